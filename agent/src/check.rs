//! Preflight: whether this machine is ready to be protected, before anything moves.
//!
//! Invariants: every check ends as PASS, WARN or FAIL with a reason, and with a remedy unless it passed; a check
//! changes nothing on this machine or on a peer; names are stable, because `run --force` takes them; only what would
//! make `run` fail or protect nothing is a FAIL there, a peer may come up later.
//! Called by the `check` command ([`all`]) and by `run` ([`before_run`]).

mod boot;
mod local;
mod upstream;

use reprotect_engine::host::preflight::{Finding, Verdict};

use crate::config::Settings;
use crate::disks::SystemRoot;

/// Every name.
pub const NAMES: [&str; 16] = [
    "configuration",
    "state-dir",
    "enrolled",
    "certificate",
    "clock",
    "upstream",
    "disks",
    "unsupported",
    "capture",
    "io-uring",
    "open-files",
    "memory",
    "boot-drivers",
    "boot-fstab",
    "boot-loader",
    "boot-network",
];

/// What stands in the way of `run`. Blocks.
#[must_use]
pub fn before_run(settings: &Settings) -> Vec<Finding> {
    soften(required(settings))
}

/// One disk that is missing or unreadable must not keep the daemon from protecting the others after a reboot: the
/// daemon names it in its status and looks for it again.
fn soften(mut findings: Vec<Finding>) -> Vec<Finding> {
    let some_disk =
        findings.iter().any(|finding| finding.name == "disks" && finding.verdict == Verdict::Pass);
    for finding in findings.iter_mut().filter(|finding| some_disk && finding.name == "disks") {
        finding.verdict = finding.verdict.min(Verdict::Warn);
    }
    findings
}

/// What must be there for this machine to be protected.
fn required(settings: &Settings) -> Vec<Finding> {
    let mut findings = local::identity(settings);
    findings.extend(local::upstream_named(settings));
    findings.extend(local::disks(settings));
    findings.push(local::open_files());
    findings.push(local::memory(settings));
    known(findings)
}

/// Every name is one that `run --force` knows.
fn known(findings: Vec<Finding>) -> Vec<Finding> {
    debug_assert!(findings.iter().all(|finding| NAMES.contains(&finding.name.as_str())), "{findings:?}");
    findings
}

/// Every check.
pub async fn all(settings: &Settings) -> Vec<Finding> {
    let own = settings.clone();
    let blocking = tokio::task::spawn_blocking(move || {
        let mut findings = vec![local::configuration(&own)];
        findings.extend(required(&own));
        findings.push(local::clock(&own));
        findings.push(local::capture(&own));
        findings.push(local::io_uring());
        findings.extend(boot::findings(&SystemRoot::default(), &boot::Kernel::running()));
        findings
    });
    let mut findings = blocking.await.unwrap_or_default();
    findings.extend(upstream::findings(settings).await);
    findings.sort_by_key(|finding| NAMES.iter().position(|name| *name == finding.name));
    known(findings)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_disk_does_not_stop_the_daemon_from_protecting_another() {
        let missing = Finding::fail("disks", "sdb is gone", "attach it");
        let alone = soften(vec![missing.clone(), Finding::pass("clock", "fine")]);
        assert!(!alone.iter().all(Finding::is_fine));
        let beside = soften(vec![missing, Finding::pass("disks", "sda")]);
        assert_eq!(beside[0].verdict, Verdict::Warn);
        assert!(beside.iter().all(Finding::is_fine));
        let other = soften(vec![Finding::pass("disks", "sda"), Finding::fail("enrolled", "no", "enrol")]);
        assert!(!other.iter().all(Finding::is_fine));
    }
}
