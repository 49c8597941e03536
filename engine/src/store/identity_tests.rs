//! Tests of probing and pairing: tables made by hand, file systems made by their own tools where those are installed.

use std::path::Path;
use std::process::Command;

use proptest::prelude::*;

use super::*;
use crate::io::memory::MemoryFile;
use crate::io::{BlockOp, WriteAt};
use crate::store::files::Files as _;
use crate::store::files::memory::MemoryFiles;

const MIB: usize = 1 << 20;

fn probe(image: &[u8]) -> DiskIdentity {
    let files = MemoryFiles::default();
    files.put("/disk", image);
    DiskIdentity::probe(&mut *files.open(Path::new("/disk"), false).unwrap()).unwrap()
}

fn put(image: &mut [u8], at: usize, data: &[u8]) {
    image[at..at + data.len()].copy_from_slice(data);
}

/// An ext superblock with this UUID, at a partition's start.
fn put_ext(image: &mut [u8], start: usize, uuid: [u8; 16]) {
    put(image, start + 1024 + 56, &[0x53, 0xef]);
    put(image, start + 1024 + 104, &uuid);
}

fn put_mbr_entry(image: &mut [u8], at: usize, number: usize, kind: u8, start: u32, count: u32) {
    let entry = at + 446 + number * 16;
    image[entry + 4] = kind;
    put(image, entry + 8, &start.to_le_bytes());
    put(image, entry + 12, &count.to_le_bytes());
    put(image, at + 510, &[0x55, 0xaa]);
}

/// A GPT with one partition from 1 MiB to 3 MiB, primary and backup.
fn gpt_image(guid: [u8; 16]) -> Vec<u8> {
    let mut image = vec![0; 4 * MIB];
    let last = (image.len() / 512 - 1) as u64;
    put_mbr_entry(&mut image, 0, 0, 0xee, 1, last as u32);
    let mut entries = vec![0_u8; 128 * 128];
    put(&mut entries, 0, &[0xaf; 16]);
    put(&mut entries, 32, &2048_u64.to_le_bytes());
    put(&mut entries, 40, &6143_u64.to_le_bytes());
    for (own, other, first) in [(1, last, 2), (last, 1, last - 32)] {
        let mut header = [0_u8; 92];
        put(&mut header, 0, b"EFI PART\0\0\x01\0\x5c\0\0\0");
        for (at, value) in [(24, own), (32, other), (40, 34), (48, last - 33), (72, first)] {
            put(&mut header, at, &value.to_le_bytes());
        }
        put(&mut header, 56, &guid);
        put(&mut header, 80, &128_u32.to_le_bytes());
        put(&mut header, 84, &128_u32.to_le_bytes());
        put(&mut header, 88, &crc32(&entries).to_le_bytes());
        let crc = crc32(&header);
        put(&mut header, 16, &crc.to_le_bytes());
        put(&mut image, own as usize * 512, &header);
        put(&mut image, first as usize * 512, &entries);
    }
    put_ext(&mut image, MIB, [0x11; 16]);
    image
}

#[test]
fn a_gpt_is_read_from_its_backup_when_the_primary_is_damaged() {
    let mut image = gpt_image([0xab; 16]);
    let whole = probe(&image);
    assert_eq!(whole.gpt_disk_guid.as_deref(), Some("abababab-abab-abab-abab-abababababab"));
    assert_eq!(whole.mbr_signature, None);
    assert_eq!(
        whole.partitions,
        [Partition {
            range: ByteRange { start: MIB as u64, end: 3 * MIB as u64 },
            content: Some(Content {
                kind: ContentKind::Ext,
                uuid: "11111111-1111-1111-1111-111111111111".into()
            }),
        }]
    );
    image[512 + 60] ^= 1; // the GUID: only the checksum tells
    assert_eq!(probe(&image), whole);
    let end = image.len();
    image[end - 512 + 60] ^= 1;
    assert_eq!(probe(&image).gpt_disk_guid, None);
    let mut image = gpt_image([0xab; 16]);
    image[1024] ^= 1; // an entry of the primary
    assert_eq!(probe(&image), whole);
}

