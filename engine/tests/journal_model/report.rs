//! What plays went through: counts that show that the rules were tried at all.
//!
//! Invariant: counts only; nothing is decided by them but whether the suite tried everything. Called by `play.rs`.

use std::fmt;

use super::machine::Found;
use super::oracle::Judged;

macro_rules! report {
    ($($name:ident: $what:literal,)+) => {
        /// What a play went through, or the sum over many.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub(crate) struct Report {
            $(#[doc = $what] pub(crate) $name: usize,)+
        }

        impl Report {
            pub(crate) const fn add(&mut self, other: &Self) {
                $(self.$name += other.$name;)+
            }

            /// What no play came to.
            pub(crate) fn never_seen(&self) -> Vec<&'static str> {
                [$((self.$name, $what),)+].into_iter().filter(|count| count.0 == 0).map(|count| count.1).collect()
            }
        }

        impl fmt::Display for Report {
            fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
                $(write!(out, "\n  {:>9} {}", self.$name, $what)?;)+
                Ok(())
            }
        }
    };
}

report! {
    stops: "stops (power loss, kill, failed flush, unreadable record)",
    records: "records",
    epochs: "undo epochs",
    merges: "merges of runs",
    expired: "runs expired",
    freed: "segments freed",
    carried: "segments freed after what waited in them was carried",
    given_up: "times that what waited for a target was given up",
    grown: "disks that grew",
    damaged: "points that are known to be damaged",
    degraded: "points listed that promise less",
    resyncs: "compare passes",
    rollbacks: "rollbacks",
    roll_forwards: "rolls forward again",
    rotten_groups: "commit groups rotted",
    rotten_images: "before-images rotted",
    found_by_later_groups: "corrupt groups found by looking on",
    found_by_manifest: "corrupt groups found by the manifest",
    found_by_peer: "losses found by the peer's position",
    holes: "holes put into runs",
    views: "views judged",
    hole_sectors: "sectors served as holes",
    points: "points listed",
}

impl Report {
    pub(crate) const fn take(&mut self, found: Found, judged: Judged) {
        self.found_by_later_groups = found.by_later_groups;
        self.found_by_manifest = found.by_manifest;
        self.found_by_peer = found.by_peer;
        self.holes = found.holes;
        self.views = judged.views;
        self.hole_sectors = judged.hole_sectors;
        self.points = judged.points;
        self.degraded = judged.degraded;
        self.damaged = judged.damaged;
    }
}
