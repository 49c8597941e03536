//! `journal dump`: what stands in the files of a retention folder, line by line.
//!
//! Invariants: output is bounded: of each kind so many lines are shown and the rest is counted; what cannot be read
//! is a line of its own. Called by `commands::journal`.

use reprotect_engine::format::manifest::SegmentOpened;
use reprotect_engine::host::output::{Output, printable};
use reprotect_engine::store::journal::indexed::FoundIndex;
use reprotect_engine::store::journal::offline::Offline;
use reprotect_engine::store::journal::recovery::Seen;
use reprotect_engine::store::journal::undo::{BlockRange, Found, Place};
use reprotect_engine::units::{BLOCK_BYTES, DiskId};
use serde::Serialize;

use super::{find_disk, open};
use crate::catalogue::hex;
use crate::cli::copies::JournalDumpArgs;

#[derive(Debug, Default, Serialize)]
struct Dump {
    sections: Vec<Section>,
}

#[derive(Debug, Serialize)]
struct Section {
    /// `superblock`, `edits`, `log`, or an undo run.
    name: String,
    lines: Vec<Line>,
    /// Lines that were not shown.
    left_out: u64,
}

#[derive(Debug, Serialize)]
struct Line {
    offset: u64,
    kind: &'static str,
    what: String,
}

impl Section {
    const fn new(name: String) -> Self {
        Self { name, lines: Vec::new(), left_out: 0 }
    }

    fn add(&mut self, limit: usize, offset: u64, kind: &'static str, what: impl FnOnce() -> String) {
        if self.lines.len() < limit {
            self.lines.push(Line { offset, kind, what: what() });
        } else {
            self.left_out += 1;
        }
    }
}

pub(super) fn dump(args: &JournalDumpArgs, output: Output) -> anyhow::Result<()> {
    let offline = open(&args.folder, args.beside)?;
    let disk = args.disk.as_deref().map(|name| find_disk(&offline, name)).transpose()?;
    let mut dump = Dump::default();
    if disk.is_none() && args.segment.is_none() {
        dump.sections.push(superblock(&offline)?);
    }
    if args.segment.is_none() {
        dump.sections.push(edits(&offline, disk, args.limit)?);
    }
    dump.sections.extend(log(&offline, disk, args)?);
    if args.segment.is_none() {
        runs(&offline, disk, args.limit, &mut dump)?;
    }
    output.result(&dump, || render(&dump))?;
    Ok(())
}

fn superblock(offline: &Offline) -> anyhow::Result<Section> {
    let mut section = Section::new("superblock".to_owned());
    for (copy, offset) in offline.superblock_copies()?.into_iter().zip((0..).step_by(4096)) {
        section.add(usize::MAX, offset, "copy", || match copy {
            None => "never written".to_owned(),
            Some(Err(error)) => format!("damaged: {error}"),
            Some(Ok(copy)) => format!(
                "generation {}, journal {}, manifest {}, durable group {}, {}",
                copy.generation,
                hex(&copy.journal),
                copy.manifest,
                copy.durable_group,
                if copy.clean { "closed in order" } else { "in use" }
            ),
        });
    }
    Ok(section)
}

fn edits(offline: &Offline, disk: Option<DiskId>, limit: usize) -> anyhow::Result<Section> {
    let mut section = Section::new(format!("manifest {}", offline.superblock().manifest));
    let torn = offline.edits(|offset, head, edit| {
        if disk.is_none_or(|disk| edit.disk() == Some(disk)) {
            section.add(limit, offset, "edit", || format!("{} {edit:?}", head.index));
        }
    })?;
    if torn {
        section.add(usize::MAX, 0, "torn", || "something that is no edit stands behind the last".to_owned());
    }
    Ok(section)
}

