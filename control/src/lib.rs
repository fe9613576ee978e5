//! The node agent's Unix-socket protocol: one JSON object a line each way, one request a line, answered in order.
//!
//! Served by the agent (`kun-proxy`), spoken by `kun-cni` and `kunctl`. Types, the blocking client, and the server that hands each
//! request to the agent. A line is at most [`MAX_LINE`] bytes.

#![forbid(unsafe_code)]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::num::{NonZeroU16, NonZeroU64};
use std::path::Path;

use kun_config::types::{BlockId, Slot, SlotClass};
use serde::{Deserialize, Serialize};

mod addresses;
mod client;
mod server;

pub use addresses::{BlockRow, Exhausted, Holder, PoolRow, SlotRow};
pub use client::{Client, ClientError};
pub use server::{Server, SocketError};

/// Longest line either side accepts: a status of 2,500 attachments fits four times.
pub const MAX_LINE: usize = 4 << 20;

/// Who an address belongs to (CNI spec §2: the attachment).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AttachmentKey {
    /// Network name.
    pub network: String,
    /// CNI_CONTAINERID.
    pub container_id: String,
    /// CNI_IFNAME.
    pub ifname: String,
}

/// What the runtime told about the pod.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct PodRef {
    /// Namespace, empty where the runtime gave none.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// UID.
    pub uid: String,
}

/// An allocation as it stands in the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Allocation {
    /// Whose.
    pub key: AttachmentKey,
    /// The slot.
    pub slot: Slot,
    /// Number of the allocation, of all of the node: a slot's only grows, and no two allocations share one.
    pub generation: u64,
    /// IPv6 address, always.
    pub v6: Ipv6Addr,
    /// IPv4 address of dual slots.
    pub v4: Option<Ipv4Addr>,
    /// The pod.
    pub pod: PodRef,
    /// Another plugin makes the interfaces.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub delegated: bool,
}

/// Slots that a caller would accept: a whole range of addresses of either family is a range of slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SlotRange {
    /// First.
    pub first: Slot,
    /// Last, included.
    pub last: Slot,
}

impl SlotRange {
    /// Whether the slot is in it.
    pub fn contains(&self, slot: Slot) -> bool {
        (self.first..=self.last).contains(&slot)
    }
}

/// How fast a pod's packets may go, both families and all its interfaces together. A direction without a limit is `None`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Bandwidth {
    /// Into the pod.
    pub ingress: Option<RateLimit>,
    /// Out of the pod.
    pub egress: Option<RateLimit>,
}

impl Bandwidth {
    /// Neither direction has a limit.
    pub fn is_unlimited(&self) -> bool {
        self.ingress.is_none() && self.egress.is_none()
    }
}

/// A limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RateLimit {
    /// Bits a second.
    pub rate: NonZeroU64,
    /// Bits that may go at once after a pause; `None`: the agent's choice. Runtimes pass huge ones (kubelet: 2³¹ − 1).
    pub burst: Option<NonZeroU64>,
}

/// Transport of a port mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

/// A port of the node that leads into the pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PortMapping {
    /// On the node.
    pub host_port: NonZeroU16,
    /// In the pod.
    pub container_port: NonZeroU16,
    /// Which.
    pub protocol: Transport,
    /// On this address of the node alone; `0.0.0.0` and `::`: any of that family; `None`: any of both.
    pub host_ip: Option<IpAddr>,
}

/// What the agent does for an attachment beyond its interfaces.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Traffic {
    /// Limits.
    pub bandwidth: Bandwidth,
    /// Host ports.
    pub port_mappings: Vec<PortMapping>,
}

impl Traffic {
    /// Nothing is asked for.
    pub fn is_empty(&self) -> bool {
        self.bandwidth.is_unlimited() && self.port_mappings.is_empty()
    }
}

/// A request to the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// CNI ADD, first half: durable slot for the key. Idempotent for a live key.
    Allocate {
        /// Whose.
        key: AttachmentKey,
        /// The pod.
        pod: PodRef,
        /// `None`: the configured default.
        class: Option<SlotClass>,
        /// This slot and no other. It must be free, a fixed address cools like any other, or have been this very attachment's last.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        slot: Option<Slot>,
        /// One of these slots; empty: any.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        within: Vec<SlotRange>,
        /// Another plugin makes the interfaces (`"ipam": {"type": "kun-cni"}`): that none of ours carries the address proves
        /// nothing, so only DEL, GC or a person takes it back.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        delegated: bool,
        /// The host ports that `Attached` will ask for. One that another pod has is refused before there is a slot: whoever tries
        /// again and again spends none on it.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        ports: Vec<PortMapping>,
    },
    /// Which slots the pods of a namespace get that do not say.
    Class {
        /// The namespace; empty where the runtime told none.
        namespace: String,
    },
    /// CNI ADD, second half: the interfaces stand; the agent attaches its programs and routes before it answers.
    Attached {
        /// Whose.
        key: AttachmentKey,
        /// Host-side interface names, IPv6's first.
        host_interfaces: Vec<String>,
        /// Limits and host ports.
        #[serde(default, skip_serializing_if = "Traffic::is_empty")]
        traffic: Traffic,
    },
    /// CNI CHECK: whether what `Attached` did still stands.
    Verify {
        /// Whose.
        key: AttachmentKey,
        /// Host-side interface names, IPv6's first.
        host_interfaces: Vec<String>,
        /// Limits and host ports.
        #[serde(default, skip_serializing_if = "Traffic::is_empty")]
        traffic: Traffic,
    },
    /// CNI DEL: the slot begins to cool. Unknown keys succeed.
    Release {
        /// Whose.
        key: AttachmentKey,
        /// The generation that is meant, where the caller knows it: a late DEL never frees a newer allocation.
        #[serde(default)]
        generation: Option<u64>,
    },
    /// CNI CHECK: the allocation as stored.
    Lookup {
        /// Whose.
        key: AttachmentKey,
    },
    /// Everything `kunctl status` shows.
    Status,
    /// Pools, blocks, and every slot that is not free.
    Ipam,
    /// By hand: an allocated slot begins to cool; one that cools or is quarantined need not wait for evidence any more.
    Free {
        /// The slot.
        slot: Slot,
        /// The generation that the caller saw. Another one since: refused.
        generation: u64,
        /// Even though an interface still carries the address.
        #[serde(default)]
        forced: bool,
    },
    /// CNI STATUS: how many slots of the class there are; `None`: of the configured default.
    Capacity {
        /// With IPv4 or without.
        class: Option<SlotClass>,
    },
    /// Why a 5-tuple goes where it goes.
    Why {
        /// `tcp`, `udp` or `sctp`.
        protocol: String,
        /// The client, where given.
        source: Option<IpAddr>,
        /// Destination address.
        destination: IpAddr,
        /// Destination port.
        port: u16,
    },
}

