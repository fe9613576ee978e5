//! The validated configuration: one struct a section of `kun.yaml`. A core receives its section, never the whole.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::Faults;
use crate::types::{PodPrefix, SlotClass};

/// All of `kun.yaml`.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// This node.
    pub node: Node,
    /// Where cluster objects come from.
    pub cluster: ClusterSource,
    /// Addresses of pods.
    pub ipam: Ipam,
    /// The service proxy.
    pub proxy: Proxy,
    /// The NAT64 gateway role.
    pub nat64: Nat64,
    /// The BGP speaker.
    pub bgp: Bgp,
    /// The DNS server.
    pub dns: Dns,
    /// The operator.
    pub operator: Operator,
    /// Files, sockets and endpoints of the programs themselves.
    pub agent: Agent,
    /// What is legal but surely not meant; for logs and `--check-config`.
    pub warnings: Faults,
}

/// `node`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// The Node object's name; default: the host name.
    pub name: String,
    /// The interface towards the fabric; `None`: the one that holds the default route.
    pub uplink: Option<String>,
}

/// `cluster`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClusterSource {
    /// A folder of Kubernetes manifests.
    Folder(PathBuf),
    /// The Kubernetes API: in-cluster configuration, or a kubeconfig.
    Kubernetes {
        /// `None`: the ServiceAccount of the pod.
        kubeconfig: Option<PathBuf>,
    },
}

/// How a pod's addresses are laid on interfaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interfaces {
    /// `eth0` for IPv6, `eth1` for IPv4: two veth pairs.
    Split,
    /// `eth0` with both.
    Shared,
}

/// `ipam`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ipam {
    /// The /96 over all pods of the cluster.
    pub pod_prefix: PodPrefix,
    /// The IPv4 pools of dual slots, cluster-wide; none of them inside 240.0.0.0/4.
    pub v4_pools: Vec<Ipv4Net>,
    /// The part of 240.0.0.0/4 for IPv6-only slots.
    pub v6_only_pool: Ipv4Net,
    /// What a pod without the annotation `kun.network/ipv4` gets.
    pub default_class: SlotClass,
    /// Split or shared.
    pub interfaces: Interfaces,
    /// Minimum time between release and reuse, on CLOCK_BOOTTIME.
    pub cooldown: Duration,
    /// How long evidence that the network has forgotten an address is looked for in vain before the address is kept back.
    pub quarantine_after: Duration,
    /// A block that a node has no use for goes back after so long.
    pub return_blocks_after: Duration,
    /// `None`: the uplink's.
    pub mtu: Option<u32>,
}

/// `proxy`.
#[derive(Debug, Clone, PartialEq)]
pub struct Proxy {
    /// The cgroup v2 directory whose processes are served at connect().
    pub cgroup_root: PathBuf,
    /// Capacity of the services map.
    pub max_services: u32,
    /// Capacity of the backends array.
    pub max_backends: u32,
    /// Capacity of the slots array (backend ids over all extents).
    pub max_slots: u32,
    /// Capacity of the flow table.
    pub max_flows: u32,
    /// How long an idle UDP flow keeps its backend.
    pub udp_idle: Duration,
}

/// `nat64`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nat64 {
    /// The prefixes under which the IPv4 world is reached. RFC 6052: /32 /40 /48 /56 /64 /96; the gateway takes /96 alone.
    pub pref64: Vec<Ipv6Net>,
    /// The gateway role: `None` on nodes that only know the prefix.
    pub gateway: Option<Nat64Gateway>,
    /// k: a pod's port block is 2^k ports; 6..=12.
    pub port_block_bits: u8,
    /// First port of the range that pods use as ephemeral ports, a multiple of 2^k: `ip_local_port_range` of every pod
    /// is `[local_port_base, local_port_base + 2^k - 1]`.
    pub local_port_base: u16,
}

/// `nat64.gateway`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nat64Gateway {
    /// The IPv4 addresses that translated flows come from; announced.
    pub pool: Vec<Ipv4Net>,
    /// The slot ranges that have port blocks, in order: block number = index of the slot in their concatenation.
    pub clients: Vec<Ipv4Net>,
    /// Which of the stateful slices is this gateway's: 0..16.
    pub slice: u8,
}

/// `bgp`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bgp {
    /// `false`: no speaker.
    pub enabled: bool,
    /// This node's AS.
    pub asn: u32,
    /// `None`: the node's IPv4 address, else the low 32 bits of its IPv6 address.
    pub router_id: Option<Ipv4Addr>,
    /// Listening address for incoming sessions; `None`: active only.
    pub listen: Option<SocketAddr>,
    /// Peers.
    pub peers: Vec<BgpPeer>,
    /// What is announced.
    pub advertise: Advertise,
    /// Graceful restart time (RFC 4724), 0: off.
    pub graceful_restart: Duration,
}

/// One entry of `bgp.peers`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BgpPeer {
    /// A name for people: metrics, status.
    pub name: String,
    /// Address; a link-local one carries its interface in `interface`.
    pub address: IpAddr,
    /// For link-local peers.
    pub interface: Option<String>,
    /// 1..2^32-1, not 23456 (RFC 6793).
    pub asn: u32,
    /// Default 179.
    pub port: u16,
    /// Source address, same family as `address`.
    pub source: Option<IpAddr>,
    /// Negotiated address families.
    pub families: Families,
    /// Hold time: 0 or ≥ 3 s (RFC 4271 §4.2). Default 9 s.
    pub hold: Duration,
    /// TCP MD5 (RFC 2385): the file with the key.
    pub md5_file: Option<PathBuf>,
    /// TTL security (RFC 5082).
    pub gtsm: bool,
}

/// Which address families a session carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Families {
    /// IPv4 unicast.
    pub v4: bool,
    /// IPv6 unicast.
    pub v6: bool,
}

/// `bgp.advertise`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Advertise {
    /// The route pair of each block that this node owns.
    pub blocks: bool,
    /// Virtual addresses of LoadBalancer services with a ready endpoint on this node.
    pub vips: bool,
    /// Pref64 and the IPv4 pool, on gateways.
    pub nat64: bool,
    /// Further prefixes, as they are.
    pub extra: Vec<IpNet>,
}

/// `dns`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dns {
    /// The Corefile.
    pub corefile: PathBuf,
    /// Prometheus endpoint of `kun-dns`; `None`: off.
    pub metrics: Option<SocketAddr>,
}

/// `operator`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Operator {
    /// Blocks of each class that every node gets at least; 1..=1000.
    pub blocks_per_node: u32,
    /// Prometheus endpoint of `kun-operator`; `None`: off.
    pub metrics: Option<SocketAddr>,
}

/// `agent`: files, sockets, endpoints.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Agent {
    /// Durable state.
    pub state_dir: PathBuf,
    /// The agent's Unix socket.
    pub socket: PathBuf,
    /// Where maps and links are pinned: a directory on a bpffs.
    pub bpffs_root: PathBuf,
    /// Prometheus endpoint of `kun-proxy`; `None`: off.
    pub metrics: Option<SocketAddr>,
    /// Log filter, as `RUST_LOG` takes it.
    pub log: String,
    /// Text or JSON.
    pub log_format: LogFormat,
}

/// How logs are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}
