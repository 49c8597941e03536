//! The structures a journal's files consist of, each with the decoder and the identity that recovery reads it with.
//!
//! Invariant: the pieces do not overlap, and together they cover everything that was written but for the zeros between
//! the last group of a segment and its index. Called by `journal_flips.rs`. Units: bytes.

use reprotect_engine::compress::Decompressor;
use reprotect_engine::format::manifest::{Edit, EditHead, ManifestHeader, SUPERBLOCK_COPIES, Superblock};
use reprotect_engine::format::segment::{GroupHeader, SegmentHeader, entries};
use reprotect_engine::format::segment_index::SegmentIndexHead;
use reprotect_engine::format::undo::frame::Frame;
use reprotect_engine::format::undo::index::{Trailer, read_fence_page, read_index_page};
use reprotect_engine::format::undo::{FRAMES_START, RunHeader};

use crate::image::Image;

const BLOCK: usize = 4096;

/// Names of the kinds, each of which an image must have.
pub(crate) const KINDS: [&str; 12] = [
    "superblock copy",
    "manifest header",
    "edit",
    "segment header",
    "group",
    "run header",
    "frame",
    "index page",
    "fence page",
    "trailer",
    "segment index head",
    "segment index items",
];

/// What a piece is, with what a reader knows of it before it reads.
#[derive(Clone, Debug)]
pub(crate) enum Kind {
    Superblock,
    ManifestHeader,
    Edit { manifest: u64, index: u64 },
    SegmentHeader,
    Group { salt: u64, group: u64 },
    RunHeader,
    Frame { salt: u64, offset: u64 },
    IndexPage { salt: u64, number: u64, frames_end: u64 },
    FencePage { salt: u64, number: u64 },
    Trailer { salt: u64, file_bytes: u64 },
    SegmentIndexHead { salt: u64 },
    SegmentIndexItems { head: SegmentIndexHead },
}

impl Kind {
    pub(crate) const fn name(&self) -> &'static str {
        KINDS[match self {
            Self::Superblock => 0,
            Self::ManifestHeader => 1,
            Self::Edit { .. } => 2,
            Self::SegmentHeader => 3,
            Self::Group { .. } => 4,
            Self::RunHeader => 5,
            Self::Frame { .. } => 6,
            Self::IndexPage { .. } => 7,
            Self::FencePage { .. } => 8,
            Self::Trailer { .. } => 9,
            Self::SegmentIndexHead { .. } => 10,
            Self::SegmentIndexItems { .. } => 11,
        }]
    }
}

/// One structure as it lies in its file.
pub(crate) struct Piece {
    pub(crate) kind: Kind,
    file: String,
    offset: usize,
    pub(crate) bytes: Vec<u8>,
    /// Bytes of it that are not padding.
    pub(crate) used: usize,
}

impl std::fmt::Debug for Piece {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?} at byte {} of {}", self.kind, self.offset, self.file)
    }
}

impl Piece {
    /// What the structure says; `None` when it is refused.
    pub(crate) fn read(&self, bytes: &[u8]) -> Option<String> {
        match &self.kind {
            Kind::Superblock => Superblock::open(bytes).ok().map(|it| format!("{it:?}")),
            Kind::ManifestHeader => ManifestHeader::open(bytes).ok().map(|it| format!("{it:?}")),
            Kind::SegmentHeader => SegmentHeader::open(bytes).ok().map(|it| format!("{it:?}")),
            Kind::RunHeader => RunHeader::from_block(bytes).ok().map(|it| format!("{it:?}")),
            Kind::Edit { manifest, index } => edit(bytes, *manifest, *index),
            Kind::Group { salt, group } => self::group(bytes, *salt, *group),
            Kind::Frame { salt, offset } => frame(bytes, *salt, *offset),
            Kind::IndexPage { salt, number, frames_end } => {
                read_index_page(bytes, *salt, *number, *frames_end).ok().map(|it| format!("{it:?}"))
            }
            Kind::FencePage { salt, number } => {
                read_fence_page(bytes, *salt, *number).ok().map(|it| format!("{it:?}"))
            }
            Kind::Trailer { salt, file_bytes } => {
                Trailer::from_block(bytes, *salt, *file_bytes).ok().map(|it| format!("{it:?}"))
            }
            Kind::SegmentIndexHead { salt } => {
                let head = SegmentIndexHead::open(bytes).ok().filter(|head| head.salt == *salt);
                head.map(|it| format!("{it:?}"))
            }
            Kind::SegmentIndexItems { head } => head.open_items(bytes).ok().map(|it| format!("{it:?}")),
        }
    }
}

fn edit(bytes: &[u8], manifest: u64, index: u64) -> Option<String> {
    let head = EditHead::open(bytes).ok()?;
    let (body, padding) = bytes.get(EditHead::BYTES..)?.split_at_checked(head.body_bytes as usize)?;
    let edit = Edit::decode(&head, body).ok()?;
    let sound = head.manifest == manifest && head.index == index && padding.iter().all(|byte| *byte == 0);
    sound.then(|| format!("{head:?} {edit:?}"))
}

fn group(bytes: &[u8], salt: u64, group: u64) -> Option<String> {
    let header = GroupHeader::open(bytes).ok()?;
    let rest = bytes.get(GroupHeader::BYTES..)?;
    let (payload, padding) = rest.split_at_checked(header.payload_bytes as usize)?;
    header.check_payload(payload).ok()?;
    let count = entries(payload).collect::<Result<Vec<_>, _>>().ok()?.len();
    let sound = header.salt == salt
        && header.group == group
        && count == header.entry_count as usize
        && padding.iter().all(|byte| *byte == 0);
    sound.then(|| format!("{header:?}"))
}

