//! libFuzzer target `agent_session`; what it checks stands in `reprotect_fuzz`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| reprotect_fuzz::run("agent_session", data));
