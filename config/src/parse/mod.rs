//! `kun.yaml`: text to [`Config`]. Unknown fields are refused, all faults are told at once, absent fields have the defaults that
//! `deploy/kun.yaml` documents.

mod bgp;
mod ipam;
mod nat64;
mod place;

use std::collections::BTreeSet;
use std::net::{Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use crate::sections::{Agent, ClusterSource, Config, Dns, LogFormat, Node, Operator, Proxy};
use crate::yaml::{self, Cursor, Fields, Mark, Sink, Value};
use crate::{Fault, Faults};

/// Parses `kun.yaml` for a host that is called `localhost`; programs use [`parse_on`].
pub fn parse(file_name: &str, text: &str) -> Result<Config, Faults> {
    parse_on(file_name, text, "localhost")
}

/// Parses `kun.yaml`; `host` is the node's name where the file gives none, since this crate cannot ask the system.
/// Legal but surely unmeant values are in [`Config::warnings`].
pub fn parse_on(file_name: &str, text: &str, host: &str) -> Result<Config, Faults> {
    let tree = single_document(file_name, text)?;
    let sink = Sink::new(file_name);
    let config = config(Cursor::root(&tree, &sink).fields(), host);
    let (faults, warnings) = sink.into_parts();
    if !faults.0.is_empty() {
        return Err(faults);
    }
    Ok(Config { warnings, ..config })
}

/// The path of every field that `kun.yaml` may have, as far as `text` opens the lists and sections that hold them: what the
/// reference must document.
pub fn known_fields(file_name: &str, text: &str) -> Result<BTreeSet<String>, Faults> {
    let tree = single_document(file_name, text)?;
    let sink = Sink::tracking(file_name);
    config(Cursor::root(&tree, &sink).fields(), "localhost");
    Ok(sink.known())
}

fn single_document<'a>(file_name: &str, text: &'a str) -> Result<yaml::Node<'a>, Faults> {
    let mut documents = yaml::documents(file_name, text).map_err(|fault| Faults(vec![fault]))?;
    if let Some(second) = documents.get(1) {
        return Err(Faults(vec![Fault {
            file: file_name.to_owned(),
            at: Some((second.at.line, second.at.column)),
            path: String::new(),
            wrong: "a second document".to_owned(),
            right: "kun.yaml is one document: remove the `---`".to_owned(),
        }]));
    }
    Ok(documents.pop().unwrap_or_else(empty))
}

/// What an absent section is read as, so that its defaults are written once.
fn empty<'a>() -> yaml::Node<'a> {
    yaml::Node {
        at: Mark { line: 1, column: 1 },
        value: Value::Mapping(Vec::new()),
    }
}

/// Reads everything. With faults noted, what comes out holds stand-ins and is thrown away by the caller.
fn config(root: Fields<'_, '_>, host: &str) -> Config {
    let empty = empty();
    let node = node(root.section("node", &empty), host);
    let cluster = cluster(root.section("cluster", &empty));
    let (ipam, ipam_places) = ipam::read(root.section("ipam", &empty));
    let proxy = proxy(root.section("proxy", &empty));
    let (nat64, nat64_places) = nat64::read(root.section("nat64", &empty), &ipam);
    let bgp = bgp::read(root.section("bgp", &empty));
    let dns = dns(root.section("dns", &empty));
    let operator = operator(root.section("operator", &empty));
    let agent = agent(root.section("agent", &empty));
    place::check_overlaps(root.cursor(), &ipam_places, &nat64_places);
    root.finish();
    Config {
        node,
        cluster,
        ipam,
        proxy,
        nat64,
        bgp,
        dns,
        operator,
        agent,
        warnings: Faults::default(),
    }
}

fn node(f: Fields<'_, '_>, host: &str) -> Node {
    let node = Node {
        name: f
            .get("name")
            .and_then(|c| c.object_name())
            .unwrap_or_else(|| host.to_owned()),
        uplink: f.get("uplink").and_then(|c| c.interface()),
    };
    f.finish();
    node
}

