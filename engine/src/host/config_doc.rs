//! The commented default configuration, generated from the types and one table of descriptions.
//!
//! Invariants: the defaults printed are the defaults used (they are serialised from `T::default()`); every key of
//! `T` has a description and every description a key, which [`undocumented`] derives from the type and the
//! programs' tests assert. Description lines begin with `# `, settings with `#` directly, so that removing that one
//! character from the settings gives a file equal to the defaults ([`uncommented`]).
//! Called by `check-config --print-default` of the three programs.

use std::fmt::Write as _;
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::config::{self, ConfigError};

/// What an operator needs to know about one key.
#[derive(Clone, Copy, Debug)]
pub struct KeyDoc {
    /// Dotted key; keys of one table stand together and after the plain ones.
    pub key: &'static str,
    /// What it does.
    pub about: &'static str,
    /// Unit and allowed values.
    pub unit: &'static str,
    /// What a larger or smaller value costs in memory, latency or throughput.
    pub cost: &'static str,
    /// A TOML value shown where the default is "not set"; empty otherwise.
    pub example: &'static str,
}

const PROBE: &str = "__probe__";

/// The commented default file.
///
/// # Errors
/// When `T` does not serialise to a TOML table, which is a defect of the type and not of any input.
pub fn render<T: Serialize + Default>(title: &str, keys: &[KeyDoc]) -> Result<String, toml::ser::Error> {
    let defaults = toml::Value::try_from(T::default())?;
    let mut text = format!(
        "# {title}\n# Every key with its default; remove the `#` before a key to change it. Unknown keys are refused.\n"
    );
    let mut table = "";
    for doc in keys {
        let (parent, name) = doc.key.rsplit_once('.').unwrap_or(("", doc.key));
        if parent != table {
            table = parent;
            let _ = write!(text, "\n[{table}]\n");
        }
        let value = doc.key.split('.').try_fold(&defaults, |value, part| value.get(part));
        let _ = write!(text, "\n# {}\n# Unit: {}. Cost: {}.\n", doc.about, doc.unit, doc.cost);
        match value {
            Some(value) => {
                let _ = writeln!(text, "#{name} = {value}");
            }
            // Two characters, so that the example is not taken for a default.
            None => {
                let _ = writeln!(text, "# Not set by default; for example: {name} = {}", doc.example);
            }
        }
    }
    Ok(text)
}

/// The table of `keys` for the manual, with the defaults that are used. Its place in a document is between
/// `<!-- keys:NAME -->` and `<!-- end -->`; each program's `tests/docs.rs` compares the two.
///
/// # Errors
/// As [`render`].
pub fn markdown<T: Serialize + Default>(keys: &[KeyDoc]) -> Result<String, toml::ser::Error> {
    let defaults = toml::Value::try_from(T::default())?;
    let cell = |text: &str| text.replace('|', "\\|");
    let mut text =
        "| key | default | unit and values | what it does | cost |\n|---|---|---|---|---|\n".to_owned();
    for KeyDoc { key, about, unit, cost, .. } in keys {
        let default = key.split('.').try_fold(&defaults, |value, part| value.get(part));
        let default = default.map_or_else(|| "not set".to_owned(), |value| format!("`{value}`"));
        let (unit, about, cost) = (cell(unit), cell(about), cell(cost));
        let _ = writeln!(text, "| `{key}` | {} | {unit} | {about} | {cost} |", cell(&default));
    }
    Ok(text)
}

/// `document` with the text between the markers of `name` replaced; `None` when it has no such markers.
#[must_use]
pub fn with_table(document: &str, name: &str, table: &str) -> Option<String> {
    let marker = format!("<!-- keys:{name} -->\n");
    let (before, after) = document.split_once(&marker)?;
    let (_, after) = after.split_once("<!-- end -->")?;
    Some(format!("{before}{marker}{table}<!-- end -->{after}"))
}

/// `rendered` with every setting active.
#[must_use]
pub fn uncommented(rendered: &str) -> String {
    let line = |line: &str| match line.strip_prefix('#') {
        Some(setting) if !setting.starts_with(' ') => setting.to_owned(),
        _ => line.to_owned(),
    };
    rendered.lines().map(line).collect::<Vec<_>>().join("\n")
}

/// Keys of `T` that `keys` does not describe and descriptions without a key; empty when both agree.
#[must_use]
pub fn undocumented<T: DeserializeOwned>(keys: &[KeyDoc]) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut expected = Vec::new();
    for name in known_keys::<T>("") {
        let prefix = format!("{name}.");
        if keys.iter().any(|doc| doc.key.starts_with(&prefix)) {
            expected.extend(known_keys::<T>(&name).into_iter().map(|inner| format!("{prefix}{inner}")));
        } else {
            expected.push(name);
        }
    }
    for key in &expected {
        match keys.iter().find(|doc| doc.key == key) {
            None => wrong.push(format!("`{key}` has no description")),
            Some(doc) if doc.about.is_empty() || doc.unit.is_empty() || doc.cost.is_empty() => {
                wrong.push(format!("`{key}` lacks text, unit or cost"));
            }
            Some(_) => {}
        }
    }
    for doc in keys.iter().filter(|doc| !expected.iter().any(|key| key == doc.key)) {
        wrong.push(format!("`{}` is described and does not exist", doc.key));
    }
    wrong
}

/// The keys `T` accepts in `table` (the root when empty), asked of the type itself with a key that cannot exist.
fn known_keys<T: DeserializeOwned>(table: &str) -> Vec<String> {
    let header = if table.is_empty() { String::new() } else { format!("[{table}]\n") };
    match config::parse::<T>(Path::new("probe"), format!("{header}{PROBE} = 0\n")) {
        Err(ConfigError::Invalid(invalid)) => {
            let known = invalid.remedy.rsplit_once("nown keys here: ").map_or("", |(_, list)| list);
            known.split('`').skip(1).step_by(2).map(str::to_owned).collect()
        }
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize, Serialize, PartialEq)]
    #[serde(deny_unknown_fields, default)]
    struct Sample {
        workers: u32,
        site: Option<String>,
        log: Log,
    }

    #[derive(Debug, Default, Deserialize, Serialize, PartialEq)]
    #[serde(deny_unknown_fields, default)]
    struct Log {
        level: String,
    }

    impl Default for Sample {
        fn default() -> Self {
            Self { workers: 4, site: None, log: Log { level: "info".to_owned() } }
        }
    }

    const fn doc(key: &'static str) -> KeyDoc {
        KeyDoc { key, about: "What", unit: "count", cost: "none", example: "\"x\"" }
    }

    #[test]
    fn the_rendered_defaults_parse_back_to_the_defaults() {
        let text = render::<Sample>("Sample", &[doc("workers"), doc("site"), doc("log.level")]).unwrap();
        assert!(text.contains("\n#workers = 4\n") && text.contains("[log]\n"), "{text}");
        assert!(text.contains("for example: site = \"x\""), "{text}");
        let file = uncommented(&text);
        assert!(file.contains("\nworkers = 4\n"), "{file}");
        assert_eq!(toml::from_str::<Sample>(&file).unwrap(), Sample::default());
    }

    #[test]
    fn missing_and_surplus_descriptions_are_found() {
        assert!(undocumented::<Sample>(&[doc("workers"), doc("site"), doc("log.level")]).is_empty());
        assert_eq!(
            undocumented::<Sample>(&[doc("workers"), doc("sites"), doc("log.level"), doc("log.colour")]),
            [
                "`site` has no description",
                "`sites` is described and does not exist",
                "`log.colour` is described and does not exist"
            ]
        );
    }
}
