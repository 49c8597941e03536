//! The daemon's admin interface: HTTP and JSON on its Unix socket.
//!
//! Invariants: who can open the socket (mode 0600) may do everything; handlers that touch files run on blocking
//! threads; every refusal says what is wrong and what to do. Called by `daemon`.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use axum::extract::State;
use axum::routing::{get, post};
use axum::{Json, Router};
use reprotect_engine::format::message::PassMode;
use reprotect_engine::host::admin::Refusal;
use reprotect_engine::host::output;
use reprotect_engine::host::values::HostPort;
use reprotect_engine::net::ca::Ca;
use reprotect_engine::net::identity::{Identity, Role};
use reprotect_engine::net::invitations::{Invitations, Invite};
use reprotect_engine::net::revocations::{Revocation, Revocations};
use reprotect_engine::net::wall_clock;
use reprotect_engine::proto::state::TargetDiskPhase;
use reprotect_engine::units::{BLOCK_BYTES, DiskId, PeerId};

use crate::admin_points;
use crate::api::{
    DiskInfo, ExportAnswer, ExportRequest, InviteAnswer, InviteRequest, MachineDisk, MachineInfo,
    RevokeAnswer, RevokeRequest, ScrubInfo, SessionInfo, StatusInfo, UnprotectAnswer, UnprotectRequest,
    VerifyAnswer, VerifyRequest,
};
use crate::catalogue::{FailbackStep, Machine, ProtectedDisk, SourceDisk};
use crate::config::Settings;
use crate::disk_status::sector_bytes;
use crate::explain::reason_and_remedy;
use crate::export;
use crate::failback::{FailbackAnswer, FailbackRequest, failback};
use crate::mounts::Mounts;
use crate::protect::{ProtectAnswer, ProtectRequest, protect};
use crate::registry::{DiskView, Registry};
use crate::retention_policy::RetentionPolicy;

/// How long an invitation may be good for.
const INVITATION_SECONDS: std::ops::RangeInclusive<u64> = 60..=24 * 3600;

/// What the handlers work on.
#[derive(Debug)]
pub struct AdminState {
    /// Machines, disks, sessions.
    pub registry: Arc<Registry>,
    /// Open invitations.
    pub invitations: Arc<Invitations>,
    /// The CA; none where the site has its own PKI.
    pub ca: Option<Arc<Ca>>,
    /// The target's own identity.
    pub identity: Arc<Identity>,
    /// Who is no longer believed.
    pub revocations: Arc<Revocations>,
    /// What a reload may change.
    pub live: Mutex<LiveSettings>,
    /// Points that are served over NBD, and where their sockets are.
    pub mounts: (Mounts, PathBuf),
    /// What is kept how long.
    pub retention_policy: RetentionPolicy,
    /// Where it listens.
    pub listen: std::net::SocketAddr,
    /// When it started.
    pub started: Instant,
}

/// The settings that take effect without a restart.
#[derive(Clone, Debug, Default)]
pub struct LiveSettings {
    /// Addresses for invitation tokens.
    pub advertise: Vec<HostPort>,
    /// Directories in which disks may be created.
    pub datastores: Vec<PathBuf>,
}

impl LiveSettings {
    /// Those of `settings`.
    #[must_use]
    pub fn of(settings: &Settings) -> Self {
        Self { advertise: settings.advertise.clone(), datastores: settings.datastores.clone() }
    }
}

impl AdminState {
    /// The settings as they are now.
    #[must_use]
    pub fn live(&self) -> LiveSettings {
        self.live.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes over new ones.
    pub fn set_live(&self, live: LiveSettings) {
        *self.live.lock().unwrap_or_else(PoisonError::into_inner) = live;
    }
}

pub(crate) type Shared = State<Arc<AdminState>>;

/// The routes.
pub fn router(state: Arc<AdminState>) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/machines", get(machines))
        .route("/v1/invite", post(invite))
        .route("/v1/revoke", post(revoke))
        .route("/v1/protect", post(protect_machine))
        .route("/v1/unprotect", post(unprotect))
        .route("/v1/export", post(export_point))
        .route("/v1/verify", post(verify_points))
        .merge(admin_points::routes())
        .route("/v1/failback", post(failback_machine))
        .route("/v1/policy", post(crate::policy::serve))
        .with_state(state)
}

async fn status(State(state): Shared) -> Json<StatusInfo> {
    let machines = state.registry.machines();
    let disks = state.registry.disks().iter().map(|view| disk_info(view, &machines)).collect();
    let session = |session: &crate::registry::LiveSession| SessionInfo {
        agent: session.agent.map(|agent| agent.to_string()),
        address: session.address.clone(),
        relay: session.relay.map(|relay| relay.to_string()),
    };
    Json(StatusInfo {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        target: state.identity.own().peer.to_string(),
        site: state.identity.own().site.clone(),
        listen: state.listen.to_string(),
        uptime_seconds: state.started.elapsed().as_secs(),
        disks,
        sessions: state.registry.sessions().iter().map(|(_, live)| session(live)).collect(),
    })
}

