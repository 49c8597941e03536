//! The deterministic simulator: the real protocol cores of agent, process server and master target over a simulated
//! clock, network and disks, in one thread.
//!
//! A seed decides everything: geometry, topology, workload, delays and faults. [`run`] plays a seed to the end, until
//! every disk is synced after the faults stopped, or until a rule of the checker is broken.
//!
//! Invariants: nothing here reads a clock, a file or randomness; the drivers do exactly what the daemons do with the
//! same cores. Units: nanoseconds, bytes, sectors. Called by `engine/tests/sim.rs`.
//!
//! | file | what |
//! |---|---|
//! | `scenario` | what a seed means |
//! | `world` | clock, event queue, faults |
//! | `network`, `disk`, `workload` | what is simulated |
//! | `codec`, `hashes`, `rng` | what it takes |
//! | `agent`, `relay`, `target` | drivers of the real cores |
//! | `checker` | the rules |
#![expect(
    clippy::indexing_slicing,
    reason = "a simulator's own indexes; an out-of-range one is a bug that must show"
)]

mod agent;
mod checker;
mod codec;
mod disk;
mod hashes;
mod network;
mod relay;
mod rng;
mod scenario;
mod target;
mod workload;
mod world;

pub use checker::{Failure, Rule};
pub use scenario::{Faults, Mode, Sabotage, Scenario};
pub use world::{Report, run};
