//! What each block of a target holds, as a CRC: so that rot, and writes by others, are noticed.
//!
//! The order around a write, and why a crash anywhere in it leaves "unknown" and never something wrong:
//!
//! | step | what | if it ends here |
//! |---:|---|---|
//! | 1 | pages of the blocks are marked open, durably ([`CrcMap::before`]) | an open page says nothing |
//! | 2 | the target is written and flushed | |
//! | 3 | the new CRCs are noted, in memory ([`CrcMap::after`]) | |
//! | 4 | much later, for many pages at once, pages are written with what is known ([`CrcMap::settle`]) | a torn page says nothing |
//!
//! A page is marked once for many writes, so that hot blocks cost a flush only now and then.
//!
//! Invariants: an entry on the medium that is not unknown is the CRC of what was last written there by us, or of what a
//! [`CrcMap::check`] found there when nothing was known; pages are settled only while the target is flushed. Memory: the
//! open pages, 4 KiB each, at most [`OPEN_PAGES_MAX`]. Units: blocks, bytes. Called by the thread that owns the target.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::files::Files;
use super::journal::JournalError;
use super::journal::undo::BlockRange;
use crate::format::crc_map::{
    MAP_MAGIC, MapHeader, PAGE_ENTRIES, UNKNOWN, decode_page, encode_page, entry_of,
};
use crate::format::segment::JournalId;
use crate::io::{BlockFile, ReadAt, WriteAt};
use crate::units::{BLOCK_BYTES, BLOCK_SECTORS, DiskId};

/// Pages that may be open: 16 MiB of memory, about 16 GiB of the disk.
pub const OPEN_PAGES_MAX: usize = 4096;
/// What the names of the files begin with.
pub const MAP_PREFIX: &str = "crc-";

/// A CRC map.
pub struct CrcMap {
    path: PathBuf,
    file: Box<dyn BlockFile>,
    salt: u64,
    blocks: u64,
    /// Pages that are marked open on the medium, with what is known by now.
    open: BTreeMap<u64, Vec<u32>>,
    /// It is only read: nothing is learnt.
    is_read_only: bool,
}

impl std::fmt::Debug for CrcMap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CrcMap")
            .field("path", &self.path)
            .field("open", &self.open.len())
            .finish_non_exhaustive()
    }
}

/// Where the map of a disk is.
#[must_use]
pub fn map_path(folder: &Path, disk: DiskId) -> PathBuf {
    folder.join(map_name(disk))
}

/// The name of a disk's map.
#[must_use]
pub fn map_name(disk: DiskId) -> String {
    format!("{MAP_PREFIX}{disk}")
}

/// Whose map it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapOwner {
    /// The journal in whose folder it is.
    pub journal: JournalId,
    /// The disk.
    pub disk: DiskId,
    /// Its size.
    pub size_sectors: u64,
}

/// What a check of some blocks found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Checked {
    /// Blocks that are as they were written.
    pub same: u64,
    /// Blocks of which nothing was known; now it is.
    pub learnt: u64,
    /// Blocks that hold something else.
    pub different: Vec<BlockRange>,
}

impl CrcMap {
    /// Opens the map of a disk; one that is missing, damaged or of something else is begun anew, knowing nothing.
    ///
    /// # Errors
    /// When the file cannot be read, made or removed.
    pub fn open(files: &dyn Files, folder: &Path, owner: MapOwner) -> Result<Self, JournalError> {
        let path = map_path(folder, owner.disk);
        let blocks = owner.size_sectors.div_ceil(BLOCK_SECTORS);
        let bytes = (1 + blocks.div_ceil(PAGE_ENTRIES)) * BLOCK_BYTES;
        if let Some(known) = Self::known(files, folder, owner, false)? {
            return Ok(known);
        }
        files.remove(&path)?;
        files.create(&path, bytes)?;
        let mut file = files.open(&path, true)?;
        let salt = super::journal::random_u64(&path)?;
        let MapOwner { journal, disk, size_sectors } = owner;
        let header = MapHeader { magic: MAP_MAGIC, crc: 0, journal, disk, salt, size_sectors };
        file.write(&[WriteAt { offset: 0, data: &header.to_block() }])?;
        file.flush()?;
        Ok(Self { path, file, salt, blocks, open: BTreeMap::new(), is_read_only: false })
    }

