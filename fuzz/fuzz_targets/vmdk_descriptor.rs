//! libFuzzer target `vmdk_descriptor`; what it checks stands in `reprotect_fuzz`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| reprotect_fuzz::run("vmdk_descriptor", data));
