//! The peers this agent may use (process servers, or the master target itself): how each stands, which is best, and a
//! connection kept ready to the one that would be next.
//!
//! With one configured peer there is nothing to choose and nothing is kept. With several, a task for each address measures
//! it; the best that has no session keeps its connection and is probed every second, the others are looked at again every
//! minute. Which is best is `choice`'s.
//!
//! Invariants: a peer is dialled by its own task or by the session, never by both; a connection is handed over at once,
//! whatever its task waits for; losing any of them costs nothing but the choice. Kept by `daemon`, read by `session`.

mod choice;

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use reprotect_engine::format::standby::Load;
use reprotect_engine::net::endpoint::CloseCode;
use reprotect_engine::net::standby::{Probing, Standing};
use reprotect_engine::units::PeerId;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

pub(crate) use choice::Way;

use crate::api::UpstreamInfo;
use crate::dial::Dial;

/// Pause between two probes of a connection that is kept.
const PROBE_PAUSE: Duration = Duration::from_secs(1);
/// … and of the first few, so that one late answer does not judge a peer.
const LOOK_PAUSE: Duration = Duration::from_millis(50);
/// How many the first few are.
const LOOKS: u32 = 3;
/// A peer that takes longer to answer is lost.
const PROBE_LIMIT: Duration = Duration::from_secs(2);
/// Pause until a peer that is not kept is looked at again.
const MEASURE_PAUSE: Duration = Duration::from_secs(60);
/// First pause until a peer that cannot be had is tried again; doubled up to the longest.
const PAUSE_FIRST: Duration = Duration::from_secs(1);
/// Longest such pause.
const PAUSE_LONGEST: Duration = Duration::from_secs(30);
/// Pause until a disk that nobody had room for makes the session move again.
const ROOM_PAUSE: Duration = Duration::from_secs(60);
/// After so long without a move, the next one is like the first.
const CALM: Duration = Duration::from_secs(2 * 3600);
/// How many times longer a reason to move must last at most.
const PATIENCE_MAX: u32 = 64;
/// How long a start waits for all peers to be measured.
const FIRST_LOOK: Duration = Duration::from_secs(1);

/// A connection that stands by, and becomes the session's.
pub(crate) type Ready = Standing<usize>;

#[derive(Debug, Default)]
struct Seen {
    way: Way,
    /// A connection is kept.
    kept: bool,
}

#[derive(Debug)]
struct Shared {
    agent: PeerId,
    seen: Mutex<BTreeMap<String, Seen>>,
    /// Who has the session, or is dialled for it.
    used: watch::Sender<Option<String>>,
    /// Changes whenever anything else here does, and after that.
    learnt: watch::Sender<u64>,
}

impl Shared {
    fn seen(&self) -> MutexGuard<'_, BTreeMap<String, Seen>> {
        // A panic while holding it leaves whole values.
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_used(&self, address: &str) -> bool {
        self.used.borrow().as_deref() == Some(address)
    }

    fn learn(&self, address: &str, change: impl FnOnce(&mut Seen)) {
        if let Some(seen) = self.seen().get_mut(address) {
            change(seen);
        }
        self.learnt.send_modify(|count| *count += 1);
    }

    /// All addresses, the best first.
    fn ranked(&self) -> Vec<String> {
        let seen = self.seen();
        let mut addresses: Vec<&String> = seen.keys().collect();
        addresses.sort_by_cached_key(|address| {
            let way = seen.get(*address).map_or(&Way::Unknown, |seen| &seen.way);
            choice::rank(way, self.own_number(address))
        });
        addresses.into_iter().cloned().collect()
    }

    /// Each agent has an order of its own among peers that are alike.
    fn own_number(&self, address: &str) -> u64 {
        let mut hasher = DefaultHasher::new();
        (self.agent.0, address).hash(&mut hasher);
        hasher.finish()
    }

    /// Whether this peer would be next; before there is a session, the one after the first counts, too.
    fn would_be_next(&self, address: &str) -> bool {
        let first = if self.used.borrow().is_some() { 1 } else { 2 };
        self.ranked().iter().filter(|other| !self.is_used(other)).take(first).any(|next| next == address)
    }

