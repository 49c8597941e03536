//! The descriptor: the text that says what a VMDK is made of.
//!
//! Invariants: parsing is total and keeps every line as it stands; [`Descriptor::text`] of an unedited descriptor is
//! the text that was parsed; an edit changes the value of one known key in place and nothing else. Keys are matched
//! without regard to case. At most [`DESCRIPTOR_BYTES_MAX`] bytes. Units: 512 B sectors.
//! Called by `store::vmdk`.

use std::fmt::{self, Write as _};

use super::sparse::GRAIN_SECTORS_DEFAULT;
use crate::units::SECTOR_BYTES;

/// Largest descriptor read or written.
pub const DESCRIPTOR_BYTES_MAX: usize = 1 << 20;
/// `parentCID` of a disk that has no parent: everything else is a snapshot or a linked clone.
pub const CID_NONE: u32 = 0xffff_ffff;
/// Sectors of one extent of a split disk: 2047 MiB, as VMware writes them.
pub const SPLIT_EXTENT_SECTORS: u64 = 2047 * 2048;

/// How an extent may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// `RW`
    ReadWrite,
    /// `RDONLY`
    ReadOnly,
    /// `NOACCESS`
    None,
}

/// What an extent is stored as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExtentKind {
    /// Plain sectors in a file, from an offset.
    Flat,
    /// Plain sectors in a file of a VMFS or NFS datastore.
    Vmfs,
    /// Hosted sparse.
    Sparse,
    /// Reads as zeros, no file.
    Zero,
    /// ESXi redo log (COWD).
    VmfsSparse,
    /// Space-efficient ESXi snapshot.
    SeSparse,
    /// Raw device mapping, pass-through or not.
    RawDeviceMap,
    /// Anything else, as written.
    Other(String),
}

impl ExtentKind {
    fn parse(word: &str) -> Self {
        match word.to_ascii_uppercase().as_str() {
            "FLAT" => Self::Flat,
            "VMFS" => Self::Vmfs,
            "SPARSE" => Self::Sparse,
            "ZERO" => Self::Zero,
            "VMFSSPARSE" => Self::VmfsSparse,
            "SESPARSE" => Self::SeSparse,
            "VMFSRDM" | "VMFSRAW" => Self::RawDeviceMap,
            _ => Self::Other(word.to_owned()),
        }
    }
}

/// One extent line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extent {
    /// How it may be used.
    pub access: Access,
    /// Its size in sectors.
    pub sectors: u64,
    /// What it is stored as.
    pub kind: ExtentKind,
    /// The file as written; none for `ZERO`.
    pub file: Option<String>,
    /// Sector of the file at which the extent begins; `FLAT` only, zero elsewhere.
    pub offset: u64,
}

/// `createType`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CreateType {
    /// Descriptor and one flat file.
    MonolithicFlat,
    /// Descriptor and flat files of at most 2 GiB.
    TwoGbMaxExtentFlat,
    /// One sparse file with an embedded descriptor.
    MonolithicSparse,
    /// Descriptor and sparse files of at most 2 GiB.
    TwoGbMaxExtentSparse,
    /// Flat on a datastore.
    Vmfs,
    /// Compressed, append-only, for transport.
    StreamOptimized,
    /// ESXi snapshot, COWD.
    VmfsSparse,
    /// ESXi snapshot, SESparse.
    SeSparse,
    /// Raw device mappings, full or partial devices of a hosted product.
    RawDevice(String),
    /// Anything else, as written.
    Other(String),
}

