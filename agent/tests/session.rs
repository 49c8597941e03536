//! The agent daemon against a scripted target: what arrives, what is sent for it, what survives restarts, and how it
//! behaves when disks or peers do not.

#![expect(clippy::unwrap_used, reason = "a failed step is a failed test")]

mod common;

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use common::target::FakeTarget;
use common::{AgentDaemon, Site, compressible, noise, run, source_id, write_config};
use reprotect_agent::api::DiskInfo;
use reprotect_engine::format::message::PassMode;
use reprotect_engine::limits::DAMAGED_BATCHES_MAX;
use reprotect_engine::net::endpoint::TransportSettings;
use reprotect_engine::net::revocations::Revocation;
use reprotect_engine::proto::credit::FlowLimits;
use reprotect_engine::units::{DiskId, PeerId};

const MIB: usize = 1 << 20;

/// An agent with one image, and the target that protects it.
struct Setup {
    site: Site,
    target: FakeTarget,
    state_dir: PathBuf,
    agent: PeerId,
    image: PathBuf,
}

impl Setup {
    fn new(content: &[u8]) -> Self {
        Self::with(content, FlowLimits::default(), "")
    }

    fn with(content: &[u8], limits: FlowLimits, more: &str) -> Self {
        let site = Site::new();
        let target = FakeTarget::with(&site, TransportSettings::default(), limits);
        let (state_dir, agent) = site.state_dir("agent");
        let image = site.path("disk.img");
        std::fs::write(&image, content).unwrap();
        write_config(&state_dir, target.address, &[&image], more);
        Self { site, target, state_dir, agent, image }
    }

    fn protect(&self, held: Vec<u8>, mode: PassMode) -> DiskId {
        self.target.protect_source(self.agent, source_id(&self.image), held, mode)
    }

    fn start(&self) -> AgentDaemon {
        AgentDaemon::start(&self.state_dir)
    }

    fn equal(&self, disk: DiskId) -> bool {
        let expected = std::fs::read(&self.image).unwrap();
        self.target.with_bytes(disk, |bytes| bytes == expected)
    }
}

fn mixed() -> Vec<u8> {
    [
        compressible(9 * MIB),
        vec![0; 8 * MIB],
        noise(6 * MIB + 512, 3),
        vec![0; 70_000 / 512 * 512],
        compressible(MIB),
    ]
    .concat()
}

#[test]
fn initial_sync_makes_the_target_equal_and_zeros_travel_as_none() {
    run(async {
        let content = mixed();
        let setup = Setup::new(&content);
        let disk = setup.protect(vec![0; content.len()], PassMode::Copy);
        let agent = setup.start();
        let info = agent.until_synced(disk).await;
        assert!(setup.equal(disk));
        let data =
            content.chunks(4096).filter(|block| block.iter().any(|byte| *byte != 0)).count() as u64 * 4096;
        assert!(info.plain_bytes_sent <= data + 70_000, "{} of {data}", info.plain_bytes_sent);
        assert!(info.wire_bytes_sent < info.plain_bytes_sent, "the agent compresses where no relay does");
        let inventory = setup.target.inventories().pop().unwrap();
        assert!(inventory.iter().any(|disk| disk.source == source_id(&setup.image) && disk.selected));
        agent.stop().await;
    });
}

#[test]
fn an_empty_disk_of_a_gigabyte_costs_less_than_a_megabyte() {
    run(async {
        let setup = Setup::new(&[]);
        let size = 1 << 30;
        std::fs::OpenOptions::new().write(true).open(&setup.image).unwrap().set_len(size).unwrap();
        let disk = setup.protect(vec![0; size as usize], PassMode::Copy);
        let agent = setup.start();
        let info = agent.until_synced(disk).await;
        assert_eq!(info.plain_bytes_sent, 0);
        assert!(info.wire_bytes_sent < MIB as u64, "{}", info.wire_bytes_sent);
        assert_eq!(info.read_bytes, 0, "holes are not read");
        agent.stop().await;
    });
}

