//! zstd into bounded buffers.
