//! Whom a session at the target believes, and what it lets through.

use bytes::Bytes;
use reprotect_engine::format::frame::FrameKind;
use reprotect_engine::format::handshake::{Hello, Role};
use reprotect_engine::format::message::{Auth, Fenced, GrowDisk, Message, OpenDiskHead, Welcome};
use reprotect_engine::proto::{Authority, Prover};
use reprotect_engine::units::{DiskId, Generation, PeerId, Sequence};

use super::relay::batch_frame;
use super::*;
use reprotect_engine::proto::master_target::{DiskInput, SessionEvent, TargetSession, Transport};
use std::sync::Arc;

struct Names;

impl Authority for Names {
    fn check_proof(&self, auth: &Auth, _nonce: &[u8; 32]) -> Result<(), String> {
        if auth.signature == "me" { Ok(()) } else { Err("who?".into()) }
    }

    fn issue(&self, disk: DiskId, size: u64, generation: Generation, agent: PeerId) -> Bytes {
        Bytes::from(format!("{disk} {size} {generation} {agent}"))
    }

    fn check_grant(
        &self,
        grant: &[u8],
        disk: DiskId,
        size: u64,
        generation: Generation,
        agent: PeerId,
    ) -> Result<(), String> {
        if self.issue(disk, size, generation, agent) == grant { Ok(()) } else { Err("not yours".into()) }
    }
}

fn fresh() -> TargetSession {
    let transport = Transport { role: Role::Agent, peer: AGENT };
    TargetSession::new(S1, TARGET, transport, Arc::new(Names), [5; 32], T0)
}

fn gets(session: &mut TargetSession, message: &Message) {
    let frame = message.encode();
    session.handle_frame(frame.kind(), frame.body()).unwrap();
}

/// A session whose agent proved itself and was offered the disk at generation 4.
fn ready() -> TargetSession {
    let mut session = fresh();
    gets(&mut session, &Message::Hello(Hello::new(AGENT, TARGET, [0; 16])));
    gets(&mut session, &Message::Auth(NoSecret.prove(&[5; 32], TARGET)));
    session.offer(DISK, [9; 16], SECTORS, Generation(4));
    while session.poll_transmit().is_some() {}
    while session.poll_event().is_some() {}
    session
}

fn open(session: &mut TargetSession, grant: Bytes) {
    let head = OpenDiskHead {
        disk: DISK,
        size_sectors: SECTORS,
        generation: Generation(4),
        lineage: LINEAGE,
        durable: Sequence::ZERO,
        grant_bytes: grant.len() as u16,
    };
    gets(session, &Message::OpenDisk(head, grant));
}

fn kinds(session: &mut TargetSession) -> Vec<FrameKind> {
    std::iter::from_fn(|| session.poll_transmit()).map(|out| out.frame.kind()).collect()
}

#[test]
fn nothing_but_hello_and_proof_is_read_before_the_proof_held() {
    for message in [Message::Inventory(inventory(), Vec::new()), Message::Welcome(Welcome { offers: 0 })] {
        let mut session = fresh();
        let frame = message.encode();
        assert!(session.handle_frame(frame.kind(), frame.body()).is_err());
    }
    let mut session = fresh();
    gets(&mut session, &Message::Hello(Hello::new(AGENT, TARGET, [0; 16])));
    let forged = Auth { signature: Bytes::from_static(b"him"), ..NoSecret.prove(&[5; 32], TARGET) };
    let frame = Message::Auth(forged).encode();
    assert!(session.handle_frame(frame.kind(), frame.body()).is_err());
    assert_eq!(session.agent(), None);
}

fn inventory() -> reprotect_engine::format::message::InventoryHead {
    reprotect_engine::format::message::InventoryHead {
        host_name: reprotect_engine::format::wire::Text::new("host"),
        disk_count: 0,
    }
}

#[test]
fn a_grant_of_another_agent_or_generation_is_refused() {
    for (generation, agent) in [(4, PeerId([8; 16])), (3, AGENT)] {
        let mut session = ready();
        open(&mut session, Names.issue(DISK, SECTORS, Generation(generation), agent));
        assert_eq!(kinds(&mut session), [FrameKind::Error]);
        assert!(session.poll_event().is_none());
        let batch = batch_frame(4, 1, 1);
        assert!(session.handle_frame(FrameKind::Batch, batch.body()).is_err(), "not opened");
    }
    let mut session = ready();
    open(&mut session, Names.issue(DISK, SECTORS, Generation(4), AGENT));
    assert!(matches!(session.poll_event(), Some(SessionEvent::ToDisk(DISK, DiskInput::Open(_)))));
}

#[test]
fn an_open_that_comes_too_late_is_offered_again_and_other_fences_are_not() {
    let mut session = ready();
    let fenced = |generation| Message::Fenced(Fenced { disk: DISK, generation: Generation(generation) });
    session.send_reply(fenced(6), SECTORS);
    assert_eq!(kinds(&mut session), [FrameKind::Fenced], "of a batch: somebody else has the disk");
    open(&mut session, Names.issue(DISK, SECTORS, Generation(4), AGENT));
    session.send_reply(fenced(6), SECTORS);
    assert_eq!(kinds(&mut session), [FrameKind::Fenced, FrameKind::Offer]);
}

#[test]
fn only_a_disk_that_was_offered_can_be_asked_to_grow() {
    let mut session = ready();
    let grow = |disk| GrowDisk { disk, generation: Generation(4), size_sectors: 2 * SECTORS };
    gets(&mut session, &Message::GrowDisk(grow(DISK)));
    assert_eq!(session.poll_event(), Some(SessionEvent::Grow(grow(DISK))));
    gets(&mut session, &Message::GrowDisk(grow(DiskId([0x66; 16]))));
    assert_eq!(session.poll_event(), None);
    let refused = session.poll_transmit().unwrap().frame;
    assert_eq!(refused.kind(), FrameKind::Error);
}
