//! What the master target knows of machines and disks, one JSON file each, replaced durably.
//!
//! Layout below the state directory: `machines/<agent>.json`, `machines/<agent>.policy` and `machines/<agent>.failback`
//! (JSON too), `disks/<disk>/disk.json`, `disks/<disk>/doubt` (JSON, see [`Doubt`]), `disks/<disk>/state` (the
//! binary state file of `format::disk_state`). Invariants: a file that does not parse is named and left alone, the
//! others are loaded; nothing here is derived from the wire without bounds. Units: bytes. Used by `registry`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use reprotect_engine::format::disk_state::DiskState;
use reprotect_engine::format::message::{InventoryDisk, Policy};
use reprotect_engine::io::durable::{
    Access, create_dir_durable, read_bounded, remove_file_durable, replace_file,
};
use reprotect_engine::store::fingerprint::{Fingerprint, TAGS_MAX};
use reprotect_engine::store::target::TargetKind;
use reprotect_engine::units::{DiskId, PeerId, SECTOR_BYTES};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Largest file read.
const FILE_BYTES_MAX: u64 = 64 << 20;

/// A disk that an agent could protect.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceDisk {
    /// Stable identity on the agent, 32 hexadecimal digits.
    pub source: String,
    /// Path or name on the machine.
    pub name: String,
    /// Size in bytes.
    pub size_bytes: u64,
    /// Whether the agent offers it without being told.
    pub selected: bool,
    /// GPT disk GUID, or zeros.
    pub gpt_guid: String,
    /// MBR signature, or zero.
    pub mbr_signature: u32,
    /// Tags of its file systems.
    pub tags: Vec<String>,
}

impl SourceDisk {
    /// As it came in an inventory.
    #[must_use]
    pub fn from_inventory(disk: &InventoryDisk) -> Self {
        let tags = disk.fs_uuids.chunks_exact(16).take(usize::from(disk.fs_count)).map(hex).collect();
        Self {
            source: hex(&disk.source),
            name: disk.name.as_str().to_owned(),
            size_bytes: disk.size_sectors.saturating_mul(SECTOR_BYTES),
            selected: disk.selected,
            gpt_guid: hex(&disk.gpt_guid),
            mbr_signature: disk.mbr_signature,
            tags,
        }
    }

    /// For pairing with existing targets.
    #[must_use]
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint {
            gpt_guid: unhex(&self.gpt_guid).unwrap_or_default(),
            mbr_signature: self.mbr_signature,
            tags: self.tags.iter().filter_map(|tag| unhex(tag)).take(TAGS_MAX).collect(),
        }
    }
}

/// A machine whose agent has enrolled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Its agent.
    pub agent: String,
    /// What it calls itself.
    pub host_name: String,
    /// Its disks, from its last inventory.
    pub disks: Vec<SourceDisk>,
}

/// A machine's policy as it is kept.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct PolicyRecord {
    revision: u64,
    points_every_ms: u64,
    #[serde(default)]
    app_points_every_ms: u64,
}

/// How far the failback of a disk is; each step is recorded when it is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailbackStep {
    /// The point is chosen; no agent may open the disk any more.
    Decided,
    /// A higher generation is durable.
    Fenced,
    /// The target is the disk as it was at the point.
    Drained,
    /// The target was checked.
    Verified,
    /// The target is closed.
    Released,
}

/// The failback of a machine, as it is kept: one file, so that its disks are never in two minds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failback {
    /// The point as the operator asked for it; none for the newest.
    pub asked: Option<String>,
    /// Its name or identity.
    pub point: String,
    /// What it promises.
    pub class: String,
    /// Its time by the source's clock; zero where it is none of the marks.
    pub source_time_ms: u64,
    /// Whether the source was away, so that what it wrote after the point is lost.
    pub source_away: bool,
    /// Its disks are being taken again: it cannot be finished any more.
    #[serde(default)]
    pub undoing: bool,
    /// The operator knew that the point is damaged, or lacks changes.
    #[serde(default)]
    pub accept_damage: bool,
    /// By UUID.
    pub disks: BTreeMap<String, FailbackDisk>,
}

