//! Preflight: whether this machine is ready to be protected, before anything moves.
//!
//! Invariants: every check ends as PASS, WARN or FAIL with a reason, and with a remedy unless it passed; a check
//! changes nothing on this machine or on a peer; names are stable, because `run --force` takes them; only what would
//! make `run` fail or protect nothing is a FAIL there, a peer may come up later.
//! Called by the `check` command ([`all`]) and by `run` ([`before_run`]).

mod boot;
mod local;
mod upstream;

use reprotect_engine::host::output::{Align, Output, Table};
use serde::Serialize;

use crate::config::Settings;
use crate::disks::SystemRoot;

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Verdict {
    /// Ready.
    Pass,
    /// Works, with a cost or a risk.
    Warn,
    /// Will not work.
    Fail,
}

/// One finding.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The check, as `run --force` takes it.
    pub name: &'static str,
    /// How it ended.
    pub verdict: Verdict,
    /// Why.
    pub reason: String,
    /// What to do; empty where it passed.
    pub remedy: String,
}

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

fn pass(name: &'static str, reason: impl Into<String>) -> Finding {
    finding(name, Verdict::Pass, reason, "")
}

fn warn(name: &'static str, reason: impl Into<String>, remedy: impl Into<String>) -> Finding {
    finding(name, Verdict::Warn, reason, remedy)
}

fn fail(name: &'static str, reason: impl Into<String>, remedy: impl Into<String>) -> Finding {
    finding(name, Verdict::Fail, reason, remedy)
}

fn finding(
    name: &'static str,
    verdict: Verdict,
    reason: impl Into<String>,
    remedy: impl Into<String>,
) -> Finding {
    debug_assert!(NAMES.contains(&name));
    Finding { name, verdict, reason: reason.into(), remedy: remedy.into() }
}

/// Our own errors say what is wrong, then what to do: "reason; remedy".
fn split(text: &str) -> (String, String) {
    let (reason, remedy) = text.split_once("; ").unwrap_or((text, "see the reason"));
    (reason.to_owned(), remedy.to_owned())
}

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
    findings
}

/// Prints the findings; fails when one of them is a FAIL.
///
/// # Errors
/// When a check failed, or standard output takes no more.
pub fn report(findings: &[Finding], output: Output) -> anyhow::Result<()> {
    let count = |verdict| findings.iter().filter(|finding| finding.verdict == verdict).count();
    let failed = count(Verdict::Fail);
    let value = serde_json::json!({ "ready": failed == 0, "findings": findings });
    output.result(&value, || render(findings))?;
    anyhow::ensure!(
        failed == 0,
        "{failed} of {} checks failed; do what the REMEDY column says",
        findings.len()
    );
    Ok(())
}

/// Refuses to start on a FAIL whose name is not in `force`.
///
/// # Errors
/// The findings that stand in the way, in the words of `check`.
pub fn insist(findings: &[Finding], force: &[String]) -> anyhow::Result<()> {
    if let Some(unknown) = force.iter().find(|name| !NAMES.contains(&name.as_str())) {
        anyhow::bail!("--force {unknown}: there is no such check; the names are {}", NAMES.join(", "));
    }
    let mut refusals = Vec::new();
    for finding in findings.iter().filter(|finding| finding.verdict == Verdict::Fail) {
        let text = format!("{}: {}; {}", finding.name, finding.reason, finding.remedy);
        if force.iter().any(|name| name == finding.name) {
            tracing::warn!("forced although a check fails: {text}");
        } else {
            refusals.push(text);
        }
    }
    if refusals.is_empty() {
        return Ok(());
    }
    anyhow::bail!(
        "not ready:\n  {}\n`reprotect-agent check` shows everything; `run --force NAME` starts all the same",
        refusals.join("\n  ")
    )
}

fn render(findings: &[Finding]) -> String {
    let mut table = Table::new(&[
        ("CHECK", Align::Left),
        ("RESULT", Align::Left),
        ("REASON", Align::Left),
        ("REMEDY", Align::Left),
    ]);
    for finding in findings {
        let verdict = match finding.verdict {
            Verdict::Pass => "PASS",
            Verdict::Warn => "WARN",
            Verdict::Fail => "FAIL",
        };
        table.row([
            finding.name.to_owned(),
            verdict.to_owned(),
            finding.reason.clone(),
            finding.remedy.clone(),
        ]);
    }
    table.render()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn run_is_refused_in_the_words_of_check_unless_the_name_is_forced() {
        let findings =
            [pass("clock", "fine"), fail("disks", "no disk", "include one"), warn("memory", "a", "b")];
        let refusal = insist(&findings, &[]).unwrap_err().to_string();
        assert!(refusal.contains("disks: no disk; include one") && refusal.contains("--force"), "{refusal}");
        assert!(!refusal.contains("memory"), "{refusal}");
        assert!(insist(&findings, &["disks".to_owned()]).is_ok());
        let unknown = insist(&findings, &["dsiks".to_owned()]).unwrap_err().to_string();
        assert!(unknown.contains("no such check") && unknown.contains("disks"), "{unknown}");
    }

    #[test]
    fn a_missing_disk_does_not_stop_the_daemon_from_protecting_another() {
        let missing = fail("disks", "sdb is gone", "attach it");
        let alone = soften(vec![missing.clone(), pass("clock", "fine")]);
        assert!(insist(&alone, &[]).is_err());
        let beside = soften(vec![missing, pass("disks", "sda")]);
        assert_eq!(beside[0].verdict, Verdict::Warn);
        assert!(insist(&beside, &[]).is_ok());
        let other = soften(vec![pass("disks", "sda"), fail("enrolled", "no", "enrol")]);
        assert!(insist(&other, &[]).is_err());
    }

    #[test]
    fn reason_and_remedy_stand_side_by_side() {
        assert_eq!(split("it is gone; attach it; reload"), ("it is gone".into(), "attach it; reload".into()));
        let text = render(&[fail("disks", "no disk", "include one")]);
        assert!(text.contains("FAIL") && text.contains("include one"), "{text}");
    }
}
