//! Properties of every decoder in `format`: arbitrary values come back as they went; damaged bytes are refused or say
//! exactly what they say; garbage never panics; no length is believed.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

#[path = "samples/arbitrary.rs"]
mod arbitrary;
mod samples;

use arbitrary::{DISK_SECTORS_MAX, compressed, counter, data_record, message, of, open, plain_of, records};

use std::io::Write as _;

use bytes::{Bytes, BytesMut};
use proptest::collection::vec;
use proptest::prelude::*;
use reprotect_engine::format::FormatError;
use reprotect_engine::format::batch::{
    BatchHeader, Stretch, decode_batch, decode_bulk, encode_batch, encode_bulk,
};
use reprotect_engine::format::disk_state::DiskState;
use reprotect_engine::format::extent::{Codec, Record, RecordHeader, RecordKind};
use reprotect_engine::format::frame::{FrameHeader, FrameKind};
use reprotect_engine::format::handshake::{Hello, HelloAck};
use reprotect_engine::format::message::{ErrorCode, ErrorHead, Message, OfferHead, PassMode};
use reprotect_engine::format::wire::Text;
use reprotect_engine::limits::{
    BATCH_PLAIN_BYTES_MAX, BATCH_RECORDS_MAX, BULK_RECORD_BYTES_MAX, DELTA_RECORD_BYTES_MAX,
    ZERO_RECORD_BYTES_MAX,
};
use reprotect_engine::range_set::RangeSet;
use reprotect_engine::units::{
    DiskId, Generation, LineageId, SECTOR_BYTES, SectorRange, Sequence, Timestamp,
};
use samples::{batch_header, bulk_header, pattern};

// ---- helpers ----------------------------------------------------------------------------------------------------

fn record_bytes(record: &Record) -> Vec<u8> {
    let mut out = BytesMut::new();
    record.put_head(&mut out);
    out.extend_from_slice(record.payload());
    assert_eq!(out.len(), record.encoded_bytes());
    out.to_vec()
}

fn batch_bytes(records: &[Record]) -> Vec<u8> {
    encode_batch(&batch_header(records.len() as u32), records).body().to_vec()
}

fn bulk_bytes(cover: SectorRange, records: &[Record]) -> Vec<u8> {
    encode_bulk(&bulk_header(cover, records.len() as u32), records).body().to_vec()
}

/// Decodes and encodes again; `None` where the decoder refused.
type Again = Box<dyn Fn(&[u8]) -> Option<Vec<u8>>>;

fn again_message(kind: FrameKind) -> Again {
    Box::new(move |bytes| {
        let message = Message::decode(kind, &Bytes::copy_from_slice(bytes)).ok()?;
        Some(message.encode().body().to_vec())
    })
}

fn again_batch() -> Again {
    Box::new(|bytes| {
        let (header, records) = decode_batch(Bytes::copy_from_slice(bytes)).ok()?;
        Some(encode_batch(&header, &records).body().to_vec())
    })
}

fn again_bulk() -> Again {
    Box::new(|bytes| {
        let (header, records) = decode_bulk(Bytes::copy_from_slice(bytes)).ok()?;
        Some(encode_bulk(&header, &records).body().to_vec())
    })
}

fn again_record() -> Again {
    Box::new(|bytes| {
        let mut rest = Bytes::copy_from_slice(bytes);
        let record = Record::take(&mut rest).ok()?;
        let _ = record.check_stored();
        let _ = open(&record);
        Some([record_bytes(&record), rest.to_vec()].concat())
    })
}

fn again_state() -> Again {
    Box::new(|bytes| Some(DiskState::decode(bytes).ok()?.to_bytes()))
}

fn again_frame_header() -> Again {
    Box::new(|bytes| Some(FrameHeader::decode(bytes.try_into().ok()?).ok()?.to_bytes().to_vec()))
}