impl CreateType {
    fn parse(word: &str) -> Self {
        match word.to_ascii_lowercase().as_str() {
            "monolithicflat" => Self::MonolithicFlat,
            "twogbmaxextentflat" => Self::TwoGbMaxExtentFlat,
            "monolithicsparse" => Self::MonolithicSparse,
            "twogbmaxextentsparse" => Self::TwoGbMaxExtentSparse,
            "vmfs" | "vmfspreallocated" | "vmfseagerzeroedthick" | "vmfsthin" => Self::Vmfs,
            "streamoptimized" => Self::StreamOptimized,
            "vmfssparse" => Self::VmfsSparse,
            "sesparse" => Self::SeSparse,
            "vmfsrawdevicemap"
            | "vmfsrdm"
            | "vmfspassthroughrawdevicemap"
            | "vmfsrdmp"
            | "vmfsraw"
            | "fulldevice"
            | "partitioneddevice" => Self::RawDevice(word.to_owned()),
            _ => Self::Other(word.to_owned()),
        }
    }
}

impl fmt::Display for CreateType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::MonolithicFlat => "monolithicFlat",
            Self::TwoGbMaxExtentFlat => "twoGbMaxExtentFlat",
            Self::MonolithicSparse => "monolithicSparse",
            Self::TwoGbMaxExtentSparse => "twoGbMaxExtentSparse",
            Self::Vmfs => "vmfs",
            Self::StreamOptimized => "streamOptimized",
            Self::VmfsSparse => "vmfsSparse",
            Self::SeSparse => "seSparse",
            Self::RawDevice(word) | Self::Other(word) => word,
        })
    }
}

/// The UUID a virtual machine sees of a disk (`ddb.uuid`), in VMware's notation of 16 spaced bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DiskUuid(pub [u8; 16]);

impl DiskUuid {
    /// Reads the notation `60 00 C2 9b …-…`, or any 32 hexadecimal digits with blanks and dashes between.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let mut digits = text.chars().filter(|c| !matches!(c, ' ' | '-'));
        let mut bytes = [0_u8; 16];
        for byte in &mut bytes {
            let (high, low) = (digits.next()?.to_digit(16)?, digits.next()?.to_digit(16)?);
            *byte = u8::try_from(high * 16 + low).ok()?;
        }
        digits.next().is_none().then_some(Self(bytes))
    }

    /// A disk UUID from 16 random bytes, with the prefix under which VMware numbers virtual disks.
    #[must_use]
    pub const fn from_random(mut bytes: [u8; 16]) -> Self {
        let [a, b, c, d, ..] = &mut bytes;
        (*a, *b, *c, *d) = (0x60, 0x00, 0xc2, 0x90 | (*d & 0x0f));
        Self(bytes)
    }
}

impl fmt::Display for DiskUuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, byte) in self.0.iter().enumerate() {
            let before = match at {
                0 => "",
                8 => "-",
                _ => " ",
            };
            write!(f, "{before}{byte:02x}")?;
        }
        Ok(())
    }
}

/// Why a descriptor cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DescriptorError {
    /// More than [`DESCRIPTOR_BYTES_MAX`].
    #[error(
        "descriptor has {got} bytes, more than {DESCRIPTOR_BYTES_MAX}: this is not a descriptor, or too many extents"
    )]
    TooLong {
        /// Bytes there are or would be.
        got: usize,
    },
    /// Not UTF-8.
    #[error("descriptor is not UTF-8 at byte {at}: save it as UTF-8, file names must be readable")]
    NotText {
        /// The first bad byte.
        at: usize,
    },
    /// A key that must be there is not.
    #[error("descriptor has no {key}")]
    Missing {
        /// The key.
        key: &'static str,
    },
    /// A value that cannot be understood.
    #[error("descriptor line {line}: {key} is {got:?}, expected {expected}")]
    Value {
        /// Line number from 1.
        line: usize,
        /// The key.
        key: &'static str,
        /// What stands there.
        got: String,
        /// What would do.
        expected: &'static str,
    },
    /// An extent line that cannot be understood.
    #[error("descriptor line {line}: extent {got:?}: {reason}")]
    Extent {
        /// Line number from 1.
        line: usize,
        /// The line.
        got: String,
        /// What is wrong.
        reason: &'static str,
    },
    /// The extents together are larger than any disk.
    #[error("extents have more than 2^53 sectors together")]
    Size,
    /// A value or file name that a descriptor cannot hold.
    #[error(
        "{what} {got:?} cannot stand in a descriptor: quotes, line ends and control characters are not allowed"
    )]
    Unwritable {
        /// What it is.
        what: &'static str,
        /// The text.
        got: String,
    },
}

