//! Bits of changed blocks, harvested by exchange.
