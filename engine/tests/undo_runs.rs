//! Undo runs against a model: a map from block to its first image, under crashes, damage, truncation and merging.
//!
//! What must hold throughout: an image is read back as it was captured, or there is an error that names it; a captured
//! block is never reported as missing, because a later image would then be shown in its place.
#![cfg(feature = "sim")]
#![expect(clippy::unwrap_used, reason = "a test may panic")]

#[path = "undo_runs/crash.rs"]
mod crash;
#[path = "undo_runs/damage.rs"]
mod damage;
#[path = "undo_runs/merge.rs"]
mod merge;
#[path = "undo_runs/model.rs"]
mod model;
#[path = "undo_runs/plain.rs"]
mod plain;