/// The failback of a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailbackDisk {
    /// The point on this disk, as EPOCH.NUMBER.
    pub at: String,
    /// How far it is.
    pub step: FailbackStep,
    /// The generation that fences what comes late.
    pub generation: u64,
    /// Bytes that were written to go back to the point; zero where it is the newest.
    pub written_bytes: u64,
    /// Bytes of the target that were read again.
    pub read_bytes: u64,
    /// Bytes of them that could be compared with what was written.
    pub compared_bytes: u64,
    /// What was not as it was written, as FIRST-LAST in bytes.
    pub different: Vec<String>,
    /// How the target's files looked when it was closed.
    pub stamp: String,
}

/// A protected disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProtectedDisk {
    /// The disk.
    pub disk: String,
    /// The agent that may write it.
    pub agent: String,
    /// The source disk on that agent.
    pub source: String,
    /// Its name there.
    pub source_name: String,
    /// The target's descriptor, file or device.
    pub path: PathBuf,
    /// createType of a VMDK, or `device`.
    pub kind: String,
    /// Size in bytes.
    pub size_bytes: u64,
    /// Whether the target was there before.
    pub existing: bool,
    /// Who the device is (see `device`); none for VMDKs and for devices that do not tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// The retention journal its writes go through, 32 hexadecimal digits; none where they go straight to the target.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub journal: Option<String>,
    /// The size it is to have; there only while it grows, or where that was interrupted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grows_to_bytes: Option<u64>,
}

/// A start found the redo log damaged at its end, and nobody knows whether something of this disk is gone with it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Doubt {
    /// What was found.
    pub reason: String,
    /// The newest entry that was there. One behind it ends the doubt: its agent has been asked by then.
    pub newest: u64,
}

/// The folder.
#[derive(Clone, Debug)]
pub struct Catalogue {
    root: PathBuf,
}

/// A disk as found in the folder: its record, and its state or why there is none.
pub type FoundDisk = (ProtectedDisk, anyhow::Result<DiskState>);

impl Catalogue {
    /// Opens the folder, making what is missing.
    ///
    /// # Errors
    /// When a directory cannot be made.
    pub fn open(state_dir: &Path) -> anyhow::Result<Self> {
        for name in ["machines", "disks"] {
            create_dir_durable(&state_dir.join(name))?;
        }
        Ok(Self { root: state_dir.to_owned() })
    }

    /// The state folder.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// All machines whose file is readable; the others are named in the log.
    ///
    /// # Errors
    /// When the folder cannot be listed.
    pub fn machines(&self) -> anyhow::Result<Vec<Machine>> {
        let mut machines = Vec::new();
        for path in entries(&self.root.join("machines"))? {
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            match read_json(&path) {
                Ok(machine) => machines.push(machine),
                Err(error) => {
                    tracing::error!("{error:#}; the machine is left out until the file is repaired")
                }
            }
        }
        Ok(machines)
    }

