//! Host ports and bandwidth limits, from the runtime's configuration through `kun-cni` and the agent to packets.

mod rig;

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use kun_control::{Request, Response};
use kun_harness::{Netns, wait_for, wait_until};
use rig::{Inside, Node, Service, VIP4, VIP6};
use serde_json::{Value, json};

/// Everything here takes milliseconds; a busy machine takes its time.
const SOON: Duration = Duration::from_secs(20);

/// Stale sockets are looked for every 15 s.
const SWEPT_WITHIN: Duration = Duration::from_secs(40);

/// The node's addresses.
const NODE4: &str = "192.0.2.2";
const NODE6: &str = "2001:db8::2";

const TCP: u16 = 18080;
const UDP: u16 = 18053;

fn at(address: &str, port: u16) -> SocketAddr {
    SocketAddr::new(address.parse::<IpAddr>().unwrap(), port)
}

/// The ports of [`Node::server`] on the node.
fn ports() -> Value {
    json!({"portMappings": [
        {"hostPort": TCP, "containerPort": 8080, "protocol": "tcp"},
        {"hostPort": UDP, "containerPort": 5353, "protocol": "udp"},
    ]})
}

fn refused(from: &Netns, to: SocketAddr) -> bool {
    rig::name_over_tcp(from, to).is_err_and(|e| e.kind() == ErrorKind::ConnectionRefused)
}

/// A socket that names whom it sends to with each datagram.
fn unconnected(from: &Netns, family_of: &str) -> UdpSocket {
    let any: IpAddr = match family_of.contains(':') {
        true => Ipv6Addr::UNSPECIFIED.into(),
        false => Ipv4Addr::UNSPECIFIED.into(),
    };
    let socket = from.run(|| UdpSocket::bind((any, 0))).unwrap();
    socket.set_read_timeout(Some(SOON)).unwrap();
    socket
}

/// Who answered, by address and by name.
fn asked_unconnected(socket: &UdpSocket, to: SocketAddr) -> (SocketAddr, String) {
    socket.send_to(b"who?", to).unwrap();
    let mut buffer = [0; 64];
    let (length, from) = socket.recv_from(&mut buffer).unwrap();
    (
        from,
        String::from_utf8_lossy(&buffer[..length]).into_owned(),
    )
}

/// kubelet's probes, resolvers, agents: processes that no pod's interface stands before.
#[test]
fn udp_of_the_nodes_own_processes_follows_services_and_host_ports() {
    let Some(node) = Node::start("ownudp") else {
        return;
    };
    let one = node.server_with("one", &ports());
    let two = node.server("two");
    node.publish(&Service::new(&[&one]));
    let _inside = Inside::enter(&node);
    let asked: Vec<(UdpSocket, SocketAddr)> = [(VIP4, 53), (VIP6, 53), (NODE4, UDP), (NODE6, UDP)]
        .map(|(address, port)| (unconnected(&node.netns, address), at(address, port)))
        .into();
    for (socket, to) in &asked {
        assert_eq!(asked_unconnected(socket, *to), (*to, "one".to_owned()));
        assert_eq!(rig::names_over_udp(&node.netns, *to, 2), ["one"]);
    }
    let connected = [VIP4, VIP6].map(|vip| rig::flow(&node.netns, at(vip, 53)).unwrap());
    for socket in &connected {
        assert_eq!(rig::ask(socket).unwrap(), "one");
    }
    // The very next datagram of the same sockets.
    node.publish(&Service::new(&[&two]));
    for (socket, to) in &asked[..2] {
        assert_eq!(asked_unconnected(socket, *to), (*to, "two".to_owned()));
    }
    // Of a connected one the kernel asks nobody: it is aborted, so that nothing goes to whoever has the address next.
    let fresh = rig::flow(&node.netns, at(VIP4, 53)).unwrap();
    for socket in &connected {
        let error = wait_for("the end of a stale socket", SWEPT_WITHIN, || {
            socket.take_error().unwrap()
        });
        assert_eq!(error.unwrap().kind(), ErrorKind::ConnectionAborted);
    }
    assert_eq!(rig::ask(&fresh).unwrap(), "two");
    node.remove(one);
    let _three = node.server_with("three", &ports());
    for (socket, to) in &asked[2..] {
        assert_eq!(asked_unconnected(socket, *to), (*to, "three".to_owned()));
    }
    node.publish(&Service::new(&[]));
    for (socket, to) in &asked[..2] {
        let refused = socket.send_to(b"who?", *to).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    }
}

