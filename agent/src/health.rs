//! What an operator should look at: health events of this machine, and the steps of its disks on the ladder of capture.
//!
//! Invariants: an event is there as long as its cause is, and keeps the time since when; a step is kept with its cause, the
//! newest `STEPS_MAX`; codes are stable. Units: milliseconds since the UNIX epoch. Owned by `machine`, shown by
//! `status` and `metrics`.

use std::collections::{BTreeMap, VecDeque};

use reprotect_engine::net::wall_clock;
use serde::{Deserialize, Serialize};

/// Steps kept.
const STEPS_MAX: usize = 64;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Protection goes on, with less than was wanted.
    Warning,
    /// What is promised is not met.
    Critical,
}

/// Everything that can be said, with its severity and remedy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Code {
    /// The durable state is older than the threshold.
    RpoExceeded,
    /// A disk is scanned although it should be followed.
    CaptureFellBack,
    /// Writes were missed: the disk is compared.
    CaptureMissed,
    /// Windows find no moment.
    WindowsFail,
    /// The kernel left out runs of the capture programs.
    EventsSkipped,
    /// Of several upstreams only the one in use can be had.
    NoStandby,
    /// The session goes over TCP.
    UdpBlocked,
    /// A hook does not do its work.
    HookFailed,
    /// Parts of a disk cannot be read.
    SourceUnreadable,
    /// A disk is stopped or paused.
    DiskProblem,
}

impl Code {
    const fn name(self) -> &'static str {
        match self {
            Self::RpoExceeded => "RPO_EXCEEDED",
            Self::CaptureFellBack => "CAPTURE_FELL_BACK",
            Self::CaptureMissed => "CAPTURE_MISSED",
            Self::WindowsFail => "WINDOWS_FAIL",
            Self::EventsSkipped => "EVENTS_SKIPPED",
            Self::NoStandby => "NO_STANDBY",
            Self::UdpBlocked => "UDP_BLOCKED",
            Self::HookFailed => "HOOK_FAILED",
            Self::SourceUnreadable => "SOURCE_UNREADABLE",
            Self::DiskProblem => "DISK_PROBLEM",
        }
    }

    const fn severity(self) -> Severity {
        match self {
            Self::RpoExceeded | Self::SourceUnreadable | Self::DiskProblem => Severity::Critical,
            Self::CaptureFellBack
            | Self::CaptureMissed
            | Self::WindowsFail
            | Self::EventsSkipped
            | Self::NoStandby
            | Self::UdpBlocked
            | Self::HookFailed => Severity::Warning,
        }
    }

    const fn remedy(self) -> &'static str {
        match self {
            Self::RpoExceeded => {
                "see whether the session is up and the link and the master target keep up; raise `rpo_threshold` if this is expected"
            }
            Self::CaptureFellBack => {
                "remove the cause: it is tried again before a later round; or set capture.mode = \"scan\" if this is meant"
            }
            Self::CaptureMissed => "nothing to do: the compare puts it right; report it if it happens again",
            Self::WindowsFail => "see the agent's log for the cause; points are fuzzy until a window closes",
            Self::EventsSkipped => {
                "nothing to do: what was missed by it is found by the account of each disk, and compared; report it if it grows"
            }
            Self::NoStandby => {
                "mend the other one, or take it out of `upstream`: until then nothing takes over when the one in use dies, and changes are remembered here instead"
            }
            Self::UdpBlocked => {
                "let UDP through on the same port number, both ways: over TCP everything works, and costs more processor time and suffers more from losses; UDP is tried again at the next connection"
            }
            Self::HookFailed => "run the hook by hand; points promise clean file systems only until it works",
            Self::SourceUnreadable => {
                "look at the kernel's log (dmesg) and at the device; it is tried again by itself, and writing these blocks anew heals them, too; until then points are degraded"
            }
            Self::DiskProblem => "do what the problem says",
        }
    }
}

