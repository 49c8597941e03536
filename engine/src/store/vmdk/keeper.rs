//! The descriptor of an open disk: changes the content identity, once, before the first write.
//!
//! Invariants: the new identity is durable before any data of this open is written, so that whoever remembers the old
//! one knows the disk has changed; a change-tracked disk leaves change tracking at the same moment, since its bitmap
//! would no longer be true. Called by `flat` and `sparse`.

use std::path::PathBuf;
use std::sync::Arc;

use crate::format::vmdk::descriptor::{CID_NONE, Descriptor};
use crate::io::{BlockError, BlockOp, WriteAt};
use crate::store::files::{Files, FilesError};
use crate::units::{SECTOR_BYTES, SectorRange};

/// Where the descriptor stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Home {
    /// A file of its own.
    File,
    /// Inside the only sparse extent.
    Embedded(SectorRange),
}

/// Keeps the descriptor of an open disk.
pub(super) struct Keeper {
    opener: Arc<dyn Files>,
    path: PathBuf,
    descriptor: Descriptor,
    home: Home,
    writable: bool,
    touched: bool,
}

impl Keeper {
    pub(super) fn new(
        opener: Arc<dyn Files>,
        path: PathBuf,
        descriptor: Descriptor,
        home: Home,
        writable: bool,
    ) -> Self {
        Self { opener, path, descriptor, home, writable, touched: false }
    }

    pub(super) fn opener(&self) -> &dyn Files {
        &*self.opener
    }

    pub(super) const fn is_writable(&self) -> bool {
        self.writable
    }

    /// Before every write: at the first one changes the descriptor. A file of its own is replaced durably here; of an
    /// embedded one the changed sectors are answered, which the caller writes and flushes before any data.
    ///
    /// # Errors
    /// When there is no randomness or the descriptor cannot be replaced.
    pub(super) fn touch(&mut self) -> Result<Vec<(u64, [u8; SECTOR_BYTES as usize])>, BlockError> {
        if self.touched {
            return Ok(Vec::new());
        }
        let fail = |source: std::io::Error| BlockError {
            name: self.path.display().to_string(),
            op: BlockOp::Write,
            offset: 0,
            len: 0,
            source,
        };
        if !self.writable {
            let why = "the disk was opened for reading only";
            return Err(fail(std::io::Error::new(std::io::ErrorKind::PermissionDenied, why)));
        }
        let cid = random_cid(self.descriptor.cid()).map_err(fail)?;
        let mut edited = self.descriptor.clone();
        edited.set_cid(cid);
        edited.drop_change_tracking(self.home != Home::File);
        let changes = match self.home {
            Home::File => {
                self.opener.replace(&self.path, edited.text().as_bytes()).map_err(|error| match error {
                    FilesError::Block(error) => error,
                    FilesError::System { source, .. } => fail(source),
                    other => fail(std::io::Error::other(other.to_string())),
                })?;
                Vec::new()
            }
            Home::Embedded(place) => changed_sectors(place, &self.descriptor.text(), &edited.text())
                .ok_or_else(|| {
                    fail(std::io::Error::other("the edited descriptor does not fit its place in the header"))
                })?,
        };
        self.descriptor = edited;
        self.touched = true;
        Ok(changes)
    }
}

/// The sectors in which two texts differ, padded with zeros; `None` when the new one does not fit.
fn changed_sectors(
    place: SectorRange,
    old: &str,
    new: &str,
) -> Option<Vec<(u64, [u8; SECTOR_BYTES as usize])>> {
    if new.len() as u64 > place.bytes() {
        return None;
    }
    let sector = |text: &str, at: u64| {
        let mut bytes = [0_u8; SECTOR_BYTES as usize];
        let rest = text.as_bytes().get((at * SECTOR_BYTES) as usize..).unwrap_or_default();
        let len = rest.len().min(bytes.len());
        bytes[..len].copy_from_slice(&rest[..len]);
        bytes
    };
    let sectors = (old.len().max(new.len()) as u64).div_ceil(SECTOR_BYTES).min(place.len());
    Some(
        (0..sectors)
            .filter(|at| sector(old, *at) != sector(new, *at))
            .map(|at| (place.start + at, sector(new, at)))
            .collect(),
    )
}

/// Writes sectors such as [`Keeper::touch`] answers.
pub(super) fn sector_writes(sectors: &[(u64, [u8; SECTOR_BYTES as usize])]) -> Vec<WriteAt<'_>> {
    sectors.iter().map(|(at, data)| WriteAt { offset: at * SECTOR_BYTES, data }).collect()
}

/// A random content identity that differs from `old` and has no special meaning.
pub(in crate::store) fn random_cid(old: u32) -> Result<u32, std::io::Error> {
    loop {
        let cid = getrandom::u32().map_err(|error| std::io::Error::other(error.to_string()))?;
        // 0 and all ones mean "none"; 0xfffffffe is what fresh disks of some tools carry.
        if cid != 0 && cid < CID_NONE - 1 && cid != old {
            return Ok(cid);
        }
    }
}
