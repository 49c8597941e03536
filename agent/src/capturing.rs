//! The thread that owns live capture: it follows disks, harvests, opens windows and keeps the account.
//!
//! Invariants: nothing that may wait for a device is done on the session's task; capture is begun with the first disk that
//! can be followed; a disk has at most one open stretch, whose blocks are live again unless the machine says that they are
//! durable; what is only known to be unknown is marked from end to end, so that it outlives this process.
//! Units: sectors. Ordered about by `following`.

#[cfg(test)]
#[path = "../tests/capture_lab/mod.rs"]
pub(crate) mod capture_lab;
mod gather;
mod held;
mod stream;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use reprotect_engine::format::batch::Stretch as StretchKind;
use reprotect_engine::format::extent::Record;
use reprotect_engine::io::{self, BlockFile};
use reprotect_engine::net::wall_clock;
use reprotect_engine::range_set::RangeSet;
use reprotect_engine::units::{BLOCK_BYTES, DiskId, SECTOR_BYTES, SectorRange, Timestamp};
use tokio::sync::mpsc as async_mpsc;

use crate::capture::{
    BlockDisk, Capture, CaptureError, CaptureSettings, CompareCause, Continuity, DiskSlot, Moment, Stretch,
    Verdict, WindowEnd, WindowPlan,
};
use crate::freeze::{Freeze, FreezeEnd};
use gather::Gatherer;
use held::HeldFreeze;
use stream::Stream;

/// Sectors of a block of the maps.
const BLOCK_SECTORS: u64 = BLOCK_BYTES / SECTOR_BYTES;
/// Of the capturing thread, in the kernel's measure of niceness.
const NICER: i32 = -10;
/// How often the account of each disk is looked at.
const CHECK_EVERY: Duration = Duration::from_secs(30);
/// How long a check waits for a moment without writes in flight.
const CHECK_PATIENCE: Duration = Duration::from_millis(50);
/// How long a machine that cannot capture is taken at its word.
const REFUSED_FOR: Duration = Duration::from_secs(300);
/// Windows that are opened one after another for a point, where there is a reason to hope.
const WINDOW_TRIES_MAX: u32 = 4;
/// How often the ring is read while every write is streamed: 64 MiB hold that long at 12 GB/s.
const STREAM_EVERY: Duration = Duration::from_millis(5);

/// What is wanted.
#[derive(Debug)]
pub(crate) enum Order {
    /// Follow the disk from now on.
    /// Of a disk that is read to so many sectors.
    Follow { disk: DiskId, path: PathBuf, identity: String, size_sectors: u64 },
    /// Follow it no longer.
    Unfollow(DiskId),
    /// Begin a stretch with what changed.
    Harvest(DiskId),
    /// Find a moment of these disks, whose stretches are open.
    Window { run: [u8; 16], disks: Vec<DiskId>, stay: bool, freeze: Option<ToFreeze> },
    /// Of the disks whose every write is streamed: everything up to a moment that is now.
    Point { run: [u8; 16], disks: Vec<DiskId>, freeze: Option<ToFreeze> },
    /// Stream no longer.
    EndStream,
    /// The stretch is durable at the target.
    Durable(DiskId),
    /// It will not be.
    GiveBack(DiskId),
    /// That something was missed is written down.
    Told(DiskId),
    /// That capture was interrupted is.
    ToldInterrupted(DiskId),
}

/// File systems that are to be frozen at the moment.
#[derive(Debug)]
pub(crate) struct ToFreeze {
    pub(crate) freeze: Freeze,
    /// How long the calls may take.
    pub(crate) limit: Duration,
}

/// Records of one batch, and what promises their order makes.
#[derive(Debug)]
pub(crate) struct Batch {
    pub(crate) disk: DiskId,
    pub(crate) kind: StretchKind,
    pub(crate) records: Vec<Record>,
}

