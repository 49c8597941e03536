//! Seeded mutations of inputs: what the stable toolchain does in place of coverage guidance.
//!
//! Invariant: the same seed makes the same inputs on every machine, so a failure is named by target, corpus file and
//! seed alone.

/// A small generator (xorshift64*); quality matters little here, sameness everywhere does.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// A generator for `seed`.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed ^ 0x9e37_79b9_7f4a_7c15 | 1)
    }

    /// The next number.
    pub const fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 8
    }

    /// A number below `bound`; zero when `bound` is.
    pub const fn below(&mut self, bound: usize) -> usize {
        if bound == 0 { 0 } else { self.next() as usize % bound }
    }
}

const INTERESTING: &[u64] = &[
    0,
    1,
    0x7f,
    0x80,
    0xff,
    0x100,
    0x1fff,
    0x2000,
    0x2001,
    0x7fff,
    0xffff,
    0x1_0000,
    0x10_0000,
    0x40_0000,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x7fff_ffff_ffff_ffff,
    0x8000_0000_0000_0000,
    0xffff_ffff_ffff_ffff,
];

/// One to four mutations of `data`; `other` is what pieces are spliced from; the result is at most `bytes_max` long.
pub fn mutate(random: &mut Random, data: &[u8], other: &[u8], bytes_max: usize) -> Vec<u8> {
    let mut out = data.to_vec();
    for _ in 0..=random.below(4) {
        let at = random.below(out.len());
        match random.below(8) {
            0 | 1 => {
                if let Some(byte) = out.get_mut(at) {
                    *byte ^= 1 << random.below(8);
                }
            }
            2 => out.truncate(at),
            3 => out.extend((0..=random.below(64)).map(|_| random.next() as u8).collect::<Vec<_>>()),
            4 => {
                let from = random.below(other.len());
                let piece = &other[from..(from + 1 + random.below(64)).min(other.len())];
                let end = (at + piece.len() * random.below(2)).min(out.len());
                out.splice(at..end, piece.iter().copied());
            }
            5 => {
                let end = (at + 1 + random.below(32)).min(out.len());
                let piece = out[at..end].to_vec();
                let to = random.below(out.len());
                out.splice(to..to, piece);
            }
            6 => {
                let end = (at + 1 + random.below(32)).min(out.len());
                out.drain(at..end);
            }
            _ => {
                let value = INTERESTING[random.below(INTERESTING.len())].to_le_bytes();
                let width = 1 << random.below(4);
                for (slot, byte) in out.iter_mut().skip(at).zip(&value[..width]) {
                    *slot = *byte;
                }
            }
        }
    }
    out.truncate(bytes_max);
    out
}
