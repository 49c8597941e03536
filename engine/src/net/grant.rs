//! A grant: what one agent may do with one disk, signed by the master target.
//!
//! Invariants: the signature covers every byte of the body, so a relay can forward a grant and not mint one; a grant is
//! good for exactly one agent, one target, one generation and until its expiry; reserved bytes are zero; there is one
//! encoding per grant. Units: sectors; nanoseconds since 1970.
//! Called by the master target (signs, and checks at every OPEN_DISK), relays and agents (check).

use rustls_pki_types::CertificateDer;
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::error::{Answer, Severity};
use crate::net::identity::{Identity, IdentityError, PeerIdentity, Purpose};
use crate::net::trust::Trust;
use crate::units::{DiskId, Generation, PeerId, SectorCount, Timestamp};

/// First bytes of a grant.
pub const GRANT_MAGIC: [u8; 4] = *b"RPGR";
/// Version of the layout.
pub const GRANT_VERSION: u32 = 1;
/// Longest signature (ECDSA P-256, ASN.1).
pub const SIGNATURE_BYTES_MAX: usize = 72;
/// Longest encoded grant.
pub const GRANT_BYTES_MAX: usize = size_of::<GrantBody>() + SIGNATURE_BYTES_MAX;

/// What a grant allows; a set of bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operations(u32);

impl Operations {
    /// Send the delta stream.
    pub const DELTA: Self = Self(1);
    /// Send initial sync and resync.
    pub const BULK: Self = Self(2);
    /// Ask for hashes of what the target holds.
    pub const COMPARE: Self = Self(4);
    /// Place marks.
    pub const MARK: Self = Self(8);
    /// Everything replication needs.
    pub const REPLICATE: Self = Self(15);

    /// The bits.
    #[must_use]
    pub const fn bits(self) -> u32 {
        self.0
    }

    /// The set of `bits`; `None` when there is none or an unknown one.
    #[must_use]
    pub const fn from_bits(bits: u32) -> Option<Self> {
        if bits != 0 && bits & !Self::REPLICATE.0 == 0 { Some(Self(bits)) } else { None }
    }

    /// Both sets together.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether all of `other` is allowed.
    #[must_use]
    pub const fn allow(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// What is granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// The disk.
    pub disk: DiskId,
    /// Its size: every address is checked against it.
    pub size: SectorCount,
    /// The fencing token of this opening.
    pub generation: Generation,
    /// Who may write.
    pub agent: PeerId,
    /// Who grants.
    pub target: PeerId,
    /// What is allowed.
    pub operations: Operations,
    /// Until when.
    pub expires: Timestamp,
}

/// The signed bytes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct GrantBody {
    /// [`GRANT_MAGIC`].
    magic: [u8; 4],
    /// [`GRANT_VERSION`].
    version: U32,
    disk: [u8; 16],
    agent: [u8; 16],
    target: [u8; 16],
    size_sectors: U64,
    generation: U64,
    expires: U64,
    operations: U32,
    /// Zero.
    reserved: [u8; 12],
}

const _: () = assert!(size_of::<GrantBody>() == 96);

