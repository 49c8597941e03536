//! `points`, `pin`, `unpin`, `mount`, `unmount`, `rollback`: what a disk was, and the way back to it.
//!
//! Invariants: going back asks; a point that promises nothing is shown as such. Called by the dispatcher.

use std::time::{Duration, UNIX_EPOCH};

use reprotect_engine::host::output::{Align, Table, bytes};

use super::{Context, ask};
use crate::api::{
    MountAnswer, MountInfo, MountRequest, PinAnswer, PinRequest, PointInfo, PointsAnswer, PointsRequest,
    RollbackAnswer, RollbackAnswers, RollbackRequest, UnmountRequest,
};
use crate::cli::{MountArgs, PinArgs, PointsArgs, RollbackArgs, UnmountArgs, UnpinArgs};

/// `points`: lists them, newest first.
///
/// # Errors
/// What the daemon refuses.
pub async fn points(context: &Context, args: &PointsArgs) -> anyhow::Result<()> {
    let request = PointsRequest { disk: args.disk.clone(), all: args.all };
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
    let nothing = "no consistent point yet (--all lists fuzzy ones, too)\n";
    let mut text = if table.is_empty() { nothing.to_owned() } else { table.render() };
    for point in &answer.points {
        if let Some(damaged) = &point.damaged {
            text.push_str(&format!("{} is damaged: {damaged}\n", point.point));
        }
    }
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
    let damaged = if point.damaged.is_some() { ", damaged" } else { "" };
    let part = if point.complete { "" } else { ", not on all disks" };
    format!("{}{pinned}{degraded}{damaged}{part}", point.class)
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
    let request = MountRequest {
        disk: args.disk.clone(),
        point: args.point.clone(),
        writable: args.writable,
        accept_damage: args.accept_damage,
    };
    let answer: MountAnswer = context.daemon().post_json("/v1/mount", &request).await?;
    context.tell(answer.note.as_deref());
    for mount in &answer.mounts {
        context.output.note(&format!("point {} of {} is mounted as {}", mount.point, mount.disk, mount.id));
    }
    // The addresses alone on standard output, so that they can be handed on by `$(…)`.
    let uris: Vec<&str> = answer.mounts.iter().map(|mount| mount.uri.as_str()).collect();
    context.output.result(&answer, || uris.join("\n"))?;
    Ok(())
}

/// `pin`: keeps a point.
///
/// # Errors
/// What the daemon refuses.
pub async fn pin(context: &Context, args: &PinArgs) -> anyhow::Result<()> {
    let request = PinRequest {
        disk: args.disk.clone(),
        point: args.point.clone(),
        pinned: Some(true),
        name: args.name.clone(),
    };
    change(context, &request, "is kept until `unpin`").await
}

/// `unpin`: lets a point go its way.
///
/// # Errors
/// What the daemon refuses.
pub async fn unpin(context: &Context, args: &UnpinArgs) -> anyhow::Result<()> {
    let request =
        PinRequest { disk: args.disk.clone(), point: args.point.clone(), pinned: Some(false), name: None };
    change(context, &request, "is thinned and expires like others").await
}

async fn change(context: &Context, request: &PinRequest, now: &str) -> anyhow::Result<()> {
    let answer: PinAnswer = context.daemon().post_json("/v1/pin", request).await?;
    context.tell(answer.note.as_deref());
    let line = |part: &crate::api::PointPart| format!("point {} of {} {now}", part.point, part.disk);
    context.output.result(&answer, || answer.parts.iter().map(line).collect::<Vec<_>>().join("\n"))?;
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
    let request = RollbackRequest {
        disk: args.disk.clone(),
        point: args.point.clone(),
        accept_damage: args.accept_damage,
    };
    let answer: RollbackAnswers = context.daemon().post_json("/v1/rollback", &request).await?;
    let line = |disk: &RollbackAnswer| {
        format!(
            "{} is as it was at {}: {} compared, {} written",
            disk.disk,
            disk.point,
            bytes(disk.compared_bytes),
            bytes(disk.written_bytes)
        )
    };
    context.output.result(&answer, || answer.disks.iter().map(line).collect::<Vec<_>>().join("\n"))?;
    Ok(())
}
