//! The node agent on a real API server that is killed, frozen, made to forget, refuses its token, replaces its Node and is flooded with
//! Services. In each case connections through a Service go on, nothing is withdrawn, the agent neither ends nor spins, and afterwards
//! the dataplane says what the API says.
//!
//! One control plane for all of it, as it takes longer to start than most of the faults take. The server is in the fabric, behind the
//! node's uplink, and the agent is what `deploy/base` makes it: a ServiceAccount's token with the rights of its ClusterRole.

mod rig;

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use kun_cluster::api::write::{Expected, WriteError, Writer};
use kun_cluster::{Kind, ObjectName, Resource};
use kun_control::{Fact, Request, Response, Status};
use kun_harness::control_plane::{ControlPlane, Part};
use kun_harness::{Netns, wait_for, wait_until};
use rig::{Inside, Node, Pod, Service, VIP4, VIP6};
use serde_json::{Value, json};

/// An agent that was refused waits up to 30 s before it asks again; a busy machine takes its time besides.
const TOLD_WITHIN: Duration = Duration::from_secs(120);

/// How long an agent is watched in a state that lasts.
const WATCHED: Duration = Duration::from_secs(5);

/// Of one core meanwhile. A thread that spins spends all of it, an agent that waits spends a hundredth.
const CPU_AT_MOST: f64 = 0.25;

/// Between two connects of the client: without it the client has the CPU that the agent is to be measured on.
const BREATH: Duration = Duration::from_millis(20);

const SERVICES: usize = 10_000;

/// One in so many has an address, and hence a frontend: to allocate it costs the server as much as the Service itself, and both are
/// paid twice, for coming and for going.
const ADDRESSED: usize = 4;

/// More make the server no faster.
const WRITERS: usize = 8;

const CIDRS: &str = "10.96.0.0/16,fd00:96::/112";

/// The agent's account in `deploy/base`.
const ACCOUNT: (&str, &str) = ("kube-system", "kun-proxy");

const BLOCK: &str = "block-10-64-0-0";

fn at(vip: &str, port: u16) -> SocketAddr {
    SocketAddr::new(vip.parse::<IpAddr>().unwrap(), port)
}

fn deploy(file: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy");
    path.join(file).display().to_string()
}

/// What the faults are done to. Fields drop in order: the way out of the node's cgroup first, the server before its namespace.
struct Lab {
    _inside: Inside,
    plane: ControlPlane,
    writer: Writer,
    token: PathBuf,
    one: Pod,
    two: Pod,
    /// Which of the two is the endpoint now.
    on_two: bool,
    node: Node,
}

impl Lab {
    /// With a client in a pod of its own; `None`: skipped.
    fn new() -> Option<(Self, Pod)> {
        let builder = ControlPlane::builder()?;
        let mut node = Node::prepare("faults")?;
        let plane = builder
            .netns(node.fabric.path())
            .bind("192.0.2.1".parse().unwrap())
            .service_cidrs(CIDRS)
            // No kubelet renews the Node.
            .controller_flags(&["--controllers=*,-node-lifecycle-controller"])
            .apiserver_flags(&[
                "--max-requests-inflight=10000",
                "--max-mutating-requests-inflight=10000",
            ])
            .start()
            .unwrap();
        let kubectl = |words: &[&str]| plane.kubectl(words, "").unwrap();
        for kind in ["ipamblocks", "ippools"] {
            let crd = format!("crds/kun.network_{kind}.yaml");
            kubectl(&["create", "-f", &deploy(&crd)]);
        }
        kubectl(&["create", "-f", &deploy("base/agent-rbac.yaml")]);
        let (token, kubeconfig) = (node.path("token"), node.path("kubeconfig"));
        plane.token_kubeconfig(&token, &kubeconfig).unwrap();
        let writer = Writer::open(Some(plane.kubeconfig())).unwrap();
        node.configure(|config| {
            config["cluster"] = json!({"kubernetes": {"kubeconfig": kubeconfig}});
            config["proxy"]["maxServices"] = json!(2 * SERVICES);
        });
        let blocks = Resource::of(Kind::IpamBlock);
        wait_for("our kind", TOLD_WITHIN, || {
            node.fabric.run(|| writer.list(blocks, None)).ok()
        })
        .unwrap();
        write_token(&plane, &token);
        let uid = create(&node.fabric, &writer, Kind::Node, &this_node())["metadata"]["uid"].take();
        let block = json!({"metadata": {"name": BLOCK},
            "spec": {"first": "10.64.0.0", "node": "node-a", "nodeUID": uid}});
        create(&node.fabric, &writer, Kind::IpamBlock, &block);
        node.spawn();
        let client = node.pod("client");
        let (one, two) = (node.server("one"), node.server("two"));
        for object in [web()]
            .iter()
            .chain(&[slice(false, &one), slice(true, &one)])
        {
            let kind = match object["kind"] == "Service" {
                true => Kind::Service,
                false => Kind::EndpointSlice,
            };
            create(&node.fabric, &writer, kind, object);
        }
        node.explains(&Service::new(&[&one]), TOLD_WITHIN);
        let lab = Self {
            _inside: Inside::enter(&node),
            plane,
            writer,
            token,
            one,
            two,
            on_two: false,
            node,
        };
        Some((lab, client))
    }

