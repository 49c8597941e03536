//! What a disk is written to: a VMDK or an attached device, created or opened, checked before the first byte.
//!
//! Invariants: a [`Target`] passed every check of the preflight that concerns one disk: no snapshot, nobody else's
//! lock, the right size, a UUID nobody else has, every extent whole. A target that is dropped and not closed is as
//! after a crash, which the next open repairs. Units: bytes. Called by the master target.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use crate::format::vmdk::descriptor::{AdapterType, DiskUuid};
use crate::io::{BlockError, BlockFile, BlockOp, ByteRange, ReadAt, WriteAt};
use crate::limits::DISK_BYTES_MAX;
pub use crate::store::files::Files;
use crate::store::vmdk::open::check_vmdk;
pub use crate::store::vmdk::{CreateSpec, Repair, TargetError, VmdkKind};
use crate::store::vmdk::{TargetFile, create_vmdk, grow_vmdk, open_vmdk};
use crate::units::SECTOR_BYTES;

/// What kind of thing a target is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TargetKind {
    /// Descriptor and one flat file.
    MonolithicFlat,
    /// Descriptor and flat files of at most 2 GiB.
    TwoGbMaxExtentFlat,
    /// Descriptor and one flat file as a datastore has it.
    Vmfs,
    /// One sparse file.
    MonolithicSparse,
    /// Descriptor and sparse files of at most 2 GiB.
    TwoGbMaxExtentSparse,
    /// A block device: a disk attached to the master target.
    Device,
}

impl TargetKind {
    /// The kind of VMDK; none for devices.
    #[must_use]
    pub const fn vmdk(self) -> Option<VmdkKind> {
        match self {
            Self::MonolithicFlat => Some(VmdkKind::MonolithicFlat),
            Self::TwoGbMaxExtentFlat => Some(VmdkKind::TwoGbMaxExtentFlat),
            Self::Vmfs => Some(VmdkKind::Vmfs),
            Self::MonolithicSparse => Some(VmdkKind::MonolithicSparse),
            Self::TwoGbMaxExtentSparse => Some(VmdkKind::TwoGbMaxExtentSparse),
            Self::Device => None,
        }
    }
}

impl From<VmdkKind> for TargetKind {
    fn from(kind: VmdkKind) -> Self {
        match kind {
            VmdkKind::MonolithicFlat => Self::MonolithicFlat,
            VmdkKind::TwoGbMaxExtentFlat => Self::TwoGbMaxExtentFlat,
            VmdkKind::Vmfs => Self::Vmfs,
            VmdkKind::MonolithicSparse => Self::MonolithicSparse,
            VmdkKind::TwoGbMaxExtentSparse => Self::TwoGbMaxExtentSparse,
        }
    }
}

impl std::fmt::Display for TargetKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.vmdk() {
            Some(kind) => kind.create_type().fmt(f),
            None => f.write_str("device"),
        }
    }
}

/// Where a target is and what it is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TargetSpec {
    /// The descriptor, the file of a monolithic sparse disk, or the device.
    pub path: PathBuf,
    /// What it is.
    pub kind: TargetKind,
}

/// What is known of a target apart from its content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TargetFacts {
    /// Where it is.
    pub path: PathBuf,
    /// What it is.
    pub kind: TargetKind,
    /// Its size.
    pub size_bytes: u64,
    /// The UUID the machine sees; none for devices and descriptors without one.
    pub uuid: Option<DiskUuid>,
    /// Content identity as it was when the target was opened; none for devices.
    pub cid: Option<u32>,
    /// It was just made and reads as zeros.
    pub fresh: bool,
}

/// What an existing target must agree with.
#[derive(Clone, Debug, Default)]
pub struct Expectation {
    /// The size of the source disk.
    pub size_bytes: Option<u64>,
    /// UUIDs of the other disks this master target knows, its own included.
    pub known_uuids: BTreeSet<DiskUuid>,
    /// Open for writing; otherwise nothing of the disk is changed.
    pub writable: bool,
}

/// An open target.
#[derive(Debug)]
pub struct Target {
    file: Box<dyn TargetFile>,
    facts: TargetFacts,
    repair: Repair,
    closed: bool,
}

impl Target {
    /// What is known of it.
    #[must_use]
    pub const fn facts(&self) -> &TargetFacts {
        &self.facts
    }

