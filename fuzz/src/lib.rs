//! What is fuzzed: one entry function per decoder and per sans-IO core, shared by the libFuzzer targets
//! (`fuzz_targets/`, run by `run.sh`) and by the mutation loop of the stable toolchain (`tests/mutation.rs`).
//!
//! Invariants: an entry function takes any bytes, never needs more memory or time than its input justifies, and panics
//! only on a bug. To add a decoder: a function, a row in [`TARGETS`], a file in `fuzz_targets/`, a `[[bin]]`, and a
//! golden file or a line in `examples/make_corpus.rs` for its seeds.

pub mod agent_session;
pub mod decoders;
pub mod input;
pub mod journal;
pub mod mutate;
pub mod nbd;
pub mod relay_session;
pub mod script;
pub mod target_session;
pub mod vmdk;

/// One thing that is fuzzed.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its name: of the libFuzzer binary and of the corpus folder.
    pub name: &'static str,
    /// Runs one input.
    pub run: fn(&[u8]),
    /// Longest input worth trying, in bytes.
    pub input_bytes_max: usize,
}

/// Everything that is fuzzed.
pub const TARGETS: &[Target] = &[
    Target { name: "frame", run: decoders::frame, input_bytes_max: 4096 },
    Target { name: "hello", run: decoders::hello, input_bytes_max: 256 },
    Target { name: "message", run: decoders::message, input_bytes_max: 4096 },
    Target { name: "batch", run: decoders::batch, input_bytes_max: 16384 },
    Target { name: "bulk", run: decoders::bulk, input_bytes_max: 16384 },
    Target { name: "record", run: decoders::record, input_bytes_max: 16384 },
    Target { name: "disk_state", run: decoders::disk_state, input_bytes_max: 2048 },
    Target { name: "superblock", run: journal::superblock, input_bytes_max: 4096 },
    Target { name: "manifest", run: journal::manifest, input_bytes_max: 4096 },
    Target { name: "segment", run: journal::segment, input_bytes_max: 4096 },
    Target { name: "segment_index", run: journal::segment_index, input_bytes_max: 8192 },
    Target { name: "redo_entry", run: journal::redo_entry, input_bytes_max: 16384 },
    Target { name: "undo_run", run: journal::undo_run, input_bytes_max: 4608 },
    Target { name: "journal", run: journal::journal, input_bytes_max: 512 },
    Target { name: "vmdk_descriptor", run: vmdk::descriptor, input_bytes_max: 4096 },
    Target { name: "vmdk_header", run: vmdk::header, input_bytes_max: 1024 },
    Target { name: "vmdk_disk", run: vmdk::disk, input_bytes_max: 1024 },
    Target { name: "nbd", run: nbd::run, input_bytes_max: 2048 },
    Target { name: "agent_session", run: agent_session::run, input_bytes_max: 4096 },
    Target { name: "target_session", run: target_session::run, input_bytes_max: 4096 },
    Target { name: "relay_session", run: relay_session::run, input_bytes_max: 4096 },
];

/// Runs one input of the target called `name`.
///
/// # Panics
/// When there is no such target, or the input shows a bug.
pub fn run(name: &str, data: &[u8]) {
    let target = TARGETS.iter().find(|target| target.name == name);
    let Some(target) = target else { panic!("no fuzz target is called {name}") };
    (target.run)(data);
}
