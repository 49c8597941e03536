//! Stopping, reloading and telling systemd: the daemon's side of its process manager.
//!
//! Invariants: shutdown is requested once and never taken back; the first SIGTERM or SIGINT asks, the second ends
//! the process at once (everything on disk survives a kill, so that is safe). Called by the programs' `run`.

use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// Sees whether the daemon is to stop. Cheap to clone; usable from threads and tasks.
#[derive(Clone, Debug)]
pub struct Shutdown {
    receiver: watch::Receiver<bool>,
}

/// Asks the daemon to stop. When the last one is dropped, that counts as asking.
#[derive(Clone, Debug)]
pub struct ShutdownTrigger {
    sender: Arc<watch::Sender<bool>>,
}

impl Shutdown {
    /// A new, unrequested shutdown.
    #[must_use]
    pub fn new() -> (ShutdownTrigger, Self) {
        let (sender, receiver) = watch::channel(false);
        (ShutdownTrigger { sender: Arc::new(sender) }, Self { receiver })
    }

    /// Returns once shutdown is requested; at once when it was.
    pub async fn requested(&self) {
        // An error means that every trigger is gone, which is a request too.
        let _ = self.receiver.clone().wait_for(|requested| *requested).await;
    }

    /// Whether shutdown was requested; for threads, between two pieces of work.
    #[must_use]
    pub fn is_requested(&self) -> bool {
        *self.receiver.borrow() || self.receiver.has_changed().is_err()
    }
}

impl ShutdownTrigger {
    /// Asks the daemon to stop. Asking again does nothing.
    pub fn request(&self) {
        self.sender.send_replace(true);
    }
}

/// Turns SIGTERM and SIGINT into `trigger`; a second one ends the process with status 128 + signal.
///
/// # Errors
/// When the handlers cannot be installed.
pub fn on_signals(trigger: ShutdownTrigger) -> io::Result<JoinHandle<()>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(tokio::spawn(async move {
        let first = either(&mut terminate, &mut interrupt).await;
        tracing::info!(signal = first, "stopping; a second signal ends the process at once");
        trigger.request();
        let second = either(&mut terminate, &mut interrupt).await;
        tracing::warn!(signal = second, "ended by a second signal");
        std::process::exit(128 + second);
    }))
}

async fn either(terminate: &mut Signal, interrupt: &mut Signal) -> i32 {
    tokio::select! {
        _ = terminate.recv() => SignalKind::terminate().as_raw_value(),
        _ = interrupt.recv() => SignalKind::interrupt().as_raw_value(),
    }
}

/// Counts SIGHUPs: each change means that the configuration is to be read again.
///
/// # Errors
/// When the handler cannot be installed.
pub fn reloads() -> io::Result<watch::Receiver<u64>> {
    let mut hangup = signal(SignalKind::hangup())?;
    let (sender, receiver) = watch::channel(0);
    tokio::spawn(async move {
        while hangup.recv().await.is_some() && !sender.is_closed() {
            sender.send_modify(|count| *count += 1);
        }
    });
    Ok(receiver)
}

/// Tells systemd about the daemon's state; silent when not started by systemd (`Type=notify`).
#[derive(Debug)]
pub struct Notifier {
    socket: Option<UnixDatagram>,
    watchdog: Option<Duration>,
}