/// Every decoder with an input it accepts.
fn decoders() -> Vec<(String, Vec<u8>, Again)> {
    let mut all: Vec<(String, Vec<u8>, Again)> = samples::messages()
        .into_iter()
        .map(|(name, message)| {
            let frame = message.encode();
            (name.to_owned(), frame.body().to_vec(), again_message(frame.kind()))
        })
        .collect();
    let mut add = |name: &str, bytes: Vec<u8>, again| all.push((name.to_owned(), bytes, again));
    add("HELLO", samples::hello().to_bytes().to_vec(), again_message(FrameKind::Hello));
    add("HELLO_ACK", samples::hello_ack().to_bytes().to_vec(), again_message(FrameKind::HelloAck));
    let header = FrameHeader::new(FrameKind::Ack, 64).to_bytes().to_vec();
    add("frame header", header, again_frame_header());
    for (name, record) in samples::records() {
        add(&format!("record {name}"), record_bytes(&record), again_record());
    }
    let records = samples::all_records();
    add("BATCH", batch_bytes(&records), again_batch());
    add("BULK", bulk_bytes(SectorRange::new(0, 1 << 21), &records), again_bulk());
    add("disk state", samples::disk_state().to_bytes(), again_state());
    all
}

fn refused_or_same(name: &str, bytes: &[u8], again: &Again) {
    if let Some(out) = again(bytes) {
        assert!(out == bytes, "{name}: accepted bytes that it would not write");
    }
}

// ---- damage -----------------------------------------------------------------------------------------------------

#[test]
fn every_sample_is_accepted_and_written_back_unchanged() {
    for (name, bytes, again) in decoders() {
        assert_eq!(again(&bytes).as_deref(), Some(bytes.as_slice()), "{name}");
    }
}

#[test]
fn every_truncation_is_refused() {
    for (name, bytes, again) in decoders() {
        for len in 0..bytes.len() {
            assert!(again(&bytes[..len]).is_none(), "{name} cut to {len} of {} bytes", bytes.len());
        }
    }
}

#[test]
fn every_extension_is_refused_except_behind_a_record() {
    for (name, bytes, again) in decoders() {
        let longer = [bytes.as_slice(), &[0]].concat();
        assert_eq!(again(&longer).is_some(), name.starts_with("record"), "{name}");
    }
}

#[test]
fn every_single_bit_flip_is_refused_or_says_exactly_what_it_says() {
    for (name, bytes, again) in decoders() {
        let mut damaged = bytes.clone();
        for bit in 0..bytes.len() * 8 {
            damaged[bit / 8] ^= 1 << (bit % 8);
            refused_or_same(&name, &damaged, &again);
            damaged[bit / 8] ^= 1 << (bit % 8);
        }
    }
}

#[test]
fn every_bit_flip_of_a_checksummed_structure_is_noticed() {
    let mut inputs = vec![
        (FrameHeader::new(FrameKind::Batch, 99).to_bytes().to_vec(), again_frame_header()),
        (samples::disk_state().to_bytes(), again_state()),
    ];
    for (_, record) in samples::records() {
        let opened: Again = Box::new(|bytes| {
            let record = Record::take(&mut Bytes::copy_from_slice(bytes)).ok()?;
            record.check_stored().ok()?; // what a relay does
            open(&record).ok()
        });
        inputs.push((record_bytes(&record), opened));
    }
    for (bytes, again) in inputs {
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(again(&damaged).is_none(), "bit {bit} of {} bytes", bytes.len());
        }
    }
}

#[test]
fn every_reserved_byte_is_checked() {
    for (bytes, table, again) in [
        (samples::hello().to_bytes().to_vec(), Hello::TABLE, again_message(FrameKind::Hello)),
        (samples::hello_ack().to_bytes().to_vec(), HelloAck::TABLE, again_message(FrameKind::HelloAck)),
        (batch_bytes(&samples::all_records()), BatchHeader::TABLE, again_batch()),
    ] {
        let reserved = table.iter().filter(|row| row.field.starts_with("reserved"));
        for at in reserved.flat_map(|row| row.offset..row.offset + row.size) {
            let mut damaged = bytes.clone();
            damaged[at] = 1;
            assert!(again(&damaged).is_none(), "byte {at}");
        }
    }
}