fn disk_info(view: &DiskView, machines: &[Machine]) -> DiskInfo {
    let record = &view.record;
    let machine = machines.iter().find(|machine| machine.agent == record.agent);
    let mut info = DiskInfo {
        disk: record.disk.clone(),
        machine: machine.map_or_else(|| record.agent.clone(), |machine| machine.host_name.clone()),
        agent: record.agent.clone(),
        source: record.source_name.clone(),
        path: record.path.display().to_string(),
        kind: record.kind.clone(),
        size_bytes: record.size_bytes,
        state: "failed".to_owned(),
        connected: false,
        settled_bytes: 0,
        generation: 0,
        durable: 0,
        marked: 0,
        wire_bytes: 0,
        plain_bytes: 0,
        written_bytes: 0,
        zeroed_bytes: 0,
        unread_bytes: 0,
        problem: with_loss(view.problem.clone(), view),
        scrub: None,
    };
    if let Some((step, generation)) = view.failback {
        info.generation = generation.0;
        if step == FailbackStep::Released {
            info.state = "released".to_owned();
            info.settled_bytes = record.size_bytes;
        }
    }
    let Some(status) = &view.status else { return info };
    let (snapshot, counters) = (status.snapshot(), status.counters());
    info.state = match (snapshot.phase, snapshot.mode) {
        (TargetDiskPhase::Failed, _) => "failed",
        _ if snapshot.closed => "closed",
        _ if view.failback.is_some() => "failing-back",
        (_, PassMode::Done) if snapshot.unread_blocks > 0 => "incomplete",
        (_, PassMode::Done) => "synced",
        (_, _) if snapshot.generation.0 == 0 => "waiting",
        (_, PassMode::Copy) => "copying",
        (_, PassMode::Compare) => "comparing",
    }
    .to_owned();
    info.connected = snapshot.phase == TargetDiskPhase::Open;
    info.settled_bytes = if snapshot.mode == PassMode::Done {
        record.size_bytes
    } else {
        sector_bytes(snapshot.settled_sectors)
    };
    info.generation = snapshot.generation.0;
    info.durable = snapshot.durable.0;
    info.marked = snapshot.marked.0;
    info.unread_bytes = u64::from(snapshot.unread_blocks) * BLOCK_BYTES;
    info.wire_bytes = counters.wire_bytes;
    info.plain_bytes = counters.plain_bytes;
    info.written_bytes = counters.written_bytes;
    info.zeroed_bytes = counters.zeroed_bytes;
    let scrub = status.scrub();
    let unread = (info.unread_bytes > 0).then(|| {
        format!(
            "{} of it cannot be read at the source and are not here, so its points are degraded; see `reprotect-agent status` there",
            output::bytes(info.unread_bytes)
        )
    });
    let problem = view.problem.clone().or(snapshot.problem);
    info.problem = with_loss(problem, view).or_else(|| scrub.findings.first().cloned()).or(unread);
    info.scrub =
        Some(ScrubInfo { rounds: scrub.rounds, read_bytes: scrub.read_bytes, findings: scrub.findings });
    info
}

/// What keeps a disk from working comes first, then what it lost.
fn with_loss(problem: Option<String>, view: &DiskView) -> Option<String> {
    match (problem, view.loss.clone()) {
        (Some(problem), Some(loss)) => Some(format!("{problem}; {loss}")),
        (problem, loss) => problem.or(loss),
    }
}

async fn machines(State(state): Shared) -> Json<Vec<MachineInfo>> {
    let protected: Vec<ProtectedDisk> = state.registry.disks().into_iter().map(|view| view.record).collect();
    let connected: Vec<String> = state
        .registry
        .sessions()
        .iter()
        .filter_map(|(_, session)| session.agent.map(|agent| agent.to_string()))
        .collect();
    let info = |machine: Machine| MachineInfo {
        disks: machine.disks.iter().map(|disk| machine_disk(&machine, disk, &protected)).collect(),
        connected: connected.contains(&machine.agent),
        agent: machine.agent,
        host_name: machine.host_name,
    };
    Json(state.registry.machines().into_iter().map(info).collect())
}

fn machine_disk(machine: &Machine, disk: &SourceDisk, protected: &[ProtectedDisk]) -> MachineDisk {
    let record =
        protected.iter().find(|record| record.agent == machine.agent && record.source == disk.source);
    MachineDisk {
        source: disk.source.clone(),
        name: disk.name.clone(),
        size_bytes: disk.size_bytes,
        selected: disk.selected,
        protected_as: record.map(|record| record.path.display().to_string()),
        disk: record.map(|record| record.disk.clone()),
    }
}

