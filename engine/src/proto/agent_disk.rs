//! One disk at the agent: its position, what is not durable yet and the newest of what is, its marks, its credit and its walk.
//!
//! Invariants: `durable ≤ last`; `unacked` holds the batches from `durable + 1` to `last` without a gap, of which the
//! first `unsent_from` went out in this session; a mark goes exactly behind its last record, and marks in the
//! order they were placed, at most `MARKS_PENDING_MAX` of them; work of a walk carries
//! the walk's epoch. Units: sectors, sequences, bytes of credit cost. Called by [`super::agent`].

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;

use super::credit::Balance;
use super::grace::Grace;
use super::pass::Pass;
use super::state::AgentDiskPhase;
use super::{Lane, Outgoing};
use crate::format::batch::{BatchHeader, CHAIN_START, Chain, Mark, MarkLabel, encode_batch};
use crate::format::extent::Record;
use crate::format::frame::Frame;
use crate::format::message::{GrantHead, Message, OfferHead, OpenDiskHead, PassCause, SourceId};
use crate::limits::{GRACE_BYTES, MARKS_PENDING_MAX};
use crate::mutants::{Mutant, mutant};
use crate::units::{DiskId, Generation, LineageId, SectorRange, Sequence, Timestamp};

/// A delta batch that is not yet durable.
#[derive(Debug)]
pub(super) struct SentBatch {
    pub(super) header: BatchHeader,
    pub(super) records: Vec<Record>,
    pub(super) chain_after: Chain,
    pub(super) cost: u64,
    pub(super) chunk: Option<u64>,
}

impl SentBatch {
    /// What its records occupy.
    pub(super) fn encoded_bytes(&self) -> u64 {
        self.records.iter().map(|record| record.encoded_bytes() as u64).sum()
    }
}

/// A bulk batch that waits for credit.
#[derive(Debug)]
pub(super) struct WaitingBulk {
    pub(super) chunk: u64,
    pub(super) cost: u64,
    pub(super) plain_bytes: u64,
    pub(super) frame: Frame,
}

/// What was handed to the transport for a disk since the agent started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SentBytes {
    /// Plain payload; sent again counts again.
    pub plain: u64,
    /// Frames as encoded.
    pub wire: u64,
}

/// Where a stream stood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamPosition {
    /// Its history.
    pub lineage: LineageId,
    /// The generation that was granted last.
    pub generation: Generation,
    /// What was durable, at least.
    pub durable: Sequence,
}

impl StreamPosition {
    /// Why what is remembered and a grant do not fit, if they do not: durable data were lost, or somebody else had the
    /// disk open since.
    pub(super) fn contradiction(&self, head: &GrantHead) -> Option<PassCause> {
        if self.lineage != head.lineage {
            return Some(PassCause::OtherLineage);
        }
        if head.durable < self.durable {
            return Some(PassCause::TargetLostDurable);
        }
        (head.generation != self.generation.next()).then_some(PassCause::OtherSession)
    }
}

#[derive(Debug)]
pub(super) struct AgentDisk {
    pub(super) phase: AgentDiskPhase,
    pub(super) source: SourceId,
    pub(super) size_sectors: u64,
    /// Of the newest offer or grant.
    pub(super) generation: Generation,
    /// Of the last grant this agent got since it started; zero before the first.
    pub(super) granted: Generation,
    pub(super) grant: Bytes,
    pub(super) lineage: Option<LineageId>,
    /// What an agent before this one knew.
    pub(super) recalled: Option<StreamPosition>,
    pub(super) durable: Sequence,
    pub(super) durable_chain: Chain,
    pub(super) last: Sequence,
    pub(super) last_chain: Chain,
    pub(super) unacked: VecDeque<SentBatch>,
    pub(super) unsent_from: usize,
    /// The newest of what became durable.
    pub(super) grace: Grace,
    /// Marks that are not durable yet, in their order.
    pub(super) marks: VecDeque<WaitingMark>,
    /// Number of the last mark sent in this generation.
    pub(super) mark_number: u64,
    /// What became of marks and was not told yet.
    pub(super) mark_news: VecDeque<MarkNews>,
    /// How the running scan round ends.
    pub(super) scan_end: ScanEnd,
    pub(super) balance: Balance,
    pub(super) bulk: VecDeque<WaitingBulk>,
    pub(super) pass: Option<Pass>,
    pub(super) requests: BTreeMap<u64, u64>,
    pub(super) next_request: u64,
    pub(super) epoch: u64,
    pub(super) newest_time: Timestamp,
    pub(super) sent: SentBytes,
    /// The pass at the target, as it last said.
    pub(super) target_pass: u64,
    pub(super) wanted: Option<WantedPass>,
    /// Where the target last found the stream damaged, and how often in a row.
    pub(super) damaged: (Sequence, u32),
    /// What every mark says that is placed now.
    pub(super) unread_blocks: u32,
    /// Where passes over the whole disk begin.
    pub(super) first: Vec<SectorRange>,
}

