//! Entry functions for VMDKs: the descriptor, the sparse header, and whole sparse disks with damaged tables.
//!
//! Invariants checked: what is accepted is written back as it was read; an edit changes one value and nothing else; a
//! disk that was opened, repaired, written and closed opens again with nothing to repair and reads the same.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, OnceLock};

use reprotect_engine::format::vmdk::descriptor::{AdapterType, Descriptor, DiskUuid};
use reprotect_engine::format::vmdk::recognise;
use reprotect_engine::format::vmdk::sparse::{Directory, FILE_SECTORS_MAX, SparseHeader, TABLE_SECTORS};
use reprotect_engine::io::{BlockError, BlockFile, ByteRange, ReadAt, WriteAt};
use reprotect_engine::store::files::memory::MemoryFiles;
use reprotect_engine::store::target::{
    CreateOptions, Expectation, Files, Target, TargetKind, TargetSpec, create_target, open_target,
};
use reprotect_engine::units::SECTOR_BYTES;

const PATH: &str = "/ds/disk.vmdk";
/// Two grain tables, the second one short.
const DISK_BYTES: u64 = 40 << 20;
/// Larger disks are not read through: an input cannot justify it.
const READ_BYTES_MAX: u64 = 64 << 20;
/// Where the base disk has data, in grains of 64 KiB.
const GRAINS: [u64; 8] = [0, 1, 2, 7, 100, 511, 512, 639];
/// Bytes of a grain of the base disk, and of the chunks in which disks are compared.
const CHUNK: usize = 64 << 10;
/// A valid content identity that no input is likely to have.
const CID: u32 = 0x5eed_1dea;

/// A descriptor's text.
pub fn descriptor(data: &[u8]) {
    let _ = recognise(data);
    let Ok(parsed) = Descriptor::parse(data) else { return };
    let text = data.split(|byte| *byte == 0).next().unwrap_or_default();
    assert_eq!(parsed.text().as_bytes(), text, "an unedited descriptor is not written back as it was read");
    assert_eq!(parsed.sectors(), parsed.extents().iter().map(|extent| extent.sectors).sum::<u64>());
    let _ = parsed.uuid();
    for keep_length in [false, true] {
        let mut edited = parsed.clone();
        edited.set_cid(CID);
        let dropped = edited.drop_change_tracking(keep_length);
        assert_eq!(dropped.as_deref(), parsed.get("changeTrackPath"));
        let again = Descriptor::parse(edited.text().as_bytes()).expect("an edited descriptor can be read");
        assert_eq!((again.cid(), again.parent_cid()), (CID, parsed.parent_cid()));
        assert_eq!((again.create_type(), again.extents()), (parsed.create_type(), parsed.extents()));
        assert_ne!(again.version(), 3, "change tracking is left");
        assert_eq!(again.uuid(), parsed.uuid());
    }
}

/// The first sector of a sparse extent.
pub fn header(data: &[u8]) {
    let _ = recognise(data);
    let Ok(header) = SparseHeader::decode(data) else { return };
    assert_eq!(SparseHeader::decode(&header.encode()).as_ref(), Ok(&header));
    assert!(header.grain_count() * header.grain_sectors >= header.capacity);
    assert!(header.table_count() > 0 && header.directory_sectors() > 0);
    let fits = |sectors: u64| header.check_file(sectors).is_ok();
    assert!(fits(u64::MAX), "no structure lies beyond every file");
    if let Directory::At(at) = header.directory {
        assert!(at < FILE_SECTORS_MAX && !fits(at), "a file that ends before its directory is accepted");
    }
}

/// A sparse disk with data in some grains, with the bytes its file has when it is closed.
fn base() -> &'static [u8] {
    static BASE: OnceLock<Vec<u8>> = OnceLock::new();
    BASE.get_or_init(|| {
        let files = MemoryFiles::default();
        let options = CreateOptions {
            adapter: AdapterType::LsiLogic,
            uuid: Some(DiskUuid([7; 16])),
            reserved_bytes: 0,
        };
        let mut disk = create_target(&files.opener(), &spec(), DISK_BYTES, &BTreeSet::new(), &options)
            .expect("a new disk in memory");
        for grain in GRAINS {
            let data = vec![grain as u8 | 1; CHUNK];
            disk.write(&[WriteAt { offset: grain * CHUNK as u64, data: &data }]).expect("memory");
        }
        disk.close().expect("memory");
        files.bytes(PATH)
    })
}

