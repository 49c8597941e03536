//! The NBD server against a client that may say anything: every rule of the protocol that well-behaved programs never
//! touch, hostile input, limits, failures of the disk, and the end.
//!
//! Invariant of each hostile row: the culprit loses its connection, and another one goes on unharmed.
#![expect(clippy::unwrap_used, reason = "a test crate: helpers outside test functions unwrap too")]

#[path = "nbd/raw.rs"]
mod raw;
#[path = "nbd/mod.rs"]
mod support;

use std::io::{ErrorKind, Write};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proptest::prelude::*;
use raw::{Chunk, Client, Reply};
use reprotect_engine::format::nbd::option::{ContextQuery, ExportQuery, OptionRequest};
use reprotect_engine::format::nbd::request::{Command, Request, command_flags};
use reprotect_engine::format::nbd::{PAYLOAD_BYTES_MAX, export_flags};
use reprotect_engine::io::memory::MemoryFile;
use reprotect_engine::io::{BlockError, BlockFile, BlockOp, ByteRange, ReadAt, WriteAt};
use reprotect_engine::net::nbd::listen::Address;
use reprotect_engine::net::nbd::{Export, ExportBy, NbdError, Server, Settings};
use support::{Running, disk, export};

const SIZE: u64 = 40 << 20;

const ACK: u32 = 1;
const ERR_UNSUPPORTED: u32 = 0x8000_0001;
const ERR_POLICY: u32 = 0x8000_0002;
const ERR_INVALID: u32 = 0x8000_0003;
const ERR_TLS_REQUIRED: u32 = 0x8000_0005;
const ERR_UNKNOWN: u32 = 0x8000_0006;

const EPERM: u32 = 1;
const EIO: u32 = 5;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;
const ESHUTDOWN: u32 = 108;

struct Lab {
    _dir: tempfile::TempDir,
    running: Running,
}

impl Lab {
    fn new(exports: Vec<Arc<dyn Export>>, settings: Settings) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let address = Address::Unix(dir.path().join("nbd.sock"));
        Self { running: Running::start(&address, exports, settings), _dir: dir }
    }

    fn serving(file: &MemoryFile, writable: bool) -> Self {
        Self::new(vec![export("disk", file, writable)], Settings::default())
    }

    fn client(&self) -> Client {
        Client::connect(self.running.address())
    }

    fn stop(self) -> usize {
        self.running.stop()
    }
}

fn query(name: &str) -> ExportQuery {
    ExportQuery { name: name.to_owned(), wanted: Vec::new() }
}

fn contexts(name: &str, queries: &[&str]) -> ContextQuery {
    ContextQuery { name: name.to_owned(), queries: queries.iter().map(|query| (*query).to_owned()).collect() }
}

fn request(command: Command, cookie: u64, offset: u64, length: u32) -> Request {
    Request { flags: 0, command, cookie, offset, length }
}

#[test]
fn every_option_is_answered_as_the_protocol_demands() {
    let (file, _) = disk(SIZE, 1);
    let lab = Lab::new(vec![export("a", &file, false), export("b", &file, true)], Settings::default());
    let mut client = lab.client();
    for (option, expected) in [
        (OptionRequest::StartTls, ERR_POLICY),
        (OptionRequest::Other(77), ERR_UNSUPPORTED),
        (OptionRequest::Info(query("nothing")), ERR_UNKNOWN),
        (OptionRequest::Info(query("")), ERR_UNKNOWN),
        (OptionRequest::Go(query("nothing")), ERR_UNKNOWN),
        (OptionRequest::SetContexts(contexts("a", &["base:allocation"])), ERR_INVALID),
        (OptionRequest::StructuredReply, ACK),
        (OptionRequest::SetContexts(contexts("nothing", &["base:allocation"])), ERR_UNKNOWN),
        (OptionRequest::List, ACK),
    ] {
        assert_eq!(client.option(&option).last().unwrap().kind, expected, "{option:?}");
    }
    assert_eq!(client.option_bytes(7, b"\0\0\0\x09short").last().unwrap().kind, ERR_INVALID);
    assert_eq!(client.option_bytes(8, b"x").last().unwrap().kind, ERR_INVALID);
    let names: Vec<_> = client.option(&OptionRequest::List).into_iter().map(|reply| reply.data).collect();
    assert_eq!(names, [b"\0\0\0\x01a".to_vec(), b"\0\0\0\x01b".to_vec(), Vec::new()]);
    let wanted = OptionRequest::Info(ExportQuery { name: "b".to_owned(), wanted: vec![1, 3] });
    let replies = client.option(&wanted);
    assert!(replies.iter().any(|reply| reply.data == [b"\0\x01".as_slice(), b"b"].concat()), "{replies:?}");
    // The connection is still good for an export.
    assert_eq!(client.go("b"), ACK);
    assert_eq!(client.option_flags & export_flags::READ_ONLY, 0);
    assert_eq!(lab.stop(), 0);
}

