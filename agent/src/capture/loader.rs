//! Loading the capture programs: which variant the running kernel takes is found by trying, never by its version.
//!
//! Invariants: maps and programs are pinned before anything is attached, links last, so that a place with all pins is
//! complete; whoever finds some missing starts afresh. Called by `kernel` and `selftest`.

use std::fs;
use std::path::Path;

use aya::programs::Program;
use aya::programs::links::FdLink;
use aya::{Btf, Ebpf, EbpfLoader};

use super::layout::FLIGHT_WAYS;
use super::pins::Claim;
use super::{CaptureError, object};

/// Maps by their names in the object, which are the names of their pins.
pub(crate) const MAPS: [&str; 6] = ["control", "dirty", "inflight", "flights", "tallies", "ring"];
/// Programs and the tracepoints they are on.
pub(crate) const PROGRAMS: [(&str, &str); 3] =
    [("on_request", "block_rq_complete"), ("on_bio", "block_bio_complete"), ("on_queue", "block_bio_queue")];

/// What a kernel may lack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Variant {
    /// Typed tracepoints.
    pub(crate) typed: bool,
    /// Loops by helper (5.17).
    pub(crate) loops: bool,
    /// Ring records of any length (5.19).
    pub(crate) any_length: bool,
}

/// All variants, best first.
pub(crate) const VARIANTS: [Variant; 6] = [
    Variant { typed: true, loops: true, any_length: true },
    Variant { typed: true, loops: true, any_length: false },
    Variant { typed: true, loops: false, any_length: false },
    Variant { typed: false, loops: true, any_length: true },
    Variant { typed: false, loops: true, any_length: false },
    Variant { typed: false, loops: false, any_length: false },
];

/// What the oldest supported kernels get.
pub(crate) const fn plainest() -> Variant {
    let [.., last] = VARIANTS;
    last
}

impl std::fmt::Display for Variant {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.typed { "typed" } else { "raw" })?;
        f.write_str(if self.loops { ", loops" } else { "" })?;
        f.write_str(if self.any_length { ", records of any length" } else { "" })
    }
}

/// Most places in the table of writes in flight: beyond, their numbers would not do.
const FLIGHTS_MAX: u32 = 1 << 24;
/// Most of the verifier's words that are kept.
const REASON_CHARS_MAX: usize = 1500;

/// How to load.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LoadOptions {
    /// Size of the ring.
    pub(crate) ring_bytes: u32,
    /// Places in the table of writes in flight; rounded up to a number of sets that is a power of two.
    pub(crate) flights_max: u32,
    /// With the hook of the tests.
    pub(crate) hooks: bool,
    /// Only this variant.
    pub(crate) only: Option<Variant>,
}

/// Whether this process on this kernel can load programs at all.
///
/// # Errors
/// [`CaptureError::Lockdown`], [`CaptureError::NoTypes`] or [`CaptureError::NotPermitted`].
pub fn check_machine() -> Result<(), CaptureError> {
    check_kernel(Path::new("/sys/kernel"))?;
    if is_permitted() { Ok(()) } else { Err(CaptureError::NotPermitted) }
}

/// Whether the kernel whose attributes stand in `dir` has what capture needs, and allows it.
fn check_kernel(dir: &Path) -> Result<(), CaptureError> {
    let lockdown = fs::read_to_string(dir.join("security/lockdown")).unwrap_or_default();
    if lockdown.contains("[confidentiality]") {
        return Err(CaptureError::Lockdown);
    }
    fs::metadata(dir.join("btf/vmlinux"))
        .map(drop)
        .map_err(|error| CaptureError::NoTypes { reason: error.to_string() })
}

/// Whether this process may load programs, as far as its capabilities say.
fn is_permitted() -> bool {
    rustix::thread::capabilities(None).is_ok_and(|sets| {
        use rustix::thread::CapabilitySet as Cap;
        sets.effective.contains(Cap::SYS_ADMIN) || sets.effective.contains(Cap::BPF | Cap::PERFMON)
    })
}

/// The running kernel's types.
pub(crate) fn kernel_types() -> Result<Btf, CaptureError> {
    Btf::from_sys_fs().map_err(|error| CaptureError::NoTypes { reason: error.to_string() })
}

