//! A node with one agent, pods attached by `kun-cni`, servers that answer their name, and clients that ask.

// Each test binary uses its part.
#![allow(dead_code)]

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kun_control::{Request, Response};
use kun_harness::{
    BpfFs, Cgroup, Netns, Process, require_root, require_tool, skip, veth, wait_for, wait_until,
};
use serde_json::{Value, json};

/// The service's addresses.
pub(crate) const VIP4: &str = "10.96.0.10";
pub(crate) const VIP6: &str = "fd00:96::10";

/// Its addresses for clients outside.
pub(crate) const LB4: &str = "198.51.100.10";
pub(crate) const LB6: &str = "2001:db8:1b::10";

/// Starting means loading eight programs on a busy machine.
const STARTS_WITHIN: Duration = Duration::from_secs(60);

/// A change of the folder is seen by inotify.
const SEEN_WITHIN: Duration = Duration::from_secs(20);

/// An answer that does not come is a lost packet.
const ANSWERS_WITHIN: Duration = Duration::from_secs(5);

/// Tests take turns: the process is in one cgroup at a time, and what another test starts meanwhile is born into it, and dies with it.
static TURN: Mutex<()> = Mutex::new(());

/// Runs its function when dropped.
pub(crate) struct OnDrop<F: FnMut()>(pub(crate) F);

impl<F: FnMut()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

/// The test's process inside the node's cgroup, where connect() is served.
pub(crate) struct Inside {
    home: PathBuf,
}

impl Inside {
    pub(crate) fn enter(node: &Node) -> Self {
        let own = fs::read_to_string("/proc/self/cgroup").unwrap();
        let path = own.lines().find_map(|l| l.strip_prefix("0::")).unwrap();
        let root = kun_harness::cgroup2_mount().unwrap();
        let home = root.join(path.trim_start_matches('/'));
        node.cgroup.add(std::process::id()).unwrap();
        Self { home }
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        let file = self.home.join("cgroup.procs");
        fs::write(file, std::process::id().to_string()).expect("the way home is open");
    }
}

/// A pod.
#[derive(Debug)]
pub(crate) struct Pod {
    pub(crate) name: String,
    pub(crate) netns: Netns,
    pub(crate) v4: Ipv4Addr,
    pub(crate) v6: Ipv6Addr,
}

/// What the manifest says about the service `default/web`.
pub(crate) struct Service<'a> {
    endpoints: &'a [&'a Pod],
}

impl<'a> Service<'a> {
    pub(crate) fn new(endpoints: &'a [&'a Pod]) -> Self {
        Self { endpoints }
    }
}

/// The node. Fields drop in order: the agent before what it stands on.
pub(crate) struct Node {
    pub(crate) agent: Option<Process>,
    pub(crate) netns: Netns,
    pub(crate) fabric: Netns,
    pub(crate) cgroup: Cgroup,
    bpffs: BpfFs,
    /// Further flags of the agent.
    pub(crate) flags: Vec<String>,
    directory: tempfile::TempDir,
    _turn: Option<MutexGuard<'static, ()>>,
}

impl Node {
    /// `None`: skipped, and said so.
    pub(crate) fn start(what: &str) -> Option<Self> {
        let mut node = Self::prepare(what)?;
        node.spawn();
        Some(node)
    }

    /// The same without an agent yet.
    pub(crate) fn prepare(what: &str) -> Option<Self> {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let node = Self::prepare_beside(what)?;
        Some(Self {
            _turn: Some(turn),
            ..node
        })
    }

    /// The same beside others: where no test of the binary enters its node's cgroup.
    pub(crate) fn prepare_beside(what: &str) -> Option<Self> {
        if !require_root() || !require_tool("ip") {
            return None;
        }
        if kun_harness::cgroup2_mount().is_err() {
            skip("because no cgroup v2 tree is mounted");
            return None;
        }
        Some(Self::build(what).unwrap_or_else(|e| panic!("{e:#}")))
    }

