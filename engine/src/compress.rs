//! zstd into bounded buffers.
/// temp
pub struct Decompressor;
impl Decompressor {
    /// temp
    /// # Errors
    /// never
    pub fn decompress_into(&mut self, _s: &[u8], _d: &mut [u8]) -> Result<(), std::io::Error> {
        Ok(())
    }
}
