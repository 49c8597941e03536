//! Preflight: whether this machine is ready to relay, before anything moves.
//!
//! Invariants: every check ends as PASS, WARN or FAIL with a reason, and with a remedy unless it passed; a check
//! changes nothing on this machine or on a target; names are stable, because `run --force` takes them.
//! Called by the `check` command (all checks) and by `run` (all but reachability: a target may come up later).

use std::io;
use std::sync::Arc;
use std::time::Duration;

use reprotect_engine::host::admin_client::AdminClient;
use reprotect_engine::host::output;
use reprotect_engine::host::places::Program;
use reprotect_engine::host::preflight::Finding;
use reprotect_engine::net::endpoint::both_free;
use reprotect_engine::net::identity::Identity;
use reprotect_engine::net::tunnel::{UDP_REMEDY, Way};
use reprotect_engine::net::wall_clock;
use reprotect_engine::units::PeerId;

use crate::budget::{BUDGET_BYTES_MIN, WINDOW_BYTES_MIN};
use crate::config::Settings;
use crate::enrolment::{self, Own};
use crate::status::Status;
use crate::upstream::Upstream;

/// Open files a process server wants: each session needs none of its own (QUIC shares two sockets), the rest is for
/// logs, the admin socket and name look-ups.
const OPEN_FILES_WANTED: u64 = 1024;
/// Below this the daemon cannot work at all.
const OPEN_FILES_MIN: u64 = 64;
const DAY_NANOS: u64 = 86_400_000_000_000;

/// Every name.
pub const NAMES: [&str; 6] = ["enrolled", "certificate", "listen", "memory", "open-files", "targets"];

/// What needs no network: all that `run` insists on.
#[must_use]
pub fn local(settings: &Settings) -> Vec<Finding> {
    let mut findings = vec![memory(settings.memory_bytes, total_memory_bytes()), open_files()];
    match Own::load(&settings.credentials) {
        Ok(own) => {
            let identity = own.identity();
            let subject = identity.own().uri();
            findings.insert(0, Finding::pass("enrolled", subject));
            findings.insert(1, certificate(&identity));
        }
        Err(error) => {
            findings.insert(0, Finding::failed("enrolled", &error));
        }
    }
    findings
}

/// Every check.
pub async fn all(settings: &Settings) -> Vec<Finding> {
    let mut findings = local(settings);
    findings.push(listen(settings).await);
    findings.extend(targets(settings).await);
    findings
}

fn certificate(identity: &Identity) -> Finding {
    let (own, now) = (identity.own(), wall_clock());
    let days = own.not_after.0.saturating_sub(now.0) / DAY_NANOS;
    if own.not_before > now {
        return Finding::fail("certificate", "it is not valid yet", "correct this machine's clock");
    }
    if own.not_after <= now {
        let remedy = "delete identity.pem in the state directory and enrol again";
        return Finding::fail("certificate", "it has expired", remedy);
    }
    if identity.is_due_for_renewal(now) {
        let remedy = "start the daemon, which renews it at the master target, and see its log";
        return Finding::warn("certificate", format!("it expires in {days} days"), remedy);
    }
    Finding::pass("certificate", format!("valid for {days} days"))
}

fn memory(budget: u64, total: Option<u64>) -> Finding {
    let disks = (budget / 4 * 3 / BUDGET_BYTES_MIN).max(1);
    let text =
        format!("{} for payload: at least {disks} machines of one disk at once", output::bytes(budget));
    match total {
        Some(total) if budget > total / 4 * 3 => Finding::fail(
            "memory",
            format!("`memory` is {} and the machine has {}", output::bytes(budget), output::bytes(total)),
            "lower `memory` to at most three quarters of the machine's",
        ),
        Some(total) if budget > total / 2 => Finding::warn(
            "memory",
            format!("`memory` is more than half of the machine's {}", output::bytes(total)),
            "lower `memory`, or give the machine more",
        ),
        _ if disks < 4 => Finding::warn(
            "memory",
            text,
            format!(
                "raise `memory` by {} per disk that is replicated at once",
                output::bytes(WINDOW_BYTES_MIN)
            ),
        ),
        _ => Finding::pass("memory", text),
    }
}

