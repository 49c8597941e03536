//! A disk's identity in the fixed form that travels in an inventory, and back.
//!
//! Invariants: equal contents have equal tags on both sides; a tag says nothing but equality. Used by the agent (from
//! its probe) and by the master target (to pair sources with existing targets).

use super::identity::{Content, ContentKind, DiskIdentity, Partition};
use crate::io::ByteRange;

/// File systems a fingerprint carries at most.
pub const TAGS_MAX: usize = 8;

/// Who a disk is, in bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fingerprint {
    /// GPT disk GUID, or zeros.
    pub gpt_guid: [u8; 16],
    /// MBR signature, or zero.
    pub mbr_signature: u32,
    /// One tag per recognised content, at most [`TAGS_MAX`].
    pub tags: Vec<[u8; 16]>,
}

impl Fingerprint {
    /// The fingerprint of a probed disk.
    #[must_use]
    pub fn of(identity: &DiskIdentity) -> Self {
        let gpt_guid = identity
            .gpt_disk_guid
            .as_deref()
            .and_then(|text| uuid::Uuid::parse_str(text).ok())
            .map_or([0; 16], |guid| *guid.as_bytes());
        let tags =
            identity.partitions.iter().filter_map(|partition| partition.content.as_ref()).take(TAGS_MAX);
        Self { gpt_guid, mbr_signature: identity.mbr_signature.unwrap_or(0), tags: tags.map(tag).collect() }
    }

    /// An identity that compares as the probed one did.
    #[must_use]
    pub fn identity(&self, size_bytes: u64) -> DiskIdentity {
        let whole = ByteRange { start: 0, end: size_bytes };
        let content = |tag: &[u8; 16]| Content {
            kind: ContentKind::Ext,
            uuid: uuid::Uuid::from_bytes(*tag).to_string(),
        };
        DiskIdentity {
            size_bytes,
            gpt_disk_guid: (self.gpt_guid != [0; 16])
                .then(|| uuid::Uuid::from_bytes(self.gpt_guid).to_string()),
            mbr_signature: (self.mbr_signature != 0).then_some(self.mbr_signature),
            partitions: self
                .tags
                .iter()
                .map(|tag| Partition { range: whole, content: Some(content(tag)) })
                .collect(),
        }
    }

    /// Whether nothing is known of the disk.
    #[must_use]
    pub fn is_blank(&self) -> bool {
        *self == Self::default()
    }
}

fn tag(content: &Content) -> [u8; 16] {
    let hash = blake3::hash(format!("{:?}:{}", content.kind, content.uuid).as_bytes());
    let mut tag = [0; 16];
    tag.copy_from_slice(&hash.as_bytes()[..16]);
    tag
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::identity::match_score;

    fn disk(guid: Option<&str>, uuids: &[&str]) -> DiskIdentity {
        DiskIdentity {
            size_bytes: 1 << 20,
            gpt_disk_guid: guid.map(str::to_owned),
            mbr_signature: None,
            partitions: uuids
                .iter()
                .map(|uuid| Partition {
                    range: ByteRange { start: 0, end: 1 },
                    content: Some(Content { kind: ContentKind::Xfs, uuid: (*uuid).to_owned() }),
                })
                .collect(),
        }
    }

    #[test]
    fn disks_match_by_fingerprint_as_they_match_by_identity() {
        let guid = "0F1E2D3C-4B5A-6978-8796-A5B4C3D2E1F0";
        let (a, b) = (disk(Some(guid), &["u1", "u2"]), disk(Some(&guid.to_lowercase()), &["u2"]));
        let other = disk(Some("11111111-4B5A-6978-8796-A5B4C3D2E1F0"), &["u2"]);
        let travel = |identity: &DiskIdentity| Fingerprint::of(identity).identity(identity.size_bytes);
        assert_eq!(match_score(&travel(&a), &travel(&b)), 110);
        assert_eq!(match_score(&travel(&a), &travel(&other)), 0);
        assert!(Fingerprint::of(&disk(None, &[])).is_blank());
    }
}
