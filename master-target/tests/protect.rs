//! `protect` on a registry with real files: what is planned, what is refused, and that a refusal changes nothing.

#![expect(clippy::unwrap_used, reason = "a failed step is a failed test")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use reprotect_engine::format::disk_state::DiskState;
use reprotect_engine::format::message::{InventoryDisk, PassMode};
use reprotect_engine::format::wire::Text;
use reprotect_engine::io::{self, BlockFile, WriteAt};
use reprotect_engine::proto::credit::FlowLimits;
use reprotect_engine::store::fingerprint::Fingerprint;
use reprotect_engine::store::identity::DiskIdentity;
use reprotect_engine::store::target::{CreateOptions, TargetKind, TargetSpec, create_target};
use reprotect_engine::units::PeerId;
use reprotect_master_target::catalogue::Catalogue;
use reprotect_master_target::protect::{ProtectAnswer, ProtectRequest, protect};
use reprotect_master_target::registry::{Registry, fs_opener};

const SIZE: u64 = 4 << 20;

struct Site {
    dir: tempfile::TempDir,
    registry: Registry,
}

/// A sector range that looks like an ext file system of this UUID.
fn file_system(uuid: u8) -> Vec<u8> {
    let mut data = vec![0_u8; 4096];
    data[1024 + 56..1024 + 58].copy_from_slice(&[0x53, 0xef]);
    data[1024 + 104..1024 + 120].fill(uuid);
    data
}

fn source(number: u8, name: &str, size_bytes: u64, uuid: u8) -> InventoryDisk {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(size_bytes).unwrap();
    let options = io::OpenOptions { write: true, ..io::OpenOptions::default() };
    let mut disk = io::open(file.path(), &options).unwrap();
    disk.write(&[WriteAt { offset: 0, data: &file_system(uuid) }]).unwrap();
    let print = Fingerprint::of(&DiskIdentity::probe(&mut disk).unwrap());
    let mut fs_uuids = [0; 128];
    for (place, tag) in fs_uuids.chunks_exact_mut(16).zip(&print.tags) {
        place.copy_from_slice(tag);
    }
    InventoryDisk {
        source: [number; 16],
        size_sectors: size_bytes / 512,
        gpt_guid: print.gpt_guid,
        mbr_signature: print.mbr_signature,
        fs_count: print.tags.len() as u8,
        selected: true,
        name: Text::new(name),
        fs_uuids,
    }
}

impl Site {
    fn with(disks: &[InventoryDisk]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("ds")).unwrap();
        let registry =
            Registry::open(Catalogue::open(&dir.path().join("state")).unwrap(), FlowLimits::default())
                .unwrap();
        registry.take_inventory(PeerId([7; 16]), "web1", disks).unwrap();
        Self { dir, registry }
    }

    fn ds(&self) -> PathBuf {
        self.dir.path().join("ds")
    }

    /// An existing VMDK with a file system on it.
    fn existing(&self, name: &str, size_bytes: u64, uuid: u8) -> PathBuf {
        let path = self.ds().join(name);
        let spec = TargetSpec { path: path.clone(), kind: TargetKind::MonolithicFlat };
        let none = BTreeSet::new();
        let mut target =
            create_target(&fs_opener(), &spec, size_bytes, &none, &CreateOptions::default()).unwrap();
        target.write(&[WriteAt { offset: 0, data: &file_system(uuid) }]).unwrap();
        target.close().unwrap();
        path
    }

    fn ask(&self, request: &ProtectRequest) -> Result<ProtectAnswer, String> {
        self.ask_within(&[], request)
    }

    fn ask_within(&self, allowed: &[PathBuf], request: &ProtectRequest) -> Result<ProtectAnswer, String> {
        let request = ProtectRequest { machine: "web1".to_owned(), ..request.clone() };
        protect(&self.registry, allowed, &request).map_err(|error| format!("{error:#}"))
    }

    fn files(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let mut files: Vec<_> = std::fs::read_dir(self.ds())
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .map(|path| (path.clone(), std::fs::read(&path).unwrap()))
            .collect();
        files.sort();
        files
    }

    /// Asks for what must be refused; nothing may have changed.
    fn refused(&self, request: &ProtectRequest, expected: &str) {
        let before = self.files();
        for dry_run in [true, false] {
            let error = self.ask(&ProtectRequest { dry_run, ..request.clone() }).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
        assert!(self.registry.disks().is_empty() && self.files() == before);
    }
}

