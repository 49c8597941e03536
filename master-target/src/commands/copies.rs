//! `export` and `verify`: points of a running master target, copied and judged.
//!
//! Invariant: `verify` exits with 1 when anything is damaged. Called by the dispatcher.

use std::time::Duration;

use clap::ValueEnum as _;
use reprotect_engine::host::admin_client::AdminClient;
use reprotect_engine::host::output::{Align, Table, bytes, printable};
use reprotect_engine::host::places::Program;

use super::Context;
use crate::api::{ExportAnswer, ExportRequest, VerifyAnswer, VerifyRequest};
use crate::cli::copies::{ExportArgs, VerifyArgs};

/// Reading a large disk takes its time; the daemon says in its log how far it is.
const WAIT: Duration = Duration::from_secs(7 * 24 * 3600);

fn daemon(context: &Context) -> AdminClient {
    AdminClient::new(Program::MasterTarget, &context.settings.places.socket).with_wait(WAIT)
}

/// `export`: copies a point into new files on the master target.
///
/// # Errors
/// What the daemon refuses.
pub async fn export(context: &Context, args: &ExportArgs) -> anyhow::Result<()> {
    let format = args.format.to_possible_value().map(|value| value.get_name().to_owned());
    let request = ExportRequest {
        what: args.what.clone(),
        point: args.point.clone(),
        format: format.unwrap_or_default(),
        path: std::path::absolute(&args.output)?,
        accept_damage: args.accept_damage,
    };
    let answer: ExportAnswer = daemon(context).post_json("/v1/export", &request).await?;
    context.tell(answer.note.as_deref());
    context.output.result(&answer, || {
        let line = |copy: &crate::api::ExportedInfo| {
            format!(
                "{} of {} is in {}: {} of data in {} of files\n",
                copy.point,
                copy.disk,
                copy.files.join(", "),
                bytes(copy.data_bytes),
                bytes(copy.file_bytes)
            )
        };
        answer.copies.iter().map(line).collect()
    })?;
    Ok(())
}

/// `verify`: reads points to their last block; answers whether all are whole.
///
/// # Errors
/// What the daemon refuses.
pub async fn verify(context: &Context, args: &VerifyArgs) -> anyhow::Result<bool> {
    let request = VerifyRequest { disk: args.disk.clone(), point: args.point.clone() };
    let answer: VerifyAnswer = daemon(context).post_json("/v1/verify", &request).await?;
    context.output.result(&answer, || render(&answer))?;
    Ok(answer.sound)
}

fn render(answer: &VerifyAnswer) -> String {
    let mut table = Table::new(&[
        ("POINT", Align::Left),
        ("READ", Align::Right),
        ("BLOCKS", Align::Right),
        ("DAMAGED", Align::Right),
        ("", Align::Left),
    ]);
    let mut tail = String::new();
    for point in &answer.points {
        let verdict = match &point.refused {
            Some(why) => printable(why),
            None if point.damaged_bytes == 0 => "OK".to_owned(),
            None => "DAMAGED".to_owned(),
        };
        let (read, damaged) = (bytes(point.read_bytes), bytes(point.damaged_bytes));
        table.row([point.point.clone(), read, point.blocks.to_string(), damaged, verdict]);
        for range in &point.damaged {
            let reason = printable(&range.reason);
            tail.push_str(&format!("{}: bytes {} to {}: {reason}\n", point.point, range.start, range.end));
        }
        if point.left_out > 0 {
            tail.push_str(&format!("{}: and {} more ranges\n", point.point, point.left_out));
        }
    }
    if table.is_empty() {
        return "no point yet".to_owned();
    }
    format!("{}{tail}", table.render())
}