fn total_memory_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

fn open_files() -> Finding {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    let remedy = "set LimitNOFILE=65536 in the service, or `ulimit -n 65536`";
    match limit {
        Some(limit) if limit < OPEN_FILES_MIN => {
            Finding::fail("open-files", format!("only {limit} open files are allowed"), remedy)
        }
        Some(limit) if limit < OPEN_FILES_WANTED => {
            Finding::warn("open-files", format!("{limit} open files are allowed"), remedy)
        }
        Some(limit) => Finding::pass("open-files", format!("{limit} open files are allowed")),
        None => Finding::pass("open-files", "unlimited"),
    }
}

/// The port is free, or our own daemon has it.
async fn listen(settings: &Settings) -> Finding {
    let address = settings.listen;
    match both_free(address) {
        Ok(()) => Finding::pass("listen", format!("{address} is free, UDP and TCP")),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            let client = AdminClient::new(Program::ProcessServer, &settings.places.socket)
                .with_wait(Duration::from_secs(5));
            match client.get_json::<Status>("/v1/status").await {
                Ok(status) if status.listen == address.to_string() => {
                    Finding::pass("listen", format!("{address} is held by the running process server"))
                }
                _ => Finding::fail(
                    "listen",
                    format!("{address} is used by another program, over UDP or TCP"),
                    format!("stop it (`ss -tulpn sport = :{}` names it), or change `listen`", address.port()),
                ),
            }
        }
        Err(error) => Finding::fail(
            "listen",
            format!("{address}: {error}"),
            "write an address of this machine as `listen`, or \"[::]\"",
        ),
    }
}

/// Each target is connected with once, certificates and all.
async fn targets(settings: &Settings) -> Vec<Finding> {
    let dir = &settings.places.state_dir;
    let ready = (|| {
        let own = Arc::new(Own::load(&settings.credentials)?);
        let targets = enrolment::targets(&settings.targets, dir)?;
        Ok::<_, enrolment::EnrolmentError>((own, enrolment::trust(&settings.credentials)?, targets))
    })();
    let (own, trust, targets) = match ready {
        Ok(ready) => ready,
        Err(error) => {
            return vec![Finding::failed("targets", &error)];
        }
    };
    let upstream = match Upstream::new(targets, own, trust) {
        Ok(upstream) => upstream,
        Err(error) => {
            return vec![Finding::fail(
                "targets",
                error.to_string(),
                "look at this machine's network configuration",
            )];
        }
    };
    let mut findings = Vec::new();
    for target in upstream.targets() {
        findings.push(match upstream.dial_one(target, PeerId::NONE).await {
            Ok(peer) => {
                let (name, rtt) = (peer.peer.peer, peer.connection.rtt());
                let text = format!("{target} is {name}, round trip {} ms", rtt.as_millis());
                match peer.way() {
                    Way::Udp => Finding::pass("targets", text),
                    Way::Tcp => Finding::warn(
                        "targets",
                        format!("{text}, over TCP: nothing came over UDP"),
                        UDP_REMEDY,
                    ),
                }
            }
            Err(reason) => Finding::fail(
                "targets",
                format!("{target}: {reason}"),
                "check that the master target runs and that its port is open from here to it (UDP, or at least TCP), or correct `targets`",
            ),
        });
    }
    upstream.close().await;
    findings
}

#[cfg(test)]
mod tests {
    use reprotect_engine::host::preflight::Verdict;

    use super::*;

    #[test]
    fn the_budget_is_judged_against_the_machine() {
        let verdict = |budget: u64, total: u64| memory(budget << 20, Some(total << 20)).verdict;
        assert_eq!(verdict(256, 8192), Verdict::Pass);
        assert_eq!(verdict(600, 1024), Verdict::Warn);
        assert_eq!(verdict(900, 1024), Verdict::Fail);
        assert_eq!(memory(WINDOW_BYTES_MIN, None).verdict, Verdict::Warn);
    }
}
