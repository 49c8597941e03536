//! The NBD server: a disk as of some point, for every program that speaks the Network Block Device protocol.
//!
//! Invariants: what is served is opened through [`Export`] only; its files are called on threads of their own, never
//! on the async runtime; a connection's memory is bounded in bytes and in requests; a client that talks nonsense
//! loses its connection and nobody else's; with TLS configured nothing is said about exports before it is up; a
//! TCP socket without TLS listens on loopback only.
//! Units: bytes. Called by the master target, for `mount`.
//!
//! | module | what |
//! |---|---|
//! | [`listen`] | where clients connect |
//! | `negotiation` | options, without I/O |
//! | `connection` | one client: handshake, requests in, replies out |
//! | `pool` | the threads and files of one client |
//! | `execute` | one request on one file |

mod connection;
mod execute;
pub mod listen;
mod negotiation;
mod pool;
pub mod tls;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{Semaphore, watch};
use tokio::task::{JoinHandle, JoinSet};

use self::connection::Context;
use self::listen::{Address, Listener, Socket};
use self::negotiation::Exports;
use crate::error::{Answer, Severity};
use crate::format::nbd::{NAME_BYTES_MAX, PAYLOAD_BYTES_MAX};
use crate::io::{BlockError, BlockFile};

/// After a failed accept (mostly: no file descriptor left) the next attempt waits this long.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A disk that is served.
///
/// Every file that [`Self::open`] gives out shows the same disk: a write that returned on one is read on all, and a
/// flush of one covers what returned on any. Read-only exports have that for nothing.
pub trait Export: Send + Sync {
    /// The name clients ask for.
    fn name(&self) -> &str;

    /// Size of the disk; it does not change.
    fn size_bytes(&self) -> u64;

    /// Whether clients may write.
    fn writable(&self) -> bool;

    /// Opens the disk once more; called on a thread that may block, and the file stays on that thread.
    ///
    /// # Errors
    /// When the disk cannot be opened; the client is told why.
    fn open(&self) -> Result<Box<dyn BlockFile>, BlockError>;
}

/// An [`Export`] made of its parts and a function that opens it.
pub struct ExportBy<F> {
    name: String,
    size_bytes: u64,
    writable: bool,
    open: F,
}

impl<F: Fn() -> Result<Box<dyn BlockFile>, BlockError> + Send + Sync> ExportBy<F> {
    /// An export that `open` opens.
    #[must_use]
    pub fn new(name: &str, size_bytes: u64, writable: bool, open: F) -> Self {
        Self { name: name.to_owned(), size_bytes, writable, open }
    }
}

impl<F: Fn() -> Result<Box<dyn BlockFile>, BlockError> + Send + Sync> Export for ExportBy<F> {
    fn name(&self) -> &str {
        &self.name
    }
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }
    fn writable(&self) -> bool {
        self.writable
    }
    fn open(&self) -> Result<Box<dyn BlockFile>, BlockError> {
        (self.open)()
    }
}

/// Bounds of a server. Each connection costs at most `bytes_in_flight_max` and some 1 MiB per worker.
#[derive(Clone)]
pub struct Settings {
    /// Clients at a time; one more is hung up on.
    pub connections_max: usize,
    /// Requests of one connection that may be under way.
    pub requests_max: usize,
    /// Payload of one connection that may be held, in or out; never less than one request's.
    pub bytes_in_flight_max: u32,
    /// Threads per connection, each with the disk opened once: so many requests run side by side.
    pub workers: usize,
    /// A client that has not chosen an export by then is hung up on. Longer than it takes, since people negotiate by
    /// hand too.
    pub handshake: Duration,
    /// Answers still owed to a client that said good-bye, or when the server stops, get this long.
    pub grace: Duration,
    /// TLS, which clients must then use; who may connect is decided by its verifier of client certificates. A client
    /// that shows none is hung up on, whatever the configuration says: a disk is served.
    pub tls: Option<Arc<rustls::ServerConfig>>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            connections_max: 16,
            requests_max: 64,
            bytes_in_flight_max: 2 * PAYLOAD_BYTES_MAX,
            workers: 4,
            handshake: Duration::from_secs(30),
            grace: Duration::from_secs(10),
            tls: None,
        }
    }
}

