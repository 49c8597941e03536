//! Errors as one line for people, each reason once; and the remedy told apart from it.
//!
//! Invariant: nothing of a chain of causes is lost, nothing is said twice. Used wherever an error is shown.

use reprotect_engine::store::target::TargetError;

/// The error and its causes, leaving out causes that its text names already.
#[must_use]
pub fn explain(error: &anyhow::Error) -> String {
    error.chain().fold(String::new(), |mut text, cause| {
        let cause = cause.to_string();
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
        text
    })
}

/// Reason and remedy of an error, as its text has them.
#[must_use]
pub fn reason_and_remedy(error: &anyhow::Error) -> (String, String) {
    let text = explain(error);
    // Targets write "reason: remedy", everything else "reason; remedy".
    let of_target = match error.downcast_ref::<TargetError>() {
        None | Some(TargetError::System { .. } | TargetError::Block(_)) => None,
        Some(_) => text.rsplit_once(": "),
    };
    let (reason, remedy) =
        of_target.or_else(|| text.split_once("; ")).unwrap_or((&text, "see the daemon's log"));
    (reason.to_owned(), remedy.to_owned())
}

#[cfg(test)]
mod tests {
    use anyhow::{Context as _, anyhow};

    use super::*;

    #[test]
    fn causes_are_named_once_and_remedies_told_apart() {
        let refused = || std::io::Error::other("refused");
        let error = anyhow!(refused()).context("cannot open a: refused");
        assert_eq!(explain(&error), "cannot open a: refused");
        let error = Err::<(), _>(refused()).context("cannot open b").expect_err("an error");
        assert_eq!(explain(&error), "cannot open b: refused");
        let parts = |error| {
            let (reason, remedy) = reason_and_remedy(&error);
            (reason.leak() as &str, remedy.leak() as &str)
        };
        assert_eq!(parts(anyhow!("it is odd; even it out")), ("it is odd", "even it out"));
        let exists = TargetError::Exists { path: "/a: b".into() };
        let (reason, remedy) = parts(exists.into());
        assert_eq!(reason, "/a: b exists already");
        assert!(remedy.starts_with("choose another name"));
    }
}
