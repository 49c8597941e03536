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
/// Most reads in a row that are not looked up because look-ups before them found no hole.
const HOLE_SEARCH_PAUSE_MAX: u32 = 63;
/// Extents in one allocation map; the client asks again from where it ends.
const EXTENTS_MAX: usize = 4096;
/// The file is asked for its map in windows of this length, so that a fragmented disk costs no more memory.
const MAP_WINDOW_BYTES: u64 = 64 << 20;
/// Zeros that must take their space are written in pieces of this length.
const ZERO_PIECE_BYTES: usize = 1 << 20;

/// When a read is looked up in the allocation map first, so that its holes need not be sent.
///
/// A look-up may cost far more than the read (measured: 25 times on tmpfs, which walks its pages; a round trip on
/// network file systems), and full disks have nothing to find: each one in vain doubles the pause before the next.
#[derive(Debug, Default)]
pub(super) struct HoleSearch {
    pause: u32,
    left: u32,
}

impl HoleSearch {
    /// The pieces of `range` to be read and sent as data, ascending; what lies between them is holes.
    fn data_in(&mut self, file: &mut dyn BlockFile, range: ByteRange) -> Vec<ByteRange> {
        if range.len() < HOLE_SEARCH_BYTES_MIN {
            return vec![range];
        }
        if self.left > 0 {
            self.left -= 1;
            return vec![range];
        }
        // A medium that has no map can still be read.
        let data = data_in(file, range).unwrap_or_else(|_| vec![range]);
        self.pause = if data == [range] { (self.pause * 2 + 1).min(HOLE_SEARCH_PAUSE_MAX) } else { 0 };
        self.left = self.pause;
        data
    }
}

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
    search: &mut HoleSearch,
) -> Result<Vec<Bytes>, BlockError> {
    match work {
        Work::Read { range, .. } if range.is_empty() => {}
        Work::Read { range, whole: true } => return read_whole(file, cookie, range),
        Work::Read { range, .. } if !allowed.structured => return read_simple(file, cookie, range),
        Work::Read { range, .. } => return read(file, cookie, range, search),
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

fn read_simple(file: &mut dyn BlockFile, cookie: u64, range: ByteRange) -> Result<Vec<Bytes>, BlockError> {
    let data = read_pieces(file, range, &[range])?;
    Ok(vec![reply::simple(cookie, None).into(), data.into()])
}

fn read_whole(file: &mut dyn BlockFile, cookie: u64, range: ByteRange) -> Result<Vec<Bytes>, BlockError> {
    let data = read_pieces(file, range, &[range])?;
    Ok(vec![reply::data_head(cookie, range, true).into(), data.into()])
}

fn read(
    file: &mut dyn BlockFile,
    cookie: u64,
    range: ByteRange,
    search: &mut HoleSearch,
) -> Result<Vec<Bytes>, BlockError> {
    let data = search.data_in(file, range);
    let buffer = Bytes::from(read_pieces(file, range, &data)?);
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::format::nbd::ALLOCATION_CONTEXT_ID;
    use crate::io::BlockOp;

    /// A disk whose map says whatever the test likes. Byte `at` of it is `pattern(at)` where the map admits data.
    struct Odd {
        size: u64,
        map: Option<Vec<ByteRange>>,
        /// Longest range it was asked to map.
        asked: u64,
    }

    fn pattern(at: u64) -> u8 {
        (at % 255) as u8 + 1
    }

    impl BlockFile for Odd {
        fn size_bytes(&self) -> u64 {
            self.size
        }
        fn read(&mut self, reads: &mut [ReadAt<'_>]) -> Result<(), BlockError> {
            for read in reads {
                for (at, byte) in (read.offset..).zip(read.data.iter_mut()) {
                    *byte = pattern(at);
                }
            }
            Ok(())
        }
        fn write(&mut self, _: &[WriteAt<'_>]) -> Result<(), BlockError> {
            Ok(())
        }
        fn zero(&mut self, _: ByteRange) -> Result<(), BlockError> {
            Ok(())
        }
        fn flush(&mut self) -> Result<(), BlockError> {
            Ok(())
        }
        fn allocated(&mut self, range: ByteRange) -> Result<Vec<ByteRange>, BlockError> {
            self.asked = self.asked.max(range.len());
            let source = std::io::Error::other("no map");
            let none = || BlockError { name: "odd".into(), op: BlockOp::Map, offset: 0, len: 0, source };
            let map = self.map.as_ref().ok_or_else(none)?;
            // Coarse: pieces are not cut to the range.
            Ok(map
                .iter()
                .copied()
                .filter(|piece| piece.start < range.end && piece.end > range.start)
                .collect())
        }
    }

    fn be32(bytes: &[u8]) -> u32 {
        u32::from_be_bytes(bytes.try_into().expect("four bytes"))
    }

    /// Length and flags of every extent of a reply.
    fn extents(frames: &[Bytes]) -> Vec<(u64, u32)> {
        let payload = &frames.concat()[reply::CHUNK_BYTES..];
        assert_eq!(be32(&payload[..4]), ALLOCATION_CONTEXT_ID);
        payload[4..].chunks_exact(8).map(|pair| (be32(&pair[..4]).into(), be32(&pair[4..]))).collect()
    }

    const SIZE: u64 = 200 << 20;

    proptest! {
        #[test]
        fn a_map_covers_its_request_whatever_the_file_says(
            cuts in proptest::collection::btree_set(0..SIZE, 0..20), start in 0..SIZE, length in 1..SIZE,
        ) {
            let cuts: Vec<u64> = cuts.into_iter().collect();
            let map: Vec<ByteRange> = cuts
                .as_chunks::<2>().0.iter().map(|[start, end]| ByteRange { start: *start, end: *end }).collect();
            let range = ByteRange { start, end: (start + length).min(SIZE) };
            let mut file = Odd { size: SIZE, map: Some(map.clone()), asked: 0 };
            let said = extents(&status(&mut file, 1, range, false).expect("no fault"));
            prop_assert!(said.windows(2).all(|pair| pair[0].1 != pair[1].1), "neighbours differ: {said:?}");
            let mut at = range.start;
            for (length, flags) in &said {
                let extent = ByteRange { start: at, end: at + length };
                let is_data = |place: u64| map.iter().any(|piece| piece.start <= place && place < piece.end);
                prop_assert!(!extent.is_empty());
                for place in [extent.start, extent.start.midpoint(extent.end), extent.end - 1] {
                    prop_assert_eq!(is_data(place), *flags == 0, "{} of {:?}", place, &said);
                }
                at = extent.end;
            }
            prop_assert_eq!(at, range.end);
            prop_assert!(file.asked <= MAP_WINDOW_BYTES);
            let first = extents(&status(&mut file, 1, range, true).expect("no fault"));
            prop_assert_eq!(first, [said[0]]);
        }

        #[test]
        fn a_read_tells_each_byte_once_whatever_the_file_says(
            cuts in proptest::collection::btree_set(0..400_000_u64, 0..20), start in 0..300_000_u64,
            length in 1..300_000_u64, has_map in any::<bool>(),
        ) {
            let cuts: Vec<u64> = cuts.into_iter().collect();
            let map: Vec<ByteRange> = cuts
                .as_chunks::<2>().0.iter().map(|[start, end]| ByteRange { start: *start, end: *end }).collect();
            let range = ByteRange { start, end: start + length };
            let mut file = Odd { size: SIZE, map: has_map.then(|| map.clone()), asked: 0 };
            let looked_up = has_map && length >= HOLE_SEARCH_BYTES_MIN;
            let expected: Vec<u8> = (range.start..range.end)
                .map(|at| {
                    let hole = looked_up && !map.iter().any(|piece| piece.start <= at && at < piece.end);
                    if hole { 0 } else { pattern(at) }
                })
                .collect();
            let frames = read(&mut file, 1, range, &mut HoleSearch::default()).expect("no fault").concat();
            let (mut told, mut rest) = (Vec::new(), frames.as_slice());
            while !rest.is_empty() {
                let payload_bytes = be32(&rest[16..20]) as usize;
                let (chunk, after) = rest.split_at(reply::CHUNK_BYTES + payload_bytes);
                let last = chunk[5] == 1;
                prop_assert_eq!(last, after.is_empty());
                let place = u64::from_be_bytes(chunk[20..28].try_into().expect("eight bytes"));
                prop_assert_eq!(place, range.start + told.len() as u64);
                match chunk[7] {
                    1 => told.extend_from_slice(&chunk[28..]),
                    2 => told.resize(told.len() + be32(&chunk[28..32]) as usize, 0),
                    other => prop_assert!(false, "chunk of kind {other}"),
                }
                rest = after;
            }
            prop_assert!(told == expected);
        }
    }

    #[test]
    fn full_disks_are_seldom_looked_up_and_sparse_ones_every_time() {
        let look_ups = |map: Vec<ByteRange>| {
            let mut file = Odd { size: SIZE, map: Some(map), asked: 0 };
            let (mut search, mut count) = (HoleSearch::default(), 0);
            for number in 0..1000_u64 {
                let range = ByteRange { start: number << 16, end: (number + 1) << 16 };
                file.asked = 0;
                search.data_in(&mut file, range);
                count += u64::from(file.asked > 0);
            }
            count
        };
        assert_eq!(look_ups(Vec::new()), 1000);
        // Reads 0, 2, 6, 14, 30, 62, and every 64th from there.
        assert_eq!(look_ups(vec![ByteRange { start: 0, end: SIZE }]), 20);
    }

    #[test]
    fn a_fragmented_disk_is_mapped_as_far_as_one_reply_goes() {
        let map = (0..10_000_u64).map(|at| ByteRange { start: at * 8192, end: at * 8192 + 4096 }).collect();
        let mut file = Odd { size: SIZE, map: Some(map), asked: 0 };
        let range = ByteRange { start: 0, end: SIZE };
        let said = extents(&status(&mut file, 1, range, false).expect("no fault"));
        assert_eq!(said.len(), EXTENTS_MAX);
        assert!(said.iter().all(|(length, _)| *length == 4096), "also the last one is whole");
    }
}
