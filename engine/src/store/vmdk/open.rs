//! Opening an existing VMDK: descriptor, checks, extents.
//!
//! Invariants: nothing is written before all checks have passed; snapshots, foreign locks and files outside the
//! descriptor's directory are refused; every extent is at least as long as its line says. Units: bytes unless named.
//! Called by `store::target`.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use super::error::TargetError;
use super::flat::{FlatVmdk, Part};
use super::keeper::{Home, Keeper};
use super::layout::Layout;
use super::sparse::{SparseExtent, SparseVmdk};
use super::tables::{LoadError, Repair, Tables};
use super::{TargetFile, VmdkKind};
use crate::format::vmdk::descriptor::{
    Access, CID_NONE, CreateType, DESCRIPTOR_BYTES_MAX, Descriptor, Extent, ExtentKind,
};
use crate::format::vmdk::sparse::{FILE_SECTORS_MAX, HEADER_BYTES, SparseHeader};
use crate::format::vmdk::{Recognised, recognise};
use crate::io::BlockFile;
use crate::store::files::{FileFacts, Files};
use crate::units::SECTOR_BYTES;

/// An opened VMDK.
#[derive(Debug)]
pub struct OpenedVmdk {
    /// The disk.
    pub file: Box<dyn TargetFile>,
    /// Its kind.
    pub kind: VmdkKind,
    /// Its descriptor as it stood when it was opened.
    pub descriptor: Descriptor,
    /// What opening put right; nothing for flat disks.
    pub repair: Repair,
}

/// A descriptor that passed every check, not yet opened.
#[derive(Clone, Debug)]
pub struct CheckedVmdk {
    /// Its kind.
    pub kind: VmdkKind,
    /// The descriptor.
    pub descriptor: Descriptor,
    pub(super) home: Home,
}

/// Opens a VMDK by its descriptor (or the single file of a monolithic sparse one).
///
/// # Errors
/// [`TargetError`], which names the file, the reason and the remedy.
pub fn open_vmdk(opener: &Arc<dyn Files>, path: &Path, writable: bool) -> Result<OpenedVmdk, TargetError> {
    let checked = check_vmdk(&**opener, path)?;
    if writable {
        check_locks(&**opener, path, &checked.descriptor)?;
    }
    let CheckedVmdk { kind, descriptor, home } = checked;
    let open = Open { opener, path, descriptor: &descriptor, writable };
    let keeper = Keeper::new(Arc::clone(opener), path.to_owned(), descriptor.clone(), home, writable);
    let (file, repair): (Box<dyn TargetFile>, Repair) = if kind.is_sparse() {
        let disk = open.sparse(keeper)?;
        let repair = disk.repair().clone();
        (Box::new(disk), repair)
    } else {
        (Box::new(open.flat(keeper)?), Repair::default())
    };
    Ok(OpenedVmdk { file, kind, descriptor, repair })
}

/// Reads a descriptor and makes all checks that need no extent to be opened.
///
/// # Errors
/// Snapshots, unsupported kinds, descriptors that cannot be understood.
pub fn check_vmdk(opener: &dyn Files, path: &Path) -> Result<CheckedVmdk, TargetError> {
    let head = opener.read_head(path, DESCRIPTOR_BYTES_MAX + 1)?;
    let unsupported =
        |what: &str, remedy| TargetError::Unsupported { path: path.into(), what: what.into(), remedy };
    let (text, home) = match recognise(&head) {
        Recognised::Descriptor => (head, Home::File),
        Recognised::HostedSparse => {
            let header = SparseHeader::decode(&head)
                .map_err(|source| TargetError::Header { path: path.into(), source })?;
            let Some(place) = header.descriptor else {
                return Err(unsupported("one extent of a split disk", "open its descriptor file instead"));
            };
            let bytes = place.byte_start() as usize..(place.byte_start() + place.bytes()) as usize;
            let text = head.get(bytes).map(<[u8]>::to_vec).ok_or_else(|| TargetError::Damaged {
                path: path.into(),
                what: "its embedded descriptor is cut off or begins beyond the first MiB".into(),
            })?;
            (text, Home::Embedded(place))
        }
        Recognised::Cowd => return Err(snapshot(path, "a vmfsSparse (COWD) redo log")),
        Recognised::SeSparse => return Err(snapshot(path, "an SESparse redo log")),
        Recognised::Other => {
            let remedy = "name the descriptor (.vmdk), not the -flat file; a device is opened as a device";
            return Err(unsupported("no VMDK descriptor", remedy));
        }
    };
    let descriptor =
        Descriptor::parse(&text).map_err(|source| TargetError::Descriptor { path: path.into(), source })?;
    check_chain(opener, path, &descriptor)?;
    let kind = kind_of(path, &descriptor)?;
    if (kind == VmdkKind::MonolithicSparse) != matches!(home, Home::Embedded(_)) {
        let what = "a sparse disk whose descriptor is not where its kind has it";
        return Err(unsupported(what, "convert it, for instance with qemu-img convert -O vmdk"));
    }
    Ok(CheckedVmdk { kind, descriptor, home })
}

