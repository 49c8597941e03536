//! The admin interface over a real Unix socket: round trips, refusals, streams, and answers that are garbage.
#![cfg(feature = "host")]

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use axum::routing::{get, post};
use axum::{Json, Router};
use reprotect_engine::host::admin::{AdminServer, AdminServerError, Refusal, line_stream};
use reprotect_engine::host::admin_client::{AdminClient, AdminError};
use reprotect_engine::host::places::Program;
use reprotect_engine::host::shutdown::{Shutdown, ShutdownTrigger};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixListener;

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Doubled {
    value: u64,
}

async fn double(Json(body): Json<Doubled>) -> Json<Doubled> {
    Json(Doubled { value: body.value * 2 })
}

async fn refuse() -> Refusal {
    Refusal::conflict("cannot pause", "no disk is running", "start one")
}

/// More lines than the channel holds, so that the reader's pace is followed.
async fn lines() -> axum::response::Response {
    let (sender, response) = line_stream();
    tokio::spawn(async move {
        for value in 0..500 {
            if sender.send(Doubled { value }).await.is_err() {
                return;
            }
        }
    });
    response
}

async fn endless() -> axum::response::Response {
    let (sender, response) = line_stream();
    tokio::spawn(async move {
        let _ = sender.send(Doubled { value: 1 }).await;
        std::future::pending::<()>().await;
    });
    response
}

struct Daemon {
    client: AdminClient,
    trigger: ShutdownTrigger,
    task: tokio::task::JoinHandle<std::io::Result<()>>,
}

async fn start(path: &Path) -> Daemon {
    let (trigger, shutdown) = Shutdown::new();
    let server = AdminServer::bind(path).await.expect("bind");
    let router = Router::new()
        .route("/v1/double", post(double))
        .route("/v1/refuse", get(refuse))
        .route("/v1/lines", get(lines))
        .route("/v1/endless", get(endless));
    let task = tokio::spawn(server.serve(router, shutdown));
    Daemon { client: AdminClient::new(Program::Agent, path), trigger, task }
}

fn socket() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = dir.path().join("run/agent.sock");
    (dir, path)
}

#[tokio::test]
async fn requests_refusals_and_unknown_paths_come_back_typed() {
    let (_dir, path) = socket();
    let daemon = start(&path).await;
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);

    let doubled: Doubled = daemon.client.post_json("/v1/double", &Doubled { value: 21 }).await.unwrap();
    assert_eq!(doubled.value, 42);

    let refused = daemon.client.get_json::<Doubled>("/v1/refuse").await.unwrap_err();
    assert_eq!(refused.to_string(), "cannot pause: no disk is running; start one");
    assert!(matches!(refused, AdminError::Refused { status: 409, .. }));

    let unknown = daemon.client.get_json::<Doubled>("/v1/nothing").await.unwrap_err();
    assert!(
        matches!(&unknown, AdminError::Refused { status: 404, body } if body.reason.contains("/v1/nothing"))
    );
    let method = daemon.client.get_json::<Doubled>("/v1/double").await.unwrap_err();
    assert!(matches!(method, AdminError::Refused { status: 405, .. }));

    // A body the daemon cannot parse is answered by the framework in plain text: an error, not a panic.
    let garbled = daemon.client.post_json::<_, Doubled>("/v1/double", &"text").await.unwrap_err();
    assert!(garbled.to_string().contains("422"), "{garbled}");

    daemon.trigger.request();
    daemon.task.await.unwrap().unwrap();
    assert!(!path.exists(), "the socket goes with the daemon");
}

#[tokio::test]
async fn progress_streams_whole_and_in_order_beyond_the_channels_bound() {
    let (_dir, path) = socket();
    let daemon = start(&path).await;
    let mut lines = daemon.client.lines("/v1/lines").await.unwrap();
    let mut next = 0;
    while let Some(line) = lines.next::<Doubled>().await.unwrap() {
        assert_eq!(line.value, next);
        next += 1;
    }
    assert_eq!(next, 500);
    let refused = daemon.client.lines("/v1/refuse").await.unwrap_err();
    assert!(matches!(refused, AdminError::Refused { .. }));
}

