//! The CNI suite against the reference plugins: what it asks for is what established plugins do, and where they differ is listed.

#![allow(missing_docs)]

use std::path::{Path, PathBuf};

use kun_conformance::cni::{self, PodNetns, Subject};
use kun_harness::{Netns, peers, require_root};
use serde_json::{Value, json};

/// Go's skeleton leaves the version out of errors, tells its own in VERSION; these two are
/// made to be first in a chain, GC releases addresses only, and host-local's DEL fails for an argument that it does not know.
const DEVIATIONS: [&str; 5] = [
    "an_error_tells_its_version",
    "add_passes_the_previous_result_through",
    "gc_keeps_the_valid_and_frees_the_rest",
    "version_repeats_the_callers",
    "del_succeeds_whatever_the_arguments",
];

struct Pod(Netns);

impl PodNetns for Pod {
    fn path(&self) -> PathBuf {
        self.0.path()
    }
}

/// Cases that fail, as `name: why` lines.
fn failures(plugin: &str, network: &dyn Fn(&Path) -> Value) -> Option<Vec<&'static str>> {
    if !require_root() {
        return None;
    }
    let plugins = peers::cni_plugins()?;
    let node = Netns::new("cni-peer").unwrap();
    let dir = tempfile::tempdir().unwrap();
    let verdicts = cni::run(&Subject {
        program: plugins.join(plugin),
        path: plugins.clone(),
        network: network(dir.path()),
        fixed: "10.99.0.77".parse().expect("an address"),
        pod: &|| Ok(Box::new(Pod(Netns::new("cni-pod")?))),
        on_node: &|command, stdin| node.run(|| cni::feed(command, stdin)),
    });
    Some(
        verdicts
            .into_iter()
            .filter_map(|verdict| {
                let error = verdict.result.err()?;
                println!("{plugin}: {}: {error:#}", verdict.name);
                Some(verdict.name)
            })
            .collect(),
    )
}

fn host_local(dir: &Path) -> Value {
    json!({
        "type": "host-local",
        "dataDir": dir,
        "ranges": [[{"subnet": "10.99.0.0/24"}], [{"subnet": "fd00:99::/120"}]],
    })
}

#[test]
fn bridge_with_host_local() {
    let network = |dir: &Path| {
        json!({
            "name": "peer",
            "type": "bridge",
            "bridge": "peer0",
            "isGateway": true,
            "ipam": host_local(dir),
        })
    };
    let Some(failures) = failures("bridge", &network) else {
        return;
    };
    assert_eq!(failures, DEVIATIONS);
}

#[test]
fn ptp_with_host_local() {
    let network = |dir: &Path| json!({"name": "peer", "type": "ptp", "ipam": host_local(dir)});
    let Some(failures) = failures("ptp", &network) else {
        return;
    };
    assert_eq!(failures, DEVIATIONS);
}
