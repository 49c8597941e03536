//! What a target called durable, kept a while at the agent: a target that lost the newest of it gets it again.
//!
//! A torn tail and a damaged last group of a redo log look the same to who opens it. The agent knows better: what it was
//! told to be durable and is not there any more is sent again from here, and only what reaches further back costs a
//! compare of the disk.
//!
//! Invariants: the batches follow each other without a gap from `base` on; marks are those placed behind `base`, in
//! their order, and never reach further back than the batches do; at most `limit` bytes of encoded records and
//! `MARKS_PENDING_MAX` marks are kept, the newest ones. Units: sequences, bytes. Called by [`super::agent_disk`].

use std::collections::VecDeque;

use super::agent_disk::SentBatch;
use crate::format::batch::{CHAIN_START, Chain, Mark};
use crate::limits::MARKS_PENDING_MAX;
use crate::units::Sequence;

/// The newest of what was durable.
#[derive(Debug)]
pub(super) struct Grace {
    base: (Sequence, Chain),
    batches: VecDeque<SentBatch>,
    marks: VecDeque<Mark>,
    bytes: u64,
    limit: u64,
}

/// What a target lost and gets again, in its order.
#[derive(Debug, Default)]
pub(super) struct TakenBack {
    pub(super) batches: Vec<SentBatch>,
    pub(super) marks: Vec<Mark>,
}

impl Grace {
    pub(super) const fn new(limit: u64) -> Self {
        let base = (Sequence::ZERO, CHAIN_START);
        Self { base, batches: VecDeque::new(), marks: VecDeque::new(), bytes: 0, limit }
    }

    pub(super) fn set_limit(&mut self, limit: u64) {
        self.limit = limit;
        self.shrink();
    }

    /// Forgets everything: the stream goes on behind a position that has no past here.
    pub(super) fn restart(&mut self, base: (Sequence, Chain)) {
        *self = Self { base, ..Self::new(self.limit) };
    }

    /// Keeps a batch that became durable: the one behind the newest.
    pub(super) fn keep(&mut self, mut batch: SentBatch) {
        // The memory the records share with the reader's buffers is wanted back there.
        batch.records = batch.records.iter().map(|record| record.detached()).collect();
        batch.chunk = None;
        self.bytes += batch.encoded_bytes();
        self.batches.push_back(batch);
        self.shrink();
    }

    /// Keeps a mark that became durable. What stands before the oldest batch could not be sent in its place again.
    pub(super) fn keep_mark(&mut self, mark: Mark) {
        if mark.sequence > self.base.0 {
            self.marks.push_back(mark);
            self.shrink();
        }
    }

    fn shrink(&mut self) {
        while self.bytes > self.limit || self.marks.len() > MARKS_PENDING_MAX {
            let Some(batch) = self.batches.pop_front() else { break };
            self.bytes -= batch.encoded_bytes();
            self.base = (batch.header.last_sequence(), batch.chain_after);
            let base = self.base.0;
            self.marks.retain(|mark| mark.sequence > base);
        }
    }

    /// The chain digest at a sequence, if it is a batch border that is known here.
    pub(super) fn chain_at(&self, sequence: Sequence) -> Option<Chain> {
        if sequence == self.base.0 {
            return Some(self.base.1);
        }
        let border = self.batches.iter().find(|batch| batch.header.last_sequence() == sequence);
        border.map(|batch| batch.chain_after)
    }