    /// The endpoint becomes the other one, and the agent hears of it.
    fn moves(&mut self) {
        self.on_two = !self.on_two;
        let endpoint = if self.on_two { &self.two } else { &self.one };
        let slices = Resource::of(Kind::EndpointSlice);
        for v6 in [false, true] {
            let slice = slice(v6, endpoint);
            let name = slice["metadata"]["name"].as_str().unwrap();
            let name = ObjectName::new("default", name);
            let patch = json!({"endpoints": slice["endpoints"]});
            wait_for("the slice to change", TOLD_WITHIN, || {
                self.node
                    .fabric
                    .run(|| self.writer.patch(slices, &name, &patch))
                    .ok()
            })
            .unwrap();
        }
        self.node.explains(&Service::new(&[endpoint]), TOLD_WITHIN);
    }

    fn status(&self) -> Status {
        match self.node.ask(&Request::Status) {
            Response::Status { status } => status,
            other => panic!("{other:?}"),
        }
    }

    fn trouble(&self) -> String {
        value(&self.status().cluster, "trouble").unwrap_or_default()
    }

    /// Waits until the agent says what is wrong, in these words; in none: that nothing is.
    fn says(&self, what: &str) {
        let said = || match what {
            "" => self.trouble().is_empty(),
            _ => self.trouble().contains(what),
        };
        assert!(
            wait_until(TOLD_WITHIN, said),
            "`{}` where `{what}` was awaited",
            self.trouble()
        );
    }

    /// Frontends and whole backend sets that this agent took away.
    fn withdrawals(&self) -> u64 {
        let text = self.node.get("/metrics");
        let line = text
            .lines()
            .find_map(|l| l.strip_prefix("kun_proxy_withdrawals_total "));
        line.unwrap_or_else(|| panic!("no such counter: {text}"))
            .trim()
            .parse()
            .unwrap()
    }

    fn frontends(&self) -> usize {
        let status = self.status();
        let said = value(&status.proxy, "frontends").unwrap_or_else(|| panic!("{status:?}"));
        said.split(' ').next().unwrap().parse().unwrap()
    }

    /// The agent in a state that lasts: it lives, waits, and withdraws nothing.
    fn is_quiet(&mut self, what: &str) {
        let before = self.withdrawals();
        let agent = self.node.agent.as_mut().expect("it runs");
        let (begin, spent) = (Instant::now(), cpu(agent.pid()));
        let ended = wait_until(WATCHED, || !agent.is_running());
        assert!(!ended, "{what}: the agent has ended: {}", self.node.log());
        let spent = (cpu(agent.pid()) - spent).as_secs_f64();
        let part = spent / begin.elapsed().as_secs_f64();
        eprintln!("{what}: {part:.4} of a core");
        assert!(part <= CPU_AT_MOST, "{what}: {part:.2} of a core");
        assert_eq!(self.withdrawals(), before, "{what}: withdrawn");
    }

    fn start(&mut self) {
        self.plane.start(Part::ApiServer, &[]).unwrap();
    }

    fn kill(&mut self) {
        self.plane.kill(Part::ApiServer).unwrap();
    }

