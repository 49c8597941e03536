//! Data capture: switching it on once it is proven, and reading the ordered records of every write.
//!
//! Invariants: data capture is never switched on unproven; records come in the order of submission, all disks of the machine
//! in one order; blocks of recorded writes are marked as well, so whoever falls behind loses order, not data.
//! An extension of [`Capture`]; called by `window` and by the agent's daemon. Units: bytes of the ring.

use std::time::{Duration, Instant};

use super::layout::{Control, Mode};
use super::{Capture, CaptureError, DiskSlot, Record, selftest};

/// How long a proof that failed is taken at its word: it loads a program and reads some thousand times.
const PROVE_AGAIN: Duration = Duration::from_secs(3600);

/// What came of the proof of data capture.
#[derive(Debug)]
pub(crate) enum Proof {
    /// Nobody wanted one yet.
    Untried,
    /// What is copied is what is written.
    Done,
    /// It is not, or that cannot be known; why, and when that was found.
    Failed {
        /// Why.
        reason: String,
        /// When.
        at: Instant,
    },
}

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
    /// writes nothing. Once per process is enough, and one that failed is not done again for an hour; `window` calls it.
    ///
    /// # Errors
    /// [`CaptureError::SelfTest`].
    pub fn prove_data(&mut self, slot: DiskSlot) -> Result<(), CaptureError> {
        match &self.proof {
            Proof::Done => return Ok(()),
            Proof::Failed { reason, at } if at.elapsed() < PROVE_AGAIN => {
                return Err(CaptureError::SelfTest { reason: reason.clone() });
            }
            Proof::Failed { .. } | Proof::Untried => {}
        }
        let disk = &self.tracked(slot)?.disk;
        let proven = selftest::prove(&self.kernel, &self.ring, &self.place, &self.options, disk);
        self.proof = match &proven {
            Ok(()) => Proof::Done,
            // Of this disk; another one may be read.
            Err(CaptureError::File { .. }) => Proof::Untried,
            Err(CaptureError::SelfTest { reason }) => {
                Proof::Failed { reason: reason.clone(), at: Instant::now() }
            }
            Err(error) => Proof::Failed { reason: error.to_string(), at: Instant::now() },
        };
        proven
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
        if on && !matches!(self.proof, Proof::Done) {
            return Err(CaptureError::SelfTest { reason: "it was not done".into() });
        }
        self.kernel.switch(if on { Mode::Data } else { Mode::Bitmap })?;
        Ok(())
    }

    /// Copies no write any more, and forgets what waits to be read: it is marked in the bitmap.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn end_recording(&self) -> Result<(), CaptureError> {
        self.kernel.switch(Mode::Bitmap)?;
        while !self.ring.skip_to_end() {
            std::thread::yield_now();
        }
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
    /// [`CaptureError::Ring`], and the record that cannot be is passed; or what `take` says, whose record is then given again.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capturing::capture_lab;

    #[test]
    fn a_proof_that_failed_is_not_done_for_each_window_and_is_done_again_after_an_hour() {
        let _turn = capture_lab::machine();
        if !capture_lab::capable() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let device = capture_lab::Loop::new(dir.path(), "disk", 16);
        let mut capture = capture_lab::capture("unproven", dir.path());
        let (slot, _) = capture.follow(device.disk(), "x").unwrap();
        // The probe then looks at another control page than the agent writes to.
        std::fs::remove_file("/sys/fs/bpf/reprotect/agent-unproven/control").unwrap();
        let error = capture.prove_data(slot).unwrap_err();
        let Proof::Failed { reason, at } = &capture.proof else { panic!("{:?}", capture.proof) };
        assert!(error.to_string().contains(reason.as_str()), "{error}");
        let (reason, at) = (reason.clone(), *at);
        let stretch = capture.open_stretch(slot).unwrap().unwrap();
        let plan = crate::capture::WindowPlan::new(vec![(slot, stretch)]);
        let error = capture.window(&plan, &mut capture_lab::Nothing, &mut ()).unwrap_err();
        assert!(error.to_string().contains("self-test") && error.to_string().contains(&reason), "{error}");
        assert!(matches!(capture.proof, Proof::Failed { at: now, .. } if now == at), "not done again");
        let Some(before) = Instant::now().checked_sub(PROVE_AGAIN) else { return };
        capture.proof = Proof::Failed { reason, at: before };
        capture.prove_data(slot).unwrap_err();
        assert!(matches!(capture.proof, Proof::Failed { at: now, .. } if now > at), "done again");
    }
}
