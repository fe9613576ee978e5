//! Pods as network namespaces on a node that is one too: real packets through the programs at the interfaces.

mod rig;

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use kun_ebpf_abi::service::{Scope, ViewKind, state};
use kun_harness::{Netns, veth};
use rig::*;

/// One family's addresses: the node's towards outside, outside's, two pods', and two service addresses.
#[derive(Debug, Clone, Copy)]
struct Plan {
    node: IpAddr,
    outside: IpAddr,
    pods: [IpAddr; 2],
    vip: IpAddr,
    gateway: IpAddr,
    /// Whom a pod sees that talks to itself.
    hairpin: IpAddr,
    host: u8,
}

fn plans() -> [Plan; 2] {
    [
        Plan {
            node: ip("192.0.2.1"),
            outside: ip("192.0.2.2"),
            pods: [ip("10.0.0.1"), ip("10.0.0.2")],
            vip: ip("10.96.0.10"),
            gateway: ip("169.254.1.1"),
            hairpin: ip("169.254.1.1"),
            host: 32,
        },
        Plan {
            node: ip("2001:db8::1"),
            outside: ip("2001:db8::2"),
            pods: [ip("fd00::1"), ip("fd00::2")],
            vip: ip("fd00:96::10"),
            gateway: ip("fe80::1"),
            hairpin: ip("100::1"),
            host: 128,
        },
    ]
}

const PODS: [&str; 2] = ["poda", "podb"];

/// A node with two pods and an outside.
struct Net {
    node: Netns,
    outside: Netns,
    pods: [Netns; 2],
}

fn mac(netns: &Netns, interface: &str) -> String {
    let shown = netns.exec(&format!("link show dev {interface}")).unwrap();
    let words: Vec<&str> = shown.split_whitespace().collect();
    let at = words.iter().position(|w| *w == "link/ether").unwrap();
    words[at + 1].to_owned()
}

impl Net {
    fn new() -> Self {
        let net = Net {
            node: Netns::new("node").unwrap(),
            outside: Netns::new("out").unwrap(),
            pods: [Netns::new("pod-a").unwrap(), Netns::new("pod-b").unwrap()],
        };
        net.node.forward().unwrap();
        veth(&net.node, "uplink", &net.outside, "eth0").unwrap();
        for (pod, name) in net.pods.iter().zip(PODS) {
            veth(&net.node, name, pod, "eth0").unwrap();
        }
        for plan in plans() {
            let prefix = if plan.host == 32 { 24 } else { 64 };
            net.node
                .exec(&format!("addr add {}/{prefix} dev uplink", plan.node))
                .unwrap();
            net.outside
                .exec(&format!("addr add {}/{prefix} dev eth0", plan.outside))
                .unwrap();
            // Outside reaches everything by way of the node, as it would by BGP.
            for to in plan.pods.into_iter().chain([plan.vip]) {
                net.outside
                    .exec(&format!("route add {to}/{} via {}", plan.host, plan.node))
                    .unwrap();
            }
            for (i, (pod, name)) in net.pods.iter().zip(PODS).enumerate() {
                let address = plan.pods[i];
                let (inner, outer) = (mac(pod, "eth0"), mac(&net.node, name));
                pod.exec(&format!("addr add {address}/{} dev eth0", plan.host))
                    .unwrap();
                pod.exec(&format!(
                    "neigh replace {} lladdr {outer} dev eth0 nud permanent",
                    plan.gateway
                ))
                .unwrap();
                let family = if plan.host == 32 { "-4" } else { "-6" };
                let default = format!(
                    "{family} route add default via {} dev eth0 onlink src {address}",
                    plan.gateway
                );
                kun_harness::run(
                    ["ip", "-n", pod.name()]
                        .into_iter()
                        .chain(default.split(' ')),
                )
                .unwrap();
                net.node
                    .exec(&format!("route add {address}/{} dev {name}", plan.host))
                    .unwrap();
                net.node
                    .exec(&format!(
                        "neigh replace {address} lladdr {inner} dev {name} nud permanent"
                    ))
                    .unwrap();
            }
        }
        net
    }

    fn attach(&self, rig: &mut Rig) {
        self.node.run(|| {
            for pod in PODS {
                rig.plane.attach_pod(pod).unwrap();
            }
            rig.plane.attach_uplink("uplink").unwrap();
        });
    }

    fn udp(&self, netns: &Netns, at: SocketAddr) -> UdpSocket {
        let socket = netns.run(|| UdpSocket::bind(at)).unwrap();
        socket
            .set_read_timeout(Some(Duration::from_secs(3)))
            .unwrap();
        socket
    }

    /// A UDP client that talks to one address.
    fn client(&self, netns: &Netns, own: IpAddr, to: SocketAddr) -> UdpSocket {
        let socket = self.udp(netns, SocketAddr::new(own, 0));
        netns.run(|| socket.connect(to)).unwrap();
        socket
    }
}