/// Why a server cannot start.
#[derive(Debug, thiserror::Error)]
pub enum NbdError {
    /// Nothing to serve, or names that no client could use.
    #[error("cannot serve the export {name:?}: {reason}")]
    Export {
        /// Which.
        name: String,
        /// What is wrong, and what to do.
        reason: &'static str,
    },
    /// Anybody on the network could read the disk.
    #[error(
        "{address} is not a loopback address and NBD without TLS is readable by anybody on the way; configure TLS, or listen on 127.0.0.1, [::1] or a Unix socket"
    )]
    Insecure {
        /// The address asked for.
        address: Address,
    },
    /// Something else listens there.
    #[error("another server answers on {}; end that mount first, or choose another socket", path.display())]
    InUse {
        /// The socket.
        path: std::path::PathBuf,
    },
    /// Something that is not a socket stands there.
    #[error("{} exists and is not a socket; move it away, or choose another path", path.display())]
    NotASocket {
        /// The path.
        path: std::path::PathBuf,
    },
    /// The operating system refused.
    #[error(
        "cannot listen on {address}: {source}; check that the address is of this host, free, and that its directory is writable"
    )]
    Listen {
        /// The address asked for.
        address: Address,
        /// The reason.
        #[source]
        source: std::io::Error,
    },
}

impl Answer for NbdError {
    fn severity(&self) -> Severity {
        Severity::Stop
    }
}

/// A running server. Dropping it hangs up on everybody at once; [`Self::stop`] lets answers out first.
#[must_use = "a server that is dropped stops"]
pub struct Server {
    address: Address,
    connections: Arc<Semaphore>,
    connections_max: usize,
    stop: watch::Sender<bool>,
    /// Ends with the number of connections that had to be cut.
    task: JoinHandle<usize>,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server").field("address", &self.address).finish_non_exhaustive()
    }
}

impl Server {
    /// Listens on `address` and serves `exports`; must be called inside a Tokio runtime.
    ///
    /// # Errors
    /// [`NbdError`].
    pub async fn start(
        address: &Address,
        exports: Vec<Arc<dyn Export>>,
        settings: Settings,
    ) -> Result<Self, NbdError> {
        check(&exports)?;
        let listener = Listener::bind(address, settings.tls.is_some()).await?;
        let address = listener.address().clone();
        let connections_max = settings.connections_max;
        let connections = Arc::new(Semaphore::new(connections_max));
        let (stop, stopping) = watch::channel(false);
        let context = Arc::new(Context { exports: Exports::new(exports), settings, stopping });
        let task = tokio::spawn(accept(listener, context, Arc::clone(&connections)));
        Ok(Self { address, connections, connections_max, stop, task })
    }

    /// Where it listens; the port is the real one when 0 was asked for.
    #[must_use]
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Clients connected at this moment.
    #[must_use]
    pub fn open_connections(&self) -> usize {
        self.connections_max.saturating_sub(self.connections.available_permits())
    }

    /// Stops listening, answers what is under way, refuses what comes after it, hangs up. When this returns, no file
    /// of an export is in use any more, unless connections had to be cut: their number is returned.
    pub async fn stop(mut self) -> usize {
        let _ = self.stop.send(true);
        (&mut self.task).await.unwrap_or_default()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn check(exports: &[Arc<dyn Export>]) -> Result<(), NbdError> {
    let refuse = |name: &str, reason| Err(NbdError::Export { name: name.to_owned(), reason });
    let mut names = BTreeSet::new();
    for export in exports {
        let name = export.name();
        if name.len() > NAME_BYTES_MAX || name.contains('\0') {
            return refuse(name, "the name is too long or holds a NUL; choose a shorter one");
        }
        if !names.insert(name) {
            return refuse(name, "two exports have this name; rename one");
        }
    }
    if exports.is_empty() { refuse("", "there is none; name at least one") } else { Ok(()) }
}

/// Accepts until the server stops; then waits for the connections.
async fn accept(listener: Listener, context: Arc<Context>, limit: Arc<Semaphore>) -> usize {
    static NUMBER: AtomicU64 = AtomicU64::new(1);
    let mut clients = JoinSet::new();
    let mut stopping = context.stopping.clone();
    loop {
        let accepted = tokio::select! {
            _ = stopping.wait_for(|stop| *stop) => break,
            Some(_) = clients.join_next() => continue,
            accepted = listener.accept() => accepted,
        };
        let socket = match accepted {
            Ok(socket) => socket,
            Err(error) => {
                tracing::warn!(%error, address = %listener.address(), "cannot accept an NBD client");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(permit) = Arc::clone(&limit).try_acquire_owned() else {
            tracing::warn!(address = %listener.address(), "too many NBD clients; one was hung up on");
            continue;
        };
        let (context, number) = (Arc::clone(&context), NUMBER.fetch_add(1, Ordering::Relaxed));
        clients.spawn(async move {
            match socket {
                Socket::Unix(stream) => connection::serve(stream, &context, number).await,
                Socket::Tcp(stream) => connection::serve(stream, &context, number).await,
            }
            drop(permit);
        });
    }
    drop(listener);
    // Connections take up to the grace for their answers and as long again for their threads.
    let everybody_left = async { while clients.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(context.settings.grace * 2, everybody_left).await;
    let cut = clients.len();
    clients.shutdown().await;
    cut
}
