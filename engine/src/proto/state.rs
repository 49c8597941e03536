//! The transition tables: which state may follow which, in one place, asserted on every change.
//!
//! Invariant: an edge that is not in the table is a bug of ours, never of a peer: what a peer may send in a state is
//! checked before. The matrices are printed by the tests below, so that a change shows in review.

/// Declares a state machine: its states and, for each, the states that may follow.
macro_rules! state_table {
    ($(#[$doc:meta])* pub enum $name:ident { $($(#[$sdoc:meta])* $state:ident => [$($next:ident),*],)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$sdoc])* $state,)* }

        impl $name {
            /// Every state.
            pub const ALL: &[Self] = &[$(Self::$state),*];

            /// Whether `next` may follow.
            #[must_use]
            pub fn may_become(self, next: Self) -> bool {
                match self { $(Self::$state => [$(Self::$next),*].contains(&next),)* }
            }

            /// Changes the state.
            ///
            /// # Panics
            /// When the table has no such edge.
            pub fn become_state(&mut self, next: Self) {
                assert!(self.may_become(next), "illegal transition of {}: {self:?} to {next:?}", stringify!($name));
                *self = next;
            }

            /// The state's name, for messages.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$state => stringify!($state),)* }
            }
        }
    };
}

state_table! {
    /// The agent's end of a session.
    pub enum AgentLink {
        /// No connection.
        Down => [HelloSent],
        /// HELLO is on its way.
        HelloSent => [ProofSent, Down],
        /// The proof is on its way.
        ProofSent => [Ready, Down],
        /// Disks may be opened.
        Ready => [Down],
    }
}

state_table! {
    /// A disk at the agent.
    pub enum AgentDiskPhase {
        /// Offered by the target, not opened.
        Offered => [Opening, Growing, Closed],
        /// OPEN_DISK is on its way.
        Opening => [Open, Closed, Stopped],
        /// Data may flow; opened anew where the stream must be given up.
        Open => [Opening, Growing, Closed, Stopped],
        /// The source is larger than the target, which is to grow: it is offered anew, or refused.
        Growing => [Offered, Closed, Stopped],
        /// The session is gone; what was not durable waits.
        Closed => [Offered],
        /// Fenced or refused: stays so until offered again.
        Stopped => [Offered, Closed],
    }
}

state_table! {
    /// The target's end of a session.
    pub enum TargetLink {
        /// Nothing came yet.
        Fresh => [ProofWanted],
        /// The nonce is on its way.
        ProofWanted => [Ready],
        /// The agent is who it says.
        Ready => [],
    }
}

state_table! {
    /// A disk at the target.
    pub enum TargetDiskPhase {
        /// Nobody has it open.
        Closed => [Opening, Failed],
        /// A new generation is being made durable.
        Opening => [Opening, Open, Closed, Failed],
        /// Data may flow.
        Open => [Opening, Closed, Failed],
        /// A write or flush failed (I6): nothing more is written until a person looked and the daemon reopened it.
        Failed => [],
    }
}

state_table! {
    /// A relayed session.
    pub enum RelayLink {
        /// Waiting for the agent's HELLO.
        Fresh => [Dialling, Over],
        /// Connecting to the target.
        Dialling => [Waiting, Over],
        /// Waiting for the target's answer.
        Waiting => [Open, Over],
        /// Frames pass.
        Open => [Over],
        /// One side is gone.
        Over => [],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_matrix_is_what_was_reviewed() {
        let mut seen = String::new();
        macro_rules! matrix {
            ($($name:ident)*) => {$(
                for from in $name::ALL {
                    let next: Vec<_> = $name::ALL.iter().filter(|to| from.may_become(**to)).map(|to| to.name()).collect();
                    seen.push_str(&format!("{} {} > {}\n", stringify!($name), from.name(), next.join(" ")));
                }
            )*};
        }
        matrix!(AgentLink AgentDiskPhase TargetLink TargetDiskPhase RelayLink);
        assert_eq!(seen, include_str!("../../tests/golden/state_matrices.txt"));
    }

    #[test]
    #[should_panic(expected = "illegal transition")]
    fn an_edge_outside_the_table_is_an_assertion() {
        AgentLink::Down.clone_and(|state| state.become_state(AgentLink::Ready));
    }

    impl AgentLink {
        fn clone_and(mut self, change: impl FnOnce(&mut Self)) {
            change(&mut self);
        }
    }
}
