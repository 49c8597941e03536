//! `status`: machines, progress, health; once or until interrupted.
//!
//! Invariants: with `--json --watch` one JSON value per line and second; on a terminal the picture is redrawn in place
//! with a bar per disk; elsewhere a table every ten seconds. Called by the dispatcher.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

use reprotect_engine::host::output::{Align, Estimate, Table, bytes, duration, printable};

use super::Context;
use crate::api::{DiskInfo, StatusInfo};
use crate::cli::StatusArgs;

/// Between two pictures on a terminal, and two lines of JSON.
const REDRAW: Duration = Duration::from_secs(1);
/// Between two tables where there is no terminal.
const REPRINT: Duration = Duration::from_secs(10);
/// Characters of a bar.
const BAR: usize = 24;

/// Runs the command.
///
/// # Errors
/// When the daemon cannot be asked.
pub async fn status(context: &Context, args: &StatusArgs) -> anyhow::Result<()> {
    let daemon = context.daemon();
    let mut watch = Watch::default();
    loop {
        let status: StatusInfo = daemon.get_json("/v1/status").await?;
        watch.take(&status, Instant::now());
        if !args.watch {
            return Ok(context.output.result(&status, || table(&status, &watch))?);
        }
        let terminal = io::stdout().is_terminal();
        let text = if context.output.json() {
            format!("{}\n", serde_json::to_string(&status)?)
        } else if terminal {
            // Home, then each line cleared as it is overwritten, then the rest: redraws without flicker.
            format!("\x1b[H{}\x1b[J", picture(&status, &watch).replace('\n', "\x1b[K\n"))
        } else {
            table(&status, &watch)
        };
        let mut stdout = io::stdout().lock();
        match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            result => result?,
        }
        drop(stdout);
        tokio::time::sleep(if terminal || context.output.json() { REDRAW } else { REPRINT }).await;
    }
}

/// Rates over time, by disk.
#[derive(Debug, Default)]
struct Watch {
    disks: BTreeMap<String, Rates>,
}

#[derive(Debug, Default)]
struct Rates {
    settled: Estimate,
    received: Estimate,
}

impl Watch {
    fn take(&mut self, status: &StatusInfo, now: Instant) {
        for disk in &status.disks {
            let rates = self.disks.entry(disk.disk.clone()).or_default();
            rates.settled.update(disk.settled_bytes, now);
            rates.received.update(disk.wire_bytes, now);
        }
    }

    fn time_left(&self, disk: &DiskInfo) -> Option<Duration> {
        let left = self.disks.get(&disk.disk)?.settled.time_left(disk.size_bytes);
        left.filter(|_| disk.settled_bytes < disk.size_bytes)
    }

    fn received(&self, disk: &DiskInfo) -> Option<u64> {
        self.disks.get(&disk.disk)?.received.rate()
    }
}

fn percent(disk: &DiskInfo) -> u64 {
    // Rounded down, so that 100 means all.
    (u128::from(disk.settled_bytes) * 100 / u128::from(disk.size_bytes.max(1))) as u64
}

fn state(disk: &DiskInfo) -> String {
    if disk.connected
        || matches!(disk.state.as_str(), "failed" | "closed" | "waiting" | "failing-back" | "released")
    {
        disk.state.clone()
    } else {
        format!("{}, agent away", disk.state)
    }
}

fn table(status: &StatusInfo, watch: &Watch) -> String {
    if status.disks.is_empty() {
        return format!("{}nothing is protected; `machines` lists what can be\n", head(status));
    }
    let mut table = Table::new(&[
        ("MACHINE", Align::Left),
        ("DISK", Align::Left),
        ("STATE", Align::Left),
        ("DONE", Align::Right),
        ("SIZE", Align::Right),
        ("RECEIVED", Align::Right),
        ("RATE", Align::Right),
        ("ETA", Align::Right),
        ("TARGET", Align::Left),
    ]);
    for disk in &status.disks {
        table.row([
            disk.machine.clone(),
            disk.source.clone(),
            state(disk),
            format!("{} %", percent(disk)),
            bytes(disk.size_bytes),
            bytes(disk.wire_bytes),
            watch.received(disk).map_or_else(|| "-".to_owned(), |rate| format!("{}/s", bytes(rate))),
            watch.time_left(disk).map_or_else(|| "-".to_owned(), duration),
            disk.path.clone(),
        ]);
    }
    format!("{}{}{}", head(status), table.render(), problems(status))
}

