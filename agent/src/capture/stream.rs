//! Data capture: switching it on once it is proven, and reading the ordered records of every write.
//!
//! Invariants: data capture is never switched on unproven; records come in the order of submission, all disks of the machine
//! in one order; blocks of recorded writes are marked as well, so whoever falls behind loses order, not data.
//! An extension of [`Capture`]; called by `window` and by the agent's daemon. Units: bytes of the ring.

use super::layout::{Control, Mode};
use super::{Capture, CaptureError, DiskSlot, Record, selftest};

/// How far the stream was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drained {
    /// Everything up to the wanted place was read; otherwise a record is being written just now.
    pub complete: bool,
    /// Records of the machine that have found no place so far, in this boot's capture.
    pub drops: u64,
}

impl Capture {
    /// Proves that what the programs copy is what is written, on one of the followed disks. Reads from it a few times,
    /// writes nothing. Once per process is enough; `window` and `record_all` call it.
    ///
    /// # Errors
    /// [`CaptureError::SelfTest`].
    pub fn prove_data(&mut self, slot: DiskSlot) -> Result<(), CaptureError> {
        if self.proven {
            return Ok(());
        }
        let disk = &self.tracked(slot)?.disk;
        selftest::prove(&self.kernel, &self.ring, &self.place, &self.options, disk)?;
        self.proven = true;
        Ok(())
    }

    /// What programs do now.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.kernel.mode().mode
    }

    /// Copies every write into the ring from now on, or no longer. What was in flight at the switch is not in the stream:
    /// for a stream that a point can stand in use [`Capture::window`].
    ///
    /// # Errors
    /// [`CaptureError::SelfTest`] before data capture was proven.
    pub fn record_all(&mut self, on: bool) -> Result<(), CaptureError> {
        if on && !self.proven {
            return Err(CaptureError::SelfTest { reason: "it was not done".into() });
        }
        self.kernel.switch(if on { Mode::Data } else { Mode::Bitmap })?;
        Ok(())
    }

    /// Where the stream ends now: every write submitted before this call stands before it.
    #[must_use]
    pub fn stream_end(&self) -> u64 {
        self.ring.end()
    }

    /// Bytes of records that wait to be read.
    #[must_use]
    pub fn stream_waiting(&self) -> u64 {
        self.ring.waiting()
    }

    /// Records of the machine that found no place in the ring.
    #[must_use]
    pub fn drops(&self) -> u64 {
        self.kernel.get(Control::Drops)
    }

    /// Gives the records before `until` to `take`, oldest first, and their place back to the kernel.
    ///
    /// # Errors
    /// [`CaptureError::Ring`], or what `take` says; its record is then given again.
    pub fn drain<E: From<CaptureError>>(
        &self,
        until: u64,
        mut take: impl FnMut(Record<'_>) -> Result<(), E>,
    ) -> Result<Drained, E> {
        let complete = self.ring.drain(until, |record| match record.kind {
            Some(_) => take(record),
            None => Ok(()), // of a self-test
        })?;
        Ok(Drained { complete, drops: self.drops() })
    }
}
