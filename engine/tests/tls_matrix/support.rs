//! A site with its CA and daemons, attackers, and raw packets for the transport tests.
//!
//! Invariant: the daemons here do what the programs do (accept, serve enrolment, echo streams) and nothing that would
//! hide a fault of the code under test.

#![expect(clippy::unwrap_used, reason = "test support: a failed step is a failed test")]
#![expect(dead_code, reason = "shared by several test programs, each of which uses a part")]

use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use quinn::{Connection, ConnectionError};
use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, Issuer, KeyPair, SanType};
use reprotect_engine::net::ca::Ca;
use reprotect_engine::net::dialer::Dialer;
use reprotect_engine::net::endpoint::{
    Accepted, EndpointError, PeerConnection, Server, TransportSettings, bind_server,
};
use reprotect_engine::net::enroll::serve_enrolment;
use reprotect_engine::net::identity::{self, Identity, PeerIdentity, Role};
use reprotect_engine::net::invitations::Invitations;
use reprotect_engine::net::revocations::Revocations;
use reprotect_engine::net::trust::{PeerRule, Trust};
use reprotect_engine::net::{tls, wall_clock};
use reprotect_engine::units::PeerId;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::ring::default_provider;
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, UnixTime};

pub(crate) const SECOND: u64 = 1_000_000_000;

pub(crate) fn loopback() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}

pub(crate) fn dialer() -> Dialer {
    Dialer::bind(loopback(), TransportSettings::default()).unwrap()
}

/// One site: CA, trust, revocations.
pub(crate) struct Site {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) ca: Arc<Ca>,
    pub(crate) revocations: Arc<Revocations>,
    pub(crate) trust: Arc<Trust>,
    pub(crate) invitations: Arc<Invitations>,
}

impl Site {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let ca = Arc::new(Ca::open_or_create(&dir.path().join("ca"), "berlin", wall_clock()).unwrap());
        let revocations = Arc::new(Revocations::load(dir.path().join("revoked")).unwrap());
        let trust = Arc::new(Trust::new(&[ca.certificate().clone()], Arc::clone(&revocations)).unwrap());
        let invitations = Arc::new(Invitations::load(dir.path().join("invitations")).unwrap());
        Self { dir, ca, revocations, trust, invitations }
    }

    pub(crate) fn identity(&self, role: Role) -> Identity {
        self.ca.issue_identity(role, PeerId::random().unwrap(), wall_clock()).unwrap()
    }

    pub(crate) fn server_tls(&self, identity: &Identity, clients: &[Role]) -> rustls::ServerConfig {
        let rule = PeerRule::of_site("berlin", clients);
        tls::server_config(identity, Arc::clone(&self.trust), rule, true).unwrap()
    }

    pub(crate) fn daemon(&self, role: Role, clients: &[Role]) -> Daemon {
        let posed = role;
        Daemon { posed, ..self.daemon_with(&self.identity(role), Arc::clone(&self.trust), clients) }
    }

    pub(crate) fn daemon_with(&self, identity: &Identity, trust: Arc<Trust>, clients: &[Role]) -> Daemon {
        self.start(identity, trust, clients, TransportSettings::default(), true)
    }

    /// One that enrols nobody, as a process server.
    pub(crate) fn daemon_set(&self, clients: &[Role], settings: TransportSettings) -> Daemon {
        let identity = self.identity(Role::ProcessServer);
        let daemon = self.start(&identity, Arc::clone(&self.trust), clients, settings, false);
        Daemon { posed: Role::ProcessServer, ..daemon }
    }

    pub(crate) fn daemon_limited(
        &self,
        role: Role,
        clients: &[Role],
        unfinished_handshakes_max: usize,
    ) -> Daemon {
        let settings = TransportSettings { unfinished_handshakes_max, ..TransportSettings::default() };
        self.start(&self.identity(role), Arc::clone(&self.trust), clients, settings, true)
    }

    fn start(
        &self,
        identity: &Identity,
        trust: Arc<Trust>,
        clients: &[Role],
        settings: TransportSettings,
        enrols: bool,
    ) -> Daemon {
        let rule = PeerRule::of_site("berlin", clients);
        let tls = tls::server_config(identity, trust, rule, enrols).unwrap();
        let server = Arc::new(bind_server(loopback(), tls, Arc::clone(&self.revocations), settings).unwrap());
        let address = server.local_address().unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let heard = Arc::new(Mutex::new(Vec::new()));
        let work = serve(
            Arc::clone(&server),
            Arc::clone(&seen),
            Arc::clone(&heard),
            Arc::clone(&self.invitations),
            Arc::clone(&self.ca),
        );
        tokio::spawn(work);
        Daemon {
            server,
            address,
            peer: identity.own().peer,
            posed: Role::MasterTarget,
            client: clients[0],
            seen,
            heard,
        }
    }

    pub(crate) async fn dial(
        &self,
        identity: &Identity,
        daemon: &Daemon,
    ) -> Result<PeerConnection, EndpointError> {
        let rule = PeerRule::of_site("berlin", &[daemon.posed]);
        let tls = tls::client_config(identity, Arc::clone(&self.trust), rule).unwrap();
        dialer().connect(daemon.address, tls, Some(daemon.peer), &self.revocations).await
    }

    /// An agent's certificate of the right CA, changed by `edit`.
    pub(crate) fn mint(
        &self,
        edit: impl Fn(&mut CertificateParams),
    ) -> (Vec<CertificateDer<'static>>, KeyPair) {
        let read = |name| std::fs::read_to_string(self.dir.path().join("ca").join(name)).unwrap();
        let issuer =
            Issuer::from_ca_cert_pem(&read("ca.pem"), KeyPair::from_pem(&read("ca.key")).unwrap()).unwrap();
        let key = KeyPair::generate().unwrap();
        let mut params = leaf_params("berlin", Role::Agent, PeerId([7; 16]));
        edit(&mut params);
        let leaf = params.signed_by(&key, &issuer).unwrap();
        (vec![leaf.into(), self.ca.certificate().clone()], key)
    }

    pub(crate) fn state_dir(&self, name: &str) -> std::path::PathBuf {
        Path::new(self.dir.path()).join(name)
    }
}

