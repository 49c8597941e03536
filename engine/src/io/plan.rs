//! Cuts the transfers of one call into pieces and decides how each reaches the medium.
//!
//! Invariants: the pieces of a transfer cover it exactly, in order; pieces of a direct route begin and end at the
//! device's alignment; everything else goes through the page cache and is kept apart, because it must not run
//! while direct pieces do (see `handle.rs`). Units: bytes. Called by `handle.rs`; the backends carry pieces out.

use super::{BlockOp, ByteRange};

/// Largest single transfer given to the kernel.
pub(super) const PIECE_BYTES_MAX: usize = 1 << 20;
/// Largest transfer through a bounce buffer: bounds the memory of a full queue of them.
pub(super) const BOUNCE_BYTES_MAX: usize = 256 << 10;

/// Where a transfer's bytes come from or go to.
#[derive(Debug)]
pub(super) enum Buffer<'a> {
    /// Filled from the medium.
    Read(&'a mut [u8]),
    /// Put on the medium.
    Write(&'a [u8]),
}

impl Buffer<'_> {
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Read(data) => data.len(),
            Self::Write(data) => data.len(),
        }
    }

    fn address(&self) -> usize {
        match self {
            Self::Read(data) => data.as_ptr().addr(),
            Self::Write(data) => data.as_ptr().addr(),
        }
    }

    fn op(&self) -> BlockOp {
        match self {
            Self::Read(_) => BlockOp::Read,
            Self::Write(_) => BlockOp::Write,
        }
    }
}

impl<'a> Buffer<'a> {
    fn split_at(self, mid: usize) -> (Self, Self) {
        match self {
            Self::Read(data) => {
                let (a, b) = data.split_at_mut(mid);
                (Self::Read(a), Self::Read(b))
            }
            Self::Write(data) => {
                let (a, b) = data.split_at(mid);
                (Self::Write(a), Self::Write(b))
            }
        }
    }
}

/// How a piece reaches the medium.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Route {
    /// Straight between the caller's memory and the device.
    Direct,
    /// Directly, by way of an aligned buffer, because the caller's memory is not aligned.
    Bounce,
    /// Through the page cache.
    Buffered,
}

/// One transfer of at most [`PIECE_BYTES_MAX`].
#[derive(Debug)]
pub(super) struct Piece<'a> {
    pub(super) offset: u64,
    pub(super) buffer: Buffer<'a>,
    pub(super) route: Route,
}

impl Piece<'_> {
    pub(super) fn op(&self) -> BlockOp {
        self.buffer.op()
    }

    pub(super) fn range(&self) -> ByteRange {
        ByteRange { start: self.offset, end: self.offset + self.buffer.len() as u64 }
    }
}

/// The pieces of one call: all of `direct` completes before `buffered` starts.
#[derive(Debug, Default)]
pub(super) struct Plan<'a> {
    pub(super) direct: Vec<Piece<'a>>,
    pub(super) buffered: Vec<Piece<'a>>,
}

/// What direct I/O demands of a transfer; both powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Alignment {
    pub(super) offset: u64,
    pub(super) memory: usize,
}

impl<'a> Plan<'a> {
    /// One transfer into: an unaligned head, an aligned middle in pieces, an unaligned tail.
    pub(super) fn cut(&mut self, offset: u64, buffer: Buffer<'a>, direct: Option<Alignment>) {
        let Some(alignment) = direct else {
            chop(offset, buffer, Route::Buffered, &mut self.buffered);
            return;
        };
        let end = offset + buffer.len() as u64;
        let first = offset.next_multiple_of(alignment.offset);
        let last = end / alignment.offset * alignment.offset;
        if first >= last {
            chop(offset, buffer, Route::Buffered, &mut self.buffered);
            return;
        }
        let (head, rest) = buffer.split_at((first - offset) as usize);
        let (middle, tail) = rest.split_at((last - first) as usize);
        chop(offset, head, Route::Buffered, &mut self.buffered);
        let fits = middle.address().is_multiple_of(alignment.memory);
        let route = if fits { Route::Direct } else { Route::Bounce };
        chop(first, middle, route, &mut self.direct);
        chop(last, tail, Route::Buffered, &mut self.buffered);
    }
}

/// Cuts a run of one route into pieces the kernel takes at once.
fn chop<'a>(mut offset: u64, mut buffer: Buffer<'a>, route: Route, out: &mut Vec<Piece<'a>>) {
    let most = if route == Route::Bounce { BOUNCE_BYTES_MAX } else { PIECE_BYTES_MAX };
    while buffer.len() > 0 {
        let len = buffer.len().min(most);
        let (piece, rest) = buffer.split_at(len);
        out.push(Piece { offset, buffer: piece, route });
        offset += len as u64;
        buffer = rest;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn pieces_cover_a_transfer_and_direct_ones_are_aligned(
            offset in 0..10_000_u64, len in 0..5_000_000_usize, shift in 0..64_usize, exponent in 9..=12_u32,
            direct: bool,
        ) {
            let alignment = Alignment { offset: 1 << exponent, memory: 1 << exponent };
            let data = vec![0_u8; len + shift];
            let mut plan = Plan::default();
            plan.cut(offset, Buffer::Write(&data[shift..]), direct.then_some(alignment));
            let mut all: Vec<&Piece<'_>> = plan.direct.iter().chain(&plan.buffered).collect();
            all.sort_by_key(|piece| piece.offset);
            let mut at = offset;
            for piece in &all {
                prop_assert_eq!(piece.offset, at);
                prop_assert_eq!(piece.buffer.address() - data.as_ptr().addr(), (at - offset) as usize + shift);
                prop_assert!((1..=PIECE_BYTES_MAX).contains(&piece.buffer.len()));
                at = piece.range().end;
            }
            prop_assert_eq!(at, offset + len as u64);
            for piece in &plan.direct {
                prop_assert!(direct && piece.route != Route::Buffered);
                prop_assert!(piece.offset.is_multiple_of(alignment.offset));
                prop_assert!((piece.buffer.len() as u64).is_multiple_of(alignment.offset));
                if piece.route == Route::Direct {
                    prop_assert!(piece.buffer.address().is_multiple_of(alignment.memory));
                } else {
                    prop_assert!(piece.buffer.len() <= BOUNCE_BYTES_MAX);
                }
            }
            let buffered: u64 = plan.buffered.iter().map(|piece| piece.range().len()).sum();
            prop_assert!(!direct || buffered < 2 * alignment.offset, "only the edges are buffered");
        }
    }
}
