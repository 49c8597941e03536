//! The lanes of a session over one QUIC connection: frames in, frames out.
//!
//! Invariants: the control lane is one bidirectional stream, opened by the dialling end; each disk's delta and bulk
//! lanes are unidirectional streams towards the target, opened when first used; frames of a lane keep their order.
//! What waits to be written is bounded by the protocol's credit, what was read and not yet handled by the channels'
//! depth; when the reader stops reading, the transport's windows stop the sender. Payload is handed to the transport
//! without a copy. Units: frames. Called by the three programs' session tasks.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use quinn::{Connection, ReadExactError, RecvStream, SendStream};
use tokio::sync::mpsc;

use crate::error::{Answer, Severity};
use crate::format::FormatError;
use crate::format::frame::{Frame, FrameHeader, FrameKind};
use crate::net::endpoint::CloseCode;
use crate::net::shaper::{Class, Shaper};
use crate::proto::{Lane, Outgoing};

/// Control frames read and not yet handled.
const CONTROL_FRAMES_MAX: usize = 64;
/// Data frames (up to 8 MiB each) read and not yet handled, per connection.
const DATA_FRAMES_MAX: usize = 4;
/// What is sent first where several lanes wait: quinn sends of the highest, and of equals in turn. They never change: quinn asks
/// for a stream's priority when it takes the stream up, so one that was lowered for a while stays behind all others.
const CONTROL_PRIORITY: i32 = 2;
const DELTA_PRIORITY: i32 = 1;
const BULK_PRIORITY: i32 = 0;
/// How long the connection's own reason is waited for after the peer finished the control lane.
const REASON_WAIT: Duration = Duration::from_secs(1);

/// Why lanes came to an end.
#[derive(Debug, thiserror::Error)]
pub enum LaneError {
    /// The peer sent bytes that are no frame.
    #[error("the peer sent bytes that are no frame: {0}")]
    Format(#[from] FormatError),
    /// The connection or a stream ended.
    #[error("the connection ended: {0}")]
    Ended(String),
}

impl LaneError {
    /// The innermost reason: the outer ones only say "connection lost", not who closed it and why.
    fn ended(error: &dyn std::error::Error) -> Self {
        let mut reason = error;
        while let Some(inner) = reason.source() {
            reason = inner;
        }
        Self::Ended(reason.to_string())
    }
}

impl Answer for LaneError {
    fn severity(&self) -> Severity {
        Severity::Retry
    }
}

/// What arrives.
#[derive(Debug)]
pub enum Arrival {
    /// A frame.
    Frame(FrameKind, Bytes),
    /// A lane ended by an error; the session is over.
    Over(LaneError),
}

/// The reading half: all lanes of a connection.
#[derive(Debug)]
pub struct LaneReader {
    control: mpsc::Receiver<Arrival>,
    data: mpsc::Receiver<Arrival>,
}

impl LaneReader {
    /// The next frame of any lane; control goes first. Safe to drop at the await.
    pub async fn next(&mut self) -> Arrival {
        let arrival = tokio::select! {
            biased;
            arrival = self.control.recv() => arrival,
            // No data lane is left when the connection is over: why it is, the control lane's reader tells.
            Some(arrival) = self.data.recv() => Some(arrival),
        };
        arrival.unwrap_or_else(|| Arrival::Over(LaneError::Ended("it was over before".into())))
    }
}

/// The writing half: frames are queued here and leave in order, lane by lane. `T` comes back when a frame was handed
/// to the transport.
#[derive(Debug)]
pub struct LaneWriter<T> {
    connection: Connection,
    control: mpsc::UnboundedSender<(Frame, T)>,
    data: HashMap<Lane, mpsc::UnboundedSender<(Frame, T)>>,
    shaper: Arc<Shaper>,
    written: mpsc::UnboundedSender<T>,
}

/// Lanes of a connection this end dialled.
///
/// # Errors
/// When the connection is gone.
pub async fn dialled<T: Send + 'static>(
    connection: &Connection,
) -> Result<(LaneReader, LaneWriter<T>, mpsc::UnboundedReceiver<T>), LaneError> {
    let (send, recv) = connection.open_bi().await.map_err(|error| LaneError::ended(&error))?;
    Ok(join(connection, send, recv))
}

