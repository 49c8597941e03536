//! Live capture of a machine: which disks are followed, what changed on them, and whether everything was seen.
//!
//! Call order: [`Capture::start`] → [`Capture::follow`] per disk → any of `open_stretch`, `harvest`, `confirm`, `check`,
//! `window` → [`Capture::leave`] or drop: programs go on, the next start continues. Whoever wants them gone calls
//! [`super::let_go`] after that.
//! Invariants: the session file is durable before programs are attached and before a disk is followed; a harvested
//! block stays pending until its stretch is confirmed; one process owns the pins and each disk.
//! All calls block, briefly; none is for an async runtime. Units: sectors. Called by the agent's daemon.

use std::collections::BTreeSet;
use std::path::PathBuf;

use reprotect_engine::net::wall_clock;
use reprotect_engine::range_set::RangeSet;
use reprotect_engine::units::{SectorCount, SectorRange};

use super::kernel::Kernel;
use super::layout::{Control, DISKS_MAX, Kind, Mode, ModeWord, Tally};
use super::loader::{self, LoadOptions, check_machine};
use super::oracle;
use super::pins::{self, Claim};
use super::ring::Ring;
use super::session_file::{CompareCause, Continuity, Session, SessionDisk, SessionStore, VERSION};
use super::stream::Proof;
use super::sysfs::boot_id;
use super::tracked::{Stretch, Tracked};
use super::{BlockDisk, CaptureError, ProgramCost, costs, object};

/// How capture is set up.
#[derive(Clone, Debug)]
pub struct CaptureSettings {
    /// Name of this agent's place among the pins: agents with different names do not meet, except at a disk.
    pub instance: String,
    /// Where the session file lies.
    pub state_dir: PathBuf,
    /// Size of the ring for written data; a power of two, locked memory.
    pub ring_bytes: u32,
    /// Writes that can be followed in flight at once; 40 bytes each, and as many of this process's memory.
    pub flights_max: u32,
    /// Whether events can be lost on purpose, for tests.
    pub test_hooks: bool,
    /// Whether the programs for the oldest supported kernels are used on any, for tests.
    pub plainest: bool,
}

impl CaptureSettings {
    /// The usual ones.
    #[must_use]
    pub fn new(instance: &str, state_dir: PathBuf) -> Self {
        Self {
            instance: instance.to_owned(),
            state_dir,
            ring_bytes: 64 << 20,
            flights_max: 1 << 16,
            test_hooks: false,
            plainest: false,
        }
    }
}

/// A followed disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DiskSlot(pub(crate) usize);

impl DiskSlot {
    /// Its number.
    #[must_use]
    pub const fn index(self) -> usize {
        self.0
    }
}

/// Counters of a followed disk since its place was first used; they only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskCounts {
    /// Bios submitted that write, flushes included.
    pub submitted: u64,
    /// Sectors seen written or zeroed.
    pub written_sectors: u64,
    /// Sectors seen discarded.
    pub discarded_sectors: u64,
    /// Bios that came again without having been seen completing.
    pub stale: u64,
    /// Completions without a submission.
    pub orphans: u64,
    /// Completions of writes that had been given up.
    pub late: u64,
    /// Writes that failed.
    pub failed: u64,
    /// Writes for which the in-flight map had no place.
    pub full: u64,
    /// Pieces of bios that requests were seen completing.
    pub completed: u64,
    /// Writes copied into the ring.
    pub records: u64,
    /// Their data, in bytes.
    pub record_bytes: u64,
    /// Writes that should have been copied and were not.
    pub unrecorded: u64,
    /// Of these, those whose data could not be read.
    pub unreadable: u64,
}

/// A place for an event to be lost, for tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// Its submission.
    Submission = 1,
    /// Its completion.
    Completion = 2,
    /// Both.
    Both = 3,
}

/// Live capture.
#[derive(Debug)]
pub struct Capture {
    pub(crate) place: Claim,
    root: PathBuf,
    store: SessionStore,
    pub(crate) kernel: Kernel,
    pub(super) session: Session,
    /// Disks of the session that this one continues; taken by `follow`.
    left: Vec<SessionDisk>,
    /// Why other disks cannot be continued.
    fresh: CompareCause,
    pub(crate) disks: Vec<Tracked>,
    pub(crate) options: LoadOptions,
    pub(crate) ring: Ring,
    pub(crate) proof: Proof,
    /// Events for which the kernel did not run a program, as counted when that was last told.
    skipped: u64,
}

