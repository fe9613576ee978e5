//! With the reference plugins: as their IPAM plugin, and as the first of their chain.

#![allow(missing_docs)]

mod node;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use kun_config::types::SlotClass;
use kun_harness::{require_root, require_tool, skip, wait_for};
use node::{DEBIAN, Node, Pod, address};
use serde_json::{Value, json};

/// The plugin, unless it or the right to use it is missing.
fn peer(name: &str) -> Option<PathBuf> {
    if !require_root() {
        return None;
    }
    let program = Path::new(DEBIAN).join(name);
    if !program.is_file() {
        skip("containernetworking-plugins is not installed; `cargo xtask setup` brings it");
        return None;
    }
    Some(program)
}

fn ping(from: &kun_harness::Netns, to: &str) {
    let mut ping = Command::new("ping");
    ping.args(["-n", "-c", "1", "-W", "5", to]);
    let out = from.output(ping).unwrap();
    assert!(
        out.status.success(),
        "{to}: {}",
        String::from_utf8_lossy(&out.stdout)
    );
}

/// A network of another plugin whose addresses are ours.
fn network(node: &Node, more: Value, section: Value) -> Value {
    let mut network = json!({
        "cniVersion": "1.0.0",
        "name": "kun",
        "ipam": {"type": "kun-cni", "kunConfig": node.config},
        "runtimeConfig": {"io.kubernetes.cri.pod-annotations": {"kun.network/ipv4": "true"}},
    });
    for (into, from) in [(None, more), (Some("ipam"), section)] {
        for (key, value) in from.as_object().unwrap() {
            match into {
                None => network[key] = value.clone(),
                Some(into) => network[into][key] = value.clone(),
            }
        }
    }
    network
}

fn counts(node: &Node) -> (u32, u32, u32) {
    node.service()
        .counts(SlotClass::Dual, kun_cni::clock::now())
        .unwrap()
}

/// ADD twice, ping both ways, CHECK, DEL, by a main plugin that delegates to us.
fn delegated(program: &Path, node: &Node, network: &Value, reach: bool) {
    let pods = [Pod::new("c1", true), Pod::new("c2", true)];
    let results: Vec<Value> = pods
        .iter()
        .map(|pod| {
            node.plugin(program, "ADD", pod, network)
                .unwrap_or_else(|e| panic!("{e}"))
                .expect("ADD has a result")
        })
        .collect();
    for (pod, result) in pods.iter().zip(&results) {
        let (v6, v4) = (
            address(result, true).unwrap(),
            address(result, false).unwrap(),
        );
        // The first address of the block is the next hop.
        assert_ne!(v4, "10.64.0.0");
        let last: u32 = v4.rsplit('.').next().unwrap().parse().unwrap();
        assert_eq!(v6, format!("fd00:64::a40:{last:x}"));
        let shown = pod.netns.exec("-o addr show dev eth0").unwrap();
        assert!(
            shown.contains(&format!("{v4}/26")) && shown.contains(&format!("{v6}/122")),
            "{shown}"
        );
        if reach {
            ping(&node.netns, &v4);
            ping(&node.netns, &v6);
        }
        let mut check = network.clone();
        check["prevResult"] = result.clone();
        assert_eq!(node.plugin(program, "CHECK", pod, &check), Ok(None));
    }
    if reach {
        ping(&pods[0].netns, &address(&results[1], false).unwrap());
        ping(&pods[1].netns, &address(&results[0], true).unwrap());
    }
    let (allocated, ..) = counts(node);
    assert_eq!(allocated, 2);
    // The address is gone from the store: CHECK of the delegate says so through the main plugin.
    let mut check = network.clone();
    check["prevResult"] = results[0].clone();
    let key = kun_control::AttachmentKey {
        network: "kun".into(),
        container_id: "c1".into(),
        ifname: "eth0".into(),
    };
    let release = kun_control::Request::Release {
        key,
        generation: None,
    };
    node.service().handle(&release, kun_cni::clock::now());
    let error = node.plugin(program, "CHECK", &pods[0], &check).unwrap_err();
    assert_eq!(error["code"], 3, "{error}");
    for pod in &pods {
        for _ in 0..2 {
            assert_eq!(node.plugin(program, "DEL", pod, network), Ok(None));
        }
    }
    let (allocated, ..) = counts(node);
    assert_eq!(allocated, 0);
    assert_eq!(node.leavings(), "");
}

#[test]
fn addresses_for_ptp() {
    let Some(program) = peer("ptp") else { return };
    let node = Node::new("split");
    let network = network(&node, json!({"type": "ptp"}), json!({}));
    delegated(&program, &node, &network, true);
}

