//! How what a harvest found is read: changed parts that lie near one another as one read, many reads at a time.
//!
//! A device takes about as long for 4 KiB as for 64, so a small gap of unchanged sectors is cheaper to read than to leave out.
//! Invariants: the parts of a span are all that was asked for in it, in order; no span is longer than `SPAN_SECTORS_MAX`; a
//! group fits `GROUP_BYTES_MAX` when each span begins at an aligned place. Units: sectors, bytes. Called by whoever
//! implements `WindowSink`.

use reprotect_engine::units::{BLOCK_BYTES, SectorRange};

/// Longest read: 1 MiB.
const SPAN_SECTORS_MAX: u64 = 2048;
/// Longest gap that is read with what lies around it: 32 KiB.
const GAP_SECTORS_MAX: u64 = 64;
/// Bytes of the spans that are read in one call.
pub const GROUP_BYTES_MAX: u64 = 8 << 20;
/// Spans that are read in one call.
const GROUP_SPANS_MAX: usize = 128;

/// Changed parts that are read as one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// What is read.
    pub whole: SectorRange,
    /// What of it was asked for.
    pub parts: Vec<SectorRange>,
}

impl Span {
    /// Bytes it takes in a buffer in which each span begins at an aligned place.
    #[must_use]
    pub const fn room_bytes(&self) -> u64 {
        self.whole.bytes().next_multiple_of(BLOCK_BYTES)
    }
}

/// Spans over these ranges, which come in order.
#[must_use]
pub fn spans(ranges: impl IntoIterator<Item = SectorRange>) -> Vec<Span> {
    let mut spans: Vec<Span> = Vec::new();
    for part in ranges.into_iter().flat_map(|range| range.aligned_pieces(SPAN_SECTORS_MAX)) {
        let fits = |span: &&mut Span| {
            part.start.saturating_sub(span.whole.end) <= GAP_SECTORS_MAX
                && part.end - span.whole.start <= SPAN_SECTORS_MAX
        };
        match spans.last_mut().filter(fits) {
            Some(span) => {
                span.whole.end = part.end;
                span.parts.push(part);
            }
            None => spans.push(Span { whole: part, parts: vec![part] }),
        }
    }
    spans
}

/// The spans in groups that are read in one call each.
pub fn groups(spans: &[Span]) -> impl Iterator<Item = &[Span]> {
    let mut left = spans;
    std::iter::from_fn(move || {
        let mut bytes = 0;
        let fits = |span: &&Span| {
            bytes += span.room_bytes();
            bytes <= GROUP_BYTES_MAX
        };
        let count = left.iter().take(GROUP_SPANS_MAX).take_while(fits).count();
        let (group, rest) = left.split_at(count);
        left = rest;
        (!group.is_empty()).then_some(group)
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_part_is_read_once_in_order_and_nothing_beyond_the_bounds(
            steps in prop::collection::vec((1_u64..300, 1_u64..6000), 0..200)
        ) {
            let mut at = 0;
            let ranges: Vec<SectorRange> = steps
                .iter()
                .map(|(gap, length)| {
                    let start = at + gap;
                    at = start + length;
                    SectorRange::new(start, at)
                })
                .collect();
            let found = spans(ranges.iter().copied());
            let parts: Vec<SectorRange> = found.iter().flat_map(|span| span.parts.iter().copied()).collect();
            let wanted: Vec<SectorRange> =
                ranges.iter().flat_map(|range| range.aligned_pieces(SPAN_SECTORS_MAX)).collect();
            prop_assert_eq!(parts, wanted);
            for span in &found {
                prop_assert!(span.whole.len() <= SPAN_SECTORS_MAX);
                prop_assert_eq!(span.whole.start, span.parts[0].start);
                prop_assert_eq!(span.whole.end, span.parts.last().unwrap().end);
                prop_assert!(span.parts.windows(2).all(|two| two[1].start - two[0].end <= GAP_SECTORS_MAX));
            }
            let mut grouped = Vec::new();
            for group in groups(&found) {
                prop_assert!(group.iter().map(Span::room_bytes).sum::<u64>() <= GROUP_BYTES_MAX);
                grouped.extend(group.iter().cloned());
            }
            prop_assert_eq!(grouped, found);
        }
    }
}
