//! Making a VMDK larger, in an order that leaves a disk of the old or the new size wherever it ends.
//!
//! | kind | order | what switches it |
//! |---|---|---|
//! | one flat file | the file is lengthened | the descriptor is replaced |
//! | split flat | the last file is filled up to 2047 MiB, further files are made | the descriptor is replaced |
//! | split sparse | the last extent is grown as below, further files are made | the descriptor is replaced |
//! | one sparse file | new tables, directories that name the old ones and the new, a new descriptor, flush | one sector: the header |
//!
//! Invariants: nothing that the disk of the old size consists of is overwritten before the switch; what lies behind the
//! old end reads as zeros; a file that an interrupted growth left behind is named by nobody and stays. Nobody has the disk
//! open, and it was closed in order. Units: sectors unless named. Called by `store::target`.

use std::path::Path;
use std::sync::Arc;

use super::VmdkKind;
use super::create::{extent_names, make_sparse};
use super::error::TargetError;
use super::keeper::Home;
use super::open::{CheckedVmdk, check_locks, check_vmdk, open_vmdk};
use super::tables::{Grain, LoadError, Tables};
use crate::format::vmdk::descriptor::{Access, Descriptor, Extent, ExtentKind, SPLIT_EXTENT_SECTORS};
use crate::format::vmdk::sparse::{
    Directory, FILE_SECTORS_MAX, HEADER_BYTES, SparseHeader, TABLE_ENTRIES, TABLE_SECTORS,
};
use crate::io::{BlockFile, ByteRange, WriteAt};
use crate::limits::DISK_BYTES_MAX;
use crate::store::files::Files;
use crate::units::{SECTOR_BYTES, SectorRange};

/// Remedy where the way a disk is laid out is in the way.
const CONVERT: &str =
    "convert the disk, for instance with qemu-img convert -O vmdk, and protect with the copy";

/// Makes a disk larger; durable when this returns. A disk that has the size already is left alone.
///
/// # Errors
/// [`TargetError`], which names the reason and the remedy: a smaller size, no space, a layout that leaves no room. The
/// disk then has its old size, or the new one.
pub fn grow_vmdk(opener: &Arc<dyn Files>, path: &Path, size_bytes: u64) -> Result<(), TargetError> {
    let checked = check_vmdk(&**opener, path)?;
    check_locks(&**opener, path, &checked.descriptor)?;
    let (old, new) = (checked.descriptor.sectors(), size_bytes / SECTOR_BYTES);
    if !size_bytes.is_multiple_of(SECTOR_BYTES) || size_bytes > DISK_BYTES_MAX {
        let what = format!("{size_bytes} bytes are no disk: whole sectors, at most {DISK_BYTES_MAX} bytes");
        return Err(TargetError::Invalid { path: path.into(), what });
    }
    if new == old {
        return Ok(());
    }
    if new < old {
        let what = format!("it has {old} sectors and would have {new}");
        let remedy = "a disk is never made smaller: protect the source anew, with a new target";
        return Err(TargetError::CannotGrow { path: path.into(), what, remedy });
    }
    if let Some(free) = opener.free_bytes(path)? {
        let needed = (new - old) * SECTOR_BYTES;
        if needed > free {
            return Err(TargetError::NoSpace { path: path.into(), needed, free });
        }
    }
    let opened = open_vmdk(opener, path, false)?;
    if !opened.repair.is_nothing() {
        let what = "it was not closed in order".to_owned();
        let remedy = "let the master target open and repair it first: restart it";
        return Err(TargetError::CannotGrow { path: path.into(), what, remedy });
    }
    drop(opened);
    Growth { opener: &**opener, path, checked }.run(new)
}

/// The growth of one disk.
struct Growth<'a> {
    opener: &'a dyn Files,
    path: &'a Path,
    checked: CheckedVmdk,
}

