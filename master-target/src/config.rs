//! The master target's configuration: raw TOML and the settings it is resolved to, once.
//!
//! Invariants: every key has a description in [`KEYS`] (asserted by a test that asks the type); settings are valid by
//! construction, nothing checks them again. Units stand on the keys. Called by `main` and by `check-config`.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use reprotect_engine::host::config::{ConfigError, Loaded, Overrides};
use reprotect_engine::host::config_doc::KeyDoc;
use reprotect_engine::host::logging::{self, LOG_KEYS, LogConfig};
use reprotect_engine::host::pki::{self, PKI_KEYS, PkiConfig};
use reprotect_engine::host::places::{MASTER_TARGET_PORT, Places, Program};
use reprotect_engine::host::values::{AddressText, ByteSize, DurationText, HostPort, ListenText};
use reprotect_engine::limits::{
    PROGRESS_BYTES, PROGRESS_NANOS, SEGMENT_BYTES_DEFAULT, SEGMENT_BYTES_MIN, UNDURABLE_BYTES_MAX,
};
use reprotect_engine::net::credentials::Credentials;
use reprotect_engine::net::identity::is_site_name;
use reprotect_engine::store::journal::ladder::{Ladder, Rung};
use serde::{Deserialize, Serialize};

use crate::retention::RetentionSettings;
use crate::scrub::ScrubSettings;

/// The file as written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RawConfig {
    /// Moves state and admin socket.
    pub state_dir: Option<PathBuf>,
    /// Where agents and process servers dial in.
    pub listen: ListenText,
    /// Addresses written into invitation tokens.
    pub advertise: Vec<AddressText>,
    /// Directories in which `protect` may create disks.
    pub datastores: Vec<PathBuf>,
    /// Flush after this many written bytes.
    pub flush_bytes: ByteSize,
    /// Flush this long after the first unflushed write.
    pub flush_interval: DurationText,
    /// Recovery points.
    pub retention: RetentionConfig,
    /// Points served to NBD clients.
    pub mounts: MountsConfig,
    /// Name of this site for people.
    pub site: Option<String>,
    /// The site's own certificates.
    pub pki: PkiConfig,
    /// Logs.
    pub log: LogConfig,
}

/// The table `retention` as written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RetentionConfig {
    /// The retention folder.
    pub path: Option<PathBuf>,
    /// Length of an undo epoch.
    pub undo_epoch: DurationText,
    /// How long the redo log is kept.
    pub any_write: DurationText,
    /// How long every undo epoch's end is kept.
    pub every_epoch: DurationText,
    /// What is kept beyond that.
    pub rungs: Vec<String>,
    /// How long points are kept.
    pub keep: DurationText,
    /// What a full drive does not take.
    pub guaranteed: DurationText,
    /// What stays free on the drive.
    pub reserve: ByteSize,
    /// Length of a segment of the redo log.
    pub segment_bytes: ByteSize,
    /// Speed of the scrub.
    pub scrub_mib_per_s: u32,
    /// Between two rounds of the scrub.
    pub scrub_pause: DurationText,
}

/// The table `mounts` as written.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MountsConfig {
    /// Where NBD clients connect.
    pub listen: Option<IpAddr>,
    /// Certificates for them.
    pub tls_dir: Option<PathBuf>,
}

impl Default for RetentionConfig {
    fn default() -> Self {
        const HOUR: u64 = 3600;
        Self {
            path: None,
            undo_epoch: DurationText(Duration::from_secs(300)),
            any_write: DurationText(Duration::from_secs(2 * HOUR)),
            every_epoch: DurationText(Duration::from_secs(4 * HOUR)),
            rungs: vec!["1h until 24h".to_owned(), "4h until 7d".to_owned(), "1d until 30d".to_owned()],
            keep: DurationText(Duration::from_secs(24 * HOUR)),
            guaranteed: DurationText(Duration::from_secs(2 * HOUR)),
            reserve: ByteSize(2 << 30),
            segment_bytes: ByteSize(SEGMENT_BYTES_DEFAULT),
            scrub_mib_per_s: 4,
            scrub_pause: DurationText(Duration::from_secs(HOUR)),
        }
    }
}