    /// Whether a connection is kept to whoever would be next.
    fn next_is_kept(&self) -> bool {
        let next = self.ranked().into_iter().find(|other| !self.is_used(other));
        next.is_some_and(|next| self.seen().get(&next).is_some_and(|seen| seen.kept))
    }

    fn use_only(&self, address: Option<&str>) {
        self.used.send_replace(address.map(str::to_owned));
        self.learnt.send_modify(|count| *count += 1);
    }
}

/// A task that looks after one address; it ends when this is dropped.
#[derive(Debug)]
struct Watcher {
    wants: mpsc::Sender<oneshot::Sender<Ready>>,
    task: JoinHandle<()>,
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The peers this agent may use.
pub(crate) struct Upstreams {
    shared: Arc<Shared>,
    dial: Arc<Dial>,
    configured: Vec<String>,
    watchers: BTreeMap<String, Watcher>,
    /// Since when which other peer has been better than the active one.
    better: Option<(String, Instant)>,
    moves: u64,
    moved_last: Option<Instant>,
    patience: u32,
}

impl Upstreams {
    /// Nobody yet; `agent` gives the order among peers that are alike.
    pub(crate) fn new(agent: PeerId, dial: Arc<Dial>) -> Self {
        let shared = Shared {
            agent,
            seen: Mutex::default(),
            used: watch::Sender::new(None),
            learnt: watch::Sender::new(0),
        };
        Self {
            shared: Arc::new(shared),
            dial,
            configured: Vec::new(),
            watchers: BTreeMap::new(),
            better: None,
            moves: 0,
            moved_last: None,
            patience: 1,
        }
    }

    /// Uses these from now on. What is known of those that stay, stays.
    pub(crate) fn configure(&mut self, addresses: &[String]) {
        if self.configured == addresses {
            return;
        }
        self.configured = addresses.to_vec();
        self.watchers.retain(|address, _| addresses.contains(address));
        {
            let mut seen = self.shared.seen();
            seen.retain(|address, _| addresses.contains(address));
            for address in addresses {
                seen.entry(address.clone()).or_default();
            }
        }
        if self.has_choice() {
            for address in addresses {
                self.watchers.entry(address.clone()).or_insert_with(|| {
                    let (wants, wanted) = mpsc::channel(1);
                    let watch =
                        watch_one(address.clone(), Arc::clone(&self.shared), Arc::clone(&self.dial), wanted);
                    Watcher { wants, task: tokio::spawn(watch) }
                });
            }
        } else {
            self.watchers.clear();
        }
    }

    /// Whether there is more than one.
    pub(crate) fn has_choice(&self) -> bool {
        self.configured.len() > 1
    }

    /// Waits a moment until all were looked at, so that the first choice is a good one.
    pub(crate) async fn first_look(&self) {
        if !self.has_choice() {
            return;
        }
        let mut learnt = self.shared.learnt.subscribe();
        let all = learnt.wait_for(|_| self.shared.seen().values().all(|seen| seen.way != Way::Unknown));
        // Who does not answer in time comes later in the order.
        let _ = tokio::time::timeout(FIRST_LOOK, all).await;
    }

    /// All addresses, the best first; as configured where there is no choice.
    pub(crate) fn ranked(&self) -> Vec<String> {
        if self.has_choice() { self.shared.ranked() } else { self.configured.clone() }
    }

    /// As [`Self::ranked`], those first to which a connection is kept and that can be used: a session begins there at once,
    /// and what is known of them is not a minute old.
    pub(crate) fn to_try(&self) -> Vec<String> {
        let mut addresses = self.ranked();
        let seen = self.shared.seen();
        let is_ready =
            |address: &String| seen.get(address).is_some_and(|seen| seen.kept && seen.way.is_usable());
        addresses.sort_by_key(|address| !is_ready(address)); // a stable sort
        addresses
    }

    /// A session is to be had with `address`: its connection, if one is kept.
    pub(crate) async fn take(&mut self, address: &str) -> Option<Ready> {
        self.shared.use_only(Some(address));
        self.better = None;
        let watcher = self.watchers.get(address)?;
        let (give, given) = oneshot::channel();
        watcher.wants.send(give).await.ok()?;
        given.await.ok()
    }