#[tokio::test]
async fn an_open_stream_does_not_keep_the_daemon_from_stopping() {
    let (_dir, path) = socket();
    let daemon = start(&path).await;
    let mut lines = daemon.client.lines("/v1/endless").await.unwrap();
    assert!(lines.next::<Doubled>().await.unwrap().is_some());
    daemon.trigger.request();
    daemon.task.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_daemon_that_does_not_run_is_named_with_the_command_that_starts_it() {
    let (_dir, path) = socket();
    let client = AdminClient::new(Program::MasterTarget, &path);
    let error = client.get_json::<Doubled>("/v1/x").await.unwrap_err();
    assert!(matches!(error, AdminError::NotRunning { .. }));
    assert!(error.to_string().contains("start it with `reprotect-master-target run`"), "{error}");

    // The same for a socket left behind by a killed daemon, which the next daemon replaces.
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let error = client.get_json::<Doubled>("/v1/x").await.unwrap_err();
    assert!(matches!(error, AdminError::NotRunning { .. }));
    let daemon = start(&path).await;
    let _: Doubled = daemon.client.post_json("/v1/double", &Doubled { value: 1 }).await.unwrap();
}

#[tokio::test]
async fn a_socket_in_use_and_a_file_in_its_place_are_never_replaced() {
    let (_dir, path) = socket();
    let daemon = start(&path).await;
    assert!(matches!(AdminServer::bind(&path).await, Err(AdminServerError::InUse { .. })));
    let _: Doubled = daemon.client.post_json("/v1/double", &Doubled { value: 1 }).await.unwrap();

    let file = path.with_file_name("file");
    std::fs::write(&file, "precious").unwrap();
    assert!(matches!(AdminServer::bind(&file).await, Err(AdminServerError::NotASocket { .. })));
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "precious");
}

/// A daemon that answers everything with `answer` and hangs up.
fn answering(path: &Path, answer: Vec<u8>) {
    std::fs::create_dir_all(path.parent().expect("parent")).expect("directory");
    let listener = UnixListener::bind(path).expect("bind");
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut request = [0_u8; 1024];
            let _ = stream.read(&mut request).await;
            let _ = stream.write_all(&answer).await;
        }
    });
}

fn http(body: &str) -> Vec<u8> {
    format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len()).into_bytes()
}

#[tokio::test]
async fn garbage_is_refused_without_panic_and_without_end() {
    let mut huge = b"HTTP/1.1 200 OK\r\ncontent-length: 99999999\r\n\r\n".to_vec();
    huge.resize(20 << 20, b'1');
    let answers: Vec<(Vec<u8>, &str)> = vec![
        (b"SSH-2.0-OpenSSH\r\n".to_vec(), "not HTTP"),
        (Vec::new(), "not HTTP"),
        (http("not json"), "not the JSON expected"),
        (http("{\"value\": -1}"), "not the JSON expected"),
        (b"HTTP/1.1 500 X\r\ncontent-length: 4\r\n\r\noops".to_vec(), "status 500"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 400\r\n\r\n{".to_vec(), "broke off"),
        (huge, "larger than 16 MiB"),
    ];
    for (answer, expected) in answers {
        let (_dir, path) = socket();
        answering(&path, answer);
        let client = AdminClient::new(Program::Agent, &path);
        let error = client.get_json::<Doubled>("/v1/x").await.unwrap_err();
        assert!(matches!(error, AdminError::Garbage { .. }), "{error:?}");
        assert!(error.to_string().contains(expected), "{expected}: {error}");
    }

    let (_dir, path) = socket();
    answering(&path, http("{\"value\":1}\n{\"val"));
    let mut lines = AdminClient::new(Program::Agent, &path).lines("/v1/x").await.unwrap();
    assert_eq!(lines.next::<Doubled>().await.unwrap(), Some(Doubled { value: 1 }));
    assert!(lines.next::<Doubled>().await.is_err());
}

#[tokio::test]
async fn a_daemon_that_never_answers_is_not_waited_for_for_ever() {
    let (_dir, path) = socket();
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let _silent = UnixListener::bind(&path).unwrap();
    let client = AdminClient::new(Program::Agent, &path).with_wait(Duration::from_millis(50));
    let error = client.get_json::<Doubled>("/v1/x").await.unwrap_err();
    assert!(matches!(error, AdminError::TimedOut { .. }));
}