/// What a window brought.
#[derive(Debug)]
pub(crate) struct WindowRead {
    /// To be submitted in this order.
    pub(crate) batches: Vec<Batch>,
    /// What could not be read before the records came, which may have it.
    pub(crate) unread: Vec<(DiskId, SectorRange)>,
    /// Why it is no moment, if it is none: the batches are changes like any others then.
    pub(crate) open: Option<String>,
    /// It is a place in a stream, not a window.
    pub(crate) point: bool,
    /// Every write since then follows, in [`CaptureNews::Streamed`].
    pub(crate) streams: bool,
    /// The moment: everything written before is in what was read or streamed.
    pub(crate) source_time: Timestamp,
    /// How the freeze went, where one was wanted.
    pub(crate) frozen: Option<Result<FreezeEnd, String>>,
}

/// What came of orders.
#[derive(Debug)]
pub(crate) enum CaptureNews {
    /// The disk is followed; what is not known of the time before, if anything.
    Followed { disk: DiskId, result: Result<Option<CompareCause>, String> },
    /// What changed is in the open stretch.
    Harvested { disk: DiskId, result: Result<RangeSet, String> },
    /// The window is over.
    Windowed { run: [u8; 16], disks: Vec<DiskId>, result: Result<WindowRead, String> },
    /// Writes in their order, behind the last window or point: all that were submitted before `as_of` and not handed on.
    Streamed { batches: Vec<Batch>, as_of: Timestamp },
    /// The stream is over: what it did not hand out is in the maps.
    StreamEnded { disks: Vec<DiskId>, why: String },
    /// The kernel did not run a program for so many events, of any disk.
    Skipped { events: u64 },
    /// Everything the kernel wrote until now was seen.
    Accounted { disk: DiskId, as_of: Timestamp },
    /// Its account cannot be had any more, and so its changes cannot be trusted: it is followed no longer.
    Unfollowed { disk: DiskId, why: String },
    /// Something was missed: the disk must be compared.
    Unaccounted { disk: DiskId, why: String },
    /// The thread is gone, by a defect: no order is taken any more.
    Gone,
}

/// Tells of the thread's end where nothing else does.
struct Farewell(async_mpsc::UnboundedSender<CaptureNews>);

impl Drop for Farewell {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // A failed send means that the agent is stopping.
            let _ = self.0.send(CaptureNews::Gone);
        }
    }
}

/// The thread's handle; dropping it leaves capture to the next process.
#[derive(Debug)]
pub(crate) struct Capturing {
    orders: Option<mpsc::Sender<Order>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Capturing {
    /// A thread that begins to capture when it is first told to follow a disk; news go to `news`.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub(crate) fn start(
        settings: CaptureSettings,
        news: async_mpsc::UnboundedSender<CaptureNews>,
    ) -> std::io::Result<Self> {
        let (orders, wanted) = mpsc::channel();
        let farewell = Farewell(news.clone());
        let owner = Owner {
            settings,
            capture: None,
            refused: None,
            disks: BTreeMap::new(),
            identities: BTreeMap::new(),
            stream: None,
            news,
        };
        let run = move || {
            let _farewell = farewell;
            owner.run(&wanted);
        };
        let thread = std::thread::Builder::new().name("capture".into()).spawn(run)?;
        Ok(Self { orders: Some(orders), thread: Some(thread) })
    }

    /// Hands an order over.
    pub(crate) fn order(&self, order: Order) {
        if let Some(orders) = &self.orders {
            // A thread that is gone has said so.
            let _ = orders.send(order);
        }
    }

    /// Ends the thread; the programs go on. Blocks until that is done.
    pub(crate) fn end(&mut self) {
        self.orders = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the capturing thread panicked; its disks are compared at the next start");
        }
    }
}

impl Drop for Capturing {
    fn drop(&mut self) {
        self.orders = None; // the thread ends by itself
    }
}

/// A followed disk.
struct Followed {
    slot: DiskSlot,
    file: Box<dyn BlockFile>,
    whole: SectorRange,
    /// Number and sequence of the device, which tell it from another one that takes its place.
    device: ((u32, u32), u64),
    stretch: Option<Stretch>,
}

