//! The service dataplane's maps (one code path for both families: every address is 128 bits).
//!
//! | map | key → value | how it changes |
//! |---|---|---|
//! | `services` | [`ServiceKey`] → [`ServiceValue`] | hash |
//! | `views` | service id × [`VIEWS`] + view → `u64` [`View`] | mmap array; one store publishes a backend set |
//! | `slots` | index → backend id | mmap array; written before it is published, recycled after a grace period |
//! | `backends` | id → [`Backend`] | mmap array; one generation store kills every flow to it |
//! | `flows` | [`FlowKey`] → [`FlowValue`] | hash; a stale generation is a miss |
//! | `affinity` | [`AffinityKey`] → [`AffinityValue`] | LRU hash |
//! | `peers` | socket cookie → [`PeerValue`] | LRU hash; a lost entry makes getpeername() show the backend |
//! | `answers` | 0 → [`Pace`] | per CPU; how fast packets are answered with ICMP errors |
//! | `opted_out` | cgroup id → `u8` | hash; sockets of that cgroup and below keep the VIP |
//!
//! [`packet`] parses and rewrites, [`select`] chooses a backend, [`steer`] is what each hook decides. All three are generic over
//! how a packet and a map are reached, so the kernel and the tests run the same code.

use crate::{Addr, Port};

pub mod packet;
pub mod select;
pub mod steer;

/// Views of a service.
pub const VIEWS: u32 = 4;

/// Which endpoints a lookup sees.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ViewKind {
    /// All endpoints of the cluster.
    Cluster = 0,
    /// Endpoints on this node.
    Local = 1,
    /// Endpoints that zone affinity selects for this node.
    Zone = 2,
}

/// Where a frontend is reachable from.
#[repr(u8)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scope {
    /// A ClusterIP.
    Cluster = 0,
    /// A LoadBalancer or external address.
    External = 1,
    /// A node port; the address is the node's.
    NodePort = 2,
    /// A port of the node that leads to one pod (CNI `portMappings`); the address is the node's.
    HostPort = 3,
    /// The same at the node's loopback address: for sockets of the node's own network namespace.
    HostLoopback = 4,
}

/// Key of `services`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceKey {
    /// Virtual address.
    pub addr: Addr,
    /// Port.
    pub port: Port,
    /// IP protocol number.
    pub proto: u8,
    /// Zero: a frontend's scope is in its value, so that one lookup finds it.
    pub pad: u8,
}

/// Value of `services`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ServiceValue {
    /// Index into `views` (× [`VIEWS`]).
    pub service: u32,
    /// [`Scope`] of the frontend.
    pub scope: u8,
    /// [`ViewKind`] that clients inside the cluster use.
    pub internal_view: u8,
    /// [`ViewKind`] that clients outside the cluster use.
    pub external_view: u8,
    /// Zero.
    pub pad: u8,
    /// ClientIP affinity: seconds, 0 = off.
    pub affinity_secs: u32,
}

/// A backend set, published as one u64: epoch (16 bits) ∥ count (16) ∥ base (32), epoch highest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct View {
    /// Grows with each publication.
    pub epoch: u16,
    /// Entries in `slots`; 0 = no endpoint.
    pub count: u16,
    /// First entry in `slots`.
    pub base: u32,
}

impl View {
    /// As stored.
    pub const fn pack(self) -> u64 {
        (self.epoch as u64) << 48 | (self.count as u64) << 32 | self.base as u64
    }

    /// As read.
    pub const fn unpack(v: u64) -> Self {
        View {
            epoch: (v >> 48) as u16,
            count: (v >> 32) as u16,
            base: v as u32,
        }
    }
}

/// States of a backend.
pub mod state {
    /// Free record.
    pub const FREE: u8 = 0;
    /// Takes new flows.
    pub const ACTIVE: u8 = 1;
    /// Keeps its flows, takes no new ones.
    pub const DRAINING: u8 = 2;
    /// Gone: its flows are re-selected.
    pub const DEAD: u8 = 3;
}

/// A backend.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Backend {
    /// Address.
    pub addr: Addr,
    /// Port.
    pub port: Port,
    /// One of [`state`].
    pub state: u8,
    /// 1: on this node.
    pub local: u8,
    /// Grows each time the record is given to another backend or dies; a flow that holds another one is a miss.
    pub generation: u32,
    /// Service id, for explanations and accounting.
    pub service: u32,
    /// Zero.
    pub pad: u32,
}