/// A parsed descriptor that can be edited and written back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Lines without `\n`; a `\r` stays in its line.
    lines: Vec<String>,
    version: u32,
    cid: u32,
    parent_cid: u32,
    create_type: CreateType,
    extents: Vec<Extent>,
}

impl Descriptor {
    /// Parses a descriptor; bytes from the first NUL on are padding.
    ///
    /// # Errors
    /// When it is too long, not UTF-8, or lacks or garbles `CID`, `createType` or an extent line.
    pub fn parse(bytes: &[u8]) -> Result<Self, DescriptorError> {
        let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
        if text.len() > DESCRIPTOR_BYTES_MAX {
            return Err(DescriptorError::TooLong { got: text.len() });
        }
        let text = std::str::from_utf8(text)
            .map_err(|error| DescriptorError::NotText { at: error.valid_up_to() })?;
        let lines: Vec<String> = text.split('\n').map(str::to_owned).collect();
        let mut extents = Vec::new();
        let mut total = 0_u64;
        for (number, line) in (1..).zip(&lines) {
            if let Some(extent) = parse_extent(number, line)? {
                total = total
                    .checked_add(extent.sectors)
                    .filter(|n| *n <= 1 << 53)
                    .ok_or(DescriptorError::Size)?;
                extents.push(extent);
            }
        }
        let mut parsed = Self {
            lines,
            version: 1,
            cid: 0,
            parent_cid: CID_NONE,
            create_type: CreateType::Other(String::new()),
            extents,
        };
        parsed.version = parsed.number("version", 10)?.unwrap_or(1);
        parsed.cid = parsed.number("CID", 16)?.ok_or(DescriptorError::Missing { key: "CID" })?;
        parsed.parent_cid = parsed.number("parentCID", 16)?.unwrap_or(CID_NONE);
        let create_type = parsed.get("createType").map(CreateType::parse);
        parsed.create_type = create_type.ok_or(DescriptorError::Missing { key: "createType" })?;
        Ok(parsed)
    }

    fn number(&self, key: &'static str, radix: u32) -> Result<Option<u32>, DescriptorError> {
        let Some((line, value)) = self.find(key) else { return Ok(None) };
        u32::from_str_radix(value, radix).map(Some).map_err(|_| DescriptorError::Value {
            line: line + 1,
            key,
            got: value.to_owned(),
            expected: if radix == 16 { "a 32-bit hexadecimal number" } else { "a number" },
        })
    }

    /// The text, as it is to be written.
    #[must_use]
    pub fn text(&self) -> String {
        self.lines.join("\n")
    }

    /// `version`: 1, or 3 with change tracking.
    #[must_use]
    pub const fn version(&self) -> u32 {
        self.version
    }

    /// Content identity: changes whenever the disk was written.
    #[must_use]
    pub const fn cid(&self) -> u32 {
        self.cid
    }

    /// Content identity of the parent; [`CID_NONE`] without one.
    #[must_use]
    pub const fn parent_cid(&self) -> u32 {
        self.parent_cid
    }

    /// What kind of VMDK this is.
    #[must_use]
    pub const fn create_type(&self) -> &CreateType {
        &self.create_type
    }

    /// The extents in disk order.
    #[must_use]
    pub fn extents(&self) -> &[Extent] {
        &self.extents
    }

    /// Sectors of the disk.
    #[must_use]
    pub fn sectors(&self) -> u64 {
        self.extents.iter().map(|extent| extent.sectors).sum() // at most 2^53, checked while parsing
    }

    /// `ddb.uuid`, where there is a readable one.
    #[must_use]
    pub fn uuid(&self) -> Option<DiskUuid> {
        self.get("ddb.uuid").and_then(DiskUuid::parse)
    }