impl Capture {
    /// Continues what a process before left, or begins afresh.
    ///
    /// # Errors
    /// Any [`CaptureError`]: the machine cannot capture, or another agent does under this name.
    pub fn start(settings: &CaptureSettings) -> Result<Self, CaptureError> {
        check_machine()?;
        let root = pins::root()?;
        let place = Claim::take(pins::place_of(&root, &settings.instance), "capture")?;
        let store = SessionStore::at(&settings.state_dir);
        let options = LoadOptions {
            ring_bytes: settings.ring_bytes,
            flights_max: settings.flights_max,
            hooks: settings.test_hooks,
            only: settings.plainest.then(loader::plainest),
        };
        let (boot, object) = (boot_id()?, object::build());
        let before = store.load();
        let fresh = match &before {
            None => CompareCause::FirstTime,
            Some(session) if session.boot != boot => CompareCause::NewBoot,
            Some(session) => match Self::reopen(&place, session) {
                Ok(kernel) => {
                    tracing::info!(place = %place.path().display(), "capture goes on with the programs that ran meanwhile");
                    if session.object != object {
                        tracing::info!(
                            "these are programs of another build of the agent, and work as before; this one's are loaded after a reboot, or a stop and `reprotect-agent unfollow`, which costs a compare"
                        );
                    }
                    let (session, left) = (session.clone(), session.disks.clone());
                    return Self::over(
                        place,
                        root,
                        store,
                        kernel,
                        session,
                        (CompareCause::FirstTime, left),
                        options,
                    );
                }
                Err(error) => CompareCause::PinsChanged { what: error.to_string() },
            },
        };
        // What was missed or interrupted is owed to its disks until it is written down, also by the processes that come next.
        let was_interrupted = matches!(fresh, CompareCause::PinsChanged { .. });
        let owed = before.map_or_else(BTreeSet::new, |session| {
            let disks = session.disks.into_iter().filter(|disk| disk.untold || was_interrupted);
            disks.map(|disk| disk.identity).chain(session.owed).collect()
        });
        let (pins, disks) = (Vec::new(), Vec::new());
        let mut session = Session { version: VERSION, boot, pins, object, disks, owed };
        let kernel = Kernel::begin(&place, &options, |kernel| {
            session.pins = kernel.ids().to_vec();
            store.store(&session)
        })?;
        Self::over(place, root, store, kernel, session, (fresh, Vec::new()), options)
    }

    fn over(
        place: Claim,
        root: PathBuf,
        store: SessionStore,
        kernel: Kernel,
        session: Session,
        (fresh, left): (CompareCause, Vec<SessionDisk>),
        options: LoadOptions,
    ) -> Result<Self, CaptureError> {
        let ring = Ring::open(kernel.ring())?;
        // What a process before did not read is marked in the bitmap.
        while !ring.skip_to_end() {
            std::thread::yield_now();
        }
        let disks = Vec::new();
        let skipped = costs::skipped(&place)?;
        let proof = Proof::Untried;
        Ok(Self { place, root, store, kernel, session, left, fresh, disks, options, ring, proof, skipped })
    }

    fn reopen(place: &Claim, session: &Session) -> Result<Kernel, CaptureError> {
        let kernel = Kernel::open(place)?;
        if kernel.ids() != session.pins {
            return Err(CaptureError::PinChanged { path: place.path().to_owned() });
        }
        kernel.check_links(place)?;
        // A window that a killed process left open must not fill the ring.
        let word = kernel.mode();
        kernel.set_mode(ModeWord { mode: Mode::Bitmap, generation: word.generation + 1 });
        kernel.settle()?;
        Ok(kernel)
    }

    /// Follows a disk from now on. Everything written after this returned is found by a harvest; what it says of the
    /// time before is the answer.
    ///
    /// # Errors
    /// [`CaptureError::InUse`], [`CaptureError::TooMany`], or what the kernel refuses.
    pub fn follow(
        &mut self,
        disk: BlockDisk,
        identity: &str,
    ) -> Result<(DiskSlot, Continuity), CaptureError> {
        disk.check_counting()?;
        let claim = Claim::disk(&self.root, &disk)?;
        let before =
            self.left.iter().position(|known| known.identity == identity).map(|at| self.left.remove(at));
        let cause = match before {
            None => self.fresh.clone(),
            Some(known) if !known.is(&disk, identity) || known.size_sectors > disk.size.0 => {
                self.forget(&known)?;
                CompareCause::OtherDisk
            }
            Some(known) => match self.is_followed(&known, &disk) {
                Ok(()) => {
                    let (slot, continuity) = self.follow_left(disk, claim, &known)?;
                    let owed = self.session.owed.contains(identity);
                    return Ok((
                        slot,
                        if owed { Continuity::Compare(interrupted_before()) } else { continuity },
                    ));
                }
                Err(error) => {
                    self.forget(&known)?;
                    self.session.owed.insert(identity.to_owned());
                    CompareCause::PinsChanged { what: error.to_string() }
                }
            },
        };
        let slot = self.follow_anew(disk, claim, identity)?;
        let is_told =
            matches!(cause, CompareCause::PinsChanged { .. }) || !self.session.owed.contains(identity);
        Ok((slot, Continuity::Compare(if is_told { cause } else { interrupted_before() })))
    }

