//! Typed configuration values: sizes, rates, durations, addresses and compression levels as a person writes them.
//!
//! Invariants: parsing is exact integer arithmetic, never floating point; `Display` writes a text that parses back
//! to the same value; a text without a unit is refused wherever two units would be plausible. Every refusal is
//! `"<what is wrong>; <what to write>"`, which [`super::config`] splits into reason and remedy.
//! Called by the `config.rs` of the three programs and by their command lines.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::str::FromStr;
use std::time::Duration;

use serde::de::{self, Deserialize, Deserializer, Visitor};
use serde::{Serialize, Serializer};

use crate::host::hours::RateHours;

/// Why a value was refused: what is wrong and what to write.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what}; {remedy}")]
pub struct ValueError {
    /// What is wrong with the text.
    pub what: String,
    /// What to write instead.
    pub remedy: String,
}

fn refuse<T>(what: impl Into<String>, remedy: impl Into<String>) -> Result<T, ValueError> {
    Err(ValueError { what: what.into(), remedy: remedy.into() })
}

/// A size in bytes: `"64MiB"`, `"1 GiB"`, `"500 MB"`, or a plain number of bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

/// A throughput limit: `"200 Mbit/s"`, `"100 MB/s"`, `"80 MiB/s"` or `"unlimited"`; bytes per second inside.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rate(pub Option<u64>);

/// A duration: `"200ms"`, `"15m"`, `"1h 30m"`; whole milliseconds inside.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct DurationText(pub Duration);

/// `host`, `host:port`, `192.0.2.7:7443`, `[2001:db8::7]:7443`: a peer to dial, resolved when dialled.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct AddressText {
    host: String,
    port: Option<u16>,
}

/// A local address to listen on: an IP address with or without a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListenText {
    ip: IpAddr,
    port: Option<u16>,
}

/// A peer to dial with its port; `Display` gives what `tokio::net::lookup_host` takes.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HostPort {
    /// Host name or IP address, without brackets.
    pub host: String,
    /// UDP and TCP port.
    pub port: u16,
}

/// `"adaptive"` or a fixed zstd level.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LevelText {
    /// Chosen continuously from the measured link and CPU.
    #[default]
    Adaptive,
    /// Always this zstd level.
    Fixed(i32),
}

const BYTE_UNITS: [(&str, u64); 9] = [
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("TB", 1_000_000_000_000),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("kB", 1000),
    ("B", 1),
];

const BIT_UNITS: [(&str, u64); 4] =
    [("Gbit", 1_000_000_000), ("Mbit", 1_000_000), ("kbit", 1000), ("bit", 1)];

/// A decimal number and the rest of the text, as `(mantissa, power of ten, rest)`: `1.5 GiB` is `(15, 10, "GiB")`.
fn split_number(text: &str) -> Option<(u128, u128, &str)> {
    let text = text.trim();
    let end = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let (number, rest) = text.split_at(end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || whole.len() + fraction.len() > 24 || (number.contains('.') && fraction.is_empty())
    {
        return None;
    }
    if !fraction.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let mantissa = format!("{whole}{fraction}").parse().ok()?;
    let scale = 10_u128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
    Some((mantissa, scale, rest.trim()))
}

/// `mantissa / scale × unit`, rounded down; `None` beyond 2^64.
fn scaled(mantissa: u128, scale: u128, unit: u64) -> Option<u64> {
    u64::try_from(mantissa.checked_mul(u128::from(unit))? / scale).ok()
}

/// Units differ by one letter of case only where it cannot be mistaken: `KB` is `kB`, but `mb` stays refused.
fn unit_of(table: &[(&str, u64)], name: &str) -> Option<u64> {
    let name = match name {
        "KB" => "kB",
        "Kbit" => "kbit",
        other => other,
    };
    table.iter().find(|(unit, _)| *unit == name).map(|(_, factor)| *factor)
}

impl FromStr for ByteSize {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let remedy = "write a number and a unit such as \"64 MiB\" or \"1 GiB\" (B, KiB, MiB, GiB, TiB, kB, MB, GB, TB)";
        let Some((mantissa, scale, unit)) = split_number(text) else {
            return refuse(format!("\"{text}\" is not a size"), remedy);
        };
        let factor = if unit.is_empty() && scale == 1 { Some(1) } else { unit_of(&BYTE_UNITS, unit) };
        let Some(factor) = factor else {
            return refuse(format!("\"{unit}\" is not a unit of size"), remedy);
        };
        match scaled(mantissa, scale, factor) {
            Some(bytes) => Ok(Self(bytes)),
            None => refuse(format!("\"{text}\" is beyond 16 EiB"), remedy),
        }
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let exact = BYTE_UNITS.iter().find(|(_, factor)| self.0 >= *factor && self.0.is_multiple_of(*factor));
        match exact {
            Some((unit, factor)) => write!(f, "{} {unit}", self.0 / factor),
            None => write!(f, "{} B", self.0),
        }
    }
}

