//! The ring of written data: the agent's end of the kernel's ring buffer.
//!
//! Invariants: the order of records is the order of submission; a record is seen whole or not at all, and one after another of
//! a write that is longer than one holds; no reader is woken,
//! it looks by itself; what is not read in time is not in the ring, and every later record says so (`drops`), its
//! blocks being marked in the bitmap; nothing that stands in the ring holds the reader up for ever: what cannot be
//! read is told once and passed. Units: bytes, sectors. Called by `stream` and `selftest`.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};

use aya::maps::MapData;
use reprotect_engine::units::SectorRange;

use super::layout::{Kind, ModeWord, RECORD_BYTES};
use super::mapped::Mapped;
use super::{CaptureError, DiskSlot};

/// Before each record: its length with two flags, and a word of the kernel's own.
const HEADER_BYTES: u64 = 8;
const BUSY: u32 = 1 << 31;
const DISCARDED: u32 = 1 << 30;
/// Room is given back in pieces of about this many bytes: every write of the kernel looks at the word that says so, and it
/// should not have to fetch it from this processor for each of them.
const GIVE_BACK_BYTES: u64 = 128 << 10;
/// The record of the self-test.
const FLAG_PROBE: u8 = 2;
/// Largest record: 4 MiB of data, its head, and what the last slice of a copy may be longer.
const LARGEST_BYTES: u64 = (4 << 20) + HEADER_BYTES + RECORD_BYTES as u64 + 512;

/// A write as it was submitted.
#[derive(Clone, Copy, Debug)]
pub struct Record<'a> {
    /// The disk.
    pub slot: DiskSlot,
    /// What was asked for; `None` is the self-test's.
    pub kind: Option<Kind>,
    /// Where.
    pub range: SectorRange,
    /// What is written; empty unless `kind` is a write.
    pub data: &'a [u8],
    /// Records of the machine that found no place before this one.
    pub drops: u64,
    /// Generation of the capture mode it was submitted in.
    pub generation: u64,
}

/// The reading end.
#[derive(Debug)]
pub(crate) struct Ring {
    consumer: Mapped,
    producer: Mapped,
    bytes: u64,
    /// Where the last reader began.
    begun: AtomicU64,
    /// Bytes that waited at most, as far as can be said from the places readers began at.
    fullest: AtomicU64,
}

impl Ring {
    /// Maps the ring.
    pub(crate) fn open(map: &MapData) -> Result<Self, CaptureError> {
        let bytes = map.info().map_err(CaptureError::map("ring"))?.max_entries() as usize;
        Self::over(map.fd(), bytes)
    }

    /// Maps what is laid out like one of so many bytes.
    fn over(map: impl AsFd, bytes: usize) -> Result<Self, CaptureError> {
        let page = rustix::param::page_size();
        // The data follow the producer's page. The kernel offers them twice, so that no record is cut by the end; once is
        // enough, because all that is mapped counts as this process's memory, and one record in a ring is cut.
        let consumer = Mapped::new(&map, 0, page, true).map_err(CaptureError::map("ring"))?;
        let producer =
            Mapped::new(&map, page as u64, page + bytes, false).map_err(CaptureError::map("ring"))?;
        let (begun, fullest) = (AtomicU64::new(0), AtomicU64::new(0));
        let ring = Self { consumer, producer, bytes: bytes as u64, begun, fullest };
        ring.begin_watching();
        Ok(ring)
    }

    /// From now on it is watched how full it gets.
    pub(crate) fn begin_watching(&self) {
        self.begun.store(self.position(), Ordering::Relaxed);
        self.fullest.store(0, Ordering::Relaxed);
    }

    fn watch(&self) {
        // Between two looks nobody gave more back than up to where the first one began.
        let waited = self.end().saturating_sub(self.begun.swap(self.position(), Ordering::Relaxed));
        self.fullest.fetch_max(waited, Ordering::Relaxed);
    }

    /// Whether every record would have found its place since [`Self::begin_watching`], had it not been too long for any.
    pub(crate) fn had_room(&self) -> bool {
        self.watch();
        self.fullest.load(Ordering::Relaxed) + LARGEST_BYTES <= self.bytes
    }

    /// Where the next record will begin: everything submitted before this call is before it.
    pub(crate) fn end(&self) -> u64 {
        self.producer.words().first().map_or(0, |word| word.load(Ordering::SeqCst))
    }

    /// Where the next record to be read begins.
    pub(crate) fn position(&self) -> u64 {
        self.consumer.words().first().map_or(0, |word| word.load(Ordering::SeqCst))
    }

    /// Bytes that wait.
    pub(crate) fn waiting(&self) -> u64 {
        self.end().saturating_sub(self.position())
    }

    /// Gives everything that waits back to the kernel, unread. Answers whether that was all: a record that is being written
    /// just now ends by itself, and its place is given back by the next reader.
    pub(crate) fn skip_to_end(&self) -> bool {
        self.watch();
        let (mut position, until) = (self.position(), self.end());
        while position < until {
            let Some(length) = self.length_at(self.place(position)) else { return false };
            position = self.after(position, length).unwrap_or(until);
            self.advance(position);
        }
        true
    }