/// A service of each family with these pods behind it: ids 0 and 1, backends 0, 1 and 2, 3.
fn services(rig: &mut Rig, proto: u8, behind: &[usize]) {
    for (id, plan) in plans().into_iter().enumerate() {
        let id = id as u32;
        rig.service(id, plan.vip, 80, proto, Scope::External);
        rig.backends(id * 2, &plan.pods.map(|p| (p, 8080)));
        let ids: Vec<u32> = behind.iter().map(|i| id * 2 + *i as u32).collect();
        rig.publish(id, ViewKind::Cluster, &ids);
        rig.publish(id, ViewKind::Local, &ids);
    }
}

/// Sends a datagram and expects it at the server, from `seen` if that matters, and its answer back at the client, which is
/// connected and so hears nobody but the service.
fn exchange(client: &UdpSocket, server: &UdpSocket, seen: Option<IpAddr>) {
    let mut room = [0; 2048];
    client.send(b"ping").unwrap();
    let (n, from) = server
        .recv_from(&mut room)
        .expect("the datagram reaches the backend");
    assert_eq!(&room[..n], b"ping");
    if let Some(seen) = seen {
        assert_eq!(from.ip(), seen);
    }
    server.send_to(b"pong", from).unwrap();
    let n = client
        .recv(&mut room)
        .expect("the answer comes from the service");
    assert_eq!(&room[..n], b"pong");
}

#[test]
fn udp_between_pods_to_oneself_and_from_outside() {
    if !kun_harness::require_root() {
        return;
    }
    let net = Net::new();
    let mut rig = Rig::new();
    services(&mut rig, UDP, &[1]);
    net.attach(&mut rig);
    for plan in plans() {
        let vip = SocketAddr::new(plan.vip, 80);
        // Bound to no address: the stack chooses where each answer comes from.
        let any: IpAddr = match plan.vip {
            IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let server = net.udp(&net.pods[1], SocketAddr::new(any, 8080));
        exchange(
            &net.client(&net.pods[0], plan.pods[0], vip),
            &server,
            Some(plan.pods[0]),
        );
        exchange(
            &net.client(&net.outside, plan.outside, vip),
            &server,
            Some(plan.outside),
        );
        // The backend's own pod: it sees the hairpin address as the client.
        exchange(
            &net.client(&net.pods[1], plan.pods[1], vip),
            &server,
            Some(plan.hairpin),
        );
    }
}

#[test]
fn a_udp_client_without_an_endpoint_is_refused_and_served_by_its_next_packet() {
    if !kun_harness::require_root() {
        return;
    }
    let net = Net::new();
    let mut rig = Rig::new();
    services(&mut rig, UDP, &[]);
    net.attach(&mut rig);
    for (id, plan) in plans().into_iter().enumerate() {
        let vip = SocketAddr::new(plan.vip, 80);
        for (netns, own) in [(&net.pods[0], plan.pods[0]), (&net.outside, plan.outside)] {
            let client = net.client(netns, own, vip);
            client.send(b"ping").unwrap();
            let fault = client.recv(&mut [0; 16]).unwrap_err();
            assert_eq!(fault.kind(), ErrorKind::ConnectionRefused, "{own}");
        }
        // The same socket, an endpoint published meanwhile.
        let client = net.client(&net.pods[0], plan.pods[0], vip);
        let server = net.udp(&net.pods[1], SocketAddr::new(plan.pods[1], 8080));
        rig.publish(id as u32, ViewKind::Cluster, &[id as u32 * 2 + 1]);
        exchange(&client, &server, None);
    }
}

#[test]
fn a_socket_that_lives_on_leaves_a_backend_that_does_not() {
    if !kun_harness::require_root() {
        return;
    }
    let net = Net::new();
    let mut rig = Rig::new();
    services(&mut rig, UDP, &[0]);
    net.attach(&mut rig);
    for (id, plan) in plans().into_iter().enumerate() {
        let (id, vip) = (id as u32, SocketAddr::new(plan.vip, 80));
        let [a, b] = [0, 1].map(|i| net.udp(&net.pods[i], SocketAddr::new(plan.pods[i], 8080)));
        let client = net.client(&net.outside, plan.outside, vip);
        exchange(&client, &a, None);
        rig.publish(id, ViewKind::Local, &[id * 2 + 1]);
        exchange(&client, &a, None);
        rig.backend(id * 2, plan.pods[0], 8080, state::DEAD, 2);
        exchange(&client, &b, None);
    }
}

/// TCP through the packet path, with payloads that travel as super-packets and whose checksums the devices leave open.
#[test]
fn tcp_from_outside_and_from_a_socket_that_no_hook_serves() {
    if !kun_harness::require_root() {
        return;
    }
    const BULK: usize = 1 << 20;
    let net = Net::new();
    let mut rig = Rig::new();
    services(&mut rig, TCP, &[1]);
    net.attach(&mut rig);
    for plan in plans() {
        let listener = net.pods[1]
            .run(|| TcpListener::bind(SocketAddr::new(plan.pods[1], 8080)))
            .unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(mut stream) = stream else { return };
                std::thread::spawn(move || {
                    let mut all = Vec::new();
                    let _ = stream.read_to_end(&mut all);
                    let _ = stream.write_all(&all);
                });
            }
        });
        for netns in [&net.outside, &net.pods[0], &net.pods[1]] {
            let vip = SocketAddr::new(plan.vip, 80);
            let mut stream = netns
                .run(|| TcpStream::connect_timeout(&vip, Duration::from_secs(3)))
                .unwrap();
            stream
                .set_read_timeout(Some(Duration::from_secs(10)))
                .unwrap();
            let sent: Vec<u8> = (0..BULK).map(|i| (i % 251) as u8).collect();
            stream.write_all(&sent).unwrap();
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            let mut got = Vec::new();
            stream.read_to_end(&mut got).unwrap();
            assert_eq!(got.len(), BULK);
            assert!(got == sent, "the octets arrive as they were sent");
        }
    }
}