impl Rate {
    /// No limit.
    pub const UNLIMITED: Self = Self(None);

    /// The limit in bytes per second, `None` when unlimited.
    #[must_use]
    pub const fn bytes_per_second(self) -> Option<u64> {
        self.0
    }
}

impl FromStr for Rate {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let remedy = "write \"unlimited\" or a number and a unit such as \"200 Mbit/s\" or \"100 MB/s\"";
        if matches!(text.trim(), "unlimited" | "off") {
            return Ok(Self::UNLIMITED);
        }
        let Some((mantissa, scale, unit)) = split_number(text) else {
            return refuse(format!("\"{text}\" is not a rate"), remedy);
        };
        let Some(unit) = unit.strip_suffix("/s") else {
            return refuse(format!("\"{text}\" has no unit per second"), remedy);
        };
        let bytes = if let Some(factor) = unit_of(&BYTE_UNITS, unit.trim()) {
            scaled(mantissa, scale, factor)
        } else if let Some(factor) = unit_of(&BIT_UNITS, unit.trim()) {
            scaled(mantissa, scale.saturating_mul(8), factor)
        } else {
            return refuse(format!("\"{unit}/s\" is not a unit of rate"), remedy);
        };
        match bytes {
            Some(0) => refuse(format!("\"{text}\" would stop everything"), remedy),
            Some(bytes) => Ok(Self(Some(bytes))),
            None => refuse(format!("\"{text}\" is beyond what can be counted"), remedy),
        }
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(bytes) = self.0 else { return f.write_str("unlimited") };
        match bytes.checked_mul(8).filter(|bits| bits.is_multiple_of(1_000_000)) {
            Some(bits) if bits.is_multiple_of(1_000_000_000) => write!(f, "{} Gbit/s", bits / 1_000_000_000),
            Some(bits) => write!(f, "{} Mbit/s", bits / 1_000_000),
            None => write!(f, "{}/s", ByteSize(bytes)),
        }
    }
}

const DURATION_UNITS: [(&str, u64); 5] =
    [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)];

impl FromStr for DurationText {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let remedy = "write a number and a unit such as \"200ms\", \"30s\", \"15m\", \"24h\" or \"1h 30m\"";
        let wrong = || refuse(format!("\"{text}\" is not a duration"), remedy);
        let mut rest = text.trim();
        let mut millis = 0_u64;
        if rest.is_empty() {
            return wrong();
        }
        while !rest.is_empty() {
            let Some((mantissa, scale, tail)) = split_number(rest) else { return wrong() };
            let end = tail.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(tail.len());
            let (unit, after) = tail.split_at(end);
            let part = unit_of(&DURATION_UNITS, unit).and_then(|factor| scaled(mantissa, scale, factor));
            match part.and_then(|part| millis.checked_add(part)) {
                Some(sum) => millis = sum,
                None => return wrong(),
            }
            rest = after.trim_start();
        }
        Ok(Self(Duration::from_millis(millis)))
    }
}

impl fmt::Display for DurationText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let millis = u64::try_from(self.0.as_millis()).unwrap_or(u64::MAX);
        let exact =
            DURATION_UNITS.iter().find(|(_, factor)| millis >= *factor && millis.is_multiple_of(*factor));
        match exact {
            Some((unit, factor)) => write!(f, "{}{unit}", millis / factor),
            None => write!(f, "{millis}ms"),
        }
    }
}