impl Growth<'_> {
    fn refuse(&self, what: impl Into<String>) -> TargetError {
        TargetError::CannotGrow { path: self.path.into(), what: what.into(), remedy: CONVERT }
    }

    fn run(&self, new: u64) -> Result<(), TargetError> {
        let kind = self.checked.kind;
        let mut extents = self.checked.descriptor.extents().to_vec();
        let mut missing = new - self.checked.descriptor.sectors();
        let Some(last) = extents.last_mut() else { return Err(self.refuse("it has no extent")) };
        let before = last.sectors;
        let room = if kind.is_split() { SPLIT_EXTENT_SECTORS.saturating_sub(before) } else { missing };
        last.sectors += missing.min(room);
        missing -= last.sectors - before;
        let last = last.clone();
        if kind == VmdkKind::MonolithicSparse {
            return self.grow_sparse(self.path, last.sectors, Some(&self.described(&extents)?));
        }
        if last.sectors > before {
            let file = self.path.with_file_name(last.file.as_deref().unwrap_or_default());
            if kind.is_sparse() {
                self.grow_sparse(&file, last.sectors, None)?;
            } else {
                self.lengthen(&file, &last, before)?;
            }
        }
        self.add_extents(&mut extents, missing)?;
        let text = self.described(&extents)?.text();
        Ok(self.opener.replace(self.path, text.as_bytes())?)
    }

    fn described(&self, extents: &[Extent]) -> Result<Descriptor, TargetError> {
        let failed = |source| TargetError::Descriptor { path: self.path.into(), source };
        let mut descriptor = self.checked.descriptor.clone();
        descriptor.set_extents(extents).map_err(failed)?;
        descriptor.drop_change_tracking(false);
        Ok(descriptor)
    }

    /// Lengthens a flat file; what an interrupted growth, or somebody else, left behind its end is cut off first.
    fn lengthen(&self, file: &Path, extent: &Extent, before: u64) -> Result<(), TargetError> {
        let same = |other: &&Extent| other.file == extent.file;
        if self.checked.descriptor.extents().iter().filter(same).count() > 1 {
            return Err(self.refuse("its last extent shares a file with another one"));
        }
        let missing = || TargetError::MissingFile { path: file.into(), by: self.path.into() };
        let end = (extent.offset + before) * SECTOR_BYTES;
        if self.opener.facts(file)?.ok_or_else(missing)?.size_bytes > end {
            self.opener.resize(file, end)?;
        }
        Ok(self.opener.resize(file, (extent.offset + extent.sectors) * SECTOR_BYTES)?)
    }

    /// Makes further files of a split disk, under names that are free.
    fn add_extents(&self, extents: &mut Vec<Extent>, mut missing: u64) -> Result<(), TargetError> {
        let kind = self.checked.kind;
        let name = self.path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let taken = self.opener.neighbours(self.path)?;
        let names = extent_names(kind, name.strip_suffix(".vmdk").unwrap_or(&name));
        let mut free = names.skip(extents.len()).filter(|name| !taken.contains(name));
        while missing > 0 {
            let (sectors, file) = (missing.min(SPLIT_EXTENT_SECTORS), free.next().unwrap_or_default());
            let path = self.path.with_file_name(&file);
            if kind.is_sparse() {
                make_sparse(self.opener, &path, sectors, None, &mut Vec::new())?;
            } else {
                self.opener.create(&path, sectors * SECTOR_BYTES)?;
            }
            let kind = if kind.is_sparse() { ExtentKind::Sparse } else { ExtentKind::Flat };
            extents.push(Extent { access: Access::ReadWrite, sectors, kind, file: Some(file), offset: 0 });
            missing -= sectors;
        }
        Ok(())
    }

    /// Grows a sparse extent; with the descriptor that it embeds, if it does.
    fn grow_sparse(
        &self,
        path: &Path,
        sectors: u64,
        descriptor: Option<&Descriptor>,
    ) -> Result<(), TargetError> {
        let bad_header = |source| TargetError::Header { path: path.into(), source };
        let header = SparseHeader::decode(&self.opener.read_head(path, HEADER_BYTES)?).map_err(bad_header)?;
        if header.capacity >= sectors {
            return Ok(()); // by a growth that was interrupted; nothing was written behind the old end since
        }
        let mut file = self.opener.open(path, true)?;
        let (tables, _) = Tables::load(&mut *file, &header, 0).map_err(|error| match error {
            LoadError::Block(error) => error.into(),
            LoadError::Damaged(what) => TargetError::Damaged { path: path.into(), what },
        })?;
        let plan = SparsePlan::new(self, &header, &tables, sectors, descriptor)?;
        drop(file); // nobody may have it open while its length changes
        self.opener.resize(path, plan.end * SECTOR_BYTES)?;
        let mut file = self.opener.open(path, true)?;
        for sectors in &plan.zeros {
            let start = sectors.byte_start();
            file.zero(ByteRange { start, end: start + sectors.bytes() })?;
        }
        let writes: Vec<_> = plan
            .writes
            .iter()
            .map(|(sector, data)| WriteAt { offset: sector * SECTOR_BYTES, data })
            .collect();
        file.write(&writes)?;
        file.flush()?;
        file.write(&[WriteAt { offset: 0, data: &plan.header.encode() }])?; // the switch
        Ok(file.flush()?)
    }
}

