//! The master target daemon: opens what it needs in order, accepts connections, stops cleanly.
//!
//! Order: state directory and its lock → CA and own identity → catalogue and targets → UDP port → admin socket →
//! ready. Stopping goes the other way: no new connections, sessions end, every target is flushed and closed.
//! Invariants: one daemon per state directory; a daemon that says ready accepts sessions. Called by `main` and tests.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::Context;
use reprotect_engine::host::admin::AdminServer;
use reprotect_engine::host::config::Overrides;
use reprotect_engine::host::places::Program;
use reprotect_engine::host::run_lock::RunLock;
use reprotect_engine::host::shutdown::{Notifier, Shutdown};
use reprotect_engine::net::ca::Ca;
use reprotect_engine::net::endpoint::{Accepted, CloseCode, Server, TransportSettings, bind_server};
use reprotect_engine::net::enroll::serve_enrolment;
use reprotect_engine::net::identity::{IDENTITY_FILE, Identity, Role};
use reprotect_engine::net::invitations::Invitations;
use reprotect_engine::net::revocations::Revocations;
use reprotect_engine::net::tls::server_config;
use reprotect_engine::net::trust::{PeerRule, Trust};
use reprotect_engine::net::tunnel::unmarked;
use reprotect_engine::net::wall_clock;
use reprotect_engine::proto::Authority;
use reprotect_engine::proto::credit::FlowLimits;
use reprotect_engine::units::PeerId;
use tokio::sync::watch;

use crate::admin::{AdminState, LiveSettings, router};
use crate::again;
use crate::authority::SiteAuthority;
use crate::catalogue::Catalogue;
use crate::config::Settings;
use crate::housekeeping;
use crate::mounts::Mounts;
use crate::registry::{Registry, fs_opener};
use crate::retention::{Retention, RetentionSettings};
use crate::retention_policy::RetentionPolicy;
use crate::scrub::Scrub;
use crate::session;

/// The site's name where none is configured.
const SITE_DEFAULT: &str = "default";
/// Longest time from a change to its commit in the redo log.
const JOURNAL_FLUSH_NANOS: u64 = 20_000_000;
/// How often the own certificate's age is looked at.
const RENEWAL_CHECK: Duration = Duration::from_secs(3600);

/// Everything about who this target is.
struct Keys {
    /// `None` where the site has its own PKI: nobody enrols here then.
    ca: Option<Arc<Ca>>,
    identity: Arc<Identity>,
    trust: Arc<Trust>,
    revocations: Arc<Revocations>,
    invitations: Arc<Invitations>,
}

/// Runs until `shutdown`.
///
/// # Errors
/// When something it needs cannot be had; the text says what and what to do.
pub async fn run(settings: Settings, shutdown: Shutdown) -> anyhow::Result<()> {
    run_reloading(settings, shutdown, None).await
}

/// Where a running daemon finds its configuration again.
#[derive(Debug)]
pub struct Reload {
    /// Changes whenever it is to be read.
    pub asked: watch::Receiver<u64>,
    /// The command line's options.
    pub overrides: Overrides,
}

