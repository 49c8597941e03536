//! Enrolment and renewal over `reprotect-enroll/1`: how a daemon gets its certificate.
//!
//! Invariants: the new machine believes only the CA whose key hash its token names, and only the master target the
//! token names; its private key never leaves it; the target spends the token durably before it issues; one request per
//! connection, bounded in bytes and time, and nothing else is served here; a renewal keeps role, peer and site, which
//! come from the verified certificate and not from the request. Called by `enroll` commands and the master target.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use quinn::Connection;
use rustls_pki_types::CertificateDer;

use crate::error::Severity;
use crate::net::ca::{Ca, CaError};
use crate::net::dialer::Dialer;
use crate::net::endpoint::{CloseCode, EndpointError, TransportSettings, peer_chain};
use crate::net::enroll_wire::{
    ANSWER_BYTES_MAX, Answer, Kind, REQUEST_BYTES_MAX, Refusal, Request, WireError, is_host_name,
};
use crate::net::files::{self, Access, FileError};
use crate::net::identity::{
    IDENTITY_FILE, Identity, IdentityError, PeerIdentity, PendingIdentity, Role, to_pem,
};
use crate::net::invitations::{InvitationError, Invitations};
use crate::net::revocations::Revocations;
use crate::net::tls::{self, TlsError};
use crate::net::token::{SECRET_BYTES, Token};
use crate::net::trust::{PeerRule, ROOTS_FILE, Trust, Usage};
use crate::net::tunnel::unmarked;
use crate::net::{mono_clock, wall_clock};
use crate::units::PeerId;

