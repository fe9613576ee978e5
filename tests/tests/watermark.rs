//! An address comes back only when every node's dataplane has applied a revision of the EndpointSlices without it: a real control
//! plane, the real operator, and two real agents with the rights that `deploy/base` gives them. One agent reaches the API server
//! through a proxy that spoils answers.
//!
//! One history for all of it, as a control plane takes longer to start than most of the steps take.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use kun_config::types::{Slot, SlotClass};
use kun_control::{AttachmentKey, Fact, PodRef, Request, Response, SlotRow, Status};
use kun_harness::control_plane::ControlPlane;
use kun_harness::{
    BpfFs, Cgroup, Netns, Process, require_root, require_tool, skip, veth, wait_for, wait_until,
};
use kun_tests::faulty_proxy::FaultyProxy;
use rustix::process::Signal;
use serde_json::{Value, json};

/// A leader that is killed is followed after 15 s, a node that was refused comes back within a minute; a busy machine takes its time.
const SOON: Duration = Duration::from_secs(150);

/// The least time that a slot is watched which must not come back; more if the way back took longer when nothing was in it.
const WATCHED: Duration = Duration::from_secs(15);

/// The least that can be configured.
const QUARANTINE_AFTER: &str = "60s";

const NODES: [&str; 2] = ["node-a", "node-b"];

/// The server's address in the fabric.
const SERVER: &str = "192.0.2.1";

fn deploy(file: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy");
    path.join(file).display().to_string()
}

fn program(name: &str) -> PathBuf {
    Path::new(env!("CARGO_BIN_EXE_kun-lab")).with_file_name(name)
}

/// A node with its agent. Fields drop in order: the agent before what it stands on.
struct Node {
    agent: Process,
    name: &'static str,
    netns: Netns,
    _cgroup: Cgroup,
    _bpffs: BpfFs,
    dir: tempfile::TempDir,
}