    /// The value of a key, without quotes; the first one where the key stands twice.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&str> {
        self.find(key).map(|(_, value)| value)
    }

    fn find(&self, key: &str) -> Option<(usize, &str)> {
        self.lines.iter().enumerate().find_map(|(at, line)| {
            let (name, value) = key_value(line)?;
            name.eq_ignore_ascii_case(key).then_some((at, value))
        })
    }

    /// Sets the content identity: eight digits for eight, so that nothing else moves.
    pub fn set_cid(&mut self, cid: u32) {
        self.cid = cid;
        self.replace("CID", &format!("{cid:08x}"));
    }

    /// Takes the change-track line out and the version back to 1, as a writer that does not keep the change-track
    /// file must; answers what the line named. With `keep_length` the line becomes blanks, so that an embedded
    /// descriptor can be rewritten sector by sector and is readable after any of them.
    pub fn drop_change_tracking(&mut self, keep_length: bool) -> Option<String> {
        let found = self.find("changeTrackPath").map(|(at, value)| (at, value.to_owned()));
        if let Some((at, _)) = found {
            if keep_length {
                if let Some(line) = self.lines.get_mut(at) {
                    *line = " ".repeat(line.len());
                }
            } else {
                self.lines.remove(at);
            }
        }
        if self.version == 3 {
            self.version = 1;
            self.replace("version", "1");
        }
        found.map(|(_, value)| value)
    }

    /// Puts other extents in the place of the lines that are there, and the cylinders that go with them.
    ///
    /// # Errors
    /// When an extent cannot be written in a line.
    pub fn set_extents(&mut self, extents: &[Extent]) -> Result<(), DescriptorError> {
        let lines = extents.iter().map(extent_line).collect::<Result<Vec<_>, _>>()?;
        let is_extent = |line: &String| matches!(parse_extent(0, line), Ok(Some(_)));
        let at = self.lines.iter().position(is_extent).unwrap_or(self.lines.len());
        self.lines.retain(|line| !is_extent(line));
        self.lines.splice(at..at, lines);
        self.extents = extents.to_vec();
        let geometry = |key| self.get(key).and_then(|value| value.parse::<u64>().ok());
        let (heads, track) = (geometry("ddb.geometry.heads"), geometry("ddb.geometry.sectors"));
        if let Some(of_cylinder) = heads.zip(track).and_then(|(heads, track)| heads.checked_mul(track))
            && of_cylinder > 0
        {
            let cylinders = (self.sectors() / of_cylinder).max(1);
            self.replace("ddb.geometry.cylinders", &cylinders.to_string());
        }
        Ok(())
    }

    /// Puts `value` where the value of `key` stands, keeping quotes and blanks; nothing when the key is absent.
    fn replace(&mut self, key: &str, value: &str) {
        let Some((at, old)) = self.find(key) else { return };
        let Some(line) = self.lines.get(at) else { return };
        // `old` is a part of `line` after its `=`; search from there, since the value may also occur in the key.
        let Some((head, tail)) = line.split_once('=') else { return };
        let edited = format!("{head}={}", tail.replacen(old, value, 1));
        if let Some(line) = self.lines.get_mut(at) {
            *line = edited;
        }
    }
}