fn original(pairs: &[(&str, &Path)]) -> ProtectRequest {
    let original = pairs.iter().map(|(disk, path)| ((*disk).to_owned(), path.to_path_buf())).collect();
    ProtectRequest { original, ..ProtectRequest::default() }
}

fn from(dir: PathBuf) -> ProtectRequest {
    ProtectRequest { original_from: Some(dir), ..ProtectRequest::default() }
}

fn into(dir: PathBuf) -> ProtectRequest {
    ProtectRequest { datastore: Some(dir), ..ProtectRequest::default() }
}

#[test]
fn new_disks_are_made_once_all_together_and_remembered() {
    let site = Site::with(&[source(1, "/dev/sda", SIZE, 1), source(2, "/dev/sdb", SIZE, 2)]);
    let plan = site.ask(&ProtectRequest { dry_run: true, ..into(site.ds()) }).unwrap();
    assert!(!plan.done && plan.disks.len() == 2 && site.files().is_empty());
    let answer = site.ask(&into(site.ds())).unwrap();
    assert!(answer.done && answer.disks.iter().all(|disk| disk.disk.is_some() && !disk.existing));
    assert!(site.ds().join("web1-sda-flat.vmdk").exists() && site.ds().join("web1-sdb.vmdk").exists());
    let again = site.ask(&into(site.ds())).unwrap_err();
    assert!(again.contains("sda is protected already"), "{again}");
    site.registry.stop();
    let state = Catalogue::open(&site.dir.path().join("state")).unwrap();
    let restarted = Registry::open(state, FlowLimits::default()).unwrap();
    let views = restarted.disks();
    let problems: Vec<_> = views.iter().map(|view| &view.problem).collect();
    assert!(problems.iter().all(|problem| problem.is_none()) && views.len() == 2, "{problems:?}");
    assert_eq!(restarted.machine("web1").unwrap().disks.len(), 2);
    restarted.stop();
}

#[test]
fn originals_are_paired_by_what_is_on_them_and_doubt_is_refused() {
    let site = Site::with(&[source(1, "/dev/sda", SIZE, 1), source(2, "/dev/sdb", SIZE, 2)]);
    let (b, a) = (site.existing("b.vmdk", SIZE, 1), site.existing("a.vmdk", SIZE, 2));
    let plan = site.ask(&ProtectRequest { dry_run: true, ..from(site.ds()) }).unwrap();
    let pairs: Vec<_> =
        plan.disks.iter().map(|disk| (disk.source.as_str(), &disk.path, disk.score)).collect();
    assert_eq!(pairs, [("/dev/sda", &b, 10), ("/dev/sdb", &a, 10)]);
    site.existing("clone.vmdk", SIZE, 2);
    site.refused(&from(site.ds()), "name the pairs with --original");
    let named = site.ask(&original(&[("sda", &b), ("sdb", &a)])).unwrap();
    assert!(named.done && named.disks.iter().all(|disk| disk.existing && disk.score == 10));
    let taken = site.ask(&original(&[("sda", &a)])).unwrap_err();
    assert!(taken.contains("protected already"), "{taken}");
    site.registry.stop();
}

#[test]
fn what_does_not_match_is_overwritten_only_when_told() {
    let site = Site::with(&[source(1, "/dev/sda", SIZE, 1)]);
    let path = site.existing("other.vmdk", SIZE, 9);
    let plan = site.ask(&ProtectRequest { dry_run: true, ..original(&[("sda", &path)]) }).unwrap();
    assert!(plan.disks[0].overwrites_unmatched());
    let refused = site.ask(&original(&[("sda", &path)])).unwrap_err();
    assert!(refused.contains("repeat with --yes") && site.registry.disks().is_empty(), "{refused}");
    assert!(site.ask(&ProtectRequest { yes: true, ..original(&[("sda", &path)]) }).unwrap().done);
    site.registry.stop();
}

