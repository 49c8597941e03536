//! The three built daemons as separate processes, through the scripts of `benches/scripts`, in their small forms.
//!
//! What must hold: every kind of target ends identical and is accepted by judges that share no code with us; kills of
//! any daemon lose no progress; an existing target receives only differences. The same scripts, with the same
//! assertions, run large by `make accept`, `make kill-test` and `make delta-test`. Needs the three binaries in the target
//! folder, which `cargo test --workspace` builds; a missing one is a failure that says how to build it.
#![expect(clippy::expect_used, reason = "a test crate: helpers outside test functions expect too")]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

/// Daemons and disks of one script at a time: two cores, and timeouts that should mean something.
static MACHINE: Mutex<()> = Mutex::new(());

/// Where cargo put this crate's program; the other two are built beside it.
fn binaries() -> PathBuf {
    Path::new(env!("CARGO_BIN_EXE_reprotect-master-target")).parent().expect("a folder").to_owned()
}

/// Runs a script with exactly these settings, whatever the caller's environment says.
fn script(name: &str, settings: &[(&str, &str)]) {
    let _turn = MACHINE.lock().unwrap_or_else(PoisonError::into_inner);
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
    let mut command = Command::new("python3");
    command.arg(repository.join("benches/scripts").join(name)).stdin(Stdio::null());
    for setting in [
        "SIZE", "FILL", "TARGET", "TARGETS", "RELAY", "KEEP", "SEED", "KILLS", "PERCENT", "LEVEL", "POINTS",
        "GROWTHS", "MODE", "FS", "RATE",
    ] {
        command.env_remove(setting);
    }
    let done = command
        .env("REPROTECT_BIN_DIR", binaries())
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .envs(settings.iter().copied())
        .output()
        .expect("python3 is there; `make setup` installs it");
    let (told, complained) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    println!("{told}{complained}");
    assert!(done.status.success(), "{name} {settings:?}: {}\n{told}{complained}", done.status);
    assert!(told.trim_end().ends_with(": OK"), "{name} ended without its verdict:\n{told}");
}

#[test]
fn every_kind_of_target_ends_identical_and_satisfies_independent_judges() {
    script("accept.py", &[("SIZE", "256M")]);
}

#[test]
fn a_direct_agent_fills_a_flat_and_a_sparse_target_just_as_well() {
    script("accept.py", &[("SIZE", "256M"), ("RELAY", "0"), ("TARGETS", "flat sparse")]);
}

#[test]
fn five_kills_of_random_daemons_during_the_initial_sync_lose_no_progress() {
    script("kill_test.py", &[("SIZE", "256M"), ("KILLS", "5")]);
}

#[test]
fn only_differences_travel_to_an_existing_target() {
    // On a small disk what does not depend on its size weighs most, so the level is as strong as the yardstick here.
    script("delta_test.py", &[("SIZE", "256M"), ("SEED", "2"), ("LEVEL", "1")]);
}

#[test]
fn recovery_points_are_the_disk_as_it_was_and_the_way_back_to_it() {
    script("points_test.py", &[("SIZE", "256M"), ("POINTS", "4"), ("ROLLBACKS", "3")]);
}

#[test]
fn what_an_existing_disk_held_can_be_had_back_and_a_rollback_holds_it() {
    script("as_found_test.py", &[("SIZE", "256M")]);
}

#[test]
fn a_disk_that_grows_under_load_keeps_its_points_whenever_the_target_is_killed() {
    script("grow_test.py", &[("SIZE", "64M"), ("GROWTHS", "2"), ("TARGET", "2gb-sparse")]);
}

#[test]
fn a_machine_goes_home_and_is_taken_back_whatever_step_the_target_is_killed_at() {
    script("failback_test.py", &[("SIZE", "128M"), ("KILLS", "5")]);
}

#[test]
fn points_are_exported_and_read_from_the_folder_alone_after_a_kill() {
    script("export_test.py", &[("SIZE", "128M"), ("POINTS", "2"), ("KILLS", "2")]);
}

#[test]
fn the_scrub_finds_rot_and_outside_writes_and_nothing_else() {
    script("scrub_test.py", &[("SIZE", "128M")]);
}

#[test]
fn points_of_a_live_disk_are_states_it_was_in_and_a_killed_agent_goes_on() {
    script("capture_test.py", &[("SIZE", "256M"), ("POINTS", "8")]);
}

#[test]
fn single_writes_of_a_live_disk_are_states_it_was_in() {
    script(
        "capture_test.py",
        &[("SIZE", "384M"), ("POINTS", "6"), ("MODE", "data"), ("FS", "xfs"), ("RELAY", "0")],
    );
}

#[test]
fn when_the_process_server_in_use_dies_the_agent_goes_on_with_the_other() {
    script("failover_test.py", &[("SIZE", "128M"), ("KILLS", "3"), ("RATE", "10")]);
}

#[test]
fn where_udp_is_dropped_everything_goes_over_tcp_and_back_once_it_is_not() {
    script("tcp_test.py", &[("SIZE", "128M"), ("RATE", "10")]);
}

#[test]
fn whatever_goes_wrong_around_the_daemons_the_newest_point_is_the_disk() {
    script("chaos.py", &[("SECONDS", "30"), ("SIZE", "128M"), ("SEED", "11")]);
}

#[test]
fn a_guest_that_loses_its_power_ends_identical_and_its_points_stay() {
    script("guest_test.py", &[("KERNELS", "6.1"), ("CUTS", "1"), ("SIZE", "96M"), ("LOAD", "1")]);
}

#[test]
fn commands_that_write_past_the_block_layer_are_noticed() {
    script("unseen_test.py", &[("KERNELS", "6.1")]);
}

#[test]
fn the_demonstration_tells_its_story_to_the_end() {
    script("demo.py", &[("SIZE", "256M"), ("TARGET", "sparse")]);
}
