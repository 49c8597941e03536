//! The journal that is damaged, what it said before, and the judgement over one that was opened again.
//!
//! Invariant: an image is the same bytes but for its identity and salts; everything it says is remembered. Called by
//! `journal_flips.rs`. Units: bytes, entry numbers.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use reprotect_engine::store::files::memory::MemoryFiles;
use reprotect_engine::store::journal::view::At;
use reprotect_engine::store::journal::{Epoch, JournalError};

use crate::journal_lab::{NOW, id};
use crate::merge::merge_runs;
use crate::place::{Lab, Place, noise};

const FOLDER: &str = "/retention";
const TARGET: &str = "/datastore/disk";
/// 64 blocks, the last of them short.
const SECTORS: u64 = 64 * 8 - 5;
const EPOCHS: u64 = 7;
const WRITES: u64 = 9;

/// How an opening came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// With an error.
    Refused,
    /// It opened, and said what is damaged.
    Named,
    /// Everything is as it was.
    Same,
}

/// A journal and what it says.
pub(crate) struct Image {
    pub(crate) files: MemoryFiles,
    /// The body of each entry, by number.
    entries: BTreeMap<u64, Vec<u8>>,
    applied: u64,
    points: BTreeMap<At, Vec<u8>>,
}

fn place(files: &MemoryFiles) -> Place {
    Place {
        files: files.opener(),
        folder: FOLDER.into(),
        targets: vec![TARGET.into()],
        size_sectors: SECTORS,
        segment_bytes: 160 << 10,
    }
}

fn close(lab: Lab) {
    drop(lab.disks);
    lab.journal.close(NOW).unwrap();
}

impl Image {
    pub(crate) fn make() -> Self {
        let files = MemoryFiles::default();
        files.put(TARGET, &noise(99, SECTORS as usize * 512));
        let mut lab = place(&files).create().unwrap();
        let mut seed = 1;
        for epoch in 1..=EPOCHS {
            for _ in 0..WRITES {
                let start = seed * 53 % (SECTORS - 40);
                lab.write(0, start, 1 + seed * 7 % 39, seed).unwrap();
                if seed.is_multiple_of(2) {
                    lab.commit().unwrap();
                }
                if seed.is_multiple_of(3) {
                    lab.apply(0).unwrap();
                }
                seed += 1;
            }
            if epoch < EPOCHS {
                lab.apply(0).unwrap();
                lab.epoch(0).unwrap();
            }
        }
        lab.commit().unwrap();
        let runs = lab.journal.shape().disks[&id(0)].runs.clone();
        merge_runs(&mut lab.journal, id(0), runs[0], runs[1]).unwrap();
        let mut image = Self { files, entries: BTreeMap::new(), applied: 0, points: BTreeMap::new() };
        image.remember(&mut lab);
        close(lab);
        // Until each copy of the superblock was written.
        for _ in 0..2 {
            close(place(&image.files).open().unwrap());
        }
        image
    }

    fn remember(&mut self, lab: &mut Lab) {
        self.applied = lab.disks[0].applied().number;
        for entry in lab.journal.entries(id(0)).to_vec() {
            self.entries.insert(entry.number, lab.journal.read(entry.place).unwrap().1);
        }
        let newest = self.entries.keys().next_back().copied().unwrap();
        for Epoch { opened, closed } in lab.journal.shape().disks[&id(0)].epochs.clone() {
            for number in opened.after..=closed.map_or(newest, |closed| closed.last) {
                let at = At::entry(opened.epoch, number);
                // Points inside a merged run are none.
                if let Ok(bytes) = lab.view(0, at) {
                    self.points.insert(at, bytes);
                }
            }
        }
        assert!(self.points.len() > 50 && self.entries.len() == (EPOCHS * WRITES) as usize);
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        Path::new(FOLDER).join(name)
    }

    /// What was ever written to the journal's files: name, place, bytes.
    pub(crate) fn written(&self) -> Vec<(String, u64, Vec<u8>)> {
        use reprotect_engine::store::files::Files as _;
        let names = self.files.neighbours(&self.path("any")).unwrap();
        let runs = |name: String| {
            let runs = self.files.bytes_sparse(self.path(&name));
            runs.into_iter().map(move |(offset, bytes)| (name.clone(), offset, bytes))
        };
        names.into_iter().flat_map(runs).collect()
    }

    pub(crate) fn byte(&self, name: &str, at: u64) -> u8 {
        let runs = self.files.bytes_sparse(self.path(name));
        let inside = runs.iter().find(|(offset, bytes)| (*offset..offset + bytes.len() as u64).contains(&at));
        inside.map_or(0, |(offset, bytes)| bytes[(at - offset) as usize])
    }

    /// Opens damaged files and reads everything. Panics where something is lost or wrong and nobody says so.
    pub(crate) fn judge(&self, files: &MemoryFiles, what: &str) -> Outcome {
        let mut lab = match place(files).open() {
            Ok(lab) => lab,
            Err(error) => {
                assert_names(&error, what);
                return Outcome::Refused;
            }
        };
        let log = &lab.found.disks[&id(0)];
        let mut named = !lab.found.damage.is_empty() || !log.missing.is_empty() || !lab.holes[0].is_empty();
        assert!(named || lab.disks[0].applied().number == self.applied, "{what}: APPLIED is lost silently");
        let found: BTreeMap<u64, _> =
            lab.journal.entries(id(0)).iter().map(|entry| (entry.number, entry.place)).collect();
        for (number, body) in &self.entries {
            match found.get(number).map(|place| lab.journal.read(*place)) {
                Some(Ok((_, read))) => assert_eq!(&read, body, "{what}: entry {number}"),
                Some(Err(error)) => {
                    assert_names(&error, what);
                    named = true;
                }
                None => assert!(named, "{what}: entry {number} is lost silently"),
            }
        }
        for (at, wanted) in &self.points {
            match lab.view(0, *at) {
                Ok(bytes) => assert!(bytes == *wanted, "{what}: {at:?} shows something else"),
                Err(error) => {
                    assert_names(&error, what);
                    named = true;
                }
            }
        }
        if named { Outcome::Named } else { Outcome::Same }
    }
}

/// An error says which file, disk or folder it is about.
fn assert_names(error: &JournalError, what: &str) {
    let text = error.to_string();
    assert!(text.contains("/retention") || text.contains("disk 0101"), "{what}: {text} names nothing");
}
