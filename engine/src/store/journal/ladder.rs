//! Which points stay: the ladder of retention, and what gives way when the drive fills up.
//!
//! | age | what stays |
//! |---|---|
//! | up to `any_write` | every mark, and every write where the stream was ordered (the redo log) |
//! | up to `every_epoch` | the end of every undo epoch |
//! | each rung | one point in each slot of its length |
//! | over `keep` | pinned points |
//!
//! In a slot the best point stays: one that all disks of its machine have, then a sound one, then what promises more, then
//! the newest. Named and pinned points stay besides. A slot is looked at once all of it is old enough, so that its runs are
//! merged once.
//!
//! Three points of a disk never go, however old they are and however full the drive is: the newest; the newest that all disks
//! of its machine have, for where one stands and the others go on that is all they have in common, and the only way to fail
//! the machine back; and the newest of those that is sound, since what came after it may be fuzzy.
//!
//! Invariants: pure; these three stay, and which is the newest says its place, no clock; the disks of
//! a machine keep the same points where they have the same. Units: nanoseconds. Age is by the target's clock; the source's
//! only cuts slots, for all disks of a machine alike: it may be wrong, jump, and be set back. Called by retention.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::format::batch::MarkClass;
use crate::units::Timestamp;

/// One point in each stretch of `every`, until an age of `until`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rung {
    /// Length of a slot.
    pub every: Duration,
    /// Up to this age.
    pub until: Duration,
}

/// What is kept how long.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ladder {
    /// The redo log is kept this long.
    pub any_write: Duration,
    /// Every undo epoch's end is kept this long.
    pub every_epoch: Duration,
    /// Then these, ascending.
    pub rungs: Vec<Rung>,
    /// Nothing but pinned points is older.
    pub keep: Duration,
    /// What pressure does not take before the last step.
    pub guaranteed: Duration,
}

impl Ladder {
    /// The rungs, each with the age at which it begins, where the first begins at `first`.
    fn begins(
        &self,
        first: Duration,
    ) -> impl DoubleEndedIterator<Item = (&Rung, Duration)> + ExactSizeIterator {
        let ends = self.rungs.iter().map(|rung| rung.until);
        let begins: Vec<Duration> = std::iter::once(first).chain(ends).take(self.rungs.len()).collect();
        self.rungs.iter().zip(begins)
    }

    /// How old a point may become at most on a drive that stands at a step: a higher one never lets it become older.
    #[must_use]
    pub fn kept_at(&self, pressure: Pressure) -> Duration {
        if pressure >= Pressure::Guaranteed { self.guaranteed.min(self.keep) } else { self.keep }
    }

    /// The rungs that begin where nothing is kept any more.
    pub fn beyond_keep(&self) -> impl Iterator<Item = &Rung> {
        self.begins(self.every_epoch).filter(|(_, begin)| *begin >= self.keep).map(|(rung, _)| rung)
    }
}

/// How full the drive is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Pressure {
    /// Below all steps.
    #[default]
    None,
    /// 70 %: told.
    Alert,
    /// 80 %: thinned early.
    ThinEarly,
    /// 85 %: nothing beyond the guaranteed.
    Guaranteed,
    /// 90 %: the redo log is kept only as long as it is needed.
    ShortLog,
    /// 95 %: the points that never go, and the oldest guaranteed one.
    Least,
    /// 98 %, or the reserve is touched: nothing more is taken in.
    Stop,
}

impl Pressure {
    /// The step at which a drive stands of which `used` of `total` bytes are taken; `reserve` bytes are to stay free.
    #[must_use]
    pub const fn of(used: u64, total: u64, reserve: u64) -> Self {
        let total = if total == 0 { 1 } else { total };
        if total.saturating_sub(used) < reserve {
            return Self::Stop;
        }
        match used.saturating_mul(100) / total {
            98.. => Self::Stop,
            95.. => Self::Least,
            90.. => Self::ShortLog,
            85.. => Self::Guaranteed,
            80.. => Self::ThinEarly,
            70.. => Self::Alert,
            _ => Self::None,
        }
    }

