//! The process server's commands that need no daemon and no data path: `check-config`.
//!
//! Invariant: a command prints its result to standard output once, and says in its error what to do.
//! Called by `main`.

use anyhow::Context;
use reprotect_engine::host::config::{ConfigError, Overrides};
use reprotect_engine::host::config_doc;
use reprotect_engine::host::output::Output;
use serde_json::json;

use crate::cli::CheckConfigArgs;
use crate::config::{KEYS, RawConfig, Settings};

/// `check-config`: resolves the configuration, or prints the commented default.
///
/// # Errors
/// [`ConfigError`] names file, line, key, what is wrong and what to write.
pub fn check_config(overrides: &Overrides, args: &CheckConfigArgs, output: Output) -> anyhow::Result<()> {
    if args.print_default {
        let text = config_doc::render::<RawConfig>("Configuration of reprotect-process-server.", &KEYS)
            .context("the default configuration cannot be written as TOML; report this as a defect")?;
        output.result(&json!({ "default": text }), || text.clone())?;
        return Ok(());
    }
    let settings = Settings::load(overrides)?;
    let path = settings.config_path.display().to_string();
    let found = settings.config_path.exists();
    output.result(&json!({ "config": path, "found": found, "valid": true }), || {
        if found { format!("{path}: valid") } else { format!("{path}: does not exist, the defaults hold") }
    })?;
    Ok(())
}

/// Whether `error` is the operator's command line or configuration, which has its own exit status.
#[must_use]
pub fn is_usage(error: &anyhow::Error) -> bool {
    error.is::<ConfigError>()
}