    /// Every frontend that the API's Services ask for.
    fn listed(&self) -> BTreeSet<SocketAddr> {
        let words = ["get", "services", "--all-namespaces", "--output=json"];
        let list: Value = serde_json::from_str(&self.plane.kubectl(&words, "").unwrap()).unwrap();
        let mut frontends = BTreeSet::new();
        for spec in items(&list["items"]).map(|item| &item["spec"]) {
            for ip in items(&spec["clusterIPs"]).filter(|ip| *ip != "None") {
                for port in items(&spec["ports"]) {
                    let number = port["port"].as_u64().unwrap() as u16;
                    frontends.insert(at(ip.as_str().unwrap(), number));
                }
            }
        }
        frontends
    }
}

fn items(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn value(facts: &[Fact], name: &str) -> Option<String> {
    let fact = facts.iter().find(|f| f.name == name)?;
    Some(fact.value.clone())
}

fn create(at: &Netns, writer: &Writer, kind: Kind, object: &Value) -> Value {
    at.run(|| writer.create(Resource::of(kind), object))
        .unwrap()
}

/// CPU time of a process.
fn cpu(pid: u32) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let (_, rest) = stat.rsplit_once(')').unwrap();
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    Duration::from_secs_f64(ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
}

fn this_node() -> Value {
    json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-a"}})
}

fn web() -> Value {
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": "default"},
    "spec": {"ipFamilyPolicy": "RequireDualStack", "clusterIP": VIP4, "clusterIPs": [VIP4, VIP6], "ports": [
        {"name": "http", "port": 80, "protocol": "TCP"},
        {"name": "dns", "port": 53, "protocol": "UDP"},
    ]}})
}

fn slice(v6: bool, pod: &Pod) -> Value {
    let (name, family, address) = match v6 {
        true => ("web-6", "IPv6", pod.v6.to_string()),
        false => ("web-4", "IPv4", pod.v4.to_string()),
    };
    json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": family,
        "metadata": {"name": name, "namespace": "default", "labels": {"kubernetes.io/service-name": "web"}},
        "ports": [
            {"name": "http", "port": 8080, "protocol": "TCP"},
            {"name": "dns", "port": 5353, "protocol": "UDP"},
        ],
        "endpoints": [{"addresses": [address], "nodeName": "node-a", "conditions": {"ready": true}}]})
}

fn write_token(plane: &ControlPlane, file: &Path) {
    let (namespace, account) = ACCOUNT;
    let hour = Duration::from_secs(3600);
    plane.write_token(namespace, account, hour, file).unwrap();
}

/// Does it, while a client connects to the Service in both families all the time and is answered every time.
fn while_served(client: &Netns, what: &str, it: impl FnOnce()) {
    let (stop, tried) = (AtomicBool::new(false), AtomicU32::new(0));
    let begin = Instant::now();
    let failures = std::thread::scope(|scope| {
        let connecting = scope.spawn(|| {
            let mut failures = BTreeSet::new();
            while !stop.load(Ordering::Relaxed) {
                for vip in [VIP4, VIP6] {
                    if let Err(error) = rig::name_over_tcp(client, at(vip, 80)) {
                        failures.insert(format!("{vip}: {error}"));
                    }
                }
                tried.fetch_add(1, Ordering::Relaxed);
                wait_until(BREATH, || stop.load(Ordering::Relaxed));
            }
            failures
        });
        // Ends the other thread also when an assertion fails.
        let stopped = rig::OnDrop(|| stop.store(true, Ordering::Relaxed));
        it();
        let so_far = tried.load(Ordering::Relaxed);
        let goes_on = wait_until(TOLD_WITHIN, || tried.load(Ordering::Relaxed) > so_far + 5);
        assert!(goes_on, "{what}: connects stand still");
        drop(stopped);
        connecting.join().unwrap()
    });
    assert!(failures.is_empty(), "{what}: {failures:?}");
    let (tried, took) = (tried.into_inner(), begin.elapsed().as_secs_f64());
    eprintln!("{what}: {tried} times both families in {took:.1} s");
}

