//! What every source file must have, and what some may not.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::arrows;

/// Most lines of code in a file, without tests, comments and blank lines.
const LONGEST: usize = 600;

/// Files that may be longer, each with its reason.
const LONG: &[(&str, &str)] = &[
    (
        "bgp/src/session.rs",
        "one task: what follows from each event of the state machine stands together",
    ),
    (
        "cni/core/tests/ipam_oracle.rs",
        "a second reading of every rule, as naive as can be, beside the histories that compare the two",
    ),
    (
        "cluster/core/tests/watch_sim.rs",
        "one simulated cluster, the properties that it keeps, and the histories that once broke them",
    ),
    ("ebpf/loader/tests/nat64_cases.rs", "a table of packets"),
    (
        "ebpf/loader/tests/packets.rs",
        "packets in, packets out, one rig",
    ),
    (
        "proxy/core/src/planner.rs",
        "the order of its ops is one argument, which its tests break at every point",
    ),
];

/// Folders that hold no source of ours.
const NOT_OURS: &[&str] = &["target", ".git", "node_modules"];

/// In the sources of a core: a file, a socket, a clock, or chance.
const IMPURE: &[&str] = &[
    "std::fs",
    "std::process",
    "std::thread",
    "std::env::var",
    "TcpStream",
    "TcpListener",
    "UdpSocket",
    "UnixStream",
    "SystemTime",
    "Instant::now",
    "tokio::",
    "RandomState",
];

/// In any file: the wall clock, which jumps when somebody sets it. Durations are measured with CLOCK_MONOTONIC or CLOCK_BOOTTIME.
const WALL_CLOCK: &[&str] = &[
    "SystemTime",
    "Timestamp::now",
    "Zoned::now",
    "Utc::now",
    "ClockId::Realtime",
    "CLOCK_REALTIME",
];

/// Files that write the time of day into an object, for people to read.
const TELLS_TIME: &[(&str, &str)] = &[
    (
        "cluster/src/api/write.rs",
        "renewTime of Leases and lastTransitionTime of conditions that are written from here",
    ),
    (
        "operator/src/claims.rs",
        "lastTransitionTime of a pool's conditions",
    ),
    (
        "operator/src/elect.rs",
        "acquireTime and renewTime of the lease; candidates measure since when they saw a change",
    ),
    ("operator/src/events.rs", "eventTime"),
];

/// In any file: what belongs to one machine or to nobody.
const PLACES: &[&str] = &["/home/", "/root/", "/Users/"];

/// Module names that say nothing.
const EMPTY_NAMES: &[&str] = &["utils", "util", "common", "helpers", "helper", "misc"];

/// Every `.rs` file, with its path from the root.
pub(super) fn rust_files(root: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    collect(root, root, &mut files)?;
    files.sort();
    Ok(files)
}

fn collect(root: &Path, directory: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in
        fs::read_dir(directory).with_context(|| format!("reading {}", directory.display()))?
    {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let kind = entry.file_type()?;
        if kind.is_dir() && !NOT_OURS.contains(&name.as_ref()) {
            collect(root, &entry.path(), files)?;
        } else if kind.is_file() && name.ends_with(".rs") {
            files.push(
                entry
                    .path()
                    .strip_prefix(root)
                    .unwrap_or(&entry.path())
                    .to_owned(),
            );
        }
    }
    Ok(())
}

/// A crate's folder and name, for those that are pure.
fn pure_folders() -> BTreeMap<&'static str, &'static str> {
    let folders = [
        ("kun-config", "config/src"),
        ("kun-cluster-core", "cluster/core/src"),
        ("kun-ebpf-abi", "ebpf/abi/src"),
        ("kun-cni-core", "cni/core/src"),
        ("kun-proxy-core", "proxy/core/src"),
        ("kun-dns-core", "dns64/core/src"),
        ("kun-bgp-core", "bgp/core/src"),
    ];
    folders
        .into_iter()
        .filter(|(name, _)| arrows::PURE.contains(name))
        .map(|(name, folder)| (folder, name))
        .collect()
}

pub(super) fn check(root: &Path, files: &[PathBuf], wrong: &mut Vec<String>) -> Result<()> {
    let pure = pure_folders();
    for file in files {
        let text = fs::read_to_string(root.join(file))
            .with_context(|| format!("reading {}", file.display()))?;
        let path = file.to_string_lossy().into_owned();
        check_file(
            &path,
            &text,
            pure.iter().any(|(folder, _)| path.starts_with(folder)),
            wrong,
        );
    }
    for (path, _reason) in LONG.iter().chain(TELLS_TIME) {
        if !root.join(path).exists() {
            wrong.push(format!(
                "xtask/src/tidy/sources.rs names {path}, which does not exist"
            ));
        }
    }
    Ok(())
}

