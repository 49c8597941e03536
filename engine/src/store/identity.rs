//! Who a disk is, told by its content: partition table identities and file-system UUIDs.
//!
//! Nothing relates a disk in the cloud to a VMDK at home but what is written on it, so originals are proposed by size,
//! GPT disk GUID or MBR signature, and file-system UUIDs. A wrong pair would overwrite a wrong disk: any doubt is an
//! [`Ambiguity`] that names all candidates, and a person decides.
//!
//! Invariants: probing is total (any content gives an identity), reads bounded amounts, and never writes; a GPT counts
//! only with correct checksums. Units: bytes of the disk. Called by the agent and the master target.

use std::collections::BTreeSet;

use crate::checksum::crc32;
use crate::io::{BlockError, BlockFile, ByteRange, ReadAt};
use crate::units::SECTOR_BYTES;

/// Partitions looked at; GPTs have 128 entries, longer ones are cut.
const PARTITIONS_MAX: usize = 256;
/// Logical partitions followed in an extended one; ends chains that loop.
const LOGICAL_MAX: usize = 64;
/// Most bytes of GPT entries read: 1024 entries of 128 bytes.
const GPT_ENTRY_BYTES_MAX: u64 = 128 << 10;
/// Bytes from the start of a file system that hold every magic we know (btrfs stands last, at 64 KiB).
const PROBE_BYTES: u64 = 68 << 10;

/// What a file system (or other content of a partition) is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum ContentKind {
    /// ext2, ext3 or ext4.
    Ext,
    /// XFS.
    Xfs,
    /// Btrfs.
    Btrfs,
    /// Linux swap.
    Swap,
    /// LVM physical volume.
    LvmPhysicalVolume,
    /// FAT12, FAT16 or FAT32.
    Fat,
    /// NTFS.
    Ntfs,
    /// LUKS.
    Luks,
}

/// A recognised content and its identity as its own tools print it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Content {
    /// What it is.
    pub kind: ContentKind,
    /// UUID or serial number.
    pub uuid: String,
}

/// A partition, or the whole disk where there is no table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Partition {
    /// Where it is.
    pub range: ByteRange,
    /// What is in it, when it is known.
    pub content: Option<Content>,
}

/// Who a disk is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DiskIdentity {
    /// Its size.
    pub size_bytes: u64,
    /// Disk GUID of its GPT.
    pub gpt_disk_guid: Option<String>,
    /// Signature of its MBR, unless zero or merely protective.
    pub mbr_signature: Option<u32>,
    /// Its partitions in table order; one over everything for a file system without a table.
    pub partitions: Vec<Partition>,
}

impl DiskIdentity {
    /// Reads a disk's identity.
    ///
    /// # Errors
    /// When the disk cannot be read; strange content is no error.
    pub fn probe(disk: &mut dyn BlockFile) -> Result<Self, BlockError> {
        let size_bytes = disk.size_bytes();
        let mut identity = Self { size_bytes, ..Self::default() };
        let whole = ByteRange { start: 0, end: size_bytes };
        let first = read_at(disk, whole, 0, SECTOR_BYTES)?;
        let mbr = Mbr::parse(&first);
        let mut ranges = Vec::new();
        let is_expected = mbr.as_ref().is_some_and(Mbr::is_protective);
        if let Some(gpt) = Gpt::read(disk, size_bytes, is_expected)?.filter(|_| is_expected || mbr.is_none())
        {
            identity.gpt_disk_guid = Some(gpt.disk_guid);
            ranges = gpt.ranges;
        } else if let Some(content) = probe_content(disk, whole) {
            // Boot sectors of FAT and NTFS end like an MBR; a file system on the bare disk goes first.
            identity.partitions.push(Partition { range: whole, content: Some(content) });
        } else if let Some(mbr) = mbr {
            identity.mbr_signature = (mbr.signature != 0).then_some(mbr.signature);
            ranges = mbr.ranges(disk, size_bytes)?;
        }
        for range in ranges.into_iter().take(PARTITIONS_MAX) {
            let content = probe_content(disk, range);
            identity.partitions.push(Partition { range, content });
        }
        Ok(identity)
    }

    fn contents(&self) -> BTreeSet<&Content> {
        self.partitions.iter().filter_map(|partition| partition.content.as_ref()).collect()
    }
}

/// Reads up to `len` bytes at `offset` of `within`; fewer at its end.
fn read_at(
    disk: &mut dyn BlockFile,
    within: ByteRange,
    offset: u64,
    len: u64,
) -> Result<Vec<u8>, BlockError> {
    let start = within.start.saturating_add(offset).min(within.end);
    let len = len.min(within.end - start);
    let mut data = vec![0; len as usize]; // at most GPT_ENTRY_BYTES_MAX
    if len > 0 {
        disk.read(&mut [ReadAt { offset: start, data: &mut data }])?;
    }
    Ok(data)
}

