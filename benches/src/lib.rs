//! Shared data of the benches: seeded, and shaped like what disks hold.
//!
//! Invariant: the same seed gives the same bytes on every machine, so that figures of two versions compare.

use bytes::Bytes;

/// A small seeded generator (xorshift64*), good enough to look random to zstd.
#[derive(Clone, Debug)]
pub struct Seeded(u64);

impl Seeded {
    /// A generator; `seed` must not be zero.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub const fn next_u64(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }
}

/// What a buffer looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// Log lines: compresses about fivefold.
    Text,
    /// Records of mixed fields: compresses about twofold.
    Mixed,
    /// Noise: does not compress.
    Noise,
    /// Zeros.
    Zeros,
}

/// `bytes` bytes of a shape.
#[must_use]
pub fn data(shape: Shape, bytes: usize) -> Bytes {
    let mut seeded = Seeded::new(0x5EED);
    let mut out = Vec::with_capacity(bytes + 128);
    while out.len() < bytes {
        let number = seeded.next_u64();
        match shape {
            Shape::Zeros => out.resize(bytes, 0),
            Shape::Noise => out.extend_from_slice(&number.to_le_bytes()),
            Shape::Mixed => {
                out.extend_from_slice(&number.to_le_bytes());
                out.extend_from_slice(&(number % 1000).to_le_bytes());
            }
            Shape::Text => out.extend_from_slice(
                format!(
                    "2026-11-23T10:{:02}:{:02} host{} unit[{}]: request took {} us\n",
                    number % 60,
                    number >> 8 & 31,
                    number >> 16 & 15,
                    number >> 24 & 4095,
                    number >> 40 & 0xffff
                )
                .as_bytes(),
            ),
        }
    }
    out.truncate(bytes);
    out.into()
}
