//! Small files that must survive a power cut: replaced as a whole, read with a bound.
//!
//! Invariants: after a crash at any moment the path names the old content or the new, never a mixture and never
//! nothing; when [`replace_file`] returned, it is the new. The only function of its kind in the tree: settings,
//! keys, certificates, progress and descriptors all go through it. A crash may leave a `.name.*.tmp` behind, which
//! nothing ever reads. Units: bytes. Blocking; called from threads, not from an async runtime.

use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::error::{Answer, Severity};

/// Who may read a replaced file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Everyone may read (0644, less the umask).
    Public,
    /// Only the owner may read (0600): keys, tokens, state.
    Private,
    /// Whoever could read the file that is replaced; everyone where there is none.
    AsBefore,
}

/// A file that could not be replaced, made or read; names it, the step and the reason.
#[derive(Debug, thiserror::Error)]
#[error("cannot {step} {}: {source}", path.display())]
pub struct DurableError {
    /// What was being done.
    pub step: &'static str,
    /// The file or directory.
    pub path: PathBuf,
    /// The operating system's reason.
    #[source]
    pub source: io::Error,
}

impl DurableError {
    /// Whether there is no such file.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        self.source.kind() == ErrorKind::NotFound
    }
}

impl Answer for DurableError {
    fn severity(&self) -> Severity {
        match self.source.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Severity::Retry,
            _ => Severity::Stop,
        }
    }
}

/// Replaces the content of `path`, or creates it, durably; a symbolic link is replaced, not followed.
///
/// # Errors
/// When any step fails. The old content is then still in place; only if the last step, making the directory
/// durable, failed is it open which of the two a crash would leave.
pub fn replace_file(path: &Path, bytes: &[u8], access: Access) -> Result<(), DurableError> {
    let fail = |step, path: &Path| {
        let path = path.to_owned();
        move |source| DurableError { step, path, source }
    };
    let Some(name) = path.file_name() else {
        return Err(fail("replace", path)(io::Error::new(ErrorKind::InvalidInput, "it names no file")));
    };
    // Random, so that two replacements at once cannot write into one temporary file.
    let mut random = [0_u8; 8];
    getrandom::fill(&mut random).map_err(|error| fail("replace", path)(io::Error::other(error)))?;
    let mut temporary_name = std::ffi::OsString::from(".");
    temporary_name.push(name);
    temporary_name.push(format!(".{:016x}.tmp", u64::from_le_bytes(random)));
    let directory = parent(path);
    let temporary = directory.join(temporary_name);
    let permissions = match access {
        Access::AsBefore => std::fs::metadata(path).ok().map(|old| old.permissions()),
        Access::Public | Access::Private => None,
    };
    let result = write_new(&temporary, bytes, access, permissions)
        .map_err(fail("write the temporary file", &temporary))
        .and_then(|()| std::fs::rename(&temporary, path).map_err(fail("replace", path)));
    if result.is_err() {
        let _ = std::fs::remove_file(&temporary); // the first error is the one to report
    }
    result?;
    sync_directory(directory).map_err(fail("make durable the directory", directory))
}

/// Removes a file, durably: after a power cut it does not come back. One that is not there is fine.
///
/// # Errors
/// When it cannot be removed, or that cannot be made durable.
pub fn remove_file_durable(path: &Path) -> Result<(), DurableError> {
    let fail = |step| move |source| DurableError { step, path: path.to_owned(), source };
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(fail("remove")(error)),
        _ => {}
    }
    sync_directory(parent(path)).map_err(fail("make durable the directory of"))
}

/// Makes the directory `path` and its missing parents, readable by the owner only, durably. No error if it exists.
///
/// # Errors
/// When a directory cannot be made or made durable, or something else is in the way.
pub fn create_dir_durable(path: &Path) -> Result<(), DurableError> {
    let fail = |step| move |source| DurableError { step, path: path.to_owned(), source };
    if path.is_dir() {
        return Ok(());
    }
    let above = parent(path);
    if above != path && !above.is_dir() {
        create_dir_durable(above)?;
    }
    match DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => {}
        // Made by someone else meanwhile; made durable here all the same.
        Err(error) if error.kind() == ErrorKind::AlreadyExists && path.is_dir() => {}
        Err(error) => return Err(fail("create the directory")(error)),
    }
    sync_directory(path).and_then(|()| sync_directory(above)).map_err(fail("make durable the directory"))
}