/// Host (brackets removed) and port of an address text.
fn split_address(text: &str) -> Option<(String, Option<u16>)> {
    let text = text.trim();
    if text.parse::<Ipv6Addr>().is_ok() {
        return Some((text.to_owned(), None));
    }
    if let Some(rest) = text.strip_prefix('[') {
        let (host, tail) = rest.split_once(']')?;
        host.parse::<Ipv6Addr>().ok()?;
        let port = match tail {
            "" => None,
            tail => Some(tail.strip_prefix(':')?.parse().ok()?),
        };
        return Some((host.to_owned(), port));
    }
    let (host, port) = match text.split_once(':') {
        Some((host, port)) => (host, Some(port.parse().ok()?)),
        None => (text, None),
    };
    let plausible = !host.is_empty()
        && host.len() <= 253
        && host.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'));
    plausible.then(|| (host.to_owned(), port))
}

impl FromStr for AddressText {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let remedy = "write \"host\", \"host:port\" or \"[2001:db8::7]:port\" with a port from 1 to 65535";
        match split_address(text) {
            Some((_, Some(0))) => refuse(format!("\"{text}\" has port 0, which nobody can dial"), remedy),
            Some((host, port)) => Ok(Self { host, port }),
            None => refuse(format!("\"{text}\" is not an address"), remedy),
        }
    }
}

impl AddressText {
    /// The address with its port, `default_port` where it named none.
    #[must_use]
    pub fn with_default_port(&self, default_port: u16) -> HostPort {
        HostPort { host: self.host.clone(), port: self.port.unwrap_or(default_port) }
    }
}

impl fmt::Display for AddressText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.port {
            Some(port) => fmt::Display::fmt(&HostPort { host: self.host.clone(), port }, f),
            None => f.write_str(&self.host),
        }
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl ListenText {
    /// The wildcard address: IPv6 with IPv4 mapped where the system allows it.
    pub const ANY: Self = Self { ip: IpAddr::V6(Ipv6Addr::UNSPECIFIED), port: None };

    /// The socket address, `default_port` where the text named none. Port 0 asks the system for a free one.
    #[must_use]
    pub fn with_default_port(self, default_port: u16) -> SocketAddr {
        SocketAddr::new(self.ip, self.port.unwrap_or(default_port))
    }
}

impl FromStr for ListenText {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let parsed = split_address(text).and_then(|(host, port)| Some((host.parse::<IpAddr>().ok()?, port)));
        match parsed {
            Some((ip, port)) => Ok(Self { ip, port }),
            None => refuse(
                format!("\"{text}\" is not an IP address to listen on"),
                "write \"[::]\" for every interface, or one address such as \"10.0.0.4:7443\"",
            ),
        }
    }
}

impl fmt::Display for ListenText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.ip, self.port) {
            (ip, Some(port)) => write!(f, "{}", SocketAddr::new(ip, port)),
            (IpAddr::V6(ip), None) => write!(f, "[{ip}]"),
            (IpAddr::V4(ip), None) => write!(f, "{ip}"),
        }
    }
}

impl FromStr for LevelText {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        match text.trim() {
            "adaptive" => Ok(Self::Adaptive),
            other => match other.parse() {
                Ok(level) => Ok(Self::Fixed(level)),
                Err(_) => refuse(
                    format!("\"{text}\" is not a level"),
                    "write \"adaptive\" or a number from -5 to 3",
                ),
            },
        }
    }
}

impl fmt::Display for LevelText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Adaptive => f.write_str("adaptive"),
            Self::Fixed(level) => write!(f, "{level}"),
        }
    }
}

/// Serde by text: strings and integers are parsed with `FromStr`, so that file and command line agree.
macro_rules! serde_by_text {
    ($($name:ident: $expecting:literal),+ $(,)?) => {$(
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct Text;
                impl Visitor<'_> for Text {
                    type Value = $name;

                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        f.write_str($expecting)
                    }

                    fn visit_str<E: de::Error>(self, text: &str) -> Result<$name, E> {
                        text.parse().map_err(E::custom)
                    }

                    fn visit_i64<E: de::Error>(self, number: i64) -> Result<$name, E> {
                        number.to_string().parse().map_err(E::custom)
                    }

                    fn visit_u64<E: de::Error>(self, number: u64) -> Result<$name, E> {
                        number.to_string().parse().map_err(E::custom)
                    }
                }
                deserializer.deserialize_any(Text)
            }
        }
    )+};
}

