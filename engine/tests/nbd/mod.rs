//! What the tests of the NBD server share: disks in memory, a server on a runtime of its own, a site's certificates.

#![expect(clippy::unwrap_used, reason = "test support: a failed step is a failed test")]
#![allow(dead_code, reason = "shared by two test programs, one of which uses all of it and one a part")]

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use reprotect_engine::io::memory::MemoryFile;
use reprotect_engine::io::{BlockFile, OpenOptions, WriteAt, open};
use reprotect_engine::net::nbd::listen::Address;
use reprotect_engine::net::nbd::tls::server_config;
use reprotect_engine::net::nbd::{Export, ExportBy, Server, Settings};
use reprotect_engine::store::overlay::{Overlay, OverlayState};
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer};

/// Not a multiple of a block; larger than one request.
pub(crate) const SIZE: u64 = (48 << 20) + 512 * 3;

/// xorshift64: contents are reproducible from the seed.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut data: Vec<u8> = (0..len.div_ceil(8)).flat_map(|_| self.next().to_le_bytes()).collect();
        data.truncate(len);
        data
    }
}

/// A disk of `size` bytes with islands of data and holes between them, and the same as plain bytes.
pub(crate) fn disk(size: u64, seed: u64) -> (MemoryFile, Vec<u8>) {
    let (mut file, mut plain) = (MemoryFile::named("disk", size), vec![0; size as usize]);
    let mut random = Random(seed);
    let mut at = 0;
    while at < size {
        let len = (4096 * (1 + random.next() % 200)).min(size - at);
        let data = random.bytes(len as usize);
        file.write(&[WriteAt { offset: at, data: &data }]).unwrap();
        plain[at as usize..(at + len) as usize].copy_from_slice(&data);
        at += len + 4096 * (random.next() % 400);
    }
    let end = random.bytes(512);
    file.write(&[WriteAt { offset: size - 512, data: &end }]).unwrap();
    plain[size as usize - 512..].copy_from_slice(&end);
    (file, plain)
}

/// Serves `file` as it is.
pub(crate) fn export(name: &str, file: &MemoryFile, writable: bool) -> Arc<dyn Export> {
    let file = file.clone_handle();
    Arc::new(ExportBy::new(name, file.size_bytes(), writable, move || Ok(Box::new(file.clone_handle()))))
}

/// Serves `base` through an overlay whose changes go to `scratch`.
pub(crate) fn overlay(name: &str, base: &MemoryFile, scratch: &MemoryFile) -> Arc<dyn Export> {
    let (base, scratch) = (base.clone_handle(), scratch.clone_handle());
    let size = base.size_bytes();
    let state = OverlayState::new("overlay", size, Box::new(scratch.clone_handle())).unwrap();
    Arc::new(ExportBy::new(name, size, true, move || {
        let (base, scratch) = (Box::new(base.clone_handle()), Box::new(scratch.clone_handle()));
        Ok(Box::new(Overlay::new(&state, base, scratch)?))
    }))
}

/// As [`overlay`], over files, with the backend this host has for them.
pub(crate) fn file_overlay(name: &str, base: &Path, scratch: &Path) -> Arc<dyn Export> {
    let (base, scratch) = (base.to_owned(), scratch.to_owned());
    let shared = OpenOptions { write: true, ..OpenOptions::default() };
    let size = std::fs::metadata(&base).unwrap().len();
    let state = OverlayState::new("overlay", size, open(&scratch, &shared).unwrap()).unwrap();
    Arc::new(ExportBy::new(name, size, true, move || {
        let of_base = open(&base, &OpenOptions::reading())?;
        Ok(Box::new(Overlay::new(&state, of_base, open(&scratch, &OpenOptions::reading())?)?))
    }))
}

/// A server on a runtime of its own, so that tests may block.
pub(crate) struct Running {
    runtime: tokio::runtime::Runtime,
    server: Option<Server>,
}

impl Running {
    pub(crate) fn start(address: &Address, exports: Vec<Arc<dyn Export>>, settings: Settings) -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let server = runtime.block_on(Server::start(address, exports, settings)).unwrap();
        Self { runtime, server: Some(server) }
    }

    pub(crate) fn server(&self) -> &Server {
        self.server.as_ref().unwrap()
    }

    pub(crate) fn address(&self) -> &Address {
        self.server().address()
    }

    /// Stops the server; how many connections had to be cut.
    pub(crate) fn stop(mut self) -> usize {
        let server = self.server.take().unwrap();
        self.runtime.block_on(server.stop())
    }
}

/// Certificates as an operator would lay them out for libnbd and qemu.
pub(crate) struct Certificates {
    pub(crate) dir: PathBuf,
    pub(crate) server: Arc<rustls::ServerConfig>,
    /// The same server, careless: it asks nobody for a certificate.
    pub(crate) careless: Arc<rustls::ServerConfig>,
}

/// Makes a CA, a server called `localhost` and a client under `dir`; and `dir/stranger`, a client of another CA.
pub(crate) fn certificates(dir: &Path) -> Certificates {
    let (ca, issuer) = authority();
    let (server, server_key) = leaf(&issuer, ExtendedKeyUsagePurpose::ServerAuth);
    lay_out(dir, &ca, &issuer);
    let (_, other_issuer) = authority();
    lay_out(&dir.join("stranger"), &ca, &other_issuer);
    std::fs::write(dir.join("server-cert.pem"), server.pem()).unwrap();
    let key_path = dir.join("server-key.pem");
    std::fs::write(&key_path, server_key.serialize_pem()).unwrap();
    let mode = |mode| std::fs::set_permissions(&key_path, std::fs::Permissions::from_mode(mode)).unwrap();
    mode(0o644);
    let refused = server_config(dir).unwrap_err().to_string();
    assert!(refused.contains("server-key.pem"), "a key that others can read: {refused}");
    mode(0o600);
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let chain = vec![CertificateDer::from(server.der().to_vec())];
    let key = PrivatePkcs8KeyDer::from(server_key.serialize_der());
    let careless = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key.into())
        .unwrap();
    Certificates { dir: dir.to_owned(), server: server_config(dir).unwrap(), careless: Arc::new(careless) }
}

fn authority() -> (rcgen::Certificate, Issuer<'static, KeyPair>) {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    let certificate = params.self_signed(&key).unwrap();
    (certificate, Issuer::new(params, key))
}

fn leaf(issuer: &Issuer<'static, KeyPair>, usage: ExtendedKeyUsagePurpose) -> (rcgen::Certificate, KeyPair) {
    let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    params.extended_key_usages = vec![usage];
    let key = KeyPair::generate().unwrap();
    (params.signed_by(&key, issuer).unwrap(), key)
}

/// The files libnbd and qemu look for: the CA they trust, and the client's own certificate.
fn lay_out(dir: &Path, ca: &rcgen::Certificate, issuer: &Issuer<'static, KeyPair>) {
    let (client, key) = leaf(issuer, ExtendedKeyUsagePurpose::ClientAuth);
    std::fs::create_dir_all(dir).unwrap();
    std::fs::write(dir.join("ca-cert.pem"), ca.pem()).unwrap();
    std::fs::write(dir.join("client-cert.pem"), client.pem()).unwrap();
    std::fs::write(dir.join("client-key.pem"), key.serialize_pem()).unwrap();
}
