//! The grain directory and tables of one sparse extent: loading, repair, and changes not yet on the medium.
//!
//! Invariants: after [`Tables::load`] every entry is a hole, a zeroed grain, or a grain inside the file that no other
//! entry and no table shares; [`Tables::append`] lies behind everything that is referenced, so that what is put there
//! overwrites nothing; memory holds what reads must see, pending changes included.
//! Memory: 4 B per grain in tables that are in use, 64 MiB per TiB of data at 64 KiB grains.
//! Units: sectors of the file; grains of the extent. Called by `sparse`.

use std::collections::{BTreeMap, BTreeSet};

use crate::format::vmdk::sparse::{
    Directory, FILE_SECTORS_MAX, FLAG_ZEROED_GRAINS, SparseHeader, TABLE_ENTRIES, TABLE_SECTORS,
};
use crate::io::{BlockError, BlockFile, ByteRange, ReadAt, push_range};
use crate::range_set::RangeSet;
use crate::units::{SECTOR_BYTES, SectorRange};

const ENTRIES: usize = TABLE_ENTRIES as usize;
const TABLE_BYTES: usize = ENTRIES * 4;
/// Entries in one sector of a table or directory.
const SECTOR_ENTRIES: usize = SECTOR_BYTES as usize / 4;
/// Tables that follow one another are read in runs of at most this many (1 MiB).
const READ_TABLES_MAX: usize = 512;
/// Damaged grains named one by one in a report.
const EXAMPLES_MAX: usize = 16;

/// One grain table.
type Table = [u32; ENTRIES];

/// What a grain is at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Grain {
    /// Not stored: reads as zeros.
    Hole,
    /// Stored from this sector of the file.
    At(u64),
}

/// What was found wrong and put right when an extent was opened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Repair {
    /// The extent was not closed by its last writer.
    pub unclean: bool,
    /// Entries in which the two copies of a table differed; the right one was kept.
    pub differing: u64,
    /// Tables of which one copy was lost and written anew.
    pub lost_tables: u64,
    /// Sectors of the disk whose grain could not be kept, because it lay outside the file or belonged to several
    /// places; they read as zeros and **must be compared or sent again**.
    pub dropped: RangeSet,
    /// The first few dropped entries: grain of the extent and the sector it claimed.
    pub examples: Vec<(u64, u32)>,
}

impl Repair {
    /// Whether nothing was wrong.
    #[must_use]
    pub fn is_nothing(&self) -> bool {
        *self == Self::default()
    }

    /// Adds what was found in another extent.
    pub(super) fn add(&mut self, other: Self) {
        self.unclean |= other.unclean;
        self.differing += other.differing;
        self.lost_tables += other.lost_tables;
        self.dropped.extend(&other.dropped);
        self.examples.extend(other.examples);
        self.examples.truncate(EXAMPLES_MAX);
    }
}

/// Why tables cannot be used.
#[derive(Debug)]
pub(super) enum LoadError {
    /// Reading failed.
    Block(BlockError),
    /// They are damaged although the extent was closed.
    Damaged(String),
}

impl From<BlockError> for LoadError {
    fn from(error: BlockError) -> Self {
        Self::Block(error)
    }
}

/// Directory and tables in memory.
pub(super) struct Tables {
    grain_sectors: u64,
    grain_count: u64,
    directories: Directories,
    /// Sector of each table's primary and redundant copy; 0 for none. Without redundancy the second stays empty.
    primary: Vec<u32>,
    redundant: Vec<u32>,
    tables: Vec<Option<Box<Table>>>,
    append: u64,
    /// Sectors of each table (as a bit each) that differ from the medium.
    dirty: BTreeMap<usize, u8>,
    /// Tables whose directory entries differ from the medium.
    dirty_directory: BTreeSet<usize>,
}

#[derive(Clone, Copy)]
struct Directories {
    primary: u64,
    redundant: Option<u64>,
}

