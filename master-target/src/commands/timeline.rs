//! `timeline`: what can be had of a disk, drawn over time.
//!
//! Invariants: one column never shows more than is there: of several stretches in it the worst is drawn, except that a
//! point is always seen. Times are UTC, by the source's clock. Called by the dispatcher.

use std::time::{Duration, UNIX_EPOCH};

use super::Context;
use crate::api::{DiskTimeline, PointInfo, PointsRequest, TimelineAnswer};
use crate::cli::TimelineArgs;

/// Columns of the drawing.
const WIDTH: usize = 72;

/// `timeline`: draws it, or prints it as JSON.
///
/// # Errors
/// What the daemon refuses.
pub async fn timeline(context: &Context, args: &TimelineArgs) -> anyhow::Result<()> {
    let request = PointsRequest { disk: args.disk.clone(), all: false };
    let answer: TimelineAnswer = context.daemon().post_json("/v1/timeline", &request).await?;
    context.output.result(&answer, || draw(&answer))?;
    Ok(())
}

fn draw(answer: &TimelineAnswer) -> String {
    let intervals = || answer.disks.iter().flat_map(|disk| &disk.intervals);
    let points = || answer.disks.iter().flat_map(|disk| &disk.points).map(|point| point.source_time_ms);
    let from = intervals().map(|interval| interval.from_ms).chain(points()).min();
    let to = intervals().map(|interval| interval.to_ms).chain(points()).max();
    let (Some(from), Some(to)) = (from, to) else { return "no consistent point yet".to_owned() };
    let mut lines = Vec::new();
    for disk in &answer.disks {
        lines.push(format!("{} ({})", disk.source, disk.disk));
        lines.push(bar(disk, from, to));
    }
    let (left, right) = (time(from), time(to));
    lines.push(format!("{left}{right:>width$}", width = WIDTH.saturating_sub(left.len())));
    lines.push("█ every write   | point   · points only   ▒ degraded   ! damaged   × lost".to_owned());
    lines.join("\n")
}

fn bar(disk: &DiskTimeline, from: u64, to: u64) -> String {
    let column = |ms: u64| {
        let share = (ms.saturating_sub(from)) as f64 / (to - from).max(1) as f64;
        ((share * (WIDTH - 1) as f64).round() as usize).min(WIDTH - 1)
    };
    let mut cells = vec![(0, ' '); WIDTH];
    let mut put = |from: usize, to: usize, rank: u8, sign: char| {
        for cell in cells.iter_mut().take(to + 1).skip(from) {
            if rank >= cell.0 {
                *cell = (rank, sign);
            }
        }
    };
    for interval in &disk.intervals {
        let (rank, sign) = match interval.offer.as_str() {
            "any-write" => (1, '█'),
            "point-only" => (2, '·'),
            "degraded" => (3, '▒'),
            "damaged" => (4, '!'),
            _ => (5, '×'),
        };
        let (first, mut last) = (column(interval.from_ms), column(interval.to_ms));
        // Where one stretch ends the next begins; the column is the next one's.
        if interval.to_ms < to && last > first {
            last -= 1;
        }
        put(first, last, rank, sign);
    }
    let inside = |ms: u64| {
        let mut any_write = disk.intervals.iter().filter(|interval| interval.offer == "any-write");
        any_write.any(|interval| interval.from_ms <= ms && ms <= interval.to_ms)
    };
    for point in disk.points.iter().filter(|point| is_whole(point) && !inside(point.source_time_ms)) {
        let at = column(point.source_time_ms);
        put(at, at, 6, '|');
    }
    cells.into_iter().map(|(_, sign)| sign).collect()
}

/// Whether a point is what its mark said.
const fn is_whole(point: &PointInfo) -> bool {
    !point.degraded && point.damaged.is_none()
}

fn time(ms: u64) -> String {
    humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_millis(ms)).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::IntervalInfo;

    fn interval(offer: &str, from_ms: u64, to_ms: u64) -> IntervalInfo {
        IntervalInfo { offer: offer.to_owned(), from_ms, to_ms }
    }

    fn point(source_time_ms: u64) -> PointInfo {
        PointInfo {
            point: "1.1".to_owned(),
            name: String::new(),
            class: "crash-consistent".to_owned(),
            source_time_ms,
            pinned: false,
            degraded: false,
            damaged: None,
            id: String::new(),
            cause: "timer".to_owned(),
            kept: true,
            targets_own: false,
            complete: true,
            parts: Vec::new(),
        }
    }

    #[test]
    fn every_kind_of_stretch_and_the_points_between_are_drawn() {
        let disk = DiskTimeline {
            disk: "d".to_owned(),
            source: "sda".to_owned(),
            intervals: vec![
                interval("point-only", 0, 3000),
                interval("lost", 3000, 4000),
                interval("degraded", 4000, 5000),
                interval("any-write", 5000, 7100),
            ],
            points: vec![point(0), point(1000), point(3000), point(6000), point(7100)],
        };
        let drawn = draw(&TimelineAnswer { disks: vec![disk] });
        let expected = "\
sda (d)
|·········|···················|×××××××××▒▒▒▒▒▒▒▒▒▒██████████████████████
1970-01-01T00:00:00Z                                1970-01-01T00:00:07Z
█ every write   | point   · points only   ▒ degraded   ! damaged   × lost";
        assert_eq!(drawn, expected);
    }

    #[test]
    fn nothing_and_a_single_point_are_drawn_too() {
        assert_eq!(draw(&TimelineAnswer { disks: Vec::new() }), "no consistent point yet");
        let disk = DiskTimeline {
            disk: "d".to_owned(),
            source: "sda".to_owned(),
            intervals: Vec::new(),
            points: vec![point(5)],
        };
        assert!(draw(&TimelineAnswer { disks: vec![disk] }).contains("\n|  "));
    }
}