    fn build(what: &str) -> anyhow::Result<Self> {
        let netns = Netns::new(&format!("{what}-n"))?;
        let fabric = Netns::new(&format!("{what}-f"))?;
        veth(&netns, "eth0", &fabric, "node")?;
        for (ns, interface, v4, v6) in [
            (&netns, "eth0", "192.0.2.2/24", "2001:db8::2/64"),
            (&fabric, "node", "192.0.2.1/24", "2001:db8::1/64"),
        ] {
            ns.exec(&format!("addr add {v4} dev {interface}"))?;
            ns.exec(&format!("addr add {v6} dev {interface} nodad"))?;
            ns.exec("link set lo up")?;
        }
        netns.exec("route add default via 192.0.2.1")?;
        netns.exec("-6 route add default via 2001:db8::1")?;
        // What a speaker would have told.
        fabric.exec(&format!("route add {LB4}/32 via 192.0.2.2"))?;
        fabric.exec(&format!("-6 route add {LB6}/128 via 2001:db8::2"))?;
        let directory = tempfile::tempdir()?;
        fs::create_dir(directory.path().join("cluster"))?;
        let node = Self {
            agent: None,
            netns,
            fabric,
            cgroup: Cgroup::new()?,
            bpffs: BpfFs::new()?,
            flags: Vec::new(),
            directory,
            _turn: None,
        };
        node.manifest(
            "node.yaml",
            &[
                json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-a"},
                    "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.2"}]}}),
                json!({"apiVersion": "kun.network/v1alpha1", "kind": "IPAMBlock", "metadata": {"name": "block-10-64-0-0"},
                    "spec": {"first": "10.64.0.0", "node": "node-a"}}),
            ],
        );
        node.configure(|_| {});
        Ok(node)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Writes kun.yaml (JSON is YAML), changed by `change`.
    pub(crate) fn configure(&self, change: impl FnOnce(&mut Value)) {
        let mut config = json!({
            "node": {"name": "node-a"},
            "cluster": {"folder": self.path("cluster")},
            "ipam": {
                "podPrefix": "fd00:64::/96", "v4Pools": ["10.64.0.0/16"], "v6OnlyPool": "240.0.0.0/8",
                "defaultClass": "dual", "interfaces": "split", "cooldown": "30s",
            },
            "proxy": {
                "cgroupRoot": self.cgroup.path(), "maxServices": 1024, "maxBackends": 1024,
                "maxSlots": 4096, "maxFlows": 4096, "udpIdle": "30s",
            },
            "agent": {
                "stateDir": self.path("state"), "socket": self.path("agent.sock"),
                "bpffsRoot": self.bpffs.path().join("kun"), "metrics": "[::1]:9466", "log": "info",
            },
        });
        change(&mut config);
        let text = serde_json::to_string_pretty(&config).unwrap();
        fs::write(self.path("kun.yaml"), text).unwrap();
    }

    /// A manifest of these documents, replaced in one step.
    pub(crate) fn manifest(&self, name: &str, documents: &[Value]) {
        let text: Vec<String> = documents.iter().map(Value::to_string).collect();
        let (new, path) = (self.path("new"), self.path("cluster").join(name));
        fs::write(&new, text.join("\n---\n")).unwrap();
        fs::rename(&new, &path).unwrap();
    }

    /// Starts the agent and waits until it has programmed what the cluster says.
    pub(crate) fn spawn(&mut self) {
        self.spawn_until("programmed");
    }

    /// Starts the agent and waits until it answers, whatever it has done so far.
    pub(crate) fn spawn_until_answers(&mut self) {
        self.spawn_until_state(|_| true);
    }

    /// Starts the agent and waits until its dataplane says this of itself.
    pub(crate) fn spawn_until(&mut self, state: &str) {
        self.spawn_until_state(|said| said == state);
    }

    fn spawn_until_state(&mut self, is: impl Fn(&str) -> bool) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kun-proxy"));
        command.arg("--config").arg(self.path("kun.yaml"));
        command.args(&self.flags);
        let log = fs::File::create(self.path("log")).unwrap();
        command
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .env_remove("RUST_LOG");
        let mut agent = self.netns.spawn(command).unwrap();
        let arrived = wait_for("the agent", STARTS_WITHIN, || {
            if !agent.is_running() {
                return Some(false);
            }
            let Some(Response::Status { status }) = self.try_ask(&Request::Status) else {
                return None;
            };
            let there = |f: &kun_control::Fact| f.name == "state" && is(&f.value);
            status.proxy.iter().any(there).then_some(true)
        });
        assert!(
            matches!(arrived, Ok(true)),
            "the agent does not come up: {}",
            self.log()
        );
        self.agent = Some(agent);
    }

    /// What its endpoint says to the kubelet's probe.
    pub(crate) fn ready(&self) -> bool {
        self.get("/readyz").starts_with("HTTP/1.1 200")
    }

    /// Its answer over HTTP; empty: there is none.
    pub(crate) fn get(&self, path: &str) -> String {
        let ask = || -> io::Result<String> {
            let mut answer = String::new();
            let mut stream = TcpStream::connect((Ipv6Addr::LOCALHOST, 9466))?;
            write!(stream, "GET {path} HTTP/1.1\r\n\r\n")?;
            stream.read_to_string(&mut answer)?;
            Ok(answer)
        };
        self.netns.run(ask).unwrap_or_default()
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// `kill -9`.
    pub(crate) fn kill(&mut self) {
        self.agent = None;
    }

    /// SIGTERM, and its end awaited.
    pub(crate) fn terminate(&mut self) {
        let mut agent = self.agent.take().expect("it runs");
        agent.signal(rustix::process::Signal::TERM).unwrap();
        let ended = wait_for("the agent's end", STARTS_WITHIN, || {
            agent.try_wait().ok().flatten()
        });
        assert!(ended.unwrap().success(), "{}", self.log());
    }

    /// Runs the program to its end in the node's namespace; everything that it says.
    pub(crate) fn run_agent(&self, arguments: &[&str]) -> String {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kun-proxy"));
        command
            .arg("--config")
            .arg(self.path("kun.yaml"))
            .args(arguments)
            .env_remove("RUST_LOG");
        let output = self.netns.output(command).unwrap();
        String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
    }

    /// `kunctl` of this node.
    pub(crate) fn kunctl(&self) -> Command {
        let mut command = Command::new(beside("kunctl"));
        command.arg("--config").arg(self.path("kun.yaml"));
        command
    }

    pub(crate) fn ask(&self, request: &Request) -> Response {
        kun_control::ask(&self.path("agent.sock"), request)
            .unwrap_or_else(|e| panic!("{e}\n{}", self.log()))
    }

    fn try_ask(&self, request: &Request) -> Option<Response> {
        kun_control::ask(&self.path("agent.sock"), request).ok()
    }

    pub(crate) fn why(&self, protocol: &str, destination: &str, port: u16) -> Response {
        self.ask(&Request::Why {
            protocol: protocol.into(),
            source: None,
            destination: destination.parse().unwrap(),
            port,
        })
    }

    /// `ip route` of a family.
    pub(crate) fn routes(&self, family: &str) -> String {
        self.netns.exec(&format!("{family} route show")).unwrap()
    }

    /// Where the agent pins, a directory for each version of the maps.
    pub(crate) fn pin_root(&self) -> PathBuf {
        self.bpffs.path().join("kun")
    }

    /// Files pinned below the agent's directory.
    pub(crate) fn pins(&self) -> usize {
        fn count(path: &Path) -> usize {
            let Ok(entries) = fs::read_dir(path) else {
                return 0;
            };
            entries
                .flatten()
                .map(|e| match e.file_type() {
                    Ok(t) if t.is_dir() => count(&e.path()),
                    _ => 1,
                })
                .sum()
        }
        count(&self.bpffs.path().join("kun"))
    }

    /// Writes the service, and waits until the agent explains it with exactly these endpoints.
    pub(crate) fn publish(&self, service: &Service<'_>) {
        let mut documents = vec![json!({"apiVersion": "v1", "kind": "Service",
        "metadata": {"name": "web", "namespace": "default"},
        "spec": {"type": "LoadBalancer", "clusterIPs": [VIP4, VIP6], "ports": [
            {"name": "http", "port": 80, "protocol": "TCP"},
            {"name": "dns", "port": 53, "protocol": "UDP"},
        ]},
        "status": {"loadBalancer": {"ingress": [{"ip": LB4}, {"ip": LB6}]}}})];
        for v6 in [false, true] {
            let endpoints: Vec<Value> = service
                .endpoints
                .iter()
                .map(|pod| {
                    let address = if v6 {
                        pod.v6.to_string()
                    } else {
                        pod.v4.to_string()
                    };
                    json!({"addresses": [address], "nodeName": "node-a",
                        "targetRef": {"kind": "Pod", "namespace": "default", "name": pod.name}})
                })
                .collect();
            documents.push(
                json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
                "metadata": {"name": if v6 { "web-6" } else { "web-4" }, "namespace": "default",
                    "labels": {"kubernetes.io/service-name": "web"}},
                "addressType": if v6 { "IPv6" } else { "IPv4" },
                "ports": [
                    {"name": "http", "port": 8080, "protocol": "TCP"},
                    {"name": "dns", "port": 5353, "protocol": "UDP"},
                ],
                "endpoints": endpoints}),
            );
        }
        self.manifest("web.yaml", &documents);
        self.explains(service, SEEN_WITHIN);
    }

    /// Waits until the agent explains the service with exactly these endpoints.
    pub(crate) fn explains(&self, service: &Service<'_>, within: Duration) {
        let wanted: Vec<(&str, &str, u16, BTreeSet<String>)> =
            [("tcp", 80, 8080), ("udp", 53, 5353)]
                .into_iter()
                .flat_map(|(protocol, port, to)| {
                    let of = |v6: bool| -> BTreeSet<String> {
                        service
                            .endpoints
                            .iter()
                            .map(|p| {
                                let ip: IpAddr = if v6 { p.v6.into() } else { p.v4.into() };
                                SocketAddr::new(ip, to).to_string()
                            })
                            .collect()
                    };
                    [
                        (protocol, VIP4, port, of(false)),
                        (protocol, VIP6, port, of(true)),
                    ]
                })
                .collect();
        let seen = wait_until(within, || {
            wanted.iter().all(|(protocol, vip, port, endpoints)| {
                let Response::Why { steps } = self.why(protocol, vip, *port) else {
                    return false;
                };
                let backends: BTreeSet<String> = steps
                    .iter()
                    .filter(|s| s.what == "backend" && !s.detail.contains("draining"))
                    .map(|s| s.object.clone())
                    .collect();
                steps.iter().any(|s| s.what == "view") && backends == *endpoints
            })
        });
        assert!(seen, "{:?}\n{}", self.why("tcp", VIP6, 80), self.log());
    }

    /// Removes the service's manifest; does not wait.
    pub(crate) fn withdraw(&self) {
        fs::remove_file(self.path("cluster").join("web.yaml")).unwrap();
    }

    /// Spoils the service's manifest.
    pub(crate) fn spoil(&self) {
        let path = self.path("cluster").join("web.yaml");
        let good = fs::read_to_string(&path).unwrap();
        fs::write(&path, good.replacen("\"port\":80", "\"port\":99999", 1)).unwrap();
    }

    /// A pod, attached by executing the plugin as a container runtime does.
    pub(crate) fn pod(&self, name: &str) -> Pod {
        self.try_pod(name, &json!({}))
            .unwrap_or_else(|e| panic!("{e}\n{}", self.log()))
    }

    /// Executes the plugin for a container; what it says, and whether it is content.
    pub(crate) fn cni(
        &self,
        verb: &str,
        name: &str,
        netns: &Netns,
        runtime: &Value,
    ) -> (bool, String) {
        let network = json!({
            "cniVersion": "1.1.0", "name": "kun", "type": "kun-cni", "kunConfig": self.path("kun.yaml"),
            "runtimeConfig": runtime,
        });
        let mut command = Command::new(beside("kun-cni"));
        command
            .env_clear()
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", format!("container-{name}"))
            .env("CNI_NETNS", netns.path())
            .env("CNI_IFNAME", "eth0")
            .env(
                "CNI_ARGS",
                format!("IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME={name}"),
            )
            .env("CNI_PATH", "/opt/cni/bin")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let output = self.netns.run(|| {
            let mut child = command.spawn().unwrap();
            let mut input = child.stdin.take().unwrap();
            input.write_all(network.to_string().as_bytes()).unwrap();
            drop(input);
            child.wait_with_output().unwrap()
        });
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        (output.status.success(), said)
    }

    /// Detaches a pod as a container runtime does.
    pub(crate) fn remove(&self, pod: Pod) {
        let (done, said) = self.cni("DEL", &pod.name, &pod.netns, &json!({}));
        assert!(done, "kun-cni DEL: {said}\n{}", self.log());
    }

    /// [`Node::pod`], with the runtime's `runtimeConfig`; an ADD that fails says why.
    pub(crate) fn try_pod(&self, name: &str, runtime: &Value) -> Result<Pod, String> {
        let netns = Netns::new(&format!("p-{name}")).unwrap();
        netns.exec("link set lo up").unwrap();
        let (done, said) = self.cni("ADD", name, &netns, runtime);
        if !done {
            return Err(said);
        }
        let result: Value = serde_json::from_str(&said).unwrap();
        let addresses: Vec<IpAddr> = result["ips"]
            .as_array()
            .unwrap()
            .iter()
            .map(|ip| ip["address"].as_str().unwrap())
            .map(|text| text.split('/').next().unwrap().parse().unwrap())
            .collect();
        let v4 = addresses.iter().find_map(|a| match a {
            IpAddr::V4(a) => Some(*a),
            IpAddr::V6(_) => None,
        });
        let v6 = addresses.iter().find_map(|a| match a {
            IpAddr::V6(a) => Some(*a),
            IpAddr::V4(_) => None,
        });
        Ok(Pod {
            name: name.to_owned(),
            netns,
            v4: v4.expect("a dual pod has IPv4"),
            v6: v6.expect("every pod has IPv6"),
        })
    }

    /// A pod that answers its name on TCP 8080 and UDP 5353, in both families.
    pub(crate) fn server(&self, name: &str) -> Pod {
        self.server_with(name, &json!({}))
    }

    /// [`Node::server`], with the runtime's `runtimeConfig`.
    pub(crate) fn server_with(&self, name: &str, runtime: &Value) -> Pod {
        let pod = self
            .try_pod(name, runtime)
            .unwrap_or_else(|e| panic!("{e}\n{}", self.log()));
        for any in [
            IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            Ipv6Addr::UNSPECIFIED.into(),
        ] {
            let (tcp, udp) = pod
                .netns
                .run(|| -> io::Result<(TcpListener, UdpSocket)> {
                    let only_v6 = |domain| -> io::Result<socket2::Socket> {
                        let socket = socket2::Socket::new(
                            if any.is_ipv4() {
                                socket2::Domain::IPV4
                            } else {
                                socket2::Domain::IPV6
                            },
                            domain,
                            None,
                        )?;
                        if any.is_ipv6() {
                            socket.set_only_v6(true)?;
                        }
                        Ok(socket)
                    };
                    let tcp = only_v6(socket2::Type::STREAM)?;
                    tcp.bind(&SocketAddr::new(any, 8080).into())?;
                    tcp.listen(128)?;
                    let udp = only_v6(socket2::Type::DGRAM)?;
                    udp.bind(&SocketAddr::new(any, 5353).into())?;
                    Ok((tcp.into(), udp.into()))
                })
                .unwrap();
            // The threads end with the test's process; their sockets hold the namespace no longer than that.
            let (answer_tcp, answer_udp) = (name.to_owned(), name.to_owned());
            std::thread::spawn(move || {
                for mut stream in tcp.incoming().flatten() {
                    // A client that has gone is its own affair.
                    let _ = stream.write_all(answer_tcp.as_bytes());
                }
            });
            std::thread::spawn(move || {
                let mut buffer = [0; 64];
                while let Ok((_, from)) = udp.recv_from(&mut buffer) {
                    let _ = udp.send_to(answer_udp.as_bytes(), from);
                }
            });
        }
        pod
    }
}