    /// What opening found and put right; its dropped sectors must be compared or sent again.
    #[must_use]
    pub const fn repair(&self) -> &Repair {
        &self.repair
    }

    /// Closes it, makes it larger and opens it again, at the size that it has then.
    ///
    /// # Errors
    /// As for [`grow_target`]: it is open at its old size then. Where it could not be closed in order or opened again,
    /// [`Self::is_closed`] says so, and nothing can be read or written any more.
    pub fn grow(&mut self, opener: &Arc<dyn Files>, size_bytes: u64) -> Result<(), TargetError> {
        let spec = TargetSpec { path: self.facts.path.clone(), kind: self.facts.kind };
        let closed = ClosedFile { name: spec.path.display().to_string(), size_bytes: self.facts.size_bytes };
        self.closed = true;
        std::mem::replace(&mut self.file, Box::new(closed)).close()?;
        let grown = grow_target(opener, &spec, size_bytes);
        *self = open_target(opener, &spec, &Expectation { writable: true, ..Expectation::default() })?;
        if self.facts.size_bytes == size_bytes { Ok(()) } else { grown }
    }

    /// Whether a growth left it closed.
    #[must_use]
    pub const fn is_closed(&self) -> bool {
        self.closed
    }

    /// Makes everything durable and leaves the files as any reader expects them.
    ///
    /// # Errors
    /// When a flush or the trimming of a file fails; the target is then as after a crash.
    pub fn close(self) -> Result<(), TargetError> {
        self.file.close()
    }
}