proptest! {
    #[test]
    fn garbage_never_panics(bytes in vec(any::<u8>(), 0..700)) {
        for (name, _, again) in decoders() {
            refused_or_same(&name, &bytes, &again);
        }
    }

    #[test]
    fn garbage_behind_a_sound_head_never_panics(
        at in 0_usize..200, junk in vec(any::<u8>(), 1..64), which in any::<prop::sample::Index>(),
    ) {
        let all = decoders();
        let (name, bytes, again) = which.get(&all);
        let mut damaged = bytes.clone();
        let at = at.min(damaged.len());
        damaged.truncate(at);
        damaged.extend(&junk);
        damaged.extend(bytes.iter().skip(at + junk.len()));
        refused_or_same(name, &damaged, again);
    }

    #[test]
    fn every_message_comes_back_as_it_went(message in message()) {
        let frame = message.encode();
        prop_assert_eq!(frame.encoded_bytes(), frame.body().len() + FrameHeader::BYTES);
        prop_assert_eq!(Message::decode(frame.kind(), &frame.body()).unwrap(), message);
    }

    #[test]
    fn every_frame_header_comes_back_as_it_went(kind in of(FrameKind::ALL), len in any::<u32>()) {
        let header = FrameHeader::new(kind, len);
        let back = FrameHeader::decode(&header.to_bytes());
        if len <= kind.body_bytes_max() {
            prop_assert_eq!(back.unwrap(), header);
        } else {
            prop_assert!(back.is_err(), "a body of {} bytes was announced", len);
        }
    }

    #[test]
    fn every_record_comes_back_as_it_went(record in (0_u64..1 << 50).prop_flat_map(data_record)) {
        let mut bytes = Bytes::from(record_bytes(&record));
        let back = Record::take(&mut bytes).unwrap();
        prop_assert!(bytes.is_empty());
        prop_assert_eq!(&back, &record);
        back.check_stored().unwrap();
        open(&back).unwrap();
    }

    #[test]
    fn every_batch_comes_back_as_it_went(records in (0_u64..1 << 40).prop_flat_map(records)) {
        let header = batch_header(records.len() as u32);
        let body = encode_batch(&header, &records).body();
        prop_assert_eq!(decode_batch(body).unwrap(), (header, records.clone()));
        let cover = SectorRange::new(records[0].range().start, records.last().unwrap().range().end);
        let header = bulk_header(cover, records.len() as u32);
        let body = encode_bulk(&header, &records).body();
        prop_assert_eq!(decode_bulk(body).unwrap(), (header, records));
    }

    #[test]
    fn every_state_comes_back_as_it_went(
        size in 1_u64..=DISK_SECTORS_MAX, sequence in counter(), pass in counter(), mode in of(PassMode::ALL),
        cuts in vec((any::<u64>(), 1_u64..5000), 0..40),
    ) {
        let mut set = RangeSet::new();
        for (start, len) in cuts {
            let start = start % size;
            set.insert(SectorRange::new(start, (start + len).min(size)));
        }
        let state = DiskState {
            size_sectors: size, sequence: Sequence(sequence), marked: Sequence(sequence / 2), pass, mode,
            settled: set.clone(), touched: set, ..samples::disk_state()
        };
        prop_assert_eq!(DiskState::decode(&state.to_bytes()).unwrap(), state);
    }

    #[test]
    fn text_is_always_a_prefix_that_reads_back(text in ".{0,40}") {
        let kept = Text::<20>::new(&text);
        let shown = kept.as_str();
        prop_assert!(shown.len() <= 20);
        // A NUL ends the text; anything else is kept up to the last character that fits.
        let expected = text.split('\0').next().unwrap();
        prop_assert!(expected.starts_with(shown));
        prop_assert!(shown.len() + 4 > expected.len().min(20), "cut too short: {:?} of {:?}", shown, text);
    }

    /// The canonical fields: what a relay may not change, and nothing else.
    #[test]
    fn a_relay_may_recode_and_the_chain_stays_equal(records in (0_u64..1 << 40).prop_flat_map(records)) {
        let recoded: Vec<Record> =
            records.iter().map(|record| compressed(record).unwrap_or_else(|| record.clone())).collect();
        let header = batch_header(records.len() as u32);
        let other_generation = BatchHeader {
            generation: Generation(header.generation.0 + 1),
            source_time: Timestamp(1),
            ..header
        };
        let chain = header.chain_after(&records);
        prop_assert_eq!(header.chain_after(&recoded), chain);
        prop_assert_eq!(other_generation.chain_after(&recoded), chain);
        for (before, after) in records.iter().zip(&recoded) {
            prop_assert_eq!(plain_of(before), plain_of(after));
            prop_assert_eq!(before.fragment_crcs(), after.fragment_crcs());
        }
        let (_, back) = decode_batch(encode_batch(&header, &recoded).body()).unwrap();
        prop_assert_eq!(header.chain_after(&back), chain);
    }
}

