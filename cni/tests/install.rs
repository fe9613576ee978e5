//! Placing the plugin on a host: what stands after a kill at any step, beside foreign files, over a running plugin.

#![allow(missing_docs)]

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use kun_cni::install::{InstallError, LIST, Lists, Wanted, install, uninstall};
use kun_harness::wait_for;

/// A test that runs itself again finds here what to do, and where.
const CHILD: &str = "KUN_TEST_INSTALL";

/// A host's directories.
struct Host(tempfile::TempDir);

impl Host {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn bin(&self) -> PathBuf {
        self.0.path().join("opt/cni/bin")
    }

    fn conf(&self) -> PathBuf {
        self.0.path().join("etc/cni/net.d")
    }

    /// Every file below, with its content.
    fn files(&self) -> BTreeMap<String, Vec<u8>> {
        let mut found = BTreeMap::new();
        let mut look = vec![self.0.path().to_owned()];
        while let Some(dir) = look.pop() {
            for entry in fs::read_dir(dir).unwrap().flatten() {
                if entry.file_type().unwrap().is_dir() {
                    look.push(entry.path());
                } else {
                    let name = entry.path();
                    let name = name.strip_prefix(self.0.path()).unwrap();
                    let content = fs::read(entry.path()).unwrap_or_default();
                    found.insert(name.to_string_lossy().into_owned(), content);
                }
            }
        }
        found
    }

    fn names(&self) -> Vec<String> {
        self.files().into_keys().collect()
    }
}

/// What version `version` places: each file differs from that of another version.
fn wanted(bin: &Path, conf: &Path, version: &str) -> Vec<Wanted> {
    let source = tempfile::tempdir().unwrap();
    let plugin = source.path().join("kun-cni");
    fs::write(&plugin, format!("plugin {version}").repeat(10_000)).unwrap();
    let lists = Lists::new(conf, LIST).unwrap();
    let list = source.path().join("list");
    fs::write(
        &list,
        format!(
            r#"{{"cniVersion":"1.1.0","name":"kun","version":"{version}","plugins":[{{"type":"kun-cni","kunConfig":"{}"}}]}}"#,
            conf.join("kun/kun.yaml").display()
        ),
    )
    .unwrap();
    let mut files = vec![Wanted::plugin(bin, &plugin).unwrap()];
    let config = format!("# {version}\n");
    files.extend(lists.wanted(&config, Some(&list)).unwrap());
    files
}

/// Ends this process as `kill -9` does.
fn kill_self() -> ! {
    rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL)
        .unwrap();
    unreachable!("SIGKILL cannot be survived");
}

/// Runs `test` of this file once more, in a process of its own.
fn again(test: &str, words: &str) -> Output {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(CHILD, words)
        .output()
        .unwrap()
}

fn told() -> Option<Vec<String>> {
    let words = std::env::var(CHILD).ok()?;
    Some(words.split(' ').map(str::to_owned).collect())
}

#[test]
fn killed_before_any_step_each_name_holds_old_or_new_and_the_next_run_mends() {
    if let Some(words) = told() {
        let [verb, step, bin, conf] = &words[..] else {
            panic!("{words:?}");
        };
        let mut left: usize = step.parse().unwrap();
        let mut before = || {
            if left == 0 {
                kill_self();
            }
            left -= 1;
        };
        let (bin, conf) = (Path::new(bin), Path::new(conf));
        if verb == "install" {
            install(&wanted(bin, conf, "new"), |_| before()).unwrap();
        } else {
            let lists = Lists::new(conf, LIST).unwrap();
            uninstall(Some(&lists), Some(bin), |_| before()).unwrap();
        }
        return;
    }
    for old in [false, true] {
        for verb in ["install", "uninstall"] {
            let mut step = 0;
            loop {
                let host = Host::new();
                let (bin, conf) = (host.bin(), host.conf());
                if old || verb == "uninstall" {
                    install(&wanted(&bin, &conf, "old"), |_| {}).unwrap();
                }
                let words = format!("{verb} {step} {} {}", bin.display(), conf.display());
                let done = again(
                    "killed_before_any_step_each_name_holds_old_or_new_and_the_next_run_mends",
                    &words,
                );
                let killed = done.status.signal() == Some(9);
                assert!(killed || done.status.success(), "{done:?}");
                let at = format!("{verb}, over an old one: {old}, step {step}");
                judge(&host, &at);

                install(&wanted(&bin, &conf, "new"), |_| {}).unwrap();
                let clean = [
                    "etc/cni/net.d/10-kun.conflist",
                    "etc/cni/net.d/kun/kun.yaml",
                    "opt/cni/bin/kun-cni",
                ];
                assert_eq!(host.names(), clean, "{at}");
                assert!(
                    standing(&host).iter().all(|(_, v)| *v == Some("new")),
                    "{at}"
                );
                if !killed {
                    break;
                }
                step += 1;
            }
            // Three files, three steps each; two for each that goes.
            assert_eq!(step, if verb == "install" { 9 } else { 6 });
        }
    }
}

