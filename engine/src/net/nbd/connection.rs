//! One NBD client: handshake, perhaps TLS, then requests in and replies out until one side has enough.
//!
//! Invariants: nothing is read ahead of the negotiation, so that no byte from before TLS is taken for one from inside
//! it; a request takes its permits before its payload is read, so that what is held is bounded; after a stop what is
//! under way is answered, what comes later is refused, and the client is hung up on as soon as nothing is owed.
//! Units: bytes. Called by the server of this module's parent, one task per client.

use std::io;
use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader, BufWriter};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_rustls::TlsAcceptor;

use super::Settings;
use super::negotiation::{Entry, Exports, Negotiation, Next, Tls};
use super::pool::{Job, Owed, Permits, Pool, Reply, refusal};
use crate::format::FormatError;
use crate::format::nbd::option::{ClientFlags, OptionHeader};
use crate::format::nbd::request::{Allowed, Request, Work};
use crate::format::nbd::{ErrorCode, PAYLOAD_BYTES_MAX, reply};

/// Bytes read and written at a time where messages are small.
const STREAM_BUFFER_BYTES: usize = 64 << 10;
/// What a request without payload is counted as: its answer may be an allocation map of this length.
const REQUEST_COST_MIN: u32 = 32 << 10;

/// What all connections of a server share.
pub(super) struct Context {
    pub(super) exports: Exports,
    pub(super) settings: Settings,
    pub(super) stopping: watch::Receiver<bool>,
}

/// Why a connection ended otherwise than by good-bye.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error("the connection broke: {0}")]
    Broken(#[from] io::Error),
    #[error("the client does not speak the protocol: {0}")]
    Garbage(#[from] FormatError),
    #[error("the client sent a write of {0} bytes, more than it was told is possible")]
    TooLong(u32),
    #[error("the client showed no certificate; make the TLS configuration demand one")]
    Nameless,
    #[error("the handshake took too long")]
    Slow,
    #[error("its answers were not taken in time")]
    NotRead,
    #[error("its disk did not come to an end in time")]
    DiskBusy,
}

/// Serves one client to its end.
pub(super) async fn serve<S>(stream: S, context: &Context, number: u64)
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    tracing::debug!(number, "NBD client connected");
    match converse(stream, context).await {
        Ok(()) => tracing::debug!(number, "NBD client left"),
        Err(reason) => tracing::info!(number, %reason, "NBD client hung up on"),
    }
}

async fn converse<S>(mut stream: S, context: &Context) -> Result<(), Ended>
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    let deadline = Instant::now() + context.settings.handshake;
    let greeted = timeout_at(deadline, greet(&mut stream, context)).await.map_err(|_| Ended::Slow)?;
    let Some((flags, outcome)) = greeted? else { return Ok(()) };
    match (outcome, &context.settings.tls) {
        (Outcome::Entered(entered), _) => transmit(stream, context, *entered).await,
        (Outcome::StartTls, Some(tls)) => {
            let acceptor = TlsAcceptor::from(Arc::clone(tls));
            let (mut stream, outcome) = timeout_at(deadline, async {
                let mut stream = acceptor.accept(stream).await?;
                if stream.get_ref().1.peer_certificates().is_none_or(<[_]>::is_empty) {
                    return Err(Ended::Nameless);
                }
                let negotiation = Negotiation::new(&context.exports, Tls::Established, flags.no_zeroes);
                let outcome = negotiate(&mut stream, context, negotiation).await?;
                Ok::<_, Ended>((stream, outcome))
            })
            .await
            .map_err(|_| Ended::Slow)??;
            match outcome {
                Outcome::Entered(entered) => transmit(stream, context, *entered).await,
                Outcome::StartTls | Outcome::Closed => Ok(stream.shutdown().await?),
            }
        }
        (Outcome::StartTls, None) | (Outcome::Closed, _) => Ok(stream.shutdown().await?),
    }
}

/// Says hello and negotiates in the open; `None` when the client left before it said anything.
async fn greet<S>(stream: &mut S, context: &Context) -> Result<Option<(ClientFlags, Outcome)>, Ended>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    stream.write_all(&reply::greeting()).await?;
    stream.flush().await?;
    let Some(flags) = read_next(stream).await? else { return Ok(None) };
    let flags = ClientFlags::decode(flags)?;
    let tls = if context.settings.tls.is_some() { Tls::Required } else { Tls::NotOffered };
    let negotiation = Negotiation::new(&context.exports, tls, flags.no_zeroes);
    Ok(Some((flags, negotiate(stream, context, negotiation).await?)))
}

