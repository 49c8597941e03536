//! After an unclean boot everything is compared, and what was busy before comes first. Needs root and live capture; says so
//! where it has none.

mod capture_lab;
mod common;

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;

use capture_lab::Loop;
use common::target::FakeTarget;
use common::{AgentDaemon, Site, noise, run, source_id, write_config};
use reprotect_engine::format::message::PassMode;
use reprotect_engine::net::wall_clock;

const MIB: usize = 1 << 20;
/// Three regions of 64 MiB.
const SIZE: usize = 192 * MIB;
const CHUNK: usize = 4 * MIB;

#[test]
fn a_compare_after_an_unclean_boot_begins_where_the_disk_was_busy() {
    let _machine = capture_lab::machine();
    if !capture_lab::capable() {
        return;
    }
    run(async {
        let site = Site::new();
        let target = FakeTarget::start(&site);
        let (state_dir, agent_id) = site.state_dir("agent");
        let device = Loop::new(site.dir.path(), "disk.img", (SIZE / MIB) as u64);
        write_config(&state_dir, target.address, &[&device.path], "capture.interval = \"1s\"");
        let source = source_id(&device.path);
        let disk = target.protect_source(agent_id, source, vec![0; SIZE], PassMode::Copy);
        let agent = AgentDaemon::start(&state_dir);
        agent.until_disk("a round", disk, |info| info.scan_rounds > 0).await;
        let file = OpenOptions::new().write(true).open(&device.path).unwrap();
        file.write_all_at(&noise(8192, 5), (150 * MIB) as u64).unwrap();
        file.sync_all().unwrap();
        let written = wall_clock().0 / 1_000_000;
        agent.until_disk("the write", disk, |info| info.durable_as_of_ms > written).await;
        agent.stop().await;

        // Another boot, as far as anybody can tell, and a target that differs in every chunk.
        let session = state_dir.join("capture.json");
        let mut known: serde_json::Value = serde_json::from_slice(&std::fs::read(&session).unwrap()).unwrap();
        known["boot"] = "00000000-0000-0000-0000-000000000000".into();
        std::fs::write(&session, serde_json::to_vec(&known).unwrap()).unwrap();
        let (state, mut bytes) = target.promised(disk);
        bytes.iter_mut().step_by(CHUNK).for_each(|byte| *byte ^= 1);
        target.lose(disk, (state, bytes));
        let seen = target.seen().len();
        let agent = AgentDaemon::start(&state_dir);
        agent.until_disk("compared", disk, |info| info.read_bytes >= SIZE as u64).await;
        agent.until_disk("synced", disk, |info| info.state == "synced").await;
        let bulk = target.seen().into_iter().skip(seen).filter(|seen| seen.sequence.is_none());
        let chunks: Vec<u64> = bulk.map(|seen| seen.range.byte_start() / CHUNK as u64).collect();
        assert_eq!(chunks.len(), SIZE / CHUNK, "each once: {chunks:?}");
        // Sixteen chunks are under way at once, so no other is read before the first of these has arrived.
        assert!((32..48).contains(&chunks[0]), "{chunks:?}");
        let content = std::fs::read(&device.path).unwrap();
        assert!(target.with_bytes(disk, |bytes| bytes == content));
        agent.stop().await;
    });
}
