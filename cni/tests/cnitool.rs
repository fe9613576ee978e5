//! libcni, as container runtimes use it, drives kun-cni through `cnitool`: alone, and in a chain with a reference plugin.

#![allow(missing_docs)]

mod node;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use kun_cni::clock;
use kun_config::types::SlotClass;
use kun_control::{Request, Response};
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
        self.configure_as("1.1.0", further);
    }

    fn configure_as(&self, version: &str, further: &[Value]) {
        let ours = json!({
            "type": "kun-cni",
            "kunConfig": self.node.config,
            "capabilities": {"io.kubernetes.cri.pod-annotations": true},
        });
        let mut plugins = vec![ours];
        plugins.extend_from_slice(further);
        self.write_list(version, &plugins);
    }

    fn write_list(&self, version: &str, plugins: &[Value]) {
        let list = json!({"cniVersion": version, "name": "kun", "plugins": plugins});
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
        self.memory().len()
    }

    /// Each of its files.
    fn memory(&self) -> Vec<Value> {
        let results = self.path("lib/cni/results");
        let files = std::fs::read_dir(results).into_iter().flatten().flatten();
        files
            .map(|file| serde_json::from_slice(&std::fs::read(file.path()).unwrap()).unwrap())
            .collect()
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

/// Of every version that a list may have: what libcni caches of ADD is what CHECK and DEL get, also from the plugin behind ours, and
/// when the list has got another version meanwhile, as it has after an update.
#[test]
fn the_cached_result_holds_in_every_version_and_from_one_to_another() {
    let Some(runtime) = Runtime::new("split") else {
        return;
    };
    let tuning = [json!({"type": "tuning", "sysctl": {"net.ipv4.tcp_keepalive_time": "611"}})];
    let versions = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
    for (n, was) in versions.iter().enumerate() {
        for further in [&[][..], &tuning] {
            for then in [was, "1.1.0"] {
                let pod = Pod::new(&format!("p{n}"), true);
                runtime.configure_as(was, further);
                let result = runtime.add(&pod);
                assert_eq!(result["cniVersion"], *was);
                let remembered = runtime.memory();
                assert_eq!(remembered.len(), 1);
                assert_eq!(remembered[0]["result"], result, "{was}");
                for v6 in [true, false] {
                    assert!(address(&result, v6).is_some(), "{was}: {result}");
                }
                runtime.configure_as(then, further);
                let checked = runtime.verb("check", &pod);
                // libcni itself refuses CHECK before 0.4.0.
                assert_eq!(
                    checked.is_ok(),
                    n >= 2 || then != *was,
                    "{was}, {then}: {checked:?}"
                );
                // What the result says is looked for: it did arrive.
                if checked.is_ok() {
                    let v6 = address(&result, true).unwrap();
                    let take = format!("addr del {v6}/128 dev eth0");
                    pod.netns.exec(&take).unwrap();
                    let missed = runtime.verb("check", &pod).unwrap_err();
                    assert!(missed.contains(&v6), "{was}, {then}: {missed}");
                }
                runtime.verb("del", &pod).unwrap();
                assert_eq!(runtime.node.leavings(), "", "{was}, {then}");
                assert_eq!(runtime.remembered(), 0);
            }
        }
    }
}

/// The list that `install` places names two versions: an old runtime takes the older, as podman 4.3 does; a new one the newest.
#[test]
fn a_list_of_several_versions_is_of_the_newest_that_libcni_speaks() {
    let Some(runtime) = Runtime::new("split") else {
        return;
    };
    let file = runtime.path("net.d/10-kun.conflist");
    let text = std::fs::read_to_string(&file).unwrap();
    let mut list: Value = serde_json::from_str(&text).unwrap();
    list["cniVersion"] = "1.0.0".into();
    list["cniVersions"] = json!(["1.0.0", "1.1.0"]);
    std::fs::write(&file, list.to_string()).unwrap();
    let pod = Pod::new("a", true);
    let result = runtime.add(&pod);
    assert_eq!(result["cniVersion"], "1.1.0");
    // STATUS came with 1.1.0: for an older list libcni asks nobody.
    std::fs::write(&runtime.node.config, "node: {nam: n}\n").unwrap();
    let error = runtime.verb("status", &pod).unwrap_err();
    assert!(error.contains("nam"), "{error}");
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

/// Under another main plugin no interface tells whose an address is: the runtime's memory does.
#[test]
fn a_store_is_rebuilt_from_what_libcni_alone_remembers() {
    let Some(runtime) = Runtime::new("split") else {
        return;
    };
    let ptp = json!({
        "type": "ptp",
        "ipam": {"type": "kun-cni", "kunConfig": runtime.node.config},
        "capabilities": {"io.kubernetes.cri.pod-annotations": true},
    });
    runtime.write_list("1.1.0", &[ptp]);
    let pods = [Pod::new("a", true), Pod::new("b", true)];
    let [kept, gone] = pods.each_ref().map(|pod| runtime.add(pod));
    runtime.verb("del", &pods[1]).unwrap();
    let store = runtime.node.state_dir().join(kun_cni::store::FILE);
    let length = std::fs::metadata(&store).unwrap().len();
    let file = File::options().write(true).open(&store).unwrap();
    file.set_len(length / 2).unwrap();
    let refused = runtime.verb("add", &pods[1]).unwrap_err();
    assert!(refused.contains("`kunctl ipam rebuild`"), "{refused}");

    let (config, results) = (runtime.node.parsed(), runtime.path("lib/cni/results"));
    let rebuilt = runtime
        .node
        .netns
        .run(|| kun_cni::rebuild::rebuild(&config, &results))
        .unwrap();
    assert_eq!(rebuilt.kept, 1);
    assert!(rebuilt.damaged.is_some_and(|file| file.is_file()));
    runtime.node.give_blocks();
    runtime.verb("check", &pods[0]).unwrap();
    let answer = runtime.node.service().handle(&Request::Ipam, clock::now());
    let Response::Ipam { slots, .. } = answer else {
        panic!("{answer:?}");
    };
    let of = |result: &Value| {
        let v6 = address(result, true).unwrap();
        slots.iter().find(|row| row.v6.to_string() == v6).unwrap()
    };
    let row = of(&kept);
    assert_eq!(
        (row.state.as_str(), row.pod.name.as_str()),
        ("allocated", "front-0")
    );
    assert_eq!(of(&gone).state, "cooling");
    // Nobody gets anything before it has rested.
    let early = runtime.verb("add", &pods[1]).unwrap_err();
    assert!(early.contains("cooling"), "{early}");
    runtime.verb("del", &pods[0]).unwrap();
    let (allocated, ..) = runtime
        .node
        .service()
        .counts(SlotClass::Dual, clock::now())
        .unwrap();
    assert_eq!(allocated, 0);
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
