//! House rules that a machine can check, over the whole tree: file heads, lengths, floors, unsafe code, links.
//!
//! Called by `cargo test`. A rule that must be broken has its exception here, with the reason.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use reprotect_engine::format::message::ErrorCode;

/// Longest source file in lines; a longer one is two files.
const LINES_MAX: usize = 800;
/// Files that may be longer, and why.
const LONG: &[(&str, &str)] = &[];

/// Modules of the engine and their floors; a module uses its own and those on lower floors.
/// `host` and `net` stand side by side on the sixth floor with `sim`; see decision 0011.
const FLOORS: &[(&str, u8)] = &[
    ("error", 1),
    ("units", 1),
    ("mutants", 1),
    ("range_set", 2),
    ("checksum", 2),
    ("limits", 2),
    ("io", 3),
    ("dirty_map", 3),
    ("compress", 3),
    ("format", 4),
    ("proto", 5),
    ("store", 5),
    ("net", 6),
    ("host", 6),
    ("sim", 6),
];
/// Uses on one floor that are allowed; all others between neighbours are not.
const NEIGHBOURS: &[(&str, &str)] = &[];

/// Words that show where a file was written instead of what it says; split so that this file has none of them.
const PLACES: &[&str] =
    &[concat!("/work", "/"), concat!("/tmp", "/wt"), concat!("/home", "/"), concat!("/root", "/")];
/// Files in which such a path is an example for the reader.
const PLACES_ALLOWED: &[&str] = &[];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// Every file of the tree with one of these endings, by its path from the root; what is built or hidden is left out.
fn files(endings: &[&str]) -> Vec<(String, String)> {
    let (root, mut found) = (root(), Vec::new());
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if path.is_dir() {
                if !name.starts_with('.')
                    && !["target", "corpus", "artifacts", "__pycache__"].contains(&name.as_str())
                {
                    folders.push(path);
                }
            } else if endings.iter().any(|ending| name.ends_with(ending)) {
                let text =
                    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
                found.push((path.strip_prefix(&root).unwrap().display().to_string(), text));
            }
        }
    }
    found.sort();
    assert!(!found.is_empty());
    found
}

fn none(what: &str, findings: Vec<String>) {
    assert!(findings.is_empty(), "{what}:\n{}", findings.join("\n"));
}

#[test]
fn every_source_file_says_why_it_exists() {
    let silent = |(path, text): (String, String)| (!text.starts_with("//! ")).then_some(path);
    none("these files do not begin with `//!`", files(&[".rs"]).into_iter().filter_map(silent).collect());
}

#[test]
fn no_source_file_is_longer_than_the_limit() {
    let mut findings = Vec::new();
    for (path, text) in files(&[".rs"]) {
        let (lines, excused) = (text.lines().count(), LONG.iter().any(|(long, _)| *long == path));
        if lines > LINES_MAX && !excused {
            findings.push(format!("{path}: {lines} lines"));
        }
        if lines <= LINES_MAX && excused {
            findings.push(format!("{path} needs its exception no longer"));
        }
    }
    none("files are to be split", findings);
}

#[test]
fn nothing_is_left_to_do_in_the_code() {
    let words = [concat!("todo", "!("), concat!("unimplemented", "!("), concat!("dbg", "!(")];
    let mut findings = Vec::new();
    for (path, text) in files(&[".rs"]) {
        findings.extend(
            words.iter().filter(|word| text.contains(**word)).map(|word| format!("{path}: {word}…)")),
        );
    }
    none("unfinished code", findings);
}

#[test]
fn nothing_names_the_place_where_it_was_written() {
    let mut findings = Vec::new();
    for (path, text) in files(&[".rs", ".md", ".toml", ".sh", ".py", "Makefile"]) {
        for (number, line) in (1..).zip(text.lines()) {
            if PLACES.iter().any(|place| line.contains(place)) && !PLACES_ALLOWED.contains(&path.as_str()) {
                findings.push(format!("{path}:{number}: {}", line.trim()));
            }
        }
    }
    none("paths of one machine", findings);
}

/// Modules named after `crate::` in the code of a file; documentation may point upwards, code may not.
fn used_modules(text: &str) -> BTreeSet<String> {
    let mut used = BTreeSet::new();
    for line in text.lines().map(str::trim_start).filter(|line| !line.starts_with("//")) {
        for part in line.split("crate::").skip(1) {
            let names = part.strip_prefix('{').map_or(part, |list| list.split('}').next().unwrap_or(list));
            let list: Vec<&str> =
                if part.starts_with('{') { names.split(',').collect() } else { vec![names] };
            for name in list {
                let word: String =
                    name.trim().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
                used.insert(word);
            }
        }
    }
    used
}

