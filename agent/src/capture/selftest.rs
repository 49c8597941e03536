//! Proving data capture before it is trusted: where memory pages are mapped, and that what is copied is what was written.
//!
//! How: a direct read of the agent's own takes a buffer that holds a known pattern. At submission the device has not
//! filled it yet, so a program that copies it then copies the pattern, through the very code that copies writes. Nothing is
//! written to any disk. The kernel does not say where the linear mapping of memory begins, so every place that is possible is
//! tried: both it and the table of pages begin at a GiB, and a wrong guess reads another page or none, harmlessly.
//!
//! Invariants: data capture stays refused unless several different patterns came through, small and large. Called by
//! `tracker` when data capture is first wanted. Units: bytes.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use super::CaptureError;
use super::kernel::Kernel;
use super::layout::Control;
use super::loader::{self, LoadOptions, Variant};
use super::pins::Claim;
use super::ring::Ring;
use super::sysfs::BlockDisk;

const GIB: u64 = 1 << 30;
/// Most places that are tried: a machine of 1 TiB has 16,000.
const GUESSES_MAX: usize = 1 << 17;
/// Length of the small and of the large read.
const LENGTHS: [usize; 2] = [4096, 128 << 10];
const ALIGN: usize = 4096;

/// A buffer for direct reads.
struct Buffer {
    bytes: Vec<u8>,
    start: usize,
}

impl Buffer {
    fn new(len: usize) -> Self {
        let bytes = vec![0; len + ALIGN];
        let start = bytes.as_ptr().align_offset(ALIGN);
        Self { bytes, start }
    }

    fn slice(&mut self, len: usize) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + len]
    }
}

struct Prober<'a> {
    kernel: &'a Kernel,
    ring: &'a Ring,
    file: File,
    buffer: Buffer,
    disk: &'a BlockDisk,
}

impl Prober<'_> {
    /// One read with a pattern; whether it came through the ring as it is.
    fn comes_through(&mut self, len: usize) -> Result<bool, CaptureError> {
        let mut pattern = vec![0; len];
        rustix::rand::getrandom(&mut pattern[..32], rustix::rand::GetRandomFlags::empty())
            .map_err(|error| CaptureError::SelfTest { reason: error.to_string() })?;
        let seed = pattern[..32].to_vec();
        for (index, chunk) in pattern.chunks_mut(32).enumerate() {
            for (byte, seed) in chunk.iter_mut().zip(&seed) {
                *byte = seed.wrapping_add((index as u8).wrapping_mul(29));
            }
        }
        let slice = self.buffer.slice(len);
        slice.copy_from_slice(&pattern);
        self.file.read_exact_at(slice, 0).map_err(CaptureError::file(&self.disk.path))?;
        let mut collected = Vec::new();
        // Submission is over, so what there is has been committed, but for other programs' records.
        let _all: bool = self.ring.drain::<CaptureError>(self.ring.end(), |record| {
            if record.kind.is_none() {
                collected.extend_from_slice(record.data);
            }
            Ok(())
        })?;
        Ok(collected.windows(len).step_by(512).any(|window| window == pattern))
    }
}

/// Finds out where pages are and proves it; returns when several patterns came through.
pub(crate) fn prove(
    kernel: &Kernel,
    ring: &Ring,
    place: &Claim,
    options: &LoadOptions,
    disk: &BlockDisk,
) -> Result<(), CaptureError> {
    let types = loader::kernel_types()?;
    let mut refusal = None;
    for variant in
        loader::VARIANTS.into_iter().filter(|variant| options.only.is_none_or(|only| only == *variant))
    {
        match attach_probe(place, options, variant, &types) {
            Ok((_loaded, _link)) => return prove_attached(kernel, ring, disk),
            Err(error) => refusal = Some(error),
        }
    }
    Err(refusal.unwrap_or(CaptureError::SelfTest { reason: "no variant was tried".into() }))
}