/// A mark that is not durable yet.
#[derive(Clone, Copy, Debug)]
pub(super) struct WaitingMark {
    /// With the number it got when it was first sent in this generation; zero before.
    pub(super) mark: Mark,
    /// Sent in this session, and not wanted again since.
    pub(super) sent: bool,
    /// It was durable before, and that was told.
    pub(super) told: bool,
}

/// What became of a mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum MarkNews {
    Durable(MarkLabel),
    Lost(MarkLabel),
}

/// How a scan round ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ScanEnd {
    /// With a fuzzy mark of its own.
    Itself,
    /// With a mark that somebody else places when told.
    Told,
    /// Its mark is placed.
    Placed,
}

/// A compare pass that must happen: asked for again in every session until the target says that it began.
#[derive(Clone, Copy, Debug)]
pub(super) struct WantedPass {
    pub(super) cause: PassCause,
    /// The pass that ran when it was asked for; a later one is the wanted one.
    pub(super) asked_in: Option<u64>,
}

impl AgentDisk {
    /// A disk that was just offered for the first time; its walks get epochs above `epochs_used`.
    pub(super) fn new(head: &OfferHead, epochs_used: u64) -> Self {
        Self {
            phase: AgentDiskPhase::Closed,
            source: head.source,
            size_sectors: head.size_sectors,
            generation: head.generation,
            granted: Generation::ZERO,
            grant: Bytes::new(),
            lineage: None,
            recalled: None,
            durable: Sequence::ZERO,
            durable_chain: CHAIN_START,
            last: Sequence::ZERO,
            last_chain: CHAIN_START,
            unacked: VecDeque::new(),
            unsent_from: 0,
            grace: Grace::new(GRACE_BYTES),
            marks: VecDeque::new(),
            mark_number: 0,
            mark_news: VecDeque::new(),
            scan_end: ScanEnd::Itself,
            balance: Balance::default(),
            bulk: VecDeque::new(),
            pass: None,
            requests: BTreeMap::new(),
            next_request: 1,
            epoch: epochs_used,
            newest_time: Timestamp::ZERO,
            sent: SentBytes::default(),
            target_pass: 0,
            wanted: None,
            damaged: (Sequence::ZERO, 0),
            unread_blocks: 0,
            first: Vec::new(),
        }
    }

    /// Begins to open the disk under the newest offer or grant.
    pub(super) fn ask_to_open(&mut self, disk: DiskId, size_sectors: u64) -> Message {
        self.phase.become_state(AgentDiskPhase::Opening);
        let head = OpenDiskHead {
            disk,
            size_sectors,
            generation: self.generation,
            lineage: self.lineage.unwrap_or(LineageId::NONE),
            durable: self.durable,
            grant_bytes: self.grant.len() as u16,
        };
        Message::OpenDisk(head, self.grant.clone())
    }

    pub(super) const fn whole(&self) -> SectorRange {
        SectorRange { start: 0, end: self.size_sectors }
    }

    /// The chain digest at `sequence`, if it is a batch border we still know.
    pub(super) fn chain_at(&self, sequence: Sequence) -> Option<Chain> {
        if sequence == self.durable {
            return Some(self.durable_chain);
        }
        if sequence < self.durable {
            return self.grace.chain_at(sequence);
        }
        let batch = self.unacked.iter().find(|batch| batch.header.last_sequence() == sequence);
        batch.map(|batch| batch.chain_after)
    }

    pub(super) fn forget_durable(&mut self, durable: Sequence) {
        while let Some(batch) = self.unacked.front()
            && batch.header.last_sequence() <= durable
        {
            self.durable = batch.header.last_sequence();
            self.durable_chain = batch.chain_after;
            if let Some(batch) = self.unacked.pop_front() {
                self.grace.keep(batch);
            }
            self.unsent_from = self.unsent_from.saturating_sub(1);
        }
    }

    /// Under a new grant the stream goes on behind what is durable at the target.
    pub(super) fn go_on(&mut self, head: &GrantHead) {
        self.forget_durable(head.durable);
        self.unsent_from = 0;
        for batch in &mut self.unacked {
            batch.header.generation = head.generation;
        }
        self.renew_marks(head.durable);
        if mutant(Mutant::ReuseSequence) {
            (self.last, self.last_chain) = (self.durable, self.durable_chain);
        }
    }

