//! The process server between a real agent core and real target cores: content, compression, order, back-pressure,
//! ends of every kind, refusals.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::sync::Arc;

use bytes::Bytes;
use common::agent::{Ended, FakeAgent, dial};
use common::target::FakeTarget;
use common::{Server, Site, compressible, noise, patiently};
use reprotect_engine::format::batch::{BulkHeader, encode_bulk};
use reprotect_engine::format::extent::{Codec, Record};
use reprotect_engine::format::frame::{Frame, FrameKind};
use reprotect_engine::format::handshake::Hello;
use reprotect_engine::format::message::{ErrorCode, Message, Policy};
use reprotect_engine::format::standby::{Load, Probe, ROUND_TRIP_NONE, ROUND_TRIP_UNKNOWN};
use reprotect_engine::net::dialer::Dialer;
use reprotect_engine::net::endpoint::TransportSettings;
use reprotect_engine::net::identity::{Identity, Role};
use reprotect_engine::net::lanes::{self, Arrival};
use reprotect_engine::net::standby::Standing;
use reprotect_engine::proto::agent::AgentEvent;
use reprotect_engine::proto::credit::FlowLimits;
use reprotect_engine::proto::{Lane, Outgoing};
use reprotect_engine::units::{DiskId, Generation, LineageId, PeerId, SectorRange, Sequence};
use reprotect_process_server::budget::{BUDGET_BYTES_MIN, WINDOW_BYTES_MAX};

const MIB: usize = 1 << 20;

fn run<F: Future>(future: F) -> F::Output {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
        .block_on(future)
}

