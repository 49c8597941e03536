//! Loading a daemon's TOML file, and refusing it so that the operator knows what to write.
//!
//! Invariants: a file is read once and completely (at most [`CONFIG_BYTES_MAX`]); unknown keys and values are
//! refused with the nearest known name; every refusal names file, line, key, what is wrong and what to write. The
//! known names come from the types themselves (serde's `deny_unknown_fields`), so no list can drift.
//! Called by the `config.rs` of the three programs; documentation of the keys is in [`super::config_doc`].

use std::fmt;
use std::io::Read;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use toml::de::{DeTable, DeValue};

use super::places::{self, Places, Program};
use super::values::{AddressText, HostPort};
use crate::error::{Answer, Severity};

/// Largest configuration file; a larger one is some other file named by mistake.
pub const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// Why a configuration was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The operator named a file that does not exist.
    #[error("{}: no such configuration file; create it (`check-config --print-default` writes a commented one) or correct --config", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// The file exists and cannot be read.
    #[error("{}: the configuration cannot be read: {source}; correct its owner and mode, or run as root", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The file was read and says something that does not hold.
    #[error(transparent)]
    Invalid(Box<InvalidKey>),
}

/// One key (or line) that was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvalidKey {
    /// The file.
    pub path: PathBuf,
    /// Line, from 1; `None` when the value was not in the file (a default or a command-line option).
    pub line: Option<usize>,
    /// Dotted key; empty when the line is not TOML at all.
    pub key: String,
    /// What is wrong.
    pub what: String,
    /// What to write.
    pub remedy: String,
}

impl fmt::Display for InvalidKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.path.display())?;
        if let Some(line) = self.line {
            write!(f, ":{line}")?;
        }
        if !self.key.is_empty() {
            write!(f, ": `{}`", self.key)?;
        }
        write!(f, ": {}; {}", self.what, self.remedy)
    }
}

impl std::error::Error for InvalidKey {}

impl Answer for ConfigError {
    fn severity(&self) -> Severity {
        Severity::Stop
    }
}

/// A parsed file with its text, so that later checks can still name the line.
#[derive(Clone, Debug)]
pub struct Loaded<T> {
    /// The raw configuration.
    pub raw: T,
    path: PathBuf,
    text: String,
}

/// Reads and parses `path`, which must exist.
///
/// # Errors
/// [`ConfigError`], naming file, line, key, what is wrong and what to write.
pub fn load<T: DeserializeOwned>(path: &Path) -> Result<Loaded<T>, ConfigError> {
    parse(path, read(path)?)
}

/// Reads and parses `path`; a file that does not exist means `T::default()`.
///
/// # Errors
/// As [`load`], except that a missing file is none.
pub fn load_or_default<T: DeserializeOwned + Default>(path: &Path) -> Result<Loaded<T>, ConfigError> {
    match read(path) {
        Ok(text) => parse(path, text),
        Err(ConfigError::Missing { path }) => Ok(Loaded { raw: T::default(), path, text: String::new() }),
        Err(error) => Err(error),
    }
}

/// The command-line options every program shares; they win over the file.
#[derive(Clone, Debug, Default)]
pub struct Overrides {
    /// `--config`: the file, which must then exist.
    pub config: Option<PathBuf>,
    /// `--state-dir`: moves state, socket and the default place of the file.
    pub state_dir: Option<PathBuf>,
    /// `--log-level`.
    pub log_level: Option<String>,
}

impl Overrides {
    /// Loads the file of `program` that these options lead to.
    ///
    /// # Errors
    /// As [`load`] where the operator named the file, else as [`load_or_default`].
    pub fn load<T: DeserializeOwned + Default>(&self, program: Program) -> Result<Loaded<T>, ConfigError> {
        match places::config_path(program, self.config.as_deref(), self.state_dir.as_deref()) {
            (path, true) => load(&path),
            (path, false) => load_or_default(&path),
        }
    }