/// Something to look at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthEvent {
    /// Stable name.
    pub code: String,
    /// How bad it is.
    pub severity: Severity,
    /// Path of the disk; empty for the machine.
    pub disk: String,
    /// What was found.
    pub cause: String,
    /// Since when.
    pub since_ms: u64,
    /// What to do.
    pub remedy: String,
}

/// A step up or down the ladder of capture.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LadderStep {
    /// When.
    pub time_ms: u64,
    /// Path of the disk.
    pub disk: String,
    /// How its changes are found from then on: `data`, `window`, `bitmap`, `compare` or `scan`.
    pub to: String,
    /// Why.
    pub cause: String,
}

/// What is known.
#[derive(Debug, Default)]
pub(crate) struct Health {
    since: BTreeMap<(Code, String), u64>,
    steps: VecDeque<LadderStep>,
    /// Steps since the start.
    pub(crate) steps_taken: u64,
}

fn now_ms() -> u64 {
    wall_clock().0 / 1_000_000
}

impl Health {
    /// Takes over what is wrong now: code, disk, cause. Answers the events, the worst first.
    pub(crate) fn observe(&mut self, found: &[(Code, String, String)]) -> Vec<HealthEvent> {
        let is_there = |code: Code, disk: &str| found.iter().any(|(c, d, _)| *c == code && d == disk);
        self.since.retain(|(code, disk), _| {
            let stays = is_there(*code, disk);
            if !stays {
                tracing::info!(code = code.name(), disk, "health: over");
            }
            stays
        });
        let mut events = Vec::new();
        for (code, disk, cause) in found {
            let since_ms = *self.since.entry((*code, disk.clone())).or_insert_with(|| {
                tracing::warn!(code = code.name(), disk, "health: {cause}; {}", code.remedy());
                now_ms()
            });
            events.push(HealthEvent {
                code: code.name().to_owned(),
                severity: code.severity(),
                disk: disk.clone(),
                cause: cause.clone(),
                since_ms,
                remedy: code.remedy().to_owned(),
            });
        }
        events.sort_by_key(|event| (std::cmp::Reverse(event.severity), event.since_ms));
        events
    }

    /// A disk's changes are found in another way from now on.
    pub(crate) fn step(&mut self, disk: &str, to: &str, cause: &str) {
        self.steps_taken += 1;
        self.steps.push_back(LadderStep {
            time_ms: now_ms(),
            disk: disk.to_owned(),
            to: to.to_owned(),
            cause: cause.to_owned(),
        });
        if self.steps.len() > STEPS_MAX {
            self.steps.pop_front();
        }
    }

    /// The newest steps, the oldest of them first.
    pub(crate) fn steps(&self) -> Vec<LadderStep> {
        self.steps.iter().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_keeps_its_time_until_its_cause_is_gone_and_the_worst_comes_first() {
        let mut health = Health::default();
        let fell = (Code::CaptureFellBack, "/dev/sdb".to_owned(), "no BTF".to_owned());
        let rpo = (Code::RpoExceeded, "/dev/sdb".to_owned(), "20 min".to_owned());
        let first = health.observe(std::slice::from_ref(&fell));
        let both = health.observe(&[fell.clone(), rpo]);
        assert_eq!(both[0].code, "RPO_EXCEEDED");
        assert_eq!((both[1].code.as_str(), both[1].since_ms), ("CAPTURE_FELL_BACK", first[0].since_ms));
        assert_eq!(health.observe(&[]), []);
        assert!(health.since.is_empty());
    }

    #[test]
    fn the_newest_steps_are_kept_and_all_are_counted() {
        let mut health = Health::default();
        for number in 0..100 {
            health.step("/dev/sdb", "window", &number.to_string());
        }
        let steps = health.steps();
        assert_eq!((steps.len(), health.steps_taken), (STEPS_MAX, 100));
        assert_eq!(steps[STEPS_MAX - 1].cause, "99");
    }
}
