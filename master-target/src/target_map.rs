//! The CRC map of a running disk's target: kept right around our own writes, compared with the target by the scrub.
//!
//! The map begins when the scrub first looks at a disk whose initial sync is done and whose before-images are kept, so
//! filling a disk costs nothing. From then on every window says what it will write before it does.
//!
//! Invariants: a target is written only when the map has durably forgotten what will be overwritten, or is gone; where
//! the scrub is off no map is left behind that would not follow our writes. Units: blocks. Used by `journaled`, on the
//! disk's own thread.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use reprotect_engine::io::{BlockFile, ByteRange, ReadAt};
use reprotect_engine::store::crc_map::{Checked, CrcMap, MapOwner, map_path};
use reprotect_engine::store::files::Files;
use reprotect_engine::store::journal::entry::Content;
use reprotect_engine::store::journal::undo::BlockRange;
use reprotect_engine::store::journal::window::Window;
use reprotect_engine::store::journal::{Journal, JournalError};
use reprotect_engine::units::{BLOCK_BYTES, BLOCK_SECTORS, DiskId, SECTOR_BYTES};

/// Pages that were written to are settled this long after the last time: hot ones are marked once in that time.
const SETTLE_EVERY: Duration = Duration::from_secs(60);

/// Pages that may be marked in a minute, 64 MiB of them: writes all over a large disk would cost too much, so the map is
/// given up and begun again later.
const MARKS_MAX: u64 = 16_384;
/// How long it is then left alone.
const HOLD: Duration = Duration::from_secs(3600);

/// The map of one target.
pub(crate) struct TargetMap {
    map: Option<CrcMap>,
    /// One that must not come back, and is not surely gone.
    going: Option<PathBuf>,
    files: Arc<dyn Files>,
    folder: PathBuf,
    owner: MapOwner,
    enabled: bool,
    /// A window was announced and is not written and flushed yet; it may have failed halfway.
    writing: bool,
    settled: Instant,
    /// Pages that were marked since then.
    marks: (Instant, u64),
    /// No map is begun before.
    hold: Option<Instant>,
}

impl TargetMap {
    /// The map of a disk as the last run left it; taken away where the scrub is off.
    ///
    /// # Errors
    /// When it cannot be opened or removed.
    pub(crate) fn open(
        journal: &Journal,
        disk: DiskId,
        size_sectors: u64,
        enabled: bool,
    ) -> Result<Self, JournalError> {
        let (files, folder) = (Arc::clone(journal.files()), journal.folder().to_owned());
        let owner = MapOwner { journal: journal.id(), disk, size_sectors };
        let path = map_path(&folder, disk);
        let mut map = None;
        if enabled && files.facts(&path)?.is_some() {
            map = Some(CrcMap::open(&*files, &folder, owner)?);
        } else {
            files.remove(&path)?;
        }
        let now = Instant::now();
        let (marks, hold) = ((now, 0), None);
        Ok(Self {
            map,
            going: None,
            files,
            folder,
            owner,
            enabled,
            writing: false,
            settled: now,
            marks,
            hold,
        })
    }

    /// Everything may be written: the map begins anew when the scrub next looks.
    ///
    /// # Errors
    /// When it cannot be removed; nothing must be written then.
    pub(crate) fn forget_all(&mut self) -> Result<(), JournalError> {
        if let Some(map) = self.map.take() {
            self.going = Some(map.path().to_owned());
        }
        if let Some(path) = &self.going {
            self.files.remove_durably(path)?;
            self.going = None;
        }
        Ok(())
    }

    /// A window will be written.
    ///
    /// # Errors
    /// When the map can neither be told nor removed; nothing must be written then.
    pub(crate) fn before(&mut self, window: &Window) -> Result<(), JournalError> {
        if self.going.is_some() {
            self.forget_all()?;
        }
        let Some(map) = &mut self.map else { return Ok(()) };
        let blocks: Vec<BlockRange> = window
            .blocks()
            .iter()
            .map(|range| BlockRange::new(range.start / BLOCK_SECTORS, range.end / BLOCK_SECTORS))
            .collect();
        // What was written before is flushed, unless that window failed and this one tries again.
        let flushed = !std::mem::replace(&mut self.writing, true);
        let full = if map.is_full() && flushed { map.settle() } else { Ok(()) };
        match full.and_then(|()| map.before(&blocks)) {
            Ok(marked) => self.count(marked),
            Err(error) => self.give_up(&error),
        }
    }

