//! Writes the seed corpus: `cargo run -p reprotect-fuzz --example make_corpus`. Seeds of decoders come from the golden
//! files, seeds of sessions are scripts (see `src/script.rs`). Files that are already there and not seeds are kept.

use std::path::Path;

use reprotect_engine::format::frame::{FrameHeader, FrameKind};
use reprotect_engine::format::nbd::option::{ClientFlags, ContextQuery, ExportQuery, OptionRequest};
use reprotect_engine::format::nbd::request::{Command, Request, command_flags};
use reprotect_engine::format::vmdk::sparse::{Directory, FLAG_NEWLINES, FLAG_REDUNDANT, SparseHeader};
use reprotect_engine::units::SectorRange;
use reprotect_fuzz::mutate::Random;

type Sections = Vec<(String, Vec<u8>)>;

/// Reads a golden file: `== NAME`, then `offset: hex` lines.
fn golden(name: &str) -> Sections {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../engine/tests/golden").join(name);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut sections = Sections::new();
    for line in text.lines() {
        if let Some(name) = line.strip_prefix("== ") {
            sections.push((name.to_owned(), Vec::new()));
        } else if let (Some((_, hex)), Some(last)) = (line.split_once(": "), sections.last_mut()) {
            last.1.extend(hex.split(' ').filter_map(|byte| u8::from_str_radix(byte, 16).ok()));
        }
    }
    sections
}

fn write(target: &str, name: &str, bytes: &[u8]) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    let name: String =
        name.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '_' }).collect();
    std::fs::create_dir_all(&folder).and_then(|()| std::fs::write(folder.join(name), bytes)).expect("corpus");
}

/// A frame as seeds of `frame`, of `message` (kind byte before the body) and of its batch target.
fn frame(name: &str, bytes: &[u8]) {
    write("frame", name, bytes);
    let (head, body) = bytes.split_first_chunk().expect("a frame");
    let kind = FrameHeader::decode(head).expect("a golden frame").kind;
    match kind {
        FrameKind::Batch => write("batch", name, body),
        FrameKind::Bulk => write("bulk", name, body),
        _ => {
            let index = FrameKind::ALL.iter().position(|other| *other == kind).expect("a kind") as u8;
            write("message", name, &[&[index], body].concat());
        }
    }
}

/// A script: the opening steps given, then random ones of which `usual` come more often.
fn script(target: &str, name: &str, opening: &[&[u8]], usual: &[u8], seed: u64) {
    let mut random = Random::new(seed);
    let mut bytes: Vec<u8> = opening.concat();
    for _ in 0..60 {
        bytes.push(usual[random.below(usual.len())]);
        // small arguments are the sensible ones
        let calm = random.below(4) > 0;
        bytes.extend((0..random.below(12)).map(|_| random.next() as u8 % if calm { 128 } else { 255 }));
    }
    write(target, name, &bytes);
}

fn main() {
    for (name, bytes) in golden("handshake.txt") {
        if name.contains("frame") { frame(&name, &bytes) } else { write("hello", &name, &bytes) }
    }
    for (name, bytes) in golden("messages.txt") {
        frame(&name, &bytes);
    }
    for (name, bytes) in golden("batches.txt") {
        if !name.starts_with("chain") {
            frame(&name, &bytes);
        }
    }
    for (name, bytes) in golden("records.txt") {
        write("record", &name, &bytes);
    }
    for (name, bytes) in golden("disk_state.txt") {
        write("disk_state", &name, &bytes);
    }
    journal();
    vmdk();
    nbd();
    sessions();
}