    /// Hands out what stands behind a border, and the marks at it, which may be lost, too.
    pub(super) fn take_back(&mut self, border: Sequence) -> TakenBack {
        let kept = self.batches.iter().take_while(|batch| batch.header.last_sequence() <= border).count();
        let batches: Vec<SentBatch> = self.batches.drain(kept..).collect();
        self.bytes -= batches.iter().map(SentBatch::encoded_bytes).sum::<u64>();
        let kept = self.marks.iter().take_while(|mark| mark.sequence < border).count();
        TakenBack { batches, marks: self.marks.drain(kept..).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::batch::{BatchHeader, MarkCause, MarkClass, Stretch, credit_cost};
    use crate::format::extent::Record;
    use crate::format::wire::Text;
    use crate::units::{DiskId, Generation, LineageId, Timestamp};

    /// Batches of one record each, one after the other.
    fn batches(count: u64) -> Vec<SentBatch> {
        let mut chain = CHAIN_START;
        (1..=count)
            .map(|number| {
                let records = vec![Record::data(number * 8, vec![number as u8; 4096].into())];
                let header = BatchHeader {
                    disk: DiskId([1; 16]),
                    lineage: LineageId([2; 16]),
                    generation: Generation(1),
                    first_sequence: Sequence(number),
                    chain,
                    source_time: Timestamp(number),
                    record_count: 1,
                    stretch: Stretch::Diff,
                };
                chain = header.chain_after(&records);
                let cost = credit_cost(&records);
                SentBatch { header, records, chain_after: chain, cost, chunk: None }
            })
            .collect()
    }

    fn mark(sequence: u64) -> Mark {
        Mark {
            disk: DiskId([1; 16]),
            lineage: LineageId([2; 16]),
            generation: Generation(1),
            sequence: Sequence(sequence),
            chain: CHAIN_START,
            source_time: Timestamp(sequence),
            point: [sequence as u8; 16],
            number: sequence,
            class: MarkClass::Crash,
            cause: MarkCause::Timer,
            name: Text::new(""),
            unread_blocks: 0,
        }
    }

    fn sequences(taken: &TakenBack) -> (Vec<u64>, Vec<u64>) {
        let batches = taken.batches.iter().map(|batch| batch.header.first_sequence.0).collect();
        (batches, taken.marks.iter().map(|mark| mark.sequence.0).collect())
    }

    #[test]
    fn what_stands_behind_a_border_is_handed_out_once_with_the_marks_at_it() {
        let mut grace = Grace::new(u64::MAX);
        let all = batches(5);
        let chain_at_3 = all[2].chain_after;
        for batch in all {
            let sequence = batch.header.first_sequence.0;
            grace.keep(batch);
            grace.keep_mark(mark(sequence));
        }
        assert_eq!(grace.chain_at(Sequence(3)), Some(chain_at_3));
        assert_eq!(grace.chain_at(Sequence(0)), Some(CHAIN_START));
        assert_eq!(sequences(&grace.take_back(Sequence(3))), (vec![4, 5], vec![3, 4, 5]));
        assert_eq!(grace.chain_at(Sequence(4)), None, "it is on its way again");
        assert_eq!(sequences(&grace.take_back(Sequence(3))), (vec![], vec![]));
        assert_eq!(sequences(&grace.take_back(Sequence(1))), (vec![2, 3], vec![1, 2]));
    }

    #[test]
    fn memory_is_bounded_and_no_mark_outlives_the_batches_it_stands_behind() {
        let all = batches(5);
        let one = all[0].encoded_bytes();
        let mut grace = Grace::new(2 * one);
        let chains: Vec<Chain> = all.iter().map(|batch| batch.chain_after).collect();
        for batch in all {
            let sequence = batch.header.first_sequence.0;
            grace.keep(batch);
            grace.keep_mark(mark(sequence));
        }
        assert_eq!(grace.bytes, 2 * one);
        assert_eq!((grace.chain_at(Sequence(2)), grace.chain_at(Sequence(3))), (None, Some(chains[2])));
        assert_eq!(sequences(&grace.take_back(Sequence(3))), (vec![4, 5], vec![4, 5]));

        for batch in batches(1) {
            grace.restart((Sequence::ZERO, CHAIN_START));
            grace.keep(batch);
        }
        for _ in 0..=MARKS_PENDING_MAX {
            grace.keep_mark(mark(1));
        }
        assert_eq!(
            sequences(&grace.take_back(Sequence(0))),
            (vec![], vec![]),
            "more marks than may wait again"
        );
        grace.restart((Sequence(7), CHAIN_START));
        grace.set_limit(0);
        assert_eq!(grace.chain_at(Sequence(7)), Some(CHAIN_START));
    }
}