    /// Whether the programs really have followed it all the time.
    fn is_followed(&self, known: &SessionDisk, disk: &BlockDisk) -> Result<(), CaptureError> {
        let pin = self.place.pin(&format!("dirty_{}", known.slot));
        let changed = || CaptureError::PinChanged { path: pin.clone() };
        if self.kernel.followed(disk.key()) != Some(known.slot) || known.anchor.is_none() {
            return Err(changed());
        }
        let pinned = super::kernel::pin_id(&pin)?;
        if self.kernel.dirty_id(known.slot) == Some(pinned) { Ok(()) } else { Err(changed()) }
    }

    fn forget(&mut self, known: &SessionDisk) -> Result<(), CaptureError> {
        if self.disks.iter().all(|tracked| tracked.slot != known.slot) {
            let key = known.number.0 << 20 | known.number.1;
            if self.kernel.followed(key) == Some(known.slot) {
                self.kernel.unfollow(key);
            }
            Tracked::remove_pins(&self.place, known.slot)?;
        }
        Ok(())
    }

    fn follow_left(
        &mut self,
        disk: BlockDisk,
        claim: Claim,
        known: &SessionDisk,
    ) -> Result<(DiskSlot, Continuity), CaptureError> {
        let size = SectorCount(known.size_sectors);
        let mut tracked = Tracked::open(&self.place, claim, disk, &known.identity, known.slot, size)?;
        (tracked.anchor, tracked.reaped) = (known.anchor, known.reaped);
        tracked.seen_quiet = known.seen_quiet;
        let dirty_blocks = tracked.live().view().count();
        self.disks.push(tracked);
        let slot = DiskSlot(known.slot);
        self.check_size(slot)?;
        Ok((slot, Continuity::Continued { dirty_blocks }))
    }

    fn follow_anew(
        &mut self,
        disk: BlockDisk,
        claim: Claim,
        identity: &str,
    ) -> Result<DiskSlot, CaptureError> {
        let taken = |slot: &usize| {
            self.disks.iter().all(|tracked| tracked.slot != *slot)
                && self.left.iter().all(|known| known.slot != *slot)
        };
        let Some(slot) = (0..DISKS_MAX).find(taken) else {
            return Err(CaptureError::TooMany { disk: disk.name, max: DISKS_MAX });
        };
        let tracked = Tracked::create(&self.place, claim, disk, identity, slot)?;
        let key = tracked.disk.key();
        self.kernel.set_dirty(slot, tracked.live().map())?;
        self.disks.push(tracked);
        if let Err(error) = self.begin_following(DiskSlot(slot), key) {
            // As if it had not been tried; what cannot be undone either is compared whenever it is followed.
            self.kernel.unfollow(key);
            let _gone = self.kernel.settle();
            self.disks.retain(|tracked| tracked.slot != slot);
            let _gone = Tracked::remove_pins(&self.place, slot);
            return Err(error);
        }
        Ok(DiskSlot(slot))
    }

    fn begin_following(&mut self, slot: DiskSlot, key: u32) -> Result<(), CaptureError> {
        self.store_session()?;
        self.kernel.follow(key, slot.0);
        self.kernel.settle()?;
        let anchor = oracle::anchor(&self.kernel, &self.tracked(slot)?.disk, slot.0, wall_clock())?;
        self.tracked_mut(slot)?.anchor = Some(anchor);
        // An anchored disk in the file is one that a killed process may continue.
        self.store_session()
    }

    /// Follows a disk no longer.
    ///
    /// # Errors
    /// What the kernel or the file system says.
    pub fn unfollow(&mut self, slot: DiskSlot) -> Result<(), CaptureError> {
        let Some(at) = self.disks.iter().position(|tracked| tracked.slot == slot.0) else { return Ok(()) };
        // The kernel first: its place is free for another disk only when no program knows this one by it.
        self.kernel.unfollow(self.disks[at].disk.key());
        self.kernel.switch(self.kernel.mode().mode)?;
        self.kernel.forget_flights_of(slot.0);
        drop(self.disks.remove(at));
        self.keep_session();
        Tracked::remove_pins(&self.place, slot.0)
    }

