//! The ring's end cuts records, and they are read whole.
//!
//! Called by `cargo test`; needs root, eBPF and fio, and says SKIPPED without.

mod capture_lab;

use std::fs::OpenOptions;
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use capture_lab::{Loop, capable, machine};
use reprotect_agent::capture::{Capture, CaptureError, CaptureSettings, let_go};
use reprotect_engine::units::SECTOR_BYTES;

const RING_BYTES: u32 = 1 << 20;
/// Lengths whose records do not fill a ring evenly.
const LENGTHS: [usize; 3] = [4096, 12288, 20480];

#[test]
fn records_that_the_end_of_the_ring_cuts_are_read_whole() {
    let _turn = machine();
    if !capable() {
        return;
    }
    for plainest in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let device = Loop::new(dir.path(), "disk", 16);
        let usual = CaptureSettings::new("ring", dir.path().to_owned());
        let settings = CaptureSettings { ring_bytes: RING_BYTES, plainest, ..usual };
        let mut capture = Capture::start(&settings).unwrap();
        let (slot, _) = capture.follow(device.disk(), "x").unwrap();
        capture.prove_data(slot).unwrap();
        capture.record_all(true).unwrap();
        let file = OpenOptions::new().write(true).custom_flags(libc::O_DIRECT).open(&device.path).unwrap();
        let mut memory = vec![0_u8; 2 * 20480];
        let start = memory.as_ptr().align_offset(4096);
        let (mut written, mut turn) = (0, 0);
        // Three times round, in which at least one record is cut each time.
        while written < 3 * RING_BYTES as usize {
            let length = LENGTHS[turn % LENGTHS.len()];
            let data = &mut memory[start..start + length];
            for (at, byte) in data.iter_mut().enumerate() {
                *byte = (at / 7 + turn * 31) as u8;
            }
            let offset = (turn % 512 * 20480) as u64;
            file.write_all_at(data, offset).unwrap();
            let mut seen = Vec::new();
            let drained = capture.drain::<CaptureError>(capture.stream_end(), |record| {
                assert_eq!(record.range.start, (offset + seen.len() as u64) / SECTOR_BYTES);
                seen.extend_from_slice(record.data);
                Ok(())
            });
            assert!(drained.unwrap().complete);
            assert!(seen == *data, "write {turn} of {length} bytes is not what was recorded");
            (written, turn) = (written + length, turn + 1);
        }
        assert_eq!(capture.counts(slot).unrecorded, 0);
        drop(capture);
        let_go("ring").unwrap();
    }
}