#[test]
fn over_an_existing_target_only_differences_travel() {
    run(async {
        let content = noise(20 * MIB, 9);
        let mut held = content.clone();
        for at in [0, 5 * MIB + 4096, 12 * MIB - 512, 20 * MIB - 1] {
            held[at] ^= 0xff;
        }
        let setup = Setup::new(&content);
        let disk = setup.protect(held, PassMode::Compare);
        let agent = setup.start();
        let info = agent.until_synced(disk).await;
        assert!(setup.equal(disk));
        assert_eq!(info.plain_bytes_sent, 4 * 4096, "one block for each difference");
        agent.stop().await;
    });
}

#[test]
fn a_scan_round_picks_up_changed_blocks_only() {
    run(async {
        let content = noise(12 * MIB, 4);
        let setup = Setup::new(&content);
        let disk = setup.protect(vec![0; content.len()], PassMode::Copy);
        let agent = setup.start();
        let synced = agent.until_disk("a round", disk, |info| info.scan_rounds > 0).await;
        assert_eq!(synced.last, 0, "nothing changed, nothing was sent");
        let file = std::fs::OpenOptions::new().write(true).open(&setup.image).unwrap();
        file.write_all_at(&noise(8192, 77), 3 * MIB as u64).unwrap();
        file.write_all_at(&[0; 4096], 9 * MIB as u64).unwrap();
        file.sync_all().unwrap();
        // The round that runs may have passed these blocks already; the one after it has not.
        let before = agent.until("a status", |_| true).await.disks[0].scan_rounds;
        let info = agent.until_disk("two rounds more", disk, |info| info.scan_rounds >= before + 2).await;
        assert!(setup.equal(disk));
        assert_eq!(info.plain_bytes_sent - synced.plain_bytes_sent, 8192, "zeros are not sent as data");
        agent.stop().await;
    });
}

#[test]
fn a_target_that_lost_what_it_called_durable_gets_it_again_without_a_compare() {
    run(async {
        let content = noise(12 * MIB, 14);
        let mut setup = Setup::new(&content);
        let disk = setup.protect(vec![0; content.len()], PassMode::Copy);
        let agent = setup.start();
        agent.until_disk("a round", disk, |info| info.scan_rounds > 0).await;
        let file = std::fs::OpenOptions::new().write(true).open(&setup.image).unwrap();
        let mut promised = None;
        for (at, seed) in [(3, 77), (5, 78), (7, 79)] {
            file.write_all_at(&noise(8192, seed), at * MIB as u64).unwrap();
            file.sync_all().unwrap();
            let rounds = agent.until("a status", |_| true).await.disks[0].scan_rounds;
            agent.until_disk("two rounds more", disk, |info| info.scan_rounds >= rounds + 2).await;
            promised.get_or_insert_with(|| setup.target.promised(disk));
        }
        let before = agent.until("a status", |_| true).await.disks[0].clone();
        setup.target.kill().await;
        agent.until("the session is over", |status| !status.connected).await;
        setup.target.lose(disk, promised.unwrap());
        assert!(!setup.equal(disk));
        setup.target.restart().await;
        let rounds = before.scan_rounds;
        let after = agent.until_disk("a round again", disk, |info| info.scan_rounds > rounds + 1).await;
        assert!(setup.equal(disk));
        assert_eq!((after.lost_at_target, after.durable), (before.durable - 1, before.durable));
        assert_eq!(
            after.plain_bytes_sent - before.plain_bytes_sent,
            2 * 8192,
            "what was lost and nothing else"
        );
        agent.stop().await;
    });
}

#[test]
fn after_a_restart_in_the_middle_at_most_a_flush_interval_is_sent_again() {
    run(async {
        let content = noise(96 * MIB, 5);
        let limits = FlowLimits { flush_bytes: 16 << 20, ..FlowLimits::default() };
        let setup = Setup::with(&content, limits, "read_rate = \"40 MB/s\"");
        let disk = setup.protect(vec![0; content.len()], PassMode::Copy);
        let first = setup.start();
        let half = first
            .until_disk("half of it is durable", disk, |info| info.settled_bytes > content.len() as u64 / 2)
            .await;
        assert!(half.settled_bytes < content.len() as u64, "it was to be interrupted");
        let sent_before = first.until("a status", |_| true).await.disks[0].plain_bytes_sent;
        first.stop().await;
        write_config(&setup.state_dir, setup.target.address, &[&setup.image], "");
        let second = setup.start();
        let info = second.until_synced(disk).await;
        assert!(setup.equal(disk));
        let sent = sent_before + info.plain_bytes_sent;
        assert!(sent <= content.len() as u64 + (64 << 20), "{sent}");
        second.stop().await;
    });
}