impl Default for RawConfig {
    fn default() -> Self {
        Self {
            state_dir: None,
            listen: ListenText::ANY,
            advertise: Vec::new(),
            datastores: Vec::new(),
            flush_bytes: ByteSize(PROGRESS_BYTES),
            flush_interval: DurationText(Duration::from_nanos(PROGRESS_NANOS)),
            retention: RetentionConfig::default(),
            mounts: MountsConfig::default(),
            site: None,
            pki: PkiConfig::default(),
            log: LogConfig::default(),
        }
    }
}

/// Every key, for the commented default file.
pub const KEYS: [KeyDoc; 25] = [
    KeyDoc {
        key: "state_dir",
        about: "Where the certificate authority, the machines and their progress are kept; setting it moves the admin socket there too.",
        unit: "absolute path; default /var/lib/reprotect/master-target with the socket /run/reprotect/master-target.sock",
        cost: "a few megabytes of disk; back it up, it holds the certificate authority",
        example: "\"/var/lib/reprotect/master-target\"",
    },
    KeyDoc {
        key: "listen",
        about: "Where agents and process servers dial in, UDP and TCP.",
        unit: "IP address with or without a port (default 7443); [::] takes IPv4 too",
        cost: "none",
        example: "",
    },
    KeyDoc {
        key: "advertise",
        about: "Addresses of this target as the others see it, written into invitation tokens; empty: this machine's own addresses.",
        unit: "list of \"host\" or \"host:port\" (default: the port of listen)",
        cost: "none",
        example: "",
    },
    KeyDoc {
        key: "datastores",
        about: "Directories in which `protect --datastore` may create disks; empty: any.",
        unit: "list of absolute paths",
        cost: "none",
        example: "",
    },
    KeyDoc {
        key: "flush_bytes",
        about: "A disk is flushed and its progress recorded after this many written bytes.",
        unit: "size from 1 MiB to 96 MiB",
        cost: "larger flushes less often and sends more twice after a kill; no memory",
        example: "",
    },
    KeyDoc {
        key: "flush_interval",
        about: "A disk is flushed at the latest this long after its first unflushed write.",
        unit: "duration from 10ms to 60s",
        cost: "longer means fewer flushes and later durable acknowledgements",
        example: "",
    },
    KeyDoc {
        key: "site",
        about: "Name of this site, shown to operators and written into the certificate authority when it is created.",
        unit: "1 to 63 of a-z, 0-9, '.' and '-'",
        cost: "none",
        example: "\"lyon\"",
    },
    KeyDoc {
        key: "retention.path",
        about: "The retention folder: redo log and before-images. Without it a disk can be had at its newest state only.",
        unit: "absolute path of a folder on a drive of its own",
        cost: "disk space for the changes of the whole retention",
        example: "\"/retention\"",
    },
    KeyDoc {
        key: "retention.undo_epoch",
        about: "A point that outlives the redo log is made at the first mark after this long.",
        unit: "duration from 1s to 24h; below 1m only for trials",
        cost: "shorter keeps more before-images",
        example: "",
    },
    KeyDoc {
        key: "retention.any_write",
        about: "The redo log is kept this long; within it every mark can be had.",
        unit: "duration from 0s to 30d",
        cost: "disk space for every change of that time, as it was sent",
        example: "",
    },
    KeyDoc {
        key: "retention.every_epoch",
        about: "The end of every undo epoch is kept this long; at least as long as any_write.",
        unit: "duration from 0s to 30d",
        cost: "disk space: runs are merged only when they are older",
        example: "",
    },
    KeyDoc {
        key: "retention.rungs",
        about: "Older points are thinned: one in each stretch of this length, until this age. The best stays: one that all disks of the machine have, then application-consistent ones, then the newest. Named and pinned points are not thinned.",
        unit: "list of \"EVERY until AGE\", ascending; what is older than keep goes all the same",
        cost: "disk space for what was overwritten between two of them",
        example: "",
    },
    KeyDoc {
        key: "retention.guaranteed",
        about: "When the drive fills up, points younger than this go last.",
        unit: "duration from 0s to 365d",
        cost: "a longer one stops replication earlier on a full drive",
        example: "",
    },
    KeyDoc {
        key: "retention.reserve",
        about: "Bytes of the retention drive that stay free, so that a full one can still recover and expire; at most a twentieth of what the journal may have.",
        unit: "size from 0 to 1 TiB",
        cost: "that much disk space",
        example: "",
    },
    KeyDoc {
        key: "retention.keep",
        about: "Points older than this are forgotten, unless they are pinned.",
        unit: "duration from 1m to 365d",
        cost: "disk space for what was overwritten in that time",
        example: "",
    },
    KeyDoc {
        key: "retention.segment_bytes",
        about: "Length of a file of the redo log; each is written once as a whole before it is used.",
        unit: "size from 32 MiB to 4 GiB",
        cost: "at least three of them are there from the start",
        example: "",
    },
    KeyDoc {
        key: "retention.scrub_mib_per_s",
        about: "Undo runs, redo log and targets are read again at this speed, a quarter of it while the disks have work; finds rot, and writes to a target by somebody else.",
        unit: "MiB per second from 1 to 10000, or 0 for no scrub",
        cost: "this much reading; 1 MiB per GiB of the targets in the retention folder for their checksums",
        example: "",
    },
    KeyDoc {
        key: "retention.scrub_pause",
        about: "Pause between the end of one round of the scrub and the beginning of the next.",
        unit: "duration from 1s to 30d",
        cost: "longer finds damage later",
        example: "",
    },
    KeyDoc {
        key: "mounts.listen",
        about: "Mounted points are served over TCP on this address, each on a port of its own; without it on Unix sockets of this machine.",
        unit: "IP address of this machine; any but loopback needs mounts.tls_dir",
        cost: "whoever may connect reads whole disks",
        example: "\"10.0.0.5\"",
    },
    KeyDoc {
        key: "mounts.tls_dir",
        about: "Folder with ca-cert.pem (who may connect), server-cert.pem and server-key.pem, as qemu and libvirt lay it out.",
        unit: "absolute path; the key readable by its owner only",
        cost: "some CPU for each byte read",
        example: "\"/etc/pki/qemu\"",
    },
    PKI_KEYS[0],
    PKI_KEYS[1],
    PKI_KEYS[2],
    LOG_KEYS[0],
    LOG_KEYS[1],
];

