//! The configuration table of the operations manual is the one of the program:
//! `UPDATE_GOLDEN=1 cargo test -p reprotect-process-server --test docs` rewrites it between its markers.

use std::path::Path;

use reprotect_engine::host::config_doc;
use reprotect_process_server::config::{KEYS, RawConfig};

#[test]
fn the_manual_lists_every_key_as_the_program_has_it() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../engine/docs/operations.md");
    let text = std::fs::read_to_string(&path).unwrap();
    let table = config_doc::markdown::<RawConfig>(&KEYS).unwrap();
    let right = config_doc::with_table(&text, "process-server", &table)
        .expect("markers of this program in the manual");
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, &right).unwrap();
    } else {
        assert!(right == text, "the manual drifted from KEYS; UPDATE_GOLDEN=1 rewrites its table");
    }
}