impl Tables {
    /// Reads, checks and repairs (in memory) the tables of a plain extent; `base` is the extent's first disk sector.
    pub(super) fn load(
        file: &mut dyn BlockFile,
        header: &SparseHeader,
        base: u64,
    ) -> Result<(Self, Repair), LoadError> {
        let Directory::At(primary) = header.directory else {
            return Err(LoadError::Damaged("its directory is in a footer".into()));
        };
        let directories = Directories { primary, redundant: header.redundant_directory };
        let count = usize::try_from(header.table_count()).unwrap_or(usize::MAX);
        let directory = |file: &mut dyn BlockFile, at| read_entries(file, at, count);
        let mut tables = Self {
            grain_sectors: header.grain_sectors,
            grain_count: header.grain_count(),
            directories,
            primary: directory(file, directories.primary)?,
            redundant: directories.redundant.map(|at| directory(file, at)).transpose()?.unwrap_or_default(),
            tables: Vec::new(),
            append: 0,
            dirty: BTreeMap::new(),
            dirty_directory: BTreeSet::new(),
        };
        let mut check = Check {
            header,
            base,
            file_sectors: (file.size_bytes() / SECTOR_BYTES).min(FILE_SECTORS_MAX),
            repair: Repair { unclean: header.unclean, ..Repair::default() },
            differing: BTreeMap::new(),
        };
        check.directories(&mut tables)?;
        let first = read_tables(file, &tables.primary)?;
        let second = read_tables(file, &tables.redundant)?;
        check.merge(&mut tables, first, second)?;
        check.unshare(&mut tables)?;
        tables.append = tables.end_of_use(header).next_multiple_of(header.grain_sectors);
        Ok((tables, check.repair))
    }

    /// The sector behind everything that is referenced.
    fn end_of_use(&self, header: &SparseHeader) -> u64 {
        let directory_end = |at: u64| at + header.directory_sectors();
        let table_end = |at: &u32| if *at == 0 { 0 } else { u64::from(*at) + TABLE_SECTORS };
        let fixed = [
            header.overhead,
            directory_end(self.directories.primary),
            self.directories.redundant.map_or(0, directory_end),
            header.descriptor.map_or(1, |range| range.end),
        ];
        let tables = self.primary.iter().chain(&self.redundant).map(table_end);
        let grains = self.stored().map(|(_, sector)| u64::from(sector) + self.grain_sectors);
        fixed.into_iter().chain(tables).chain(grains).max().unwrap_or(0)
    }

