//! The operator's wishes over the default selection: `disks.include` and `disks.exclude`.
//!
//! Invariants: exclude wins over include, include over the default; a wish that matches nothing is an error, because
//! the disk an operator named and mistyped would otherwise silently stay unprotected; two wishes for one device give
//! one source. Called by `run`, `enroll` and the `disks` command.

use std::path::Path;

use reprotect_engine::error::{Answer, Severity};

use super::{Disk, Source, SourceError, SystemRoot};

/// Why the wishes cannot be met.
#[derive(Debug, thiserror::Error)]
pub enum SelectError {
    /// A pattern matches no disk and is no image file.
    #[error(
        "disks.include: \"{pattern}\" matches no disk and is no image file; `reprotect-agent disks --all` lists the disks"
    )]
    NoMatch {
        /// The pattern.
        pattern: String,
    },
    /// A device that cannot be protected was named.
    #[error("disks.include: {name} cannot be protected: {reason}; remove it from the list")]
    Impossible {
        /// The device.
        name: String,
        /// Why.
        reason: String,
    },
    /// The device or image itself does not serve.
    #[error("disks.include: {0}")]
    Source(#[from] SourceError),
}

impl Answer for SelectError {
    fn severity(&self) -> Severity {
        Severity::Stop
    }
}

/// The sources to protect: those of `disks` selected by default, plus `include`, minus `exclude`.
///
/// # Errors
/// [`SelectError`]; patterns of `exclude` may match nothing.
pub fn select(
    root: &SystemRoot,
    disks: &[Disk],
    include: &[String],
    exclude: &[String],
) -> Result<Vec<Source>, SelectError> {
    let excluded = |disk: &Disk| is_excluded(root, disk, exclude);
    let mut images = Vec::new();
    let mut wanted: Vec<&Disk> = Vec::new();
    for pattern in include {
        let matching: Vec<&Disk> = disks.iter().filter(|disk| names(root, disk, pattern)).collect();
        if matching.is_empty() {
            images.push(other(root, pattern)?);
        }
        for disk in matching.into_iter().filter(|disk| !excluded(disk)) {
            if !disk.verdict.class.may_be_included() {
                // A wide pattern may well cover a CD drive; only a plain name is a wish that cannot be met.
                if is_pattern(pattern) {
                    continue;
                }
                let (name, reason) = (disk.name.clone(), disk.verdict.reason.clone());
                return Err(SelectError::Impossible { name, reason });
            }
            wanted.push(disk);
        }
    }
    let mut sources = Vec::new();
    for disk in disks {
        let named = wanted.iter().any(|wish| wish.name == disk.name);
        if (disk.verdict.selected || named) && !excluded(disk) {
            sources.push(Source::disk(disk)?);
        }
    }
    for image in images {
        let path = image.path.display().to_string();
        if !sources.contains(&image) && !exclude.iter().any(|pattern| glob(pattern, &path)) {
            sources.push(image);
        }
    }
    Ok(sources)
}

/// Whether a pattern of `exclude` names `disk`.
#[must_use]
pub fn is_excluded(root: &SystemRoot, disk: &Disk, exclude: &[String]) -> bool {
    exclude.iter().any(|pattern| names(root, disk, pattern))
}

/// A wish that is no listed disk: an image file by its path.
fn other(root: &SystemRoot, pattern: &str) -> Result<Source, SelectError> {
    if !pattern.contains('/') || is_pattern(pattern) {
        return Err(SelectError::NoMatch { pattern: pattern.to_owned() });
    }
    match Source::at(root, Path::new(pattern)) {
        Ok(source) => Ok(source),
        Err(SourceError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            Err(SelectError::NoMatch { pattern: pattern.to_owned() })
        }
        Err(error) => Err(error.into()),
    }
}

/// Whether `pattern` names `disk`: by kernel name, path, mapper name, WWID or any symlink below `/dev`.
fn names(root: &SystemRoot, disk: &Disk, pattern: &str) -> bool {
    let path = disk.path.display().to_string();
    let own = Path::new("/dev").join(&disk.name).display().to_string();
    let mapper = disk.mapper.as_ref().map(|mapper| mapper.name.as_str());
    let texts = [Some(disk.name.as_str()), Some(&path), Some(&own), mapper, disk.wwid.as_deref()];
    texts.into_iter().flatten().any(|text| glob(pattern, text))
        || (pattern.starts_with("/dev/") && root.device_name(pattern).as_deref() == Some(disk.name.as_str()))
}

fn is_pattern(text: &str) -> bool {
    text.contains(['*', '?'])
}

/// Whether `text` matches `pattern`, in which `*` stands for any characters and `?` for one.
fn glob(pattern: &str, text: &str) -> bool {
    let (pattern, text): (Vec<char>, Vec<char>) = (pattern.chars().collect(), text.chars().collect());
    let (mut at, mut seen) = (0, 0);
    // Where to go on when a mismatch follows: behind the last `*`, one character further.
    let mut retry: Option<(usize, usize)> = None;
    while seen < text.len() {
        match pattern.get(at) {
            Some('*') => {
                retry = Some((at + 1, seen));
                at += 1;
            }
            Some(c) if *c == '?' || text.get(seen) == Some(c) => {
                at += 1;
                seen += 1;
            }
            _ => match retry {
                Some((after, from)) => {
                    retry = Some((after, from + 1));
                    (at, seen) = (after, from + 1);
                }
                None => return false,
            },
        }
    }
    pattern.iter().skip(at).all(|c| *c == '*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_whole_names() {
        for (pattern, text, matches) in [
            ("sda", "sda", true),
            ("sda", "sdaa", false),
            ("sd*", "sdaa", true),
            ("sd?", "sdaa", false),
            ("*n1", "nvme0n1", true),
            ("a*b*c", "aXbXbc", true),
            ("*", "", true),
            ("", "x", false),
        ] {
            assert_eq!(glob(pattern, text), matches, "{pattern} {text}");
        }
    }
}