impl Node {
    fn start(name: &'static str, netns: Netns, kubeconfig: &Path) -> Self {
        let (cgroup, bpffs) = (Cgroup::new().unwrap(), BpfFs::new().unwrap());
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let config = json!({
            "node": {"name": name},
            "cluster": {"kubernetes": {"kubeconfig": kubeconfig}},
            "ipam": {"podPrefix": "fd00:64::/96", "v4Pools": ["10.64.0.0/16"], "cooldown": "2s", "quarantineAfter": QUARANTINE_AFTER},
            "proxy": {"cgroupRoot": cgroup.path(), "maxServices": 1024, "maxBackends": 1024, "maxSlots": 4096, "maxFlows": 4096},
            "agent": {"stateDir": path("state"), "socket": path("agent.sock"), "bpffsRoot": bpffs.path().join("kun")},
        });
        fs::write(path("kun.yaml"), config.to_string()).unwrap();
        let mut command = Command::new(program("kun-proxy"));
        command.arg("--config").arg(path("kun.yaml"));
        let log = File::create(path("log")).unwrap();
        command
            .env_remove("RUST_LOG")
            .stdout(Stdio::null())
            .stderr(log);
        Self {
            agent: netns.spawn(command).unwrap(),
            name,
            netns,
            _cgroup: cgroup,
            _bpffs: bpffs,
            dir,
        }
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    fn try_ask(&self, request: &Request) -> Option<Response> {
        kun_control::ask(&self.dir.path().join("agent.sock"), request).ok()
    }

    fn ask(&self, request: &Request) -> Response {
        self.try_ask(request)
            .unwrap_or_else(|| panic!("{} does not answer: {}", self.name, self.log()))
    }

    fn status(&self) -> Option<Status> {
        match self.try_ask(&Request::Status)? {
            Response::Status { status } => Some(status),
            _ => None,
        }
    }

    /// A slot as another plugin would ask for it, so that nobody misses its interfaces.
    fn allocate(&self, container: &str) -> (Slot, u64) {
        let request = Request::Allocate {
            key: key(container),
            pod: PodRef {
                namespace: "default".into(),
                name: container.into(),
                uid: String::new(),
            },
            class: Some(SlotClass::Dual),
            slot: None,
            within: Vec::new(),
            delegated: true,
        };
        match self.ask(&request) {
            Response::Allocation { allocation } => (allocation.slot, allocation.generation),
            other => panic!("{other:?}"),
        }
    }

    fn release(&self, container: &str) {
        let released = self.ask(&Request::Release {
            key: key(container),
            generation: None,
        });
        assert_eq!(released, Response::Done);
    }

    /// What `kunctl ipam` shows of a slot; `None`: it is free.
    fn row(&self, slot: Slot) -> Option<SlotRow> {
        match self.ask(&Request::Ipam) {
            Response::Ipam { slots, .. } => slots.into_iter().find(|row| row.slot == slot),
            other => panic!("{other:?}"),
        }
    }

    fn comes_back(&self, slot: Slot) -> Duration {
        let begin = Instant::now();
        wait_for("the slot to come back", SOON, || {
            self.row(slot).is_none().then_some(())
        })
        .unwrap_or_else(|e| panic!("{e:#}: {:?}\n{}", self.row(slot), self.log()));
        begin.elapsed()
    }

    /// It does not come back, and says of whom it waits.
    fn waits(&self, slot: Slot, time: Duration, what: &str) {
        let back = wait_until(time, || self.row(slot).is_none());
        assert!(!back, "{what}: the slot came back");
        let row = self.row(slot).unwrap();
        let says = |text: &str| row.why.iter().any(|why| why.contains(text));
        assert!(says("is waited for"), "{what}: {row:?}");
    }
}

fn key(container: &str) -> AttachmentKey {
    AttachmentKey {
        network: "kun".into(),
        container_id: container.into(),
        ifname: "eth0".into(),
    }
}

fn value(facts: &[Fact], name: &str) -> Option<String> {
    let fact = facts.iter().find(|f| f.name == name)?;
    Some(fact.value.clone())
}

struct Lab {
    nodes: Vec<Node>,
    operator: Option<Process>,
    proxy: FaultyProxy,
    plane: ControlPlane,
    fabric: Netns,
    dir: tempfile::TempDir,
}

impl Lab {
    fn new() -> Option<Self> {
        if !require_root() || !require_tool("ip") {
            return None;
        }
        if kun_harness::cgroup2_mount().is_err() {
            skip("because no cgroup v2 tree is mounted");
            return None;
        }
        for name in ["kun-proxy", "kun-operator"] {
            if !program(name).is_file() {
                skip(&format!(
                    "because {name} is not built: cargo build --workspace --bins"
                ));
                return None;
            }
        }
        let builder = ControlPlane::builder()?;
        let fabric = Netns::new("wm-f").unwrap();
        fabric.exec("link set lo up").unwrap();
        let mut namespaces = Vec::new();
        // Each on a wire of its own; the server has the first one's end.
        for (i, name) in NODES.iter().enumerate() {
            let netns = Netns::new(&format!("wm-{name}")).unwrap();
            veth(&netns, "eth0", &fabric, name).unwrap();
            let (here, there) = (4 * i + 2, 4 * i + 1);
            for (ns, interface, last) in [(&netns, "eth0", here), (&fabric, *name, there)] {
                let address = format!("addr add 192.0.2.{last}/30 dev {interface}");
                ns.exec(&address).unwrap();
            }
            netns.exec("link set lo up").unwrap();
            let route = format!("route add default via 192.0.2.{there}");
            netns.exec(&route).unwrap();
            namespaces.push(netns);
        }
        let plane = builder
            .netns(fabric.path())
            .bind(SERVER.parse().unwrap())
            // No kubelet renews the Nodes.
            .controller_flags(&["--controllers=*,-node-lifecycle-controller"])
            .start()
            .unwrap_or_else(|e| panic!("{e:#}"));
        let kubectl = |words: &[&str], stdin: &str| plane.kubectl(words, stdin).unwrap();
        kubectl(&["apply", "--server-side", "-k", &deploy("crds")], "");
        for rights in ["agent", "operator"] {
            kubectl(
                &["create", "-f", &deploy(&format!("base/{rights}-rbac.yaml"))],
                "",
            );
        }
        let established = [
            "wait",
            "--for=condition=Established",
            "crd",
            "--all",
            "--timeout=60s",
        ];
        kubectl(&established, "");
        let objects = NODES
            .map(|name| format!("---\napiVersion: v1\nkind: Node\nmetadata: {{name: {name}}}\n"));
        kubectl(&["apply", "--server-side", "-f", "-"], &objects.concat());
        let pool = "apiVersion: kun.network/v1alpha1\nkind: IPPool\nmetadata: {name: main}\nspec: {pods: [10.64.0.0/24, 240.0.0.0/24]}\n";
        kubectl(&["apply", "--server-side", "-f", "-"], pool);
        let dir = tempfile::tempdir().unwrap();
        let account = |name: &str| {
            let (token, kubeconfig) = (
                dir.path().join(name),
                dir.path().join(format!("{name}.conf")),
            );
            let hour = Duration::from_secs(3600);
            plane
                .write_token("kube-system", name, hour, &token)
                .unwrap();
            plane.token_kubeconfig(&token, &kubeconfig).unwrap();
            kubeconfig
        };
        let (agents, _) = (account("kun-proxy"), account("kun-operator"));
        let proxy = namespaces[1].run(|| FaultyProxy::start(&agents)).unwrap();
        let mut lab = Self {
            nodes: Vec::new(),
            operator: None,
            proxy,
            plane,
            fabric,
            dir,
        };
        lab.operate();
        let ways = [agents, lab.proxy.kubeconfig()];
        for ((name, netns), way) in NODES.into_iter().zip(namespaces).zip(ways) {
            lab.nodes.push(Node::start(name, netns, &way));
        }
        for node in &lab.nodes {
            wait_for(node.name, SOON, || {
                let status = node.status()?;
                let good = |facts: &[Fact], name| {
                    facts
                        .iter()
                        .any(|f| f.name == name && f.ok && !f.value.is_empty())
                };
                (good(&status.ipam, "blocks") && good(&status.ipam, "watermark")).then_some(())
            })
            .unwrap_or_else(|e| {
                panic!(
                    "{e:#}: {:?}\n{}\n{}",
                    node.status(),
                    node.log(),
                    lab.operator_log()
                )
            });
        }
        Some(lab)
    }

