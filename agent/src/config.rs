//! The agent's configuration: raw TOML and the settings it is resolved to, once.
//!
//! Invariants: every key has a description in [`KEYS`] (asserted by a test that asks the type); settings are valid by
//! construction, nothing checks them again. Units stand on the keys. Called by `main` and by `check-config`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use reprotect_engine::host::config::{ConfigError, Loaded, Overrides};
use reprotect_engine::host::config_doc::KeyDoc;
use reprotect_engine::host::hours::{HourlyRate, RateHours, SEND_HOURS_KEY};
use reprotect_engine::host::logging::{self, LOG_KEYS, LogConfig};
use reprotect_engine::host::pki::{self, PKI_KEYS, PkiConfig};
use reprotect_engine::host::places::{MASTER_TARGET_PORT, Places, Program};
use reprotect_engine::host::values::{AddressText, ByteSize, DurationText, HostPort, LevelText, Rate};
use reprotect_engine::net::credentials::Credentials;
use serde::{Deserialize, Serialize};

use crate::hooks::Hooks;

/// Who compresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compress {
    /// The agent where it speaks to a master target directly, else the process server.
    #[default]
    Auto,
    /// The process server.
    Relay,
    /// The agent.
    Source,
    /// Nobody.
    Off,
}

/// How changes of a disk are found, where it can be followed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CaptureMode {
    /// By live capture, with a closing window for each point: crash-consistent points.
    #[default]
    Window,
    /// By live capture of every write, in its order: each is a point.
    Data,
    /// By live capture, without windows: fuzzy points.
    Bitmap,
    /// By reading everything and comparing hashes: fuzzy points.
    Scan,
}

impl CaptureMode {
    /// How changes are found as long as no stream of every write is open.
    #[must_use]
    pub const fn base(self) -> Self {
        match self {
            Self::Data => Self::Window,
            mode => mode,
        }
    }
}

impl std::fmt::Display for CaptureMode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Window => "window",
            Self::Data => "data",
            Self::Bitmap => "bitmap",
            Self::Scan => "scan",
        })
    }
}

/// The `[capture]` table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CaptureConfig {
    /// How changes are found.
    pub mode: CaptureMode,
    /// Pause between two rounds of followed disks.
    pub interval: DurationText,
    /// Pause between two points that bring the machine to rest.
    pub app_interval: DurationText,
    /// What may wait while every write is streamed.
    pub queue: ByteSize,
}

impl Default for CaptureConfig {
    fn default() -> Self {
        Self {
            mode: CaptureMode::Window,
            interval: DurationText(Duration::from_secs(10)),
            app_interval: DurationText(Duration::from_secs(3600)),
            queue: ByteSize(128 << 20),
        }
    }
}

/// The `[hooks]` table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HooksConfig {
    /// Brings applications to rest.
    pub pre_freeze: Vec<String>,
    /// Lets them go on.
    pub post_thaw: Vec<String>,
    /// How long each may take.
    pub limit: DurationText,
}

impl Default for HooksConfig {
    fn default() -> Self {
        Self { pre_freeze: Vec::new(), post_thaw: Vec::new(), limit: DurationText(Duration::from_secs(30)) }
    }
}

/// The `[metrics]` table.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MetricsConfig {
    /// Where they are served besides the admin socket.
    pub listen: Option<SocketAddr>,
}

/// The `[disks]` table.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DisksConfig {
    /// Disks to offer in addition to those selected by default.
    pub include: Vec<String>,
    /// Disks not to offer.
    pub exclude: Vec<String>,
}

/// The file as written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RawConfig {
    /// Moves state and admin socket.
    pub state_dir: Option<PathBuf>,
    /// Process servers and master targets to dial.
    pub upstream: Vec<AddressText>,
    /// Who compresses.
    pub compress: Compress,
    /// zstd level where the agent compresses.
    pub compress_level: LevelText,
    /// Limit on reading the disks.
    pub read_rate: Rate,
    /// Limit on sending.
    pub send_rate: Rate,
    /// When another holds.
    pub send_hours: Vec<RateHours>,
    /// Pause between two passes over a disk.
    pub scan_interval: DurationText,
    /// Payload budget.
    pub memory: ByteSize,
    /// Age of the durable state beyond which it is a health event.
    pub rpo_threshold: DurationText,
    /// Which disks.
    pub disks: DisksConfig,
    /// Live capture.
    pub capture: CaptureConfig,
    /// Programs around a freeze.
    pub hooks: HooksConfig,
    /// Numbers for Prometheus.
    pub metrics: MetricsConfig,
    /// The site's own certificates.
    pub pki: PkiConfig,
    /// Logs.
    pub log: LogConfig,
}