fn snapshot(path: &Path, sign: impl Into<String>) -> TargetError {
    TargetError::Snapshot { path: path.into(), sign: sign.into() }
}

/// What is read of a disk that stands beside another one: its descriptor, where that is not unusually long.
const CHILD_HEAD_BYTES: usize = 64 << 10;

/// Every sign of a snapshot: a parent, a delta extent, a delta's name, a delta or a child of this disk beside it.
fn check_chain(opener: &dyn Files, path: &Path, descriptor: &Descriptor) -> Result<(), TargetError> {
    if descriptor.parent_cid() != CID_NONE {
        return Err(snapshot(path, format!("parentCID={:08x}", descriptor.parent_cid())));
    }
    if let Some(parent) = descriptor.get("parentFileNameHint") {
        return Err(snapshot(path, format!("parentFileNameHint={parent:?}")));
    }
    if matches!(descriptor.create_type(), CreateType::VmfsSparse | CreateType::SeSparse) {
        return Err(snapshot(path, format!("createType={}", descriptor.create_type())));
    }
    for extent in descriptor.extents() {
        if matches!(extent.kind, ExtentKind::VmfsSparse | ExtentKind::SeSparse) {
            return Err(snapshot(path, format!("an extent of type {:?}", extent.kind)));
        }
    }
    let name = file_name(path);
    let extents = descriptor.extents().iter().filter_map(|extent| extent.file.as_deref());
    if let Some(delta) = std::iter::once(name.as_str()).chain(extents).find(|name| delta_base(name).is_some())
    {
        return Err(snapshot(path, format!("the name {delta}")));
    }
    let stem = name.strip_suffix(".vmdk").unwrap_or(&name);
    for other in opener.neighbours(path)? {
        if delta_base(&other) == Some(stem) {
            return Err(snapshot(path, format!("beside it stands {other}")));
        }
        if other != name && parent_named_by(opener, &path.with_file_name(&other)).is_some_and(|it| it == name)
        {
            return Err(snapshot(path, format!("{other} beside it is based on it")));
        }
    }
    Ok(())
}

/// The parent that the disk at `path` names, whatever its own name is: linked clones and other programs' snapshots.
/// What cannot be read or understood names none: it is looked at for the sake of another disk.
fn parent_named_by(opener: &dyn Files, path: &Path) -> Option<String> {
    if !path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("vmdk")) {
        return None;
    }
    let head = opener.read_head(path, CHILD_HEAD_BYTES).ok()?;
    let text = match recognise(&head) {
        Recognised::Descriptor if head.len() < CHILD_HEAD_BYTES => head,
        Recognised::HostedSparse => {
            let place = SparseHeader::decode(&head).ok()?.descriptor?;
            let start = usize::try_from(place.byte_start()).ok()?;
            head.get(start..start.checked_add(usize::try_from(place.bytes()).ok()?)?)?.to_vec()
        }
        _ => return None,
    };
    let parent = Descriptor::parse(&text).ok()?.get("parentFileNameHint")?.to_owned();
    // The hint is a path of whoever wrote it: the last part is the file's name.
    parent.rsplit(['/', '\\']).next().map(str::to_owned)
}