/// What the client's connect() meets: `true`, a frontend without endpoints; `false`, no frontend.
fn are_refused(client: &Netns, frontends: &BTreeSet<SocketAddr>) -> BTreeSet<bool> {
    client.run(|| {
        let connect = |to: &SocketAddr| {
            let domain = socket2::Domain::for_address(*to);
            let socket = socket2::Socket::new(domain, socket2::Type::STREAM, None).unwrap();
            socket.set_nonblocking(true).unwrap();
            match socket.connect(&(*to).into()) {
                Err(e) if e.kind() == ErrorKind::ConnectionRefused => true,
                // Under way: nobody took the address for a Service's.
                _ => false,
            }
        };
        frontends.iter().map(connect).collect()
    })
}

/// What goes wrong, and what holds meanwhile and afterwards; the namespace is the client's.
type Step = fn(&mut Lab, &Netns);

fn killed(lab: &mut Lab, _: &Netns) {
    let before = lab.withdrawals();
    lab.kill();
    lab.says("cannot be reached");
    lab.is_quiet("no API server");
    lab.start();
    lab.moves();
    lab.says("");
    assert_eq!(lab.withdrawals(), before);
}

fn frozen(lab: &mut Lab, _: &Netns) {
    let before = lab.withdrawals();
    lab.plane.freeze(Part::ApiServer).unwrap();
    lab.is_quiet("a frozen API server");
    lab.plane.thaw(Part::ApiServer).unwrap();
    lab.moves();
    lab.says("");
    assert_eq!(lab.withdrawals(), before);
}

/// Every version that the agent could resume from is forgotten: it lists anew, and the list is no reason to withdraw anything.
fn forgetful(lab: &mut Lab, _: &Netns) {
    let before = lab.withdrawals();
    lab.kill();
    lab.says("cannot be reached");
    lab.plane.compact().unwrap();
    lab.start();
    lab.says("");
    lab.moves();
    assert_eq!(lab.withdrawals(), before);
}

/// The account is deleted, and made anew with other tokens.
fn unknown(lab: &mut Lab, _: &Netns) {
    let before = lab.withdrawals();
    let (namespace, account) = ACCOUNT;
    let kubectl = |plane: &ControlPlane, verb| {
        let words = ["--namespace", namespace, verb, "serviceaccount", account];
        plane.kubectl(&words, "").unwrap()
    };
    kubectl(&lab.plane, "delete");
    // Streams outlive the token that they were asked for with.
    lab.kill();
    lab.start();
    lab.says("does not know us");
    lab.is_quiet("a refused token");
    kubectl(&lab.plane, "create");
    write_token(&lab.plane, &lab.token);
    lab.moves();
    lab.says("");
    assert_eq!(lab.withdrawals(), before);
}

/// Another Node under our name: Services do not mind, and a block that was the old Node's gives no new addresses while the pods in it
/// stay routed, until it is given to the new one.
fn node_replaced(lab: &mut Lab, _: &Netns) {
    let before = lab.withdrawals();
    let blocks = |lab: &Lab| value(&lab.status().ipam, "blocks").unwrap();
    assert!(!blocks(lab).is_empty());
    let (nodes, name) = (Resource::of(Kind::Node), ObjectName::new("", "node-a"));
    let fabric = &lab.node.fabric;
    fabric
        .run(|| lab.writer.delete(nodes, &name, &Expected::default()))
        .unwrap();
    let uid = create(fabric, &lab.writer, Kind::Node, &this_node())["metadata"]["uid"].take();
    assert!(
        wait_until(TOLD_WITHIN, || blocks(lab).is_empty()),
        "a block of another Node: {}",
        blocks(lab)
    );
    let routed = |lab: &Lab| {
        lab.node.routes("-4").contains("unreachable 10.64.0.0/26 ")
            && lab
                .node
                .routes("-6")
                .contains("unreachable fd00:64::a40:0/122 ")
    };
    assert!(routed(lab), "pods live in the block");
    lab.moves();
    let ours = json!({"spec": {"nodeUID": uid, "epoch": 2}});
    let (kind, block) = (Resource::of(Kind::IpamBlock), ObjectName::new("", BLOCK));
    let fabric = &lab.node.fabric;
    fabric
        .run(|| lab.writer.patch(kind, &block, &ours))
        .unwrap();
    assert!(
        wait_until(TOLD_WITHIN, || !blocks(lab).is_empty()),
        "the block is ours again"
    );
    assert!(routed(lab));
    assert_eq!(lab.withdrawals(), before);
}

