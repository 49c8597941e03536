//! Frames: up to sixteen adjacent before-images, compressed or raw, or a run of blocks that were zeros, or a run of
//! blocks whose images are lost.
//!
//! Invariants: the head is checked apart from the payload; it names the frame's own place, so a frame is valid where it
//! was written and nowhere else; one CRC-32 per block of plain data; a compressed payload has a CRC of its own, so that
//! it can be checked and copied without decompressing. Frames are written in groups, ascending inside a group; a group
//! begins at a 4 KiB boundary and its last frame is padded to one. Units: bytes and blocks.
//!
//! Layout: [`FrameHead`], the block CRCs (4 bytes each, raw and zstd only), the stored payload, padding.

use super::{BlockRange, DISK_BLOCKS_MAX, UNDO_ALIGN_BYTES};
use crate::checksum::crc32;
use crate::compress::Decompressor;
use crate::format::FormatError;
use crate::format::wire::{COUNTER_MAX, wire, wire_enum};
use crate::units::BLOCK_BYTES;

/// First four bytes of a frame.
pub const FRAME_MAGIC: u32 = u32::from_le_bytes(*b"UNFR");
/// Frames begin at multiples of this many bytes.
pub const FRAME_ALIGN_BYTES: u64 = 8;
/// Most blocks of one frame with a payload: 64 KiB, so that one block is read without reading much else.
pub const FRAME_BLOCKS_MAX: u64 = 16;
/// Most blocks of one frame without payload: 1 GiB.
pub const EMPTY_FRAME_BLOCKS_MAX: u64 = 1 << 18;
/// Most bytes of one frame with its CRCs and payload, rounded up to [`FRAME_ALIGN_BYTES`], without a group's padding.
pub const FRAME_BYTES_MAX: u64 = FrameHead::BYTES as u64 + FRAME_BLOCKS_MAX * (4 + BLOCK_BYTES);

const _: () = {
    assert!(FRAME_BYTES_MAX.is_multiple_of(FRAME_ALIGN_BYTES));
    assert!(EMPTY_FRAME_BLOCKS_MAX * BLOCK_BYTES <= crate::limits::ZERO_RECORD_BYTES_MAX);
    assert!((FrameHead::BYTES as u64).is_multiple_of(FRAME_ALIGN_BYTES));
};

wire_enum! {
    /// What a frame holds of its blocks.
    pub enum UndoCodec: u8 {
        /// They were zeros; there is no payload.
        Zeros = 0,
        /// Their bytes as they were.
        Raw = 1,
        /// One independent zstd frame with its content size.
        Zstd = 2,
        /// Their images are lost to damage; there is no payload, and nothing may be shown in their place.
        Lost = 3,
    }
}

impl UndoCodec {
    /// Whether a frame of this kind has a payload.
    #[must_use]
    pub const fn has_payload(self) -> bool {
        matches!(self, Self::Raw | Self::Zstd)
    }
}

wire! {
    /// The fixed head of a frame.
    pub struct FrameHead / FrameHeadWire = 64 {
        /// Always [`FRAME_MAGIC`].
        magic: u32,
        /// CRC-32 of this head with this field zero, followed by the block CRCs.
        head_crc: u32,
        /// The run's salt.
        salt: u64,
        /// Where in the file this head stands.
        offset: u64,
        /// Number of the frame in the run, from zero, ascending.
        number: u64,
        /// First block.
        first_block: u64,
        /// Number of blocks.
        block_count: u32,
        /// Length of the stored payload in bytes.
        stored_bytes: u32,
        /// CRC-32 of the stored payload where it is compressed; zero otherwise (the block CRCs cover it).
        stored_crc: u32,
        /// Frames of the same group before this one.
        group_at: u32,
        /// Frames of the same group after this one.
        group_left: u32,
        /// Zeros that follow the payload, up to the next frame.
        pad_bytes: u16,
        /// What the frame holds.
        codec: UndoCodec,
        ; reserved: [u8; 1],
    }
}

impl FrameHead {
    /// The blocks it covers.
    #[must_use]
    pub const fn blocks(&self) -> BlockRange {
        BlockRange { start: self.first_block, end: self.first_block.saturating_add(self.block_count as u64) }
    }

    /// Bytes of head, CRCs and payload.
    #[must_use]
    pub const fn used_bytes(&self) -> u64 {
        let crcs = if self.codec.has_payload() { self.block_count as u64 * 4 } else { 0 };
        Self::BYTES as u64 + crcs + self.stored_bytes as u64
    }

    /// Bytes to the next frame.
    #[must_use]
    pub const fn whole_bytes(&self) -> u64 {
        self.used_bytes() + self.pad_bytes as u64
    }