fn check_file(path: &str, text: &str, pure: bool, wrong: &mut Vec<String>) {
    if !text
        .lines()
        .find(|line| !line.trim().is_empty())
        .is_some_and(|line| line.starts_with("//!"))
    {
        wrong.push(format!(
            "{path}:1: opens without `//!`: what it owns, what it refuses, the RFC"
        ));
    }
    let stem = Path::new(path)
        .file_stem()
        .unwrap_or_default()
        .to_string_lossy();
    if EMPTY_NAMES.contains(&stem.as_ref()) {
        wrong.push(format!("{path}: a module is named after what it owns"));
    }
    let code = Code::of(text);
    let may_be_unsafe = path.starts_with("ebpf/") || path.ends_with("/sys.rs");
    // This file must name what it forbids.
    let is_this = path == "xtask/src/tidy/sources.rs";
    let tells_time = is_this || TELLS_TIME.iter().any(|(teller, _)| *teller == path);
    for (number, line) in &code.lines {
        if !may_be_unsafe && !is_this && has_word(line, "unsafe") && !line.contains("unsafe_code") {
            wrong.push(format!(
                "{path}:{number}: `unsafe` belongs in ebpf/ or in one sys.rs a shell"
            ));
        }
        if !is_this && let Some(place) = PLACES.iter().find(|place| line.contains(**place)) {
            wrong.push(format!(
                "{path}:{number}: {place} is a place on one machine"
            ));
        }
        if !tells_time
            && !pure
            && let Some(clock) = WALL_CLOCK.iter().find(|clock| line.contains(**clock))
        {
            wrong.push(format!(
                "{path}:{number}: {clock} jumps when somebody sets the clock; measure with `Instant` or CLOCK_BOOTTIME"
            ));
        }
        if path.starts_with("proxy/src/")
            && path != "proxy/src/main.rs"
            && !path.starts_with("proxy/src/agent/")
        {
            for (_, module) in arrows::MAIN_ONLY {
                if has_word(line, module) {
                    wrong.push(format!(
                        "{path}:{number}: {module} is joined in main.rs and agent/ alone"
                    ));
                }
            }
        }
        // One that is given its seed is as pure as the seed.
        let seeded = line.replace("SeedableRandomState", "");
        if pure && let Some(token) = IMPURE.iter().find(|token| seeded.contains(**token)) {
            wrong.push(format!(
                "{path}:{number}: {token} in a core; let the shell hand it in"
            ));
        }
    }
    let allowed = LONG.iter().any(|(long, _)| *long == path);
    if code.lines.len() > LONGEST && !allowed {
        wrong.push(format!(
            "{path}: {} lines of code; split it, or give its reason in xtask/src/tidy/sources.rs",
            code.lines.len()
        ));
    }
}

/// The lines of code: no comments, no blank lines, nothing from `#[cfg(test)]` `mod` on.
struct Code<'a> {
    lines: Vec<(usize, &'a str)>,
}

impl<'a> Code<'a> {
    fn of(text: &'a str) -> Self {
        let mut lines = Vec::new();
        let mut after_cfg_test = false;
        for (index, line) in text.lines().enumerate() {
            let trimmed = line.trim();
            if after_cfg_test && trimmed.starts_with("mod ") && trimmed.ends_with('{') {
                break;
            }
            after_cfg_test =
                trimmed == "#[cfg(test)]" || (after_cfg_test && trimmed.starts_with("#["));
            let code = trimmed.split(" // ").next().unwrap_or_default();
            if code.is_empty() || code.starts_with("//") {
                continue;
            }
            lines.push((index + 1, code));
        }
        Self { lines }
    }
}

fn has_word(line: &str, word: &str) -> bool {
    line.split(|c: char| !(c.is_alphanumeric() || c == '_'))
        .any(|w| w == word)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn faults(path: &str, text: &str, pure: bool) -> Vec<String> {
        let mut wrong = Vec::new();
        check_file(path, text, pure, &mut wrong);
        wrong
    }

    #[test]
    fn a_good_file_has_no_fault() {
        let good = "//! Slots.\n\nfn f() {}\n// unsafe is only a word here\n#[cfg(test)]\nmod tests {\n use std::fs;\n}\n";
        assert_eq!(
            faults("cni/core/src/slot.rs", good, true),
            Vec::<String>::new()
        );
    }

    #[test]
    fn each_fault_is_seen() {
        for (path, text, pure, fault) in [
            ("a/src/x.rs", "fn f() {}\n", false, "opens without"),
            (
                "a/src/utils.rs",
                "//! x\n",
                false,
                "named after what it owns",
            ),
            (
                "a/src/x.rs",
                "//! x\nunsafe { f() }\n",
                false,
                "`unsafe` belongs",
            ),
            (
                "a/src/x.rs",
                "//! x\nlet p = \"/root/x\";\n",
                false,
                "one machine",
            ),
            (
                "cni/core/src/x.rs",
                "//! x\nlet t = Instant::now();\n",
                true,
                "in a core",
            ),
            (
                "cni/src/x.rs",
                "//! x\nlet t = SystemTime::now();\n",
                false,
                "sets the clock",
            ),
            (
                "proxy/src/x.rs",
                "//! x\nuse kun_bgp::Speaker;\n",
                false,
                "main.rs and agent/",
            ),
        ] {
            let faults = faults(path, text, pure);
            assert!(
                faults.len() == 1 && faults[0].contains(fault),
                "{path}: {faults:?}"
            );
        }
        let long = format!("//! x\n{}", "f();\n".repeat(LONGEST + 1));
        assert!(faults("a/src/x.rs", &long, false)[0].contains("601 lines of code"));
        assert_eq!(
            faults("ebpf/loader/src/x.rs", "//! x\nunsafe { f() }\n", false),
            Vec::<String>::new()
        );
        assert_eq!(
            faults("cni/src/sys.rs", "//! x\nunsafe { f() }\n", false),
            Vec::<String>::new()
        );
    }
}
