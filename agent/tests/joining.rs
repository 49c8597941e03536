//! A disk that is protected while another one of the machine is streamed. Needs root and live capture; says so where it has
//! none.

mod capture_lab;
mod common;

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;

use capture_lab::Loop;
use common::target::FakeTarget;
use common::{AgentDaemon, Site, noise, run, source_id, wait_for, write_config};
use reprotect_engine::format::batch::MarkClass;
use reprotect_engine::format::message::PassMode;
use reprotect_engine::units::DiskId;

const MIB: usize = 1 << 20;
const SIZE: usize = 24 * MIB;

#[test]
fn a_disk_that_is_protected_while_another_is_streamed_joins_the_stream() {
    let _machine = capture_lab::machine();
    if !capture_lab::capable() {
        return;
    }
    run(async {
        let site = Site::new();
        let target = FakeTarget::start(&site);
        let (state_dir, agent_id) = site.state_dir("agent");
        let images = ["one.img", "two.img"].map(|name| site.path(name));
        for (seed, image) in images.iter().enumerate() {
            std::fs::write(image, noise(SIZE, 40 + seed as u64)).unwrap();
        }
        let devices = images.map(|image| Loop::existing(&image));
        let more = "capture.mode = \"data\"\ncapture.interval = \"1s\"";
        write_config(&state_dir, target.address, &[&devices[0].path, &devices[1].path], more);
        let protect = |device: &Loop| {
            target.protect_source(agent_id, source_id(&device.path), vec![0; SIZE], PassMode::Copy)
        };
        let write = |device: &Loop, at: usize, seed: u64| {
            let file = OpenOptions::new().write(true).open(&device.path).unwrap();
            file.write_all_at(&noise(8192, seed), at as u64).unwrap();
            file.sync_all().unwrap();
        };
        let equal = |device: &Loop, disk: DiskId| {
            capture_lab::run("blockdev", &["--flushbufs", device.path.to_str().unwrap()]);
            let content = std::fs::read(&device.path).unwrap();
            target.with_bytes(disk, |bytes| bytes == content)
        };
        let first = protect(&devices[0]);
        let agent = AgentDaemon::start(&state_dir);
        agent.until_disk("every write is known", first, |info| info.streaming).await;
        write(&devices[0], 3 * MIB, 7);
        let second = protect(&devices[1]);
        target.offer(second);
        // What is written while the new one is copied is in nobody's way.
        write(&devices[0], 5 * MIB, 8);
        write(&devices[1], 9 * MIB, 9);
        for disk in [first, second] {
            agent.until_disk("every write is known", disk, |info| info.streaming).await;
        }
        write(&devices[0], 11 * MIB, 10);
        write(&devices[1], 12 * MIB, 11);
        wait_for("all of it", async || {
            (equal(&devices[0], first) && equal(&devices[1], second)).then_some(())
        })
        .await;
        wait_for("a point of both", async || {
            let marks = target.marks();
            let crash: Vec<_> = marks.iter().filter(|mark| mark.class == MarkClass::Crash).collect();
            let both = crash.iter().any(|mark| {
                mark.disk == second
                    && crash.iter().any(|other| other.disk == first && other.point == mark.point)
            });
            both.then_some(())
        })
        .await;
        let status = agent.until("both", |status| status.disks.len() == 2).await;
        assert!(
            status.disks.iter().all(|info| info.unaccounted == 0 && info.problem.is_none()),
            "{status:?}"
        );
        assert_eq!(status.sessions, 1);
        agent.stop().await;
    });
}
