//! Entry point of `reprotect-agent`.
fn main() {}