#[test]
fn a_target_that_does_not_write_holds_the_agent_within_its_memory() {
    run(async {
        let content = noise(200 * MIB, 6);
        for compress in ["off", "source"] {
            let limits =
                FlowLimits { unwritten_bytes: 1 << 30, undurable_bytes: 1 << 30, ..FlowLimits::default() };
            // Slow enough that the target is deaf long before everything is sent.
            let more = format!("compress = \"{compress}\"\nmemory = \"64 MiB\"\nread_rate = \"100 MB/s\"");
            let setup = Setup::with(&content, limits, &more);
            let disk = setup.protect(vec![0; content.len()], PassMode::Copy);
            let agent = setup.start();
            agent.until_disk("it is under way", disk, |info| info.plain_bytes_sent > 0).await;
            // Nothing is read from the connection, credit is plenty: frames pile up in the agent.
            setup.target.deafen(true);
            agent.until_disk("its memory is full", disk, |info| info.held_bytes >= 40 << 20).await;
            tokio::time::sleep(std::time::Duration::from_millis(500)).await;
            setup.target.deafen(false);
            let info = agent.until_synced(disk).await;
            assert!(setup.equal(disk));
            assert_eq!(info.held_bytes_max, 64 << 20);
            assert!(info.held_bytes_peak <= info.held_bytes_max, "{info:?}");
            agent.stop().await;
        }
    });
}

#[test]
fn stopping_is_prompt_while_a_reader_waits_for_memory_or_for_its_rate() {
    run(async {
        for more in ["memory = \"64 MiB\"", "read_rate = \"1 kB/s\""] {
            let content = noise(160 * MIB, 7);
            let setup = Setup::with(&content, FlowLimits::default(), more);
            let disk = setup.protect(vec![0; content.len()], PassMode::Copy);
            setup.target.stall(true);
            let agent = setup.start();
            agent.until("offered or waiting", |status| status.connected).await;
            setup.target.stall(false);
            agent.until_disk("reading", disk, |info| info.read_bytes > 0).await;
            setup.target.stall(true);
            tokio::time::sleep(std::time::Duration::from_millis(500)).await;
            let began = Instant::now();
            agent.stop().await;
            // Generous: the machine may be busy; a wait for memory or rate would last for ever.
            assert!(began.elapsed().as_secs() < 20);
        }
    });
}

#[test]
fn a_missing_source_is_named_and_comes_back_with_a_reload() {
    run(async {
        let content = noise(4 * MIB, 8);
        let setup = Setup::new(&content);
        let disk = setup.protect(vec![0; content.len()], PassMode::Copy);
        let away = setup.site.path("away.img");
        std::fs::rename(&setup.image, &away).unwrap();
        let agent = setup.start();
        let status = agent.until("the warning", |status| !status.warnings.is_empty()).await;
        assert!(status.warnings[0].contains("disk.img"), "{:?}", status.warnings);
        let info = agent.until_disk("it is missing", disk, |info| info.problem.is_some()).await;
        let problem = info.problem.unwrap();
        assert!(problem.contains("attach it again"), "{problem}");
        std::fs::rename(&away, &setup.image).unwrap();
        agent.reload();
        let info = agent.until_synced(disk).await;
        assert_eq!(info.problem, None);
        assert!(setup.equal(disk));
        let status = agent.until("no warning", |status| status.warnings.is_empty()).await;
        assert_eq!(status.sessions, 1, "progress and session went on");
        agent.stop().await;
    });
}