fn cluster(f: Fields<'_, '_>) -> ClusterSource {
    let folder = f.get("folder").and_then(|c| c.absolute_path());
    let kubernetes = f.get("kubernetes").map(|c| {
        if f.get("folder").is_some() {
            c.fault(
                "given together with `folder`",
                "the cluster has one source: keep one of them",
            );
        }
        let k = c.fields();
        let kubeconfig = k.get("kubeconfig").and_then(|c| c.absolute_path());
        k.finish();
        ClusterSource::Kubernetes { kubeconfig }
    });
    f.finish();
    kubernetes.unwrap_or_else(|| {
        ClusterSource::Folder(folder.unwrap_or_else(|| PathBuf::from("/etc/kun/manifests")))
    })
}

fn proxy(f: Fields<'_, '_>) -> Proxy {
    // The upper bounds keep every map below 1 GiB, which a node cannot have meant.
    let count = |name, default: u32, max: u32| {
        f.get(name)
            .and_then(|c| c.count(64, max))
            .unwrap_or(default)
    };
    let proxy = Proxy {
        cgroup_root: path(&f, "cgroupRoot", "/sys/fs/cgroup"),
        max_services: count("maxServices", 65_536, 4 << 20),
        max_backends: count("maxBackends", 262_144, 16 << 20),
        max_slots: count("maxSlots", 1 << 20, 64 << 20),
        max_flows: count("maxFlows", 131_072, 8 << 20),
        udp_idle: duration(
            &f,
            "udpIdle",
            Duration::from_secs(60),
            Duration::from_secs(1),
            Duration::from_secs(86_400),
        ),
    };
    f.finish();
    proxy
}

fn dns(f: Fields<'_, '_>) -> Dns {
    let dns = Dns {
        corefile: path(&f, "corefile", "/etc/kun/Corefile"),
        metrics: endpoint(&f, "metrics", 9153),
    };
    f.finish();
    dns
}

fn operator(f: Fields<'_, '_>) -> Operator {
    let operator = Operator {
        // 1,000 blocks are 64,000 pods on one node.
        blocks_per_node: f
            .get("blocksPerNode")
            .and_then(|c| c.count(1, 1000))
            .unwrap_or(1),
        metrics: endpoint(&f, "metrics", 9467),
    };
    f.finish();
    operator
}

fn agent(f: Fields<'_, '_>) -> Agent {
    let agent = Agent {
        state_dir: path(&f, "stateDir", "/var/lib/kun"),
        socket: socket(&f),
        bpffs_root: path(&f, "bpffsRoot", "/sys/fs/bpf/kun"),
        metrics: endpoint(&f, "metrics", 9466),
        log: f
            .get("log")
            .and_then(|c| c.string())
            .unwrap_or_else(|| "info".to_owned()),
        log_format: f
            .get("logFormat")
            .and_then(|c| c.choice(&[("text", LogFormat::Text), ("json", LogFormat::Json)]))
            .unwrap_or(LogFormat::Text),
    };
    f.finish();
    agent
}

/// The length of `sockaddr_un.sun_path` without its closing zero (unix(7)).
const SOCKET_PATH_MAX: usize = 107;

fn socket(f: &Fields<'_, '_>) -> PathBuf {
    let socket = path(f, "socket", "/run/kun/agent.sock");
    let length = socket.as_os_str().len();
    if length > SOCKET_PATH_MAX
        && let Some(c) = f.get("socket")
    {
        c.fault(
            format_args!("{length} bytes long"),
            format_args!("a Unix socket's path has at most {SOCKET_PATH_MAX} bytes"),
        );
    }
    socket
}

fn path(f: &Fields<'_, '_>, name: &'static str, default: &str) -> PathBuf {
    f.get(name)
        .and_then(|c| c.absolute_path())
        .unwrap_or_else(|| PathBuf::from(default))
}

/// `off` switches it off; the default listens on all addresses of both families.
fn endpoint(f: &Fields<'_, '_>, name: &'static str, port: u16) -> Option<SocketAddr> {
    let default = Some(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)));
    f.get(name).and_then(|c| c.endpoint()).unwrap_or(default)
}

fn duration(
    f: &Fields<'_, '_>,
    name: &'static str,
    default: Duration,
    min: Duration,
    max: Duration,
) -> Duration {
    let Some(c) = f.get(name) else { return default };
    let Some(value) = c.duration() else {
        return default;
    };
    if !(min..=max).contains(&value) {
        c.fault(
            format_args!("{} s is out of range", value.as_secs_f64()),
            format_args!(
                "write a duration from {}s to {}s",
                min.as_secs(),
                max.as_secs()
            ),
        );
    }
    value
}
