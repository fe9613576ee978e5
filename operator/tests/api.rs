//! The operator as one of several on a real API server: who acts, what is written, and what a leader that dies leaves.

#![allow(missing_docs)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use kun_harness::control_plane::ControlPlane;
use kun_harness::{Process, wait_for};
use rustix::process::Signal;
use serde_json::Value;

/// A leader that dies is followed after 15 s; a busy machine takes its time.
const SOON: Duration = Duration::from_secs(60);

const POOL: &str = "
apiVersion: kun.network/v1alpha1
kind: IPPool
metadata: {name: main}
spec:
  pods: [10.64.0.0/16, 240.0.0.0/16]
  services: {v4: [192.0.2.0/24], v6: ['2001:db8:1::/112']}
";

/// A server with kun's kinds, and a place for logs.
struct Cluster {
    plane: ControlPlane,
    dir: tempfile::TempDir,
}

struct Operator {
    process: Process,
    log: PathBuf,
}

impl Operator {
    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// The part of its log that names it: `holderIdentity`.
    fn me(&self) -> String {
        let log = self.log();
        let me = log.split("me=").nth(1).unwrap_or_default();
        me.split([' ', '\n'])
            .next()
            .unwrap_or_default()
            .trim_matches('"')
            .to_owned()
    }
}

impl Cluster {
    fn start() -> Option<Self> {
        // Nodes here have no kubelet.
        let builder = ControlPlane::builder()?
            .controller_flags(&["--controllers=*,-node-lifecycle-controller"]);
        let plane = builder.start().unwrap_or_else(|e| panic!("{e:#}"));
        let crds = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/crds");
        plane
            .kubectl(&["apply", "--server-side", "-k", crds], "")
            .unwrap();
        plane
            .kubectl(
                &[
                    "wait",
                    "--for=condition=Established",
                    "crd",
                    "--all",
                    "--timeout=60s",
                ],
                "",
            )
            .unwrap();
        let dir = tempfile::tempdir().unwrap();
        let cluster = Self { plane, dir };
        cluster.apply(POOL);
        Some(cluster)
    }

    fn operator(&self, name: &str, more: &str) -> Operator {
        let config = self.dir.path().join(format!("{name}.yaml"));
        let text = format!(
            "cluster: {{kubernetes: {{kubeconfig: {}}}}}\noperator: {{metrics: \"off\"}}\n{more}",
            self.plane.kubeconfig().display()
        );
        fs::write(&config, text).unwrap();
        let log = self.dir.path().join(format!("{name}.log"));
        let out = File::options()
            .create(true)
            .append(true)
            .open(&log)
            .unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_kun-operator"));
        command
            .arg("--config")
            .arg(config)
            .env("POD_NAME", name)
            .env_remove("RUST_LOG")
            .stdout(Stdio::null())
            .stderr(out);
        let process = Process::spawn(&mut command).unwrap();
        Operator { process, log }
    }

    fn apply(&self, text: &str) {
        self.plane
            .kubectl(&["apply", "--server-side", "-f", "-"], text)
            .unwrap();
    }

    fn get(&self, what: &str) -> Vec<Value> {
        let text = self
            .plane
            .kubectl(&["get", what, "-A", "-o", "json"], "")
            .unwrap();
        let list: Value = serde_json::from_str(&text).unwrap();
        list["items"].as_array().unwrap().clone()
    }

    /// The owner of each block: node, uid, epoch.
    fn blocks(&self) -> BTreeMap<String, (String, String, i64)> {
        let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
        let blocks = self.get("ipamblocks").into_iter().map(|b| {
            let spec = &b["spec"];
            let epoch = spec["epoch"].as_i64().unwrap();
            (
                text(&spec["first"]),
                (text(&spec["node"]), text(&spec["nodeUID"]), epoch),
            )
        });
        blocks.collect()
    }

    /// Addresses of each Service that has some, by namespace/name.
    fn addresses(&self) -> BTreeMap<String, Vec<String>> {
        let services = self.get("services").into_iter().filter_map(|s| {
            let ingress = s["status"]["loadBalancer"]["ingress"].as_array()?;
            let ips = ingress
                .iter()
                .filter_map(|i| i["ip"].as_str().map(str::to_owned));
            Some((s["metadata"]["name"].as_str()?.to_owned(), ips.collect()))
        });
        services.collect()
    }

