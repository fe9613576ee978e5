//! A control plane in a network of its own, the operator, and two agents with the rights that `deploy/base` gives them; the second one's
//! way to the API server goes through a proxy that spoils answers.

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
pub(crate) const SOON: Duration = Duration::from_secs(150);

/// The least time that a slot is watched which must not come back; more if the way back took longer when nothing was in it.
pub(crate) const WATCHED: Duration = Duration::from_secs(15);

/// The least that can be configured.
const QUARANTINE_AFTER: &str = "60s";

pub(crate) const NODES: [&str; 2] = ["node-a", "node-b"];

pub(crate) const MAX_SERVICES: u32 = 1024;
pub(crate) const MAX_BACKENDS: u32 = 1024;
pub(crate) const MAX_SLOTS: u32 = 4096;

/// A slice beside the one that is written all the time.
const HELD: &str = "held-4";

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
pub(crate) struct Node {
    pub(crate) agent: Process,
    pub(crate) name: &'static str,
    pub(crate) netns: Netns,
    pub(crate) cgroup: Cgroup,
    pub(crate) bpffs: BpfFs,
    dir: tempfile::TempDir,
}

impl Node {
    pub(crate) fn start(name: &'static str, netns: Netns, kubeconfig: &Path) -> Self {
        let (cgroup, bpffs) = (Cgroup::new().unwrap(), BpfFs::new().unwrap());
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let config = json!({
            "node": {"name": name},
            "cluster": {"kubernetes": {"kubeconfig": kubeconfig}},
            "ipam": {"podPrefix": "fd00:64::/96", "v4Pools": ["10.64.0.0/16"], "cooldown": "2s", "quarantineAfter": QUARANTINE_AFTER, "returnBlocksAfter": "5s"},
            "proxy": {"cgroupRoot": cgroup.path(), "maxServices": MAX_SERVICES, "maxBackends": MAX_BACKENDS, "maxSlots": MAX_SLOTS, "maxFlows": MAX_SLOTS},
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
            cgroup,
            bpffs,
            dir,
        }
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    fn try_ask(&self, request: &Request) -> Option<Response> {
        kun_control::ask(&self.dir.path().join("agent.sock"), request).ok()
    }

    pub(crate) fn ask(&self, request: &Request) -> Response {
        self.try_ask(request)
            .unwrap_or_else(|| panic!("{} does not answer: {}", self.name, self.log()))
    }

    pub(crate) fn status(&self) -> Option<Status> {
        match self.try_ask(&Request::Status)? {
            Response::Status { status } => Some(status),
            _ => None,
        }
    }

    /// A slot as another plugin would ask for it, so that nobody misses its interfaces.
    pub(crate) fn allocate(&self, container: &str) -> (Slot, u64) {
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
            ports: Vec::new(),
        };
        match self.ask(&request) {
            Response::Allocation { allocation } => (allocation.slot, allocation.generation),
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn release(&self, container: &str) {
        let released = self.ask(&Request::Release {
            key: key(container),
            generation: None,
        });
        assert_eq!(released, Response::Done);
    }

    /// What `kunctl ipam` shows of a slot; `None`: it is free.
    pub(crate) fn row(&self, slot: Slot) -> Option<SlotRow> {
        match self.ask(&Request::Ipam) {
            Response::Ipam { slots, .. } => slots.into_iter().find(|row| row.slot == slot),
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn comes_back(&self, slot: Slot) -> Duration {
        let begin = Instant::now();
        wait_for("the slot to come back", SOON, || {
            self.row(slot).is_none().then_some(())
        })
        .unwrap_or_else(|e| panic!("{e:#}: {:?}\n{}", self.row(slot), self.log()));
        begin.elapsed()
    }

    /// It does not come back, and says of whom it waits.
    pub(crate) fn waits(&self, slot: Slot, time: Duration, what: &str) {
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

pub(crate) fn value(facts: &[Fact], name: &str) -> Option<String> {
    let fact = facts.iter().find(|f| f.name == name)?;
    Some(fact.value.clone())
}

pub(crate) struct Lab {
    pub(crate) nodes: Vec<Node>,
    pub(crate) operator: Option<Process>,
    pub(crate) proxy: FaultyProxy,
    pub(crate) plane: ControlPlane,
    pub(crate) fabric: Netns,
    dir: tempfile::TempDir,
}

impl Lab {
    pub(crate) fn new() -> Option<Self> {
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
                let watermark = good(&status.ipam, "watermark");
                // The dual block: one of the other class may be there before it.
                let dual = lab.get(&["ipamblocks"])["items"]
                    .as_array()?
                    .iter()
                    .any(|b| {
                        let first = b["spec"]["first"].as_str();
                        b["spec"]["node"] == node.name
                            && first.is_some_and(|a| a.starts_with("10."))
                            && b["status"]["phase"] == "Confirmed"
                    });
                (watermark && dual && good(&status.ipam, "blocks")).then_some(())
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
    pub(crate) fn operate(&mut self) {
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

    /// Ends the operator in its own way: it gives its lease back, so that the next one need not wait until that has run out.
    pub(crate) fn retire(&mut self) {
        let mut operator = self.operator.take().expect("it runs");
        operator.signal(Signal::TERM).unwrap();
        let ended = wait_for("the operator's end", SOON, || {
            operator.try_wait().ok().flatten()
        });
        assert!(ended.unwrap().success(), "{}", self.operator_log());
    }

    pub(crate) fn operator_log(&self) -> String {
        fs::read_to_string(self.dir.path().join("operator.log")).unwrap_or_default()
    }

    pub(crate) fn get(&self, words: &[&str]) -> Value {
        let words: Vec<&str> = ["get", "-o", "json"].iter().chain(words).copied().collect();
        self.plane
            .kubectl(&words, "")
            .ok()
            .and_then(|text| serde_json::from_str(&text).ok())
            .unwrap_or_default()
    }

    pub(crate) fn revision_on(&self, namespace: &str, lease: &str) -> u64 {
        let lease = self.get(&["-n", namespace, "lease", lease]);
        let revision = &lease["metadata"]["annotations"]["kun.network/endpoints-revision"];
        revision
            .as_str()
            .and_then(|r| r.parse().ok())
            .unwrap_or_default()
    }

    pub(crate) fn published(&self, node: &str) -> u64 {
        self.revision_on("kun-node-lease", node)
    }

    pub(crate) fn folded(&self) -> u64 {
        self.revision_on("kube-system", "kun-watermark")
    }

    pub(crate) fn all_have(&self, revision: u64) {
        for node in &self.nodes {
            wait_for(&format!("{} at {revision}", node.name), SOON, || {
                (self.published(node.name) >= revision).then_some(())
            })
            .unwrap_or_else(|e| panic!("{e:#}: {}\n{}", self.published(node.name), node.log()));
        }
    }

    /// The Service's endpoints are these; the revision since when.
    pub(crate) fn endpoints(&self, slots: &[Slot]) -> u64 {
        let endpoints: Vec<Value> = slots
            .iter()
            .map(|slot| json!({"addresses": [slot.ipv4().to_string()], "conditions": {"ready": true}}))
            .collect();
        let service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": "default"},
            "spec": {"ports": [{"name": "http", "port": 80}]}});
        self.slice("web-4", &endpoints, &[service])
    }

    /// Writes a slice of the Service, beside these objects; the revision since when.
    fn slice(&self, name: &str, endpoints: &[Value], beside: &[Value]) -> u64 {
        let slice = json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": name, "namespace": "default", "labels": {"kubernetes.io/service-name": "web"}},
            "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}], "endpoints": endpoints});
        let items: Vec<&Value> = beside.iter().chain([&slice]).collect();
        let list = json!({"apiVersion": "v1", "kind": "List", "items": items});
        self.plane
            .kubectl(&["apply", "-f", "-"], &list.to_string())
            .unwrap();
        let slice = self.get(&["-n", "default", "endpointslice", name]);
        slice["metadata"]["resourceVersion"]
            .as_str()
            .unwrap()
            .parse()
            .unwrap()
    }

    /// A slot of node A that every node sends to, released there; the slice still has it.
    pub(crate) fn used_and_released(&self, container: &str) -> (Slot, u64) {
        let (slot, generation) = self.nodes[0].allocate(container);
        self.all_have(self.endpoints(&[slot]));
        self.nodes[0].release(container);
        (slot, generation)
    }

    /// The same in a slice of its own, until [`Lab::let_go`].
    pub(crate) fn held_and_released(&self, container: &str) -> Slot {
        let (slot, _) = self.nodes[0].allocate(container);
        let endpoint =
            json!({"addresses": [slot.ipv4().to_string()], "conditions": {"ready": true}});
        self.all_have(self.slice(HELD, &[endpoint], &[]));
        self.nodes[0].release(container);
        slot
    }

    pub(crate) fn let_go(&self) {
        let words = ["-n", "default", "delete", "endpointslice", HELD];
        self.plane.kubectl(&words, "").unwrap();
    }

    pub(crate) fn condition(&self, node: &str) -> Value {
        let node = self.get(&["node", node]);
        let conditions = node["status"]["conditions"].as_array().cloned();
        let ours = |c: &Value| c["type"] == "kun.network/VirtualNICNotReclaimed";
        let mut conditions = conditions.unwrap_or_default().into_iter();
        conditions.find(ours).unwrap_or_default()
    }

    pub(crate) fn turns(&self, node: &Node, status: &str) -> Value {
        wait_for(&format!("the condition to be {status}"), SOON, || {
            let condition = self.condition(node.name);
            (condition["status"] == status).then_some(condition)
        })
        .unwrap_or_else(|e| panic!("{e:#}: {}\n{}", self.condition(node.name), node.log()))
    }
}