#[test]
fn policies_marks_and_words_about_points_pass_the_relay() {
    run(async {
        let site = Site::new();
        let target = FakeTarget::start(&site);
        let policy =
            Policy { revision: 3, points_every_ms: 60_000, target: target.id, app_points_every_ms: 0 };
        target.set_policy(policy);
        let server = Server::start(&site.state_dir("ps"), target.address, "").await;
        let mut agent = FakeAgent::new(&site, target.id);
        let disk = target.protect(agent.id, MIB);
        agent.add_disk(disk, noise(MIB, 1));
        let mut link = patiently("initial sync", agent.sync(server.address)).await;
        assert!(agent.events.contains(&AgentEvent::Policy(policy)), "{:?}", agent.events);
        for byte in 1..=3 {
            let batch = vec![vec![Record::data(0, Bytes::from(vec![byte; 4096]))]];
            let ended = patiently("delta", agent.send_delta(&mut link, disk, batch)).await;
            assert!(matches!(ended, Ended::Done), "{ended:?}");
        }
        let all_told = |agent: &mut FakeAgent| {
            agent.events.iter().filter(|event| matches!(event, AgentEvent::Marked { .. })).count() == 3
        };
        assert!(matches!(patiently("marks", agent.go(&mut link, all_told)).await, Ended::Done));
        assert_eq!(target.marks().len(), 3);

        assert!(agent.core.degrade(disk, None, Sequence(1), Sequence(2), "the oracle differs"));
        assert!(!agent.core.degrade(disk, None, Sequence(2), Sequence(1), "backwards"));
        assert!(!agent.core.degrade(DiskId([9; 16]), None, Sequence(1), Sequence(2), "another disk"));
        // What comes behind it on its way is there: so is it.
        let arrived = patiently("the words arrive", async {
            loop {
                let turn = agent.go(&mut link, |_| true).await;
                assert!(matches!(turn, Ended::Done), "{turn:?}");
                if let [degraded] = target.degraded().as_slice() {
                    return *degraded;
                }
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
        });
        let told = arrived.await;
        assert_eq!((told.disk, told.from, told.to), (disk, Sequence(1), Sequence(2)));
        assert_eq!(told.cause.as_str(), "the oracle differs");
        link.cut();
        server.stop().await;
    });
}

#[test]
fn a_disk_arrives_equal_and_compressed_through_the_relay_and_noise_stays_raw() {
    run(async {
        let site = Site::new();
        let target = FakeTarget::start(&site);
        let server = Server::start(&site.state_dir("ps"), target.address, "workers = 2").await;
        let mut agent = FakeAgent::new(&site, target.id);
        let content: Bytes =
            [compressible(6 * MIB), noise(2 * MIB, 5), Bytes::from(vec![0; MIB]), compressible(3 * MIB)]
                .concat()
                .into();
        let disk = target.protect(agent.id, content.len());
        agent.add_disk(disk, content.clone());
        let mut link = patiently("initial sync", agent.sync(server.address)).await;
        assert_eq!(target.bytes(disk), content, "initial sync");
        assert_eq!(target.relays(), [1], "one relay on the way");

        // Ordered delta: many batches of several records, compressible and not, over the same blocks again and again.
        let mut expected = content.to_vec();
        let mut batches = Vec::new();
        for number in 0..60_u64 {
            let records: Vec<Record> = (0..4)
                .map(|part| {
                    let sector = (number * 37 + part * 11) % 4000 * 8;
                    let plain = if (number + part) % 3 == 0 {
                        noise(65536, number * 4 + part + 1)
                    } else {
                        compressible(65536)
                    };
                    let at = sector as usize * 512;
                    expected[at..at + plain.len()].copy_from_slice(&plain);
                    Record::data(sector, plain)
                })
                .collect();
            batches.push(records);
        }
        let ended = patiently("delta", agent.send_delta(&mut link, disk, batches)).await;
        assert!(matches!(ended, Ended::Done), "{ended:?}");
        assert!(target.bytes(disk) == expected, "delta");

        let seen = target.seen();
        let sequences: Vec<u64> = seen.iter().filter_map(|record| record.sequence).collect();
        assert_eq!(sequences, (1..=240).collect::<Vec<_>>(), "the delta lane kept its order");
        let bulk: Vec<u64> =
            seen.iter().filter(|record| record.sequence.is_none()).map(|record| record.range.start).collect();
        assert!(bulk.is_sorted(), "the bulk lane kept its order: {bulk:?}");

        let noisy = |range: SectorRange| range.start >= 12288 && range.end <= 16384;
        for record in seen.iter().filter(|record| record.sequence.is_none() && record.plain_bytes > 0) {
            let codec = if noisy(record.range) { Codec::Raw } else { Codec::Zstd };
            assert_eq!(record.codec, codec, "{:?}", record);
        }
        let (stored, plain) = seen
            .iter()
            .filter(|record| record.codec == Codec::Zstd)
            .fold((0, 0), |(stored, plain), record| {
                (stored + record.stored_bytes, plain + record.plain_bytes)
            });
        assert!(plain * 2 > stored * 3, "ratio over 1.5: {plain} as {stored}");

        let status = server
            .until("everything is handed over", |status| {
                let plain_bytes = 11 * MIB as u64 + 240 * 65536; // zeros cost nothing
                status.sessions.first().is_some_and(|session| {
                    session.held_bytes == 0 && session.traffic.plain_bytes == plain_bytes
                })
            })
            .await;
        let session = &status.sessions[0];
        assert_eq!(session.agent, agent.id.to_string());
        assert!(session.ratio.unwrap() > 1.5, "{session:?}");
        assert!(session.traffic.from_agent_bytes > session.traffic.to_target_bytes);
        assert_eq!(session.disks[0].disk, disk.to_string());
        assert_eq!(session.disks[0].plain_bytes, session.traffic.plain_bytes);
        server.stop().await;
    });
}

/// A target whose transport takes next to nothing before it is read.
fn narrow() -> (TransportSettings, FlowLimits) {
    let transport = TransportSettings {
        stream_window_bytes: 256 << 10,
        receive_window_bytes: 1 << 20,
        ..TransportSettings::default()
    };
    let limits =
        FlowLimits { unwritten_bytes: 256 << 20, undurable_bytes: 512 << 20, ..FlowLimits::default() };
    (transport, limits)
}

#[test]
fn a_target_that_stops_reading_makes_the_relay_hold_at_most_its_window() {
    run(async {
        let site = Site::new();
        let (transport, limits) = narrow();
        let target = FakeTarget::with(&site, transport, limits);
        let server = Server::start(&site.state_dir("ps"), target.address, "memory = \"256 MiB\"").await;
        let mut agent = FakeAgent::new(&site, target.id);
        let content = noise(96 * MIB, 3);
        let disk = target.protect(agent.id, content.len());
        agent.add_disk(disk, content.clone());
        let mut link = agent.connect(server.address).await;
        let opened = |agent: &mut FakeAgent| {
            agent.events.iter().any(|event| matches!(event, AgentEvent::Opened { .. }))
        };
        assert!(matches!(patiently("open", agent.go(&mut link, opened)).await, Ended::Done));
        target.deafen(true);
        let going = async {
            let ended = agent.go(&mut link, FakeAgent::is_synced).await;
            assert!(matches!(ended, Ended::Done), "{ended:?}");
        };
        let watching = async {
            // Stands still when two looks some ticks apart see the same, with something held.
            let mut before = 0;
            let mut still = 0;
            while still < 4 {
                tokio::time::sleep(std::time::Duration::from_millis(300)).await;
                let status = server.status().await;
                let session = &status.sessions[0];
                let received = session.traffic.from_agent_bytes;
                still = if received == before && session.held_bytes > 0 { still + 1 } else { 0 };
                before = received;
                assert!(session.held_bytes <= session.window_bytes, "{session:?}");
                assert!(session.held_bytes_max <= WINDOW_BYTES_MAX, "{session:?}");
                assert!(status.reserved_bytes <= status.memory_bytes);
            }
            assert!(
                (before as usize) < content.len() * 3 / 4,
                "the agent was held back, not everything buffered"
            );
            target.deafen(false);
        };
        patiently("both", async { tokio::join!(going, watching) }).await;
        assert!(target.bytes(disk) == content);
        server.stop().await;
    });
}

#[test]
fn a_target_that_grants_no_more_credit_holds_the_agent_back() {
    run(async {
        let site = Site::new();
        let limits = FlowLimits { unwritten_bytes: 16 << 20, ..FlowLimits::default() };
        let target = FakeTarget::with(&site, TransportSettings::default(), limits);
        let server = Server::start(&site.state_dir("ps"), target.address, "").await;
        let mut agent = FakeAgent::new(&site, target.id);
        let content = noise(64 * MIB, 9);
        let disk = target.protect(agent.id, content.len());
        agent.add_disk(disk, content.clone());
        let mut link = agent.connect(server.address).await;
        let opened = |agent: &mut FakeAgent| {
            agent.events.iter().any(|event| matches!(event, AgentEvent::Opened { .. }))
        };
        assert!(matches!(patiently("open", agent.go(&mut link, opened)).await, Ended::Done));
        target.stall(true);
        let going = async {
            let ended = agent.go(&mut link, FakeAgent::is_synced).await;
            assert!(matches!(ended, Ended::Done), "{ended:?}");
        };
        let watching = async {
            let mut still = 0;
            let mut before = u64::MAX;
            while still < 4 {
                tokio::time::sleep(std::time::Duration::from_millis(300)).await;
                let received = server.status().await.sessions[0].traffic.plain_bytes;
                still = if received == before { still + 1 } else { 0 };
                before = received;
            }
            assert!(before <= 2 * (16 << 20), "no more than was granted: {before}");
            target.stall(false);
        };
        patiently("both", async { tokio::join!(going, watching) }).await;
        assert!(target.bytes(disk) == content);
        server.stop().await;
    });
}

#[test]
fn whoever_is_killed_the_session_ends_and_the_next_one_resumes() {
    run(async {
        let site = Site::new();
        let mut target = FakeTarget::start(&site);
        let state_dir = site.state_dir("ps");
        let mut server = Server::start(&state_dir, target.address, "").await;
        let mut agent = FakeAgent::new(&site, target.id);
        let content = noise(48 * MIB, 17);
        let disk = target.protect(agent.id, content.len());
        agent.add_disk(disk, content.clone());
        let newest_session = |target: &FakeTarget| target.seen().iter().map(|seen| seen.session.0).max();

        // The agent dies in the middle.
        let mut link = agent.connect(server.address).await;
        let ended = patiently("some records", agent.go(&mut link, |_| target.seen().len() >= 4)).await;
        assert!(matches!(ended, Ended::Done), "{ended:?}");
        link.cut();
        agent.core.handle_disconnected();
        server.until("the agent's session is over", |status| status.sessions.is_empty()).await;

        // The target dies in the middle: the agent is told who, and what to do.
        // What is still on its way of the session before does not tell that this one has begun.
        let before = newest_session(&target);
        let mut link = agent.connect(server.address).await;
        let ended = patiently("some more", agent.go(&mut link, |_| newest_session(&target) > before)).await;
        assert!(matches!(ended, Ended::Done), "{ended:?}");
        let (ended, ()) =
            patiently("the end", async { tokio::join!(agent.go(&mut link, |_| false), target.kill()) }).await;
        let (code, text) = ended.peer();
        assert_eq!(code, ErrorCode::Upstream);
        assert!(text.contains(&target.address.to_string()) && text.contains("resumes"), "{text}");
        server.until("the session is over", |status| status.sessions.is_empty()).await;

        // While it is gone, the agent is told so at once.
        let mut link = agent.connect(server.address).await;
        let (code, text) = patiently("refusal", agent.go(&mut link, |_| false)).await.peer();
        assert_eq!(code, ErrorCode::Upstream);
        assert!(text.contains(&target.address.to_string()) && text.contains("check that it runs"), "{text}");
        target.restart().await;

        // The relay is restarted in the middle.
        let before = newest_session(&target);
        let mut link = agent.connect(server.address).await;
        let done = |agent: &mut FakeAgent| newest_session(&target) > before || agent.is_synced();
        let ended = patiently("some more", agent.go(&mut link, done)).await;
        assert!(matches!(ended, Ended::Done), "{ended:?}");
        if !agent.is_synced() {
            let (ended, ()) =
                patiently("the end", async { tokio::join!(agent.go(&mut link, |_| false), server.stop()) })
                    .await;
            assert!(matches!(&ended, Ended::Gone(reason) if reason.contains("shutting down")), "{ended:?}");
            server = Server::start(&state_dir, target.address, "").await;
            drop(patiently("the rest", agent.sync(server.address)).await);
        }
        assert!(target.bytes(disk) == content);
        server.stop().await;
    });
}

#[test]
fn only_agents_of_the_site_are_served() {
    run(async {
        let site = Site::new();
        let target = FakeTarget::start(&site);
        let server = Server::start(&site.state_dir("ps"), target.address, "").await;
        for role in [Role::ProcessServer, Role::MasterTarget] {
            let identity = site.identity(role);
            // A client may finish its handshake before the server judged it; then the close comes right after.
            if let Ok((peer, _dialer)) = dial(&identity, &site.trust(), server.address).await {
                patiently("the refusal", peer.connection.closed()).await;
            }
        }
        assert_eq!(server.status().await.totals.sessions, 0);
        server.stop().await;
    });
}

#[test]
fn a_hello_of_another_agent_is_refused() {
    run(async {
        let site = Site::new();
        let target = FakeTarget::start(&site);
        let server = Server::start(&site.state_dir("ps"), target.address, "").await;
        let identity = Arc::new(site.identity(Role::Agent));
        let mut liar = FakeAgent::with(&site, identity, PeerId([9; 16]), PeerId::NONE);
        let mut link = liar.connect(server.address).await;
        let (code, text) = patiently("refusal", liar.go(&mut link, |_| false)).await.peer();
        assert_eq!(code, ErrorCode::Identity);
        assert!(text.contains("another agent"), "{text}");
        assert_eq!(target.relays(), [0_u8; 0], "the target heard nothing");
        server.stop().await;
    });
}

#[test]
fn an_agent_that_names_its_target_gets_no_other() {
    run(async {
        let site = Site::new();
        let target = FakeTarget::start(&site);
        let server = Server::start(&site.state_dir("ps"), target.address, "").await;
        let mut agent = FakeAgent::new(&site, PeerId([9; 16]));
        let mut link = agent.connect(server.address).await;
        let (code, text) = patiently("refusal", agent.go(&mut link, |_| false)).await.peer();
        assert_eq!(code, ErrorCode::Upstream);
        assert!(text.contains(&target.address.to_string()), "{text}");
        server.stop().await;
    });
}

#[test]
fn a_record_beyond_the_granted_size_ends_the_session_before_the_target_sees_it() {
    run(async {
        let site = Site::new();
        let target = FakeTarget::start(&site);
        let server = Server::start(&site.state_dir("ps"), target.address, "").await;
        let mut agent = FakeAgent::new(&site, target.id);
        let disk = target.protect(agent.id, 4 * MIB);
        agent.add_disk(disk, compressible(4 * MIB));
        let mut link = patiently("initial sync", agent.sync(server.address)).await;
        let before = target.seen().len();
        let beyond = 4 * MIB as u64 / 512;
        let records = vec![Record::data(beyond - 4, compressible(4096))];
        let (code, text) =
            patiently("refusal", agent.send_delta(&mut link, disk, vec![records])).await.peer();
        assert_eq!(code, ErrorCode::Limit);
        assert!(text.contains("outside the granted disk"), "{text}");
        assert_eq!(target.seen().len(), before);
        server.stop().await;
    });
}

#[test]
fn data_of_a_disk_that_was_not_opened_ends_the_session() {
    run(async {
        let site = Site::new();
        let target = FakeTarget::start(&site);
        let server = Server::start(&site.state_dir("ps"), target.address, "").await;
        let mut agent = FakeAgent::new(&site, target.id);
        let mut link = agent.connect(server.address).await;
        assert!(matches!(
            patiently("ready", agent.go(&mut link, |agent| agent.core.is_ready())).await,
            Ended::Done
        ));
        let disk = DiskId([3; 16]);
        let header = BulkHeader {
            disk,
            lineage: LineageId([1; 16]),
            generation: Generation(1),
            pass: 1,
            as_of: Sequence(0),
            cover: SectorRange::new(0, 8),
            record_count: 1,
        };
        let frame = encode_bulk(&header, &[Record::data(0, compressible(4096))]);
        link.writer.send(Outgoing { lane: Lane::Bulk(disk), frame }, ());
        let (code, text) = patiently("refusal", agent.go(&mut link, |_| false)).await.peer();
        assert_eq!(code, ErrorCode::Identity);
        assert!(text.contains("not granted"), "{text}");
        server.stop().await;
    });
}

#[test]
fn garbage_on_a_control_stream_ends_only_that_session() {
    run(async {
        let site = Site::new();
        let target = FakeTarget::start(&site);
        let server = Server::start(&site.state_dir("ps"), target.address, "").await;
        let mut good = FakeAgent::new(&site, target.id);
        let disk = target.protect(good.id, 2 * MIB);
        good.add_disk(disk, compressible(2 * MIB));
        let mut link = patiently("initial sync", good.sync(server.address)).await;

        let identity = site.identity(Role::Agent);
        let (peer, _dialer) = dial(&identity, &site.trust(), server.address).await.unwrap();
        let (mut send, mut receive) = peer.connection.open_bi().await.unwrap();
        send.write_all(&noise(4096, 77)).await.unwrap();
        let answer = patiently("the farewell", receive.read_to_end(4096)).await;
        drop(answer); // an ERROR frame, then the end, or only the end: either way the connection is closed
        patiently("the close", peer.connection.closed()).await;

        // Sound frames in a senseless order are answered by name.
        let (peer, _dialer2) = dial(&identity, &site.trust(), server.address).await.unwrap();
        let (mut reader, mut writer, _written) = lanes::dialled::<()>(&peer.connection).await.unwrap();
        writer.send(Outgoing::control(Frame::new(FrameKind::PassEnd, Bytes::from(vec![0; 48]))), ());
        let Arrival::Frame(kind, body) = patiently("the answer", reader.next()).await else {
            panic!("no answer")
        };
        let Ok(Message::Error(head, text)) = Message::decode(kind, &body) else { panic!("{kind:?}") };
        assert_eq!(head.code, ErrorCode::Protocol);
        assert!(text.contains("PASS_END"), "{text}");
        drop((reader, writer));
        reprotect_engine::net::endpoint::CloseCode::Finished.close(&peer.connection);

        let records = vec![Record::data(8, noise(4096, 2))];
        let ended =
            patiently("the good agent goes on", good.send_delta(&mut link, disk, vec![records])).await;
        assert!(matches!(ended, Ended::Done), "{ended:?}");
        server.until("one session is left", |status| status.sessions.len() == 1).await;
        server.stop().await;
    });
}

#[test]
fn an_agent_that_does_not_speak_leaves_by_itself_and_holds_no_memory() {
    run(async {
        let site = Site::new();
        let target = FakeTarget::start(&site);
        let server = Server::start(&site.state_dir("ps"), target.address, "").await;
        let identity = site.identity(Role::Agent);
        let (peer, _dialer) = dial(&identity, &site.trust(), server.address).await.unwrap();
        let (mut reader, mut writer, _written) = lanes::dialled::<()>(&peer.connection).await.unwrap();
        let hello = Hello::new(identity.own().peer, PeerId([9; 16]), [1; 16]);
        writer.send(Outgoing::control(Message::Hello(hello).encode()), ());
        let Arrival::Frame(kind, _) = patiently("an answer", reader.next()).await else { panic!("closed") };
        assert_eq!(kind, FrameKind::Error);
        // The farewell waits for nobody longer than its time.
        patiently("the close", peer.connection.closed()).await;
        let status = server.until("nobody is here", |status| status.sessions.is_empty()).await;
        assert_eq!(status.reserved_bytes, 0);
        server.stop().await;
    });
}

#[test]
fn when_the_budget_is_given_away_newcomers_are_refused_politely() {
    run(async {
        let site = Site::new();
        let target = FakeTarget::start(&site);
        let server = Server::start(&site.state_dir("ps"), target.address, "memory = \"64 MiB\"").await;
        let mut links = Vec::new();
        let mut refused = None;
        for _ in 0..=(64 * MIB as u64 / BUDGET_BYTES_MIN) {
            let mut agent = FakeAgent::new(&site, target.id);
            let disk = target.protect(agent.id, MIB);
            agent.add_disk(disk, compressible(MIB));
            let mut link = agent.connect(server.address).await;
            match patiently("sync or refusal", agent.go(&mut link, FakeAgent::is_synced)).await {
                Ended::Done => links.push((agent, link)),
                other => refused = Some(other),
            }
            let status = server.status().await;
            assert!(status.reserved_bytes <= status.memory_bytes);
        }
        let (code, text) = refused.expect("one too many").peer();
        assert_eq!(code, ErrorCode::Limit);
        assert!(text.contains("raise `memory`"), "{text}");
        assert!(links.len() >= 4, "{}", links.len());
        assert!(server.status().await.totals.refused >= 1);

        // Room is made when one leaves.
        let (_, link) = links.pop().unwrap();
        let left = links.len();
        link.cut();
        server.until("one left", |status| status.sessions.len() == left).await;
        let mut agent = FakeAgent::new(&site, target.id);
        let disk = target.protect(agent.id, MIB);
        agent.add_disk(disk, compressible(MIB));
        drop(patiently("the newcomer", agent.sync(server.address)).await);
        server.stop().await;
    });
}

/// An agent that stands by, and what it dialled with.
async fn stand(site: &Site, server: &Server) -> (Identity, Dialer, Standing<()>) {
    let identity = site.identity(Role::Agent);
    let (peer, dialer) = dial(&identity, &site.trust(), server.address).await.unwrap();
    (identity, dialer, Standing::open(peer).await.unwrap())
}

#[test]
fn an_agent_that_stands_by_learns_how_the_relay_stands_and_takes_no_memory_until_it_begins() {
    run(async {
        let site = Site::new();
        let target = FakeTarget::start(&site);
        let server = Server::start(&site.state_dir("ps"), target.address, "memory = \"64 MiB\"").await;
        let (identity, _dialer, mut standing) = stand(&site, &server).await;
        let load = patiently("an answer", standing.probe(common::PATIENCE)).await.unwrap();
        assert!(load.accepts && load.sessions == 0 && load.room_permille == 1000, "{load:?}");
        let status = server.status().await;
        assert!(status.sessions.is_empty() && status.totals.sessions == 0 && status.reserved_bytes == 0);

        // Others take the memory; what stands by learns that, also from within a session.
        let mut links = Vec::new();
        let load = loop {
            let mut agent = FakeAgent::new(&site, target.id);
            let disk = target.protect(agent.id, MIB);
            agent.add_disk(disk, compressible(MIB));
            links.push(patiently("initial sync", agent.sync(server.address)).await);
            let load = patiently("an answer", standing.probe(common::PATIENCE)).await.unwrap();
            if !load.accepts {
                break load;
            }
        };
        assert!(load.sessions == links.len() as u32 && load.room_permille < 500, "{load:?}");
        let mut link = links.pop().unwrap();
        let probe = Message::Probe(Probe { token: 9 }).encode();
        link.writer.send(Outgoing::control(probe), ());
        let body = loop {
            match patiently("an answer in the session", link.reader.next()).await {
                Arrival::Frame(FrameKind::Load, body) => break body,
                Arrival::Frame(..) => {}
                Arrival::Over(error) => panic!("{error}"),
            }
        };
        assert_eq!(Message::decode(FrameKind::Load, &body), Ok(Message::Load(Load { token: 9, ..load })));

        // Its HELLO begins a session on the same connection, which is then refused for want of memory.
        let (_, _, (mut reader, mut writer, _written)) = standing.into_parts();
        let hello = Hello::new(identity.own().peer, target.id, [7; 16]);
        writer.send(Outgoing::control(Message::Hello(hello).encode()), ());
        match patiently("a refusal", reader.next()).await {
            Arrival::Frame(FrameKind::Error, body) => {
                let Ok(Message::Error(head, text)) = Message::decode(FrameKind::Error, &body) else {
                    panic!("no error: {body:?}")
                };
                assert_eq!(head.code, ErrorCode::Limit, "{text}");
            }
            other => panic!("{other:?}"),
        }
        server.stop().await;
    });
}

#[test]
fn a_relay_says_how_far_its_target_is_and_that_it_is_gone() {
    run(async {
        let site = Site::new();
        let target = FakeTarget::start(&site);
        let server = Server::start(&site.state_dir("ps"), target.address, "").await;
        let (_, _dialer, mut standing) = stand(&site, &server).await;
        let mut until = async |wanted: fn(u32) -> bool| loop {
            let load = standing.probe(common::PATIENCE).await.unwrap();
            if wanted(load.target_micros) {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        };
        patiently("the way is measured", until(|micros| (1..ROUND_TRIP_UNKNOWN).contains(&micros))).await;
        assert!(server.status().await.target_micros.is_some());
        target.kill().await;
        patiently("the way is gone", until(|micros| micros == ROUND_TRIP_NONE)).await;
        assert!(server.status().await.target_problem.is_some());
        server.stop().await;
    });
}

#[test]
fn fifty_agents_share_the_budget_and_every_disk_arrives() {
    run(async {
        let site = Site::new();
        let target = FakeTarget::start(&site);
        let server = Server::start(&site.state_dir("ps"), target.address, "memory = \"768 MiB\"").await;
        let mut tasks = Vec::new();
        for number in 0..50_u64 {
            let mut agent = FakeAgent::new(&site, target.id);
            let content: Bytes = [compressible(2 * MIB), noise(MIB, number + 1)].concat().into();
            let disk = target.protect(agent.id, content.len());
            agent.add_disk(disk, content.clone());
            let address = server.address;
            tasks.push(tokio::spawn(async move {
                let link = agent.sync(address).await;
                (disk, content, agent, link)
            }));
        }
        let mut kept = Vec::new();
        for task in tasks {
            let status = server.status().await;
            assert!(status.reserved_bytes <= status.memory_bytes, "{status:?}");
            let windows: u64 =
                status.sessions.iter().map(|session| session.window_bytes + session.send_window_bytes).sum();
            assert!(windows <= status.memory_bytes, "{windows}");
            let (disk, content, agent, link) = patiently("a sync", task).await.unwrap();
            assert!(target.bytes(disk) == content, "{disk}");
            kept.push((agent, link));
        }
        let status = server.until("all are counted", |status| status.sessions.len() == 50).await;
        assert_eq!(status.totals.sessions, 50);
        server.stop().await;
    });
}