    /// The places of `program`: `--state-dir`, else the file's `state_dir`, else the packaged ones.
    ///
    /// # Errors
    /// When the file's `state_dir` is relative or the resulting paths do not fit.
    pub fn places<T>(
        &self,
        program: Program,
        loaded: &Loaded<T>,
        state_dir: Option<&Path>,
    ) -> Result<Places, ConfigError> {
        if self.state_dir.is_none() && state_dir.is_some_and(Path::is_relative) {
            return Err(loaded.invalid("state_dir", "a relative path", "write an absolute one"));
        }
        Places::resolve(program, self.state_dir.as_deref().or(state_dir)).map_err(|error| {
            let (what, remedy) = explain(&error.to_string());
            loaded.invalid("state_dir", what, remedy)
        })
    }
}

fn read(path: &Path) -> Result<String, ConfigError> {
    let failed = |source: std::io::Error| match source.kind() {
        std::io::ErrorKind::NotFound => ConfigError::Missing { path: path.to_owned() },
        _ => ConfigError::Read { path: path.to_owned(), source },
    };
    let file = std::fs::File::open(path).map_err(failed)?;
    let mut bytes = Vec::new();
    file.take(CONFIG_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(failed)?;
    let invalid = |what: &str| {
        ConfigError::Invalid(Box::new(InvalidKey {
            path: path.to_owned(),
            line: None,
            key: String::new(),
            what: what.to_owned(),
            remedy: "name the daemon's TOML file with --config".to_owned(),
        }))
    };
    if bytes.len() as u64 > CONFIG_BYTES_MAX {
        return Err(invalid("larger than 1 MiB, so not a configuration"));
    }
    String::from_utf8(bytes).map_err(|_| invalid("not text in UTF-8"))
}

/// Parses `text`; `path` is only named in errors.
///
/// # Errors
/// As [`load`].
pub fn parse<T: DeserializeOwned>(path: &Path, text: String) -> Result<Loaded<T>, ConfigError> {
    match toml::from_str(&text) {
        Ok(raw) => Ok(Loaded { raw, path: path.to_owned(), text }),
        Err(error) => {
            let offset = error.span().map(|span| span.start);
            let (what, remedy) = explain(error.message());
            Err(ConfigError::Invalid(Box::new(InvalidKey {
                path: path.to_owned(),
                line: offset.map(|offset| line_of(&text, offset)),
                key: offset.and_then(|offset| key_at(&text, offset)).unwrap_or_default(),
                what,
                remedy,
            })))
        }
    }
}

impl<T> Loaded<T> {
    /// The addresses `texts` of dotted `key` with their ports; one that stands twice is refused.
    ///
    /// # Errors
    /// Names the address that stands twice.
    pub fn addresses(
        &self,
        key: &str,
        texts: &[AddressText],
        default_port: u16,
    ) -> Result<Vec<HostPort>, ConfigError> {
        let mut addresses: Vec<HostPort> = Vec::with_capacity(texts.len());
        for text in texts {
            let address = text.with_default_port(default_port);
            if addresses.contains(&address) {
                return Err(self.invalid(key, format!("{address} stands twice"), "write it once"));
            }
            addresses.push(address);
        }
        Ok(addresses)
    }

    /// The file this came from (or would have come from).
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A refusal of the value of dotted `key`, with its line where the file has it.
    #[must_use]
    pub fn invalid(&self, key: &str, what: impl Into<String>, remedy: impl Into<String>) -> ConfigError {
        ConfigError::Invalid(Box::new(InvalidKey {
            path: self.path.clone(),
            line: offset_of(&self.text, key).map(|offset| line_of(&self.text, offset)),
            key: key.to_owned(),
            what: what.into(),
            remedy: remedy.into(),
        }))
    }

    /// `value` if it lies in `range`.
    ///
    /// # Errors
    /// Names the value and both ends of the range.
    pub fn in_range<V>(&self, key: &str, value: V, range: &RangeInclusive<V>) -> Result<V, ConfigError>
    where
        V: PartialOrd + fmt::Display,
    {
        if range.contains(&value) {
            return Ok(value);
        }
        let side = if value < *range.start() { "too small" } else { "too large" };
        Err(self.invalid(
            key,
            format!("{value} is {side}"),
            format!("write a value from {} to {}", range.start(), range.end()),
        ))
    }
}

/// What is wrong and what to write, from serde's message.
fn explain(message: &str) -> (String, String) {
    let names: Vec<&str> = message.split('`').skip(1).step_by(2).collect();
    let (what, subject) = if message.starts_with("unknown field") {
        ("unknown key".to_owned(), "keys")
    } else if message.starts_with("unknown variant") {
        (format!("\"{}\" is not a known value", names.first().unwrap_or(&"")), "values")
    } else if message.starts_with("duplicate") {
        (message.to_owned(), "")
    } else {
        let (what, remedy) = message.split_once("; ").unwrap_or((message, ""));
        let remedy = if !remedy.is_empty() {
            remedy.to_owned()
        } else if let Some((_, expected)) = what.split_once(", expected ") {
            format!("write {expected}")
        } else {
            "correct the TOML on this line (`check-config --print-default` shows every key)".to_owned()
        };
        return (what.replace('\n', " "), remedy);
    };
    let Some((got, known)) = names.split_first() else {
        return (what, "see `check-config --print-default`".to_owned());
    };
    let list = known.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    let remedy = match (subject, nearest(got, known)) {
        ("", _) => "write it once".to_owned(),
        (_, Some(near)) => format!("did you mean `{near}`? Known {subject} here: {list}"),
        (_, None) => format!("known {subject} here: {list}"),
    };
    (what, remedy)
}

/// The known name most like `got`, if one is like enough that a slip of the keyboard explains it.
#[must_use]
pub fn nearest<'a>(got: &str, known: &[&'a str]) -> Option<&'a str> {
    let got = got.to_lowercase();
    known
        .iter()
        .map(|name| (strsim::jaro_winkler(&got, name), *name))
        .filter(|(likeness, _)| *likeness >= 0.8)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, name)| name)
}