    /// Records a machine.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save_machine(&self, machine: &Machine) -> anyhow::Result<()> {
        let path = self.root.join("machines").join(format!("{}.json", machine.agent));
        Ok(replace_file(&path, &serde_json::to_vec_pretty(machine)?, Access::Private)?)
    }

    /// The policies of all machines that have one; files that are damaged are named in the log.
    ///
    /// # Errors
    /// When the folder cannot be listed.
    pub fn policies(&self) -> anyhow::Result<BTreeMap<PeerId, Policy>> {
        let mut policies = BTreeMap::new();
        for path in entries(&self.root.join("machines"))? {
            let agent = path.file_stem().and_then(|stem| peer(&stem.to_string_lossy()));
            let Some(agent) = agent.filter(|_| path.extension().is_some_and(|ext| ext == "policy")) else {
                continue;
            };
            match read_json::<PolicyRecord>(&path) {
                Ok(PolicyRecord { revision, points_every_ms, app_points_every_ms }) => {
                    let target = PeerId::NONE;
                    let policy = Policy { revision, points_every_ms, target, app_points_every_ms };
                    policies.insert(agent, policy);
                }
                Err(error) => tracing::error!(
                    "{error:#}; its agent keeps the policy it has until `policy` sets another one"
                ),
            }
        }
        Ok(policies)
    }

    /// Records a machine's policy.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save_policy(&self, agent: PeerId, policy: &Policy) -> anyhow::Result<()> {
        let path = self.root.join("machines").join(format!("{agent}.policy"));
        let Policy { revision, points_every_ms, app_points_every_ms, .. } = *policy;
        let record = PolicyRecord { revision, points_every_ms, app_points_every_ms };
        Ok(replace_file(&path, &serde_json::to_vec_pretty(&record)?, Access::Private)?)
    }

    /// The failbacks of all machines that have one; one that is damaged stops the start, because an agent might write
    /// to what a virtual machine runs from.
    ///
    /// # Errors
    /// When the folder cannot be listed, or a file is damaged.
    pub fn failbacks(&self) -> anyhow::Result<BTreeMap<PeerId, Failback>> {
        let mut failbacks = BTreeMap::new();
        for path in entries(&self.root.join("machines"))? {
            let agent = path.file_stem().and_then(|stem| peer(&stem.to_string_lossy()));
            if let Some(agent) = agent.filter(|_| path.extension().is_some_and(|ext| ext == "failback")) {
                let failback = read_json(&path).with_context(|| {
                    format!("{} says which disks are released; restore it, or remove it when no virtual machine runs from its targets", path.display())
                })?;
                failbacks.insert(agent, failback);
            }
        }
        Ok(failbacks)
    }

    /// Records the failback of a machine.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save_failback(&self, agent: PeerId, failback: &Failback) -> anyhow::Result<()> {
        let path = self.root.join("machines").join(format!("{agent}.failback"));
        Ok(replace_file(&path, &serde_json::to_vec_pretty(failback)?, Access::Private)?)
    }

    /// Forgets the failback of a machine.
    ///
    /// # Errors
    /// When the file cannot be removed.
    pub fn remove_failback(&self, agent: PeerId) -> anyhow::Result<()> {
        let path = self.root.join("machines").join(format!("{agent}.failback"));
        remove_file_durable(&path).context("remove it by hand")
    }

    /// All disks whose record is readable.
    ///
    /// # Errors
    /// When the folder cannot be listed.
    pub fn disks(&self) -> anyhow::Result<Vec<FoundDisk>> {
        let mut disks = Vec::new();
        for dir in entries(&self.root.join("disks"))? {
            if !dir.join("disk.json").exists() {
                continue; // half made or half removed when the daemon was killed: no disk
            }
            match read_json::<ProtectedDisk>(&dir.join("disk.json")) {
                Ok(record) => {
                    let state = read_state(&dir.join("state"));
                    disks.push((record, state));
                }
                Err(error) => tracing::error!("{error:#}; the disk is left out until the file is repaired"),
            }
        }
        Ok(disks)
    }

    /// Records a new disk: its state first, so that a record always has one.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn save_disk(&self, record: &ProtectedDisk, state: &DiskState) -> anyhow::Result<()> {
        let dir = self.root.join("disks").join(&record.disk);
        create_dir_durable(&dir)?;
        replace_file(&dir.join("state"), &state.to_bytes(), Access::Private)?;
        replace_file(&dir.join("disk.json"), &serde_json::to_vec_pretty(record)?, Access::Private)?;
        Ok(())
    }

    /// Records what has changed of a disk, apart from its state.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save_record(&self, record: &ProtectedDisk) -> anyhow::Result<()> {
        let path = self.root.join("disks").join(&record.disk).join("disk.json");
        Ok(replace_file(&path, &serde_json::to_vec_pretty(record)?, Access::Private)?)
    }

    /// Forgets a disk: its record first, so that what is left after a crash is no disk any more.
    ///
    /// # Errors
    /// When a file cannot be removed.
    pub fn remove_disk(&self, disk: DiskId) -> anyhow::Result<()> {
        let dir = self.root.join("disks").join(disk.to_string());
        remove_file_durable(&dir.join("disk.json")).context("remove it by hand")?;
        std::fs::remove_dir_all(&dir)
            .with_context(|| format!("cannot remove {}; remove it by hand", dir.display()))
    }

    /// What is doubtful of a disk.
    ///
    /// # Errors
    /// When the file is damaged or cannot be read.
    pub fn doubt(&self, disk: DiskId) -> anyhow::Result<Option<Doubt>> {
        let path = self.doubt_path(disk);
        if path.exists() { read_json(&path).map(Some) } else { Ok(None) }
    }

    /// Records what is doubtful of a disk.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save_doubt(&self, disk: DiskId, doubt: &Doubt) -> anyhow::Result<()> {
        Ok(replace_file(&self.doubt_path(disk), &serde_json::to_vec_pretty(doubt)?, Access::Private)?)
    }

    /// A disk is doubtful no more.
    ///
    /// # Errors
    /// When the file cannot be removed.
    pub fn remove_doubt(&self, disk: DiskId) -> anyhow::Result<()> {
        let path = self.doubt_path(disk);
        Ok(remove_file_durable(&path)?)
    }

    fn doubt_path(&self, disk: DiskId) -> PathBuf {
        self.root.join("disks").join(disk.to_string()).join("doubt")
    }

    /// A disk's state as it was last recorded here.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn disk_state(&self, disk: DiskId) -> anyhow::Result<DiskState> {
        read_state(&self.state_path(disk))
    }

    /// Where a disk's state is kept.
    #[must_use]
    pub fn state_path(&self, disk: DiskId) -> PathBuf {
        self.root.join("disks").join(disk.to_string()).join("state")
    }
}

