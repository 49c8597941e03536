//! `check`: whether this machine is ready, each thing by name with PASS, WARN or FAIL, the reason and the remedy.
//!
//! Invariants: changes nothing but a file it removes again; exit status 1 exactly when something is FAIL, a wrong
//! configuration included. Called by the dispatcher.

use reprotect_engine::host::config::Overrides;
use reprotect_engine::host::output::{Align, EXIT_FAILED, EXIT_OK, Output, Table};
use serde_json::json;

use crate::checks::{Check, Verdict, everything};
use crate::config::Settings;

/// Runs the command; answers the exit status.
///
/// # Errors
/// When the result cannot be printed.
pub fn check(overrides: &Overrides, output: Output) -> anyhow::Result<u8> {
    let checks = match Settings::load(overrides) {
        Ok(settings) => everything(&settings),
        Err(error) => {
            let text = error.to_string();
            let (reason, remedy) = text.rsplit_once("; ").unwrap_or((&text, "correct it"));
            vec![Check::fail("configuration", reason, remedy)]
        }
    };
    let failed = checks.iter().any(|check| check.verdict == Verdict::Fail);
    output.result(&json!({ "ready": !failed, "checks": checks }), || render(&checks))?;
    Ok(if failed { EXIT_FAILED } else { EXIT_OK })
}

fn render(checks: &[Check]) -> String {
    let mut table =
        Table::new(&[("", Align::Left), ("CHECK", Align::Left), ("REASON AND REMEDY", Align::Left)]);
    for check in checks {
        let text = match check.verdict {
            Verdict::Pass => check.reason.clone(),
            _ => format!("{}; {}", check.reason, check.remedy),
        };
        table.row([check.verdict.to_string(), check.name.clone(), text]);
    }
    table.render()
}