/// What the master target runs with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// State directory and admin socket.
    pub places: Places,
    /// The file these came from, read again on SIGHUP.
    pub config_path: PathBuf,
    /// Where agents and process servers dial in.
    pub listen: SocketAddr,
    /// Addresses for invitation tokens; empty means this machine's own.
    pub advertise: Vec<HostPort>,
    /// Directories in which disks may be created; empty means any.
    pub datastores: Vec<PathBuf>,
    /// Flush after this many written bytes.
    pub flush_bytes: u64,
    /// Flush this long after the first unflushed write.
    pub flush_interval: Duration,
    /// The retention folder and how long it keeps what; `None`: newest state only.
    pub retention: Option<(PathBuf, RetentionSettings)>,
    /// Where mounted points are served.
    pub mounts: MountsConfig,
    /// Name of this site.
    pub site: Option<String>,
    /// Identity and roots.
    pub credentials: Credentials,
    /// Logs.
    pub log: LogConfig,
}

impl Settings {
    /// Loads and resolves the file that the command line's `overrides` lead to.
    ///
    /// # Errors
    /// Names file, line, key, what is wrong and what to write.
    pub fn load(overrides: &Overrides) -> Result<Self, ConfigError> {
        Self::resolve(&overrides.load(Program::MasterTarget)?, overrides)
    }

