//! Tests that cannot run here say so, to people and to `cargo xtask test`.

use std::fs::OpenOptions;
use std::io::Write;

/// The variable that names the file in which skips are recorded.
const RECORD: &str = "KUN_SKIPS";

/// Records that the calling test was skipped, and why. The caller returns.
pub fn skip(because: &str) {
    let test = std::thread::current().name().unwrap_or("?").to_owned();
    println!("skipped, because {because}");
    if let Some(path) = std::env::var_os(RECORD) {
        let line = format!("{test}\t{because}\n");
        let written = OpenOptions::new()
            .append(true)
            .create(true)
            .open(&path)
            .and_then(|mut file| file.write_all(line.as_bytes()));
        // A skip that nobody hears of would look like a pass.
        written.unwrap_or_else(|e| panic!("{}: cannot record a skip: {e}", path.to_string_lossy()));
    }
}

/// `false`, with a skip recorded, unless root.
pub fn require_root() -> bool {
    let root = is_root();
    if !root {
        skip("it needs root");
    }
    root
}

/// `false`, with a skip recorded, unless the program is in PATH or an sbin directory.
pub fn require_tool(name: &str) -> bool {
    let path = std::env::var("PATH").unwrap_or_default();
    let found = path
        .split(':')
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin"])
        .any(|directory| std::path::Path::new(directory).join(name).is_file());
    if !found {
        skip(&format!(
            "{name} is not installed; `cargo xtask setup` brings it"
        ));
    }
    found
}

pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}