    /// Starts an operator.
    fn operate(&mut self) {
        let path = |name: &str| self.dir.path().join(name);
        let config = json!({
            "cluster": {"kubernetes": {"kubeconfig": path("kun-operator.conf")}},
            "ipam": {"podPrefix": "fd00:64::/96", "v4Pools": ["10.64.0.0/16"], "cooldown": "2s", "quarantineAfter": QUARANTINE_AFTER},
            "operator": {"metrics": "off"},
        });
        fs::write(path("operator.yaml"), config.to_string()).unwrap();
        let mut command = Command::new(program("kun-operator"));
        let log = File::options()
            .create(true)
            .append(true)
            .open(path("operator.log"))
            .unwrap();
        command
            .arg("--config")
            .arg(path("operator.yaml"))
            .env_remove("RUST_LOG")
            .stdout(Stdio::null())
            .stderr(log);
        self.operator = Some(self.fabric.spawn(command).unwrap());
    }

    fn operator_log(&self) -> String {
        fs::read_to_string(self.dir.path().join("operator.log")).unwrap_or_default()
    }

    fn get(&self, words: &[&str]) -> Value {
        let words: Vec<&str> = ["get", "-o", "json"].iter().chain(words).copied().collect();
        self.plane
            .kubectl(&words, "")
            .ok()
            .and_then(|text| serde_json::from_str(&text).ok())
            .unwrap_or_default()
    }

    fn revision_on(&self, namespace: &str, lease: &str) -> u64 {
        let lease = self.get(&["-n", namespace, "lease", lease]);
        let revision = &lease["metadata"]["annotations"]["kun.network/endpoints-revision"];
        revision
            .as_str()
            .and_then(|r| r.parse().ok())
            .unwrap_or_default()
    }

    fn published(&self, node: &str) -> u64 {
        self.revision_on("kun-node-lease", node)
    }

    fn folded(&self) -> u64 {
        self.revision_on("kube-system", "kun-watermark")
    }

    fn all_have(&self, revision: u64) {
        for node in &self.nodes {
            wait_for(&format!("{} at {revision}", node.name), SOON, || {
                (self.published(node.name) >= revision).then_some(())
            })
            .unwrap_or_else(|e| panic!("{e:#}: {}\n{}", self.published(node.name), node.log()));
        }
    }