    pub(crate) fn tracked(&self, slot: DiskSlot) -> Result<&Tracked, CaptureError> {
        self.disks.iter().find(|tracked| tracked.slot == slot.0).ok_or_else(|| gone(slot))
    }

    pub(super) fn tracked_mut(&mut self, slot: DiskSlot) -> Result<&mut Tracked, CaptureError> {
        self.disks.iter_mut().find(|tracked| tracked.slot == slot.0).ok_or_else(|| gone(slot))
    }

    pub(super) fn store_session(&mut self) -> Result<(), CaptureError> {
        self.session.disks = self.disks.iter().map(session_disk).collect();
        self.session.disks.extend(self.left.iter().cloned());
        self.store.store(&self.session)
    }

    /// Begins a stretch of a disk; `None` when all that may be open at once are.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub fn open_stretch(&mut self, slot: DiskSlot) -> Result<Option<Stretch>, CaptureError> {
        self.see_quiet()?;
        let tracked =
            self.disks.iter_mut().find(|tracked| tracked.slot == slot.0).ok_or_else(|| gone(slot))?;
        tracked.open_stretch(&self.place)
    }

    /// Which blocks changed since the last harvest, as sectors. They are pending in `stretch` now; read them after this
    /// returned, past the page cache.
    ///
    /// # Errors
    /// When the disk is not followed.
    pub fn harvest(&self, slot: DiskSlot, stretch: Stretch) -> Result<RangeSet, CaptureError> {
        Ok(self.tracked(slot)?.harvest(stretch))
    }

    /// The stretch is durable at the target: its blocks are forgotten.
    ///
    /// # Errors
    /// What the file system says.
    pub fn confirm(&mut self, slot: DiskSlot, stretch: Stretch) -> Result<(), CaptureError> {
        let tracked =
            self.disks.iter_mut().find(|tracked| tracked.slot == slot.0).ok_or_else(|| gone(slot))?;
        tracked.confirm(&self.place, stretch)
    }

    /// The stretch will not become durable: the next harvest finds its blocks again. Answers how many.
    ///
    /// # Errors
    /// What the file system says.
    pub fn give_back(&mut self, slot: DiskSlot, stretch: Stretch) -> Result<u64, CaptureError> {
        let tracked =
            self.disks.iter_mut().find(|tracked| tracked.slot == slot.0).ok_or_else(|| gone(slot))?;
        tracked.give_back(&self.place, stretch)
    }

    /// Marks a range as changed: a block that could not be read, or that was read in a window that failed.
    ///
    /// # Errors
    /// When the disk is not followed.
    pub fn mark(&self, slot: DiskSlot, range: SectorRange) -> Result<(), CaptureError> {
        self.tracked(slot)?.mark(range);
        Ok(())
    }

    /// Looks at the size of the disk: one that grew is followed whole from now on, its open stretches end and are live
    /// again. Answers the size.
    ///
    /// # Errors
    /// [`CaptureError::Unsupported`] when it shrank.
    pub fn check_size(&mut self, slot: DiskSlot) -> Result<SectorCount, CaptureError> {
        let tracked = self.tracked_mut(slot)?;
        let (old, new) = (tracked.disk.size, tracked.disk.current_size()?);
        if new < old {
            return Err(CaptureError::Unsupported {
                disk: tracked.disk.name.clone(),
                reason: format!("it shrank from {} to {} sectors; enable its protection anew", old.0, new.0),
            });
        }
        if new > old {
            // The new live map is in force before it has what the old ones had: a process that is killed in between leaves
            // a disk without an anchor, which the next one compares.
            let anchor = tracked.anchor.take();
            self.store_session()?;
            let (kernel, place) = (&mut self.kernel, &self.place);
            let tracked =
                self.disks.iter_mut().find(|tracked| tracked.slot == slot.0).ok_or_else(|| gone(slot))?;
            tracked.grow(place, new, |live| kernel.set_dirty(slot.0, live.map()))?;
            tracked.anchor = anchor;
            tracing::info!(disk = %tracked.disk.name, from = old.0, to = new.0, "the disk grew");
            self.store_session()?;
        }
        Ok(new)
    }

    /// Whether programs and maps are pinned and attached as they were.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.kernel.check_links(&self.place).is_ok()
    }

    /// Counters of a disk.
    #[must_use]
    pub fn counts(&self, slot: DiskSlot) -> DiskCounts {
        let one = |field| self.kernel.tally(slot.0, field, 0);
        let kinds = |field, kinds: &[Kind]| -> u64 {
            kinds.iter().map(|kind| self.kernel.kind_tally(slot.0, field, *kind)).sum()
        };
        DiskCounts {
            submitted: kinds(Tally::Queued, &Kind::ALL),
            written_sectors: kinds(Tally::DoneSectors, &Kind::WRITTEN)
                + kinds(Tally::EndedSectors, &Kind::WRITTEN),
            discarded_sectors: kinds(Tally::DoneSectors, &[Kind::Discard])
                + kinds(Tally::EndedSectors, &[Kind::Discard]),
            stale: one(Tally::Stale),
            orphans: one(Tally::Orphans),
            late: one(Tally::Late) + one(Tally::EndedLate),
            failed: one(Tally::Failed) + one(Tally::EndedFailed),
            full: one(Tally::Full),
            completed: one(Tally::DoneBios),
            records: one(Tally::Records),
            record_bytes: one(Tally::RecordBytes),
            unrecorded: one(Tally::Unrecorded),
            unreadable: one(Tally::Unmapped),
        }
    }

    /// What the programs cost, and how often they were skipped.
    ///
    /// # Errors
    /// When the pins are gone.
    pub fn costs(&self) -> Result<Vec<ProgramCost>, CaptureError> {
        costs::read(&self.place)
    }

    /// Events for which the kernel did not run a program, because it was running on that processor already, since this was
    /// last asked. What completions they were is in the account of their disk; that there were any is told apart from it.
    ///
    /// # Errors
    /// When the pins are gone.
    pub fn newly_skipped(&mut self) -> Result<u64, CaptureError> {
        let now = costs::skipped(&self.place)?;
        Ok(now.wrapping_sub(std::mem::replace(&mut self.skipped, now)))
    }

    /// As if so many events had been skipped, for tests.
    pub const fn skip(&mut self, events: u64) {
        self.skipped = self.skipped.wrapping_sub(events);
    }

    /// Operations of a kind that were seen completing.
    #[must_use]
    pub fn completed(&self, slot: DiskSlot, kind: Kind) -> u64 {
        self.kernel.kind_tally(slot.0, Tally::Done, kind) + self.kernel.kind_tally(slot.0, Tally::Ended, kind)
    }

    /// Blocks that the next harvest finds, at least.
    ///
    /// # Errors
    /// When the disk is not followed.
    pub fn dirty_blocks(&self, slot: DiskSlot) -> Result<u64, CaptureError> {
        Ok(self.tracked(slot)?.live().view().count())
    }

    /// Makes the `nth` event of a kind from now be lost. Only with `test_hooks`.
    pub fn lose(&self, kind: Kind, loss: Loss, nth: u64) {
        self.kernel.set(Control::SkipWhat, kind as u64 | (loss as u64) << 32);
        self.kernel.set(Control::SkipCountdown, nth);
    }

    /// Events lost on purpose.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.kernel.get(Control::Skipped)
    }

    /// Leaves capture to the next process: programs and maps stay in the kernel and go on, so that whatever is written until
    /// then is known. Where nothing is to be left, [`super::let_go`] follows.
    ///
    /// # Errors
    /// When the kernel or the state directory refuses something; programs go on all the same, and what the next start
    /// cannot be sure of is compared.
    pub fn leave(mut self) -> Result<(), CaptureError> {
        // Nobody reads the ring until then.
        self.end_recording()?;
        self.see_quiet()?;
        self.store_session()
    }
}

fn interrupted_before() -> CompareCause {
    CompareCause::PinsChanged {
        what: "an agent before this one found it, and ended before it was written down".to_owned(),
    }
}

fn session_disk(tracked: &Tracked) -> SessionDisk {
    let (anchor, reaped) = tracked
        .untold
        .map_or((tracked.anchor, tracked.reaped), |untold| (Some(untold.anchor), untold.reaped));
    SessionDisk {
        identity: tracked.identity.clone(),
        name: tracked.disk.name.clone(),
        number: tracked.disk.number,
        sequence: tracked.disk.sequence,
        size_sectors: tracked.disk.size.0,
        slot: tracked.slot,
        anchor,
        seen_quiet: tracked.seen_quiet,
        reaped,
        untold: tracked.untold.is_some(),
    }
}

pub(super) fn gone(slot: DiskSlot) -> CaptureError {
    CaptureError::NotFollowed { disk: format!("disk number {}", slot.0) }
}
