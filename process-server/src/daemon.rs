//! The running process server: takes its place, listens, relays each agent, answers its own commands, renews its
//! certificate, and stops cleanly.
//!
//! Invariants: one daemon per state directory; READY is told only when agents can connect; after shutdown was requested
//! nothing new is accepted, every session is closed with a code that says "dial again", and `run` returns when all are
//! over. Nothing is kept on disk but identity, roots and target addresses, so a kill at any time loses nothing.
//! Called by `main` and by tests, any number of times in one process.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::State;
use axum::routing::get;
use axum::{Json, Router};
use reprotect_engine::error::{Answer, Severity};
use reprotect_engine::host::admin::{AdminServer, AdminServerError};
use reprotect_engine::host::hours::HourlyRate;
use reprotect_engine::host::places::{PlaceError, Program};
use reprotect_engine::host::run_lock::{RunLock, RunLockError};
use reprotect_engine::host::shutdown::{Notifier, Shutdown};
use reprotect_engine::host::values::LevelText;
use reprotect_engine::net::endpoint::{Accepted, CloseCode, EndpointError, Server, bind_server};
use reprotect_engine::net::enroll;
use reprotect_engine::net::enroll_wire::is_host_name;
use reprotect_engine::net::identity::{Identity, Role};
use reprotect_engine::net::shaper::Shaper;
use reprotect_engine::net::tls::{self, TlsError};
use reprotect_engine::net::trust::{PeerRule, Trust};
use reprotect_engine::net::{mono_clock, wall_clock};
use tokio::task::JoinSet;

use crate::budget::Budget;
use crate::config::Settings;
use crate::enrolment::{self, EnrolmentError, Own};
use crate::recode::{Governor, RecodePool};
use crate::relay::Relay;
use crate::status::{Register, Status};
use crate::upstream::{self, Reach, Upstream};

/// How often the compression level is looked at.
const OBSERVE: Duration = Duration::from_millis(250);
/// How often it is checked whether the certificate is due for renewal, and tried again where that failed.
const RENEWAL_CHECK: Duration = Duration::from_secs(600);
/// Connections whose sessions run or end; more wait in the endpoint.
const SESSIONS_MAX: usize = 1024;