/// host-local's "never broadcast", for both ends of every block.
#[test]
fn the_ends_of_a_subnet_are_no_pods() {
    if !require_root() {
        return;
    }
    let node = Node::new("split");
    let ours = PathBuf::from(env!("CARGO_BIN_EXE_kun-cni"));
    let mut given = std::collections::BTreeSet::new();
    let pod = Pod::new("c", true);
    let variables = |id: &str| {
        let mut vars = pod.variables("ADD", &pod.netns.path());
        vars[1].1 = id.to_owned();
        vars
    };
    let network = network(&node, json!({"type": "bridge"}), json!({}));
    let add = |id: &str| {
        let vars = variables(id);
        let vars: Vec<(&str, &str)> = vars.iter().map(|(n, v)| (*n, v.as_str())).collect();
        node::answer(&node.execute(&vars, network.to_string().as_bytes()))
    };
    for i in 0..62 {
        let result = add(&format!("c{i}")).unwrap().unwrap();
        assert!(given.insert(address(&result, false).unwrap()));
    }
    assert!(!given.contains("10.64.0.0") && !given.contains("10.64.0.63"));
    let error = add("more").unwrap_err();
    assert_eq!(error["code"], 11, "{error}");
    // Asked for by name.
    let mut fixed = network.clone();
    fixed["runtimeConfig"]["ips"] = json!(["10.64.0.5"]);
    let error = node.plugin(&ours, "ADD", &pod, &fixed).unwrap_err();
    assert_eq!(error["code"], 11, "{error}");
}

#[test]
fn addresses_for_bridge() {
    let Some(program) = peer("bridge") else {
        return;
    };
    let node = Node::new("split");
    let more = json!({"type": "bridge", "bridge": "br0", "isGateway": true});
    let network = network(&node, more, json!({}));
    delegated(&program, &node, &network, true);
}

#[test]
fn addresses_for_macvlan_without_a_next_hop_of_ours() {
    let Some(program) = peer("macvlan") else {
        return;
    };
    let node = Node::new("split");
    node.netns
        .exec("link add up0 type veth peer name up1")
        .unwrap();
    node.netns.exec("link set up0 up").unwrap();
    node.netns.exec("link set up1 up").unwrap();
    let more = json!({"type": "macvlan", "master": "up0"});
    let routes = json!([{"dst": "198.51.100.0/24"}, {"dst": "2001:db8::/32"}]);
    let section = json!({"gateway": false, "routes": routes});
    let network = network(&node, more, section);
    let pods = [Pod::new("c1", true), Pod::new("c2", true)];
    let results: Vec<Value> = pods
        .iter()
        .map(|pod| {
            node.plugin(&program, "ADD", pod, &network)
                .unwrap_or_else(|e| panic!("{e}"))
                .expect("ADD has a result")
        })
        .collect();
    // The first address of a subnet is no host's, with a next hop of ours or without.
    assert_eq!(address(&results[0], false).as_deref(), Some("10.64.0.1"));
    assert!(results[0]["ips"][0].get("gateway").is_none());
    let shown = pods[0].netns.exec("route show").unwrap();
    assert!(shown.contains("198.51.100.0/24 dev eth0"), "{shown}");
    // That plugin does not wait.
    for pod in &pods {
        wait_for("the end of detection", Duration::from_secs(10), || {
            let tentative = pod.netns.exec("-6 addr show tentative").unwrap();
            tentative.is_empty().then_some(())
        })
        .unwrap();
    }
    // macvlan interfaces of one parent reach each other.
    ping(&pods[0].netns, &address(&results[1], false).unwrap());
    ping(&pods[1].netns, &address(&results[0], true).unwrap());
    for pod in &pods {
        assert_eq!(node.plugin(&program, "DEL", pod, &network), Ok(None));
    }
    assert_eq!(counts(&node).0, 0);
}

