//! What the agent's protocol core tells its driver.
//!
//! Invariant: every event is about one thing that happened; those that want an answer say which. Units: sectors,
//! sequences. Made by [`super::agent`] only.

use super::agent_disk::MarkNews;
use super::pass::{PassAction, Sink};
use crate::format::batch::MarkLabel;
use crate::format::message::{ErrorCode, MarkRequest, PassCause, PassMode, Policy, SourceId};
use crate::units::{DiskId, Sequence};

/// What the agent's driver is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AgentEvent {
    /// The session may be used.
    Ready,
    /// The target offers a disk; answer with [`Agent::open`](super::agent::Agent::open) or leave it.
    Offered {
        /// The disk.
        disk: DiskId,
        /// The source it is to be read from.
        source: SourceId,
        /// Its size at the target.
        size_sectors: u64,
    },
    /// The disk is open; a pass follows unless the mode is [`PassMode::Done`].
    Opened {
        /// The disk.
        disk: DiskId,
        /// What the target needs.
        mode: PassMode,
    },
    /// Something to do for a pass; answer with the same epoch.
    Work {
        /// The disk.
        disk: DiskId,
        /// Names the walk; an answer with an older one is ignored.
        epoch: u64,
        /// Where the chunk's records will go, which bounds their length.
        sink: Sink,
        /// The newest delta sequence now; to be handed back with bulk data read from now on.
        as_of: Sequence,
        /// What.
        action: PassAction,
    },
    /// The whole disk is on the target.
    Synced {
        /// The disk.
        disk: DiskId,
    },
    /// A scan round's mark is durable.
    ScanDone {
        /// The disk.
        disk: DiskId,
    },
    /// A scan round that was begun by [`Agent::begin_scan_to_mark`](super::agent::Agent::begin_scan_to_mark) has submitted all it read: place its mark.
    ScanRead {
        /// The disk.
        disk: DiskId,
    },
    /// A mark is durable.
    Marked {
        /// The disk.
        disk: DiskId,
        /// What was said of it.
        label: MarkLabel,
    },
    /// A mark will never be durable: the stream it stood in was given up.
    MarkLost {
        /// The disk.
        disk: DiskId,
        /// What was said of it.
        label: MarkLabel,
    },
    /// The machine's policy, at every session and whenever it changes.
    Policy(Policy),
    /// The target wants a point of the machine: place its marks, or say why not with [`Agent::refuse_mark`](super::agent::Agent::refuse_mark).
    MarkRequested(MarkRequest),
    /// A compare pass was asked for, and why.
    Resync {
        /// The disk.
        disk: DiskId,
        /// Why.
        cause: PassCause,
    },
    /// The target lost these sequences after it had called them durable; they are sent again.
    TargetLost {
        /// The disk.
        disk: DiskId,
        /// The first of them.
        from: Sequence,
        /// The last of them.
        to: Sequence,
    },
    /// The disk was fenced or refused and stays stopped until it is offered again.
    Stopped {
        /// The disk.
        disk: DiskId,
        /// The other end's code.
        code: ErrorCode,
        /// The other end's words.
        text: String,
    },
    /// The target paused or warned; nothing to do.
    Warned {
        /// The disk.
        disk: DiskId,
        /// The other end's code.
        code: ErrorCode,
        /// The other end's words.
        text: String,
    },
}

impl AgentEvent {
    pub(super) const fn of_mark(disk: DiskId, news: MarkNews) -> Self {
        match news {
            MarkNews::Durable(label) => Self::Marked { disk, label },
            MarkNews::Lost(label) => Self::MarkLost { disk, label },
        }
    }
}