    /// Stored grains and where they are.
    fn stored(&self) -> impl Iterator<Item = (u64, u32)> + '_ {
        self.tables.iter().zip(0_u64..).filter_map(|(table, at)| Some((table.as_deref()?, at))).flat_map(
            |(table, at)| {
                (0_u64..)
                    .zip(table)
                    .filter(|(_, sector)| **sector > 1)
                    .map(move |(entry, sector)| (at * TABLE_ENTRIES + entry, *sector))
            },
        )
    }

    /// The sector behind the file's used part: where the next grain goes, and the length of a closed file.
    pub(super) const fn append(&self) -> u64 {
        self.append
    }

    /// Sectors the file has when every grain is stored; beyond [`FILE_SECTORS_MAX`] it cannot grow.
    pub(super) fn file_sectors_max(&self) -> u64 {
        let stored = self.stored_count();
        let missing = self.primary.iter().filter(|at| **at == 0).count() as u64
            + self.redundant.iter().filter(|at| **at == 0).count() as u64;
        let growth = (self.grain_count - stored.min(self.grain_count) + missing) * self.grain_sectors;
        (self.append + growth).min(FILE_SECTORS_MAX)
    }

    /// Where the tables stand: the entries of the directory, and of its redundant copy.
    pub(super) fn directories(&self) -> (&[u32], Option<&[u32]>) {
        (&self.primary, self.is_redundant().then_some(&self.redundant))
    }

    /// How many grains are stored.
    pub(super) fn stored_count(&self) -> u64 {
        self.stored().count() as u64
    }

    /// What a grain is.
    pub(super) fn grain(&self, grain: u64) -> Grain {
        match self.entry(grain) {
            0 | 1 => Grain::Hole,
            sector => Grain::At(sector.into()),
        }
    }

    fn entry(&self, grain: u64) -> u32 {
        let (table, entry) = place(grain);
        self.tables.get(table).and_then(Option::as_deref).map_or(0, |table| table[entry])
    }

    /// First grain at or after `grain` that lies in a table in use; lets callers pass over 32 MiB of holes at once.
    pub(super) fn next_in_use(&self, grain: u64) -> u64 {
        let (table, _) = place(grain);
        match self.tables.iter().skip(table).position(Option::is_some) {
            Some(0) => grain,
            Some(ahead) => (table + ahead) as u64 * TABLE_ENTRIES,
            None => self.grain_count,
        }
    }

    /// Whether the table of a grain is not in the file yet.
    pub(super) fn lacks_table(&self, grain: u64) -> Option<usize> {
        let (table, _) = place(grain);
        self.primary.get(table).is_some_and(|at| *at == 0).then_some(table)
    }

    /// Whether there are redundant tables.
    pub(super) const fn is_redundant(&self) -> bool {
        self.directories.redundant.is_some()
    }

    /// Takes over what was written: new tables at their sectors, grains at theirs, and the new append position.
    pub(super) fn commit(&mut self, tables: &[(usize, u64)], grains: &[(u64, u64)], append: u64) {
        for (table, sector) in tables {
            self.primary[*table] = entry_of(*sector);
            if self.is_redundant() {
                self.redundant[*table] = entry_of(*sector + TABLE_SECTORS);
            }
            self.dirty_directory.insert(*table);
        }
        for (grain, sector) in grains {
            self.set(*grain, entry_of(*sector));
        }
        self.append = append;
    }

    fn set(&mut self, grain: u64, sector: u32) {
        let (table, entry) = place(grain);
        self.tables[table].get_or_insert_with(|| Box::new([0; ENTRIES]))[entry] = sector;
        *self.dirty.entry(table).or_default() |= 1 << (entry / SECTOR_ENTRIES);
    }

    /// Gives every table that has only one copy the other one at the append position; answers what to write there.
    /// They are used (entered in the directory) only after that was flushed.
    pub(super) fn restore_copies(&mut self) -> Vec<(u64, Vec<u8>)> {
        let mut writes = Vec::new();
        for table in 0..self.redundant.len() {
            let (first, second) = (self.primary[table], self.redundant[table]);
            if (first == 0) == (second == 0) {
                continue;
            }
            let sector = self.append;
            self.append += self.grain_sectors;
            let lost = if first == 0 { &mut self.primary } else { &mut self.redundant };
            lost[table] = entry_of(sector);
            writes
                .push((sector, encode(self.tables[table].as_deref().map_or(&[0; ENTRIES][..], |t| &t[..]))));
            self.dirty_directory.insert(table);
        }
        writes
    }

    /// Changed sectors of both directories, ready to write: sector of the file and bytes, neighbours joined.
    pub(super) fn directory_writes(&self) -> Vec<(u64, Vec<u8>)> {
        let sectors: BTreeSet<usize> =
            self.dirty_directory.iter().map(|table| table / SECTOR_ENTRIES).collect();
        let copies =
            [(Some(self.directories.primary), &self.primary), (self.directories.redundant, &self.redundant)];
        let mut pieces = Vec::new();
        for (at, entries) in copies {
            let Some(at) = at else { continue };
            for sector in &sectors {
                let first = sector * SECTOR_ENTRIES;
                let mut bytes = encode(&entries[first..entries.len().min(first + SECTOR_ENTRIES)]);
                bytes.resize(SECTOR_BYTES as usize, 0);
                pieces.push((at + *sector as u64, bytes));
            }
        }
        join(pieces)
    }

    /// Changed sectors of both copies of the tables, ready to write.
    pub(super) fn table_writes(&self) -> Vec<(u64, Vec<u8>)> {
        let mut pieces = Vec::new();
        for (table, sectors) in &self.dirty {
            let Some(entries) = self.tables[*table].as_deref() else { continue };
            for (sector, part) in entries.chunks(SECTOR_ENTRIES).enumerate() {
                if sectors & (1 << sector) == 0 {
                    continue;
                }
                for copy in [self.primary.get(*table), self.redundant.get(*table)].into_iter().flatten() {
                    pieces.push((u64::from(*copy) + sector as u64, encode(part)));
                }
            }
        }
        join(pieces)
    }

    /// Whether directory entries wait to be written.
    pub(super) fn has_dirty_directory(&self) -> bool {
        !self.dirty_directory.is_empty()
    }

    /// Whether table entries wait to be written.
    pub(super) fn has_dirty_tables(&self) -> bool {
        !self.dirty.is_empty()
    }

    /// The directory is on the medium.
    pub(super) fn directory_written(&mut self) {
        self.dirty_directory.clear();
    }

    /// The tables are on the medium.
    pub(super) fn tables_written(&mut self) {
        self.dirty.clear();
    }
}

