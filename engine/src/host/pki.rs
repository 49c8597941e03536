//! The `[pki]` table: a site's own certificates instead of those the master target's CA issues.
//!
//! Invariants: all three files are named or none; paths are absolute. Units: paths. Used by the three programs'
//! configurations; the files themselves are read and judged by `net::credentials`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::config::{ConfigError, Loaded};
use super::config_doc::KeyDoc;

/// The `[pki]` table as written.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PkiConfig {
    /// Certificate chain, leaf first.
    pub certificate: Option<PathBuf>,
    /// Its private key.
    pub key: Option<PathBuf>,
    /// The certificates to trust.
    pub roots: Option<PathBuf>,
}

/// The descriptions of the table's keys.
pub const PKI_KEYS: [KeyDoc; 3] = [
    KeyDoc {
        key: "pki.certificate",
        about: "Certificate chain of the site's own PKI, leaf first, instead of enrolment; its URI name must be reprotect://SITE/ROLE/UUID.",
        unit: "absolute path of a PEM file",
        cost: "renewal is yours: replace the file and restart the daemon before the certificate expires",
        example: "\"/etc/reprotect/certificate.pem\"",
    },
    KeyDoc {
        key: "pki.key",
        about: "Private key of that certificate (ECDSA P-256, PKCS#8).",
        unit: "absolute path of a PEM file of mode 0600",
        cost: "none",
        example: "\"/etc/reprotect/key.pem\"",
    },
    KeyDoc {
        key: "pki.roots",
        about: "Certificates of the authorities whose peers are believed.",
        unit: "absolute path of a PEM file with 1 to 16 certificates",
        cost: "whoever these authorities certify for this site may speak",
        example: "\"/etc/reprotect/roots.pem\"",
    },
];

/// Certificate, key and roots, in this order, or none where the table is empty.
///
/// # Errors
/// When only some of the keys are set, or a path is relative.
pub fn resolve<T>(loaded: &Loaded<T>, config: &PkiConfig) -> Result<Option<[PathBuf; 3]>, ConfigError> {
    let (certificate, key, roots) = match (&config.certificate, &config.key, &config.roots) {
        (None, None, None) => return Ok(None),
        (Some(certificate), Some(key), Some(roots)) => (certificate, key, roots),
        (None, ..) => return Err(missing(loaded, "pki.certificate")),
        (_, None, _) => return Err(missing(loaded, "pki.key")),
        (.., None) => return Err(missing(loaded, "pki.roots")),
    };
    for (name, path) in [("pki.certificate", certificate), ("pki.key", key), ("pki.roots", roots)] {
        if path.is_relative() {
            let what = format!("{} is a relative path", path.display());
            return Err(loaded.invalid(name, what, "write an absolute one"));
        }
    }
    Ok(Some([certificate.clone(), key.clone(), roots.clone()]))
}

fn missing<T>(loaded: &Loaded<T>, key: &str) -> ConfigError {
    loaded.invalid(
        key,
        "not set while another key of [pki] is",
        "set all three of certificate, key and roots, or none",
    )
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::host::config;

    #[derive(Debug, Default, Deserialize)]
    #[serde(deny_unknown_fields, default)]
    struct Raw {
        pki: PkiConfig,
    }

    fn parse(text: &str) -> Result<Option<[PathBuf; 3]>, ConfigError> {
        let loaded = config::parse::<Raw>(Path::new("t.toml"), text.to_owned())?;
        resolve(&loaded, &loaded.raw.pki)
    }

    #[test]
    fn all_three_files_or_none() {
        assert_eq!(parse("").unwrap(), None);
        let all = "[pki]\ncertificate = \"/c\"\nkey = \"/k\"\nroots = \"/r\"\n";
        assert_eq!(parse(all).unwrap(), Some(["/c", "/k", "/r"].map(PathBuf::from)));
        let error = parse("[pki]\ncertificate = \"/c\"\nroots = \"/r\"\n").unwrap_err().to_string();
        assert!(error.contains("pki.key") && error.contains("all three"), "{error}");
        assert!(parse(&all.replace("/r", "r")).unwrap_err().to_string().contains("relative"));
    }
}
