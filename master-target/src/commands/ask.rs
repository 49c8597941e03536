//! Asking the operator before something is destroyed.
//!
//! Invariants: only a plain `y` or `yes` is a yes; where nobody can answer (no terminal) nothing is assumed and
//! nothing waits. Used by the commands that overwrite, forget or lock out.

use std::io::{self, BufRead as _, IsTerminal as _, Write as _};

/// Whether somebody can answer: questions go to standard error, answers come from standard input.
#[must_use]
pub fn can_ask() -> bool {
    io::stdin().is_terminal() && io::stderr().is_terminal()
}

/// Asks; `false` for anything but yes.
///
/// # Errors
/// When the terminal cannot be read.
pub fn ask(question: &str) -> io::Result<bool> {
    write!(io::stderr().lock(), "{question} [y/N] ")?;
    let mut answer = String::new();
    io::stdin().lock().read_line(&mut answer)?;
    Ok(is_yes(&answer))
}

/// Lets a dangerous command go on: `--yes`, or a yes on the terminal.
///
/// # Errors
/// When the operator declined, or nobody can be asked.
pub fn confirm(yes: bool, question: &str) -> anyhow::Result<()> {
    if yes {
        return Ok(());
    }
    if !can_ask() {
        anyhow::bail!("{question} Nobody can be asked here: repeat with --yes");
    }
    if ask(question)? { Ok(()) } else { Err(anyhow::anyhow!("nothing was done")) }
}

fn is_yes(answer: &str) -> bool {
    ["y", "yes"].contains(&answer.trim().to_ascii_lowercase().as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_yes_is_yes() {
        assert!(["y", "Y\n", " yes \n", "YES"].iter().all(|answer| is_yes(answer)));
        assert!(["", "\n", "n", "no", "ye", "yes please", "j"].iter().all(|answer| !is_yes(answer)));
    }
}