#[test]
fn a_reload_takes_over_what_changed_and_a_wrong_file_changes_nothing() {
    run(async {
        let content = noise(4 * MIB, 10);
        let setup = Setup::new(&content);
        let disk = setup.protect(vec![0; content.len()], PassMode::Copy);
        let agent = setup.start();
        agent.until_synced(disk).await;
        let config = setup.state_dir.join("agent.toml");
        let good = std::fs::read_to_string(&config).unwrap();
        std::fs::write(&config, format!("scan_intervall = \"1s\"\n{good}")).unwrap();
        agent.reload();
        let refused = agent.until("the refusal", |status| !status.warnings.is_empty()).await;
        assert!(refused.warnings[0].contains("did you mean `scan_interval`"), "{:?}", refused.warnings);
        let rounds = refused.disks[0].scan_rounds;
        agent.until_disk("it goes on", disk, |info| info.scan_rounds > rounds).await;

        // Excluded: nothing is read any more, and the disk says why.
        std::fs::write(&config, good.replace("exclude = [", "exclude = [\"*/disk.img\", ")).unwrap();
        agent.reload();
        let info = agent.until_disk("it is stopped", disk, |info| info.state == "stopped").await;
        assert!(info.problem.unwrap().contains("disks.exclude"));
        // Included again: a new session opens it where it was.
        std::fs::write(&config, good).unwrap();
        agent.reload();
        let info = agent
            .until_disk("rounds again", disk, |info| info.problem.is_none() && info.scan_rounds > rounds + 1)
            .await;
        assert_eq!(info.plain_bytes_sent, content.len() as u64, "nothing was sent again");
        agent.stop().await;
    });
}

#[test]
fn a_disk_that_becomes_smaller_is_stopped_and_the_other_goes_on() {
    run(async {
        let content = noise(4 * MIB, 11);
        let setup = Setup::new(&content);
        let other = setup.site.path("other.img");
        std::fs::write(&other, &content).unwrap();
        write_config(&setup.state_dir, setup.target.address, &[&setup.image, &other], "");
        let disk = setup.protect(vec![0; content.len()], PassMode::Copy);
        let second = setup.target.protect_source(
            setup.agent,
            source_id(&other),
            vec![0; content.len()],
            PassMode::Copy,
        );
        let agent = setup.start();
        agent.until_synced(disk).await;
        agent.until_synced(second).await;
        let image = std::fs::OpenOptions::new().write(true).open(&setup.image).unwrap();
        image.set_len(3 * MIB as u64).unwrap();
        let info = agent.until_disk("it is stopped", disk, |info| info.state == "stopped").await;
        let problem = info.problem.unwrap();
        assert!(problem.contains("4.00 MiB") && problem.contains("3.00 MiB"), "{problem}");
        let rounds = agent.until_disk("a look", second, |_| true).await.scan_rounds;
        agent.until_disk("the other goes on", second, |info| info.scan_rounds > rounds + 1).await;
        // Offered again as it is, the target names both sizes.
        agent.reload();
        agent
            .until_disk("refused by size", disk, |info| {
                info.problem.as_ref().is_some_and(|text| text.contains("sectors"))
            })
            .await;
        image.set_len(4 * MIB as u64).unwrap();
        agent.reload();
        let rounds = info.scan_rounds;
        agent
            .until_disk("it fits again", disk, |info| info.scan_rounds > rounds && info.problem.is_none())
            .await;
        agent.stop().await;
    });
}

#[test]
fn changes_that_arrive_damaged_every_time_are_given_up_and_a_compare_carries_them() {
    run(async {
        let content = noise(6 * MIB, 31);
        let setup = Setup::new(&content);
        let disk = setup.protect(vec![0; content.len()], PassMode::Copy);
        let agent = setup.start();
        agent.until_synced(disk).await;
        setup.target.damage(DAMAGED_BATCHES_MAX);
        write_at(&setup.image, 2 * MIB, &noise(70_000 / 512 * 512, 32));
        agent.until_disk("given up", disk, |_| setup.target.still_damages() == 0).await;
        agent.until_disk("compared", disk, |info| info.state == "synced" && setup.equal(disk)).await;
        // It follows again, on the stream that was opened anew, and has nothing left to complain of.
        let rounds = agent.until_synced(disk).await.scan_rounds;
        write_at(&setup.image, 4 * MIB, &noise(4096, 33));
        let followed = |info: &DiskInfo| info.scan_rounds > rounds && setup.equal(disk);
        let info = agent.until_disk("followed", disk, followed).await;
        assert_eq!(info.problem, None);
        agent.stop().await;
    });
}