#[test]
fn contexts_are_listed_by_namespace_and_chosen_by_name_for_one_export() {
    let (file, _) = disk(SIZE, 2);
    let lab = Lab::new(vec![export("a", &file, false), export("b", &file, false)], Settings::default());
    let mut client = lab.client();
    client.option(&OptionRequest::StructuredReply);
    let mut count = |option: OptionRequest| client.option(&option).len() - 1;
    assert_eq!(count(OptionRequest::ListContexts(contexts("a", &[]))), 1);
    assert_eq!(count(OptionRequest::ListContexts(contexts("a", &["base:"]))), 1);
    assert_eq!(count(OptionRequest::ListContexts(contexts("a", &["other:thing"]))), 0);
    assert_eq!(count(OptionRequest::SetContexts(contexts("a", &[]))), 0);
    assert_eq!(count(OptionRequest::SetContexts(contexts("a", &["x-y:z", "base:allocation"]))), 1);
    // It was chosen for `a`, so `b` has none.
    assert_eq!(client.go("b"), ACK);
    client.send(&request(Command::BlockStatus, 1, 0, 4096), &[]);
    assert_eq!(client.chunk().error(), Some(EINVAL));
    let mut client = lab.client();
    client.option(&OptionRequest::StructuredReply);
    client.option(&OptionRequest::SetContexts(contexts("a", &["base:allocation"])));
    // A choice that fails takes back the one before it.
    assert_eq!(client.option_bytes(10, b"junk").last().unwrap().kind, ERR_INVALID);
    assert_eq!(client.go("a"), ACK);
    client.send(&request(Command::BlockStatus, 1, 0, 4096), &[]);
    assert_eq!(client.chunk().error(), Some(EINVAL));
    assert_eq!(lab.stop(), 0);
}

#[test]
fn the_old_way_to_choose_an_export_works_with_and_without_zeros() {
    let (file, plain) = disk(SIZE, 3);
    let lab = Lab::serving(&file, false);
    for (no_zeroes, len) in [(false, 134), (true, 10)] {
        let mut client = Client::connect_with(lab.running.address(), no_zeroes);
        client.write(&OptionRequest::ExportName("disk".to_owned()).encode());
        let answer = client.read(len);
        assert_eq!(answer[..8], SIZE.to_be_bytes());
        client.send(&request(Command::Read, 9, SIZE - 512, 512), &[]);
        assert_eq!(client.simple(), Reply { cookie: 9, error: 0 });
        assert_eq!(client.read(512), plain[SIZE as usize - 512..]);
    }
    let mut client = lab.client();
    client.write(&OptionRequest::ExportName("nothing".to_owned()).encode());
    client.expect_hang_up();
    assert_eq!(lab.stop(), 0);
}

