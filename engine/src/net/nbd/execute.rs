//! One request on one file: what is read, written or looked up, and the reply it makes.
//!
//! Invariants: a reply covers its request exactly, in ascending order, also when the file's allocation map is coarse,
//! reaches further than asked or is no use at all; memory is one request's payload. Runs on a pool's threads only.
//! Units: bytes.

use bytes::Bytes;

use crate::format::nbd::ErrorCode;
use crate::format::nbd::reply::{self, Extent};
use crate::format::nbd::request::{Allowed, Work};
use crate::io::{BlockError, BlockFile, ByteRange, ReadAt, WriteAt, push_range};

/// Shorter reads are not looked up in the allocation map: the look-up costs as much as it could save.
const HOLE_SEARCH_BYTES_MIN: u64 = 64 << 10;
/// Extents in one allocation map; the client asks again from where it ends.
pub(super) const EXTENTS_MAX: usize = 4096;
/// The file is asked for its map in windows of this length, so that a fragmented disk costs no more memory.
const MAP_WINDOW_BYTES: u64 = 64 << 20;
/// Zeros that must take their space are written in pieces of this length.
const ZERO_PIECE_BYTES: usize = 1 << 20;

/// Does `work`; the frames of the reply, which is a success.
///
/// # Errors
/// What the file said.
pub(super) fn carry_out(
    file: &mut dyn BlockFile,
    cookie: u64,
    work: Work,
    payload: &[u8],
    allowed: &Allowed,
) -> Result<Vec<Bytes>, BlockError> {
    match work {
        Work::Read { range, whole } => return read(file, cookie, range, whole, allowed.structured),
        Work::Status { range, one } => return status(file, cookie, range, one),
        Work::Write { range, durable } => {
            if !range.is_empty() {
                file.write(&[WriteAt { offset: range.start, data: payload }])?;
            }
            flush_if(file, durable)?;
        }
        Work::Zero { range, durable, allocate } => {
            if allocate {
                write_zeros(file, range)?;
            } else if !range.is_empty() {
                file.zero(range)?;
            }
            flush_if(file, durable)?;
        }
        // On a read-only disk nothing waits to become durable.
        Work::Flush => flush_if(file, allowed.writable)?,
        Work::Disconnect => {}
    }
    let frame = if allowed.structured { reply::done(cookie) } else { reply::simple(cookie, None) };
    Ok(vec![frame.into()])
}

fn flush_if(file: &mut dyn BlockFile, wanted: bool) -> Result<(), BlockError> {
    if wanted { file.flush() } else { Ok(()) }
}

fn write_zeros(file: &mut dyn BlockFile, range: ByteRange) -> Result<(), BlockError> {
    let zeros = vec![0; ZERO_PIECE_BYTES.min(range.len() as usize)];
    let mut at = range.start;
    while at < range.end {
        let data = &zeros[..zeros.len().min((range.end - at) as usize)];
        file.write(&[WriteAt { offset: at, data }])?;
        at += data.len() as u64;
    }
    Ok(())
}

/// What of `range` may hold data: the file's map, cut to the range and put in order where it is not.
fn data_in(file: &mut dyn BlockFile, range: ByteRange) -> Result<Vec<ByteRange>, BlockError> {
    let mut data: Vec<ByteRange> = Vec::new();
    let mut at = range.start;
    for piece in file.allocated(range)? {
        let piece = ByteRange { start: piece.start.max(at), end: piece.end.min(range.end) };
        if !piece.is_empty() {
            at = piece.end;
            push_range(&mut data, piece);
        }
    }
    Ok(data)
}

