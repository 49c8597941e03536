//! The loaded programs and their maps, as pinned: the one place where capture talks to the kernel.
//!
//! Invariants: it is always opened from the pins, whether they were made a moment ago or by a process that was killed, so
//! both ways are one; counters only grow and are summed over CPUs. Units: sectors, 64-bit words.
//! Owned by `tracker`; read by `oracle` and `window`.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use aya::maps::{Array, ArrayOfMaps, IterableMap, Map, MapData, MapError, MapInfo};
use aya::programs::ProgramInfo;
use aya::programs::links::PinnedLink;
use rustix::thread::{MembarrierCommand, membarrier};

use super::layout::{CONTROL_WORDS, DISKS, DISKS_MAX, FLIGHTS_WORDS, TALLY_WORDS, WRITTEN_OFF};
use super::layout::{Control, Flight, GENERATION_SLOTS, Kind, Mode, ModeWord, Tally};
use super::layout::{FLIGHT_BUSY, FLIGHT_SET_WORDS, FLIGHT_WAYS, FLIGHT_WORDS};
use super::loader::{LoadOptions, MAPS, PROGRAMS, attach, link_pin, load, program};
use super::mapped::Mapped;
use super::pins::Claim;
use super::{CaptureError, bitmap};

/// An entry of the table of writes in flight: where its key stands, and the key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FlightKey {
    at: usize,
    key: u64,
}

/// Programs and maps in the kernel.
#[derive(Debug)]
pub(crate) struct Kernel {
    control: Mapped,
    flights: Mapped,
    tallies: Mapped,
    inflight: Mapped,
    dirty: ArrayOfMaps<MapData, Array<MapData, u64>>,
    ring: MapData,
    cpus: usize,
    ids: Vec<u32>,
}

impl Kernel {
    /// Loads into an empty place, pins, attaches, opens. `before_attach` is called between.
    pub(crate) fn begin(
        place: &Claim,
        options: &LoadOptions,
        before_attach: impl FnOnce(&Self) -> Result<(), CaptureError>,
    ) -> Result<Self, CaptureError> {
        place.clear()?;
        let (mut loaded, variant) = load(place, options)?;
        let kernel = Self::open(place)?;
        kernel.set_mode(ModeWord { mode: Mode::Bitmap, generation: 1 });
        before_attach(&kernel)?;
        for (name, tracepoint) in PROGRAMS {
            let link = attach(program(&mut loaded, name)?, tracepoint)?;
            link.pin(place.pin(&link_pin(name))).map_err(super::loader::refused)?;
        }
        tracing::info!(%variant, place = %place.path().display(), "capture programs attached");
        Ok(kernel)
    }

