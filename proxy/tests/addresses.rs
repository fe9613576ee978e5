//! Addresses under the real agent: what comes back and when, and what it reclaims of pods that are gone.

mod rig;

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use kun_control::{AttachmentKey, Request, Response, SlotRow};
use kun_harness::{Netns, wait_for, wait_until};
use rig::{Node, Pod, Service, VIP4, VIP6};
use serde_json::json;

/// Two looks of 20 s, a round of 5 s after each, and a busy machine; the promise is 60 s.
const RECLAIMED_WITHIN: Duration = Duration::from_secs(60);

/// One round of looks and a busy machine.
const SOON: Duration = Duration::from_secs(30);

fn rows(node: &Node) -> Vec<SlotRow> {
    match node.ask(&Request::Ipam) {
        Response::Ipam { slots, .. } => slots,
        other => panic!("{other:?}"),
    }
}

fn row(node: &Node, container: &str) -> Option<SlotRow> {
    let mut rows = rows(node).into_iter();
    rows.find(|row| row.key.container_id == format!("container-{container}"))
}

fn interfaces(node: &Node) -> usize {
    let links = node.netns.exec("-br link show type veth").unwrap();
    links
        .lines()
        .filter(|line| !line.starts_with("eth0"))
        .count()
}

#[test]
fn leaks_are_reclaimed_and_an_address_comes_back_when_nothing_knows_it() {
    let Some(mut node) = Node::start("addresses") else {
        return;
    };
    node.terminate();
    node.configure(|config| config["ipam"]["cooldown"] = json!("1s"));
    node.spawn();

    let (gone, left, stays) = (node.pod("gone"), node.pod("left"), node.pod("stays"));
    let held = gone.v4;
    node.manifest(
        "held.yaml",
        &[json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {"name": "held", "namespace": "default", "labels": {"kubernetes.io/service-name": "held"}},
            "addressType": "IPv4", "ports": [{"name": "", "port": 80}],
            "endpoints": [{"addresses": [held.to_string()]}]})],
    );
    // One pod's namespace goes without a DEL; of another the DEL is told and its interfaces are not removed.
    drop(gone);
    let release = Request::Release {
        key: AttachmentKey {
            network: "kun".into(),
            container_id: "container-left".into(),
            ifname: "eth0".into(),
        },
        generation: None,
    };
    assert_eq!(node.ask(&release), Response::Done);

    let known = wait_for("a look at what was left", SOON, || {
        row(&node, "left").filter(|row| row.state == "waiting" && row.why.len() > 2)
    })
    .unwrap();
    for what in ["interface", "a route leads to", "neighbour"] {
        let said = known.why.iter().any(|line| line.contains(what));
        assert!(said, "{what}: {:?}", known.why);
    }
    // The interfaces of a pod that is gone are removed, and with them everything that knew its address.
    let free = wait_until(RECLAIMED_WITHIN, || row(&node, "left").is_none());
    assert!(free, "the address of what was left is not free");
    drop(left);
    // The slot of the other is let go, and rests for as long as a slice has it.
    let waiting = wait_for("the slot of what is gone waits", RECLAIMED_WITHIN, || {
        row(&node, "gone").filter(|row| row.state == "waiting" && !row.why.is_empty())
    })
    .unwrap();
    assert_eq!(
        waiting.why,
        [format!("EndpointSlice default/held has {held}")]
    );
    fs::remove_file(node.path("cluster").join("held.yaml")).unwrap();
    let free = wait_until(SOON, || row(&node, "gone").is_none());
    assert!(free, "{:?}", row(&node, "gone"));

    // The living one was not touched.
    assert_eq!(row(&node, "stays").unwrap().state, "allocated");
    assert_eq!(interfaces(&node), 2, "of the pod that lives");
    drop(stays);
}

/// A DaemonSet without `hostNetwork`: none of the node's interfaces is to be seen there.
#[test]
fn an_agent_in_another_namespace_takes_nothing_from_the_living() {
    let Some(mut node) = Node::start("astray") else {
        return;
    };
    let stays = node.pod("stays");
    node.terminate();
    let elsewhere = Netns::new("astray-away").unwrap();
    elsewhere.exec("link set lo up").unwrap();
    let home = std::mem::replace(&mut node.netns, elsewhere);
    node.spawn_until_answers();
    let trouble = |node: &Node| match node.ask(&Request::Status) {
        Response::Status { status } => status.ipam.into_iter().find(|f| f.name == "namespace"),
        other => panic!("{other:?}"),
    };
    let told = wait_for("a look at no interface", SOON, || trouble(&node)).unwrap();
    assert!(
        !told.ok && told.value.contains("hostNetwork: true"),
        "{told:?}"
    );
    assert_eq!(row(&node, "stays").unwrap().state, "allocated");

    node.terminate();
    node.netns = home;
    node.spawn();
    assert_eq!(trouble(&node), None);
    assert_eq!(row(&node, "stays").unwrap().state, "allocated");
    assert_eq!(interfaces(&node), 2);
    drop(stays);
}

/// A UDP socket in a pod.
fn bound(pod: &Pod, v6: bool, port: u16) -> UdpSocket {
    let own: IpAddr = match v6 {
        true => pod.v6.into(),
        false => pod.v4.into(),
    };
    let socket = pod.netns.run(|| UdpSocket::bind((own, port))).unwrap();
    socket.set_read_timeout(Some(SOON)).unwrap();
    socket
}