fn spec() -> TargetSpec {
    TargetSpec { path: PATH.into(), kind: TargetKind::MonolithicSparse }
}

/// Changes of the base disk: seven bytes each, a region, a place in it in 32-bit words, the new word. The content of
/// the regions stays what the writers of other programs or a crash might leave there.
pub fn disk(data: &[u8]) {
    let mut bytes = base().to_vec();
    let header = SparseHeader::decode(&bytes).expect("the base disk has a header");
    let table = |words: &[u8], at: u64| {
        let entry = words.get((at * SECTOR_BYTES) as usize..)?.first_chunk::<4>()?;
        Some(u64::from(u32::from_le_bytes(*entry)))
    };
    let Directory::At(primary) = header.directory else { return };
    let redundant = header.redundant_directory.unwrap_or(primary);
    let regions = [
        (0, 1),
        (primary, 1),
        (redundant, 1),
        (table(&bytes, primary).unwrap_or(primary), 2 * TABLE_SECTORS),
        (table(&bytes, redundant).unwrap_or(redundant), 2 * TABLE_SECTORS),
        (1, 20),
    ];
    for change in data.as_chunks::<7>().0 {
        let [region, low, high, value @ ..] = *change;
        let (start, sectors) = regions[usize::from(region) % regions.len()];
        let word = usize::from(u16::from_le_bytes([low, high])) % (sectors * SECTOR_BYTES / 4) as usize;
        let at = (start * SECTOR_BYTES) as usize + word * 4;
        if let Some(slot) = bytes.get_mut(at..at + 4) {
            slot.copy_from_slice(&value);
        }
    }
    let files = MemoryFiles::default();
    files.put(PATH, &bytes);
    exercise(&files.opener());
}

/// Opens, reads, writes, closes, opens again.
fn exercise(opener: &Arc<dyn Files>) {
    if !reprotect_engine::store::vmdk::open::check_vmdk(&**opener, Path::new(PATH))
        .is_ok_and(|checked| checked.descriptor.sectors() * SECTOR_BYTES <= READ_BYTES_MAX)
    {
        return;
    }
    let open = || open_target(opener, &spec(), &Expectation { writable: true, ..Expectation::default() });
    let Ok(mut disk) = open() else { return };
    let Ok(mut content) = read_all(&mut disk) else { return };
    let size = disk.size_bytes();
    // Somewhere behind the first chunk, which is zeroed, as far as the disk is that long.
    let (place, zeroed) = (size / 2 / 512 * 512, ByteRange { start: 0, end: size.min(CHUNK as u64) });
    if place < zeroed.end || disk.write(&[WriteAt { offset: place, data: &[0xa5; 512] }]).is_err() {
        return; // a full extent refuses; then nothing is claimed about it
    }
    if disk.zero(zeroed).is_err() {
        return;
    }
    content.remove(&0);
    let (chunk, inside) = (place / CHUNK as u64, place as usize % CHUNK);
    let bytes = content.entry(chunk).or_insert_with(|| vec![0; CHUNK.min((size - place) as usize + inside)]);
    bytes[inside..inside + 512].fill(0xa5);
    disk.close().expect("memory takes every flush");
    let mut again = open().expect("a disk that was closed cleanly opens");
    assert!(again.repair().is_nothing(), "left to repair after a clean close: {:?}", again.repair());
    assert!(
        read_all(&mut again).expect("it reads") == content,
        "the disk reads otherwise after a clean close"
    );
}

/// The chunks that are not zeros, by number.
fn read_all(disk: &mut Target) -> Result<BTreeMap<u64, Vec<u8>>, BlockError> {
    let size = disk.size_bytes();
    let mut content = BTreeMap::new();
    for range in disk.allocated(ByteRange { start: 0, end: size })? {
        for chunk in range.start / CHUNK as u64..range.end.div_ceil(CHUNK as u64) {
            let offset = chunk * CHUNK as u64;
            let mut data = vec![0; CHUNK.min((size - offset) as usize)];
            disk.read(&mut [ReadAt { offset, data: &mut data }])?;
            if data.iter().any(|byte| *byte != 0) {
                content.insert(chunk, data);
            }
        }
    }
    Ok(content)
}