fn frame(bytes: &[u8], salt: u64, offset: u64) -> Option<String> {
    let frame = Frame::read(bytes, salt, offset).ok()?;
    frame.check_stored().ok()?;
    if frame.padding.iter().any(|byte| *byte != 0) {
        return None; // verification names it; no reader uses it
    }
    Some(format!("{:?}", frame.head))
}

/// Cuts the image into its structures.
pub(crate) fn pieces(image: &Image) -> Vec<Piece> {
    let mut pieces = Vec::new();
    for (file, offset, bytes) in image.written() {
        let mut cut = Cut { file, base: offset as usize, bytes, pieces: &mut pieces };
        match cut.file.split('-').next() {
            _ if cut.file == "superblock" => {
                assert_eq!(cut.bytes.len(), SUPERBLOCK_COPIES as usize * BLOCK);
                for copy in 0..SUPERBLOCK_COPIES as usize {
                    cut.take(copy * BLOCK, BLOCK, Superblock::BYTES, Kind::Superblock);
                }
            }
            Some("manifest") => cut.manifest(),
            Some("redo") => cut.segment(),
            Some("undo") => cut.run(),
            _ => panic!("{} is no file of a journal", cut.file),
        }
    }
    // Each piece must read back what it is: the decoder and the identity are the right ones.
    for piece in &pieces {
        assert!(piece.read(&piece.bytes).is_some(), "{piece:?} does not decode");
    }
    pieces
}

struct Cut<'a> {
    file: String,
    base: usize,
    bytes: Vec<u8>,
    pieces: &'a mut Vec<Piece>,
}

impl Cut<'_> {
    fn take(&mut self, at: usize, len: usize, used: usize, kind: Kind) {
        let bytes = self.bytes[at..at + len].to_vec();
        self.pieces.push(Piece { kind, file: self.file.clone(), offset: self.base + at, bytes, used });
    }

    fn manifest(&mut self) {
        let header = ManifestHeader::open(&self.bytes).unwrap();
        self.take(0, BLOCK, ManifestHeader::BYTES, Kind::ManifestHeader);
        let (mut at, mut index) = (BLOCK, 1);
        while let Some(head) = self.bytes.get(at..).and_then(|rest| EditHead::open(rest).ok()) {
            let len = head.stored_bytes() as usize;
            // Padding is checked, so every byte counts.
            self.take(at, len, len, Kind::Edit { manifest: header.number, index });
            (at, index) = (at + len, index + 1);
        }
        // Room for more of them: what a flipped bit does there is examined by opening the journal.
        assert!(self.bytes[at..].iter().all(|byte| *byte == 0), "{} is all edits and room", self.file);
    }

    fn segment(&mut self) {
        let Ok(header) = SegmentHeader::open(&self.bytes) else {
            assert!(self.bytes.iter().all(|byte| *byte == 0), "{} was never used", self.file);
            return;
        };
        self.take(0, BLOCK, SegmentHeader::BYTES, Kind::SegmentHeader);
        let (mut at, mut group) = (BLOCK, header.first_group);
        while let Some(head) = self.bytes.get(at..).and_then(|rest| GroupHeader::open(rest).ok()) {
            let len = head.stored_bytes() as usize;
            self.take(at, len, len, Kind::Group { salt: header.salt, group });
            (at, group) = (at + len, group + 1);
        }
        let block = self.bytes.len() - BLOCK;
        let mut end = self.bytes.len();
        if let Ok(head) = SegmentIndexHead::open(&self.bytes[block..]) {
            assert_eq!((head.salt, head.groups_end), (header.salt, at as u64));
            end = head.items_offset().unwrap() as usize;
            self.take(end, block - end, block - end, Kind::SegmentIndexItems { head });
            self.take(block, BLOCK, SegmentIndexHead::BYTES, Kind::SegmentIndexHead { salt: header.salt });
        }
        assert!(
            self.bytes[at..end].iter().all(|byte| *byte == 0),
            "{}: only zeros behind the last group",
            self.file
        );
    }

    fn run(&mut self) {
        let header = RunHeader::from_block(&self.bytes[..BLOCK]).unwrap();
        let salt = header.salt;
        for copy in 0..2 {
            self.take(copy * BLOCK, BLOCK, BLOCK, Kind::RunHeader);
        }
        let mut at = FRAMES_START as usize;
        while let Some(frame) = self.bytes.get(at..).and_then(|rest| Frame::read(rest, salt, at as u64).ok())
        {
            let len = frame.head.whole_bytes() as usize;
            let mut plain = vec![0; 64 << 10];
            let mut decompressor = Decompressor::new().unwrap();
            if frame.head.codec.has_payload() {
                assert!(frame.open_into(&mut decompressor, &mut plain).unwrap().1.is_none());
            }
            self.take(at, len, len, Kind::Frame { salt, offset: at as u64 });
            at += len;
        }
        let file_bytes = self.bytes.len() as u64;
        let trailer = &self.bytes[self.bytes.len() - BLOCK..];
        let Ok(trailer) = Trailer::from_block(trailer, salt, file_bytes) else {
            assert_eq!(at, self.bytes.len(), "a run that goes on is all frames");
            return;
        };
        let (places, frames_end) = (trailer.places(), trailer.frames_end);
        assert_eq!(at as u64, frames_end);
        for number in 0..places.index_pages() {
            let page = places.index_page(number);
            self.take(
                page.offset as usize,
                page.bytes,
                page.bytes,
                Kind::IndexPage { salt, number, frames_end },
            );
        }
        for number in 0..places.fence_pages() {
            let page = places.fence_page(number);
            self.take(page.offset as usize, page.bytes, page.bytes, Kind::FencePage { salt, number });
        }
        self.take(places.trailer() as usize, BLOCK, BLOCK, Kind::Trailer { salt, file_bytes });
    }
}
