//! The agent's numbers for Prometheus, made of the status each time somebody asks: `GET /metrics` on the admin socket and
//! on `metrics.listen`.
//!
//! Invariants: names and units as Prometheus wants them (seconds, bytes, `_total` for counters); a disk is named by its
//! UUID and path. Called by `daemon`.

use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::api::{DiskInfo, StatusInfo};

/// What a scrape is answered with.
pub(crate) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Disk {
    disk: String,
    source: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Event {
    code: String,
    disk: String,
}

type Gauges = Family<Disk, Gauge<f64, AtomicU64>>;
type Counters = Family<Disk, Counter>;

fn gauges(
    registry: &mut Registry,
    info: &StatusInfo,
    name: &str,
    help: &str,
    of: fn(&DiskInfo) -> Option<f64>,
) {
    let family = Gauges::default();
    registry.register(name, help, family.clone());
    for disk in &info.disks {
        if let Some(value) = of(disk) {
            family.get_or_create(&label(disk)).set(value);
        }
    }
}

fn counters(registry: &mut Registry, info: &StatusInfo, name: &str, help: &str, of: fn(&DiskInfo) -> u64) {
    let family = Counters::default();
    registry.register(name, help, family.clone());
    for disk in &info.disks {
        family.get_or_create(&label(disk)).inc_by(of(disk));
    }
}

fn label(disk: &DiskInfo) -> Disk {
    Disk { disk: disk.disk.clone(), source: escaped(&disk.source) }
}

/// As the exposition wants it, which the library leaves to its callers.
fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// The exposition of a status.
pub(crate) fn render(info: &StatusInfo) -> String {
    let mut registry = Registry::with_prefix("reprotect_agent");
    let connected: Gauge = Gauge::default();
    connected.set(i64::from(info.connected));
    registry.register("connected", "1 while a session is up", connected);
    gauges(
        &mut registry,
        info,
        "rpo_seconds",
        "Age of the newest state of the disk that the target holds durably",
        |disk| disk.rpo_ms.map(|age| age as f64 / 1000.0),
    );
    let streaming = |disk: &DiskInfo| Some(f64::from(u8::from(disk.streaming)));
    gauges(&mut registry, info, "disk_streaming", "1 while every write is a recovery point", streaming);
    let held = |disk: &DiskInfo| Some(disk.held_bytes as f64);
    gauges(&mut registry, info, "disk_held_bytes", "Payload in memory, not yet acknowledged", held);
    let unread = |disk: &DiskInfo| Some(disk.unread_bytes as f64);
    gauges(&mut registry, info, "disk_unread_bytes", "Not at the target, because it cannot be read", unread);
    counters(&mut registry, info, "disk_read_bytes", "Read from the disk", |disk| disk.read_bytes);
    counters(&mut registry, info, "disk_sent_bytes", "Handed to the transport", |disk| disk.wire_bytes_sent);
    counters(&mut registry, info, "disk_rounds", "Rounds whose mark is durable", |disk| disk.scan_rounds);
    counters(&mut registry, info, "disk_capture_misses", "Misses of live capture", |disk| disk.unaccounted);
    let failed: Counter = Counter::default();
    failed.inc_by(info.windows_failed);
    registry.register("windows_failed", "Closing windows that found no moment", failed);
    let skipped: Counter = Counter::default();
    skipped.inc_by(info.events_skipped);
    registry.register("capture_events_skipped", "Events without a run of the capture programs", skipped);
    let steps: Counter = Counter::default();
    steps.inc_by(info.ladder_steps);
    registry.register("ladder_steps", "Steps up and down the ladder of capture", steps);
    let events = Family::<Event, Gauge>::default();
    registry.register("health_event", "1 for each health event that holds", events.clone());
    for event in &info.health {
        let label = Event { code: event.code.clone(), disk: escaped(&event.disk) };
        events.get_or_create(&label).set(1);
    }
    let mut text = String::new();
    // Writing into a string cannot fail.
    let _ = encode(&mut text, &registry);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scrape_names_each_disk_and_leaves_out_what_is_not_known() {
        let disk = |name: &str, rpo_ms| DiskInfo {
            disk: name.to_owned(),
            source: "/dev/\"sdb\"".to_owned(),
            rpo_ms,
            read_bytes: 7,
            ..DiskInfo::default()
        };
        let info =
            StatusInfo { disks: vec![disk("one", Some(1500)), disk("two", None)], ..StatusInfo::default() };
        let text = render(&info);
        assert!(
            text.contains("reprotect_agent_rpo_seconds{disk=\"one\",source=\"/dev/\\\"sdb\\\"\"} 1.5\n"),
            "{text}"
        );
        assert!(!text.contains("rpo_seconds{disk=\"two\""), "{text}");
        assert!(text.contains("reprotect_agent_disk_read_bytes_total{disk=\"two\""), "{text}");
        assert!(text.ends_with("# EOF\n"), "{text}");
    }
}
