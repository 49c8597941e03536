//! Whether anything still comes from a peer: how a dead one is found before the transport gives it up.
//!
//! Both ends of a connection send something every `KEEP_ALIVE_NANOS`, so a peer of which nothing comes for several of
//! them is gone, stopped or cut off. Looks are counted, not the clock: a process that was itself not scheduled has not
//! looked, and blames nobody. Invariant: one datagram begins the count anew. Units: looks. Called by the session tasks of
//! the agent and the process server on their timers.

use quinn::Connection;

/// The looks at one connection.
#[derive(Debug, Default)]
pub struct Silence {
    datagrams: u64,
    looks: u32,
}

impl Silence {
    /// Looks at `connection`: answers at how many looks in a row nothing had come since the one before.
    pub fn look(&mut self, connection: &Connection) -> u32 {
        self.count(connection.stats().udp_rx.datagrams)
    }

    const fn count(&mut self, datagrams: u64) -> u32 {
        if datagrams == self.datagrams {
            self.looks += 1;
        } else {
            self.datagrams = datagrams;
            self.looks = 0;
        }
        self.looks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_looks_that_found_nothing_new_are_counted() {
        let mut silence = Silence::default();
        let looks: Vec<u32> = [3, 3, 3, 4, 4, 9].map(|datagrams| silence.count(datagrams)).to_vec();
        assert_eq!(looks, [0, 1, 2, 0, 1, 0]);
    }
}