fn head(status: &StatusInfo) -> String {
    let agents = status.sessions.iter().filter(|session| session.agent.is_some()).count();
    format!(
        "site {}, listening on {}, up {}, {agents} agents connected\n",
        printable(&status.site),
        status.listen,
        duration(Duration::from_secs(status.uptime_seconds)),
    )
}

fn problems(status: &StatusInfo) -> String {
    let problem = |disk: &DiskInfo| {
        let text = disk.problem.as_ref()?;
        Some(format!("{} {}: {}\n", printable(&disk.machine), printable(&disk.source), printable(text)))
    };
    status.disks.iter().filter_map(problem).collect()
}

fn picture(status: &StatusInfo, watch: &Watch) -> String {
    let mut text = head(status);
    let label = |disk: &DiskInfo| format!("{} {}", printable(&disk.machine), printable(&disk.source));
    let width = status.disks.iter().map(|disk| label(disk).chars().count()).max().unwrap_or(0);
    for disk in &status.disks {
        let percent = percent(disk);
        let full = BAR * percent.min(100) as usize / 100;
        let mut line = format!(
            "{:<width$}  [{}{}] {percent:>3} %  {} of {}  {}",
            label(disk),
            "=".repeat(full),
            " ".repeat(BAR - full),
            bytes(disk.settled_bytes),
            bytes(disk.size_bytes),
            state(disk),
        );
        if let Some(rate) = watch.received(disk).filter(|rate| *rate > 0) {
            line.push_str(&format!("  {}/s", bytes(rate)));
        }
        if let Some(left) = watch.time_left(disk) {
            line.push_str(&format!("  ETA {}", duration(left)));
        }
        text.push_str(&line);
        text.push('\n');
    }
    if status.disks.is_empty() {
        text.push_str("nothing is protected; `machines` lists what can be\n");
    }
    text + &problems(status)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(settled_bytes: u64) -> DiskInfo {
        DiskInfo {
            disk: "d".into(),
            machine: "web\u{1b}[2J".into(),
            agent: "a".into(),
            source: "sda".into(),
            path: "/ds/web.vmdk".into(),
            kind: "vmfs".into(),
            size_bytes: 1000 << 20,
            state: "copying".into(),
            connected: true,
            settled_bytes,
            generation: 1,
            durable: 0,
            marked: 0,
            wire_bytes: settled_bytes,
            plain_bytes: 0,
            written_bytes: 0,
            zeroed_bytes: 0,
            unread_bytes: 0,
            problem: Some("no space".into()),
            scrub: None,
        }
    }

    fn info(disk: DiskInfo) -> StatusInfo {
        StatusInfo {
            version: "1".into(),
            target: "t".into(),
            site: "s".into(),
            listen: "[::]:7443".into(),
            uptime_seconds: 5,
            disks: vec![disk],
            sessions: Vec::new(),
        }
    }

    #[test]
    fn bars_show_share_rate_time_left_and_problems_and_steer_no_terminal() {
        let (mut watch, start) = (Watch::default(), Instant::now());
        for second in 0..=5 {
            watch.take(&info(disk(second * (100 << 20))), start + Duration::from_secs(second));
        }
        let status = info(disk(500 << 20));
        for text in [picture(&status, &watch), table(&status, &watch)] {
            assert!(text.contains("50 %") && text.contains("100 MiB/s") && text.contains("5 s"), "{text}");
            assert!(text.contains("no space") && !text.contains('\u{1b}'), "{text}");
        }
        assert!(picture(&status, &watch).contains("[============            ]"));
    }

    #[test]
    fn a_hundred_percent_means_all_and_no_size_divides_nothing() {
        assert_eq!(percent(&disk((1000 << 20) - 1)), 99);
        assert_eq!(percent(&disk(1000 << 20)), 100);
        assert_eq!(percent(&DiskInfo { size_bytes: 0, ..disk(0) }), 0);
    }
}