/// One exchange must be over in this time.
pub const EXCHANGE_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a machine did not get its certificate, or a request was not served.
#[derive(Debug, thiserror::Error)]
pub enum EnrollError {
    /// The token is for another program.
    #[error("the token is for a daemon of role {token}, this is a {own}; invite again with the right role")]
    WrongProgram {
        /// The token's role.
        token: Role,
        /// Ours.
        own: Role,
    },
    /// The token is too old.
    #[error(
        "the token has expired (or this machine's clock is ahead); make a new one with `reprotect-master-target invite`"
    )]
    Expired,
    /// There is an identity already.
    #[error("{0} exists: this machine is enrolled; delete that file to enrol it anew")]
    AlreadyEnrolled(String),
    /// A host name that cannot be sent.
    #[error("host name {0:?} is not usable; use letters, digits, '.', '-' and '_', at most 253")]
    HostName(String),
    /// A name in the token does not resolve.
    #[error("cannot resolve {address}: {source}; check the name service, or invite with an IP address")]
    Resolve {
        /// As in the token.
        address: String,
        /// The reason.
        #[source]
        source: std::io::Error,
    },
    /// No connection.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    /// The connection broke or took too long.
    #[error("the enrolment exchange with {0} broke off; try again")]
    BrokenOff(SocketAddr),
    /// The other side's message is malformed.
    #[error("the enrolment message from {0} is malformed; check that both sides run Reprotect")]
    Malformed(SocketAddr),
    /// The target refused.
    #[error("the master target refused: {}", refusal_text(*.0))]
    Refused(Refusal),
    /// What the target issued is not usable.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The state directory.
    #[error(transparent)]
    File(#[from] FileError),
    /// TLS.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Serving: the invitation.
    #[error(transparent)]
    Invitation(#[from] InvitationError),
    /// Serving: the CA.
    #[error(transparent)]
    Ca(#[from] CaError),
}

impl crate::error::Answer for EnrollError {
    fn severity(&self) -> Severity {
        match self {
            Self::Endpoint(error) => error.severity(),
            Self::Invitation(error) => error.severity(),
            Self::BrokenOff(_) | Self::Resolve { .. } | Self::Refused(Refusal::TooMany) => Severity::Retry,
            _ => Severity::Stop,
        }
    }
}

fn refusal_text(refusal: Refusal) -> &'static str {
    match refusal {
        Refusal::Unknown => "the token is unknown or was already used; make a new one",
        Refusal::Expired => "the token has expired; make a new one",
        Refusal::WrongRole => "the token is for another kind of daemon; invite again with the right role",
        Refusal::TooMany => "too many attempts; wait a few seconds and try again",
        Refusal::BadRequest => "it does not accept the certificate request; check both versions",
        Refusal::NoCertificate => "a renewal needs the present certificate; enrol again if it is lost",
        Refusal::Version => "it does not know this version of enrolment; upgrade the master target first",
        Refusal::Internal => "it has a problem of its own; see its log",
    }
}

/// Gets this machine's first certificate and saves it, with the CA to trust, in `state_dir`.
///
/// # Errors
/// When the token does not fit, no address answers as the invited target, or it refuses.
pub async fn enroll(
    token: &Token,
    role: Role,
    host_name: &str,
    state_dir: &Path,
) -> Result<Identity, EnrollError> {
    let identity_path = state_dir.join(IDENTITY_FILE);
    if identity_path.exists() {
        return Err(EnrollError::AlreadyEnrolled(identity_path.display().to_string()));
    }
    if token.role != role {
        return Err(EnrollError::WrongProgram { token: token.role, own: role });
    }
    if token.expires <= wall_clock() {
        return Err(EnrollError::Expired);
    }
    let pending = PendingIdentity::generate()?;
    let request = request(Kind::Enrol, role, token.secret, host_name, pending.request()?)?;
    let connection = connect_any(token).await?;
    let (peer, chain) = exchange(&connection, &request).await?;
    let shown = peer_chain(&connection).unwrap_or_default();
    let root = tls::pinned_root(&shown, &token.ca_key_sha256)?.clone();
    CloseCode::Finished.close(&connection);

    let trust = Trust::new(std::slice::from_ref(&root), Arc::new(Revocations::in_memory()))?;
    let identity = accept_issued(pending, chain, &trust, role, peer)?;
    // The roots first: an identity that is there is complete.
    files::create_private_dir(state_dir)?;
    files::replace(&state_dir.join(ROOTS_FILE), to_pem("CERTIFICATE", &root).as_bytes(), Access::Public)?;
    identity.save(state_dir)?;
    Ok(identity)
}

/// Gets a new certificate for a new key, with the present one; the caller saves and uses it.
///
/// # Errors
/// When the target cannot be reached, is not who it should be, or refuses.
pub async fn renew(
    identity: &Identity,
    trust: &Arc<Trust>,
    target: SocketAddr,
    target_rule: &PeerRule,
    host_name: &str,
) -> Result<Identity, EnrollError> {
    let own = identity.own();
    let pending = PendingIdentity::generate()?;
    let request = request(Kind::Renew, own.role, [0; SECRET_BYTES], host_name, pending.request()?)?;
    let dialer = Dialer::bind(unspecified(target), TransportSettings::default())?;
    let config = tls::renewal_config(identity, Arc::clone(trust), target_rule.clone())?;
    let connection = dialer.connect_raw(target, config, target_rule.peer).await?;
    let (peer, chain) = exchange(&connection, &request).await?;
    CloseCode::Finished.close(&connection);
    if peer != own.peer {
        return Err(IdentityError::OtherPeer { expected: own.peer, got: peer }.into());
    }
    Ok(accept_issued(pending, chain, trust, own.role, peer)?)
}

fn request(
    kind: Kind,
    role: Role,
    secret: [u8; SECRET_BYTES],
    host_name: &str,
    csr: Vec<u8>,
) -> Result<Request, EnrollError> {
    if !is_host_name(host_name) {
        return Err(EnrollError::HostName(host_name.to_owned()));
    }
    Ok(Request { kind, role, secret, host_name: host_name.to_owned(), csr })
}

/// Believes what was issued only if it is ours, in every respect.
fn accept_issued(
    pending: PendingIdentity,
    chain: Vec<CertificateDer<'static>>,
    trust: &Trust,
    role: Role,
    peer: PeerId,
) -> Result<Identity, IdentityError> {
    let identity = pending.complete(chain)?;
    let rule = PeerRule { roles: crate::net::trust::Roles::of(&[role]), peer: Some(peer), site: None };
    if let Some((leaf, rest)) = identity.chain().split_first() {
        trust.verify_chain(leaf, rest, Usage::Client, &rule, wall_clock())?;
    }
    Ok(identity)
}

fn unspecified(towards: SocketAddr) -> SocketAddr {
    if towards.is_ipv4() { (Ipv4Addr::UNSPECIFIED, 0).into() } else { (Ipv6Addr::UNSPECIFIED, 0).into() }
}

/// The first of the token's addresses where the invited target answers; else the last error.
async fn connect_any(token: &Token) -> Result<Connection, EnrollError> {
    let rule = PeerRule {
        roles: crate::net::trust::Roles::of(&[Role::MasterTarget]),
        peer: Some(token.target),
        site: None,
    };
    let mut last = None;
    for address in &token.addresses {
        let resolved = match tokio::net::lookup_host(address).await {
            Ok(resolved) => resolved,
            Err(source) => {
                last = Some(EnrollError::Resolve { address: address.clone(), source });
                continue;
            }
        };
        for target in resolved.take(4) {
            let dialer = Dialer::bind(unspecified(target), TransportSettings::default())?;
            let config = tls::enrolment_config(token.ca_key_sha256, rule.clone())?;
            match dialer.connect_raw(target, config, Some(token.target)).await {
                Ok(connection) => return Ok(connection),
                Err(error) => last = Some(error.into()),
            }
        }
    }
    Err(last.unwrap_or(EnrollError::Expired))
}

/// Sends a request and reads its answer.
async fn exchange(
    connection: &Connection,
    request: &Request,
) -> Result<(PeerId, Vec<CertificateDer<'static>>), EnrollError> {
    let address = unmarked(connection.remote_address());
    let bytes = request.encode().ok_or(EnrollError::Malformed(address))?;
    let talk = async {
        let (mut send, mut receive) = connection.open_bi().await.ok()?;
        send.write_all(&bytes).await.ok()?;
        send.finish().ok()?;
        receive.read_to_end(ANSWER_BYTES_MAX).await.ok()
    };
    let answer = tokio::time::timeout(EXCHANGE_TIMEOUT, talk).await.ok().flatten();
    match Answer::decode(&answer.ok_or(EnrollError::BrokenOff(address))?) {
        Ok(Answer::Issued { peer, chain, .. }) => Ok((peer, chain)),
        Ok(Answer::Refused(refusal)) => Err(EnrollError::Refused(refusal)),
        Err(WireError::Version(_)) => Err(EnrollError::Refused(Refusal::Version)),
        Err(WireError::Malformed) => Err(EnrollError::Malformed(address)),
    }
}

/// What was served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Enrolled {
    /// First certificate, or a renewal.
    pub kind: Kind,
    /// Whom.
    pub peer: PeerId,
    /// As what.
    pub role: Role,
    /// What the machine calls itself; for people only.
    pub host_name: String,
}