impl Notifier {
    /// The notifier that the environment (`NOTIFY_SOCKET`, `WATCHDOG_USEC`) asks for.
    ///
    /// # Errors
    /// When systemd named a socket and it cannot be reached.
    pub fn from_env() -> io::Result<Self> {
        let watchdog = std::env::var("WATCHDOG_USEC").ok().and_then(|text| text.parse().ok());
        let for_us =
            std::env::var("WATCHDOG_PID").map_or(true, |text| text.parse() == Ok(std::process::id()));
        let name = std::env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty());
        Self::to(name.as_deref(), watchdog.filter(|_| for_us).map(Duration::from_micros))
    }

    /// A notifier that sends to the socket `name` (`@` begins an abstract one).
    ///
    /// # Errors
    /// When the socket cannot be reached.
    pub fn to(name: Option<&std::ffi::OsStr>, watchdog: Option<Duration>) -> io::Result<Self> {
        let Some(name) = name else { return Ok(Self { socket: None, watchdog: None }) };
        let address = match name.as_encoded_bytes() {
            [b'@', rest @ ..] => SocketAddr::from_abstract_name(rest)?,
            _ => SocketAddr::from_pathname(name)?,
        };
        let socket = UnixDatagram::unbound()?;
        socket.connect_addr(&address)?;
        socket.set_nonblocking(true)?;
        Ok(Self { socket: Some(socket), watchdog })
    }

    /// Sends `state`, for example `READY=1`, `STOPPING=1`, `RELOADING=1` or `STATUS=…`.
    ///
    /// # Errors
    /// When systemd does not take it.
    pub fn send(&self, state: &str) -> io::Result<()> {
        match &self.socket {
            Some(socket) => socket.send(state.as_bytes()).map(|_| ()),
            None => Ok(()),
        }
    }

    /// Half the watchdog's patience: how often [`Self::watch`] reports; `None` without a watchdog.
    #[must_use]
    pub fn watchdog_interval(&self) -> Option<Duration> {
        self.watchdog.map(|patience| patience / 2).filter(|interval| !interval.is_zero())
    }

    /// Reports `WATCHDOG=1` for as long as the runtime turns, until `shutdown`, then `STOPPING=1`.
    pub async fn watch(&self, shutdown: &Shutdown) {
        let beats = async {
            match self.watchdog_interval() {
                None => std::future::pending().await,
                Some(interval) => loop {
                    if let Err(error) = self.send("WATCHDOG=1") {
                        tracing::warn!(%error, "systemd did not take the watchdog report");
                    }
                    tokio::time::sleep(interval).await;
                },
            }
        };
        tokio::select! {
            () = shutdown.requested() => {}
            () = beats => {}
        }
        if let Err(error) = self.send("STOPPING=1") {
            tracing::warn!(%error, "systemd did not take the stop report");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run<F: Future>(future: F) -> F::Output {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
    }

    #[test]
    fn a_request_wakes_every_waiter_and_stays() {
        run(async {
            let (trigger, shutdown) = Shutdown::new();
            assert!(!shutdown.is_requested());
            let waiter = tokio::spawn({
                let shutdown = shutdown.clone();
                async move { shutdown.requested().await }
            });
            trigger.request();
            trigger.request();
            waiter.await.unwrap();
            shutdown.requested().await;
            assert!(shutdown.is_requested());
        });
    }

    #[test]
    fn losing_the_trigger_counts_as_a_request() {
        run(async {
            let (trigger, shutdown) = Shutdown::new();
            drop(trigger);
            shutdown.requested().await;
            assert!(shutdown.is_requested());
        });
    }

    #[test]
    fn systemd_hears_ready_watchdog_and_stopping() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let systemd = UnixDatagram::bind(&path).unwrap();
        let heard = || {
            let mut buffer = [0_u8; 64];
            let length = systemd.recv(&mut buffer).unwrap();
            String::from_utf8_lossy(&buffer[..length]).into_owned()
        };
        let notifier = Notifier::to(Some(path.as_os_str()), Some(Duration::from_secs(20))).unwrap();
        assert_eq!(notifier.watchdog_interval(), Some(Duration::from_secs(10)));
        notifier.send("READY=1").unwrap();
        assert_eq!(heard(), "READY=1");
        run(async {
            let (trigger, shutdown) = Shutdown::new();
            let watch = async {
                tokio::task::yield_now().await;
                trigger.request();
            };
            tokio::join!(notifier.watch(&shutdown), watch);
        });
        assert_eq!(heard(), "WATCHDOG=1");
        assert_eq!(heard(), "STOPPING=1");
    }

    #[test]
    fn abstract_notify_sockets_work_and_their_absence_is_silent() {
        let name = format!("@reprotect-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name.as_bytes()[1..]).unwrap();
        let systemd = UnixDatagram::bind_addr(&address).unwrap();
        Notifier::to(Some(name.as_ref()), None).unwrap().send("READY=1").unwrap();
        let mut buffer = [0_u8; 16];
        assert_eq!(systemd.recv(&mut buffer).unwrap(), 7);
        assert!(Notifier::to(None, None).unwrap().send("READY=1").is_ok());
        assert!(Notifier::to(Some("/nonexistent/notify".as_ref()), None).is_err());
    }
}