    /// The same head with the padding its place asks for: up to the next frame, or at the end of a group up to 4 KiB.
    #[must_use]
    pub const fn with_padding(self) -> Self {
        let end = self.offset + self.used_bytes();
        let align = if self.group_left == 0 { UNDO_ALIGN_BYTES } else { FRAME_ALIGN_BYTES };
        Self { pad_bytes: (end.next_multiple_of(align) - end) as u16, ..self }
    }

    /// The bytes with `head_crc` computed over them and the block CRCs that follow.
    #[must_use]
    pub fn sealed_bytes(&self, crcs: &[u8]) -> [u8; Self::BYTES] {
        Self { head_crc: self.crc(crcs), ..*self }.to_bytes()
    }

    fn crc(&self, crcs: &[u8]) -> u32 {
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&Self { head_crc: 0, ..*self }.to_bytes());
        hasher.update(crcs);
        hasher.finalize()
    }

    /// Whether lengths, place and codec fit together; nothing is believed before.
    fn check(&self) -> Result<(), FormatError> {
        let refuse = |field, got, expected| Err(FormatError::Field { what: "Frame", field, got, expected });
        let (count, stored) = (u64::from(self.block_count), u64::from(self.stored_bytes));
        if self.magic != FRAME_MAGIC {
            return refuse("magic", self.magic.into(), "the magic of a frame");
        }
        let blocks_max = if self.codec.has_payload() { FRAME_BLOCKS_MAX } else { EMPTY_FRAME_BLOCKS_MAX };
        if count == 0 || count > blocks_max {
            return refuse("block_count", count, "1 to 16 blocks, or to 262144 without payload");
        }
        if self.blocks().end > DISK_BLOCKS_MAX {
            return refuse("first_block", self.first_block, "blocks of a disk of at most 64 TiB");
        }
        match self.codec {
            UndoCodec::Zeros | UndoCodec::Lost if stored != 0 || self.stored_crc != 0 => {
                return refuse("stored_bytes", stored, "no payload");
            }
            UndoCodec::Raw if stored != count * BLOCK_BYTES || self.stored_crc != 0 => {
                return refuse("stored_bytes", stored, "the plain length, and no CRC of its own");
            }
            UndoCodec::Zstd if stored == 0 || stored >= count * BLOCK_BYTES => {
                return refuse("stored_bytes", stored, "less than the plain length");
            }
            _ => {}
        }
        if self.offset > super::RUN_BYTES_MAX || !self.offset.is_multiple_of(FRAME_ALIGN_BYTES) {
            return refuse("offset", self.offset, "a multiple of 8 in a file");
        }
        if self.group_at == 0 && !self.offset.is_multiple_of(UNDO_ALIGN_BYTES) {
            return refuse("offset", self.offset, "a multiple of 4096 at the front of a group");
        }
        if self.number > COUNTER_MAX {
            return refuse("number", self.number, "a number below 2^63");
        }
        if self.pad_bytes != self.with_padding().pad_bytes {
            return refuse("pad_bytes", self.pad_bytes.into(), "padding to the next frame and no more");
        }
        Ok(())
    }
}

/// A frame with a checked head; its payload is checked by [`Frame::check_stored`] or on opening.
#[derive(Clone, Copy, Debug)]
pub struct Frame<'a> {
    /// The head.
    pub head: FrameHead,
    /// The block CRCs as they are stored.
    pub crcs: &'a [u8],
    /// The stored payload.
    pub payload: &'a [u8],
    /// The padding behind it, where `bytes` held it.
    pub padding: &'a [u8],
}

impl<'a> Frame<'a> {
    /// Reads the frame at the front of `bytes`, which stood at `offset` of a run with this salt.
    ///
    /// # Errors
    /// When the head is damaged or of somewhere else, or `bytes` end before the payload does.
    pub fn read(bytes: &'a [u8], salt: u64, offset: u64) -> Result<Self, FormatError> {
        let (head, rest) = FrameHead::read_prefix(bytes)?;
        head.check()?;
        let crc_bytes = if head.codec.has_payload() { head.block_count as usize * 4 } else { 0 };
        let short =
            FormatError::Short { what: "Frame", got: bytes.len(), expected: head.used_bytes() as usize };
        let (crcs, rest) = rest.split_at_checked(crc_bytes).ok_or_else(|| short.clone())?;
        let expected = head.crc(crcs);
        if head.head_crc != expected {
            return Err(FormatError::Checksum { what: "Frame head", got: head.head_crc, expected });
        }
        if head.salt != salt {
            return Err(FormatError::Field {
                what: "Frame",
                field: "salt",
                got: head.salt,
                expected: "the run's",
            });
        }
        if head.offset != offset {
            return Err(FormatError::Field {
                what: "Frame",
                field: "offset",
                got: head.offset,
                expected: "the place where it stands",
            });
        }
        let (payload, rest) = rest.split_at_checked(head.stored_bytes as usize).ok_or(short)?;
        let padding = rest.get(..usize::from(head.pad_bytes)).unwrap_or(rest);
        Ok(Self { head, crcs, payload, padding })
    }