fn attach_probe(
    place: &Claim,
    options: &LoadOptions,
    variant: Variant,
    types: &aya::Btf,
) -> Result<(aya::Ebpf, aya::programs::links::FdLink), CaptureError> {
    let mut loaded = loader::open_object(place.path(), options, variant, types)?;
    let program = loader::program(&mut loaded, "on_probe")?;
    loader::load_program(program, "block_bio_queue", types)?;
    let link = loader::attach(program, "block_bio_queue")?;
    Ok((loaded, link))
}

fn prove_attached(kernel: &Kernel, ring: &Ring, disk: &BlockDisk) -> Result<(), CaptureError> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(&disk.path)
        .map_err(CaptureError::file(&disk.path))?;
    let buffer = Buffer::new(LENGTHS[1]);
    let mut prober = Prober { kernel, ring, file, buffer, disk };
    kernel.set(Control::ProbePage, 0);
    kernel.set(Control::ProbeTgid, u64::from(std::process::id()));
    let known = kernel.get(Control::AddressBase);
    let proven = (known != 0 && prove_base(&mut prober, known)?) || find_base(&mut prober)?;
    kernel.set(Control::ProbeTgid, 0);
    if proven {
        return Ok(());
    }
    kernel.set(Control::AddressBase, 0);
    let guesses = guesses(kernel)?.len();
    Err(CaptureError::SelfTest {
        reason: format!("a known pattern came through at none of {guesses} possible places of memory"),
    })
}

fn find_base(prober: &mut Prober<'_>) -> Result<bool, CaptureError> {
    // The first read only tells where to look.
    prober.comes_through(LENGTHS[0])?;
    for guess in guesses(prober.kernel)? {
        if prove_base(prober, guess)? {
            tracing::info!(base = format!("{guess:#x}"), "data capture is proven");
            return Ok(true);
        }
    }
    Ok(false)
}

fn prove_base(prober: &mut Prober<'_>, base: u64) -> Result<bool, CaptureError> {
    prober.kernel.set(Control::AddressBase, base);
    for len in [LENGTHS[0], LENGTHS[0], LENGTHS[1], LENGTHS[0], LENGTHS[1]] {
        if !prober.comes_through(len)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Every value of C that is possible, where address = page × (page size / description size) + C.
fn guesses(kernel: &Kernel) -> Result<Vec<u64>, CaptureError> {
    let (page, task) = (kernel.get(Control::ProbePage), kernel.get(Control::ProbeTask));
    let description = kernel.get(Control::ProbePageBytes);
    let page_bytes = rustix::param::page_size() as u64;
    if page == 0 || description == 0 {
        return Err(CaptureError::SelfTest { reason: "the probe did not run".into() });
    }
    if !page_bytes.is_multiple_of(description) {
        return Err(CaptureError::SelfTest {
            reason: format!("a page's description has {description} bytes, which does not divide a page"),
        });
    }
    let memory_gib = memory_end().div_ceil(GIB);
    let factor = page_bytes / description;
    let table_gib = memory_end().div_ceil(factor).div_ceil(GIB);
    let mut guesses = Vec::new();
    for table in 0..=table_gib {
        for memory in 0..=memory_gib {
            let mapping = (task & !(GIB - 1)).wrapping_sub(memory * GIB);
            let table = (page & !(GIB - 1)).wrapping_sub(table * GIB);
            guesses.push(mapping.wrapping_sub(table.wrapping_mul(factor)));
        }
    }
    guesses.truncate(GUESSES_MAX);
    Ok(guesses)
}

/// One past the last address of memory.
fn memory_end() -> u64 {
    let text = fs::read_to_string("/proc/iomem").unwrap_or_default();
    let ends = text.lines().filter(|line| line.ends_with("System RAM")).filter_map(|line| {
        let (_, end) = line.split_once('-')?;
        u64::from_str_radix(end.split_ascii_whitespace().next()?, 16).ok()
    });
    // Without it, 64 GiB: what a machine that hides it may have.
    ends.max().filter(|end| *end > 0).map_or(64 * GIB, |end| end + 1)
}
