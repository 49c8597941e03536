//! Where NBD clients connect: a Unix socket only its owner may open, or a TCP address.
//!
//! Invariants: a Unix socket has mode 0600 from the moment it is visible (it is bound under another name, then
//! renamed), is never put in the place of one that somebody answers on, and is removed with its listener; TCP beyond
//! loopback needs TLS. Called by the server of this module's parent.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::net::sockopt;
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

use super::NbdError;

/// A TCP peer that is silent for this long is asked whether it still lives …
const KEEP_ALIVE_IDLE: Duration = Duration::from_secs(30);
/// … this often …
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// … and so many times before its connection ends.
const KEEP_ALIVE_PROBES: u32 = 6;

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A socket file.
    Unix(PathBuf),
    /// An address of this host; port 0 takes any free one.
    Tcp(SocketAddr),
}

impl Address {
    /// `port` on loopback, which needs no TLS.
    #[must_use]
    pub fn loopback(port: u16) -> Self {
        Self::Tcp(SocketAddr::from(([127, 0, 0, 1], port)))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => path.display().fmt(f),
            Self::Tcp(address) => address.fmt(f),
        }
    }
}

/// One accepted client.
pub(super) enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
}

enum Bound {
    Unix { listener: UnixListener, _file: SocketFile },
    Tcp(TcpListener),
}

/// Removes the socket file when the listener ends.
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Best effort: a stale socket is recognised and replaced by the next listener.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A bound socket.
pub(super) struct Listener {
    address: Address,
    bound: Bound,
}

impl Listener {
    /// Binds `address`; `tls` tells whether clients will have to use TLS.
    pub(super) async fn bind(address: &Address, tls: bool) -> Result<Self, NbdError> {
        let failed = |source| NbdError::Listen { address: address.clone(), source };
        match address {
            Address::Unix(path) => {
                let (listener, file) = bind_unix(path).await?;
                Ok(Self { address: address.clone(), bound: Bound::Unix { listener, _file: file } })
            }
            Address::Tcp(socket) if !tls && !socket.ip().is_loopback() => {
                Err(NbdError::Insecure { address: address.clone() })
            }
            Address::Tcp(socket) => {
                let listener = TcpListener::bind(socket).await.map_err(failed)?;
                let address = Address::Tcp(listener.local_addr().map_err(failed)?);
                Ok(Self { address, bound: Bound::Tcp(listener) })
            }
        }
    }

    pub(super) fn address(&self) -> &Address {
        &self.address
    }

    /// The next client.
    pub(super) async fn accept(&self) -> io::Result<Socket> {
        match &self.bound {
            Bound::Unix { listener, .. } => Ok(Socket::Unix(listener.accept().await?.0)),
            Bound::Tcp(listener) => {
                let stream = listener.accept().await?.0;
                prepare(&stream)?;
                Ok(Socket::Tcp(stream))
            }
        }
    }
}

/// Answers leave at once, and a machine that vanished does not hold its connection for ever.
fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, KEEP_ALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(stream, KEEP_ALIVE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(stream, KEEP_ALIVE_PROBES)?;
    Ok(())
}

async fn bind_unix(path: &Path) -> Result<(UnixListener, SocketFile), NbdError> {
    let failed = |source| NbdError::Listen { address: Address::Unix(path.to_owned()), source };
    match std::fs::symlink_metadata(path) {
        Ok(meta) if !meta.file_type().is_socket() => {
            return Err(NbdError::NotASocket { path: path.to_owned() });
        }
        Ok(_) if UnixStream::connect(path).await.is_ok() => {
            return Err(NbdError::InUse { path: path.to_owned() });
        }
        _ => {}
    }
    let mut fresh = path.as_os_str().to_owned();
    fresh.push(".new");
    let fresh = PathBuf::from(fresh);
    match std::fs::remove_file(&fresh) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let listener = UnixListener::bind(&fresh).map_err(failed)?;
    let file = SocketFile(fresh.clone()); // removed on each way out from here
    std::fs::set_permissions(&fresh, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
    std::fs::rename(&fresh, path).map_err(failed)?;
    drop(file); // nothing stands under the first name any more
    Ok((listener, SocketFile(path.to_owned())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_unix_socket_is_private_replaces_a_stale_one_and_goes_with_its_listener() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nbd.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "stale");
        let address = Address::Unix(path.clone());
        let listener = Listener::bind(&address, false).await.unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(matches!(Listener::bind(&address, false).await, Err(NbdError::InUse { .. })));
        drop(listener);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left behind");
    }

    #[tokio::test]
    async fn what_is_not_a_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("precious");
        std::fs::write(&path, "data").unwrap();
        let refused = Listener::bind(&Address::Unix(path.clone()), false).await;
        assert!(matches!(refused, Err(NbdError::NotASocket { .. })));
        assert_eq!(std::fs::read(&path).unwrap(), b"data");
    }

    #[tokio::test]
    async fn tcp_beyond_loopback_needs_tls() {
        let everywhere = Address::Tcp(SocketAddr::from(([0, 0, 0, 0], 0)));
        let refused = Listener::bind(&everywhere, false).await.err().unwrap();
        assert!(matches!(refused, NbdError::Insecure { .. }) && refused.to_string().contains("TLS"));
        assert!(Listener::bind(&everywhere, true).await.is_ok());
        let loopback = Listener::bind(&Address::loopback(0), false).await.unwrap();
        assert!(matches!(loopback.address(), Address::Tcp(address) if address.port() != 0));
    }
}