/// Key of `flows`: a packet's tuple as it is seen at one hook.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FlowKey {
    /// Source.
    pub src: Addr,
    /// Destination.
    pub dst: Addr,
    /// Source port.
    pub sport: Port,
    /// Destination port.
    pub dport: Port,
    /// IP protocol number.
    pub proto: u8,
    /// [`flow`] direction.
    pub dir: u8,
    /// Zero.
    pub pad: u16,
}

/// Directions in [`FlowKey::dir`].
pub mod flow {
    /// Client to frontend: the value's address is the backend's.
    pub const FORWARD: u8 = 0;
    /// Backend to client: the value's address is the frontend's.
    pub const REVERSE: u8 = 1;
    /// Backend to itself as its client, whom it sees under the hairpin address: the value's address is the frontend's.
    pub const HAIRPIN: u8 = 2;
    /// A socket of the node itself to a frontend: the source is the socket ([`select::socket_client`](super::select::socket_client)),
    /// the value's address is the backend's. No packet has this direction.
    pub const SOCKET: u8 = 3;
    /// A backend to such a socket: the value's address is the frontend's.
    pub const SOCKET_REVERSE: u8 = 4;
}

/// Value of `flows`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FlowValue {
    /// What replaces the destination (forward) or the source (reverse).
    pub addr: Addr,
    /// Its port.
    pub port: Port,
    /// 1: a FIN or RST was seen.
    pub closing: u8,
    /// Zero.
    pub pad: u8,
    /// Backend id.
    pub backend: u32,
    /// Generation of the backend when the flow was made.
    pub generation: u32,
    /// The client's port on the other side of the rewriting: what the backend sees (forward), what the client has (reverse).
    /// 0: the same one.
    pub client: Port,
    /// Zero.
    pub pad2: u16,
    /// CLOCK_BOOTTIME nanoseconds of the last packet.
    pub seen: u64,
}

/// How fast ICMP errors go out (RFC 4443 §2.4 f, RFC 1812 §4.3.2.8): the rate and the burst of Linux, for each CPU.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Pace {
    /// When the next answer would be due if all came evenly: CLOCK_BOOTTIME nanoseconds.
    pub next: u64,
}

impl Pace {
    /// Between two answers: a thousand in a second.
    pub const EVERY_NS: u64 = 1_000_000;
    /// Answers at once after a silence.
    pub const BURST: u64 = 50;

    /// Whether an answer may go out now; counts it if so.
    #[inline(always)]
    pub fn take(&mut self, now: u64) -> bool {
        let next = if self.next > now { self.next } else { now };
        if next - now >= Self::BURST * Self::EVERY_NS {
            return false;
        }
        self.next = next + Self::EVERY_NS;
        true
    }
}

/// Key of `affinity`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct AffinityKey {
    /// Client address; at connect(), where the source is not yet chosen, the client's network namespace
    /// ([`select::netns_client`]).
    pub client: Addr,
    /// Index into `views`: an endpoint that one view chose need not be in another.
    pub view: u32,
}

/// Value of `affinity`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AffinityValue {
    /// Backend id.
    pub backend: u32,
    /// Its generation.
    pub generation: u32,
    /// CLOCK_BOOTTIME nanoseconds of the last use.
    pub seen: u64,
}

/// Value of `peers`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerValue {
    /// What the program asked for.
    pub frontend: Addr,
    /// What it is connected to: getpeername() of another address is not answered from here.
    pub backend: Addr,
    /// Port of the frontend.
    pub frontend_port: Port,
    /// Port of the backend.
    pub backend_port: Port,
}

const _: () = {
    assert!(size_of::<ServiceKey>() == 20);
    assert!(size_of::<ServiceValue>() == 12);
    assert!(size_of::<Backend>() == 32);
    assert!(size_of::<FlowKey>() == 40);
    assert!(size_of::<FlowValue>() == 40);
    assert!(size_of::<AffinityKey>() == 20);
    assert!(size_of::<AffinityValue>() == 16);
    assert!(size_of::<PeerValue>() == 36);
    assert!(size_of::<Pace>() == 8);
};

#[cfg(test)]
mod tests {
    use super::Pace;

    #[test]
    fn answers_keep_their_pace() {
        let mut pace = Pace::default();
        let start = 5_000_000_000;
        let burst = (0..1000).filter(|_| pace.take(start)).count() as u64;
        assert_eq!(burst, Pace::BURST);
        // Asked a hundred times in each interval, for a second.
        let step = Pace::EVERY_NS / 100;
        let second = (1..=100_000)
            .filter(|i| pace.take(start + i * step))
            .count();
        assert_eq!(second, 1000);
        assert!(pace.take(start + 10 * second as u64 * Pace::EVERY_NS));
    }
}