/// Table and entry of a grain. Both are below 2^32, since capacity is bounded by the header's decoder.
const fn place(grain: u64) -> (usize, usize) {
    ((grain / TABLE_ENTRIES) as usize, (grain % TABLE_ENTRIES) as usize)
}

/// A sector as an entry; callers never pass [`FILE_SECTORS_MAX`], which their bounds checks guarantee.
fn entry_of(sector: u64) -> u32 {
    u32::try_from(sector).unwrap_or_else(|_| panic!("sector {sector} is beyond the 2 TiB of a sparse extent"))
}

fn encode(entries: &[u32]) -> Vec<u8> {
    entries.iter().flat_map(|entry| entry.to_le_bytes()).collect()
}

fn decode(bytes: &[u8]) -> impl Iterator<Item = u32> + '_ {
    bytes.as_chunks::<4>().0.iter().map(|entry| u32::from_le_bytes(*entry))
}

/// Sorts pieces by place and joins those that touch.
fn join(mut pieces: Vec<(u64, Vec<u8>)>) -> Vec<(u64, Vec<u8>)> {
    pieces.sort_unstable_by_key(|(at, _)| *at);
    let mut joined: Vec<(u64, Vec<u8>)> = Vec::new();
    for (at, bytes) in pieces {
        match joined.last_mut() {
            Some((start, run)) if *start + run.len() as u64 / SECTOR_BYTES == at => {
                run.extend_from_slice(&bytes)
            }
            _ => joined.push((at, bytes)),
        }
    }
    joined
}

fn read_entries(file: &mut dyn BlockFile, sector: u64, count: usize) -> Result<Vec<u32>, BlockError> {
    let mut bytes = vec![0; (count * 4).next_multiple_of(SECTOR_BYTES as usize)];
    file.read(&mut [ReadAt { offset: sector * SECTOR_BYTES, data: &mut bytes }])?;
    Ok(decode(&bytes).take(count).collect())
}

/// Reads the tables at these sectors (0: none); all-zero ones are answered as `None` too.
fn read_tables(file: &mut dyn BlockFile, sectors: &[u32]) -> Result<Vec<Option<Box<Table>>>, BlockError> {
    let mut tables = Vec::with_capacity(sectors.len());
    while tables.len() < sectors.len() {
        let rest = &sectors[tables.len()..];
        if rest[0] == 0 {
            tables.push(None);
            continue;
        }
        let step = |pair: &[u32]| pair[1] > 0 && u64::from(pair[1]) == u64::from(pair[0]) + TABLE_SECTORS;
        let run = 1 + rest.windows(2).take(READ_TABLES_MAX - 1).take_while(|pair| step(pair)).count();
        let start = u64::from(rest[0]) * SECTOR_BYTES;
        let range = ByteRange { start, end: start + (run * TABLE_BYTES) as u64 };
        // Tables of a new disk are one large hole; asking first saves reading 128 MiB of zeros per TiB.
        let mut bytes = vec![0; run * TABLE_BYTES];
        if !file.allocated(range)?.is_empty() {
            file.read(&mut [ReadAt { offset: start, data: &mut bytes }])?;
        }
        tables.extend(bytes.as_chunks::<TABLE_BYTES>().0.iter().map(|bytes| {
            (!crate::checksum::is_zero(bytes)).then(|| {
                let mut table = Box::new([0; ENTRIES]);
                table.iter_mut().zip(decode(bytes)).for_each(|(entry, value)| *entry = value);
                table
            })
        }));
    }
    Ok(tables)
}