    /// A deliberate bug: what was submitted and is not durable is gone.
    pub(super) fn forget_undurable(&mut self) {
        self.unacked.clear();
        (self.last, self.last_chain) = (self.durable, self.durable_chain);
    }

    /// The target stands at `border` again, before what it had called durable: that waits once more. The border must be
    /// one that [`Self::chain_at`] knows.
    pub(super) fn take_back(&mut self, border: Sequence, chain: Chain) {
        let taken = self.grace.take_back(border);
        (self.durable, self.durable_chain) = (border, chain);
        for batch in taken.batches.into_iter().rev().filter(|_| !mutant(Mutant::GraceForgotten)) {
            let at = if mutant(Mutant::GraceReversed) { self.unacked.len() } else { 0 };
            self.unacked.insert(at, batch);
        }
        for mark in taken.marks.into_iter().rev() {
            self.marks.push_front(WaitingMark { mark, sent: false, told: true });
        }
    }

    /// Takes a new grant; answers whether another session had the disk open since the last one. A grant of our own that
    /// was lost on its way counts as one: a compare too many is better than one too few.
    pub(super) fn take_grant(&mut self, generation: Generation, grant: Bytes) -> bool {
        let foreign = self.granted != Generation::ZERO && self.generation != self.granted;
        let foreign = foreign && !mutant(Mutant::IgnoreOtherSession);
        self.generation = generation;
        self.granted = generation;
        self.grant = grant;
        foreign
    }

    /// Takes note of the pass that runs at the target. A newer one than that in which a wanted one was asked for is that one,
    /// where it is of the whole disk: a target also begins passes of its own, over what it lost.
    pub(super) fn set_target_pass(&mut self, pass: u64, is_whole: bool) {
        self.target_pass = pass;
        let waits = |wanted: &WantedPass| !is_whole || wanted.asked_in.is_none_or(|before| pass <= before);
        self.wanted = self.wanted.filter(waits);
    }

    /// Ends the running walk: work handed out for it is ignored when it comes back.
    pub(super) fn end_walk(&mut self) {
        self.pass = None;
        self.bulk.clear();
        self.requests.clear();
        self.epoch += 1;
        for batch in &mut self.unacked {
            batch.chunk = None; // of the walk that is over, not of the next one
        }
    }

    /// Begins a walk under an epoch of its own.
    pub(super) fn begin_walk(&mut self, pass: Pass) {
        self.end_walk();
        self.pass = Some(pass);
    }

    /// The first mark that is to be sent, if it stands before the next batch and so must be sent now.
    fn next_mark(&mut self) -> Option<Mark> {
        let next = self.unacked.get(self.unsent_from).map(|batch| batch.header.first_sequence);
        let waiting = self.marks.iter_mut().find(|waiting| !waiting.sent)?;
        if next.is_some_and(|next| next <= waiting.mark.sequence) {
            return None;
        }
        if waiting.mark.number == 0 {
            self.mark_number += 1;
            waiting.mark.number = self.mark_number;
        }
        waiting.sent = true;
        waiting.mark.generation = self.generation;
        Some(waiting.mark)
    }

    /// The stream goes on behind `received`: marks there or later are still to be sent, those before it arrived.
    pub(super) fn resend_marks(&mut self, received: Sequence) {
        for waiting in self.marks.iter_mut().filter(|waiting| waiting.mark.sequence >= received) {
            waiting.sent = false;
        }
    }

    /// A new generation goes on behind `durable`. A batch is sent only after the marks before it, so what the target
    /// went past is durable there; a mark exactly at `durable` may be, and is sent again.
    pub(super) fn renew_marks(&mut self, durable: Sequence) {
        while let Some(waiting) = self.marks.front()
            && waiting.mark.sequence < durable
        {
            let (mark, told) = (waiting.mark, waiting.told);
            self.mark_news.extend((!told).then(|| MarkNews::Durable(mark.label())));
            self.grace.keep_mark(mark);
            self.marks.pop_front();
        }
        self.mark_number = 0;
        for waiting in &mut self.marks {
            (waiting.sent, waiting.mark.number) = (false, 0);
        }
    }

    /// The target says that marks up to a number of this generation are durable.
    pub(super) fn marks_durable(&mut self, number: u64) {
        while let Some(waiting) = self.marks.front()
            && (1..=number).contains(&waiting.mark.number)
        {
            let (mark, told) = (waiting.mark, waiting.told);
            self.mark_news.extend((!told).then(|| MarkNews::Durable(mark.label())));
            self.grace.keep_mark(mark);
            self.marks.pop_front();
        }
    }

