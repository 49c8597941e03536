//! zstd for records: into bounded buffers, out of untrusted bytes, at a level that follows link and processor.
//!
//! Invariants: a stored record is one zstd frame with its content size and nothing after it; compression is used
//! only where it saves at least 6 %, else the record travels plain; decompression writes into a buffer of exactly
//! the promised size and allocates nothing that its input could choose (it decodes in one piece, so a frame's
//! window is the buffer itself). Units: bytes. Contexts are costly and reused: one per worker thread.
//! Called by the agent and process server (compressing), the master target (decompressing) and the journal.

mod level;

use zstd::zstd_safe;
use zstd_safe::zstd_sys::ZSTD_ErrorCode;

pub use self::level::{EVIDENCE_NANOS, HOLD_NANOS_MAX, HOLD_NANOS_MIN, LevelController, Load};
use crate::error::{Answer, Severity};

/// The levels in use, fastest first. Zero is left out: zstd takes it for its default, three.
pub const LEVELS: [i32; 8] = [-5, -4, -3, -2, -1, 1, 2, 3];
/// The level to begin with: most of the ratio at a fraction of the cost.
pub const LEVEL_DEFAULT: i32 = -1;

/// A record that could not be compressed or decompressed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CompressError {
    /// zstd refused to work on our side: out of memory.
    #[error("zstd cannot compress: {reason}; give the daemon more memory")]
    Compressor {
        /// zstd's words.
        reason: &'static str,
    },
    /// The stored bytes are no zstd frame, or say nothing of their size.
    #[error(
        "stored record of {stored_bytes} bytes is no zstd frame with a content size; it must be sent again"
    )]
    NoContentSize {
        /// Length of what was given.
        stored_bytes: usize,
    },
    /// The frame promises another size than the record.
    #[error("stored record holds {got} bytes instead of {expected}; it must be sent again")]
    ContentSize {
        /// What the frame says.
        got: u64,
        /// What the record says.
        expected: u64,
    },
    /// There is something after the frame, or the frame is cut.
    #[error("stored record of {stored_bytes} bytes is not exactly one zstd frame; it must be sent again")]
    NotOneFrame {
        /// Length of what was given.
        stored_bytes: usize,
    },
    /// The frame is damaged.
    #[error("stored record is damaged: {reason}; it must be sent again")]
    Damaged {
        /// zstd's words.
        reason: &'static str,
    },
}

impl Answer for CompressError {
    fn severity(&self) -> Severity {
        match self {
            Self::Compressor { .. } => Severity::Stop,
            _ => Severity::Resync,
        }
    }
}

/// A reusable compressor; one per worker thread.
pub struct Compressor {
    context: zstd_safe::CCtx<'static>,
    level: i32,
}

impl Compressor {
    /// A compressor at `level`, which is moved into −5..=3.
    ///
    /// # Errors
    /// When there is no memory for it.
    pub fn new(level: i32) -> Result<Self, CompressError> {
        let context = zstd_safe::CCtx::try_create()
            .ok_or(CompressError::Compressor { reason: "no memory for its context" })?;
        let mut compressor = Self { context, level: 0 };
        compressor.set_level(level)?;
        Ok(compressor)
    }

    /// Changes the level from the next record on; moved into −5..=3.
    ///
    /// # Errors
    /// When zstd refuses it.
    pub fn set_level(&mut self, level: i32) -> Result<(), CompressError> {
        let level = if level == 0 { LEVEL_DEFAULT } else { level.clamp(LEVELS[0], LEVELS[LEVELS.len() - 1]) };
        if level != self.level {
            self.context
                .set_parameter(zstd_safe::CParameter::CompressionLevel(level))
                .map_err(|code| CompressError::Compressor { reason: zstd_safe::get_error_name(code) })?;
            self.level = level;
        }
        Ok(())
    }

    /// The level in use.
    #[must_use]
    pub fn level(&self) -> i32 {
        self.level
    }

    /// Compresses one record; `None` when that saves under 6 %: send it plain then.
    ///
    /// # Errors
    /// When zstd fails on our side.
    pub fn compress(&mut self, plain: &[u8]) -> Result<Option<Vec<u8>>, CompressError> {
        let mut stored = Vec::new();
        Ok(self.compress_into(plain, &mut stored)?.then_some(stored))
    }