    /// Resolves a loaded file.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn resolve(loaded: &Loaded<RawConfig>, overrides: &Overrides) -> Result<Self, ConfigError> {
        let raw = &loaded.raw;
        if let Some(path) = raw.datastores.iter().find(|path| path.is_relative()) {
            let what = format!("{} is a relative path", path.display());
            return Err(loaded.invalid("datastores", what, "write an absolute one"));
        }
        if let Some(site) = raw.site.as_ref().filter(|site| !is_site_name(site)) {
            let what = format!("\"{site}\" is no site name");
            return Err(loaded.invalid("site", what, "write 1 to 63 of a-z, 0-9, '.' and '-'"));
        }
        let listen = raw.listen.with_default_port(MASTER_TARGET_PORT);
        // Half of what may be undurable, so that writing goes on while a flush runs.
        let flush_range = ByteSize(1 << 20)..=ByteSize(UNDURABLE_BYTES_MAX / 2);
        let interval_range = DurationText(Duration::from_millis(10))..=DurationText(Duration::from_secs(60));
        let places = overrides.places(Program::MasterTarget, loaded, raw.state_dir.as_deref())?;
        Ok(Self {
            credentials: Credentials::new(&places.state_dir, pki::resolve(loaded, &raw.pki)?),
            places,
            config_path: loaded.path().to_owned(),
            listen,
            advertise: loaded.addresses("advertise", &raw.advertise, listen.port())?,
            datastores: raw.datastores.clone(),
            flush_bytes: loaded.in_range("flush_bytes", raw.flush_bytes, &flush_range)?.0,
            flush_interval: loaded.in_range("flush_interval", raw.flush_interval, &interval_range)?.0,
            retention: resolve_retention(loaded)?,
            mounts: resolve_mounts(loaded)?,
            site: raw.site.clone(),
            log: logging::resolve(loaded, &raw.log, overrides.log_level.as_deref())?,
        })
    }
}

fn resolve_mounts(loaded: &Loaded<RawConfig>) -> Result<MountsConfig, ConfigError> {
    let raw = loaded.raw.mounts.clone();
    if raw.tls_dir.is_none() && raw.listen.is_some_and(|listen| !listen.is_loopback()) {
        let what = "NBD without TLS is readable by anybody on the way".to_owned();
        return Err(loaded.invalid("mounts.listen", what, "set mounts.tls_dir, or write 127.0.0.1"));
    }
    if let Some(path) = raw.tls_dir.as_ref().filter(|path| path.is_relative()) {
        let what = format!("{} is a relative path", path.display());
        return Err(loaded.invalid("mounts.tls_dir", what, "write an absolute one"));
    }
    Ok(raw)
}

fn resolve_ladder(loaded: &Loaded<RawConfig>) -> Result<Ladder, ConfigError> {
    const DAY: u64 = 24 * 3600;
    let raw = &loaded.raw.retention;
    let seconds = |from, to| DurationText(Duration::from_secs(from))..=DurationText(Duration::from_secs(to));
    let any_write = loaded.in_range("retention.any_write", raw.any_write, &seconds(0, 30 * DAY))?.0;
    let every_epoch = loaded.in_range("retention.every_epoch", raw.every_epoch, &seconds(0, 30 * DAY))?.0;
    let rungs = rungs(&raw.rungs)
        .map_err(|what| loaded.invalid("retention.rungs", what, "write for example \"1h until 24h\""))?;
    Ok(Ladder {
        any_write,
        every_epoch: every_epoch.max(any_write),
        rungs,
        keep: loaded.in_range("retention.keep", raw.keep, &seconds(60, 365 * DAY))?.0,
        guaranteed: loaded.in_range("retention.guaranteed", raw.guaranteed, &seconds(0, 365 * DAY))?.0,
    })
}

/// Reads rungs like `1h until 24h`.
///
/// # Errors
/// Says which is wrong and how.
pub fn rungs(texts: &[String]) -> Result<Vec<Rung>, String> {
    let mut rungs: Vec<Rung> = Vec::new();
    for text in texts {
        let (every, until) = text.split_once(" until ").ok_or_else(|| format!("{text} is no rung"))?;
        let duration = |part: &str| {
            part.trim().parse::<DurationText>().map(|duration| duration.0).map_err(|error| error.to_string())
        };
        let rung = Rung { every: duration(every)?, until: duration(until)? };
        if rung.every.is_zero() || rung.until < rung.every {
            return Err(format!("{text} keeps nothing"));
        }
        if rungs.last().is_some_and(|last| last.until >= rung.until || last.every > rung.every) {
            return Err(format!("{text} is not longer than the one before it"));
        }
        rungs.push(rung);
    }
    Ok(rungs)
}

