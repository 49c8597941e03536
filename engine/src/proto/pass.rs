//! One walk over a disk: which chunks are read, which hashes are asked for, and which pieces are sent.
//!
//! A chunk goes `reading → (comparing → refining → confirming →) sending → sent`. A bulk pass repairs the target until all of the
//! disk is settled durably; a scan round does the same through the delta stream and forgets itself at its mark.
//!
//! Invariants: at most [`CHUNKS_OPEN_MAX`] chunks hold data at the agent; what cannot be read is never sent; a chunk is
//! settled only when the target says its sectors are durable (bulk) or its records were given sequences (scan); nothing of
//! a compared chunk is sent before a 16-byte hash has confirmed what is left out, for what is sent settles all of it; a
//! reconnect begins again with what is not settled. Units: sectors; a unit is 64 KiB, a fine unit 4 KiB, counted from the chunk's first sector.
//! Driven by [`super::agent`]; the data themselves stay with the agent's reader.

use std::collections::{BTreeMap, VecDeque};

use super::compare::{Computed, Question, UnitMask};
use crate::checksum::UnitHash;
use crate::format::message::{CompareAnswer, PassMode, RefineUnit};
use crate::limits::{CHUNK_BYTES, CHUNKS_OPEN_MAX, COMPARE_FINE_BYTES, COMPARE_UNIT_BYTES};
use crate::mutants::{Mutant, mutant};
use crate::range_set::RangeSet;
use crate::units::{SECTOR_BYTES, SectorRange};

const UNIT_SECTORS: u64 = COMPARE_UNIT_BYTES / SECTOR_BYTES;
const FINE_SECTORS: u64 = COMPARE_FINE_BYTES / SECTOR_BYTES;

/// Where the pieces of a walk go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sink {
    /// Initial sync or resync, by the bulk stream.
    Bulk,
    /// A scan round, by the delta stream.
    Delta,
}

/// What the walk wants done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PassAction {
    /// Read the chunk and keep its data; with `hash`, answer with its unit hashes.
    Read {
        /// The chunk.
        chunk: SectorRange,
        /// Whether hashes are needed.
        hash: bool,
        /// The parts of it that are wanted, ascending; empty for all of it.
        pieces: Vec<SectorRange>,
    },
    /// Ask the target for hashes of the chunk, or with `units` which of their blocks are equal there.
    Ask {
        /// The chunk.
        chunk: SectorRange,
        /// Units to refine; empty for unit hashes of the whole chunk.
        units: Vec<RefineUnit>,
    },
    /// Compute this of the kept data.
    Compute {
        /// The chunk.
        chunk: SectorRange,
        /// What.
        question: Question,
    },
    /// Make records of these pieces of the kept data and submit them (perhaps none); then forget the data.
    Send {
        /// The chunk.
        chunk: SectorRange,
        /// What to send, ascending.
        pieces: Vec<SectorRange>,
    },
}

#[derive(Debug, Default)]
struct Chunk {
    range: SectorRange,
    local: Option<Vec<UnitHash>>,
    remote: Option<Vec<UnitHash>>,
    refine: Vec<u16>,
    pieces: Vec<SectorRange>,
    /// What the target said of the units to refine: blocks it holds as equal, and the hash over all of them.
    claim: Option<(Vec<UnitMask>, UnitHash)>,
    /// What of it cannot be read.
    unread: RangeSet,
}

/// One walk over a disk.
#[derive(Debug)]
pub struct Pass {
    number: u64,
    mode: PassMode,
    sink: Sink,
    whole: SectorRange,
    chunk_sectors: u64,
    settled: RangeSet,
    begun: RangeSet,
    cursor: u64,
    /// Walked before the rest, in this order.
    ahead: VecDeque<SectorRange>,
    /// Only known parts of the disk are walked: a chunk is what is wanted of an aligned piece of it.
    sparse: bool,
    open: BTreeMap<u64, Chunk>,
    actions: VecDeque<PassAction>,
    end_announced: bool,
}

/// An answer that does not fit what was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an answer for {got} units where {expected} were asked for")]
pub struct HashCountError {
    /// Units that were answered.
    pub got: usize,
    /// Units asked for.
    pub expected: usize,
}