    /// The map of a disk as it stands, to be read; `None` where there is none, or one that is damaged or of something else.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn open_to_read(
        files: &dyn Files,
        folder: &Path,
        owner: MapOwner,
    ) -> Result<Option<Self>, JournalError> {
        Self::known(files, folder, owner, true)
    }

    fn known(
        files: &dyn Files,
        folder: &Path,
        owner: MapOwner,
        is_read_only: bool,
    ) -> Result<Option<Self>, JournalError> {
        let path = map_path(folder, owner.disk);
        let blocks = owner.size_sectors.div_ceil(BLOCK_SECTORS);
        let bytes = (1 + blocks.div_ceil(PAGE_ENTRIES)) * BLOCK_BYTES;
        if files.facts(&path)?.is_none_or(|facts| facts.size_bytes != bytes) {
            return Ok(None);
        }
        let Ok(header) = MapHeader::open(&files.read_head(&path, BLOCK_BYTES as usize)?) else {
            return Ok(None);
        };
        let MapHeader { journal, disk, size_sectors, salt, .. } = header;
        if (MapOwner { journal, disk, size_sectors }) != owner {
            return Ok(None);
        }
        let file = files.open(&path, !is_read_only)?;
        Ok(Some(Self { path, file, salt, blocks, open: BTreeMap::new(), is_read_only }))
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Blocks will be written: from when this returns until they are known again, nothing is said of them. Answers how
    /// many pages had to be marked.
    ///
    /// # Errors
    /// When that cannot be made durable; the blocks must not be written then.
    pub fn before(&mut self, blocks: &[BlockRange]) -> Result<u64, JournalError> {
        let touched: BTreeSet<u64> = blocks
            .iter()
            .filter(|range| !range.is_empty())
            .flat_map(|range| range.start / PAGE_ENTRIES..=(range.end - 1) / PAGE_ENTRIES)
            .collect();
        let new: Vec<u64> = touched.into_iter().filter(|page| !self.open.contains_key(page)).collect();
        if !new.is_empty() {
            let pages = self.read_pages(&new)?;
            let mark = |page: &u64| (*page, encode_page(self.salt, *page, true, &[]));
            self.write_pages(&new.iter().map(mark).collect::<Vec<_>>())?;
            self.file.flush()?;
            self.open.extend(pages);
        }
        for range in blocks {
            for block in range.start..range.end {
                self.note(block, UNKNOWN);
            }
        }
        Ok(new.len() as u64)
    }

    /// The block holds `data`, flushed; it was announced to [`Self::before`].
    pub fn after(&mut self, block: u64, data: &[u8]) {
        self.note(block, entry_of(data));
    }

    fn note(&mut self, block: u64, entry: u32) {
        if let Some(page) = self.open.get_mut(&(block / PAGE_ENTRIES))
            && let Some(place) = page.get_mut((block % PAGE_ENTRIES) as usize)
        {
            *place = entry;
        }
    }

    /// Whether so many pages are open that they should be settled.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.open.len() >= OPEN_PAGES_MAX
    }

    /// Writes what is known of the open pages. Everything written to the target must be flushed.
    ///
    /// # Errors
    /// When it cannot be written; the pages then stay open on the medium, or are torn, which says the same.
    pub fn settle(&mut self) -> Result<(), JournalError> {
        const AT_ONCE: usize = 256;
        while !self.open.is_empty() {
            let pages: Vec<(u64, Vec<u8>)> = self
                .open
                .iter()
                .take(AT_ONCE)
                .map(|(page, entries)| (*page, encode_page(self.salt, *page, false, entries)))
                .collect();
            self.write_pages(&pages)?;
            for (page, _) in &pages {
                self.open.remove(page);
            }
        }
        Ok(self.file.flush()?)
    }

    /// Compares what blocks hold, from `first` on, with what is known; where nothing is, it is learnt. `data` is what
    /// the target holds there now; a last block may be short.
    ///
    /// # Errors
    /// When the map cannot be read or written.
    pub fn check(&mut self, first: u64, data: &[u8]) -> Result<Checked, JournalError> {
        let mut checked = Checked::default();
        let mut at = first;
        let end = (first + (data.len() as u64).div_ceil(BLOCK_BYTES)).min(self.blocks);
        while at < end {
            let page = at / PAGE_ENTRIES;
            let stop = end.min((page + 1) * PAGE_ENTRIES);
            let from = ((at - first) * BLOCK_BYTES) as usize;
            let part = data.get(from..).unwrap_or_default();
            self.check_page(page, at, stop, part, &mut checked)?;
            at = stop;
        }
        Ok(checked)
    }

    fn check_page(
        &mut self,
        page: u64,
        start: u64,
        end: u64,
        data: &[u8],
        checked: &mut Checked,
    ) -> Result<(), JournalError> {
        let held = self.open.remove(&page);
        let was_open = held.is_some();
        let mut entries = match held {
            Some(entries) => entries,
            None => self.read_page(page)?,
        };
        let before = checked.learnt;
        for (block, bytes) in (start..end).zip(data.chunks(BLOCK_BYTES as usize)) {
            let found = entry_of(bytes);
            match entries.get_mut((block % PAGE_ENTRIES) as usize) {
                Some(entry) if *entry == UNKNOWN => {
                    *entry = found;
                    checked.learnt += 1;
                }
                Some(entry) if *entry == found => checked.same += 1,
                _ => push_block(&mut checked.different, block),
            }
        }
        if was_open {
            self.open.insert(page, entries);
        } else if checked.learnt > before && !self.is_read_only {
            // Nothing of it is being written: it may be written as it is.
            let bytes = encode_page(self.salt, page, false, &entries);
            self.write_pages(&[(page, bytes)])?;
        }
        Ok(())
    }

    fn read_page(&mut self, page: u64) -> Result<Vec<u32>, JournalError> {
        Ok(self.read_pages(&[page])?.pop().map(|(_, entries)| entries).unwrap_or_default())
    }

    fn read_pages(&mut self, pages: &[u64]) -> Result<Vec<(u64, Vec<u32>)>, JournalError> {
        let mut bytes = vec![0; pages.len() * BLOCK_BYTES as usize];
        let places = pages.iter().map(|page| (1 + page) * BLOCK_BYTES);
        let mut reads: Vec<ReadAt<'_>> = places
            .zip(bytes.chunks_mut(BLOCK_BYTES as usize))
            .map(|(offset, data)| ReadAt { offset, data })
            .collect();
        self.file.read(&mut reads)?;
        let unknown = || vec![UNKNOWN; PAGE_ENTRIES as usize];
        let blocks = bytes.chunks(BLOCK_BYTES as usize);
        let entries = |(page, block): (&u64, &[u8])| {
            (*page, decode_page(block, self.salt, *page).unwrap_or_else(unknown))
        };
        Ok(pages.iter().zip(blocks).map(entries).collect())
    }

    fn write_pages(&mut self, pages: &[(u64, Vec<u8>)]) -> Result<(), JournalError> {
        let writes: Vec<WriteAt<'_>> =
            pages.iter().map(|(page, data)| WriteAt { offset: (1 + page) * BLOCK_BYTES, data }).collect();
        Ok(self.file.write(&writes)?)
    }
}

