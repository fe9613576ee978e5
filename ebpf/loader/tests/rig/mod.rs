//! What the dataplane's tests share: a dataplane on a bpffs of its own, services in it, and packets made and read by etherparse,
//! which knows nothing of our code.

// Each test binary uses its part.
#![allow(dead_code, unreachable_pub)]

use std::net::IpAddr;
use std::path::PathBuf;

use etherparse::{NetSlice, PacketBuilder, SlicedPacket, TransportSlice};
use kun_ebpf_abi::reason::Reason;
use kun_ebpf_abi::service::{Backend, Scope, ServiceKey, ServiceValue, View, ViewKind, state};
use kun_ebpf_abi::{Addr, Port};
use kun_ebpf_loader::{Adopted, ServiceConfig, ServiceDataplane};
use kun_harness::BpfFs;

/// tcx and clsact: go on to the next program.
pub const PASS: i32 = -1;
/// Drop.
pub const SHOT: i32 = 2;
/// Redirect.
pub const REDIRECT: i32 = 7;

pub const UDP: u8 = 17;
pub const TCP: u8 = 6;

pub const SYN: u8 = 0x02;
pub const ACK: u8 = 0x10;
pub const FIN: u8 = 0x01;

pub fn addr(ip: IpAddr) -> Addr {
    match ip {
        IpAddr::V4(a) => Addr::v4(a.octets()),
        IpAddr::V6(a) => Addr::v6(a.octets()),
    }
}

pub fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address in a test")
}

/// A client, a service's address, two backends and a stranger of one family.
#[derive(Debug, Clone, Copy)]
pub struct Family {
    pub client: IpAddr,
    pub vip: IpAddr,
    pub backends: [IpAddr; 2],
    pub stranger: IpAddr,
    pub hairpin: IpAddr,
}

pub fn families() -> [Family; 2] {
    [
        Family {
            client: ip("10.0.0.5"),
            vip: ip("10.96.0.10"),
            backends: [ip("10.0.1.1"), ip("10.0.1.2")],
            stranger: ip("10.0.9.9"),
            hairpin: ip("169.254.1.1"),
        },
        Family {
            client: ip("fd00::5"),
            vip: ip("fd00:96::10"),
            backends: [ip("fd00:1::1"), ip("fd00:1::2")],
            stranger: ip("fd00:9::9"),
            hairpin: ip("100::1"),
        },
    ]
}

/// A dataplane of its own.
pub struct Rig {
    pub plane: ServiceDataplane,
    pub bpffs: BpfFs,
    config: ServiceConfig,
    next_slot: u32,
}

impl Rig {
    pub fn new() -> Self {
        Self::with(1024, PathBuf::from("/nonexistent"))
    }

    pub fn with(max_flows: u32, cgroup_root: PathBuf) -> Self {
        let bpffs = BpfFs::new().expect("a bpffs");
        let config = ServiceConfig {
            bpffs_root: bpffs.path().to_owned(),
            mount_bpffs: false,
            cgroup_root,
            max_services: 64,
            max_backends: 64,
            max_slots: 256,
            max_flows,
        };
        let (plane, adopted) = ServiceDataplane::open(&config).expect("the dataplane loads");
        assert_eq!(adopted, Adopted::default(), "a fresh bpffs holds nothing");
        Rig {
            plane,
            bpffs,
            config,
            next_slot: 0,
        }
    }

    /// Ends the dataplane as an agent's death would, and starts the next.
    pub fn restart(self) -> (Self, Adopted) {
        self.restart_after(|| ())
    }

    /// [`Self::restart`], with something happening while no agent runs.
    pub fn restart_after(self, meanwhile: impl FnOnce()) -> (Self, Adopted) {
        let Rig {
            plane,
            bpffs,
            config,
            next_slot,
        } = self;
        drop(plane);
        meanwhile();
        let (plane, adopted) = ServiceDataplane::open(&config).expect("the dataplane loads again");
        let rig = Rig {
            plane,
            bpffs,
            config,
            next_slot,
        };
        (rig, adopted)
    }

    pub fn config(&self) -> &ServiceConfig {
        &self.config
    }

    /// A service under an id, all views alike, and no backends yet.
    pub fn service(
        &mut self,
        id: u32,
        vip: IpAddr,
        port: u16,
        proto: u8,
        scope: Scope,
    ) -> ServiceValue {
        let value = ServiceValue {
            service: id,
            scope: scope as u8,
            internal_view: ViewKind::Cluster as u8,
            external_view: ViewKind::Local as u8,
            pad: 0,
            affinity_secs: 0,
        };
        self.plane
            .maps()
            .upsert_service(&key(vip, port, proto), &value)
            .expect("room for a service");
        value
    }

    /// Backends with these ids, active, generation 1.
    pub fn backends(&mut self, first: u32, all: &[(IpAddr, u16)]) -> Vec<u32> {
        (first..)
            .zip(all)
            .map(|(id, (ip, port))| {
                self.backend(id, *ip, *port, state::ACTIVE, 1);
                id
            })
            .collect()
    }

    pub fn backend(&mut self, id: u32, ip: IpAddr, port: u16, state: u8, generation: u32) {
        let backend = Backend {
            addr: addr(ip),
            port: Port::new(port),
            state,
            local: 1,
            generation,
            service: 0,
            pad: 0,
        };
        self.plane
            .maps()
            .write_backend(id, &backend)
            .expect("room for a backend");
    }

