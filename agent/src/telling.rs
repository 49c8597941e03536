//! What the machine tells of itself: the status that `status` and `metrics` show, and what is not as it should be.
//!
//! Invariant: made anew each time from the state itself. Units stand in `api`. Part of `machine`.

use std::sync::atomic::Ordering;
use std::time::Duration;

use reprotect_engine::host::output;
use reprotect_engine::net::wall_clock;
use reprotect_engine::units::{DiskId, SECTOR_BYTES};

use crate::api::{DiskInfo, StatusInfo, UpstreamInfo};
use crate::health::Code;
use crate::machine::Machine;
use crate::protected::Protected;

impl Machine {
    /// Brings the status up to date.
    pub(crate) fn publish(&mut self, compress: bool) {
        let missing = self.missing.iter().filter(|(disk, _)| !self.disks.contains_key(disk));
        let mut disks: Vec<DiskInfo> =
            self.disks.iter().map(|(id, state)| self.disk_info(*id, state)).collect();
        disks.extend(missing.map(|(id, missing)| DiskInfo {
            disk: id.to_string(),
            state: "stopped".to_owned(),
            problem: Some(missing.problem.clone()),
            ..DiskInfo::default()
        }));
        let found = self.look_for_trouble();
        let health = self.health.observe(&found);
        let level = compress.then(|| self.workers.load().level.load(Ordering::Relaxed));
        self.status().send_modify(|status| {
            status.disks = disks;
            status.health = health;
            if status.ladder_steps != self.health.steps_taken {
                status.ladder = self.health.steps();
                status.ladder_steps = self.health.steps_taken;
            }
            status.windows_failed = self.following.windows_failed;
            status.events_skipped = self.following.events_skipped;
            status.app_interval_ms = self.app_pause().map(millis);
            status.level = level;
            status.policy_revision = self.policy.revision();
            status.scan_interval_ms = millis(self.scan_pause());
        });
    }

    /// What is not as it should be.
    fn look_for_trouble(&self) -> Vec<(Code, String, String)> {
        let mut found = Vec::new();
        let (now, threshold) = (wall_clock(), self.plan().settings.rpo_threshold);
        for (id, state) in &self.disks {
            let mut say = |code, cause| found.push((code, state.path.clone(), cause));
            if let Some(age) = state.freshness.age(now).filter(|age| *age > threshold) {
                say(
                    Code::RpoExceeded,
                    format!("the target holds it as it was {} ago", output::duration(age)),
                );
            }
            if let Some(problem) = &state.problem {
                say(Code::DiskProblem, problem.clone());
            }
            if let Some(missing) = state.unread.describe() {
                say(Code::SourceUnreadable, missing);
            }
            if let Some((code, cause)) = self.following.trouble(*id) {
                say(code, cause);
            }
        }
        let missing = self.missing.values().map(|missing| missing.problem.clone());
        found.extend(missing.map(|problem| (Code::DiskProblem, String::new(), problem)));
        let machine =
            |code, problem: &Option<String>| problem.clone().map(|problem| (code, String::new(), problem));
        found.extend(machine(Code::WindowsFail, &self.following.window_problem));
        let skipped = self.following.events_skipped;
        let skipped = (skipped > 0).then(|| format!("{skipped} events since the agent's start"));
        found.extend(machine(Code::EventsSkipped, &skipped));
        found.extend(machine(Code::NoStandby, &no_standby(&self.status().borrow())));
        found.extend(machine(Code::UdpBlocked, &udp_blocked(&self.status().borrow())));
        found.extend(machine(Code::HookFailed, &self.hook_problem));
        found
    }

