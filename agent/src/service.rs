//! The agent's commands around the running daemon: `run`, `check`, `enroll`, `status`, `mark`, `unfollow`.
//!
//! Invariant: a command prints its result to standard output once, and says in its error what to do.
//! Called by `main`.

use std::time::{Duration, Instant};

use anyhow::Context;
use reprotect_engine::host::admin_client::AdminClient;
use reprotect_engine::host::output::{self, Align, Output, Table};
use reprotect_engine::host::places::Program;
use reprotect_engine::host::preflight::{insist, report};
use reprotect_engine::host::run_lock::RunLock;
use reprotect_engine::host::shutdown::{Shutdown, on_signals};
use reprotect_engine::host::values::Rate;
use reprotect_engine::io::durable::{Access, replace_file};
use reprotect_engine::net::enroll::enroll as enroll_at;
use reprotect_engine::net::identity::Role;
use reprotect_engine::net::token::Token;
use serde_json::json;

use crate::api::{DiskInfo, MarkAnswer, MarkRequest, StatusInfo, UpstreamInfo};
use crate::capture;
use crate::check;
use crate::cli::{EnrollArgs, MarkArgs, RunArgs, StatusArgs};
use crate::config::Settings;
use crate::daemon;
use crate::health::HealthEvent;
use crate::plan::UPSTREAM_FILE;

/// How often `status --watch` looks.
const WATCH: Duration = Duration::from_millis(500);

/// How long `mark` waits: reading large disks takes its time.
const MARK_WAIT: Duration = Duration::from_secs(7 * 86_400);

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("the system gives no threads; raise the limit on processes")
}

/// `run`: the daemon, in the foreground, until a signal; SIGHUP reads the configuration again.
///
/// # Errors
/// When a preflight check fails that is not forced, or something the daemon needs cannot be had.
pub fn run(settings: Settings, args: &RunArgs) -> anyhow::Result<()> {
    insist(Program::Agent, &check::before_run(&settings), &check::NAMES, &args.force)?;
    let runtime = runtime()?;
    runtime.block_on(async {
        let (trigger, shutdown) = Shutdown::new();
        on_signals(trigger)?;
        daemon::run(settings, shutdown).await
    })?;
    // Reader and worker threads hold nothing that must be saved.
    runtime.shutdown_timeout(Duration::from_secs(1));
    Ok(())
}

/// `check`: every preflight check.
///
/// # Errors
/// When one of them fails.
pub fn check(settings: &Settings, output: Output) -> anyhow::Result<()> {
    let findings = runtime()?.block_on(check::all(settings));
    anyhow::ensure!(report(&findings, output)?, "not ready; do what the remedies say");
    Ok(())
}

/// `enroll`: this machine's certificate, for a token of the master target.
///
/// # Errors
/// When the token does not fit or the target refuses.
pub fn enroll(settings: &Settings, args: &EnrollArgs, output: Output) -> anyhow::Result<()> {
    let token = Token::from_argument(&args.token)?;
    settings.places.create_state_dir()?;
    let state_dir = &settings.places.state_dir;
    let identity = runtime()?.block_on(enroll_at(&token, Role::Agent, &daemon::host_name(), state_dir))?;
    let upstream = state_dir.join(UPSTREAM_FILE);
    replace_file(&upstream, token.addresses.join("\n").as_bytes(), Access::Private)?;
    let own = identity.own();
    output.result(
        &json!({ "agent": own.peer.to_string(), "site": own.site, "upstream": token.addresses }),
        || {
            format!(
                "Enrolled at site {} as agent {}.\nIt will connect to {} unless `upstream` is configured.\nNext: start the daemon with `reprotect-agent run`.",
                own.site,
                own.peer,
                token.addresses.join(", ")
            )
        },
    )?;
    Ok(())
}

/// `status`: what the running daemon says of itself.
///
/// # Errors
/// When it does not run.
pub fn status(settings: &Settings, args: &StatusArgs, output: Output) -> anyhow::Result<()> {
    let client = AdminClient::new(Program::Agent, &settings.places.socket);
    runtime()?.block_on(async {
        if !args.watch {
            let info: StatusInfo = client.get_json("/v1/status").await?;
            output.result(&info, || render(&info))?;
            return Ok(());
        }
        watch(&client, output).await
    })
}

/// `mark`: a recovery point of all disks of the machine; waits until it is durable.
///
/// # Errors
/// What the daemon refuses; no point is made then, and nothing stays frozen.
pub fn mark(settings: &Settings, args: &MarkArgs, output: Output) -> anyhow::Result<()> {
    let freeze_limit_ms = u64::try_from(args.freeze_limit.0.as_millis()).unwrap_or(u64::MAX);
    let (freeze, app) = (args.freeze || args.app, args.app);
    let request = MarkRequest { name: args.name.clone(), freeze, freeze_limit_ms, app };
    let client = AdminClient::new(Program::Agent, &settings.places.socket).with_wait(MARK_WAIT);
    let answer: MarkAnswer = runtime()?.block_on(client.post_json("/v1/mark", &request))?;
    output.result(&answer, || render_mark(&answer))?;
    Ok(())
}

/// `unfollow`: the kernel forgets this agent's capture.
///
/// # Errors
/// When the agent runs, has no identity, or the pins cannot be removed.
pub fn unfollow(settings: &Settings, output: Output) -> anyhow::Result<()> {
    let places = &settings.places;
    let _lock = RunLock::acquire(Program::Agent, &places.state_dir)?;
    let identity = daemon::load_identity(&settings.credentials)?;
    let removed = capture::let_go(&identity.own().peer.to_string())?;
    output.result(&json!({ "removed": removed }), || {
        let text = if removed {
            "Removed what live capture had left in the kernel; the disks are compared when the agent runs again."
        } else {
            "Live capture had left nothing in the kernel."
        };
        text.to_owned()
    })?;
    Ok(())
}

