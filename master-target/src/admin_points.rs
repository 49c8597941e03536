//! The admin interface's part for recovery points and retention.
//!
//! Invariants: as for `admin`. Called by `admin`, which hands the routes on.

use std::sync::Arc;

use axum::extract::State;
use axum::routing::{get, post};
use axum::{Json, Router};
use reprotect_engine::host::admin::Refusal;
use reprotect_engine::units::DiskId;

use crate::admin::{AdminState, Shared, blocking, refused};
use crate::api::{
    MountAnswer, MountInfo, MountRequest, PinAnswer, PinRequest, PointPart, PointsAnswer, PointsRequest,
    ReceiptsAnswer, ReceiptsRequest, RetentionAnswer, RetentionRequest, RollbackAnswers, RollbackRequest,
    TimelineAnswer, UnmountRequest,
};
use crate::{points, retention_policy};

/// The routes.
pub(crate) fn routes() -> Router<Arc<AdminState>> {
    Router::new()
        .route("/v1/points", post(list_points))
        .route("/v1/timeline", post(timeline))
        .route("/v1/receipts", post(receipts))
        .route("/v1/pin", post(pin))
        .route("/v1/mount", post(mount))
        .route("/v1/unmount", post(unmount))
        .route("/v1/rollback", post(rollback))
        .route("/v1/retention", get(show_retention).post(change_retention))
}

/// The disks of a name.
pub(crate) fn disks(state: &AdminState, name: &str) -> anyhow::Result<Vec<DiskId>> {
    let records = state.registry.protected_disks(name)?;
    records.iter().map(|record| Ok(DiskId::parse(&record.disk)?)).collect()
}

async fn list_points(
    State(state): Shared,
    Json(request): Json<PointsRequest>,
) -> Result<Json<PointsAnswer>, Refusal> {
    blocking(move || {
        let disks = disks(&state, &request.disk)?;
        let points = points::list(&state.registry, &disks, request.all)?;
        let names: Vec<String> = disks.iter().map(ToString::to_string).collect();
        Ok(PointsAnswer { disk: names.join(","), points, mounts: state.mounts.0.list() })
    })
    .await
}

async fn receipts(
    State(state): Shared,
    Json(request): Json<ReceiptsRequest>,
) -> Result<Json<ReceiptsAnswer>, Refusal> {
    blocking(move || {
        let all = request.disk.is_empty();
        let disks = if all { Vec::new() } else { disks(&state, &request.disk)? };
        Ok(ReceiptsAnswer { receipts: state.registry.receipts().all(&disks) })
    })
    .await
}

async fn timeline(
    State(state): Shared,
    Json(request): Json<PointsRequest>,
) -> Result<Json<TimelineAnswer>, Refusal> {
    blocking(move || {
        let records = state.registry.protected_disks(&request.disk)?;
        Ok(TimelineAnswer { disks: points::timeline(&state.registry, &records)? })
    })
    .await
}

async fn pin(State(state): Shared, Json(request): Json<PinRequest>) -> Result<Json<PinAnswer>, Refusal> {
    blocking(move || {
        let disks = disks(&state, &request.disk)?;
        let name = request.name.as_deref();
        let changed = points::change(&state.registry, &disks, &request.point, request.pinned, name)?;
        let part = |(disk, at): &(DiskId, _)| PointPart { disk: disk.to_string(), point: format!("{at}") };
        Ok(PinAnswer { parts: changed.places.iter().map(part).collect(), note: changed.note })
    })
    .await
}

async fn mount(
    State(state): Shared,
    Json(request): Json<MountRequest>,
) -> Result<Json<MountAnswer>, Refusal> {
    let points::Chosen { places, note } = {
        let (state, request) = (Arc::clone(&state), request.clone());
        let find = move || {
            points::choose(
                &state.registry,
                &disks(&state, &request.disk)?,
                &request.point,
                request.accept_damage,
            )
        };
        blocking(find).await?.0
    };
    let (mounts, folder) = &state.mounts;
    let mut mounted: Vec<MountInfo> = Vec::new();
    for place in places {
        match mounts.mount(&state.registry, folder, place, request.writable).await {
            Ok(info) => mounted.push(info),
            Err(error) => {
                // All disks of a machine or none.
                for info in mounted {
                    let _ = mounts.unmount(&info.id).await; // the error that matters is the one below
                }
                return Err(refused(&error));
            }
        }
    }
    Ok(Json(MountAnswer { mounts: mounted, note }))
}

async fn unmount(
    State(state): Shared,
    Json(request): Json<UnmountRequest>,
) -> Result<Json<MountInfo>, Refusal> {
    state.mounts.0.unmount(&request.id).await.map(Json).map_err(|error| refused(&error))
}

async fn rollback(
    State(state): Shared,
    Json(request): Json<RollbackRequest>,
) -> Result<Json<RollbackAnswers>, Refusal> {
    blocking(move || {
        let _busy = state.registry.begin_long(&state.registry.protected_disks(&request.disk)?)?;
        let disks = disks(&state, &request.disk)?;
        points::rollback(&state.registry, &disks, &request.point, request.accept_damage)
    })
    .await
}

async fn show_retention(State(state): Shared) -> Result<Json<RetentionAnswer>, Refusal> {
    blocking(move || retention_policy::show(&state.registry, &state.retention_policy)).await
}

async fn change_retention(
    State(state): Shared,
    Json(request): Json<RetentionRequest>,
) -> Result<Json<RetentionAnswer>, Refusal> {
    blocking(move || {
        let _alone = state.registry.changing();
        retention_policy::change(&state.registry, &state.retention_policy, &request)?;
        retention_policy::show(&state.registry, &state.retention_policy)
    })
    .await
}
