//! `check`: whether this machine is ready, each thing by name with PASS, WARN or FAIL, the reason and the remedy.
//!
//! Invariants: changes nothing but a file it removes again; exit status 1 exactly when something is FAIL, a wrong
//! configuration included. Called by the dispatcher.

use std::time::Duration;

use reprotect_engine::host::admin_client::AdminClient;
use reprotect_engine::host::config::Overrides;
use reprotect_engine::host::output::{EXIT_FAILED, EXIT_OK, Output};
use reprotect_engine::host::places::Program;
use reprotect_engine::host::preflight::{self, Finding};

use super::{journal, retention, wait};
use crate::api::RetentionAnswer;
use crate::checks::{everything, is_running};
use crate::config::Settings;
use crate::retention_policy::{Reach, RetentionPolicy, reach_at_rest};

/// How long a running daemon is waited for: a check must not hang because the daemon does.
const DAEMON_WAIT: Duration = Duration::from_secs(5);

/// Runs the command; answers the exit status.
///
/// # Errors
/// When the result cannot be printed.
pub fn check(overrides: &Overrides, output: Output) -> anyhow::Result<u8> {
    let checks = match Settings::load(overrides) {
        Ok(settings) => {
            let mut checks = everything(&settings);
            checks.extend(reach_of_drive(&settings));
            checks
        }
        Err(error) => {
            let text = error.to_string();
            let (reason, remedy) = text.rsplit_once("; ").unwrap_or((&text, "correct it"));
            vec![Finding::fail("configuration", reason, remedy)]
        }
    };
    Ok(if preflight::report(&checks, output)? { EXIT_OK } else { EXIT_FAILED })
}

/// How far the retention drive reaches: by what a running daemon says, else by what stands in the folder. Nothing where that
/// cannot be read, which the check of its content says, or where a daemon runs and does not answer.
fn reach_of_drive(settings: &Settings) -> Option<Finding> {
    let (folder, chosen) = settings.retention.as_ref()?;
    let daemon = AdminClient::new(Program::MasterTarget, &settings.places.socket).with_wait(DAEMON_WAIT);
    let name = "retention-reach";
    let asked = wait(async { Ok(daemon.get_json::<RetentionAnswer>("/v1/retention").await?) });
    if let Ok(answer) = asked {
        return Some(finding(name, retention::reach_of(&answer), chosen.ladder.guaranteed, ""));
    }
    if is_running(settings) {
        return None;
    }
    let policy = RetentionPolicy::new(&settings.places.state_dir, Some(chosen.ladder.clone()));
    let ladder = match policy.ladder() {
        Ok(ladder) => ladder?,
        Err(error) => return Some(Finding::fail(name, error.to_string(), "no start is possible before")),
    };
    // No lock is taken: a daemon that starts meanwhile must not be refused because of it.
    let reach = reach_at_rest(journal::reader(true), folder, &ladder).ok()?;
    Some(finding(name, reach, ladder.guaranteed, " (the last in which a master target ran)"))
}

fn finding(name: &str, reach: Reach, guaranteed: Duration, which_hour: &str) -> Finding {
    let hours = guaranteed.as_secs() / 3600;
    match reach.hours_held {
        Some(held) if held < hours => Finding::warn(
            name,
            format!("{}{which_hour}, less than the {hours} h that are guaranteed", retention::reach(reach)),
            "add space to the drive, or shorten the retention",
        ),
        Some(_) => Finding::pass(name, format!("{}{which_hour}", retention::reach(reach))),
        None => Finding::pass(name, retention::reach(reach)),
    }
}

#[cfg(test)]
mod tests {
    use reprotect_engine::host::preflight::Verdict;

    use super::*;

    #[test]
    fn the_reach_of_the_drive_is_said_and_warned_of_where_it_is_less_than_what_is_guaranteed() {
        let of = |hours_held, is_young| {
            let guaranteed = Duration::from_secs(24 * 3600);
            let found = finding("retention-reach", Reach { hours_held, is_young }, guaranteed, " (of then)");
            (found.verdict, found.reason)
        };
        let (verdict, reason) = of(Some(31), false);
        assert_eq!(verdict, Verdict::Pass);
        assert_eq!(reason, "at the last hour's churn this drive holds 31 h of points (of then)");
        let (verdict, reason) = of(Some(23), false);
        assert!(verdict == Verdict::Warn && reason.contains("less than the 24 h"), "{reason}");
        let (verdict, reason) = of(None, true);
        assert!(verdict == Verdict::Pass && reason.contains("no hour of history yet"), "{reason}");
        assert!(of(None, false).1.contains("nothing changed in the last hour"));
    }
}