fn render_mark(answer: &MarkAnswer) -> String {
    let named = if answer.name.is_empty() { String::new() } else { format!(" \"{}\"", answer.name) };
    let disks: Vec<&str> = answer.disks.iter().map(|disk| disk.source.as_str()).collect();
    let frozen = match answer.frozen.as_slice() {
        [] if answer.class == "fuzzy" => "; nothing was frozen, so it is no consistent state".to_owned(),
        [] => String::new(),
        frozen => format!(
            "; frozen meanwhile: {} (for {} and the {} of the call)",
            frozen.join(", "),
            output::duration(Duration::from_micros(answer.frozen_us)),
            output::duration(Duration::from_micros(answer.freeze_call_us)),
        ),
    };
    let problems: String = answer.problems.iter().map(|problem| format!("\nwarning: {problem}")).collect();
    format!(
        "Point {}{named} ({}) of {} is durable{frozen}.{problems}",
        answer.point,
        answer.class,
        disks.join(", ")
    )
}

async fn watch(client: &AdminClient, output: Output) -> anyhow::Result<()> {
    let mut bars = std::collections::BTreeMap::new();
    loop {
        let info: StatusInfo = client.get_json("/v1/status").await?;
        if output.json() {
            output.result(&info, String::new)?;
        } else {
            for disk in &info.disks {
                let bar = bars.entry(disk.disk.clone()).or_insert_with(|| {
                    output.progress(&format!("{} {}", disk.source, disk.state), disk.size_bytes)
                });
                bar.update(disk.settled_bytes, disk.size_bytes, Instant::now());
            }
        }
        tokio::time::sleep(WATCH).await;
    }
}

fn render(info: &StatusInfo) -> String {
    let link = match (&info.upstream, info.connected) {
        (Some(upstream), true) => {
            let limit = info.send_rate.map(|rate| format!(", sending at most {}", Rate(Some(rate))));
            format!(
                "connected to {} {upstream}{}",
                info.upstream_role.as_deref().unwrap_or("peer"),
                limit.unwrap_or_default()
            )
        }
        _ => format!("not connected: {}", info.problem.as_deref().unwrap_or("no session yet")),
    };
    let mut table = Table::new(&[
        ("DISK", Align::Left),
        ("SIZE", Align::Right),
        ("STATE", Align::Left),
        ("DONE", Align::Right),
        ("READ", Align::Right),
        ("SENT", Align::Right),
        ("ROUNDS", Align::Right),
        ("CAPTURE", Align::Left),
        ("RPO", Align::Right),
        ("PROBLEM", Align::Left),
    ]);
    for disk in &info.disks {
        table.row([
            disk.source.clone(),
            output::bytes(disk.size_bytes),
            disk.state.clone(),
            percent(disk),
            output::bytes(disk.read_bytes),
            output::bytes(disk.wire_bytes_sent),
            disk.scan_rounds.to_string(),
            disk.capture.clone(),
            rpo(disk),
            disk.problem.clone().unwrap_or_default(),
        ]);
    }
    let upstreams = if info.upstreams.len() > 1 {
        info.upstreams.iter().map(|peer| format!("\n{}", upstream_line(peer))).collect()
    } else {
        String::new()
    };
    let rounds = match info.policy_revision {
        0 => String::new(),
        revision => format!(
            ", rounds {} apart (policy revision {revision})",
            output::duration(Duration::from_millis(info.scan_interval_ms))
        ),
    };
    let warnings: String = info.warnings.iter().map(|warning| format!("\nwarning: {warning}")).collect();
    let health: String = info.health.iter().map(health_line).collect();
    let disks = if table.is_empty() {
        "No disk is protected yet: run `reprotect-master-target protect` for this machine.".to_owned()
    } else {
        table.render()
    };
    format!("agent {}, {link}{rounds}{upstreams}{warnings}{health}\n{disks}", info.agent)
}

/// How a peer stands.
fn upstream_line(peer: &UpstreamInfo) -> String {
    let standing = match (&peer.problem, peer.used, peer.ready) {
        (_, true, _) => "in use".to_owned(),
        (Some(problem), ..) => format!("cannot be used: {problem}"),
        (None, _, true) => "ready".to_owned(),
        (None, ..) => "not in use".to_owned(),
    };
    let millis = |micros: u64| format!("{:.1} ms", micros as f64 / 1000.0);
    let way = peer.round_trip_us.map_or_else(String::new, |micros| format!(", {} away", millis(micros)));
    let target = match (peer.round_trip_us, peer.to_target_us) {
        (Some(_), Some(micros)) => format!(", {} to the master target", millis(micros)),
        (Some(_), None) => ", does not reach the master target".to_owned(),
        _ => String::new(),
    };
    let room =
        peer.room_permille.map_or_else(String::new, |room| format!(", {} % of its memory free", room / 10));
    format!("upstream {}: {standing}{way}{target}{room}", peer.address)
}

fn health_line(event: &HealthEvent) -> String {
    let of = if event.disk.is_empty() { String::new() } else { format!(" {}", event.disk) };
    format!("\n{}{of}: {}; {}", event.code, event.cause, event.remedy)
}

/// The age of the durable state.
fn rpo(disk: &DiskInfo) -> String {
    disk.rpo_ms.map_or_else(|| "-".to_owned(), |age| output::duration(Duration::from_millis(age)))
}

fn percent(disk: &DiskInfo) -> String {
    format!("{} %", disk.settled_bytes.saturating_mul(100) / disk.size_bytes.max(1))
}