fn log(offline: &Offline, disk: Option<DiskId>, args: &JournalDumpArgs) -> anyhow::Result<Vec<Section>> {
    let wanted = |number: u64| args.segment.is_none_or(|segment| segment == number);
    let mut sections: Vec<Section> = Vec::new();
    let mut shown = false;
    let scan = offline.log(|seen| match seen {
        Seen::Segment(opened, path) => {
            shown = wanted(opened.number);
            if shown {
                let name = format!("segment {} in {}", opened.number, path.display());
                let mut section = Section::new(name);
                index(&mut section, offline, opened);
                sections.push(section);
            }
        }
        Seen::Group { offset, header, .. } => {
            if let Some(section) = sections.last_mut().filter(|_| shown && disk.is_none()) {
                section.add(args.limit, offset, "group", || {
                    format!(
                        "{}: {} entries, {} bytes, durable group {}",
                        header.group, header.entry_count, header.payload_bytes, header.durable_group
                    )
                });
            }
        }
        Seen::Entry { place, head, .. } => {
            let of_disk = disk.is_none_or(|disk| disk == head.disk);
            if let Some(section) = sections.last_mut().filter(|_| shown && of_disk) {
                section.add(args.limit, place.offset, "entry", || {
                    format!(
                        "{:?} {} of disk {}, {} bytes",
                        head.kind, head.number, head.disk, head.body_bytes
                    )
                });
            }
        }
    })?;
    let mut wrong = Section::new("log".to_owned());
    for damage in &scan.damage {
        let what = || format!("{}: {}", damage.path.display(), damage.reason);
        wrong.add(usize::MAX, damage.offset, "damaged", what);
    }
    if let Some((path, offset)) = &scan.torn {
        wrong.add(usize::MAX, *offset, "torn", || format!("{} ends here", path.display()));
    }
    sections.extend((!wrong.lines.is_empty()).then_some(wrong));
    Ok(sections)
}

/// What the index of a segment says of it as a whole; its items are what the entries are.
fn index(section: &mut Section, offline: &Offline, segment: &SegmentOpened) {
    let at = segment.bytes.saturating_sub(BLOCK_BYTES);
    match offline.index(segment) {
        Ok(FoundIndex::None) => {}
        Ok(FoundIndex::Whole(head, items)) => section.add(usize::MAX, at, "index", || {
            format!("groups {} to {}, {} items", head.first_group, head.last_group, items.len())
        }),
        Ok(FoundIndex::Damaged(error)) => {
            section.add(usize::MAX, at, "damaged", || format!("its index: {error}"))
        }
        Err(error) => section.add(usize::MAX, at, "damaged", || format!("its index: {error}")),
    }
}

fn runs(offline: &Offline, only: Option<DiskId>, limit: usize, dump: &mut Dump) -> anyhow::Result<()> {
    for (disk, shape) in &offline.shape().disks {
        if only.is_some_and(|only| only != *disk) {
            continue;
        }
        for run in &shape.runs {
            let name =
                format!("undo run of disk {disk}, epochs {} to {}, {} bytes", run.first, run.last, run.bytes);
            let mut section = Section::new(name);
            match offline.run(*disk, *run) {
                Ok(mut sealed) => {
                    let whole = sealed.header().disk_blocks();
                    for part in parts(whole) {
                        images(&mut section, limit, sealed.lookup(part)?);
                    }
                }
                Err(error) => section.add(usize::MAX, 0, "damaged", || error.to_string()),
            }
            dump.sections.push(section);
        }
        if let Some(epoch) = shape.open_epoch() {
            let mut section =
                Section::new(format!("open undo run of disk {disk}, epoch {}", epoch.opened.epoch));
            match offline.open_run(*disk) {
                Ok((Some(run), _)) => {
                    let whole: BlockRange = run.header().disk_blocks();
                    parts(whole).for_each(|part| images(&mut section, limit, run.lookup(part)));
                }
                Ok((None, _)) => {}
                Err(error) => section.add(usize::MAX, 0, "damaged", || error.to_string()),
            }
            dump.sections.push(section);
        }
    }
    Ok(())
}

/// A disk in parts whose images fit memory, however many there are.
fn parts(whole: BlockRange) -> impl Iterator<Item = BlockRange> {
    const STEP: u64 = 1 << 18;
    (whole.start..whole.end)
        .step_by(STEP as usize)
        .map(move |start| BlockRange::new(start, whole.end.min(start + STEP)))
}

fn images(section: &mut Section, limit: usize, found: Vec<Found>) {
    for found in found {
        let (offset, kind) = match found.place {
            Place::Stored(offset) => (offset.0, "frame"),
            Place::Zeros => (0, "zeros"),
            Place::Lost => (0, "lost"),
        };
        section.add(limit, offset, kind, || found.blocks.to_string());
    }
}

fn render(dump: &Dump) -> String {
    let mut text = String::new();
    for section in &dump.sections {
        text.push_str(&format!("{}\n", printable(&section.name)));
        for line in &section.lines {
            text.push_str(&format!("  {:>12}  {:<7}  {}\n", line.offset, line.kind, printable(&line.what)));
        }
        if section.left_out > 0 {
            text.push_str(&format!("  … and {} more; see --limit\n", section.left_out));
        }
    }
    text
}
