//! `run`: the daemon in the foreground.
//!
//! Invariants: SIGTERM and SIGINT stop it cleanly, a second one at once; SIGHUP reads the configuration again; what
//! keeps it from starting is an error with a remedy and exit status 1. Called by the dispatcher.

use anyhow::Context as _;
use reprotect_engine::host::config::Overrides;
use reprotect_engine::host::places::Program;
use reprotect_engine::host::preflight::insist;
use reprotect_engine::host::shutdown::{Shutdown, on_signals, reloads};
use reprotect_engine::host::{logging, open_files};

use crate::checks::preflight;
use crate::cli::RunArgs;
use crate::config::Settings;
use crate::daemon::{self, Reload};

/// Runs the daemon until a signal.
///
/// # Errors
/// When something it needs cannot be had.
pub fn run(settings: Settings, overrides: Overrides, args: &RunArgs) -> anyhow::Result<()> {
    logging::init(&settings.log);
    open_files::raise_limit();
    insist(Program::MasterTarget, &preflight(&settings), &[], &args.force)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .thread_name("net")
        .enable_all()
        .build()
        .context("the system gives no threads or no event queue; raise the limits of this service")?;
    runtime.block_on(async {
        let (trigger, shutdown) = Shutdown::new();
        on_signals(trigger).context("the signal handlers cannot be installed")?;
        let asked = reloads().context("the signal handlers cannot be installed")?;
        daemon::run_reloading(settings, shutdown, Some(Reload { asked, overrides })).await
    })
}