#[test]
fn wrong_size_snapshots_locks_and_double_use_are_refused_without_a_trace() {
    let site = Site::with(&[source(1, "/dev/sda", SIZE, 1), source(2, "/dev/sdb", SIZE, 2)]);
    let large = site.existing("large.vmdk", 2 * SIZE, 1);
    site.refused(&original(&[("sda", &large)]), "choose the disk that was failed over");
    let good = site.existing("good.vmdk", SIZE, 1);
    site.refused(&original(&[("sda", &good), ("sdb", &good)]), "each disk needs its own");
    site.refused(&original(&[("sdz", &good)]), "has no disk sdz; it has /dev/sda, /dev/sdb");
    site.refused(&original(&[("sda", &site.ds().join("gone.vmdk"))]), "is missing");

    std::fs::write(site.ds().join("good-000001.vmdk"), "# Disk DescriptorFile\n").unwrap();
    site.refused(&original(&[("sda", &good)]), "consolidate snapshots first");
    std::fs::remove_file(site.ds().join("good-000001.vmdk")).unwrap();

    // Opened only when it is carried out, and then before anything is replicated.
    let second = site.existing("second.vmdk", SIZE, 2);
    std::fs::write(site.ds().join("second.vmdk.lck"), "").unwrap();
    let before = site.files();
    let request = original(&[("sda", &good), ("sdb", &second)]);
    let in_use = site.ask(&request).unwrap_err();
    assert!(in_use.contains("is in use"), "{in_use}");
    assert!(site.registry.disks().is_empty() && site.files() == before);
    std::fs::remove_file(site.ds().join("second.vmdk.lck")).unwrap();
    assert!(site.ask(&request).unwrap().done);
    site.registry.stop();
}

#[test]
fn a_clone_with_the_same_uuid_is_refused() {
    let site = Site::with(&[source(1, "/dev/sda", SIZE, 1), source(2, "/dev/sdb", SIZE, 2)]);
    let (one, two) = (site.existing("one.vmdk", SIZE, 1), site.existing("two.vmdk", SIZE, 2));
    let text = std::fs::read_to_string(&one).unwrap();
    std::fs::write(&two, text.replace("one-flat", "two-flat")).unwrap();
    let error = site.ask(&original(&[("sda", &one), ("sdb", &two)])).unwrap_err();
    assert!(error.contains("which another disk has too"), "{error}");
    assert!(site.registry.disks().is_empty());
    assert!(site.ask(&original(&[("sda", &one)])).unwrap().done);
    let error = site.ask(&original(&[("sdb", &two)])).unwrap_err();
    assert!(error.contains("which another disk has too"), "{error}");
    site.registry.stop();
}

#[test]
fn new_disks_need_their_place_and_their_space() {
    let site = Site::with(&[source(1, "/dev/sda", SIZE, 1), source(2, "/dev/huge", 8 << 40, 2)]);
    site.refused(&into(site.ds()), "free some space or choose another datastore");
    let small = Site::with(&[source(1, "/dev/sda", SIZE, 1)]);
    let outside = small.ask_within(&[PathBuf::from("/somewhere")], &into(small.ds())).unwrap_err();
    assert!(outside.contains("add it there"), "{outside}");
    let sneaky = small.ds().join("..").join("elsewhere");
    let climbing = small.ask_within(&[small.ds()], &into(sneaky)).unwrap_err();
    assert!(climbing.contains("`..`"), "{climbing}");
    let elsewhere = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(elsewhere.path(), small.ds().join("link")).unwrap();
    let linked = small.ask_within(&[small.ds()], &into(small.ds().join("link"))).unwrap_err();
    assert!(linked.contains("add it there"), "{linked}");
    std::fs::remove_file(small.ds().join("link")).unwrap();
    small.refused(&into("relative".into()), "relative path");
    let kind = Some("vmfsSparse".to_owned());
    small.refused(&ProtectRequest { kind, ..into(small.ds()) }, "no kind of VMDK");
    std::fs::write(small.ds().join("web1-sda.vmdk"), "mine").unwrap();
    small.refused(&into(small.ds()), "exists already");
    std::fs::remove_file(small.ds().join("web1-sda.vmdk")).unwrap();
    assert!(small.ask_within(&[small.ds()], &into(small.ds().join("new/web1"))).unwrap().done);
    small.registry.stop();
}

#[test]
fn a_disk_that_is_let_go_keeps_its_target_and_can_be_protected_again() {
    let site = Site::with(&[source(1, "/dev/sda", SIZE, 1)]);
    let path = site.existing("web.vmdk", SIZE, 1);
    site.ask(&original(&[("sda", &path)])).unwrap();
    for name in ["web1:sda", "web1:/dev/sda", path.to_str().unwrap()] {
        assert_eq!(site.registry.protected(name).unwrap().path, path, "{name}");
    }
    assert!(site.registry.protected("web2:sda").unwrap_err().to_string().contains("MACHINE:DISK"));
    let record = site.registry.protected("web1:sda").unwrap();
    let disk = reprotect_engine::units::DiskId::parse(&record.disk).unwrap();
    site.registry.remove_disk(disk).unwrap();
    assert!(site.registry.disks().is_empty() && path.exists());
    assert!(site.ask(&original(&[("sda", &path)])).unwrap().done, "it is free again");
    site.registry.stop();
}