    /// Checks the stored payload without decompressing it.
    ///
    /// # Errors
    /// When a checksum does not match.
    pub fn check_stored(&self) -> Result<(), FormatError> {
        match self.head.codec {
            UndoCodec::Zeros | UndoCodec::Lost => Ok(()),
            UndoCodec::Zstd => {
                let expected = crc32(self.payload);
                if expected == self.head.stored_crc {
                    return Ok(());
                }
                Err(FormatError::Checksum { what: "frame payload", got: self.head.stored_crc, expected })
            }
            UndoCodec::Raw => match self.sound_blocks(self.payload) {
                (_, Some(error)) => Err(error),
                (_, None) => Ok(()),
            },
        }
    }

    /// Puts the plain data into the front of `plain` and answers which blocks are sound (bit n is block n), and what is
    /// wrong with the first that is not. Raw blocks are judged one by one; a compressed payload is sound or not.
    ///
    /// # Errors
    /// When nothing of the payload can be used: it is compressed and damaged, or the frame has none.
    pub fn open_into(
        &self,
        decompressor: &mut Decompressor,
        plain: &mut [u8],
    ) -> Result<(u32, Option<FormatError>), FormatError> {
        let plain_bytes = self.head.block_count as usize * BLOCK_BYTES as usize;
        let got = plain.len();
        let short = FormatError::Short { what: "buffer of a frame", got, expected: plain_bytes };
        let plain = plain.get_mut(..plain_bytes).ok_or(short)?;
        match self.head.codec {
            UndoCodec::Zeros | UndoCodec::Lost => {
                return Err(FormatError::Payload { what: "Frame", reason: "it has no payload".into() });
            }
            UndoCodec::Raw => {
                for (slot, byte) in
                    plain.chunks_mut(BLOCK_BYTES as usize).zip(self.payload.chunks(BLOCK_BYTES as usize))
                {
                    slot.copy_from_slice(byte); // both are whole blocks: `check` compared the lengths
                }
            }
            UndoCodec::Zstd => {
                self.check_stored()?;
                decompressor
                    .decompress_into(self.payload, plain)
                    .map_err(|error| FormatError::Payload { what: "Frame", reason: error.to_string() })?;
            }
        }
        Ok(self.sound_blocks(plain))
    }

