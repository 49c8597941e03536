//! The process server's configuration: raw TOML and the settings it is resolved to, once.
//!
//! Invariants: every key has a description in [`KEYS`] (asserted by a test that asks the type); settings are valid by
//! construction, nothing checks them again. Units stand on the keys. Called by `main` and by `check-config`.

use std::net::SocketAddr;
use std::path::PathBuf;

use reprotect_engine::host::config::{ConfigError, Loaded, Overrides};
use reprotect_engine::host::config_doc::KeyDoc;
use reprotect_engine::host::hours::{HourlyRate, RateHours, SEND_HOURS_KEY};
use reprotect_engine::host::logging::{self, LOG_KEYS, LogConfig};
use reprotect_engine::host::pki::{self, PKI_KEYS, PkiConfig};
use reprotect_engine::host::places::{MASTER_TARGET_PORT, PROCESS_SERVER_PORT, Places, Program};
use reprotect_engine::host::values::{AddressText, ByteSize, HostPort, LevelText, ListenText, Rate};
use reprotect_engine::limits::RELAY_MEMORY_BYTES_DEFAULT;
use reprotect_engine::net::credentials::Credentials;
use serde::{Deserialize, Serialize};

/// The file as written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RawConfig {
    /// Moves state and admin socket.
    pub state_dir: Option<PathBuf>,
    /// Where agents dial in.
    pub listen: ListenText,
    /// Master targets to forward to.
    pub targets: Vec<AddressText>,
    /// Payload budget.
    pub memory: ByteSize,
    /// Limit on sending.
    pub send_rate: Rate,
    /// When another holds.
    pub send_hours: Vec<RateHours>,
    /// zstd level.
    pub level: LevelText,
    /// Compression threads; 0 means one per CPU.
    pub workers: u32,
    /// The site's own certificates.
    pub pki: PkiConfig,
    /// Logs.
    pub log: LogConfig,
}

impl Default for RawConfig {
    fn default() -> Self {
        Self {
            state_dir: None,
            listen: ListenText::ANY,
            targets: Vec::new(),
            memory: ByteSize(RELAY_MEMORY_BYTES_DEFAULT),
            send_rate: Rate::UNLIMITED,
            send_hours: Vec::new(),
            level: LevelText::Adaptive,
            workers: 0,
            pki: PkiConfig::default(),
            log: LogConfig::default(),
        }
    }
}

/// Every key, for the commented default file.
pub const KEYS: [KeyDoc; 13] = [
    KeyDoc {
        key: "state_dir",
        about: "Where identity and certificates are kept; setting it moves the admin socket there too.",
        unit: "absolute path; default /var/lib/reprotect/process-server with the socket /run/reprotect/process-server.sock",
        cost: "less than a megabyte of disk: a process server keeps nothing that cannot be lost",
        example: "\"/var/lib/reprotect/process-server\"",
    },
    KeyDoc {
        key: "listen",
        about: "Where agents dial in, UDP and TCP.",
        unit: "IP address with or without a port (default 7444); [::] takes IPv4 too",
        cost: "none",
        example: "",
    },
    KeyDoc {
        key: "targets",
        about: "Master targets to forward to; empty: the addresses in the enrolment token.",
        unit: "list of \"host\" or \"host:port\" (default port 7443)",
        cost: "none",
        example: "",
    },
    KeyDoc {
        key: "memory",
        about: "Budget for batches received and not yet acknowledged by the target, all peers together.",
        unit: "size from 64 MiB to 256 GiB",
        cost: "this much memory; each machine needs 1 MiB and each of its open disks 8.5 MiB at least, who does not fit is refused; less holds agents back sooner when the far link is slow",
        example: "",
    },
    KeyDoc {
        key: "send_rate",
        about: "Limit on sending data to the master targets, all machines together: the share of the link that replication may have. A tenth of it stays for what is compared or copied while new writes want all of it.",
        unit: "unlimited, or a rate such as 200 Mbit/s or 100 MB/s",
        cost: "with less than the disks' changes need, the durable state grows old",
        example: "",
    },
    SEND_HOURS_KEY,
    KeyDoc {
        key: "level",
        about: "How hard batches are compressed.",
        unit: "adaptive, or a zstd level from -5 (fast) to 3 (small)",
        cost: "each level up costs CPU and gains ratio; adaptive follows the measured link and CPU",
        example: "",
    },
    KeyDoc {
        key: "workers",
        about: "Compression threads.",
        unit: "count from 1 to 256, or 0 for one per CPU",
        cost: "about 2 MiB of memory each, and the CPU they are given",
        example: "",
    },
    PKI_KEYS[0],
    PKI_KEYS[1],
    PKI_KEYS[2],
    LOG_KEYS[0],
    LOG_KEYS[1],
];

