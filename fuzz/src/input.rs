//! Reads choices from fuzz input: small numbers, picks from lists, runs of bytes. Reads zeros behind the end, so that
//! every prefix of a script is a script.

/// What is left of the input.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a> {
    bytes: &'a [u8],
}

impl<'a> Input<'a> {
    /// All of `bytes`.
    #[must_use]
    pub const fn new(bytes: &'a [u8]) -> Self {
        Self { bytes }
    }

    /// The next byte, or `None` at the end: asked for before each step of a script.
    pub fn step(&mut self) -> Option<u8> {
        let (first, rest) = self.bytes.split_first()?;
        self.bytes = rest;
        Some(*first)
    }

    /// The next byte, zero behind the end.
    pub fn byte(&mut self) -> u8 {
        self.step().unwrap_or(0)
    }

    /// The next two bytes as a number.
    pub fn short(&mut self) -> u64 {
        u64::from(self.byte()) | u64::from(self.byte()) << 8
    }

    /// One of `choices`.
    ///
    /// # Panics
    /// When there are none.
    pub fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[usize::from(self.byte()) % choices.len()]
    }

    /// Up to `len` of the next bytes.
    pub fn take(&mut self, len: usize) -> &'a [u8] {
        let (mine, rest) = self.bytes.split_at(len.min(self.bytes.len()));
        self.bytes = rest;
        mine
    }

    /// `base`, near it, or something extreme: what a hostile peer would put where `base` belongs.
    pub fn near(&mut self, base: u64) -> u64 {
        match self.byte() {
            0..=237 => base,
            238..=242 => base.saturating_add(1),
            243..=247 => base.saturating_sub(1),
            248..=249 => 0,
            250 => u64::MAX >> 1,
            251..=254 => base.saturating_add(self.short()),
            255 => u64::MAX,
        }
    }
}
