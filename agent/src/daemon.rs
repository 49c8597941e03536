//! The agent daemon: identity, sources, and one session after another until it is told to stop.
//!
//! Invariants: one daemon per state directory; a lost session is dialled again, first at once, then with growing
//! pauses, through the configured peers in turn; nothing is forgotten that was not durable. Called by `main` and tests.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use anyhow::Context;
use axum::extract::State;
use axum::routing::get;
use axum::{Json, Router};
use bytes::Bytes;
use reprotect_engine::format::message::Auth;
use reprotect_engine::host::admin::AdminServer;
use reprotect_engine::host::places::Program;
use reprotect_engine::host::run_lock::RunLock;
use reprotect_engine::host::shutdown::{Notifier, Shutdown};
use reprotect_engine::host::values::HostPort;

use reprotect_engine::net::endpoint::{CloseCode, Dialer, PeerConnection, TransportSettings};
use reprotect_engine::net::enroll::renew;
use reprotect_engine::net::identity::{IDENTITY_FILE, Identity, Purpose, Role};
use reprotect_engine::net::revocations::Revocations;
use reprotect_engine::net::tls::client_config;
use reprotect_engine::net::trust::{PeerRule, ROOTS_FILE, Trust};
use reprotect_engine::net::wall_clock;
use reprotect_engine::proto::agent::Agent;
use reprotect_engine::proto::{Prover, session_proof_message};
use reprotect_engine::units::PeerId;
use tokio::sync::watch;

use crate::api::StatusInfo;
use crate::config::Settings;
use crate::session::Machine;
use crate::sources;

/// First pause before dialling again; doubled up to the longest.
const PAUSE_FIRST: Duration = Duration::from_millis(200);
/// Longest pause before dialling again.
const PAUSE_LONGEST: Duration = Duration::from_secs(5);
/// A session that lasted this long counts as a success: the pause starts small again.
const GOOD_SESSION: Duration = Duration::from_secs(10);
/// File with the addresses of the invitation.
pub const UPSTREAM_FILE: &str = "upstream";

/// Proves this agent with its certificate's key.
struct KeyProver(SharedIdentity);

/// The identity in use; renewal replaces it.
type SharedIdentity = Arc<RwLock<Arc<Identity>>>;

fn current(identity: &SharedIdentity) -> Arc<Identity> {
    // A panic while holding it leaves a whole value: the only change is one assignment.
    Arc::clone(&identity.read().unwrap_or_else(PoisonError::into_inner))
}

impl Prover for KeyProver {
    fn prove(&self, nonce: &[u8; 32], target: PeerId) -> Auth {
        let identity = current(&self.0);
        let agent = identity.own().peer;
        let message = session_proof_message(nonce, agent, target);
        let signature = identity.sign(Purpose::SessionProof, &message).unwrap_or_else(|error| {
            // An empty signature is refused by the target, which says so.
            tracing::error!(%error, "the session proof could not be signed");
            Vec::new()
        });
        let certificates = identity.chain().iter().map(|der| Bytes::copy_from_slice(der)).collect();
        Auth { agent, signature: signature.into(), certificates }
    }
}

/// Runs until `shutdown`.
///
/// # Errors
/// When something it needs cannot be had; the text says what and what to do.
pub async fn run(settings: Settings, shutdown: Shutdown) -> anyhow::Result<()> {
    settings.places.create_state_dir()?;
    let state_dir = settings.places.state_dir.clone();
    let _lock = RunLock::acquire(Program::Agent, &state_dir)?;
    let identity = Arc::new(load_identity(&state_dir)?);
    let upstream = upstream(&settings)?;
    let disks = settings.disks.clone();
    let found = tokio::task::spawn_blocking(move || sources::find(&disks)).await??;
    let (status, watched) = watch::channel(StatusInfo {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        agent: identity.own().peer.to_string(),
        ..StatusInfo::default()
    });
    let admin = AdminServer::bind(&settings.places.socket).await?;
    let started = Instant::now();
    let router = Router::new().route("/v1/status", get(show_status)).with_state((watched, started));
    let admin_task = tokio::spawn(admin.serve(router, shutdown.clone()));
    let shared: SharedIdentity = Arc::new(RwLock::new(Arc::clone(&identity)));
    let core = Agent::new(identity.own().peer, PeerId::NONE, Box::new(KeyProver(Arc::clone(&shared))));
    let host_name = host_name();
    let mut machine = Machine::new(core, &host_name, settings, found, status)?;
    let notifier = Notifier::from_env()?;
    notifier.send("READY=1")?;
    tracing::info!(agent = %identity.own().peer, host_name, "ready");
    tokio::select! {
        result = sessions(&mut machine, shared, &state_dir, &upstream) => result?,
        () = notifier.watch(&shutdown) => {}
        () = shutdown.requested() => {}
    }
    tracing::info!("stopping");
    // Best effort: systemd learns of the end by the exit as well.
    let _ = notifier.send("STOPPING=1");
    admin_task.await??;
    Ok(())
}

