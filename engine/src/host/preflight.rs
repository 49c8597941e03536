//! What `check` finds and `run` insists on, in the same words in all programs.
//!
//! Invariants: a finding is PASS, WARN or FAIL with a reason, and with a remedy unless it passed; FAIL is what would lose
//! data or keep the daemon from working; names are stable, because `run --force` takes them.
//! Called by each program's checks, `check` and `run`.

use std::fmt;

use serde::Serialize;

use super::output::{Align, Output, Table};
use super::places::Program;

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Verdict {
    /// All is well.
    Pass,
    /// It works, with a cost or a risk.
    Warn,
    /// It does not work, or data would be lost.
    Fail,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pass => "PASS",
            Self::Warn => "WARN",
            Self::Fail => "FAIL",
        })
    }
}

/// One thing that was checked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The check, as `run --force` takes it.
    pub name: String,
    /// How it ended.
    pub verdict: Verdict,
    /// Why.
    pub reason: String,
    /// What to do; empty where it passed.
    pub remedy: String,
}

impl Finding {
    /// A check that ended so.
    pub fn new(verdict: Verdict, name: &str, reason: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name: name.to_owned(), verdict, reason: reason.into(), remedy: remedy.into() }
    }

    /// A check that passed.
    pub fn pass(name: &str, reason: impl Into<String>) -> Self {
        Self::new(Verdict::Pass, name, reason, "")
    }

    /// A check that found something doubtful.
    pub fn warn(name: &str, reason: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::new(Verdict::Warn, name, reason, remedy)
    }

    /// A check that failed.
    pub fn fail(name: &str, reason: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::new(Verdict::Fail, name, reason, remedy)
    }

    /// A check that failed by an error in our own words, which say what is wrong, then what to do.
    pub fn failed(name: &str, error: &dyn fmt::Display) -> Self {
        let (reason, remedy) = reason_and_remedy(&error.to_string());
        Self::fail(name, reason, remedy)
    }

    /// Whether nothing speaks against going on.
    #[must_use]
    pub fn is_fine(&self) -> bool {
        self.verdict != Verdict::Fail
    }
}

/// Our own errors say "what is wrong; what to do", or "what is wrong (why): what to do".
#[must_use]
pub fn reason_and_remedy(text: &str) -> (String, String) {
    if let Some((reason, remedy)) = text.split_once("; ") {
        return (reason.to_owned(), remedy.to_owned());
    }
    match text.split_once("): ") {
        Some((reason, remedy)) => (format!("{reason})"), remedy.to_owned()),
        None => (text.to_owned(), "see the reason".to_owned()),
    }
}

/// Prints the findings of `check`; answers whether none of them is a FAIL.
///
/// # Errors
/// When standard output takes no more.
pub fn report(findings: &[Finding], output: Output) -> std::io::Result<bool> {
    let ready = findings.iter().all(Finding::is_fine);
    let value = serde_json::json!({ "ready": ready, "findings": findings });
    output.result(&value, || render(findings))?;
    Ok(ready)
}

fn render(findings: &[Finding]) -> String {
    let columns = ["CHECK", "RESULT", "REASON", "REMEDY"].map(|title| (title, Align::Left));
    let mut table = Table::new(&columns);
    for Finding { name, verdict, reason, remedy } in findings {
        table.row([name.clone(), verdict.to_string(), reason.clone(), remedy.clone()]);
    }
    table.render()
}

/// Why `run` does not start.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// `--force` names no check: the command line is wrong.
    #[error("--force {name}: there is no such check; the names are {known}")]
    Unknown {
        /// What it names.
        name: String,
        /// What there is.
        known: String,
    },
    /// Checks failed that were not forced.
    #[error(
        "not ready:\n  {failed}\n`{program} check` shows everything; `run --force NAME` starts all the same"
    )]
    NotReady {
        /// A line for each, in the words of `check`.
        failed: String,
        /// Whose they are.
        program: &'static str,
    },
}

impl Refusal {
    /// Whether the command line is wrong.
    #[must_use]
    pub const fn is_usage(&self) -> bool {
        matches!(self, Self::Unknown { .. })
    }
}

/// Refuses to start on a FAIL whose name is not in `force`; logs what is doubtful or forced. `known` are names that can be
/// forced although nothing was found under them.
///
/// # Errors
/// Any [`Refusal`].
pub fn insist(
    program: Program,
    findings: &[Finding],
    known: &[&str],
    force: &[String],
) -> Result<(), Refusal> {
    let mut names: Vec<&str> = known.to_vec();
    names.extend(findings.iter().map(|finding| finding.name.as_str()).filter(|name| !known.contains(name)));
    if let Some(name) = force.iter().find(|name| !names.contains(&name.as_str())) {
        return Err(Refusal::Unknown { name: name.clone(), known: names.join(", ") });
    }
    let mut failed = Vec::new();
    for Finding { name, verdict, reason, remedy } in findings {
        match verdict {
            Verdict::Pass => {}
            Verdict::Fail if !force.contains(name) => failed.push(format!("{name}: {reason}; {remedy}")),
            _ => tracing::warn!(check = name, "{reason}; {remedy}"),
        }
    }
    if failed.is_empty() {
        return Ok(());
    }
    Err(Refusal::NotReady { failed: failed.join("\n  "), program: program.binary() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn run_is_refused_in_the_words_of_check_unless_the_name_is_forced() {
        let findings = [
            Finding::pass("clock", "fine"),
            Finding::fail("disks", "no disk", "include one"),
            Finding::warn("memory", "a", "b"),
        ];
        let insist = |force: &[&str]| {
            let force: Vec<String> = force.iter().map(|name| (*name).to_owned()).collect();
            insist(Program::Agent, &findings, &["boot"], &force)
        };
        let refusal = insist(&[]).unwrap_err();
        assert!(!refusal.is_usage());
        let text = refusal.to_string();
        assert!(text.contains("disks: no disk; include one") && text.contains("--force"), "{text}");
        assert!(text.contains("reprotect-agent check") && !text.contains("memory"), "{text}");
        assert!(insist(&["disks"]).is_ok() && insist(&["disks", "boot"]).is_ok());
        let unknown = insist(&["dsiks"]).unwrap_err();
        assert!(unknown.is_usage() && unknown.to_string().contains("boot, clock, disks"), "{unknown}");
    }

    #[test]
    fn reason_and_remedy_stand_side_by_side() {
        let both = |text| reason_and_remedy(text);
        assert_eq!(both("it is gone; attach it; reload"), ("it is gone".into(), "attach it; reload".into()));
        assert_eq!(both("it is gone (why): attach it"), ("it is gone (why)".into(), "attach it".into()));
        let text = render(&[Finding::failed("disks", &"no disk; include one")]);
        assert!(text.starts_with("CHECK") && text.contains("FAIL") && text.contains("include one"), "{text}");
    }
}
