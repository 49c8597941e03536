//! The byte tables of the documents are derived from the structures, so that neither can drift:
//! `UPDATE_GOLDEN=1 cargo test -p reprotect-engine --test docs` rewrites them between their markers.
//!
//! A table stands between `<!-- table:NAME -->` and `<!-- end -->`; NAME is a structure (offset, size, field, meaning)
//! or an enumeration (value, name, meaning).

#![expect(clippy::unwrap_used, reason = "a failed step is a failed test")]

use std::fmt::Write as _;
use std::path::PathBuf;

use reprotect_engine::format::undo::{frame as undo_frame, index as undo_index};
use reprotect_engine::format::wire::{Row, ValueRow};
use reprotect_engine::format::{
    batch, crc_map, disk_state, extent, frame, handshake, manifest, message, segment, segment_index, standby,
    undo,
};

enum Table {
    Structure(usize, &'static [Row]),
    Values(&'static [ValueRow]),
}

macro_rules! tables {
    ($($module:ident: $($structure:ident)* | $($values:ident)*;)*) => {
        vec![$(
            $((stringify!($structure), Table::Structure($module::$structure::BYTES, $module::$structure::TABLE)),)*
            $((stringify!($values), Table::Values($module::$values::TABLE)),)*
        )*]
    };
}

/// Every structure and enumeration that is documented.
fn tables() -> Vec<(&'static str, Table)> {
    tables! {
        frame: FrameHeader | FrameKind;
        handshake: Hello HelloAck | Role;
        message: AuthHead Welcome InventoryHead InventoryDisk OfferHead OpenDiskHead GrantHead Ack BulkAckHead Credit
            Nack Fenced CompareRequestHead RefineUnit CompareHashesHead PassBegin PassState PassEnd PointDegrade Policy MarkRequest
            MarkRefused GrowDisk ErrorHead
            | PassMode PassCause NackReason ErrorCode;
        standby: Probe Load |;
        batch: BatchHeader BulkHeader Mark | Stretch MarkClass;
        extent: RecordHeader | RecordKind Codec;
        disk_state: DiskStateHead |;
        segment: SegmentHeader GroupHeader EntryHead Applied | EntryKind;
        segment_index: SegmentIndexHead SegmentIndexItem |;
        manifest: Superblock ManifestHeader EditHead SegmentOpened Released DiskAdded DiskRemoved EpochOpened
            EpochClosed RunsMerged EpochsExpired PointKept PointDropped StretchDegraded EntriesLost LossMended
            ImagesDamaged ImagesSound EntryDamaged EntrySound DiskGrown
            | EditKind EpochCause;
        crc_map: MapHeader MapPageHead |;
        undo: RunHeader |;
        undo_frame: FrameHead | UndoCodec;
        undo_index: PageHead IndexEntry Trailer | PageKind;
    }
}

/// Documentation as one line of a table: links to items become their names.
fn plain(meaning: &str) -> String {
    meaning.trim().replace("[`", "`").replace("`]", "`").replace('|', "\\|")
}

fn render(table: &Table) -> String {
    let mut out = String::new();
    match table {
        Table::Structure(bytes, rows) => {
            out.push_str("| offset | size | field | meaning |\n|---:|---:|---|---|\n");
            for row in *rows {
                let reserved = row.field.starts_with("reserved");
                let meaning =
                    if reserved { "zeros; anything else is refused".into() } else { plain(row.meaning) };
                writeln!(out, "| {} | {} | `{}` | {meaning} |", row.offset, row.size, row.field).unwrap();
            }
            writeln!(out, "| {bytes} | | | |").unwrap();
        }
        Table::Values(rows) => {
            out.push_str("| value | name | meaning |\n|---:|---|---|\n");
            for row in *rows {
                writeln!(out, "| {} | `{}` | {} |", row.value, row.name, plain(row.meaning)).unwrap();
            }
        }
    }
    out
}

const END: &str = "<!-- end -->";

/// The document with every table as it must be, and the names of the tables in it.
fn with_tables(text: &str, all: &[(&str, Table)]) -> (String, Vec<String>) {
    let (mut out, mut seen, mut rest) = (String::new(), Vec::new(), text);
    while let Some((before, after)) = rest.split_once("<!-- table:") {
        let (name, after) = after.split_once(" -->\n").expect("a marker on a line of its own");
        let (_, after) = after.split_once(END).unwrap_or_else(|| panic!("table:{name} has no end marker"));
        let (_, table) = all
            .iter()
            .find(|(known, _)| *known == name)
            .unwrap_or_else(|| panic!("no structure is called {name}"));
        write!(out, "{before}<!-- table:{name} -->\n{}{END}", render(table)).unwrap();
        seen.push(name.to_owned());
        rest = after;
    }
    out.push_str(rest);
    (out, seen)
}

#[test]
fn every_structure_has_its_byte_table_in_the_documents() {
    let all = tables();
    let mut documented = Vec::new();
    for name in ["wire.md", "disk.md"] {
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("docs").join(name);
        let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{name}: {error}"));
        let (right, seen) = with_tables(&text, &all);
        documented.extend(seen);
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            std::fs::write(&path, &right).unwrap();
        } else {
            assert!(right == text, "{name} drifted from the structures; UPDATE_GOLDEN=1 rewrites its tables");
        }
    }
    let mut wanted: Vec<String> = all.iter().map(|(name, _)| (*name).to_owned()).collect();
    wanted.sort();
    documented.sort();
    assert_eq!(documented, wanted, "each table stands in the documents once");
}

#[test]
fn byte_tables_have_no_gap_and_no_overlap() {
    for (name, table) in tables() {
        let Table::Structure(bytes, rows) = table else { continue };
        let mut at = 0;
        for row in rows {
            assert_eq!(row.offset, at, "{name}.{}", row.field);
            at += row.size;
        }
        assert_eq!(at, bytes, "{name}");
    }
}

#[test]
fn every_field_and_value_says_what_it_means() {
    for (name, table) in tables() {
        match table {
            Table::Structure(_, rows) => {
                for row in rows.iter().filter(|row| !row.field.starts_with("reserved")) {
                    assert!(!row.meaning.trim().is_empty(), "{name}.{}", row.field);
                }
            }
            Table::Values(rows) => {
                assert!(rows.iter().all(|row| !row.meaning.trim().is_empty()), "{name}");
                let mut values: Vec<u64> = rows.iter().map(|row| row.value).collect();
                values.dedup();
                assert_eq!(values.len(), rows.len(), "{name}: a value is used twice");
            }
        }
    }
}
