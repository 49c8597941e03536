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

use super::{retention, wait};
use crate::api::RetentionAnswer;
use crate::checks::everything;
use crate::config::Settings;

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

/// What a running daemon says of the retention drive; nothing where none runs.
fn reach_of_drive(settings: &Settings) -> Option<Finding> {
    settings.retention.as_ref()?;
    let keep = settings.retention.as_ref().map(|(_, chosen)| chosen.ladder.guaranteed)?;
    let daemon = AdminClient::new(Program::MasterTarget, &settings.places.socket).with_wait(DAEMON_WAIT);
    let answer: RetentionAnswer = wait(async { Ok(daemon.get_json("/v1/retention").await?) }).ok()?;
    let (name, reason) = ("retention-reach", retention::reach(&answer));
    let hours = keep.as_secs() / 3600;
    Some(match answer.hours_held {
        Some(held) if held < hours => Finding::warn(
            name,
            format!("{reason}, less than the {hours} h that are guaranteed"),
            "add space to the drive, or shorten the retention",
        ),
        _ => Finding::pass(name, reason),
    })
}