/// Makes the grain table entry of a sparse file point beyond its end, as a crash of the medium may leave it.
fn lose_grain(path: &Path, grain: u64) {
    let mut data = std::fs::read(path).unwrap();
    let sector = |data: &[u8], at: usize| u32::from_le_bytes(data[at..at + 4].try_into().unwrap()) as usize;
    for directory in [sector(&data, 48), sector(&data, 56)] {
        let table = sector(&data, directory * 512);
        let at = table * 512 + grain as usize * 4;
        data[at..at + 4].copy_from_slice(&0x7fff_ff80_u32.to_le_bytes());
    }
    data[72] = 1; // not closed
    std::fs::write(path, data).unwrap();
}

#[test]
fn what_a_crash_of_the_medium_took_from_a_finished_disk_is_compared_again_and_nothing_else() {
    let size = 16 << 20;
    let site = Site::with(&[source(1, "/dev/sda", size, 1)]);
    let sparse = ProtectRequest { kind: Some("monolithicSparse".to_owned()), ..into(site.ds()) };
    let answer = site.ask(&sparse).unwrap();
    let disk = answer.disks[0].disk.clone().unwrap();
    site.registry.stop();
    let state_path = site.dir.path().join("state/disks").join(disk).join("state");
    let mut state = DiskState::decode(&std::fs::read(&state_path).unwrap()).unwrap();
    state.mode = PassMode::Done;
    std::fs::write(&state_path, state.to_bytes()).unwrap();
    lose_grain(&answer.disks[0].path, 100); // 64 KiB grains: in the second chunk of 4 MiB

    // Twice: closing puts the tables in order, and what was lost must still be known.
    for restart in 0..2 {
        let catalogue = Catalogue::open(&site.dir.path().join("state")).unwrap();
        let registry = Registry::open(catalogue, FlowLimits::default()).unwrap();
        let snapshot = registry.disks()[0].status.as_ref().unwrap().snapshot();
        assert_eq!((snapshot.mode, snapshot.pass), (PassMode::Compare, state.pass + 1), "start {restart}");
        assert_eq!(snapshot.settled_sectors, (size - (4 << 20)) / 512);
        registry.stop();
    }
}

fn losetup(arguments: &[&std::ffi::OsStr]) -> String {
    let output = std::process::Command::new("losetup").args(arguments).output().unwrap();
    assert!(output.status.success(), "losetup: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

#[test]
fn another_device_under_the_old_name_is_refused() {
    if !rustix::process::geteuid().is_root() || !Path::new("/dev/loop-control").exists() {
        return eprintln!("SKIPPED: needs root and loop devices");
    }
    let site = Site::with(&[source(1, "/dev/sda", SIZE, 1)]);
    let images = ["one.img", "two.img"].map(|name| site.dir.path().join(name));
    for image in &images {
        std::fs::write(image, file_system(1)).unwrap();
        std::fs::File::options().write(true).open(image).unwrap().set_len(SIZE).unwrap();
    }
    let device = losetup(&["--find".as_ref(), "--show".as_ref(), images[0].as_os_str()]);
    let answer = site.ask(&original(&[("sda", Path::new(&device))])).unwrap();
    assert_eq!((answer.disks[0].kind.as_str(), answer.disks[0].score), ("device", 10));
    site.registry.stop();
    let problem = || {
        let catalogue = Catalogue::open(&site.dir.path().join("state")).unwrap();
        let registry = Registry::open(catalogue, FlowLimits::default()).unwrap();
        let problem = registry.disks()[0].problem.clone();
        registry.stop();
        problem
    };
    assert_eq!(problem(), None, "the same device is fine");
    losetup(&["--detach".as_ref(), device.as_ref()]);
    losetup(&[device.as_ref(), images[1].as_os_str()]);
    let refused = problem();
    losetup(&["--detach".as_ref(), device.as_ref()]);
    assert!(refused.as_deref().is_some_and(|why| why.contains("is not the disk it was")), "{refused:?}");
}