    /// What it does, for people.
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self {
            Self::None => "the drive has room",
            Self::Alert => "the drive is 70 % full: add space or shorten the retention",
            Self::ThinEarly => "the drive is 80 % full: points are thinned early",
            Self::Guaranteed => "the drive is 85 % full: points older than the guaranteed time are dropped",
            Self::ShortLog => "the drive is 90 % full: the redo log is kept only as long as it is needed",
            Self::Least => {
                "the drive is 95 % full: only the newest points and the oldest guaranteed one are kept"
            }
            Self::Stop => "the drive is 98 % full: nothing more is taken in until there is space",
        }
    }
}

/// A kept point of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// The point.
    pub id: [u8; 16],
    /// Where it stands: undo epoch and entry.
    pub place: (u64, u64),
    /// Its time by the source's clock.
    pub label: Timestamp,
    /// When the target had it, by its own clock; the same for all disks of a machine.
    pub time: Timestamp,
    /// What it promises.
    pub class: MarkClass,
    /// Somebody gave it a name.
    pub named: bool,
    /// Somebody wants it kept, or reads it now.
    pub pinned: bool,
    /// All disks of its machine have it.
    pub complete: bool,
    /// On every disk that has it it is a state the source was in, and whole as far as is known.
    pub sound: bool,
}

/// How long the redo log is kept under a pressure.
#[must_use]
pub const fn log_kept(ladder: &Ladder, pressure: Pressure) -> Duration {
    if (pressure as u8) < (Pressure::ShortLog as u8) { ladder.any_write } else { Duration::ZERO }
}

/// The points of a disk that go.
#[must_use]
pub fn dropped(
    points: &[Candidate],
    ladder: &Ladder,
    pressure: Pressure,
    now: Timestamp,
) -> BTreeSet<[u8; 16]> {
    let last = never_dropped(points);
    let mut gone = BTreeSet::new();
    let mut slots: BTreeMap<(usize, u64), Vec<&Candidate>> = BTreeMap::new();
    let keep = ladder.kept_at(pressure);
    let young = points.iter().filter(|point| age(point, now) <= keep);
    // Of use is one that all disks have; where they differ in their oldest, each would keep its own.
    let oldest = young.min_by_key(|point| (!point.complete, point.place));
    for point in points.iter().filter(|point| !point.pinned && !last.contains(&point.id)) {
        if age(point, now) > keep || pressure >= Pressure::Least {
            let last_resort =
                pressure >= Pressure::Least && oldest.is_some_and(|oldest| oldest.id == point.id);
            if !last_resort {
                gone.insert(point.id);
            }
        } else if let Some(slot) = slot(point, ladder, pressure, now) {
            slots.entry(slot).or_default().push(point);
        }
    }
    for rivals in slots.into_values() {
        let worth = |point: &&&Candidate| (point.complete, point.sound, rank(point.class), point.place);
        let best = rivals.iter().max_by_key(worth);
        let best = best.map(|point| point.id);
        gone.extend(
            rivals.iter().filter(|point| !point.named && Some(point.id) != best).map(|point| point.id),
        );
    }
    gone
}

/// The newest point, the newest that all disks of the machine have, and the newest of these that is sound.
fn never_dropped(points: &[Candidate]) -> BTreeSet<[u8; 16]> {
    let newest = |fits: fn(&Candidate) -> bool| {
        points.iter().filter(|point| fits(point)).max_by_key(|point| point.place).map(|point| point.id)
    };
    let last =
        [newest(|_| true), newest(|point| point.complete), newest(|point| point.complete && point.sound)];
    last.into_iter().flatten().collect()
}

/// The rung and slot a point stands in, if all of the slot is old enough for that rung: as much later than the point as
/// the source's clock had to go to its end.
fn slot(point: &Candidate, ladder: &Ladder, pressure: Pressure, now: Timestamp) -> Option<(usize, u64)> {
    let first = if pressure >= Pressure::ThinEarly { ladder.any_write } else { ladder.every_epoch };
    ladder.begins(first).enumerate().rev().find_map(|(at, (rung, begin))| {
        let every = nanos(rung.every).max(1);
        let slot = point.label.0 / every;
        let end = point.time.0.saturating_add(every - point.label.0 % every);
        (now.0.saturating_sub(end) >= nanos(begin) && now.0 >= end).then_some((at, slot))
    })
}