    /// The blocks of `plain` whose CRC matches, and what is wrong with the first one whose does not.
    fn sound_blocks(&self, plain: &[u8]) -> (u32, Option<FormatError>) {
        let (mut sound, mut wrong) = (0_u32, None);
        let blocks = plain.chunks(BLOCK_BYTES as usize);
        for (at, (block, crc)) in blocks.zip(self.crcs.chunks_exact(4)).enumerate() {
            let got = crc.first_chunk().map_or(0, |crc| u32::from_le_bytes(*crc));
            let expected = crc32(block);
            if got == expected {
                sound |= 1 << at;
            } else {
                wrong.get_or_insert(FormatError::Checksum { what: "before-image", got, expected });
            }
        }
        (sound, wrong)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::compress::{Compressor, LEVEL_DEFAULT};

    const SALT: u64 = 0xC0FF_EE00_5A17;

    /// One encoded frame with its padding, alone in its group.
    fn encoded(first_block: u64, codec: UndoCodec, count: u32, plain: &[u8]) -> Vec<u8> {
        let crcs: Vec<u8> = plain.chunks(4096).flat_map(|block| crc32(block).to_le_bytes()).collect();
        let payload = match codec {
            UndoCodec::Raw => plain.to_vec(),
            UndoCodec::Zstd => Compressor::new(LEVEL_DEFAULT).unwrap().compress(plain).unwrap().unwrap(),
            UndoCodec::Zeros | UndoCodec::Lost => Vec::new(),
        };
        let stored_crc = if codec == UndoCodec::Zstd { crc32(&payload) } else { 0 };
        let head = FrameHead {
            magic: FRAME_MAGIC,
            head_crc: 0,
            salt: SALT,
            offset: 8192,
            number: 3,
            first_block,
            block_count: count,
            stored_bytes: payload.len() as u32,
            stored_crc,
            group_at: 0,
            group_left: 0,
            pad_bytes: 0,
            codec,
        }
        .with_padding();
        let mut bytes = head.sealed_bytes(&crcs).to_vec();
        bytes.extend(crcs);
        bytes.extend(payload);
        bytes.resize(head.whole_bytes() as usize, 0);
        assert!(bytes.len().is_multiple_of(4096));
        bytes
    }

    fn samples() -> Vec<(UndoCodec, u32, Vec<u8>, Vec<u8>)> {
        let plain: Vec<u8> = (0..3 * 4096_u32).map(|at| (at / 7) as u8).collect();
        [
            (UndoCodec::Raw, 3, plain.clone()),
            (UndoCodec::Zstd, 3, plain),
            (UndoCodec::Zeros, 100_000, Vec::new()),
            (UndoCodec::Lost, 2, Vec::new()),
        ]
        .into_iter()
        .map(|(codec, count, plain)| (codec, count, encoded(77, codec, count, &plain), plain))
        .collect()
    }

    fn open(bytes: &[u8]) -> Result<(Vec<u8>, u32), FormatError> {
        let frame = Frame::read(bytes, SALT, 8192)?;
        let mut plain = vec![0; FRAME_BLOCKS_MAX as usize * 4096];
        let (sound, _) = frame.open_into(&mut Decompressor::new().unwrap(), &mut plain)?;
        plain.truncate(frame.head.block_count as usize * 4096);
        Ok((plain, sound))
    }

    #[test]
    fn frames_come_back_as_they_went() {
        for (codec, count, bytes, plain) in samples() {
            let frame = Frame::read(&bytes, SALT, 8192).unwrap();
            assert_eq!(
                (frame.head.codec, frame.head.blocks()),
                (codec, BlockRange::new(77, 77 + u64::from(count)))
            );
            assert_eq!(frame.head.whole_bytes() as usize, bytes.len());
            assert!(frame.check_stored().is_ok());
            match codec {
                UndoCodec::Raw | UndoCodec::Zstd => assert_eq!(open(&bytes).unwrap(), (plain, 0b111)),
                UndoCodec::Zeros | UndoCodec::Lost => assert!(open(&bytes).is_err()),
            }
        }
    }

    #[test]
    fn a_frame_is_valid_at_its_own_place_in_its_own_run_only() {
        for (_, _, bytes, _) in samples() {
            assert!(Frame::read(&bytes, SALT + 1, 8192).is_err());
            assert!(Frame::read(&bytes, SALT, 8200).is_err());
        }
    }

    #[test]
    fn every_flipped_bit_is_found_or_lies_in_the_padding() {
        for (codec, _, bytes, plain) in samples() {
            let used = Frame::read(&bytes, SALT, 8192).unwrap().head.used_bytes() as usize;
            for bit in 0..bytes.len() * 8 {
                let mut damaged = bytes.clone();
                damaged[bit / 8] ^= 1 << (bit % 8);
                let Ok(frame) = Frame::read(&damaged, SALT, 8192) else { continue };
                if bit / 8 >= used {
                    assert!(frame.padding.iter().any(|byte| *byte != 0), "seen in the padding");
                    continue;
                }
                assert!(frame.check_stored().is_err(), "{codec:?} bit {bit}");
                if let Ok((got, sound)) = open(&damaged) {
                    for block in 0..3 {
                        let place = block * 4096..(block + 1) * 4096;
                        assert!(sound & (1 << block) == 0 || got[place.clone()] == plain[place], "bit {bit}");
                    }
                    assert_eq!(sound.count_ones(), 2, "{codec:?}: the other raw blocks stay readable");
                }
            }
        }
    }

    #[test]
    fn every_truncation_is_an_error() {
        for (_, _, bytes, _) in samples() {
            let used = Frame::read(&bytes, SALT, 8192).unwrap().head.used_bytes() as usize;
            for len in 0..used {
                assert!(Frame::read(&bytes[..len], SALT, 8192).is_err());
            }
        }
    }

    proptest! {
        #[test]
        fn heads_with_sound_checksums_and_any_fields_never_panic(
            mut head in proptest::collection::vec(any::<u8>(), FrameHead::BYTES), tail in 0..200_usize,
        ) {
            head[..4].copy_from_slice(&FRAME_MAGIC.to_le_bytes());
            head[62] %= 4;
            head[63] = 0;
            let mut bytes = head;
            bytes.resize(bytes.len() + tail, 0);
            if let Ok((parsed, rest)) = FrameHead::read_prefix(&bytes) {
                let crc_bytes = if parsed.codec.has_payload() { parsed.block_count as usize * 4 } else { 0 };
                let crcs = rest.get(..crc_bytes).unwrap_or_default().to_vec();
                let sealed = parsed.sealed_bytes(&crcs);
                bytes[..FrameHead::BYTES].copy_from_slice(&sealed);
                let _ = Frame::read(&bytes, parsed.salt, parsed.offset);
            }
        }
    }
}
