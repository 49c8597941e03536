//! One followed disk: its live map, what was harvested and is not durable yet, and its place in the kernel's tables.
//!
//! Invariants (I7): a block that was marked has its bit in the live map, in `incoming` or in the pending map of an open
//! stretch, at every moment, whoever is killed; bits leave a pending map only when the stretch is confirmed or given
//! back. `incoming` exists so that a harvest can say what it found, apart from what earlier ones of the stretch
//! found. Units: sectors. Owned by `tracker`.

use reprotect_engine::range_set::RangeSet;
use reprotect_engine::units::{SectorCount, SectorRange};

use super::bitmap::Bitmap;
use super::pins::Claim;
use super::{Account, Anchor, BlockDisk, CaptureError};

/// Stretches of a disk that can be open at once: one that is sent and one that grows, and as many again.
pub const STRETCHES_MAX: usize = 4;

/// An open stretch of a disk: what was harvested into it stays pending until it is durable at the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Stretch(pub(crate) usize);

/// A check that found sectors missing while writes were in flight all the time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Undecided {
    /// Begun after it: a write that is older and in flight at the next check is a lost completion.
    pub(crate) generation: u64,
    /// Sectors that were missing.
    pub(crate) short: Account,
    /// Sectors of entries that were overwritten although they were old, counted then.
    pub(crate) old_stale: Account,
}

/// The account as it stood before misses that are not written down yet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Untold {
    pub(crate) anchor: Anchor,
    pub(crate) reaped: Account,
    /// How many.
    pub(crate) misses: u32,
}

/// The maps and the identity of a followed disk.
#[derive(Debug)]
pub(crate) struct Tracked {
    pub(crate) disk: BlockDisk,
    pub(crate) identity: String,
    pub(crate) slot: usize,
    pub(crate) anchor: Option<Anchor>,
    /// Sectors of entries that were given up since the anchor was taken.
    pub(crate) reaped: Account,
    /// Account before something was missed that is not written down yet: the next process is to find it, too.
    pub(crate) untold: Option<Untold>,
    /// The kernel has shown no write in flight since the disk is followed, by this process or the ones before it.
    pub(crate) seen_quiet: bool,
    /// What the last check could not decide about.
    pub(crate) undecided: Option<Undecided>,
    /// The last check found the kernel's account behind what was seen.
    pub(crate) behind: bool,
    live: Bitmap,
    incoming: Bitmap,
    pending: [Option<Bitmap>; STRETCHES_MAX],
    _claim: Claim,
}

/// Names of a disk's pins.
fn names(slot: usize) -> Vec<String> {
    let mut names = vec![format!("dirty_{slot}"), format!("incoming_{slot}")];
    names.extend((0..STRETCHES_MAX).map(|stretch| format!("pending_{slot}_{stretch}")));
    names
}

impl Tracked {
    /// Clean maps for a disk that was not followed.
    pub(crate) fn create(
        place: &Claim,
        claim: Claim,
        disk: BlockDisk,
        identity: &str,
        slot: usize,
    ) -> Result<Self, CaptureError> {
        Self::remove_pins(place, slot)?;
        let live = Bitmap::create(&place.pin(&format!("dirty_{slot}")), disk.size)?;
        let incoming = Bitmap::create(&place.pin(&format!("incoming_{slot}")), disk.size)?;
        let pending = Default::default();
        Ok(Self {
            disk,
            identity: identity.to_owned(),
            slot,
            anchor: None,
            reaped: Account::default(),
            untold: None,
            seen_quiet: false,
            undecided: None,
            behind: false,
            live,
            incoming,
            pending,
            _claim: claim,
        })
    }

    /// The maps a process before left, of a disk that had `size` then; everything harvested is live again.
    pub(crate) fn open(
        place: &Claim,
        claim: Claim,
        disk: BlockDisk,
        identity: &str,
        slot: usize,
        size: SectorCount,
    ) -> Result<Self, CaptureError> {
        let live = Bitmap::open(&place.pin(&format!("dirty_{slot}")), size)?;
        let incoming = Bitmap::open(&place.pin(&format!("incoming_{slot}")), size)?;
        incoming.view().restore_into(&live.view());
        for stretch in 0..STRETCHES_MAX {
            let pin = place.pin(&format!("pending_{slot}_{stretch}"));
            if pin.exists() {
                Bitmap::open(&pin, size)?.view().restore_into(&live.view());
                super::pins::remove(&pin)?;
            }
        }
        let mut disk = disk;
        disk.size = size;
        let pending = Default::default();
        Ok(Self {
            disk,
            identity: identity.to_owned(),
            slot,
            anchor: None,
            reaped: Account::default(),
            untold: None,
            seen_quiet: false,
            undecided: None,
            behind: false,
            live,
            incoming,
            pending,
            _claim: claim,
        })
    }

