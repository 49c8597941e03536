//! Chooses the compression level from what is scarce: the link or the processor. Sans-IO.
//!
//! # The rule
//! * The queue to the link is at least half full and the workers compress at most 60 % of the time: the link is the
//!   bottleneck and there is processor time to spend. One level up.
//! * The workers compress at least 95 % of the time, the queue in front of them is at least half full and the one
//!   to the link at most a quarter: the processor is the bottleneck. One level down.
//! * Anything else is balance, or a source that has no more to give: stay.
//!
//! Either must hold for [`EVIDENCE_NANOS`] without interruption, counted anew after each change. A level costs at
//! most 1.6 times its predecessor for the bytes it gains (measured at 64 KiB and 1 MiB records), so what was 60 %
//! busy stays under 96 % after a raise and the two rules cannot alternate. Where data is stranger than that, a raise
//! that had to be taken back is not tried again for a while that doubles each time.
//!
//! Invariant: a level of [`LEVELS`], changed by one place at a time. Units: permille, nanoseconds of a monotonic clock.
//! Called by the compressing stage of agent and process server, a few times a second.

use super::{LEVEL_DEFAULT, LEVELS};
use crate::units::MonoTime;

/// How long one bottleneck must show before the level changes.
pub const EVIDENCE_NANOS: u64 = 2_000_000_000;
/// How long a raise that was taken back is not tried again, the first time.
pub const HOLD_NANOS_MIN: u64 = 30_000_000_000;
/// The longest that wait may become by doubling.
pub const HOLD_NANOS_MAX: u64 = 900_000_000_000;

const BUSY_SPARE_PERMILLE: u16 = 600;
const BUSY_SATURATED_PERMILLE: u16 = 950;
const QUEUE_WAITING_PERMILLE: u16 = 500;
const QUEUE_DRAINED_PERMILLE: u16 = 250;

/// What was seen since the last observation; each from 0 to 1000.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Share of time the workers spent compressing; waiting for either queue is not compressing.
    pub busy_permille: u16,
    /// How full the queue in front of the workers is.
    pub input_permille: u16,
    /// How full the queue to the link is; 1000 while sending is stalled for want of credit or window.
    pub output_permille: u16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Up,
    Down,
}

/// Follows the load. Call [`Self::observe`] a few times a second and compress the next records at what it returns.
#[derive(Clone, Debug)]
pub struct LevelController {
    index: usize,
    evidence: Option<(Step, MonoTime)>,
    raised_at: Option<MonoTime>,
    hold_nanos: u64,
    raise_not_before: MonoTime,
}

impl Default for LevelController {
    fn default() -> Self {
        Self::new(LEVEL_DEFAULT)
    }
}

impl LevelController {
    /// Begins at the level of [`LEVELS`] nearest to `level` from below.
    #[must_use]
    pub fn new(level: i32) -> Self {
        let index = LEVELS.iter().rposition(|known| *known <= level).unwrap_or(0);
        Self {
            index,
            evidence: None,
            raised_at: None,
            hold_nanos: HOLD_NANOS_MIN,
            raise_not_before: MonoTime::ZERO,
        }
    }

    /// The level in force.
    #[must_use]
    pub fn level(&self) -> i32 {
        LEVELS.get(self.index).copied().unwrap_or(LEVEL_DEFAULT)
    }

    /// Takes one observation; the level for the next records.
    pub fn observe(&mut self, now: MonoTime, load: Load) -> i32 {
        let Some(step) = Self::wanted(load) else {
            self.evidence = None;
            return self.level();
        };
        match self.evidence {
            Some((same, since)) if same == step => {
                if now.nanos_since(since) >= EVIDENCE_NANOS && self.take(step, now) {
                    self.evidence = None;
                }
            }
            _ => self.evidence = Some((step, now)),
        }
        self.level()
    }

    fn wanted(load: Load) -> Option<Step> {
        let link_waits = load.output_permille >= QUEUE_WAITING_PERMILLE;
        if link_waits && load.busy_permille <= BUSY_SPARE_PERMILLE {
            return Some(Step::Up);
        }
        let workers_lag = load.busy_permille >= BUSY_SATURATED_PERMILLE
            && load.input_permille >= QUEUE_WAITING_PERMILLE
            && load.output_permille <= QUEUE_DRAINED_PERMILLE;
        workers_lag.then_some(Step::Down)
    }