/// `key = "value"` of a line that is neither comment nor extent; quotes and blanks off.
fn key_value(line: &str) -> Option<(&str, &str)> {
    let line = line.trim();
    if line.starts_with('#') {
        return None;
    }
    let (key, value) = line.split_once('=')?;
    let key = key.trim();
    // An extent's file name may contain '='; its first word is no key.
    if key.is_empty() || key.contains([' ', '\t', '"']) {
        return None;
    }
    let value = value.trim();
    Some((key, value.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')).unwrap_or(value)))
}

/// The extent of a line; `None` for lines that are something else.
fn parse_extent(line: usize, text: &str) -> Result<Option<Extent>, DescriptorError> {
    let error = |reason| DescriptorError::Extent { line, got: text.trim().to_owned(), reason };
    let (word, rest) = split_word(text);
    let access = match word.to_ascii_uppercase().as_str() {
        "RW" => Access::ReadWrite,
        "RDONLY" => Access::ReadOnly,
        "NOACCESS" => Access::None,
        _ => return Ok(None),
    };
    let (sectors, rest) = split_word(rest);
    let sectors: u64 = sectors.parse().map_err(|_| error("its size is not a number of sectors"))?;
    if sectors == 0 {
        return Err(error("it has no sectors"));
    }
    let (kind, rest) = split_word(rest);
    if kind.is_empty() {
        return Err(error("it has no type"));
    }
    let kind = ExtentKind::parse(kind);
    let rest = rest.trim();
    let (file, rest) = match rest.strip_prefix('"') {
        Some(quoted) => {
            let (name, rest) =
                quoted.split_once('"').ok_or_else(|| error("the quote of its file name is not closed"))?;
            (Some(name.to_owned()), rest)
        }
        None => (None, rest),
    };
    if file.as_deref().is_none_or(str::is_empty)
        && !matches!(kind, ExtentKind::Zero)
        && access != Access::None
    {
        return Err(error("it names no file"));
    }
    let (offset, _) = split_word(rest);
    let offset = match (&kind, offset) {
        (ExtentKind::Flat, "") => 0, // written so by some tools for the only extent of a file
        (ExtentKind::Flat, digits) => {
            digits.parse().map_err(|_| error("its offset is not a number of sectors"))?
        }
        _ => 0,
    };
    if sectors.checked_add(offset).is_none_or(|end| end > 1 << 53) {
        return Err(error("it ends beyond 2^53 sectors"));
    }
    Ok(Some(Extent { access, sectors, kind, file, offset }))
}

fn split_word(text: &str) -> (&str, &str) {
    let text = text.trim_start();
    text.split_once([' ', '\t', '\r']).unwrap_or((text, ""))
}

/// The controller the disk is meant for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AdapterType {
    /// LSI Logic, what the reference set-up asks for.
    #[default]
    LsiLogic,
    /// BusLogic.
    BusLogic,
    /// IDE.
    Ide,
}

impl AdapterType {
    const fn word(self) -> &'static str {
        match self {
            Self::LsiLogic => "lsilogic",
            Self::BusLogic => "buslogic",
            Self::Ide => "ide",
        }
    }

    /// Heads and sectors per track the controller's BIOS would report for a disk of so many sectors.
    const fn geometry(self, sectors: u64) -> (u64, u64) {
        const GIB_SECTORS: u64 = 1 << 21;
        match self {
            Self::Ide => (16, 63),
            Self::LsiLogic | Self::BusLogic if sectors >= GIB_SECTORS => (255, 63),
            Self::LsiLogic | Self::BusLogic => (64, 32),
        }
    }
}

/// What a new descriptor is made from.
#[derive(Clone, Debug)]
pub struct NewDescriptor<'a> {
    /// Kind; must be one that can be created: flat, split, sparse or `vmfs`.
    pub create_type: CreateType,
    /// The extents in disk order.
    pub extents: &'a [Extent],
    /// Content identity, random, neither 0 nor [`CID_NONE`].
    pub cid: u32,
    /// 16 random bytes that accompany the short identity.
    pub long_content_id: [u8; 16],
    /// The UUID the machine will see.
    pub uuid: DiskUuid,
    /// The controller.
    pub adapter: AdapterType,
    /// Virtual hardware version; 14 runs on ESXi 6.7 and later.
    pub hardware_version: u32,
}

