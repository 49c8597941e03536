//! What the capture programs and the agent share: places in the maps and the record of the ring, as `bpf/capture.h` states.
//!
//! Invariants: maps are read and written as 64-bit words, so that a word is never seen half changed; the numbers here equal
//! those of the header, which the unit test reads. Units: sectors, bytes. Called by every file of this module.

use reprotect_engine::units::SectorRange;

/// Disks one machine's capture can follow.
pub const DISKS_MAX: usize = 64;
/// Places for counters of generations; a generation uses the one of its number modulo this.
pub(crate) const GENERATION_SLOTS: usize = 16;
/// Words of the control value.
pub(crate) const CONTROL_WORDS: usize = DISKS + DISKS_MAX;
/// Where the counts of entries that were given up begin in it.
pub(crate) const WRITTEN_OFF: usize = 13;
/// Where the numbers of followed disks begin in it.
pub(crate) const DISKS: usize = 31;
/// Places of one set of the table of writes in flight.
pub(crate) const FLIGHT_WAYS: usize = 8;
/// Words of such a set: keys, then the writes.
pub(crate) const FLIGHT_SET_WORDS: usize = FLIGHT_WAYS * (1 + FLIGHT_WORDS);
/// Words of a write in flight.
pub(crate) const FLIGHT_WORDS: usize = 4;
/// In a key: its place is being filled.
pub(crate) const FLIGHT_BUSY: u64 = 1;
/// Words of one CPU's generation counters.
pub(crate) const FLIGHTS_WORDS: usize = 4 * GENERATION_SLOTS;
/// Words of one CPU's counters of one disk.
pub(crate) const TALLY_WORDS: usize = 56;
/// Bytes of a record's head.
pub(crate) const RECORD_BYTES: usize = 48;

/// Words of the control value.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Control {
    /// Mode and generation.
    ModeWord = 0,
    /// Older generations are given up.
    ReapedBelow = 1,
    /// Records that found no place.
    Drops = 2,
    /// Where page memory begins, scaled.
    AddressBase = 3,
    /// Test hook: which event.
    SkipCountdown = 4,
    /// Test hook: kind and place.
    SkipWhat = 5,
    /// Test hook: events lost.
    Skipped = 7,
    /// Self-test: whose reads.
    ProbeTgid = 8,
    /// Self-test: the page seen.
    ProbePage = 9,
    /// Self-test: the task seen.
    ProbeTask = 10,
    /// Self-test: size of a page's description.
    ProbePageBytes = 11,
    /// Entries of older generations that are overwritten are counted apart.
    DoubtBelow = 12,
    /// Places of followed disks that programs look at.
    DisksEnd = 30,
}

/// Kinds of operations a block device is asked for, as the programs count them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Data are written.
    Write = 0,
    /// Discard.
    Discard = 1,
    /// Secure erase.
    SecureErase = 2,
    /// Zeros are written.
    Zeroes = 3,
    /// A flush without data.
    Flush = 4,
    /// A driver's own command that may have written anywhere.
    Passthrough = 5,
    /// A command for zones, whose range is not known here.
    Zone = 6,
}

impl Kind {
    /// All kinds, in the order of their numbers.
    pub const ALL: [Self; 7] = [
        Self::Write,
        Self::Discard,
        Self::SecureErase,
        Self::Zeroes,
        Self::Flush,
        Self::Passthrough,
        Self::Zone,
    ];

    /// The kind of this number.
    #[must_use]
    pub fn of(number: u8) -> Option<Self> {
        Self::ALL.get(usize::from(number)).copied()
    }

    /// Kinds whose sectors the kernel counts as written.
    pub(crate) const WRITTEN: [Self; 3] = [Self::Write, Self::SecureErase, Self::Zeroes];
}

/// What the programs do with an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Nothing.
    Off = 0,
    /// Mark blocks.
    Bitmap = 1,
    /// Mark blocks and copy data into the ring.
    Data = 2,
}

/// Mode and generation: one word, so that an event sees both of one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ModeWord {
    pub(crate) mode: Mode,
    pub(crate) generation: u64,
}

impl ModeWord {
    pub(crate) const fn encode(self) -> u64 {
        self.mode as u64 | self.generation << 8
    }

    pub(crate) const fn decode(word: u64) -> Self {
        let mode = match word & 0xff {
            1 => Mode::Bitmap,
            2 => Mode::Data,
            _ => Mode::Off,
        };
        Self { mode, generation: word >> 8 }
    }
}

/// Where the fields of a tally begin.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Tally {
    Queued = 0,
    Stale = 8,
    StaleWritten = 9,
    StaleDiscarded = 10,
    Full = 11,
    Records = 12,
    RecordBytes = 13,
    Unrecorded = 14,
    Unmapped = 15,
    Done = 16,
    DoneSectors = 24,
    Orphans = 32,
    Late = 33,
    Failed = 34,
    DoneBios = 35,
    Ended = 36,
    EndedSectors = 44,
    EndedFailed = 52,
    EndedLate = 53,
    OldStaleWritten = 54,
    OldStaleDiscarded = 55,
}

/// A write on its way, as the table of writes in flight holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Flight {
    pub(crate) range: SectorRange,
    pub(crate) generation: u64,
    /// Sectors not yet seen completing.
    pub(crate) remaining: u64,
    pub(crate) slot: usize,
    pub(crate) discard: bool,
}