/// Serves the one request of an enrolment connection, then closes it. `peer` is what the handshake verified, if the
/// client showed a certificate.
///
/// # Errors
/// When the request was refused (the client was told) or the exchange broke off.
pub async fn serve_enrolment(
    connection: Connection,
    peer: Option<PeerIdentity>,
    invitations: &Arc<Invitations>,
    ca: &Arc<Ca>,
) -> Result<Enrolled, EnrollError> {
    let serve = serve_one(&connection, peer, invitations, ca);
    let result = match tokio::time::timeout(EXCHANGE_TIMEOUT, serve).await {
        Ok(result) => result,
        Err(_) => Err(EnrollError::BrokenOff(unmarked(connection.remote_address()))),
    };
    let code = if matches!(result, Err(EnrollError::Malformed(_))) {
        CloseCode::Violation
    } else {
        // The client closes when it has read the answer; closing first could cut it off.
        let _ = tokio::time::timeout(EXCHANGE_TIMEOUT, connection.closed()).await;
        CloseCode::Finished
    };
    code.close(&connection);
    result
}

async fn serve_one(
    connection: &Connection,
    peer: Option<PeerIdentity>,
    invitations: &Arc<Invitations>,
    ca: &Arc<Ca>,
) -> Result<Enrolled, EnrollError> {
    let address = unmarked(connection.remote_address());
    let broken = || EnrollError::BrokenOff(address);
    let (mut send, mut receive) = connection.accept_bi().await.map_err(|_| broken())?;
    let bytes = match receive.read_to_end(REQUEST_BYTES_MAX).await {
        Ok(bytes) => bytes,
        Err(quinn::ReadToEndError::TooLong) => return Err(EnrollError::Malformed(address)),
        Err(quinn::ReadToEndError::Read(_)) => return Err(broken()),
    };
    let decided = match Request::decode(&bytes) {
        Err(WireError::Malformed) => return Err(EnrollError::Malformed(address)),
        Err(WireError::Version(_)) => Err(EnrollError::Refused(Refusal::Version)),
        Ok(request) => {
            let (invitations, ca) = (Arc::clone(invitations), Arc::clone(ca));
            // Spending a token syncs a file: not for a runtime thread. The rate limit bounds how many run.
            tokio::task::spawn_blocking(move || decide(&request, peer.as_ref(), &invitations, &ca))
                .await
                .map_err(|_| broken())?
        }
    };
    let (answer, result) = match decided {
        Ok((enrolled, chain)) => {
            let answer = Answer::Issued { peer: enrolled.peer, site: ca.site().to_owned(), chain };
            (answer, Ok(enrolled))
        }
        Err(error) => (Answer::Refused(refusal_of(&error)), Err(error)),
    };
    let bytes = answer.encode().ok_or(EnrollError::Malformed(address))?;
    send.write_all(&bytes).await.map_err(|_| broken())?;
    send.finish().map_err(|_| broken())?;
    result
}

type Issued = (Enrolled, Vec<CertificateDer<'static>>);

fn decide(
    request: &Request,
    peer: Option<&PeerIdentity>,
    invitations: &Invitations,
    ca: &Ca,
) -> Result<Issued, EnrollError> {
    let now = wall_clock();
    let (role, peer) = match request.kind {
        Kind::Enrol => {
            let invitation = invitations.redeem(&request.secret, request.role, now, mono_clock())?;
            (invitation.role, invitation.peer)
        }
        Kind::Renew => {
            let peer = peer.ok_or(EnrollError::Refused(Refusal::NoCertificate))?;
            (peer.role, peer.peer)
        }
    };
    let chain = ca.issue_now(&request.csr, role, peer, now)?;
    Ok((Enrolled { kind: request.kind, peer, role, host_name: request.host_name.clone() }, chain))
}

fn refusal_of(error: &EnrollError) -> Refusal {
    match error {
        EnrollError::Refused(refusal) => *refusal,
        EnrollError::Invitation(InvitationError::Unknown) => Refusal::Unknown,
        EnrollError::Invitation(InvitationError::Expired) => Refusal::Expired,
        EnrollError::Invitation(InvitationError::WrongRole { .. }) => Refusal::WrongRole,
        EnrollError::Invitation(InvitationError::TooMany) => Refusal::TooMany,
        EnrollError::Ca(CaError::Request { .. }) => Refusal::BadRequest,
        _ => Refusal::Internal,
    }
}