pub(crate) fn leaf_params(site: &str, role: Role, peer: PeerId) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![SanType::URI(identity::uri(site, role, peer).try_into().unwrap())];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    params
}

/// A CA that knows nothing of us but the names.
pub(crate) struct ForeignPki {
    issuer: rcgen::CertifiedIssuer<'static, KeyPair>,
}

impl ForeignPki {
    pub(crate) fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap();
        Self { issuer: rcgen::CertifiedIssuer::self_signed(params, key).unwrap() }
    }

    pub(crate) fn identity(&self, role: Role, peer: PeerId) -> Identity {
        let key = KeyPair::generate().unwrap();
        let mut params = leaf_params("berlin", role, peer);
        params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
        let leaf = params.signed_by(&key, &self.issuer).unwrap();
        Identity::new(vec![leaf.into()], PrivatePkcs8KeyDer::from(key.serialize_der())).unwrap()
    }

    pub(crate) fn trust(&self) -> Arc<Trust> {
        Arc::new(Trust::new(&[self.issuer.der().clone()], Arc::new(Revocations::in_memory())).unwrap())
    }
}

/// A listening daemon: echoes streams of believed peers, serves enrolment.
pub(crate) struct Daemon {
    server: Arc<Server>,
    pub(crate) address: SocketAddr,
    pub(crate) peer: PeerId,
    /// What clients take it for; impostors pose as a target.
    posed: Role,
    client: Role,
    seen: Arc<Mutex<Vec<PeerIdentity>>>,
    heard: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl Daemon {
    /// What every stream carried that reached the daemon.
    pub(crate) fn heard(&self) -> Vec<Vec<u8>> {
        self.heard.lock().unwrap().clone()
    }

    /// Every peer that was handed to the daemon.
    pub(crate) fn seen(&self) -> Vec<PeerIdentity> {
        self.seen.lock().unwrap().clone()
    }

    /// A daemon of the same role on the site's present files.
    pub(crate) fn restarted_as(site: &Site, old: &Self) -> Self {
        site.daemon(old.posed, &[old.client])
    }

    pub(crate) fn open_connections(&self) -> usize {
        self.server.open_connections()
    }

    /// An honest agent still gets in, and is the only one who ever did.
    pub(crate) async fn still_serves_and_saw_none(&self, site: &Site) {
        let honest = site.identity(self.client);
        let connection = site.dial(&honest, self).await.unwrap();
        assert!(echoes(&connection.connection).await);
        let seen: Vec<_> = self.seen().into_iter().map(|peer| peer.peer).collect();
        assert_eq!(seen, [honest.own().peer]);
    }
}

async fn serve(
    server: Arc<Server>,
    seen: Arc<Mutex<Vec<PeerIdentity>>>,
    heard: Arc<Mutex<Vec<Vec<u8>>>>,
    invitations: Arc<Invitations>,
    ca: Arc<Ca>,
) {
    while let Some(accepted) = server.accept().await {
        match accepted {
            Accepted::Peer(peer) => {
                seen.lock().unwrap().push((*peer.peer).clone());
                tokio::spawn(echo(peer.connection, Arc::clone(&heard)));
            }
            Accepted::Enrolment { connection, peer } => {
                let (invitations, ca) = (Arc::clone(&invitations), Arc::clone(&ca));
                tokio::spawn(async move { serve_enrolment(connection, peer, &invitations, &ca).await });
            }
        }
    }
}

async fn echo(connection: Connection, heard: Arc<Mutex<Vec<Vec<u8>>>>) {
    while let Ok((mut send, mut receive)) = connection.accept_bi().await {
        if let Ok(bytes) = receive.read_to_end(1 << 20).await {
            heard.lock().unwrap().push(bytes.clone());
            let _ = send.write_all(&bytes).await;
            let _ = send.finish();
        }
    }
}

/// Whether a stream goes there and back.
pub(crate) async fn echoes(connection: &Connection) -> bool {
    let talk = async {
        let (mut send, mut receive) = connection.open_bi().await.ok()?;
        send.write_all(b"ping").await.ok()?;
        send.finish().ok()?;
        receive.read_to_end(16).await.ok()
    };
    tokio::time::timeout(Duration::from_secs(30), talk).await.ok().flatten().as_deref() == Some(b"ping")
}

/// The TLS alert a connection ended with.
pub(crate) fn alert(error: &ConnectionError) -> Option<u8> {
    let code = match error {
        ConnectionError::ConnectionClosed(close) => close.error_code,
        ConnectionError::TransportError(error) => error.code,
        _ => return None,
    };
    let code = u64::from(code);
    (0x100..0x200).contains(&code).then(|| (code - 0x100) as u8)
}

/// A client that believes any server and shows what it likes.
pub(crate) struct Attacker {
    endpoint: quinn::Endpoint,
}

impl Attacker {
    pub(crate) fn anonymous(protocols: &[&[u8]]) -> Self {
        Self::with(Self::builder().with_no_client_auth(), protocols)
    }