#[test]
fn an_mbr_gives_primary_and_logical_partitions_even_in_a_loop() {
    let mut image = vec![0; 8 * MIB];
    put(&mut image, 440, &0x1234_abcd_u32.to_le_bytes());
    put_mbr_entry(&mut image, 0, 0, 0x83, 2048, 2048);
    put_mbr_entry(&mut image, 0, 1, 0x05, 4096, 8192);
    put_mbr_entry(&mut image, 0, 2, 0x83, 4096, u32::MAX); // beyond the disk
    put_ext(&mut image, MIB, [0x22; 16]);
    let extended = 4096 * 512;
    put_mbr_entry(&mut image, extended, 0, 0x83, 63, 1000);
    put_mbr_entry(&mut image, extended, 1, 0x05, 2048, 2048);
    put_mbr_entry(&mut image, extended + 2048 * 512, 0, 0x83, 63, 500);
    let found = probe(&image);
    assert_eq!(found.mbr_signature, Some(0x1234_abcd));
    let starts: Vec<u64> = found.partitions.iter().map(|p| p.range.start / 512).collect();
    assert_eq!(starts, [2048, 4096 + 63, 4096 + 2048 + 63]);
    assert!(found.partitions[0].content.is_some());
    put_mbr_entry(&mut image, extended + 2048 * 512, 1, 0x05, 2048, 2048); // to itself
    assert_eq!(probe(&image).partitions.len(), 1 + LOGICAL_MAX);
}