serde_by_text! {
    ByteSize: "a size such as \"64 MiB\"",
    Rate: "a rate such as \"200 Mbit/s\" or \"unlimited\"",
    DurationText: "a duration such as \"15m\"",
    AddressText: "an address such as \"host:port\"",
    ListenText: "an IP address such as \"[::]:7443\"",
    LevelText: "\"adaptive\" or a level from -5 to 3",
    RateHours: "hours and a rate such as \"mon-fri 08:00-18:00 50 Mbit/s\"",
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes_are_exact_and_units_are_never_guessed() {
        let size = |text: &str| text.parse::<ByteSize>().map(|s| s.0);
        assert_eq!(size("64MiB"), Ok(64 << 20));
        assert_eq!(size("1 GiB"), Ok(1 << 30));
        assert_eq!(size("1.5 GiB"), Ok(3 << 29));
        assert_eq!(size("500 MB"), Ok(500_000_000));
        assert_eq!(size("4096"), Ok(4096));
        for wrong in ["", "MiB", "-1 MiB", "64M", "64 mb", "1..5 GiB", "1. GiB", "99999999 TiB", "1.5", "١ B"]
        {
            assert!(size(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn rates_know_bits_and_bytes_and_need_a_unit() {
        let rate = |text: &str| text.parse::<Rate>().map(|r| r.0);
        assert_eq!(rate("200 Mbit/s"), Ok(Some(25_000_000)));
        assert_eq!(rate("100MB/s"), Ok(Some(100_000_000)));
        assert_eq!(rate("1 MiB/s"), Ok(Some(1 << 20)));
        assert_eq!(rate("unlimited"), Ok(None));
        for wrong in ["200", "0 MB/s", "4 bit/s/s", "fast", "200 Mbit"] {
            assert!(rate(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn durations_add_up_and_need_a_unit() {
        let millis = |text: &str| text.parse::<DurationText>().map(|d| d.0.as_millis());
        assert_eq!(millis("200ms"), Ok(200));
        assert_eq!(millis("15m"), Ok(900_000));
        assert_eq!(millis("1h 30m"), Ok(5_400_000));
        assert_eq!(millis("1h30m"), Ok(5_400_000));
        assert_eq!(millis("0.5s"), Ok(500));
        for wrong in ["15", "", "m", "5 weeks", "-1s", "999999999999999999999d"] {
            assert!(millis(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn addresses_take_the_default_port_only_when_they_name_none() {
        let dial = |text: &str| text.parse::<AddressText>().map(|a| a.with_default_port(7443).to_string());
        assert_eq!(dial("target.example").as_deref(), Ok("target.example:7443"));
        assert_eq!(dial("target.example:9").as_deref(), Ok("target.example:9"));
        assert_eq!(dial("2001:db8::7").as_deref(), Ok("[2001:db8::7]:7443"));
        assert_eq!(dial("[2001:db8::7]:80").as_deref(), Ok("[2001:db8::7]:80"));
        for wrong in ["", ":7443", "host:", "host:0", "host:70000", "a b", "[::1", "[host]:1", "http://h"] {
            assert!(dial(wrong).is_err(), "{wrong}");
        }
        assert!("name:1".parse::<ListenText>().is_err(), "one listens on addresses, not names");
        assert_eq!(ListenText::ANY.with_default_port(7443).to_string(), "[::]:7443");
    }

    proptest! {
        #[test]
        fn what_is_printed_parses_back_to_the_same_value(bytes in 1_u64.., millis in 0_u64..1 << 50) {
            prop_assert_eq!(ByteSize(bytes).to_string().parse::<ByteSize>(), Ok(ByteSize(bytes)));
            prop_assert_eq!(Rate(Some(bytes)).to_string().parse::<Rate>(), Ok(Rate(Some(bytes))));
            let duration = DurationText(Duration::from_millis(millis));
            prop_assert_eq!(duration.to_string().parse::<DurationText>(), Ok(duration));
        }

        #[test]
        fn no_text_makes_a_parser_panic(text in ".{0,40}") {
            let _ = text.parse::<ByteSize>();
            let _ = text.parse::<Rate>();
            let _ = text.parse::<DurationText>();
            let _ = text.parse::<AddressText>();
            let _ = text.parse::<ListenText>();
            let _ = text.parse::<LevelText>();
        }
    }
}
