//! The compiled capture programs, as `build.rs` made them.
//!
//! Invariant: the bytes are aligned, because an object file is read in place. Called by `loader`.

/// For typed tracepoints.
pub(crate) static TYPED: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/capture_typed.o"));
/// For kernels without them.
pub(crate) static RAW: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/capture_raw.o"));

/// Tells builds of the programs from one another.
pub(crate) fn build() -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(TYPED).update(RAW);
    hasher.finalize().to_hex()[..16].to_owned()
}