/// What the runtime remembers is not what the store has: the slot is another one by now, or the result another container's.
#[test]
fn check_of_a_delegate_wants_its_addresses_in_the_result() {
    if !require_root() {
        return;
    }
    let node = Node::new("split");
    let ours = PathBuf::from(env!("CARGO_BIN_EXE_kun-cni"));
    let pod = Pod::new("c1", true);
    let network = network(&node, json!({"type": "bridge"}), json!({}));
    let result = node.plugin(&ours, "ADD", &pod, &network).unwrap().unwrap();
    let mut check = network.clone();
    check["prevResult"] = result.clone();
    assert_eq!(node.plugin(&ours, "CHECK", &pod, &check), Ok(None));
    for other in ["10.64.0.40/26", "fd00:64::a40:28/122"] {
        let v6 = other.contains(':');
        let mut ips = result["ips"].as_array().unwrap().clone();
        let is_of_family = |ip: &Value| ip["address"].as_str().unwrap().contains(':') == v6;
        let ip = ips.iter_mut().find(|ip| is_of_family(ip)).unwrap();
        let had = ip["address"].take();
        ip["address"] = other.into();
        check["prevResult"]["ips"] = ips.into();
        let error = node.plugin(&ours, "CHECK", &pod, &check).unwrap_err();
        assert_eq!(error["code"], 101, "{error}");
        let details = error["details"].as_str().unwrap();
        assert!(details.contains(had.as_str().unwrap()), "{error}");
    }
    assert_eq!(node.plugin(&ours, "DEL", &pod, &network), Ok(None));
}

/// The result that `bridge` would hand to us in its delegate's place.
#[test]
fn a_delegates_result_has_no_interfaces_in_any_version() {
    if !require_root() {
        return;
    }
    let node = Node::new("split");
    let ours = PathBuf::from(env!("CARGO_BIN_EXE_kun-cni"));
    for version in ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        let pod = Pod::new(&format!("c-{version}"), true);
        let mut network = network(&node, json!({"type": "bridge"}), json!({}));
        network["cniVersion"] = version.into();
        let result = node.plugin(&ours, "ADD", &pod, &network).unwrap().unwrap();
        assert!(result.get("interfaces").is_none(), "{result}");
        for ip in result["ips"].as_array().unwrap() {
            assert!(ip.get("interface").is_none(), "{result}");
            assert!(ip["gateway"].is_string(), "{result}");
        }
        assert_eq!(result["routes"].as_array().unwrap().len(), 2);
        assert_eq!(node.plugin(&ours, "DEL", &pod, &network), Ok(None));
    }
    let (_, cooling, _) = counts(&node);
    // Five, and the block's first, put aside by the first ADD.
    assert_eq!(cooling, 6);
    // GC and STATUS, as a main plugin forwards them.
    let pod = Pod::new("gone", true);
    let mut network = network(&node, json!({"type": "bridge"}), json!({}));
    network["cniVersion"] = "1.1.0".into();
    node.plugin(&ours, "ADD", &pod, &network).unwrap();
    assert_eq!(node.plugin(&ours, "STATUS", &pod, &network), Ok(None));
    network["cni.dev/valid-attachments"] = json!([{"containerID": "gone", "ifname": "eth0"}]);
    assert_eq!(node.plugin(&ours, "GC", &pod, &network), Ok(None));
    assert_eq!(counts(&node).0, 1);
    network["cni.dev/valid-attachments"] = json!([]);
    assert_eq!(node.plugin(&ours, "GC", &pod, &network), Ok(None));
    assert_eq!(counts(&node).0, 0);
}

/// kun-cni, then another plugin on its result; CHECK of both holds; DEL in reverse.
fn chained(node: &Node, pod: &Pod, program: &Path, more: Value, meanwhile: impl FnOnce(&Value)) {
    node.netns.exec("addr add 192.0.2.7/32 dev lo").unwrap();
    node.netns
        .exec("addr add 2001:db8::7/128 dev lo nodad")
        .unwrap();
    let ours = PathBuf::from(env!("CARGO_BIN_EXE_kun-cni"));
    let mut first = pod.network(node);
    first["cniVersion"] = "1.0.0".into();
    let result = node
        .plugin(&ours, "ADD", pod, &first)
        .unwrap_or_else(|e| panic!("{e}"))
        .expect("ADD has a result");
    let mut second = json!({"cniVersion": "1.0.0", "name": "kun", "prevResult": result});
    for (key, value) in more.as_object().unwrap() {
        second[key] = value.clone();
    }
    let result = node
        .plugin(program, "ADD", pod, &second)
        .unwrap_or_else(|e| panic!("{e}"))
        .expect("ADD has a result");
    meanwhile(&result);
    for (program, network) in [(ours.as_path(), &first), (program, &second)] {
        // Debian's 1.1.1 looks for the IPv4 rules among the IPv6 ones.
        if program.ends_with("portmap") {
            continue;
        }
        let mut check = network.clone();
        check["prevResult"] = result.clone();
        assert_eq!(
            node.plugin(program, "CHECK", pod, &check),
            Ok(None),
            "{}",
            program.display()
        );
    }
    for (program, network) in [(program, &second), (ours.as_path(), &first)] {
        let mut del = network.clone();
        del["prevResult"] = result.clone();
        assert_eq!(node.plugin(program, "DEL", pod, &del), Ok(None));
    }
    assert_eq!(node.leavings(), "");
}