impl Pass {
    /// A walk over `whole` that leaves out what is settled.
    #[must_use]
    pub fn new(number: u64, mode: PassMode, sink: Sink, whole: SectorRange, settled: RangeSet) -> Self {
        Self {
            number,
            mode,
            sink,
            whole,
            chunk_sectors: CHUNK_BYTES / SECTOR_BYTES,
            begun: settled.clone(),
            settled,
            cursor: whole.start,
            ahead: VecDeque::new(),
            sparse: false,
            open: BTreeMap::new(),
            actions: VecDeque::new(),
            end_announced: false,
        }
    }

    /// A delta round over what is known to have changed: it is read and sent without a question.
    #[must_use]
    pub fn of_changes(whole: SectorRange, changed: &RangeSet) -> Self {
        let unchanged = changed.missing(whole).into_iter().collect();
        Self { sparse: true, ..Self::new(0, PassMode::Copy, Sink::Delta, whole, unchanged) }
    }

    /// The same walk, which begins with these parts, in this order.
    #[must_use]
    pub fn with_first(mut self, first: &[SectorRange]) -> Self {
        self.ahead = first.iter().copied().collect();
        self
    }

    /// The same walk in chunks of `bytes`, a multiple of the compare unit, at most [`CHUNK_BYTES`].
    ///
    /// # Panics
    /// When `bytes` is not.
    #[must_use]
    pub fn with_chunk_bytes(mut self, bytes: u64) -> Self {
        assert!(
            bytes.is_multiple_of(COMPARE_UNIT_BYTES) && (COMPARE_UNIT_BYTES..=CHUNK_BYTES).contains(&bytes)
        );
        self.chunk_sectors = bytes / SECTOR_BYTES;
        self
    }

    /// Number of the pass at the target (zero for scan rounds).
    #[must_use]
    pub const fn number(&self) -> u64 {
        self.number
    }

    /// Where its pieces go.
    #[must_use]
    pub const fn sink(&self) -> Sink {
        self.sink
    }

    /// Whether it compares before it sends.
    #[must_use]
    pub const fn mode(&self) -> PassMode {
        self.mode
    }

    /// Sectors settled so far and in all.
    #[must_use]
    pub fn progress(&self) -> (u64, u64) {
        (self.settled.sector_count(), self.whole.len())
    }

    /// The next thing to do, if the window allows one.
    pub fn poll_action(&mut self) -> Option<PassAction> {
        if self.actions.is_empty() && self.open.len() < CHUNKS_OPEN_MAX {
            self.begin_chunk();
        }
        self.actions.pop_front()
    }

    fn begin_chunk(&mut self) {
        let ahead = self.next_ahead();
        let Some(mut range) = ahead.or_else(|| self.next_range()) else { return };
        let mut pieces = Vec::new();
        if self.sparse {
            let end = (range.start / self.chunk_sectors + 1) * self.chunk_sectors;
            pieces = self.begun.missing(SectorRange::new(range.start, end.min(self.whole.end)));
            range.end = pieces.last().map_or(range.end, |last| last.end);
        }
        if ahead.is_none() {
            self.cursor = range.end;
        }
        self.begun.insert(range);
        self.open.insert(range.start, Chunk { range, pieces: pieces.clone(), ..Chunk::default() });
        let hash = self.mode == PassMode::Compare;
        self.actions.push_back(PassAction::Read { chunk: range, hash, pieces });
        if hash {
            self.actions.push_back(PassAction::Ask { chunk: range, units: Vec::new() });
        }
    }

    /// The next run that nobody began of what comes first.
    fn next_ahead(&mut self) -> Option<SectorRange> {
        while let Some(first) = self.ahead.front() {
            let gap = self.begun.missing(first.intersect(self.whole)).into_iter().next();
            if let Some(run) = gap.and_then(|gap| gap.aligned_pieces(self.chunk_sectors).next()) {
                return Some(run);
            }
            self.ahead.pop_front();
        }
        None
    }

