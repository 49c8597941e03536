//! The policy of a machine at the master target: set by an operator, kept in the catalogue, told to the agent.
//!
//! Invariants: every change has a higher revision and is durable before anybody is told; an agent that is away is told
//! when it connects. Units: milliseconds. Called by `admin`.

use std::time::Duration;

use anyhow::Context as _;
use axum::Json;
use axum::extract::State;
use reprotect_engine::format::message::Policy;
use reprotect_engine::host::admin::Refusal;
use reprotect_engine::host::values::DurationText;

use crate::admin::{Shared, blocking};
use crate::api::{PolicyAnswer, PolicyRequest};
use crate::catalogue::peer;
use crate::registry::Registry;

/// What a pause between two scan rounds may be, in milliseconds: as in the agent's configuration.
const POINTS_EVERY_MS: std::ops::RangeInclusive<u64> = 100..=7 * 86_400_000;

/// What a pause between two points that bring applications to rest may be, in milliseconds.
const APP_POINTS_EVERY_MS: std::ops::RangeInclusive<u64> = 60_000..=7 * 86_400_000;

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
    let known = registry.policy(agent);
    let (revision, points, app_points) =
        known.map_or((0, 0, 0), |known| (known.revision, known.points_every_ms, known.app_points_every_ms));
    let points_every_ms = request.points_every_ms.unwrap_or(points);
    let app_points_every_ms = request.app_points_every_ms.unwrap_or(app_points);
    let text = |pause| DurationText(Duration::from_millis(pause));
    anyhow::ensure!(
        points_every_ms == 0 || POINTS_EVERY_MS.contains(&points_every_ms),
        "points every {} cannot be had; write --points-every from 100ms to 7d",
        text(points_every_ms)
    );
    anyhow::ensure!(
        matches!(app_points_every_ms, 0 | Policy::NEVER_MS)
            || APP_POINTS_EVERY_MS.contains(&app_points_every_ms),
        "application-consistent points every {} cannot be had; write --app-every from 1m to 7d, or 0s for never",
        text(app_points_every_ms)
    );
    let changes = request.points_every_ms.is_some() || request.app_points_every_ms.is_some();
    let revision = if changes {
        let policy = registry.set_policy(agent, points_every_ms, app_points_every_ms)?;
        tracing::info!(%agent, revision = policy.revision, points_every_ms, app_points_every_ms, "policy changed");
        policy.revision
    } else {
        revision
    };
    let connected = registry.sessions().iter().any(|(_, session)| session.agent == Some(agent));
    Ok(PolicyAnswer {
        machine: machine.host_name,
        agent: machine.agent,
        revision,
        points_every_ms,
        app_points_every_ms,
        connected,
    })
}
