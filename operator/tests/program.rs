//! The program as an init system sees it: exit codes, lines on stderr, and a life of following the folder.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use kun_harness::wait_for;

const WITHIN: Duration = Duration::from_secs(20);

fn write_config(dir: &Path, more: &str) -> PathBuf {
    let manifests = dir.join("manifests");
    fs::create_dir_all(&manifests).expect("writable");
    let config = dir.join("kun.yaml");
    let text = format!(
        "cluster: {{folder: {}}}\noperator: {{metrics: \"[::1]:0\"}}\n{more}",
        manifests.display()
    );
    fs::write(&config, text).expect("writable");
    config
}

fn operator(config: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kun-operator"));
    command.arg("--config").arg(config).env_remove("RUST_LOG");
    command
}

fn once(config: &Path) -> Output {
    operator(config).arg("--once").output().expect("runs")
}

fn node(dir: &Path, name: &str) {
    let text = format!("{{apiVersion: v1, kind: Node, metadata: {{name: {name}}}}}");
    let new = dir.join(".new");
    fs::write(&new, text).expect("writable");
    fs::rename(&new, dir.join("manifests").join(format!("{name}.yaml"))).expect("renamed");
}

/// Killed when the test ends, however it ends.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn check_config_says_ok_or_every_fault() {
    let dir = tempfile::tempdir().expect("a directory");
    let good = write_config(dir.path(), "");
    let output = operator(&good)
        .arg("--check-config")
        .output()
        .expect("runs");
    assert_eq!(
        (output.status.code(), output.stdout.as_slice()),
        (Some(0), b"ok\n".as_slice())
    );
    let bad = write_config(dir.path(), "node: {nam: x}\nbgp: {asn: 0}\n");
    let output = operator(&bad).arg("--check-config").output().expect("runs");
    assert_eq!(output.status.code(), Some(1));
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(told.lines().count(), 2, "{told}");
    assert!(
        told.contains("kun.yaml:3:8: node.nam: unknown field; did you mean `name`?"),
        "{told}"
    );
}

#[test]
fn once_is_0_when_all_is_given_and_1_when_something_lacks() {
    let dir = tempfile::tempdir().expect("a directory");
    let config = write_config(dir.path(), "ipam: {v6OnlyPool: 240.0.0.0/26}\n");
    node(dir.path(), "a");
    assert_eq!(once(&config).status.code(), Some(0));
    node(dir.path(), "b");
    let output = once(&config);
    assert_eq!(output.status.code(), Some(1));
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        told.contains("node b has 0 of 1 IPv6-only blocks"),
        "{told}"
    );
}

#[test]
fn a_missing_folder_is_one_clear_line() {
    let dir = tempfile::tempdir().expect("a directory");
    let config = write_config(dir.path(), "");
    fs::remove_dir(dir.path().join("manifests")).expect("empty");
    let output = once(&config);
    assert_eq!(output.status.code(), Some(1));
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(told.lines().count(), 1, "{told}");
    assert!(
        told.contains("the manifest folder cannot be read"),
        "{told}"
    );
}

#[test]
fn it_follows_the_folder_and_heals_after_kill_9() {
    let dir = tempfile::tempdir().expect("a directory");
    let config = write_config(dir.path(), "");
    let blocks = dir.path().join("manifests/kun-generated/ipam-blocks.yaml");
    let owns = |name: &str| {
        fs::read_to_string(&blocks).is_ok_and(|text| text.contains(&format!("node: \"{name}\"")))
    };
    for round in ["one", "two"] {
        // The second round begins after the first was killed: its lock is gone with it.
        let _running = Running(
            operator(&config)
                .stderr(Stdio::null())
                .spawn()
                .expect("runs"),
        );
        node(dir.path(), round);
        wait_for("a block for the node", WITHIN, || owns(round).then_some(())).expect("in time");
    }
    assert!(owns("one") && owns("two"));
}

#[test]
fn logs_are_json_where_asked() {
    let dir = tempfile::tempdir().expect("a directory");
    let config = write_config(dir.path(), "agent: {logFormat: json}\n");
    node(dir.path(), "a");
    let output = once(&config);
    let lines: Vec<_> = BufReader::new(output.stderr.as_slice())
        .lines()
        .map_while(Result::ok)
        .collect();
    assert!(!lines.is_empty());
    for line in lines {
        let value: serde_json::Value =
            serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line}"));
        assert_eq!(value["message"], "block assigned", "{line}");
        assert_eq!(value["node"], "a", "{line}");
    }
}