impl Default for RawConfig {
    fn default() -> Self {
        Self {
            state_dir: None,
            upstream: Vec::new(),
            compress: Compress::Auto,
            compress_level: LevelText::Adaptive,
            read_rate: Rate::UNLIMITED,
            send_rate: Rate::UNLIMITED,
            send_hours: Vec::new(),
            scan_interval: DurationText(Duration::from_secs(15 * 60)),
            memory: ByteSize(256 << 20),
            rpo_threshold: DurationText(Duration::from_secs(15 * 60)),
            disks: DisksConfig::default(),
            capture: CaptureConfig::default(),
            hooks: HooksConfig::default(),
            metrics: MetricsConfig::default(),
            pki: PkiConfig::default(),
            log: LogConfig::default(),
        }
    }
}

/// Every key, for the commented default file.
pub const KEYS: [KeyDoc; 25] = [
    KeyDoc {
        key: "state_dir",
        about: "Where identity, certificates and progress are kept; setting it moves the admin socket there too.",
        unit: "absolute path; default /var/lib/reprotect/agent with the socket /run/reprotect/agent.sock",
        cost: "a few megabytes of disk",
        example: "\"/var/lib/reprotect/agent\"",
    },
    KeyDoc {
        key: "upstream",
        about: "Process servers and master targets that may be used. With several the agent uses the best (process servers first, then by round trip to the master target and by load), keeps the next one ready, and goes on with it when the one in use dies; empty: the addresses in the enrolment token.",
        unit: "list of \"host\" or \"host:port\"; without a port 7443, a master target (a process server listens on 7444)",
        cost: "with several, one idle connection and a few packets a second",
        example: "",
    },
    KeyDoc {
        key: "compress",
        about: "Who compresses: the agent (source), the process server (relay), nobody (off), or whichever suits the path (auto).",
        unit: "auto, relay, source or off",
        cost: "source spends this machine's CPU, off spends link bandwidth",
        example: "",
    },
    KeyDoc {
        key: "compress_level",
        about: "How hard the agent compresses when it does.",
        unit: "adaptive, or a zstd level from -5 (fast) to 3 (small)",
        cost: "each level up costs CPU and gains ratio; adaptive follows the measured link and CPU",
        example: "",
    },
    KeyDoc {
        key: "read_rate",
        about: "Limit on reading the disks, all together, so that the machine's own work goes on.",
        unit: "unlimited, or a rate such as 200 Mbit/s or 100 MB/s",
        cost: "a lower rate makes initial sync and every pass last longer",
        example: "",
    },
    KeyDoc {
        key: "send_rate",
        about: "Limit on sending data, all disks together; a tenth of it stays for what is compared or copied while new writes want all of it. Control messages are not limited.",
        unit: "unlimited, or a rate such as 200 Mbit/s or 100 MB/s",
        cost: "with less than the disks' changes need, the durable state grows old",
        example: "",
    },
    SEND_HOURS_KEY,
    KeyDoc {
        key: "scan_interval",
        about: "Pause between the end of one pass over a disk and the beginning of the next.",
        unit: "duration from 100ms to 7d",
        cost: "shorter finds changes sooner and reads the disks more often",
        example: "",
    },
    KeyDoc {
        key: "memory",
        about: "Budget for data read and not yet acknowledged as written, all disks together.",
        unit: "size from 64 MiB to 64 GiB",
        cost: "this much memory; below 64 MiB per disk, disks wait for one another on slow links",
        example: "",
    },
    KeyDoc {
        key: "rpo_threshold",
        about: "A health event is raised when the newest durable state of a disk is older than this.",
        unit: "duration from 1s to 7d",
        cost: "none",
        example: "",
    },
    KeyDoc {
        key: "disks.include",
        about: "Disks to offer besides those selected by default (`reprotect-agent disks` shows them), and image files.",
        unit: "list of names, paths, WWIDs or patterns with * and ?",
        cost: "none",
        example: "",
    },
    KeyDoc {
        key: "disks.exclude",
        about: "Disks never to offer; wins over include.",
        unit: "list of names, paths, WWIDs or patterns with * and ?",
        cost: "none",
        example: "",
    },
    KeyDoc {
        key: "capture.mode",
        about: "How changes are found: by live capture with a closing window for each point (crash-consistent points), by live capture of every write (data: each is a point), by live capture alone (bitmap, fuzzy points), or by reading everything (scan). A disk that cannot be followed is scanned.",
        unit: "window, data, bitmap or scan",
        cost: "data copies everything that is written, window only what is while a window is open; scan reads each disk whole in each round",
        example: "",
    },
    KeyDoc {
        key: "capture.interval",
        about: "Pause between two rounds of disks that are followed; the master target's policy wins. Holds from the next start.",
        unit: "duration from 1s to 7d",
        cost: "shorter loses less with the machine, and opens more windows",
        example: "",
    },
    KeyDoc {
        key: "capture.app_interval",
        about: "Pause between two points for which the machine is brought to rest: by the hooks (application-consistent), or by freezing its file systems alone (frozen). The master target's policy wins.",
        unit: "duration from 1m to 7d; 0s for never",
        cost: "each writes out what the file systems hold, and stops writes for milliseconds",
        example: "",
    },
    KeyDoc {
        key: "capture.queue",
        about: "How much may wait to become durable while every write is known (mode data), all disks together. Beyond, the maps remember what changed, and there are points only, until the target keeps up again.",
        unit: "size from 64 MiB to 64 GiB",
        cost: "this much memory, besides `memory`",
        example: "",
    },
    KeyDoc {
        key: "hooks.pre_freeze",
        about: "Program that brings applications to rest before the file systems are frozen; REPROTECT_POINT names the point. It must succeed for the point to be application-consistent.",
        unit: "list: program and arguments; empty for none",
        cost: "applications stand still until the post_thaw hook",
        example: "[\"/etc/reprotect/pre-freeze\"]",
    },
    KeyDoc {
        key: "hooks.post_thaw",
        about: "Program that lets applications go on after the thaw. It is run whenever pre_freeze was begun, also when that failed or the agent was killed meanwhile, and must bear being run twice.",
        unit: "list: program and arguments; empty for none",
        cost: "none",
        example: "[\"/etc/reprotect/post-thaw\"]",
    },
    KeyDoc {
        key: "hooks.limit",
        about: "How long each hook may take; then it is ended with everything it started.",
        unit: "duration from 1s to 1h",
        cost: "applications stand still that long at most, and for the window after",
        example: "",
    },
    KeyDoc {
        key: "metrics.listen",
        about: "Serves numbers for Prometheus at http://ADDRESS/metrics, besides the admin socket; without encryption, so on this machine only.",
        unit: "loopback address with port; default none",
        cost: "none",
        example: "\"127.0.0.1:9443\"",
    },
    PKI_KEYS[0],
    PKI_KEYS[1],
    PKI_KEYS[2],
    LOG_KEYS[0],
    LOG_KEYS[1],
];