#[test]
fn a_disk_that_is_not_protected_any_more_is_let_go_and_its_source_may_be_protected_again() {
    run(async {
        let content = noise(2 * MIB, 34);
        let mut setup = Setup::new(&content);
        let first = setup.protect(vec![0; content.len()], PassMode::Copy);
        let agent = setup.start();
        agent.until_synced(first).await;
        setup.target.unprotect(first);
        agent.until("the disk is let go", |status| status.connected && status.disks.is_empty()).await;
        let second = setup.protect(vec![0; content.len()], PassMode::Copy);
        setup.target.restart().await;
        agent.until_synced(second).await;
        assert!(setup.equal(second));

        // The agent was not there when it was said: the new offer of the source says it too.
        setup.target.kill().await;
        setup.target.unprotect(second);
        let third = setup.protect(vec![0; content.len()], PassMode::Copy);
        setup.target.restart().await;
        agent.until_synced(third).await;
        assert_eq!(agent.until("one disk", |status| !status.disks.is_empty()).await.disks.len(), 1);
        agent.stop().await;
    });
}

#[test]
fn a_revoked_agent_says_so_and_does_not_hammer() {
    run(async {
        let content = noise(MIB, 12);
        let setup = Setup::new(&content);
        let disk = setup.protect(vec![0; content.len()], PassMode::Copy);
        let agent = setup.start();
        agent.until_synced(disk).await;
        setup.target.trust().revocations().revoke(Revocation::Peer(setup.agent)).unwrap();
        let status = agent.until("the refusal", |status| !status.connected && status.problem.is_some()).await;
        let problem = status.problem.unwrap();
        assert!(problem.contains("revoked") && problem.contains("enrol"), "{problem}");
        agent.until_disk("the disk waits", disk, |info| info.state == "disconnected").await;
        agent.stop().await;
    });
}

#[test]
fn an_agent_of_another_site_is_told_what_is_wrong() {
    run(async {
        let (here, there) = (Site::new(), Site::new());
        let target = FakeTarget::start(&there);
        let (state_dir, _) = here.state_dir("agent");
        let image = here.path("disk.img");
        std::fs::write(&image, noise(MIB, 13)).unwrap();
        write_config(&state_dir, target.address, &[&image], "");
        let agent = AgentDaemon::start(&state_dir);
        let status = agent.until("the refusal", |status| status.problem.is_some()).await;
        let problem = status.problem.unwrap();
        assert!(problem.contains("not believed") && problem.contains("site"), "{problem}");
        assert_eq!(status.sessions, 0);
        agent.stop().await;
    });
}

#[test]
fn of_two_agents_with_one_identity_the_older_is_fenced_and_stays_quiet() {
    run(async {
        let content = noise(2 * MIB, 14);
        let setup = Setup::new(&content);
        let disk = setup.protect(vec![0; content.len()], PassMode::Copy);
        let first = setup.start();
        first.until_synced(disk).await;
        let clone = setup.site.path("clone");
        std::fs::create_dir(&clone).unwrap();
        for entry in std::fs::read_dir(&setup.state_dir).unwrap() {
            let entry = entry.unwrap();
            if entry.path().extension().is_some_and(|ext| ext == "pem" || ext == "toml") {
                std::fs::copy(entry.path(), clone.join(entry.file_name())).unwrap();
            }
        }
        let second = AgentDaemon::start(&clone);
        second.until_synced(disk).await;
        let fenced = first.until_disk("fenced", disk, |info| info.state == "stopped").await;
        let problem = fenced.problem.unwrap();
        assert!(problem.contains("fenced") && problem.contains("identity"), "{problem}");
        let rounds = second.until_disk("a look", disk, |_| true).await.scan_rounds;
        second.until_disk("it keeps the disk", disk, |info| info.scan_rounds > rounds + 5).await;
        assert_eq!(second.until("a look", |_| true).await.sessions, 1);
        assert_eq!(first.until("a look", |_| true).await.sessions, 1);
        first.until_disk("still quiet", disk, |info| info.state == "stopped").await;
        // The other one is stopped: a reload takes the disk back.
        second.stop().await;
        first.reload();
        first
            .until_disk("back", disk, |info| info.problem.is_none() && info.scan_rounds > fenced.scan_rounds)
            .await;
        first.stop().await;
    });
}

/// A loop device; detached on drop.
struct Loop(PathBuf);

impl Loop {
    fn attach(image: &Path, more: &[&str]) -> Option<Self> {
        let output =
            Command::new("losetup").args(["--find", "--show"]).args(more).arg(image).output().ok()?;
        let text = String::from_utf8(output.stdout).unwrap();
        output.status.success().then(|| Self(PathBuf::from(text.trim())))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.0).output();
    }
}

