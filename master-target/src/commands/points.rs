//! `points`, `mount`, `unmount`, `rollback`: what a disk was, and the way back to it.
//!
//! Invariants: going back asks; a point that promises nothing is shown as such. Called by the dispatcher.

use std::time::{Duration, UNIX_EPOCH};

use reprotect_engine::host::output::{Align, Table, bytes};

use super::{Context, ask};
use crate::api::{
    MountInfo, MountRequest, PointInfo, PointsAnswer, PointsRequest, RollbackAnswer, RollbackRequest,
    UnmountRequest,
};
use crate::cli::{MountArgs, PointsArgs, RollbackArgs, UnmountArgs};

/// `points`: lists them, newest first.
///
/// # Errors
/// What the daemon refuses.
pub async fn points(context: &Context, args: &PointsArgs) -> anyhow::Result<()> {
    let request = PointsRequest { disk: args.disk.clone() };
    let answer: PointsAnswer = context.daemon().post_json("/v1/points", &request).await?;
    context.output.result(&answer, || render(&answer))?;
    Ok(())
}

fn render(answer: &PointsAnswer) -> String {
    let mut table = Table::new(&[
        ("POINT", Align::Left),
        ("TIME", Align::Left),
        ("CLASS", Align::Left),
        ("NAME", Align::Left),
    ]);
    for point in &answer.points {
        table.row([point.point.clone(), time(point), class(point), point.name.clone()]);
    }
    let mut text = if table.is_empty() { "no point yet\n".to_owned() } else { table.render() };
    for mount in &answer.mounts {
        text.push_str(&format!(
            "mounted {}: point {} of {} at {}\n",
            mount.id, mount.point, mount.disk, mount.uri
        ));
    }
    text.trim_end().to_owned()
}

fn class(point: &PointInfo) -> String {
    let pinned = if point.pinned { ", pinned" } else { "" };
    let degraded = if point.degraded { ", degraded" } else { "" };
    format!("{}{pinned}{degraded}", point.class)
}

fn time(point: &PointInfo) -> String {
    let at = UNIX_EPOCH + Duration::from_millis(point.source_time_ms);
    humantime::format_rfc3339_seconds(at).to_string()
}

/// `mount`: prints where NBD clients find the point.
///
/// # Errors
/// What the daemon refuses.
pub async fn mount(context: &Context, args: &MountArgs) -> anyhow::Result<()> {
    let request =
        MountRequest { disk: args.disk.clone(), point: args.point.clone(), writable: args.writable };
    let answer: MountInfo = context.daemon().post_json("/v1/mount", &request).await?;
    context.output.note(&format!("point {} of {} is mounted as {}", answer.point, answer.disk, answer.id));
    // The address alone on standard output, so that it can be handed on by `$(…)`.
    context.output.result(&answer, || answer.uri.clone())?;
    Ok(())
}

/// `unmount`: ends a mount.
///
/// # Errors
/// What the daemon refuses.
pub async fn unmount(context: &Context, args: &UnmountArgs) -> anyhow::Result<()> {
    let request = UnmountRequest { id: args.id.clone() };
    let answer: MountInfo = context.daemon().post_json("/v1/unmount", &request).await?;
    context.output.result(&answer, || format!("{} is no longer mounted", answer.id))?;
    Ok(())
}

/// `rollback`: takes a target back to a point.
///
/// # Errors
/// What the daemon refuses, or that nobody agreed.
pub async fn rollback(context: &Context, args: &RollbackArgs) -> anyhow::Result<()> {
    let question = format!(
        "The target of {} will be as it was at {}; what it holds now stays a point. Roll back?",
        args.disk, args.point
    );
    ask::confirm(args.yes, &question)?;
    let request = RollbackRequest { disk: args.disk.clone(), point: args.point.clone() };
    let answer: RollbackAnswer = context.daemon().post_json("/v1/rollback", &request).await?;
    context.output.result(&answer, || {
        format!(
            "{} is as it was at {}: {} compared, {} written",
            answer.disk,
            answer.point,
            bytes(answer.compared_bytes),
            bytes(answer.written_bytes)
        )
    })?;
    Ok(())
}