    /// The stream they stand in is given up.
    pub(super) fn lose_marks(&mut self) {
        let untold = self.marks.drain(..).filter(|waiting| !waiting.told);
        self.mark_news.extend(untold.map(|waiting| MarkNews::Lost(waiting.mark.label())));
    }

    /// The target found the stream damaged from `resume_from` on; answers how often in a row it said so.
    pub(super) fn note_damaged(&mut self, resume_from: Sequence) -> u32 {
        let before = if self.damaged.0 == resume_from { self.damaged.1 } else { 0 };
        self.damaged = (resume_from, before + 1);
        before + 1
    }

    /// Forgets the stream and what it carried: the next grant's position is taken over, and a pass carries the rest.
    pub(super) fn give_up_stream(&mut self, cause: PassCause) {
        self.end_walk();
        self.lineage = None;
        self.grace.restart((Sequence::ZERO, CHAIN_START));
        self.unacked.clear();
        self.unsent_from = 0;
        self.lose_marks();
        self.balance = Balance::default();
        self.damaged = (Sequence::ZERO, 0);
        self.wanted = Some(WantedPass { cause, asked_in: None });
    }

    /// A mark after everything submitted so far; answers whether there was room for it.
    pub(super) fn place_mark(&mut self, disk: DiskId, label: MarkLabel) -> bool {
        let Some(lineage) = self.lineage.filter(|_| self.marks.len() < MARKS_PENDING_MAX) else {
            return false;
        };
        let mark = Mark {
            disk,
            lineage,
            generation: self.generation,
            sequence: self.last,
            chain: self.last_chain,
            source_time: label.source_time,
            point: label.point,
            number: 0,
            class: label.class,
            cause: label.cause,
            name: label.name,
            unread_blocks: self.unread_blocks,
        };
        self.marks.push_back(WaitingMark { mark, sent: false, told: false });
        if self.scan_end == ScanEnd::Told && self.pass.as_ref().is_some_and(Pass::has_ended) {
            self.scan_end = ScanEnd::Placed;
        }
        true
    }

    /// Takes over the target's position, dropping what is not durable: a pass will carry it.
    pub(super) fn adopt(&mut self, head: &GrantHead) {
        self.lineage = Some(head.lineage);
        self.durable = head.durable;
        self.durable_chain = head.chain;
        self.last = head.durable;
        self.last_chain = head.chain;
        self.grace.restart((head.durable, head.chain));
        self.unacked.clear();
        self.unsent_from = 0;
        self.lose_marks();
    }
}

/// The next delta batch or mark of a disk that credit allows; a mark goes exactly behind its last record. Nothing goes while
/// a compare pass is wanted and has not begun at the target: something before it is missing there, and a target that does
/// not know would take what follows for a state of the source. PASS_BEGIN travels on another lane, and may be lost.
pub(super) fn next_delta(id: DiskId, disk: &mut AgentDisk) -> Option<Outgoing> {
    if disk.wanted.is_some() {
        return None;
    }
    if let Some(mark) = disk.next_mark()
        && !(mutant(Mutant::DropMark) && mark.number % 2 == 1)
    {
        return Some(Outgoing { lane: Lane::Delta(id), frame: Message::Mark(mark).encode() });
    }
    let batch = disk.unacked.get_mut(disk.unsent_from)?;
    if !disk.balance.spend(batch.cost) {
        return None;
    }
    disk.unsent_from += 1;
    let frame = encode_batch(&batch.header, &batch.records);
    disk.sent.plain += batch.records.iter().map(Record::plain_bytes).sum::<u64>();
    disk.sent.wire += frame.encoded_bytes() as u64;
    if let Some(chunk) = batch.chunk.take()
        && let Some(pass) = disk.pass.as_mut()
    {
        pass.handle_sent(chunk);
    }
    Some(Outgoing { lane: Lane::Delta(id), frame })
}

pub(super) fn next_bulk(id: DiskId, disk: &mut AgentDisk) -> Option<Outgoing> {
    let cost = disk.bulk.front()?.cost;
    if !disk.balance.spend(cost) {
        return None;
    }
    let bulk = disk.bulk.pop_front()?;
    disk.sent.plain += bulk.plain_bytes;
    disk.sent.wire += bulk.frame.encoded_bytes() as u64;
    if let Some(pass) = disk.pass.as_mut() {
        pass.handle_sent(bulk.chunk);
    }
    Some(Outgoing { lane: Lane::Bulk(id), frame: bulk.frame })
}