/// What the agent runs with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// State directory and admin socket.
    pub places: Places,
    /// The file these came from, read again on SIGHUP.
    pub config_path: PathBuf,
    /// Peers to dial, in order; empty means those of the enrolment token.
    pub upstream: Vec<HostPort>,
    /// Identity and roots.
    pub credentials: Credentials,
    /// Who compresses.
    pub compress: Compress,
    /// zstd level where the agent compresses.
    pub compress_level: LevelText,
    /// Limit on reading.
    pub read_rate: Rate,
    /// Limit on sending.
    pub send_rate: HourlyRate,
    /// Pause between two passes.
    pub scan_interval: Duration,
    /// Payload budget in bytes.
    pub memory_bytes: u64,
    /// Which disks.
    pub disks: DisksConfig,
    /// How changes are found.
    pub capture_mode: CaptureMode,
    /// Pause between two rounds of followed disks.
    pub capture_interval: Duration,
    /// Bytes that may wait to become durable while every write is streamed, all disks together.
    pub capture_queue_bytes: u64,
    /// Age of the durable state beyond which it is a health event.
    pub rpo_threshold: Duration,
    /// Where numbers are served.
    pub metrics_listen: Option<SocketAddr>,
    /// Pause between two points that bring the machine to rest; `None` for never.
    pub app_interval: Option<Duration>,
    /// Programs around a freeze.
    pub hooks: Hooks,
    /// Logs.
    pub log: LogConfig,
}