impl Flight {
    /// From the table's words.
    pub(crate) fn decode(value: [u64; FLIGHT_WORDS]) -> Self {
        let [sector, generation, sizes, place] = value;
        let sectors = (sizes & u64::from(u32::MAX)) >> 9;
        Self {
            range: SectorRange { start: sector, end: sector.saturating_add(sectors) },
            generation,
            remaining: (sizes >> 32) >> 9,
            slot: (place & u64::from(u32::MAX)) as usize,
            discard: place >> 32 == Kind::Discard as u64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sizes that the header asserts of its structures.
    fn asserted(name: &str) -> usize {
        let header = include_str!("../../bpf/capture.h");
        let line = header.lines().find(|line| line.contains(&format!("sizeof(struct {name}) =="))).unwrap();
        let number = line.split("== ").nth(1).unwrap().split(',').next().unwrap();
        number.parse().unwrap_or(RECORD_BYTES)
    }

    #[test]
    fn sizes_are_those_of_the_header() {
        assert_eq!(asserted("control"), CONTROL_WORDS * 8);
        assert_eq!(asserted("flights"), FLIGHTS_WORDS * 8);
        assert_eq!(asserted("tally"), TALLY_WORDS * 8);
        assert_eq!(asserted("flight"), FLIGHT_WORDS * 8);
        assert_eq!(asserted("flight_set"), FLIGHT_SET_WORDS * 8);
        assert!(
            include_str!("../../bpf/capture.h").contains(&format!("#define RECORD_BYTES {RECORD_BYTES}"))
        );
        assert!(include_str!("../../bpf/capture.h").contains(&format!("#define DISKS_MAX {DISKS_MAX}")));
        let ways = format!("#define FLIGHT_WAYS {FLIGHT_WAYS}");
        assert!(include_str!("../../bpf/capture.h").contains(&ways));
        let busy = format!("#define FLIGHT_BUSY {FLIGHT_BUSY}ULL");
        assert!(include_str!("../../bpf/capture.h").contains(&busy));
    }

    /// Where the fields of a structure of 64-bit words stand, and its words; two half words in a line are one.
    fn places(name: &str) -> (std::collections::BTreeMap<String, usize>, usize) {
        let header = include_str!("../../bpf/capture.h");
        let body = header.split(&format!("struct {name} {{")).nth(1).unwrap().split("};").next().unwrap();
        let (mut halves, mut places) = (0, std::collections::BTreeMap::new());
        for line in body.lines() {
            let Some(declaration) = line.trim().strip_prefix("__u").and_then(|rest| rest.split(';').next())
            else {
                continue;
            };
            let (bits, declaration) = declaration.split_once(' ').unwrap();
            let (name, count) = match declaration.split_once('[') {
                Some((name, count)) => {
                    let count = count.trim_end_matches(']').replace("GENERATION_SLOTS", "16");
                    let count = count.replace("DISKS_MAX", "64").replace("KINDS", "8");
                    (name, count.parse().unwrap())
                }
                None => (declaration, 1),
            };
            places.insert(name.to_owned(), halves / 2);
            halves += count * bits.parse::<usize>().unwrap() / 32;
        }
        (places, halves / 2)
    }

    #[test]
    fn fields_of_the_control_stand_where_the_header_has_them() {
        let (places, words) = places("control");
        assert_eq!(words, CONTROL_WORDS);
        let fields = [
            ("mode_word", Control::ModeWord as usize),
            ("reaped_below", Control::ReapedBelow as usize),
            ("drops", Control::Drops as usize),
            ("address_base", Control::AddressBase as usize),
            ("skip_countdown", Control::SkipCountdown as usize),
            ("skip_kind", Control::SkipWhat as usize),
            ("skipped", Control::Skipped as usize),
            ("probe_tgid", Control::ProbeTgid as usize),
            ("probe_page", Control::ProbePage as usize),
            ("probe_task", Control::ProbeTask as usize),
            ("probe_page_bytes", Control::ProbePageBytes as usize),
            ("doubt_below", Control::DoubtBelow as usize),
            ("written_off", WRITTEN_OFF),
            ("disks_end", Control::DisksEnd as usize),
            ("disks", DISKS),
        ];
        for (name, place) in fields {
            assert_eq!(places.get(name), Some(&place), "{name}");
        }
    }

    #[test]
    fn fields_of_the_tally_stand_where_the_header_has_them() {
        let (places, words) = places("tally");
        assert_eq!(words, TALLY_WORDS);
        let fields = [
            ("queued", Tally::Queued),
            ("stale", Tally::Stale),
            ("stale_sectors", Tally::StaleWritten),
            ("full", Tally::Full),
            ("records", Tally::Records),
            ("record_bytes", Tally::RecordBytes),
            ("unrecorded", Tally::Unrecorded),
            ("unmapped", Tally::Unmapped),
            ("done", Tally::Done),
            ("done_sectors", Tally::DoneSectors),
            ("orphans", Tally::Orphans),
            ("late", Tally::Late),
            ("failed", Tally::Failed),
            ("done_bios", Tally::DoneBios),
            ("ended", Tally::Ended),
            ("ended_sectors", Tally::EndedSectors),
            ("ended_failed", Tally::EndedFailed),
            ("ended_late", Tally::EndedLate),
            ("old_stale_sectors", Tally::OldStaleWritten),
        ];
        for (name, field) in fields {
            assert_eq!(places.get(name), Some(&(field as usize)), "{name}");
        }
    }

    #[test]
    fn a_mode_word_is_read_as_it_was_written() {
        for mode in [Mode::Off, Mode::Bitmap, Mode::Data] {
            let word = ModeWord { mode, generation: 0x00ab_cdef_0123_4567 };
            assert_eq!(ModeWord::decode(word.encode()), word);
        }
    }
}
