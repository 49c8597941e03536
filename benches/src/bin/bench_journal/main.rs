//! How fast is the retention journal, and what does it cost? Figures of the store itself, on real files, without a network.
//!
//! `bench_journal FOLDER [PART …]` measures in FOLDER (which it creates and removes) and prints a table; the last line is
//! the same as JSON. Parts: `commit apply amplification mount inside grow`. Environment: `SIZE_MIB` (disk of the apply part,
//! 2048), `APPLY_MIB` (writes of the apply part, 192), `GROW` (records of the grow part, 300000), `EXTENTS` (of the
//! mount part, 10000000), `EPOCH_MIB` (of the inside part, 6000). Run by `make bench-journal` as a release build. Units stand in the names.
#![expect(clippy::expect_used, reason = "a benchmark stops where it cannot measure")]

mod amplification;
mod apply;
mod commit;
mod counting;
mod grow;
mod inside;
mod mount;
mod world;

use std::path::PathBuf;
use std::process::ExitCode;

/// A figure with its name, unit, and the goal it is held against.
struct Figure {
    name: String,
    value: f64,
    goal: Option<(char, f64)>,
}

/// The figures so far.
#[derive(Default)]
pub(crate) struct Report(Vec<Figure>);

impl Report {
    /// Notes a figure and prints it.
    fn note(&mut self, name: impl Into<String>, value: f64) {
        self.push(name.into(), value, None);
    }

    /// A figure that shall be at least (`'>'`) or at most (`'<'`) `goal`.
    fn held(&mut self, name: impl Into<String>, value: f64, against: char, goal: f64) {
        self.push(name.into(), value, Some((against, goal)));
    }

    fn push(&mut self, name: String, value: f64, goal: Option<(char, f64)>) {
        let met = match goal {
            None => String::new(),
            Some((against, goal)) => {
                let met = if against == '>' { value >= goal } else { value <= goal };
                format!("  goal {against}= {goal}: {}", if met { "met" } else { "MISSED" })
            }
        };
        println!("{name:<66} {value:>12.3}{met}");
        self.0.push(Figure { name, value, goal });
    }

    fn json(&self) -> serde_json::Value {
        let figures = self.0.iter().map(|figure| {
            let goal = figure.goal.map(|(against, goal)| format!("{against}= {goal}"));
            (figure.name.clone(), serde_json::json!({ "value": figure.value, "goal": goal }))
        });
        serde_json::Value::Object(figures.collect())
    }
}

/// A number from the environment.
fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(default)
}

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let Some(folder) = arguments.next().map(PathBuf::from) else {
        eprintln!("usage: bench_journal FOLDER [commit|apply|amplification|mount|inside|grow …]");
        return ExitCode::from(2);
    };
    let wanted: Vec<String> = arguments.collect();
    let mut report = Report::default();
    type Part = fn(&std::path::Path, &mut Report);
    let parts: [(&str, Part); 6] = [
        ("commit", commit::run),
        ("apply", apply::run),
        ("amplification", amplification::run),
        ("mount", mount::run),
        ("inside", inside::run),
        ("grow", grow::run),
    ];
    for (name, part) in parts {
        if wanted.is_empty() || wanted.iter().any(|part| part == name) {
            println!("-- {name}");
            let own = folder.join(name);
            std::fs::create_dir_all(&own).expect("a folder to measure in");
            part(&own, &mut report);
            std::fs::remove_dir_all(&own).expect("what was measured in is removed");
        }
    }
    println!("{}", report.json());
    ExitCode::SUCCESS
}