impl Settings {
    /// Loads and resolves the file that the command line's `overrides` lead to.
    ///
    /// # Errors
    /// Names file, line, key, what is wrong and what to write.
    pub fn load(overrides: &Overrides) -> Result<Self, ConfigError> {
        Self::resolve(&overrides.load(Program::Agent)?, overrides)
    }

    /// Reads the file again, for SIGHUP. Where state and socket are stays as it is until the next start.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn reload(&self) -> Result<Self, ConfigError> {
        let overrides = Overrides {
            config: self.config_path.exists().then(|| self.config_path.clone()),
            state_dir: Some(self.places.state_dir.clone()),
            log_level: Some(self.log.level.clone()),
        };
        let config_path = self.config_path.clone();
        Ok(Self { places: self.places.clone(), config_path, ..Self::load(&overrides)? })
    }

    /// Resolves a loaded file.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn resolve(loaded: &Loaded<RawConfig>, overrides: &Overrides) -> Result<Self, ConfigError> {
        let raw = &loaded.raw;
        let scan_range =
            DurationText(Duration::from_millis(100))..=DurationText(Duration::from_secs(7 * 86_400));
        if let LevelText::Fixed(level) = raw.compress_level {
            loaded.in_range("compress_level", level, &(-5..=3))?;
        }
        for (key, list) in [("disks.include", &raw.disks.include), ("disks.exclude", &raw.disks.exclude)] {
            if list.iter().any(|name| name.trim().is_empty()) {
                return Err(loaded.invalid(
                    key,
                    "an empty name",
                    "write a name such as \"sdb\", or remove it",
                ));
            }
        }
        let capture_range =
            DurationText(Duration::from_secs(1))..=DurationText(Duration::from_secs(7 * 86_400));
        let places = overrides.places(Program::Agent, loaded, raw.state_dir.as_deref())?;
        Ok(Self {
            credentials: Credentials::new(&places.state_dir, pki::resolve(loaded, &raw.pki)?),
            places,
            config_path: loaded.path().to_owned(),
            upstream: loaded.addresses("upstream", &raw.upstream, MASTER_TARGET_PORT)?,
            compress: raw.compress,
            compress_level: raw.compress_level,
            read_rate: raw.read_rate,
            send_rate: HourlyRate { usual: raw.send_rate, hours: raw.send_hours.clone() },
            scan_interval: loaded.in_range("scan_interval", raw.scan_interval, &scan_range)?.0,
            memory_bytes: loaded
                .in_range("memory", raw.memory, &(ByteSize(64 << 20)..=ByteSize(64 << 30)))?
                .0,
            disks: raw.disks.clone(),
            capture_mode: raw.capture.mode,
            capture_interval: loaded.in_range("capture.interval", raw.capture.interval, &capture_range)?.0,
            capture_queue_bytes: loaded
                .in_range("capture.queue", raw.capture.queue, &(ByteSize(64 << 20)..=ByteSize(64 << 30)))?
                .0,
            rpo_threshold: loaded.in_range("rpo_threshold", raw.rpo_threshold, &capture_range)?.0,
            metrics_listen: metrics_listen(loaded, raw.metrics.listen)?,
            app_interval: app_interval(loaded, raw.capture.app_interval)?,
            hooks: hooks(loaded, &raw.hooks)?,
            log: logging::resolve(loaded, &raw.log, overrides.log_level.as_deref())?,
        })
    }
}

fn metrics_listen(
    loaded: &Loaded<RawConfig>,
    listen: Option<SocketAddr>,
) -> Result<Option<SocketAddr>, ConfigError> {
    if listen.is_some_and(|address| !address.ip().is_loopback()) {
        return Err(loaded.invalid(
            "metrics.listen",
            "others could read it, for it is not encrypted",
            "write a loopback address such as \"127.0.0.1:9443\"",
        ));
    }
    Ok(listen)
}