    /// Whether the kernel shows writes in flight, or cannot say. A disk that is gone has none.
    pub(crate) fn is_busy(&self) -> bool {
        match self.disk.writes_in_flight() {
            Ok(writes) => writes != 0,
            Err(CaptureError::File { source, .. }) => source.kind() != std::io::ErrorKind::NotFound,
            Err(_) => true,
        }
    }

    /// Removes the pins of a place.
    pub(crate) fn remove_pins(place: &Claim, slot: usize) -> Result<(), CaptureError> {
        names(slot).iter().try_for_each(|name| super::pins::remove(&place.pin(name)))
    }

    /// The live map.
    pub(crate) fn live(&self) -> &Bitmap {
        &self.live
    }

    /// Begins a stretch; `None` when all are open.
    pub(crate) fn open_stretch(&mut self, place: &Claim) -> Result<Option<Stretch>, CaptureError> {
        let Some(free) = self.pending.iter().position(Option::is_none) else { return Ok(None) };
        let pin = place.pin(&format!("pending_{}_{free}", self.slot));
        self.pending[free] = Some(Bitmap::create(&pin, self.disk.size)?);
        Ok(Some(Stretch(free)))
    }

    fn pending(&self, stretch: Stretch) -> Option<&Bitmap> {
        self.pending.get(stretch.0)?.as_ref()
    }

    /// Moves every live bit into the stretch and says which blocks these are. They are read after this returned.
    pub(crate) fn harvest(&self, stretch: Stretch) -> RangeSet {
        let mut found = RangeSet::new();
        let Some(pending) = self.pending(stretch) else { return found };
        // Empty but for a harvest that was interrupted, whose blocks are then found again.
        self.live.view().harvest_into(&self.incoming.view());
        for range in self.incoming.view().ranges() {
            found.insert(range);
        }
        self.incoming.view().harvest_into(&pending.view());
        found
    }

    /// Ends a stretch that is durable at the target.
    pub(crate) fn confirm(&mut self, place: &Claim, stretch: Stretch) -> Result<(), CaptureError> {
        let Some(slot) = self.pending.get_mut(stretch.0) else { return Ok(()) };
        *slot = None;
        super::pins::remove(&place.pin(&format!("pending_{}_{}", self.slot, stretch.0)))
    }

    /// Ends a stretch that will never be durable: its blocks are live again. Answers how many.
    pub(crate) fn give_back(&mut self, place: &Claim, stretch: Stretch) -> Result<u64, CaptureError> {
        let Some(pending) = self.pending(stretch) else { return Ok(0) };
        let blocks = pending.view().restore_into(&self.live.view());
        self.confirm(place, stretch)?;
        Ok(blocks)
    }

    /// Marks a range as if it had been written.
    pub(crate) fn mark(&self, range: SectorRange) {
        self.live.view().mark(range);
    }

    /// Replaces the maps by larger ones; what is beyond the old size is dirty. `swap` puts the new live map in force and
    /// returns when nobody uses the old one.
    pub(crate) fn grow(
        &mut self,
        place: &Claim,
        size: SectorCount,
        swap: impl FnOnce(&Bitmap) -> Result<(), CaptureError>,
    ) -> Result<(), CaptureError> {
        let old_size = self.disk.size;
        let live = Bitmap::create(&place.pin(&format!("dirty_{}", self.slot)), size)?;
        swap(&live)?;
        // Whatever was marked in the old maps is live again: a stretch begins anew after a change of size.
        copy_bits(&self.live, &live);
        copy_bits(&self.incoming, &live);
        for stretch in 0..STRETCHES_MAX {
            if let Some(pending) = &self.pending[stretch] {
                copy_bits(pending, &live);
            }
        }
        // Programs could not mark blocks beyond the old map.
        live.view().mark(SectorRange::new(old_size.0, size.0));
        self.incoming = Bitmap::create(&place.pin(&format!("incoming_{}", self.slot)), size)?;
        for stretch in 0..STRETCHES_MAX {
            self.confirm(place, Stretch(stretch))?;
        }
        self.live = live;
        self.disk.size = size;
        Ok(())
    }
}

fn copy_bits(from: &Bitmap, to: &Bitmap) {
    for range in from.view().ranges() {
        to.view().mark(range);
    }
}
