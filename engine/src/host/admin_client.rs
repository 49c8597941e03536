//! The admin interface's client side: how a command talks to its daemon.
//!
//! Invariants: nothing a daemon (or whoever holds the socket) answers makes a command panic or grow without bound:
//! answers end at [`ANSWER_BYTES_MAX`], lines at [`LINE_BYTES_MAX`], waiting at a deadline; a daemon that does not run
//! is told apart from one that refuses, and the operator learns how to start it.
//! Called by the programs' commands; the server side is [`super::admin`].

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use super::admin::ErrorBody;
use super::places::Program;
use crate::error::{Answer, Severity};

/// Largest answer a command reads.
pub const ANSWER_BYTES_MAX: usize = 16 << 20;
/// Largest line of a progress stream.
pub const LINE_BYTES_MAX: usize = 1 << 20;
/// How long a command waits for an answer (streams: for its beginning).
const ANSWER_WAIT: Duration = Duration::from_secs(60);

/// Why a request to the daemon failed.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// Nobody answers on the socket.
    #[error("{program} is not running (nobody answers on {}); start it with `{program} run`, or name its --state-dir", socket.display())]
    NotRunning {
        /// The daemon.
        program: Program,
        /// Its socket.
        socket: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// The socket may not be opened by this user.
    #[error("the admin socket {} may only be opened by its owner; use sudo", socket.display())]
    Forbidden {
        /// The socket.
        socket: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// The daemon understood the request and refused it.
    #[error("{}: {}; {}", body.error, body.reason, body.remedy)]
    Refused {
        /// HTTP status.
        status: u16,
        /// What it said.
        body: ErrorBody,
    },
    /// What came back is not an answer of this daemon.
    #[error(
        "{program} gave an answer that is not understood ({what}); use a command of the daemon's own version, and see its log"
    )]
    Garbage {
        /// The daemon.
        program: Program,
        /// What is wrong with the answer.
        what: String,
        /// The decoder's error, where there is one.
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
    /// No answer in time.
    #[error("{program} did not answer within {} s; see its log, it may be stopping or waiting for a disk", waited.as_secs())]
    TimedOut {
        /// The daemon.
        program: Program,
        /// How long it was waited for.
        waited: Duration,
    },
    /// The request itself cannot be written as JSON: a defect of the command.
    #[error("the request cannot be written as JSON: {0}; report this as a defect")]
    Request(#[source] serde_json::Error),
}

impl Answer for AdminError {
    fn severity(&self) -> Severity {
        match self {
            Self::NotRunning { .. } | Self::TimedOut { .. } => Severity::Retry,
            _ => Severity::Stop,
        }
    }
}

/// A command's view of its daemon. Each request uses its own connection.
#[derive(Clone, Debug)]
pub struct AdminClient {
    program: Program,
    socket: PathBuf,
    wait: Duration,
}

impl AdminClient {
    /// The daemon of `program` behind `socket`; nothing is opened yet.
    #[must_use]
    pub fn new(program: Program, socket: &Path) -> Self {
        Self { program, socket: socket.to_owned(), wait: ANSWER_WAIT }
    }

    /// Waits `wait` for an answer instead of 60 s.
    #[must_use]
    pub fn with_wait(mut self, wait: Duration) -> Self {
        self.wait = wait;
        self
    }

    /// `GET path`, the answer parsed as JSON.
    ///
    /// # Errors
    /// [`AdminError`].
    pub async fn get_json<R: DeserializeOwned>(&self, path: &str) -> Result<R, AdminError> {
        self.within(async { self.parse(self.send(Method::GET, path, Bytes::new()).await?).await }).await
    }

    /// `POST path` with `body` as JSON, the answer parsed as JSON.
    ///
    /// # Errors
    /// [`AdminError`].
    pub async fn post_json<B: Serialize, R: DeserializeOwned>(
        &self,
        path: &str,
        body: &B,
    ) -> Result<R, AdminError> {
        let body = serde_json::to_vec(body).map_err(AdminError::Request)?;
        self.within(async { self.parse(self.send(Method::POST, path, body.into()).await?).await }).await
    }

    /// `GET path` as a stream of JSON lines (see [`super::admin::line_stream`]).
    ///
    /// # Errors
    /// [`AdminError`]; waiting for the first line after the answer began has no deadline.
    pub async fn lines(&self, path: &str) -> Result<LineReader, AdminError> {
        let response = self
            .within(async {
                let response = self.send(Method::GET, path, Bytes::new()).await?;
                if response.status().is_success() { Ok(response) } else { Err(self.refusal(response).await) }
            })
            .await?;
        Ok(LineReader {
            program: self.program,
            body: response.into_body(),
            held: BytesMut::new(),
            ended: false,
        })
    }

    async fn within<T>(&self, answer: impl Future<Output = Result<T, AdminError>>) -> Result<T, AdminError> {
        match tokio::time::timeout(self.wait, answer).await {
            Ok(result) => result,
            Err(_) => Err(AdminError::TimedOut { program: self.program, waited: self.wait }),
        }
    }

    async fn connect(&self) -> Result<UnixStream, AdminError> {
        UnixStream::connect(&self.socket).await.map_err(|source| {
            let socket = self.socket.clone();
            match source.kind() {
                io::ErrorKind::PermissionDenied => AdminError::Forbidden { socket, source },
                _ => AdminError::NotRunning { program: self.program, socket, source },
            }
        })
    }

    async fn send(&self, method: Method, path: &str, body: Bytes) -> Result<Response<Incoming>, AdminError> {
        let stream = TokioIo::new(self.connect().await?);
        let not_http = |source: hyper::Error| garbage(self.program, "not HTTP", Some(Box::new(source)));
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(stream).await.map_err(not_http)?;
        // Ends with the response; its error, if any, also reaches the response.
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "localhost")
            .header("content-type", "application/json")
            .body(Full::new(body))
            .map_err(|source| {
                garbage(self.program, "a malformed path was asked for", Some(Box::new(source)))
            })?;
        sender.send_request(request).await.map_err(not_http)
    }

    async fn parse<R: DeserializeOwned>(&self, response: Response<Incoming>) -> Result<R, AdminError> {
        if !response.status().is_success() {
            return Err(self.refusal(response).await);
        }
        let body = self.collect(response).await?;
        serde_json::from_slice(&body)
            .map_err(|source| garbage(self.program, "not the JSON expected", Some(Box::new(source))))
    }

    async fn refusal(&self, response: Response<Incoming>) -> AdminError {
        let status = response.status().as_u16();
        match self.collect(response).await {
            Err(error) => error,
            Ok(body) => match serde_json::from_slice::<ErrorBody>(&body) {
                Ok(body) => AdminError::Refused { status, body },
                // For example the framework's own answer to a body that does not parse.
                Err(source) => {
                    let text: String = String::from_utf8_lossy(&body).chars().take(200).collect();
                    garbage(self.program, format!("status {status}: {text:?}"), Some(Box::new(source)))
                }
            },
        }
    }

    async fn collect(&self, response: Response<Incoming>) -> Result<Bytes, AdminError> {
        match Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await {
            Ok(body) => Ok(body.to_bytes()),
            Err(source) if source.is::<LengthLimitError>() => {
                Err(garbage(self.program, "larger than 16 MiB", Some(source)))
            }
            Err(source) => Err(garbage(self.program, "it broke off", Some(source))),
        }
    }
}

