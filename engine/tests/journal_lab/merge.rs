//! Two adjacent undo runs become one, in the order the manifest prescribes: new file, edit, then the inputs go.
//!
//! Invariant: a crash at any step leaves either both inputs or the merged run named. Units: undo epochs. Called by the
//! tests; the master target's retention has its own, with policy.

use std::sync::Arc;

use reprotect_engine::format::manifest::{Edit, RunsMerged};
use reprotect_engine::store::journal::applier::run_path;
use reprotect_engine::store::journal::undo::{RunIdentity, SealedRun, merge, merged_header};
use reprotect_engine::store::journal::{Journal, JournalError, Run, RunFile};
use reprotect_engine::units::DiskId;

use crate::journal_lab::{NOW, POSITION};

pub(crate) fn merge_runs(
    journal: &mut Journal,
    disk: DiskId,
    older: Run,
    newer: Run,
) -> Result<(), JournalError> {
    let files = Arc::clone(journal.files());
    let open = |run: Run| {
        let identity = RunIdentity {
            journal: journal.id(),
            disk,
            lineage: POSITION.lineage,
            generation: POSITION.generation,
            undo_epoch: run.first,
            undo_epoch_last: run.last,
        };
        SealedRun::open(&*files, &run_path(journal, disk, run.file), &identity)
    };
    let (mut a, mut b) = (open(older)?, open(newer)?);
    let number = older.first * 1000 + newer.last;
    let path = run_path(journal, disk, RunFile::Merged(number));
    let header = merged_header(a.header(), b.header(), (number << 12) | 0xabc);
    let run_bytes = merge(&mut a, &mut b, &*files, &path, header)?.len_bytes();
    let merged = RunsMerged { disk, first: older.first, last: newer.last, run: number, run_bytes };
    journal.edit(&[Edit::RunsMerged(merged)], NOW)?;
    for input in [older, newer] {
        files.remove(&run_path(journal, disk, input.file))?;
    }
    Ok(())
}
