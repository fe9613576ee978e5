//! The manifests say what the programs understand: commands and flags that exist, configurations that are right, and the places on a node
//! that the configuration names. `rbac.rs` applies them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use kun_harness::control_plane::ControlPlane;
use kun_harness::skip;

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

/// `None`: not built, and said so.
fn program(name: &str) -> Option<PathBuf> {
    let lab = Path::new(env!("CARGO_BIN_EXE_kun-lab"));
    let path = lab.parent().unwrap_or(Path::new(".")).join(name);
    if path.is_file() {
        return Some(path);
    }
    skip(&format!(
        "{name} is not built: cargo build --workspace --bins"
    ));
    None
}

fn run(program: &Path, words: &[&str]) -> Output {
    let mut command = Command::new(program);
    command.args(words).env("NODE_NAME", "node-a");
    command.env_remove("CNI_COMMAND");
    command.output().unwrap()
}

/// Files below `deploy/` of this name, or ending so.
fn files(end: &str) -> Vec<PathBuf> {
    let (mut found, mut look) = (Vec::new(), vec![deploy()]);
    while let Some(dir) = look.pop() {
        for entry in fs::read_dir(dir).unwrap().flatten() {
            let path = entry.path();
            if path.is_dir() {
                look.push(path);
            } else if path.to_string_lossy().ends_with(end) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

#[test]
fn commands_name_programs_of_the_image_and_flags_that_they_have() {
    let image = fs::read_to_string(deploy().join("Dockerfile")).unwrap();
    let mut seen = 0;
    for file in files(".yaml") {
        let text = fs::read_to_string(&file).unwrap();
        for line in text.lines() {
            let Some(words) = line.trim_start().strip_prefix("command: [") else {
                continue;
            };
            let words: Vec<&str> = words.trim_end_matches(']').split(", ").collect();
            let (path, flags) = words.split_first().unwrap();
            let name = path
                .strip_prefix("/usr/bin/")
                .unwrap_or_else(|| panic!("{line}"));
            if name == "sleep" {
                continue;
            }
            assert!(
                image.contains(&format!("release/{name} ")),
                "{name} is not in the image"
            );
            let Some(program) = program(name) else {
                return;
            };
            let help = run(&program, &["--help"]);
            let help = String::from_utf8_lossy(&help.stdout).into_owned();
            for flag in flags {
                let flag = flag.split('=').next().unwrap();
                assert!(
                    help.contains(flag),
                    "{}: {name} has no {flag}:\n{help}",
                    file.display()
                );
            }
            seen += 1;
        }
    }
    assert!(seen >= 5, "only {seen} commands are seen");
}

#[test]
fn configurations_are_right() {
    let (all, corefiles) = (files("/kun.yaml"), files("/Corefile"));
    assert!(
        all.len() >= 5 && corefiles.len() >= 2,
        "{all:?} {corefiles:?}"
    );
    // Each with each of the others would show nothing more.
    let other = corefiles.iter().cycle();
    for (file, corefile) in all.iter().zip(other) {
        let (path, corefile) = (file.to_str().unwrap(), corefile.to_str().unwrap());
        for name in ["kun-proxy", "kun-cni", "kun-operator", "kun-dns"] {
            let Some(program) = program(name) else {
                return;
            };
            let mut words = vec!["--check-config", "--config", path];
            if name == "kun-dns" {
                words.extend(["--corefile", corefile]);
            }
            let checked = run(&program, &words);
            assert!(checked.status.success(), "{name}: {checked:?}");
            let told = String::from_utf8_lossy(&checked.stderr).into_owned();
            // The examples' addresses are for documentation (RFC 5737), and nobody should forget to replace them.
            let meant = |line: &str| line.contains("192.0.2.0/24 is not globally routed");
            let warnings: Vec<&str> = told.lines().filter(|line| !meant(line)).collect();
            assert!(warnings.is_empty(), "{name}: {warnings:?}");
        }
    }
}

#[test]
fn the_agent_sees_the_places_that_its_configuration_names() {
    let daemonset = fs::read_to_string(deploy().join("agent/daemonset.yaml")).unwrap();
    for file in files("/kun.yaml") {
        let text = fs::read_to_string(&file).unwrap();
        let config = kun_config::parse(&file.to_string_lossy(), &text).unwrap();
        let agent = &config.agent;
        let places = [
            agent.socket.parent().unwrap(),
            &agent.state_dir,
            agent.bpffs_root.parent().unwrap(),
            &config.proxy.cgroup_root,
        ];
        for place in places {
            let place = place.display();
            assert!(
                daemonset.contains(&format!("mountPath: {place}}}")),
                "{place} is not mounted"
            );
            assert!(
                daemonset.contains(&format!("hostPath: {{path: {place},")),
                "{place} is not the node's"
            );
        }
        let port = agent.metrics.unwrap().port();
        assert!(
            daemonset.contains(&format!("containerPort: {port},")),
            "{port}"
        );
    }
}

#[test]
fn kustomize_builds_all_of_it() {
    // The builder is the control plane's own kubectl; no server is started.
    if ControlPlane::builder().is_none() {
        return;
    }
    let kubectl = kun_harness::control_plane::binary();
    let with_pods = tempfile::tempdir().unwrap();
    let link = |name: &str| {
        std::os::unix::fs::symlink(
            fs::canonicalize(deploy().join(name)).unwrap(),
            with_pods.path().join(name),
        )
        .unwrap();
    };
    for name in ["base", "agent", "crds", "components"] {
        link(name);
    }
    fs::create_dir(with_pods.path().join("own")).unwrap();
    fs::write(
        with_pods.path().join("own/kustomization.yaml"),
        "resources: [../base]\ncomponents: [../components/dns-pods-verified]\n",
    )
    .unwrap();
    for (path, says) in [
        (deploy().join("base"), "image: kun:0.1.0"),
        (deploy().join("overlays/dual-stack"), "- fd00:10:96::a"),
        (
            deploy().join("overlays/nat64-gateway"),
            "name: kun-proxy-gateway-1",
        ),
        (deploy().join("uninstall"), "- --cleanup"),
        (with_pods.path().join("own"), "  - pods\n"),
    ] {
        let built = run(&kubectl, &["kubectl", "kustomize", path.to_str().unwrap()]);
        let text = String::from_utf8_lossy(&built.stdout).into_owned();
        assert!(
            built.status.success(),
            "{}: {}",
            path.display(),
            String::from_utf8_lossy(&built.stderr)
        );
        assert!(text.contains(says), "{}: no {says:?}", path.display());
        assert!(
            !text.contains("image: kun\n"),
            "{}: an image without a tag",
            path.display()
        );
    }
}
