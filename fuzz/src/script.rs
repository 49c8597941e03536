//! What the three session fuzzers share: identities, a trivial prover and authority, and values picked from input.
//!
//! A script is a list of steps, each a byte and its arguments. Most steps say something sensible, so that deep states
//! are reached; arguments are sometimes hostile ([`Input::near`]), and one step sends raw bytes.

use bytes::Bytes;
use reprotect_engine::checksum::UnitHash;
use reprotect_engine::format::batch::{Chain, Mark, MarkCause, MarkClass};
use reprotect_engine::format::extent::Record;
use reprotect_engine::format::frame::FrameKind;
use reprotect_engine::format::message::{Auth, Message};
use reprotect_engine::format::wire::Text;
use reprotect_engine::proto::{Authority, Prover};
use reprotect_engine::units::{DiskId, Generation, LineageId, PeerId, SectorRange, Sequence, Timestamp};

use crate::input::Input;

/// Steps of one script; more are not worth their time.
pub const STEPS_MAX: usize = 1500;
/// The agent.
pub const AGENT: PeerId = PeerId([0xa1; 16]);
/// The process server.
pub const RELAY: PeerId = PeerId([0x9e; 16]);
/// The master target.
pub const TARGET: PeerId = PeerId([0x71; 16]);
/// The disks that exist …
pub const DISKS: [DiskId; 2] = [DiskId([0xd1; 16]), DiskId([0xd2; 16])];
/// … and one that does not.
pub const STRANGER: DiskId = DiskId([0xdf; 16]);
/// Sizes that reach borders: nothing, one sector, less than a block, one unit, one chunk, several chunks and a bit, the
/// largest disk.
pub const SIZES: [u64; 7] = [0, 1, 7, 128, 8192, 3 * 8192 + 129, 1 << 37];

/// Signs with a fixed word.
#[derive(Debug)]
pub struct FixedProver;

impl Prover for FixedProver {
    fn prove(&self, _nonce: &[u8; 32], _target: PeerId) -> Auth {
        Auth { agent: AGENT, signature: Bytes::from_static(b"me"), certificates: Vec::new() }
    }
}

/// Believes the fixed word, and grants that begin with the generation they are for.
#[derive(Debug)]
pub struct FixedAuthority;

impl Authority for FixedAuthority {
    fn check_proof(&self, auth: &Auth, _nonce: &[u8; 32]) -> Result<(), String> {
        if auth.signature == b"me".as_slice() { Ok(()) } else { Err("forged".into()) }
    }

    fn issue(&self, _disk: DiskId, _size_sectors: u64, generation: Generation, _agent: PeerId) -> Bytes {
        Bytes::copy_from_slice(&generation.0.to_le_bytes())
    }

    fn check_grant(
        &self,
        grant: &[u8],
        _disk: DiskId,
        _size_sectors: u64,
        generation: Generation,
        _agent: PeerId,
    ) -> Result<(), String> {
        if grant == generation.0.to_le_bytes() { Ok(()) } else { Err("forged".into()) }
    }
}

/// One of the disks, seldom the one that does not exist.
pub fn disk(input: &mut Input<'_>) -> DiskId {
    match input.byte() {
        0..=199 => DISKS[0],
        200..=251 => DISKS[1],
        _ => STRANGER,
    }
}

/// One of two sessions, mostly the first.
pub fn slot(input: &mut Input<'_>) -> usize {
    usize::from(input.byte() >= 200)
}

/// A history: mostly `known`.
pub fn lineage(input: &mut Input<'_>, known: LineageId) -> LineageId {
    match input.byte() {
        0..=250 => known,
        other => LineageId([other; 16]),
    }
}

/// A chain digest: mostly `known`.
pub fn chain(input: &mut Input<'_>, known: Chain) -> Chain {
    match input.byte() {
        0..=250 => known,
        other => [other; 16],
    }
}

/// Hashes of which some are equal and some are zeros.
pub fn hashes(input: &mut Input<'_>, count: usize) -> Vec<UnitHash> {
    let pattern = input.take(4);
    (0..count)
        .map(|at| UnitHash([pattern.get(at % 5).copied().unwrap_or(0) % 4; 16])) // 0 is ZEROS
        .collect()
}

/// A range on a disk of `size` sectors, now and then beyond its end.
pub fn range(input: &mut Input<'_>, size: u64, len_max: u64) -> SectorRange {
    let start = input.short() * 8 % size.max(1);
    let len = (input.short() + 1).min(len_max);
    let end =
        if input.byte() < 250 { start.saturating_add(len).min(size) } else { start.saturating_add(len) };
    SectorRange::new(start, end.max(start))
}

/// One to four records in or near a disk of `size` sectors; ascending where `within` is to be settled by them.
pub fn records(input: &mut Input<'_>, size: u64, within: Option<SectorRange>) -> Vec<Record> {
    let mut at = within.map_or(0, |range| range.start);
    let mut out = Vec::new();
    for _ in 0..=input.byte() % 4 {
        let range = match within {
            Some(cover) => {
                let len = (u64::from(input.byte()) + 1).min(cover.end.saturating_sub(at));
                SectorRange::new(at, at + len)
            }
            None => range(input, size, 128),
        };
        if range.is_empty() {
            continue;
        }
        at = range.end;
        out.push(match input.byte() % 4 {
            0 | 1 => Record::data(range.start, vec![input.byte(); range.bytes() as usize].into()),
            2 => Record::zeros(range),
            _ => Record::discard(range),
        });
    }
    if out.is_empty() {
        out.push(Record::zeros(SectorRange::new(at, at + 1)));
    }
    out
}

/// A mark.
pub fn mark(input: &mut Input<'_>, disk: DiskId, at: (LineageId, Generation, Sequence, Chain)) -> Mark {
    Mark {
        disk,
        lineage: lineage(input, at.0),
        generation: Generation(input.near(at.1.0)),
        sequence: Sequence(input.near(at.2.0)),
        chain: chain(input, at.3),
        source_time: Timestamp(input.short()),
        point: [input.byte(); 16],
        number: input.near(1),
        class: input.pick(MarkClass::ALL),
        cause: input.pick(MarkCause::ALL),
        name: Text::new(""),
        unread_blocks: 0,
    }
}

/// Any kind with raw bytes as its body.
pub fn raw(input: &mut Input<'_>) -> (FrameKind, Bytes) {
    let kind = input.pick(FrameKind::ALL);
    let len = usize::from(input.byte());
    (kind, Bytes::copy_from_slice(input.take(len)))
}

/// A message as the other end would receive it; one in 64 is damaged on the way.
pub fn sent(input: &mut Input<'_>, message: &Message) -> (FrameKind, Bytes) {
    let frame = message.encode();
    (frame.kind(), damaged(input, &frame.body()))
}

/// One in 64 bodies with a byte changed or cut off.
pub fn damaged(input: &mut Input<'_>, body: &Bytes) -> Bytes {
    match input.byte() {
        0..=251 => body.clone(),
        252..=253 => body.slice(..usize::from(input.byte()).min(body.len())),
        _ => {
            let mut bytes = body.to_vec();
            let at = input.short() as usize % bytes.len().max(1);
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= input.byte();
            }
            bytes.into()
        }
    }
}
