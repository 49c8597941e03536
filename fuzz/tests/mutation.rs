//! A bounded mutation loop over every fuzz target, for the stable toolchain: part of `make test`.
//!
//! Replays the committed corpus (every input that ever failed is in it), then a fixed number of seeded mutations of
//! it, then random scripts. A failure prints the target, the corpus file and the seed, and leaves the input in the
//! system's folder for temporary files; move it into `corpus/<target>/` when the bug is fixed.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};

use reprotect_fuzz::mutate::{Random, mutate};
use reprotect_fuzz::{TARGETS, Target};

fn corpus(target: &Target) -> Vec<(PathBuf, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target.name);
    let mut files: Vec<PathBuf> = std::fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("{}: {error}; run the example make_corpus", folder.display()))
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    assert!(!files.is_empty(), "{} is empty", folder.display());
    files.into_iter().map(|path| (path.clone(), std::fs::read(path).unwrap())).collect()
}

fn attempt(target: &Target, what: &str, data: &[u8]) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| (target.run)(data))) {
        let path =
            std::env::temp_dir().join(format!("reprotect-fuzz-{}-{}", target.name, std::process::id()));
        std::fs::write(&path, data).unwrap();
        eprintln!("target {}, {what}: input saved as {}", target.name, path.display());
        resume_unwind(panic);
    }
}

/// Replays the corpus and `count` mutations spread over it, then `count / 4` random inputs.
fn hammer(name: &str, count: usize) {
    let target = TARGETS.iter().find(|target| target.name == name).unwrap();
    let corpus = corpus(target);
    for (path, data) in &corpus {
        attempt(target, &path.display().to_string(), data);
    }
    for seed in 0..count {
        let (path, data) = &corpus[seed % corpus.len()];
        let mut random = Random::new(seed as u64);
        let other = &corpus[random.below(corpus.len())].1;
        let input = mutate(&mut random, data, other, target.input_bytes_max);
        attempt(target, &format!("{} mutated with seed {seed}", path.display()), &input);
    }
    for seed in 0..count / 4 {
        let mut random = Random::new(!(seed as u64));
        let len = random.below(target.input_bytes_max);
        let input: Vec<u8> = (0..len).map(|_| random.next() as u8).collect();
        attempt(target, &format!("random input with seed {seed}"), &input);
    }
}

macro_rules! hammered {
    ($($name:ident: $count:expr,)*) => {
        $(#[test] fn $name() { hammer(stringify!($name), $count); })*

        #[test]
        fn every_target_is_hammered() {
            let mut names = vec![$(stringify!($name)),*];
            let mut wanted: Vec<&str> = TARGETS.iter().map(|target| target.name).collect();
            names.sort_unstable();
            wanted.sort_unstable();
            assert_eq!(names, wanted);
        }
    };
}

// Counts are chosen so that the whole file takes some ten seconds on two cores.
hammered! {
    frame: 200_000,
    hello: 200_000,
    message: 200_000,
    batch: 100_000,
    bulk: 100_000,
    record: 100_000,
    disk_state: 100_000,
    superblock: 100_000,
    manifest: 100_000,
    segment: 100_000,
    segment_index: 50_000,
    redo_entry: 50_000,
    undo_run: 50_000,
    journal: 1_000,
    vmdk_descriptor: 100_000,
    vmdk_header: 200_000,
    vmdk_disk: 5_000,
    nbd: 200_000,
    agent_session: 10_000,
    target_session: 10_000,
    relay_session: 10_000,
}