fn bytes<const N: usize>(data: &[u8], at: usize) -> Option<[u8; N]> {
    data.get(at..)?.first_chunk::<N>().copied()
}

fn le16(data: &[u8], at: usize) -> Option<u64> {
    bytes(data, at).map(|bytes| u16::from_le_bytes(bytes).into())
}

fn le32(data: &[u8], at: usize) -> Option<u32> {
    bytes(data, at).map(u32::from_le_bytes)
}

fn le64(data: &[u8], at: usize) -> Option<u64> {
    bytes(data, at).map(u64::from_le_bytes)
}

/// A run of sectors as bytes, when it lies on the disk and is not empty.
fn sectors(start: u64, count: u64, disk_bytes: u64) -> Option<ByteRange> {
    let end = start.checked_add(count)?.checked_mul(SECTOR_BYTES)?;
    (count > 0 && end <= disk_bytes).then(|| ByteRange { start: start * SECTOR_BYTES, end })
}

/// A master boot record, or the boot record of a logical partition.
struct Mbr {
    signature: u32,
    /// Type, first sector, sectors.
    entries: [(u8, u64, u64); 4],
}

impl Mbr {
    fn parse(sector: &[u8]) -> Option<Self> {
        if bytes(sector, 510)? != [0x55, 0xaa] {
            return None;
        }
        let mut entries = [(0, 0, 0); 4];
        for (number, entry) in entries.iter_mut().enumerate() {
            let at = 446 + number * 16;
            *entry = (*sector.get(at + 4)?, le32(sector, at + 8)?.into(), le32(sector, at + 12)?.into());
        }
        Some(Self { signature: le32(sector, 440)?, entries })
    }

    /// Whether it only guards a GPT.
    fn is_protective(&self) -> bool {
        self.entries.iter().any(|(kind, ..)| *kind == 0xee)
    }

    /// Primary and logical partitions.
    fn ranges(&self, disk: &mut dyn BlockFile, disk_bytes: u64) -> Result<Vec<ByteRange>, BlockError> {
        let mut ranges = Vec::new();
        for (kind, start, count) in self.entries {
            let Some(range) = sectors(start, count, disk_bytes).filter(|_| kind != 0 && start != 0) else {
                continue;
            };
            if is_extended(kind) {
                logical(disk, range, &mut ranges)?;
            } else {
                ranges.push(range);
            }
        }
        Ok(ranges)
    }
}

const fn is_extended(kind: u8) -> bool {
    matches!(kind, 0x05 | 0x0f | 0x85)
}

/// Follows the chain of logical partitions, whose links are relative to the extended partition.
fn logical(
    disk: &mut dyn BlockFile,
    extended: ByteRange,
    found: &mut Vec<ByteRange>,
) -> Result<(), BlockError> {
    let mut offset = 0;
    for _ in 0..LOGICAL_MAX {
        let Some(record) = Mbr::parse(&read_at(disk, extended, offset, SECTOR_BYTES)?) else { return Ok(()) };
        let [(kind, start, count), (next_kind, next, _), ..] = record.entries;
        let first = (extended.start + offset) / SECTOR_BYTES;
        if kind != 0 && start != 0 {
            found.extend(sectors(first + start, count, extended.end));
        }
        if !is_extended(next_kind) || next == 0 {
            return Ok(());
        }
        offset = next * SECTOR_BYTES; // a 32-bit sector number
    }
    Ok(())
}

/// A GPT with correct checksums.
struct Gpt {
    disk_guid: String,
    ranges: Vec<ByteRange>,
}

impl Gpt {
    /// The primary one, or the backup at the end of the disk. A copy that cannot be read counts as none, unless one
    /// `is_expected` and there is no other: whose disk it is cannot be told then.
    fn read(
        disk: &mut dyn BlockFile,
        disk_bytes: u64,
        is_expected: bool,
    ) -> Result<Option<Self>, BlockError> {
        let last = (disk_bytes / SECTOR_BYTES).saturating_sub(1);
        let mut failed = None;
        for sector in [1, last] {
            match Self::read_at(disk, disk_bytes, sector) {
                Ok(Some(gpt)) => return Ok(Some(gpt)),
                Ok(None) => {}
                Err(error) => failed = Some(error),
            }
        }
        failed.filter(|_| is_expected).map_or(Ok(None), Err)
    }