#[test]
fn the_chain_changes_with_every_canonical_field() {
    let records = samples::all_records();
    let header = batch_header(records.len() as u32);
    let chain = header.chain_after(&records);
    let heads = [
        BatchHeader { disk: DiskId([1; 16]), ..header },
        BatchHeader { lineage: LineageId([1; 16]), ..header },
        BatchHeader { first_sequence: Sequence(42), ..header },
        BatchHeader { chain: [1; 16], ..header },
        BatchHeader { stretch: Stretch::Ordered, ..header },
    ];
    for (at, other) in heads.iter().enumerate() {
        assert_ne!(other.chain_after(&records), chain, "header field {at}");
    }
    let mut swapped = records.clone();
    swapped.swap(0, 1);
    let with_first = |record| [vec![record], records[1..].to_vec()].concat();
    let lists = [
        swapped,
        records[1..].to_vec(),
        with_first(Record::data(8, pattern(1024))), // another address
        with_first(Record::data(7, vec![9; 1024].into())), // other data
        with_first(Record::zeros(SectorRange::new(7, 9))), // another kind
        with_first(Record::discard(SectorRange::new(7, 9))),
        with_first(Record::zeros(SectorRange::new(7, 10))), // another length
    ];
    let mut seen: Vec<_> = lists.iter().map(|list| header.chain_after(list)).collect();
    seen.push(chain);
    let count = seen.len();
    seen.sort_unstable();
    seen.dedup();
    assert_eq!(seen.len(), count, "two different streams have one chain");
}

// ---- lengths ----------------------------------------------------------------------------------------------------

/// A record's head with a checksum that holds, whatever it says.
fn head(header: RecordHeader) -> Bytes {
    let head_crc = crc32fast::hash(&RecordHeader { head_crc: 0, ..header }.to_bytes());
    Bytes::copy_from_slice(&RecordHeader { head_crc, ..header }.to_bytes())
}

const ZERO_HEAD: RecordHeader = RecordHeader {
    sector: 0,
    sector_count: 8,
    stored_bytes: 0,
    kind: RecordKind::Zero,
    codec: Codec::None,
    stored_crc: 0,
    head_crc: 0,
};

#[test]
fn a_record_that_claims_more_than_there_is_is_refused_without_reserving_it() {
    let data = RecordHeader { kind: RecordKind::Data, codec: Codec::Raw, ..ZERO_HEAD };
    let zstd = RecordHeader { codec: Codec::Zstd, ..data };
    let full = (BULK_RECORD_BYTES_MAX / SECTOR_BYTES) as u32;
    for header in [
        RecordHeader { sector_count: u32::MAX, stored_bytes: u32::MAX, ..data },
        RecordHeader { sector_count: full + 1, stored_bytes: (full + 1) * 512, ..data },
        RecordHeader { sector_count: full, stored_bytes: full * 512, ..data },
        RecordHeader { sector_count: u32::MAX, stored_bytes: 1, ..zstd },
        RecordHeader { sector_count: full + 1, stored_bytes: 1, ..zstd },
        RecordHeader { sector_count: 8, stored_bytes: u32::MAX, ..zstd },
        RecordHeader { sector_count: 8, stored_bytes: 4096, ..zstd },
        RecordHeader { sector_count: 8, stored_bytes: 0, ..zstd },
        RecordHeader { sector_count: 0, ..data },
        RecordHeader { stored_bytes: 4096, stored_crc: 1, ..data },
        RecordHeader { sector_count: 0, ..ZERO_HEAD },
        RecordHeader { stored_bytes: 1, ..ZERO_HEAD },
        RecordHeader { stored_crc: 1, ..ZERO_HEAD },
        RecordHeader { codec: Codec::Raw, ..ZERO_HEAD },
        RecordHeader { codec: Codec::None, ..data },
        RecordHeader { sector_count: (ZERO_RECORD_BYTES_MAX / SECTOR_BYTES) as u32 + 1, ..ZERO_HEAD },
    ] {
        assert!(Record::take(&mut head(header)).is_err(), "{header:?}");
    }
    let most = RecordHeader { sector_count: (ZERO_RECORD_BYTES_MAX / SECTOR_BYTES) as u32, ..ZERO_HEAD };
    assert!(Record::take(&mut head(most)).is_ok(), "the longest zero record is allowed");
}

#[test]
fn addresses_beyond_2_to_the_64_bytes_are_refused() {
    let last = u64::MAX / SECTOR_BYTES;
    for (sector, sound) in [(last - 8, true), (last - 7, false), (u64::MAX - 8, false), (u64::MAX, false)] {
        let header = RecordHeader { sector, ..ZERO_HEAD };
        assert_eq!(Record::take(&mut head(header)).is_ok(), sound, "sector {sector}");
    }
}