#[test]
fn with_tls_nothing_is_told_before_it() {
    let dir = tempfile::tempdir().unwrap();
    let certificates = support::certificates(dir.path());
    let (file, _) = disk(SIZE, 4);
    let settings = Settings { tls: Some(certificates.server), ..Settings::default() };
    let lab = Lab::new(vec![export("secret", &file, false)], settings);
    let mut client = lab.client();
    for option in [
        OptionRequest::List,
        OptionRequest::StructuredReply,
        OptionRequest::Info(query("secret")),
        OptionRequest::Info(query("nothing")),
        OptionRequest::Go(query("secret")),
        OptionRequest::ListContexts(contexts("secret", &[])),
        OptionRequest::Other(99),
    ] {
        let replies = client.option(&option);
        assert_eq!(replies.len(), 1, "{option:?}");
        assert_eq!(replies[0].kind, ERR_TLS_REQUIRED, "{option:?}");
        assert!(!String::from_utf8_lossy(&replies[0].data).contains("secret"));
    }
    client.write(&OptionRequest::ExportName("secret".to_owned()).encode());
    client.expect_hang_up();
    // Whoever puts plain requests behind STARTTLS gets no answer to them.
    let mut client = lab.client();
    let list = OptionRequest::List.encode();
    client.write(&[OptionRequest::StartTls.encode(), list.clone(), list].concat());
    assert_eq!(client.option_reply(5).kind, ACK);
    let rest = client.read_to_end();
    assert!(!rest.windows(6).any(|window| window == b"secret"), "{rest:?}");
    assert_eq!(lab.stop(), 0);
}

#[test]
fn reads_come_in_chunks_of_data_and_holes_unless_asked_otherwise() {
    let (file, plain) = disk(SIZE, 5);
    let lab = Lab::serving(&file, false);
    let mut client = lab.client();
    client.enter("disk");
    let mut whole = request(Command::Read, 2, 512, 8 << 20);
    client.send(&request(Command::Read, 1, 512, 8 << 20), &[]);
    let chunks = client.chunks();
    assert!(chunks.iter().any(|chunk| matches!(chunk, Chunk::Hole(_))), "the disk has holes");
    assert_eq!(Chunk::assemble(&chunks, 512, 8 << 20), plain[512..512 + (8 << 20)]);
    whole.flags = command_flags::DF;
    client.send(&whole, &[]);
    let chunks = client.chunks();
    assert!(matches!(chunks.as_slice(), [Chunk::Data(512, _)]), "one piece");
    assert_eq!(Chunk::assemble(&chunks, 512, 8 << 20), plain[512..512 + (8 << 20)]);
    // Nothing at all, the last byte, and the largest request.
    client.send(&request(Command::Read, 3, 0, 0), &[]);
    assert_eq!(client.chunks(), [Chunk::Done]);
    client.send(&request(Command::Read, 4, SIZE - 1, 1), &[]);
    assert_eq!(client.chunks(), [Chunk::Data(SIZE - 1, plain[SIZE as usize - 1..].to_vec())]);
    client.send(&request(Command::Read, 5, 0, PAYLOAD_BYTES_MAX), &[]);
    let len = PAYLOAD_BYTES_MAX as usize;
    assert!(Chunk::assemble(&client.chunks(), 0, len) == plain[..len]);
    assert_eq!(lab.stop(), 0);
}

#[test]
fn an_allocation_map_covers_its_request_or_stops_at_the_first_extent() {
    let (file, _) = disk(SIZE, 16);
    let lab = Lab::serving(&file, false);
    let mut client = lab.client();
    client.enter("disk");
    let all = ByteRange { start: 0, end: SIZE };
    let expected = file.clone_handle().allocated(all).unwrap();
    client.send(&request(Command::BlockStatus, 1, 0, SIZE as u32), &[]);
    let Chunk::Status(map) = client.chunk() else { panic!("a map") };
    let (mut at, mut data) = (0, Vec::new());
    for (length, flags) in &map {
        let end = at + u64::from(*length);
        if *flags == 0 {
            data.push(ByteRange { start: at, end });
        }
        at = end;
    }
    assert_eq!((at, data), (SIZE, expected));
    let first_data = map.iter().position(|(_, flags)| *flags == 0).unwrap();
    let place: u64 = map[..first_data].iter().map(|(length, _)| u64::from(*length)).sum();
    let mut one = request(Command::BlockStatus, 2, place, (SIZE - place) as u32);
    one.flags = command_flags::REQ_ONE;
    client.send(&one, &[]);
    assert_eq!(client.chunk(), Chunk::Status(vec![map[first_data]]));
    assert_eq!(lab.stop(), 0);
}

