//! The gateway between real stacks: a pod with IPv6 only, a server with IPv4 only, namespaces and veths.

mod nat64_world;

use std::collections::HashSet;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::time::{Duration, Instant};

use kun_ebpf_abi::Addr;
use kun_ebpf_abi::nat64::Counter;
use kun_ebpf_abi::nat64::bib::{ICMP_TIMEOUT, UDP_TIMEOUT};
use kun_ebpf_abi::reason::Reason;
use kun_ebpf_loader::{Mechanism, Nat64Dataplane, nat64::now};
use kun_harness::{require_root, require_tool, wait_for};
use nat64_world::*;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// A TCP connection of the pod from this address to the server, and what the server accepted.
fn connect(w: &World, port: u16) -> (TcpStream, TcpStream, SocketAddr) {
    let listener = listen(w, port);
    let client = w.pod.run(|| TcpStream::connect(server6(port)).unwrap());
    let (server, from) = listener.accept().unwrap();
    (client, server, from)
}

fn udp(w: &World, from: &str) -> UdpSocket {
    w.pod.run(|| {
        let s = UdpSocket::bind(from).unwrap();
        s.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        s
    })
}

fn udp_server(w: &World, port: u16) -> UdpSocket {
    w.server.run(|| {
        let s = UdpSocket::bind(("0.0.0.0", port)).unwrap();
        s.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        s
    })
}

fn ping(w: &World, words: &str, target: &str) -> (bool, String) {
    let mut c = Command::new("ping");
    c.args(words.split_whitespace()).arg(target);
    let out = w.pod.output(c).unwrap();
    let text =
        String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    (out.status.success(), text)
}

#[test]
fn tcp_crosses_with_the_ports_of_the_block() {
    if !require_root() {
        return;
    }
    let w = World::new();
    let plane = w.translate(None);
    let (client, peer, from) = connect(&w, 80);
    let local = client.local_addr().unwrap().port();
    assert_eq!(from.ip(), ip(BLOCK_ADDR));
    // The pod is slot 10.8.0.1: the second block, 2048..3072.
    assert_eq!(from.port(), 2048 + (local - 64512));
    let server = std::thread::spawn(move || talk(peer, 8 << 20, 8 << 20));
    talk(client, 8 << 20, 8 << 20);
    server.join().unwrap();
    let stats = plane.stats().unwrap();
    assert!(stats.counter(Counter::SixToFour) > 0 && stats.counter(Counter::FourToSix) > 0);
    assert_eq!(stats.counter(Counter::Exception), 0);
    assert_eq!(
        (stats.bib, stats.sessions),
        (0, 0),
        "an in-block flow needs no state"
    );
    assert_eq!(stats.reasons.iter().sum::<u64>(), 0, "{stats:?}");
}

/// Super-packets cross whole: far fewer packets are translated than segments would be.
#[test]
fn super_packets_cross_whole() {
    if !require_root() {
        return;
    }
    let w = World::new();
    let plane = w.translate(None);
    for (up, down) in [(64 << 20, 1), (1, 64 << 20)] {
        let before = plane.stats().unwrap();
        let (client, peer, _) = connect(&w, 80);
        let server = std::thread::spawn(move || talk(peer, down, up));
        talk(client, up, down);
        server.join().unwrap();
        let after = plane.stats().unwrap();
        let direction = if up > down {
            Counter::SixToFour
        } else {
            Counter::FourToSix
        };
        let packets = after.counter(direction) - before.counter(direction);
        let segments = (64 << 20) / 1428;
        assert!(
            packets < segments / 4,
            "{packets} packets for {segments} segments"
        );
    }
    assert_eq!(plane.stats().unwrap().reasons.iter().sum::<u64>(), 0);
}