    /// The next run that nobody began, within one aligned chunk; settled runs are stepped over whole, however long.
    fn next_range(&self) -> Option<SectorRange> {
        let rest = SectorRange::new(self.cursor.min(self.whole.end), self.whole.end);
        let gap = self.begun.missing(rest).into_iter().next()?;
        gap.aligned_pieces(self.chunk_sectors).next()
    }

    /// Parts of an open chunk cannot be read: they are not sent, and what is computed of them means nothing. The chunk is
    /// settled without them; who reads keeps account of them.
    pub fn handle_unread(&mut self, chunk_start: u64, unread: &[SectorRange]) {
        if let Some(state) = self.open.get_mut(&chunk_start) {
            unread.iter().for_each(|range| state.unread.insert(range.intersect(state.range)));
        }
    }

    /// The chunk was read; `hashes` as asked for.
    ///
    /// # Errors
    /// When the number of hashes does not fit.
    pub fn handle_read(
        &mut self,
        chunk: SectorRange,
        hashes: Option<Vec<UnitHash>>,
    ) -> Result<(), HashCountError> {
        let Some(state) = self.open.get_mut(&chunk.start) else { return Ok(()) };
        match hashes {
            None if self.sparse => self.send(chunk.start),
            None => {
                state.pieces.push(state.range);
                self.send(chunk.start);
            }
            Some(hashes) => {
                check_count(hashes.len(), unit_count(state.range))?;
                state.local = Some(hashes);
                self.compare(chunk.start);
            }
        }
        Ok(())
    }

    /// The target's answer came: unit hashes first, then what is equal in the units to refine.
    ///
    /// # Errors
    /// When it does not fit what was asked.
    pub fn handle_remote(&mut self, chunk_start: u64, answer: CompareAnswer) -> Result<(), HashCountError> {
        let Some(state) = self.open.get_mut(&chunk_start) else { return Ok(()) };
        let CompareAnswer { hashes, masks } = answer;
        if state.remote.is_none() {
            check_count(masks.len(), 0)?;
            check_count(hashes.len(), unit_count(state.range))?;
            state.remote = Some(hashes);
            self.compare(chunk_start);
            return Ok(());
        }
        check_count(masks.len(), state.refine.len())?;
        let [hash] = *hashes else { return Err(HashCountError { got: hashes.len(), expected: 1 }) };
        let equal = state.refine.iter().zip(masks).map(|(unit, mask)| UnitMask { unit: *unit, mask });
        let equal: Vec<UnitMask> = equal.collect();
        let chunk = state.range;
        if equal.iter().all(|unit| unit.mask == 0) {
            self.send_all_but(chunk_start, &equal);
        } else {
            state.claim = Some((equal.clone(), hash));
            self.actions.push_back(PassAction::Compute { chunk, question: Question::Confirm(equal) });
        }
        Ok(())
    }

    /// What was to be computed of the kept data is there.
    ///
    /// # Errors
    /// When it does not fit what was asked.
    pub fn handle_computed(&mut self, chunk: SectorRange, computed: Computed) -> Result<(), HashCountError> {
        let Some(state) = self.open.get_mut(&chunk.start) else { return Ok(()) };
        match computed {
            Computed::Crcs(units) => {
                check_count(units.len(), state.refine.len())?;
                self.actions.push_back(PassAction::Ask { chunk: state.range, units });
            }
            Computed::Confirmed(ours) => {
                let Some((mut equal, theirs)) = state.claim.take() else { return Ok(()) };
                if ours != theirs {
                    // Somewhere two different blocks have the same CRC. Where, nobody knows.
                    equal.iter_mut().for_each(|unit| unit.mask = 0);
                }
                self.send_all_but(chunk.start, &equal);
            }
        }
        Ok(())
    }

    fn compare(&mut self, start: u64) {
        let Some(state) = self.open.get_mut(&start) else { return };
        let (Some(local), Some(remote)) = (&state.local, &state.remote) else { return };
        for (index, (ours, theirs)) in local.iter().zip(remote).enumerate() {
            let unit = sub_range(state.range, index as u64, UNIT_SECTORS);
            let is_known = state.unread.overlap(unit).next().is_none();
            if (is_known && ours == theirs) || state.unread.contains(unit) {
                continue;
            }
            if is_known && (*ours == UnitHash::ZEROS || *theirs == UnitHash::ZEROS) {
                state.pieces.push(unit);
            } else {
                state.refine.push(index as u16); // at most 64 units a chunk
            }
        }
        let (chunk, units) = (state.range, state.refine.clone());
        if units.is_empty() {
            self.send(start);
        } else {
            self.actions.push_back(PassAction::Compute { chunk, question: Question::Crcs(units) });
        }
    }

