//! Which disks this machine has, who they are, and how the target knows them again.
//!
//! Invariants: a source's identity comes from the disk itself (WWID or serial, else its partition table, else its
//! path for an image), so that it survives a reboot that renames devices; two sources never share an identity.
//! Called by `daemon` at start and on SIGHUP. Units: bytes and sectors.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Context;
use reprotect_engine::format::message::{InventoryDisk, SourceId};
use reprotect_engine::format::wire::Text;
use reprotect_engine::io;
use reprotect_engine::store::fingerprint::Fingerprint;
use reprotect_engine::store::identity::DiskIdentity;
use reprotect_engine::units::SECTOR_BYTES;

use crate::config::DisksConfig;
use crate::disks::{SystemRoot, enumerate, select};
use crate::disks::{Source, SourceKind};

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

/// Finds the machine's sources. Blocks.
///
/// # Errors
/// When the disks cannot be listed or a configured one cannot be protected.
pub fn find(config: &DisksConfig) -> anyhow::Result<Sources> {
    let root = SystemRoot::default();
    let disks = enumerate(&root)?;
    let chosen = select(&root, &disks, &config.include, &config.exclude)?;
    let mut sources = Sources::new();
    for source in &chosen {
        let fingerprint = probe(&source.path)
            .with_context(|| format!("{} is selected and cannot be read; run the agent as root", source.path.display()))?;
        add(&mut sources, source.clone(), fingerprint, true)?;
    }
    for disk in disks.iter().filter(|disk| disk.is_worth_showing() && disk.verdict.class.may_be_included()) {
        if chosen.iter().any(|source| source.path == disk.path) {
            continue;
        }
        if let Ok(source) = Source::disk(disk) {
            add(&mut sources, source, Fingerprint::default(), false)?;
        }
    }
    Ok(sources)
}

fn add(sources: &mut Sources, source: Source, fingerprint: Fingerprint, selected: bool) -> anyhow::Result<()> {
    let id = identity(&source, &fingerprint);
    if let Some(other) = sources.get(&id) {
        anyhow::bail!(
            "{} and {} report the same identity; exclude one of them in [disks]",
            other.source.path.display(),
            source.path.display()
        );
    }
    sources.insert(id, KnownSource { source, id, fingerprint, selected });
    Ok(())
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

fn probe(path: &Path) -> anyhow::Result<Fingerprint> {
    let mut file = io::open(path, &io::OpenOptions::reading())?;
    Ok(Fingerprint::of(&DiskIdentity::probe(&mut file)?))
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
