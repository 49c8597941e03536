//! Writing a stream-optimised VMDK: compressed grains one behind the other, tables and directory at the end.
//!
//! | in the file, each at a sector | what |
//! |---|---|
//! | header, descriptor | the directory's place is given as "in the footer" |
//! | grain marker and deflated grain, many | ascending; grains of zeros are left out |
//! | table marker and table | behind the grains it names; a table without grains is left out |
//! | directory marker and directory, footer marker and footer, end marker | where a reader begins |
//!
//! Invariants: strictly sequential, so that any [`Write`] will do, a pipe too; memory is one table, the directory and
//! two grains; a file whose end is missing has no footer and is refused by every reader. Units: sectors, bytes.
//! Called by `store::export`.

use std::io::{self, Write};

use flate2::Compression;
use flate2::write::ZlibEncoder;

use crate::checksum::is_zero;
use crate::format::vmdk::descriptor::{
    Access, AdapterType, CreateType, Descriptor, DiskUuid, Extent, ExtentKind, NewDescriptor,
};
use crate::format::vmdk::sparse::{
    Directory, FILE_SECTORS_MAX, FLAG_COMPRESSED, FLAG_MARKERS, FLAG_NEWLINES, GRAIN_SECTORS_DEFAULT,
    SparseHeader, TABLE_ENTRIES, TABLE_SECTORS,
};
use crate::units::{SECTOR_BYTES, SectorRange};

/// Bytes of a grain.
pub const GRAIN_BYTES: u64 = GRAIN_SECTORS_DEFAULT * SECTOR_BYTES;
/// Sectors kept for the descriptor.
const DESCRIPTOR_SECTORS: u64 = 20;
/// Bytes of a grain marker before its data.
const GRAIN_MARKER_BYTES: usize = 12;

const MARKER_END: u32 = 0;
const MARKER_TABLE: u32 = 1;
const MARKER_DIRECTORY: u32 = 2;
const MARKER_FOOTER: u32 = 3;

/// What a new stream says of itself.
#[derive(Clone, Debug)]
pub struct StreamSpec {
    /// The file's name in its descriptor.
    pub name: String,
    /// Sectors of the disk.
    pub sectors: u64,
    /// The UUID the machine will see.
    pub uuid: DiskUuid,
    /// The controller.
    pub adapter: AdapterType,
    /// Content identity, random, neither 0 nor all ones.
    pub cid: u32,
    /// 16 random bytes.
    pub long_content_id: [u8; 16],
}

/// Writes a stream-optimised VMDK. Call order: [`Self::begin`], [`Self::grain`] ascending, [`Self::finish`].
#[derive(Debug)]
pub struct StreamWriter<W> {
    out: W,
    header: SparseHeader,
    /// Sectors written.
    at: u64,
    /// Grain number that comes next at the earliest.
    next: u64,
    /// Entries of the table that is being filled.
    table: Vec<u32>,
    directory: Vec<u32>,
}

impl<W: Write> StreamWriter<W> {
    /// Writes header and descriptor.
    ///
    /// # Errors
    /// When the descriptor cannot be made of the spec, or `out` fails.
    pub fn begin(mut out: W, spec: &StreamSpec) -> io::Result<Self> {
        let descriptor = describe(spec)?;
        let header = SparseHeader {
            version: 3,
            flags: FLAG_NEWLINES | FLAG_COMPRESSED | FLAG_MARKERS,
            capacity: spec.sectors,
            grain_sectors: GRAIN_SECTORS_DEFAULT,
            descriptor: Some(SectorRange::new(1, 1 + DESCRIPTOR_SECTORS)),
            redundant_directory: None,
            directory: Directory::InFooter,
            overhead: GRAIN_SECTORS_DEFAULT,
            unclean: false,
            compression: 1,
        };
        let mut bytes = header.encode().to_vec();
        bytes.extend_from_slice(descriptor.text().as_bytes());
        if bytes.len() as u64 > (1 + DESCRIPTOR_SECTORS) * SECTOR_BYTES {
            return Err(io::Error::other("its descriptor is longer than 10 KiB: use a shorter name"));
        }
        bytes.resize(GRAIN_BYTES as usize, 0);
        out.write_all(&bytes)?;
        let (table, directory) = (vec![0; TABLE_ENTRIES as usize], Vec::new());
        Ok(Self { out, at: GRAIN_SECTORS_DEFAULT, header, next: 0, table, directory })
    }

