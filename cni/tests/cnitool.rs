//! libcni, as container runtimes use it, drives kun-cni through `cnitool`: alone, and in a chain with a reference plugin.

#![allow(missing_docs)]

mod node;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use kun_harness::{peers, require_root};
use node::{Node, Pod, address};
use serde_json::{Value, json};

/// A node with a network list and what executes it.
struct Runtime {
    node: Node,
    cnitool: PathBuf,
    plugins: PathBuf,
}

impl Runtime {
    /// `None`, recorded as a skip, where it cannot be had.
    fn new(interfaces: &str) -> Option<Self> {
        if !require_root() {
            return None;
        }
        let runtime = Self {
            cnitool: peers::require("cnitool")?,
            plugins: peers::cni_plugins()?,
            node: Node::new(interfaces),
        };
        for directory in ["net.d", "lib"] {
            std::fs::create_dir(runtime.path(directory)).unwrap();
        }
        runtime.configure(&[]);
        Some(runtime)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.node.dir.path().join(name)
    }

    /// Writes the network list: kun-cni, then these.
    fn configure(&self, further: &[Value]) {
        let ours = json!({
            "type": "kun-cni",
            "kunConfig": self.node.config,
            "capabilities": {"io.kubernetes.cri.pod-annotations": true},
        });
        let mut plugins = vec![ours];
        plugins.extend_from_slice(further);
        let list = json!({"cniVersion": "1.1.0", "name": "kun", "plugins": plugins});
        std::fs::write(self.path("net.d/10-kun.conflist"), list.to_string()).unwrap();
    }

    /// One verb, as the runtime does it. libcni keeps results below /var/lib/cni; here that is a directory of the test's.
    fn output(&self, verb: &str, netns: &Path) -> Output {
        let ours = Path::new(env!("CARGO_BIN_EXE_kun-cni")).parent().unwrap();
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "sh", "-ec"])
            .arg("mount --bind \"$0\" /var/lib; exec \"$@\"")
            .arg(self.path("lib"))
            .arg(&self.cnitool)
            .args([verb, "kun"])
            .arg(netns)
            .env("NETCONFPATH", self.path("net.d"))
            .env(
                "CNI_PATH",
                format!("{}:{}", ours.display(), self.plugins.display()),
            )
            .env(
                "CNI_ARGS",
                "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=front-0",
            )
            .env(
                "CAP_ARGS",
                r#"{"io.kubernetes.cri.pod-annotations":{"kun.network/ipv4":"true"}}"#,
            );
        self.node.netns.output(command).unwrap()
    }

    /// Its stdout, or what it says went wrong.
    fn verb(&self, verb: &str, pod: &Pod) -> Result<String, String> {
        let output = self.output(verb, &pod.netns.path());
        let out = String::from_utf8_lossy(&output.stdout).into_owned();
        match output.status.success() {
            true => Ok(out),
            false => Err(out + &String::from_utf8_lossy(&output.stderr)),
        }
    }

    fn add(&self, pod: &Pod) -> Value {
        let out = self.verb("add", pod).unwrap();
        serde_json::from_str(&out).unwrap_or_else(|e| panic!("{e}: {out}"))
    }

    /// What libcni remembers.
    fn remembered(&self) -> usize {
        let results = self.path("lib/cni/results");
        std::fs::read_dir(results).map_or(0, |entries| entries.count())
    }
}

#[test]
fn every_verb_in_both_layouts() {
    for interfaces in ["split", "shared"] {
        let Some(runtime) = Runtime::new(interfaces) else {
            return;
        };
        let pod = Pod::new("a", true);
        runtime.verb("status", &pod).unwrap();
        let result = runtime.add(&pod);
        let held = pod.netns.exec("-br addr show").unwrap();
        for v6 in [false, true] {
            let address = address(&result, v6).unwrap();
            assert!(held.contains(&address), "{address}: {held}");
        }
        runtime.verb("check", &pod).unwrap();
        // What is gone is missed.
        let v6 = address(&result, true).unwrap();
        pod.netns
            .exec(&format!("addr del {v6}/128 dev eth0"))
            .unwrap();
        let missed = runtime.verb("check", &pod).unwrap_err();
        assert!(missed.contains(&v6), "{missed}");
        runtime.verb("del", &pod).unwrap();
        runtime.verb("del", &pod).unwrap();
        assert_eq!(runtime.node.leavings(), "", "{interfaces}");
        assert_eq!(runtime.remembered(), 0);
    }
}

#[test]
fn gc_without_a_list_of_the_valid_is_refused() {
    let Some(runtime) = Runtime::new("split") else {
        return;
    };
    let pods = [Pod::new("a", true), Pod::new("b", true)];
    let results = pods.each_ref().map(|pod| runtime.add(pod));
    assert_ne!(address(&results[0], true), address(&results[1], true));
    assert_eq!(runtime.remembered(), 2);
    // One that libcni has forgotten: only a list could tell that it is gone.
    let results = runtime.path("lib/cni/results");
    let forgotten = std::fs::read_dir(&results).unwrap().next().unwrap();
    std::fs::remove_file(forgotten.unwrap().path()).unwrap();
    // cnitool gives none. libcni deletes what it remembers, and asks us to collect the rest: an absent list is no empty one.
    let refused = runtime.verb("gc", &pods[0]).unwrap_err();
    assert!(refused.contains("cni.dev/valid-attachments"), "{refused}");
    assert_eq!(runtime.remembered(), 0);
    let standing = pods.each_ref().map(|pod| {
        let links = pod.netns.exec("-br link show").unwrap();
        usize::from(links.contains("eth0"))
    });
    assert_eq!(standing.iter().sum::<usize>(), 1, "{standing:?}");
}

#[test]
fn a_chain_with_a_reference_plugin() {
    let Some(runtime) = Runtime::new("split") else {
        return;
    };
    runtime
        .configure(&[json!({"type": "tuning", "sysctl": {"net.ipv4.tcp_keepalive_time": "611"}})]);
    let pod = Pod::new("a", true);
    runtime.verb("status", &pod).unwrap();
    let result = runtime.add(&pod);
    assert!(address(&result, true).is_some(), "{result}");
    let read = || std::fs::read_to_string("/proc/sys/net/ipv4/tcp_keepalive_time").unwrap();
    assert_eq!(pod.netns.run(read).trim(), "611");
    runtime.verb("check", &pod).unwrap();
    runtime.verb("del", &pod).unwrap();
    assert_eq!(runtime.node.leavings(), "");
    // One that fails after ours: libcni takes back what ours made.
    runtime.configure(&[json!({"type": "tuning", "sysctl": {"net.ipv4.no_such": "1"}})]);
    runtime.verb("add", &pod).unwrap_err();
    runtime.verb("del", &pod).unwrap();
    assert_eq!(runtime.node.leavings(), "");
}

#[test]
fn status_says_what_is_wrong() {
    let Some(runtime) = Runtime::new("split") else {
        return;
    };
    let pod = Pod::new("a", true);
    std::fs::write(&runtime.node.config, "node: {nam: n}\n").unwrap();
    let error = runtime.verb("status", &pod).unwrap_err();
    assert!(error.contains("nam"), "{error}");
}