/// Loads the first variant that the kernel takes into `place`, which holds no pins, and pins all but links.
pub(crate) fn load(place: &Claim, options: &LoadOptions) -> Result<(Ebpf, Variant), CaptureError> {
    let types = kernel_types()?;
    let mut refusal = None;
    for variant in VARIANTS.into_iter().filter(|variant| options.only.is_none_or(|only| only == *variant)) {
        match load_variant(place.path(), options, variant, &types) {
            Ok(loaded) => {
                if let Some(refusal) = &refusal {
                    tracing::info!(%variant, %refusal, "the kernel takes a lesser variant of the capture program");
                }
                return Ok((loaded, variant));
            }
            Err(error) => {
                place.clear()?;
                refusal.get_or_insert(error);
            }
        }
    }
    Err(refusal.unwrap_or(CaptureError::Refused { reason: "no variant was tried".into() }))
}

fn load_variant(
    dir: &Path,
    options: &LoadOptions,
    variant: Variant,
    types: &Btf,
) -> Result<Ebpf, CaptureError> {
    let mut loaded = open_object(dir, options, variant, types)?;
    for (name, tracepoint) in PROGRAMS {
        let program = program(&mut loaded, name)?;
        load_program(program, tracepoint, types)?;
        program.pin(dir.join(name)).map_err(refused)?;
    }
    Ok(loaded)
}

/// The object with its maps, those pinned in `dir` or new ones pinned there; no program is loaded yet.
pub(crate) fn open_object(
    dir: &Path,
    options: &LoadOptions,
    variant: Variant,
    types: &Btf,
) -> Result<Ebpf, CaptureError> {
    let cpus = u32::try_from(cpus()?).unwrap_or(u32::MAX);
    let (loops, any_length, hooks) =
        (u8::from(variant.loops), u8::from(variant.any_length), u8::from(options.hooks));
    let set_bits = set_bits(options.flights_max);
    let page_shift = rustix::param::page_size().trailing_zeros() as u8;
    let mut loader = EbpfLoader::new();
    loader.btf(Some(types));
    for map in MAPS {
        loader.map_pin_path(map, dir.join(map));
    }
    loader
        .map_max_entries("flights", cpus)
        .map_max_entries("tallies", cpus.saturating_mul(super::layout::DISKS_MAX as u32))
        .map_max_entries("inflight", 1 << set_bits)
        .map_max_entries("ring", options.ring_bytes)
        .override_global("WITH_LOOP", &loops, true)
        .override_global("WITH_DYNPTR", &any_length, true)
        .override_global("WITH_HOOKS", &hooks, true)
        .override_global("PAGE_SHIFT", &page_shift, true)
        .override_global("FLIGHT_SET_BITS", &set_bits, true);
    let object = if variant.typed { object::TYPED } else { object::RAW };
    loader.load(object).map_err(refused)
}

/// Bits of the number of a set, so that there are `flights` places; each set has one beside it.
fn set_bits(flights: u32) -> u8 {
    let sets = flights.clamp(1, FLIGHTS_MAX).div_ceil(FLIGHT_WAYS as u32).next_power_of_two().max(2);
    sets.trailing_zeros() as u8
}

/// The program of that name.
pub(crate) fn program<'a>(loaded: &'a mut Ebpf, name: &str) -> Result<&'a mut Program, CaptureError> {
    loaded
        .program_mut(name)
        .ok_or_else(|| CaptureError::Refused { reason: format!("the object has no program {name}") })
}

/// Gives a program to the kernel's verifier.
pub(crate) fn load_program(program: &mut Program, tracepoint: &str, types: &Btf) -> Result<(), CaptureError> {
    match program {
        Program::BtfTracePoint(program) => program.load(tracepoint, types).map_err(refused),
        Program::RawTracePoint(program) => program.load().map_err(refused),
        other => Err(CaptureError::Refused { reason: format!("{tracepoint}: unexpected {other:?}") }),
    }
}

/// Attaches a loaded program; it runs until the link is dropped, or its pin removed.
pub(crate) fn attach(program: &mut Program, tracepoint: &str) -> Result<FdLink, CaptureError> {
    match program {
        Program::BtfTracePoint(program) => {
            let id = program.attach().map_err(refused)?;
            Ok(program.take_link(id).map_err(refused)?.into())
        }
        Program::RawTracePoint(program) => {
            let id = program.attach(tracepoint).map_err(refused)?;
            Ok(program.take_link(id).map_err(refused)?.into())
        }
        other => Err(CaptureError::Refused { reason: format!("{tracepoint}: unexpected {other:?}") }),
    }
}

