//! Entry point of `reprotect-master-target`.
fn main() {}