fn file_name(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

/// The disk a delta belongs to, by its name `disk-000001[-delta|-sesparse|-s001].vmdk`.
fn delta_base(name: &str) -> Option<&str> {
    let stem = name.strip_suffix(".vmdk")?;
    let numbered = |stem: &str| {
        let (_, digits) = stem.rsplit_once('-')?;
        (digits.len() == 6 && digits.bytes().all(|byte| byte.is_ascii_digit())).then(|| stem.len() - 7)
    };
    let base = numbered(stem).or_else(|| {
        let (head, tail) = stem.rsplit_once('-')?;
        let split =
            tail.strip_prefix('s').is_some_and(|n| n.len() >= 3 && n.bytes().all(|b| b.is_ascii_digit()));
        (split || matches!(tail, "delta" | "sesparse")).then(|| numbered(head)).flatten()
    })?;
    stem.get(..base)
}

/// The kind of a disk, when it is one that can be written.
fn kind_of(path: &Path, descriptor: &Descriptor) -> Result<VmdkKind, TargetError> {
    let unsupported =
        |what: String, remedy| Err(TargetError::Unsupported { path: path.into(), what, remedy });
    if !(1..=3).contains(&descriptor.version()) {
        return unsupported(format!("a VMDK of version {}", descriptor.version()), "convert it to version 1");
    }
    let kind = match descriptor.create_type() {
        CreateType::MonolithicFlat => VmdkKind::MonolithicFlat,
        CreateType::TwoGbMaxExtentFlat => VmdkKind::TwoGbMaxExtentFlat,
        CreateType::MonolithicSparse => VmdkKind::MonolithicSparse,
        CreateType::TwoGbMaxExtentSparse => VmdkKind::TwoGbMaxExtentSparse,
        CreateType::Vmfs => VmdkKind::Vmfs,
        CreateType::StreamOptimized => {
            let remedy = "it is for transport only; convert it first, for instance with qemu-img convert or vmkfstools -i";
            return unsupported("a stream-optimised disk".into(), remedy);
        }
        CreateType::RawDevice(word) => {
            let remedy = "attach the device to the master target and use it as a device target";
            return unsupported(format!("a raw device mapping ({word})"), remedy);
        }
        other => {
            let remedy =
                "convert it to a flat or sparse disk, for instance with qemu-img convert or vmkfstools -i";
            return unsupported(format!("of createType {other}"), remedy);
        }
    };
    if descriptor.extents().is_empty() {
        return Err(TargetError::Damaged {
            path: path.into(),
            what: "its descriptor names no extent".into(),
        });
    }
    if kind == VmdkKind::MonolithicSparse && descriptor.extents().len() != 1 {
        return Err(TargetError::Damaged {
            path: path.into(),
            what: "a single sparse file with several extents".into(),
        });
    }
    for extent in descriptor.extents() {
        let fits = match extent.kind {
            ExtentKind::Sparse => kind.is_sparse(),
            ExtentKind::Flat | ExtentKind::Vmfs => !kind.is_sparse(),
            _ => false,
        };
        if !fits || extent.access != Access::ReadWrite {
            let what = format!("a disk with an extent {:?} {:?}", extent.access, extent.kind);
            return unsupported(
                what,
                "only disks whose extents are all RW and of the disk's own kind can be written; convert it",
            );
        }
    }
    Ok(kind)
}

/// VMware's lock files: `NAME.lck` beside the files (hosted products), `.lck-<inode>` (NFS datastores).
///
/// # Errors
/// [`TargetError::InUse`] names the lock.
pub fn check_locks(opener: &dyn Files, path: &Path, descriptor: &Descriptor) -> Result<(), TargetError> {
    let mut names = vec![file_name(path)];
    names.extend(descriptor.extents().iter().filter_map(|extent| extent.file.clone()));
    let mut inodes = Vec::new();
    let neighbours = opener.neighbours(path)?;
    let in_use =
        |sign: &str| TargetError::InUse { path: path.into(), sign: format!("lock {sign} beside it") };
    if neighbours.iter().any(|name| name.starts_with(".lck-")) {
        for name in &names {
            inodes.extend(opener.facts(&path.with_file_name(name))?.map(|facts| facts.inode));
        }
    }
    for neighbour in &neighbours {
        let hosted = neighbour.strip_suffix(".lck").is_some_and(|name| names.iter().any(|own| own == name));
        // The number is hexadecimal, in one byte order or the other depending on who wrote it.
        let nfs = neighbour
            .strip_prefix(".lck-")
            .and_then(|digits| u64::from_str_radix(digits, 16).ok())
            .is_some_and(|number| inodes.contains(&number) || inodes.contains(&number.swap_bytes()));
        if hosted || nfs {
            return Err(in_use(neighbour));
        }
    }
    Ok(())
}

/// The opening of one disk.
struct Open<'a> {
    opener: &'a Arc<dyn Files>,
    path: &'a Path,
    descriptor: &'a Descriptor,
    writable: bool,
}