    /// Writes a grain; one of zeros is left out. The last one of the disk may be shorter than [`GRAIN_BYTES`].
    ///
    /// # Errors
    /// When `out` fails, or the file would pass the 2 TiB that its entries can address.
    ///
    /// # Panics
    /// When grains do not ascend, or the number is beyond the disk.
    pub fn grain(&mut self, number: u64, data: &[u8]) -> io::Result<()> {
        assert!(number >= self.next && number < self.header.grain_count(), "grains ascend, on the disk");
        if is_zero(data) {
            return Ok(());
        }
        while self.directory.len() as u64 != number / TABLE_ENTRIES {
            self.finish_table()?;
        }
        let mut bytes = (number * GRAIN_SECTORS_DEFAULT).to_le_bytes().to_vec();
        bytes.extend_from_slice(&[0; 4]);
        let mut encoder = ZlibEncoder::new(bytes, Compression::fast());
        encoder.write_all(data)?;
        // A reader takes as many bytes as a grain has, also of the one that reaches beyond the disk.
        encoder.write_all(&vec![0; (GRAIN_BYTES as usize).saturating_sub(data.len())])?;
        let mut bytes = encoder.finish()?;
        let size = (bytes.len() - GRAIN_MARKER_BYTES) as u32;
        if let Some(place) = bytes.get_mut(8..GRAIN_MARKER_BYTES) {
            place.copy_from_slice(&size.to_le_bytes());
        }
        let place = self.place()?;
        if let Some(entry) = self.table.get_mut((number % TABLE_ENTRIES) as usize) {
            *entry = place;
        }
        self.next = number + 1;
        self.put(bytes)
    }

    /// Writes what stands at the end, and answers `out`, not flushed.
    ///
    /// # Errors
    /// As for [`Self::grain`].
    pub fn finish(mut self) -> io::Result<W> {
        while (self.directory.len() as u64) < self.header.table_count() {
            self.finish_table()?;
        }
        let bytes: Vec<u8> = self.directory.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        self.marker(self.header.directory_sectors(), MARKER_DIRECTORY)?;
        let place = self.place()?;
        self.put(bytes)?;
        self.marker(1, MARKER_FOOTER)?;
        let footer = SparseHeader { directory: Directory::At(place.into()), ..self.header.clone() };
        self.put(footer.encode().to_vec())?;
        self.marker(0, MARKER_END)?;
        Ok(self.out)
    }

    /// Bytes written so far.
    #[must_use]
    pub const fn written_bytes(&self) -> u64 {
        self.at * SECTOR_BYTES
    }

    fn finish_table(&mut self) -> io::Result<()> {
        let mut place = 0;
        if self.table.iter().any(|entry| *entry != 0) {
            let bytes: Vec<u8> = self.table.iter().flat_map(|entry| entry.to_le_bytes()).collect();
            self.table.fill(0);
            self.marker(TABLE_SECTORS, MARKER_TABLE)?;
            place = self.place()?;
            self.put(bytes)?;
        }
        self.directory.push(place);
        Ok(())
    }

    /// A marker that is followed by `sectors` of metadata.
    fn marker(&mut self, sectors: u64, kind: u32) -> io::Result<()> {
        let mut bytes = sectors.to_le_bytes().to_vec();
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&kind.to_le_bytes());
        self.put(bytes)
    }

    /// Where the next thing stands, as an entry says it.
    fn place(&self) -> io::Result<u32> {
        let beyond = |_| {
            let limit = (FILE_SECTORS_MAX * SECTOR_BYTES) >> 40;
            io::Error::other(format!("a stream-optimised file ends at {limit} TiB: export as flat"))
        };
        u32::try_from(self.at).map_err(beyond)
    }

    fn put(&mut self, mut bytes: Vec<u8>) -> io::Result<()> {
        bytes.resize(bytes.len().next_multiple_of(SECTOR_BYTES as usize), 0);
        self.out.write_all(&bytes)?;
        self.at += bytes.len() as u64 / SECTOR_BYTES;
        Ok(())
    }
}