/// The structures of a journal, and patches of a whole one (see `src/journal.rs`: file, place, change).
fn journal() {
    for (name, bytes) in golden("manifest.txt") {
        let target = if name == "Superblock" { "superblock" } else { "manifest" };
        write(target, &name, &padded(&bytes));
    }
    for (name, bytes) in golden("segment.txt") {
        write("segment", &name, &padded(&bytes));
    }
    let index = golden("segment_index.txt");
    write("segment_index", "whole", &index.iter().flat_map(|(_, bytes)| padded(bytes)).collect::<Vec<_>>());
    for (name, bytes) in index.iter().skip(1) {
        write("segment_index", name, &padded(bytes));
    }
    for (name, bytes) in golden("undo_run.txt") {
        write("undo_run", &name, &padded(&bytes));
    }
    for (name, bytes) in golden("batches.txt") {
        let Some((head, body)) = bytes.split_first_chunk() else { continue };
        match FrameHeader::decode(head).map(|header| header.kind) {
            Ok(FrameKind::Batch) => write("redo_entry", &name, &[&[0], body].concat()),
            // A bulk entry says first which ranges may be written: all of them.
            Ok(FrameKind::Bulk) => {
                let keep = [&1_u32.to_le_bytes()[..], &[0; 8], &(1_u64 << 21).to_le_bytes()].concat();
                write("redo_entry", &name, &[&[1], keep.as_slice(), body].concat());
            }
            _ => {}
        }
    }
    for file in 0..8_u8 {
        for (name, how) in [("flip", 3), ("flip and put right", 2), ("cut", 0), ("remove", 1)] {
            write("journal", &format!("{name} {file}"), &[file, 31 * file, 0, 0x11, 0, how]);
        }
    }
    write("journal", "nothing", &[]);
}

/// A structure in its block of 4 KiB.
fn padded(bytes: &[u8]) -> Vec<u8> {
    let mut block = bytes.to_vec();
    block.resize(bytes.len().next_multiple_of(4096), 0);
    block
}

/// What a client says: flags, options, requests (see `src/nbd.rs`).
fn nbd() {
    let export = |name: &str| ExportQuery { name: name.to_owned(), wanted: vec![0, 1, 3] };
    let contexts = |queries: &[&str]| ContextQuery {
        name: "disk".to_owned(),
        queries: queries.iter().map(|query| (*query).to_owned()).collect(),
    };
    let request = |command, flags, offset, length| {
        Request { flags, command, cookie: 7, offset, length }.to_bytes().to_vec()
    };
    let flags = ClientFlags { no_zeroes: true }.to_bytes().to_vec();
    let usual = [
        OptionRequest::StructuredReply.encode(),
        OptionRequest::SetContexts(contexts(&["base:allocation"])).encode(),
        OptionRequest::Go(export("disk")).encode(),
    ]
    .concat();
    let requests = [
        request(Command::Read, command_flags::DF, 4096, 65536),
        [request(Command::Write, command_flags::FUA, 512, 16), vec![0xA5; 16]].concat(),
        request(Command::Flush, 0, 0, 0),
        request(Command::Trim, 0, 0, 1 << 20),
        request(Command::WriteZeroes, command_flags::NO_HOLE, 1 << 20, 1 << 20),
        request(Command::BlockStatus, command_flags::REQ_ONE, 0, u32::MAX),
        request(Command::Cache, 0, 0, 512),
        request(Command::Disconnect, 0, 0, 0),
    ]
    .concat();
    write("nbd", "usual", &[flags.as_slice(), &usual, &requests].concat());
    let old = OptionRequest::ExportName("disk".to_owned()).encode();
    write("nbd", "old", &[flags.as_slice(), &old, &requests].concat());
    let others = [
        OptionRequest::StartTls.encode(),
        OptionRequest::List.encode(),
        OptionRequest::Info(export("")).encode(),
        OptionRequest::ListContexts(contexts(&["base:", "qemu:dirty-bitmap:x"])).encode(),
        OptionRequest::Other(11).encode(),
        OptionRequest::Abort.encode(),
    ];
    write("nbd", "others", &[flags.as_slice(), &others.concat()].concat());
}