/// The thread's own.
struct Owner {
    settings: CaptureSettings,
    capture: Option<Capture>,
    /// Why there is no capture on this machine, and since when that is known.
    refused: Option<(String, Instant)>,
    disks: BTreeMap<DiskId, Followed>,
    /// Who they are, also those that are followed no longer.
    identities: BTreeMap<DiskId, String>,
    stream: Option<Stream>,
    news: async_mpsc::UnboundedSender<CaptureNews>,
}

impl Owner {
    fn run(mut self, orders: &mpsc::Receiver<Order>) {
        // The ring does not wait, and a frozen machine should not. Without the right to, it works as others do.
        let _ = rustix::process::nice(NICER);
        let mut checked = Instant::now();
        loop {
            let wait = CHECK_EVERY.saturating_sub(checked.elapsed());
            match orders.recv_timeout(if self.stream.is_some() { wait.min(STREAM_EVERY) } else { wait }) {
                Ok(order) => self.take(order),
                Err(mpsc::RecvTimeoutError::Timeout) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
            }
            self.stream_on();
            if checked.elapsed() >= CHECK_EVERY {
                self.check_all();
                checked = Instant::now();
            }
        }
        // An upgrade is a stop and a start: what is written in between must be known, so the programs go on.
        if let Some(capture) = self.capture.take()
            && let Err(error) = capture.leave()
        {
            tracing::warn!(%error, "capture could not be left in order; its disks may be compared at the next start");
        }
    }

    fn take(&mut self, order: Order) {
        match order {
            Order::Follow { disk, path, identity, size_sectors } => {
                let result = self.follow(disk, &path, &identity, size_sectors);
                self.tell(CaptureNews::Followed { disk, result });
            }
            Order::Unfollow(disk) => self.unfollow(disk),
            Order::Harvest(disk) => {
                let result = self.harvest(disk).map_err(|error| error.to_string());
                self.tell(CaptureNews::Harvested { disk, result });
            }
            Order::Point { run, disks, freeze } => {
                let result = self.point(&disks, held(freeze)).map_err(|error| error.to_string());
                self.tell(CaptureNews::Windowed { run, disks, result });
            }
            Order::EndStream => self.end_stream("it is not wanted any more"),
            Order::Window { run, disks, stay, freeze } => {
                self.end_stream("a window begins");
                let result = self.window(&disks, stay, held(freeze)).map_err(|error| error.to_string());
                self.tell(CaptureNews::Windowed { run, disks, result });
            }
            Order::Durable(disk) => self.end_stretch(disk, true),
            Order::GiveBack(disk) => self.end_stretch(disk, false),
            Order::Told(disk) => self.told(disk),
            Order::ToldInterrupted(disk) => self.told_interrupted(disk),
        }
    }

    fn tell(&self, news: CaptureNews) {
        // A failed send means that the agent is stopping.
        let _ = self.news.send(news);
    }

    /// The capture of this machine, begun where it was not yet.
    fn capture(&mut self) -> Result<&mut Capture, String> {
        if let Some((why, _)) = self.refused.as_ref().filter(|(_, since)| since.elapsed() < REFUSED_FOR) {
            return Err(why.clone());
        }
        // Programs or maps that somebody took away are made anew once no disk is followed by the old ones.
        if self.disks.is_empty() && self.capture.as_ref().is_some_and(|capture| !capture.is_whole()) {
            self.capture = None;
        }
        if self.capture.is_none() {
            match Capture::start(&self.settings) {
                Ok(capture) => (self.capture, self.refused) = (Some(capture), None),
                Err(error) => {
                    let why = error.to_string();
                    self.refused = Some((why.clone(), Instant::now()));
                    return Err(why);
                }
            }
        }
        self.capture.as_mut().ok_or_else(|| "capture is not there".to_owned())
    }