    /// Sends the units that were refined without the blocks that are equal.
    fn send_all_but(&mut self, start: u64, equal: &[UnitMask]) {
        let Some(state) = self.open.get_mut(&start) else { return };
        for UnitMask { unit, mask } in equal {
            let blocks =
                sub_range(state.range, u64::from(*unit), UNIT_SECTORS).aligned_from_start(FINE_SECTORS);
            for (index, block) in blocks.enumerate() {
                // Of one that cannot be read whole, what can be is sent.
                if mask & (1 << index) == 0 || state.unread.overlap(block).next().is_some() {
                    state.pieces.push(block);
                }
            }
        }
        self.send(start);
    }

    fn send(&mut self, start: u64) {
        let Some(state) = self.open.get_mut(&start) else { return };
        let mut pieces: RangeSet = state.pieces.drain(..).collect();
        state.unread.iter().for_each(|range| pieces.remove(range));
        self.actions.push_back(PassAction::Send { chunk: state.range, pieces: pieces.iter().collect() });
    }

    /// The records of a chunk left the agent: its window place is free.
    pub fn handle_sent(&mut self, chunk_start: u64) {
        if let Some(chunk) = self.open.remove(&chunk_start)
            && self.sink == Sink::Delta
        {
            self.settled.insert(chunk.range);
        }
    }

    /// Sectors became durable at the target.
    pub fn handle_settled(&mut self, ranges: &[SectorRange]) {
        for range in ranges {
            self.settled.insert(range.intersect(self.whole));
        }
    }

    /// Whether [`Self::take_end`] answered true.
    #[must_use]
    pub const fn has_ended(&self) -> bool {
        self.end_announced
    }

    /// Whether everything is settled; true once, so that the end is announced once.
    #[must_use]
    pub fn take_end(&mut self) -> bool {
        let settled = if mutant(Mutant::EndPassEarly) { &self.begun } else { &self.settled };
        let over = !self.end_announced && self.open.is_empty() && settled.contains(self.whole);
        self.end_announced |= over;
        over
    }
}

impl SectorRange {
    /// Pieces of `unit` sectors counted from the run's own start.
    fn aligned_from_start(self, unit: u64) -> impl Iterator<Item = Self> {
        (0..self.len().div_ceil(unit)).map(move |index| sub_range(self, index, unit))
    }
}

fn sub_range(range: SectorRange, index: u64, unit: u64) -> SectorRange {
    let start = range.start + index * unit;
    SectorRange::new(start, (start + unit).min(range.end))
}

/// Number of units of a run, counted from its own start.
#[must_use]
pub const fn unit_count(range: SectorRange) -> usize {
    range.len().div_ceil(UNIT_SECTORS) as usize
}