/// The name of a program's link among the pins.
pub(crate) fn link_pin(program: &str) -> String {
    format!("link_{program}")
}

/// CPUs that may ever be there.
pub(crate) fn cpus() -> Result<usize, CaptureError> {
    aya::util::nr_cpus().map_err(|(what, source)| CaptureError::File { path: what.into(), source })
}

/// With the whole chain of causes: the verifier's words are at its end.
pub(crate) fn refused(error: impl std::error::Error) -> CaptureError {
    let mut reason = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        reason.push_str(": ");
        reason.push_str(&cause.to_string());
        source = cause.source();
    }
    if reason.contains("Operation not permitted") {
        // Lockdown is not always to be read anywhere.
        return if is_permitted() { CaptureError::Forbidden { reason } } else { CaptureError::NotPermitted };
    }
    // The verifier tells its whole way; what it did not like stands at the end.
    let reason = match reason.char_indices().rev().nth(REASON_CHARS_MAX) {
        Some((at, _)) => format!("…{}", &reason[at..]),
        None => reason,
    };
    CaptureError::Refused { reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A kernel's attributes in a folder of their own.
    fn kernel(lockdown: Option<&str>, types: bool) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        if let Some(lockdown) = lockdown {
            fs::create_dir(dir.path().join("security")).unwrap();
            fs::write(dir.path().join("security/lockdown"), lockdown).unwrap();
        }
        if types {
            fs::create_dir(dir.path().join("btf")).unwrap();
            fs::write(dir.path().join("btf/vmlinux"), "").unwrap();
        }
        dir
    }

    #[test]
    fn a_kernel_that_cannot_or_does_not_allow_it_is_told_with_the_remedy() {
        let said = |lockdown, types| {
            let dir = kernel(lockdown, types);
            check_kernel(dir.path()).map_err(|error| error.to_string())
        };
        for lockdown in
            [None, Some("[none] integrity confidentiality\n"), Some("none [integrity] confidentiality\n")]
        {
            assert_eq!(said(lockdown, true), Ok(()), "{lockdown:?}");
        }
        let locked = said(Some("none integrity [confidentiality]\n"), true).unwrap_err();
        assert!(locked.contains("lockdown=integrity") && locked.contains("`scan`"), "{locked}");
        let untyped = said(None, false).unwrap_err();
        assert!(untyped.contains("CONFIG_DEBUG_INFO_BTF") && untyped.contains("`scan`"), "{untyped}");
    }

    #[test]
    fn a_load_that_the_kernel_forbids_is_no_want_of_rights_where_they_are_there() {
        let refusal = refused(std::io::Error::from_raw_os_error(libc::EPERM)).to_string();
        let remedy = if is_permitted() { "lockdown=integrity" } else { "system service" };
        assert!(refusal.contains(remedy), "{refusal}");
        let other = refused(std::io::Error::from_raw_os_error(libc::EINVAL));
        assert!(matches!(other, CaptureError::Refused { .. }), "{other}");
    }

    #[test]
    fn a_table_of_writes_in_flight_has_the_places_that_are_wanted_and_a_pair_of_sets() {
        for (flights, sets) in [(0, 2), (1, 2), (16, 2), (17, 4), (1 << 16, 1 << 13), (u32::MAX, 1 << 21)] {
            assert_eq!(1_u32 << set_bits(flights), sets, "{flights}");
        }
    }

    /// What an older kernel gets must pass a newer one's verifier too, so that it is known to load at all.
    #[test]
    fn every_variant_is_taken_by_this_kernel() {
        if let Err(error) = check_machine() {
            println!("SKIPPED: {error}");
            return;
        }
        let place =
            Claim::take(super::super::pins::root().unwrap().join("agent-variants"), "variants").unwrap();
        for variant in VARIANTS {
            place.clear().unwrap();
            let options =
                LoadOptions { ring_bytes: 1 << 20, flights_max: 1024, hooks: false, only: Some(variant) };
            let begun = std::time::Instant::now();
            let (mut loaded, taken) =
                load(&place, &options).unwrap_or_else(|error| panic!("{variant}: {error}"));
            assert_eq!(taken, variant);
            let types = kernel_types().unwrap();
            let probe = program(&mut loaded, "on_probe").unwrap();
            load_program(probe, "block_bio_queue", &types)
                .unwrap_or_else(|error| panic!("{variant}: {error}"));
            println!("{variant}: loaded in {:?}", begun.elapsed());
        }
        place.clear().unwrap();
    }
}