/// A program of another package lies beside `kun-proxy`; a test run of this package alone has not built it.
fn beside(name: &'static str) -> PathBuf {
    let path = Path::new(env!("CARGO_BIN_EXE_kun-proxy")).with_file_name(name);
    static BUILT: Mutex<BTreeSet<&str>> = Mutex::new(BTreeSet::new());
    let mut built = BUILT.lock().unwrap_or_else(PoisonError::into_inner);
    if !built.contains(name) {
        let status = Command::new(env!("CARGO"))
            .args(["build", "--quiet", "--offline", "--package", name])
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .status();
        // A machine without cargo has it from elsewhere.
        if status.is_ok_and(|s| s.success()) || path.is_file() {
            built.insert(name);
        }
    }
    assert!(path.is_file(), "{} is not built", path.display());
    path
}

/// Connects from a pod; who answered. The peer must be whom the client asked for.
pub(crate) fn name_over_tcp(from: &Netns, to: SocketAddr) -> io::Result<String> {
    let mut stream = from.run(|| TcpStream::connect_timeout(&to, ANSWERS_WITHIN))?;
    stream.set_read_timeout(Some(ANSWERS_WITHIN))?;
    let peer = stream.peer_addr()?;
    if peer != to {
        return Err(io::Error::new(
            ErrorKind::InvalidData,
            format!("asked for {to}, getpeername says {peer}"),
        ));
    }
    let mut name = String::new();
    stream.read_to_string(&mut name)?;
    Ok(name)
}

