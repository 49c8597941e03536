//! The protocol without I/O or clocks.