/// Reads a whole file of at most `bytes_max` bytes.
///
/// # Errors
/// When it cannot be read (see [`DurableError::is_not_found`]) or is larger.
pub fn read_bounded(path: &Path, bytes_max: u64) -> Result<Vec<u8>, DurableError> {
    let fail = |source| DurableError { step: "read", path: path.to_owned(), source };
    let file = File::open(path).map_err(fail)?;
    let mut bytes = Vec::new();
    // The bound counts what is read, not what the length says: that may change, and devices have none.
    file.take(bytes_max.saturating_add(1)).read_to_end(&mut bytes).map_err(fail)?;
    if bytes.len() as u64 > bytes_max {
        let why = format!("larger than {bytes_max} bytes; it is not a file of ours");
        return Err(fail(io::Error::new(ErrorKind::FileTooLarge, why)));
    }
    Ok(bytes)
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        Some(_) => Path::new("."),
        None => path, // the root
    }
}

fn write_new(path: &Path, bytes: &[u8], access: Access, permissions: Option<Permissions>) -> io::Result<()> {
    let mode = if access == Access::Private { 0o600 } else { 0o644 };
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
    if let Some(permissions) = permissions {
        file.set_permissions(permissions)?;
    }
    file.write_all(bytes)?;
    file.sync_all()
}

fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> = std::fs::read_dir(dir)
            .expect("list")
            .map(|entry| entry.expect("entry").file_name().into_string().expect("UTF-8"))
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_replaced_as_before_keeps_its_permissions() {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("disk.vmdk");
        replace_file(&path, b"one", Access::AsBefore).expect("new");
        std::fs::set_permissions(&path, Permissions::from_mode(0o640)).expect("mode");
        replace_file(&path, b"two", Access::AsBefore).expect("replaced");
        assert_eq!(std::fs::metadata(&path).expect("metadata").permissions().mode() & 0o777, 0o640);
    }

    #[test]
    fn replaces_whole_files_and_leaves_nothing_else_behind() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("state");
        for content in [&b"first, and longer"[..], b"second", b""] {
            replace_file(&path, content, Access::Private).expect("replace");
            assert_eq!(read_bounded(&path, 100).expect("read"), content);
        }
        assert_eq!(names(dir.path()), ["state"]);
        assert_eq!(std::fs::metadata(&path).expect("metadata").permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_failed_replacement_keeps_the_old_content_and_removes_its_temporary_file() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("taken");
        std::fs::create_dir(&path).expect("a directory in the way");
        let error = replace_file(&path, b"new", Access::Public).expect_err("a directory cannot be replaced");
        assert!(error.to_string().contains("taken"), "{error}");
        assert_eq!(names(dir.path()), ["taken"]);
        assert!(replace_file(&dir.path().join("missing/file"), b"", Access::Public).is_err());
        assert!(replace_file(Path::new("/"), b"", Access::Public).is_err());
    }

    #[test]
    fn concurrent_replacements_leave_one_whole_content() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("state");
        std::thread::scope(|scope| {
            for fill in 1..=4_u8 {
                let path = &path;
                scope.spawn(move || {
                    for _ in 0..10 {
                        replace_file(path, &[fill; 5000], Access::Public).expect("replace");
                    }
                });
            }
        });
        let content = read_bounded(&path, 5000).expect("read");
        assert_eq!(content.len(), 5000);
        assert!(content.iter().all(|byte| *byte == content[0]));
        assert_eq!(names(dir.path()), ["state"]);
    }

    #[test]
    fn directories_are_made_with_their_parents_and_existing_ones_accepted() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("a/b/c");
        create_dir_durable(&path).expect("create");
        create_dir_durable(&path).expect("again");
        assert!(path.is_dir());
        std::fs::write(path.join("file"), b"").expect("write");
        assert!(create_dir_durable(&path.join("file")).is_err());
    }

    #[test]
    fn reading_is_bounded_and_tells_missing_from_broken() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("file");
        std::fs::write(&path, [7; 10]).expect("write");
        assert_eq!(read_bounded(&path, 10).expect("fits"), [7; 10]);
        assert_eq!(read_bounded(&path, 9).expect_err("too large").source.kind(), ErrorKind::FileTooLarge);
        assert!(read_bounded(&dir.path().join("none"), 9).expect_err("missing").is_not_found());
        assert!(read_bounded(Path::new("/dev/zero"), 1000).is_err(), "endless");
    }
}