/// Who answers `count` connections: each once, in order of their names.
pub(crate) fn names_over_tcp(from: &Netns, to: SocketAddr, count: usize) -> Vec<String> {
    let names: BTreeSet<String> = (0..count)
        .map(|_| name_over_tcp(from, to).unwrap_or_else(|e| panic!("{to}: {e}")))
        .collect();
    names.into_iter().collect()
}

/// A connected UDP socket in a pod: it takes answers from `to` alone.
pub(crate) fn flow(from: &Netns, to: SocketAddr) -> io::Result<UdpSocket> {
    from.run(|| {
        let any: IpAddr = match to {
            SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let socket = UdpSocket::bind((any, 0))?;
        socket.set_read_timeout(Some(ANSWERS_WITHIN))?;
        socket.connect(to)?;
        Ok(socket)
    })
}

/// One datagram and its answer.
pub(crate) fn ask(flow: &UdpSocket) -> io::Result<String> {
    flow.send(b"who?")?;
    let mut buffer = [0; 64];
    let length = flow.recv(&mut buffer)?;
    Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
}

/// Who answers `count` flows.
pub(crate) fn names_over_udp(from: &Netns, to: SocketAddr, count: usize) -> Vec<String> {
    let names: BTreeSet<String> = (0..count)
        .map(|_| {
            flow(from, to)
                .and_then(|flow| ask(&flow))
                .unwrap_or_else(|e| panic!("{to} over UDP: {e}"))
        })
        .collect();
    names.into_iter().collect()
}

/// A flow that goes to the server of this name: new ones are made until one does.
pub(crate) fn flow_to(from: &Netns, to: SocketAddr, name: &str) -> UdpSocket {
    wait_for("a flow to the wanted backend", SEEN_WITHIN, || {
        let flow = flow(from, to).ok()?;
        (ask(&flow).ok()? == name).then_some(flow)
    })
    .unwrap()
}