/// As [`run`], taking over what may change at each [`Reload`].
///
/// # Errors
/// As [`run`].
pub async fn run_reloading(
    settings: Settings,
    shutdown: Shutdown,
    reload: Option<Reload>,
) -> anyhow::Result<()> {
    settings.places.create_state_dir()?;
    let _lock = RunLock::acquire(Program::MasterTarget, &settings.places.state_dir)?;
    let keys = open_keys(&settings)?;
    let limits = FlowLimits {
        flush_bytes: settings.flush_bytes,
        flush_nanos: u64::try_from(settings.flush_interval.as_nanos()).unwrap_or(u64::MAX),
        ..FlowLimits::default()
    };
    let catalogue = Catalogue::open(&settings.places.state_dir)?;
    let chosen = settings.retention.clone();
    let configured = chosen.as_ref().map(|(_, chosen)| chosen.ladder.clone());
    let retention_policy = RetentionPolicy::new(&settings.places.state_dir, configured);
    let policy = retention_policy.clone();
    let (registry, retention) =
        tokio::task::spawn_blocking(move || open_disks(catalogue, limits, chosen, &policy)).await??;
    let registry = Arc::new(registry);
    let authority: Arc<dyn Authority> =
        Arc::new(SiteAuthority::new(Arc::clone(&keys.identity), Arc::clone(&keys.trust))?);
    let site = keys.identity.own().site.clone();
    let rule = PeerRule::of_site(&site, &[Role::Agent, Role::ProcessServer]);
    let tls = server_config(&keys.identity, Arc::clone(&keys.trust), rule.clone(), keys.ca.is_some())?;
    let server = Arc::new(bind_server(
        settings.listen,
        tls,
        Arc::clone(&keys.revocations),
        TransportSettings::default(),
    )?);
    let listen = server.local_address()?;
    let admin = AdminServer::bind(&settings.places.socket).await?;
    let mounts = settings.places.state_dir.join("mounts");
    let state = Arc::new(AdminState {
        registry: Arc::clone(&registry),
        invitations: Arc::clone(&keys.invitations),
        ca: keys.ca.clone(),
        identity: Arc::clone(&keys.identity),
        revocations: Arc::clone(&keys.revocations),
        live: Mutex::new(LiveSettings::of(&settings)),
        mounts: (Mounts::new(&settings.mounts, &mounts)?, mounts),
        retention_policy,
        listen,
        started: Instant::now(),
    });
    let counting = tokio::spawn(Arc::clone(registry.receipts()).count_points(Arc::clone(&registry)));
    let mut retention = retention;
    if let Some((retention, threads)) = &mut retention {
        threads.push(again::start(&registry, retention).context("no thread for disks that were given up")?);
    }
    let scrub = match &retention {
        Some((retention, _)) => Scrub::start(&registry, retention)?,
        None => None,
    };
    let admin_task = tokio::spawn(admin.serve(router(Arc::clone(&state)), shutdown.clone()));
    let notifier = Notifier::from_env()?;
    notifier.send("READY=1")?;
    tracing::info!(%listen, site, target = %keys.identity.own().peer, "ready");
    tokio::select! {
        () = accept(&server, &keys, authority, &registry) => {}
        () = renew_own(&server, &keys, &rule, &settings) => {}
        () = take_reloads(reload, settings.clone(), &state) => {}
        () = notifier.watch(&shutdown) => {}
        () = shutdown.requested() => {}
    }
    tracing::info!("stopping: closing sessions, then every target");
    if let Some((retention, _)) = &retention {
        retention.interrupt(); // what is ended below may wait for a disk that goes back
    }
    counting.abort();
    // Best effort: systemd learns of the end by the exit as well.
    let _ = notifier.send("STOPPING=1");
    server.close().await;
    state.mounts.0.stop().await;
    tokio::task::spawn_blocking(move || {
        if let Some(scrub) = scrub {
            scrub.stop();
        }
        registry.stop();
        if let Some((retention, threads)) = retention {
            retention.close(threads);
        }
    })
    .await?;
    admin_task.await??;
    Ok(())
}

/// The journal and the threads that commit it and keep house.
type OpenRetention = (Arc<Retention>, Vec<std::thread::JoinHandle<()>>);

/// Opens the journal, where there is one, then every disk.
fn open_disks(
    catalogue: Catalogue,
    limits: FlowLimits,
    chosen: Option<(std::path::PathBuf, RetentionSettings)>,
    policy: &RetentionPolicy,
) -> anyhow::Result<(Registry, Option<OpenRetention>)> {
    let Some((folder, settings)) = chosen else {
        tracing::warn!("no `retention.path`: disks can be had at their newest state only");
        return Ok((Registry::open(catalogue, limits)?, None));
    };
    let (retention, recovered) = Retention::open(fs_opener(), &folder, settings)?;
    policy.take_effect(&retention)?; // before the first points are thinned
    let _opening = retention.opening(); // before anybody tidies the log up
    let threads = vec![
        retention.start().context("no thread for the retention journal")?,
        housekeeping::start(&retention).context("no thread for the retention journal")?,
    ];
    // In the log a flush is one for all disks, so the state follows each batch closely.
    let limits = FlowLimits { flush_nanos: limits.flush_nanos.min(JOURNAL_FLUSH_NANOS), ..limits };
    match Registry::open_with(catalogue, limits, fs_opener(), Some((Arc::clone(&retention), recovered))) {
        Ok(registry) => Ok((registry, Some((retention, threads)))),
        Err(error) => {
            retention.close(threads);
            Err(error)
        }
    }
}

fn open_keys(settings: &Settings) -> anyhow::Result<Keys> {
    let state_dir = &settings.places.state_dir;
    let revocations = Arc::new(Revocations::load(state_dir.join("revoked"))?);
    let invitations = Arc::new(Invitations::load(state_dir.join("invitations"))?);
    if settings.credentials.renewed_in().is_none() {
        let identity = settings.credentials.identity()?;
        let own = identity.own();
        anyhow::ensure!(
            own.role == Role::MasterTarget,
            "the certificate in `pki.certificate` names a {}, not a master-target; have one issued with the URI reprotect://{}/master-target/UUID",
            own.role,
            own.site
        );
        let trust = Arc::new(settings.credentials.trust(Arc::clone(&revocations))?);
        return Ok(Keys { ca: None, identity: Arc::new(identity), trust, revocations, invitations });
    }
    let site = settings.site.as_deref().unwrap_or(SITE_DEFAULT);
    let ca = Ca::open_or_create(&state_dir.join("ca"), site, wall_clock())?;
    let trust = Arc::new(Trust::new(&[ca.certificate().clone()], Arc::clone(&revocations))?);
    let identity = own_identity(&ca, state_dir)?;
    Ok(Keys { ca: Some(Arc::new(ca)), identity: Arc::new(identity), trust, revocations, invitations })
}