#[test]
fn udp_crosses_both_ways() {
    if !require_root() {
        return;
    }
    let w = World::new();
    let plane = w.translate(None);
    let server = udp_server(&w, 53);
    let client = udp(&w, &format!("[{POD}]:0"));
    for n in [0usize, 1, 2, 3, 511, 1400] {
        let sent: Vec<u8> = (0..n).map(|i| i as u8).collect();
        client.send_to(&sent, server6(53)).unwrap();
        let mut got = [0; 2000];
        let (k, from) = server.recv_from(&mut got).unwrap();
        assert_eq!((&got[..k], from.ip()), (&sent[..], ip(BLOCK_ADDR)));
        server.send_to(&got[..k], from).unwrap();
        let (k, from) = client.recv_from(&mut got).unwrap();
        assert_eq!((&got[..k], from), (&sent[..], server6(53)));
    }
    assert_eq!(plane.stats().unwrap().counter(Counter::Exception), 0);
}

/// SO_NO_CHECK on the IPv4 side: the gateway computes what IPv6 demands.
#[test]
fn a_datagram_without_checksum_gets_one() {
    if !require_root() {
        return;
    }
    let w = World::new();
    let plane = w.translate(None);
    let server = udp_server(&w, 53);
    rustix_no_check(&server);
    let client = udp(&w, &format!("[{POD}]:0"));
    for n in [0usize, 1, 2, 3, 64, 511, 512, 513, 1023, 1400] {
        client.send_to(b"?", server6(53)).unwrap();
        let (_, from) = server.recv_from(&mut [0; 16]).unwrap();
        let sent: Vec<u8> = (0..n).map(|i| (i * 7) as u8).collect();
        server.send_to(&sent, from).unwrap();
        let mut got = [0; 2000];
        let (k, _) = client.recv_from(&mut got).unwrap();
        assert_eq!(&got[..k], &sent[..], "{n} octets");
    }
    assert_eq!(plane.stats().unwrap().reasons.iter().sum::<u64>(), 0);
}

#[allow(unsafe_code, reason = "no crate has this socket option")]
fn rustix_no_check(socket: &UdpSocket) {
    use std::os::fd::AsRawFd;
    let one: libc::c_int = 1;
    // SAFETY: an int of this length is what the option takes.
    let r = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NO_CHECK,
            (&raw const one).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    assert_eq!(r, 0);
}

#[test]
fn ping_crosses_and_its_session_ends_after_a_minute() {
    if !require_root() || !require_tool("ping") {
        return;
    }
    let w = World::new();
    let mut plane = w.translate(None);
    let target = server6(0).ip().to_string();
    for size in ["0", "1", "56", "1400"] {
        let (ok, text) = ping(&w, &format!("-c 1 -W 5 -s {size}"), &target);
        assert!(ok, "{text}");
    }
    let stats = plane.stats().unwrap();
    assert!(stats.sessions >= 1 && stats.bib >= 1);
    assert_eq!(plane.expire(now()).unwrap(), 0);
    let later = now() + ICMP_TIMEOUT + 1_000_000_000;
    assert_eq!(plane.expire(later).unwrap(), stats.sessions);
    plane.expire(later).unwrap();
    plane.expire(later).unwrap();
    let stats = plane.stats().unwrap();
    assert_eq!((stats.bib, stats.sessions), (0, 0));
}

/// Hosts outside go on sending to a client that is gone: whoever has its address next gets nothing of it.
#[test]
fn entries_of_an_inner_host_are_forgotten_and_no_others() {
    if !require_root() {
        return;
    }
    let w = World::new();
    let mut plane = w.translate(None);
    let server = udp_server(&w, 53);
    let [(gone, late), (other, still)] = [POD, FOREIGN].map(|from| {
        let client = udp(&w, &format!("[{from}]:123"));
        client.send_to(b"?", server6(53)).unwrap();
        let (_, external) = server.recv_from(&mut [0; 16]).unwrap();
        server.send_to(b"!", external).unwrap();
        client.recv_from(&mut [0; 16]).unwrap();
        (client, external)
    });
    let pod = Addr::v6(POD.parse::<Ipv6Addr>().unwrap().octets());
    assert_eq!(plane.forget(&HashSet::from([pod])).unwrap(), 1);
    assert_eq!(plane.forget(&HashSet::from([pod])).unwrap(), 0);
    let stats = plane.stats().unwrap();
    assert_eq!((stats.bib, stats.sessions), (1, 1));
    // In this order on one way.
    server.send_to(b"!", late).unwrap();
    server.send_to(b"!", still).unwrap();
    other.recv_from(&mut [0; 16]).unwrap();
    gone.set_nonblocking(true).unwrap();
    assert!(gone.recv_from(&mut [0; 16]).is_err());
}

