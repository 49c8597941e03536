//! QUIC and TLS around the protocol cores.
