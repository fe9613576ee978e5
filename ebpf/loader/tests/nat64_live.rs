//! The gateway between real stacks: a pod with IPv6 only, a server with IPv4 only, namespaces and veths.

mod nat64_world;

use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::process::Command;
use std::time::Duration;

use kun_ebpf_abi::nat64::Counter;
use kun_ebpf_loader::Mechanism;
use kun_harness::require_root;
use nat64_world::*;

#[test]
fn tcp_crosses_with_the_ports_of_the_block() {
    if !require_root() {
        return;
    }
    let w = World::new();
    let plane = w.translate(None);
    let listener = listen(&w, 80);
    let stream = w.pod.run(|| TcpStream::connect(server6(80)).unwrap());
    let (peer, from) = listener.accept().unwrap();
    let local = stream.local_addr().unwrap().port();
    assert_eq!(from.ip(), BLOCK_ADDR.parse::<IpAddr>().unwrap());
    // The pod is slot 10.8.0.1: the second block, 2048..3072.
    assert_eq!(from.port(), 2048 + (local - 64512));
    let server = std::thread::spawn(move || talk(peer, 8 << 20, 8 << 20));
    talk(stream, 8 << 20, 8 << 20);
    server.join().unwrap();
    let stats = plane.stats().unwrap();
    assert!(stats.counter(Counter::SixToFour) > 0 && stats.counter(Counter::FourToSix) > 0);
    assert_eq!(stats.counter(Counter::Exception), 0);
    assert_eq!(
        (stats.bib, stats.sessions),
        (0, 0),
        "an in-block flow needs no state"
    );
}
