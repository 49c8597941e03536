//! A source of which parts cannot be read: the rest arrives, what is missing is named, and it heals by itself.
//!
//! Behind a loop device the end of its file is cut off: reading there is an input/output error, until somebody writes there
//! or the file is whole again. Needs root; what follows disks also needs live capture. Says so where it has none.

#![expect(clippy::unwrap_used, reason = "a failed step is a failed test")]

mod capture_lab;
mod common;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use capture_lab::Loop;
use common::target::FakeTarget;
use common::{AgentDaemon, Site, noise, run, source_id, wait_for, write_config};
use reprotect_agent::api::DiskInfo;
use reprotect_engine::format::batch::{Mark, MarkClass};
use reprotect_engine::format::message::PassMode;
use reprotect_engine::units::DiskId;

const MIB: usize = 1 << 20;
const SIZE: usize = 24 * MIB;
/// Where the file is cut off: in the middle of a chunk, at a block.
const CUT: usize = 9 * MIB + 20 * 1024;
const MISSING: u64 = (SIZE - CUT) as u64;
/// What the target holds before.
const OLD: u8 = 0xee;

/// A disk whose end cannot be read, an agent's state, and a target.
struct Setup {
    _site: Site,
    target: FakeTarget,
    state_dir: PathBuf,
    backing: File,
    content: Vec<u8>,
    device: Loop,
    disk: DiskId,
}

impl Setup {
    fn new(mode: PassMode, more: &str) -> Self {
        let site = Site::new();
        let target = FakeTarget::start(&site);
        let (state_dir, agent) = site.state_dir("agent");
        let image = site.path("disk.img");
        let content = noise(SIZE, 31);
        std::fs::write(&image, &content).unwrap();
        let backing = OpenOptions::new().write(true).open(&image).unwrap();
        let device = Loop::existing(&image);
        let source = source_id(&device.path);
        backing.set_len(CUT as u64).unwrap();
        write_config(&state_dir, target.address, &[&device.path], more);
        let before = if mode == PassMode::Copy { 0 } else { OLD };
        let disk = target.protect_source(agent, source, vec![before; SIZE], mode);
        Self { _site: site, target, state_dir, backing, content, device, disk }
    }

    fn start(&self) -> AgentDaemon {
        AgentDaemon::start(&self.state_dir)
    }

    /// Writes through the device, past the cache.
    fn write(&self, at: usize, bytes: &[u8]) {
        write_through(&self.device.path, at, bytes);
    }

    /// The file is whole again.
    fn mend(&self) {
        self.backing.write_all_at(&self.content, 0).unwrap();
        self.backing.sync_all().unwrap();
    }

    fn arrived(&self, expected: &[u8]) -> bool {
        self.target.with_bytes(self.disk, |bytes| bytes == expected)
    }

    /// Waits for a mark placed from now on that `wanted` holds of.
    async fn next_mark(&self, what: &str, wanted: impl Fn(&Mark) -> bool) {
        let before = self.target.marks().len();
        wait_for(what, async || self.target.marks().into_iter().skip(before).find(&wanted)).await;
    }
}

fn write_through(path: &Path, at: usize, bytes: &[u8]) {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(bytes, at as u64).unwrap();
    file.sync_all().unwrap();
}

fn is_incomplete(info: &DiskInfo) -> bool {
    info.unread_bytes > 0 && (info.state == "incomplete" || info.state == "scanning")
}

/// What is told of the missing end.
fn check(info: &DiskInfo) {
    assert_eq!((info.unread_bytes, info.unread_ranges), (MISSING, 1), "{info:?}");
    assert_eq!((info.unread[0].start, info.unread[0].bytes), (CUT as u64, MISSING));
    let problem = info.problem.as_ref().unwrap();
    assert!(problem.contains("complete except 1 range") && problem.contains("cannot be read"), "{problem}");
}

