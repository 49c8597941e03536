//! The agent's commands that need no daemon and no data path: `disks` and `check-config`.
//!
//! Invariant: a command prints its result to standard output once, and says in its error what to do.
//! Called by `main`.

use std::path::Path;

use anyhow::Context;
use reprotect_engine::host::config::{ConfigError, Overrides};
use reprotect_engine::host::config_doc;
use reprotect_engine::host::output::Output;
use reprotect_engine::host::preflight::Refusal;
use serde_json::json;

use crate::cli::{CheckConfigArgs, DisksArgs};
use crate::config::{KEYS, RawConfig, Settings};
use crate::disks::{self, Disk, Source, SystemRoot};
use crate::sources;

/// `disks`: the machine's disks with their verdicts, the configuration's wishes applied.
///
/// # Errors
/// When sysfs cannot be read or a wish of the configuration cannot be met.
pub fn disks(settings: &Settings, args: &DisksArgs, output: Output) -> anyhow::Result<()> {
    let root = SystemRoot::default();
    let mut disks = disks::enumerate(&root)?;
    let mut sources = disks::select(&root, &disks, &settings.disks.include, &settings.disks.exclude)?;
    apply_wishes(&mut disks, &sources);
    fingerprint(&mut disks, &mut sources);
    let shown: Vec<&Disk> = disks.iter().filter(|disk| args.all || disk.is_worth_showing()).collect();
    let images: Vec<&Source> =
        sources.iter().filter(|source| !disks.iter().any(|disk| disk.path == source.path)).collect();
    output.result(&json!({ "disks": shown, "images": images }), || disks::render(&shown))?;
    Ok(())
}

/// Fills in what only a look at the content tells: the GUID of the partition table. A disk that may not be opened, or
/// has none, keeps `None`: the listing is for looking, also without root.
fn fingerprint(disks: &mut [Disk], sources: &mut [Source]) {
    let guid = |path: &Path| sources::probe(path).ok()?.gpt_disk_guid;
    for disk in disks.iter_mut().filter(|disk| disk.bytes > 0) {
        disk.fingerprint = guid(&disk.path);
    }
    for source in sources {
        source.fingerprint = match disks.iter().find(|disk| disk.path == source.path) {
            Some(disk) => disk.fingerprint.clone(),
            None => guid(&source.path),
        };
    }
}

/// Shows what the configuration changes about the default.
fn apply_wishes(disks: &mut [Disk], sources: &[Source]) {
    for disk in disks {
        let chosen = sources.iter().any(|source| source.path == disk.path);
        let verdict = &mut disk.verdict;
        if chosen && !verdict.selected {
            verdict.reason = format!("included by the configuration ({})", verdict.reason);
        } else if !chosen && verdict.selected {
            verdict.reason = format!("excluded by the configuration ({})", verdict.reason);
        }
        verdict.selected = chosen;
    }
}

/// `check-config`: resolves the configuration, or prints the commented default.
///
/// # Errors
/// [`ConfigError`] names file, line, key, what is wrong and what to write.
pub fn check_config(overrides: &Overrides, args: &CheckConfigArgs, output: Output) -> anyhow::Result<()> {
    if args.print_default {
        let text = config_doc::render::<RawConfig>("Configuration of reprotect-agent.", &KEYS)
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
        || error.is::<disks::SelectError>()
        || error.downcast_ref::<Refusal>().is_some_and(Refusal::is_usage)
}
