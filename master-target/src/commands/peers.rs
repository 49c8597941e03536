//! `invite`, `revoke`, `machines`, `unprotect`: who may connect, who has, and whose disks are let go.
//!
//! Invariants: a token is printed once and kept nowhere; revoking and letting go ask. Called by the dispatcher.

use std::time::Duration;

use reprotect_engine::host::output::{Align, Table, bytes, duration};
use reprotect_engine::host::places::Program;

use super::{Context, ask};
use crate::api::{
    InviteAnswer, InviteRequest, MachineInfo, RevokeAnswer, RevokeRequest, UnprotectAnswer, UnprotectRequest,
};
use crate::cli::{InviteArgs, InviteRole, RevokeArgs, UnprotectArgs};

/// `invite`: prints the token and the command that uses it.
///
/// # Errors
/// What the daemon refuses.
pub async fn invite(context: &Context, args: &InviteArgs) -> anyhow::Result<()> {
    let (role, program) = match args.role {
        InviteRole::Agent => ("agent", Program::Agent),
        InviteRole::ProcessServer => ("process-server", Program::ProcessServer),
    };
    let request = InviteRequest { role: role.to_owned(), valid_seconds: args.valid.0.as_secs() };
    let answer: InviteAnswer = context.daemon().post_json("/v1/invite", &request).await?;
    context.output.note(&format!(
        "On the other machine, within {}, run:\n  {program} enroll TOKEN\nIt will connect to {}. The token is secret and works once:",
        duration(Duration::from_secs(answer.valid_seconds)),
        answer.addresses.join(", "),
    ));
    // The token alone on standard output, so that it can be handed on by `$(…)`.
    context.output.result(&answer, || answer.token.clone())?;
    Ok(())
}

/// `revoke`: refuses a peer from now on.
///
/// # Errors
/// What the daemon refuses, or that nobody agreed.
pub async fn revoke(context: &Context, args: &RevokeArgs) -> anyhow::Result<()> {
    let question = format!(
        "{} will be refused from now on and must enrol again with a new token. Revoke it?",
        args.peer
    );
    ask::confirm(args.yes, &question)?;
    let request = RevokeRequest { peer: args.peer.clone() };
    let answer: RevokeAnswer = context.daemon().post_json("/v1/revoke", &request).await?;
    context.output.result(&answer, || format!("{} is revoked; its connections are closed", answer.peer))?;
    Ok(())
}

/// `unprotect`: stops replicating a disk; its target stays as it is.
///
/// # Errors
/// What the daemon refuses, or that nobody agreed.
pub async fn unprotect(context: &Context, args: &UnprotectArgs) -> anyhow::Result<()> {
    let daemon = context.daemon();
    let mut request = UnprotectRequest { disk: args.disk.clone(), dry_run: true };
    let found: UnprotectAnswer = daemon.post_json("/v1/unprotect", &request).await?;
    let question = format!(
        "{} will no longer be replicated to {}; the target stays, protecting it again compares all of it. Stop?",
        found.source, found.path
    );
    ask::confirm(args.yes, &question)?;
    request = UnprotectRequest { disk: found.disk, dry_run: false };
    let answer: UnprotectAnswer = daemon.post_json("/v1/unprotect", &request).await?;
    context.output.result(&answer, || {
        format!("{} is no longer replicated; {} is closed and stays", answer.source, answer.path)
    })?;
    Ok(())
}

/// `machines`: the enrolled machines and their disks.
///
/// # Errors
/// When the daemon cannot be asked.
pub async fn machines(context: &Context) -> anyhow::Result<()> {
    let machines: Vec<MachineInfo> = context.daemon().get_json("/v1/machines").await?;
    context.output.result(&machines, || render(&machines))?;
    Ok(())
}

fn render(machines: &[MachineInfo]) -> String {
    if machines.is_empty() {
        return "no machine has connected yet; `invite --role agent` makes a token for one".to_owned();
    }
    let mut table = Table::new(&[
        ("MACHINE", Align::Left),
        ("AGENT", Align::Left),
        ("DISK", Align::Left),
        ("SIZE", Align::Right),
        ("SELECTED", Align::Left),
        ("PROTECTED AS", Align::Left),
    ]);
    for machine in machines {
        let agent =
            if machine.connected { machine.agent.clone() } else { format!("{} (away)", machine.agent) };
        if machine.disks.is_empty() {
            table.row([machine.host_name.clone(), agent.clone(), "(no disks reported)".to_owned()]);
        }
        for disk in &machine.disks {
            table.row([
                machine.host_name.clone(),
                agent.clone(),
                disk.name.clone(),
                bytes(disk.size_bytes),
                if disk.selected { "yes" } else { "no" }.to_owned(),
                disk.protected_as.clone().unwrap_or_else(|| "-".to_owned()),
            ]);
        }
    }
    table.render()
}