/// Why a grant is not accepted.
#[derive(Debug, thiserror::Error)]
pub enum GrantError {
    /// Not a grant.
    #[error("malformed grant: {0}")]
    Malformed(&'static str),
    /// A version we do not know.
    #[error("grant of version {got}, we know {GRANT_VERSION}; upgrade the older side")]
    Version {
        /// What came.
        got: u32,
    },
    /// The signer is not believed or the signature does not fit.
    #[error("the grant is not signed by its master target: {0}")]
    Signer(#[from] IdentityError),
    /// Shown by another agent than it was given to.
    #[error("the grant for {disk} belongs to agent {expected} and was shown by {got}")]
    OtherAgent {
        /// The disk.
        disk: DiskId,
        /// Whose it is.
        expected: PeerId,
        /// Who showed it.
        got: PeerId,
    },
    /// Issued by another target than the one that checks.
    #[error("the grant was issued by target {got}, not by {expected}")]
    OtherTarget {
        /// Who checks.
        expected: PeerId,
        /// Who signed.
        got: PeerId,
    },
    /// For another disk.
    #[error("the grant is for disk {got}, not for {expected}")]
    OtherDisk {
        /// Which disk is to be opened.
        expected: DiskId,
        /// Which disk it is for.
        got: DiskId,
    },
    /// Replayed: the disk was opened again since.
    #[error("the grant for {disk} has generation {got}, the disk is at {current}; open the disk again")]
    Generation {
        /// The disk.
        disk: DiskId,
        /// Of the grant.
        got: Generation,
        /// Of the disk.
        current: Generation,
    },
    /// Too late.
    #[error("the grant for {disk} has expired; open the disk again")]
    Expired {
        /// The disk.
        disk: DiskId,
    },
    /// Something it does not allow.
    #[error("the grant for {disk} does not allow this operation")]
    Operation {
        /// The disk.
        disk: DiskId,
    },
}

impl Answer for GrantError {
    fn severity(&self) -> Severity {
        match self {
            Self::Generation { .. } | Self::Expired { .. } => Severity::Retry,
            _ => Severity::Stop,
        }
    }
}

impl Grant {
    fn body(&self) -> GrantBody {
        GrantBody {
            magic: GRANT_MAGIC,
            version: U32::new(GRANT_VERSION),
            disk: self.disk.0,
            agent: self.agent.0,
            target: self.target.0,
            size_sectors: U64::new(self.size.0),
            generation: U64::new(self.generation.0),
            expires: U64::new(self.expires.0),
            operations: U32::new(self.operations.bits()),
            reserved: [0; 12],
        }
    }

    fn from_body(body: &GrantBody) -> Result<Self, GrantError> {
        if body.magic != GRANT_MAGIC {
            return Err(GrantError::Malformed("it does not begin as one"));
        }
        if body.version.get() != GRANT_VERSION {
            return Err(GrantError::Version { got: body.version.get() });
        }
        if body.reserved != [0; 12] {
            return Err(GrantError::Malformed("reserved bytes are not zero"));
        }
        let operations = Operations::from_bits(body.operations.get())
            .ok_or(GrantError::Malformed("no or unknown operations"))?;
        Ok(Self {
            disk: DiskId(body.disk),
            size: SectorCount(body.size_sectors.get()),
            generation: Generation(body.generation.get()),
            agent: PeerId(body.agent),
            target: PeerId(body.target),
            operations,
            expires: Timestamp(body.expires.get()),
        })
    }
}

/// Signs grants with the master target's identity.
#[derive(Clone, Copy, Debug)]
pub struct GrantSigner<'a> {
    identity: &'a Identity,
}

impl<'a> GrantSigner<'a> {
    /// A signer; `identity` must be the grants' target.
    #[must_use]
    pub fn new(identity: &'a Identity) -> Self {
        Self { identity }
    }

