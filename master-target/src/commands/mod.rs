//! The master target's commands, one file each; `main` dispatches to them.
//!
//! Invariants: a command prints its result to standard output once and everything else to standard error, says in its
//! error what to do, and asks before it destroys anything; without a terminal it never waits for an answer. Commands
//! that need the daemon talk to its admin socket; `run`, `check-config`, `check`, `inspect` and `journal` need none.

pub mod ask;
pub mod check;
pub mod config;
pub mod copies;
pub mod failback;
pub mod inspect;
pub mod journal;
pub mod peers;
pub mod points;
pub mod policy;
pub mod protect;
pub mod receipts;
pub mod retention;
pub mod run;
pub mod status;
pub mod timeline;

use std::time::Duration;

use anyhow::Context as _;
use reprotect_engine::host::admin_client::AdminClient;
use reprotect_engine::host::config::ConfigError;
use reprotect_engine::host::output::{EXIT_FAILED, EXIT_OK, EXIT_USAGE, Output};
use reprotect_engine::host::places::Program;
use reprotect_engine::host::preflight::Refusal;

use crate::cli::{Cli, Command};
use crate::config::Settings;
use crate::explain::explain;

/// How long a command waits for the daemon: creating and examining disks on a slow datastore takes its time.
const DAEMON_WAIT: Duration = Duration::from_secs(600);

/// What every command works with.
#[derive(Debug)]
pub struct Context {
    /// The configuration.
    pub settings: Settings,
    /// How results are printed.
    pub output: Output,
}

impl Context {
    /// The daemon of this configuration.
    #[must_use]
    pub fn daemon(&self) -> AdminClient {
        AdminClient::new(Program::MasterTarget, &self.settings.places.socket).with_wait(DAEMON_WAIT)
    }

    /// What the operator has to know besides the result, also where that is piped on.
    fn tell(&self, note: Option<&str>) {
        if let Some(note) = note.filter(|_| !self.output.json()) {
            eprintln!("{}: {note}", Program::MasterTarget);
        }
    }
}

/// Runs the command of a parsed command line; answers the exit status, errors already printed.
#[must_use]
pub fn dispatch(cli: Cli) -> u8 {
    match carry_out(cli) {
        Ok(status) => status,
        Err(error) => {
            eprintln!("{}: {}", Program::MasterTarget, explain(&error));
            if error.is::<ConfigError>() || error.downcast_ref::<Refusal>().is_some_and(Refusal::is_usage) {
                EXIT_USAGE
            } else {
                EXIT_FAILED
            }
        }
    }
}

fn carry_out(cli: Cli) -> anyhow::Result<u8> {
    let output = Output::new(cli.global.json);
    let overrides = cli.global.overrides();
    if let Command::CheckConfig(args) = &cli.command {
        return config::check_config(&overrides, args, output).map(|()| EXIT_OK);
    }
    if let Command::Check(_) = &cli.command {
        return check::check(&overrides, output);
    }
    if let Command::Journal(args) = &cli.command {
        return journal::journal(args, output).map(exit_status);
    }
    let settings = Settings::load(&overrides)?;
    let context = Context { settings, output };
    match cli.command {
        Command::Run(args) => run::run(context.settings, overrides, &args)?,
        Command::Invite(args) => wait(peers::invite(&context, &args))?,
        Command::Revoke(args) => wait(peers::revoke(&context, &args))?,
        Command::Machines(_) => wait(peers::machines(&context))?,
        Command::Protect(args) => wait(protect::protect(&context, &args))?,
        Command::Unprotect(args) => wait(peers::unprotect(&context, &args))?,
        Command::Policy(args) => wait(policy::policy(&context, &args))?,
        Command::Points(args) => wait(points::points(&context, &args))?,
        Command::Timeline(args) => wait(timeline::timeline(&context, &args))?,
        Command::Receipts(args) => wait(receipts::receipts(&context, &args))?,
        Command::Pin(args) => wait(points::pin(&context, &args))?,
        Command::Unpin(args) => wait(points::unpin(&context, &args))?,
        Command::Retention(args) => wait(retention::retention(&context, &args))?,
        Command::Mount(args) => wait(points::mount(&context, &args))?,
        Command::Unmount(args) => wait(points::unmount(&context, &args))?,
        Command::Rollback(args) => wait(points::rollback(&context, &args))?,
        Command::Failback(args) => wait(failback::failback(&context, &args))?,
        Command::Export(args) => wait(copies::export(&context, &args))?,
        Command::Verify(args) => return wait(copies::verify(&context, &args)).map(exit_status),
        Command::Status(args) => wait(status::status(&context, &args))?,
        Command::Journal(_) => {}     // above: it needs no configuration
        Command::CheckConfig(_) => {} // above: it must work when the configuration does not
        Command::Inspect(args) => inspect::inspect(&args, context.output)?,
        Command::Check(_) => {} // above, for the same reason
    }
    Ok(EXIT_OK)
}

/// Whether all was well, as an exit status.
const fn exit_status(sound: bool) -> u8 {
    if sound { EXIT_OK } else { EXIT_FAILED }
}

/// Runs a command's conversation with the daemon.
fn wait<T>(command: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("the system gives no event queue; raise the limit of open files (ulimit -n)")?;
    runtime.block_on(command)
}