/// The version of each file that a runtime reads: list, kun.yaml, plugin. Half a file is none.
fn standing(host: &Host) -> [(&'static str, Option<&'static str>); 3] {
    let files = host.files();
    let names = [
        "etc/cni/net.d/10-kun.conflist",
        "etc/cni/net.d/kun/kun.yaml",
        "opt/cni/bin/kun-cni",
    ];
    names.map(|name| {
        let version = files.get(name).map(|content| {
            ["old", "new"]
                .into_iter()
                .find(|version| {
                    let whole = wanted(&host.bin(), &host.conf(), version);
                    whole
                        .iter()
                        .any(|w| w.path().ends_with(name) && content == w.bytes())
                })
                .unwrap_or_else(|| panic!("{name} is neither old nor new: {} bytes", content.len()))
        });
        (name, version)
    })
}

/// A list never names what is not there, and never stands over older things than itself.
fn judge(host: &Host, at: &str) {
    let [list, config, plugin] = standing(host).map(|(_, version)| version);
    if list.is_some() {
        assert!(
            config.is_some() && plugin.is_some(),
            "{at}: {list:?} {config:?} {plugin:?}"
        );
    }
    if list == Some("new") {
        assert_eq!((config, plugin), (Some("new"), Some("new")), "{at}");
    }
    // Whatever else lies there is nothing that a runtime reads.
    for name in host.names() {
        let read = [".conflist", ".conf", ".json"]
            .iter()
            .any(|e| name.ends_with(e));
        assert!(
            !read || name == "etc/cni/net.d/10-kun.conflist",
            "{at}: {name}"
        );
    }
}

#[test]
fn killed_amid_a_write_the_old_file_stands() {
    if let Some(words) = told() {
        let [bytes, bin, conf] = &words[..] else {
            panic!("{words:?}");
        };
        // The kernel ends a process that writes past this with SIGXFSZ, in the middle of its write.
        let limit = rustix::process::Rlimit {
            current: Some(bytes.parse().unwrap()),
            maximum: None,
        };
        let files = wanted(Path::new(bin), Path::new(conf), "new");
        rustix::process::setrlimit(rustix::process::Resource::Fsize, limit).unwrap();
        install(&files, |_| {}).unwrap();
        return;
    }
    for bytes in [0, 1, 4096, 99_999] {
        let host = Host::new();
        let (bin, conf) = (host.bin(), host.conf());
        install(&wanted(&bin, &conf, "old"), |_| {}).unwrap();
        let words = format!("{bytes} {} {}", bin.display(), conf.display());
        let done = again("killed_amid_a_write_the_old_file_stands", &words);
        assert!(!done.status.success(), "{bytes}: {done:?}");
        let at = format!("after {bytes} bytes");
        judge(&host, &at);
        assert!(
            standing(&host).iter().all(|(_, v)| *v == Some("old")),
            "{at}"
        );
        install(&wanted(&bin, &conf, "new"), |_| {}).unwrap();
        assert_eq!(host.names().len(), 3, "{at}");
    }
}

#[test]
fn a_second_run_writes_nothing() {
    let host = Host::new();
    let files = wanted(&host.bin(), &host.conf(), "new");
    assert_eq!(install(&files, |_| {}).unwrap().len(), 3);
    assert_eq!(
        install(&files, |step| panic!("{step:?}")).unwrap(),
        [""; 0].map(Path::new)
    );
    // A changed mode is mended: a plugin that cannot be executed is none.
    fs::set_permissions(
        host.bin().join("kun-cni"),
        fs::Permissions::from_mode(0o644),
    )
    .unwrap();
    assert_eq!(
        install(&files, |_| {}).unwrap(),
        [host.bin().join("kun-cni")]
    );
    let lists = Lists::new(&host.conf(), LIST).unwrap();
    assert_eq!(
        uninstall(Some(&lists), Some(&host.bin()), |_| {})
            .unwrap()
            .len(),
        3
    );
    assert_eq!(
        uninstall(Some(&lists), Some(&host.bin()), |_| {})
            .unwrap()
            .len(),
        0
    );
    assert_eq!(host.names(), [""; 0]);
}