/// First sector and length of what has its place by the header: itself, the descriptor, the directories. A damaged
/// header may place them anywhere, and nothing that is written later may lie on them.
fn fixed_places(header: &SparseHeader) -> Vec<(u64, u64)> {
    let directory = match header.directory {
        Directory::At(at) => Some(at),
        Directory::InFooter => None,
    };
    let directories = [directory, header.redundant_directory].into_iter().flatten();
    let mut places = vec![(0, 1)];
    places.extend(header.descriptor.map(|range| (range.start, range.len())));
    places.extend(directories.map(|at| (at, header.directory_sectors())));
    places
}

/// The checks of a load.
struct Check<'a> {
    header: &'a SparseHeader,
    base: u64,
    file_sectors: u64,
    repair: Repair,
    /// Grains whose copies differed, with the copy that was not taken.
    differing: BTreeMap<u64, u32>,
}

impl Check<'_> {
    /// Puts 0 for directory entries outside the file and refuses tables that are lost or shared.
    fn directories(&mut self, tables: &mut Tables) -> Result<(), LoadError> {
        let end = self.file_sectors;
        let mut places = fixed_places(self.header);
        for index in 0..tables.primary.len() {
            let (mut bad, mut good) = (0, 0);
            for copy in
                [Some(&mut tables.primary[index]), tables.redundant.get_mut(index)].into_iter().flatten()
            {
                if *copy != 0 && u64::from(*copy) + TABLE_SECTORS > end {
                    *copy = 0;
                    bad += 1;
                } else if *copy != 0 {
                    places.push((u64::from(*copy), TABLE_SECTORS));
                    good += 1;
                }
            }
            if bad > 0 && good == 0 {
                return Err(LoadError::Damaged(format!(
                    "grain table {index} lies outside the file in every copy"
                )));
            }
            self.repair.lost_tables += u64::from(good == 1 && tables.is_redundant());
        }
        places.sort_unstable();
        match places.windows(2).find(|pair| pair[0].0 + pair[0].1 > pair[1].0) {
            Some(pair) => Err(LoadError::Damaged(format!(
                "header, descriptor, directories and grain tables overlap at sector {}",
                pair[1].0
            ))),
            None => Ok(()),
        }
    }

    fn in_range(&self, entry: u32) -> bool {
        match entry {
            0 => true,
            1 if self.header.flags & FLAG_ZEROED_GRAINS != 0 => true,
            _ => {
                let start = u64::from(entry);
                let end = start + self.header.grain_sectors;
                start >= self.header.overhead
                    && end <= self.file_sectors
                    && fixed_places(self.header).iter().all(|(at, len)| end <= *at || at + len <= start)
            }
        }
    }

    /// Chooses each entry from its two copies.
    fn merge(
        &mut self,
        tables: &mut Tables,
        first: Vec<Option<Box<Table>>>,
        second: Vec<Option<Box<Table>>>,
    ) -> Result<(), LoadError> {
        let zeros = [0; ENTRIES];
        let mut second = second.into_iter();
        for (index, first) in first.into_iter().enumerate() {
            let second = second.next().flatten();
            let lost = (tables.primary[index] == 0, tables.redundant.get(index).is_none_or(|at| *at == 0));
            let (one, two) = match lost {
                (false, true) => (first.as_deref(), first.as_deref()),
                (true, false) => (second.as_deref(), second.as_deref()),
                _ => (first.as_deref(), second.as_deref()),
            };
            if one.is_none() && two.is_none() {
                tables.tables.push(None);
                continue;
            }
            let (one, two) = (one.unwrap_or(&zeros), two.unwrap_or(&zeros));
            let mut merged = Box::new([0; ENTRIES]);
            for entry in 0..ENTRIES {
                let grain = index as u64 * TABLE_ENTRIES + entry as u64;
                merged[entry] = self.choose(tables, grain, one[entry], two[entry])?;
            }
            tables.tables.push(Some(merged));
        }
        Ok(())
    }

    fn choose(&mut self, tables: &mut Tables, grain: u64, one: u32, two: u32) -> Result<u32, LoadError> {
        if grain >= self.header.grain_count() {
            return Ok(0); // beyond the capacity: whatever stands there means nothing
        }
        if one == two {
            return if self.in_range(one) { Ok(one) } else { self.drop_grain(tables, grain, one) };
        }
        self.repair.differing += 1;
        let (table, entry) = place(grain);
        *tables.dirty.entry(table).or_default() |= 1 << (entry / SECTOR_ENTRIES);
        let usable = |entry: u32| entry != 0 && self.in_range(entry);
        let (taken, other) = if usable(one) { (one, two) } else { (if usable(two) { two } else { 0 }, 0) };
        self.differing.insert(grain, if self.in_range(other) { other } else { 0 });
        if taken == 0 { self.drop_grain(tables, grain, one.max(two)) } else { Ok(taken) }
    }

    /// Gives a grain up: allowed only where a crash explains it.
    fn drop_grain(&mut self, tables: &mut Tables, grain: u64, claimed: u32) -> Result<u32, LoadError> {
        if !self.repair.unclean && !self.differing.contains_key(&grain) {
            return Err(LoadError::Damaged(format!(
                "grain {grain} claims sector {claimed}, outside the file or shared"
            )));
        }
        let start = self.base + grain * self.header.grain_sectors;
        let end = self.base + ((grain + 1) * self.header.grain_sectors).min(self.header.capacity);
        self.repair.dropped.insert(SectorRange::new(start, end));
        if self.repair.examples.len() < EXAMPLES_MAX {
            self.repair.examples.push((grain, claimed));
        }
        let (table, entry) = place(grain);
        *tables.dirty.entry(table).or_default() |= 1 << (entry / SECTOR_ENTRIES);
        Ok(0)
    }

    /// Resolves grains that share sectors with others or with a table. Entries whose copies differed yield first.
    fn unshare(&mut self, tables: &mut Tables) -> Result<(), LoadError> {
        loop {
            let shared = shared_sectors(tables);
            if shared.is_empty() {
                return Ok(());
            }
            let victims: Vec<(u64, u32)> = tables.stored().filter(|(_, at)| shared.contains(at)).collect();
            let unsure: Vec<(u64, u32)> =
                victims.iter().copied().filter(|(grain, _)| self.differing.contains_key(grain)).collect();
            let yielding = if unsure.is_empty() { victims } else { unsure };
            for (grain, claimed) in yielding {
                let other = self.differing.get(&grain).copied().unwrap_or(0);
                let value = if other > 1 && other != claimed {
                    self.differing.insert(grain, 0);
                    other
                } else {
                    self.drop_grain(tables, grain, claimed)?
                };
                let (table, entry) = place(grain);
                if let Some(table) = &mut tables.tables[table] {
                    table[entry] = value;
                }
            }
        }
    }
}