#[test]
fn a_host_port_is_served_to_everybody_who_may() {
    let Some(node) = Node::start("hostport") else {
        return;
    };
    let client = node.pod("client");
    let one = node.server_with("one", &ports());
    let mut inside = None;
    for (who, from) in [
        ("outside", &node.fabric),
        ("another pod", &client.netns),
        ("the pod itself", &one.netns),
    ] {
        // What is outside is in no cgroup of the node.
        if who != "outside" && inside.is_none() {
            inside = Some(Inside::enter(&node));
        }
        for address in [NODE4, NODE6] {
            let name = rig::name_over_tcp(from, at(address, TCP));
            assert_eq!(
                name.unwrap_or_else(|e| e.to_string()),
                "one",
                "{who}, TCP to {address}"
            );
            let seen = rig::names_over_udp(from, at(address, UDP), 3);
            assert_eq!(seen, ["one"], "{who}, UDP to {address}");
        }
    }
    // The node itself, and its loopback addresses, which are nobody else's.
    for address in [NODE4, NODE6, "127.0.0.1", "::1"] {
        let name = rig::name_over_tcp(&node.netns, at(address, TCP));
        assert_eq!(name.unwrap(), "one", "the node, TCP to {address}");
        let seen = rig::names_over_udp(&node.netns, at(address, UDP), 3);
        assert_eq!(seen, ["one"], "the node, UDP to {address}");
        let (from, name) = asked_unconnected(&unconnected(&node.netns, address), at(address, UDP));
        assert_eq!((from, name.as_str()), (at(address, UDP), "one"));
    }
    for address in ["127.0.0.1", "::1"] {
        assert!(
            refused(&client.netns, at(address, TCP)),
            "a pod's {address} is its own"
        );
    }
    drop(inside);
    assert!(
        refused(&node.fabric, at(NODE4, TCP + 1)),
        "another port is the node's own"
    );
    // One address alone.
    let here = json!({"portMappings": [
        {"hostPort": TCP + 2, "containerPort": 8080, "protocol": "tcp", "hostIP": NODE6},
        {"hostPort": TCP + 3, "containerPort": 8080, "protocol": "tcp", "hostIP": "0.0.0.0"},
    ]});
    let _two = node.server_with("two", &here);
    for (address, port, served) in [
        (NODE6, TCP + 2, true),
        (NODE4, TCP + 2, false),
        (NODE6, TCP + 3, false),
        (NODE4, TCP + 3, true),
    ] {
        let to = at(address, port);
        match rig::name_over_tcp(&node.fabric, to) {
            Ok(name) => assert!(served && name == "two", "{to}: {name}"),
            Err(e) => assert!(
                !served && e.kind() == ErrorKind::ConnectionRefused,
                "{to}: {e}"
            ),
        }
    }
    let Response::Why { steps } = node.why("udp", NODE6, UDP) else {
        panic!("no reasons");
    };
    let why = |text: &str| {
        steps
            .iter()
            .any(|s| s.object.contains(text) || s.detail.contains(text))
    };
    assert!(why("default/one") && why("host port"), "{steps:?}");
}

#[test]
fn a_port_is_one_pods_and_the_next_ones_from_its_first_datagram() {
    let Some(node) = Node::start("replace") else {
        return;
    };
    let client = node.pod("client");
    let one = node.server_with("one", &ports());
    let flows = [NODE4, NODE6]
        .into_iter()
        .flat_map(|address| [&node.fabric, &client.netns].map(|from| (address, from)))
        .map(|(address, from)| rig::flow(from, at(address, UDP)).unwrap());
    let flows: Vec<_> = flows.collect();
    for flow in &flows {
        assert_eq!(rig::ask(flow).unwrap(), "one");
    }
    let fault = node.try_pod("two", &ports()).unwrap_err();
    for part in ["18080/tcp", "default/one", "container-one"] {
        assert!(fault.contains(part), "{fault}");
    }
    // The one that was refused left nothing: the first is served on, and the second may come when it is gone.
    assert_eq!(rig::ask(&flows[0]).unwrap(), "one");
    node.remove(one);
    // Nobody has the port: what is sent now must not decide about what is sent later.
    for flow in &flows {
        let _ = flow.send(b"who?");
    }
    let _two = node.server_with("two", &ports());
    for flow in &flows {
        // The answers to the datagrams between: refusals.
        while flow.take_error().unwrap().is_some() {}
        assert_eq!(
            rig::ask(flow).unwrap(),
            "two",
            "the very next datagram of {flow:?}"
        );
    }
}

/// A runtime tries again every few seconds, and with another container each time: the slots of a node would all cool in the end.
#[test]
fn a_pod_whose_port_is_taken_uses_up_no_slots() {
    let Some(node) = Node::start("portslots") else {
        return;
    };
    let one = node.server_with("one", &ports());
    let in_use = || {
        let Response::Ipam { slots, .. } = node.ask(&Request::Ipam) else {
            panic!("no rows");
        };
        let rows = slots.into_iter();
        rows.map(|row| (row.key.container_id, row.state, row.generation))
            .collect::<Vec<_>>()
    };
    let before = in_use();
    assert_eq!(before.len(), 1);
    for attempt in 0..3 {
        let netns = Netns::new(&format!("portslots-{attempt}")).unwrap();
        let (done, said) = node.cni("ADD", &format!("try-{attempt}"), &netns, &ports());
        assert!(!done && said.contains("default/one"), "{said}");
        let links = netns.exec("-o link show").unwrap();
        assert!(!links.contains("eth0"), "an interface stays: {links}");
    }
    assert_eq!(in_use(), before);
    node.remove(one);
    node.server_with("two", &ports());
}