const fn rank(class: MarkClass) -> u8 {
    match class {
        MarkClass::App => 3,
        MarkClass::Frozen => 2,
        MarkClass::Crash => 1,
        MarkClass::Fuzzy => 0,
    }
}

fn age(point: &Candidate, now: Timestamp) -> Duration {
    Duration::from_nanos(now.0.saturating_sub(point.time.0))
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MINUTE: u64 = 60_000_000_000;
    const HOUR: Duration = Duration::from_secs(3600);
    const DAY: Duration = Duration::from_secs(86400);

    fn ladder() -> Ladder {
        Ladder {
            any_write: 2 * HOUR,
            every_epoch: 4 * HOUR,
            rungs: vec![
                Rung { every: HOUR, until: DAY },
                Rung { every: 4 * HOUR, until: 7 * DAY },
                Rung { every: DAY, until: 30 * DAY },
            ],
            keep: 30 * DAY,
            guaranteed: 3 * HOUR,
        }
    }

    fn point(minute: u64) -> Candidate {
        let mut id = [0; 16];
        id[..8].copy_from_slice(&minute.to_le_bytes());
        let (place, time) = ((minute, minute), Timestamp(minute * MINUTE));
        Candidate {
            id,
            place,
            label: time,
            time,
            class: MarkClass::Crash,
            named: false,
            pinned: false,
            complete: true,
            sound: true,
        }
    }

    fn left(points: &[Candidate], pressure: Pressure, now: u64) -> Vec<Candidate> {
        let gone = dropped(points, &ladder(), pressure, Timestamp(now * MINUTE));
        points.iter().filter(|point| !gone.contains(&point.id)).copied().collect()
    }

    /// Minutes of a month of points every five minutes, thinned each hour as time goes on.
    fn month() -> (Vec<Candidate>, u64) {
        let mut points = Vec::new();
        let end = 31 * 24 * 60;
        for minute in (0..=end).step_by(5) {
            points.push(point(minute));
            if minute % 60 == 0 {
                points = left(&points, Pressure::None, minute);
            }
        }
        (points, end)
    }

    #[test]
    fn a_fuller_drive_never_keeps_a_point_longer_than_an_emptier_one() {
        use Pressure::{Alert, Guaranteed, Least, None, ShortLog, Stop, ThinEarly};
        for (keep, guaranteed) in [(HOUR, DAY), (DAY, HOUR), (HOUR, HOUR)] {
            let ladder = Ladder { keep, guaranteed, ..ladder() };
            let kept =
                [None, Alert, ThinEarly, Guaranteed, ShortLog, Least, Stop].map(|step| ladder.kept_at(step));
            assert!(kept.is_sorted_by(|emptier, fuller| emptier >= fuller), "{kept:?}");
        }
    }

    #[test]
    fn a_month_of_points_becomes_the_ladder() {
        let (points, now) = month();
        let count = |from: u64, to: u64| {
            points.iter().filter(|point| (from..to).contains(&(now - point.time.0 / MINUTE))).count()
        };
        assert_eq!(count(0, 4 * 60), 48, "every epoch for four hours");
        assert_eq!(count(5 * 60, 24 * 60), 19, "hourly");
        assert_eq!(count(28 * 60, 7 * 24 * 60), (7 * 24 - 28) / 4, "every four hours");
        assert_eq!(count(8 * 24 * 60, 30 * 24 * 60), 22, "daily");
        assert_eq!(count(30 * 24 * 60 + 1, u64::MAX), 0, "nothing older");
    }

    #[test]
    fn in_a_slot_the_machine_wins_then_the_sound_then_the_promise_then_the_newest_and_names_and_pins_stay() {
        let hour = |minute: u64| point(10 * 60 + minute);
        let mut points: Vec<Candidate> = (0..60).step_by(5).map(hour).collect();
        points.push(point(40 * 60));
        points[2].class = MarkClass::App;
        points[2].complete = false;
        points[5].class = MarkClass::App;
        points[6].class = MarkClass::App;
        points[6].sound = false;
        points[3].named = true;
        points[4].pinned = true;
        (points[11].class, points[11].sound) = (MarkClass::Fuzzy, false);
        let ids: Vec<u64> =
            left(&points, Pressure::None, 40 * 60).iter().map(|p| p.time.0 / MINUTE).collect();
        assert_eq!(ids, [615, 620, 625, 2400]);
    }

    /// Points every five minutes for two days, with the labels of a source whose clock goes as `label` says.
    fn labelled(label: impl Fn(u64) -> u64) -> Vec<u64> {
        let mut points = Vec::new();
        for minute in (0..=2 * 24 * 60).step_by(5) {
            let label = Timestamp(label(minute) * MINUTE);
            points.push(Candidate { label, ..point(minute) });
            if minute % 60 == 0 {
                points = left(&points, Pressure::None, minute);
            }
        }
        points.iter().map(|point| point.place.0).collect()
    }

    #[test]
    fn a_source_clock_that_is_wrong_or_jumps_makes_no_point_older_and_none_the_newest() {
        const YEAR: u64 = 365 * 24 * 60;
        let right = labelled(|minute| 10 * YEAR + minute);
        assert_eq!(right.last(), Some(&2880));
        assert_eq!(labelled(|minute| minute), right, "behind by ten years, and `keep` is thirty days");
        assert_eq!(labelled(|minute| 20 * YEAR + minute), right, "ahead of everybody");
        let hours = |points: &[u64]| {
            // What stays of each hour by the target's clock.
            let mut hours: Vec<u64> = points.iter().map(|minute| minute / 60).collect();
            hours.dedup();
            hours
        };
        let recent = |points: &[u64]| points.iter().filter(|minute| **minute > 2880 - 240).count();
        let back = labelled(|minute| 10 * YEAR + minute - if minute > 2700 { 60 } else { 0 });
        assert_eq!(back, right, "set back by an hour within what is kept whole");
        let ahead =
            labelled(|minute| if (1440..1500).contains(&minute) { 11 * YEAR } else { 10 * YEAR } + minute);
        assert_eq!((hours(&ahead), recent(&ahead)), (hours(&right), recent(&right)), "an hour of next year");
    }

    #[test]
    fn each_step_of_pressure_keeps_less_and_the_newest_always_stays() {
        let points: Vec<Candidate> = (0..=20 * 60).step_by(5).map(point).collect();
        let now = 20 * 60;
        let oldest = |pressure| now - left(&points, pressure, now)[0].time.0 / MINUTE;
        let count = |pressure| left(&points, pressure, now).len();
        assert_eq!(count(Pressure::None), count(Pressure::Alert));
        assert!(count(Pressure::ThinEarly) < count(Pressure::Alert));
        assert_eq!(oldest(Pressure::Guaranteed), 125, "the newest of the hour that was thinned early");
        assert_eq!(left(&points, Pressure::Least, now).len(), 2);
        assert_eq!(oldest(Pressure::Stop), 180);
        assert_eq!(log_kept(&ladder(), Pressure::Guaranteed), 2 * HOUR);
        assert_eq!(log_kept(&ladder(), Pressure::ShortLog), Duration::ZERO);
    }

    fn minutes(points: &[Candidate]) -> Vec<u64> {
        points.iter().map(|point| point.place.0).collect()
    }

    /// A disk goes on while another of its machine stands at minute 60; the point there was fuzzy, that of minute 55 was not.
    #[test]
    fn the_last_points_that_the_disks_have_in_common_outlive_what_is_kept_and_a_full_drive() {
        let hour: Vec<Candidate> = (5..=60).step_by(5).map(point).collect();
        let on = |minute: u64| Candidate { complete: minute <= 60, sound: minute != 60, ..point(minute) };
        let going: Vec<Candidate> = (5..=50 * 60).step_by(5).map(on).collect();
        let standing: Vec<Candidate> = hour.iter().map(|point| on(point.place.0)).collect();
        for (pressure, days) in [(Pressure::None, 32), (Pressure::Least, 3), (Pressure::Stop, 40)] {
            let now = days * 24 * 60;
            assert_eq!(
                minutes(&left(&standing, pressure, now)),
                [55, 60],
                "the disk that stands, {pressure:?}"
            );
            let stays = minutes(&left(&going, pressure, now));
            assert_eq!(stays[..2], [55, 60], "the disk that goes on, {pressure:?}");
            assert_eq!(stays.last(), Some(&(50 * 60)), "{pressure:?}");
        }
    }

    #[test]
    fn a_disk_that_has_just_ended_an_epoch_on_a_full_drive_keeps_the_point_before_until_the_others_have_it_too()
     {
        let of = |newest_is_complete| {
            let mut points = [point(10), point(15), point(20)];
            points[2].complete = newest_is_complete;
            minutes(&left(&points, Pressure::Least, 200))
        };
        assert_eq!(of(false), [15, 20]);
        assert_eq!(of(true), [20]);
    }

    #[test]
    fn pressure_has_the_documented_steps() {
        let of = |used| Pressure::of(used, 1000, 10);
        assert_eq!(
            [0, 699, 700, 799, 800, 850, 900, 950, 980, 1000].map(of),
            [
                Pressure::None,
                Pressure::None,
                Pressure::Alert,
                Pressure::Alert,
                Pressure::ThinEarly,
                Pressure::Guaranteed,
                Pressure::ShortLog,
                Pressure::Least,
                Pressure::Stop,
                Pressure::Stop
            ]
        );
        assert_eq!(Pressure::of(10, 1000, 995), Pressure::Stop, "the reserve counts, too");
        assert_eq!(Pressure::of(0, 0, 0), Pressure::None);
    }

    proptest! {
        #[test]
        fn whatever_goes_the_newest_and_the_pinned_stay_and_thinning_twice_changes_nothing(
            minutes in proptest::collection::btree_set(0..50_000_u64, 1..60),
            pins in proptest::collection::vec(any::<bool>(), 60),
            whole in proptest::collection::vec(any::<(bool, bool)>(), 60),
            later in 0..50_000_u64,
            pressure in prop_oneof![Just(Pressure::None), Just(Pressure::ThinEarly), Just(Pressure::Guaranteed), Just(Pressure::Least)],
        ) {
            let points: Vec<Candidate> = minutes
                .iter()
                .zip(pins.iter().zip(&whole))
                .map(|(minute, (pinned, (complete, sound)))| Candidate {
                    pinned: *pinned,
                    complete: *complete,
                    sound: *sound,
                    ..point(*minute)
                })
                .collect();
            let now = minutes.iter().max().copied().unwrap_or(0) + later;
            let stays = left(&points, pressure, now);
            prop_assert!(stays.contains(points.last().unwrap()));
            let common = || points.iter().rev().filter(|point| point.complete);
            prop_assert!(common().take(1).all(|point| stays.contains(point)));
            prop_assert!(common().filter(|point| point.sound).take(1).all(|point| stays.contains(point)));
            prop_assert!(points.iter().filter(|point| point.pinned).all(|point| stays.contains(point)));
            prop_assert_eq!(&left(&stays, pressure, now), &stays);
        }

        /// Two disks with points of which some are on both: thinned one after the other, as housekeeping does, and as often
        /// as it likes, they never lose the last that they have in common.
        #[test]
        fn two_disks_keep_their_newest_common_point_and_the_newest_sound_one_whatever_each_has_besides(
            points in proptest::collection::vec((0..3_u8, any::<bool>()), 1..60),
            steps in proptest::collection::vec((0..20_000_u64, prop_oneof![Just(Pressure::None), Just(Pressure::Guaranteed), Just(Pressure::Least)]), 1..6),
        ) {
            let all: Vec<(u64, u8, bool)> =
                points.iter().zip(0..).map(|((on, sound), at)| (at * 7, *on, *sound)).collect();
            let newest = |sound: bool| all.iter().rev().find(|(_, on, is)| *on == 2 && (!sound || *is));
            let mut disks = [0, 1].map(|disk| {
                let has = all.iter().filter(move |(_, on, _)| *on == disk || *on == 2);
                has.map(|(minute, _, sound)| Candidate { sound: *sound, ..point(*minute) }).collect::<Vec<_>>()
            });
            let mut now = 60 * 7;
            for (later, pressure) in steps {
                now += later;
                for disk in [0, 1] {
                    let other = minutes(&disks[1 - disk]);
                    for point in &mut disks[disk] {
                        point.complete = other.contains(&point.place.0);
                    }
                    disks[disk] = left(&disks[disk], pressure, now);
                }
                for (minute, ..) in newest(false).into_iter().chain(newest(true)) {
                    prop_assert!(disks.iter().all(|disk| minutes(disk).contains(minute)), "{minute} at {now}");
                }
            }
        }
    }
}
