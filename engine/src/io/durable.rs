//! Durable file replacement.