#[test]
fn a_count_is_checked_before_anything_is_reserved_for_it() {
    // The head and its checksum, and nothing behind them.
    let alone = |head: &[u8]| Bytes::from([head, &crc32fast::hash(head).to_le_bytes()].concat());
    let batch = |record_count| alone(&batch_header(record_count).to_bytes());
    for count in [0, 1, BATCH_RECORDS_MAX, BATCH_RECORDS_MAX + 1, u32::MAX] {
        assert!(decode_batch(batch(count)).is_err(), "{count} records in no bytes");
        let bulk = alone(&bulk_header(SectorRange::new(0, 8), count).to_bytes());
        assert_eq!(decode_bulk(bulk).is_ok(), count == 0, "{count}");
    }
    for (name, message) in samples::messages() {
        let frame = message.encode();
        let body = frame.body();
        for at in 0..body.len().saturating_sub(4) {
            let mut huge = body.to_vec();
            huge[at..at + 4].fill(0xff); // whichever field holds a count: it now says 4 Gi or 64 Ki
            refused_or_same(name, &huge, &again_message(frame.kind()));
        }
    }
}

#[test]
fn a_batch_holds_at_most_its_limits() {
    let bulk_len = BULK_RECORD_BYTES_MAX;
    let delta_len = DELTA_RECORD_BYTES_MAX;
    let run = |len: u64, count: u64| -> Vec<Record> {
        let plain = Bytes::from(vec![3_u8; len as usize]);
        let raw = Record::data(0, plain);
        let one = compressed(&raw).unwrap();
        let step = len / SECTOR_BYTES;
        (0..count)
            .map(|at| {
                // the same payload at another block-aligned address has the same fragments
                let moved = Record::data(at * step, vec![3_u8; len as usize].into());
                moved.recoded(one.payload().clone())
            })
            .collect()
    };
    let full = BATCH_PLAIN_BYTES_MAX / delta_len;
    assert!(decode_batch(batch_bytes(&run(delta_len, full)).into()).is_ok());
    assert!(decode_batch(batch_bytes(&run(delta_len, full + 1)).into()).is_err(), "over 4 MiB plain");
    assert!(
        decode_batch(batch_bytes(&run(delta_len + 512, 1)).into()).is_err(),
        "over 64 KiB a delta record"
    );
    let cover = SectorRange::new(0, 1 << 20);
    let full = BATCH_PLAIN_BYTES_MAX / bulk_len;
    assert!(decode_bulk(bulk_bytes(cover, &run(bulk_len, full)).into()).is_ok());
    assert!(decode_bulk(bulk_bytes(cover, &run(bulk_len, full + 1)).into()).is_err(), "over 4 MiB plain");
    let zeros = |count: u64| -> Vec<Record> {
        (0..count).map(|at| Record::zeros(SectorRange::new(at * 2, at * 2 + 1))).collect()
    };
    let most = u64::from(BATCH_RECORDS_MAX);
    assert!(decode_batch(batch_bytes(&zeros(most)).into()).is_ok());
    assert!(decode_batch(batch_bytes(&zeros(most + 1)).into()).is_err(), "too many records");
}

#[test]
fn bulk_records_outside_their_cover_or_out_of_order_are_refused() {
    let zeros = |start, end| Record::zeros(SectorRange::new(start, end));
    let cover = SectorRange::new(100, 200);
    let sound = |records: &[Record]| decode_bulk(bulk_bytes(cover, records).into()).is_ok();
    assert!(sound(&[]));
    assert!(sound(&[zeros(100, 150), zeros(150, 200)]));
    assert!(!sound(&[zeros(99, 101)]), "begins before the cover");
    assert!(!sound(&[zeros(199, 201)]), "ends behind the cover");
    assert!(!sound(&[zeros(150, 160), zeros(159, 170)]), "overlap");
    assert!(!sound(&[zeros(150, 160), zeros(100, 110)]), "descending");
}

#[test]
fn sequences_that_could_overflow_are_refused() {
    let records = [Record::zeros(SectorRange::new(0, 1))];
    let max = u64::MAX >> 1;
    for (first, sound) in [(0, false), (1, true), (max, true), (max + 1, false), (u64::MAX, false)] {
        let header = BatchHeader { first_sequence: Sequence(first), ..batch_header(1) };
        assert_eq!(decode_batch(encode_batch(&header, &records).body()).is_ok(), sound, "{first}");
    }
    let header = BatchHeader { first_sequence: Sequence(max), ..batch_header(2) };
    let records = [records[0].clone(), Record::zeros(SectorRange::new(2, 3))];
    assert!(decode_batch(encode_batch(&header, &records).body()).is_err());
}