fn describe(spec: &StreamSpec) -> io::Result<Descriptor> {
    let extent = Extent {
        access: Access::ReadWrite,
        sectors: spec.sectors,
        kind: ExtentKind::Sparse,
        file: Some(spec.name.clone()),
        offset: 0,
    };
    let new = NewDescriptor {
        create_type: CreateType::StreamOptimized,
        extents: &[extent],
        cid: spec.cid,
        long_content_id: spec.long_content_id,
        uuid: spec.uuid,
        adapter: spec.adapter,
        hardware_version: 14,
    };
    new.build().map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(sectors: u64) -> StreamSpec {
        StreamSpec {
            name: "disk.vmdk".to_owned(),
            sectors,
            uuid: DiskUuid([3; 16]),
            adapter: AdapterType::default(),
            cid: 7,
            long_content_id: [1; 16],
        }
    }

    /// Takes a stream apart from its end, as a reader does: the sectors of its tables that name grains.
    fn tables(bytes: &[u8]) -> Vec<Option<Vec<u32>>> {
        let sector = |at: u64| &bytes[(at * SECTOR_BYTES) as usize..];
        let words = |bytes: &[u8], count: u64| -> Vec<u32> {
            let words = bytes.chunks_exact(4).take(count as usize);
            words.map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect()
        };
        let footer = SparseHeader::decode(&bytes[bytes.len() - 1024..]).unwrap();
        let Directory::At(at) = footer.directory else { panic!("the footer names no directory") };
        words(sector(at), footer.table_count())
            .into_iter()
            .map(|table| (table > 0).then(|| words(sector(table.into()), TABLE_ENTRIES)))
            .collect()
    }

    #[test]
    fn grains_of_zeros_and_tables_without_grains_take_no_space() {
        let mut writer = StreamWriter::begin(Vec::new(), &spec(3 * TABLE_ENTRIES * 128 + 1)).unwrap();
        writer.grain(0, &[0; GRAIN_BYTES as usize]).unwrap();
        writer.grain(5, &[7; GRAIN_BYTES as usize]).unwrap();
        writer.grain(3 * TABLE_ENTRIES, &[9; 512]).unwrap();
        let bytes = writer.finish().unwrap();
        let tables = tables(&bytes);
        assert_eq!(tables.len(), 4);
        assert!(tables[1].is_none() && tables[2].is_none());
        let used = |table: &Option<Vec<u32>>| -> Vec<usize> {
            let table = table.as_ref().unwrap();
            (0..table.len()).filter(|at| table[*at] != 0).collect()
        };
        assert_eq!((used(&tables[0]), used(&tables[3])), (vec![5], vec![0]));
        let at = tables[0].as_ref().unwrap()[5] as usize * 512;
        assert_eq!(bytes[at..at + 8], (5 * 128_u64).to_le_bytes());
        let size = u32::from_le_bytes(bytes[at + 8..at + 12].try_into().unwrap()) as usize;
        let mut plain = Vec::new();
        let mut decoder = flate2::write::ZlibDecoder::new(&mut plain);
        decoder.write_all(&bytes[at + 12..at + 12 + size]).unwrap();
        decoder.finish().unwrap();
        assert_eq!(plain, [7; GRAIN_BYTES as usize]);
        assert!(bytes.len() < 80 << 10, "{} bytes", bytes.len());
    }

    #[test]
    fn the_header_points_to_the_footer_and_is_never_taken_for_a_target() {
        let bytes = StreamWriter::begin(Vec::new(), &spec(1000)).unwrap().finish().unwrap();
        let header = SparseHeader::decode(&bytes).unwrap();
        assert_eq!((header.directory, header.version, header.is_plain()), (Directory::InFooter, 3, false));
        assert_eq!(bytes.len() % 512, 0);
        assert_eq!(bytes[bytes.len() - 512..], [0; 512]);
    }

    #[test]
    fn a_name_that_no_descriptor_takes_is_refused() {
        let named = |name: &str| StreamSpec { name: name.to_owned(), ..spec(1000) };
        assert!(StreamWriter::begin(Vec::new(), &named("a\"b.vmdk")).is_err());
        assert!(StreamWriter::begin(Vec::new(), &named(&"x".repeat(20_000))).is_err());
    }
}
