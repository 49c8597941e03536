//! What a seed means: sizes, topology, workload and how often what goes wrong.
//!
//! Invariants: derived from the seed alone; swarm-weighted, so that some seeds know no crash and others little else.
//! Units: bytes, nanoseconds, per mille. Called by `sim::world` and by tests that want a special case.

use super::rng::Rng;
use crate::proto::credit::FlowLimits;

/// How the source's changes reach the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Every write is captured in order.
    Ordered,
    /// Writes are found by scan rounds.
    Scan,
}

/// A driver that breaks a rule on purpose, to prove that the checker sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sabotage {
    /// The target reports a checkpoint before it happened.
    AcknowledgeEarly,
    /// The target writes its state but forgets to flush the disk first.
    ForgetFlush,
    /// The target writes whole bulk records, also where delta was newer.
    StaleBulk,
    /// The target forgets some writes.
    LoseWrites,
    /// The target hands every tenth batch to the disk twice, renumbered.
    ApplyTwice,
    /// The target starts with the previous generation after a crash.
    ReuseGeneration,
    /// The target keeps a batch of a fenced session and writes it later.
    WriteFenced,
    /// The target reports writes as done before they are.
    IgnoreCredit,
    /// The target does not look at checksums.
    TrustPayload,
    /// The agent never answers a read.
    NeverRead,
    /// The target does not keep the last mark of a checkpoint.
    LoseMarks,
    /// The agent hands in what it harvested with the newest write first.
    HarvestReversed,
    /// The agent forgets what it captured and did not harvest with its connection.
    HarvestForgotten,
    /// Both ends take blocks with equal CRCs for equal.
    BelieveCrcs,
}

/// How often what goes wrong, while faults last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// Connections severed.
    pub disconnects: u64,
    /// Pairs of machines that cannot reach each other for a while.
    pub partitions: u64,
    /// Agents that crash and start again.
    pub agent_crashes: u64,
    /// Process servers that crash and start again.
    pub relay_crashes: u64,
    /// Crashes and restarts of the master target.
    pub target_crashes: u64,
    /// A second agent of the same identity that appears for a while, every other one restored from a snapshot.
    pub twins: u64,
    /// Writes (per mille) that find the target full.
    pub full_per_mille: u64,
    /// Flushes (per mille) that fail.
    pub flush_fails_per_mille: u64,
    /// Batches (per mille) with a flipped bit.
    pub flips_per_mille: u64,
    /// Notifications of lost sessions (per mille) that come twice.
    pub late_notices_per_mille: u64,
    /// Frames (per mille) that take far longer.
    pub spikes_per_mille: u64,
    /// Crashes of the master target (per mille) that cost the newest of what was durable.
    pub lost_tails_per_mille: u64,
}

/// One run.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// The seed of everything random in the run.
    pub seed: u64,
    /// How changes travel.
    pub mode: Mode,
    /// Agents.
    pub agents: usize,
    /// For each disk, its agent, its sectors and whether its target held something before.
    pub disks: Vec<(usize, u64, bool)>,
    /// Process servers; zero means direct connections.
    pub relays: usize,
    /// Whether agents may also connect directly although there are process servers.
    pub mixed_routes: bool,
    /// Whether process servers compress.
    pub compress: bool,
    /// Bytes of a chunk.
    pub chunk_bytes: u64,
    /// Windows of the target.
    pub flow: FlowLimits,
    /// Window of a relay per disk.
    pub relay_window_bytes: u64,
    /// Writes per disk while faults last.
    pub writes: u64,
    /// Writes (per mille) that are followed by a mark.
    pub marks_per_mille: u64,
    /// How long faults and writes last.
    pub active_nanos: u64,
    /// Usual network delay.
    pub delay_nanos: u64,
    /// Usual time of a disk operation.
    pub disk_nanos: u64,
    /// What goes wrong.
    pub faults: Faults,
    /// How long captured writes may wait to be harvested, all into few batches; zero: each is a batch at once.
    pub harvest_nanos: u64,
    /// How long the records of a chunk may take to be made.
    pub submit_nanos: u64,
    /// A rule broken on purpose.
    pub sabotage: Option<Sabotage>,
    /// Whether every event is printed.
    pub trace: bool,
}

const MS: u64 = 1_000_000;

impl Scenario {
    /// The scenario of a seed.
    #[must_use]
    pub fn from_seed(seed: u64) -> Self {
        let mut rng = Rng::new(seed.wrapping_mul(0x2545_f491_4f6c_dd1d));
        let agents = if rng.chance(300) { 2 } else { 1 };
        let count = rng.between(agents as u64, 3);
        let disks = (0..count as usize)
            .map(|index| {
                let kib = rng.pick(&[300, 448, 512, 777, 1024, 1500, 3000]);
                let odd = if rng.chance(500) { rng.below(8) } else { 0 };
                (index % agents, kib * 2 + odd, rng.chance(400))
            })
            .collect();
        let relays = rng.pick(&[0, 0, 1, 1, 2]);
        let unwritten = rng.pick(&[192, 192, 256, 1024]) << 10; // a full chunk's batch just fits the smallest
        Self {
            seed,
            mode: if rng.chance(600) { Mode::Ordered } else { Mode::Scan },
            agents,
            disks,
            relays,
            mixed_routes: relays > 0 && rng.chance(200),
            compress: rng.chance(700),
            chunk_bytes: rng.pick(&[64, 64, 128]) << 10,
            flow: FlowLimits {
                unwritten_bytes: unwritten,
                undurable_bytes: rng.pick(&[1, 2, 4]) * unwritten,
                flush_bytes: rng.pick(&[64, 256, 256]) << 10,
                flush_nanos: rng.pick(&[20, 200, 1000]) * MS,
            },
            relay_window_bytes: rng.pick(&[192, 256, 512, 4096]) << 10,
            writes: rng.pick(&[0, 10, 40, 120, 400]),
            marks_per_mille: rng.pick(&[0, 100, 500]),
            active_nanos: rng.pick(&[1000, 3000, 8000, 20_000]) * MS,
            delay_nanos: rng.pick(&[MS / 5, 2 * MS, 20 * MS]),
            disk_nanos: rng.pick(&[MS / 20, MS, 8 * MS]),
            faults: Faults::draw(&mut rng),
            harvest_nanos: rng.pick(&[0, 0, 5, 100, 1000]) * MS,
            submit_nanos: rng.pick(&[0, 0, 20, 500]) * MS,
            sabotage: None,
            trace: false,
        }
    }
}

impl Faults {
    /// Each kind of fault is absent, rare or common.
    fn draw(rng: &mut Rng) -> Self {
        if rng.chance(60) {
            return Self::default();
        }
        let mut some = |rare: u64, common: u64| rng.pick(&[0, 0, rare, common]);
        Self {
            disconnects: some(2, 12),
            partitions: some(1, 4),
            agent_crashes: some(1, 5),
            relay_crashes: some(1, 5),
            target_crashes: some(1, 6),
            twins: some(0, 2),
            full_per_mille: some(5, 60),
            flush_fails_per_mille: some(0, 30),
            flips_per_mille: some(5, 60),
            late_notices_per_mille: some(100, 700),
            spikes_per_mille: some(5, 80),
            lost_tails_per_mille: some(300, 1000),
        }
    }
}