    fn holder(&self) -> Option<(String, i64)> {
        let words = [
            "-n",
            "kube-system",
            "get",
            "lease",
            "kun-operator",
            "-o",
            "json",
        ];
        let text = self.plane.kubectl(&words, "").ok()?;
        let lease: Value = serde_json::from_str(&text).ok()?;
        let holder = lease["spec"]["holderIdentity"].as_str()?.to_owned();
        Some((holder, lease["spec"]["leaseTransitions"].as_i64()?))
    }

    /// One block of each class for every node, each of one owner who exists; every Service its own addresses.
    fn complete(&self, nodes: usize, services: usize) -> bool {
        let blocks = self.blocks();
        let owners: BTreeSet<_> = blocks
            .iter()
            .map(|(first, (node, uid, _))| (first.starts_with("240."), node, uid))
            .collect();
        assert_eq!(
            owners.len(),
            blocks.len(),
            "a node has two of one class: {blocks:?}"
        );
        let addresses = self.addresses();
        let all: Vec<&String> = addresses.values().flatten().collect();
        let unique: BTreeSet<&String> = all.iter().copied().collect();
        assert_eq!(
            unique.len(),
            all.len(),
            "an address is given twice: {addresses:?}"
        );
        blocks.len() == nodes * 2 && addresses.len() == services
    }
}

fn node(name: &str) -> String {
    format!("---\napiVersion: v1\nkind: Node\nmetadata: {{name: {name}}}\n")
}

fn balancer(name: &str, more: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: default}}\nspec: {{type: LoadBalancer, ipFamilyPolicy: RequireDualStack, ports: [{{port: 80}}]{more}}}\n"
    )
}

#[test]
fn leaders_die_and_no_assignment_is_lost_or_doubled() {
    let Some(cluster) = Cluster::start() else {
        return;
    };
    let mut operators: Vec<Operator> =
        vec![cluster.operator("op-0", ""), cluster.operator("op-1", "")];
    let (mut nodes, mut services) = (0, 0);
    let mut before = (BTreeMap::new(), BTreeMap::new());
    let mut leaders = BTreeSet::new();
    for round in 0..3_usize {
        // Much to do, and the leader dies in the middle of it.
        let batch: String = (0..30)
            .map(|i| node(&format!("n{round}-{i}")) + &balancer(&format!("s{round}-{i}"), ""))
            .collect();
        (nodes, services) = (nodes + 30, services + 30);
        cluster.apply(&batch);
        let (holder, _) = wait_for("a leader", SOON, || {
            let (holder, transitions) = cluster.holder()?;
            (!holder.is_empty() && !leaders.contains(&holder)).then_some((holder, transitions))
        })
        .unwrap();
        // After some writes, and at another moment in each round.
        let some = before.0.len() + round * 7 + 1;
        wait_for("some blocks", SOON, || {
            (cluster.blocks().len() >= some).then_some(())
        })
        .unwrap();
        let leads = operators.iter().position(|o| o.me() == holder);
        let leads = leads.unwrap_or_else(|| panic!("{holder} leads, and is none of ours"));
        operators[leads].process.signal(Signal::KILL).unwrap();
        leaders.insert(holder);
        operators[leads] = cluster.operator(&format!("op-{}", round + 2), "");
        wait_for("everything assigned", SOON, || {
            cluster.complete(nodes, services).then_some(())
        })
        .unwrap_or_else(|e| panic!("{e:#}\n{}\n{}", operators[0].log(), operators[1].log()));
        let after = (cluster.blocks(), cluster.addresses());
        for (block, owner) in &before.0 {
            assert_eq!(after.0.get(block), Some(owner), "{block} moved");
        }
        for (service, addresses) in &before.1 {
            assert_eq!(after.1.get(service), Some(addresses), "{service} moved");
        }
        before = after;
    }
    // One that is told to stop gives the lease back: the other need not wait.
    let (leads, holder, transitions) = wait_for("a living leader", SOON, || {
        let (holder, transitions) = cluster.holder()?;
        let leads = operators.iter().position(|o| o.me() == holder)?;
        Some((leads, holder, transitions))
    })
    .unwrap();
    let asked = std::time::Instant::now();
    operators[leads].process.signal(Signal::TERM).unwrap();
    wait_for("the next leader", SOON, || {
        let (now, count) = cluster.holder()?;
        (!now.is_empty() && now != holder && count > transitions).then_some(())
    })
    .unwrap();
    assert!(
        asked.elapsed() < Duration::from_secs(10),
        "{:?}",
        asked.elapsed()
    );
}