/// Lanes of a connection this end accepted; waits for the peer to open the control lane.
///
/// # Errors
/// When the connection ends first.
pub async fn accepted<T: Send + 'static>(
    connection: &Connection,
) -> Result<(LaneReader, LaneWriter<T>, mpsc::UnboundedReceiver<T>), LaneError> {
    let (send, recv) = connection.accept_bi().await.map_err(|error| LaneError::ended(&error))?;
    Ok(join(connection, send, recv))
}

fn join<T: Send + 'static>(
    connection: &Connection,
    send: SendStream,
    recv: RecvStream,
) -> (LaneReader, LaneWriter<T>, mpsc::UnboundedReceiver<T>) {
    let (control_in, control) = mpsc::channel(CONTROL_FRAMES_MAX);
    let (data_in, data) = mpsc::channel(DATA_FRAMES_MAX);
    tokio::spawn(read_control(connection.clone(), recv, control_in));
    tokio::spawn(accept_data_lanes(connection.clone(), data_in));
    let (written, handed_over) = mpsc::unbounded_channel();
    let control_out = spawn_writer(connection.clone(), send, written.clone());
    let writer = LaneWriter {
        connection: connection.clone(),
        control: control_out,
        data: HashMap::new(),
        shaper: Arc::default(),
        written,
    };
    (LaneReader { control, data }, writer, handed_over)
}

impl<T: Send + 'static> LaneWriter<T> {
    /// Waits until the connection is over; answers why.
    pub async fn closed(&self) -> LaneError {
        LaneError::ended(&self.connection.closed().await)
    }

    /// Data leave as fast as this allows; of lanes that were not used yet.
    pub fn shape(&mut self, shaper: Arc<Shaper>) {
        self.shaper = shaper;
    }

    /// Queues a frame on its lane. A lane that cannot be written closes the connection, which the reader notices.
    pub fn send(&mut self, outgoing: Outgoing, token: T) {
        let lane = match outgoing.lane {
            Lane::Control => &self.control,
            data => self.data.entry(data).or_insert_with(|| {
                let class = if matches!(data, Lane::Delta(_)) { Class::Delta } else { Class::Bulk };
                let shaper = Arc::clone(&self.shaper);
                open_data_lane(self.connection.clone(), class, shaper, self.written.clone())
            }),
        };
        // A failed send means that the writer ended with the connection; the session is being torn down.
        let _ = lane.send((outgoing.frame, token));
    }
}

async fn accept_data_lanes(connection: Connection, data: mpsc::Sender<Arrival>) {
    while let Ok(recv) = connection.accept_uni().await {
        tokio::spawn(read_lane(recv, data.clone()));
    }
}

/// Reads the control lane. Its end is the session's: a peer that leaves finishes it and then closes the connection,
/// with a reason that may be a packet later.
async fn read_control(connection: Connection, recv: RecvStream, arrivals: mpsc::Sender<Arrival>) {
    read_lane(recv, arrivals.clone()).await;
    let reason = match tokio::time::timeout(REASON_WAIT, connection.closed()).await {
        Ok(closed) => LaneError::ended(&closed),
        Err(_) => LaneError::Ended("the peer finished the control lane and gave no reason".into()),
    };
    // A reader that is gone, or was told by the lane's own error, needs no other reason.
    let _ = arrivals.send(Arrival::Over(reason)).await;
}

async fn read_lane(mut recv: RecvStream, arrivals: mpsc::Sender<Arrival>) {
    loop {
        let arrival = match read_frame(&mut recv).await {
            Ok(Some((kind, body))) => Arrival::Frame(kind, body),
            Ok(None) => return,
            Err(error) => Arrival::Over(error),
        };
        let over = matches!(arrival, Arrival::Over(_));
        if arrivals.send(arrival).await.is_err() || over {
            return;
        }
    }
}