fn resolve_retention(
    loaded: &Loaded<RawConfig>,
) -> Result<Option<(PathBuf, RetentionSettings)>, ConfigError> {
    let raw = &loaded.raw.retention;
    let seconds = |from, to| DurationText(Duration::from_secs(from))..=DurationText(Duration::from_secs(to));
    const DAY: u64 = 24 * 3600;
    let sizes = ByteSize(SEGMENT_BYTES_MIN)..=ByteSize(4 << 30);
    let settings = RetentionSettings {
        undo_epoch: loaded.in_range("retention.undo_epoch", raw.undo_epoch, &seconds(1, DAY))?.0,
        ladder: resolve_ladder(loaded)?,
        reserve_bytes: loaded
            .in_range("retention.reserve", raw.reserve, &(ByteSize(0)..=ByteSize(1 << 40)))?
            .0,
        segment_bytes: loaded.in_range("retention.segment_bytes", raw.segment_bytes, &sizes)?.0,
        scrub: resolve_scrub(loaded)?,
    };
    let Some(path) = &raw.path else { return Ok(None) };
    if path.is_relative() {
        let what = format!("{} is a relative path", path.display());
        return Err(loaded.invalid("retention.path", what, "write an absolute one"));
    }
    Ok(Some((path.clone(), settings)))
}

fn resolve_scrub(loaded: &Loaded<RawConfig>) -> Result<ScrubSettings, ConfigError> {
    let raw = &loaded.raw.retention;
    if raw.scrub_mib_per_s > 10_000 {
        let what = format!("{} is too large", raw.scrub_mib_per_s);
        return Err(loaded.invalid("retention.scrub_mib_per_s", what, "write a number from 0 to 10000"));
    }
    let pauses = DurationText(Duration::from_secs(1))..=DurationText(Duration::from_secs(30 * 24 * 3600));
    Ok(ScrubSettings {
        bytes_per_second: u64::from(raw.scrub_mib_per_s) << 20,
        pause: loaded.in_range("retention.scrub_pause", raw.scrub_pause, &pauses)?.0,
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use reprotect_engine::host::{config, config_doc};

    use super::*;

    fn resolve(text: &str) -> Result<Settings, ConfigError> {
        let loaded = config::parse(Path::new("mt.toml"), text.to_owned())?;
        Settings::resolve(&loaded, &Overrides::default())
    }

    #[test]
    fn every_key_is_documented_and_the_commented_default_is_the_default() {
        assert_eq!(config_doc::undocumented::<RawConfig>(&KEYS), Vec::<String>::new());
        let text = config_doc::render::<RawConfig>("Master target", &KEYS).unwrap();
        assert_eq!(resolve(&text).unwrap(), resolve("").unwrap());
        let active = config_doc::uncommented(&text);
        assert!(active.contains("\nflush_interval = \"1s\"\n"), "{active}");
        assert_eq!(resolve(&active).unwrap(), resolve("").unwrap());
    }

    #[test]
    fn advertised_addresses_take_the_port_listened_on() {
        assert_eq!(resolve("").unwrap().listen.to_string(), "[::]:7443");
        let settings =
            resolve("listen = \"0.0.0.0:9000\"\nadvertise = [\"home.example\", \"other:1\"]").unwrap();
        let texts: Vec<String> = settings.advertise.iter().map(ToString::to_string).collect();
        assert_eq!(texts, ["home.example:9000", "other:1"]);
    }

    #[test]
    fn values_out_of_range_name_key_line_and_range() {
        for (text, refusal) in [
            (
                "flush_bytes = \"1 GiB\"",
                "mt.toml:1: `flush_bytes`: 1 GiB is too large; write a value from 1 MiB to 96 MiB",
            ),
            (
                "\ndatastores = [\"vm\"]",
                "mt.toml:2: `datastores`: vm is a relative path; write an absolute one",
            ),
            (
                "[mounts]\nlisten = \"10.0.0.5\"",
                "mt.toml:2: `mounts.listen`: NBD without TLS is readable by anybody on the way; set mounts.tls_dir, or write 127.0.0.1",
            ),
            (
                "retention = { rungs = [\"1h\"] }",
                "mt.toml:1: `retention.rungs`: 1h is no rung; write for example \"1h until 24h\"",
            ),
            (
                "site = \"Lyon\"",
                "mt.toml:1: `site`: \"Lyon\" is no site name; write 1 to 63 of a-z, 0-9, '.' and '-'",
            ),
        ] {
            assert_eq!(resolve(text).unwrap_err().to_string(), refusal);
        }
    }
}