/// A 24 MiB disk with a GPT and data.
fn partitioned(image: &Path) -> bool {
    std::fs::write(image, noise(24 * MIB, 15)).unwrap();
    std::fs::OpenOptions::new().write(true).open(image).unwrap().write_all_at(&[0; MIB], 0).unwrap();
    let script = "label: gpt\nlabel-id: 0F1E2D3C-4B5A-6978-8796-A5B4C3D2E1F0\nstart=2048, size=16384\n";
    let mut child =
        match Command::new("sfdisk").arg("-q").arg(image).stdin(std::process::Stdio::piped()).spawn() {
            Ok(child) => child,
            Err(_) => return false,
        };
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), script.as_bytes()).unwrap();
    child.wait().unwrap().success()
}

#[test]
fn a_disk_of_which_nothing_can_be_read_is_paused_and_goes_on_when_it_can() {
    let site = Site::new();
    let (backing, image) = (site.path("backing.img"), site.path("other.img"));
    let content = noise(24 * MIB, 16);
    std::fs::write(&backing, &content).unwrap();
    std::fs::write(&image, noise(MIB, 17)).unwrap();
    let Some(device) = Loop::attach(&backing, &[]) else {
        eprintln!("left out: loop devices need root");
        return;
    };
    run(async {
        let target = FakeTarget::start(&site);
        let (state_dir, agent_id) = site.state_dir("agent");
        write_config(&state_dir, target.address, &[&device.0, &image], "");
        let zeros = || vec![0; 24 * MIB];
        let disk = target.protect_source(agent_id, source_id(&device.0), zeros(), PassMode::Copy);
        let other = target.protect_source(agent_id, source_id(&image), vec![0; MIB], PassMode::Copy);
        let agent = AgentDaemon::start(&state_dir);
        agent.until_synced(disk).await;
        agent.until_synced(other).await;
        // Behind the loop device its file is empty: reading anywhere is an input/output error.
        let file = std::fs::OpenOptions::new().write(true).open(&backing).unwrap();
        file.set_len(0).unwrap();
        let info = agent.until_disk("it is paused", disk, |info| info.state == "paused").await;
        let problem = info.problem.unwrap();
        assert!(problem.contains("cannot read") && problem.contains("tried again"), "{problem}");
        let rounds = agent.until_disk("a look", other, |_| true).await.scan_rounds;
        agent.until_disk("the other goes on", other, |info| info.scan_rounds > rounds + 1).await;
        file.write_all_at(&content, 0).unwrap();
        file.sync_all().unwrap();
        agent.reload();
        let rounds = info.scan_rounds;
        let info = agent.until_disk("it goes on", disk, |info| info.scan_rounds > rounds + 1).await;
        assert_eq!(info.problem, None);
        assert!(target.with_bytes(disk, |bytes| bytes == content));
        assert_eq!(agent.until("a look", |_| true).await.sessions, 1);
        agent.stop().await;
    });
}

#[test]
fn a_loop_device_with_partitions_is_protected_whole_and_known_by_its_table() {
    let site = Site::new();
    let image = site.path("disk.img");
    if !partitioned(&image) {
        eprintln!("left out: no sfdisk");
        return;
    }
    let Some(device) = Loop::attach(&image, &["--partscan"]) else {
        eprintln!("left out: loop devices need root");
        return;
    };
    run(async {
        let target = FakeTarget::start(&site);
        let (state_dir, agent_id) = site.state_dir("agent");
        write_config(&state_dir, target.address, &[&device.0], "");
        let id = source_id(&device.0);
        let disk = target.protect_source(agent_id, id, vec![0; 24 * MIB], PassMode::Copy);
        let agent = AgentDaemon::start(&state_dir);
        agent.until_synced(disk).await;
        let expected = std::fs::read(&image).unwrap();
        assert!(target.with_bytes(disk, |bytes| bytes == expected));
        let inventory = target.inventories().pop().unwrap();
        let told = inventory.iter().find(|disk| disk.source == id).unwrap();
        assert_eq!(told.gpt_guid[..4], [0x0f, 0x1e, 0x2d, 0x3c]);
        agent.stop().await;
    });
}

fn write_at(image: &Path, offset: usize, bytes: &[u8]) {
    let file = std::fs::OpenOptions::new().write(true).open(image).unwrap();
    file.write_all_at(bytes, offset as u64).unwrap();
}
