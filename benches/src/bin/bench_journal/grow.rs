//! What a record costs while the journal grows a hundredfold, and how long such a log takes to open.
//!
//! Small batches, a commit every 256; nothing is released. What the medium takes for the same writes changes with its
//! other guests, so the cost is also given without it. A log of 100 GB does not fit every machine: seconds per GB, with
//! the indexes of its segments and, in the same run, without.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use reprotect_engine::format::segment::{Applied, EntryKind};
use reprotect_engine::store::files::Files;
use reprotect_engine::store::journal::{Journal, JournalSettings};

use super::counting::{Class, Counting};
use super::world::{Batches, NOW, add, disk_id, open_or_create, resident_mib, retention};
use super::{Report, setting};

const SEGMENT_BYTES: u64 = 256 << 20;
const GROUP: u64 = 256;

pub(crate) fn run(folder: &Path, report: &mut Report) {
    let records = setting("GROW", 300_000).next_multiple_of(100 * GROUP);
    let (files, retention) = (Counting::new(), retention(folder));
    let mut journal = open_or_create(&files, &retention, SEGMENT_BYTES);
    add(&mut journal, 0, 1 << 20);
    let body = Batches::new(false).batch(0, std::iter::once(7));
    journal.prepare((records * (body.len() as u64 + 100) / SEGMENT_BYTES) as usize + 2).expect("room");
    let (mut costs, mut own_costs) = (Vec::new(), Vec::new());
    for _ in 0..records / GROUP {
        let (begun, before) = (Instant::now(), files.counts());
        for _ in 0..GROUP {
            journal.append(disk_id(0), EntryKind::Batch, &[&body], NOW).expect("room in the log");
        }
        journal.commit(NOW).expect("a commit");
        let took = begun.elapsed().as_secs_f64();
        let done = files.counts().since(&before);
        costs.push(took * 1e6 / GROUP as f64);
        own_costs.push((took - done.busy_s()) * 1e6 / GROUP as f64);
    }
    // The first hundredth against the last; of each the middle one of its commits, for one commit is noise.
    let part = costs.len() / 100;
    for (what, costs) in [("", &mut costs), (" without writes and flushes", &mut own_costs)] {
        let last = middle(&mut costs.split_off(costs.len() - part));
        let first = middle(&mut costs[..part]);
        report.note(format!("cost of a record{what}, us, first hundredth"), first);
        report.note(format!("cost of a record{what}, us, last hundredth"), last);
        report.held(format!("last over first{what}"), last / first, '<', 1.25);
    }
    // All of it is applied, as nearly all of a log is that is kept for its points.
    let applied = Applied { number: records, epoch: 0, undo_bytes: 0 };
    journal.append_applied(disk_id(0), applied, NOW).expect("room in the log");
    journal.commit(NOW).expect("a commit");
    let log_gb = journal.entries(disk_id(0)).iter().map(|entry| entry.place.bytes).sum::<u64>() as f64 / 1e9;
    drop(journal);
    report.note("opening after a crash: GB of log", log_gb);
    let indexed = open(&files, &retention, records, "with indexes", log_gb, report);
    forget_indexes(&retention);
    let read = open(&files, &retention, records, "without indexes", log_gb, report);
    report.note("opening with indexes over without", indexed / read);
    // The newest segment is read whatever the size of the log.
    let newest = (read / log_gb * SEGMENT_BYTES as f64 / 1e9).min(indexed);
    let of_100_gb = newest + 100.0 * (indexed - newest) / log_gb;
    report.held("opening 100 GB of such a log with indexes, s", of_100_gb, '<', 10.0);
}

/// The middle one; there is one.
fn middle(costs: &mut [f64]) -> f64 {
    costs.sort_by(f64::total_cmp);
    costs[costs.len() / 2]
}

/// Opens the journal; answers the seconds it took.
fn open(
    files: &Counting,
    retention: &Path,
    records: u64,
    how: &str,
    log_gb: f64,
    report: &mut Report,
) -> f64 {
    let (before, counts) = (resident_mib(), files.counts());
    let begun = Instant::now();
    let opener: Arc<dyn Files> = Arc::new(files.clone());
    let settings = JournalSettings { segment_bytes: SEGMENT_BYTES };
    let (journal, found) = Journal::open(opener, retention, settings, NOW).expect("it opens");
    let took = begun.elapsed().as_secs_f64();
    assert_eq!(journal.entries(disk_id(0)).len() as u64, records, "every record is there");
    let read = files.counts().since(&counts).of(Class::Log).read_bytes as f64 / 1e9;
    report.note(format!("opening after a crash, {how}: segments not read"), found.indexed as f64);
    report.note(format!("opening after a crash, {how}: GB read"), read);
    report.note(format!("opening after a crash, {how}, s"), took);
    report.note(format!("opening after a crash, {how}, s per GB of log"), took / log_gb);
    report.note(format!("memory of the opened journal, {how}, MiB"), resident_mib() - before);
    took
}

/// Takes the head of each segment's index away, as if an older program had written the log.
fn forget_indexes(retention: &Path) {
    use std::os::unix::fs::FileExt as _;
    for entry in std::fs::read_dir(retention).expect("the retention folder") {
        let path = entry.expect("a file").path();
        if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("redo-")) {
            let file = std::fs::File::options().write(true).open(&path).expect("a segment");
            let bytes = file.metadata().expect("its length").len();
            file.write_all_at(&[0; 4096], bytes - 4096).expect("it is written");
            file.sync_all().expect("it is flushed");
        }
    }
}