/// A host outside the pod prefix, and a pod's explicit low port, are served statefully on the last address.
#[test]
fn exceptions_use_the_last_address_and_their_slice() {
    if !require_root() {
        return;
    }
    let w = World::new();
    let mut plane = w.translate(None);
    let server = udp_server(&w, 53);
    let mut seen = Vec::new();
    for from in [format!("[{FOREIGN}]:5000"), format!("[{POD}]:123")] {
        let client = udp(&w, &from);
        let mut last = None;
        for _ in 0..3 {
            client.send_to(b"?", server6(53)).unwrap();
            let (_, external) = server.recv_from(&mut [0; 16]).unwrap();
            assert_eq!(external.ip(), ip(EXCEPTION_ADDR));
            assert!((1024..4096).contains(&external.port()));
            assert!(
                last.is_none_or(|l| l == external),
                "endpoint-independent mapping"
            );
            last = Some(external);
            server.send_to(b"!", external).unwrap();
            assert_eq!(client.recv_from(&mut [0; 16]).unwrap().1, server6(53));
        }
        seen.extend(last);
    }
    assert_ne!(seen[0], seen[1]);
    let stats = plane.stats().unwrap();
    assert_eq!((stats.bib, stats.sessions), (2, 2));
    let later = now() + UDP_TIMEOUT + 2_000_000_000;
    assert_eq!(plane.expire(later).unwrap(), 2);
    plane.expire(later).unwrap();
    assert_eq!(plane.stats().unwrap().bib, 0);

    // TCP from outside the prefix: a state machine follows it, bulk included.
    let listener = listen(&w, 80);
    let client = w.pod.run(|| tcp_from(FOREIGN, server6(80)));
    let (peer, from) = listener.accept().unwrap();
    assert_eq!(from.ip(), ip(EXCEPTION_ADDR));
    let server = std::thread::spawn(move || talk(peer, 4 << 20, 4 << 20));
    talk(client, 4 << 20, 4 << 20);
    server.join().unwrap();
}

fn tcp_from(source: &str, to: SocketAddr) -> TcpStream {
    let source: SocketAddr = (source.parse::<Ipv6Addr>().unwrap(), 0).into();
    let socket = rustix::net::socket(
        rustix::net::AddressFamily::INET6,
        rustix::net::SocketType::STREAM,
        None,
    )
    .unwrap();
    rustix::net::bind(&socket, &source).unwrap();
    rustix::net::connect(&socket, &to).unwrap();
    socket.into()
}

/// An open port takes datagrams from anybody (endpoint-independent filtering), but only what goes out makes sessions: a flood of
/// forged senders does not fill the table.
#[test]
fn what_comes_unasked_to_an_open_port_makes_no_session() {
    if !require_root() {
        return;
    }
    let w = World::new();
    let plane = w.translate(None);
    let server = udp_server(&w, 53);
    let client = udp(&w, &format!("[{POD}]:123"));
    client.send_to(b"?", server6(53)).unwrap();
    let (_, external) = server.recv_from(&mut [0; 16]).unwrap();
    for port in 6000..6100 {
        let other = udp_server(&w, port);
        other.send_to(b"!", external).unwrap();
        assert_eq!(client.recv_from(&mut [0; 16]).unwrap().1, server6(port));
    }
    assert_eq!(plane.stats().unwrap().sessions, 1);
}

