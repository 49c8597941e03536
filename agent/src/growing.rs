//! A source disk that has another size than it had: a larger one is asked to grow at the target, and opened anew at its new
//! size; a smaller one is stopped.
//!
//! Invariants: a disk that grows is read by nobody until it is offered again; its capture goes on all the time, what was
//! harvested and is not durable is live again, and everything behind the old end is in its map before it is opened. Units:
//! sectors, bytes. Part of `machine`.

use reprotect_engine::format::message::SourceId;
use reprotect_engine::host::output;
use reprotect_engine::units::{DiskId, SECTOR_BYTES};

use crate::machine::Machine;

impl Machine {
    /// A reader found that its disk has another size.
    pub(crate) fn handle_resized(&mut self, disk: DiskId, bytes: u64) {
        let Some(state) = self.disks.get_mut(&disk) else { return };
        if bytes / SECTOR_BYTES > state.size_sectors {
            state.grows_to = Some(bytes / SECTOR_BYTES);
            return self.grow(disk);
        }
        let text = format!(
            "the disk had {} and has {} ({bytes} bytes) now, and a target is never made smaller: give it its size again, then reload the agent; or protect it anew, with a new target",
            output::bytes(state.size_bytes()),
            output::bytes(bytes)
        );
        tracing::error!(%disk, path = state.path, "stopped: {text}");
        state.stop(text);
        self.following.forget_stream(disk);
    }

    /// Asks the target of a disk that is larger to grow, where it can be asked now: else when it is opened, or offered.
    pub(crate) fn grow(&mut self, disk: DiskId) {
        let Some(state) = self.disks.get(&disk) else { return };
        let Some(sectors) = state.grows_to else { return };
        if !self.core.ask_to_grow(disk, sectors) {
            return;
        }
        let to = output::bytes(sectors * SECTOR_BYTES);
        tracing::info!(%disk, path = state.path, to, "the disk is larger than its target, which is asked to grow");
        if self.following.streams_any() {
            self.end_streaming("a disk grew");
        }
        self.following.pause(disk);
        if let Some(state) = self.disks.get_mut(&disk) {
            state.begin_growing();
        }
        if self.is_marking(disk) {
            self.fail_run(&format!("disk {disk} grew"));
        }
    }

    /// What the master target is told of a source follows its size.
    pub(crate) fn note_size(&mut self, source: SourceId, sectors: u64) {
        let bytes = sectors * SECTOR_BYTES;
        let Some(known) = self.sources.get_mut(&source) else { return };
        if known.source.bytes / SECTOR_BYTES != sectors {
            known.source.bytes = bytes;
            let sources = self.sources.clone();
            self.set_sources(sources);
        }
    }
}
