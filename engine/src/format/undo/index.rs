//! What is written when a run is sealed: an address-sorted index in checksummed pages, their fence keys, a trailer.
//!
//! Invariants: one [`IndexEntry`] for each frame, ascending, not overlapping; page n holds entries n × 2729 onwards, so
//! the place and length of every page follow from the number of frames ([`IndexPlaces`]); a fence is the first block of
//! a page; the trailer is the last 4 KiB of the file. All of it can be made again from the frames. Units: bytes, blocks.
//!
//! Layout: index pages (64 KiB each, the last one cut to a multiple of 4 KiB), fence pages (likewise), the trailer. A
//! page is [`PageHead`], its items, zeros. A run without frames has one empty page of each kind.

use super::frame::{EMPTY_FRAME_BLOCKS_MAX, FRAME_ALIGN_BYTES, FRAME_BLOCKS_MAX, FRAME_BYTES_MAX, UndoCodec};
use super::{
    BlockRange, DISK_BLOCKS_MAX, FRAMES_START, RUN_BYTES_MAX, UNDO_ALIGN_BYTES, check_padding, padded,
};
use crate::checksum::crc32;
use crate::format::FormatError;
use crate::format::wire::{put_items, wire, wire_enum};
use crate::units::Timestamp;

/// Longest page.
pub const PAGE_BYTES_MAX: usize = 64 << 10;
/// Entries of a full index page.
pub const PAGE_ENTRIES: u64 = ((PAGE_BYTES_MAX - PageHead::BYTES) / IndexEntry::BYTES) as u64;
/// Fences of a full fence page.
pub const PAGE_FENCES: u64 = ((PAGE_BYTES_MAX - PageHead::BYTES) / 8) as u64;
/// First eight bytes of a trailer.
pub const TRAILER_MAGIC: [u8; 8] = *b"RPUNDEND";
/// First four bytes of a page.
pub const PAGE_MAGIC: u32 = u32::from_le_bytes(*b"UNPG");

const _: () = assert!(FRAME_BYTES_MAX / FRAME_ALIGN_BYTES <= u16::MAX as u64);

wire_enum! {
    /// What a page holds.
    pub enum PageKind: u8 {
        /// Index entries.
        Entries = 1,
        /// Fences: the first block of each index page.
        Fences = 2,
    }
}

wire! {
    /// The head of an index or fence page.
    pub struct PageHead / PageHeadWire = 32 {
        /// Always [`PAGE_MAGIC`].
        magic: u32,
        /// CRC-32 of the whole page with this field zero.
        crc: u32,
        /// The run's salt.
        salt: u64,
        /// Number of the page among those of its kind, from zero.
        number: u64,
        /// Number of items.
        count: u32,
        /// What the page holds.
        kind: PageKind,
        ; reserved: [u8; 3],
    }
}

wire! {
    /// Where the image of some blocks stands in the file.
    pub struct IndexEntry / IndexEntryWire = 24 {
        /// First block.
        first_block: u64,
        /// Where the frame's head stands.
        offset: u64,
        /// Number of blocks.
        block_count: u32,
        /// Bytes of head, CRCs and payload in units of eight, rounded up; zero where no frame says what was lost.
        frame_units: u16,
        /// What the frame holds.
        codec: UndoCodec,
        ; reserved: [u8; 1],
    }
}

impl IndexEntry {
    /// The blocks.
    #[must_use]
    pub const fn blocks(&self) -> BlockRange {
        BlockRange { start: self.first_block, end: self.first_block.saturating_add(self.block_count as u64) }
    }

    /// Bytes of the frame, without a group's padding.
    #[must_use]
    pub const fn frame_bytes(&self) -> u64 {
        self.frame_units as u64 * FRAME_ALIGN_BYTES
    }