#[test]
fn tuning_after_us_may_change_the_mtu_and_its_sysctls() {
    let Some(program) = peer("tuning") else {
        return;
    };
    let node = Node::new("split");
    let pod = Pod::new("c1", true);
    let more = json!({
        "type": "tuning",
        "mtu": 1320,
        "sysctl": {"net.ipv6.conf.eth0.hop_limit": "33"},
    });
    chained(&node, &pod, &program, more, |result| {
        let link = pod.netns.exec("link show eth0").unwrap();
        assert!(link.contains("mtu 1320"), "{link}");
        ping(&node.netns, &address(result, true).unwrap());
        ping(&node.netns, &address(result, false).unwrap());
    });
}

#[test]
fn a_later_plugins_hardware_address_is_named_by_check() {
    let Some(program) = peer("tuning") else {
        return;
    };
    let node = Node::new("split");
    let pod = Pod::new("c1", true);
    let first = node.add(&pod).unwrap();
    let mut previous = first.clone();
    previous["cniVersion"] = "1.0.0".into();
    let second = json!({
        "cniVersion": "1.0.0", "name": "kun", "type": "tuning",
        "mac": "02:00:00:00:00:77", "prevResult": previous,
    });
    let mut result = node
        .plugin(&program, "ADD", &pod, &second)
        .unwrap()
        .unwrap();
    result["cniVersion"] = "1.1.0".into();
    let error = node.check(&pod, &result).unwrap_err();
    assert_eq!(error["code"], 101, "{error}");
    let details = error["details"].as_str().unwrap();
    assert!(
        details.contains("eth0: hardware address 02:00:00:00:00:77, not ")
            && details.contains("give the `mac` capability to kun-cni"),
        "{details}"
    );
}

/// §2 CHECK: a later plugin may have taken a route away, and then it is not in the result.
#[test]
fn a_route_that_a_later_plugin_took_away_is_not_missed() {
    if !require_root() {
        return;
    }
    let node = Node::new("split");
    let pod = Pod::new("c1", true);
    let mut result = node.add(&pod).unwrap();
    pod.netns.exec("-4 route del default").unwrap();
    let error = node.check(&pod, &result).unwrap_err();
    assert!(
        error["details"]
            .as_str()
            .unwrap()
            .contains("route 0.0.0.0/0"),
        "{error}"
    );
    result["routes"]
        .as_array_mut()
        .unwrap()
        .retain(|route| route["dst"] != "0.0.0.0/0");
    node.check(&pod, &result).unwrap();
}

#[test]
fn bandwidth_after_us_shapes_the_first_pair() {
    let Some(program) = peer("bandwidth") else {
        return;
    };
    let node = Node::new("shared");
    let pod = Pod::new("c1", true);
    let more = json!({
        "type": "bandwidth",
        "ingressRate": 8_000_000, "ingressBurst": 800_000,
        "egressRate": 8_000_000, "egressBurst": 800_000,
    });
    chained(&node, &pod, &program, more, |result| {
        let host = result["interfaces"][1]["name"].as_str().unwrap();
        let mut tc = Command::new("tc");
        tc.args(["qdisc", "show", "dev", host]);
        let out = node.netns.output(tc).unwrap();
        let shown = String::from_utf8_lossy(&out.stdout).into_owned();
        assert!(shown.contains("tbf"), "{shown}");
        ping(&node.netns, &address(result, false).unwrap());
    });
}

/// A host port that leads into the pod, from outside and from the pod itself: there and back through one interface.
#[test]
fn portmap_after_us_and_a_pod_reaches_itself_through_the_node() {
    let Some(program) = peer("portmap") else {
        return;
    };
    if !require_tool("iptables") {
        return;
    }
    let node = Node::new("shared");
    let pod = Pod::new("c1", true);
    let more = json!({
        "type": "portmap",
        "snat": true,
        "runtimeConfig": {"portMappings": [
            {"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}
        ]},
    });
    chained(&node, &pod, &program, more, |_| {
        let listener = pod
            .netns
            .run(|| std::net::TcpListener::bind("0.0.0.0:80").unwrap());
        for from in [&node.netns, &pod.netns] {
            let client = from.run(|| {
                let to = "192.0.2.7:8080".parse().unwrap();
                std::net::TcpStream::connect_timeout(&to, Duration::from_secs(5))
            });
            client.unwrap();
            listener.accept().unwrap();
        }
    });
}