    /// Changes the level if it may; whether it did.
    fn take(&mut self, step: Step, now: MonoTime) -> bool {
        match step {
            Step::Up => {
                if self.index + 1 >= LEVELS.len() || now < self.raise_not_before {
                    return false;
                }
                self.index += 1;
                self.raised_at = Some(now);
            }
            Step::Down => {
                if self.index == 0 {
                    return false;
                }
                self.index -= 1;
                if let Some(raised) = self.raised_at.take() {
                    // Taken back soon: the raise was a mistake. Later: conditions have changed since.
                    let soon = now.nanos_since(raised) <= self.hold_nanos;
                    self.hold_nanos =
                        if soon { (self.hold_nanos * 2).min(HOLD_NANOS_MAX) } else { HOLD_NANOS_MIN };
                    self.raise_not_before = now.plus_nanos(self.hold_nanos);
                }
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TICK_NANOS: u64 = 200_000_000;
    const HOUR_TICKS: u64 = 3_600_000_000_000 / TICK_NANOS;

    /// A source, workers and a link in equilibrium; speeds in MB/s of plain bytes, the link in MB/s of stored ones.
    #[derive(Clone, Debug)]
    struct Plant {
        source: f64,
        link: f64,
        speed: [f64; LEVELS.len()],
        ratio: [f64; LEVELS.len()],
    }

    impl Plant {
        fn load(&self, level: i32) -> Load {
            let at = LEVELS.iter().position(|known| *known == level).expect("a known level");
            let (workers, link) = (self.speed[at], self.link * self.ratio[at]);
            let flow = self.source.min(workers).min(link);
            let full = |is| if is { 1000 } else { 0 };
            Load {
                busy_permille: (flow / workers * 1000.0) as u16,
                input_permille: full(flow < self.source),
                output_permille: full(flow >= link),
            }
        }

        /// Runs for an hour; the levels that followed one another, with their ticks.
        fn run(&self, controller: &mut LevelController) -> Vec<(u64, i32)> {
            let mut changes = vec![(0, controller.level())];
            for tick in 0..HOUR_TICKS {
                let before = controller.level();
                let now = controller.observe(MonoTime(tick * TICK_NANOS), self.load(before));
                if now != before {
                    changes.push((tick, now));
                }
            }
            changes
        }
    }

    fn plant(cost_max: f64) -> impl Strategy<Value = Plant> {
        let steps = proptest::collection::vec((1.0..1.15_f64, 1.0..cost_max), LEVELS.len() - 1);
        (1.0..5000.0_f64, 1.0..5000.0_f64, 50.0..3000.0_f64, 1.0..4.0_f64, steps).prop_map(
            |(source, link, speed, ratio, steps)| {
                let mut plant = Plant { source, link, speed: [speed; 8], ratio: [ratio; 8] };
                for (at, (gain, cost)) in steps.into_iter().enumerate() {
                    // `cost` is per byte gained: gain times slowdown.
                    plant.ratio[at + 1] = plant.ratio[at] * gain;
                    plant.speed[at + 1] = plant.speed[at] / (cost / gain).max(1.0);
                }
                plant
            },
        )
    }

    proptest! {
        #[test]
        fn steady_load_finds_a_level_and_keeps_it(plant in plant(1.58)) {
            let changes = plant.run(&mut LevelController::default());
            let (last, level) = *changes.last().expect("the first");
            prop_assert!(last < HOUR_TICKS / 10, "{changes:?}");
            let mut directions: Vec<i32> = changes.windows(2).map(|pair| (pair[1].1 - pair[0].1).signum()).collect();
            directions.dedup();
            prop_assert!(directions.len() <= 1, "there and back: {changes:?}");
            let load = plant.load(level);
            prop_assert!(LevelController::wanted(load) != Some(Step::Up) || level == 3);
            prop_assert!(LevelController::wanted(load) != Some(Step::Down) || level == -5);
        }

        #[test]
        fn strange_data_makes_it_try_ever_more_rarely(plant in plant(6.0)) {
            let changes = plant.run(&mut LevelController::default());
            // Seven steps to an end of the scale, then a try (two changes) after 1, 2, 4, 8 and each 15 minutes.
            prop_assert!(changes.len() <= 7 + 2 * (1 + 4 + 4), "{changes:?}");
        }
    }

    fn flat(source: f64, link: f64) -> Plant {
        Plant { source, link, speed: [600.0; 8], ratio: [2.0; 8] }
    }

    #[test]
    fn a_narrow_link_raises_to_the_top_and_a_wide_one_lowers_to_the_bottom() {
        let mut controller = LevelController::default();
        assert_eq!(controller.level(), -1);
        let narrow = flat(1000.0, 10.0).run(&mut controller);
        assert_eq!(narrow.iter().map(|(_, level)| *level).collect::<Vec<_>>(), [-1, 1, 2, 3], "never zero");
        let wide = flat(5000.0, 5000.0).run(&mut LevelController::new(-3));
        assert_eq!(wide.iter().map(|(_, level)| *level).collect::<Vec<_>>(), [-3, -4, -5]);
    }

    #[test]
    fn an_idle_source_changes_nothing() {
        assert_eq!(flat(1.0, 100.0).run(&mut LevelController::default()).len(), 1);
    }

    #[test]
    fn evidence_must_not_be_interrupted() {
        let mut controller = LevelController::default();
        let narrow = Load { busy_permille: 100, input_permille: 1000, output_permille: 1000 };
        for second in 0..600 {
            let load = if second % 2 == 0 { narrow } else { Load::default() };
            assert_eq!(controller.observe(MonoTime(second * 1_000_000_000), load), -1);
        }
    }

    #[test]
    fn any_start_level_is_one_of_the_known() {
        for level in -10..10 {
            assert!(LEVELS.contains(&LevelController::new(level).level()));
        }
        assert_eq!(LevelController::new(0).level(), -1);
    }
}