    /// As [`Self::compress`], into a buffer that is reused; whether it holds the compressed record (otherwise its
    /// content is unspecified).
    ///
    /// # Errors
    /// As for [`Self::compress`].
    pub fn compress_into(&mut self, plain: &[u8], stored: &mut Vec<u8>) -> Result<bool, CompressError> {
        let limit = stored_bytes_max(plain.len());
        stored.clear();
        stored.reserve_exact(limit);
        match self.context.compress2(stored, plain) {
            Ok(_) => Ok(stored.len() <= limit),
            // The buffer is no larger than what is worth having, so zstd stops as soon as it is not.
            Err(code) if zstd_safe::is_error_kind(code, ZSTD_ErrorCode::ZSTD_error_dstSize_tooSmall) => {
                Ok(false)
            }
            Err(code) => Err(CompressError::Compressor { reason: zstd_safe::get_error_name(code) }),
        }
    }
}

impl std::fmt::Debug for Compressor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Compressor").field("level", &self.level).finish_non_exhaustive()
    }
}

/// The most a compressed record may take for compression to be worth its decompression: 94 %.
fn stored_bytes_max(plain_bytes: usize) -> usize {
    plain_bytes - (plain_bytes / 50 * 3 + plain_bytes % 50 * 3 / 50)
}

/// A reusable decompressor for untrusted bytes; one per worker thread.
pub struct Decompressor {
    context: zstd_safe::DCtx<'static>,
}

impl Decompressor {
    /// A decompressor.
    ///
    /// # Errors
    /// When there is no memory for it.
    pub fn new() -> Result<Self, CompressError> {
        let context = zstd_safe::DCtx::try_create()
            .ok_or(CompressError::Compressor { reason: "no memory for a decompression context" })?;
        Ok(Self { context })
    }

    /// Decompresses one record into `plain`, whose length is what the record's header promised; the caller has
    /// bounded it by the record's kind. On error its content is unspecified.
    ///
    /// # Errors
    /// When `stored` is not exactly one sound frame of exactly that size.
    pub fn decompress_into(&mut self, stored: &[u8], plain: &mut [u8]) -> Result<(), CompressError> {
        let no_size = CompressError::NoContentSize { stored_bytes: stored.len() };
        let Ok(Some(got)) = zstd_safe::get_frame_content_size(stored) else { return Err(no_size) };
        let expected = plain.len() as u64;
        if got != expected {
            return Err(CompressError::ContentSize { got, expected });
        }
        if zstd_safe::find_frame_compressed_size(stored) != Ok(stored.len()) {
            return Err(CompressError::NotOneFrame { stored_bytes: stored.len() });
        }
        let written = self
            .context
            .decompress(plain, stored)
            .map_err(|code| CompressError::Damaged { reason: zstd_safe::get_error_name(code) })?;
        if written as u64 != expected {
            return Err(CompressError::ContentSize { got: written as u64, expected });
        }
        Ok(())
    }
}