async fn invite(
    State(state): Shared,
    Json(request): Json<InviteRequest>,
) -> Result<Json<InviteAnswer>, Refusal> {
    let role = match Role::parse(&request.role) {
        Some(role @ (Role::Agent | Role::ProcessServer)) => role,
        _ => {
            let reason = format!("{} cannot be invited", request.role);
            return Err(Refusal::conflict(
                "no invitation",
                reason,
                "use --role agent or --role process-server",
            ));
        }
    };
    if !INVITATION_SECONDS.contains(&request.valid_seconds) {
        let reason = format!(
            "a token cannot be valid for {} s: it lies in logs and clipboards",
            request.valid_seconds
        );
        return Err(Refusal::conflict("no invitation", reason, "use --valid from 1m to 24h"));
    }
    let addresses = advertised(&state);
    blocking(move || {
        let ca = state.ca.as_ref().context("this site has its own PKI ([pki] in the configuration): have it issue the certificate, nobody enrols here")?;
        let ca_key_sha256 = ca.key_sha256()?;
        let invite = Invite {
            role,
            lifetime: Duration::from_secs(request.valid_seconds),
            target: state.identity.own().peer,
            ca_key_sha256,
            addresses: addresses.clone(),
        };
        let (invitation, token) = state.invitations.create(invite, wall_clock())?;
        Ok(InviteAnswer {
            token: token.to_text()?,
            peer: invitation.peer.to_string(),
            valid_seconds: request.valid_seconds,
            addresses,
        })
    })
    .await
}

/// Where invited daemons find this target: as configured, else where it listens, else its host name.
fn advertised(state: &AdminState) -> Vec<String> {
    let advertise = state.live().advertise;
    if !advertise.is_empty() {
        return advertise.iter().map(ToString::to_string).take(4).collect();
    }
    if !state.listen.ip().is_unspecified() {
        return vec![state.listen.to_string()];
    }
    let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    vec![format!("{name}:{}", state.listen.port())]
}

async fn revoke(
    State(state): Shared,
    Json(request): Json<RevokeRequest>,
) -> Result<Json<RevokeAnswer>, Refusal> {
    blocking(move || {
        let peer = match PeerId::parse(&request.peer) {
            Ok(peer) => peer,
            Err(_) => PeerId::parse(&state.registry.machine(&request.peer)?.agent)?,
        };
        if peer == state.identity.own().peer {
            anyhow::bail!("this is the master target itself; it cannot be revoked");
        }
        state.revocations.revoke(Revocation::Peer(peer))?;
        state.invitations.withdraw(peer)?;
        tracing::warn!(%peer, "revoked; its connections are closed");
        Ok(RevokeAnswer { peer: peer.to_string() })
    })
    .await
}

async fn protect_machine(
    State(state): Shared,
    Json(request): Json<ProtectRequest>,
) -> Result<Json<ProtectAnswer>, Refusal> {
    blocking(move || protect(&state.registry, &state.live().datastores, &request)).await
}

async fn unprotect(
    State(state): Shared,
    Json(request): Json<UnprotectRequest>,
) -> Result<Json<UnprotectAnswer>, Refusal> {
    blocking(move || {
        let record = state.registry.protected(&request.disk)?;
        let _alone = state.registry.changing_of(&record.agent)?;
        if !request.dry_run {
            state.registry.remove_disk(DiskId::parse(&record.disk)?)?;
            tracing::warn!(disk = record.disk, path = %record.path.display(), "no longer protected; the target stays");
        }
        Ok(UnprotectAnswer {
            disk: record.disk,
            source: record.source_name,
            path: record.path.display().to_string(),
        })
    })
    .await
}

async fn failback_machine(
    State(state): Shared,
    Json(request): Json<FailbackRequest>,
) -> Result<Json<FailbackAnswer>, Refusal> {
    blocking(move || {
        let machine = state.registry.machine(&request.machine)?;
        let _busy = state.registry.begin_long(&state.registry.protected_disks(&machine.agent)?)?;
        failback(&state.registry, &request)
    })
    .await
}

async fn export_point(
    State(state): Shared,
    Json(request): Json<ExportRequest>,
) -> Result<Json<ExportAnswer>, Refusal> {
    blocking(move || export::copy_point(&state.registry, &request)).await
}

async fn verify_points(
    State(state): Shared,
    Json(request): Json<VerifyRequest>,
) -> Result<Json<VerifyAnswer>, Refusal> {
    blocking(move || export::verify_points(&state.registry, &request)).await
}

pub(crate) fn refused(error: &anyhow::Error) -> Refusal {
    let (reason, remedy) = reason_and_remedy(error);
    Refusal::conflict("refused", reason, remedy)
}

/// Runs what touches files on a thread of its own; its error becomes a refusal whose text carries the remedy.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
) -> Result<Json<T>, Refusal> {
    match tokio::task::spawn_blocking(work).await {
        Ok(Ok(value)) => Ok(Json(value)),
        Ok(Err(error)) => Err(refused(&error)),
        Err(error) => Err(Refusal::conflict(
            "failed",
            error.to_string(),
            "see the daemon's log, report this as a defect",
        )),
    }
}