#[test]
fn no_module_uses_a_floor_above_its_own() {
    let floor = |module: &str| FLOORS.iter().find(|(name, _)| *name == module).map(|(_, floor)| *floor);
    let mut findings = Vec::new();
    let mut seen = BTreeSet::new();
    for (path, text) in files(&[".rs"]) {
        let Some(inside) = path.strip_prefix("engine/src/").filter(|inside| *inside != "lib.rs") else {
            continue;
        };
        let own = inside.split(['/', '.']).next().unwrap();
        let Some(height) = floor(own) else {
            findings.push(format!("{path}: module {own} is on no floor"));
            continue;
        };
        seen.insert(own.to_owned());
        for used in used_modules(&text).iter().filter(|used| *used != own) {
            let allowed = match floor(used) {
                Some(below) if below < height => true,
                Some(same) => same == height && (height == 6 || NEIGHBOURS.contains(&(own, used.as_str()))),
                None => continue, // an item of the crate's root
            };
            if !allowed {
                findings.push(format!("{path} uses {used}"));
            }
        }
    }
    assert_eq!(seen.len(), FLOORS.len(), "every floor has its modules");
    none("uses that point up or across", findings);
}

#[test]
fn the_floors_in_the_crate_documentation_are_these() {
    let text = fs::read_to_string(root().join("engine/src/lib.rs")).unwrap();
    for (module, floor) in FLOORS {
        let row = format!("//! | {floor} |");
        let line = text.lines().find(|line| line.starts_with(&row)).unwrap_or_else(|| panic!("no row {row}"));
        assert!(line.contains(&format!("[`{module}`]")), "{module} is not on floor {floor} of lib.rs");
    }
}

#[test]
fn programs_do_not_know_one_another() {
    let programs = ["agent", "process-server", "master-target"];
    for own in programs {
        let manifest = fs::read_to_string(root().join(own).join("Cargo.toml")).unwrap();
        let dependencies = manifest.split("[dependencies]").nth(1).unwrap().split("\n[").next().unwrap();
        for other in programs {
            assert!(!dependencies.contains(&format!("reprotect-{other}")), "{own} depends on {other}");
        }
    }
}

#[test]
fn unsafe_code_gives_its_reasons() {
    let mut findings = Vec::new();
    let (block, lint) = (concat!("unsafe", " {"), concat!("expect(", "unsafe_code"));
    for (path, text) in files(&[".rs"]) {
        let lines: Vec<&str> = text.lines().collect();
        for (at, line) in lines.iter().enumerate() {
            let code = line.split("//").next().unwrap();
            if code.contains(block) && !is_explained(&lines, at) {
                findings.push(format!("{path}:{}: an unsafe block without SAFETY", at + 1));
            }
            let attribute = || lines[at..lines.len().min(at + 4)].concat();
            if code.contains(lint) && !attribute().contains("reason =") {
                findings.push(format!("{path}:{}: unsafe code is expected without a reason", at + 1));
            }
        }
    }
    none("unsafe code", findings);
}

/// Whether a SAFETY comment stands in the comment right above the statement that line `at` belongs to.
fn is_explained(lines: &[&str], at: usize) -> bool {
    let mut above = lines[..at].iter().rev().map(|line| line.trim());
    above.by_ref().take(3).any(|line| line.contains("SAFETY:"))
        || lines[at].contains("SAFETY:")
        || above.take_while(|line| line.starts_with("//")).any(|line| line.contains("SAFETY:"))
}

/// Targets of the links of a document, outside code blocks, with where they stand.
fn links(text: &str) -> Vec<(usize, String)> {
    let (mut found, mut in_code) = (Vec::new(), false);
    for (number, line) in (1..).zip(text.lines()) {
        if line.trim_start().starts_with("```") {
            in_code = !in_code;
        }
        if in_code {
            continue;
        }
        for part in line.split("](").skip(1) {
            found.push((number, part.split(')').next().unwrap().to_owned()));
        }
    }
    found
}

