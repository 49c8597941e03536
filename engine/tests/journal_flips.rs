//! Every bit of a journal flipped, every truncation: what was written is detected, or it is shown to say nothing.
//!
//! The image is a journal of more than a mebibyte as it lies on the medium: superblock, manifest, redo segments, undo
//! runs that go on, are sealed and are merged, closed in order. Two examinations share the work, since opening a journal
//! eight million times takes hours:
//!
//! * **Each bit, alone**: the structure it lies in (superblock copy, edit, group, frame, page …) is read by the decoder
//!   that recovery uses, with the identity it must have. It must be refused, or decode to exactly what it said before;
//!   such a bit is *padding*, and counted. The same for each length that a structure can be cut to.
//! * **A sample, whole**: the damaged journal is opened, every entry and point read. It must be refused, or name what is
//!   damaged, or show everything as it was. Bits of space that was never written are examined in this way only.
//!
//! In the suite each 61st bit is flipped, and about a thousand journals are opened; `make flips` flips each bit, and opens
//! some ten thousand. Called by `cargo test` and `make flips`.
#![cfg(feature = "sim")]
#![expect(clippy::unwrap_used, reason = "a test may panic")]

#[path = "journal_flips/image.rs"]
mod image;
mod journal_lab;
#[path = "journal_lab/merge.rs"]
mod merge;
#[path = "journal_flips/pieces.rs"]
mod pieces;
#[path = "journal_lab/place.rs"]
mod place;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use image::{Image, Outcome};
use pieces::{Piece, pieces};

/// Whether all is to be flipped.
fn all() -> bool {
    std::env::var_os("FLIPS").is_some()
}

/// Bits found and bits that say nothing, by kind of structure.
type Counts = BTreeMap<&'static str, (u64, u64)>;

/// Runs `work` on each of the pieces, on two threads, and adds up what it answers.
fn on_two_threads(pieces: &[Piece], work: impl Fn(&Piece) -> (u64, u64) + Sync) -> Counts {
    let next = AtomicUsize::new(0);
    let run = || {
        let mut counts = Counts::new();
        while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
            let (found, silent) = work(piece);
            let count = counts.entry(piece.kind.name()).or_default();
            (count.0, count.1) = (count.0 + found, count.1 + silent);
        }
        counts
    };
    let mut sum = Counts::new();
    std::thread::scope(|scope| {
        for worker in [scope.spawn(run), scope.spawn(run)] {
            for (kind, (found, silent)) in worker.join().unwrap() {
                let count = sum.entry(kind).or_default();
                (count.0, count.1) = (count.0 + found, count.1 + silent);
            }
        }
    });
    sum
}

#[test]
fn every_flipped_bit_of_a_structure_is_refused_by_its_decoder_or_says_nothing() {
    let image = Image::make();
    let pieces = pieces(&image);
    let bytes: usize = pieces.iter().map(|piece| piece.bytes.len()).sum();
    assert!(bytes > 1 << 20, "the image has {bytes} bytes");
    let step = if all() { 1 } else { 61 };
    let counts = on_two_threads(&pieces, |piece| {
        let (mut found, mut padding) = (0, 0);
        let said = piece.read(&piece.bytes).expect("an intact structure");
        let mut damaged = piece.bytes.clone();
        for bit in (0..damaged.len() * 8).step_by(step) {
            damaged[bit / 8] ^= 1 << (bit % 8);
            match piece.read(&damaged) {
                None => found += 1,
                Some(now) => {
                    assert_eq!(now, said, "{piece:?}, bit {bit}: it decodes to something else");
                    assert!(bit / 8 >= piece.used, "{piece:?}, bit {bit}: a byte that is used says nothing");
                    padding += 1;
                }
            }
            damaged[bit / 8] ^= 1 << (bit % 8);
        }
        (found, padding)
    });
    let (found, padding) = counts.values().fold((0, 0), |sum, count| (sum.0 + count.0, sum.1 + count.1));
    eprintln!(
        "{bytes} bytes in {} structures: {found} bits found, {padding} in padding, 0 silent",
        pieces.len()
    );
    eprintln!("by structure (found, padding): {counts:?}");
    for kind in pieces::KINDS {
        assert!(counts.contains_key(kind), "no {kind} in the image");
    }
}