fn garbage(
    program: Program,
    what: impl Into<String>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
) -> AdminError {
    AdminError::Garbage { program, what: what.into(), source }
}

/// A stream of JSON lines being read.
#[derive(Debug)]
pub struct LineReader {
    program: Program,
    body: Incoming,
    held: BytesMut,
    ended: bool,
}

impl LineReader {
    /// The next value, `None` at the end of the stream.
    ///
    /// # Errors
    /// [`AdminError::Garbage`] when the stream breaks off or a line is not the JSON expected.
    pub async fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, AdminError> {
        loop {
            if let Some(end) = self.held.iter().position(|byte| *byte == b'\n') {
                let line = self.held.split_to(end + 1);
                return self.parse(&line).map(Some);
            }
            if self.ended {
                let rest = std::mem::take(&mut self.held);
                return if rest.is_empty() { Ok(None) } else { self.parse(&rest).map(Some) };
            }
            if self.held.len() > LINE_BYTES_MAX {
                return Err(garbage(self.program, "a line larger than 1 MiB", None));
            }
            match self.body.frame().await {
                None => self.ended = true,
                Some(Ok(frame)) => {
                    if let Some(data) = frame.data_ref() {
                        self.held.extend_from_slice(data);
                    }
                }
                Some(Err(source)) => {
                    return Err(garbage(self.program, "it broke off", Some(Box::new(source))));
                }
            }
        }
    }

    fn parse<T: DeserializeOwned>(&self, line: &[u8]) -> Result<T, AdminError> {
        serde_json::from_slice(line).map_err(|source| {
            garbage(self.program, "a line is not the JSON expected", Some(Box::new(source)))
        })
    }
}