/// The agent dies while there is no server to ask: the next one serves on what the last one left.
fn agent_killed(lab: &mut Lab, _: &Netns) {
    lab.kill();
    lab.node.kill();
    lab.node.spawn_until("waiting for the cluster");
    let status = lab.status();
    assert_eq!(value(&status.proxy, "adopted").as_deref(), Some("yes"));
    assert_eq!(value(&status.cluster, "synced").as_deref(), Some("no"));
    lab.is_quiet("an agent without a view");
    lab.start();
    let programmed = || value(&lab.status().proxy, "state").as_deref() == Some("programmed");
    assert!(wait_until(TOLD_WITHIN, programmed), "{}", lab.node.log());
    assert_eq!(lab.withdrawals(), 0, "nothing had gone");
    lab.moves();
    lab.says("");
}

fn flooded(lab: &mut Lab, client: &Netns) {
    let (services, before) = (Resource::of(Kind::Service), lab.listed());
    let each = |work: &(dyn Fn(&Writer, usize) -> Result<(), WriteError> + Sync)| {
        std::thread::scope(|scope| {
            let write = |first| {
                let (fabric, admin) = (&lab.node.fabric, lab.plane.kubeconfig());
                scope.spawn(move || {
                    fabric.run(|| {
                        let writer = Writer::open(Some(admin)).unwrap();
                        for i in (first..SERVICES).step_by(WRITERS) {
                            work(&writer, i).unwrap();
                        }
                    });
                })
            };
            let writers: Vec<_> = (0..WRITERS).map(write).collect();
            let done = || writers.iter().all(|writer| writer.is_finished());
            // The dataplane answers all the while: a pod's ADD would wait for it.
            while !wait_until(Duration::from_secs(1), done) {
                lab.frontends();
            }
        });
    };
    let follows = |count: usize| {
        let begin = Instant::now();
        assert!(
            wait_until(TOLD_WITHIN, || lab.frontends() == count),
            "{} frontends instead of {count}: {}",
            lab.frontends(),
            lab.trouble()
        );
        eprintln!(
            "{count} frontends after {:.1} s",
            begin.elapsed().as_secs_f64()
        );
    };
    let (begin, withdrawn) = (Instant::now(), lab.withdrawals());
    each(&|writer, i| {
        let service = json!({"metadata": {"name": format!("s{i}"), "namespace": "default"},
            "spec": {"ports": [{"port": 80}], "clusterIP": if i % ADDRESSED == 0 { "" } else { "None" }}});
        writer.create(services, &service).map(drop)
    });
    eprintln!(
        "{SERVICES} created in {:.1} s",
        begin.elapsed().as_secs_f64()
    );
    let listed = lab.listed();
    assert_eq!(listed.len(), before.len() + SERVICES / ADDRESSED);
    follows(listed.len());
    let flood: BTreeSet<SocketAddr> = listed.difference(&before).copied().collect();
    assert_eq!(are_refused(client, &flood), BTreeSet::from([true]));
    assert_eq!(lab.withdrawals(), withdrawn, "withdrawn while they came");
    let begin = Instant::now();
    each(&|writer, i| {
        let name = ObjectName::new("default", &format!("s{i}"));
        writer.delete(services, &name, &Expected::default())
    });
    eprintln!(
        "{SERVICES} deleted in {:.1} s",
        begin.elapsed().as_secs_f64()
    );
    assert_eq!(lab.listed(), before);
    follows(before.len());
    assert_eq!(are_refused(client, &flood), BTreeSet::from([false]));
    lab.moves();
    lab.says("");
}

#[test]
fn an_agent_keeps_its_last_good_state_whatever_its_api_server_does() {
    let Some((mut lab, client)) = Lab::new() else {
        return;
    };
    let steps: [(&str, Step); 7] = [
        ("killed and restarted", killed),
        ("frozen and thawed", frozen),
        ("compacted while it was down", forgetful),
        ("refuses the token", unknown),
        ("replaces the Node", node_replaced),
        ("down while the agent is killed", agent_killed),
        ("flooded with Services", flooded),
    ];
    for (what, step) in steps {
        while_served(&client.netns, what, || step(&mut lab, &client.netns));
    }
    lab.is_quiet("afterwards");
}