/// What is written to grow a sparse extent.
struct SparsePlan {
    header: SparseHeader,
    /// The file's length then.
    end: u64,
    /// New tables, and what the last grain holds behind the old end.
    zeros: Vec<SectorRange>,
    /// Directories and descriptor, by their sectors.
    writes: Vec<(u64, Vec<u8>)>,
}

impl SparsePlan {
    fn new(
        growth: &Growth<'_>,
        old: &SparseHeader,
        tables: &Tables,
        sectors: u64,
        descriptor: Option<&Descriptor>,
    ) -> Result<Self, TargetError> {
        let grains = old.grain_count();
        if (grains..old.table_count() * TABLE_ENTRIES).any(|grain| tables.grain(grain) != Grain::Hole) {
            return Err(growth.refuse("its tables name grains behind its end"));
        }
        let mut header = SparseHeader { capacity: sectors, ..old.clone() };
        let (mut zeros, mut writes) = (Vec::new(), Vec::new());
        let used = old.capacity % old.grain_sectors;
        if let Grain::At(at) = tables.grain(grains - 1)
            && used > 0
        {
            zeros.push(SectorRange::new(at + used, at + old.grain_sectors));
        }
        let mut end = tables.append();
        if header.table_count() > old.table_count() {
            let (primary, redundant) = tables.directories();
            let mut copy = |entries| {
                let (at, places) = (end, TablePlaces::new(end, old, &header));
                writes.push((at, places.directory(entries)));
                end = places.end;
                zeros.push(SectorRange::new(places.first, places.end));
                at
            };
            let (redundant, primary) = (redundant.map(&mut copy), copy(primary));
            (header.redundant_directory, header.directory) = (redundant, Directory::At(primary));
        }
        end = end.next_multiple_of(header.grain_sectors);
        if end + (header.grain_count() - tables.stored_count()) * header.grain_sectors > FILE_SECTORS_MAX {
            return Err(growth.refuse("one sparse file ends at 2 TiB"));
        }
        if let (Some(descriptor), Home::Embedded(place)) = (descriptor, &growth.checked.home) {
            let text = descriptor.text().into_bytes();
            let place = other_half(*place, text.len() as u64)
                .ok_or_else(|| growth.refuse("there is no room for a second descriptor in its header"))?;
            header.descriptor = Some(place);
            let mut bytes = text;
            bytes.resize(place.bytes() as usize, 0);
            writes.push((place.start, bytes));
        }
        Ok(Self { header, end, zeros, writes })
    }
}

/// A new directory and, behind it, the tables that the old one does not have.
struct TablePlaces {
    directory_bytes: u64,
    added: u64,
    /// The first of the new tables.
    first: u64,
    end: u64,
}

impl TablePlaces {
    const fn new(at: u64, old: &SparseHeader, new: &SparseHeader) -> Self {
        let (added, first) = (new.table_count() - old.table_count(), at + new.directory_sectors());
        let directory_bytes = new.directory_sectors() * SECTOR_BYTES;
        Self { directory_bytes, added, first, end: first + added * TABLE_SECTORS }
    }

    /// The directory: the old tables where they are, then the new ones.
    fn directory(&self, entries: &[u32]) -> Vec<u8> {
        let new = (0..self.added).map(|table| (self.first + table * TABLE_SECTORS) as u32);
        let mut bytes: Vec<u8> = entries.iter().copied().chain(new).flat_map(u32::to_le_bytes).collect();
        bytes.resize(self.directory_bytes as usize, 0);
        bytes
    }
}

/// Where a second descriptor of so many bytes fits beside the first: in the half of the room behind the header that the
/// first does not use. Some readers look for a descriptor in the second sector whatever the header says: there is one.
fn other_half(place: SectorRange, bytes: u64) -> Option<SectorRange> {
    let needed = bytes.div_ceil(SECTOR_BYTES);
    let half = if place.start > 1 {
        SectorRange::new(1, place.start)
    } else {
        SectorRange::new(place.start + place.len() / 2, place.end)
    };
    (half.len() >= needed && (place.start > 1 || place.len() / 2 >= needed)).then_some(half)
}

#[cfg(test)]
#[path = "grow_tests.rs"]
mod tests;
