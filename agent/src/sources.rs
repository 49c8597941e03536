//! Which disks this machine has, who they are, and how the target knows them again.
//!
//! Invariants: a source's identity comes from the disk itself (WWID or serial, else its partition table, else its
//! path for an image), so that it survives a reboot that renames devices; two sources never share an identity; one
//! disk that is missing or unreadable is named as a problem and never keeps the others from being protected; what
//! `disks.exclude` names is no source at all. Called by `plan` at start and on SIGHUP, by `opening`, by `check`.
//! Units: bytes and sectors.

use std::collections::BTreeMap;
use std::path::Path;

use reprotect_engine::format::message::{InventoryDisk, SourceId};
use reprotect_engine::format::wire::Text;
use reprotect_engine::io;
use reprotect_engine::store::fingerprint::Fingerprint;
use reprotect_engine::store::identity::DiskIdentity;
use reprotect_engine::units::SECTOR_BYTES;

use crate::config::DisksConfig;
use crate::disks::{Disk, DisksError, Source, SourceKind, SystemRoot, enumerate, is_excluded, select};

/// A source and its identity.
#[derive(Clone, Debug)]
pub struct KnownSource {
    /// The disk or image.
    pub source: Source,
    /// Its identity on the wire.
    pub id: SourceId,
    /// What is on it.
    pub fingerprint: Fingerprint,
    /// Whether it is offered without being asked for.
    pub selected: bool,
}

/// All sources by identity.
pub type Sources = BTreeMap<SourceId, KnownSource>;

/// What was found.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// What can be protected.
    pub sources: Sources,
    /// What was wished for and cannot be, in words with a remedy.
    pub problems: Vec<String>,
}

/// Finds the machine's sources. Blocks.
///
/// # Errors
/// When the disks cannot be listed at all.
pub fn find(config: &DisksConfig) -> Result<Found, DisksError> {
    find_below(&SystemRoot::default(), config)
}

/// As [`find`], on the machine below `root`.
///
/// # Errors
/// When the disks cannot be listed at all.
pub fn find_below(root: &SystemRoot, config: &DisksConfig) -> Result<Found, DisksError> {
    let disks = enumerate(root)?;
    let mut found = Found::default();
    let chosen = select_leniently(root, &disks, config, &mut found.problems);
    for source in &chosen {
        match probe(&source.path) {
            Ok(identity) => found.add(source.clone(), &Fingerprint::of(&identity), true),
            Err(error) => {
                found.problems.push(format!("{error}; run the agent as root, or exclude it in [disks]"))
            }
        }
    }
    for disk in disks.iter().filter(|disk| disk.is_worth_showing() && disk.verdict.class.may_be_included()) {
        if chosen.iter().any(|source| source.path == disk.path) || is_excluded(root, disk, &config.exclude) {
            continue;
        }
        if let Ok(source) = Source::disk(disk) {
            // Not asked for, so one that cannot be read is no problem yet.
            let fingerprint =
                probe(&source.path).map_or_else(|_| Fingerprint::default(), |disk| Fingerprint::of(&disk));
            found.add(source, &fingerprint, false);
        }
    }
    Ok(found)
}

/// The selection without the wishes that cannot be met, which become problems.
fn select_leniently(
    root: &SystemRoot,
    disks: &[Disk],
    config: &DisksConfig,
    problems: &mut Vec<String>,
) -> Vec<Source> {
    let mut include = Vec::new();
    for pattern in &config.include {
        match select(root, disks, std::slice::from_ref(pattern), &config.exclude) {
            Ok(_) => include.push(pattern.clone()),
            Err(error) => problems.push(error.to_string()),
        }
    }
    let usable: Vec<Disk> = disks.iter().filter(|disk| Source::disk(disk).is_ok()).cloned().collect();
    select(root, &usable, &include, &config.exclude).unwrap_or_else(|error| {
        problems.push(error.to_string());
        Vec::new()
    })
}

impl Found {
    fn add(&mut self, source: Source, fingerprint: &Fingerprint, selected: bool) {
        let id = identity(&source, fingerprint);
        if let Some(other) = self.sources.get(&id) {
            if selected {
                self.problems.push(format!(
                    "{} and {} report the same identity, so only the first is protected; exclude one of them in [disks]",
                    other.source.path.display(),
                    source.path.display()
                ));
            }
            return;
        }
        self.sources.insert(id, KnownSource { source, id, fingerprint: fingerprint.clone(), selected });
    }

    /// How many are protected without being asked for.
    #[must_use]
    pub fn selected(&self) -> usize {
        self.sources.values().filter(|source| source.selected).count()
    }
}