impl NewDescriptor<'_> {
    /// Writes the descriptor and parses it back, so that what is created is what any reader sees.
    ///
    /// # Errors
    /// When a file name cannot be written, or the text would be too long (too many extents).
    pub fn build(&self) -> Result<Descriptor, DescriptorError> {
        let mut text = String::with_capacity(1024 + self.extents.len() * 64);
        // Writing to a String cannot fail; the result is dropped for that reason alone.
        let _ = write!(
            text,
            "# Disk DescriptorFile\nversion=1\nencoding=\"UTF-8\"\nCID={:08x}\nparentCID={CID_NONE:08x}\n\
             createType=\"{}\"\n\n# Extent description\n",
            self.cid, self.create_type
        );
        for extent in self.extents {
            let _ = writeln!(text, "{}", extent_line(extent)?);
        }
        let sectors: u64 = self.extents.iter().map(|extent| extent.sectors).fold(0, u64::saturating_add);
        let (heads, track) = self.adapter.geometry(sectors);
        let cylinders = (sectors / (heads * track)).max(1);
        let _ = write!(text, "\n# The Disk Data Base\n#DDB\n\n");
        let _ = writeln!(text, "ddb.adapterType = \"{}\"", self.adapter.word());
        let _ = writeln!(text, "ddb.geometry.cylinders = \"{cylinders}\"");
        let _ = writeln!(text, "ddb.geometry.heads = \"{heads}\"");
        let _ = writeln!(text, "ddb.geometry.sectors = \"{track}\"");
        let _ = writeln!(text, "ddb.longContentID = \"{}\"", self.long_content_text());
        let _ = writeln!(text, "ddb.uuid = \"{}\"", self.uuid);
        let _ = writeln!(text, "ddb.virtualHWVersion = \"{}\"", self.hardware_version);
        if matches!(self.create_type, CreateType::Vmfs) {
            let _ = writeln!(text, "ddb.thinProvisioned = \"1\"");
        }
        if text.len() > DESCRIPTOR_BYTES_MAX {
            return Err(DescriptorError::TooLong { got: text.len() });
        }
        Descriptor::parse(text.as_bytes())
    }

    /// The long identity ends in the short one.
    fn long_content_text(&self) -> String {
        let mut bytes = self.long_content_id;
        let [.., a, b, c, d] = &mut bytes;
        [*a, *b, *c, *d] = self.cid.to_be_bytes();
        bytes.iter().fold(String::new(), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        })
    }
}

fn extent_line(extent: &Extent) -> Result<String, DescriptorError> {
    let access = match extent.access {
        Access::ReadWrite => "RW",
        Access::ReadOnly => "RDONLY",
        Access::None => "NOACCESS",
    };
    let file = extent.file.as_deref().unwrap_or_default();
    if file.contains('"') || file.chars().any(char::is_control) {
        return Err(DescriptorError::Unwritable { what: "the extent file name", got: file.to_owned() });
    }
    Ok(match &extent.kind {
        ExtentKind::Flat => format!("{access} {} FLAT \"{file}\" {}", extent.sectors, extent.offset),
        ExtentKind::Vmfs => format!("{access} {} VMFS \"{file}\"", extent.sectors),
        ExtentKind::Sparse => format!("{access} {} SPARSE \"{file}\"", extent.sectors),
        ExtentKind::Zero => format!("{access} {} ZERO", extent.sectors),
        kind => {
            return Err(DescriptorError::Unwritable { what: "the extent type", got: format!("{kind:?}") });
        }
    })
}

/// Sizes of the extents of a new disk: one, or pieces of [`SPLIT_EXTENT_SECTORS`] for split kinds.
pub fn extent_sizes(split: bool, sectors: u64) -> impl Iterator<Item = u64> {
    let piece = if split { SPLIT_EXTENT_SECTORS } else { sectors.max(1) };
    (0..sectors.div_ceil(piece)).map(move |at| piece.min(sectors - at * piece))
}

const _: () = {
    // Split extents are whole grains, so that no grain spans two files.
    assert!(SPLIT_EXTENT_SECTORS.is_multiple_of(GRAIN_SECTORS_DEFAULT));
    assert!(SPLIT_EXTENT_SECTORS * SECTOR_BYTES < 1 << 31);
};

#[cfg(test)]
#[path = "descriptor_tests.rs"]
mod tests;
