//! libFuzzer target `segment_index`; what it checks stands in `reprotect_fuzz`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| reprotect_fuzz::run("segment_index", data));
