//! The agent daemon: identity, plan, and one session after another until it is told to stop.
//!
//! Invariants: one daemon per state directory; SIGHUP replaces the plan and nothing else; nothing is forgotten that
//! was not durable; when told to stop it is gone within two seconds, whatever its threads wait for. Called by
//! `service` and by tests.

use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE as CONTENT_TYPE_HEADER;
use axum::routing::{get, post};
use axum::{Json, Router};
use reprotect_engine::host::admin::{AdminServer, Refusal};
use reprotect_engine::host::places::Program;
use reprotect_engine::host::run_lock::RunLock;
use reprotect_engine::host::shutdown::{Notifier, Shutdown, reloads};
use reprotect_engine::net::credentials::Credentials;
use reprotect_engine::net::identity::{IDENTITY_FILE, Identity, Role};
use reprotect_engine::proto::agent::Agent;
use reprotect_engine::units::PeerId;
use tokio::sync::{mpsc, oneshot, watch};

use crate::api::{MarkAnswer, MarkRequest, StatusInfo};
use crate::config::Settings;
use crate::dial::{Dial, KeyProver, SharedIdentity};
use crate::following::Following;
use crate::freeze::thaw_left_behind;
use crate::machine::Machine;
use crate::marking::{Asker, MarkOrder};
use crate::metrics;
use crate::plan::{Plan, follow_reloads};
use crate::rota::{Ended, Rota};
use crate::upstreams::{Ready, Upstreams};

/// Longest wait for the capturing thread to leave its programs to the next process.
const CAPTURE_GRACE: Duration = Duration::from_secs(1);
/// Longest wait for a post_thaw hook, which needs nobody to wait for it.
const RELEASE_GRACE: Duration = Duration::from_millis(500);
/// Longest wait for answers of the admin interface that are under way.
const ADMIN_GRACE: Duration = Duration::from_millis(500);

/// How often the status is made anew while there is no session.
const AWAY_TICK: Duration = Duration::from_millis(500);
/// Orders for points that may wait; they are taken one after another.
const ORDERS_MAX: usize = 4;
/// How long file systems may be frozen, in milliseconds.
const FREEZE_LIMIT_MS: std::ops::RangeInclusive<u64> = 1000..=600_000;

/// Runs until `shutdown`; SIGHUP reads the configuration again.
///
/// # Errors
/// When something it needs cannot be had; the text says what and what to do.
pub async fn run(settings: Settings, shutdown: Shutdown) -> anyhow::Result<()> {
    run_reloading(settings, reloads()?, shutdown).await
}

/// As [`run`], reading the configuration again whenever `reloads` changes.
///
/// # Errors
/// As [`run`].
pub async fn run_reloading(
    settings: Settings,
    reloads: watch::Receiver<u64>,
    shutdown: Shutdown,
) -> anyhow::Result<()> {
    let state_dir = settings.places.state_dir.clone();
    let socket = settings.places.socket.clone();
    // Before anything is written: the state directory may be on a file system that was left frozen. An agent that answers
    // has frozen it itself.
    if UnixStream::connect(&socket).is_err() {
        thaw_left_behind(&state_dir);
    }
    settings.places.create_state_dir()?;
    let _lock = RunLock::acquire(Program::Agent, &state_dir)?;
    let credentials = settings.credentials.clone();
    let identity = Arc::new(load_identity(&credentials)?);
    let plan = tokio::task::spawn_blocking(move || Plan::make(settings)).await??;
    let (plans, plan) = watch::channel(Arc::new(plan));
    let (status, watched) = watch::channel(StatusInfo {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        agent: identity.own().peer.to_string(),
        ..StatusInfo::default()
    });
    let admin = AdminServer::bind(&socket).await?;
    let (orders, from_operators) = mpsc::channel(ORDERS_MAX);
    let listen = plan.borrow().settings.metrics_listen;
    let metrics = metrics_router(watched.clone());
    if let Some(address) = listen {
        serve_metrics(address, metrics.clone(), shutdown.clone()).await?;
    }
    let router = Router::new()
        .route("/v1/status", get(show_status))
        .with_state((watched, Instant::now()))
        .route("/v1/mark", post(mark))
        .with_state(orders)
        .merge(metrics);
    let admin_task = tokio::spawn(admin.serve(router, shutdown.clone()));
    let shared: SharedIdentity = Arc::new(RwLock::new(Arc::clone(&identity)));
    let core = Agent::new(identity.own().peer, PeerId::NONE, Box::new(KeyProver(Arc::clone(&shared))));
    let host_name = host_name();
    let instance = identity.own().peer.to_string();
    let mut machine = Machine::new(core, &instance, &host_name, plan, from_operators, status)?;
    machine.release_left_behind();
    let dial = Arc::new(Dial::new(shared, credentials, host_name.clone())?);
    let reloading = tokio::spawn(follow_reloads(reloads, plans));
    let notifier = Notifier::from_env()?;
    notifier.send("READY=1")?;
    tracing::info!(agent = %identity.own().peer, host_name, "ready");
    tokio::select! {
        () = sessions(&mut machine, &dial, identity.own().peer) => {}
        () = notifier.watch(&shutdown) => {}
        () = shutdown.requested() => {}
    }
    tracing::info!("stopping");
    // Best effort: systemd learns of the end by the exit as well.
    let _ = notifier.send("STOPPING=1");
    reloading.abort();
    if let Some(released) = machine.release_run()
        && tokio::time::timeout(RELEASE_GRACE, released).await.is_err()
    {
        tracing::warn!("the post_thaw hook goes on by itself");
    }
    end_capture(&mut machine.following).await;
    // Ends the readers and workers, whatever they wait for.
    drop(machine);
    dial.close().await;
    match tokio::time::timeout(ADMIN_GRACE, admin_task).await {
        Ok(served) => served??,
        Err(_) => tracing::debug!("an answer of the admin interface was cut"),
    }
    Ok(())
}