async fn show_status(State((status, started)): State<(watch::Receiver<StatusInfo>, Instant)>) -> Json<StatusInfo> {
    let mut info = status.borrow().clone();
    info.uptime_seconds = started.elapsed().as_secs();
    Json(info)
}

/// The machine's name for people.
#[must_use]
pub fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

fn load_identity(state_dir: &Path) -> anyhow::Result<Identity> {
    if !state_dir.join(IDENTITY_FILE).exists() {
        anyhow::bail!(
            "this agent has not enrolled: make a token with `reprotect-master-target invite --role agent`, then run `reprotect-agent enroll TOKEN`"
        );
    }
    Ok(Identity::load(state_dir)?)
}

/// Where to dial: as configured, else as the invitation said.
fn upstream(settings: &Settings) -> anyhow::Result<Vec<String>> {
    if !settings.upstream.is_empty() {
        return Ok(settings.upstream.iter().map(HostPort::to_string).collect());
    }
    let path = settings.places.state_dir.join(UPSTREAM_FILE);
    let text = std::fs::read_to_string(&path)
        .with_context(|| format!("no upstream is configured and {} cannot be read; write `upstream` into the configuration", path.display()))?;
    let addresses: Vec<String> = text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned).collect();
    anyhow::ensure!(!addresses.is_empty(), "{} is empty; write `upstream` into the configuration", path.display());
    Ok(addresses)
}

/// One session after another; returns only when nothing can be done.
async fn sessions(
    machine: &mut Machine,
    identity: SharedIdentity,
    state_dir: &Path,
    upstream: &[String],
) -> anyhow::Result<()> {
    let revocations = Arc::new(Revocations::in_memory());
    let trust = Arc::new(Trust::load(&state_dir.join(ROOTS_FILE), Arc::clone(&revocations))?);
    let mut dial = Dial { identity, trust, revocations, v4: None, v6: None, state_dir };
    let mut pause = PAUSE_FIRST;
    for attempt in 0_usize.. {
        let Some(address) = upstream.get(attempt % upstream.len()) else { break };
        let began = Instant::now();
        let reason = match dial.connect(address).await {
            Ok(peer) => {
                let mut name = [0_u8; 16];
                // Only a name for the logs of both ends.
                let _ = rustix::rand::getrandom(&mut name, rustix::rand::GetRandomFlags::empty());
                let reason = machine.run_session(&peer, name).await;
                CloseCode::Finished.close(&peer.connection);
                reason
            }
            Err(error) => {
                machine.unreachable(&format!("{error:#}"));
                format!("{error:#}")
            }
        };
        if began.elapsed() >= GOOD_SESSION {
            pause = PAUSE_FIRST;
        }
        tracing::warn!(address, reason, again_in = ?pause, "no session");
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSE_LONGEST);
    }
    Ok(())
}

/// What dialling needs.
struct Dial<'a> {
    identity: SharedIdentity,
    trust: Arc<Trust>,
    revocations: Arc<Revocations>,
    v4: Option<Dialer>,
    v6: Option<Dialer>,
    state_dir: &'a Path,
}

impl Dial<'_> {
    async fn connect(&mut self, address: &str) -> anyhow::Result<PeerConnection> {
        let mut resolved =
            tokio::net::lookup_host(address).await.with_context(|| format!("cannot resolve {address}"))?;
        let first = resolved.next().with_context(|| format!("{address} resolves to nothing"))?;
        self.renew_if_due(first).await;
        let identity = current(&self.identity);
        let rule = PeerRule::of_site(&identity.own().site, &[Role::ProcessServer, Role::MasterTarget]);
        let tls = client_config(&identity, Arc::clone(&self.trust), rule)?;
        let dialer = match first {
            SocketAddr::V4(_) => socket(&mut self.v4, Ipv4Addr::UNSPECIFIED.into())?,
            SocketAddr::V6(_) => socket(&mut self.v6, Ipv6Addr::UNSPECIFIED.into())?,
        };
        Ok(dialer.connect(first, tls, None, &self.revocations).await?)
    }

    /// Renews the certificate where this address is a master target; through a relay it cannot be.
    async fn renew_if_due(&mut self, address: SocketAddr) {
        let identity = current(&self.identity);
        if !identity.is_due_for_renewal(wall_clock()) {
            return;
        }
        let rule = PeerRule::of_site(&identity.own().site, &[Role::MasterTarget]);
        let renewed = renew(&identity, &self.trust, address, &rule, &host_name()).await;
        match renewed.map_err(anyhow::Error::from).and_then(|identity| {
            identity.save(self.state_dir)?;
            Ok(identity)
        }) {
            Ok(identity) => {
                tracing::info!(until = identity.own().not_after.0, "the certificate was renewed");
                *self.identity.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(identity);
            }
            Err(error) => tracing::warn!("the certificate is due and was not renewed at {address}: {error:#}"),
        }
    }
}

/// The socket of an address family, bound when first needed.
fn socket(slot: &mut Option<Dialer>, local: IpAddr) -> anyhow::Result<&Dialer> {
    match slot {
        Some(dialer) => Ok(dialer),
        None => Ok(slot.insert(Dialer::bind(SocketAddr::new(local, 0), TransportSettings::default())?)),
    }
}
