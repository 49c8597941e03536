//! The process server's commands.
//!
//! Invariant: a command prints its result to standard output once (`status --watch` once a second), and says in its
//! error what to do. Called by `main`.

use std::io::IsTerminal;
use std::time::Duration;

use anyhow::Context;
use reprotect_engine::host::admin_client::AdminClient;
use reprotect_engine::host::config::{ConfigError, Overrides};
use reprotect_engine::host::config_doc;
use reprotect_engine::host::output::{self, Align, Output, Table};
use reprotect_engine::host::places::Program;
use reprotect_engine::host::preflight::{Finding, Refusal, insist, report};
use reprotect_engine::host::shutdown::{Shutdown, on_signals, reloads};
use reprotect_engine::host::values::Rate;
use reprotect_engine::net::enroll;
use reprotect_engine::net::identity::{IDENTITY_FILE, Role};
use reprotect_engine::net::token::{Token, TokenError};
use serde_json::json;

use crate::check;
use crate::cli::{CheckConfigArgs, EnrollArgs, RunArgs, StatusArgs};
use crate::config::{KEYS, RawConfig, Settings};
use crate::status::{SessionStatus, Status};
use crate::{daemon, enrolment};

/// How often `status --watch` asks.
const WATCH: Duration = Duration::from_secs(1);

/// `run`: the daemon, in the foreground.
///
/// # Errors
/// When a check fails that was not forced, or the daemon cannot start.
pub async fn run(settings: Settings, args: &RunArgs) -> anyhow::Result<()> {
    // The daemon itself refuses to start without an identity, forced or not.
    let findings: Vec<Finding> =
        check::local(&settings).into_iter().filter(|finding| finding.name != "enrolled").collect();
    insist(Program::ProcessServer, &findings, &check::NAMES, &args.force)?;
    let (trigger, shutdown) = Shutdown::new();
    on_signals(trigger).context("cannot install signal handlers")?;
    let mut reloads = reloads().context("cannot install signal handlers")?;
    tokio::spawn(async move {
        while reloads.changed().await.is_ok() {
            tracing::warn!("SIGHUP: a changed configuration takes effect at the next start of this program");
        }
    });
    daemon::run(settings, shutdown).await?;
    Ok(())
}

/// `enroll`: gets this machine its certificate and keeps the target's addresses.
///
/// # Errors
/// When the token is damaged or refused, or the state directory cannot be written.
pub async fn enroll(settings: &Settings, args: &EnrollArgs, output: Output) -> anyhow::Result<()> {
    let token = Token::from_argument(&args.token)?;
    let state_dir = &settings.places.state_dir;
    settings.places.create_state_dir()?;
    // Before the identity, which is then complete when it is there; not over the addresses of an enrolled machine.
    if token.role == Role::ProcessServer && !state_dir.join(IDENTITY_FILE).exists() {
        enrolment::save_targets(state_dir, &token)?;
    }
    let identity = enroll::enroll(&token, Role::ProcessServer, &daemon::host_name(), state_dir).await?;
    let own = identity.own();
    let answer = json!({
        "peer": own.peer.to_string(),
        "site": own.site,
        "target": token.target.to_string(),
        "addresses": token.addresses,
    });
    output.result(&answer, || {
        format!(
            "enrolled as process server {} of site {}, master target {}\nnext: reprotect-process-server check",
            own.peer,
            own.site,
            token.addresses.join(", ")
        )
    })?;
    Ok(())
}

/// `check`: every preflight check; whether none failed.
///
/// # Errors
/// When the result cannot be printed.
pub async fn check(settings: &Settings, output: Output) -> anyhow::Result<bool> {
    let findings = check::all(settings).await;
    Ok(report(&findings, output)?)
}

/// `status`: what the daemon says of itself, once or every second.
///
/// # Errors
/// When no daemon answers.
pub async fn status(settings: &Settings, args: &StatusArgs, output: Output) -> anyhow::Result<()> {
    let client = AdminClient::new(Program::ProcessServer, &settings.places.socket);
    loop {
        let status: Status = client.get_json("/v1/status").await?;
        if args.watch && !output.json() && std::io::stdout().is_terminal() {
            print!("\x1b[H\x1b[2J"); // home and clear, as `watch` does
        }
        output.result(&status, || render(&status))?;
        if !args.watch {
            return Ok(());
        }
        tokio::time::sleep(WATCH).await;
    }
}

fn ratio(value: Option<f64>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| format!("{value:.2}"))
}

fn render(status: &Status) -> String {
    let totals = &status.totals;
    let mut text = format!(
        "process server {} ({}) on {}, up {}\nlevel {}{}, {} workers; memory {} of {} promised\n\
         {} sessions now, {} since the start, {} refused; {} plain relayed as {} (ratio {})\n",
        status.peer,
        status.version,
        status.listen,
        output::duration(Duration::from_secs(status.uptime_seconds)),
        status.level,
        if status.adaptive { " (adaptive)" } else { "" },
        status.workers,
        output::bytes(status.reserved_bytes),
        output::bytes(status.memory_bytes),
        status.sessions.len(),
        totals.sessions,
        totals.refused,
        output::bytes(totals.traffic.plain_bytes),
        output::bytes(totals.traffic.batch_bytes),
        ratio(totals.traffic.ratio()),
    );
    if let Some(rate) = status.send_rate {
        text.push_str(&format!("at most {} to the master targets now\n", Rate(Some(rate))));
    }
    if !status.sessions.is_empty() {
        text.push('\n');
        text.push_str(&sessions_table(&status.sessions));
    }
    text
}

fn sessions_table(sessions: &[SessionStatus]) -> String {
    let mut table = Table::new(&[
        ("AGENT", Align::Left),
        ("FROM", Align::Left),
        ("DISKS", Align::Right),
        ("HELD", Align::Right),
        ("WINDOW", Align::Right),
        ("IN", Align::Right),
        ("OUT", Align::Right),
        ("RATIO", Align::Right),
        ("PLAIN/S", Align::Right),
        ("TARGET", Align::Left),
    ]);
    for session in sessions {
        let rate: u64 = session.disks.iter().filter_map(|disk| disk.bytes_per_second).sum();
        table.row([
            session.agent.clone(),
            session.address.clone(),
            session.disks.len().to_string(),
            output::bytes(session.held_bytes),
            output::bytes(session.window_bytes),
            output::bytes(session.traffic.from_agent_bytes),
            output::bytes(session.traffic.to_target_bytes),
            ratio(session.ratio),
            output::bytes(rate),
            session.target.clone().unwrap_or_else(|| "connecting".to_owned()),
        ]);
    }
    table.render()
}

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
        || error.is::<TokenError>()
        || error.downcast_ref::<Refusal>().is_some_and(Refusal::is_usage)
}
