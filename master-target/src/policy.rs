//! The policy of a machine at the master target: set by an operator, kept in the catalogue, told to the agent.
//!
//! Invariants: every change has a higher revision and is durable before anybody is told; an agent that is away is told
//! when it connects. Units: milliseconds. Called by `admin`.

use std::time::Duration;

use anyhow::Context as _;
use axum::Json;
use axum::extract::State;
use reprotect_engine::host::admin::Refusal;
use reprotect_engine::host::values::DurationText;

use crate::admin::{Shared, blocking};
use crate::api::{PolicyAnswer, PolicyRequest};
use crate::catalogue::peer;
use crate::registry::Registry;

/// What a pause between two scan rounds may be, in milliseconds: as in the agent's configuration.
const POINTS_EVERY_MS: std::ops::RangeInclusive<u64> = 100..=7 * 86_400_000;

/// `POST /v1/policy`.
///
/// # Errors
/// What [`change`] refuses.
pub(crate) async fn serve(
    State(state): Shared,
    Json(request): Json<PolicyRequest>,
) -> Result<Json<PolicyAnswer>, Refusal> {
    blocking(move || change(&state.registry, &request)).await
}

/// Shows a machine's policy, or changes it. Blocks.
///
/// # Errors
/// When there is no such machine, the value is out of range, or the change cannot be recorded.
pub fn change(registry: &Registry, request: &PolicyRequest) -> anyhow::Result<PolicyAnswer> {
    let _alone = registry.changing();
    let machine = registry.machine(&request.machine)?;
    let agent = peer(&machine.agent).context("the machine's record names no agent; let it connect again")?;
    let (revision, points_every_ms) = match request.points_every_ms {
        None => registry.policy(agent).map_or((0, 0), |policy| (policy.revision, policy.points_every_ms)),
        Some(pause) => {
            anyhow::ensure!(
                pause == 0 || POINTS_EVERY_MS.contains(&pause),
                "points every {} cannot be had; write --points-every from 100ms to 7d",
                DurationText(Duration::from_millis(pause))
            );
            let policy = registry.set_policy(agent, pause)?;
            tracing::info!(%agent, revision = policy.revision, points_every_ms = pause, "policy changed");
            (policy.revision, pause)
        }
    };
    let connected = registry.sessions().iter().any(|(_, session)| session.agent == Some(agent));
    Ok(PolicyAnswer {
        machine: machine.host_name,
        agent: machine.agent,
        revision,
        points_every_ms,
        connected,
    })
}