/// The target's identity of its own CA: made at the first start, renewed when due.
fn own_identity(ca: &Ca, state_dir: &Path) -> anyhow::Result<Identity> {
    let peer = if state_dir.join(IDENTITY_FILE).exists() {
        let identity = Identity::load(state_dir)?;
        if !identity.is_due_for_renewal(wall_clock()) {
            return Ok(identity);
        }
        identity.own().peer
    } else {
        PeerId::random().map_err(|error| anyhow::anyhow!("the system has no randomness: {error}"))?
    };
    let identity = ca.issue_identity(Role::MasterTarget, peer, wall_clock())?;
    identity.save(state_dir)?;
    Ok(identity)
}

/// Accepts until the endpoint is closed.
async fn accept(server: &Server, keys: &Keys, authority: Arc<dyn Authority>, registry: &Arc<Registry>) {
    let target = keys.identity.own().peer;
    while let Some(accepted) = server.accept().await {
        match accepted {
            Accepted::Peer(peer) => {
                let (authority, registry) = (Arc::clone(&authority), Arc::clone(registry));
                let revocations = Arc::clone(&keys.revocations);
                tokio::spawn(session::serve(peer, target, authority, registry, revocations));
            }
            Accepted::Enrolment { connection, peer } => {
                let Some(ca) = keys.ca.clone() else {
                    CloseCode::Violation.close(&connection);
                    continue;
                };
                let invitations = Arc::clone(&keys.invitations);
                tokio::spawn(async move {
                    let address = unmarked(connection.remote_address());
                    match serve_enrolment(connection, peer, &invitations, &ca).await {
                        Ok(enrolled) => tracing::info!(
                            %address, peer = %enrolled.peer, role = %enrolled.role, host = enrolled.host_name, "enrolled"
                        ),
                        Err(error) => tracing::warn!(%address, %error, "an enrolment was refused"),
                    }
                });
            }
        }
    }
}

/// Reads the configuration again whenever asked to; never returns.
async fn take_reloads(reload: Option<Reload>, mut current: Settings, state: &AdminState) {
    let Some(Reload { mut asked, overrides }) = reload else { return std::future::pending().await };
    while asked.changed().await.is_ok() {
        match Settings::load(&overrides) {
            Ok(new) => {
                state.set_live(LiveSettings::of(&new));
                let live = Settings {
                    advertise: new.advertise.clone(),
                    datastores: new.datastores.clone(),
                    ..current.clone()
                };
                if live == new {
                    tracing::info!("the configuration was read again");
                } else {
                    tracing::warn!(
                        "the configuration was read again; advertise and datastores hold now, the other changes from the next start"
                    );
                }
                current = live;
            }
            Err(error) => tracing::error!("the configuration was not taken over, the old one holds: {error}"),
        }
    }
    std::future::pending().await
}

/// Renews the target's own certificate in time; never returns.
async fn renew_own(server: &Server, keys: &Keys, rule: &PeerRule, settings: &Settings) {
    let Some(ca) = &keys.ca else { return std::future::pending().await }; // the site's PKI renews
    loop {
        tokio::time::sleep(RENEWAL_CHECK).await;
        if keys.identity.is_due_for_renewal(wall_clock())
            && let Err(error) = renew_now(server, ca, &keys.trust, rule, &settings.places.state_dir)
        {
            tracing::error!("the target's own certificate could not be renewed: {error:#}");
        }
    }
}

fn renew_now(
    server: &Server,
    ca: &Ca,
    trust: &Arc<Trust>,
    rule: &PeerRule,
    state_dir: &Path,
) -> anyhow::Result<()> {
    if !Identity::load(state_dir)?.is_due_for_renewal(wall_clock()) {
        return Ok(()); // renewed by this daemon already
    }
    let renewed = own_identity(ca, state_dir)?;
    server
        .replace_tls(server_config(&renewed, Arc::clone(trust), rule.clone(), true)?)
        .context("the endpoint refused the new certificate")?;
    tracing::info!("the target's own certificate was renewed");
    Ok(())
}
