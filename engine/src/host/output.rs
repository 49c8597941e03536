//! What commands print: aligned tables, progress, JSON, and numbers a person can read.
//!
//! Invariants: results go to standard output, everything else to standard error; with `--json` standard output is
//! JSON only; progress is a bar on a terminal, a line every few seconds otherwise, and nothing with `--json`.
//! Rounded numbers are for people and never parsed. Called by the programs' commands.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

/// Exit status of a command that did what was asked.
pub const EXIT_OK: u8 = 0;
/// Exit status of a command that failed.
pub const EXIT_FAILED: u8 = 1;
/// Exit status of a command line or configuration that is wrong.
pub const EXIT_USAGE: u8 = 2;

/// How often progress is printed where there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// Where and how a command prints.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    json: bool,
    stdout_is_terminal: bool,
    stderr_is_terminal: bool,
}

impl Output {
    /// The process's own output; `json` as given on the command line.
    #[must_use]
    pub fn new(json: bool) -> Self {
        Self {
            json,
            stdout_is_terminal: io::stdout().is_terminal(),
            stderr_is_terminal: io::stderr().is_terminal(),
        }
    }

    /// Whether the result is to be JSON.
    #[must_use]
    pub const fn json(self) -> bool {
        self.json
    }

    /// Prints a command's result: `value` as JSON with `--json`, else the text `human` makes.
    ///
    /// # Errors
    /// When standard output takes no more. A reader that closed its end (`| head`) is no error.
    pub fn result<T: Serialize>(self, value: &T, human: impl FnOnce() -> String) -> io::Result<()> {
        let mut text = if self.json { serde_json::to_string_pretty(value)? } else { human() };
        if !text.is_empty() && !text.ends_with('\n') {
            text.push('\n');
        }
        let mut stdout = io::stdout().lock();
        match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            result => result,
        }
    }

    /// A remark for a person beside the result; silent when the output is piped or JSON.
    pub fn note(self, text: &str) {
        if !self.json && self.stdout_is_terminal {
            let _ = writeln!(io::stderr().lock(), "{text}");
        }
    }

    /// A progress display for `total` bytes.
    #[must_use]
    pub fn progress(self, label: &str, total: u64) -> Progress {
        let shown = if self.json {
            Shown::Nothing
        } else if self.stderr_is_terminal {
            Shown::Bar(bar(label, total))
        } else {
            Shown::Lines { last: None }
        };
        Progress { label: label.to_owned(), total, shown, estimate: Estimate::default() }
    }
}

fn bar(label: &str, total: u64) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
    let template = "{prefix} [{bar:30}] {percent:>3} %  {binary_bytes} of {binary_total_bytes}  {msg}";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.set_prefix(label.to_owned());
    bar
}

/// Progress of one job in bytes, with rate and time left.
#[derive(Debug)]
pub struct Progress {
    label: String,
    total: u64,
    shown: Shown,
    estimate: Estimate,
}

#[derive(Debug)]
enum Shown {
    Nothing,
    Bar(ProgressBar),
    Lines { last: Option<Instant> },
}

impl Progress {
    /// Shows `done` of the total at `now`; `total` may change (a pass may find more to do).
    pub fn update(&mut self, done: u64, total: u64, now: Instant) {
        self.total = total;
        self.estimate.update(done, now);
        let tail = self.estimate.describe(total);
        match &mut self.shown {
            Shown::Nothing => {}
            Shown::Bar(bar) => {
                bar.set_length(total);
                bar.set_position(done);
                bar.set_message(tail);
            }
            Shown::Lines { last } => {
                if last.is_none_or(|last| now.saturating_duration_since(last) >= LINE_INTERVAL) {
                    *last = Some(now);
                    let _ = writeln!(
                        io::stderr().lock(),
                        "{}: {} of {} ({} %)  {tail}",
                        self.label,
                        bytes(done),
                        bytes(total),
                        percent(done, total)
                    );
                }
            }
        }
    }

    /// Removes the bar, or prints the closing line `text`.
    pub fn finish(self, text: &str) {
        match self.shown {
            Shown::Nothing => {}
            Shown::Bar(bar) => bar.finish_with_message(text.to_owned()),
            Shown::Lines { .. } => {
                let _ = writeln!(io::stderr().lock(), "{}: {text}", self.label);
            }
        }
    }
}

/// Rate and time left from positions over time: a mean that forgets, half of it after about five updates' time.
#[derive(Clone, Copy, Debug, Default)]
pub struct Estimate {
    last: Option<(u64, Instant)>,
    bytes_per_second: Option<f64>,
}

impl Estimate {
    /// Takes the position `done` at `now`; a position that went back (a new pass) starts the rate again.
    pub fn update(&mut self, done: u64, now: Instant) {
        let Some((before, then)) = self.last else {
            self.last = Some((done, now));
            return;
        };
        let elapsed = now.saturating_duration_since(then).as_secs_f64();
        if done < before {
            *self = Self { last: Some((done, now)), bytes_per_second: None };
        } else if elapsed >= 0.05 {
            let rate = (done - before) as f64 / elapsed;
            let mean = self.bytes_per_second.map_or(rate, |mean| 0.85_f64.mul_add(mean, 0.15 * rate));
            *self = Self { last: Some((done, now)), bytes_per_second: Some(mean) };
        }
    }

    /// Bytes per second, once two positions are known.
    #[must_use]
    pub fn rate(&self) -> Option<u64> {
        // Truncation is meant: the number is for people.
        self.bytes_per_second.map(|rate| rate as u64)
    }