/// The anchor a heading gets.
fn anchor(heading: &str) -> String {
    let text = heading.trim_start_matches('#').trim().to_lowercase();
    let kept = text.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

#[test]
fn every_link_between_documents_leads_somewhere() {
    let mut findings = Vec::new();
    for (path, text) in files(&[".md"]) {
        for (number, link) in links(&text).into_iter().filter(|(_, link)| !link.contains("://")) {
            let (file, place) = link.split_once('#').unwrap_or((&link, ""));
            let own = root().join(&path);
            let target = if file.is_empty() { own } else { own.parent().unwrap().join(file) };
            let leads = if place.is_empty() || target.is_dir() {
                target.exists()
            } else {
                let text = fs::read_to_string(&target).unwrap_or_default();
                text.lines().any(|line| line.starts_with('#') && anchor(line) == place)
            };
            if !leads {
                findings.push(format!("{path}:{number}: {link}"));
            }
        }
    }
    none("links that lead nowhere", findings);
}

#[test]
fn every_document_can_be_reached() {
    let root = root();
    let mut linked = BTreeSet::new();
    for start in ["README.md", "engine/docs/architecture.md"] {
        let folder = root.join(start).parent().unwrap().to_owned();
        for (_, link) in links(&fs::read_to_string(root.join(start)).unwrap()) {
            let file = link.split('#').next().unwrap();
            linked.extend(folder.join(file).canonicalize());
        }
    }
    let mut findings = Vec::new();
    for (path, _) in files(&[".md"]).into_iter().filter(|(path, _)| path.starts_with("engine/docs/")) {
        if !linked.contains(&root.join(&path).canonicalize().unwrap()) {
            findings.push(path);
        }
    }
    none("documents that neither README.md nor architecture.md links to", findings);
}

/// Words of the documents that look like a source file of this tree.
fn source_paths(text: &str) -> impl Iterator<Item = &str> {
    let is_path = |word: &&str| {
        let ending = [".rs", ".sh", ".py"].iter().any(|ending| word.ends_with(ending));
        ending && word.contains('/') && !word.contains(['<', '*', '{', '…']) && !word.starts_with('/')
    };
    text.split(|c: char| c.is_whitespace() || "`()[],;:\"'|".contains(c)).filter(is_path)
}

#[test]
fn source_files_named_in_the_documents_exist() {
    let root = root();
    let mut findings = Vec::new();
    for (path, text) in files(&[".md"]) {
        for named in source_paths(&text) {
            let from_here = root.join(&path).parent().unwrap().join(named);
            if !root.join(named).exists() && !from_here.exists() {
                findings.push(format!("{path}: {named}"));
            }
        }
    }
    none("documents name files that are not there", findings);
}

#[test]
fn every_error_code_is_explained_to_operators() {
    let text = fs::read_to_string(root().join("engine/docs/operations.md")).unwrap();
    for row in ErrorCode::TABLE {
        let cell = format!("| {} | `{}` |", row.value, row.name);
        assert!(text.contains(&cell), "operations.md lacks the row {cell}");
    }
}

#[test]
fn decisions_are_numbered_and_dated() {
    let mut numbers = BTreeSet::new();
    for (path, text) in files(&[".md"]).into_iter().filter(|(path, _)| path.contains("docs/decisions/")) {
        let name = path.rsplit('/').next().unwrap();
        let number = name.get(..4).filter(|number| number.bytes().all(|byte| byte.is_ascii_digit()));
        let number = number.unwrap_or_else(|| panic!("{path} has no number of four digits"));
        assert!(numbers.insert(number.to_owned()), "{path}: number {number} is used twice");
        assert!(
            text.starts_with(&format!("# {number}: ")),
            "{path} does not begin with its number and title"
        );
        assert!(text.lines().nth(2).is_some_and(|line| line.starts_with("Date: 20")), "{path} has no date");
    }
}

/// Rows `| step | file | function |` of the tables that follow a write.
fn steps(text: &str) -> Vec<(String, String)> {
    let quoted = |cell: &str| Some(cell.trim().strip_prefix('`')?.strip_suffix('`')?.to_owned());
    let row = |line: &str| {
        let cells: Vec<&str> = line.split('|').collect();
        let (file, function) = (quoted(cells.get(2)?)?, quoted(cells.get(3)?)?);
        file.ends_with(".rs").then_some((file, function))
    };
    text.lines().filter_map(row).collect()
}

#[test]
fn the_path_of_one_write_names_functions_that_exist() {
    let mut findings = Vec::new();
    for document in ["README.md", "engine/docs/architecture.md"] {
        let steps = steps(&fs::read_to_string(root().join(document)).unwrap());
        assert!(steps.len() > 8, "{document} does not follow a write");
        for (file, function) in steps {
            let code = fs::read_to_string(root().join(&file)).unwrap_or_default();
            if !code.contains(&format!("fn {function}(")) {
                findings.push(format!("{document}: {file} has no function {function}"));
            }
        }
    }
    none("steps that are not in the code", findings);
}
