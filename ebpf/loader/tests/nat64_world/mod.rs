//! A pod, an IPv4-only server and a gateway, each in a namespace of its own, around a router: all that the gateway has is its
//! uplink.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::time::Duration;

use kun_ebpf_loader::{Mechanism, Nat64Config, Nat64Dataplane};
use kun_harness::{BpfFs, Netns, veth};

pub(crate) const POD: &str = "2001:db8:10::a08:1";
pub(crate) const POD2: &str = "2001:db8:10::a08:2";
pub(crate) const FOREIGN: &str = "2001:db8:20::1";
pub(crate) const SERVER: &str = "192.0.2.80";
pub(crate) const BLOCK_ADDR: &str = "198.51.100.0";
pub(crate) const EXCEPTION_ADDR: &str = "198.51.100.3";

pub(crate) struct World {
    pub(crate) pod: Netns,
    pub(crate) server: Netns,
    pub(crate) router: Netns,
    pub(crate) gateway: Netns,
    pub(crate) bpffs: BpfFs,
}

/// The gateway's uplink, named as a VLAN's interface is.
pub(crate) const UPLINK: &str = "up.0";

pub(crate) fn config(bpffs_root: PathBuf) -> Nat64Config {
    Nat64Config {
        bpffs_root,
        pod_prefix: "2001:db8:10::".parse().unwrap(),
        pref64: ("2001:db8:64::".parse().unwrap(), 96),
        pool: vec![(Ipv4Addr::new(198, 51, 100, 0), 30)],
        clients: vec![(Ipv4Addr::new(10, 8, 0, 0), 24)],
        port_block_bits: 10,
        local_port_base: 64512,
        slice: 0,
    }
}

/// The server under Pref64.
pub(crate) fn server6(port: u16) -> SocketAddr {
    let four: Ipv4Addr = SERVER.parse().unwrap();
    let prefix = u128::from("2001:db8:64::".parse::<Ipv6Addr>().unwrap());
    let six = Ipv6Addr::from(prefix | u128::from(u32::from(four)));
    (six, port).into()
}

impl World {
    /// Built, with the pod's ports in its block; the gateway does not translate yet.
    pub(crate) fn new() -> World {
        let w = World {
            pod: Netns::new("n64p").unwrap(),
            server: Netns::new("n64s").unwrap(),
            router: Netns::new("n64r").unwrap(),
            gateway: Netns::new("n64g").unwrap(),
            bpffs: BpfFs::new().unwrap(),
        };
        veth(&w.pod, "eth0", &w.router, "pod").unwrap();
        veth(&w.server, "eth0", &w.router, "server").unwrap();
        veth(&w.gateway, UPLINK, &w.router, "gw").unwrap();
        w.router.forward().unwrap();
        w.gateway.forward().unwrap();
        for words in [
            "addr add fd00:1::1/64 dev pod",
            "addr add fd00:3::1/64 dev gw",
            "addr add 192.0.2.1/24 dev server",
            "addr add 203.0.113.1/24 dev gw",
            "route add 2001:db8:10::/96 via fd00:1::2",
            "route add 2001:db8:20::/64 via fd00:1::2",
            "route add 2001:db8:64::/96 via fd00:3::2",
            "route add 198.51.100.0/30 via 203.0.113.2",
        ] {
            w.router.exec(words).unwrap();
        }
        for words in [
            "addr add fd00:1::2/64 dev eth0",
            "addr add 2001:db8:10::a08:1/128 dev eth0",
            "addr add 2001:db8:10::a08:2/128 dev eth0 preferred_lft 0",
            "addr add 2001:db8:20::1/128 dev eth0 preferred_lft 0",
            "route add default via fd00:1::1 src 2001:db8:10::a08:1",
        ] {
            w.pod.exec(words).unwrap();
        }
        w.server.exec("addr add 192.0.2.80/24 dev eth0").unwrap();
        w.server.exec("route add default via 192.0.2.1").unwrap();
        for words in [
            &format!("addr add fd00:3::2/64 dev {UPLINK}"),
            &format!("addr add 203.0.113.2/24 dev {UPLINK}"),
            "route add default via 203.0.113.1",
            "-6 route add default via fd00:3::1",
        ] {
            w.gateway.exec(words).unwrap();
        }
        w.pod
            .sysctl("net.ipv4.ip_local_port_range", "64512 65535")
            .unwrap();
        w
    }

    /// A dataplane in the gateway, attached.
    pub(crate) fn translate(&self, only: Option<Mechanism>) -> Nat64Dataplane {
        let config = config(self.bpffs.path().to_owned());
        self.gateway.run(move || {
            let mut plane = Nat64Dataplane::open(&config).unwrap();
            let by = plane.attach_by(UPLINK, only).unwrap();
            assert!(only.is_none_or(|m| m == by));
            plane
        })
    }
}

/// Sends `n` octets of a pattern and reads `back` octets of it: both sides see every octet.
pub(crate) fn talk(mut stream: TcpStream, n: usize, back: usize) -> TcpStream {
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    stream
        .set_write_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    let mut writer = stream.try_clone().unwrap();
    let sender = std::thread::spawn(move || {
        let mut sent = 0;
        while sent < n {
            let chunk: Vec<u8> = (sent..n.min(sent + 65536)).map(pattern).collect();
            writer.write_all(&chunk).unwrap();
            sent += chunk.len();
        }
    });
    let mut got = 0;
    let mut buffer = vec![0; 65536];
    while got < back {
        let most = buffer.len().min(back - got);
        let k = stream.read(&mut buffer[..most]).unwrap();
        assert_ne!(k, 0, "closed after {got} of {back}");
        for (i, octet) in buffer[..k].iter().enumerate() {
            assert_eq!(*octet, pattern(got + i), "octet {}", got + i);
        }
        got += k;
    }
    sender.join().unwrap();
    stream
}

fn pattern(i: usize) -> u8 {
    (i.wrapping_mul(31) ^ (i >> 8)) as u8
}

/// A listener in the server.
pub(crate) fn listen(w: &World, port: u16) -> TcpListener {
    w.server
        .run(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap())
}