    /// Time until `total` at this rate; `None` while nothing moves.
    #[must_use]
    pub fn time_left(&self, total: u64) -> Option<Duration> {
        let (done, _) = self.last?;
        let rate = self.bytes_per_second.filter(|rate| *rate >= 1.0)?;
        Duration::try_from_secs_f64(total.saturating_sub(done) as f64 / rate).ok()
    }

    fn describe(&self, total: u64) -> String {
        let mut text = self.rate().map(|rate| format!("{}/s", bytes(rate))).unwrap_or_default();
        if let Some(left) = self.time_left(total) {
            let _ = write!(text, "  ETA {}", duration(left));
        }
        text
    }
}

fn percent(done: u64, total: u64) -> u64 {
    if total == 0 { 100 } else { (u128::from(done) * 100 / u128::from(total)).min(100) as u64 }
}

/// `count` bytes for people: three significant digits and a binary unit, `1.50 GiB`.
#[must_use]
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut value = count as f64 / 1024.0;
    let mut unit = UNITS[0];
    for next in &UNITS[1..] {
        // 999.5 would print as 1000 of the smaller unit.
        if value < 999.5 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    let decimals = if value < 9.995 { 2 } else { usize::from(value < 99.95) };
    format!("{value:.decimals$} {unit}")
}

/// A duration for people: the two largest units, `2h 05m`; below a minute in seconds or milliseconds.
#[must_use]
pub fn duration(span: Duration) -> String {
    let seconds = span.as_secs();
    match seconds {
        0 => format!("{} ms", span.as_millis()),
        1..60 => format!("{seconds} s"),
        60..3600 => format!("{}m {:02}s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{}h {:02}m", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{}d {:02}h", seconds / 86_400, seconds % 86_400 / 3600),
    }
}

/// Which side of its column a cell stands on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Align {
    /// Text.
    Left,
    /// Numbers.
    Right,
}

/// An aligned table; the last column is not padded.
#[derive(Clone, Debug)]
pub struct Table {
    columns: Vec<(String, Align)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these column heads.
    #[must_use]
    pub fn new(columns: &[(&str, Align)]) -> Self {
        Self {
            columns: columns.iter().map(|(name, align)| ((*name).to_owned(), *align)).collect(),
            rows: Vec::new(),
        }
    }

    /// Adds a row; missing cells are empty, surplus ones are dropped.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let mut cells: Vec<String> = cells.into_iter().map(|cell| printable(&cell)).collect();
        cells.resize(self.columns.len(), String::new());
        self.rows.push(cells);
    }

    /// Whether it has no row.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The text, heads first.
    #[must_use]
    pub fn render(&self) -> String {
        let heads: Vec<String> = self.columns.iter().map(|(name, _)| name.clone()).collect();
        let lines: Vec<&Vec<String>> = std::iter::once(&heads).chain(&self.rows).collect();
        let mut widths = vec![0; self.columns.len()];
        for line in &lines {
            for (width, cell) in widths.iter_mut().zip(line.iter()) {
                *width = (*width).max(cell.chars().count());
            }
        }
        let mut text = String::new();
        for line in lines {
            let mut row = String::new();
            for ((cell, width), (_, align)) in line.iter().zip(&widths).zip(&self.columns) {
                let _ = match align {
                    Align::Left => write!(row, "{cell:<width$}  "),
                    Align::Right => write!(row, "{cell:>width$}  "),
                };
            }
            text.push_str(row.trim_end());
            text.push('\n');
        }
        text
    }
}

/// Text from devices and peers without control characters, so that it cannot steer a terminal.
#[must_use]
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_have_three_digits_and_never_a_thousand_of_a_smaller_unit() {
        for (count, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.00 KiB"),
            (1536, "1.50 KiB"),
            (10 << 20, "10.0 MiB"),
            (150 << 30, "150 GiB"),
            ((1 << 20) - 1, "1.00 MiB"),
            (u64::MAX, "16.0 EiB"),
        ] {
            assert_eq!(bytes(count), text);
        }
    }

    #[test]
    fn durations_show_their_two_largest_units() {
        for (seconds, text) in [(5, "5 s"), (65, "1m 05s"), (7500, "2h 05m"), (90_000, "1d 01h")] {
            assert_eq!(duration(Duration::from_secs(seconds)), text);
        }
        assert_eq!(duration(Duration::from_millis(250)), "250 ms");
    }

    #[test]
    fn tables_align_and_carry_no_control_characters() {
        let mut table = Table::new(&[("DISK", Align::Left), ("SIZE", Align::Right), ("WHY", Align::Left)]);
        table.row(["sda".to_owned(), "1.00 GiB".to_owned(), "a\u{1b}[2Jb".to_owned()]);
        table.row(["nvme0n1".to_owned(), "9 B".to_owned()]);
        assert_eq!(table.render(), "DISK         SIZE  WHY\nsda      1.00 GiB  a?[2Jb\nnvme0n1       9 B\n");
    }

    #[test]
    fn the_estimate_follows_the_rate_and_starts_again_with_a_new_pass() {
        let start = Instant::now();
        let mut estimate = Estimate::default();
        assert_eq!(estimate.time_left(100), None);
        for second in 0..=10 {
            estimate.update(second * 1000, start + Duration::from_secs(second));
        }
        assert_eq!(estimate.rate(), Some(1000));
        assert_eq!(estimate.time_left(20_000), Some(Duration::from_secs(10)));
        estimate.update(0, start + Duration::from_secs(11));
        assert_eq!(estimate.rate(), None);
        assert_eq!(percent(5, 0), 100);
        assert_eq!(percent(u64::MAX, u64::MAX), 100);
    }
}