#[test]
fn a_leader_that_was_frozen_writes_nothing_when_it_thaws() {
    let Some(cluster) = Cluster::start() else {
        return;
    };
    let first = cluster.operator("op-0", "");
    cluster.apply(&node("a"));
    wait_for("blocks", SOON, || cluster.complete(1, 0).then_some(())).unwrap();
    let frozen = first.me();
    first.process.signal(Signal::STOP).unwrap();
    let second = cluster.operator("op-1", "");
    wait_for("the second leads", SOON, || {
        (cluster.holder()?.0 == second.me()).then_some(())
    })
    .unwrap();
    // Work that both would do: the frozen one's watch has it in its socket.
    let batch: String = (0..10)
        .map(|i| node(&format!("b{i}")) + &balancer(&format!("s{i}"), ""))
        .collect();
    cluster.apply(&batch);
    wait_for("all assigned", SOON, || {
        cluster.complete(11, 10).then_some(())
    })
    .unwrap();
    let before = (cluster.blocks(), cluster.addresses());
    first.process.signal(Signal::CONT).unwrap();
    wait_for("it knows", SOON, || {
        first.log().contains("nothing is written").then_some(())
    })
    .unwrap_or_else(|e| panic!("{e:#}\n{}", first.log()));
    assert_eq!((cluster.blocks(), cluster.addresses()), before);
    assert_eq!(cluster.holder().unwrap().0, second.me());
    assert_ne!(frozen, second.me());
    // It acted in one reign only.
    assert_eq!(
        first.log().matches("the operator acts").count(),
        1,
        "{}",
        first.log()
    );
}

/// By it a person tells whether what a status says is about the pool as it is now.
#[test]
fn a_pools_status_names_the_generation_that_it_is_about() {
    let Some(cluster) = Cluster::start() else {
        return;
    };
    let operator = cluster.operator("op-0", "");
    let pool = || cluster.get("ippools").pop().unwrap();
    let generation = || pool()["metadata"]["generation"].as_i64().unwrap();
    // The generation that status and conditions are about, if they are of one mind, and whether the pool gives out.
    let said = || {
        let status = pool()["status"].clone();
        let conditions = status["conditions"].as_array()?.clone();
        let about = status["observedGeneration"].as_i64()?;
        let ready = conditions.iter().find(|c| c["type"] == "Ready")?["status"] == "True";
        let of_one_mind = (conditions.iter()).all(|c| c["observedGeneration"] == about);
        (of_one_mind && conditions.len() == 2).then_some((about, ready))
    };
    let says = |what: &str, wanted: (i64, bool)| {
        wait_for(what, SOON, || (said() == Some(wanted)).then_some(()))
            .unwrap_or_else(|e| panic!("{e:#}: {}\n{}", pool(), operator.log()));
    };
    says("the first status", (1, true));
    let closed = POOL.replace("spec:", "spec:\n  closed: true");
    cluster.apply(&closed);
    assert_eq!(generation(), 2);
    says("a pool that is closed", (2, false));
    // What nobody has looked at yet is not claimed.
    operator.process.signal(Signal::STOP).unwrap();
    cluster.apply(POOL);
    assert_eq!((generation(), said()), (3, Some((2, false))));
    operator.process.signal(Signal::CONT).unwrap();
    says("a pool that is open again", (3, true));
}

