//! pread/pwrite backend.