/// The agent's answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "kebab-case")]
pub enum Response {
    /// Allocate, Lookup.
    Allocation {
        /// The allocation.
        allocation: Allocation,
    },
    /// Release, Attached, Verify: done, or as it should be.
    Done,
    /// Verify: something is missing.
    NotAsExpected {
        /// One line each.
        missing: Vec<String>,
    },
    /// Class.
    Class {
        /// The class.
        class: SlotClass,
    },
    /// Capacity.
    Capacity {
        /// In use.
        allocated: u32,
        /// Released, not to be used yet.
        cooling: u32,
        /// To be had at once.
        free: u32,
    },
    /// Allocate with a `slot` that cannot be had.
    Unavailable {
        /// The slot.
        slot: Slot,
        /// Why not.
        because: Unavailable,
    },
    /// Allocate with `within` that no block of this node has a part in.
    Elsewhere {
        /// Of this class.
        class: SlotClass,
        /// It gives out these.
        blocks: Vec<BlockId>,
    },
    /// Lookup of an unknown key.
    Unknown,
    /// No slot is to be had now (CNI code 11).
    Exhausted {
        /// Until when, and who has them.
        exhausted: Exhausted,
    },
    /// Refused or failed: what, and what to do.
    Failed {
        /// One line.
        message: String,
    },
    /// `Status`: sections by name, each owned by the part that fills it.
    Status {
        /// The sections.
        status: Status,
    },
    /// `Ipam`.
    Ipam {
        /// One row a slot.
        slots: Vec<SlotRow>,
        /// One row a block.
        #[serde(default)]
        blocks: Vec<BlockRow>,
        /// One row a class.
        #[serde(default)]
        pools: Vec<PoolRow>,
    },
    /// `Why`.
    Why {
        /// The chain of reasons, first decided first.
        steps: Vec<WhyStep>,
    },
}

/// Why a slot that was asked for by its number cannot be had.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "kebab-case")]
pub enum Unavailable {
    /// In no block of this node.
    NotOurs,
    /// In use.
    Allocated {
        /// By whom.
        key: AttachmentKey,
        /// The pod.
        pod: PodRef,
    },
    /// Released, and not free yet.
    Cooling {
        /// Until it is free; `None`: it has rested, but something still knows it; `kunctl ipam` says what.
        free_in_secs: Option<u64>,
    },
    /// The attachment has another slot already.
    HasAnother {
        /// Which.
        slot: Slot,
    },
}

/// One reason in the answer to "why?".
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WhyStep {
    /// `service`, `view`, `backend`, `endpoint`, `manifest`, `route`, `drop`.
    pub what: String,
    /// The object: `default/frontend:http`.
    pub object: String,
    /// One line for people.
    pub detail: String,
    /// Where the object was read: file and line, or resourceVersion.
    pub source: Option<String>,
}

/// `kunctl status`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Status {
    /// Node name.
    pub node: String,
    /// Program version.
    pub version: String,
    /// Seconds since start.
    pub uptime_secs: u64,
    /// The cluster view: `synced`, counts by kind.
    pub cluster: Vec<Fact>,
    /// Service dataplane.
    pub proxy: Vec<Fact>,
    /// Addresses.
    pub ipam: Vec<Fact>,
    /// NAT64.
    pub nat64: Vec<Fact>,
    /// BGP sessions.
    pub bgp: Vec<BgpSession>,
    /// Kernel abilities: what is missing and what it costs.
    pub kernel: Vec<Fact>,
}

/// One line of a status section.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fact {
    /// Name.
    pub name: String,
    /// Value.
    pub value: String,
    /// Whether this is as it should be.
    pub ok: bool,
}

/// A BGP session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BgpSession {
    /// Peer name.
    pub peer: String,
    /// Peer address.
    pub address: IpAddr,
    /// FSM state, RFC 4271 §8.2.2.
    pub state: String,
    /// Seconds in this state.
    pub since_secs: u64,
    /// Prefixes in Adj-RIB-Out.
    pub announced: u32,
    /// Why it was last down.
    pub last_error: Option<String>,
}

/// Asks the agent at `socket` once.
pub fn ask(socket: &Path, request: &Request) -> Result<Response, ClientError> {
    Client::connect(socket)?.ask(request)
}