#[test]
fn host_ports_outlive_the_agent_and_not_their_pod() {
    let Some(mut node) = Node::start("hostlife") else {
        return;
    };
    let one = node.server_with("one", &ports());
    let flow = rig::flow(&node.fabric, at(NODE6, UDP)).unwrap();
    assert_eq!(rig::ask(&flow).unwrap(), "one");
    for kill in [true, false] {
        if kill {
            node.kill();
        } else {
            node.terminate();
        }
        assert_eq!(rig::ask(&flow).unwrap(), "one", "no agent runs");
        assert_eq!(
            rig::name_over_tcp(&node.fabric, at(NODE4, TCP)).unwrap(),
            "one"
        );
        node.spawn();
        assert_eq!(rig::ask(&flow).unwrap(), "one", "the next agent runs");
        let fault = node.try_pod("two", &ports()).unwrap_err();
        assert!(
            fault.contains("default/one"),
            "the next agent knows whose it is: {fault}"
        );
    }
    // Removed while no agent runs: its ports go with the next one's start.
    node.kill();
    node.remove(one);
    node.spawn();
    assert!(refused(&node.fabric, at(NODE4, TCP)));
    let _two = node.server_with("two", &ports());
    assert_eq!(rig::ask(&flow).unwrap(), "two");
    // A new address of the node is served as well.
    node.netns.exec("addr add 192.0.2.3/24 dev eth0").unwrap();
    let served = || rig::name_over_tcp(&node.fabric, at("192.0.2.3", TCP)).is_ok();
    assert!(wait_until(SOON, served));
}

/// As many datagrams as a socket's buffer takes.
const SENT: usize = 80;

/// Datagrams of 1000 octets that get out of a pod when many are sent at once.
fn burst(node: &Node, pod: &rig::Pod) -> usize {
    let sink = node
        .fabric
        .run(|| std::net::UdpSocket::bind("[2001:db8::1]:9"))
        .unwrap();
    sink.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
    let socket = pod
        .netns
        .run(|| std::net::UdpSocket::bind("[::]:0"))
        .unwrap();
    for _ in 0..SENT {
        pod.netns
            .run(|| socket.send_to(&[0; 1000], "[2001:db8::1]:9"))
            .unwrap();
    }
    let mut got = 0;
    while got < SENT && sink.recv(&mut [0; 2000]).is_ok() {
        got += 1;
    }
    got
}

fn fact(node: &Node, name: &str) -> Option<String> {
    let Response::Status { status } = node.ask(&Request::Status) else {
        panic!("no status");
    };
    let found = status.proxy.into_iter().find(|f| f.name == name)?;
    Some(found.value)
}

#[test]
fn a_limit_holds_from_the_first_packet_through_a_killed_agent_to_the_end_of_the_pod() {
    let Some(mut node) = Node::start("limit") else {
        return;
    };
    // 16 KiB at once, the least, and then a datagram in eight seconds.
    let slow = json!({"bandwidth": {
        "egressRate": 1000, "egressBurst": 1000, "ingressRate": 1_000_000, "ingressBurst": 1_000_000,
    }});
    let pod = node.try_pod("slow", &slow).unwrap();
    let free = node.pod("free");
    assert_eq!(burst(&node, &free), SENT, "a pod without a limit");
    let through = burst(&node, &pod);
    assert!(
        (14..=17).contains(&through),
        "{through} datagrams of 16 KiB"
    );
    let lost = fact(&node, "limit default/slow egress").unwrap();
    assert!(
        lost.contains(&format!("{} packets", SENT - through)),
        "{lost}"
    );
    node.kill();
    assert!(
        burst(&node, &pod) <= 1,
        "no agent runs, and the bucket is empty"
    );
    node.spawn();
    assert!(
        burst(&node, &pod) <= 1,
        "the next agent left the bucket as it was"
    );
    assert!(fact(&node, "limits").unwrap().contains("of 1 pods"));
    node.remove(pod);
    let gone = || fact(&node, "limits").is_none();
    assert!(wait_until(SOON, gone));
    assert_eq!(burst(&node, &free), SENT);
}

#[test]
fn as_much_goes_at_once_as_was_asked_for_and_no_more_for_a_runtimes_default() {
    let Some(node) = Node::start("burst") else {
        return;
    };
    // Forty datagrams are six minutes of this rate; two gigabits are all that fits the socket.
    let forty = 40 * 8 * (1000 + 8 + 40 + 14);
    for (name, asked, through) in [
        ("forty", json!(forty), 36..=40),
        ("kubelet", json!(i32::MAX), 14..=17),
        ("containerd", json!(u32::MAX), 14..=17),
    ] {
        let more = json!({"bandwidth": {"egressRate": 1000, "egressBurst": asked}});
        let pod = node.try_pod(name, &more).unwrap();
        let got = burst(&node, &pod);
        assert!(through.contains(&got), "{name}: {got} datagrams");
    }
}