    /// The session with `address` is over.
    pub(crate) fn give_back(&self, address: &str, lost: Option<&str>) {
        if let Some(reason) = lost {
            self.shared.learn(address, |seen| seen.way = Way::Lost(reason.to_owned()));
        }
        self.shared.use_only(None);
    }

    /// What the session learnt of its peer; answers a reason to move, if there is one.
    pub(crate) fn advise(&mut self, address: &str, probing: &Probing, now: Instant) -> Option<String> {
        if !self.has_choice() {
            return None;
        }
        if let (Some(round_trip), Some(load)) = (probing.round_trip(), probing.load()) {
            // A peer that serves this agent takes it, whatever it would say to another.
            let way = Way::Reached { round_trip, load: Load { accepts: true, ..load } };
            if self.shared.seen().get(address).is_some_and(|seen| seen.way != way) {
                self.shared.learn(address, |seen| seen.way = way);
            }
        }
        let waited = probing.waits_since().map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
        let best = self.shared.ranked().into_iter().find(|other| other != address)?;
        let after = {
            let seen = self.shared.seen();
            let way = |address: &str| seen.get(address).map_or(&Way::Unknown, |seen| &seen.way);
            choice::worth_after(way(address), waited, way(&best))
        };
        let Some(after) = after.map(|after| after * self.patience(now)) else {
            self.better = None;
            return None;
        };
        let since = match &self.better {
            Some((other, since)) if *other == best => *since,
            _ => self.better.insert((best.clone(), now)).1,
        };
        if now.saturating_duration_since(since) < after {
            return None;
        }
        self.better = None;
        self.note_move(now);
        Some(format!("{best} has served better than {address} for {} s", after.as_secs()))
    }

    /// How many times longer than usual a reason to move must last: each move doubles it, until none came for a while. A load
    /// that makes the peer it goes to the slower one, or a disk that only one has room for, moves nobody to and fro.
    fn patience(&mut self, now: Instant) -> u32 {
        if self.moved_last.is_some_and(|at| now >= at + CALM) {
            (self.moved_last, self.patience) = (None, 1);
        }
        self.patience
    }

    fn note_move(&mut self, now: Instant) {
        self.moves += 1;
        self.moved_last = Some(now);
        self.patience = (self.patience * 2).min(PATIENCE_MAX);
    }

    /// Whether it is worth to go elsewhere because `address` has no room for a disk: somebody else has room, and this was
    /// not tried just now.
    pub(crate) fn has_room_elsewhere(&mut self, address: &str, now: Instant) -> bool {
        let elsewhere =
            self.shared.seen().iter().any(|(other, seen)| other != address && seen.way.is_usable());
        let pause = ROOM_PAUSE * self.patience(now);
        let lately = self.moved_last.is_some_and(|at| now < at + pause);
        if !elsewhere || lately {
            return false;
        }
        self.note_move(now);
        true
    }

    /// How often the session moved because another peer served better.
    pub(crate) const fn moves(&self) -> u64 {
        self.moves
    }