/// A datagram that a pod asked for and that comes when the pod is gone must not reach the next one at its address as the
/// Service's answer.
#[test]
fn the_next_pod_at_an_address_gets_none_of_the_last_ones_answers() {
    const PORT: u16 = 40000;
    let Some(mut node) = Node::start("answers") else {
        return;
    };
    node.terminate();
    node.configure(|config| {
        config["ipam"]["cooldown"] = json!("1s");
        // So that nothing goes by being idle.
        config["proxy"]["udpIdle"] = json!("1h");
    });
    node.spawn();
    let server = node.pod("server");
    node.publish(&Service::new(&[&server]));
    let bystander = node.pod("bystander");
    let client = node.pod("client");
    let (v4, v6) = (client.v4, client.v6);
    let backends = [false, true].map(|v6| bound(&server, v6, 5353));
    let vips = [VIP4, VIP6].map(|vip| SocketAddr::new(vip.parse().unwrap(), 53));
    let mut buffer = [0; 64];
    let ask = |pod: &Pod, at: usize| {
        let socket = bound(pod, at == 1, PORT);
        socket.connect(vips[at]).unwrap();
        socket.send(b"who?").unwrap();
        socket
    };
    let mut asked = Vec::new();
    for (at, backend) in backends.iter().enumerate() {
        for pod in [&bystander, &client] {
            let socket = ask(pod, at);
            let (_, from) = backend.recv_from(&mut buffer).unwrap();
            assert_eq!(from.port(), PORT);
            if pod.name == "bystander" {
                asked.push((socket, from));
            }
        }
    }
    node.remove(client);
    let free = wait_until(RECLAIMED_WITHIN, || row(&node, "client").is_none());
    assert!(free, "{:?}", row(&node, "client"));

    let next = node
        .try_pod("next", &json!({"ips": [v4.to_string()]}))
        .unwrap();
    assert_eq!((next.v4, next.v6), (v4, v6));
    for (at, backend) in backends.iter().enumerate() {
        let socket = bound(&next, at == 1, PORT);
        socket.connect(vips[at]).unwrap();
        let to: IpAddr = if at == 1 { v6.into() } else { v4.into() };
        // The late answer, then one that must arrive: on the way they keep their order.
        let here = bound(&next, at == 1, PORT + 1);
        backend.send_to(b"late", (to, PORT)).unwrap();
        backend.send_to(b"end", (to, PORT + 1)).unwrap();
        let (length, _) = here.recv_from(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"end");
        socket.set_nonblocking(true).unwrap();
        let got = socket.recv(&mut buffer);
        assert!(got.is_err(), "the last pod's answer: {:?}", &buffer[..4]);
        // A flow of its own is served, and others' were not touched.
        socket.set_nonblocking(false).unwrap();
        socket.send(b"who?").unwrap();
        let (_, from) = backend.recv_from(&mut buffer).unwrap();
        backend.send_to(b"now", from).unwrap();
        let length = socket.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"now");
        let (socket, from) = &asked[at];
        backend.send_to(b"still", from).unwrap();
        let length = socket.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"still");
    }
}

/// A gateway keeps an entry for each port that is not in a pod's block. Those of a pod that is gone would let hosts outside through
/// to the next pod at its address.
#[test]
fn a_gateway_forgets_a_pod_before_its_address_is_used_again() {
    const PORT: u16 = 5000;
    let Some(mut node) = Node::prepare("gateway") else {
        return;
    };
    node.configure(|config| {
        config["ipam"]["cooldown"] = json!("1s");
        config["nat64"] = json!({
            "pref64": ["2001:db8:64::/96"], "portBlockBits": 10,
            "gateway": {"pool": ["203.0.113.0/30"], "clients": ["10.64.0.0/26"], "slice": 0},
        });
    });
    // What a speaker would have told.
    node.fabric.forward().unwrap();
    for route in [
        "2001:db8:64::/96 via 2001:db8::2",
        "203.0.113.0/30 via 192.0.2.2",
    ] {
        node.fabric.exec(&format!("route add {route}")).unwrap();
    }
    node.spawn();
    let entries = || match node.ask(&Request::Status) {
        Response::Status { status } => {
            let found = status.nat64.into_iter().find(|f| f.name == "bib_entries");
            found.expect("it is a gateway").value
        }
        other => panic!("{other:?}"),
    };
    let own: Ipv4Addr = [192, 0, 2, 1].into();
    let server = node.fabric.run(|| UdpSocket::bind((own, 53))).unwrap();
    server.set_read_timeout(Some(SOON)).unwrap();
    let prefix = u128::from("2001:db8:64::".parse::<Ipv6Addr>().unwrap());
    let server6 = Ipv6Addr::from(prefix | u128::from(u32::from(own)));
    let (stays, goes) = (node.pod("stays"), node.pod("goes"));
    for pod in [&stays, &goes] {
        let socket = bound(pod, true, PORT);
        socket.send_to(b"who?", (server6, 53)).unwrap();
        let (_, from) = server.recv_from(&mut [0; 64]).unwrap();
        assert!(from.ip().to_string().starts_with("203.0.113."), "{from}");
    }
    assert_eq!(entries(), "2");
    node.remove(goes);
    let free = wait_until(RECLAIMED_WITHIN, || row(&node, "goes").is_none());
    assert!(free, "{:?}", row(&node, "goes"));
    assert_eq!(entries(), "1", "that of the pod that lives");
    drop(stays);
}
