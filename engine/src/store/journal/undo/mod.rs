//! Undo runs: the first before-images of one undo epoch of one disk.
//!
//! While the epoch is open its run is an [`ActiveRun`]; closed, a [`SealedRun`]; thinning merges two sealed runs into one,
//! and the older image wins. Units: bytes and blocks. Called by the rest of `store::journal`.

mod error;
mod file;
mod index;
mod merge;
mod pages;
mod rebuild;
mod run;
mod scan;
mod seal;
mod sealed;
mod verify;
mod write;

pub use self::error::{Hole, UndoError};
pub use self::index::RunIndex;
pub use self::merge::{merge, merged_header};
pub use self::run::{ActiveRun, Image, ImageData, images_bytes_max, run_bytes_max};
pub use self::sealed::{Found, Place, SealedRun};
pub use crate::format::undo::{BlockRange, FRAMES_START, RunHeader, RunIdentity};