/// Nothing that the inside did not ask for comes in through the exceptions' address, and nothing through an unused port.
#[test]
fn unasked_packets_from_ipv4_are_dropped_and_counted() {
    if !require_root() {
        return;
    }
    let w = World::new();
    let plane = w.translate(None);
    let server = udp_server(&w, 53);
    for target in [
        format!("{EXCEPTION_ADDR}:2000"),
        format!("{BLOCK_ADDR}:1000"),
    ] {
        server.send_to(b"?", &target).unwrap();
    }
    wait_for("two drops", Duration::from_secs(5), || {
        (plane.stats().unwrap().reason(Reason::Nat64NoReverse) == 2).then_some(())
    })
    .unwrap();
}

/// A pod reaches another pod's external address (RFC 6146 §3.8).
#[test]
fn hairpin_from_pod_to_pod_through_the_pool() {
    if !require_root() {
        return;
    }
    let w = World::new();
    let plane = w.translate(None);
    let target = udp(&w, &format!("[{POD2}]:65000"));
    let client = udp(&w, &format!("[{POD}]:64600"));
    // Slot 10.8.0.2: third block, 3072..4096.
    let pool6: Ipv6Addr = "2001:db8:64::c633:6400".parse().unwrap();
    let external = SocketAddr::from((pool6, 3072 + (65000 - 64512)));
    let back = SocketAddr::from((pool6, 2048 + (64600 - 64512)));
    for n in [1usize, 2, 1000] {
        client.send_to(&vec![7; n], external).unwrap();
        let mut got = [0; 2000];
        assert_eq!(target.recv_from(&mut got).unwrap(), (n, back));
        target.send_to(&got[..n], back).unwrap();
        assert_eq!(client.recv_from(&mut got).unwrap(), (n, external));
    }
    assert_eq!(plane.stats().unwrap().counter(Counter::Hairpin), 6);
}

/// A narrow link on the IPv4 side: the router's "fragmentation needed" reaches the pod as Packet Too Big, 20 larger.
#[test]
fn path_mtu_is_discovered_towards_ipv4() {
    if !require_root() || !require_tool("ping") {
        return;
    }
    let w = World::new();
    let plane = w.translate(None);
    w.router.exec("link set server mtu 1400").unwrap();
    let target = server6(0).ip().to_string();
    let (ok, text) = ping(&w, "-c 1 -W 2 -M do -s 1440", &target);
    assert!(!ok && text.contains("mtu=1420"), "{text}");
    let route = w.pod.exec(&format!("-6 route get {target}")).unwrap();
    assert!(route.contains("mtu 1420"), "{route}");
    // TCP finds its way through the same link; its segments become smaller. (Only towards the narrow link: a veth drops
    // what is larger than its peer's MTU without a word.)
    let (client, peer, _) = connect(&w, 80);
    let server = std::thread::spawn(move || talk(peer, 1, 1 << 20));
    talk(client, 1 << 20, 1);
    server.join().unwrap();
    assert!(plane.stats().unwrap().counter(Counter::IcmpError) >= 1);
}

/// A narrow link on the IPv6 side: Packet Too Big reaches the server as "fragmentation needed", 20 smaller.
#[test]
fn path_mtu_is_discovered_towards_ipv6() {
    if !require_root() {
        return;
    }
    let w = World::new();
    let plane = w.translate(None);
    w.router.exec("link set pod mtu 1300").unwrap();
    let (client, peer, _) = connect(&w, 80);
    let server = std::thread::spawn(move || talk(peer, 1 << 20, 1));
    talk(client, 1, 1 << 20);
    server.join().unwrap();
    let route = w.server.exec(&format!("route get {BLOCK_ADDR}")).unwrap();
    assert!(route.contains("mtu 1280"), "{route}");
    assert!(plane.stats().unwrap().counter(Counter::IcmpError) >= 1);
}