    fn check(&self, before: u64, frames_end: u64) -> Result<(), FormatError> {
        let refuse =
            |field, got, expected| Err(FormatError::Field { what: "IndexEntry", field, got, expected });
        let blocks_max = if self.codec.has_payload() { FRAME_BLOCKS_MAX } else { EMPTY_FRAME_BLOCKS_MAX };
        if self.block_count == 0 || u64::from(self.block_count) > blocks_max {
            return refuse("block_count", self.block_count.into(), "as many blocks as a frame may hold");
        }
        if self.first_block < before || self.blocks().end > DISK_BLOCKS_MAX {
            return refuse("first_block", self.first_block, "ascending blocks of the disk");
        }
        let frame_end = self.offset.checked_add(self.frame_bytes());
        let inside = frame_end.is_some_and(|end| end <= frames_end) && self.offset >= FRAMES_START;
        if !inside || !self.offset.is_multiple_of(FRAME_ALIGN_BYTES) || self.frame_bytes() > FRAME_BYTES_MAX {
            return refuse("offset", self.offset, "the place of a frame in this file");
        }
        Ok(())
    }
}

/// Where index, fences and trailer stand: all of it follows from the end and the number of the frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IndexPlaces {
    /// End of the frames, and the place of the first index page.
    pub frames_end: u64,
    /// Number of frames.
    pub frames: u64,
}

/// Place and length of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PagePlace {
    /// First byte in the file.
    pub offset: u64,
    /// Length in bytes, a multiple of 4 KiB.
    pub bytes: usize,
    /// Items it holds.
    pub items: u64,
}

const fn page_bytes(items: u64, item_bytes: u64) -> u64 {
    (PageHead::BYTES as u64 + items * item_bytes).next_multiple_of(UNDO_ALIGN_BYTES)
}

impl IndexPlaces {
    /// Number of index pages.
    #[must_use]
    pub const fn index_pages(&self) -> u64 {
        let pages = self.frames.div_ceil(PAGE_ENTRIES);
        if pages == 0 { 1 } else { pages }
    }

    /// Number of fence pages.
    #[must_use]
    pub const fn fence_pages(&self) -> u64 {
        self.index_pages().div_ceil(PAGE_FENCES)
    }

    /// The index page of this number.
    #[must_use]
    pub fn index_page(&self, number: u64) -> PagePlace {
        let items = self.frames.saturating_sub(number * PAGE_ENTRIES).min(PAGE_ENTRIES);
        let bytes = page_bytes(items, IndexEntry::BYTES as u64) as usize;
        PagePlace { offset: self.frames_end + number * PAGE_BYTES_MAX as u64, bytes, items }
    }

    /// The fence page of this number.
    #[must_use]
    pub fn fence_page(&self, number: u64) -> PagePlace {
        let last = self.index_page(self.index_pages() - 1);
        let items = self.index_pages().saturating_sub(number * PAGE_FENCES).min(PAGE_FENCES);
        let offset = last.offset + last.bytes as u64 + number * PAGE_BYTES_MAX as u64;
        PagePlace { offset, bytes: page_bytes(items, 8) as usize, items }
    }

    /// Where the trailer stands.
    #[must_use]
    pub fn trailer(&self) -> u64 {
        let last = self.fence_page(self.fence_pages() - 1);
        last.offset + last.bytes as u64
    }

    /// Length of the whole file.
    #[must_use]
    pub fn file_bytes(&self) -> u64 {
        self.trailer() + UNDO_ALIGN_BYTES
    }
}

/// Puts a page of entries or fences into `page`, all of which is used.
fn put_page(page: &mut [u8], mut head: PageHead, put: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = Vec::with_capacity(page.len());
    put_items(&mut bytes, [head.to_bytes()]);
    put(&mut bytes);
    bytes.resize(page.len(), 0);
    head.crc = crc32(&bytes);
    for (slot, byte) in bytes.iter_mut().zip(head.to_bytes()) {
        *slot = byte;
    }
    page.copy_from_slice(&bytes);
}

/// Writes index page `number` into `page`, which has the length its place says.
pub fn put_index_page(page: &mut [u8], salt: u64, number: u64, entries: &[IndexEntry]) {
    let count = entries.len() as u32; // at most PAGE_ENTRIES
    let head = PageHead { magic: PAGE_MAGIC, crc: 0, salt, number, count, kind: PageKind::Entries };
    put_page(page, head, |out| put_items(out, entries.iter().map(IndexEntry::to_bytes)));
}

/// Writes fence page `number` into `page`, which has the length its place says.
pub fn put_fence_page(page: &mut [u8], salt: u64, number: u64, fences: &[u64]) {
    let count = fences.len() as u32; // at most PAGE_FENCES
    let head = PageHead { magic: PAGE_MAGIC, crc: 0, salt, number, count, kind: PageKind::Fences };
    put_page(page, head, |out| put_items(out, fences.iter().copied()));
}

