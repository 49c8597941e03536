//! What to do about an error: every typed error of the engine answers with one of three severities.
//!
//! Invariant: an error keeps its `source()` and what was got and expected; it is logged once, where it is handled.

/// The answer every typed error gives: what the caller is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Severity {
    /// Try again: nothing is wrong with the data (a lost connection, a busy peer, a full queue).
    Retry,
    /// Continuity is lost: the affected ranges must be compared or sent again; other disks go on.
    Resync,
    /// A person must look: wrong device, failed flush, forked history, refused authorisation.
    Stop,
}

/// Implemented by every typed error.
pub trait Answer: std::error::Error {
    /// What the caller is to do.
    fn severity(&self) -> Severity;
}