#[test]
fn foreign_files_are_left_alone() {
    let host = Host::new();
    fs::create_dir_all(host.conf()).unwrap();
    fs::create_dir_all(host.bin()).unwrap();
    for name in ["05-other.conflist", "99-loopback.conf"] {
        fs::write(host.conf().join(name), "{}").unwrap();
    }
    fs::write(host.bin().join("bridge"), "b").unwrap();
    let lists = Lists::new(&host.conf(), LIST).unwrap();
    assert_eq!(lists.before(), [host.conf().join("05-other.conflist")]);
    let files = wanted(&host.bin(), &host.conf(), "new");
    install(&files, |_| {}).unwrap();
    uninstall(Some(&lists), Some(&host.bin()), |_| {}).unwrap();
    assert_eq!(
        host.names(),
        [
            "etc/cni/net.d/05-other.conflist",
            "etc/cni/net.d/99-loopback.conf",
            "opt/cni/bin/bridge"
        ]
    );

    // Of our name, and not ours.
    let list = host.conf().join(LIST);
    fs::write(&list, r#"{"plugins":[{"type":"bridge"}]}"#).unwrap();
    for refused in [
        install(&files, |_| {}).map(drop),
        uninstall(Some(&lists), None, |_| {}).map(drop),
    ] {
        assert!(matches!(refused, Err(InstallError::Foreign(path)) if path == list));
    }
    assert_eq!(
        fs::read_to_string(&list).unwrap(),
        r#"{"plugins":[{"type":"bridge"}]}"#
    );
}

#[test]
fn a_link_is_replaced_and_what_it_points_to_stays() {
    let host = Host::new();
    fs::create_dir_all(host.bin()).unwrap();
    let elsewhere = host.0.path().join("elsewhere");
    fs::write(&elsewhere, "x").unwrap();
    std::os::unix::fs::symlink(&elsewhere, host.bin().join("kun-cni")).unwrap();
    install(&wanted(&host.bin(), &host.conf(), "new"), |_| {}).unwrap();
    assert_eq!(fs::read_to_string(&elsewhere).unwrap(), "x");
    assert!(
        host.bin()
            .join("kun-cni")
            .symlink_metadata()
            .unwrap()
            .is_file()
    );
}

#[test]
fn a_list_that_would_fail_at_the_first_pod_is_refused() {
    let host = Host::new();
    let lists = Lists::new(&host.conf(), LIST).unwrap();
    let path = host.0.path().join("list");
    for (text, says) in [
        ("{", "not JSON"),
        (
            r#"{"plugins":[{"type":"bridge"}]}"#,
            "no plugin has the type `kun-cni`",
        ),
        (
            r#"{"plugins":[{"type":"kun-cni"}]}"#,
            "kunConfig is null; kun.yaml is placed at",
        ),
        (
            r#"{"plugins":[{"type":"kun-cni","kunConfig":"/etc/kun/kun.yaml"}]}"#,
            "kunConfig is \"/etc/kun/kun.yaml\"; kun.yaml is placed at",
        ),
    ] {
        fs::write(&path, text).unwrap();
        let refused = lists.wanted("", Some(&path)).unwrap_err().to_string();
        assert!(refused.contains(says), "{refused}");
    }
    for name in ["", "kun", ".kun.conflist", "a/b.conflist", "10-kun.conf"] {
        assert!(
            matches!(Lists::new(&host.conf(), name), Err(InstallError::Name(_))),
            "{name}"
        );
    }
}

fn program(words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_kun-cni"))
        .args(words)
        .env_remove("CNI_COMMAND")
        .output()
        .unwrap()
}

#[test]
fn the_program_places_itself_over_one_that_runs() {
    let host = Host::new();
    let (bin, conf) = (host.bin(), host.conf());
    let config = host.0.path().join("kun.yaml");
    fs::write(&config, "ipam: {v4Pools: [10.64.0.0/16]}\n").unwrap();
    let (bin, conf) = (bin.to_str().unwrap(), conf.to_str().unwrap());
    let flags = [
        "install",
        "--bin-dir",
        bin,
        "--conf-dir",
        conf,
        "--config",
        config.to_str().unwrap(),
    ];
    let done = program(&flags);
    assert!(done.status.success(), "{done:?}");
    let said = String::from_utf8(done.stdout).unwrap();
    assert_eq!(said.lines().count(), 3, "{said}");
    assert_eq!(
        fs::read(format!("{bin}/kun-cni")).unwrap(),
        fs::read(env!("CARGO_BIN_EXE_kun-cni")).unwrap()
    );
    assert_eq!(
        fs::read_to_string(format!("{conf}/10-kun.conflist")).unwrap(),
        format!(
            "{{\n  \"cniVersion\": \"1.0.0\",\n  \"cniVersions\": [\n    \"1.0.0\",\n    \"1.1.0\"\n  ],\n  \"name\": \"kun\",\n  \"plugins\": [\n    {{\n      \"capabilities\": {{\n        \"bandwidth\": true,\n        \"dns\": true,\n        \"io.kubernetes.cri.pod-annotations\": true,\n        \"ipRanges\": true,\n        \"ips\": true,\n        \"mac\": true,\n        \"portMappings\": true\n      }},\n      \"kunConfig\": \"{conf}/kun/kun.yaml\",\n      \"type\": \"kun-cni\"\n    }}\n  ]\n}}\n"
        )
    );

    // What is placed answers; while it runs (it reads its standard input) it is replaced, and the next one answers too.
    let mut runs = Command::new(format!("{bin}/kun-cni"))
        .env("CNI_COMMAND", "STATUS")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let old = fs::canonicalize(format!("{bin}/kun-cni")).unwrap();
    let executes = format!("/proc/{}/exe", runs.id());
    wait_for(
        "the plugin runs",
        std::time::Duration::from_secs(10),
        || (fs::read_link(&executes).ok()? == old).then_some(()),
    )
    .unwrap();
    let other = wanted(&host.bin(), &host.conf(), "old");
    install(&other[..1], |_| {}).unwrap();
    let done = program(&flags);
    assert!(done.status.success(), "{done:?}");
    let version = Command::new(format!("{bin}/kun-cni"))
        .env("CNI_COMMAND", "VERSION")
        .output()
        .unwrap();
    assert!(version.status.success(), "{version:?}");
    runs.stdin.take().unwrap().write_all(b"{").unwrap();
    let ended = runs.wait_with_output().unwrap();
    assert!(
        String::from_utf8_lossy(&ended.stdout).contains("not JSON") || !ended.stdout.is_empty(),
        "{ended:?}"
    );

    let done = program(&["uninstall", "--bin-dir", bin, "--conf-dir", conf]);
    assert!(done.status.success(), "{done:?}");
    assert_eq!(host.names(), ["kun.yaml"]);
}

#[test]
fn wrong_words_and_wrong_configurations_place_nothing() {
    let host = Host::new();
    let bad = host.0.path().join("kun.yaml");
    fs::write(&bad, "ipam: {pool: x}\n").unwrap();
    let conf = host.conf();
    let conf = conf.to_str().unwrap();
    for (words, says) in [
        (vec!["install"], "give --bin-dir, --conf-dir or both"),
        (vec!["install", "--bin-dir"], "--bin-dir: without a value"),
        (vec!["install", "--bin", "x"], "--bin: unknown"),
        (
            vec!["install", "--bin-dir", "x", "--name", "y"],
            "--name: means nothing without --conf-dir",
        ),
        (vec!["uninstall", "--config", "x"], "--config: unknown"),
        (
            vec!["install", "--conf-dir", conf, "--conf-dir", conf],
            "--conf-dir: given twice",
        ),
        (
            vec![
                "install",
                "--conf-dir",
                conf,
                "--config",
                bad.to_str().unwrap(),
            ],
            "ipam.pool: unknown field",
        ),
    ] {
        let done = program(&words);
        let said = String::from_utf8_lossy(&done.stderr);
        assert!(
            !done.status.success() && said.contains(says),
            "{words:?}: {said}"
        );
    }
    assert_eq!(host.names(), ["kun.yaml"]);
}
