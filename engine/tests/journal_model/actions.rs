//! What can happen in a tick, and how often it does.
//!
//! Invariant: every action has a weight above zero, so each can follow each. Called by the driver in `play.rs`.

use super::mutations::Rule;

/// One step of the source, the journal, an operator, or fate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    Write,
    Mark,
    Receive,
    Flush,
    Idle,
    Apply,
    Sync,
    Free,
    Thin,
    Expire,
    Pin,
    Roll,
    Rot,
    Carry,
    GiveUp,
    Grow,
    Scrub,
    Stop,
    Wait,
}

/// What can happen, and how often it does; each seed makes some of it rarer and some more frequent.
pub(crate) const ACTIONS: [(Action, usize); 19] = [
    (Action::Write, 200),
    (Action::Mark, 100),
    (Action::Receive, 180),
    (Action::Flush, 90),
    (Action::Idle, 20),
    (Action::Apply, 300),
    (Action::Sync, 160),
    (Action::Free, 60),
    (Action::Thin, 80),
    (Action::Expire, 15),
    (Action::Pin, 10),
    (Action::Roll, 140),
    (Action::Rot, 8),
    (Action::Carry, 8),
    (Action::GiveUp, 2),
    (Action::Grow, 10),
    (Action::Scrub, 10),
    (Action::Stop, 6),
    (Action::Wait, 4),
];

/// Some broken rules show only where things meet that rarely do; their plays, and the plays they are held against, bring
/// these together more often.
pub(crate) const fn favoured(rule: Option<Rule>) -> &'static [(Action, usize)] {
    match rule {
        Some(Rule::PassedMarkStays) => &[
            (Action::Stop, 12),
            (Action::Mark, 2),
            (Action::Sync, 3),
            (Action::Apply, 5),
            (Action::Receive, 3),
        ],
        Some(Rule::EditBeforeUnlink) => &[(Action::Thin, 8), (Action::Stop, 4)],
        Some(Rule::FreshSegmentAfterCut) => &[(Action::Stop, 8), (Action::Apply, 3)],
        Some(Rule::RedoImageNotAcrossGap) => {
            &[(Action::Rot, 8), (Action::Mark, 3), (Action::Apply, 3), (Action::Write, 2)]
        }
        Some(Rule::RollbackNamesFrames) => &[(Action::Rot, 10), (Action::Roll, 6)],
        Some(Rule::WaitForLastApplied) => {
            &[(Action::Rot, 100), (Action::Mark, 3), (Action::Apply, 2), (Action::Stop, 6), (Action::Sync, 2)]
        }
        Some(Rule::WaitAtGap) => &[(Action::Rot, 10)],
        Some(Rule::EndIsApplied | Rule::RollbackPins) => &[(Action::Roll, 4)],
        Some(Rule::CarryWhatWaits | Rule::CarryBeforeFree | Rule::NoPointsWithoutLog) => {
            &[(Action::Carry, 6), (Action::Wait, 6), (Action::Receive, 2), (Action::Stop, 2)]
        }
        Some(Rule::CarriedAreMissed) => &[
            (Action::Carry, 10),
            (Action::Wait, 8),
            (Action::Rot, 30),
            (Action::Receive, 2),
            (Action::Stop, 4),
        ],
        Some(Rule::PointsKeepTheirSize | Rule::RollbackTakesAllBlocks) => {
            &[(Action::Grow, 10), (Action::Apply, 2), (Action::Roll, 3)]
        }
        Some(Rule::DamageIsWritten | Rule::OlderImagesHide | Rule::DamageIsHandedOn) => &[
            (Action::Rot, 20),
            (Action::Scrub, 10),
            (Action::Mark, 2),
            (Action::Apply, 2),
            (Action::Thin, 2),
        ],
        Some(Rule::LostBeforePassed | Rule::LossDegradesPoints) => &[(Action::GiveUp, 20), (Action::Mark, 2)],
        Some(Rule::CutIsRecorded) => &[(Action::Rot, 10), (Action::Stop, 5)],
        _ => &[],
    }
}