/// How a negotiation ended.
enum Outcome {
    StartTls,
    Entered(Box<Entered>),
    Closed,
}

/// An open export.
struct Entered {
    pool: Pool,
    allowed: Allowed,
}

/// Takes options until the client has an export, wants TLS, or has enough.
async fn negotiate<S>(
    stream: &mut S,
    context: &Context,
    mut negotiation: Negotiation<'_>,
) -> Result<Outcome, Ended>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut stopping = context.stopping.clone();
    loop {
        let head = tokio::select! {
            head = read_next(stream) => head?,
            _ = stopping.wait_for(|stop| *stop) => None,
        };
        let Some(head) = head else { return Ok(Outcome::Closed) };
        let header = OptionHeader::decode(head)?;
        let mut data = vec![0; header.data_bytes as usize];
        stream.read_exact(&mut data).await?;
        let (mut answer, next) = negotiation.handle_option(header.option, &data);
        let mut outcome = None;
        match next {
            Next::Continue => {}
            Next::StartTls => outcome = Some(Outcome::StartTls),
            Next::Close => outcome = Some(Outcome::Closed),
            Next::Enter(entry) => (answer, outcome) = enter(&entry, context).await,
        }
        stream.write_all(&answer).await?;
        stream.flush().await?;
        if let Some(outcome) = outcome {
            return Ok(outcome);
        }
    }
}

/// Opens the chosen export; what the client is told, and how it goes on.
async fn enter(entry: &Entry, context: &Context) -> (Vec<u8>, Option<Outcome>) {
    let (workers, requests_max) = (context.settings.workers.max(1), context.settings.requests_max.max(1));
    match Pool::start(&entry.export, entry.allowed, workers, requests_max).await {
        Ok(pool) => {
            let entered = Entered { pool, allowed: entry.allowed };
            (entry.welcome.clone(), Some(Outcome::Entered(Box::new(entered))))
        }
        Err(error) => {
            tracing::warn!(%error, export = entry.export.name(), "an NBD export cannot be opened");
            match entry.refusal(&error.to_string()) {
                Some(answer) => (answer, None),
                None => (Vec::new(), Some(Outcome::Closed)),
            }
        }
    }
}

/// Fills `N` bytes; `None` when the stream ends before the first.
async fn read_next<const N: usize>(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<[u8; N]>> {
    let mut bytes = [0; N];
    let first = stream.read(&mut bytes).await?;
    if first == 0 {
        return Ok(None);
    }
    stream.read_exact(bytes.get_mut(first..).unwrap_or_default()).await?;
    Ok(Some(bytes))
}

/// Requests and replies until the end.
async fn transmit<S>(stream: S, context: &Context, entered: Entered) -> Result<(), Ended>
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    let Entered { pool, allowed } = entered;
    let requests_max = context.settings.requests_max.max(1);
    let (replies, outgoing) = mpsc::channel(requests_max);
    let bytes_max = context.settings.bytes_in_flight_max.max(PAYLOAD_BYTES_MAX);
    let session = Session {
        pool: &pool,
        allowed,
        replies,
        requests: Arc::new(Semaphore::new(requests_max)),
        bytes: Arc::new(Semaphore::new(bytes_max as usize)),
        stopping: context.stopping.clone(),
    };
    let (reader, writer) = tokio::io::split(stream);
    let mut reader = BufReader::with_capacity(STREAM_BUFFER_BYTES, reader);
    let mut sending = Box::pin(send(writer, outgoing));
    let received = tokio::select! {
        received = session.receive(&mut reader) => received,
        () = session.drained(requests_max) => Ok(()),
        sent = &mut sending => Err(sent.err().map_or(Ended::NotRead, Ended::Broken)),
    };
    drop(session);
    // What was submitted is answered, as far as there is somebody to take it; the writer ends with the last answer.
    let grace = context.settings.grace;
    let sent = async {
        if matches!(received, Err(Ended::Broken(_) | Ended::NotRead)) {
            drop(sending);
            return Ok(());
        }
        match timeout(grace, sending).await {
            Err(_) => Err(Ended::NotRead),
            // A client may leave without waiting for what it is owed.
            Ok(Ok(()) | Err(_)) => Ok(()),
        }
    };
    let (sent, finished) = tokio::join!(sent, pool.finish(grace));
    received.and(sent).and(if finished { Ok(()) } else { Err(Ended::DiskBusy) })
}

