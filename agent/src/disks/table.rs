//! The table that `reprotect-agent disks` prints.
//!
//! Invariant: one row per disk, every row with its verdict and reason; nothing a device reports can steer the
//! terminal (the table makes text printable). Called by the `disks` command.

use reprotect_engine::host::output::{Align, Table, bytes};

use super::Disk;

/// `disks` as an aligned table with one line of summary.
#[must_use]
pub fn render(disks: &[&Disk]) -> String {
    let mut table = Table::new(&[
        ("DISK", Align::Left),
        ("SIZE", Align::Right),
        ("PROTECT", Align::Left),
        ("PARTS", Align::Right),
        ("MODEL", Align::Left),
        ("MOUNTS", Align::Left),
        ("WHY", Align::Left),
    ]);
    for disk in disks {
        table.row([
            disk.path.display().to_string(),
            bytes(disk.bytes),
            if disk.verdict.selected { "yes" } else { "no" }.to_owned(),
            disk.partitions.len().to_string(),
            disk.model.clone().unwrap_or_else(|| "-".to_owned()),
            uses(disk),
            disk.verdict.reason.clone(),
        ]);
    }
    let selected: Vec<_> = disks.iter().filter(|disk| disk.verdict.selected).collect();
    let total = selected.iter().fold(0_u64, |sum, disk| sum.saturating_add(disk.bytes));
    format!(
        "{}{} of {} disks are protected by default, {}\n",
        table.render(),
        selected.len(),
        disks.len(),
        bytes(total)
    )
}

/// Mount points (the first three) and swap.
fn uses(disk: &Disk) -> String {
    let mut uses: Vec<String> = disk.mounts.iter().map(|mount| mount.mount_point.clone()).collect();
    uses.dedup();
    let surplus = uses.len().saturating_sub(3);
    uses.truncate(3);
    if surplus > 0 {
        uses.push(format!("+{surplus}"));
    }
    if !disk.swap.is_empty() {
        uses.push("[swap]".to_owned());
    }
    if uses.is_empty() { "-".to_owned() } else { uses.join(",") }
}
