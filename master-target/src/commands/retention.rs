//! `retention`: what is kept how long, and how far the drive reaches.
//!
//! Invariants: without options nothing is changed. Called by the dispatcher.

use reprotect_engine::host::output::bytes;

use super::Context;
use crate::api::{RetentionAnswer, RetentionRequest};
use crate::cli::RetentionArgs;
use crate::retention_policy::Reach;

/// `retention`: shows it, after the changes that were asked for.
///
/// # Errors
/// What the daemon refuses.
pub async fn retention(context: &Context, args: &RetentionArgs) -> anyhow::Result<()> {
    let request = RetentionRequest {
        any_write: args.any_write.clone(),
        every_epoch: args.every_epoch.clone(),
        rungs: (!args.rungs.is_empty()).then(|| args.rungs.clone()),
        keep: args.keep.clone(),
        guaranteed: args.guaranteed.clone(),
        reset: args.reset,
    };
    let answer: RetentionAnswer = match request == RetentionRequest::default() {
        true => context.daemon().get_json("/v1/retention").await?,
        false => context.daemon().post_json("/v1/retention", &request).await?,
    };
    context.output.result(&answer, || render(&answer))?;
    Ok(())
}

/// How far the drive reaches, in words.
pub(super) fn reach(reach: Reach) -> String {
    match reach {
        Reach { hours_held: Some(hours), .. } => {
            format!("at the last hour's churn this drive holds {hours} h of points")
        }
        Reach { is_young: true, .. } => {
            "there is no hour of history yet: how far the drive reaches cannot be told before".to_owned()
        }
        Reach { .. } => {
            "nothing changed in the last hour: how far the drive reaches cannot be told".to_owned()
        }
    }
}

/// How far the drive of a running master target reaches.
pub(super) fn reach_of(answer: &RetentionAnswer) -> Reach {
    Reach { hours_held: answer.hours_held, is_young: answer.is_young }
}

fn render(answer: &RetentionAnswer) -> String {
    let text = |value: &Option<String>| value.clone().unwrap_or_default();
    let (ladder, reach, keep) = (&answer.ladder, reach(reach_of(answer)), text(&answer.ladder.keep));
    let mut rungs = ladder.rungs.clone().unwrap_or_default();
    rungs.retain(|rung| !answer.without_effect.contains(rung));
    let without_effect = match answer.without_effect.is_empty() {
        true => String::new(),
        false => format!(
            "without effect, because nothing is kept beyond {keep}: {}; `retention --keep` changes that\n",
            answer.without_effect.join(", ")
        ),
    };
    format!(
        "every write for {}, every undo epoch for {}{}; nothing unpinned beyond {keep}{}\n{without_effect}\
         on a full drive the last {} go last\n\
         {}: {} of {} free, redo log {}, undo runs {}; {}\n{}\
         last hour: {} of redo log, {} of undo runs; {reach}",
        text(&ladder.any_write),
        text(&ladder.every_epoch),
        rungs.iter().map(|rung| format!(", then one each {rung}")).collect::<String>(),
        if answer.changed {
            " (changed by command; `retention --reset` goes back to the configuration)"
        } else {
            ""
        },
        text(&ladder.guaranteed),
        answer.folder,
        bytes(answer.free_bytes),
        bytes(answer.total_bytes),
        bytes(answer.log_bytes),
        bytes(answer.undo_bytes),
        answer.pressure,
        answer.stays.as_ref().map_or_else(String::new, |stays| format!("{stays}\n")),
        bytes(answer.log_bytes_last_hour),
        bytes(answer.undo_bytes_last_hour),
    )
}