#[test]
fn flows_outlive_the_agent_and_detaching_ends_service() {
    if !kun_harness::require_root() {
        return;
    }
    let net = Net::new();
    let mut rig = Rig::new();
    services(&mut rig, UDP, &[1]);
    net.attach(&mut rig);
    let pairs = plans().map(|plan| {
        let vip = SocketAddr::new(plan.vip, 80);
        let server = net.udp(&net.pods[1], SocketAddr::new(plan.pods[1], 8080));
        (net.client(&net.pods[0], plan.pods[0], vip), server)
    });
    let talk = || {
        pairs
            .iter()
            .for_each(|(client, server)| exchange(client, server, None))
    };
    talk();
    let (rig, adopted) = rig.restart_after(talk);
    if rig.plane.missing().iter().any(|m| m.feature == "tcx") {
        kun_harness::skip("adopting links needs tcx, which this kernel lacks");
    } else {
        // Pods have filters, which need no adoption to stay.
        assert_eq!(
            adopted.links,
            ["uplink_egress:uplink", "uplink_ingress:uplink"]
        );
    }
    talk();
    let mut rig = rig;
    // As an agent does when it starts: attach all again.
    net.attach(&mut rig);
    talk();
    net.node.run(|| rig.plane.detach("poda")).unwrap();
    let (client, _) = &pairs[0];
    client
        .set_read_timeout(Some(Duration::from_millis(200)))
        .unwrap();
    client.send(b"ping").unwrap();
    assert!(
        client.recv(&mut [0; 16]).is_err(),
        "the service address is nobody's without the program"
    );
    net.node
        .run(|| rig.plane.detach("poda"))
        .expect("detaching twice is no fault");
    net.node.run(|| rig.plane.attach_pod("poda")).unwrap();
    client
        .set_read_timeout(Some(Duration::from_secs(3)))
        .unwrap();
    // The datagram that met no program is not answered; the next one is.
    talk();
}

#[test]
fn an_interface_that_is_gone_is_forgotten_and_its_name_can_be_given_again() {
    if !kun_harness::require_root() {
        return;
    }
    let net = Net::new();
    let mut rig = Rig::new();
    if rig.plane.missing().iter().any(|m| m.feature == "tcx") {
        kun_harness::skip("links that outlive their interface need tcx, which this kernel lacks");
        return;
    }
    for name in ["poda", "podb"] {
        net.node.run(|| rig.plane.attach_uplink(name)).unwrap();
    }
    net.node.exec("link del poda").unwrap();
    net.node.exec("link del podb").unwrap();
    veth(&net.node, "podb", &net.pods[1], "eth0").unwrap();
    net.node.run(|| rig.plane.attach_uplink("podb")).unwrap();
    let (mut rig, adopted) = rig.restart();
    assert_eq!(adopted.stale, ["uplink_egress:poda", "uplink_ingress:poda"]);
    assert_eq!(adopted.links, ["uplink_egress:podb", "uplink_ingress:podb"]);
    net.node
        .run(|| rig.plane.detach("poda"))
        .expect("detaching what is gone is no fault");
    let of_uplink = net.node.run(|| rig.plane.attach_uplink("poda"));
    let of_pod = net.node.run(|| rig.plane.attach_pod("poda"));
    for refused in [of_uplink, of_pod] {
        let fault = refused.unwrap_err().to_string();
        assert!(fault.contains("poda"), "{fault}");
    }
}
