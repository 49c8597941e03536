//! Opening disks off the session's task: when they are offered, when they were missing, when they could not be read.
//!
//! Invariants: opening may wait for the device and for others to be listed, so it has a thread of its own and its
//! result comes back as a message; a disk is found by its identity, so that one that came back under another name is
//! the same disk, and another one under its name is not. Called by `machine`.

use std::sync::Arc;
use std::time::Instant;

use reprotect_engine::format::message::SourceId;
use reprotect_engine::limits::CHUNK_BYTES;
use reprotect_engine::units::DiskId;
use tokio::sync::mpsc;

use crate::budget::Budget;
use crate::config::DisksConfig;
use crate::disks::SourceKind;
use crate::faults::PROBE_PAUSE;
use crate::reader::{DiskReader, FromDisk, ReaderSetup};
use crate::sources::{self, Found, KnownSource};
use crate::throttle::Throttle;

/// Why a disk is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// The target offers it, with this size.
    Offer {
        /// The target's size.
        size_sectors: u64,
    },
    /// It could not be read.
    Probe,
}

/// What came of it.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) disk: DiskId,
    pub(crate) source: SourceId,
    /// The reader and the path it reads.
    pub(crate) result: Result<(DiskReader, String), String>,
    /// Its memory, as handed in.
    pub(crate) budget: Arc<Budget>,
    /// All sources, where they were looked for again.
    pub(crate) found: Option<Found>,
}

/// A protected disk that this machine does not have at the moment.
#[derive(Debug)]
pub(crate) struct Missing {
    pub(crate) source: SourceId,
    /// Size at the target.
    pub(crate) size_sectors: u64,
    pub(crate) problem: String,
    /// When to look again; `None` while that is under way.
    pub(crate) again_at: Option<Instant>,
}

impl Missing {
    pub(crate) fn new(source: SourceId, size_sectors: u64, problem: String) -> Self {
        Self { source, size_sectors, problem, again_at: Some(Instant::now() + PROBE_PAUSE) }
    }
}

/// A disk to be opened.
pub(crate) struct Opening {
    pub(crate) disk: DiskId,
    pub(crate) source: SourceId,
    /// As it was last seen; looked for again where that is `None`.
    pub(crate) known: Option<KnownSource>,
    pub(crate) disks: DisksConfig,
    pub(crate) budget: Arc<Budget>,
    pub(crate) throttle: Arc<Throttle>,
    pub(crate) reads: mpsc::UnboundedSender<(DiskId, FromDisk)>,
}

impl Opening {
    /// Opens it on a thread for blocking work; the result goes to `opened`.
    pub(crate) fn spawn(self, opened: mpsc::UnboundedSender<Opened>) {
        tokio::task::spawn_blocking(move || {
            // A failed send means that the agent is stopping.
            let _ = opened.send(self.open());
        });
    }

    fn open(self) -> Opened {
        let (disk, source) = (self.disk, self.source);
        let budget = Arc::clone(&self.budget);
        let mut found = None;
        let known = match &self.known {
            Some(known) => Ok(known.clone()),
            None => sources::find(&self.disks).map_err(|error| format!("{error:#}")).and_then(|sources| {
                let known = sources.sources.get(&source).cloned();
                found = Some(sources);
                known.ok_or_else(|| {
                    "the disk that is to be protected is not in this machine, or `disks.exclude` names it; attach it again, or correct [disks]; it is looked for every 15 s".to_owned()
                })
            }),
        };
        let result = known.and_then(|known| self.start(&known));
        Opened { disk, source, result, budget, found }
    }

    fn start(self, known: &KnownSource) -> Result<(DiskReader, String), String> {
        let (disk, reads) = (self.disk, self.reads);
        let path = known.source.path.clone();
        let text = path.display().to_string();
        let setup = ReaderSetup {
            path,
            is_device: known.source.kind == SourceKind::BlockDevice,
            budget: self.budget,
            throttle: self.throttle,
            deliver: Box::new(move |news| {
                // A failed send means that the agent is stopping.
                let _ = reads.send((disk, news));
            }),
        };
        DiskReader::start(setup).map(|reader| (reader, text)).map_err(|error| error.to_string())
    }
}

/// The part of the memory that one of `disks` gets.
pub(crate) fn share_bytes(memory_bytes: u64, disks: usize) -> u64 {
    (memory_bytes / disks.max(1) as u64).max(CHUNK_BYTES)
}
