//! `failback`: hands a machine's disks over to its virtual machine, or takes them again.
//!
//! Invariants: it says what it will do and asks; what would be lost is named before; the next steps are printed. Called
//! by the dispatcher.

use std::time::{Duration, UNIX_EPOCH};

use reprotect_engine::host::output::bytes;

use super::{Context, ask};
use crate::cli::failback::{FailbackArgs, VerifyArg};
use crate::failback::{FailbackAnswer, FailbackInfo, FailbackRequest, VerifyPolicy};

/// How long it may take: a last round, a rollback and a whole read of every disk.
const WAIT: Duration = Duration::from_secs(7 * 24 * 3600);

/// `failback`.
///
/// # Errors
/// What the daemon refuses, or that nobody agreed.
pub async fn failback(context: &Context, args: &FailbackArgs) -> anyhow::Result<()> {
    let request = FailbackRequest {
        machine: args.machine.clone(),
        point: args.point.clone(),
        accept_damage: args.accept_damage,
        verify: match args.verify {
            VerifyArg::Whole => VerifyPolicy::Whole,
            VerifyArg::Sample => VerifyPolicy::Sample,
            VerifyArg::None => VerifyPolicy::None,
        },
        source_already_off: args.source_already_off,
        insist: args.yes,
        dry_run: args.dry_run,
        undo: args.undo,
    };
    let daemon = context.daemon().with_wait(WAIT);
    if !args.dry_run {
        if args.undo {
            let question = format!(
                "The targets of {} are opened again; no virtual machine may have them. What they hold now stays a point, then they are made equal to the source again. Take them?",
                args.machine
            );
            ask::confirm(args.yes, &question)?;
        } else {
            let dry = FailbackRequest { dry_run: true, ..request.clone() };
            let plan: FailbackAnswer = daemon.post_json("/v1/failback", &dry).await?;
            ask::confirm(args.yes, &question(&plan, args))?;
        }
    }
    let answer: FailbackAnswer = daemon.post_json("/v1/failback", &request).await?;
    context.output.result(&answer, || render(&answer))?;
    Ok(())
}

fn question(plan: &FailbackAnswer, args: &FailbackArgs) -> String {
    let stop = match (&plan.loss, args.source_already_off) {
        (Some(loss), _) => format!("The source is taken for off: {loss}."),
        (None, true) => String::new(),
        (None, false) => format!(
            "Stop what writes on {} now (services, databases): its disks are read a last time, and what is written later is lost.",
            plan.machine
        ),
    };
    format!(
        "{stop}\n{}Replication of {} ends, and its targets are released. Go on?",
        summary(plan),
        plan.machine
    )
}

fn summary(answer: &FailbackAnswer) -> String {
    let mut text = format!("{}: {}", answer.machine, answer.point);
    if answer.source_time_ms > 0 {
        let at = UNIX_EPOCH + Duration::from_millis(answer.source_time_ms);
        text.push_str(&format!(" of {}", humantime::format_rfc3339_seconds(at)));
    }
    match answer.class.as_str() {
        "" => {}
        // It must not look like any other.
        "fuzzy" => text.push_str(", FUZZY: blocks of different times, unless nothing was written meanwhile"),
        class => text.push_str(&format!(", {class}")),
    }
    text.push('\n');
    if let Some(note) = &answer.note {
        text.push_str(&format!("  {note}\n"));
    }
    for disk in &answer.disks {
        text.push_str(&line(disk));
        text.push('\n');
    }
    text
}

fn line(disk: &FailbackInfo) -> String {
    let mut text = format!("  {} ({}): {}", disk.source, bytes(disk.size_bytes), disk.path);
    if !disk.point.is_empty() {
        text.push_str(&format!(", point {}", disk.point));
    }
    if disk.written_bytes > 0 {
        text.push_str(&format!(", {} taken back", bytes(disk.written_bytes)));
    }
    if disk.read_bytes > 0 {
        text.push_str(&format!(
            ", {} read again, {} of them compared",
            bytes(disk.read_bytes),
            bytes(disk.compared_bytes)
        ));
    }
    if !disk.different.is_empty() {
        text.push_str(&format!(", NOT AS WRITTEN at bytes {}", disk.different.join(", ")));
    }
    text
}

fn render(answer: &FailbackAnswer) -> String {
    let mut text = summary(answer);
    if let Some(loss) = &answer.loss {
        text.push_str(&format!("{loss}\n"));
    }
    text.push_str(match answer.state.as_str() {
        "released" => "released; next:\n",
        "taken-back" => "taken again; next:\n",
        _ => "nothing was done\n",
    });
    for step in &answer.next {
        text.push_str(&format!("  {step}\n"));
    }
    text.trim_end().to_owned()
}