fn line_of(text: &str, offset: usize) -> usize {
    1 + text.bytes().take(offset).filter(|byte| *byte == b'\n').count()
}

/// The dotted key whose name or value covers byte `offset`; `None` where the text is not TOML.
fn key_at(text: &str, offset: usize) -> Option<String> {
    let table = DeTable::parse(text).ok()?;
    let mut path = Vec::new();
    descend(table.get_ref(), offset, &mut path);
    (!path.is_empty()).then(|| path.join("."))
}

fn descend(table: &DeTable<'_>, offset: usize, path: &mut Vec<String>) -> bool {
    for (key, value) in table {
        if let DeValue::Table(inner) = value.get_ref() {
            // The span of a `[table]` is its header only, so its keys are searched whatever it covers.
            path.push(key.get_ref().to_string());
            if descend(inner, offset, path) {
                return true;
            }
            path.pop();
        }
        if key.span().contains(&offset) || value.span().contains(&offset) {
            path.push(key.get_ref().to_string());
            return true;
        }
    }
    false
}

/// Byte offset of the dotted `key` in `text`.
fn offset_of(text: &str, key: &str) -> Option<usize> {
    let root = DeTable::parse(text).ok()?;
    let mut table = root.get_ref();
    let mut found = None;
    for part in key.split('.') {
        let (name, value) = table.iter().find(|(name, _)| name.get_ref() == part)?;
        found = Some(name.span().start);
        match value.get_ref() {
            DeValue::Table(inner) => table = inner,
            _ => break,
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;
    use crate::host::values::{ByteSize, DurationText};

    #[derive(Debug, Default, Deserialize)]
    #[serde(deny_unknown_fields, default)]
    struct Sample {
        memory: ByteSize,
        interval: DurationText,
        workers: u32,
        mode: Mode,
        disks: Inner,
    }

    #[derive(Debug, Default, Deserialize)]
    #[serde(deny_unknown_fields, default)]
    struct Inner {
        include: Vec<String>,
    }

    #[derive(Debug, Default, Deserialize, PartialEq)]
    #[serde(rename_all = "lowercase")]
    enum Mode {
        #[default]
        Auto,
        Relay,
    }

    fn refusal(text: &str) -> String {
        parse::<Sample>(Path::new("a.toml"), text.to_owned()).expect_err("refused").to_string()
    }

    #[test]
    fn an_unknown_key_is_answered_with_line_and_nearest_name() {
        assert_eq!(
            refusal("workers = 1\nmemmory = 3\n"),
            "a.toml:2: `memmory`: unknown key; did you mean `memory`? Known keys here: `memory`, `interval`, \
             `workers`, `mode`, `disks`"
        );
        assert_eq!(
            refusal("\n[disks]\n  inclde = []\n"),
            "a.toml:3: `disks.inclde`: unknown key; did you mean `include`? Known keys here: `include`"
        );
        assert!(!refusal("zzz = 1").contains("did you mean"));
    }

    #[test]
    fn wrong_values_say_what_to_write() {
        assert_eq!(
            refusal("memory = \"64M\""),
            "a.toml:1: `memory`: \"M\" is not a unit of size; write a number and a unit such as \"64 MiB\" or \
             \"1 GiB\" (B, KiB, MiB, GiB, TiB, kB, MB, GB, TB)"
        );
        assert_eq!(
            refusal("mode = \"rely\""),
            "a.toml:1: `mode`: \"rely\" is not a known value; did you mean `relay`? Known values here: `auto`, \
             `relay`"
        );
        assert_eq!(
            refusal("memory = 1\nworkers = \"two\""),
            "a.toml:2: `workers`: invalid type: string \"two\", expected u32; write u32"
        );
        assert!(
            refusal("interval = 15").starts_with("a.toml:1: `interval`: \"15\" is not a duration; write")
        );
        assert!(refusal("[disks]\ninclude = [1]").starts_with("a.toml:2: `disks.include`: invalid type"));
    }

    #[test]
    fn text_that_is_not_toml_is_refused_with_its_line() {
        assert!(
            refusal("workers = 1\nmemory =\n").starts_with("a.toml:2: "),
            "{}",
            refusal("workers = 1\nmemory =\n")
        );
        assert!(refusal("workers = 1\nworkers = 2\n").starts_with("a.toml:2: "));
    }

    #[test]
    fn later_checks_still_name_the_line() {
        let loaded: Loaded<Sample> =
            parse(Path::new("a.toml"), "\nworkers = 99\n[disks]\ninclude = [\"x\"]\n".to_owned()).unwrap();
        assert_eq!(loaded.in_range("workers", 4, &(1..=8)).unwrap(), 4);
        assert_eq!(
            loaded.in_range("workers", 99, &(1..=8)).unwrap_err().to_string(),
            "a.toml:2: `workers`: 99 is too large; write a value from 1 to 8"
        );
        assert_eq!(
            loaded.invalid("disks.include", "no", "yes").to_string(),
            "a.toml:4: `disks.include`: no; yes"
        );
        assert_eq!(loaded.invalid("memory", "no", "yes").to_string(), "a.toml: `memory`: no; yes");
    }

    #[test]
    fn a_missing_file_is_an_error_or_the_defaults_as_the_caller_says() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("none.toml");
        assert!(matches!(load::<Sample>(&path), Err(ConfigError::Missing { .. })));
        assert_eq!(load_or_default::<Sample>(&path).unwrap().raw.mode, Mode::Auto);
        assert!(matches!(load_or_default::<Sample>(dir.path()), Err(ConfigError::Read { .. })));
        std::fs::write(&path, [0xff, 0xfe]).unwrap();
        assert!(load::<Sample>(&path).unwrap_err().to_string().contains("UTF-8"));
    }

    proptest::proptest! {
        #[test]
        fn no_text_makes_the_loader_panic(text in "(memory|workers|disks|mode|\\[|\\]|\\.|=|\"|[0-9]| |\n){0,30}") {
            let _ = parse::<Sample>(Path::new("a.toml"), text);
        }
    }
}
