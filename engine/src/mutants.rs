//! Deliberate bugs in the real code, one at a time, to prove that the tests would see them.
//!
//! Each is a line `mutant(Mutant::Name)` at the place it breaks. Without the feature `sim`, and so in what is shipped,
//! that is `false` at compile time and nothing is left of it. With it, a test puts one in force for its own thread by
//! [`with`]; nobody else can.
//!
//! Some rules are a second line: what they refuse, another one has refused before. Broken alone, these change nothing
//! that can be seen, and so are no mutants here: the chain that the target compares with its own, and the agent with
//! the target's (the agent has noticed the other session's generation before); one NACK for a gap instead of one for each
//! (in a lane that keeps its order a gap comes behind damage only, which has its own); bulk that is not
//! written twice in one pass (the agent sends nothing twice in one, as long as a GRANT can name all that is settled).
//!
//! Invariants: none is in force unless a test says so; each names who judges it and within how many seeds it must be
//! caught. Units: seeds. Called by `proto` and `store`; judged by `engine/tests/sim.rs` and
//! `engine/tests/journal_model/`; `make sim-mutants` prints the table.

/// Who must catch a bug.
#[cfg(feature = "sim")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Judge {
    /// A rule of the simulator's checker.
    Simulator,
    /// The executable model of the journal, to which the store is held.
    Model,
}

/// What is known of a bug.
#[cfg(feature = "sim")]
#[derive(Clone, Copy, Debug)]
pub struct Known {
    /// The bug.
    pub mutant: Mutant,
    /// What it does.
    pub text: &'static str,
    /// Who must catch it.
    pub judge: Judge,
    /// Within how many seeds, counted from 0.
    pub within: u64,
}

macro_rules! mutants {
    ($($judge:ident { $(#[doc = $text:literal] $name:ident = $within:literal,)+ })+) => {
        /// A bug.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Mutant { $($(#[doc = $text] $name,)+)+ }

        /// Every bug.
        #[cfg(feature = "sim")]
        pub const MUTANTS: &[Known] = &[$($(
            Known { mutant: Mutant::$name, text: $text, judge: Judge::$judge, within: $within },
        )+)+];
    };
}

mutants! {
    Simulator {
        /// The agent does nothing about a NACK.
        ForgetNack = 1000,
        /// After a resume the agent gives sequences out again that wait to be sent.
        ReuseSequence = 100,
        /// With the connection the agent forgets what is not durable.
        ForgetUndurable = 100,
        /// The agent does not send every other mark, and counts it as sent.
        DropMark = 100,
        /// The agent does not notice that another session had the disk open.
        IgnoreOtherSession = 400,
        /// Answers to the work of an older walk count for the one that runs.
        LateAnswers = 2000,
        /// A compare pass that was asked for is forgotten with the connection.
        ForgetWantedPass = 2000,
        /// The agent ends a pass when all is sent, not when all is durable.
        EndPassEarly = 100,
        /// The agent sends without credit.
        SpendBeyondCredit = 100,
        /// What a target lost is sent again in the wrong order.
        GraceReversed = 2000,
        /// What a target lost is not sent again.
        GraceForgotten = 2000,
        /// The process server lets batches leave that were compressed first.
        RelayReorders = 400,
        /// The process server passes on credit beyond its own window.
        RelayCreditTwice = 100,
        /// The target acknowledges what came in while a checkpoint ran.
        AcknowledgeEarly = 100,
        /// The target acknowledges marks before a checkpoint recorded them.
        MarkEarly = 100,
        /// The target says of bulk that it is durable when it was accepted.
        BulkEarly = 100,
        /// The target grants a generation before it is durable.
        GrantEarly = 100,
        /// The target grants a generation twice.
        ReuseGeneration = 100,
        /// The target takes batches of any generation and session.
        AcceptOldGeneration = 400,
        /// The target goes on over a gap in the sequence.
        ContinueOverGap = 100,
        /// The target takes a batch a second time.
        AcceptTwice = 2000,
        /// The target writes the records of a batch in reverse order.
        ReverseRecords = 400,
        /// Bulk overwrites what delta wrote since the pass began.
        BulkOverDelta = 100,
        /// A new pass counts what the one before had settled.
        KeepSettled = 400,
        /// The target gives credit twice.
        CreditTwice = 100,
    }
    Model {
        /// Barrier 1: before-images are not flushed before the target is written.
        UndoUnflushed = 26,
        /// Barrier 2: the target is not flushed before it counts as applied.
        TargetUnflushed = 26,
        /// The redo log does not flush its groups.
        GroupUnflushed = 26,
        /// Redo is released although it is not applied.
        ReleaseUnapplied = 26,
        /// In a merge the newer image wins.
        MergeNewestWins = 26,
        /// A rollback that was cut short is not taken up again.
        ForgetRollback = 40,
    }
}

/// Whether this bug is in force. Without the feature `sim` it never is.
#[cfg(not(feature = "sim"))]
pub(crate) const fn mutant(_: Mutant) -> bool {
    false
}

#[cfg(feature = "sim")]
thread_local! {
    static IN_FORCE: std::cell::Cell<Option<Mutant>> = const { std::cell::Cell::new(None) };
}

/// Whether this bug is in force on this thread.
#[cfg(feature = "sim")]
pub(crate) fn mutant(asked: Mutant) -> bool {
    IN_FORCE.get() == Some(asked)
}

/// Does `play` with a bug in force on this thread, and on no other; it ends with `play`, also by a panic.
#[cfg(feature = "sim")]
pub fn with<T>(mutant: Option<Mutant>, play: impl FnOnce() -> T) -> T {
    struct Before(Option<Mutant>);
    impl Drop for Before {
        fn drop(&mut self) {
            IN_FORCE.set(self.0);
        }
    }
    let _before = Before(IN_FORCE.replace(mutant));
    play()
}