#[test]
fn every_truncation_of_a_structure_is_refused_by_its_decoder_or_cuts_padding() {
    let image = Image::make();
    let pieces = pieces(&image);
    let step = if all() { 1 } else { 13 };
    let counts = on_two_threads(&pieces, |piece| {
        let (mut found, mut padding) = (0, 0);
        let said = piece.read(&piece.bytes).expect("an intact structure");
        for len in (0..piece.bytes.len()).step_by(step) {
            match piece.read(&piece.bytes[..len]) {
                None => found += 1,
                Some(now) => {
                    assert_eq!(now, said, "{piece:?} cut to {len} bytes decodes to something else");
                    padding += 1;
                }
            }
        }
        (found, padding)
    });
    eprintln!("lengths (found, only padding cut): {counts:?}");
}

/// Tries whole openings and adds up how they came out.
fn open_all(image: &Image, what: &str, damages: &[Damage]) {
    let (next, counts) = (AtomicUsize::new(0), [const { AtomicU64::new(0) }; 3]);
    let run = || {
        while let Some(damage) = damages.get(next.fetch_add(1, Ordering::Relaxed)) {
            let files = image.files.snapshot();
            damage.inflict(image, &files);
            let outcome = image.judge(&files, &format!("{damage:?}"));
            counts[outcome as usize].fetch_add(1, Ordering::Relaxed);
        }
    };
    std::thread::scope(|scope| {
        let workers = [scope.spawn(run), scope.spawn(run)];
        workers.into_iter().for_each(|worker| worker.join().unwrap());
    });
    let [refused, named, same] = [Outcome::Refused, Outcome::Named, Outcome::Same]
        .map(|outcome| counts[outcome as usize].load(Ordering::Relaxed));
    eprintln!("{what}: {refused} refused, {named} opened and named, {same} opened with everything as it was");
    assert!(named > 0 && same > 0, "{what}: the sample says nothing");
}

/// What happens to a file.
#[derive(Debug)]
enum Damage {
    /// File, bit.
    Flip(String, u64),
    /// File, length.
    Cut(String, u64),
    /// The file is gone.
    Remove(String),
}

impl Damage {
    fn inflict(&self, image: &Image, files: &reprotect_engine::store::files::memory::MemoryFiles) {
        match self {
            Self::Flip(name, bit) => {
                let path = image.path(name);
                let (byte, old) = (bit / 8, image.byte(name, bit / 8));
                files.poke(path, byte, &[old ^ (1 << (bit % 8))]);
            }
            Self::Cut(name, len) => files.opener().resize(&image.path(name), *len).unwrap(),
            Self::Remove(name) => files.opener().remove(&image.path(name)).unwrap(),
        }
    }
}

#[test]
fn a_journal_with_a_flipped_bit_names_it_or_shows_everything_as_it_was() {
    let image = Image::make();
    let wanted = if all() { 10_000 } else { 700 };
    let bits: u64 = image.written().iter().map(|(_, _, bytes)| bytes.len() as u64 * 8).sum();
    let step = (bits / wanted) | 1; // odd, so that it comes to every bit of a byte
    let mut damages = Vec::new();
    let mut at = 0;
    for (name, offset, bytes) in image.written() {
        let end = at + bytes.len() as u64 * 8;
        damages.extend(
            (at.next_multiple_of(step)..end)
                .step_by(step as usize)
                .map(|bit| Damage::Flip(name.clone(), offset * 8 + bit - at)),
        );
        at = end;
    }
    open_all(&image, &format!("{} flips, one in {step} of {bits} bits", damages.len()), &damages);
}

#[test]
fn a_journal_with_a_truncated_or_deleted_file_names_it_or_shows_everything_as_it_was() {
    let image = Image::make();
    let step = if all() { 4 << 10 } else { 16 << 10 };
    let mut damages = Vec::new();
    for (name, offset, bytes) in image.written() {
        let end = offset + bytes.len() as u64;
        // At blocks, beside them, and a sector less one behind them.
        let lengths = (offset..end).step_by(step).flat_map(|len| [len, len + 1, len + 511]);
        damages.extend(lengths.filter(|len| *len < end).map(|len| Damage::Cut(name.clone(), len)));
        damages.push(Damage::Remove(name));
    }
    open_all(&image, &format!("{} truncations and deletions", damages.len()), &damages);
}
