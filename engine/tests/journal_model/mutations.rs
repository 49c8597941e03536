//! The rules of the journal, one line each. The model keeps all of them or all but one.
//!
//! Invariant: each rule is asked for at the place where it matters (`self.keeps(Rule::…)`), so that it can be found, and
//! breaking it is seen by the oracle within the number of seeds given here. Called by the model and its tests.

macro_rules! rules {
    ($($(#[doc = $text:literal])+ $name:ident = $seeds:literal,)+) => {
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum Rule { $($(#[doc = $text])+ $name,)+ }

        /// Every rule, and the seeds within which its loss must be seen.
        pub(crate) const RULES: &[(Rule, u64)] = &[$((Rule::$name, $seeds),)+];
    };
}

rules! {
    // The redo log.
    /// A position is acknowledged as durable only after the flush that covers it.
    FlushBeforeDurable = 20,
    /// A flush that failed stops the device; it is opened again and replayed, the flush is never repeated (I6).
    FailedFlushStops = 20,
    /// What opening finds may be in the page cache only: everything is flushed before it is relied on.
    FlushAtOpen = 50,
    /// At most four groups are in flight.
    BoundedInFlight = 200,
    /// An invalid group that something later calls durable is corruption; it is skipped and named, nothing is cut.
    LookOn = 200,
    /// After a cut the log goes on in a new segment with a fresh salt.
    FreshSegmentAfterCut = 1500,
    /// The peer's durable position is compared on resume: a target behind it has lost durable records.
    PeerGuard = 400,
    /// The apply worker waits at a gap until it is filled or given up.
    WaitAtGap = 400,

    /// It also waits for the last record it applied, if that is lost: it may be a mark that ends the epoch.
    WaitForLastApplied = 10000,

    // Apply.
    /// The undo run is flushed before the target is written (I1, barrier 1).
    UndoBeforeTarget = 20,
    /// The target is flushed before APPLIED is recorded (barrier 2).
    TargetBeforeApplied = 20,
    /// A block is captured once in an undo epoch (I2).
    FirstTouchWins = 20,
    /// A before-image is of the whole block, however little of it is written.
    WholeBlocks = 20,
    /// A window never spans an undo epoch (I4).
    WindowInsideEpoch = 20,
    /// An image from the redo log stands for no block that was rolled back since.
    RedoImageNotAcrossRollback = 50,
    /// An image from the redo log stands for no block whose history has a gap since.
    RedoImageNotAcrossGap = 6000,

    // Undo epochs.
    /// The edit that ends an epoch is flushed before anything of the next one is written.
    EpochEditFirst = 20,
    /// An epoch ends only at a mark that was placed after this opening, or that the manifest names.
    NoNewEndOnReplay = 50,
    /// The edit that ends an epoch says that all of it is applied, whatever became of the APPLIED record.
    EndIsApplied = 100,
    /// A mark that one disk has passed inside its epoch ends the epoch of no other.
    PassedMarkStays = 6000,
    /// A point is listed when its mark is durable on every disk of the machine.
    EveryDiskOfPoint = 20,

    // Views.
    /// The base of a block is the earliest run of an epoch at or after the point's, not after only.
    BaseFromOwnEpoch = 20,
    /// A lost record makes holes of what it may have written.
    GapIsHole = 400,
    /// An image that fails its check is a hole; no newer image and no live block takes its place.
    BadImageIsHole = 20,

    // Corrupt undo runs.
    /// An invalid frame before the undo length that APPLIED names is a hole, not a torn tail.
    NamedFrameIsHole = 20,
    /// After a cut, an uncaptured block that carries any redo record not yet applied is a hole.
    WrittenUncapturedIsHole = 400,
    /// A view takes such a block for a hole too, from the moment of opening.
    ViewsSeeSuspects = 400,
    /// That comparison is made sector by sector with every record, not with the window's merged block.
    CompareEveryRecord = 400,
    /// That a run was cut is written down before it is cut.
    CutIsRecorded = 200,

    // Segments, thinning, expiry.
    /// Redo records are freed only after the target was flushed past them (I3).
    FreeOnlyApplied = 400,
    /// Redo records are freed only when they are older than the any-write window.
    FreeOnlyOld = 20,
    /// They are kept back to the start of the oldest epoch that the window touches.
    FreeWholeEpochs = 20,
    /// What a freed segment said last about each disk is carried into the manifest.
    CarryApplied = 100,
    /// What waits in a segment that is freed is carried to the head of the log.
    CarryWhatWaits = 50,
    /// The copy is flushed before the segment it came from is freed.
    CarryBeforeFree = 200,
    /// What was carried and is not applied is missed when it cannot be read, though its first segment is gone.
    CarriedAreMissed = 1500,
    /// Points inside an epoch are listed only while the log has all of that epoch.
    NoPointsWithoutLog = 200,
    /// What is given up is written down before APPLIED goes past it.
    LostBeforePassed = 200,
    /// Points behind a loss promise less until the disk was compared.
    LossDegradesPoints = 200,
    /// Of two images the older one wins.
    OlderImageWins = 50,
    /// A hole is an image too: it wins over a newer one.
    MergeKeepsHoles = 100,
    /// A merged run is flushed before the manifest names it.
    MergeBeforeEdit = 50,
    /// Inputs are unlinked after the edit that drops them is flushed.
    EditBeforeUnlink = 800,
    /// Pinned points are never merged across.
    PinsStay = 100,
    /// The oldest run expires first.
    OldestExpires = 100,

    // Growth and damage.
    /// A point has the size that its disk had behind its last record.
    PointsKeepTheirSize = 100,
    /// A rollback over a growth takes what is behind the old end back, too.
    RollbackTakesAllBlocks = 400,
    /// What is found damaged is written down.
    DamageIsWritten = 200,
    /// A damaged image concerns no point that has an older image of its block.
    OlderImagesHide = 1500,
    /// A merge hands on the damage that points outside the merged run need.
    DamageIsHandedOn = 400,

    // Bulk and rollback.
    /// Bulk progress is recorded after the target was flushed.
    BulkFlushFirst = 200,
    /// Bulk bypasses the journal only while the disk has no point.
    NoBypassWithPoints = 20,
    /// A rollback begins when all that is durable is applied.
    RollbackAfterDrain = 50,
    /// A rollback keeps before-images like any other epoch.
    RollbackCaptures = 50,
    /// A rollback that was cut short is taken up again.
    RollbackRestarts = 50,
    /// The manifest names a rollback's before-images before their blocks are written.
    RollbackNamesFrames = 6000,
    /// Nothing that a rollback under way still reads is freed, merged or expired.
    RollbackPins = 400,
}
