//! Live capture: seeing the writes to a running disk by eBPF programs on the block layer's tracepoints.
//!
//! A write's way: the program at submission marks its blocks and remembers it as in flight (`bpf/capture.bpf.c`); the one
//! at completion marks them again; `tracker` harvests the marks, `tracked` keeps them pending until they are durable;
//! `accounting` and `oracle` compare what was seen with the kernel's own account; `session_file` says what may be continued after a
//! restart. `loader` and `kernel` are all that talks to the kernel.
//!
//! Invariants: a write is never missed without being noticed (see `oracle`); nothing here blocks or delays a write.

mod accounting;
mod bitmap;
mod costs;
mod error;
mod kernel;
mod layout;
mod loader;
mod mapped;
mod object;
mod oracle;
mod pins;
mod ring;
mod selftest;
mod session_file;
mod spans;
mod stream;
mod sysfs;
mod tracked;
mod tracker;
mod window;

pub use costs::{Measuring, ProgramCost};
pub use error::CaptureError;
pub use layout::{DISKS_MAX, Kind, Mode};
pub use loader::check_machine;
pub(crate) use oracle::Anchor;
pub use oracle::{Check, Verdict};
pub use pins::let_go;
pub use ring::Record;
pub use session_file::{CompareCause, Continuity};
pub use spans::{GROUP_BYTES_MAX, Span, groups, spans};
pub use stream::Drained;
pub use sysfs::{Account, BlockDisk};
pub use tracked::{STRETCHES_MAX, Stretch};
pub use tracker::{Capture, CaptureSettings, DiskCounts, DiskSlot, Loss};
pub use window::{Closed, Moment, WindowEnd, WindowFailure, WindowPlan, WindowSink};