/// Descriptors as VMware's products write them and with what is rare; headers of plain and stream-optimised extents;
/// changes of a sparse disk (see `src/vmdk.rs`: region, word, value).
fn vmdk() {
    let head = "# Disk DescriptorFile\nversion=1\nencoding=\"UTF-8\"\nCID=123abcde\nparentCID=ffffffff\n";
    let ddb = "ddb.adapterType = \"lsilogic\"\nddb.geometry.cylinders = \"20\"\nddb.geometry.heads = \"16\"\n\
        ddb.geometry.sectors = \"63\"\nddb.longContentID = \"00112233445566778899aabbccddeeff\"\n\
        ddb.uuid = \"60 00 C2 9a 01 02 03 04-05 06 07 08 09 0a 0b 0c\"\nddb.virtualHWVersion = \"14\"\n";
    for (name, kind, extents) in [
        ("flat", "monolithicFlat", "RW 20480 FLAT \"disk-flat.vmdk\" 0\n"),
        ("vmfs", "vmfs", "RW 20480 VMFS \"disk-flat.vmdk\"\n"),
        ("sparse", "monolithicSparse", "RW 20480 SPARSE \"disk.vmdk\"\n"),
        (
            "split",
            "twoGbMaxExtentSparse",
            "RW 4192256 SPARSE \"disk-s001.vmdk\"\nRW 1 SPARSE \"disk-s002.vmdk\"\n",
        ),
        ("stream", "streamOptimized", "RDONLY 20480 SPARSE \"disk.vmdk\"\n"),
        ("mapping", "vmfsRawDeviceMap", "RW 20480 VMFSRDM \"disk-rdm.vmdk\"\nRW 8 ZERO\n"),
    ] {
        let text = format!("{head}createType=\"{kind}\"\n\n{extents}\n# The Disk Data Base\n#DDB\n\n{ddb}");
        write("vmdk_descriptor", name, text.as_bytes());
        let tracked = text.replace("version=1", "version=3") + "changeTrackPath=\"disk-ctk.vmdk\"\r\n";
        write("vmdk_descriptor", &format!("{name} tracked"), tracked.as_bytes());
    }
    let plain = SparseHeader {
        version: 1,
        flags: FLAG_NEWLINES | FLAG_REDUNDANT,
        capacity: 20480,
        grain_sectors: 128,
        descriptor: SectorRange::from_len(1, 20),
        redundant_directory: Some(21),
        directory: Directory::At(26),
        overhead: 128,
        unclean: false,
        compression: 0,
    };
    write("vmdk_header", "plain", &plain.encode());
    write("vmdk_header", "unclean", &SparseHeader { unclean: true, ..plain.clone() }.encode());
    let stream = SparseHeader {
        version: 3,
        flags: 0x30001,
        redundant_directory: None,
        directory: Directory::InFooter,
        compression: 1,
        ..plain
    };
    write("vmdk_header", "stream", &stream.encode());
    write("vmdk_disk", "untouched", &[]);
    let unclean = [0, 18, 0, 1, 0x0a, 0x20, 0x0d];
    for (name, change) in [
        ("unclean", unclean),
        ("no_directory_entry", [1, 0, 0, 0, 0, 0, 0]),
        ("directory_entry_outside", [2, 0, 0, 0xff, 0xff, 0xff, 0x7f]),
        ("grain_outside", [3, 1, 0, 0xff, 0xff, 0xff, 0x7f]),
        ("grain_lost_in_one_copy", [4, 1, 0, 0, 0, 0, 0]),
        ("grain_shared", [3, 50, 0, 128, 1, 0, 0]),
        ("descriptor", [5, 30, 0, b'z', b'z', b'z', b'z']),
    ] {
        write("vmdk_disk", name, &change);
        write("vmdk_disk", &format!("{name} unclean"), &[unclean, change].concat());
    }
}

fn sessions() {
    // Each opening brings the session to an open disk; see the `step` function of each session for the numbers.
    let agent: &[&[u8]] =
        &[&[0], &[0; 5], &[1, 0, 4, 0, 0, 0], &[3, 0, 1, 0, 0, 0, 0, 0, 1, 0], &[5, 0, 0, 0xff, 0xff, 0, 0]];
    let target: &[&[u8]] = &[&[0; 8], &[4, 0, 0, 0, 0], &[12, 31]];
    let relay: &[&[u8]] = &[&[0; 8], &[1, 0, 0, 0, 0], &[2, 0, 0xff, 0xff, 0, 0]];
    for seed in 0..8_u64 {
        let name = format!("script_{seed}");
        script(
            "agent_session",
            &name,
            agent,
            &[3, 5, 6, 7, 9, 12, 13, 14, 18, 19, 20, 21, 21, 22, 23, 11, 15],
            seed,
        );
        script("target_session", &name, target, &[4, 5, 5, 5, 6, 6, 7, 8, 9, 10, 12, 12, 12, 13, 14], seed);
        script("relay_session", &name, relay, &[1, 2, 3, 3, 3, 4, 4, 5, 6, 7, 8, 8, 9, 9], seed);
    }
    for target in ["agent_session", "target_session", "relay_session"] {
        write(target, "nothing", &[]);
        write(target, "every_step_once", &(0..=255_u8).collect::<Vec<_>>());
    }
}
