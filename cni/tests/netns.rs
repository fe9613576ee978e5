//! The plugin as a runtime executes it, in real network namespaces.

#![allow(missing_docs)]

mod node;

use std::io::Read;
use std::net::{Shutdown, TcpStream};
use std::process::Command;
use std::time::Duration;

use kun_harness::{require_root, wait_for};
use node::{Node, Pod, address};

/// One echo each way, at once: the very first packet must arrive.
fn first_ping(from: &kun_harness::Netns, to: &str) {
    let mut ping = Command::new("ping");
    ping.args(["-n", "-c", "1", "-W", "2", to]);
    let out = from.output(ping).unwrap();
    assert!(
        out.status.success(),
        "{to}: {}{}",
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
}

/// An address of the node that pods can reach.
fn node_addresses(node: &Node) {
    node.netns.exec("addr add 192.0.2.7/32 dev lo").unwrap();
    node.netns
        .exec("addr add 2001:db8::7/128 dev lo nodad")
        .unwrap();
}

#[test]
fn a_dual_pod_is_reached_both_ways_with_the_first_packet() {
    if !require_root() {
        return;
    }
    for interfaces in ["split", "shared"] {
        let node = Node::new(interfaces);
        node_addresses(&node);
        let pod = Pod::new("c1", true);
        let result = node.add(&pod).unwrap();
        let (v6, v4) = (
            address(&result, true).unwrap(),
            address(&result, false).unwrap(),
        );
        assert_eq!((v6.as_str(), v4.as_str()), ("fd00:64::a40:0", "10.64.0.0"));
        // Neither the address nor the link-local one waits for duplicate address detection.
        let waiting = pod.netns.exec("-6 addr show tentative").unwrap();
        assert_eq!(waiting, "");
        first_ping(&node.netns, &v6);
        first_ping(&node.netns, &v4);
        first_ping(&pod.netns, "2001:db8::7");
        first_ping(&pod.netns, "192.0.2.7");
        node.check(&pod, &result).unwrap();
        node.del(&pod).unwrap();
        assert_eq!(node.leavings(), "");
    }
}

#[test]
fn pods_reach_each_other_and_a_v6_only_pod_has_no_ipv4() {
    if !require_root() {
        return;
    }
    let node = Node::new("split");
    let (dual, single) = (Pod::new("c1", true), Pod::new("c2", false));
    let dual_result = node.add(&dual).unwrap();
    let single_result = node.add(&single).unwrap();
    assert_eq!(address(&single_result, false), None);
    let v6 = address(&single_result, true).unwrap();
    assert_eq!(v6, "fd00:64::f000:40");
    first_ping(&dual.netns, &v6);
    first_ping(&single.netns, &address(&dual_result, true).unwrap());
    let v4 = single.netns.exec("-4 addr show dev eth0").unwrap();
    assert_eq!(v4, "");
    let range = single
        .netns
        .run(|| std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap());
    assert_eq!(range.trim_end(), "64512\t65535");
}

#[test]
fn a_second_add_fails_and_the_first_pod_lives_on() {
    if !require_root() {
        return;
    }
    let node = Node::new("split");
    node_addresses(&node);
    let pod = Pod::new("c1", true);
    let first = node.add(&pod).unwrap();
    let error = node.add(&pod).unwrap_err();
    assert!(
        error["details"].as_str().unwrap().contains("eth0 already"),
        "{error}"
    );
    node.check(&pod, &first).unwrap();
    first_ping(&node.netns, &address(&first, true).unwrap());
    assert_eq!(node.service().live(kun_cni::clock::now()).unwrap().len(), 1);
}

/// The same attachment asked for again, in another namespace: a runtime that lost its memory does so.
#[test]
fn a_second_add_into_another_namespace_fails_and_the_first_pod_lives_on() {
    if !require_root() {
        return;
    }
    let node = Node::new("split");
    node_addresses(&node);
    let pod = Pod::new("c1", true);
    let first = node.add(&pod).unwrap();
    let other = Pod::new("c1", true);
    let error = node.add(&other).unwrap_err();
    let details = error["details"].as_str().unwrap();
    assert!(
        details.contains("the attachment stands already") && details.contains("DEL"),
        "{error}"
    );
    assert_eq!(other.netns.exec("-br link show type veth").unwrap(), "");
    node.check(&pod, &first).unwrap();
    first_ping(&node.netns, &address(&first, true).unwrap());
    assert_eq!(node.service().live(kun_cni::clock::now()).unwrap().len(), 1);
}

/// `ipam.interfaces` may change while pods live.
#[test]
fn check_looks_for_the_layout_in_which_add_made_the_pod() {
    if !require_root() {
        return;
    }
    for (before, after) in [("split", "shared"), ("shared", "split")] {
        let node = Node::new(before);
        let pod = Pod::new("c1", true);
        let result = node.add(&pod).unwrap();
        let text = std::fs::read_to_string(&node.config).unwrap();
        let [old, new] = [before, after].map(|layout| format!("interfaces: {layout}"));
        std::fs::write(&node.config, text.replace(&old, &new)).unwrap();
        node.check(&pod, &result).unwrap();
        node.del(&pod).unwrap();
        assert_eq!(node.leavings(), "");
    }
}

#[test]
fn del_repeats_and_outlives_the_namespace() {
    if !require_root() {
        return;
    }
    let node = Node::new("split");
    let pod = Pod::new("c1", true);
    node.add(&pod).unwrap();
    // The runtime removes the namespace first: its path is gone.
    let network = pod.network(&node);
    let vars = pod.variables("DEL", std::path::Path::new("/run/netns/gone"));
    drop(pod.netns);
    let vars: Vec<(&str, &str)> = vars.iter().map(|(n, v)| (*n, v.as_str())).collect();
    for _ in 0..2 {
        let out = node.execute(&vars, network.to_string().as_bytes());
        assert_eq!(node::answer(&out), Ok(None));
    }
    assert_eq!(node.leavings(), "");
    let counts = node
        .service()
        .counts(kun_config::types::SlotClass::Dual, kun_cni::clock::now())
        .unwrap();
    assert_eq!(counts, (0, 1, 63));
}

#[test]
fn check_names_what_is_missing() {
    if !require_root() {
        return;
    }
    let node = Node::new("split");
    let pod = Pod::new("c1", true);
    let result = node.add(&pod).unwrap();
    let host4 = result["interfaces"][3]["name"].as_str().unwrap().to_owned();
    let breaks: [(&kun_harness::Netns, String, &str); 5] = [
        (
            &pod.netns,
            "-4 route del default".into(),
            "pod: route 0.0.0.0/0 via 169.254.1.1 on eth1",
        ),
        (
            &pod.netns,
            "addr del fd00:64::a40:0/128 dev eth0".into(),
            "pod: address fd00:64::a40:0/128 on eth0",
        ),
        (
            &node.netns,
            format!("neigh del 10.64.0.0 dev {host4}"),
            "node: neighbour 10.64.0.0",
        ),
        (
            &node.netns,
            "route del 10.64.0.0/32".into(),
            "node: route 10.64.0.0/32 on",
        ),
        (&pod.netns, "link set eth1 down".into(), "pod: eth1 up"),
    ];
    for (netns, command, named) in breaks {
        netns.exec(&command).unwrap();
        let error = node.check(&pod, &result).unwrap_err();
        assert_eq!(error["code"], 101, "{error}");
        let details = error["details"].as_str().unwrap();
        assert!(details.contains(named), "{command}: {details}");
    }
    node.del(&pod).unwrap();
    let error = node.check(&pod, &result).unwrap_err();
    assert_eq!(error["code"], 3, "{error}");
}

/// The kernel drops a node's routes with an interface that goes down, and brings none back.
#[test]
fn routes_survive_flaps_of_either_end() {
    if !require_root() {
        return;
    }
    for interfaces in ["split", "shared"] {
        let node = Node::new(interfaces);
        node_addresses(&node);
        let pod = Pod::new("c1", true);
        let mut network = pod.network(&node);
        network["runtimeConfig"]["mac"] = "02:00:00:00:be:ef".into();
        let result = node.verb("ADD", &pod, &network).unwrap().unwrap();
        let (v6, v4) = (
            address(&result, true).unwrap(),
            address(&result, false).unwrap(),
        );
        let ipam = std::sync::Arc::new(node.service());
        let config = node.parsed();
        node.netns
            .run(|| kun_cni::keeper::start(ipam, config))
            .unwrap();
        let hosts: Vec<String> = result["interfaces"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|i| i.get("sandbox").is_none())
            .map(|i| i["name"].as_str().unwrap().to_owned())
            .collect();
        let routes =
            || node.netns.exec("-4 route").unwrap() + &node.netns.exec("-6 route").unwrap();
        let complete = |routes: &str| {
            [&v4, &v6]
                .iter()
                .all(|address| routes.contains(&format!("{address} dev kun")))
        };
        for _ in 0..3 {
            for host in &hosts {
                node.netns.exec(&format!("link set {host} down")).unwrap();
                node.netns.exec(&format!("link set {host} up")).unwrap();
            }
            wait_for("the routes", Duration::from_secs(10), || {
                complete(&routes()).then_some(())
            })
            .unwrap();
            first_ping(&node.netns, &v6);
            first_ping(&node.netns, &v4);
            first_ping(&pod.netns, "2001:db8::7");
            first_ping(&pod.netns, "192.0.2.7");
        }
        // The other end takes only the carrier away: nothing is lost on the node.
        for round in 0..3 {
            for ifname in ["eth0", "eth1"].iter().take(hosts.len()) {
                pod.netns.exec(&format!("link set {ifname} down")).unwrap();
                let left = routes();
                assert!(complete(&left), "{round}: {left}");
                pod.netns.exec(&format!("link set {ifname} up")).unwrap();
            }
        }
    }
}

/// A pod has one port block to send from. A client that closes first leaves its ports waiting, and goes on all the same.
#[test]
fn a_pod_that_used_up_its_ports_has_them_back_soon() {
    if !require_root() {
        return;
    }
    const PORTS: usize = 1024;
    let node = Node::new("split");
    node_addresses(&node);
    let pod = Pod::new("c1", true);
    node.add(&pod).unwrap();
    let listener = node
        .netns
        .run(|| std::net::TcpListener::bind("[2001:db8::7]:0").unwrap());
    let server = listener.local_addr().unwrap();
    let connect = || {
        pod.netns.run(|| {
            let client = TcpStream::connect_timeout(&server, Duration::from_secs(2))?;
            let (mut served, _) = listener.accept()?;
            client.shutdown(Shutdown::Write)?;
            served.read_to_end(&mut Vec::new()).map(drop)
        })
    };
    for _ in 0..PORTS {
        connect().unwrap();
    }
    // One second between two lives of a port; a minute if none were allowed.
    wait_for("a port to be free", Duration::from_secs(10), || {
        connect().ok()
    })
    .unwrap();
}

/// What a pod's end must have: addresses, default routes, and neighbour entries for the next hops, in one text.
fn pods_end(pod: &Pod) -> String {
    ["-6 addr", "-4 addr", "-6 route", "-4 route", "neigh"]
        .map(|what| pod.netns.exec(&format!("{what} show")).unwrap())
        .concat()
}

/// Lines of [`pods_end`] that a flap takes away, in an order of their own.
fn lasting(text: &str) -> Vec<String> {
    let mut lines: Vec<String> = text
        .lines()
        .map(|line| line.trim().to_owned())
        .filter(|line| {
            ["inet", "default via", "fe80::1 ", "169.254.1.1 "]
                .iter()
                .any(|begin| line.starts_with(begin))
        })
        .collect();
    lines.sort();
    lines
}

fn keep(node: &Node) {
    let (ipam, config) = (std::sync::Arc::new(node.service()), node.parsed());
    node.netns
        .run(|| kun_cni::keeper::start(ipam, config))
        .unwrap();
}

/// A pod that takes its own end down loses IPv6 addresses, and routes and neighbours of both families.
#[test]
fn a_pod_gets_back_what_a_flap_of_its_own_end_took() {
    if !require_root() {
        return;
    }
    for (interfaces, ipv4) in [("split", true), ("shared", true), ("split", false)] {
        let node = Node::new(interfaces);
        node_addresses(&node);
        // Another pod beside it, in whose namespace the interface has the same name.
        let other = Pod::new("other", ipv4);
        node.add(&other).unwrap();
        let pod = Pod::new("c1", ipv4);
        let result = node.add(&pod).unwrap();
        let pods = result["interfaces"].as_array().unwrap().len() / 2;
        let whole = lasting(&pods_end(&pod));
        let others = lasting(&pods_end(&other));
        keep(&node);
        for _ in 0..2 {
            for ifname in ["eth0", "eth1"].iter().take(pods) {
                pod.netns.exec(&format!("link set {ifname} down")).unwrap();
                assert_ne!(lasting(&pods_end(&pod)), whole, "{ifname} is down");
                pod.netns.exec(&format!("link set {ifname} up")).unwrap();
            }
            wait_for("what the flap took", Duration::from_secs(15), || {
                (lasting(&pods_end(&pod)) == whole).then_some(())
            })
            .unwrap_or_else(|e| panic!("{interfaces}: {e}: {}", pods_end(&pod)));
            first_ping(&pod.netns, "2001:db8::7");
            if ipv4 {
                first_ping(&pod.netns, "192.0.2.7");
            }
        }
        assert_eq!(lasting(&pods_end(&other)), others);
    }
}

#[test]
fn what_a_pod_chose_itself_stays_and_an_interface_that_is_not_ours_is_left_alone() {
    if !require_root() {
        return;
    }
    let node = Node::new("shared");
    node_addresses(&node);
    let (own, foreign, plain) = (
        Pod::new("c1", true),
        Pod::new("c2", true),
        Pod::new("c3", true),
    );
    for pod in [&own, &foreign, &plain] {
        node.add(pod).unwrap();
    }
    let whole = lasting(&pods_end(&plain));
    keep(&node);
    // While it is down nobody may restore, so what is set before it comes up is there first.
    own.netns.exec("link set eth0 down").unwrap();
    own.netns
        .exec("link add own0 type veth peer name own1")
        .unwrap();
    own.netns.exec("link set own0 up").unwrap();
    own.netns.exec("link set own1 up").unwrap();
    own.netns.exec("addr add 192.0.2.99/24 dev own0").unwrap();
    own.netns
        .exec("-4 route add default via 192.0.2.1 dev own0")
        .unwrap();
    own.netns.exec("link set eth0 up").unwrap();
    foreign.netns.exec("link set eth0 down").unwrap();
    foreign
        .netns
        .exec("link set eth0 address 02:00:00:00:00:99")
        .unwrap();
    foreign.netns.exec("link set eth0 up").unwrap();
    // Flaps for ever: it is whole some time after it ends.
    for _ in 0..50 {
        plain.netns.exec("link set eth0 down").unwrap();
        plain.netns.exec("link set eth0 up").unwrap();
    }
    wait_for("what the flaps took", Duration::from_secs(15), || {
        let own = pods_end(&own);
        (lasting(&pods_end(&plain)) == whole && own.contains("default via fe80::1 dev eth0"))
            .then_some(())
    })
    .unwrap();
    let routes = own.netns.exec("-4 route show default").unwrap();
    assert_eq!(routes.trim(), "default via 192.0.2.1 dev own0");
    let left = pods_end(&foreign);
    assert!(!left.contains("default via"), "{left}");
}
