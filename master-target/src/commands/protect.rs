//! `protect`: shows the plan, asks, carries it out.
//!
//! | | terminal | no terminal |
//! |---|---|---|
//! | new disks, or every existing disk matches its source | asks | goes on |
//! | an existing disk that matches nothing would be overwritten | asks, naming it | refuses |
//! | `--yes` | goes on | goes on |
//!
//! Invariants: the plan is the daemon's own dry run; consent to overwrite what does not match is sent only when it was
//! given for a plan that named it, so a plan that got worse in between is refused by the daemon. Called by the dispatcher.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use reprotect_engine::host::output::{Align, Table, bytes};

use super::{Context, ask};
use crate::cli::{DiskFormat, ProtectArgs};
use crate::protect::{PlannedDisk, ProtectAnswer, ProtectRequest};

/// Runs the command.
///
/// # Errors
/// What the daemon refuses, or that nobody agreed.
pub async fn protect(context: &Context, args: &ProtectArgs) -> anyhow::Result<()> {
    let daemon = context.daemon();
    let mut request = request(args)?;
    if !args.yes {
        request.dry_run = true;
        let plan: ProtectAnswer = daemon.post_json("/v1/protect", &request).await?;
        request.yes = consent(context, &plan)?;
        request.dry_run = false;
    }
    let answer: ProtectAnswer = daemon.post_json("/v1/protect", &request).await?;
    context.output.result(&answer, || render(&answer))?;
    Ok(())
}

fn request(args: &ProtectArgs) -> anyhow::Result<ProtectRequest> {
    let absolute = |path: &PathBuf| {
        std::path::absolute(path).with_context(|| format!("{} cannot be made absolute", path.display()))
    };
    let original = args
        .original
        .iter()
        .map(|pair| Ok((pair.disk.clone(), absolute(&pair.path)?)))
        .collect::<anyhow::Result<_>>()?;
    Ok(ProtectRequest {
        machine: args.machine.clone(),
        original,
        original_from: args.original_from.as_ref().map(absolute).transpose()?,
        datastore: args.datastore.as_ref().map(absolute).transpose()?,
        kind: args.datastore.is_some().then(|| create_type(args.format).to_owned()),
        yes: args.yes,
        dry_run: false,
    })
}

/// The createType of a format.
const fn create_type(format: DiskFormat) -> &'static str {
    match format {
        DiskFormat::Flat => "monolithicFlat",
        DiskFormat::Vmfs => "vmfs",
        DiskFormat::TwoGbFlat => "twoGbMaxExtentFlat",
        DiskFormat::Sparse => "monolithicSparse",
        DiskFormat::TwoGbSparse => "twoGbMaxExtentSparse",
    }
}

/// Asks where somebody can answer; answers whether overwriting what does not match was agreed to.
fn consent(context: &Context, plan: &ProtectAnswer) -> anyhow::Result<bool> {
    let unmatched: Vec<&Path> = plan
        .disks
        .iter()
        .filter(|planned| planned.overwrites_unmatched())
        .map(|planned| planned.path.as_path())
        .collect();
    if !ask::can_ask() {
        return match unmatched.first() {
            Some(path) => Err(anyhow::anyhow!(
                "{} carries neither the partition table nor the file systems of its source, and nobody can be asked here; if it is to be overwritten, repeat with --yes",
                path.display()
            )),
            None => Ok(false),
        };
    }
    if !context.output.json() {
        eprint!("{}", render(plan));
    }
    let question = if unmatched.is_empty() {
        "Begin replication?".to_owned()
    } else {
        let names: Vec<String> = unmatched.iter().map(|path| path.display().to_string()).collect();
        format!("What is on {} does not match and will be LOST. Overwrite?", names.join(", "))
    };
    if ask::ask(&question)? { Ok(!unmatched.is_empty()) } else { anyhow::bail!("nothing was done") }
}

fn render(answer: &ProtectAnswer) -> String {
    let mut table = Table::new(&[
        ("DISK", Align::Left),
        ("SIZE", Align::Right),
        ("TARGET", Align::Left),
        ("KIND", Align::Left),
        ("HOW", Align::Left),
        ("MATCH", Align::Left),
    ]);
    for planned in &answer.disks {
        table.row([
            planned.source.clone(),
            bytes(planned.size_bytes),
            planned.path.display().to_string(),
            planned.kind.clone(),
            if planned.existing { "compare, send differences" } else { "create, copy" }.to_owned(),
            matching(planned),
        ]);
    }
    let mut text = table.render();
    for left_out in &answer.left_out {
        text.push_str(&format!("left out: {}\n", reprotect_engine::host::output::printable(left_out)));
    }
    if answer.done {
        text.push_str(&format!("{} is being replicated; `status --watch` shows it\n", answer.machine));
    }
    text
}

fn matching(planned: &PlannedDisk) -> String {
    match (planned.existing, planned.score) {
        (false, _) => "new".to_owned(),
        (true, 0) => "NONE: will be overwritten".to_owned(),
        (true, score @ 100..) => format!("partition table, {} file systems ({score})", score % 100 / 10),
        (true, score) => format!("{} file systems ({score})", score / 10),
    }
}

#[cfg(test)]
mod tests {
    use reprotect_engine::store::target::TargetKind;

    use super::*;
    use crate::catalogue::kind_from_text;

    #[test]
    fn every_format_is_a_kind_that_can_be_made() {
        for format in [
            DiskFormat::Flat,
            DiskFormat::Vmfs,
            DiskFormat::TwoGbFlat,
            DiskFormat::Sparse,
            DiskFormat::TwoGbSparse,
        ] {
            let kind = kind_from_text(create_type(format)).expect("a kind");
            assert!(kind.vmdk().is_some() && kind != TargetKind::Device, "{format:?}");
        }
    }
}