    fn disk_info(&self, id: DiskId, state: &Protected) -> DiskInfo {
        let sent = self.core.sent_bytes(id);
        let (durable, last) = self.core.position(id).unwrap_or_default();
        let size_bytes = state.size_bytes();
        let settled = self.core.pass_progress(id).map_or(size_bytes, |(settled, _)| settled * SECTOR_BYTES);
        let (held_bytes, held_bytes_peak) = state.budget.held_bytes();
        let missing = self.missing.get(&id).map(|missing| missing.problem.clone());
        DiskInfo {
            disk: id.to_string(),
            source: state.path.clone(),
            size_bytes,
            state: state.state().to_owned(),
            settled_bytes: settled,
            read_bytes: state.read_bytes(),
            plain_bytes_sent: sent.plain,
            wire_bytes_sent: sent.wire,
            durable: durable.0,
            last: last.0,
            capture: self.following.describe(id),
            unaccounted: state.unaccounted,
            lost_at_target: state.lost_at_target,
            scan_rounds: state.scan_rounds,
            durable_as_of_ms: state.freshness.durable_as_of().0 / 1_000_000,
            rpo_ms: state.freshness.age(wall_clock()).map(millis),
            streaming: self.is_streaming(std::iter::once(id)),
            held_bytes,
            held_bytes_peak,
            held_bytes_max: state.budget.limit_bytes(),
            unread_bytes: state.unread.ranges().sector_count() * SECTOR_BYTES,
            unread_ranges: state.unread.ranges().run_count() as u64,
            unread: state.unread.first_ranges(),
            problem: missing.or_else(|| state.problem.clone()).or_else(|| state.unread.describe()),
        }
    }
}

/// Why none of the other upstreams could take over, where there are some.
fn no_standby(status: &StatusInfo) -> Option<String> {
    let others: Vec<_> = status.upstreams.iter().filter(|peer| !peer.used).collect();
    let useless = |peer: &&UpstreamInfo| {
        peer.problem.is_some() || (peer.round_trip_us.is_some() && peer.to_target_us.is_none())
    };
    if others.is_empty() || !status.connected || !others.iter().all(useless) {
        return None;
    }
    let why = |peer: &&UpstreamInfo| {
        let reason = peer.problem.as_deref().unwrap_or("does not reach the master target");
        format!("{}: {reason}", peer.address)
    };
    Some(others.iter().map(why).collect::<Vec<_>>().join("; "))
}

/// With whom the session goes over TCP, where it does.
fn udp_blocked(status: &StatusInfo) -> Option<String> {
    let upstream = status.upstream.as_ref().filter(|_| status.connected && status.over_tcp)?;
    Some(format!("the session is with {upstream}: nothing came over UDP"))
}

fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lonely_upstream_is_told_only_where_others_were_configured_and_looked_at() {
        let peer = |address: &str, used, problem: Option<&str>, to_target_us| UpstreamInfo {
            address: address.to_owned(),
            used,
            problem: problem.map(str::to_owned),
            round_trip_us: Some(900),
            to_target_us,
            ..UpstreamInfo::default()
        };
        let told =
            |upstreams, connected| no_standby(&StatusInfo { upstreams, connected, ..StatusInfo::default() });
        let used = || peer("a", true, None, Some(1200));
        assert_eq!(told(vec![], true), None);
        assert_eq!(told(vec![used()], true), None);
        assert_eq!(told(vec![used(), peer("b", false, None, Some(1))], true), None);
        let new = UpstreamInfo { address: "c".to_owned(), ..UpstreamInfo::default() };
        assert_eq!(told(vec![used(), new], true), None);
        let lost = || vec![used(), peer("b", false, Some("no answer"), None), peer("c", false, None, None)];
        assert_eq!(told(lost(), true).as_deref(), Some("b: no answer; c: does not reach the master target"));
        assert_eq!(told(lost(), false), None, "without a session that is what is told");
    }

    #[test]
    fn a_session_over_tcp_is_told_as_long_as_it_lasts() {
        let told = |connected, over_tcp| {
            let upstream = Some("192.0.2.1:7444 over TCP".to_owned());
            udp_blocked(&StatusInfo { connected, over_tcp, upstream, ..StatusInfo::default() })
        };
        assert!(told(true, true).unwrap().contains("192.0.2.1:7444 over TCP"));
        assert_eq!((told(true, false), told(false, true)), (None, None));
    }
}