#[test]
fn what_can_be_read_arrives_what_cannot_is_named_and_keeps_what_the_target_had_and_heals() {
    let _machine = capture_lab::machine();
    if !rustix::process::geteuid().is_root() {
        return println!("SKIPPED: loop devices need root");
    }
    for mode in [PassMode::Copy, PassMode::Compare] {
        run(async {
            let setup = Setup::new(mode, "");
            let agent = setup.start();
            let info = agent.until_disk("the rest is there", setup.disk, is_incomplete).await;
            check(&info);
            let status = agent.until("an event", |status| !status.health.is_empty()).await;
            let event = &status.health[0];
            assert_eq!(event.code, "SOURCE_UNREADABLE", "{event:?}");
            assert!(event.cause.contains("1 range") && event.remedy.contains("dmesg"), "{event:?}");
            let blocks = (MISSING / 4096) as u32;
            setup.next_mark("a mark that says so", |mark| mark.unread_blocks == blocks).await;
            let mut expected = setup.content.clone();
            expected[CUT..].fill(if mode == PassMode::Copy { 0 } else { OLD });
            assert!(setup.arrived(&expected), "the rest, and what was there before");
            let beyond = |seen: &common::target::Seen| seen.range.end > (CUT / 512) as u64;
            assert!(!setup.target.seen().iter().any(beyond), "nothing was made up");

            // A part of it heals, then the rest.
            setup.backing.set_len((16 * MIB) as u64).unwrap();
            setup.backing.write_all_at(&setup.content[..16 * MIB], 0).unwrap();
            agent.reload();
            let left = (SIZE - 16 * MIB) as u64;
            agent.until_disk("less is missing", setup.disk, |info| info.unread_bytes == left).await;
            setup.mend();
            agent.reload();
            let healed = |info: &DiskInfo| info.unread_bytes == 0 && info.problem.is_none();
            agent.until_disk("nothing is missing", setup.disk, healed).await;
            setup.next_mark("a mark of the whole disk", |mark| mark.unread_blocks == 0).await;
            assert!(setup.arrived(&setup.content));
            let status = agent.until("no event", |status| status.health.is_empty()).await;
            assert_eq!(status.sessions, 1, "and nobody began anew");
            agent.stop().await;
        });
    }
}

#[test]
fn points_of_a_followed_disk_are_not_whole_until_the_guest_writes_what_was_missing() {
    let _machine = capture_lab::machine();
    if !capture_lab::capable() {
        return;
    }
    for capture in ["window", "data"] {
        run(async {
            let more = format!("capture.mode = \"{capture}\"\ncapture.interval = \"1s\"");
            let setup = Setup::new(PassMode::Copy, &more);
            let agent = setup.start();
            let lacks = |mark: &Mark| mark.class == MarkClass::Crash && mark.unread_blocks > 0;
            setup.next_mark("a point that says what is missing", lacks).await;
            check(&agent.until_disk("incomplete", setup.disk, is_incomplete).await);
            // The guest goes on, and so does the rest of the disk.
            let mut expected = setup.content.clone();
            expected[CUT..].fill(0);
            let fresh = noise(8192, 77);
            setup.write(3 * MIB, &fresh);
            expected[3 * MIB..3 * MIB + 8192].copy_from_slice(&fresh);
            wait_for("the write", async || setup.arrived(&expected).then_some(())).await;
            // The last block is written anew: the file is whole again, with a hole that reads as zeros.
            let last = noise(4096, 78);
            setup.write(SIZE - 4096, &last);
            expected[SIZE - 4096..].copy_from_slice(&last);
            let whole = |mark: &Mark| mark.class == MarkClass::Crash && mark.unread_blocks == 0;
            setup.next_mark("a point of the whole disk", whole).await;
            assert!(setup.arrived(&expected));
            let info = agent.until_disk("synced", setup.disk, |info| info.unread_bytes == 0).await;
            assert_eq!((info.problem, info.unaccounted), (None, 0));
            agent.stop().await;
        });
    }
}

#[test]
fn the_next_process_knows_what_is_missing_and_compares_nothing_for_it() {
    let _machine = capture_lab::machine();
    if !capture_lab::capable() {
        return;
    }
    run(async {
        let setup = Setup::new(PassMode::Copy, "capture.interval = \"1s\"");
        let agent = setup.start();
        let lacks = |mark: &Mark| mark.class == MarkClass::Crash && mark.unread_blocks > 0;
        setup.next_mark("a point that says what is missing", lacks).await;
        agent.stop().await;
        let agent = setup.start();
        setup.next_mark("one of the next process", lacks).await;
        let info = agent.until_disk("incomplete", setup.disk, is_incomplete).await;
        check(&info);
        assert!(info.read_bytes < MIB as u64, "{info:?}");
        setup.mend();
        agent.reload();
        agent.until_disk("nothing is missing", setup.disk, |info| info.unread_bytes == 0).await;
        setup.next_mark("a point of the whole disk", |mark| mark.unread_blocks == 0).await;
        assert!(setup.arrived(&setup.content));
        agent.stop().await;
        // A list that is damaged is none: everything is compared, as if nothing were known.
        let list = setup.state_dir.join(format!("unread-{}", setup.disk));
        assert!(!list.exists(), "nothing is missing");
        std::fs::write(&list, "12 1").unwrap();
        let agent = setup.start();
        agent.until_disk("compared", setup.disk, |info| info.read_bytes >= SIZE as u64).await;
        agent.until_disk("synced", setup.disk, |info| info.state == "synced").await;
        agent.stop().await;
    });
}
