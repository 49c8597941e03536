//! Cutting the data of a chunk into records: where the zeros are, and how long a record may be.
//!
//! Invariants: the records cover exactly the wanted pieces, ascending, without overlap; a run of zeros of at least
//! [`ZERO_RUN_BYTES_MIN`] that is aligned to blocks becomes a ZERO record, shorter ones stay in the data (they
//! compress to nothing and would cost a record each). Payload is shared with the chunk, never copied. Units: sectors.

use bytes::Bytes;

use crate::checksum::is_zero;
use crate::format::extent::Record;
use crate::units::{BLOCK_BYTES, SECTOR_BYTES, SectorRange};

/// Shortest run of zeros that becomes a record of its own.
pub const ZERO_RUN_BYTES_MIN: u64 = 64 << 10;

/// Records for the `pieces` of a chunk whose `data` begin at sector `start`; no record is longer than
/// `record_bytes_max`.
///
/// # Panics
/// When a piece lies outside the data.
#[must_use]
pub fn cut_records(start: u64, data: &Bytes, pieces: &[SectorRange], record_bytes_max: u64) -> Vec<Record> {
    let mut records = Vec::new();
    for piece in pieces {
        let from = ((piece.start - start) * SECTOR_BYTES) as usize;
        let plain = data.slice(from..from + piece.bytes() as usize);
        for (range, zero) in zero_runs(*piece, &plain) {
            if zero {
                records.push(Record::zeros(range));
                continue;
            }
            for part in range.aligned_pieces(record_bytes_max / SECTOR_BYTES) {
                let at = ((part.start - piece.start) * SECTOR_BYTES) as usize;
                records.push(Record::data(part.start, plain.slice(at..at + part.bytes() as usize)));
            }
        }
    }
    records
}

/// Splits a piece into runs of zeros (long enough to matter, or the whole piece) and runs of data.
fn zero_runs(piece: SectorRange, plain: &[u8]) -> Vec<(SectorRange, bool)> {
    let mut runs: Vec<(SectorRange, bool)> = Vec::new();
    for block in piece.aligned_pieces(BLOCK_BYTES / SECTOR_BYTES) {
        let at = ((block.start - piece.start) * SECTOR_BYTES) as usize;
        let zero = plain.get(at..at + block.bytes() as usize).is_some_and(is_zero);
        match runs.last_mut() {
            Some((run, kind)) if *kind == zero => run.end = block.end,
            _ => runs.push((block, zero)),
        }
    }
    if runs.len() == 1 {
        return runs;
    }
    let mut merged: Vec<(SectorRange, bool)> = Vec::with_capacity(runs.len());
    for (run, zero) in runs {
        let zero = zero && run.bytes() >= ZERO_RUN_BYTES_MIN;
        match merged.last_mut() {
            Some((last, kind)) if *kind == zero => last.end = run.end,
            _ => merged.push((run, zero)),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::extent::RecordKind;

    fn chunk(blocks: &[u8]) -> Bytes {
        blocks.iter().flat_map(|byte| [*byte; 4096]).collect()
    }

    #[test]
    fn long_runs_of_zeros_become_records_and_short_ones_stay_data() {
        let mut blocks = vec![7_u8; 64];
        blocks[10..12].fill(0);
        blocks[20..40].fill(0);
        let whole = SectorRange::new(800, 800 + 64 * 8);
        let records = cut_records(800, &chunk(&blocks), &[whole], 1 << 20);
        let shape: Vec<_> = records.iter().map(|r| (r.kind(), r.range().len() / 8)).collect();
        assert_eq!(shape, [(RecordKind::Data, 20), (RecordKind::Zero, 20), (RecordKind::Data, 24)]);
    }

    #[test]
    fn a_piece_of_nothing_but_zeros_is_one_zero_record_however_short() {
        let records = cut_records(0, &chunk(&[0, 1]), &[SectorRange::new(0, 8)], 1 << 20);
        assert_eq!(records.iter().map(Record::kind).collect::<Vec<_>>(), [RecordKind::Zero]);
    }

    #[test]
    fn records_end_at_multiples_of_the_record_size() {
        let records = cut_records(8, &chunk(&[1; 40]), &[SectorRange::new(8, 328)], 64 << 10);
        let lens: Vec<_> = records.iter().map(|r| r.range().len()).collect();
        assert_eq!(lens, [120, 128, 72]);
    }
}