    fn follow(
        &mut self,
        disk: DiskId,
        path: &std::path::Path,
        identity: &str,
        size_sectors: u64,
    ) -> Result<Option<CompareCause>, String> {
        let text = |error: CaptureError| error.to_string();
        let device = BlockDisk::at(path).map_err(text)?;
        let place = (device.number, device.sequence);
        if let Some(known) = self.disks.get(&disk) {
            if known.device == place {
                let same = known.whole.end == size_sectors;
                return if same { Ok(None) } else { self.grow(disk, path, size_sectors).map(|()| None) };
            }
            self.unfollow(disk);
        }
        if device.size.0 < size_sectors {
            return Err(shrank(path));
        }
        let (whole, file) = (SectorRange::new(0, size_sectors), open_direct(path)?);
        self.identities.insert(disk, identity.to_owned());
        let capture = self.capture()?;
        let (slot, continuity) = capture.follow(device, identity).map_err(text)?;
        let cause = match continuity {
            // Marked from end to end by a process before this one, and not put right by it.
            Continuity::Continued { dirty_blocks } if dirty_blocks >= whole.len() / BLOCK_SECTORS => {
                Some(CompareCause::FirstTime)
            }
            Continuity::Continued { dirty_blocks } => {
                tracing::info!(%disk, dirty_blocks, "capture goes on where it was");
                None
            }
            Continuity::Compare(cause) => {
                // Until that was put right, also by a process after this one.
                capture.mark(slot, whole).map_err(text)?;
                Some(cause)
            }
        };
        self.disks.insert(disk, Followed { slot, file, whole, device: place, stretch: None });
        Ok(cause)
    }

    /// A followed disk is larger: its maps are, too, with everything behind the old end in them. What was harvested
    /// and is not durable is live again.
    fn grow(&mut self, disk: DiskId, path: &std::path::Path, size_sectors: u64) -> Result<(), String> {
        if self.stream.as_ref().is_some_and(|stream| stream.disks().contains(&disk)) {
            self.end_stream("a disk grew");
        }
        self.end_stretch(disk, false);
        let (Some(capture), Some(known)) = (&mut self.capture, self.disks.get_mut(&disk)) else {
            return Err(not_followed(disk).to_string());
        };
        let text = |error: CaptureError| error.to_string();
        let size = capture.check_size(known.slot).map_err(text)?;
        if size.0 < size_sectors {
            return Err(shrank(path));
        }
        // The maps may have had this size before: what was written there meanwhile nobody has read.
        capture.mark(known.slot, SectorRange::new(known.whole.end, size.0)).map_err(text)?;
        known.file = open_direct(path)?;
        known.whole = SectorRange::new(0, size_sectors);
        Ok(())
    }

    fn unfollow(&mut self, disk: DiskId) {
        // Its place may be another disk's next, and the stream knows disks by their places.
        if self.stream.as_ref().is_some_and(|stream| stream.disks().contains(&disk)) {
            self.end_stream("a disk is followed no longer");
        }
        if let (Some(known), Some(capture)) = (self.disks.remove(&disk), &mut self.capture)
            && let Err(error) = capture.unfollow(known.slot)
        {
            tracing::warn!(%disk, %error, "the disk could not be let go");
        }
    }

    fn harvest(&mut self, disk: DiskId) -> Result<RangeSet, CaptureError> {
        self.end_stretch(disk, false);
        let (Some(capture), Some(known)) = (&mut self.capture, self.disks.get_mut(&disk)) else {
            return Err(not_followed(disk));
        };
        let Some(stretch) = capture.open_stretch(known.slot)? else {
            return Err(CaptureError::Unsupported {
                disk: disk.to_string(),
                reason: "all its stretches are open".to_owned(),
            });
        };
        known.stretch = Some(stretch);
        let mut changed = capture.harvest(known.slot, stretch)?;
        // The last block of a disk may be shorter than the map's. Where the disk has grown once more since it is read to here,
        // what is behind stays marked until it is read, too.
        let behind = known.whole.end.next_multiple_of(BLOCK_SECTORS);
        let late: Vec<SectorRange> = changed.overlap(SectorRange::new(behind, u64::MAX)).collect();
        for range in late {
            capture.mark(known.slot, range)?;
        }
        changed.remove(SectorRange::new(known.whole.end, u64::MAX));
        Ok(changed)
    }

