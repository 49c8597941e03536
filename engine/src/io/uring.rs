//! io_uring backend.
