//! zstd for records: into bounded buffers, out of untrusted bytes, at a level that follows link and processor.
//!
//! Invariants: a stored record is one zstd frame with its content size and nothing after it; compression is used
//! only where it saves at least 6 %, else the record travels plain; decompression writes into a buffer of exactly
//! the promised size and allocates nothing that its input could choose (it decodes in one piece, so a frame's
//! window is the buffer itself). Units: bytes. Contexts are costly and reused: one per worker thread.
//! Called by the agent and process server (compressing), the master target (decompressing) and the journal.

use zstd::zstd_safe;
use zstd_safe::zstd_sys::ZSTD_ErrorCode;

use crate::error::{Answer, Severity};
use crate::units::MonoTime;

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

/// The most a compressed record may take for compression to be worth its decompression.
fn stored_bytes_max(plain_bytes: usize) -> usize {
    plain_bytes - plain_bytes.div_ceil(100) * 6.min(plain_bytes)
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