/// The items of a page, still as bytes, after everything else was checked.
fn page_items(
    page: &[u8],
    salt: u64,
    number: u64,
    kind: PageKind,
    item_bytes: usize,
) -> Result<&[u8], FormatError> {
    let refuse = |field, got, expected| Err(FormatError::Field { what: "Page", field, got, expected });
    let (head, rest) = PageHead::read_prefix(page)?;
    if head.magic != PAGE_MAGIC {
        return refuse("magic", head.magic.into(), "the magic of a page");
    }
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&PageHead { crc: 0, ..head }.to_bytes());
    hasher.update(rest);
    let expected = hasher.finalize();
    if head.crc != expected {
        return Err(FormatError::Checksum { what: "Page", got: head.crc, expected });
    }
    if (head.salt, head.number, head.kind) != (salt, number, kind) {
        return refuse("number", head.number, "the page of this run that belongs here");
    }
    let items_bytes = (head.count as usize).saturating_mul(item_bytes);
    let Some((items, padding)) = rest.split_at_checked(items_bytes) else {
        return refuse("count", head.count.into(), "as many items as fit a page");
    };
    check_padding("Page", padding)?;
    Ok(items)
}

/// Reads index page `number` of a run whose frames end at `frames_end`.
///
/// # Errors
/// When it is damaged, of another place, or its entries are not what a run may hold.
pub fn read_index_page(
    page: &[u8],
    salt: u64,
    number: u64,
    frames_end: u64,
) -> Result<Vec<IndexEntry>, FormatError> {
    let items = page_items(page, salt, number, PageKind::Entries, IndexEntry::BYTES)?;
    let mut before = 0;
    items
        .chunks_exact(IndexEntry::BYTES)
        .map(|item| {
            let entry = IndexEntry::read_exact(item)?;
            entry.check(before, frames_end)?;
            before = entry.blocks().end;
            Ok(entry)
        })
        .collect()
}

/// Reads fence page `number`.
///
/// # Errors
/// When it is damaged or of another place.
pub fn read_fence_page(page: &[u8], salt: u64, number: u64) -> Result<Vec<u64>, FormatError> {
    let items = page_items(page, salt, number, PageKind::Fences, 8)?;
    let fences = items.chunks_exact(8).filter_map(|item| item.first_chunk().map(|b| u64::from_le_bytes(*b)));
    Ok(fences.collect())
}

wire! {
    /// The last 4 KiB of a sealed run are this and zeros.
    pub struct Trailer / TrailerWire = 128 {
        /// Always [`TRAILER_MAGIC`].
        magic: [u8; 8],
        /// CRC-32 of this structure with this field zero.
        crc: u32,
        /// Number of fence pages.
        fence_pages: u32,
        /// The run's salt.
        salt: u64,
        /// The run's (oldest) undo epoch.
        undo_epoch: u64,
        /// Number of frames.
        frames: u64,
        /// Number of blocks in them.
        blocks: u64,
        /// Blocks with a payload.
        data_blocks: u64,
        /// Blocks whose images are lost.
        lost_blocks: u64,
        /// End of the frames and place of the first index page.
        frames_end: u64,
        /// Number of index pages.
        index_pages: u64,
        /// First block in the run.
        first_block: u64,
        /// One past the last block in the run.
        end_block: u64,
        /// When the (oldest) undo epoch began.
        opened: Timestamp,
        /// When the (newest) undo epoch was closed.
        closed: Timestamp,
        ; reserved: [u8; 16],
    }
}

impl Trailer {
    /// Where the pages stand.
    #[must_use]
    pub const fn places(&self) -> IndexPlaces {
        IndexPlaces { frames_end: self.frames_end, frames: self.frames }
    }

    /// The blocks between which the run holds images.
    #[must_use]
    pub const fn span(&self) -> BlockRange {
        BlockRange { start: self.first_block, end: self.end_block }
    }

    /// The last 4 KiB of the file.
    #[must_use]
    pub fn to_block(&self) -> [u8; UNDO_ALIGN_BYTES as usize] {
        padded(&Self { crc: crc32(&Self { crc: 0, ..*self }.to_bytes()), ..*self }.to_bytes())
    }