const fn check_count(got: usize, expected: usize) -> Result<(), HashCountError> {
    if got == expected { Ok(()) } else { Err(HashCountError { got, expected }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const H: fn(u8) -> UnitHash = |byte| UnitHash([byte; 16]);

    fn whole(units: u64) -> SectorRange {
        SectorRange::new(0, units * UNIT_SECTORS)
    }

    fn hashes(all: &[UnitHash]) -> CompareAnswer {
        CompareAnswer { hashes: all.to_vec(), masks: Vec::new() }
    }

    /// The walk refines one unit and is told by the target that these blocks are equal, with a hash over them.
    fn refines(pass: &mut Pass, chunk: SectorRange, unit: u16, mask: u16) {
        let question = Question::Crcs(vec![unit]);
        assert_eq!(pass.poll_action(), Some(PassAction::Compute { chunk, question }));
        assert_eq!(pass.poll_action(), None, "without the CRCs there is nothing to ask");
        let units = vec![RefineUnit { unit, crcs: [5; 16] }];
        pass.handle_computed(chunk, Computed::Crcs(units.clone())).unwrap();
        assert_eq!(pass.poll_action(), Some(PassAction::Ask { chunk, units }));
        pass.handle_remote(chunk.start, CompareAnswer { hashes: vec![H(7)], masks: vec![mask] }).unwrap();
        let question = Question::Confirm(vec![UnitMask { unit, mask }]);
        assert_eq!(pass.poll_action(), Some(PassAction::Compute { chunk, question }));
    }

    #[test]
    fn a_copy_reads_and_sends_every_chunk_once_and_ends_when_all_is_durable() {
        let disk = whole(64 * 3 + 1);
        let mut pass = Pass::new(1, PassMode::Copy, Sink::Bulk, disk, RangeSet::new());
        let mut sent = RangeSet::new();
        while let Some(action) = pass.poll_action() {
            match action {
                PassAction::Read { chunk, hash, .. } => {
                    assert!(!hash);
                    pass.handle_read(chunk, None).unwrap();
                }
                PassAction::Send { chunk, pieces } => {
                    assert_eq!(pieces, [chunk]);
                    assert!(sent.overlap(chunk).next().is_none(), "twice: {chunk}");
                    sent.insert(chunk);
                    pass.handle_sent(chunk.start);
                }
                other => panic!("{other:?}"),
            }
        }
        assert!(sent.contains(disk));
        assert!(!pass.take_end(), "nothing is durable yet");
        pass.handle_settled(&[disk]);
        assert!(pass.take_end());
        assert!(!pass.take_end(), "announced once");
    }

    #[test]
    fn a_compare_refines_only_units_that_differ_and_sends_only_fine_units_that_differ() {
        let disk = whole(4);
        let mut pass = Pass::new(2, PassMode::Compare, Sink::Bulk, disk, RangeSet::new());
        assert_eq!(pass.poll_action(), Some(PassAction::Read { chunk: disk, hash: true, pieces: vec![] }));
        assert_eq!(pass.poll_action(), Some(PassAction::Ask { chunk: disk, units: vec![] }));
        pass.handle_remote(0, hashes(&[H(1), H(2), UnitHash::ZEROS, H(4)])).unwrap();
        pass.handle_read(disk, Some(vec![H(1), H(9), H(3), UnitHash::ZEROS])).unwrap();
        refines(&mut pass, disk, 1, 0b1111_1111_1110_0111);
        assert_eq!(pass.poll_action(), None, "nothing is sent before it is confirmed");
        pass.handle_computed(disk, Computed::Confirmed(H(7))).unwrap();
        let pieces = vec![SectorRange::new(128 + 24, 128 + 40), SectorRange::new(256, 512)];
        assert_eq!(pass.poll_action(), Some(PassAction::Send { chunk: disk, pieces }));
    }

    #[test]
    fn a_copy_goes_on_without_what_cannot_be_read() {
        let disk = whole(4);
        let mut pass = Pass::new(1, PassMode::Copy, Sink::Bulk, disk, RangeSet::new());
        assert!(matches!(pass.poll_action(), Some(PassAction::Read { .. })));
        // What lies outside the chunk is not its business.
        pass.handle_unread(0, &[SectorRange::new(8, 24), SectorRange::new(500, 900)]);
        pass.handle_read(disk, None).unwrap();
        let pieces = vec![SectorRange::new(0, 8), SectorRange::new(24, 500)];
        assert_eq!(pass.poll_action(), Some(PassAction::Send { chunk: disk, pieces }));
        let changed: RangeSet = [SectorRange::new(16, 32), SectorRange::new(64, 72)].into_iter().collect();
        let mut round = Pass::of_changes(disk, &changed);
        let chunk = SectorRange::new(16, 72);
        assert!(matches!(round.poll_action(), Some(PassAction::Read { .. })));
        round.handle_unread(16, &[SectorRange::new(16, 24), SectorRange::new(64, 72)]);
        round.handle_read(chunk, None).unwrap();
        let pieces = vec![SectorRange::new(24, 32)];
        assert_eq!(round.poll_action(), Some(PassAction::Send { chunk, pieces }));
    }

    #[test]
    fn a_compare_believes_no_hash_of_what_cannot_be_read() {
        let disk = whole(3);
        let mut pass = Pass::new(1, PassMode::Compare, Sink::Bulk, disk, RangeSet::new());
        let _ = (pass.poll_action(), pass.poll_action());
        // A block of the first unit, all of the second: there it reads as zeros, as the target does.
        let block = SectorRange::new(8, 16);
        pass.handle_unread(0, &[block, sub_range(disk, 1, UNIT_SECTORS)]);
        pass.handle_remote(0, hashes(&[H(1), H(2), H(3)])).unwrap();
        pass.handle_read(disk, Some(vec![H(1), UnitHash::ZEROS, H(3)])).unwrap();
        refines(&mut pass, disk, 0, 0b1111_1111_1110_1101);
        pass.handle_computed(disk, Computed::Confirmed(H(7))).unwrap();
        let pieces = vec![SectorRange::new(32, 40)];
        assert_eq!(pass.poll_action(), Some(PassAction::Send { chunk: disk, pieces }));
    }

    #[test]
    fn the_window_bounds_open_chunks() {
        let mut pass = Pass::new(1, PassMode::Copy, Sink::Bulk, whole(64 * 100), RangeSet::new());
        let mut reads = 0;
        while let Some(PassAction::Read { .. }) = pass.poll_action() {
            reads += 1;
        }
        assert_eq!(reads, CHUNKS_OPEN_MAX);
    }

    #[test]
    fn a_settled_disk_of_the_largest_size_is_walked_at_once() {
        let disk = SectorRange::new(0, crate::limits::DISK_BYTES_MAX / SECTOR_BYTES);
        let settled: RangeSet = [SectorRange::new(0, disk.end - 1)].into_iter().collect();
        let mut pass = Pass::new(1, PassMode::Copy, Sink::Bulk, disk, settled);
        let last = SectorRange::new(disk.end - 1, disk.end);
        for _ in 0..100 {
            let chunk = pass.poll_action();
            let read = PassAction::Read { chunk: last, hash: false, pieces: vec![] };
            assert!(chunk.is_none() || chunk == Some(read));
        }
    }

    #[test]
    fn what_is_to_come_first_is_read_first_and_everything_once() {
        let chunk = CHUNK_BYTES / SECTOR_BYTES;
        let disk = SectorRange::new(0, 6 * chunk + 8);
        let settled = SectorRange::new(4 * chunk, 5 * chunk);
        let first = [SectorRange::new(3 * chunk, 5 * chunk + 8), SectorRange::new(6 * chunk, 90 * chunk)];
        let pass = Pass::new(1, PassMode::Compare, Sink::Bulk, disk, [settled].into_iter().collect());
        let mut pass = pass.with_first(&first);
        let mut read = Vec::new();
        while let Some(action) = pass.poll_action() {
            if let PassAction::Read { chunk, .. } = action {
                read.push((chunk.start, chunk.end));
                pass.handle_sent(chunk.start);
            }
        }
        let expected = [
            (3 * chunk, 4 * chunk),
            (5 * chunk, 5 * chunk + 8),
            (6 * chunk, disk.end),
            (0, chunk),
            (chunk, 2 * chunk),
            (2 * chunk, 3 * chunk),
            (5 * chunk + 8, 6 * chunk),
        ];
        assert_eq!(read, expected);
    }

    #[test]
    fn settled_ranges_are_never_read_again() {
        let settled: RangeSet =
            [SectorRange::new(0, 100), SectorRange::new(8192, 8200)].into_iter().collect();
        let mut pass = Pass::new(1, PassMode::Copy, Sink::Bulk, SectorRange::new(0, 8300), settled.clone());
        let mut read = RangeSet::new();
        while let Some(action) = pass.poll_action() {
            if let PassAction::Read { chunk, .. } = action {
                assert!(settled.overlap(chunk).next().is_none());
                read.insert(chunk);
                pass.handle_sent(chunk.start);
            }
        }
        read.extend(&settled);
        assert!(read.contains(SectorRange::new(0, 8300)));
    }

    #[test]
    fn a_round_of_changes_reads_and_sends_what_changed_and_nothing_between() {
        let chunk = CHUNK_BYTES / SECTOR_BYTES;
        let disk = SectorRange::new(0, 3 * chunk + 24);
        let runs = [
            (8, 16),
            (96, 104),
            (chunk - 8, chunk + 8),
            (2 * chunk + 8, 2 * chunk + 16),
            (3 * chunk, disk.end),
        ];
        let changed: RangeSet = runs.iter().map(|(start, end)| SectorRange::new(*start, *end)).collect();
        let mut pass = Pass::of_changes(disk, &changed);
        let (mut sent, mut chunks) = (RangeSet::new(), 0);
        while let Some(action) = pass.poll_action() {
            match action {
                PassAction::Read { chunk: read, hash, pieces } => {
                    assert!(!hash && !pieces.is_empty() && read.start / chunk == (read.end - 1) / chunk);
                    assert_eq!((read.start, read.end), (pieces[0].start, pieces[pieces.len() - 1].end));
                    pass.handle_read(read, None).unwrap();
                }
                PassAction::Send { chunk: read, pieces } => {
                    chunks += 1;
                    sent.extend(&pieces.into_iter().collect());
                    assert!(!pass.take_end());
                    pass.handle_sent(read.start);
                }
                other => panic!("{other:?}"),
            }
        }
        assert_eq!((sent, chunks), (changed, 4));
        assert!(pass.take_end());
        assert!(Pass::of_changes(disk, &RangeSet::new()).take_end(), "nothing changed");
    }

    #[test]
    fn what_is_not_confirmed_is_sent_whole_and_what_has_nothing_to_confirm_at_once() {
        let disk = whole(3);
        let unit = |index| sub_range(disk, index, UNIT_SECTORS);
        for (mask, ours) in [(0b10, Some(H(8))), (0, None)] {
            let mut pass = Pass::new(1, PassMode::Compare, Sink::Delta, disk, RangeSet::new());
            let _ = (pass.poll_action(), pass.poll_action());
            pass.handle_remote(0, hashes(&[H(1), H(2), H(3)])).unwrap();
            pass.handle_read(disk, Some(vec![H(1), H(4), H(3)])).unwrap();
            let _ = pass.poll_action();
            pass.handle_computed(disk, Computed::Crcs(vec![RefineUnit { unit: 1, crcs: [0; 16] }])).unwrap();
            let _ = pass.poll_action();
            pass.handle_remote(0, CompareAnswer { hashes: vec![H(7)], masks: vec![mask] }).unwrap();
            if let Some(ours) = ours {
                assert!(matches!(pass.poll_action(), Some(PassAction::Compute { .. })));
                pass.handle_computed(disk, Computed::Confirmed(ours)).unwrap();
            }
            let pieces = vec![unit(1)];
            assert_eq!(pass.poll_action(), Some(PassAction::Send { chunk: disk, pieces }), "{mask}");
        }
    }

    #[test]
    fn answers_for_the_wrong_number_of_units_are_refused() {
        let disk = whole(4);
        let mut pass = Pass::new(2, PassMode::Compare, Sink::Bulk, disk, RangeSet::new());
        let _ = pass.poll_action();
        assert!(pass.handle_remote(0, hashes(&[H(1); 3])).is_err());
        assert!(pass.handle_remote(0, CompareAnswer { hashes: vec![H(1); 4], masks: vec![1] }).is_err());
        assert!(pass.handle_read(disk, Some(vec![H(1); 5])).is_err());
        pass.handle_remote(0, hashes(&[H(1); 4])).unwrap();
        pass.handle_read(disk, Some(vec![H(1), H(2), H(2), H(1)])).unwrap();
        assert!(pass.handle_computed(disk, Computed::Crcs(Vec::new())).is_err());
        for (hash_count, masks) in [(1, 1), (1, 3), (0, 2), (2, 2)] {
            let answer = CompareAnswer { hashes: vec![H(1); hash_count], masks: vec![0; masks] };
            assert!(pass.handle_remote(0, answer).is_err(), "{hash_count} and {masks}");
        }
    }
}