    /// Where a position stands in the mapping.
    fn place(&self, position: u64) -> u64 {
        rustix::param::page_size() as u64 + position % self.bytes
    }

    /// Where the record behind the one at `position` begins; `None` where it cannot be so long.
    fn after(&self, position: u64, length: u32) -> Option<u64> {
        let bytes = u64::from(length & !(BUSY | DISCARDED));
        let next = position + (HEADER_BYTES + bytes).next_multiple_of(8);
        (next <= self.end()).then_some(next)
    }

    fn advance(&self, to: u64) {
        if let Some(word) = self.consumer.words().first() {
            word.store(to, Ordering::SeqCst);
        }
    }

    /// Gives every committed record before `until` to `take` and its place back to the kernel. Answers whether all were
    /// committed; if not, the next one is being written just now.
    ///
    /// # Errors
    /// [`CaptureError::Ring`], and what cannot be read is passed: the next reader goes on behind it. Or what `take` says; the
    /// record it failed at is given again.
    pub(crate) fn drain<E: From<CaptureError>>(
        &self,
        until: u64,
        mut take: impl FnMut(Record<'_>) -> Result<(), E>,
    ) -> Result<bool, E> {
        self.watch();
        let mut position = self.position();
        let mut given_back = position;
        let mut joined = Vec::new();
        let all = loop {
            if position >= until {
                break Ok(true);
            }
            let at = self.place(position);
            let Some(length) = self.length_at(at) else { break Ok(false) };
            let bytes = u64::from(length & !(BUSY | DISCARDED));
            let Some(next) = self.after(position, length) else {
                // Nothing behind it can be found any more.
                let reason = format!("{bytes} bytes at {position}, behind the end");
                position = self.end();
                break Err(CaptureError::Ring { reason }.into());
            };
            if length & DISCARDED == 0 {
                let body = self.body(position + HEADER_BYTES, bytes as usize, &mut joined);
                let Some(record) = body.and_then(decode) else {
                    let reason = format!("{bytes} bytes at {position}");
                    position = next;
                    break Err(CaptureError::Ring { reason }.into());
                };
                if let Err(error) = take(record) {
                    break Err(error);
                }
            }
            position = next;
            if position - given_back >= GIVE_BACK_BYTES {
                self.advance(position);
                given_back = position;
            }
        };
        if position > given_back {
            self.advance(position);
        }
        all
    }

    /// `len` bytes of a committed record from `position`; put together in `joined` where the ring's end cuts them.
    fn body<'a>(&'a self, position: u64, len: usize, joined: &'a mut Vec<u8>) -> Option<&'a [u8]> {
        let (begin, at) = (rustix::param::page_size(), (position % self.bytes) as usize);
        let until_end = self.bytes as usize - at;
        if len <= until_end {
            return self.producer.settled(begin + at, len);
        }
        joined.clear();
        joined.extend_from_slice(self.producer.settled(begin + at, until_end)?);
        joined.extend_from_slice(self.producer.settled(begin, len - until_end)?);
        Some(joined)
    }

    /// The length word at `at`, if the record is committed.
    fn length_at(&self, at: u64) -> Option<u32> {
        // The kernel writes the lower half; the upper half is its own and does not change after.
        let word = self.producer.words().get(at as usize / 8)?.load(Ordering::Acquire);
        let length = if cfg!(target_endian = "little") { word as u32 } else { (word >> 32) as u32 };
        (length & BUSY == 0).then_some(length)
    }
}

/// A record from its bytes. `None` for one that cannot be.
fn decode(body: &[u8]) -> Option<Record<'_>> {
    let (head, data) = body.split_first_chunk::<RECORD_BYTES>()?;
    let word =
        |at: usize| -> Option<u64> { Some(u64::from_ne_bytes(head.get(at..at + 8)?.try_into().ok()?)) };
    let half =
        |at: usize| -> Option<u32> { Some(u32::from_ne_bytes(head.get(at..at + 4)?.try_into().ok()?)) };
    let (sector, sectors) = (word(0)?, u64::from(half(32)? >> 9));
    let slot = usize::from(u16::from_ne_bytes(head.get(40..42)?.try_into().ok()?));
    let kind = *head.get(42)?;
    let probe = head.get(43)? & FLAG_PROBE != 0;
    let kind = if probe { None } else { Some(Kind::of(kind)?) };
    let data = data.get(..half(36)? as usize)?;
    if kind == Some(Kind::Write) && data.len() as u64 != sectors << 9 {
        return None;
    }
    Some(Record {
        slot: DiskSlot(slot),
        kind,
        range: SectorRange { start: sector, end: sector.checked_add(sectors)? },
        data,
        drops: word(16)?,
        generation: ModeWord::decode(word(8)?).generation,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(sector: u64, bytes: u32, data_bytes: u32, kind: u8) -> Vec<u8> {
        let mut head = Vec::new();
        for word in [sector, ModeWord { mode: super::super::Mode::Data, generation: 5 }.encode(), 3, 0] {
            head.extend_from_slice(&word.to_ne_bytes());
        }
        head.extend_from_slice(&bytes.to_ne_bytes());
        head.extend_from_slice(&data_bytes.to_ne_bytes());
        head.extend_from_slice(&7_u16.to_ne_bytes());
        head.extend_from_slice(&[kind, 0, 0, 0, 0, 0]);
        head
    }

    #[test]
    fn a_record_is_read_as_the_program_writes_it() {
        let mut body = head(16, 1024, 1024, 0);
        body.extend_from_slice(&[1; 4096]);
        let record = decode(&body).unwrap();
        assert_eq!((record.slot, record.kind), (DiskSlot(7), Some(Kind::Write)));
        assert_eq!(record.range, SectorRange { start: 16, end: 18 });
        assert_eq!((record.drops, record.generation), (3, 5));
        assert_eq!(record.data, [1; 1024]);
    }

    #[test]
    fn a_record_that_cannot_be_is_none() {
        assert!(decode(&head(16, 1024, 1024, 0)).is_none(), "without its data");
        assert!(decode(&head(16, 1024, 0, 0)).is_none(), "a write of nothing");
        assert!(decode(&head(16, 1024, 0, 7)).is_none(), "of no kind");
        assert!(decode(&head(u64::MAX, 1024, 0, 1)).is_none(), "beyond everything");
        assert!(decode(&head(16, 1024, 0, 1)).is_some(), "a discard has none");
        for len in 0..RECORD_BYTES {
            assert!(decode(&head(1, 512, 0, 1)[..len]).is_none());
        }
    }

    /// What is laid out like a ring, in memory.
    struct Lab {
        file: std::fs::File,
        ring: Ring,
        end: u64,
    }

    const LAB_BYTES: usize = 16 << 20;

    impl Lab {
        fn new() -> Self {
            let page = rustix::param::page_size();
            let file = tempfile::tempfile().unwrap();
            file.set_len((2 * page + 2 * LAB_BYTES) as u64).unwrap();
            let ring = Ring::over(&file, LAB_BYTES).unwrap();
            Self { file, ring, end: 0 }
        }

        /// A record as the kernel commits it, or of another length than it has.
        fn put(&mut self, body: &[u8], length: u32) {
            use std::os::unix::fs::FileExt;
            let page = rustix::param::page_size() as u64;
            let at = 2 * page + self.end % LAB_BYTES as u64;
            self.file.write_all_at(&u64::from(length).to_ne_bytes(), at).unwrap();
            self.file.write_all_at(body, at + HEADER_BYTES).unwrap();
            self.end += (HEADER_BYTES + body.len() as u64).next_multiple_of(8);
            self.file.write_all_at(&self.end.to_ne_bytes(), page).unwrap();
        }

        fn discard(&mut self, sector: u64) {
            let body = head(sector, 512, 0, Kind::Discard as u8);
            self.put(&body, body.len() as u32);
        }

        /// Sectors of the records that can be read now.
        fn read(&self) -> Result<Vec<u64>, CaptureError> {
            let mut found = Vec::new();
            let all = self.ring.drain::<CaptureError>(self.ring.end(), |record| {
                found.push(record.range.start);
                Ok(())
            })?;
            assert!(all);
            Ok(found)
        }
    }

    #[test]
    fn a_record_that_cannot_be_is_told_once_and_does_not_hold_up_what_is_behind_it() {
        let mut lab = Lab::new();
        lab.discard(1);
        let broken = head(2, 512, 0, 7);
        lab.put(&broken, broken.len() as u32);
        lab.discard(3);
        assert!(matches!(lab.read(), Err(CaptureError::Ring { .. })));
        assert_eq!(lab.read().unwrap(), [3]);
        // One whose length points behind the end: nothing behind it can be found, and the next one is written there.
        let body = head(4, 512, 0, Kind::Discard as u8);
        lab.put(&body, 1 << 20);
        lab.discard(5);
        assert!(matches!(lab.read(), Err(CaptureError::Ring { .. })));
        assert_eq!(lab.ring.waiting(), 0);
        lab.discard(6);
        assert_eq!(lab.read().unwrap(), [6]);
        lab.put(&body, 1 << 20);
        assert!(lab.ring.skip_to_end());
        assert_eq!(lab.ring.waiting(), 0);
    }

    #[test]
    fn a_ring_that_had_room_for_the_largest_record_all_the_time_knows_it() {
        let mut lab = Lab::new();
        let large = head(1, 0, 0, Kind::Discard as u8);
        let fill = |lab: &mut Lab, mib: usize| {
            let mut body = large.clone();
            body.resize(mib << 20, 0);
            lab.put(&body, body.len() as u32);
        };
        fill(&mut lab, 6);
        assert!(lab.ring.had_room());
        lab.read().unwrap();
        // Nobody looked in between: as much as this may have waited at once.
        fill(&mut lab, 6);
        lab.read().unwrap();
        assert!(!lab.ring.had_room(), "twice 6 MiB since the last reader but one began");
        lab.ring.begin_watching();
        assert!(lab.ring.had_room());
    }
}