    /// Reads the trailer of a file of `file_bytes`.
    ///
    /// # Errors
    /// When it is damaged, of another run, or does not fit the file.
    pub fn from_block(block: &[u8], salt: u64, file_bytes: u64) -> Result<Self, FormatError> {
        const WHAT: &str = "Trailer";
        let refuse = |field, got, expected| Err(FormatError::Field { what: WHAT, field, got, expected });
        let (trailer, rest) = Self::read_prefix(block)?;
        if trailer.magic != TRAILER_MAGIC {
            return refuse("magic", u64::from_le_bytes(trailer.magic), "the magic of a trailer");
        }
        let expected = crc32(&Self { crc: 0, ..trailer }.to_bytes());
        if trailer.crc != expected {
            return Err(FormatError::Checksum { what: WHAT, got: trailer.crc, expected });
        }
        check_padding(WHAT, rest)?;
        if trailer.salt != salt {
            return refuse("salt", trailer.salt, "the run's");
        }
        let (end, frames) = (trailer.frames_end, trailer.frames);
        if !(FRAMES_START..=RUN_BYTES_MAX).contains(&end) || !end.is_multiple_of(UNDO_ALIGN_BYTES) {
            return refuse("frames_end", end, "a multiple of 4096 in the file");
        }
        if frames > DISK_BLOCKS_MAX {
            return refuse("frames", frames, "no more frames than blocks");
        }
        let places = trailer.places();
        if (trailer.index_pages, u64::from(trailer.fence_pages))
            != (places.index_pages(), places.fence_pages())
        {
            return refuse("index_pages", trailer.index_pages, "the pages that so many frames need");
        }
        if places.file_bytes() != file_bytes {
            return refuse("frames_end", end, "pages that end with the file");
        }
        let span = trailer.end_block.checked_sub(trailer.first_block);
        if trailer.end_block > DISK_BLOCKS_MAX || span.is_none_or(|span| trailer.blocks > span) {
            return refuse("blocks", trailer.blocks, "blocks between the first and the last");
        }
        if trailer.data_blocks.checked_add(trailer.lost_blocks).is_none_or(|some| some > trailer.blocks) {
            return refuse("data_blocks", trailer.data_blocks, "a part of the blocks");
        }
        Ok(trailer)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SALT: u64 = 99;
    const END: u64 = 1 << 30;

    fn entries(count: u64) -> Vec<IndexEntry> {
        (0..count)
            .map(|at| IndexEntry {
                first_block: at * 20,
                offset: FRAMES_START + at * 4200,
                block_count: 1 + (at % 16) as u32,
                frame_units: 520,
                codec: UndoCodec::Raw,
            })
            .collect()
    }

    fn page(entries: &[IndexEntry]) -> Vec<u8> {
        let place = IndexPlaces { frames_end: END, frames: entries.len() as u64 }.index_page(0);
        let mut page = vec![0xEE; place.bytes];
        put_index_page(&mut page, SALT, 0, entries);
        page
    }

    fn trailer() -> Trailer {
        let places = IndexPlaces { frames_end: FRAMES_START + 4096, frames: 9 };
        Trailer {
            magic: TRAILER_MAGIC,
            crc: 0,
            fence_pages: places.fence_pages() as u32,
            salt: SALT,
            undo_epoch: 3,
            frames: places.frames,
            blocks: 50,
            data_blocks: 40,
            lost_blocks: 1,
            frames_end: places.frames_end,
            index_pages: places.index_pages(),
            first_block: 7,
            end_block: 70,
            opened: Timestamp(1),
            closed: Timestamp(2),
        }
    }

    #[test]
    fn pages_come_back_as_they_went_full_and_empty() {
        for count in [0, 1, 169, 170, PAGE_ENTRIES] {
            let entries = entries(count);
            let page = page(&entries);
            assert!(page.len() <= PAGE_BYTES_MAX && page.len().is_multiple_of(4096));
            assert_eq!(read_index_page(&page, SALT, 0, END).unwrap(), entries);
            assert!(read_index_page(&page, SALT + 1, 0, END).is_err());
            assert!(read_index_page(&page, SALT, 1, END).is_err());
        }
        let fences: Vec<u64> = (0..PAGE_FENCES).collect();
        let mut page = vec![0; PAGE_BYTES_MAX];
        put_fence_page(&mut page, SALT, 4, &fences);
        assert_eq!(read_fence_page(&page, SALT, 4).unwrap(), fences);
        assert!(read_index_page(&page, SALT, 4, END).is_err(), "the kinds are told apart");
    }

    #[test]
    fn every_flipped_bit_and_truncation_of_a_page_and_a_trailer_is_found() {
        let page = page(&entries(30));
        let file_bytes = trailer().places().file_bytes();
        let block = trailer().to_block();
        assert!(Trailer::from_block(&block, SALT, file_bytes).is_ok());
        for bit in 0..4096 * 8 {
            let (mut page, mut block) = (page.clone(), block);
            page[bit / 8] ^= 1 << (bit % 8);
            block[bit / 8] ^= 1 << (bit % 8);
            assert!(read_index_page(&page, SALT, 0, END).is_err(), "page, bit {bit}");
            assert!(Trailer::from_block(&block, SALT, file_bytes).is_err(), "trailer, bit {bit}");
        }
        for len in 0..4096 {
            assert!(read_index_page(&page[..len], SALT, 0, END).is_err());
        }
        assert!((0..Trailer::BYTES).all(|len| Trailer::from_block(&block[..len], SALT, file_bytes).is_err()));
    }

    #[test]
    fn entries_that_no_run_can_have_are_refused() {
        let good = entries(3);
        let with = |change: fn(&mut IndexEntry)| {
            let mut entries = good.clone();
            change(&mut entries[1]);
            read_index_page(&page(&entries), SALT, 0, END)
        };
        assert!(with(|entry| entry.first_block = 0).is_err(), "not ascending");
        assert!(with(|entry| entry.block_count = 0).is_err());
        assert!(with(|entry| entry.block_count = 17).is_err());
        assert!(with(|entry| entry.offset = 4096).is_err(), "in the header");
        assert!(with(|entry| entry.offset = END).is_err(), "behind the frames");
        assert!(with(|entry| entry.offset = u64::MAX - 7).is_err());
        assert!(with(|entry| entry.frame_units = u16::MAX).is_err());
    }

    #[test]
    fn a_trailer_must_fit_its_file() {
        let file_bytes = trailer().places().file_bytes();
        for (damaged, bytes) in [
            (trailer(), file_bytes + 4096),
            (Trailer { frames: u64::MAX, ..trailer() }, file_bytes),
            (Trailer { frames_end: u64::MAX, ..trailer() }, file_bytes),
            (Trailer { index_pages: 2, ..trailer() }, file_bytes),
            (Trailer { end_block: 6, ..trailer() }, file_bytes),
            (Trailer { lost_blocks: u64::MAX, ..trailer() }, file_bytes),
        ] {
            assert!(Trailer::from_block(&damaged.to_block(), SALT, bytes).is_err(), "{damaged:?}");
        }
    }

    proptest! {
        #[test]
        fn places_follow_one_another_without_gap(frames in 0..60_000_000_u64) {
            let places = IndexPlaces { frames_end: FRAMES_START, frames };
            let mut at = places.frames_end;
            let mut items = 0;
            for number in 0..places.index_pages() {
                let page = places.index_page(number);
                prop_assert_eq!(page.offset, at);
                at += page.bytes as u64;
                items += page.items;
            }
            prop_assert_eq!(items, frames);
            for number in 0..places.fence_pages() {
                let page = places.fence_page(number);
                prop_assert_eq!(page.offset, at);
                at += page.bytes as u64;
            }
            prop_assert_eq!((places.trailer(), places.file_bytes()), (at, at + 4096));
        }

        #[test]
        fn arbitrary_pages_with_sound_checksums_never_panic(bytes in proptest::collection::vec(any::<u8>(), 32..400), kind in 1..=2_u8) {
            let mut page = bytes;
            page[..4].copy_from_slice(&PAGE_MAGIC.to_le_bytes());
            page[4..8].fill(0);
            page[28] = kind;
            page[29..32].fill(0);
            let crc = crc32(&page);
            page[4..8].copy_from_slice(&crc.to_le_bytes());
            let head = PageHead::read_prefix(&page).map(|(head, _)| head).unwrap();
            let _ = read_index_page(&page, head.salt, head.number, END);
            let _ = read_fence_page(&page, head.salt, head.number);
        }
    }
}