/// The kind a record names.
#[must_use]
pub fn kind_from_text(text: &str) -> Option<TargetKind> {
    [
        TargetKind::MonolithicFlat,
        TargetKind::TwoGbMaxExtentFlat,
        TargetKind::Vmfs,
        TargetKind::MonolithicSparse,
        TargetKind::TwoGbMaxExtentSparse,
        TargetKind::Device,
    ]
    .into_iter()
    .find(|kind| kind.to_string() == text)
}

/// The agent of a text.
#[must_use]
pub fn peer(text: &str) -> Option<PeerId> {
    PeerId::parse(text).ok()
}

/// Hexadecimal digits.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Sixteen bytes of 32 hexadecimal digits.
#[must_use]
pub fn unhex(text: &str) -> Option<[u8; 16]> {
    (text.len() == 32).then(|| u128::from_str_radix(text, 16).ok().map(u128::to_be_bytes))?
}

fn entries(dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let list = std::fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))?;
    let mut paths = list.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<_>>>()?;
    paths.sort();
    Ok(paths)
}

fn read_json<T: DeserializeOwned>(path: &Path) -> anyhow::Result<T> {
    let bytes = read_bounded(path, FILE_BYTES_MAX)?;
    serde_json::from_slice(&bytes).with_context(|| format!("{} is damaged", path.display()))
}

fn read_state(path: &Path) -> anyhow::Result<DiskState> {
    let remedy = "`unprotect` the disk and `protect` it again with --original: existing data is compared";
    let bytes = read_bounded(path, FILE_BYTES_MAX).map_err(|error| anyhow!("{error}; {remedy}"))?;
    DiskState::decode(&bytes).map_err(|error| anyhow!("{} is damaged: {error}; {remedy}", path.display()))
}
