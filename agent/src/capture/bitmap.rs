//! One pinned map of dirty blocks, mapped into memory; the view is the engine's [`DirtyMap`].
//!
//! Invariants: one bit per 4 KiB; the map outlives the process as long as its pin stands; only ever grown by replacing it.
//! Called by `tracked`.

use std::path::Path;

use aya::maps::{Array, IterableMap, Map, MapData};
use reprotect_engine::dirty_map::{DirtyMap, words_for};
use reprotect_engine::units::SectorCount;

use super::CaptureError;
use super::kernel::{map_id, pinned};
use super::mapped::Mapped;

/// `BPF_F_MMAPABLE | BPF_F_INNER_MAP`: maps of one outer map may differ in size.
pub(crate) const FLAGS: u32 = 1 << 10 | 1 << 12;

/// A map of the dirty blocks of a disk.
pub(crate) struct Bitmap {
    map: Array<MapData, u64>,
    mapped: Mapped,
    disk: SectorCount,
}

impl std::fmt::Debug for Bitmap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bitmap").field("id", &self.id()).field("disk", &self.disk).finish_non_exhaustive()
    }
}

impl Bitmap {
    /// A new one, all clean, pinned at `path`; a pin that stands there is replaced.
    pub(crate) fn create(path: &Path, disk: SectorCount) -> Result<Self, CaptureError> {
        super::pins::remove(path)?;
        let words = u32::try_from(words_for(disk)).map_err(|_| CaptureError::Unsupported {
            disk: path.display().to_string(),
            reason: "it is larger than 1 EiB".into(),
        })?;
        let map = Array::create(words, FLAGS).map_err(CaptureError::map("dirty"))?;
        map.map().pin(path).map_err(CaptureError::map("dirty"))?;
        Self::of(map, disk)
    }

    /// The one pinned at `path`.
    pub(crate) fn open(path: &Path, disk: SectorCount) -> Result<Self, CaptureError> {
        let changed = || CaptureError::PinChanged { path: path.to_owned() };
        let map: Array<MapData, u64> = Array::try_from(Map::Array(pinned(path)?)).map_err(|_| changed())?;
        if u64::from(map.len()) != words_for(disk) {
            return Err(changed());
        }
        Self::of(map, disk)
    }

    fn of(map: Array<MapData, u64>, disk: SectorCount) -> Result<Self, CaptureError> {
        let bytes = (map.len() as usize * 8).next_multiple_of(rustix::param::page_size());
        let mapped = Mapped::new(map.map().fd(), 0, bytes, true).map_err(CaptureError::map("dirty"))?;
        Ok(Self { map, mapped, disk })
    }

    /// Its bits.
    pub(crate) fn view(&self) -> DirtyMap<'_> {
        match DirtyMap::new(self.mapped.words(), self.disk) {
            Some(view) => view,
            None => unreachable!("the map was made for this size"),
        }
    }

    /// The kernel's map.
    pub(crate) fn map(&self) -> &Array<MapData, u64> {
        &self.map
    }

    /// The kernel's number of the map.
    pub(crate) fn id(&self) -> Option<u32> {
        map_id(&self.map)
    }
}