impl BlockFile for Target {
    fn size_bytes(&self) -> u64 {
        self.file.size_bytes()
    }
    fn read(&mut self, reads: &mut [ReadAt<'_>]) -> Result<(), BlockError> {
        self.file.read(reads)
    }
    fn write(&mut self, writes: &[WriteAt<'_>]) -> Result<(), BlockError> {
        self.file.write(writes)
    }
    fn zero(&mut self, range: ByteRange) -> Result<(), BlockError> {
        self.file.zero(range)
    }
    fn flush(&mut self) -> Result<(), BlockError> {
        self.file.flush()
    }
    fn allocated(&mut self, range: ByteRange) -> Result<Vec<ByteRange>, BlockError> {
        self.file.allocated(range)
    }
}

/// Makes a new VMDK and opens it for writing.
///
/// # Errors
/// Existing files, too little space, a UUID that is taken, impossible sizes; devices are not made but attached.
pub fn create_target(
    opener: &Arc<dyn Files>,
    spec: &TargetSpec,
    size_bytes: u64,
    known_uuids: &BTreeSet<DiskUuid>,
    options: &CreateOptions,
) -> Result<Target, TargetError> {
    let Some(kind) = spec.kind.vmdk() else {
        return Err(TargetError::Unsupported {
            path: spec.path.clone(),
            what: "a device".into(),
            remedy: "devices are not created; attach the disk to the master target and open it",
        });
    };
    if let Some(uuid) = options.uuid {
        check_uuid(&spec.path, Some(uuid), known_uuids)?;
    }
    let CreateOptions { adapter, uuid, reserved_bytes } = *options;
    create_vmdk(opener, &spec.path, &CreateSpec { kind, size_bytes, adapter, uuid, reserved_bytes })?;
    let expect =
        Expectation { size_bytes: Some(size_bytes), known_uuids: known_uuids.clone(), writable: true };
    let mut target = open_target(opener, spec, &expect)?;
    target.facts.fresh = true;
    Ok(target)
}

/// What may be chosen when a target is made.
#[derive(Clone, Copy, Debug, Default)]
pub struct CreateOptions {
    /// The controller in the descriptor.
    pub adapter: AdapterType,
    /// The UUID the machine will see; random when not given.
    pub uuid: Option<DiskUuid>,
    /// Bytes of the same medium that are promised to other targets already.
    pub reserved_bytes: u64,
}

/// Opens an existing target after every check.
///
/// # Errors
/// [`TargetError`], which names the file, the reason and the remedy.
pub fn open_target(
    opener: &Arc<dyn Files>,
    spec: &TargetSpec,
    expect: &Expectation,
) -> Result<Target, TargetError> {
    match spec.kind.vmdk() {
        Some(kind) => open_disk(opener, &spec.path, kind, expect),
        None => open_device(opener, &spec.path, expect),
    }
}

/// Tells what kind of target stands at a path, without opening it for writing.
///
/// # Errors
/// As for [`open_target`], apart from what only opening shows.
pub fn detect_target(opener: &Arc<dyn Files>, path: &Path) -> Result<TargetSpec, TargetError> {
    let missing = || TargetError::MissingFile { path: path.into(), by: path.into() };
    let facts = opener.facts(path)?.ok_or_else(missing)?;
    let kind = if facts.is_device { TargetKind::Device } else { check_vmdk(&**opener, path)?.kind.into() };
    Ok(TargetSpec { path: path.into(), kind })
}

/// Makes a closed target larger; durable when this returns. Of a device it only sees that this was done.
///
/// # Errors
/// [`TargetError::CannotGrow`] and others, with the remedy; the target then has its old size, or the new one.
pub fn grow_target(opener: &Arc<dyn Files>, spec: &TargetSpec, size_bytes: u64) -> Result<(), TargetError> {
    if spec.kind.vmdk().is_some() {
        return grow_vmdk(opener, &spec.path, size_bytes);
    }
    let got = target_bytes(opener, spec)?;
    if got == size_bytes {
        return Ok(());
    }
    Err(TargetError::CannotGrow {
        path: spec.path.clone(),
        what: format!("the device has {got} bytes, the source {size_bytes}"),
        remedy: "give the disk that is attached here exactly the size of the source, have it rescanned (echo 1 > /sys/block/sdX/device/rescan), then reload the agent",
    })
}

/// The size of a target that need not be open.
///
/// # Errors
/// When it cannot be examined.
pub fn target_bytes(opener: &Arc<dyn Files>, spec: &TargetSpec) -> Result<u64, TargetError> {
    if spec.kind.vmdk().is_some() {
        return Ok(check_vmdk(&**opener, &spec.path)?.descriptor.sectors() * SECTOR_BYTES);
    }
    let missing = || TargetError::MissingFile { path: spec.path.clone(), by: spec.path.clone() };
    Ok(opener.facts(&spec.path)?.ok_or_else(missing)?.size_bytes)
}

fn check_size(path: &Path, got: u64, expected: Option<u64>) -> Result<(), TargetError> {
    match expected {
        Some(expected) if expected != got => {
            Err(TargetError::SizeDiffers { path: path.into(), got, expected })
        }
        _ => Ok(()),
    }
}

fn check_uuid(path: &Path, uuid: Option<DiskUuid>, known: &BTreeSet<DiskUuid>) -> Result<(), TargetError> {
    match uuid.filter(|uuid| known.contains(uuid)) {
        Some(uuid) => Err(TargetError::DuplicateUuid { path: path.into(), uuid }),
        None => Ok(()),
    }
}

fn open_disk(
    opener: &Arc<dyn Files>,
    path: &Path,
    kind: VmdkKind,
    expect: &Expectation,
) -> Result<Target, TargetError> {
    // Everything the descriptor tells is checked before an extent is opened, lengthened or repaired.
    let checked = check_vmdk(&**opener, path)?;
    if checked.kind != kind {
        let what = format!("it is {}, not {}", TargetKind::from(checked.kind), TargetKind::from(kind));
        return Err(TargetError::Invalid { path: path.into(), what });
    }
    let uuid = checked.descriptor.uuid();
    check_size(path, checked.descriptor.sectors() * SECTOR_BYTES, expect.size_bytes)?;
    check_uuid(path, uuid, &expect.known_uuids)?;
    let opened = open_vmdk(opener, path, expect.writable)?;
    let facts = TargetFacts {
        path: path.into(),
        kind: kind.into(),
        size_bytes: opened.file.size_bytes(),
        uuid,
        cid: Some(opened.descriptor.cid()),
        fresh: false,
    };
    Ok(Target { file: opened.file, facts, repair: opened.repair, closed: false })
}

fn open_device(opener: &Arc<dyn Files>, path: &Path, expect: &Expectation) -> Result<Target, TargetError> {
    let missing = || TargetError::MissingFile { path: path.into(), by: path.into() };
    let found = opener.facts(path)?.ok_or_else(missing)?;
    if !found.is_device {
        return Err(TargetError::Unsupported {
            path: path.into(),
            what: "a file and no device".into(),
            remedy: "name the VMDK descriptor and its kind, or the device under /dev/disk/by-id",
        });
    }
    if found.size_bytes == 0 || found.size_bytes > DISK_BYTES_MAX {
        let what = format!("the device has {} bytes; 1 to {DISK_BYTES_MAX} are possible", found.size_bytes);
        return Err(TargetError::Invalid { path: path.into(), what });
    }
    check_size(path, found.size_bytes, expect.size_bytes)?;
    let file = Box::new(DeviceFile(opener.open(path, expect.writable)?));
    let facts = TargetFacts {
        path: path.into(),
        kind: TargetKind::Device,
        size_bytes: file.size_bytes(),
        uuid: None,
        cid: None,
        fresh: false,
    };
    Ok(Target { file, facts, repair: Repair::default(), closed: false })
}

/// In the place of a target that was closed to grow and could not be opened again.
#[derive(Debug)]
struct ClosedFile {
    name: String,
    size_bytes: u64,
}

impl ClosedFile {
    fn refuse(&self, op: BlockOp) -> BlockError {
        let source = std::io::Error::other("it was closed to grow and could not be opened again");
        BlockError { name: self.name.clone(), op, offset: 0, len: 0, source }
    }
}

impl BlockFile for ClosedFile {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }
    fn read(&mut self, _reads: &mut [ReadAt<'_>]) -> Result<(), BlockError> {
        Err(self.refuse(BlockOp::Read))
    }
    fn write(&mut self, _writes: &[WriteAt<'_>]) -> Result<(), BlockError> {
        Err(self.refuse(BlockOp::Write))
    }
    fn zero(&mut self, _range: ByteRange) -> Result<(), BlockError> {
        Err(self.refuse(BlockOp::Zero))
    }
    fn flush(&mut self) -> Result<(), BlockError> {
        Err(self.refuse(BlockOp::Flush))
    }
    fn allocated(&mut self, _range: ByteRange) -> Result<Vec<ByteRange>, BlockError> {
        Err(self.refuse(BlockOp::Map))
    }
}

impl TargetFile for ClosedFile {
    fn close(self: Box<Self>) -> Result<(), TargetError> {
        Err(self.refuse(BlockOp::Flush).into())
    }
}

/// An attached device: nothing between the target and the medium.
struct DeviceFile(Box<dyn BlockFile>);

impl std::fmt::Debug for DeviceFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DeviceFile").field("size_bytes", &self.0.size_bytes()).finish()
    }
}

impl BlockFile for DeviceFile {
    fn size_bytes(&self) -> u64 {
        self.0.size_bytes()
    }
    fn read(&mut self, reads: &mut [ReadAt<'_>]) -> Result<(), BlockError> {
        self.0.read(reads)
    }
    fn write(&mut self, writes: &[WriteAt<'_>]) -> Result<(), BlockError> {
        self.0.write(writes)
    }
    fn zero(&mut self, range: ByteRange) -> Result<(), BlockError> {
        self.0.zero(range)
    }
    fn flush(&mut self) -> Result<(), BlockError> {
        self.0.flush()
    }
    fn allocated(&mut self, range: ByteRange) -> Result<Vec<ByteRange>, BlockError> {
        self.0.allocated(range)
    }
}

impl TargetFile for DeviceFile {
    fn close(mut self: Box<Self>) -> Result<(), TargetError> {
        Ok(self.0.flush()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Answer as _, Severity};
    use crate::store::files::memory::MemoryFiles;

    const PATH: &str = "/ds/vm/web.vmdk";
    const SIZE: u64 = 8 << 20;

    fn spec(kind: TargetKind) -> TargetSpec {
        TargetSpec { path: PATH.into(), kind }
    }

    fn create(files: &MemoryFiles, kind: TargetKind) -> Result<Target, TargetError> {
        create_target(&files.opener(), &spec(kind), SIZE, &BTreeSet::new(), &CreateOptions::default())
    }

    fn writable() -> Expectation {
        Expectation { writable: true, ..Expectation::default() }
    }

    fn open(files: &MemoryFiles, kind: TargetKind) -> Result<Target, TargetError> {
        open_target(&files.opener(), &spec(kind), &writable())
    }

    /// A fresh disk of a kind whose descriptor was edited.
    fn edited(kind: TargetKind, from: &str, to: &str) -> MemoryFiles {
        let files = MemoryFiles::default();
        create(&files, kind).unwrap().close().unwrap();
        let text = String::from_utf8(files.bytes(PATH)).unwrap();
        assert!(text.contains(from), "{text}");
        files.put(PATH, text.replace(from, to).as_bytes());
        files
    }

    #[test]
    fn a_new_target_is_fresh_and_found_again_with_its_identity() {
        for kind in VmdkKind::ALL.map(TargetKind::from) {
            let files = MemoryFiles::default();
            let target = create(&files, kind).unwrap();
            let facts = target.facts().clone();
            assert!(facts.fresh && facts.uuid.is_some() && facts.size_bytes == SIZE);
            target.close().unwrap();
            assert_eq!(detect_target(&files.opener(), Path::new(PATH)).unwrap(), spec(kind));
            assert_eq!(open(&files, kind).unwrap().facts(), &TargetFacts { fresh: false, ..facts.clone() });
            assert!(matches!(create(&files, kind), Err(TargetError::Exists { .. })));
            let other = if kind == TargetKind::Vmfs { TargetKind::MonolithicFlat } else { TargetKind::Vmfs };
            assert!(matches!(open(&files, other), Err(TargetError::Invalid { .. })));
        }
    }

    #[test]
    fn every_sign_of_a_snapshot_is_refused_with_the_remedy() {
        let flat = TargetKind::Vmfs;
        let mut cases = vec![
            edited(flat, "parentCID=ffffffff", "parentCID=1234abcd"),
            edited(flat, "parentCID=ffffffff", "parentCID=ffffffff\nparentFileNameHint=\"base.vmdk\""),
            edited(flat, "createType=\"vmfs\"", "createType=\"vmfsSparse\""),
            edited(flat, "createType=\"vmfs\"", "createType=\"seSparse\""),
            edited(flat, " VMFS ", " VMFSSPARSE "),
            edited(flat, "web-flat.vmdk", "web-000003-delta.vmdk"),
        ];
        let beside = edited(flat, "", "");
        beside.put("/ds/vm/web-000001.vmdk", b"# Disk DescriptorFile\n");
        cases.push(beside);
        let child = edited(flat, "", "");
        let text = String::from_utf8(child.bytes(PATH)).unwrap();
        let hint = "parentCID=1234abcd\nparentFileNameHint=\"/vmfs/volumes/ds/vm/web.vmdk\"";
        let clone = text.replace("parentCID=ffffffff", hint);
        assert_ne!(clone, text);
        child.put("/ds/vm/clone.vmdk", clone.as_bytes());
        cases.push(child);
        for magic in [&b"COWD\x01\0\0\0"[..], &[0xbe, 0xba, 0xfe, 0xca, 0, 0, 0, 0]] {
            let files = MemoryFiles::default();
            files.put(PATH, &[magic, &[0; 600]].concat());
            cases.push(files);
        }
        for (number, files) in cases.iter().enumerate() {
            let before = files.bytes(PATH);
            let error = open(files, flat).unwrap_err();
            assert!(matches!(error, TargetError::Snapshot { .. }), "case {number}: {error}");
            assert!(error.to_string().contains("consolidate snapshots first"));
            assert_eq!((error.severity(), files.bytes(PATH)), (Severity::Stop, before));
        }
    }

    #[test]
    fn locks_of_vmware_beside_the_disk_are_respected() {
        for lock in ["web.vmdk.lck", "web-flat.vmdk.lck", ".lck-0000000000000000"] {
            let files = edited(TargetKind::Vmfs, "", "");
            files.put(format!("/ds/vm/{lock}"), b"");
            let error = open(&files, TargetKind::Vmfs).unwrap_err();
            assert!(matches!(&error, TargetError::InUse { sign, .. } if sign.contains(lock)), "{error}");
        }
        let files = edited(TargetKind::Vmfs, "", "");
        files.put("/ds/vm/other.vmdk.lck", b"");
        files.put("/ds/vm/.lck-1234000000000000", b"");
        let first = open(&files, TargetKind::Vmfs).unwrap();
        assert!(matches!(open(&files, TargetKind::Vmfs), Err(TargetError::InUse { .. })));
        drop(first);
        open(&files, TargetKind::Vmfs).unwrap();
    }

    #[test]
    fn size_uuid_and_space_are_checked() {
        let files = edited(TargetKind::Vmfs, "", "");
        let uuid = open(&files, TargetKind::Vmfs).unwrap().facts().uuid.unwrap();
        let with = |expect: &Expectation| open_target(&files.opener(), &spec(TargetKind::Vmfs), expect);
        let size = Expectation { size_bytes: Some(SIZE + 512), ..writable() };
        assert!(matches!(with(&size), Err(TargetError::SizeDiffers { got: SIZE, .. })));
        let known = Expectation { known_uuids: BTreeSet::from([uuid]), ..writable() };
        assert!(matches!(with(&known), Err(TargetError::DuplicateUuid { .. })));

        let files = MemoryFiles::default();
        files.set_free_bytes(Some(SIZE - 1));
        let error = create(&files, TargetKind::MonolithicFlat).unwrap_err();
        assert!(matches!(error, TargetError::NoSpace { needed: SIZE, .. }) && error.is_full());
        assert!(files.trace().is_empty(), "nothing was made");
    }

    #[test]
    fn missing_short_and_foreign_extents_are_named() {
        let files = edited(TargetKind::MonolithicFlat, "web-flat.vmdk", "gone-flat.vmdk");
        let error = open(&files, TargetKind::MonolithicFlat).unwrap_err();
        assert!(
            matches!(error, TargetError::MissingFile { .. }) && error.to_string().contains("gone-flat.vmdk")
        );
        let files = edited(TargetKind::MonolithicFlat, "", "");
        files.put("/ds/vm/web-flat.vmdk", &[0; 512]);
        assert!(matches!(
            open(&files, TargetKind::MonolithicFlat),
            Err(TargetError::ExtentShort { got: 512, .. })
        ));
        for outside in ["/etc/shadow", "../web-flat.vmdk", "sub/x.vmdk", ".."] {
            let files = edited(TargetKind::MonolithicFlat, "web-flat.vmdk", outside);
            let error = open(&files, TargetKind::MonolithicFlat).unwrap_err();
            assert!(matches!(error, TargetError::ExtentOutside { .. }), "{outside}: {error}");
        }
    }

    #[test]
    fn kinds_that_cannot_be_targets_say_what_to_do() {
        for (kind, remedy) in
            [("streamOptimized", "convert"), ("vmfsRawDeviceMap", "device target"), ("custom", "convert")]
        {
            let files = edited(TargetKind::MonolithicFlat, "monolithicFlat", kind);
            let error = open(&files, TargetKind::MonolithicFlat).unwrap_err();
            assert!(matches!(error, TargetError::Unsupported { .. }), "{error}");
            assert!(error.to_string().contains(remedy), "{error}");
        }
        let files = edited(TargetKind::MonolithicFlat, "RW ", "RDONLY ");
        assert!(matches!(open(&files, TargetKind::MonolithicFlat), Err(TargetError::Unsupported { .. })));
        assert!(matches!(create(&files, TargetKind::Device), Err(TargetError::Unsupported { .. })));
    }

    #[test]
    fn a_tracked_disk_leaves_change_tracking_at_the_first_write() {
        let files = edited(TargetKind::Vmfs, "version=1", "version=3\nchangeTrackPath=\"web-ctk.vmdk\"");
        let mut target = open(&files, TargetKind::Vmfs).unwrap();
        assert!(String::from_utf8(files.bytes(PATH)).unwrap().contains("changeTrackPath"));
        target.write(&[WriteAt { offset: 0, data: &[1; 512] }]).unwrap();
        let text = String::from_utf8(files.bytes(PATH)).unwrap();
        assert!(!text.contains("changeTrackPath") && text.contains("version=1"));
    }

    #[test]
    fn sparse_files_beyond_two_tebibytes_are_refused_before_anything_is_made() {
        let files = MemoryFiles::default();
        let make = |kind| {
            let none = BTreeSet::new();
            create_target(&files.opener(), &spec(kind), 2 << 40, &none, &CreateOptions::default())
        };
        assert!(matches!(make(TargetKind::MonolithicSparse), Err(TargetError::Invalid { .. })));
        assert!(files.trace().is_empty());
        make(TargetKind::MonolithicFlat).unwrap();
    }
}