/// Saves what capture knows; where that takes too long the next start compares, as after a crash.
async fn end_capture(following: &mut Following) {
    let ended = following.take_thread().map(|mut thread| tokio::task::spawn_blocking(move || thread.end()));
    if let Some(ended) = ended
        && tokio::time::timeout(CAPTURE_GRACE, ended).await.is_err()
    {
        tracing::warn!("capture did not end in time; the next start goes on from what it left");
    }
}

/// Makes a point of the machine; answers when it is durable.
async fn mark(
    State(orders): State<mpsc::Sender<MarkOrder>>,
    Json(request): Json<MarkRequest>,
) -> Result<Json<MarkAnswer>, Refusal> {
    let refused = |reason: &str| {
        let (reason, remedy) = reason.split_once("; ").unwrap_or((reason, "see the agent's log"));
        Refusal::conflict("no point was made", reason, remedy)
    };
    if !FREEZE_LIMIT_MS.contains(&request.freeze_limit_ms) {
        return Err(refused("a freeze may last from 1 s to 10 min; write another --freeze-limit"));
    }
    let (answer, answered) = oneshot::channel();
    let stopping = "the agent is stopping; ask again when it runs";
    let asker = Asker::Command(answer);
    orders.send(MarkOrder { request, asker }).await.map_err(|_| refused(stopping))?;
    match answered.await {
        Ok(Ok(answer)) => Ok(Json(answer)),
        Ok(Err(reason)) => Err(refused(&reason)),
        Err(_) => Err(refused(stopping)),
    }
}

fn metrics_router(status: watch::Receiver<StatusInfo>) -> Router {
    let show = |State(status): State<watch::Receiver<StatusInfo>>| async move {
        ([(CONTENT_TYPE_HEADER, metrics::CONTENT_TYPE)], metrics::render(&status.borrow()))
    };
    Router::new().route("/metrics", get(show)).with_state(status)
}

/// Serves the metrics where Prometheus finds them.
async fn serve_metrics(address: SocketAddr, router: Router, shutdown: Shutdown) -> anyhow::Result<()> {
    let listener = tokio::net::TcpListener::bind(address).await.with_context(|| {
        format!("`metrics.listen` {address} cannot be used; write another address, or end what listens there")
    })?;
    drop(tokio::spawn(async move {
        let served =
            axum::serve(listener, router).with_graceful_shutdown(async move { shutdown.requested().await });
        if let Err(error) = served.await {
            tracing::error!(%error, "metrics are not served any more; restart the agent");
        }
    }));
    Ok(())
}

