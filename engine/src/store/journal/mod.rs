//! The retention journal on disk: undo runs.
//!
//! An undo run holds the first before-image of each block that was overwritten in one undo epoch of one disk. While the
//! epoch is open it is an [`ActiveRun`]; closed, a [`SealedRun`]; thinning merges two sealed runs into one.

mod undo_error;
mod undo_file;
mod undo_index;
mod undo_merge;
mod undo_pages;
mod undo_rebuild;
mod undo_run;
mod undo_scan;
mod undo_seal;
mod undo_sealed;
mod undo_verify;
mod undo_write;

pub use self::undo_error::{Hole, UndoError};
pub use self::undo_index::RunIndex;
pub use self::undo_merge::{merge, merged_header};
pub use self::undo_run::{ActiveRun, Image, ImageData, run_bytes_max};
pub use self::undo_sealed::{Found, Place, SealedRun};