/// The gateway's own uplink is too narrow for what the server sends: it answers, and the server obeys.
#[test]
fn what_does_not_fit_the_uplink_is_answered() {
    if !require_root() {
        return;
    }
    let w = World::new();
    let plane = w.translate(None);
    let server = udp_server(&w, 53);
    let client = udp(&w, &format!("[{POD}]:0"));
    client.send_to(b"?", server6(53)).unwrap();
    let (_, from) = server.recv_from(&mut [0; 16]).unwrap();
    // 1472 + 28 = 1500 octets of IPv4 would be 1520 of IPv6.
    server.send_to(&[0; 1472], from).unwrap();
    wait_for("the server's route to know", Duration::from_secs(5), || {
        let route = w.server.exec(&format!("route get {BLOCK_ADDR}")).ok()?;
        route.contains("mtu 1480").then_some(())
    })
    .unwrap();
    server.send_to(&[1; 1452], from).unwrap();
    assert_eq!(client.recv_from(&mut [0; 2000]).unwrap().0, 1452);
    assert_eq!(plane.stats().unwrap().counter(Counter::TooBig), 1);
}

/// A closed port: the server's "port unreachable" reaches the pod's socket as a refusal, and the pod's reaches the server's.
#[test]
fn port_unreachable_crosses_both_ways() {
    if !require_root() {
        return;
    }
    let w = World::new();
    let _plane = w.translate(None);
    let client = udp(&w, &format!("[{POD}]:0"));
    client.connect(server6(9)).unwrap();
    client.send(b"?").unwrap();
    let refused = client.recv(&mut [0; 16]).unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);

    // A port of the pod's block that nobody ever had. One that was just closed is no such port: a process that another test
    // forks meanwhile holds a copy of the socket until it execs, takes the datagram, and nobody answers.
    let unused = 2048 + (client.local_addr().unwrap().port() - 64512 + 1) % 1024;
    let server = udp_server(&w, 53);
    server.connect((BLOCK_ADDR, unused)).unwrap();
    server.send(b"!").unwrap();
    let refused = server.recv(&mut [0; 16]).unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
}

/// A hop limit that ends at the gateway is answered with Time Exceeded, and one that ends behind it likewise.
#[test]
fn time_exceeded_comes_from_the_gateway_and_from_behind_it() {
    if !require_root() || !require_tool("ping") {
        return;
    }
    let w = World::new();
    let plane = w.translate(None);
    let target = server6(0).ip().to_string();
    let (ok, text) = ping(&w, "-c 1 -W 5 -t 2", &target);
    assert!(
        !ok && text.contains("fd00:3::2") && text.contains("Time exceeded"),
        "{text}"
    );
    let (ok, text) = ping(&w, "-c 1 -W 5 -t 3", &target);
    // The router behind the gateway, 203.0.113.1, under Pref64.
    assert!(
        !ok && text.contains("2001:db8:64::cb00:7101") && text.contains("Time exceeded"),
        "{text}"
    );
    let stats = plane.stats().unwrap();
    assert_eq!(stats.counter(Counter::ToStack), 1);
    assert_eq!(stats.counter(Counter::IcmpError), 1);
}

/// A datagram in fragments from the pod.
#[test]
fn fragments_from_ipv6_arrive() {
    if !require_root() {
        return;
    }
    let w = World::new();
    let plane = w.translate(None);
    let server = udp_server(&w, 53);
    for from in [format!("[{POD}]:0"), format!("[{FOREIGN}]:5000")] {
        let client = udp(&w, &from);
        let sent: Vec<u8> = (0..6000).map(|i| (i * 3) as u8).collect();
        client.send_to(&sent, server6(53)).unwrap();
        let mut got = [0; 8000];
        let (k, _) = server.recv_from(&mut got).unwrap();
        assert_eq!(&got[..k], &sent[..]);
    }
    assert!(plane.stats().unwrap().counter(Counter::Fragment) >= 10);
}