    fn end_stretch(&mut self, disk: DiskId, durable: bool) {
        let (Some(capture), Some(known)) = (&mut self.capture, self.disks.get_mut(&disk)) else { return };
        let Some(stretch) = known.stretch.take() else { return };
        let ended = if durable {
            capture.confirm(known.slot, stretch)
        } else {
            capture.give_back(known.slot, stretch).map(drop)
        };
        if let Err(error) = ended {
            tracing::error!(%disk, %error, "a stretch of changes could not be ended");
        }
    }

    /// Hands on what stands in the ring.
    fn stream_on(&mut self) {
        let (Some(stream), Some(capture)) = (&mut self.stream, &self.capture) else { return };
        match stream.advance(capture) {
            Ok(None) => {}
            Ok(Some((batches, as_of))) => self.tell(CaptureNews::Streamed { batches, as_of }),
            Err(broken) => self.end_stream(&broken.to_string()),
        }
    }

    fn end_stream(&mut self, why: &str) {
        let Some(stream) = self.stream.take() else { return };
        if let Some(capture) = &mut self.capture
            && let Err(error) = capture.end_recording()
        {
            tracing::error!(%error, "the stream of writes could not be ended");
        }
        self.tell(CaptureNews::StreamEnded { disks: stream.disks(), why: why.to_owned() });
    }

    /// Everything streamed so far, and a stretch of each disk that holds no more than that.
    fn point(&mut self, disks: &[DiskId], mut held: HeldFreeze) -> Result<WindowRead, CaptureError> {
        if !self.stream.as_ref().is_some_and(|stream| disks.iter().all(|disk| stream.disks().contains(disk)))
        {
            return Err(not_streamed("a window comes first"));
        }
        // Before the stream's end is taken: what is harvested was submitted before, and is in the stream.
        for disk in disks {
            self.harvest(*disk)?;
        }
        while !held.is_ready() {
            // What file systems write out on the way to the moment goes on as always.
            self.stream_on();
            if self.stream.is_none() {
                return Err(not_streamed("it ended on the way to the moment"));
            }
            std::thread::sleep(STREAM_EVERY / 10);
        }
        let (Some(stream), Some(capture)) = (&mut self.stream, &mut self.capture) else {
            return Err(not_streamed("there is no stream"));
        };
        let (source_time, end) = (wall_clock(), capture.stream_end());
        held.is_over();
        match stream.close(capture, end) {
            Ok(batches) => {
                // Until the stream ends: then a round reads them.
                for (slot, range) in stream.discarded() {
                    capture.mark(slot, range)?;
                }
                Ok(WindowRead {
                    batches,
                    unread: Vec::new(),
                    open: None,
                    point: true,
                    streams: true,
                    source_time,
                    frozen: held.into_result(),
                })
            }
            Err(broken) => {
                let reason = broken.to_string();
                self.end_stream(&reason);
                Err(CaptureError::NotStreamed { reason })
            }
        }
    }