/// Adds a block to an ascending list, joined to the last one where they touch.
fn push_block(list: &mut Vec<BlockRange>, block: u64) {
    match list.last_mut() {
        Some(last) if last.end == block => last.end = block + 1,
        _ => list.push(BlockRange::new(block, block + 1)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::store::files::memory::MemoryFiles;

    const OWNER: MapOwner =
        MapOwner { journal: [1; 16], disk: DiskId([2; 16]), size_sectors: 3000 * BLOCK_SECTORS - 3 };

    fn open(files: &MemoryFiles) -> CrcMap {
        CrcMap::open(&*files.opener(), Path::new("/r"), OWNER).unwrap()
    }

    fn block(value: u8) -> Vec<u8> {
        vec![value; BLOCK_BYTES as usize]
    }

    fn write(map: &mut CrcMap, number: u64, value: u8) {
        map.before(&[BlockRange::new(number, number + 1)]).unwrap();
        map.after(number, &block(value));
    }

    #[test]
    fn what_was_written_is_known_and_what_is_unknown_is_learnt() {
        let files = MemoryFiles::default();
        let mut map = open(&files);
        write(&mut map, 1500, 7);
        assert_eq!(map.check(1500, &block(7)).unwrap(), Checked { same: 1, ..Checked::default() });
        map.settle().unwrap();
        drop(map);
        let mut map = open(&files);
        let checked = map.check(1499, &[block(9), block(8), block(9)].concat()).unwrap();
        assert_eq!(checked, Checked { same: 0, learnt: 2, different: vec![BlockRange::new(1500, 1501)] });
        // The last block of the disk is short.
        let last = &block(3)[..5 * 512];
        assert_eq!(map.check(2999, last).unwrap().learnt, 1);
        drop(map);
        assert_eq!(open(&files).check(2999, last).unwrap().same, 1);
    }

    #[test]
    fn a_map_of_another_disk_or_size_and_a_damaged_one_are_begun_anew() {
        let files = MemoryFiles::default();
        let mut map = open(&files);
        write(&mut map, 5, 7);
        map.settle().unwrap();
        let path = map.path().to_owned();
        drop(map);
        files.poke(&path, 20, &[0xff]);
        assert_eq!(open(&files).check(5, &block(8)).unwrap().learnt, 1);
        let other = MapOwner { journal: [9; 16], ..OWNER };
        let mut map = CrcMap::open(&*files.opener(), Path::new("/r"), other).unwrap();
        assert_eq!(map.check(5, &block(9)).unwrap().learnt, 1);
    }

    #[test]
    fn open_pages_are_bounded_by_who_asks() {
        let files = MemoryFiles::default();
        let owner =
            MapOwner { size_sectors: (OPEN_PAGES_MAX as u64 + 1) * PAGE_ENTRIES * BLOCK_SECTORS, ..OWNER };
        let mut map = CrcMap::open(&*files.opener(), Path::new("/r"), owner).unwrap();
        map.before(&[BlockRange::new(0, owner.size_sectors / BLOCK_SECTORS - PAGE_ENTRIES)]).unwrap();
        assert!(map.is_full());
        map.settle().unwrap();
        assert!(!map.is_full());
    }

    #[derive(Clone, Debug)]
    enum Step {
        /// Block, value, and whether it is written whole.
        Write(u64, u8, bool),
        Check(u64),
        Settle,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let place = 1010..1025_u64; // around a border of pages
        proptest::collection::vec(
            prop_oneof![
                4 => (place.clone(), 1..5_u8, any::<bool>()).prop_map(|(at, value, whole)| Step::Write(at, value, whole)),
                3 => place.prop_map(Step::Check),
                1 => Just(Step::Settle),
            ],
            1..25,
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
        /// Target and map lose power together, the target having flushed what `after` was told; whatever the map then
        /// knows is what the target holds, torn blocks included.
        #[test]
        fn after_a_crash_anywhere_nothing_known_is_wrong(steps in steps(), seed in any::<u64>()) {
            const TARGET: &str = "/t/disk";
            let files = MemoryFiles::default();
            files.put(TARGET, &vec![0; 1100 * BLOCK_BYTES as usize]);
            let before = files.snapshot();
            let mut map = open(&files);
            let mut target = files.opener().open(Path::new(TARGET), true).unwrap();
            let start = files.trace().len();
            let mut now: BTreeMap<u64, u8> = BTreeMap::new();
            for step in &steps {
                match *step {
                    Step::Write(at, value, whole) => {
                        map.before(&[BlockRange::new(at, at + 1)]).unwrap();
                        let data = block(value);
                        target.write(&[WriteAt { offset: at * BLOCK_BYTES, data: &data }]).unwrap();
                        target.flush().unwrap();
                        now.insert(at, value);
                        if whole {
                            map.after(at, &data);
                        }
                    }
                    Step::Check(at) => {
                        let data = block(now.get(&at).copied().unwrap_or(0));
                        prop_assert_eq!(map.check(at, &data).unwrap().different, []);
                    }
                    Step::Settle => map.settle().unwrap(),
                }
            }
            let trace = files.trace();
            for events in start..=trace.len() {
                let mut state = seed ^ events as u64 | 1;
                let lands = move || {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    state >> 40 & 1 == 0
                };
                let after = before.crashed(&trace, events, lands);
                let content = after.bytes(TARGET);
                let mut map = open(&after);
                for at in 1005..1030_usize {
                    let data = &content[at * BLOCK_BYTES as usize..(at + 1) * BLOCK_BYTES as usize];
                    prop_assert_eq!(map.check(at as u64, data).unwrap().different, []);
                }
            }
        }
    }
}