/// A datagram in fragments from the server, small enough to fit IPv6 with its larger headers.
#[test]
fn fragments_from_ipv4_arrive() {
    if !require_root() {
        return;
    }
    let w = World::new();
    let _plane = w.translate(None);
    w.server.exec("link set eth0 mtu 1400").unwrap();
    let server = udp_server(&w, 53);
    for from in [format!("[{POD}]:0"), format!("[{FOREIGN}]:5000")] {
        let client = udp(&w, &from);
        client.send_to(b"?", server6(53)).unwrap();
        let (_, external) = server.recv_from(&mut [0; 16]).unwrap();
        let sent: Vec<u8> = (0..6000).map(|i| (i * 3) as u8).collect();
        server.send_to(&sent, external).unwrap();
        let mut got = [0; 8000];
        let (k, _) = client.recv_from(&mut got).unwrap();
        assert_eq!(&got[..k], &sent[..]);
    }
}

/// The loader goes in mid-flow and another comes: nothing is lost, neither of a flow without state nor of one with.
#[test]
fn a_restart_in_mid_flow_loses_nothing() {
    if !require_root() {
        return;
    }
    let w = World::new();
    let first = w.translate(None);
    assert!(!first.adopted());
    let listener = listen(&w, 80);
    let block = w.pod.run(|| TcpStream::connect(server6(80)).unwrap());
    let (block_peer, _) = listener.accept().unwrap();
    let stateful = w.pod.run(|| tcp_from(FOREIGN, server6(80)));
    let (stateful_peer, _) = listener.accept().unwrap();
    let threads: Vec<_> = [(block, block_peer), (stateful, stateful_peer)]
        .into_iter()
        .flat_map(|(a, b)| {
            [
                std::thread::spawn(move || talk(a, 24 << 20, 24 << 20)),
                std::thread::spawn(move || talk(b, 24 << 20, 24 << 20)),
            ]
        })
        .collect();
    let before = first.stats().unwrap();
    drop(first);
    let mut plane: Option<Nat64Dataplane> = None;
    for _ in 0..3 {
        drop(plane.take());
        let next = w.translate(None);
        assert!(next.adopted());
        plane = Some(next);
    }
    let plane = plane.unwrap();
    for t in threads {
        t.join().unwrap();
    }
    let after = plane.stats().unwrap();
    assert!(after.counter(Counter::SixToFour) > before.counter(Counter::SixToFour));
    assert_eq!(after.sessions, 1);
    assert_eq!(after.reasons.iter().sum::<u64>(), 0, "{after:?}");
}

/// Kernels before 6.6 have no tcx: the same by clsact, and replaced in place.
#[test]
fn clsact_serves_where_tcx_lacks() {
    if !require_root() {
        return;
    }
    let w = World::new();
    drop(w.translate(Some(Mechanism::Clsact)));
    let (mut client, mut server, _) = connect(&w, 80);
    drop(w.translate(Some(Mechanism::Clsact)));
    client.write_all(b"still here").unwrap();
    let mut got = [0; 10];
    server.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"still here");
    let tc = w
        .gateway
        .output({
            let mut c = Command::new("tc");
            c.args(["filter", "show", "dev", UPLINK, "ingress"]);
            c
        })
        .unwrap();
    let shown = String::from_utf8_lossy(&tc.stdout);
    let filters = shown.lines().filter(|l| l.contains(" handle "));
    assert_eq!(
        filters.count(),
        1,
        "one filter, not one more each start: {shown}"
    );
}

/// Three hundred connections at once from one pod, each with its own port of the block.
#[test]
fn many_connections_share_no_external_port() {
    if !require_root() {
        return;
    }
    let w = World::new();
    let _plane = w.translate(None);
    let listener: TcpListener = listen(&w, 80);
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut held = Vec::new();
    let mut ports = std::collections::HashSet::new();
    for _ in 0..300 {
        let client = w.pod.run(|| TcpStream::connect(server6(80)).unwrap());
        let (server, from) = listener.accept().unwrap();
        assert_eq!(from.ip(), ip(BLOCK_ADDR));
        assert!(ports.insert(from.port()));
        held.push((client, server));
        assert!(Instant::now() < deadline);
    }
}
