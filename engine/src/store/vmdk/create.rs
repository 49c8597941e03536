//! Making a new VMDK: extents first, the descriptor last, so that half a disk is never taken for one.
//!
//! Invariants: no existing file is touched; the space check comes before the first file; what was made is removed when
//! a later step fails. Sparse extents get all their tables at once, as every other writer does, so that only foreign
//! files ever lack one. Units: bytes unless named. Called by `store::target`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::VmdkKind;
use super::error::TargetError;
use super::keeper::random_cid;
use crate::format::vmdk::descriptor::{
    Access, AdapterType, DESCRIPTOR_BYTES_MAX, Descriptor, DiskUuid, Extent, ExtentKind, NewDescriptor,
    extent_sizes,
};
use crate::format::vmdk::sparse::{
    Directory, FILE_SECTORS_MAX, FLAG_NEWLINES, FLAG_REDUNDANT, GRAIN_SECTORS_DEFAULT, SparseHeader,
    TABLE_SECTORS,
};
use crate::io::WriteAt;
use crate::limits::DISK_BYTES_MAX;
use crate::store::files::Files;
use crate::units::{SECTOR_BYTES, SectorRange};

/// Sectors kept for an embedded descriptor: 10 KiB, as other writers do.
const DESCRIPTOR_SECTORS: u64 = 20;

/// What a new disk is to be.
#[derive(Clone, Debug)]
pub struct CreateSpec {
    /// Its kind.
    pub kind: VmdkKind,
    /// Its size, whole sectors.
    pub size_bytes: u64,
    /// The controller in the descriptor.
    pub adapter: AdapterType,
    /// The UUID the machine will see; random when not given.
    pub uuid: Option<DiskUuid>,
    /// Bytes of the same medium that are promised to others already (sparse files that have still to grow).
    pub reserved_bytes: u64,
}

impl CreateSpec {
    /// A disk of a kind and size with everything else by default.
    #[must_use]
    pub fn new(kind: VmdkKind, size_bytes: u64) -> Self {
        Self { kind, size_bytes, adapter: AdapterType::default(), uuid: None, reserved_bytes: 0 }
    }
}

/// Makes the files of a new disk; all durable when this returns.
///
/// # Errors
/// [`TargetError::Exists`], [`TargetError::NoSpace`], sizes no such disk can have, and what the system refuses.
pub fn create_vmdk(
    opener: &Arc<dyn Files>,
    path: &Path,
    spec: &CreateSpec,
) -> Result<Descriptor, TargetError> {
    let plan = Plan::new(path, spec)?;
    for file in plan.files() {
        if opener.facts(&file)?.is_some() {
            return Err(TargetError::Exists { path: file });
        }
    }
    if let Some(free) = opener.free_bytes(path)? {
        // A sparse target holds data too; it is only cheaper until it does.
        let needed = spec.size_bytes.saturating_add(spec.reserved_bytes);
        if needed > free {
            return Err(TargetError::NoSpace { path: path.into(), needed, free });
        }
    }
    let mut made = Vec::new();
    plan.make(&**opener, &mut made).inspect_err(|_| {
        for file in made.iter().rev() {
            // The first error is the one to report; a file that cannot be removed shows up at the next attempt.
            let _ = opener.remove(file);
        }
    })?;
    Ok(plan.descriptor)
}

/// Everything about a new disk that is decided before its first file is made.
struct Plan {
    path: PathBuf,
    kind: VmdkKind,
    descriptor: Descriptor,
    /// Files of the extents and their sectors, in disk order.
    extents: Vec<(PathBuf, u64)>,
}

impl Plan {
    fn new(path: &Path, spec: &CreateSpec) -> Result<Self, TargetError> {
        let invalid = |what: String| TargetError::Invalid { path: path.into(), what };
        let size = spec.size_bytes;
        if size == 0 || !size.is_multiple_of(SECTOR_BYTES) || size > DISK_BYTES_MAX {
            return Err(invalid(format!(
                "{size} bytes are no disk: whole sectors, at most {DISK_BYTES_MAX} bytes"
            )));
        }
        let sectors = size / SECTOR_BYTES;
        if spec.kind.is_sparse() && !spec.kind.is_split() && sparse_sectors_max(sectors) > FILE_SECTORS_MAX {
            let what = "one sparse file ends at 2 TiB: use twoGbMaxExtentSparse, vmfs or monolithicFlat";
            return Err(invalid(what.into()));
        }
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let stem = name
            .strip_suffix(".vmdk")
            .filter(|stem| !stem.is_empty())
            .ok_or_else(|| invalid("the name of a VMDK is UTF-8 and ends in .vmdk".into()))?;
        let names = extent_names(spec.kind, stem);
        let extents: Vec<Extent> = extent_sizes(spec.kind.is_split(), sectors)
            .zip(names)
            .map(|(sectors, file)| Extent {
                access: Access::ReadWrite,
                sectors,
                kind: match spec.kind {
                    VmdkKind::Vmfs => ExtentKind::Vmfs,
                    kind if kind.is_sparse() => ExtentKind::Sparse,
                    _ => ExtentKind::Flat,
                },
                file: Some(file),
                offset: 0,
            })
            .collect();
        let descriptor = describe(path, spec, &extents)?;
        let extents = extents
            .into_iter()
            .map(|extent| (path.with_file_name(extent.file.unwrap_or_default()), extent.sectors))
            .collect();
        Ok(Self { path: path.into(), kind: spec.kind, descriptor, extents })
    }