/// First sectors of grains that overlap another grain or a table.
fn shared_sectors(tables: &Tables) -> BTreeSet<u32> {
    let mut grains: Vec<u32> = tables.stored().map(|(_, at)| at).collect();
    grains.sort_unstable();
    let mut shared = BTreeSet::new();
    for pair in grains.windows(2) {
        if u64::from(pair[0]) + tables.grain_sectors > u64::from(pair[1]) {
            shared.extend(pair);
        }
    }
    for table in tables.primary.iter().chain(&tables.redundant).filter(|at| **at != 0) {
        let table = u64::from(*table);
        // A grain overlaps if it begins before the table's end and ends behind its start.
        let before = grains.partition_point(|at| u64::from(*at) < table + TABLE_SECTORS);
        shared.extend(
            grains[..before].iter().rev().take_while(|at| u64::from(**at) + tables.grain_sectors > table),
        );
    }
    shared
}

/// Adds the stored grains of `range` (bytes of the extent) to `found`, shifted by `shift` bytes.
pub(super) fn stored_ranges(tables: &Tables, range: ByteRange, shift: u64, found: &mut Vec<ByteRange>) {
    let grain_bytes = tables.grain_sectors * SECTOR_BYTES;
    let mut grain = range.start / grain_bytes;
    while grain * grain_bytes < range.end {
        let next = tables.next_in_use(grain);
        if next != grain {
            grain = next;
            continue;
        }
        if tables.grain(grain) != Grain::Hole {
            let start = range.start.max(grain * grain_bytes);
            let end = range.end.min((grain + 1) * grain_bytes);
            push_range(found, ByteRange { start: start + shift, end: end + shift });
        }
        grain += 1;
    }
}
