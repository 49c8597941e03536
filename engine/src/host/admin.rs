//! The admin interface's server side: HTTP and JSON on a Unix socket that only its owner may open.
//!
//! Invariants: the socket has mode 0600 from the moment it is visible (it is bound under another name, then
//! renamed); a socket somebody answers on is never replaced; every refusal is an [`ErrorBody`] with error, reason and
//! remedy, also for unknown paths and methods. Progress is streamed as one JSON value per line over a bounded
//! channel, so a slow reader slows its own job's reports and nothing else.
//! Called by the programs' `run`; the client side is [`super::admin_client`].

use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, HttpBody};
use axum::http::{StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use hyper::body::Frame;
use serde::{Deserialize, Serialize};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;

use super::places::{self, PlaceError};
use super::shutdown::Shutdown;
use crate::error::{Answer, Severity};

/// After shutdown was requested, answers in flight get this long; streams are then cut.
const GRACE: Duration = Duration::from_secs(2);
/// Progress lines held for one reader.
pub const STREAM_LINES_MAX: usize = 64;

/// The JSON body of every refusal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// What failed.
    pub error: String,
    /// Why.
    pub reason: String,
    /// What to do about it.
    pub remedy: String,
}

/// A refusal as a handler returns it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// HTTP status.
    pub status: StatusCode,
    /// What the operator is told.
    pub body: ErrorBody,
}

impl Refusal {
    /// A refusal with `status`.
    #[must_use]
    pub fn new(
        status: StatusCode,
        error: &str,
        reason: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        let body = ErrorBody { error: error.to_owned(), reason: reason.into(), remedy: remedy.into() };
        Self { status, body }
    }

    /// The request is understood and cannot be done as things stand (409).
    #[must_use]
    pub fn conflict(error: &str, reason: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, error, reason, remedy)
    }

    /// The request names something that does not exist (404).
    #[must_use]
    pub fn not_found(error: &str, reason: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, error, reason, remedy)
    }

    /// The daemon failed while doing it (500): the error with its chain of sources.
    #[must_use]
    pub fn failed(error: &str, cause: &dyn std::error::Error, remedy: impl Into<String>) -> Self {
        let mut reason = cause.to_string();
        let mut source = cause.source();
        while let Some(inner) = source {
            let text = inner.to_string();
            if !reason.contains(&text) {
                reason = format!("{reason}: {text}");
            }
            source = inner.source();
        }
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, error, reason, remedy)
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.status, axum::Json(self.body)).into_response()
    }
}

/// Why the admin socket could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum AdminServerError {
    /// Another daemon answers on the socket.
    #[error("another daemon answers on {}; stop it first, or give this one its own --state-dir", path.display())]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// Something that is not a socket stands in its place.
    #[error("{} exists and is not a socket; move it away", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The directory cannot be made.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// The operating system refused.
    #[error("the admin socket {} cannot be opened: {source}; check that its directory is writable", path.display())]
    Io {
        /// The socket.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
}

impl Answer for AdminServerError {
    fn severity(&self) -> Severity {
        Severity::Stop
    }
}

/// A bound admin socket; its file is removed on drop.
#[derive(Debug)]
pub struct AdminServer {
    listener: UnixListener,
    file: SocketFile,
}

/// Removes the socket when the server ends.
#[derive(Debug)]
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Best effort: a stale socket is recognised and replaced at the next start.
        let _ = std::fs::remove_file(&self.0);
    }
}

impl AdminServer {
    /// Binds `path`, replacing a socket nobody answers on; its directory is created with mode 0755 when missing.
    ///
    /// Must be called inside a Tokio runtime, by the holder of the state directory's lock.
    ///
    /// # Errors
    /// [`AdminServerError`].
    pub async fn bind(path: &Path) -> Result<Self, AdminServerError> {
        let failed = |source| AdminServerError::Io { path: path.to_owned(), source };
        if let Some(dir) = path.parent() {
            places::create_dir(dir, 0o755)?;
        }
        match std::fs::symlink_metadata(path) {
            Ok(meta) if !meta.file_type().is_socket() => {
                return Err(AdminServerError::NotASocket { path: path.to_owned() });
            }
            Ok(_) if UnixStream::connect(path).await.is_ok() => {
                return Err(AdminServerError::InUse { path: path.to_owned() });
            }
            _ => {}
        }
        let mut fresh = path.as_os_str().to_owned();
        fresh.push(".new");
        let fresh = PathBuf::from(fresh);
        match std::fs::remove_file(&fresh) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        let listener = UnixListener::bind(&fresh).map_err(failed)?;
        std::fs::set_permissions(&fresh, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
        std::fs::rename(&fresh, path).map_err(failed)?;
        Ok(Self { listener, file: SocketFile(path.to_owned()) })
    }

    /// Serves `router` until `shutdown`; unknown paths and methods are answered with an [`ErrorBody`].
    ///
    /// # Errors
    /// When the listener fails.
    pub async fn serve(self, router: Router, shutdown: Shutdown) -> std::io::Result<()> {
        let Self { listener, file: _file } = self;
        let router = router.fallback(unknown_path).method_not_allowed_fallback(unknown_method);
        let graceful = shutdown.clone();
        let server = axum::serve(listener, router)
            .with_graceful_shutdown(async move { graceful.requested().await })
            .into_future();
        tokio::select! {
            result = server => result,
            () = async { shutdown.requested().await; tokio::time::sleep(GRACE).await } => Ok(()),
        }
    }
}

async fn unknown_path(uri: Uri) -> Refusal {
    Refusal::not_found(
        "unknown request",
        format!("this daemon knows no {}", uri.path()),
        "use a command of the same version as the daemon",
    )
}

async fn unknown_method(uri: Uri) -> Refusal {
    Refusal::new(
        StatusCode::METHOD_NOT_ALLOWED,
        "unknown request",
        format!("{} does not take this method", uri.path()),
        "use a command of the same version as the daemon",
    )
}

/// A channel for progress reports and the response that streams them, one JSON value per line.
///
/// The sender's `send` fails once the reader is gone; dropping the sender ends the stream.
#[must_use]
pub fn line_stream<T: Serialize + Send + 'static>() -> (mpsc::Sender<T>, Response) {
    let (sender, receiver) = mpsc::channel(STREAM_LINES_MAX);
    let body = Body::new(Lines { receiver });
    (sender, ([(header::CONTENT_TYPE, "application/x-ndjson")], body).into_response())
}

struct Lines<T> {
    receiver: mpsc::Receiver<T>,
}

impl<T: Serialize> HttpBody for Lines<T> {
    type Data = Bytes;
    type Error = serde_json::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, serde_json::Error>>> {
        self.receiver.poll_recv(context).map(|item| {
            item.map(|item| {
                let mut line = serde_json::to_vec(&item)?;
                line.push(b'\n');
                Ok(Frame::data(Bytes::from(line)))
            })
        })
    }
}
