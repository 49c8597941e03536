//! `check-config`: whether the configuration holds, or the commented default.
//!
//! Invariant: needs neither daemon nor state, so that it works where nothing else does yet. Called by the dispatcher.

use anyhow::Context;
use reprotect_engine::host::config::Overrides;
use reprotect_engine::host::config_doc;
use reprotect_engine::host::output::Output;
use serde_json::json;

use crate::cli::CheckConfigArgs;
use crate::config::{KEYS, RawConfig, Settings};

/// `check-config`: resolves the configuration, or prints the commented default.
///
/// # Errors
/// Names file, line, key, what is wrong and what to write.
pub fn check_config(overrides: &Overrides, args: &CheckConfigArgs, output: Output) -> anyhow::Result<()> {
    if args.print_default {
        let text = config_doc::render::<RawConfig>("Configuration of reprotect-master-target.", &KEYS)
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
