//! What is stored: records, commit groups, undo frames, and where a point lies.
//!
//! Units: a target has [`BLOCKS`] blocks of [`SECTORS`] sectors; a sector's content is one number that the source never
//! writes twice, so a wrong sector is always seen. Sequences count from 1 per disk; 0 is the state before any record.

/// Blocks of a target.
pub(crate) const BLOCKS: usize = 5;
/// Sectors of a block.
pub(crate) const SECTORS: usize = 4;
/// Commit groups of a redo-log segment.
pub(crate) const SEGMENT_GROUPS: usize = 5;
/// Commit groups that may be written and not yet flushed.
pub(crate) const IN_FLIGHT: usize = 4;
/// Length of the any-write window in ticks.
pub(crate) const WINDOW: usize = 30;

pub(crate) type Sequence = usize;
pub(crate) type Block = [u32; SECTORS];
/// A block as a view knows it; `None` is a hole.
pub(crate) type Seen = [Option<u32>; SECTORS];

/// One record of a disk's delta stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) disk: usize,
    pub(crate) sequence: Sequence,
    /// When the source wrote it; a record that is sent again keeps it, else the any-write window would move back.
    pub(crate) time: usize,
    pub(crate) body: Body,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Body {
    /// Sectors from `sector` on; may touch parts of several blocks.
    Write { sector: usize, values: Vec<u32> },
    /// A mark of the machine: the same number on each of its disks.
    Mark { mark: usize, state: bool },
}

impl Record {
    /// Sectors and contents that this record writes.
    pub(crate) fn writes(&self) -> impl Iterator<Item = (usize, u32)> + '_ {
        let (sector, values): (usize, &[u32]) = match &self.body {
            Body::Write { sector, values } => (*sector, values),
            Body::Mark { .. } => (0, &[]),
        };
        values.iter().enumerate().map(move |(at, value)| (sector + at, *value))
    }

    pub(crate) fn touches(&self, block: usize) -> bool {
        self.writes().any(|write| write.0 / SECTORS == block)
    }
}

/// The target was flushed past `sequence`, and the undo run of `epoch` had `frames` durable frames by then.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Applied {
    pub(crate) disk: usize,
    pub(crate) sequence: Sequence,
    pub(crate) epoch: usize,
    pub(crate) frames: usize,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    Record(Record),
    Applied(Applied),
}

/// A commit group of the redo log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Group {
    pub(crate) number: usize,
    pub(crate) salt: u64,
    /// Highest group that was known to be durable when this one was written.
    pub(crate) durable_group: usize,
    pub(crate) entries: Vec<Entry>,
}

/// A before-image in an undo run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Frame {
    pub(crate) block: usize,
    /// `None`: the image is lost, and that is known (a hole).
    pub(crate) image: Option<Block>,
    /// Sectors the image covers: all, unless that rule is broken.
    pub(crate) covers: [bool; SECTORS],
}

impl Frame {
    pub(crate) const fn hole(block: usize) -> Self {
        Self { block, image: None, covers: [true; SECTORS] }
    }
}

/// Where a state lies: before-images from epoch `base` on, over them what was logged up to `upto`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct At {
    pub(crate) base: usize,
    pub(crate) upto: Sequence,
}