    fn read_at(disk: &mut dyn BlockFile, disk_bytes: u64, sector: u64) -> Result<Option<Self>, BlockError> {
        let whole = ByteRange { start: 0, end: disk_bytes };
        let header = read_at(disk, whole, sector * SECTOR_BYTES, SECTOR_BYTES)?;
        let Some(place) = GptHeader::parse(&header, sector) else { return Ok(None) };
        let len = place.entries * place.entry_bytes;
        let entries = read_at(disk, whole, place.first.saturating_mul(SECTOR_BYTES), len)?;
        if entries.len() as u64 != len || crc32(&entries) != place.entries_crc {
            return Ok(None);
        }
        let ranges = entries
            .chunks_exact(place.entry_bytes as usize)
            .filter(|entry| entry.iter().take(16).any(|byte| *byte != 0))
            .filter_map(|entry| {
                let (first, last) = (le64(entry, 32)?, le64(entry, 40)?);
                sectors(first, last.checked_sub(first)?.checked_add(1)?, disk_bytes)
            })
            .collect();
        Ok(Some(Self { disk_guid: place.disk_guid, ranges }))
    }
}

struct GptHeader {
    disk_guid: String,
    first: u64,
    entries: u64,
    entry_bytes: u64,
    entries_crc: u32,
}

impl GptHeader {
    fn parse(sector: &[u8], own: u64) -> Option<Self> {
        let size = le32(sector, 12)? as usize;
        if !sector.starts_with(b"EFI PART") || !(92..=512).contains(&size) || le64(sector, 24)? != own {
            return None;
        }
        let mut covered = sector.get(..size)?.to_vec();
        covered.get_mut(16..20)?.fill(0);
        if crc32(&covered) != le32(sector, 16)? {
            return None;
        }
        let (entries, entry_bytes) = (u64::from(le32(sector, 80)?), u64::from(le32(sector, 84)?));
        if entry_bytes < 128 || entries == 0 || entries.saturating_mul(entry_bytes) > GPT_ENTRY_BYTES_MAX {
            return None;
        }
        let disk_guid = uuid::Uuid::from_bytes_le(bytes(sector, 56)?).hyphenated().to_string();
        Some(Self {
            disk_guid,
            first: le64(sector, 72)?,
            entries,
            entry_bytes,
            entries_crc: le32(sector, 88)?,
        })
    }
}

/// Recognises what begins at the start of `range`; what cannot be read is nothing known.
fn probe_content(disk: &mut dyn BlockFile, range: ByteRange) -> Option<Content> {
    let data = read_at(disk, range, 0, PROBE_BYTES).ok()?;
    type Probe = fn(&[u8]) -> Option<Content>;
    // Those with long magics first, so that remains of an older file system are not taken for the present one.
    const PROBES: [Probe; 8] = [luks, lvm, xfs, btrfs, ext, swap, ntfs, fat];
    PROBES.iter().find_map(|probe| probe(&data))
}

fn hyphenated(kind: ContentKind, bytes: [u8; 16]) -> Option<Content> {
    let uuid = uuid::Uuid::from_bytes(bytes);
    (!uuid.is_nil()).then(|| Content { kind, uuid: uuid.hyphenated().to_string() })
}

fn ext(data: &[u8]) -> Option<Content> {
    if le16(data, 1024 + 56)? != 0xef53 {
        return None;
    }
    hyphenated(ContentKind::Ext, bytes(data, 1024 + 104)?)
}

fn xfs(data: &[u8]) -> Option<Content> {
    data.starts_with(b"XFSB")
        .then(|| bytes(data, 32))
        .flatten()
        .and_then(|uuid| hyphenated(ContentKind::Xfs, uuid))
}

fn btrfs(data: &[u8]) -> Option<Content> {
    if &bytes::<8>(data, 0x1_0040)? != b"_BHRfS_M" {
        return None;
    }
    hyphenated(ContentKind::Btrfs, bytes(data, 0x1_0020)?)
}

fn swap(data: &[u8]) -> Option<Content> {
    // The magic ends the first page, whose size is the machine's that made it.
    let is_swap = |page: usize| bytes::<10>(data, page - 10).is_some_and(|magic| &magic == b"SWAPSPACE2");
    [4096, 8192, 16384, 65536].into_iter().any(is_swap).then_some(())?;
    hyphenated(ContentKind::Swap, bytes(data, 1024 + 12)?)
}

fn lvm(data: &[u8]) -> Option<Content> {
    // The label stands in any of the first four sectors; LVM writes its UUID in groups of 6-4-4-4-4-4-6.
    let label = data.chunks_exact(512).take(4).find(|sector| sector.starts_with(b"LABELONE"))?;
    if label.get(24..32)? != b"LVM2 001" {
        return None;
    }
    let header = le32(label, 20)? as usize;
    let uuid = bytes::<32>(label, header)?;
    let text =
        std::str::from_utf8(&uuid).ok().filter(|text| text.bytes().all(|b| b.is_ascii_alphanumeric()))?;
    let (mut groups, mut rest) = (Vec::new(), text);
    for len in [6, 4, 4, 4, 4, 4, 6] {
        let (group, tail) = rest.split_at_checked(len)?;
        groups.push(group);
        rest = tail;
    }
    Some(Content { kind: ContentKind::LvmPhysicalVolume, uuid: groups.join("-") })
}