    /// Opens what is pinned. What is attached is checked by [`Self::check_links`].
    pub(crate) fn open(place: &Claim) -> Result<Self, CaptureError> {
        let map = |name: &'static str| pinned(&place.pin(name));
        let cpus = super::loader::cpus()?;
        let mapped = |name: &'static str, words: usize| -> Result<Mapped, CaptureError> {
            let data = map(name)?;
            let bytes = (words * 8).next_multiple_of(rustix::param::page_size());
            Mapped::new(data.fd(), 0, bytes, true).map_err(CaptureError::map(name))
        };
        let sets = map("inflight")?.info().map_err(CaptureError::map("inflight"))?.max_entries() as usize;
        let mut ids = Vec::new();
        for name in MAPS {
            ids.push(pin_id(&place.pin(name))?);
        }
        for (name, _) in PROGRAMS {
            ids.push(program_info(&place.pin(name))?.id());
        }
        Ok(Self {
            control: mapped("control", CONTROL_WORDS)?,
            flights: mapped("flights", cpus * FLIGHTS_WORDS)?,
            tallies: mapped("tallies", cpus * DISKS_MAX * TALLY_WORDS)?,
            inflight: mapped("inflight", sets * FLIGHT_SET_WORDS)?,
            dirty: ArrayOfMaps::try_from(Map::ArrayOfMaps(map("dirty")?))
                .map_err(CaptureError::map("dirty"))?,
            ring: map("ring")?,
            cpus,
            ids,
        })
    }

    /// Numbers of the maps and programs, in the order of their names in `loader`.
    pub(crate) fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Whether everything that was pinned is still pinned and attached.
    ///
    /// # Errors
    /// [`CaptureError::PinChanged`] names the first that is not.
    pub(crate) fn check_links(&self, place: &Claim) -> Result<(), CaptureError> {
        for (name, id) in MAPS.iter().zip(&self.ids) {
            same(&place.pin(name), *id, pin_id)?;
        }
        for ((name, _), id) in PROGRAMS.iter().zip(self.ids.iter().skip(MAPS.len())) {
            same(&place.pin(name), *id, |path| Ok(program_info(path)?.id()))?;
            same(&place.pin(&link_pin(name)), *id, |path| {
                let changed = || CaptureError::PinChanged { path: path.to_owned() };
                let link = PinnedLink::from_pin(path).map_err(|_| changed())?;
                let link: aya::programs::links::FdLink = link.into();
                Ok(link.info().map_err(|_| changed())?.program_id())
            })?;
        }
        Ok(())
    }

    fn control(&self, word: Control) -> &AtomicU64 {
        &self.control.words()[word as usize]
    }

    /// A control word.
    pub(crate) fn get(&self, word: Control) -> u64 {
        self.control(word).load(Ordering::SeqCst)
    }

    /// Sets a control word.
    pub(crate) fn set(&self, word: Control, value: u64) {
        self.control(word).store(value, Ordering::SeqCst);
    }

    /// Mode and generation in force.
    pub(crate) fn mode(&self) -> ModeWord {
        ModeWord::decode(self.get(Control::ModeWord))
    }

    /// Sets both; programs that run just now may still have read the old ones, see [`Self::settle`].
    pub(crate) fn set_mode(&self, word: ModeWord) {
        self.set(Control::ModeWord, word.encode());
    }

    /// Changes the mode and begins a generation; returns when no program runs any more that read the old word.
    pub(crate) fn switch(&self, mode: Mode) -> Result<u64, CaptureError> {
        let generation = self.mode().generation + 1;
        self.set_mode(ModeWord { mode, generation });
        self.settle()?;
        Ok(generation)
    }

    /// Waits until every program that runs now has ended.
    pub(crate) fn settle(&self) -> Result<(), CaptureError> {
        if membarrier(MembarrierCommand::Global).is_ok() {
            return Ok(());
        }
        self.settle_by_map()
    }

    /// Where CPUs run without a tick the barrier is refused: changing a map of maps waits for running programs as well. The
    /// last place is set to what stands there, or to a map of nothing where no disk has it.
    fn settle_by_map(&self) -> Result<(), CaptureError> {
        let map = MapData::from_id(self.ids[1]).map_err(CaptureError::map("dirty"))?;
        let mut dirty: ArrayOfMaps<MapData, Array<MapData, u64>> =
            ArrayOfMaps::try_from(Map::ArrayOfMaps(map)).map_err(CaptureError::map("dirty"))?;
        let last = DISKS_MAX as u32 - 1;
        let there = match dirty.get(&last, 0) {
            Ok(there) => there,
            Err(MapError::KeyNotFound) => {
                Array::create(1, bitmap::FLAGS).map_err(CaptureError::map("dirty"))?
            }
            Err(error) => return Err(CaptureError::map("dirty")(error)),
        };
        dirty.set(last, &there, 0).map_err(CaptureError::map("dirty"))
    }

    /// Writes of generations before `generation` that were submitted and not seen completing. Exact after
    /// [`Self::settle`], and then it only falls.
    pub(crate) fn in_flight_before(&self, generation: u64, reaped_below: u64) -> u64 {
        let words = self.flights.words();
        let mut sum = 0_u64;
        let oldest = reaped_below.max(generation.saturating_sub(GENERATION_SLOTS as u64 - 1));
        for older in oldest..generation {
            let written_off = self.written_off(older).load(Ordering::SeqCst);
            sum = sum.wrapping_add(in_flight_of(words, self.cpus, older).wrapping_sub(written_off));
        }
        sum
    }

    fn written_off(&self, generation: u64) -> &AtomicU64 {
        &self.control.words()[WRITTEN_OFF + (generation % GENERATION_SLOTS as u64) as usize]
    }

    /// Gives up every entry older than `generation`; answers from which generation on entries had not been given up before.
    /// From then on programs credit nothing to those generations, so that what is missing in their counters stays as it is
    /// and is remembered: the counters are used again by later generations.
    pub(crate) fn give_up_before(&self, generation: u64) -> Result<u64, CaptureError> {
        let before = self.get(Control::ReapedBelow);
        self.set(Control::ReapedBelow, generation);
        self.settle()?;
        let oldest = before.max(generation.saturating_sub(GENERATION_SLOTS as u64 - 1));
        for older in oldest..generation {
            let missing = in_flight_of(self.flights.words(), self.cpus, older);
            self.written_off(older).store(missing, Ordering::SeqCst);
        }
        Ok(before)
    }

    /// A counter of a disk, over all CPUs.
    pub(crate) fn tally(&self, slot: usize, field: Tally, index: usize) -> u64 {
        let words = self.tallies.words();
        (0..self.cpus)
            .map(|cpu| (cpu * DISKS_MAX + slot) * TALLY_WORDS + field as usize + index)
            .map(|at| words[at].load(Ordering::Acquire))
            .fold(0, u64::wrapping_add)
    }

    /// Sectors and counts that were seen completing, per kind.
    pub(crate) fn kind_tally(&self, slot: usize, field: Tally, kind: Kind) -> u64 {
        self.tally(slot, field, kind as usize)
    }

    /// Begins following a disk in that place. Programs that begin from now on know it.
    pub(crate) fn follow(&self, key: u32, slot: usize) {
        self.disk(slot).store(u64::from(key), Ordering::SeqCst);
        self.control(Control::DisksEnd).fetch_max(slot as u64 + 1, Ordering::SeqCst);
    }

    /// Ends following a disk, if it is followed; programs that run just now may still know it, see [`Self::settle`].
    pub(crate) fn unfollow(&self, key: u32) {
        if let Some(slot) = self.followed(key) {
            self.disk(slot).store(0, Ordering::SeqCst);
        }
    }

    /// The place of a followed disk.
    pub(crate) fn followed(&self, key: u32) -> Option<usize> {
        (0..DISKS_MAX).find(|slot| self.disk(*slot).load(Ordering::SeqCst) == u64::from(key))
    }

    fn disk(&self, slot: usize) -> &AtomicU64 {
        &self.control.words()[DISKS + slot]
    }

    /// Puts a dirty map into its place; returns when no program uses the one that was there.
    pub(crate) fn set_dirty(&mut self, slot: usize, map: &Array<MapData, u64>) -> Result<(), CaptureError> {
        self.dirty.set(slot as u32, map, 0).map_err(CaptureError::map("dirty"))
    }

    /// Number of the dirty map in its place.
    pub(crate) fn dirty_id(&self, slot: usize) -> Option<u32> {
        let map: Array<MapData, u64> = self.dirty.get(&(slot as u32), 0).ok()?;
        map_id(&map)
    }

    /// Writes in flight. Entries come and go meanwhile: of generations that had ended before, by [`Self::switch`], none
    /// comes, and what is answered of them is whole.
    pub(crate) fn flights(&self) -> Vec<(FlightKey, Flight)> {
        let words = self.inflight.words();
        let keys = (0..words.len() / FLIGHT_SET_WORDS * FLIGHT_WAYS)
            .map(|place| place / FLIGHT_WAYS * FLIGHT_SET_WORDS + place % FLIGHT_WAYS);
        keys.filter_map(|at| self.flight(at)).collect()
    }

    fn flight(&self, at: usize) -> Option<(FlightKey, Flight)> {
        let words = self.inflight.words();
        let key = words[at].load(Ordering::Acquire);
        if key == 0 || key & FLIGHT_BUSY != 0 {
            return None;
        }
        let (set, way) = (at / FLIGHT_SET_WORDS * FLIGHT_SET_WORDS, at % FLIGHT_SET_WORDS);
        let first = set + FLIGHT_WAYS + way * FLIGHT_WORDS;
        let value = std::array::from_fn(|word| words[first + word].load(Ordering::Relaxed));
        fence(Ordering::Acquire);
        // Otherwise it ended meanwhile, and what was read may be of the next one.
        (words[at].load(Ordering::Relaxed) == key).then(|| (FlightKey { at, key }, Flight::decode(value)))
    }

    /// Takes an entry away; answers whether it was there, for it may have gone by itself. The key says its generation, so
    /// that a later write in the same place is another one.
    pub(crate) fn forget_flight(&self, entry: FlightKey) -> bool {
        let key = &self.inflight.words()[entry.at];
        key.compare_exchange(entry.key, 0, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }

    /// Takes away the entries of a disk that no program follows since before this generation: their completions are not
    /// seen, and nothing is to wait for them.
    pub(crate) fn forget_flights_of(&self, slot: usize) {
        let reaped_below = self.get(Control::ReapedBelow);
        for (entry, known) in self.flights().into_iter().filter(|(_, flight)| flight.slot == slot) {
            if self.forget_flight(entry) && known.generation >= reaped_below {
                self.written_off(known.generation).fetch_add(1, Ordering::SeqCst);
            }
        }
    }

    /// The ring's map.
    pub(crate) fn ring(&self) -> &MapData {
        &self.ring
    }
}

