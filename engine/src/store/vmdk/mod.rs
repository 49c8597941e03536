//! VMDKs as targets: flat and hosted sparse, opened, created, read and written through [`BlockFile`].
//!
//! | file | what |
//! |---|---|
//! | `open` | descriptor → checks → an opened disk |
//! | `create` | a new disk of one of five kinds |
//! | `grow` | a disk becomes larger |
//! | `flat` | plain extents |
//! | `sparse` | grains: planning of writes, the crash-safe order |
//! | `stream` | a compressed copy for transport, written front to back |
//! | `tables` | grain tables: load, repair, pending changes |
//! | `layout` | splitting operations at extent borders |
//! | `keeper` | the descriptor of an open disk: new content identity at the first write |
//!
//! Invariants: a disk is written only after its content identity was changed durably; a disk dropped without
//! [`TargetFile::close`] is as after a crash, which every open repairs. Called by `store::target`.

pub mod create;
pub mod error;
mod flat;
mod grow;
mod keeper;
mod layout;
pub mod open;
mod sparse;
pub mod stream;
mod tables;

pub use create::{CreateSpec, create_vmdk};
pub use error::TargetError;
pub use flat::FlatVmdk;
pub use grow::grow_vmdk;
#[cfg(feature = "io")]
pub(in crate::store) use keeper::random_cid;
pub use open::{OpenedVmdk, open_vmdk};
pub use sparse::SparseVmdk;
pub use tables::Repair;

use crate::format::vmdk::descriptor::CreateType;
use crate::io::BlockFile;

/// The kinds of VMDK that can be a live target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum VmdkKind {
    /// Descriptor and one flat file.
    MonolithicFlat,
    /// Descriptor and flat files of at most 2 GiB.
    TwoGbMaxExtentFlat,
    /// Descriptor and one flat file as a datastore has it.
    Vmfs,
    /// One sparse file.
    MonolithicSparse,
    /// Descriptor and sparse files of at most 2 GiB.
    TwoGbMaxExtentSparse,
}

impl VmdkKind {
    /// Every kind.
    pub const ALL: [Self; 5] = [
        Self::MonolithicFlat,
        Self::TwoGbMaxExtentFlat,
        Self::Vmfs,
        Self::MonolithicSparse,
        Self::TwoGbMaxExtentSparse,
    ];

    /// Whether it has grain tables.
    #[must_use]
    pub const fn is_sparse(self) -> bool {
        matches!(self, Self::MonolithicSparse | Self::TwoGbMaxExtentSparse)
    }

    /// Whether it is split into files of at most 2 GiB.
    #[must_use]
    pub const fn is_split(self) -> bool {
        matches!(self, Self::TwoGbMaxExtentFlat | Self::TwoGbMaxExtentSparse)
    }

    /// The word in the descriptor.
    #[must_use]
    pub const fn create_type(self) -> CreateType {
        match self {
            Self::MonolithicFlat => CreateType::MonolithicFlat,
            Self::TwoGbMaxExtentFlat => CreateType::TwoGbMaxExtentFlat,
            Self::Vmfs => CreateType::Vmfs,
            Self::MonolithicSparse => CreateType::MonolithicSparse,
            Self::TwoGbMaxExtentSparse => CreateType::TwoGbMaxExtentSparse,
        }
    }
}

/// An open target: a [`BlockFile`] that must be closed to leave the medium clean.
pub trait TargetFile: BlockFile + std::fmt::Debug {
    /// Makes everything durable and leaves the files as any reader expects them.
    ///
    /// # Errors
    /// When a flush or the trimming of a file fails; the target is then as after a crash and not lost.
    fn close(self: Box<Self>) -> Result<(), TargetError>;
}

#[cfg(test)]
mod sparse_tests;