#[test]
fn disks_larger_than_the_limit_are_refused() {
    for (size_sectors, sound) in [(DISK_SECTORS_MAX, true), (DISK_SECTORS_MAX + 1, false), (u64::MAX, false)]
    {
        let state = DiskState {
            size_sectors,
            settled: RangeSet::new(),
            touched: RangeSet::new(),
            ..samples::disk_state()
        };
        assert_eq!(DiskState::decode(&state.to_bytes()).is_ok(), sound, "{size_sectors}");
        let head = OfferHead {
            disk: state.disk,
            source: [0; 16],
            size_sectors,
            generation: Generation(1),
            grant_bytes: 0,
        };
        let frame = Message::Offer(head, Bytes::new()).encode();
        assert_eq!(Message::decode(frame.kind(), &frame.body()).is_ok(), sound, "{size_sectors}");
    }
}

#[test]
fn a_state_that_contradicts_itself_is_refused() {
    let sound = samples::disk_state();
    let outside: RangeSet =
        [SectorRange::new(sound.size_sectors - 1, sound.size_sectors + 1)].into_iter().collect();
    for (why, state) in [
        ("settled outside the disk", DiskState { settled: outside.clone(), ..sound.clone() }),
        ("touched outside the disk", DiskState { touched: outside, ..sound.clone() }),
        ("mark behind the sequence", DiskState { marked: Sequence(43), ..sound.clone() }),
        ("pass that cannot be counted on", DiskState { pass: u64::MAX, ..sound }),
    ] {
        assert!(DiskState::decode(&state.to_bytes()).is_err(), "{why}");
    }
}

#[test]
fn an_error_text_that_is_not_utf_8_is_refused() {
    let frame = Message::error(DiskId::NONE, ErrorCode::Full, "full").encode();
    let mut body = frame.body().to_vec();
    body[ErrorHead::BYTES + 1] = 0xff;
    assert!(Message::decode(FrameKind::Error, &body.into()).is_err());
}

// ---- payloads ---------------------------------------------------------------------------------------------------

#[test]
fn a_payload_that_is_not_exactly_the_promised_length_is_refused() {
    let record = Record::data(0, vec![5_u8; 64 << 10].into());
    let stored = |bytes: usize| Bytes::from(zstd::bulk::compress(&vec![5_u8; bytes], 1).unwrap());
    assert_eq!(open(&record.recoded(stored(64 << 10))).unwrap(), vec![5; 64 << 10]);
    for bytes in [0, 1, (64 << 10) - 1, (64 << 10) + 1, 1 << 20, 256 << 20] {
        assert!(open(&record.recoded(stored(bytes))).is_err(), "{bytes} bytes inside");
    }
}

#[test]
fn a_payload_of_several_frames_or_without_its_size_or_with_a_tail_is_refused() {
    let record = Record::data(0, vec![5_u8; 64 << 10].into());
    let half = zstd::bulk::compress(&[5_u8; 32 << 10], 1).unwrap();
    assert!(open(&record.recoded([half.clone(), half].concat().into())).is_err(), "two frames");
    let whole = zstd::bulk::compress(&[5_u8; 64 << 10], 1).unwrap();
    assert!(open(&record.recoded([whole, vec![0]].concat().into())).is_err(), "a byte behind the frame");
    let mut encoder = zstd::stream::Encoder::new(Vec::new(), 1).unwrap();
    encoder.include_contentsize(false).unwrap();
    encoder.write_all(&[5_u8; 64 << 10]).unwrap();
    assert!(open(&record.recoded(encoder.finish().unwrap().into())).is_err(), "no content size");
}

#[test]
fn a_payload_with_other_content_of_the_right_length_is_refused() {
    let record = Record::data(3, pattern(8192));
    let mut other = pattern(8192).to_vec();
    other[8191] ^= 1;
    let stored = zstd::bulk::compress(&other, 1).unwrap();
    assert!(matches!(
        open(&record.recoded(stored.into())),
        Err(FormatError::Checksum { what: "fragment", .. })
    ));
}

#[test]
#[should_panic(expected = "stored.len()")]
fn recoding_to_something_no_shorter_is_our_own_bug() {
    let _ = Record::data(0, vec![5_u8; 512].into()).recoded(vec![0; 512].into());
}