    pub(crate) fn showing(chain: Vec<CertificateDer<'static>>, key: &KeyPair, protocols: &[&[u8]]) -> Self {
        let key = default_provider()
            .key_provider
            .load_private_key(PrivatePkcs8KeyDer::from(key.serialize_der()).into())
            .unwrap();
        // Around rustls' own check that key and certificate fit.
        let shown = Arc::new(Shown(Arc::new(rustls::sign::CertifiedKey::new(chain, key))));
        Self::with(Self::builder().with_client_cert_resolver(shown), protocols)
    }

    fn builder() -> rustls::ConfigBuilder<rustls::ClientConfig, rustls::client::WantsClientCert> {
        rustls::ClientConfig::builder_with_provider(Arc::new(default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Credulous))
    }

    fn with(mut tls: rustls::ClientConfig, protocols: &[&[u8]]) -> Self {
        tls.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
        tls.enable_early_data = true;
        let mut transport = quinn::TransportConfig::default();
        transport.crypto_buffer_size(1 << 20);
        let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(tls).unwrap();
        let mut config = quinn::ClientConfig::new(Arc::new(crypto));
        config.transport_config(Arc::new(transport));
        let mut endpoint = quinn::Endpoint::client(loopback()).unwrap();
        endpoint.set_default_client_config(config);
        Self { endpoint }
    }