#[test]
fn blocks_come_back_when_the_node_object_is_gone_and_not_before() {
    let Some(cluster) = Cluster::start() else {
        return;
    };
    // Two blocks of each class in all.
    cluster.apply(
        "{apiVersion: kun.network/v1alpha1, kind: IPPool, metadata: {name: main}, spec: {pods: [10.64.0.0/25, 240.0.0.0/25]}}",
    );
    let operator = cluster.operator("op-0", "ipam: {cooldown: 3s}\n");
    cluster.apply(&(node("a") + &node("b")));
    wait_for("blocks", SOON, || cluster.complete(2, 0).then_some(())).unwrap();
    let uid = |name: &str| {
        let nodes = cluster.get("nodes");
        let found = nodes
            .iter()
            .find(|n| n["metadata"]["name"] == name)
            .unwrap();
        found["metadata"]["uid"].as_str().unwrap().to_owned()
    };
    let of = |uid: &str| -> BTreeMap<String, i64> {
        let blocks = cluster.blocks().into_iter();
        blocks
            .filter(|(_, o)| o.1 == uid)
            .map(|(b, o)| (b, o.2))
            .collect()
    };
    let (old, other) = (uid("a"), uid("b"));
    let had = of(&old);
    assert_eq!(had.len(), 2);
    // It is silent, and it is there: nothing is taken from it for the sake of another.
    cluster.apply(&node("c"));
    wait_for("the shortage", SOON, || {
        operator.log().contains("node c has 0 of 1").then_some(())
    })
    .unwrap();
    let told = || {
        cluster.get("events").iter().any(|e| {
            e["reason"] == "NoFreeBlock" && e["involvedObject"]["name"] == "c"
                || e["regarding"]["name"] == "c"
        })
    };
    wait_for("an Event of it", SOON, || told().then_some(())).unwrap();
    assert_eq!(of(&old), had);
    // Deleted, and made again under its name at once: another node.
    cluster.plane.kubectl(&["delete", "node", "a"], "").unwrap();
    cluster.apply(&node("a"));
    let new = uid("a");
    assert_ne!(new, old);
    // There is one pair of blocks for two nodes that have none: it rests first, then one of them has it, with the next epoch.
    let begun = std::time::Instant::now();
    let heir = wait_for("an heir", SOON, || {
        let blocks = cluster.blocks();
        let owners: BTreeSet<String> = had.keys().map(|b| blocks[b].1.clone()).collect();
        (owners.len() == 1 && !owners.contains(&old)).then_some(owners.into_iter().next()?)
    })
    .unwrap();
    assert!(
        begun.elapsed() >= Duration::from_millis(2500),
        "after {:?}",
        begun.elapsed()
    );
    assert!([new, uid("c")].contains(&heir));
    assert!(
        of(&heir).values().all(|epoch| *epoch == 2),
        "{:?}",
        cluster.blocks()
    );
    assert_eq!(of(&other).values().copied().collect::<Vec<_>>(), [1, 1]);
}

#[test]
fn services_of_others_are_left_alone() {
    let Some(cluster) = Cluster::start() else {
        return;
    };
    let foreign = ", loadBalancerClass: example.com/lb";
    let own = ", loadBalancerClass: kun.network/bgp";
    cluster.apply(
        &(balancer("foreign", foreign) + &balancer("named", "") + &balancer("elsewhere", "")),
    );
    for (service, ingress) in [
        ("named", r#"{"hostname":"lb.example"}"#),
        ("elsewhere", r#"{"ip":"198.51.100.7"}"#),
    ] {
        let patch = format!(r#"{{"status":{{"loadBalancer":{{"ingress":[{ingress}]}}}}}}"#);
        let words = [
            "patch",
            "service",
            service,
            "--subresource=status",
            "--type=merge",
            "-p",
            &patch,
        ];
        cluster.plane.kubectl(&words, "").unwrap();
    }
    let operator = cluster.operator("op-0", "");
    cluster.apply(&(balancer("own", own) + &balancer("nobodys", "")));
    wait_for("addresses", SOON, || {
        let addresses = cluster.addresses();
        (addresses.get("own")?.len() == 2 && addresses.get("nobodys")?.len() == 2).then_some(())
    })
    .unwrap_or_else(|e| panic!("{e:#}\n{}", operator.log()));
    let addresses = cluster.addresses();
    assert_eq!(addresses.get("foreign"), None);
    assert_eq!(addresses["named"], [""; 0]);
    assert_eq!(addresses["elsewhere"], ["198.51.100.7"]);

    // Somebody who takes the addresses away again and again has his way.
    let empty = r#"{"status":{"loadBalancer":{"ingress":null}}}"#;
    let words = [
        "patch",
        "service",
        "nobodys",
        "--subresource=status",
        "--type=merge",
        "-p",
        empty,
    ];
    wait_for("the operator gives up", SOON, || {
        cluster.plane.kubectl(&words, "").ok()?;
        operator
            .log()
            .contains("Service default/nobodys: its addresses were written 8 times")
            .then_some(())
    })
    .unwrap_or_else(|e| panic!("{e:#}\n{}", operator.log()));
    assert_eq!(cluster.addresses()["own"], addresses["own"]);
}
