//! Whom to try next, and when.
//!
//! Invariants: each usable peer is tried once, the best first and without a pause, before any is tried again; the pause
//! between two such rounds grows until a session held; a peer that refuses this agent for what it is (revoked, expired,
//! another site) is asked again only every [`PAUSE_REFUSED`], so that nothing hammers at a closed door.
//! The order comes from `upstreams`. Called by `daemon`.

use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, Instant};

/// First pause before a peer is tried again; doubled up to the longest.
const PAUSE_FIRST: Duration = Duration::from_millis(200);
/// Longest pause before a peer is tried again.
const PAUSE_LONGEST: Duration = Duration::from_secs(5);
/// Pause after a refusal, which only a person can mend.
pub const PAUSE_REFUSED: Duration = Duration::from_secs(60);
/// A session that lasted this long counts as a success: everybody may be tried again, and the pause starts small.
const GOOD_SESSION: Duration = Duration::from_secs(10);

/// How an attempt ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It may well go better the next time.
    Lost(String),
    /// The peer does not want this agent; the text says what to do.
    Refused(String),
    /// The plan changed: dial again at once.
    Replanned(String),
    /// Another peer serves better: go there at once.
    Moved(String),
}

impl Ended {
    /// The reason.
    #[must_use]
    pub fn reason(&self) -> &str {
        let (Self::Lost(reason) | Self::Refused(reason) | Self::Replanned(reason) | Self::Moved(reason)) =
            self;
        reason
    }
}

/// Whom to try next, and when.
#[derive(Debug)]
pub struct Rota {
    /// Tried since the last good session, or since the last pause.
    tried: BTreeSet<String>,
    pause: Duration,
    not_before: Option<Instant>,
    refused_until: HashMap<String, Instant>,
}

impl Default for Rota {
    fn default() -> Self {
        Self { tried: BTreeSet::new(), pause: PAUSE_FIRST, not_before: None, refused_until: HashMap::new() }
    }
}

impl Rota {
    /// The address to try next and when, seen at `now`, of `ranked`, whose best comes first; `None` without any.
    pub fn next(&mut self, ranked: &[String], now: Instant) -> Option<(String, Instant)> {
        self.refused_until.retain(|_, until| *until > now);
        let welcome = |address: &&String| !self.refused_until.contains_key(*address);
        if let Some(fresh) =
            ranked.iter().filter(welcome).find(|address| !self.tried.contains(address.as_str()))
        {
            return Some((fresh.clone(), now));
        }
        // Everybody was tried: the next round begins after a pause.
        self.tried.clear();
        let from = self.not_before.unwrap_or(now).max(now);
        if let Some(best) = ranked.iter().find(welcome) {
            return Some((best.clone(), from));
        }
        let first = ranked.iter().min_by_key(|address| self.refused_until.get(*address))?;
        let at = self.refused_until.get(first).map_or(from, |until| from.max(*until));
        Some((first.clone(), at))
    }

    /// An attempt at `address` that began at `began` ended at `now`.
    pub fn ended(&mut self, address: &str, ended: &Ended, began: Instant, now: Instant) {
        if now.saturating_duration_since(began) >= GOOD_SESSION {
            self.pause = PAUSE_FIRST;
            self.tried.clear();
        }
        match ended {
            Ended::Lost(_) => {
                self.tried.insert(address.to_owned());
                self.not_before = Some(now + self.pause);
                self.pause = (self.pause * 2).min(PAUSE_LONGEST);
            }
            Ended::Refused(_) => {
                self.refused_until.insert(address.to_owned(), now + PAUSE_REFUSED);
            }
            Ended::Replanned(_) => *self = Self::default(),
            Ended::Moved(_) => self.tried = BTreeSet::from([address.to_owned()]),
        }
    }

    /// An operator changed something: nobody is waited for any more.
    pub fn hurry(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn everybody_is_tried_at_once_the_best_first_and_again_after_growing_pauses() {
        let (mut rota, ranked) = (Rota::default(), addresses(&["a", "b"]));
        let mut now = Instant::now();
        let (mut tried, mut pauses) = (Vec::new(), Vec::new());
        for _ in 0..12 {
            let (address, at) = rota.next(&ranked, now).unwrap();
            pauses.push((at - now).as_millis());
            now = at;
            rota.ended(&address, &Ended::Lost(String::new()), now, now);
            tried.push(address);
        }
        assert_eq!(tried.concat(), "abababababab");
        assert_eq!(pauses, [0, 0, 400, 0, 1600, 0, 5000, 0, 5000, 0, 5000, 0]);
    }

    #[test]
    fn after_a_session_that_held_the_others_are_tried_at_once() {
        let (mut rota, ranked) = (Rota::default(), addresses(&["a", "b"]));
        let begin = Instant::now();
        for _ in 0..7 {
            let (address, at) = rota.next(&ranked, begin).unwrap();
            rota.ended(&address, &Ended::Lost(String::new()), at, at);
        }
        let held = begin + GOOD_SESSION;
        rota.ended("a", &Ended::Lost(String::new()), begin, held);
        assert_eq!(rota.next(&ranked, held), Some(("b".to_owned(), held)));
        rota.ended("b", &Ended::Lost(String::new()), held, held);
        assert_eq!(rota.next(&ranked, held), Some(("a".to_owned(), held + 2 * PAUSE_FIRST)));
    }

    #[test]
    fn a_single_peer_that_was_lost_is_dialled_again_after_a_short_pause() {
        let (mut rota, ranked) = (Rota::default(), addresses(&["a"]));
        let begin = Instant::now();
        let held = begin + GOOD_SESSION;
        rota.ended("a", &Ended::Lost(String::new()), begin, held);
        assert_eq!(rota.next(&ranked, held), Some(("a".to_owned(), held + PAUSE_FIRST)));
    }

    #[test]
    fn who_moved_does_not_go_back_at_once() {
        let (mut rota, ranked) = (Rota::default(), addresses(&["a", "b"]));
        let now = Instant::now();
        rota.ended("a", &Ended::Moved(String::new()), now, now);
        assert_eq!(rota.next(&ranked, now), Some(("b".to_owned(), now)));
    }

    #[test]
    fn a_peer_that_refused_is_left_alone_while_others_are_tried() {
        let (mut rota, ranked) = (Rota::default(), addresses(&["a", "b"]));
        let begin = Instant::now();
        let mut now = begin;
        let mut asked = Vec::new();
        while now < begin + 3 * PAUSE_REFUSED {
            let (address, at) = rota.next(&ranked, now).unwrap();
            now = at;
            let ended = if address == "a" {
                asked.push(now);
                Ended::Refused(String::new())
            } else {
                Ended::Lost(String::new())
            };
            rota.ended(&address, &ended, now, now);
        }
        assert!(asked.len() <= 4, "{asked:?}");
        assert!(asked.windows(2).all(|pair| pair[1] - pair[0] >= PAUSE_REFUSED));
    }

    #[test]
    fn a_single_peer_that_refused_is_asked_again_slowly_or_when_an_operator_hurries() {
        let (mut rota, ranked) = (Rota::default(), addresses(&["a"]));
        let now = Instant::now();
        rota.ended("a", &Ended::Refused(String::new()), now, now);
        assert_eq!(rota.next(&ranked, now).unwrap().1, now + PAUSE_REFUSED);
        rota.hurry();
        assert_eq!(rota.next(&ranked, now).unwrap().1, now);
        assert!(rota.next(&[], now).is_none());
    }
}
