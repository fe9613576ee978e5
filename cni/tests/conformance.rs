//! The black-box CNI suite, which Debian's plugins pass too, against kun-cni.

#![allow(missing_docs)]

mod node;

use std::path::{Path, PathBuf};

use kun_conformance::cni::{self, PodNetns, Subject};
use kun_harness::{Netns, require_root};
use node::Node;
use serde_json::json;

/// Where `cargo xtask test` has linked the plugin as `cargo xtask build` does.
const AS_SHIPPED: &str = "KUN_CNI_AS_SHIPPED";

struct Pod(Netns);

impl PodNetns for Pod {
    fn path(&self) -> PathBuf {
        self.0.path()
    }
}

/// The whole suite for one program in one layout.
fn every_case(program: &Path, interfaces: &str) {
    let node = Node::new(interfaces);
    let mut network = node.network();
    network["runtimeConfig"] = json!({
        "io.kubernetes.cri.pod-annotations": {"kun.network/ipv4": "true"}
    });
    let verdicts = cni::run(&Subject {
        program: program.into(),
        path: "/opt/cni/bin".into(),
        network,
        fixed: "10.64.0.60".parse().expect("an address"),
        pod: &|| Ok(Box::new(Pod(Netns::new("cni-pod")?))),
        on_node: &|command, stdin| node.netns.run(|| cni::feed(command, stdin)),
    });
    assert_eq!(verdicts.len(), cni::CASES.len());
    for verdict in verdicts {
        if let Err(e) = verdict.result {
            panic!("{interfaces}: {}: {e:#}", verdict.name);
        }
    }
    assert_eq!(node.leavings(), "", "{interfaces}");
}

#[test]
fn every_case_holds_in_both_layouts() {
    if !require_root() {
        return;
    }
    for interfaces in ["split", "shared"] {
        every_case(Path::new(env!("CARGO_BIN_EXE_kun-cni")), interfaces);
    }
}

/// Another C library and another allocator than those of all other tests.
#[test]
fn every_case_holds_for_the_program_as_it_is_shipped() {
    if !require_root() {
        return;
    }
    match std::env::var_os(AS_SHIPPED) {
        Some(program) => every_case(Path::new(&program), "split"),
        None => kun_harness::skip(&format!(
            "{AS_SHIPPED} names no program: `cargo xtask test` builds it"
        )),
    }
}