    fn window(
        &mut self,
        disks: &[DiskId],
        stay: bool,
        mut held: HeldFreeze,
    ) -> Result<WindowRead, CaptureError> {
        let Some(capture) = &mut self.capture else {
            return Err(CaptureError::NotFollowed { disk: names(disks) });
        };
        let mut plan = Vec::new();
        let mut files = BTreeMap::new();
        let mut streamed = Vec::new();
        for (disk, known) in self.disks.iter_mut().filter(|(disk, _)| disks.contains(disk)) {
            plan.push((known.slot, known.stretch.ok_or_else(|| not_followed(*disk))?));
            streamed.push((*disk, known.slot, known.whole, capture.counts(known.slot)));
            files.insert(known.slot.index(), (*disk, &mut known.file, known.whole));
        }
        if plan.len() != disks.len() {
            return Err(CaptureError::NotFollowed { disk: names(disks) });
        }
        let mut gatherer = Gatherer::new(files);
        let mut source_time = wall_clock();
        let plan = WindowPlan { stay, ..WindowPlan::new(plan) };
        let mut drops;
        let mut tries = 1;
        let open = loop {
            drops = capture.drops();
            streamed.iter_mut().for_each(|(_, slot, _, before)| *before = capture.counts(*slot));
            match capture.window(&plan, &mut gatherer, &mut held) {
                Ok(WindowEnd::Closed(closed)) => {
                    tracing::debug!(?closed, tries, "a window closed");
                    source_time = closed.source_time;
                    break None;
                }
                // Writes that fail or are too long now and then must not keep every window from closing.
                Ok(WindowEnd::Failed(failure))
                    if failure.may_pass() && held.is_any() && tries < WINDOW_TRIES_MAX =>
                {
                    tracing::debug!(%failure, "another window is opened at once");
                    gatherer.forget_records();
                    tries += 1;
                }
                Ok(WindowEnd::Failed(failure)) => break Some(failure.to_string()),
                // What was read until then are changes like any others; what was not is read in the next round, which keeps
                // nothing in memory and leaves less for the window after it.
                Err(error @ CaptureError::WindowTooLarge { .. }) => break Some(error.to_string()),
                Err(error) => return Err(error),
            }
        };
        let unread = gatherer.unread();
        let (read, again) = gatherer.into_batches(open.is_none());
        // What a device makes of a discarded range is its own affair: it is read again in the next round.
        for (slot, range) in &again {
            capture.mark(*slot, *range)?;
        }
        let streams = stay && open.is_none();
        if streams {
            self.stream = Some(Stream::begin(streamed.into_iter(), drops, again));
        }
        let frozen = held.into_result();
        Ok(WindowRead { batches: read, unread, open, point: false, streams, source_time, frozen })
    }

    fn told(&mut self, disk: DiskId) {
        if let (Some(capture), Some(known)) = (&mut self.capture, self.disks.get(&disk)) {
            capture.told(known.slot);
        }
    }

    /// Also of a disk that is not followed any more.
    fn told_interrupted(&mut self, disk: DiskId) {
        if let (Some(capture), Some(identity)) = (&mut self.capture, self.identities.get(&disk)) {
            capture.told_interrupted(identity);
        }
    }

    fn check_all(&mut self) {
        let Some(capture) = &mut self.capture else { return };
        // Pins that are gone are told by the disks' own checks.
        let events = capture.newly_skipped().unwrap_or(0);
        if events > 0 {
            // A failed send means that the agent is stopping.
            let _ = self.news.send(CaptureNews::Skipped { events });
        }
        let disks: Vec<DiskId> = self.disks.keys().copied().collect();
        for disk in disks {
            self.check_disk(disk, events > 0);
            self.stream_on(); // the ring does not wait for the others
        }
    }

    /// `skipped`: programs were not run for some events since the last check.
    fn check_disk(&mut self, disk: DiskId, skipped: bool) {
        let (Some(capture), Some(known)) = (&mut self.capture, self.disks.get(&disk)) else { return };
        let (slot, whole, as_of) = (known.slot, known.whole, wall_clock());
        let why = match capture.check(slot, CHECK_PATIENCE).map(|check| check.verdict) {
            // The next check has to find it clean, too.
            Ok(Verdict::Clean { .. }) if skipped => return,
            Ok(Verdict::Clean { .. }) => {
                let _ = self.news.send(CaptureNews::Accounted { disk, as_of });
                return;
            }
            Ok(Verdict::Undecided) => return,
            Ok(Verdict::Short { sectors }) => CompareCause::Unaccounted { sectors }.to_string(),
            Ok(Verdict::Behind { sectors }) => format!(
                "the kernel counts {sectors} sectors less than were seen: its account was off for a while (iostats), and what was missed then is not known"
            ),
            Ok(Verdict::Unranged { commands }) => {
                format!("{commands} commands went past the block layer and may have written anything")
            }
            Err(error) => {
                capture.owe(slot);
                let _ = self.news.send(CaptureNews::Unfollowed { disk, why: error.to_string() });
                return self.unfollow(disk);
            }
        };
        if let Err(error) = capture.mark(slot, whole) {
            tracing::error!(%disk, %error, "the disk could not be marked");
        }
        let _ = self.news.send(CaptureNews::Unaccounted { disk, why });
    }
}

