//! `policy`: by what a machine's agent works.
//!
//! Invariant: says whether the agent knows it already. Called by the dispatcher.

use std::time::Duration;

use reprotect_engine::format::message::Policy;
use reprotect_engine::host::values::DurationText;

use super::Context;
use crate::api::{PolicyAnswer, PolicyRequest};
use crate::cli::PolicyArgs;

/// `policy`: shows it, or changes it.
///
/// # Errors
/// What the daemon refuses.
pub async fn policy(context: &Context, args: &PolicyArgs) -> anyhow::Result<()> {
    let millis = |pause: DurationText| u64::try_from(pause.0.as_millis()).unwrap_or(u64::MAX);
    let own = args.agents_own.then_some(0);
    let points_every_ms = args.points_every.map(|pause| millis(pause).max(1)).or(own);
    // A pause of nothing is none.
    let app = |pause| if millis(pause) == 0 { Policy::NEVER_MS } else { millis(pause) };
    let app_points_every_ms = args.app_every.map(app).or(own);
    let request = PolicyRequest { machine: args.machine.clone(), points_every_ms, app_points_every_ms };
    let answer: PolicyAnswer = context.daemon().post_json("/v1/policy", &request).await?;
    let changed = points_every_ms.is_some() || app_points_every_ms.is_some();
    context.output.result(&answer, || render(&answer, changed))?;
    Ok(())
}

fn render(answer: &PolicyAnswer, changed: bool) -> String {
    let rounds = match answer.points_every_ms {
        0 => "a round of each disk as often as the agent's own configuration says".to_owned(),
        pause => format!("{} between two rounds of each disk", DurationText(Duration::from_millis(pause))),
    };
    let app = match answer.app_points_every_ms {
        0 => "as its configuration says".to_owned(),
        Policy::NEVER_MS => "never".to_owned(),
        pause => format!("every {}", DurationText(Duration::from_millis(pause))),
    };
    let known = match (changed, answer.connected) {
        (true, true) => "; its agent was told",
        (true, false) => "; its agent is away and is told when it connects",
        (false, _) => "",
    };
    format!(
        "{}: {rounds}, applications brought to rest for a point {app} (revision {}){known}",
        answer.machine, answer.revision
    )
}
