//! The rules of the protocol cores, one test each, without a network: frames are handed from core to core.
//!
//! Where the simulator found a rule broken, the rule stands here, because a seed's run changes with the code.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod agent;
mod relay;
mod session;
mod target;

use bytes::Bytes;
use reprotect_engine::format::batch::CHAIN_START;
use reprotect_engine::format::extent::Record;
use reprotect_engine::format::handshake::{HELLO_MAGIC, HelloAck, Role};
use reprotect_engine::format::message::{Auth, GrantHead, PassMode};
use reprotect_engine::proto::Prover;
use reprotect_engine::proto::target_disk::SessionId;
use reprotect_engine::units::{DiskId, Generation, LineageId, MonoTime, PeerId, SectorRange, Sequence};

const DISK: DiskId = DiskId([1; 16]);
const LINEAGE: LineageId = LineageId([2; 16]);
const AGENT: PeerId = PeerId([3; 16]);
const TARGET: PeerId = PeerId([4; 16]);
const SECTORS: u64 = 1024;
const S1: SessionId = SessionId(1);
const S2: SessionId = SessionId(2);
const T0: MonoTime = MonoTime(0);

fn range(start: u64, end: u64) -> SectorRange {
    SectorRange::new(start, end)
}

fn data(start: u64, end: u64, byte: u8) -> Record {
    Record::data(start, Bytes::from(vec![byte; range(start, end).bytes() as usize]))
}

struct NoSecret;

impl Prover for NoSecret {
    fn prove(&self, _nonce: &[u8; 32], _target: PeerId) -> Auth {
        Auth { agent: AGENT, signature: Bytes::from_static(b"me"), certificates: Vec::new() }
    }
}

/// The target's answer to HELLO.
fn hello_ack() -> HelloAck {
    HelloAck {
        magic: HELLO_MAGIC,
        version: 1,
        role: Role::MasterTarget,
        features: 0,
        target: TARGET,
        nonce: [5; 32],
    }
}

/// A GRANT without settled ranges.
fn grant_head(generation: u64, pass: u64, mode: PassMode) -> GrantHead {
    GrantHead {
        disk: DISK,
        generation: Generation(generation),
        lineage: LINEAGE,
        durable: Sequence::ZERO,
        chain: CHAIN_START,
        pass,
        mode,
        range_count: 0,
        grant_bytes: 0,
    }
}