fn luks(data: &[u8]) -> Option<Content> {
    if !data.starts_with(b"LUKS\xba\xbe") {
        return None;
    }
    let uuid = bytes::<36>(data, 168)?;
    let text = std::str::from_utf8(&uuid).ok().and_then(|text| uuid::Uuid::parse_str(text).ok())?;
    hyphenated(ContentKind::Luks, *text.as_bytes())
}

fn ntfs(data: &[u8]) -> Option<Content> {
    if bytes::<8>(data, 3)? != *b"NTFS    " {
        return None;
    }
    let serial = le64(data, 72)?;
    (serial != 0).then(|| Content { kind: ContentKind::Ntfs, uuid: format!("{serial:016X}") })
}

fn fat(data: &[u8]) -> Option<Content> {
    let at = if bytes::<5>(data, 82)? == *b"FAT32" {
        67
    } else if [*b"FAT12", *b"FAT16"].contains(&bytes::<5>(data, 54)?) {
        39
    } else {
        return None;
    };
    let serial = le32(data, at)?;
    let is_boot_sector = bytes(data, 510)? == [0x55, 0xaa] && serial != 0;
    is_boot_sector.then(|| Content {
        kind: ContentKind::Fat,
        uuid: format!("{:04X}-{:04X}", serial >> 16, serial & 0xffff),
    })
}

/// A source disk and the target proposed for it, by index into the lists that were given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pair {
    /// Index of the source.
    pub source: usize,
    /// Index of the target.
    pub target: usize,
    /// How sure it is; see [`match_score`].
    pub score: u32,
}

/// Why pairs cannot be proposed: several disks fit equally well.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{sources:?} could each be any of {targets:?} (clones of one template?): name the pairs with --original DISK=PATH"
)]
pub struct Ambiguity {
    /// Names of all sources that compete.
    pub sources: Vec<String>,
    /// Names of all targets that fit.
    pub targets: Vec<String>,
}

impl crate::error::Answer for Ambiguity {
    fn severity(&self) -> crate::error::Severity {
        crate::error::Severity::Stop
    }
}

/// How well two disks match: 0 for not at all; a common partition table identity counts 100, each common file-system
/// identity 10. Disks of different size never match, nor do those whose table identities contradict one another.
#[must_use]
pub fn match_score(a: &DiskIdentity, b: &DiskIdentity) -> u32 {
    if a.size_bytes != b.size_bytes {
        return 0;
    }
    let mut score = 0;
    match (&a.gpt_disk_guid, &b.gpt_disk_guid) {
        (Some(one), Some(other)) if one == other => score += 100,
        (Some(_), Some(_)) => return 0,
        _ => {}
    }
    match (a.mbr_signature, b.mbr_signature) {
        (Some(one), Some(other)) if one == other => score += 100,
        (Some(_), Some(_)) => return 0,
        _ => {}
    }
    let common = a.contents().intersection(&b.contents()).count().min(PARTITIONS_MAX);
    score + 10 * common as u32
}

/// Proposes a target for each source that has exactly one best match, and is the best match of it in turn; sources
/// without any match are left out.
///
/// # Errors
/// [`Ambiguity`] as soon as a source has two equally good targets, or a target two equally good sources. Nothing is
/// proposed then, not even the clear pairs: clones make all of them doubtful.
pub fn propose_pairs(
    sources: &[(String, DiskIdentity)],
    targets: &[(String, DiskIdentity)],
) -> Result<Vec<Pair>, Ambiguity> {
    let score = |source: usize, target: usize| match_score(&sources[source].1, &targets[target].1);
    let mut pairs = Vec::new();
    for source in 0..sources.len() {
        let best = (0..targets.len()).map(|target| score(source, target)).max().unwrap_or(0);
        if best == 0 {
            continue;
        }
        let fitting: Vec<usize> =
            (0..targets.len()).filter(|target| score(source, *target) == best).collect();
        let rivals: BTreeSet<usize> = fitting
            .iter()
            .flat_map(|target| (0..sources.len()).filter(|other| score(*other, *target) >= best))
            .collect();
        match fitting.as_slice() {
            [target] if rivals.len() == 1 => pairs.push(Pair { source, target: *target, score: best }),
            _ => {
                return Err(Ambiguity {
                    sources: rivals.iter().map(|at| sources[*at].0.clone()).collect(),
                    targets: fitting.iter().map(|at| targets[*at].0.clone()).collect(),
                });
            }
        }
    }
    Ok(pairs)
}

#[cfg(test)]
#[path = "identity_tests.rs"]
mod tests;
