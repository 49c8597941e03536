//! `policy`: by what a machine's agent works.
//!
//! Invariant: says whether the agent knows it already. Called by the dispatcher.

use std::time::Duration;

use reprotect_engine::host::values::DurationText;

use super::Context;
use crate::api::{PolicyAnswer, PolicyRequest};
use crate::cli::PolicyArgs;

/// `policy`: shows it, or changes it.
///
/// # Errors
/// What the daemon refuses.
pub async fn policy(context: &Context, args: &PolicyArgs) -> anyhow::Result<()> {
    let pause = args.points_every.map(|pause| u64::try_from(pause.0.as_millis()).unwrap_or(u64::MAX).max(1));
    let points_every_ms = pause.or(args.agents_own.then_some(0));
    let request = PolicyRequest { machine: args.machine.clone(), points_every_ms };
    let answer: PolicyAnswer = context.daemon().post_json("/v1/policy", &request).await?;
    context.output.result(&answer, || render(&answer, points_every_ms.is_some()))?;
    Ok(())
}

fn render(answer: &PolicyAnswer, changed: bool) -> String {
    let rounds = match answer.points_every_ms {
        0 => "a scan round of each disk as often as the agent's own `scan_interval` says".to_owned(),
        pause => {
            let pause = DurationText(Duration::from_millis(pause));
            format!("{pause} between two scan rounds of each disk")
        }
    };
    let known = match (changed, answer.connected) {
        (true, true) => "; its agent was told",
        (true, false) => "; its agent is away and is told when it connects",
        (false, _) => "",
    };
    format!("{}: {rounds} (revision {}){known}", answer.machine, answer.revision)
}