    /// Body and signature, at most [`GRANT_BYTES_MAX`] bytes.
    ///
    /// # Errors
    /// When the grant names another target, or the key cannot sign.
    pub fn sign(&self, grant: &Grant) -> Result<Vec<u8>, GrantError> {
        let own = self.identity.own().peer;
        if grant.target != own {
            return Err(GrantError::OtherTarget { expected: own, got: grant.target });
        }
        let body = grant.body();
        let signature = self.identity.sign(Purpose::Grant, body.as_bytes())?;
        Ok([body.as_bytes(), &signature].concat())
    }
}

/// What a grant is held against.
#[derive(Clone, Copy, Debug)]
pub struct GrantUse {
    /// The agent that shows it, as verified in its handshake or session proof.
    pub agent: PeerId,
    /// The disk to be opened.
    pub disk: DiskId,
    /// The disk's present generation; a grant must carry exactly this one.
    pub generation: Generation,
    /// What is about to be done.
    pub operations: Operations,
    /// Now.
    pub now: Timestamp,
}

/// Checks grants of one master target.
#[derive(Debug)]
pub struct GrantVerifier {
    target: PeerIdentity,
    certificate: CertificateDer<'static>,
}

impl GrantVerifier {
    /// A verifier for grants signed by the holder of `chain`, which must be a believed master target by `rule`.
    ///
    /// # Errors
    /// When the chain is refused.
    pub fn new(
        trust: &Trust,
        chain: &[CertificateDer<'_>],
        rule: &crate::net::trust::PeerRule,
        now: Timestamp,
    ) -> Result<Self, GrantError> {
        let (leaf, rest) =
            chain.split_first().ok_or(IdentityError::Malformed { reason: "the chain is empty" })?;
        let target = trust.verify_chain(leaf, rest, crate::net::trust::Usage::Server, rule, now)?;
        if target.role != crate::net::identity::Role::MasterTarget {
            return Err(IdentityError::RoleRefused { peer: target.peer, got: target.role }.into());
        }
        Ok(Self { target, certificate: leaf.clone().into_owned() })
    }

    /// Reads a grant whose signature fits; says nothing about agent, disk, generation or time.
    ///
    /// # Errors
    /// When it is malformed or not signed by our target.
    pub fn open(&self, bytes: &[u8]) -> Result<Grant, GrantError> {
        if bytes.len() > GRANT_BYTES_MAX {
            return Err(GrantError::Malformed("it is too long"));
        }
        let (body, signature) =
            GrantBody::ref_from_prefix(bytes).map_err(|_| GrantError::Malformed("it is too short"))?;
        let signer = self.target.peer;
        webpki::EndEntityCert::try_from(&self.certificate)
            .and_then(|certificate| {
                let message = Purpose::Grant.bound(body.as_bytes());
                certificate.verify_signature(webpki::ring::ECDSA_P256_SHA256, &message, signature)
            })
            .map_err(|_| IdentityError::Signature(signer))?;
        let grant = Grant::from_body(body)?;
        if grant.target != signer {
            return Err(GrantError::OtherTarget { expected: signer, got: grant.target });
        }
        Ok(grant)
    }

    /// Reads a grant and holds it against its use.
    ///
    /// # Errors
    /// The first reason why it does not allow the use.
    pub fn verify(&self, bytes: &[u8], usage: &GrantUse) -> Result<Grant, GrantError> {
        let grant = self.open(bytes)?;
        let disk = grant.disk;
        if grant.agent != usage.agent {
            return Err(GrantError::OtherAgent { disk, expected: grant.agent, got: usage.agent });
        }
        if disk != usage.disk {
            return Err(GrantError::OtherDisk { expected: usage.disk, got: disk });
        }
        if grant.generation != usage.generation {
            return Err(GrantError::Generation { disk, got: grant.generation, current: usage.generation });
        }
        if grant.expires <= usage.now {
            return Err(GrantError::Expired { disk });
        }
        if !grant.operations.allow(usage.operations) {
            return Err(GrantError::Operation { disk });
        }
        Ok(grant)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::net::ca::Ca;
    use crate::net::identity::Role;
    use crate::net::revocations::Revocations;
    use crate::net::trust::PeerRule;
    use crate::net::wall_clock;

    struct Site {
        _dir: tempfile::TempDir,
        ca: Ca,
        target: Identity,
        trust: Trust,
    }

    fn site() -> Site {
        let dir = tempfile::tempdir().unwrap();
        let ca = Ca::open_or_create(dir.path(), "berlin", wall_clock()).unwrap();
        let target = ca.issue_identity(Role::MasterTarget, PeerId([1; 16]), wall_clock()).unwrap();
        let trust = Trust::new(&[ca.certificate().clone()], Arc::new(Revocations::in_memory())).unwrap();
        Site { _dir: dir, ca, target, trust }
    }

    fn verifier(site: &Site, identity: &Identity) -> Result<GrantVerifier, GrantError> {
        let rule = PeerRule::of_site("berlin", Role::ALL);
        GrantVerifier::new(&site.trust, identity.chain(), &rule, wall_clock())
    }

    fn grant() -> Grant {
        Grant {
            disk: DiskId([5; 16]),
            size: SectorCount(2048),
            generation: Generation(7),
            agent: PeerId([2; 16]),
            target: PeerId([1; 16]),
            operations: Operations::DELTA.and(Operations::MARK),
            expires: Timestamp(1_000),
        }
    }

    fn usage() -> GrantUse {
        GrantUse {
            agent: PeerId([2; 16]),
            disk: DiskId([5; 16]),
            generation: Generation(7),
            operations: Operations::DELTA,
            now: Timestamp(999),
        }
    }

    #[test]
    fn a_grant_is_good_for_its_agent_disk_generation_time_and_operations_only() {
        let site = site();
        let verifier = verifier(&site, &site.target).unwrap();
        let bytes = GrantSigner::new(&site.target).sign(&grant()).unwrap();
        assert!(bytes.len() <= GRANT_BYTES_MAX);
        assert_eq!(verifier.verify(&bytes, &usage()).unwrap(), grant());

        let refused = |usage: GrantUse| verifier.verify(&bytes, &usage).unwrap_err();
        let stolen = refused(GrantUse { agent: PeerId([3; 16]), ..usage() });
        assert!(matches!(stolen, GrantError::OtherAgent { .. }));
        let other = refused(GrantUse { disk: DiskId([6; 16]), ..usage() });
        assert!(matches!(other, GrantError::OtherDisk { .. }));
        for generation in [6, 8] {
            let replayed = refused(GrantUse { generation: Generation(generation), ..usage() });
            assert!(matches!(replayed, GrantError::Generation { .. }));
        }
        let late = refused(GrantUse { now: Timestamp(1_000), ..usage() });
        assert!(matches!(late, GrantError::Expired { .. }));
        let more = refused(GrantUse { operations: Operations::REPLICATE, ..usage() });
        assert!(matches!(more, GrantError::Operation { .. }));
    }

    #[test]
    fn every_changed_or_missing_byte_breaks_a_grant() {
        let site = site();
        let verifier = verifier(&site, &site.target).unwrap();
        let bytes = GrantSigner::new(&site.target).sign(&grant()).unwrap();
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            assert!(verifier.open(&changed).is_err(), "byte {at}");
            assert!(verifier.open(&bytes[..at]).is_err(), "cut at {at}");
        }
        assert!(verifier.open(&[bytes.as_slice(), &[0]].concat()).is_err());
        assert!(matches!(verifier.open(&[0; 4096]), Err(GrantError::Malformed(_))));
    }

    #[test]
    fn only_a_master_target_can_mint_and_only_for_itself() {
        let site = site();
        let relay = site.ca.issue_identity(Role::ProcessServer, PeerId([1; 16]), wall_clock()).unwrap();
        assert!(verifier(&site, &relay).is_err());
        let minted = GrantSigner::new(&relay).sign(&grant()).unwrap();
        let verifier = verifier(&site, &site.target).unwrap();
        assert!(matches!(verifier.open(&minted), Err(GrantError::Signer(IdentityError::Signature(_)))));
        let foreign = Grant { target: PeerId([9; 16]), ..grant() };
        assert!(matches!(GrantSigner::new(&site.target).sign(&foreign), Err(GrantError::OtherTarget { .. })));
    }

    #[test]
    fn signed_bodies_with_reserved_bytes_or_unknown_bits_are_still_refused() {
        let site = site();
        let verifier = verifier(&site, &site.target).unwrap();
        let sign = |body: GrantBody| {
            let signature = site.target.sign(Purpose::Grant, body.as_bytes()).unwrap();
            verifier.open(&[body.as_bytes(), &signature].concat())
        };
        let body = grant().body();
        assert!(sign(body).is_ok());
        assert!(sign(GrantBody { reserved: [1; 12], ..body }).is_err());
        assert!(sign(GrantBody { operations: U32::new(16), ..body }).is_err());
        assert!(sign(GrantBody { operations: U32::new(0), ..body }).is_err());
        assert!(matches!(
            sign(GrantBody { version: U32::new(2), ..body }),
            Err(GrantError::Version { got: 2 })
        ));
    }
}