/// Sends answers until there will be no more, then ends the stream.
async fn send(writer: impl AsyncWrite + Unpin, mut replies: mpsc::Receiver<Reply>) -> io::Result<()> {
    let mut out = BufWriter::with_capacity(STREAM_BUFFER_BYTES, writer);
    while let Some(Reply { frames, permits }) = replies.recv().await {
        for frame in frames {
            out.write_all(&frame).await?;
        }
        drop(permits);
        if replies.is_empty() {
            out.flush().await?;
        }
    }
    out.shutdown().await
}

/// The receiving side of a connection.
struct Session<'a> {
    pool: &'a Pool,
    allowed: Allowed,
    replies: mpsc::Sender<Reply>,
    requests: Arc<Semaphore>,
    bytes: Arc<Semaphore>,
    stopping: watch::Receiver<bool>,
}

impl Session<'_> {
    /// Takes requests until the client says good-bye or leaves.
    async fn receive(&self, reader: &mut (impl AsyncRead + Unpin)) -> Result<(), Ended> {
        while let Some(head) = read_next(reader).await? {
            let request = Request::decode(head)?;
            if request.payload_bytes() > PAYLOAD_BYTES_MAX {
                return Err(Ended::TooLong(request.payload_bytes()));
            }
            if *self.stopping.borrow() {
                self.turn_away(reader, &request).await?;
                continue;
            }
            let permits = self.permits(&request).await?;
            let mut payload = vec![0; request.payload_bytes() as usize];
            reader.read_exact(&mut payload).await?;
            match request.check(&self.allowed) {
                Ok(Work::Disconnect) => return Ok(()),
                Ok(work) => self.pool.submit(Job { work, payload, owed: self.owed(&request, permits) }),
                Err(code) => self.owed(&request, permits).refuse_early(code, reason(code)).await,
            }
        }
        Ok(())
    }

    fn owed(&self, request: &Request, permits: Permits) -> Owed {
        Owed::new(request.cookie, self.allowed.structured, &self.replies, permits)
    }

    /// Waits until the connection may hold what this request needs.
    async fn permits(&self, request: &Request) -> Result<Permits, Ended> {
        let cost = match request.check(&self.allowed) {
            Ok(Work::Read { range, .. }) => range.len() as u32,
            _ => request.payload_bytes(),
        };
        let closed = |_| Ended::Broken(io::ErrorKind::ConnectionAborted.into());
        let one = Arc::clone(&self.requests).acquire_owned().await.map_err(closed)?;
        let bytes = Arc::clone(&self.bytes).acquire_many_owned(cost.max(REQUEST_COST_MIN));
        Ok((one, bytes.await.map_err(closed)?))
    }

    /// Refuses a request that came after the server began to stop.
    async fn turn_away(&self, reader: &mut (impl AsyncRead + Unpin), request: &Request) -> io::Result<()> {
        let mut payload = reader.take(request.payload_bytes().into());
        tokio::io::copy(&mut payload, &mut tokio::io::sink()).await?;
        let code = ErrorCode::Shutdown;
        let frames = refusal(request.cookie, code, reason(code), self.allowed.structured);
        let _ = self.replies.send(Reply { frames, permits: None }).await;
        Ok(())
    }

    /// Returns once the server stops and every request that was taken is answered.
    async fn drained(&self, requests_max: usize) {
        let mut stopping = self.stopping.clone();
        let _ = stopping.wait_for(|stop| *stop).await;
        let all = u32::try_from(requests_max).unwrap_or(u32::MAX);
        let _ = self.requests.acquire_many(all).await;
    }
}

fn reason(code: ErrorCode) -> &'static str {
    match code {
        ErrorCode::Permission => "the export is read-only",
        ErrorCode::Invalid => "the request is outside the export, or not understood by this server",
        ErrorCode::NoSpace => "the write would pass the end of the export",
        ErrorCode::Io => "the medium failed",
        ErrorCode::Shutdown => "the server is stopping",
    }
}