/// Opens a device past the page cache, whose content capture knows nothing of.
fn open_direct(path: &std::path::Path) -> Result<Box<dyn BlockFile>, String> {
    let (file, backend) =
        io::open_reporting(path, &io::OpenOptions::reading()).map_err(|error| error.to_string())?;
    if backend.is_direct() {
        return Ok(file);
    }
    Err(format!("{} can only be read through the page cache", path.display()))
}

fn shrank(path: &std::path::Path) -> String {
    format!("{} became smaller while it was opened; give it its size again", path.display())
}

fn held(wanted: Option<ToFreeze>) -> HeldFreeze {
    let limit = wanted.as_ref().map_or(Duration::ZERO, |wanted| wanted.limit);
    HeldFreeze::new(wanted.map(|wanted| wanted.freeze), limit)
}

fn not_followed(disk: DiskId) -> CaptureError {
    CaptureError::NotFollowed { disk: disk.to_string() }
}

fn not_streamed(reason: &str) -> CaptureError {
    CaptureError::NotStreamed { reason: reason.to_owned() }
}

fn names(disks: &[DiskId]) -> String {
    disks.iter().map(DiskId::to_string).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    const DISK: DiskId = DiskId([3; 16]);
    const MIB_SECTORS: u64 = 2048;

    /// The device is larger than the disk is read to yet: it grew since it was opened.
    #[test]
    fn what_a_disk_grew_by_is_all_found_also_where_its_map_had_that_size_before() {
        let _turn = capture_lab::machine();
        if !capture_lab::capable() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let device = capture_lab::Loop::new(dir.path(), "disk", 16);
        let (news, _told) = async_mpsc::unbounded_channel();
        let _place = capture_lab::Place::new("outgrown");
        let settings = CaptureSettings::new("outgrown", dir.path().to_owned());
        let mut owner = Owner {
            settings,
            capture: None,
            refused: None,
            disks: BTreeMap::new(),
            identities: BTreeMap::new(),
            stream: None,
            news,
        };
        let follow =
            |mib: u64, owner: &mut Owner| owner.follow(DISK, &device.path, "x", mib * MIB_SECTORS).unwrap();
        assert_eq!(follow(8, &mut owner), Some(CompareCause::FirstTime));
        assert_eq!(owner.harvest(DISK).unwrap().sector_count(), 8 * MIB_SECTORS);
        owner.end_stretch(DISK, true);
        assert_eq!(owner.harvest(DISK).unwrap().sector_count(), 0);
        assert_eq!(follow(16, &mut owner), None);
        let found: Vec<SectorRange> = owner.harvest(DISK).unwrap().iter().collect();
        assert_eq!(found, [SectorRange::new(8 * MIB_SECTORS, 16 * MIB_SECTORS)]);
    }

    /// That the kernel does leave out runs is shown in a guest (`unseen_commands`); here none need happen.
    #[test]
    fn runs_that_were_left_out_are_told_and_a_check_in_which_they_were_is_not_called_clean() {
        let _turn = capture_lab::machine();
        if !capture_lab::capable() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let device = capture_lab::Loop::new(dir.path(), "disk", 16);
        let (news, mut told) = async_mpsc::unbounded_channel();
        let _place = capture_lab::Place::new("left-out");
        let settings = CaptureSettings::new("left-out", dir.path().to_owned());
        let mut owner = Owner {
            settings,
            capture: None,
            refused: None,
            disks: BTreeMap::new(),
            identities: BTreeMap::new(),
            stream: None,
            news,
        };
        owner.follow(DISK, &device.path, "x", 16 * MIB_SECTORS).unwrap();
        owner.capture.as_mut().unwrap().skip(3);
        owner.check_all();
        assert!(matches!(told.try_recv(), Ok(CaptureNews::Skipped { events: 3.. })));
        assert!(told.try_recv().is_err(), "nothing is called clean");
        owner.check_all();
        assert!(matches!(told.try_recv(), Ok(CaptureNews::Accounted { disk: DISK, .. })));
    }
}