    /// Bounds what the map costs.
    fn count(&mut self, marked: u64) -> Result<(), JournalError> {
        if self.marks.0.elapsed() >= SETTLE_EVERY {
            self.marks = (Instant::now(), 0);
        }
        self.marks.1 += marked;
        if self.marks.1 <= MARKS_MAX {
            return Ok(());
        }
        tracing::info!(
            disk = %self.owner.disk,
            "so much is written all over the disk that its CRC map is given up for an hour; outside writes are not noticed meanwhile"
        );
        self.hold = Some(Instant::now() + HOLD);
        self.forget_all()
    }

    /// The window was written and flushed.
    pub(crate) fn after(&mut self, window: &Window) {
        self.writing = false;
        let Some(map) = &mut self.map else { return };
        let zeros = [0; BLOCK_BYTES as usize];
        for run in window.runs() {
            let mut block = run.range.start.div_ceil(BLOCK_SECTORS);
            while let Some(bytes) = block_bytes(block, self.owner.size_sectors)
                && block * BLOCK_SECTORS + bytes / SECTOR_BYTES <= run.range.end
            {
                let from = ((block * BLOCK_SECTORS - run.range.start) * SECTOR_BYTES) as usize;
                let data = match &run.content {
                    Content::Data(data) => data.get(from..from + bytes as usize),
                    Content::Zeros => zeros.get(..bytes as usize),
                };
                map.after(block, data.unwrap_or_default());
                block += 1;
            }
        }
    }

    /// Nothing is being written and everything is flushed: what is known goes to the medium now and then.
    pub(crate) fn idle(&mut self) {
        if self.settled.elapsed() >= SETTLE_EVERY {
            self.settle();
        }
    }

    /// Writes what is known; the target is flushed.
    pub(crate) fn settle(&mut self) {
        if self.writing {
            return; // pages stay open, which says nothing of them
        }
        self.settled = Instant::now();
        let settled = self.map.as_mut().map_or(Ok(()), CrcMap::settle);
        if let Err(error) = settled
            && let Err(error) = self.give_up(&error)
        {
            // Pages that were to be written are open on the medium, or torn, and say nothing.
            tracing::warn!(disk = %self.owner.disk, %error, "the CRC map could not be removed");
        }
    }

    /// Compares a part of the target, whole blocks of it, with the map; `None` while the scrub is off.
    ///
    /// # Errors
    /// When the target or the map cannot be read.
    pub(crate) fn check(
        &mut self,
        target: &mut dyn BlockFile,
        range: ByteRange,
    ) -> Result<Option<Checked>, JournalError> {
        if !self.enabled || self.hold.is_some_and(|until| Instant::now() < until) {
            return Ok(None);
        }
        let map = match &mut self.map {
            Some(map) => map,
            None => self.map.insert(CrcMap::open(&*self.files, &self.folder, self.owner)?),
        };
        let mut data = vec![0; range.len() as usize];
        for part in target.allocated(range)? {
            let (from, to) = ((part.start - range.start) as usize, (part.end - range.start) as usize);
            let data = data.get_mut(from..to).unwrap_or_default();
            target.read(&mut [ReadAt { offset: part.start, data }])?;
        }
        debug_assert!(range.start.is_multiple_of(BLOCK_BYTES), "whole blocks are compared");
        map.check(range.start / BLOCK_BYTES, &data).map(Some)
    }

    fn give_up(&mut self, error: &JournalError) -> Result<(), JournalError> {
        tracing::warn!(disk = %self.owner.disk, %error, "the CRC map of the target is given up; the scrub begins a new one");
        self.forget_all()
    }
}

/// Bytes of a block; `None` behind the end of the disk.
fn block_bytes(block: u64, size_sectors: u64) -> Option<u64> {
    let sectors = size_sectors.checked_sub(block * BLOCK_SECTORS).filter(|sectors| *sectors > 0)?;
    Some(sectors.min(BLOCK_SECTORS) * SECTOR_BYTES)
}