/// What the process server runs with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// State directory and admin socket.
    pub places: Places,
    /// The file these came from.
    pub config_path: PathBuf,
    /// Where agents dial in.
    pub listen: SocketAddr,
    /// Master targets; empty means those of the enrolment token.
    pub targets: Vec<HostPort>,
    /// Payload budget in bytes.
    pub memory_bytes: u64,
    /// Limit on sending.
    pub send_rate: HourlyRate,
    /// Identity and roots.
    pub credentials: Credentials,
    /// zstd level.
    pub level: LevelText,
    /// Compression threads, at least one.
    pub workers: usize,
    /// Logs.
    pub log: LogConfig,
}

impl Settings {
    /// Loads and resolves the file that the command line's `overrides` lead to.
    ///
    /// # Errors
    /// Names file, line, key, what is wrong and what to write.
    pub fn load(overrides: &Overrides) -> Result<Self, ConfigError> {
        Self::resolve(&overrides.load(Program::ProcessServer)?, overrides)
    }

    /// Resolves a loaded file.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn resolve(loaded: &Loaded<RawConfig>, overrides: &Overrides) -> Result<Self, ConfigError> {
        let raw = &loaded.raw;
        if let LevelText::Fixed(level) = raw.level {
            loaded.in_range("level", level, &(-5..=3))?;
        }
        let workers = match loaded.in_range("workers", raw.workers, &(0..=256))? {
            0 => std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            count => count as usize,
        };
        let places = overrides.places(Program::ProcessServer, loaded, raw.state_dir.as_deref())?;
        Ok(Self {
            credentials: Credentials::new(&places.state_dir, pki::resolve(loaded, &raw.pki)?),
            places,
            config_path: loaded.path().to_owned(),
            listen: raw.listen.with_default_port(PROCESS_SERVER_PORT),
            targets: loaded.addresses("targets", &raw.targets, MASTER_TARGET_PORT)?,
            memory_bytes: loaded
                .in_range("memory", raw.memory, &(ByteSize(64 << 20)..=ByteSize(256 << 30)))?
                .0,
            send_rate: HourlyRate { usual: raw.send_rate, hours: raw.send_hours.clone() },
            level: raw.level,
            workers,
            log: logging::resolve(loaded, &raw.log, overrides.log_level.as_deref())?,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use reprotect_engine::host::{config, config_doc};

    use super::*;

    fn resolve(text: &str) -> Result<Settings, ConfigError> {
        let loaded = config::parse(Path::new("ps.toml"), text.to_owned())?;
        Settings::resolve(&loaded, &Overrides::default())
    }

    #[test]
    fn every_key_is_documented_and_the_commented_default_is_the_default() {
        assert_eq!(config_doc::undocumented::<RawConfig>(&KEYS), Vec::<String>::new());
        let text = config_doc::render::<RawConfig>("Process server", &KEYS).unwrap();
        assert_eq!(resolve(&text).unwrap(), resolve("").unwrap());
        let active = config_doc::uncommented(&text);
        assert!(active.contains("\nlisten = \"[::]\"\n"), "{active}");
        assert_eq!(resolve(&active).unwrap(), resolve("").unwrap());
    }

    #[test]
    fn defaults_are_the_documented_ports_and_at_least_one_worker() {
        let settings = resolve("targets = [\"target.example\"]").unwrap();
        assert_eq!(settings.listen.to_string(), "[::]:7444");
        assert_eq!(settings.targets[0].to_string(), "target.example:7443");
        assert!(settings.workers >= 1);
        assert_eq!(resolve("workers = 3").unwrap().workers, 3);
    }

    #[test]
    fn values_out_of_range_name_key_line_and_range() {
        for (text, refusal) in [
            ("workers = 1000", "ps.toml:1: `workers`: 1000 is too large; write a value from 0 to 256"),
            ("level = 9", "ps.toml:1: `level`: 9 is too large; write a value from -5 to 3"),
            (
                "listen = \"name:1\"",
                "ps.toml:1: `listen`: \"name:1\" is not an IP address to listen on; write \"[::]\" for every \
                 interface, or one address such as \"10.0.0.4:7443\"",
            ),
        ] {
            assert_eq!(resolve(text).unwrap_err().to_string(), refusal);
        }
    }
}