#[test]
fn a_refused_request_leaves_the_stream_in_step() {
    let (file, _) = disk(SIZE, 6);
    let lab = Lab::serving(&file, false);
    for structured in [false, true] {
        let mut client = lab.client();
        if structured {
            client.enter("disk");
        } else {
            assert_eq!(client.go("disk"), ACK);
        }
        let mut unknown_flag = request(Command::Read, 6, 0, 512);
        unknown_flag.flags = 1 << 9;
        for (request, payload, expected) in [
            (request(Command::Write, 1, 0, 100_000), 100_000, EPERM),
            (request(Command::Trim, 2, 0, 512), 0, EPERM),
            (request(Command::WriteZeroes, 3, 0, 512), 0, EPERM),
            (request(Command::Read, 4, SIZE, 1), 0, EINVAL),
            (request(Command::Other(50), 5, 0, 512), 0, EINVAL),
            (unknown_flag, 0, EINVAL),
            (request(Command::Read, 7, 0, u32::MAX), 0, EINVAL),
        ] {
            client.send(&request, &vec![0x25; payload]);
            let error = if structured { client.chunk().error().unwrap() } else { client.simple().error };
            assert_eq!(error, expected, "{request:?}");
        }
        client.send(&request(Command::Flush, 8, 0, 0), &[]);
        let done = if structured { client.chunks() == [Chunk::Done] } else { client.simple().error == 0 };
        assert!(done, "a flush of nothing succeeds");
        client.send(&request(Command::Disconnect, 9, 0, 0), &[]);
        client.expect_hang_up();
    }
    assert_eq!(lab.stop(), 0);
}

#[test]
fn writes_zeros_and_flushes_reach_the_disk() {
    let file = MemoryFile::new(SIZE);
    let lab = Lab::serving(&file, true);
    let mut client = lab.client();
    client.enter("disk");
    let mut send = |request: Request, payload: &[u8]| {
        client.send(&request, payload);
        assert_eq!(client.chunks(), [Chunk::Done], "{request:?}");
    };
    send(request(Command::Write, 1, 1000, 5000), &[7; 5000]);
    assert_eq!(file.flush_count(), 0);
    send(Request { flags: command_flags::FUA, ..request(Command::Write, 2, 8192, 1) }, &[8]);
    assert_eq!(file.flush_count(), 1, "FUA");
    send(request(Command::Flush, 3, 0, 0), &[]);
    assert_eq!(file.flush_count(), 2);
    send(request(Command::Trim, 4, 1000, 1000), &[]);
    let no_hole =
        Request { flags: command_flags::NO_HOLE, ..request(Command::WriteZeroes, 5, 1 << 20, 3 << 20) };
    send(no_hole, &[]);
    assert_eq!(file.allocated_bytes(), (3 << 20) + 2 * 4096 + 4096, "zeros that take their space");
    send(request(Command::WriteZeroes, 6, 1 << 20, 3 << 20), &[]);
    assert_eq!(file.allocated_bytes(), 3 * 4096, "zeros as a hole");
    let mut data = vec![0; 9000];
    file.clone_handle().read(&mut [ReadAt { offset: 0, data: &mut data }]).unwrap();
    let mut expected = vec![0; 9000];
    expected[2000..6000].fill(7);
    expected[8192] = 8;
    assert!(data == expected);
    for (command, length) in [(Command::Write, 2), (Command::WriteZeroes, 2)] {
        client.send(
            &request(command, 7, SIZE - 1, length),
            if command == Command::Write { &[0; 2] } else { &[] },
        );
        assert_eq!(client.chunk().error(), Some(ENOSPC));
    }
    assert_eq!(lab.stop(), 0);
}

/// A disk whose reads wait for the test, and fail, panic or succeed as it says; starting ones report their place.
struct Gated {
    inner: MemoryFile,
    gate: Arc<Gate>,
}

struct Gate {
    entered: Mutex<Sender<u64>>,
    held: Mutex<Option<Arc<Mutex<()>>>>,
    open_files: AtomicUsize,
}

const PANIC_AT: u64 = 13 << 20;