    /// How each stands, for people.
    pub(crate) fn describe(&self) -> Vec<UpstreamInfo> {
        let ranked = self.ranked();
        let seen = self.shared.seen();
        let describe = |address: &String| {
            let seen = seen.get(address)?;
            let mut info = UpstreamInfo {
                address: address.clone(),
                used: self.shared.is_used(address),
                ready: seen.kept,
                ..UpstreamInfo::default()
            };
            match &seen.way {
                Way::Unknown => {}
                Way::Reached { round_trip, load } => {
                    let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
                    info.round_trip_us = Some(micros(*round_trip));
                    info.to_target_us = seen.way.to_target().map(micros);
                    info.sessions = Some(load.sessions);
                    info.room_permille = Some(load.room_permille);
                    info.accepts = load.accepts;
                }
                Way::Lost(reason) => info.problem = Some(reason.clone()),
            }
            Some(info)
        };
        ranked.iter().filter_map(describe).collect()
    }
}

/// Looks after one address for ever.
async fn watch_one(
    address: String,
    shared: Arc<Shared>,
    dial: Arc<Dial>,
    mut wants: mpsc::Receiver<oneshot::Sender<Ready>>,
) {
    let mut pause = PAUSE_FIRST;
    loop {
        let mut used = shared.used.subscribe();
        if idle(&mut wants, used.wait_for(|used| used.as_deref() != Some(address.as_str()))).await.is_none() {
            continue; // wanted: the session has it now
        }
        let opened = async {
            let peer = dial.connect(&address).await.map_err(|ended| ended.reason().to_owned())?;
            Ready::open(peer).await.map_err(|error| error.to_string())
        };
        let reason = match idle(&mut wants, opened).await {
            None => continue,
            Some(Err(reason)) => reason,
            Some(Ok(ready)) => match keep(&address, &shared, ready, &mut wants).await {
                Kept::HandedOver => continue,
                Kept::NotNeeded => {
                    pause = PAUSE_FIRST;
                    // Looked at again after a while, or when the one before it falls away.
                    let mut learnt = shared.learnt.subscribe();
                    let needed = async {
                        tokio::select! {
                            () = tokio::time::sleep(MEASURE_PAUSE) => {}
                            _ = learnt.wait_for(|_| shared.would_be_next(&address)) => {}
                        }
                    };
                    let _ = idle(&mut wants, needed).await;
                    continue;
                }
                Kept::Lost(reason) => {
                    pause = PAUSE_FIRST;
                    reason
                }
            },
        };
        if !shared.is_used(&address) {
            tracing::debug!(address, reason, "a process server does not stand by");
            shared.learn(&address, |seen| seen.way = Way::Lost(reason));
        }
        let _ = idle(&mut wants, tokio::time::sleep(pause)).await;
        pause = (pause * 2).min(PAUSE_LONGEST);
    }
}

/// Waits for `what` while there is no connection to hand over; none when one was wanted, which then gets nothing.
async fn idle<F: Future>(wants: &mut mpsc::Receiver<oneshot::Sender<Ready>>, what: F) -> Option<F::Output> {
    tokio::select! {
        Some(_nothing) = wants.recv() => None,
        output = what => Some(output),
    }
}

/// How the keeping of a connection ended.
enum Kept {
    HandedOver,
    NotNeeded,
    Lost(String),
}

/// Measures a connection and keeps it while it would be next.
async fn keep(
    address: &str,
    shared: &Shared,
    mut ready: Ready,
    wants: &mut mpsc::Receiver<oneshot::Sender<Ready>>,
) -> Kept {
    let mut looks = 0;
    let ended = loop {
        let probed = tokio::select! {
            want = wants.recv() => match want {
                Some(want) => break hand_over(ready, want),
                None => break Kept::NotNeeded,
            },
            probed = ready.probe(PROBE_LIMIT) => probed,
        };
        let load = match probed {
            Ok(load) => load,
            Err(error) => {
                let reason = ready.peer.refusal().unwrap_or_else(|| error.to_string());
                CloseCode::Finished.close(&ready.peer.connection);
                break Kept::Lost(reason);
            }
        };
        let round_trip = ready.probing.round_trip().unwrap_or_default();
        looks += 1;
        if looks == 1 || looks >= LOOKS {
            shared.learn(address, |seen| {
                seen.way = Way::Reached { round_trip, load };
                seen.kept = true;
            });
        }
        // It goes when the one that would be next is there.
        if looks >= LOOKS && !shared.would_be_next(address) && shared.next_is_kept() {
            CloseCode::Finished.close(&ready.peer.connection);
            break Kept::NotNeeded;
        }
        let pause = if looks < LOOKS { LOOK_PAUSE } else { PROBE_PAUSE };
        tokio::select! {
            want = wants.recv() => match want {
                Some(want) => break hand_over(ready, want),
                None => break Kept::NotNeeded,
            },
            () = tokio::time::sleep(pause) => {}
        }
    };
    shared.learn(address, |seen| seen.kept = false);
    ended
}

fn hand_over(ready: Ready, want: oneshot::Sender<Ready>) -> Kept {
    match want.send(ready) {
        Ok(()) => Kept::HandedOver,
        Err(ready) => {
            CloseCode::Finished.close(&ready.peer.connection);
            Kept::NotNeeded
        }
    }
}