    /// Visits a server that gives tickets for early data under our servers' name, and keeps what it gets.
    pub(crate) async fn collects_tickets(&self) {
        let key = KeyPair::generate().unwrap();
        let leaf = CertificateParams::default().self_signed(&key).unwrap();
        let mut tls = rustls::ServerConfig::builder_with_provider(Arc::new(default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![leaf.into()], PrivatePkcs8KeyDer::from(key.serialize_der()).into())
            .unwrap();
        tls.alpn_protocols = vec![reprotect_engine::net::ALPN_DATA.to_vec()];
        tls.max_early_data_size = u32::MAX;
        let crypto = quinn::crypto::rustls::QuicServerConfig::try_from(tls).unwrap();
        let config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
        let generous = quinn::Endpoint::server(config, loopback()).unwrap();
        let address = generous.local_addr().unwrap();
        let serve = async {
            let connection = generous.accept().await.unwrap().await.unwrap();
            echo(connection, Arc::default()).await;
        };
        let visit = async {
            let connection = self.connect(address).await.unwrap();
            assert!(echoes(&connection).await, "the tickets came with the answer");
            connection.close(0_u32.into(), b"");
        };
        tokio::join!(serve, visit);
    }

    pub(crate) fn dial(&self, address: SocketAddr) -> quinn::Connecting {
        self.endpoint.connect(address, "any.reprotect.internal").unwrap()
    }

    pub(crate) async fn connect(&self, address: SocketAddr) -> Result<Connection, ConnectionError> {
        self.dial(address).await
    }

    /// How the server ends it; fails when it does not.
    pub(crate) async fn closed_by(&self, address: SocketAddr) -> ConnectionError {
        let end = async {
            match self.connect(address).await {
                Ok(connection) => connection.closed().await,
                Err(error) => error,
            }
        };
        tokio::time::timeout(Duration::from_secs(30), end).await.expect("the server must close")
    }
}

#[derive(Debug)]
struct Shown(Arc<rustls::sign::CertifiedKey>);

impl rustls::client::ResolvesClientCert for Shown {
    fn resolve(
        &self,
        _hints: &[&[u8]],
        _schemes: &[rustls::SignatureScheme],
    ) -> Option<Arc<rustls::sign::CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }

    fn has_certs(&self) -> bool {
        true
    }
}

#[derive(Debug)]
struct Credulous;

impl ServerCertVerifier for Credulous {
    fn verify_server_cert(
        &self,
        _leaf: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        default_provider().signature_verification_algorithms.supported_schemes()
    }
}

/// First packets of `count` connections, as a client sends them to nobody.
pub(crate) async fn capture_initials(count: usize) -> Vec<Vec<u8>> {
    use reprotect_engine::net::ALPN_DATA;
    let hole = tokio::net::UdpSocket::bind(loopback()).await.unwrap();
    let address = hole.local_addr().unwrap();
    let attacker = Attacker::anonymous(&[ALPN_DATA]);
    let mut initials = Vec::with_capacity(count);
    let mut bytes = vec![0; 2048];
    while initials.len() < count {
        let connecting = attacker.dial(address);
        let (len, _) = hole.recv_from(&mut bytes).await.unwrap();
        // Long header, type Initial: repeated packets of earlier connections are as good.
        if len >= 1200 && bytes[0] & 0xf0 == 0xc0 {
            initials.push(bytes[..len].to_vec());
        }
        drop(connecting);
    }
    initials
}

/// A TLS ClientHello with ECDSA and x25519, offering `versions` in its extension, or without that extension.
pub(crate) fn client_hello(versions: &[u16]) -> Vec<u8> {
    fn extension(kind: u16, body: &[u8]) -> Vec<u8> {
        let len = u16::try_from(body.len()).unwrap();
        [&kind.to_be_bytes(), &len.to_be_bytes(), body].concat()
    }
    let mut extensions = Vec::new();
    extensions.extend(extension(10, &[0, 2, 0, 0x1d])); // groups: x25519
    extensions.extend(extension(13, &[0, 2, 4, 3])); // signatures: ECDSA P-256 SHA-256
    extensions.extend(extension(16, b"\0\x0c\x0breprotect/1")); // ALPN
    if !versions.is_empty() {
        let list: Vec<u8> = versions.iter().flat_map(|version| version.to_be_bytes()).collect();
        extensions.extend(extension(43, &[&[u8::try_from(list.len()).unwrap()], list.as_slice()].concat()));
    }
    let mut body = vec![3, 3];
    body.extend([7; 32]); // random
    body.push(0); // session
    body.extend([0, 4, 0x13, 0x01, 0xc0, 0x2b]); // AES-128-GCM of 1.3 and of 1.2
    body.extend([1, 0]); // compression: none
    body.extend(u16::try_from(extensions.len()).unwrap().to_be_bytes());
    body.extend(extensions);
    let len = u32::try_from(body.len()).unwrap().to_be_bytes();
    [&[1, len[1], len[2], len[3]], body.as_slice()].concat()
}

/// A small deterministic generator (xorshift).
pub(crate) struct Seed(pub(crate) u64);

impl Seed {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(crate) fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }
}