impl std::fmt::Debug for Decompressor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Decompressor").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn text(len: usize) -> Vec<u8> {
        (0..len).map(|at| b"the path of one write "[at % 22] ^ u8::from(at % 1000 == 7)).collect()
    }

    fn noise(len: usize) -> Vec<u8> {
        let mut state = 0x9E37_79B9_7F4A_7C15_u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        };
        std::iter::repeat_with(&mut next).flatten().take(len).collect()
    }

    fn stored(plain: &[u8]) -> Vec<u8> {
        Compressor::new(LEVEL_DEFAULT)
            .expect("context")
            .compress(plain)
            .expect("compress")
            .expect("compressible")
    }

    fn decompress(stored: &[u8], len: usize) -> Result<Vec<u8>, CompressError> {
        let mut plain = vec![0; len];
        Decompressor::new().expect("context").decompress_into(stored, &mut plain).map(|()| plain)
    }

    proptest! {
        #[test]
        fn what_was_compressed_comes_back(
            runs in proptest::collection::vec((any::<u8>(), 1..2000_usize), 1..60), level in -7..=5_i32,
        ) {
            let plain: Vec<u8> = runs.iter().flat_map(|(byte, len)| std::iter::repeat_n(*byte, *len)).collect();
            let mut compressor = Compressor::new(level).expect("context");
            prop_assert!(LEVELS.contains(&compressor.level()));
            if let Some(stored) = compressor.compress(&plain).expect("compress") {
                prop_assert!(stored.len() * 100 <= plain.len() * 94 + 100);
                prop_assert_eq!(decompress(&stored, plain.len()), Ok(plain));
            }
        }

        #[test]
        fn damaged_bytes_are_refused_or_fill_the_buffer_and_never_panic(
            at in any::<prop::sample::Index>(), flip in 1..=255_u8, cut in any::<prop::sample::Index>(),
        ) {
            let mut bytes = stored(&text(20_000));
            prop_assert!(decompress(&bytes[..cut.index(bytes.len())], 20_000).is_err(), "cut short");
            let at = at.index(bytes.len());
            bytes[at] ^= flip;
            if let Ok(plain) = decompress(&bytes, 20_000) {
                prop_assert_eq!(plain.len(), 20_000); // the fragment CRCs above find what zstd cannot
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), len in 0..5000_usize) {
            let _ = decompress(&bytes, len);
            let framed = [&[0x28, 0xB5, 0x2F, 0xFD][..], &bytes].concat();
            let _ = decompress(&framed, len);
        }
    }

    #[test]
    fn what_saves_under_six_percent_stays_plain() {
        let mut compressor = Compressor::new(3).expect("context");
        assert_eq!(compressor.compress(&noise(1 << 20)), Ok(None));
        assert_eq!(compressor.compress(&[]), Ok(None));
        for (zeros, worth) in [(3_000, false), (9_000, true)] {
            let mut plain = noise(100_000);
            plain[..zeros].fill(0);
            assert_eq!(compressor.compress(&plain).expect("compress").is_some(), worth, "{zeros} zeros");
        }
        // A buffer left over from something larger does not change the rule.
        let mut reused = Vec::with_capacity(1 << 20);
        assert_eq!(compressor.compress_into(&noise(10_000), &mut reused), Ok(false));
        assert_eq!(compressor.compress_into(&text(10_000), &mut reused), Ok(true));
    }

    #[test]
    fn the_limit_is_ninety_four_percent_for_every_length() {
        for len in (0..3000).chain([65_536, 1 << 20, usize::MAX]) {
            let exact = len as u128 - len as u128 * 6 / 100;
            assert_eq!(stored_bytes_max(len) as u128, exact, "{len}");
        }
    }

    #[test]
    fn a_compression_bomb_is_refused_by_its_header_and_by_its_blocks() {
        let bomb = stored(&vec![0; 64 << 20]);
        assert!(bomb.len() < 16 << 10);
        let expected = 64 << 10;
        assert_eq!(
            decompress(&bomb, expected as usize),
            Err(CompressError::ContentSize { got: 64 << 20, expected }),
        );
        // The same frame with a lie in its header: a window byte, then the content size in four.
        assert_eq!(bomb[4] & 0xE0, 0x80, "the layout this test edits");
        let mut lying = bomb;
        lying[6..10].copy_from_slice(&(expected as u32).to_le_bytes());
        assert!(matches!(decompress(&lying, expected as usize), Err(CompressError::Damaged { .. })));
    }

    #[test]
    fn a_frame_without_its_size_or_with_company_is_refused() {
        let plain = text(5000);
        let mut context = zstd_safe::CCtx::create();
        context.set_parameter(zstd_safe::CParameter::ContentSizeFlag(false)).expect("parameter");
        let mut anonymous = Vec::with_capacity(6000);
        context.compress2(&mut anonymous, &plain).expect("compress");
        let stored_bytes = anonymous.len();
        assert_eq!(decompress(&anonymous, 5000), Err(CompressError::NoContentSize { stored_bytes }));

        let frame = stored(&plain);
        let skippable = [0x50, 0x2A, 0x4D, 0x18, 0, 0, 0, 0];
        for company in [&frame[..], &skippable, b"x"] {
            let stored = [&frame, company].concat();
            let error = CompressError::NotOneFrame { stored_bytes: stored.len() };
            assert_eq!(decompress(&stored, 5000), Err(error));
        }
        assert_eq!(decompress(&frame, 5000), Ok(plain));
    }
}