impl BlockFile for Gated {
    fn size_bytes(&self) -> u64 {
        self.inner.size_bytes()
    }
    fn read(&mut self, reads: &mut [ReadAt<'_>]) -> Result<(), BlockError> {
        let offset = reads[0].offset;
        let _ = self.gate.entered.lock().unwrap().send(offset);
        assert_ne!(offset, PANIC_AT, "a bug in a disk");
        let held = self.gate.held.lock().unwrap().clone();
        // Only the read of the first block waits.
        if let Some(held) = held.filter(|_| offset == 0) {
            drop(held.lock());
        }
        self.inner.read(reads)
    }
    fn write(&mut self, writes: &[WriteAt<'_>]) -> Result<(), BlockError> {
        self.inner.write(writes)
    }
    fn zero(&mut self, range: ByteRange) -> Result<(), BlockError> {
        self.inner.zero(range)
    }
    fn flush(&mut self) -> Result<(), BlockError> {
        self.inner.flush()
    }
    fn allocated(&mut self, range: ByteRange) -> Result<Vec<ByteRange>, BlockError> {
        self.inner.allocated(range)
    }
}

impl Drop for Gated {
    fn drop(&mut self) {
        self.gate.open_files.fetch_sub(1, Ordering::SeqCst);
    }
}

fn gated(file: &MemoryFile) -> (Arc<dyn Export>, Arc<Gate>, Receiver<u64>) {
    let (entered, starts) = channel();
    let gate = Arc::new(Gate {
        entered: Mutex::new(entered),
        held: Mutex::new(None),
        open_files: AtomicUsize::new(0),
    });
    let (inner, of_export) = (file.clone_handle(), Arc::clone(&gate));
    let export = ExportBy::new("disk", SIZE, true, move || {
        of_export.open_files.fetch_add(1, Ordering::SeqCst);
        Ok(Box::new(Gated { inner: inner.clone_handle(), gate: Arc::clone(&of_export) }))
    });
    (Arc::new(export), gate, starts)
}

#[test]
fn a_slow_request_does_not_hold_up_the_ones_behind_it() {
    let (file, plain) = disk(SIZE, 7);
    let (export, gate, starts) = gated(&file);
    let lab = Lab::new(vec![export], Settings::default());
    let mut client = lab.client();
    client.enter("disk");
    let lock = Arc::new(Mutex::new(()));
    let hold = lock.lock().unwrap();
    *gate.held.lock().unwrap() = Some(Arc::clone(&lock));
    client.send(&request(Command::Read, 1, 0, 512), &[]);
    assert_eq!(starts.recv().unwrap(), 0);
    for cookie in 2..40 {
        client.send(&request(Command::Read, cookie, cookie * 4096, 512), &[]);
    }
    let mut seen: Vec<u64> = (2..40).map(|_| client.next_cookie_of_512(&plain)).collect();
    seen.sort_unstable();
    assert!(seen.into_iter().eq(2..40), "every other request was answered first");
    drop(hold);
    assert_eq!(client.next_cookie_of_512(&plain), 1);
    assert_eq!(lab.stop(), 0);
    assert_eq!(gate.open_files.load(Ordering::SeqCst), 0, "nothing holds the disk after the stop");
}

#[test]
fn a_disk_that_fails_or_panics_costs_one_request() {
    let (file, _) = disk(SIZE, 8);
    let (export, _, _starts) = gated(&file);
    let lab = Lab::new(vec![export], Settings::default());
    let mut client = lab.client();
    client.enter("disk");
    for (kind, expected) in
        [(ErrorKind::Other, EIO), (ErrorKind::PermissionDenied, EPERM), (ErrorKind::StorageFull, ENOSPC)]
    {
        file.inject(BlockOp::Read, 0, kind);
        client.send(&request(Command::Read, 1, 4096, 512), &[]);
        assert_eq!(client.chunk().error(), Some(expected), "{kind:?}");
    }
    for round in 0..3 {
        client.send(&request(Command::Read, round, PANIC_AT, 512), &[]);
        assert_eq!(client.chunk().error(), Some(EIO), "panic {round}");
        client.send(&request(Command::Read, round, 8192, 512), &[]);
        assert!(matches!(client.chunk(), Chunk::Data(8192, _)), "a thread is left");
    }
    // The last thread goes too, and the client is still answered.
    client.send(&request(Command::Read, 9, PANIC_AT, 512), &[]);
    assert_eq!(client.chunk().error(), Some(EIO));
    client.send(&request(Command::Read, 10, 8192, 512), &[]);
    assert_eq!(client.chunk().error(), Some(EIO));
    let mut other = lab.client();
    other.enter("disk");
    other.send(&request(Command::Read, 1, 8192, 512), &[]);
    assert!(matches!(other.chunk(), Chunk::Data(8192, _)));
    assert_eq!(lab.stop(), 0);
}

#[test]
fn an_export_that_cannot_be_opened_is_refused_by_name_and_reason() {
    let (file, _) = disk(SIZE, 9);
    let broken = ExportBy::new("broken", SIZE, false, || {
        let source = std::io::Error::other("its journal is gone");
        Err(BlockError { name: "point 12".to_owned(), op: BlockOp::Open, offset: 0, len: 0, source })
    });
    let short = ExportBy::new("short", SIZE, false, || Ok(Box::new(MemoryFile::new(512))));
    let panics = ExportBy::new("panics", SIZE, false, || panic!("a bug in an export"));
    let exports: Vec<Arc<dyn Export>> =
        vec![Arc::new(broken), Arc::new(short), Arc::new(panics), export("disk", &file, false)];
    let lab = Lab::new(exports, Settings::default());
    let mut client = lab.client();
    for (name, why) in [("broken", "its journal is gone"), ("short", "512 bytes"), ("panics", "opening")] {
        let replies = client.option(&OptionRequest::Go(query(name)));
        assert_eq!(replies.len(), 1, "{replies:?}");
        assert_eq!(replies[0].kind, ERR_UNKNOWN);
        let told = String::from_utf8(replies[0].data.clone()).unwrap();
        assert!(told.contains(why), "{told}");
    }
    assert_eq!(client.go("disk"), ACK, "another export may still be chosen");
    assert_eq!(lab.stop(), 0);
}

#[test]
fn a_client_that_takes_no_answers_is_held_to_its_bound() {
    let (file, plain) = disk(SIZE, 10);
    let (export, _, starts) = gated(&file);
    let settings = Settings { grace: Duration::from_millis(200), ..Settings::default() };
    let bound = (settings.bytes_in_flight_max / (8 << 20)) as usize;
    let lab = Lab::new(vec![export], settings);
    let mut client = lab.client();
    client.enter("disk");
    for cookie in 0..40 {
        let read = Request { flags: command_flags::DF, ..request(Command::Read, cookie, 1 << 20, 8 << 20) };
        client.send(&read, &[]);
    }
    // A neighbour is served meanwhile; when it is done, nothing more has begun than the bound allows.
    let mut other = lab.client();
    other.enter("disk");
    for cookie in 0..200 {
        other.send(&request(Command::Read, cookie, 512, 512), &[]);
        assert_eq!(other.chunk(), Chunk::Data(512, plain[512..1024].to_vec()));
    }
    let begun = starts.try_iter().filter(|offset| *offset != 512).count();
    // One answer may be on its way through the socket's buffer.
    assert!(begun <= bound + 1, "{begun} reads of 8 MiB began");
    drop(client);
    other.send(&request(Command::Disconnect, 0, 0, 0), &[]);
    other.expect_hang_up();
    lab.stop();
}

#[test]
fn garbage_half_open_and_surplus_clients_harm_nobody() {
    let (file, plain) = disk(SIZE, 11);
    let settings = Settings { connections_max: 4, ..Settings::default() };
    let lab = Lab::new(vec![export("disk", &file, true)], settings);
    let mut honest = lab.client();
    honest.enter("disk");
    let mut check = |what: &str| {
        honest.send(&request(Command::Read, 1, SIZE - 512, 512), &[]);
        assert_eq!(honest.chunk(), Chunk::Data(SIZE - 512, plain[SIZE as usize - 512..].to_vec()), "{what}");
    };
    for garbage in [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n".to_vec(),
        [1_u32.to_be_bytes().to_vec(), vec![0; 64]].concat(),
        [1_u32.to_be_bytes().to_vec(), b"IHAVEOPT\0\0\0\x07\xff\xff\xff\xff".to_vec()].concat(),
        vec![0xff; 4096],
    ] {
        let mut client = Client::silent(lab.running.address());
        let _ = client.stream.write_all(&garbage);
        client.expect_hang_up();
        check("garbage in the handshake");
    }
    for bad in [vec![0x55; 28], request(Command::Write, 1, 0, PAYLOAD_BYTES_MAX + 1).to_bytes().to_vec()] {
        let mut client = lab.client();
        client.enter("disk");
        client.write(&bad);
        client.expect_hang_up();
        check("garbage in a request");
    }
    let mut half = lab.client();
    half.enter("disk");
    half.write(&request(Command::Write, 1, 0, 4096).to_bytes());
    half.write(&[0xEE; 100]);
    drop(half);
    check("half a write");
    // Surplus: hung up on before a word, and room again when one has left.
    lab.wait_for_connections(1);
    let crowd: Vec<Client> = (0..3).map(|_| lab.client()).collect();
    let mut surplus = Client::silent(lab.running.address());
    surplus.expect_hang_up();
    assert_eq!(surplus.heard, 0, "hung up on before a word");
    drop(crowd);
    lab.wait_for_connections(1);
    lab.client().enter("disk");
    check("a crowd");
    let mut first = vec![0; 4096];
    file.clone_handle().read(&mut [ReadAt { offset: 0, data: &mut first }]).unwrap();
    assert!(first == plain[..4096], "half a write changed nothing");
    assert_eq!(lab.stop(), 0);
}

#[test]
fn a_client_that_does_not_finish_its_handshake_is_dropped_in_time() {
    let (file, _) = disk(1 << 20, 17);
    let settings = Settings { handshake: Duration::from_millis(100), ..Settings::default() };
    let lab = Lab::new(vec![export("disk", &file, false)], settings);
    let flags = 3_u32.to_be_bytes();
    let half_an_option = [flags.as_slice(), b"IHAVE"].concat();
    let without_its_data = [flags.as_slice(), &OptionRequest::Go(query("disk")).encode()[..20]].concat();
    for said in [b"".as_slice(), &flags[..2], &half_an_option, &without_its_data] {
        let mut client = Client::silent(lab.running.address());
        let _ = client.stream.write_all(said); // it may be dropped already
        client.expect_hang_up();
    }
    lab.wait_for_connections(0);
    assert_eq!(lab.stop(), 0);
}

impl Lab {
    /// Waits for clients that have left to be noticed.
    fn wait_for_connections(&self, count: usize) {
        for _ in 0..2000 {
            if self.running.server().open_connections() == count {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("{} connections are left", self.running.server().open_connections());
    }
}

#[test]
fn a_stop_answers_what_is_under_way_and_refuses_what_comes_later() {
    let (file, plain) = disk(SIZE, 12);
    let (export, gate, starts) = gated(&file);
    let lab = Lab::new(vec![export], Settings::default());
    let mut client = lab.client();
    client.enter("disk");
    let mut idle = lab.client();
    idle.enter("disk");
    let mut negotiating = lab.client();
    let lock = Arc::new(Mutex::new(()));
    let hold = lock.lock().unwrap();
    *gate.held.lock().unwrap() = Some(Arc::clone(&lock));
    client.send(&request(Command::Read, 1, 0, 512), &[]);
    assert_eq!(starts.recv().unwrap(), 0);
    let address = lab.running.address().clone();
    let stopping = std::thread::spawn(move || lab.stop());
    // Nothing is owed to these.
    idle.expect_hang_up();
    negotiating.expect_hang_up();
    client.send(&request(Command::Write, 2, 0, 512), &[1; 512]);
    let refused = client.chunk();
    assert_eq!(refused.error(), Some(ESHUTDOWN));
    drop(hold);
    assert_eq!(client.chunk(), Chunk::Data(0, plain[..512].to_vec()));
    client.expect_hang_up();
    assert_eq!(stopping.join().unwrap(), 0);
    assert_eq!(gate.open_files.load(Ordering::SeqCst), 0);
    let Address::Unix(path) = address else { panic!("a Unix socket") };
    assert!(!path.exists(), "the socket is gone");
}

#[test]
fn a_stop_that_waits_in_vain_cuts_the_connection_and_says_so() {
    let (file, _) = disk(SIZE, 13);
    let (export, gate, starts) = gated(&file);
    let lab = Lab::new(vec![export], Settings { grace: Duration::from_millis(100), ..Settings::default() });
    let mut client = lab.client();
    client.enter("disk");
    let lock = Arc::new(Mutex::new(()));
    let hold = lock.lock().unwrap();
    *gate.held.lock().unwrap() = Some(Arc::clone(&lock));
    client.send(&request(Command::Read, 1, 0, 512), &[]);
    assert_eq!(starts.recv().unwrap(), 0);
    assert_eq!(lab.stop(), 1, "its disk is still at work");
    client.expect_hang_up();
    drop(hold);
}

#[test]
fn exports_without_a_usable_name_are_refused_at_the_start() {
    let (file, _) = disk(1 << 20, 14);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let start = |exports| {
        runtime.block_on(Server::start(&Address::loopback(0), exports, Settings::default())).err().unwrap()
    };
    let twice = || export("same", &file, false);
    assert!(matches!(start(vec![twice(), twice()]), NbdError::Export { .. }));
    assert!(matches!(start(Vec::new()), NbdError::Export { .. }));
    assert!(matches!(start(vec![export(&"x".repeat(5000), &file, false)]), NbdError::Export { .. }));
}

/// What a hostile client says: well-formed pieces and noise, in any order.
fn noise() -> impl Strategy<Value = Vec<u8>> {
    let option = prop_oneof![
        Just(OptionRequest::List),
        Just(OptionRequest::StructuredReply),
        Just(OptionRequest::StartTls),
        Just(OptionRequest::Abort),
        Just(OptionRequest::Go(query("disk"))),
        Just(OptionRequest::Info(query("disk"))),
        Just(OptionRequest::SetContexts(contexts("disk", &["base:allocation"]))),
        Just(OptionRequest::ExportName("disk".to_owned())),
    ];
    let request =
        (0..9_u16, 0..32_u16, 0..SIZE + 4096, 0..9000_u32).prop_map(|(number, flags, offset, length)| {
            let mut bytes = request(Command::Other(number), 3, offset, length).to_bytes().to_vec();
            bytes[4..6].copy_from_slice(&flags.to_be_bytes());
            if number == 1 {
                bytes.extend(vec![0xAB; length as usize]);
            }
            bytes
        });
    let piece = prop_oneof![
        4 => option.prop_map(|option| option.encode()),
        4 => request,
        1 => proptest::collection::vec(any::<u8>(), 0..64),
    ];
    (proptest::collection::vec(piece, 0..12), any::<bool>(), any::<prop::sample::Index>()).prop_map(
        |(pieces, cut, at)| {
            let mut bytes = pieces.concat();
            if cut && !bytes.is_empty() {
                bytes.truncate(at.index(bytes.len()));
            }
            bytes
        },
    )
}

#[test]
fn no_sequence_of_bytes_disturbs_another_client() {
    let (file, plain) = disk(SIZE, 15);
    let scratch = MemoryFile::new(SIZE);
    let settings = Settings { connections_max: 64, ..Settings::default() };
    // Writes of the noise go to a disk of its own.
    let lab = Lab::new(vec![export("disk", &scratch, true), export("calm", &file, false)], settings);
    let mut honest = lab.client();
    honest.enter("calm");
    let honest = Mutex::new(honest);
    proptest!(ProptestConfig::with_cases(300), |(flags in 0..4_u32, bytes in noise())| {
        let mut client = Client::silent(lab.running.address());
        let _ = client.stream.write_all(&[flags.to_be_bytes().as_slice(), &bytes].concat());
        client.finish_writing();
        let _ = client.read_to_end(); // it ends: the server hangs up, whatever was said
        let mut honest = honest.lock().unwrap();
        honest.send(&request(Command::Read, 1, 4096, 512), &[]);
        prop_assert_eq!(honest.chunk(), Chunk::Data(4096, plain[4096..4608].to_vec()));
    });
    lab.wait_for_connections(1);
    assert_eq!(lab.stop(), 0);
}