    fn files(&self) -> impl Iterator<Item = PathBuf> + '_ {
        let descriptor = (self.kind != VmdkKind::MonolithicSparse).then(|| self.path.clone());
        self.extents.iter().map(|(file, _)| file.clone()).chain(descriptor)
    }

    fn make(&self, opener: &dyn Files, made: &mut Vec<PathBuf>) -> Result<(), TargetError> {
        for (file, sectors) in &self.extents {
            if self.kind.is_sparse() {
                let text = self.descriptor.text();
                let embedded = (self.kind == VmdkKind::MonolithicSparse).then_some(text.as_bytes());
                make_sparse(opener, file, *sectors, embedded, made)?;
            } else {
                opener.create(file, sectors * SECTOR_BYTES)?;
                made.push(file.clone());
            }
        }
        if self.kind != VmdkKind::MonolithicSparse {
            opener.replace(&self.path, self.descriptor.text().as_bytes())?;
            made.push(self.path.clone());
        }
        Ok(())
    }
}

fn describe(path: &Path, spec: &CreateSpec, extents: &[Extent]) -> Result<Descriptor, TargetError> {
    let no_randomness = |source| TargetError::system("get random numbers for", path, source);
    let mut random = [0_u8; 32];
    getrandom::fill(&mut random).map_err(|error| no_randomness(std::io::Error::other(error.to_string())))?;
    let (long, uuid) = random.split_at(16);
    let (mut long_content_id, mut uuid_bytes) = ([0; 16], [0; 16]);
    long_content_id.copy_from_slice(long);
    uuid_bytes.copy_from_slice(uuid);
    let new = NewDescriptor {
        create_type: spec.kind.create_type(),
        extents,
        cid: random_cid(0).map_err(no_randomness)?,
        long_content_id,
        uuid: spec.uuid.unwrap_or(DiskUuid::from_random(uuid_bytes)),
        adapter: spec.adapter,
        hardware_version: 14,
    };
    let descriptor = new.build().map_err(|source| TargetError::Descriptor { path: path.into(), source })?;
    let room = match spec.kind {
        VmdkKind::MonolithicSparse => (DESCRIPTOR_SECTORS * SECTOR_BYTES) as usize,
        _ => DESCRIPTOR_BYTES_MAX,
    };
    let got = descriptor.text().len();
    if got > room {
        let what = format!("its descriptor would have {got} bytes, {room} are possible: use a shorter name");
        return Err(TargetError::Invalid { path: path.into(), what });
    }
    Ok(descriptor)
}

/// File names of the extents of a kind, as VMware gives them.
pub(super) fn extent_names(kind: VmdkKind, stem: &str) -> impl Iterator<Item = String> {
    let stem = stem.to_owned();
    (1..).map(move |number| match kind {
        VmdkKind::MonolithicFlat | VmdkKind::Vmfs => format!("{stem}-flat.vmdk"),
        VmdkKind::TwoGbMaxExtentFlat => format!("{stem}-f{number:03}.vmdk"),
        VmdkKind::MonolithicSparse => format!("{stem}.vmdk"),
        VmdkKind::TwoGbMaxExtentSparse => format!("{stem}-s{number:03}.vmdk"),
    })
}

/// The layout of a new extent: header, descriptor, redundant directory and tables, directory and tables, grains.
fn new_header(sectors: u64, embedded: bool) -> SparseHeader {
    let mut header = SparseHeader {
        version: 1,
        flags: FLAG_NEWLINES | FLAG_REDUNDANT,
        capacity: sectors,
        grain_sectors: GRAIN_SECTORS_DEFAULT,
        descriptor: embedded.then(|| SectorRange::new(1, 1 + DESCRIPTOR_SECTORS)),
        redundant_directory: None,
        directory: Directory::InFooter,
        overhead: 0,
        unclean: false,
        compression: 0,
    };
    let redundant = header.descriptor.map_or(1, |range| range.end);
    let copy_sectors = header.directory_sectors() + header.table_count() * TABLE_SECTORS;
    header.redundant_directory = Some(redundant);
    header.directory = Directory::At(redundant + copy_sectors);
    header.overhead = (redundant + 2 * copy_sectors).next_multiple_of(GRAIN_SECTORS_DEFAULT);
    header
}

/// Sectors a new sparse file has when it is full.
fn sparse_sectors_max(sectors: u64) -> u64 {
    let header = new_header(sectors, true);
    header.overhead + header.grain_count() * header.grain_sectors
}

pub(super) fn make_sparse(
    opener: &dyn Files,
    file: &Path,
    sectors: u64,
    embedded: Option<&[u8]>,
    made: &mut Vec<PathBuf>,
) -> Result<(), TargetError> {
    let header = new_header(sectors, embedded.is_some());
    let directory = |at: u64| {
        let first_table = at + header.directory_sectors();
        let mut bytes: Vec<u8> = (0..header.table_count())
            .flat_map(|table| ((first_table + table * TABLE_SECTORS) as u32).to_le_bytes())
            .collect();
        bytes.resize((header.directory_sectors() * SECTOR_BYTES) as usize, 0);
        (at * SECTOR_BYTES, bytes)
    };
    let mut pieces = vec![(0, header.encode().to_vec())];
    pieces.extend(header.redundant_directory.map(directory));
    if let Directory::At(at) = header.directory {
        pieces.push(directory(at));
    }
    if let (Some(text), Some(place)) = (embedded, header.descriptor) {
        let mut bytes = text.to_vec();
        bytes.resize(place.bytes() as usize, 0);
        pieces.push((place.byte_start(), bytes));
    }
    opener.create(file, header.overhead * SECTOR_BYTES)?;
    made.push(file.to_owned());
    let mut out = opener.open(file, true)?;
    let writes: Vec<_> = pieces.iter().map(|(offset, data)| WriteAt { offset: *offset, data }).collect();
    out.write(&writes)?;
    Ok(out.flush()?)
}