    /// Publishes these backends as a view, in a fresh extent.
    pub fn publish(&mut self, service: u32, kind: ViewKind, ids: &[u32]) {
        let base = self.next_slot;
        self.next_slot += ids.len() as u32;
        let maps = self.plane.maps();
        maps.write_slots(base, ids).expect("room for slots");
        let epoch = maps
            .view(service, kind)
            .expect("a service id")
            .epoch
            .wrapping_add(1);
        let view = View {
            epoch,
            count: ids.len() as u16,
            base,
        };
        maps.publish(service, kind, view).expect("a service id");
    }

    pub fn counted(&self, reason: Reason) -> u64 {
        let all = self.plane.reasons().expect("counters");
        all.iter()
            .find(|(r, _)| *r == reason)
            .expect("every reason is listed")
            .1
    }
}

pub fn key(vip: IpAddr, port: u16, proto: u8) -> ServiceKey {
    ServiceKey {
        addr: addr(vip),
        port: Port::new(port),
        proto,
        pad: 0,
    }
}

/// One end of a flow.
pub type End = (IpAddr, u16);

const MACS: ([u8; 6], [u8; 6]) = ([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);

/// A packet with right checksums.
pub fn packet(proto: u8, src: End, dst: End, flags: u8, payload: &[u8]) -> Vec<u8> {
    let ethernet = PacketBuilder::ethernet2(MACS.0, MACS.1);
    let ip = match (src.0, dst.0) {
        (IpAddr::V4(s), IpAddr::V4(d)) => ethernet.ipv4(s.octets(), d.octets(), 64),
        (IpAddr::V6(s), IpAddr::V6(d)) => ethernet.ipv6(s.octets(), d.octets(), 64),
        _ => panic!("a packet is of one family"),
    };
    let mut out = Vec::new();
    let written = if proto == UDP {
        ip.udp(src.1, dst.1).write(&mut out, payload)
    } else {
        let mut tcp = ip.tcp(src.1, dst.1, 1000, 4096);
        if flags & SYN != 0 {
            tcp = tcp.syn();
        }
        if flags & ACK != 0 {
            tcp = tcp.ack(7);
        }
        if flags & FIN != 0 {
            tcp = tcp.fin();
        }
        tcp.write(&mut out, payload)
    };
    written.expect("a packet is written to memory");
    out
}

pub fn udp(src: End, dst: End) -> Vec<u8> {
    packet(UDP, src, dst, 0, b"hello, world")
}

/// What a packet says, its checksums proven right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Read {
    pub src: End,
    pub dst: End,
    pub proto: u8,
    pub payload: Vec<u8>,
    pub macs: ([u8; 6], [u8; 6]),
}

pub fn read(bytes: &[u8]) -> Read {
    let sliced = SlicedPacket::from_ethernet(bytes).expect("a whole packet");
    let (src, dst) = match sliced.net.as_ref().expect("IP") {
        NetSlice::Ipv4(v4) => {
            let header = v4.header();
            assert_eq!(
                header.to_header().calc_header_checksum(),
                header.header_checksum(),
                "IPv4 header checksum of {bytes:02x?}"
            );
            (
                IpAddr::V4(header.source_addr()),
                IpAddr::V4(header.destination_addr()),
            )
        }
        NetSlice::Ipv6(v6) => {
            let header = v6.header();
            (
                IpAddr::V6(header.source_addr()),
                IpAddr::V6(header.destination_addr()),
            )
        }
        _ => panic!("neither IPv4 nor IPv6"),
    };
    let (sport, dport, proto, payload, found, right) =
        match sliced.transport.as_ref().expect("a transport header") {
            TransportSlice::Udp(u) => {
                let h = u.to_header();
                let right = match (src, dst) {
                    (IpAddr::V4(s), IpAddr::V4(d)) => {
                        h.calc_checksum_ipv4_raw(s.octets(), d.octets(), u.payload())
                    }
                    (IpAddr::V6(s), IpAddr::V6(d)) => {
                        h.calc_checksum_ipv6_raw(s.octets(), d.octets(), u.payload())
                    }
                    _ => unreachable!("one family"),
                };
                (
                    h.source_port,
                    h.destination_port,
                    UDP,
                    u.payload().to_vec(),
                    h.checksum,
                    right,
                )
            }
            TransportSlice::Tcp(t) => {
                let h = t.to_header();
                let right = match (src, dst) {
                    (IpAddr::V4(s), IpAddr::V4(d)) => {
                        h.calc_checksum_ipv4_raw(s.octets(), d.octets(), t.payload())
                    }
                    (IpAddr::V6(s), IpAddr::V6(d)) => {
                        h.calc_checksum_ipv6_raw(s.octets(), d.octets(), t.payload())
                    }
                    _ => unreachable!("one family"),
                };
                (
                    h.source_port,
                    h.destination_port,
                    TCP,
                    t.payload().to_vec(),
                    h.checksum,
                    right,
                )
            }
            other => panic!("neither TCP nor UDP: {other:?}"),
        };
    assert_eq!(
        found,
        right.expect("short enough"),
        "transport checksum of {bytes:02x?}"
    );
    let mac = |at: usize| bytes[at..at + 6].try_into().expect("six bytes");
    Read {
        src: (src, sport),
        dst: (dst, dport),
        proto,
        payload,
        macs: (mac(6), mac(0)),
    }
}
