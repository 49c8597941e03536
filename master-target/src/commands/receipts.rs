//! `receipts`: what passes over whole disks were made, why, and what they cost.
//!
//! Invariant: as the daemon says it, newest first. Called by the dispatcher.

use std::time::{Duration, UNIX_EPOCH};

use reprotect_engine::host::output::{self, Align, Table, bytes};

use super::Context;
use crate::api::{Receipt, ReceiptsAnswer, ReceiptsRequest};
use crate::cli::ReceiptsArgs;

/// `receipts`: lists them.
///
/// # Errors
/// What the daemon refuses.
pub async fn receipts(context: &Context, args: &ReceiptsArgs) -> anyhow::Result<()> {
    let request = ReceiptsRequest { disk: args.disk.clone().unwrap_or_default() };
    let answer: ReceiptsAnswer = context.daemon().post_json("/v1/receipts", &request).await?;
    context.output.result(&answer, || render(&answer))?;
    Ok(())
}

fn render(answer: &ReceiptsAnswer) -> String {
    if answer.receipts.is_empty() {
        return "no pass over a whole disk in the last 30 days".to_owned();
    }
    let mut table = Table::new(&[
        ("BEGAN", Align::Left),
        ("DISK", Align::Left),
        ("CAUSE", Align::Left),
        ("RESULT", Align::Left),
        ("TOOK", Align::Right),
        ("COMPARED", Align::Right),
        ("MOVED", Align::Right),
        ("RANGES", Align::Right),
        ("POINTS", Align::Left),
    ]);
    for receipt in &answer.receipts {
        table.row([
            humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_millis(receipt.begun_ms))
                .to_string(),
            receipt.disk.clone(),
            receipt.cause.clone(),
            receipt.result.clone(),
            output::duration(took(receipt)),
            bytes(receipt.compared_bytes),
            bytes(receipt.moved_bytes),
            receipt.range_count.to_string(),
            points(receipt),
        ]);
    }
    table.render()
}

fn took(receipt: &Receipt) -> Duration {
    let end = if receipt.ended_ms == 0 { receipt.updated_ms } else { receipt.ended_ms };
    Duration::from_millis(end.saturating_sub(receipt.begun_ms))
}

fn points(receipt: &Receipt) -> String {
    match (receipt.points_kept, receipt.points_degraded) {
        (Some(kept), Some(0)) => format!("{kept} kept"),
        (Some(kept), Some(degraded)) => format!("{kept} kept, {degraded} of them degraded"),
        _ => "-".to_owned(),
    }
}