/// Reads one frame; `None` at the end of the stream.
async fn read_frame(recv: &mut RecvStream) -> Result<Option<(FrameKind, Bytes)>, LaneError> {
    let mut head = [0_u8; FrameHeader::BYTES];
    match recv.read_exact(&mut head).await {
        Ok(()) => {}
        Err(ReadExactError::FinishedEarly(0)) => return Ok(None),
        Err(error) => return Err(LaneError::ended(&error)),
    }
    let header = FrameHeader::decode(&head)?;
    let want = header.body_bytes as usize;
    let mut body = BytesMut::with_capacity(want);
    while body.len() < want {
        match recv.read_chunk(want - body.len(), true).await {
            Ok(Some(chunk)) if chunk.bytes.len() == want => return Ok(Some((header.kind, chunk.bytes))),
            Ok(Some(chunk)) => body.extend_from_slice(&chunk.bytes),
            Ok(None) => return Err(LaneError::Ended("a frame was cut short".into())),
            Err(error) => return Err(LaneError::ended(&error)),
        }
    }
    Ok(Some((header.kind, body.freeze())))
}

fn spawn_writer<T: Send + 'static>(
    connection: Connection,
    send: SendStream,
    written: mpsc::UnboundedSender<T>,
) -> mpsc::UnboundedSender<(Frame, T)> {
    let (queue, frames) = mpsc::unbounded_channel();
    let lane = WriteLane { connection, send, written };
    // An error means that the stream is gone, which the next write reports.
    let _ = lane.send.set_priority(CONTROL_PRIORITY);
    tokio::spawn(lane.control(frames));
    queue
}

fn open_data_lane<T: Send + 'static>(
    connection: Connection,
    class: Class,
    shaper: Arc<Shaper>,
    written: mpsc::UnboundedSender<T>,
) -> mpsc::UnboundedSender<(Frame, T)> {
    let (queue, frames) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        if let Ok(send) = connection.open_uni().await {
            let lane = WriteLane { connection, send, written };
            lane.data(frames, class, &shaper).await;
        }
    });
    queue
}

/// One lane that is written.
struct WriteLane<T> {
    connection: Connection,
    send: SendStream,
    written: mpsc::UnboundedSender<T>,
}

impl<T> WriteLane<T> {
    async fn control(mut self, mut frames: mpsc::UnboundedReceiver<(Frame, T)>) {
        while let Some((frame, token)) = frames.recv().await {
            if self.send.write_all_chunks(&mut frame.into_parts()).await.is_err() {
                return self.give_up();
            }
            let _ = self.written.send(token);
        }
        let _ = self.send.finish();
    }

    async fn data(mut self, mut frames: mpsc::UnboundedReceiver<(Frame, T)>, class: Class, shaper: &Shaper) {
        let priority = if class == Class::Delta { DELTA_PRIORITY } else { BULK_PRIORITY };
        // An error means that the stream is gone, which the next write reports.
        let _ = self.send.set_priority(priority);
        while let Some((frame, token)) = frames.recv().await {
            let mut parts = frame.into_parts();
            let is_written = match shaper.piece_bytes() {
                Some(piece_bytes) => self.write_in_pieces(parts, piece_bytes, class, shaper).await,
                None => self.send.write_all_chunks(&mut parts).await.is_ok(),
            };
            if !is_written {
                return self.give_up();
            }
            let _ = self.written.send(token);
        }
        let _ = self.send.finish();
    }

    /// As fast as that is allowed; answers whether the stream took all.
    async fn write_in_pieces(
        &mut self,
        parts: Vec<Bytes>,
        piece_bytes: usize,
        class: Class,
        shaper: &Shaper,
    ) -> bool {
        for mut part in parts {
            while !part.is_empty() {
                let piece = part.split_to(part.len().min(piece_bytes));
                if !self.write(piece, class, shaper).await {
                    return false;
                }
            }
        }
        true
    }

    /// Writes a piece when it may leave; answers whether the stream still took it.
    async fn write(&mut self, piece: Bytes, class: Class, shaper: &Shaper) -> bool {
        tokio::select! {
            biased;
            () = shaper.pass(class, piece.len()) => {}
            // Nobody waits for it any more, and what it waits for is others'.
            _ = self.connection.closed() => return false,
        }
        self.send.write_chunk(piece).await.is_ok()
    }

    /// The connection is over, or the peer refuses this lane: without it the session would stand still, so the connection
    /// ends and its reader tells the session. Who closed it before keeps its reason.
    fn give_up(&self) {
        if self.connection.close_reason().is_none() {
            CloseCode::Violation.close(&self.connection);
        }
    }
}