/// Why the daemon did not start or could not go on.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The state directory.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// Another daemon has the state directory.
    #[error(transparent)]
    Lock(#[from] RunLockError),
    /// Identity, roots or targets.
    #[error(transparent)]
    Enrolment(#[from] EnrolmentError),
    /// TLS.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The network.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    /// The admin socket.
    #[error(transparent)]
    Admin(#[from] AdminServerError),
    /// The operating system gave no threads, or took something back.
    #[error("cannot {action}: {source}; look at the limits of the service")]
    System {
        /// What was tried.
        action: &'static str,
        /// The reason.
        #[source]
        source: io::Error,
    },
}

impl Answer for RunError {
    fn severity(&self) -> Severity {
        Severity::Stop
    }
}

fn system(action: &'static str) -> impl FnOnce(io::Error) -> RunError {
    move |source| RunError::System { action, source }
}

/// What the admin interface and the tasks share.
#[derive(Debug)]
struct Daemon {
    relay: Arc<Relay>,
    own: Arc<Own>,
    trust: Arc<Trust>,
    server: Server,
    listen: SocketAddr,
    adaptive: bool,
    /// The limit on sending.
    send_rate: HourlyRate,
    state_dir: PathBuf,
    started: Instant,
}

/// Runs the process server until `shutdown`.
///
/// # Errors
/// [`RunError`] when it cannot start; a failing session or renewal is logged and no reason to end.
pub async fn run(settings: Settings, shutdown: Shutdown) -> Result<(), RunError> {
    settings.places.create_state_dir()?;
    let _lock = RunLock::acquire(Program::ProcessServer, &settings.places.state_dir)?;
    let daemon = Arc::new(Daemon::start(&settings)?);
    let admin = AdminServer::bind(&settings.places.socket).await?;
    let router = Router::new().route("/v1/status", get(status)).with_state(Arc::clone(&daemon));
    let notifier = Notifier::from_env().map_err(system("reach systemd's notification socket"))?;
    if let Err(error) = notifier.send("READY=1") {
        tracing::warn!(%error, "systemd did not hear that the daemon is ready");
    }
    tracing::info!(
        listen = %daemon.listen,
        peer = %daemon.own.identity().own().peer,
        memory_bytes = settings.memory_bytes,
        workers = settings.workers,
        "process server is ready"
    );
    let mut tasks = JoinSet::new();
    tasks.spawn(Arc::clone(&daemon).follow_load(shutdown.clone()));
    tasks.spawn(Arc::clone(&daemon).follow_hours(shutdown.clone()));
    tasks.spawn(Arc::clone(&daemon).renew_when_due(shutdown.clone()));
    tasks.spawn({
        let relay = Arc::clone(&daemon.relay);
        async move { relay.upstream.follow_target().await }
    });
    let serving = tokio::spawn(admin.serve(router, shutdown.clone()));
    let accepting = accept_all(&daemon, &shutdown);
    tokio::join!(accepting, notifier.watch(&shutdown));
    tasks.shutdown().await;
    tokio::join!(daemon.server.close(), daemon.relay.upstream.close());
    match serving.await {
        Ok(result) => result.map_err(system("serve the admin socket"))?,
        Err(error) => tracing::error!(%error, "the admin socket's task ended badly"),
    }
    tracing::info!("process server stopped");
    Ok(())
}

/// Takes agents until shutdown, then waits for the sessions.
async fn accept_all(daemon: &Arc<Daemon>, shutdown: &Shutdown) {
    let mut sessions = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = daemon.server.accept(), if sessions.len() < SESSIONS_MAX => accepted,
            Some(ended) = sessions.join_next() => {
                if let Err(error) = ended {
                    tracing::error!(%error, "a session's task ended badly; report this as a defect");
                }
                continue;
            }
            () = shutdown.requested() => None,
        };
        match accepted {
            Some(Accepted::Peer(peer)) if peer.peer.role == Role::Agent => {
                sessions.spawn(Arc::clone(&daemon.relay).serve(peer, shutdown.clone()));
            }
            Some(Accepted::Peer(peer)) => {
                tracing::warn!(peer = %peer.peer.peer, role = %peer.peer.role, "only agents are served here");
                CloseCode::Violation.close(&peer.connection);
            }
            Some(Accepted::Enrolment { connection, .. }) => CloseCode::Violation.close(&connection),
            None => break,
        }
    }
    while sessions.join_next().await.is_some() {}
}

impl Daemon {
    fn start(settings: &Settings) -> Result<Self, RunError> {
        let state_dir = settings.places.state_dir.clone();
        let own = Arc::new(Own::load(&settings.credentials)?);
        let trust = enrolment::trust(&settings.credentials)?;
        let targets = enrolment::targets(&settings.targets, &state_dir)?;
        let revocations = Arc::clone(trust.revocations());
        let tls = tls::server_config(&own.identity(), Arc::clone(&trust), agents(&own), false)?;
        let server = bind_server(settings.listen, tls, revocations, upstream::agent_transport())?;
        let listen = server.local_address().map_err(system("read the listening address"))?;
        let relay = Relay {
            upstream: Upstream::new(targets, Arc::clone(&own), Arc::clone(&trust))?,
            pool: RecodePool::start(settings.workers, settings.level, settings.memory_bytes)
                .map_err(system("start the compression threads"))?,
            budget: Budget::new(settings.memory_bytes),
            register: Arc::new(Register::default()),
            shaper: Arc::new(Shaper::new(settings.send_rate.now())),
        };
        Ok(Self {
            relay: Arc::new(relay),
            own,
            trust,
            server,
            listen,
            adaptive: settings.level == LevelText::Adaptive,
            send_rate: settings.send_rate.clone(),
            state_dir,
            started: Instant::now(),
        })
    }