#[test]
fn contents_are_recognised_on_the_bare_disk() {
    let uuid: [u8; 16] = std::array::from_fn(|n| n as u8 + 1);
    let text = "01020304-0506-0708-090a-0b0c0d0e0f10";
    type Fill<'a> = &'a dyn Fn(&mut [u8]);
    let cases: [(ContentKind, &str, Fill<'_>); 8] = [
        (ContentKind::Xfs, text, &|i| {
            put(i, 0, b"XFSB");
            put(i, 32, &uuid)
        }),
        (ContentKind::Btrfs, text, &|i| {
            put(i, 0x10040, b"_BHRfS_M");
            put(i, 0x10020, &uuid)
        }),
        (ContentKind::Swap, text, &|i| {
            put(i, 4086, b"SWAPSPACE2");
            put(i, 1036, &uuid)
        }),
        (ContentKind::Ext, text, &|i| put_ext(i, 0, uuid)),
        (ContentKind::LvmPhysicalVolume, "abcdef-0123-4567-89AB-CDEF-ghij-klmnop", &|i| {
            put(
                i,
                512,
                b"LABELONE\x01\0\0\0\0\0\0\0\0\0\0\0\x20\0\0\0LVM2 001abcdef0123456789ABCDEFghijklmnop",
            );
        }),
        (ContentKind::Luks, text, &|i| {
            put(i, 0, b"LUKS\xba\xbe");
            put(i, 168, text.as_bytes())
        }),
        (ContentKind::Ntfs, "0102030405060708", &|i| {
            put(i, 3, b"NTFS    ");
            put(i, 72, &0x0102_0304_0506_0708_u64.to_le_bytes());
            put(i, 510, &[0x55, 0xaa]);
        }),
        (ContentKind::Fat, "1234-ABCD", &|i| {
            put(i, 82, b"FAT32   ");
            put(i, 67, &0x1234_abcd_u32.to_le_bytes());
            put(i, 510, &[0x55, 0xaa]);
        }),
    ];
    for (kind, uuid, fill) in cases {
        let mut image = vec![0; MIB];
        fill(&mut image);
        let found = probe(&image);
        assert_eq!(found.partitions.len(), 1, "{kind:?}");
        assert_eq!(found.partitions[0].content, Some(Content { kind, uuid: uuid.into() }));
        assert_eq!(found.mbr_signature, None, "{kind:?}");
    }
    assert!(probe(&vec![0; MIB]).partitions.is_empty());
    assert!(probe(&[]).partitions.is_empty());
}

/// Makes a file system with its own tool and probes it; loudly skipped where the tool is missing.
fn made_by(tool: &str, args: &[&str], kind: ContentKind, uuid: &str) {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    std::fs::File::create(&image).unwrap().set_len(400 * MIB as u64).unwrap(); // XFS wants 300
    let Ok(out) = Command::new(tool).args(args).arg(&image).output() else {
        eprintln!("SKIPPED: {tool} is not installed");
        return;
    };
    assert!(out.status.success(), "{tool}: {}", String::from_utf8_lossy(&out.stderr));
    let mut bytes = vec![0; MIB];
    std::io::Read::read_exact(&mut std::fs::File::open(&image).unwrap(), &mut bytes).unwrap();
    assert_eq!(probe(&bytes).partitions[0].content, Some(Content { kind, uuid: uuid.into() }));
}

#[test]
fn file_systems_made_by_their_own_tools_are_recognised() {
    let uuid = "a1b2c3d4-0001-4000-8000-0123456789ab";
    made_by("mkfs.ext4", &["-q", "-F", "-U", uuid], ContentKind::Ext, uuid);
    made_by("mkswap", &["-q", "-U", uuid], ContentKind::Swap, uuid);
    made_by("mkfs.xfs", &["-q", "-f", "-m", &format!("uuid={uuid}")], ContentKind::Xfs, uuid);
    made_by("mkfs.btrfs", &["-q", "-f", "-U", uuid], ContentKind::Btrfs, uuid);
    made_by("mkfs.vfat", &["-i", "1234abcd"], ContentKind::Fat, "1234-ABCD");
}

fn disk(size: u64, guid: &str, contents: &[&str]) -> DiskIdentity {
    DiskIdentity {
        size_bytes: size,
        gpt_disk_guid: (!guid.is_empty()).then(|| guid.into()),
        mbr_signature: None,
        partitions: contents
            .iter()
            .map(|uuid| Partition {
                range: ByteRange { start: 0, end: size },
                content: Some(Content { kind: ContentKind::Ext, uuid: (*uuid).into() }),
            })
            .collect(),
    }
}

fn named(disks: &[(&str, DiskIdentity)]) -> Vec<(String, DiskIdentity)> {
    disks.iter().map(|(name, disk)| ((*name).to_owned(), disk.clone())).collect()
}

#[test]
fn what_cannot_be_read_tells_nothing_but_a_table_that_must_be_there_is_not_passed_over() {
    let probe = |is_protective: bool, failing: Option<u64>| {
        let mut file = MemoryFile::new(1 << 20);
        let mut first = [0; 512];
        if is_protective {
            first[446 + 4] = 0xee;
            first[446 + 8] = 1;
            first[446 + 12..446 + 16].fill(0xff);
            first[510..].copy_from_slice(&[0x55, 0xaa]);
        }
        file.write(&[WriteAt { offset: 0, data: &first }]).unwrap();
        if let Some(nth) = failing {
            file.inject(BlockOp::Read, nth, std::io::ErrorKind::Other);
        }
        DiskIdentity::probe(&mut file)
    };
    // First sector, primary table, backup table, content.
    for nth in 1..4 {
        assert_eq!(probe(false, Some(nth)).unwrap().gpt_disk_guid, None);
    }
    assert!(probe(false, Some(0)).is_err(), "nothing is known of it");
    assert!(probe(true, Some(1)).is_err() && probe(true, Some(2)).is_err(), "it has a table");
    assert!(probe(true, None).is_ok());
}

#[test]
fn pairs_follow_identity_and_size() {
    let sources = named(&[
        ("sda", disk(10, "g1", &["a", "b"])),
        ("sdb", disk(10, "", &["c"])),
        ("sdc", disk(20, "", &["x"])),
    ]);
    let targets = named(&[
        ("data.vmdk", disk(10, "", &["c"])),
        ("other.vmdk", disk(10, "g9", &["a", "b"])),
        ("os.vmdk", disk(10, "g1", &["a"])),
        ("small.vmdk", disk(19, "", &["x"])),
    ]);
    let pairs = propose_pairs(&sources, &targets).unwrap();
    assert_eq!(pairs, [Pair { source: 0, target: 2, score: 110 }, Pair { source: 1, target: 0, score: 10 }]);
}

#[test]
fn clones_are_refused_with_every_candidate_named() {
    let clone = || disk(10, "g1", &["a"]);
    let error = propose_pairs(&named(&[("sda", clone())]), &named(&[("one", clone()), ("two", clone())]))
        .unwrap_err();
    assert_eq!(error, Ambiguity { sources: vec!["sda".into()], targets: vec!["one".into(), "two".into()] });
    assert!(error.to_string().contains("\"two\""));
    let error = propose_pairs(&named(&[("sda", clone()), ("sdb", clone())]), &named(&[("one", clone())]))
        .unwrap_err();
    assert_eq!(error.sources, ["sda", "sdb"]);
    // A weaker claim does not stand against a better one.
    let weaker = disk(10, "", &["a"]);
    let pairs =
        propose_pairs(&named(&[("sda", clone())]), &named(&[("one", clone()), ("two", weaker)])).unwrap();
    assert_eq!(pairs[0].target, 0);
}

proptest! {
    #[test]
    fn any_content_can_be_probed(edits in proptest::collection::vec((0_usize..4 * MIB, any::<u8>()), 0..30),
        near in proptest::collection::vec((0_usize..2048, any::<u8>()), 0..30))
    {
        let mut image = gpt_image([1; 16]);
        for (at, byte) in edits.into_iter().chain(near) { image[at] = byte; }
        let found = probe(&image);
        prop_assert!(found.partitions.iter().all(|p| p.range.start < p.range.end && p.range.end <= found.size_bytes));
    }
}