fn read(
    file: &mut dyn BlockFile,
    cookie: u64,
    range: ByteRange,
    whole: bool,
    structured: bool,
) -> Result<Vec<Bytes>, BlockError> {
    if range.is_empty() {
        let frame = if structured { reply::done(cookie) } else { reply::simple(cookie, None) };
        return Ok(vec![frame.into()]);
    }
    let data = if range.len() < HOLE_SEARCH_BYTES_MIN {
        vec![range]
    } else {
        // A medium that has no map can still be read.
        data_in(file, range).unwrap_or_else(|_| vec![range])
    };
    let buffer = Bytes::from(read_pieces(file, range, &data)?);
    if !structured {
        return Ok(vec![reply::simple(cookie, None).into(), buffer]);
    }
    if data.is_empty() {
        return Ok(vec![reply::hole(cookie, range, true).into()]);
    }
    if whole {
        return Ok(vec![reply::data_head(cookie, range, true).into(), buffer]);
    }
    let mut frames: Vec<Bytes> = Vec::with_capacity(3 * data.len() + 1);
    let mut at = range.start;
    for piece in data {
        if at < piece.start {
            frames.push(reply::hole(cookie, ByteRange { start: at, end: piece.start }, false).into());
        }
        frames.push(reply::data_head(cookie, piece, piece.end == range.end).into());
        frames.push(buffer.slice((piece.start - range.start) as usize..(piece.end - range.start) as usize));
        at = piece.end;
    }
    if at < range.end {
        frames.push(reply::hole(cookie, ByteRange { start: at, end: range.end }, true).into());
    }
    Ok(frames)
}

/// The bytes of `range`: those of `data` from the file, zeros between.
fn read_pieces(
    file: &mut dyn BlockFile,
    range: ByteRange,
    data: &[ByteRange],
) -> Result<Vec<u8>, BlockError> {
    let mut buffer = vec![0; range.len() as usize];
    let mut reads = Vec::with_capacity(data.len());
    let (mut rest, mut at) = (buffer.as_mut_slice(), range.start);
    for piece in data {
        let (_, after) = rest.split_at_mut((piece.start - at) as usize);
        let (mine, after) = after.split_at_mut(piece.len() as usize);
        reads.push(ReadAt { offset: piece.start, data: mine });
        (rest, at) = (after, piece.end);
    }
    if !reads.is_empty() {
        file.read(&mut reads)?;
    }
    Ok(buffer)
}

fn status(
    file: &mut dyn BlockFile,
    cookie: u64,
    range: ByteRange,
    one: bool,
) -> Result<Vec<Bytes>, BlockError> {
    let most = if one { 1 } else { EXTENTS_MAX };
    let mut map = Map { extents: Vec::new(), most };
    let mut at = range.start;
    while at < range.end && !map.is_full() {
        let window = ByteRange { start: at, end: range.end.min(at.saturating_add(MAP_WINDOW_BYTES)) };
        for piece in data_in(file, window)? {
            map.push(piece.start - at, true);
            map.push(piece.len(), false);
            at = piece.end;
        }
        map.push(window.end - at, true);
        at = window.end;
    }
    map.extents.truncate(most);
    Ok(vec![reply::status(cookie, &map.extents).into()])
}

/// Extents in order, neighbours of one kind joined.
struct Map {
    extents: Vec<Extent>,
    most: usize,
}

impl Map {
    /// Whether the last extent that counts is known to its end.
    fn is_full(&self) -> bool {
        self.extents.len() > self.most
    }

    fn push(&mut self, length: u64, is_hole: bool) {
        // A request is shorter than 2^32 bytes, and so is everything in it.
        let length = u32::try_from(length).unwrap_or(u32::MAX);
        let is_full = self.is_full();
        match self.extents.last_mut() {
            _ if length == 0 => {}
            Some(last) if last.is_hole == is_hole => last.length = last.length.saturating_add(length),
            _ if is_full => {}
            _ => self.extents.push(Extent { length, is_hole }),
        }
    }
}

/// The number and the words by which a client learns of a failure.
pub(super) fn explain(error: &BlockError) -> (ErrorCode, String) {
    use std::io::ErrorKind;
    let code = match error.source.kind() {
        _ if error.is_full() => ErrorCode::NoSpace,
        ErrorKind::FileTooLarge => ErrorCode::NoSpace,
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => ErrorCode::Permission,
        ErrorKind::InvalidInput => ErrorCode::Invalid,
        _ => ErrorCode::Io,
    };
    (code, error.to_string())
}