impl Open<'_> {
    /// The file of an extent, which must stand beside the descriptor.
    fn extent_path(&self, extent: &Extent) -> Result<PathBuf, TargetError> {
        let file = extent.file.clone().unwrap_or_default();
        let mut components = Path::new(&file).components();
        match (components.next(), components.next()) {
            (Some(Component::Normal(name)), None) => Ok(self.path.with_file_name(name)),
            _ => Err(TargetError::ExtentOutside { path: self.path.into(), file }),
        }
    }

    fn facts(&self, path: &Path) -> Result<FileFacts, TargetError> {
        self.opener
            .facts(path)?
            .ok_or_else(|| TargetError::MissingFile { path: path.into(), by: self.path.into() })
    }

    fn layout(&self) -> Layout {
        let sizes = self.descriptor.extents().iter().map(|extent| extent.sectors * SECTOR_BYTES);
        Layout::new(self.path.display().to_string(), sizes)
    }

    fn flat(&self, keeper: Keeper) -> Result<FlatVmdk, TargetError> {
        let mut files: Vec<PathBuf> = Vec::new();
        let mut index: BTreeMap<PathBuf, usize> = BTreeMap::new();
        let mut used: Vec<(usize, u64, u64)> = Vec::new();
        let mut parts = Vec::new();
        for extent in self.descriptor.extents() {
            let path = self.extent_path(extent)?;
            let (offset, expected) =
                (extent.offset * SECTOR_BYTES, (extent.offset + extent.sectors) * SECTOR_BYTES);
            let got = self.facts(&path)?.size_bytes;
            if got < expected {
                return Err(TargetError::ExtentShort { path, got, expected });
            }
            let backing = *index.entry(path.clone()).or_insert_with(|| {
                files.push(path);
                files.len() - 1
            });
            used.push((backing, offset, expected));
            parts.push(Part { backing, offset });
        }
        used.sort_unstable();
        if used.windows(2).any(|pair| pair[0].0 == pair[1].0 && pair[0].2 > pair[1].1) {
            let what = "two extents share sectors of one file".into();
            return Err(TargetError::Damaged { path: self.path.into(), what });
        }
        let files =
            files.iter().map(|path| self.opener.open(path, self.writable)).collect::<Result<_, _>>()?;
        Ok(FlatVmdk::new(self.layout(), parts, files, keeper))
    }

    fn sparse(&self, keeper: Keeper) -> Result<SparseVmdk, TargetError> {
        let mut extents = Vec::new();
        let mut repair = Repair::default();
        let (mut base, mut lengthened) = (0, false);
        for extent in self.descriptor.extents() {
            let path = match self.descriptor.create_type() {
                CreateType::MonolithicSparse => self.path.to_owned(), // the file may have been renamed as a whole
                _ => self.extent_path(extent)?,
            };
            let (opened, found, longer) = self.sparse_extent(path, extent, base)?;
            extents.push(opened);
            repair.add(found);
            lengthened |= longer;
            base += extent.sectors;
        }
        Ok(SparseVmdk::new(self.layout(), extents, keeper, repair, lengthened))
    }

    fn sparse_extent(
        &self,
        path: PathBuf,
        extent: &Extent,
        base: u64,
    ) -> Result<(SparseExtent, Repair, bool), TargetError> {
        let file_bytes = self.facts(&path)?.size_bytes;
        let head = self.opener.read_head(&path, HEADER_BYTES)?;
        match recognise(&head) {
            Recognised::Cowd => return Err(snapshot(&path, "a vmfsSparse (COWD) redo log")),
            Recognised::SeSparse => return Err(snapshot(&path, "an SESparse redo log")),
            _ => {}
        }
        let bad_header = |source| TargetError::Header { path: path.clone(), source };
        let header = SparseHeader::decode(&head).map_err(bad_header)?;
        header.check_file(file_bytes / SECTOR_BYTES).map_err(bad_header)?;
        if !header.is_plain() || header.capacity > FILE_SECTORS_MAX {
            return Err(TargetError::Unsupported {
                path,
                what: "a compressed or oversized sparse extent".into(),
                remedy: "convert the disk, for instance with qemu-img convert -O vmdk",
            });
        }
        // One file of several may have been grown for a descriptor that was not replaced: nothing is behind its old end.
        let split = self.descriptor.create_type() == &CreateType::TwoGbMaxExtentSparse;
        if header.capacity < extent.sectors || header.capacity > extent.sectors && !split {
            let what =
                format!("its header says {} sectors, the descriptor {}", header.capacity, extent.sectors);
            return Err(TargetError::Damaged { path, what });
        }
        let mut file = self.opener.open(&path, self.writable)?;
        let (tables, repair) = load(&path, &mut *file, &header, base)?;
        let longest = tables.file_sectors_max() * SECTOR_BYTES;
        let lengthen = self.writable && file.size_bytes() < longest;
        if lengthen {
            drop(file);
            self.opener.resize(&path, longest)?;
            file = self.opener.open(&path, true)?;
        }
        Ok((SparseExtent { path, file, header, tables, begun: false, unflushed: true }, repair, lengthen))
    }
}

fn load(
    path: &Path,
    file: &mut dyn BlockFile,
    header: &SparseHeader,
    base: u64,
) -> Result<(Tables, Repair), TargetError> {
    Tables::load(file, header, base).map_err(|error| match error {
        LoadError::Block(error) => error.into(),
        LoadError::Damaged(what) => TargetError::Damaged { path: path.into(), what },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delta_names_are_told_from_disk_names() {
        for (name, base) in [
            ("web-000001.vmdk", Some("web")),
            ("web-000012-delta.vmdk", Some("web")),
            ("web-000001-sesparse.vmdk", Some("web")),
            ("web-000001-s003.vmdk", Some("web")),
            ("web.vmdk", None),
            ("web-flat.vmdk", None),
            ("web-s001.vmdk", None),
            ("web-20240101.vmdk", None),
            ("web-000001.nvram", None),
        ] {
            assert_eq!(delta_base(name), base, "{name}");
        }
    }
}