fn app_interval(loaded: &Loaded<RawConfig>, interval: DurationText) -> Result<Option<Duration>, ConfigError> {
    if interval.0.is_zero() {
        return Ok(None);
    }
    let range = DurationText(Duration::from_secs(60))..=DurationText(Duration::from_secs(7 * 86_400));
    Ok(Some(loaded.in_range("capture.app_interval", interval, &range)?.0))
}

fn hooks(loaded: &Loaded<RawConfig>, raw: &HooksConfig) -> Result<Hooks, ConfigError> {
    for (key, command) in [("hooks.pre_freeze", &raw.pre_freeze), ("hooks.post_thaw", &raw.post_thaw)] {
        if command.first().is_some_and(|program| !program.starts_with('/')) {
            return Err(loaded.invalid(
                key,
                "the program is not named by its whole path",
                "write it as [\"/path/of/program\", \"argument\"]",
            ));
        }
    }
    if raw.pre_freeze.is_empty() && !raw.post_thaw.is_empty() {
        return Err(loaded.invalid(
            "hooks.post_thaw",
            "it is never run without hooks.pre_freeze",
            "set both, or neither",
        ));
    }
    let range = DurationText(Duration::from_secs(1))..=DurationText(Duration::from_secs(3600));
    let limit = loaded.in_range("hooks.limit", raw.limit, &range)?.0;
    Ok(Hooks { pre_freeze: raw.pre_freeze.clone(), post_thaw: raw.post_thaw.clone(), limit })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use reprotect_engine::host::{config, config_doc};

    use super::*;

    fn resolve(text: &str) -> Result<Settings, ConfigError> {
        let loaded = config::parse(Path::new("agent.toml"), text.to_owned())?;
        Settings::resolve(&loaded, &Overrides::default())
    }

    #[test]
    fn every_key_is_documented_and_the_commented_default_is_the_default() {
        assert_eq!(config_doc::undocumented::<RawConfig>(&KEYS), Vec::<String>::new());
        let text = config_doc::render::<RawConfig>("Agent", &KEYS).unwrap();
        assert_eq!(resolve(&text).unwrap(), resolve("").unwrap());
        let active = config_doc::uncommented(&text);
        assert!(active.contains("\nmemory = \"256 MiB\"\n"), "{active}");
        assert_eq!(resolve(&active).unwrap(), resolve("").unwrap());
    }

    #[test]
    fn values_out_of_range_name_key_line_and_range() {
        for (text, refusal) in [
            (
                "\nmemory = \"1 MiB\"",
                "agent.toml:2: `memory`: 1 MiB is too small; write a value from 64 MiB to 64 GiB",
            ),
            (
                "compress_level = 19",
                "agent.toml:1: `compress_level`: 19 is too large; write a value from -5 to 3",
            ),
            (
                "scan_interval = \"1ms\"",
                "agent.toml:1: `scan_interval`: 1ms is too small; write a value from 100ms to 7d",
            ),
            (
                "upstream = [\"a\", \"a:7443\"]",
                "agent.toml:1: `upstream`: a:7443 stands twice; write it once",
            ),
            (
                "[log]\nlevel = \"loud\"",
                "agent.toml:2: `log.level`: \"loud\" is not a level; write error, warn, info, debug or trace",
            ),
            ("state_dir = \"here\"", "agent.toml:1: `state_dir`: a relative path; write an absolute one"),
        ] {
            assert_eq!(resolve(text).unwrap_err().to_string(), refusal);
        }
    }

    #[test]
    fn the_command_line_wins_over_the_file() {
        let loaded =
            config::parse(Path::new("a"), "state_dir = \"/srv/a\"\n[log]\nlevel = \"warn\"".to_owned());
        let loaded = loaded.unwrap();
        let file = Settings::resolve(&loaded, &Overrides::default()).unwrap();
        assert_eq!((file.places.state_dir.as_path(), file.log.level.as_str()), (Path::new("/srv/a"), "warn"));
        let overrides =
            Overrides { config: None, state_dir: Some("/srv/b".into()), log_level: Some("debug".to_owned()) };
        let both = Settings::resolve(&loaded, &overrides).unwrap();
        assert_eq!(
            (both.places.socket.as_path(), both.log.level.as_str()),
            (Path::new("/srv/b/agent.sock"), "debug")
        );
    }
}
