//! What is found damaged of the retention journal becomes durable knowledge of it, whoever found it.
//!
//! Invariants: other runs are asked for older images without the journal's lock; that a record could not be written is
//! told and stops nothing, for whoever meets the damage next records it. Units: blocks. Called by the scrub and by disks'
//! threads.

use std::sync::Arc;

use reprotect_engine::net::wall_clock;
use reprotect_engine::store::journal::rot::{Found, reach};
use reprotect_engine::store::journal::scrub::RunPlace;
use reprotect_engine::store::journal::undo::BlockRange;
use reprotect_engine::store::journal::{Journal, JournalError};
use reprotect_engine::units::{BLOCK_BYTES, DiskId};

use crate::retention::Retention;

/// Records what a reading of a run found. `whole`: all of the run was read.
///
/// # Errors
/// When the manifest cannot be written.
pub(crate) fn note_run(
    retention: &Retention,
    place: &RunPlace,
    found: Vec<Found>,
    whole: bool,
) -> Result<(), JournalError> {
    let (files, older) = {
        let mut locked = retention.lock();
        let journal = locked.get()?;
        (Arc::clone(journal.files()), journal.older_runs(place)?)
    };
    let reached = reach(&*files, &older, found);
    if retention.lock().get()?.note_run(place, &reached, whole, wall_clock())? {
        let (disk, path) = (place.disk, place.path.display());
        tracing::error!(%disk, %path, "points that need damaged before-images are damaged; `points` says which");
    }
    Ok(())
}

/// Records what an error of reading `bytes` of a point says to be damaged.
pub(crate) fn note_error(retention: &Retention, disk: DiskId, error: &JournalError, bytes: (u64, u64)) {
    let asked = BlockRange::new(bytes.0 / BLOCK_BYTES, bytes.1.div_ceil(BLOCK_BYTES));
    let noted = (|| {
        let run = {
            let mut locked = retention.lock();
            let journal = locked.get()?;
            note_entry(journal, disk, error)?;
            journal.run_of_error(disk, error, asked)
        };
        run.map_or(Ok(()), |(place, found)| note_run(retention, &place, vec![found], false))
    })();
    if let Err(error) = noted {
        tracing::warn!(%disk, %error, "what was found damaged could not be recorded");
    }
}

/// As [`note_error`], for errors of reading the log; answers whether that was not known.
///
/// # Errors
/// When the manifest cannot be written.
pub(crate) fn note_entry(
    journal: &mut Journal,
    disk: DiskId,
    error: &JournalError,
) -> Result<bool, JournalError> {
    let Some(entry) = journal.entry_of_error(disk, error) else { return Ok(false) };
    // What a reader met may be of an entry whose space was given to this one.
    if journal.read(entry.place).is_ok() {
        return Ok(false);
    }
    journal.note_entry(&entry, Some(&error.to_string()), wall_clock())
}
