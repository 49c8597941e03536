//! What the agent runs by: settings, sources and addresses, made once at the start and again on SIGHUP.
//!
//! Invariants: a plan is whole and never changed, only replaced; a configuration that is refused leaves the plan in
//! force and is named in the status. Called by `daemon`; followed by `machine` and by the dialling loop.

use std::sync::Arc;

use anyhow::Context;
use reprotect_engine::host::values::HostPort;
use tokio::sync::watch;

use crate::config::Settings;
use crate::sources::{self, Sources};

/// File with the addresses of the invitation, one a line.
pub const UPSTREAM_FILE: &str = "upstream";

/// The plan in force.
pub type Plans = watch::Receiver<Arc<Plan>>;

/// What to do.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The configuration.
    pub settings: Settings,
    /// The machine's sources.
    pub sources: Sources,
    /// Whom to dial, in order; never empty.
    pub upstream: Vec<String>,
    /// What was asked for and cannot be had.
    pub warnings: Vec<String>,
}

impl Plan {
    /// The plan that follows from `settings`. Blocks.
    ///
    /// # Errors
    /// When the disks cannot be listed or nobody is there to dial.
    pub fn make(settings: Settings) -> anyhow::Result<Self> {
        let upstream = upstream(&settings)?;
        let found = sources::find(&settings.disks)?;
        for problem in &found.problems {
            tracing::warn!("{problem}");
        }
        Ok(Self { settings, sources: found.sources, upstream, warnings: found.problems })
    }
}

/// Where to dial: as configured, else as the invitation said.
///
/// # Errors
/// When neither names anybody.
pub fn upstream(settings: &Settings) -> anyhow::Result<Vec<String>> {
    if !settings.upstream.is_empty() {
        return Ok(settings.upstream.iter().map(HostPort::to_string).collect());
    }
    let path = settings.places.state_dir.join(UPSTREAM_FILE);
    let text = std::fs::read_to_string(&path).with_context(|| {
        format!(
            "no upstream is configured and {} cannot be read; write `upstream` into the configuration",
            path.display()
        )
    })?;
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let addresses: Vec<String> = lines.map(str::to_owned).collect();
    anyhow::ensure!(
        !addresses.is_empty(),
        "{} is empty; write `upstream` into the configuration",
        path.display()
    );
    Ok(addresses)
}

/// Replaces the plan whenever `reloads` counts on.
pub async fn follow_reloads(mut reloads: watch::Receiver<u64>, plans: watch::Sender<Arc<Plan>>) {
    while reloads.changed().await.is_ok() {
        let settings = plans.borrow().settings.clone();
        let made = tokio::task::spawn_blocking(move || {
            let changed = settings.reload()?;
            if changed.memory_bytes != settings.memory_bytes
                || changed.compress_level != settings.compress_level
            {
                tracing::warn!("`memory` and `compress_level` hold from the next start of the agent");
            }
            let (memory_bytes, compress_level) = (settings.memory_bytes, settings.compress_level);
            Plan::make(Settings { memory_bytes, compress_level, ..changed })
        });
        let refused = match made.await {
            Ok(Ok(plan)) => {
                tracing::info!("configuration read again");
                plans.send_replace(Arc::new(plan));
                continue;
            }
            Ok(Err(error)) => format!("{error:#}"),
            Err(error) => error.to_string(),
        };
        tracing::error!("the configuration is refused and the old one stays in force: {refused}");
        plans.send_modify(|plan| {
            let warnings =
                vec![format!("the configuration is refused and the old one stays in force: {refused}")];
            *plan = Arc::new(Plan { warnings, ..Plan::clone(plan) });
        });
    }
}
