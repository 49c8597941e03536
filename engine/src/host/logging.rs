//! Logs: to standard error, for people or as JSON lines.
//!
//! Invariants: standard output belongs to a command's result and never carries a log line; the level is checked when
//! the configuration is resolved, not when the first line is lost. Called by the programs' `main`.

use std::io::IsTerminal;

use serde::{Deserialize, Serialize};
use tracing_subscriber::EnvFilter;

use super::config::{ConfigError, Loaded};
use super::config_doc::KeyDoc;

/// How a log line looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// One line of text.
    #[default]
    Human,
    /// One JSON object per line.
    Json,
}

/// The `[log]` table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogConfig {
    /// `error`, `warn`, `info`, `debug`, `trace`, or directives such as `info,reprotect_engine=debug`.
    pub level: String,
    /// For people or for machines.
    pub format: LogFormat,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { level: "info".to_owned(), format: LogFormat::Human }
    }
}

/// The descriptions of the `[log]` table's keys.
pub const LOG_KEYS: [KeyDoc; 2] = [
    KeyDoc {
        key: "log.level",
        about: "What is logged to standard error; --log-level wins over it.",
        unit: "error, warn, info, debug, trace, or directives such as \"info,reprotect_engine=debug\"",
        cost: "debug and trace log every batch and cost throughput",
        example: "",
    },
    KeyDoc {
        key: "log.format",
        about: "How a log line looks: text for people or one JSON object per line.",
        unit: "human or json",
        cost: "none",
        example: "",
    },
];

/// Checks `log` with the command line's `--log-level`, which wins.
///
/// # Errors
/// Names `log.level` and what to write.
pub fn resolve<T>(
    loaded: &Loaded<T>,
    log: &LogConfig,
    level: Option<&str>,
) -> Result<LogConfig, ConfigError> {
    let level = level.unwrap_or(&log.level);
    match check_level(level) {
        Ok(()) => Ok(LogConfig { level: level.to_owned(), format: log.format }),
        Err(what) => Err(loaded.invalid("log.level", what, "write error, warn, info, debug or trace")),
    }
}

/// Whether `level` is one.
///
/// # Errors
/// What is wrong with it.
pub fn check_level(level: &str) -> Result<(), String> {
    // A lone word is a target to the filter's grammar, which would silently log nothing: only levels are taken.
    let word = level.trim();
    let lone = !word.contains(['=', ',', '[']);
    if lone && !["off", "error", "warn", "info", "debug", "trace"].contains(&word) {
        return Err(format!("\"{level}\" is not a level"));
    }
    EnvFilter::try_new(level).map(|_| ()).map_err(|error| format!("\"{level}\" is not a level ({error})"))
}

/// Starts logging for this process; a second call (several daemons in one test process) keeps the first.
pub fn init(log: &LogConfig) {
    let filter = EnvFilter::try_new(&log.level).unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    // An error means that logging was started before, which is wanted.
    let _ = match log.format {
        LogFormat::Human => builder.with_target(false).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_checked_before_a_line_is_lost() {
        for good in ["info", "off", "info,reprotect_engine=debug", "reprotect_agent=trace"] {
            assert_eq!(check_level(good), Ok(()), "{good}");
        }
        for wrong in ["", "verbose", "info,x=loud"] {
            assert!(check_level(wrong).is_err(), "{wrong}");
        }
    }
}
