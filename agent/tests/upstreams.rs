//! The agent daemon between two scripted targets: which it uses, what stands by, and what happens when one goes.

#![expect(clippy::unwrap_used, reason = "a failed step is a failed test")]

mod common;

use std::path::PathBuf;

use common::target::FakeTarget;
use common::{AgentDaemon, Site, compressible, run, source_id, write_config};
use reprotect_agent::api::{StatusInfo, UpstreamInfo};
use reprotect_engine::format::message::PassMode;
use reprotect_engine::units::DiskId;

const BYTES: usize = 1 << 20;

/// An agent that may use two targets, each of which protects its image.
struct Setup {
    _site: Site,
    targets: [FakeTarget; 2],
    disks: [DiskId; 2],
    state_dir: PathBuf,
    image: PathBuf,
}

impl Setup {
    fn new() -> Self {
        let site = Site::new();
        let targets = [FakeTarget::start(&site), FakeTarget::start(&site)];
        let (state_dir, agent) = site.state_dir("agent");
        let image = site.path("disk.img");
        std::fs::write(&image, compressible(BYTES)).unwrap();
        let source = source_id(&image);
        let disks =
            [0, 1].map(|n: usize| targets[n].protect_source(agent, source, vec![0; BYTES], PassMode::Copy));
        let setup = Self { _site: site, targets, disks, state_dir, image };
        setup.configure(&[0, 1]);
        setup
    }

    fn address(&self, target: usize) -> String {
        self.targets[target].address.to_string()
    }

    /// Writes a configuration with these of the targets.
    fn configure(&self, wanted: &[usize]) {
        write_config(&self.state_dir, self.targets[0].address, &[&self.image], "");
        let path = self.state_dir.join("agent.toml");
        let list: Vec<String> = wanted.iter().map(|target| format!("{:?}", self.address(*target))).collect();
        let text = std::fs::read_to_string(&path).unwrap();
        let rest = text.split_once('\n').unwrap().1;
        std::fs::write(path, format!("upstream = [{}]\n{rest}", list.join(", "))).unwrap();
    }

    fn of<'a>(&self, status: &'a StatusInfo, target: usize) -> &'a UpstreamInfo {
        let address = self.address(target);
        status.upstreams.iter().find(|peer| peer.address == address).unwrap()
    }
}

fn is_lonely(status: &StatusInfo) -> bool {
    status.health.iter().any(|event| event.code == "NO_STANDBY")
}

/// One has the session, the other is ready; answers which is which.
async fn settled(setup: &Setup, agent: &AgentDaemon) -> (usize, usize) {
    let both = |status: &StatusInfo| {
        status.connected
            && status.upstreams.iter().filter(|peer| peer.used).count() == 1
            && status.upstreams.iter().any(|peer| !peer.used && peer.ready && peer.round_trip_us.is_some())
    };
    let status = agent.until("one is used and the other is ready", both).await;
    if setup.of(&status, 0).used { (0, 1) } else { (1, 0) }
}

#[test]
fn when_the_peer_in_use_goes_the_one_that_stood_by_has_the_session_and_who_comes_back_stands_by() {
    run(async {
        let mut setup = Setup::new();
        let agent = AgentDaemon::start(&setup.state_dir);
        let (used, other) = settled(&setup, &agent).await;
        agent.until_synced(setup.disks[used]).await;
        setup.targets[used].kill().await;
        let moved = |status: &StatusInfo| status.connected && setup.of(status, other).used;
        let status = agent.until("the other has the session", moved).await;
        assert_eq!(status.sessions, 2, "it was the first that was tried");
        agent.until_synced(setup.disks[other]).await;
        let expected = std::fs::read(&setup.image).unwrap();
        assert!(setup.targets[other].with_bytes(setup.disks[other], |bytes| bytes == expected));

        let status = agent.until("that nobody stands by is told", is_lonely).await;
        assert!(setup.of(&status, used).problem.is_some() && !setup.of(&status, used).ready);
        setup.targets[used].restart().await;
        let status = agent.until("that is over when it is back", |status| !is_lonely(status)).await;
        assert!(
            status.connected && setup.of(&status, other).used,
            "who is as good does not take the session back"
        );
        assert_eq!((status.sessions, status.moves), (2, 0));
        agent.stop().await;
    });
}

#[test]
fn a_peer_that_is_not_configured_any_more_is_not_missed_and_the_session_goes_on() {
    run(async {
        let setup = Setup::new();
        let agent = AgentDaemon::start(&setup.state_dir);
        let (used, other) = settled(&setup, &agent).await;
        setup.targets[other].kill().await;
        agent.until("that nobody stands by is told", is_lonely).await;
        setup.configure(&[used]);
        agent.reload();
        let alone = |status: &StatusInfo| status.upstreams.len() == 1 && !is_lonely(status);
        let status = agent.until("one is configured, and is enough", alone).await;
        assert!(status.connected && status.sessions == 1, "{status:?}");
        agent.stop().await;
    });
}