    /// Lets the compression level follow link and processor.
    async fn follow_load(self: Arc<Self>, shutdown: Shutdown) {
        if !self.adaptive {
            return;
        }
        let mut governor = Governor::default();
        let mut tick = tokio::time::interval(OBSERVE);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        while !shutdown.is_requested() {
            tick.tick().await;
            governor.observe(&self.relay.pool, mono_clock(), self.relay.register.output_permille());
        }
    }

    /// Keeps the rate that the hour asks for.
    async fn follow_hours(self: Arc<Self>, shutdown: Shutdown) {
        let mut tick = tokio::time::interval(OBSERVE);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        while !self.send_rate.hours.is_empty() && !shutdown.is_requested() {
            tick.tick().await;
            self.relay.shaper.set_rate(self.send_rate.now());
        }
    }

    /// Renews the certificate when a third of its life is left; the master target says no to a revoked one.
    async fn renew_when_due(self: Arc<Self>, shutdown: Shutdown) {
        let mut tick = tokio::time::interval(RENEWAL_CHECK);
        while !shutdown.is_requested() {
            tick.tick().await;
            if !self.own.is_renewed_here() || !self.own.identity().is_due_for_renewal(wall_clock()) {
                continue;
            }
            match self.renew().await {
                Ok(()) => tracing::info!("the certificate was renewed"),
                Err(reason) => tracing::warn!(
                    reason,
                    state_dir = %self.state_dir.display(),
                    "the certificate is due and could not be renewed; it is tried again in 10 minutes"
                ),
            }
        }
    }

    async fn renew(&self) -> Result<(), String> {
        let identity = self.own.identity();
        let mut reasons = Vec::new();
        for target in self.relay.upstream.targets() {
            let addresses = match upstream::resolve(target).await {
                Ok(addresses) => addresses,
                Err(reason) => {
                    reasons.push(format!("{target}: {reason}"));
                    continue;
                }
            };
            for address in addresses {
                let rule = self.relay.upstream.rule();
                match enroll::renew(&identity, &self.trust, address, &rule, &host_name()).await {
                    Ok(renewed) => return self.use_renewed(renewed),
                    Err(error) => reasons.push(format!("{target}: {error}")),
                }
            }
        }
        Err(reasons.join("; "))
    }

    fn use_renewed(&self, renewed: Identity) -> Result<(), String> {
        self.own.replace(renewed).map_err(|error| error.to_string())?;
        let trust = Arc::clone(&self.trust);
        let tls = tls::server_config(&self.own.identity(), trust, agents(&self.own), false)
            .map_err(|error| error.to_string())?;
        self.server.replace_tls(tls).map_err(|error| error.to_string())
    }

    fn status(&self) -> Status {
        let (sessions, totals) = self.relay.register.read();
        let identity = self.own.identity();
        let (target_micros, target_problem) = match self.relay.upstream.reach() {
            Reach::Unknown => (None, None),
            Reach::Reached(time) => (Some(u32::try_from(time.as_micros()).unwrap_or(u32::MAX)), None),
            Reach::Lost(reason) => (None, Some(reason)),
        };
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            peer: identity.own().peer.to_string(),
            listen: self.listen.to_string(),
            uptime_seconds: self.started.elapsed().as_secs(),
            certificate_expires: identity.own().not_after.0 / 1_000_000_000,
            memory_bytes: self.relay.budget.total_bytes(),
            reserved_bytes: self.relay.budget.reserved_bytes(),
            level: self.relay.pool.level(),
            adaptive: self.adaptive,
            workers: self.relay.pool.workers(),
            target_micros,
            target_problem,
            send_rate: self.relay.shaper.rate(),
            sessions,
            totals,
        }
    }
}

async fn status(State(daemon): State<Arc<Daemon>>) -> Json<Status> {
    Json(daemon.status())
}

/// Whom this server serves: agents of its site.
fn agents(own: &Own) -> PeerRule {
    PeerRule::of_site(&own.identity().own().site, &[Role::Agent])
}

/// What this machine calls itself, where that can stand in a certificate request.
#[must_use]
pub fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    if is_host_name(name.trim()) { name.trim().to_owned() } else { "process-server".to_owned() }
}