    /// The Service's endpoints are these; the revision since when.
    fn endpoints(&self, slots: &[Slot]) -> u64 {
        let endpoints: Vec<Value> = slots
            .iter()
            .map(|slot| json!({"addresses": [slot.ipv4().to_string()], "conditions": {"ready": true}}))
            .collect();
        let list = json!({"apiVersion": "v1", "kind": "List", "items": [
            {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": "default"},
                "spec": {"ports": [{"name": "http", "port": 80}]}},
            {"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
                "metadata": {"name": "web-4", "namespace": "default", "labels": {"kubernetes.io/service-name": "web"}},
                "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}], "endpoints": endpoints},
        ]});
        self.plane
            .kubectl(&["apply", "-f", "-"], &list.to_string())
            .unwrap();
        let slice = self.get(&["-n", "default", "endpointslice", "web-4"]);
        slice["metadata"]["resourceVersion"]
            .as_str()
            .unwrap()
            .parse()
            .unwrap()
    }

    /// A slot of node A that every node sends to, released there; the slice still has it.
    fn used_and_released(&self, container: &str) -> (Slot, u64) {
        let (slot, generation) = self.nodes[0].allocate(container);
        self.all_have(self.endpoints(&[slot]));
        self.nodes[0].release(container);
        (slot, generation)
    }

    fn condition(&self, node: &str) -> Value {
        let node = self.get(&["node", node]);
        let conditions = node["status"]["conditions"].as_array().cloned();
        let ours = |c: &Value| c["type"] == "kun.network/VirtualNICNotReclaimed";
        let mut conditions = conditions.unwrap_or_default().into_iter();
        conditions.find(ours).unwrap_or_default()
    }

    fn turns(&self, node: &Node, status: &str) -> Value {
        wait_for(&format!("the condition to be {status}"), SOON, || {
            let condition = self.condition(node.name);
            (condition["status"] == status).then_some(condition)
        })
        .unwrap_or_else(|e| panic!("{e:#}: {}\n{}", self.condition(node.name), node.log()))
    }
}

/// Nothing is in the way; how long that takes.
fn comes_back_when_all_have_applied(lab: &mut Lab) -> Duration {
    let (slot, _) = lab.used_and_released("one");
    let held = lab.nodes[0].row(slot).expect("a slice has it");
    assert_ne!(held.state, "free");
    let without = lab.endpoints(&[]);
    let took = lab.nodes[0].comes_back(slot);
    assert!(lab.folded() >= without, "{} of {without}", lab.folded());
    for node in NODES {
        let has = lab.published(node);
        assert!(has >= without, "{node}: {has} of {without}");
    }
    took
}

/// The other node's agent is frozen: its dataplane still sends to the address.
fn a_frozen_agent_is_waited_for(lab: &mut Lab, time: Duration) {
    let (slot, _) = lab.used_and_released("two");
    lab.nodes[1].agent.signal(Signal::STOP).unwrap();
    lab.endpoints(&[]);
    lab.nodes[0].waits(slot, time, "a frozen agent");
    let why = lab.nodes[0].row(slot).unwrap().why;
    assert!(why.iter().any(|w| w.contains("of node-b")), "{why:?}");
    let status = lab.nodes[0].status().unwrap();
    let watermark = value(&status.ipam, "watermark").unwrap();
    assert!(watermark.contains("slowest: node-b"), "{watermark}");
    lab.nodes[1].agent.signal(Signal::CONT).unwrap();
    lab.nodes[0].comes_back(slot);
}

/// Nobody folds: the slot waits, is quarantined, and comes back once somebody does.
fn without_an_operator_it_waits(lab: &mut Lab) {
    let (slot, _) = lab.used_and_released("three");
    lab.operator = None;
    lab.endpoints(&[]);
    let row = || lab.nodes[0].row(slot);
    wait_for("quarantine", SOON, || {
        let row = row().expect("it came back without anybody to say so");
        (row.state == "quarantined").then_some(())
    })
    .unwrap_or_else(|e| panic!("{e:#}: {:?}", row()));
    lab.nodes[0].waits(slot, Duration::ZERO, "quarantined");
    lab.operate();
    lab.nodes[0].comes_back(slot);
}

/// Refused, and cut off again and again: the dataplane keeps what it has, and what it has is published once the server takes it.
fn faults_in_between_cost_time_alone(lab: &mut Lab) {
    let (slot, _) = lab.used_and_released("four");
    let backends = |lab: &Lab| value(&lab.nodes[1].status().unwrap().proxy, "backends").unwrap();
    let before = backends(lab);
    // The API server's own, and the one.
    assert!(before.starts_with("2 of"), "{before}");
    {
        let mut faults = lab.proxy.faults();
        for _ in 0..10 {
            faults.refuse.extend([(429, Some(1)), (500, None)]);
        }
    }
    lab.proxy.cut();
    // Every answer but a few is a refusal until they are used up.
    wait_for("the refusals to be used up", SOON, || {
        assert_eq!(backends(lab), before, "the dataplane lost what it had");
        lab.proxy.faults().refuse.is_empty().then_some(())
    })
    .unwrap();
    lab.proxy.cut();
    let without = lab.endpoints(&[]);
    lab.nodes[0].comes_back(slot);
    assert!(lab.published("node-b") >= without);
    let failed = lab.nodes[1].log().contains("the proxy says");
    assert!(failed, "no publication met a fault: {}", lab.nodes[1].log());
}

/// The fold's Lease is deleted: the operator makes it anew.
fn a_deleted_fold_is_made_anew(lab: &mut Lab) {
    let words = ["-n", "kube-system", "delete", "lease", "kun-watermark"];
    lab.plane.kubectl(&words, "").unwrap();
    wait_for("the fold", SOON, || (lab.folded() > 0).then_some(()))
        .unwrap_or_else(|e| panic!("{e:#}\n{}", lab.operator_log()));
}

/// An interface that carries the tag of a pod that is gone, and that the kernel does not remove: the loopback.
fn what_cannot_be_reclaimed_is_a_condition(lab: &mut Lab) {
    let node = &lab.nodes[0];
    let before = lab.turns(node, "False");
    assert_eq!(before["reason"], "AllReclaimed");
    let (slot, generation) = node.allocate("five");
    node.release("five");
    let tag = format!("link set lo alias kun:{generation}:kun/five/eth0");
    node.netns.exec(&tag).unwrap();
    let stays = lab.turns(node, "True");
    assert_eq!(stays["reason"], "InterfacesStay");
    let message = stays["message"].as_str().unwrap();
    assert!(message.contains("lo: "), "{message}");
    assert!(stays["lastTransitionTime"].as_str() > before["lastTransitionTime"].as_str());
    // Others' conditions are theirs, and a second round writes nothing.
    let version = |lab: &Lab| lab.get(&["node", node.name])["metadata"]["resourceVersion"].clone();
    let written = version(lab);
    assert!(!wait_until(Duration::from_secs(12), || version(lab) != written));
    // `ip` takes no empty alias.
    let index = "/sys/class/net/lo/ifalias";
    let words = [
        "ip",
        "netns",
        "exec",
        node.netns.name(),
        "sh",
        "-c",
        &format!("echo > {index}"),
    ];
    kun_harness::run(words).unwrap();
    let gone = lab.turns(node, "False");
    assert!(gone["lastTransitionTime"].as_str() > stays["lastTransitionTime"].as_str());
    node.comes_back(slot);
}

/// A node that is gone is waited for by nobody, and its Lease goes with it.
fn a_deleted_node_takes_its_lease_along(lab: &mut Lab) {
    let (slot, _) = lab.used_and_released("six");
    lab.nodes[1].agent.signal(Signal::STOP).unwrap();
    lab.endpoints(&[]);
    lab.nodes[0].waits(slot, WATCHED, "a frozen agent");
    lab.plane
        .kubectl(&["delete", "node", "node-b"], "")
        .unwrap();
    lab.nodes[0].comes_back(slot);
    wait_for("the Lease to go", SOON, || {
        let leases = lab.get(&["-n", "kun-node-lease", "leases"]);
        let names: BTreeSet<String> = (leases["items"].as_array().into_iter().flatten())
            .map(|l| l["metadata"]["name"].to_string())
            .collect();
        (names == BTreeSet::from(["\"node-a\"".to_owned()])).then_some(())
    })
    .unwrap();
    lab.nodes[1].agent.signal(Signal::CONT).unwrap();
}

#[test]
fn an_address_comes_back_only_after_every_nodes_dataplane_has_forgotten_it() {
    let Some(mut lab) = Lab::new() else {
        return;
    };
    let took = comes_back_when_all_have_applied(&mut lab);
    eprintln!("a slot came back {took:?} after its last slice");
    a_frozen_agent_is_waited_for(&mut lab, WATCHED.max(took * 2));
    without_an_operator_it_waits(&mut lab);
    faults_in_between_cost_time_alone(&mut lab);
    a_deleted_fold_is_made_anew(&mut lab);
    what_cannot_be_reclaimed_is_a_condition(&mut lab);
    a_deleted_node_takes_its_lease_along(&mut lab);
}