/// Done is read first: a write that is submitted and done between the two readings must not make the sum negative.
fn in_flight_of(words: &[AtomicU64], cpus: usize, generation: u64) -> u64 {
    let at = (generation % GENERATION_SLOTS as u64) as usize;
    let sum = |field: usize| {
        (0..cpus)
            .map(|cpu| words[cpu * FLIGHTS_WORDS + field * GENERATION_SLOTS + at].load(Ordering::SeqCst))
            .fold(0, u64::wrapping_add)
    };
    let gone = sum(1).wrapping_add(sum(2)).wrapping_add(sum(3));
    sum(0).wrapping_sub(gone)
}

/// The number of a map.
pub(crate) fn map_id(map: &Array<MapData, u64>) -> Option<u32> {
    map.map().info().ok().map(|info| info.id())
}

/// A pinned map.
pub(crate) fn pinned(path: &Path) -> Result<MapData, CaptureError> {
    MapData::from_pin(path).map_err(|_| CaptureError::PinChanged { path: path.to_owned() })
}

/// The number of a pinned map.
pub(crate) fn pin_id(path: &Path) -> Result<u32, CaptureError> {
    let info = MapInfo::from_pin(path).map_err(|_| CaptureError::PinChanged { path: path.to_owned() })?;
    Ok(info.id())
}

fn program_info(path: &Path) -> Result<ProgramInfo, CaptureError> {
    ProgramInfo::from_pin(path).map_err(|_| CaptureError::PinChanged { path: path.to_owned() })
}

fn same(
    path: &Path,
    id: u32,
    ask: impl FnOnce(&Path) -> Result<u32, CaptureError>,
) -> Result<(), CaptureError> {
    if ask(path)? == id { Ok(()) } else { Err(CaptureError::PinChanged { path: path.to_owned() }) }
}