async fn show_status(
    State((status, started)): State<(watch::Receiver<StatusInfo>, Instant)>,
) -> Json<StatusInfo> {
    let mut info = status.borrow().clone();
    info.uptime_seconds = started.elapsed().as_secs();
    Json(info)
}

/// The machine's name for people.
#[must_use]
pub fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// This agent's identity.
///
/// # Errors
/// When it has not enrolled, or the files cannot be used.
pub fn load_identity(credentials: &Credentials) -> anyhow::Result<Identity> {
    if let Some(dir) = credentials.renewed_in()
        && !dir.join(IDENTITY_FILE).exists()
    {
        anyhow::bail!(
            "this agent has not enrolled; make a token with `reprotect-master-target invite --role agent`, then run `reprotect-agent enroll TOKEN`"
        );
    }
    let identity = credentials.identity()?;
    let role = identity.own().role;
    anyhow::ensure!(
        role == Role::Agent,
        "this identity is of role {role}; name an agent's --state-dir or certificate"
    );
    Ok(identity)
}

/// One session after another; ends only when there is nobody to dial.
async fn sessions(machine: &mut Machine, dial: &Arc<Dial>, agent: PeerId) {
    let mut upstreams = Upstreams::new(agent, Arc::clone(dial));
    let mut rota = Rota::default();
    upstreams.configure(&machine.plan().upstream);
    upstreams.first_look().await;
    loop {
        let Some((address, at)) = rota.next(&upstreams.to_try(), Instant::now()) else { return };
        if !wait_until(machine, at).await {
            upstreams.configure(&machine.plan().upstream);
            machine.tell_upstreams(&upstreams);
            rota.hurry();
            continue;
        }
        let (began, before) = (Instant::now(), machine.status().borrow().sessions);
        let ended = attempt(machine, dial, &mut upstreams, &address).await;
        // Only a session that came about counts as one that held.
        let began = if machine.status().borrow().sessions > before { began } else { Instant::now() };
        let lost = matches!(ended, Ended::Lost(_) | Ended::Refused(_)).then(|| ended.reason());
        upstreams.give_back(&address, lost);
        rota.ended(&address, &ended, began, Instant::now());
        machine.tell_upstreams(&upstreams);
        match &ended {
            Ended::Lost(reason) => tracing::warn!(address, reason, "no session; trying again"),
            Ended::Refused(reason) => tracing::error!(address, reason, "refused; asked again every 60 s"),
            Ended::Replanned(reason) => tracing::info!(address, reason, "session ended"),
            Ended::Moved(reason) => tracing::warn!(address, reason, "the session moves"),
        }
    }
}

/// Waits for the next attempt, while the machine's own affairs go on; false where the plan changed meanwhile.
async fn wait_until(machine: &mut Machine, at: Instant) -> bool {
    let mut tick = tokio::time::interval(AWAY_TICK);
    loop {
        tokio::select! {
            () = tokio::time::sleep_until(at.into()) => return true,
            _ = tick.tick() => machine.publish(false), // what is durable gets older
            Some(order) = machine.inputs.orders.recv() => {
                machine.handle_mark_order(order); // refused, as there is no session
            }
            Some((point, news)) = machine.inputs.freezes.recv() => machine.handle_freeze_news(point, news),
            Some(news) = machine.inputs.capture.recv() => machine.handle_capture(news),
            Ok(()) = machine.plans.changed() => {
                machine.replan();
                return false;
            }
        }
    }
}

async fn attempt(machine: &mut Machine, dial: &Dial, upstreams: &mut Upstreams, address: &str) -> Ended {
    let ready = match upstreams.take(address).await {
        Some(ready) => Ok(ready),
        None => match dial.connect(address).await {
            Ok(peer) => Ready::open(peer.clone()).await.map_err(|error| {
                peer.refusal().map_or_else(|| Ended::Lost(format!("{address}: {error}")), Ended::Refused)
            }),
            Err(ended) => Err(ended),
        },
    };
    match ready {
        Ok(ready) => {
            let mut name = [0_u8; 16];
            // Only a name for the logs of both ends.
            let _ = rustix::rand::getrandom(&mut name, rustix::rand::GetRandomFlags::empty());
            machine.run_session(ready, upstreams, address, name).await
        }
        Err(ended) => {
            machine.unreachable(ended.reason());
            ended
        }
    }
}
