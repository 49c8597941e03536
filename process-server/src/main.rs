//! Entry point of `reprotect-process-server`.
fn main() {}