fn identity(source: &Source, fingerprint: &Fingerprint) -> SourceId {
    let text = match (&source.stable_id, source.kind) {
        (Some(id), _) => format!("id:{id}"),
        (None, SourceKind::ImageFile) => format!("image:{}", source.path.display()),
        (None, SourceKind::BlockDevice) if fingerprint.gpt_guid != [0; 16] => {
            format!("gpt:{:02x?}", fingerprint.gpt_guid)
        }
        (None, SourceKind::BlockDevice) => format!("device:{}", source.path.display()),
    };
    let mut id = [0; 16];
    id.copy_from_slice(&blake3::hash(text.as_bytes()).as_bytes()[..16]);
    id
}

/// Who the disk at `path` is, by its content. Blocks.
///
/// # Errors
/// When it cannot be opened or read.
pub fn probe(path: &Path) -> Result<DiskIdentity, io::BlockError> {
    DiskIdentity::probe(&mut io::open(path, &io::OpenOptions::reading())?)
}

/// The inventory to send.
#[must_use]
pub fn inventory(sources: &Sources) -> Vec<InventoryDisk> {
    sources.values().map(inventory_disk).collect()
}

fn inventory_disk(known: &KnownSource) -> InventoryDisk {
    let mut fs_uuids = [0_u8; 128];
    for (slot, tag) in fs_uuids.chunks_exact_mut(16).zip(&known.fingerprint.tags) {
        slot.copy_from_slice(tag);
    }
    InventoryDisk {
        source: known.id,
        size_sectors: known.source.bytes / SECTOR_BYTES,
        gpt_guid: known.fingerprint.gpt_guid,
        mbr_signature: known.fingerprint.mbr_signature,
        fs_count: known.fingerprint.tags.len().min(8) as u8,
        selected: known.selected,
        name: Text::new(&known.source.path.display().to_string()),
        fs_uuids,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine without any disk of its own.
    fn bare() -> (tempfile::TempDir, SystemRoot) {
        let dir = tempfile::tempdir().unwrap();
        for (path, text) in [("proc/self/mountinfo", ""), ("proc/swaps", "Filename\n")] {
            let path = dir.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        std::fs::create_dir_all(dir.path().join("sys/block")).unwrap();
        let root = SystemRoot::at(dir.path());
        (dir, root)
    }

    #[test]
    fn a_missing_image_is_a_problem_and_the_others_are_found() {
        // Images are opened by their real path, so the root is the real one and every disk of it is excluded.
        let dir = tempfile::tempdir().unwrap();
        let (there, gone) = (dir.path().join("there.img"), dir.path().join("gone.img"));
        std::fs::write(&there, vec![1; 4096]).unwrap();
        let include = vec![gone.display().to_string(), there.display().to_string()];
        let found = find(&DisksConfig { include, exclude: vec!["*".into()] });
        // `*` excludes images as well.
        assert_eq!(found.unwrap().selected(), 0);
        let include = vec![gone.display().to_string(), there.display().to_string()];
        let exclude = [
            "sd*", "vd*", "nvme*", "xvd*", "loop*", "dm-*", "md*", "zram*", "ram*", "nbd*", "sr*", "hd*",
            "mmcblk*",
        ];
        let exclude = exclude.map(str::to_owned).to_vec();
        let found = find(&DisksConfig { include, exclude }).unwrap();
        let paths: Vec<&Path> = found.sources.values().map(|known| known.source.path.as_path()).collect();
        assert_eq!(paths, [there.as_path()]);
        assert_eq!(found.selected(), 1);
        let [problem] = found.problems.as_slice() else { panic!("{:?}", found.problems) };
        assert!(problem.contains("gone.img") && problem.contains("matches no disk"), "{problem}");
    }

    #[test]
    fn a_machine_without_disks_has_no_sources_and_no_problems() {
        let (_dir, root) = bare();
        let found = find_below(&root, &DisksConfig::default()).unwrap();
        assert!(found.sources.is_empty() && found.problems.is_empty());
    }

    #[test]
    fn identity_follows_the_disk_and_not_its_name() {
        let source = |path: &str, stable_id: Option<&str>, kind| Source {
            path: path.into(),
            name: String::new(),
            kind,
            bytes: 512,
            stable_id: stable_id.map(str::to_owned),
            fingerprint: None,
        };
        let blank = Fingerprint::default();
        let device = SourceKind::BlockDevice;
        let id = |path: &str, stable: Option<&str>, print: &Fingerprint| {
            identity(&source(path, stable, device), print)
        };
        assert_eq!(id("/dev/sda", Some("naa.1"), &blank), id("/dev/sdb", Some("naa.1"), &blank));
        assert_ne!(id("/dev/sda", Some("naa.1"), &blank), id("/dev/sda", Some("naa.2"), &blank));
        let gpt = Fingerprint { gpt_guid: [9; 16], ..Fingerprint::default() };
        assert_eq!(id("/dev/sda", None, &gpt), id("/dev/sdb", None, &gpt));
        assert_ne!(id("/dev/sda", None, &blank), id("/dev/sdb", None, &blank));
    }
}
