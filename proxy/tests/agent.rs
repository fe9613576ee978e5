//! The node agent as it runs: the real `kun-proxy` in a network namespace with its own cgroup, bpffs and manifest folder, pods
//! attached by the real `kun-cni`, and clients whose connect() and packets it serves.

mod rig;

use std::fs;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::num::{NonZeroU16, NonZeroU64};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use kun_control::{
    AttachmentKey, Bandwidth, PortMapping, RateLimit, Request, Response, Traffic, Transport,
};
use kun_harness::{wait_for, wait_until};
use rig::{Inside, LB4, LB6, Node, Service, VIP4, VIP6};
use serde_json::json;

/// Everything here takes milliseconds; a busy machine takes its time.
const SOON: Duration = Duration::from_secs(20);
/// What somebody takes away is told, and put back within a second; on a busy machine in less than the 15 s in which filters are looked for.
const TOLD_WITHIN: Duration = Duration::from_secs(12);

fn at(vip: &str, port: u16) -> SocketAddr {
    SocketAddr::new(vip.parse::<IpAddr>().unwrap(), port)
}

#[test]
fn services_follow_their_endpoints() {
    let Some(node) = Node::start("follow") else {
        return;
    };
    let client = node.pod("client");
    let (one, two) = (node.server("one"), node.server("two"));
    node.publish(&Service::new(&[&one, &two]));
    let inside = Inside::enter(&node);
    for vip in [VIP4, VIP6] {
        // TCP: both backends are seen, and the peer stays the service.
        let seen = rig::names_over_tcp(&client.netns, at(vip, 80), 40);
        assert_eq!(seen, ["one", "two"], "{vip} over TCP");
        // UDP: the answer comes from the service's address, for every new flow.
        let seen = rig::names_over_udp(&client.netns, at(vip, 53), 40);
        assert_eq!(seen, ["one", "two"], "{vip} over UDP");
    }

    // A UDP flow whose backend goes moves on with its next packet.
    let flows: Vec<UdpSocket> = [VIP4, VIP6]
        .into_iter()
        .map(|vip| rig::flow_to(&client.netns, at(vip, 53), "one"))
        .collect();
    node.publish(&Service::new(&[&two]));
    for flow in &flows {
        assert_eq!(rig::ask(flow).unwrap(), "two", "a flow to a dead backend");
    }
    for vip in [VIP4, VIP6] {
        let seen = rig::names_over_tcp(&client.netns, at(vip, 80), 20);
        assert_eq!(seen, ["two"], "{vip}");
    }

    // No endpoint: refused at once, not after a timeout.
    node.publish(&Service::new(&[]));
    for vip in [VIP4, VIP6] {
        let error = rig::name_over_tcp(&client.netns, at(vip, 80)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{vip}: {error}");
    }
    drop(inside);
}

#[test]
fn a_virtual_address_is_served_to_the_world_outside() {
    let Some(node) = Node::start("outside") else {
        return;
    };
    let (one, two) = (node.server("one"), node.server("two"));
    node.publish(&Service::new(&[&one, &two]));
    for vip in [LB4, LB6] {
        let seen = rig::names_over_tcp(&node.fabric, at(vip, 80), 40);
        assert_eq!(seen, ["one", "two"], "{vip} over TCP");
        let seen = rig::names_over_udp(&node.fabric, at(vip, 53), 40);
        assert_eq!(seen, ["one", "two"], "{vip} over UDP");
    }
    let flows = [LB4, LB6].map(|vip| rig::flow_to(&node.fabric, at(vip, 53), "one"));
    node.publish(&Service::new(&[&two]));
    for flow in &flows {
        assert_eq!(rig::ask(flow).unwrap(), "two", "a flow to a dead backend");
    }
    let Response::Why { steps } = node.ask(&Request::Why {
        protocol: "tcp".into(),
        source: Some("203.0.113.9".parse().unwrap()),
        destination: LB4.parse().unwrap(),
        port: 80,
    }) else {
        panic!("no reasons");
    };
    assert!(
        steps
            .iter()
            .any(|s| s.what == "view" && s.detail.contains("on node node-a")),
        "{steps:?}"
    );
}

#[test]
fn a_killed_agent_is_followed_without_a_gap() {
    let Some(mut node) = Node::start("killed") else {
        return;
    };
    let client = node.pod("client");
    let (one, two) = (node.server("one"), node.server("two"));
    node.publish(&Service::new(&[&one, &two]));
    let inside = Inside::enter(&node);
    let flow = rig::flow_to(&client.netns, at(VIP4, 53), "one");
    let (stop, tried) = (AtomicBool::new(false), AtomicU32::new(0));
    let failures = std::thread::scope(|scope| {
        let connecting = scope.spawn(|| {
            let mut failures = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                for vip in [VIP4, VIP6] {
                    if let Err(error) = rig::name_over_tcp(&client.netns, at(vip, 80)) {
                        failures.push(format!("{vip}: {error}"));
                    }
                }
                tried.fetch_add(1, Ordering::Relaxed);
            }
            failures
        });
        // Ends the other thread also when an assertion here fails.
        let stopped = rig::OnDrop(|| stop.store(true, Ordering::Relaxed));
        let some_more = || {
            let so_far = tried.load(Ordering::Relaxed);
            assert!(
                wait_until(SOON, || tried.load(Ordering::Relaxed) > so_far + 20),
                "connects stand still"
            );
        };
        some_more();
        node.kill();
        some_more();
        assert_eq!(rig::ask(&flow).unwrap(), "one", "while no agent runs");
        node.spawn();
        some_more();
        drop(stopped);
        connecting.join().unwrap()
    });
    assert_eq!(failures, Vec::<String>::new());
    assert_eq!(rig::ask(&flow).unwrap(), "one", "a flow of before the kill");
    let Response::Status { status } = node.ask(&Request::Status) else {
        panic!("no status");
    };
    assert!(
        status
            .proxy
            .iter()
            .any(|f| f.name == "adopted" && f.value == "yes"),
        "{status:?}"
    );
    // And it is in charge: a change arrives.
    node.publish(&Service::new(&[&two]));
    assert_eq!(
        rig::names_over_tcp(&client.netns, at(VIP6, 80), 20),
        ["two"]
    );
    drop(inside);
}

#[test]
fn what_went_while_no_agent_ran_is_forgotten_by_the_next() {
    let Some(mut node) = Node::start("gone") else {
        return;
    };
    let client = node.pod("client");
    let one = node.server("one");
    node.publish(&Service::new(&[&one]));
    let inside = Inside::enter(&node);
    assert_eq!(rig::names_over_tcp(&client.netns, at(VIP6, 80), 2), ["one"]);
    node.kill();
    node.withdraw();
    // A pod that came meanwhile, by the plugin alone, has its programs once an agent is back.
    let late = node.pod("late");
    node.spawn();
    assert!(
        wait_until(SOON, || {
            let Response::Why { steps } = node.why("tcp", VIP6, 80) else {
                return false;
            };
            steps.iter().all(|s| s.what == "route")
        }),
        "the service is still there"
    );
    node.publish(&Service::new(&[&one]));
    assert_eq!(rig::names_over_udp(&late.netns, at(VIP4, 53), 2), ["one"]);
    drop(inside);
}

#[test]
fn a_manifest_that_is_broken_at_start_takes_nothing_with_it() {
    let Some(mut node) = Node::start("broken") else {
        return;
    };
    let client = node.pod("client");
    let one = node.server("one");
    node.publish(&Service::new(&[&one]));
    let inside = Inside::enter(&node);
    let flow = rig::flow_to(&client.netns, at(VIP4, 53), "one");
    node.kill();
    node.spoil();
    node.spawn();
    let held = |node: &Node| {
        let Response::Status { status } = node.ask(&Request::Status) else {
            panic!("no status");
        };
        let held = status.proxy.into_iter().find(|f| f.name == "held")?;
        Some((held.value, held.ok))
    };
    let said = "8 frontends, 4 backends in no readable manifest, until all can be read";
    assert_eq!(held(&node), Some((said.to_owned(), false)));
    for vip in [VIP4, VIP6] {
        assert_eq!(rig::names_over_tcp(&client.netns, at(vip, 80), 5), ["one"]);
    }
    assert_eq!(rig::ask(&flow).unwrap(), "one");
    // A removed file is no longer a broken one: what it held goes.
    node.withdraw();
    assert!(
        wait_until(SOON, || {
            let Response::Why { steps } = node.why("tcp", VIP6, 80) else {
                return false;
            };
            steps.iter().all(|s| s.what == "route")
        }),
        "the service is still there"
    );
    assert_eq!(held(&node), None);
    drop(inside);
}

#[test]
fn why_names_the_objects_that_decided() {
    let Some(node) = Node::start("why") else {
        return;
    };
    let one = node.server("one");
    node.publish(&Service::new(&[&one]));
    let Response::Why { steps } = node.why("tcp", VIP6, 80) else {
        panic!("no reasons");
    };
    let find = |what: &str| {
        steps
            .iter()
            .find(|s| s.what == what)
            .unwrap_or_else(|| panic!("no {what} in {steps:?}"))
    };
    let service = find("service");
    assert_eq!(service.object, "default/web:http");
    assert!(
        service
            .source
            .as_deref()
            .is_some_and(|s| s.ends_with("web.yaml:1")),
        "{service:?}"
    );
    assert!(find("view").detail.contains("all endpoints"), "{steps:?}");
    assert_eq!(
        find("backend").object,
        SocketAddr::new(one.v6.into(), 8080).to_string()
    );
    assert!(find("endpoint").detail.contains("ready yes"), "{steps:?}");
    assert_eq!(find("pod").object, "default/one");

    let Response::Why { steps } = node.why("tcp", VIP6, 81) else {
        panic!("no reasons");
    };
    assert!(steps[0].detail.contains("no port 81/tcp"), "{steps:?}");
    let Response::Failed { message } = node.why("icmp", VIP6, 81) else {
        panic!("icmp has ports now");
    };
    assert!(message.contains("icmp"));
}

#[test]
fn blocks_are_routed_and_cleanup_leaves_nothing() {
    let Some(mut node) = Node::start("cleanup") else {
        return;
    };
    assert!(
        wait_until(SOON, || node
            .routes("-4")
            .contains("unreachable 10.64.0.0/26 ")),
        "{}",
        node.routes("-4")
    );
    assert!(
        node.routes("-6")
            .contains("unreachable fd00:64::a40:0/122 "),
        "{}",
        node.routes("-6")
    );
    assert!(node.pins() > 0);
    let pod = node.pod("left");
    assert_eq!(
        filters_of(&node).len(),
        2 * 2,
        "one each way on each of two interfaces"
    );
    let refused = node.run_agent(&["--cleanup"]);
    assert!(refused.contains("another agent answers there"), "{refused}");
    node.terminate();
    assert!(node.pins() > 0, "a clean stop leaves the datapath");
    let said = node.run_agent(&["--cleanup"]);
    assert_eq!(node.pins(), 0, "{said}");
    assert_eq!(filters_of(&node), Vec::<String>::new(), "{said}");
    drop(pod);
    assert!(!node.routes("-4").contains("unreachable"));
    assert!(!node.routes("-6").contains("unreachable fd00:64"));
}

/// Host-side interfaces of pods.
fn pod_interfaces(node: &Node) -> Vec<String> {
    let links = node.netns.exec("-o link show").unwrap();
    (links.lines())
        .filter_map(|line| line.split([' ', '@']).nth(1))
        .filter(|name| name.starts_with("kun"))
        .map(str::to_owned)
        .collect()
}

/// Our filters on pods' interfaces, a line each.
fn filters_of(node: &Node) -> Vec<String> {
    let mut found = Vec::new();
    for name in pod_interfaces(node) {
        for direction in ["ingress", "egress"] {
            let mut tc = Command::new("tc");
            tc.args(["filter", "show", "dev", &name, direction]);
            let out = node.netns.output(tc).unwrap();
            let said = String::from_utf8_lossy(&out.stdout).into_owned();
            let ours = said.lines().filter(|line| line.contains("handle 0x1 "));
            found.extend(ours.map(|line| format!("{name} {direction}: {line}")));
        }
    }
    found
}

/// `ipam.interfaces` is for pods that are made from then on.
#[test]
fn pods_of_another_layout_stay_reachable() {
    let Some(mut node) = Node::start("layout") else {
        return;
    };
    let [one, other] = ["split", "shared"];
    for (before, after) in [(one, other), (other, one)] {
        node.terminate();
        node.configure(|config| config["ipam"]["interfaces"] = json!(before));
        node.spawn();
        let pod = node.pod(before);
        let ends = pod_interfaces(&node);
        node.terminate();
        node.configure(|config| config["ipam"]["interfaces"] = json!(after));
        node.spawn();
        // What the kernel drops with the first the agent puts back after the second.
        for end in &ends {
            node.netns.exec(&format!("link set {end} down")).unwrap();
            node.netns.exec(&format!("link set {end} up")).unwrap();
        }
        for address in [IpAddr::from(pod.v4), IpAddr::from(pod.v6)] {
            let answers = || {
                let mut ping = Command::new("ping");
                ping.args(["-c", "1", "-W", "1", &address.to_string()]);
                node.netns.output(ping).unwrap().status.success()
            };
            assert!(wait_until(SOON, answers), "{before}: {address}");
        }
        assert_eq!(pod_interfaces(&node), ends);
        node.remove(pod);
    }
}

/// What CHECK asks of the agent for a pod.
fn missing(node: &Node, name: &str, traffic: Traffic) -> Vec<String> {
    let key = AttachmentKey {
        network: "kun".into(),
        container_id: format!("container-{name}"),
        ifname: "eth0".into(),
    };
    match node.ask(&Request::Verify {
        key,
        host_interfaces: pod_interfaces(node),
        traffic,
    }) {
        Response::Done => Vec::new(),
        Response::NotAsExpected { missing } => missing,
        other => panic!("{other:?}"),
    }
}

/// The newer version's programs attach beside the older one's, which serve on until the newer ones do.
#[test]
fn what_an_older_version_pinned_goes_once_the_newer_serves() {
    let Some(mut node) = Node::start("abi") else {
        return;
    };
    let server = node.server("one");
    node.publish(&Service::new(&[&server]));
    let versions = || {
        let entries = fs::read_dir(node.pin_root()).unwrap();
        let mut names: Vec<String> = (entries.flatten())
            .map(|e| e.file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    let [ours] = versions().try_into().unwrap();
    let pins = node.pins();
    let root = node.pin_root();
    let pinned = |version: &str, object: &str| root.join(version).join(object);
    fs::create_dir(root.join("v0x")).unwrap();
    for cut_off in [false, true] {
        node.kill();
        fs::rename(root.join(&ours), root.join("v0")).unwrap();
        if cut_off {
            // As a kill amid the removal leaves it.
            fs::remove_dir_all(pinned("v0", "service").join("links")).unwrap();
        }
        node.spawn();
        let gone = wait_until(SOON, || !root.join("v0").exists());
        assert!(gone, "{}", node.log());
        let entries = fs::read_dir(&root).unwrap();
        assert_eq!(entries.count(), 2, "what is nobody's version stays");
        assert_eq!(node.pins(), pins);
        let inside = Inside::enter(&node);
        for vip in [VIP4, VIP6] {
            let seen = rig::names_over_tcp(&node.netns, at(vip, 80), 2);
            assert_eq!(seen, ["one"], "{vip}");
        }
        drop(inside);
    }
    // Also when all of it is to go.
    node.kill();
    fs::create_dir_all(pinned("v0", "service")).unwrap();
    node.run_agent(&["--cleanup"]);
    assert_eq!(node.pins(), 0);
    assert!(!root.join("v0").exists());
}

/// The queueing discipline stays, and is none the wiser: the kernel tells whoever listens.
#[test]
fn a_filter_that_somebody_took_away_is_missed_by_check_and_put_back() {
    let Some(node) = Node::start("filter") else {
        return;
    };
    let rate = 10_000_000;
    let limits = json!({"bandwidth": {"ingressRate": rate}});
    let pod = node.try_pod("limited", &limits).unwrap();
    let limit = RateLimit {
        rate: NonZeroU64::new(rate).unwrap(),
        burst: None,
    };
    let bandwidth = Bandwidth {
        ingress: Some(limit),
        egress: None,
    };
    let asked = Traffic {
        bandwidth,
        ..Traffic::default()
    };
    assert_eq!(
        missing(&node, "limited", asked.clone()),
        Vec::<String>::new()
    );
    let before = filters_of(&node);
    let interfaces = pod_interfaces(&node);
    let delete = |name: &str, priority: &[&str]| {
        let mut tc = Command::new("tc");
        tc.args(["filter", "del", "dev", name, "egress"])
            .args(priority);
        node.netns.output(tc).unwrap().status.success()
    };
    let taken = [("106", "limiting"), ("107", "service")];
    for (name, (priority, programs)) in interfaces.iter().zip(taken) {
        let line = format!("{name} carries no {programs} programs");
        // It is back within a second: perhaps before CHECK asked.
        let told = wait_until(SOON, || {
            delete(name, &["pref", priority]);
            missing(&node, "limited", asked.clone()).contains(&line)
        });
        assert!(told, "{line}");
    }
    let whole = || filters_of(&node).len() == before.len();
    assert!(wait_until(TOLD_WITHIN, whole), "{:?}", filters_of(&node));
    // All of a direction at once.
    assert!(delete(&interfaces[0], &[]));
    assert!(wait_until(TOLD_WITHIN, whole), "{:?}", filters_of(&node));
    assert_eq!(missing(&node, "limited", asked), Vec::<String>::new());
    // What was a limit's goes with it, and nobody puts it back.
    node.remove(pod);
    assert_eq!(filters_of(&node), Vec::<String>::new());
}

/// A host port is nothing on the pod's own interfaces: the agent alone knows whether it is served.
#[test]
fn a_host_port_that_is_not_served_is_missed_by_check() {
    let Some(node) = Node::start("hostport") else {
        return;
    };
    let mapping = |host_port| PortMapping {
        host_port: NonZeroU16::new(host_port).unwrap(),
        container_port: NonZeroU16::new(80).unwrap(),
        protocol: Transport::Tcp,
        host_ip: None,
    };
    let asked = |ports: &[u16]| Traffic {
        port_mappings: ports.iter().copied().map(mapping).collect(),
        ..Traffic::default()
    };
    let served =
        json!({"portMappings": [{"hostPort": 18080, "containerPort": 80, "protocol": "tcp"}]});
    let pod = node.try_pod("served", &served).unwrap();
    let none = Vec::<String>::new();
    assert_eq!(missing(&node, "served", asked(&[18080])), none);
    let missed = missing(&node, "served", asked(&[18080, 18081]));
    assert_eq!(missed, ["host port 18081 is not served"]);
    drop(pod);
}

/// Filters have no owner: anybody's `tc qdisc del` takes them away.
#[test]
fn programs_that_somebody_took_away_are_put_back() {
    let Some(node) = Node::start("heal") else {
        return;
    };
    let client = node.pod("client");
    let server = node.server("one");
    node.publish(&Service::new(&[&server]));
    let before = filters_of(&node);
    for name in pod_interfaces(&node) {
        let mut tc = Command::new("tc");
        tc.args(["qdisc", "del", "dev", &name, "clsact"]);
        assert!(node.netns.output(tc).unwrap().status.success(), "{name}");
    }
    assert_eq!(filters_of(&node), Vec::<String>::new());
    assert!(
        wait_until(TOLD_WITHIN, || filters_of(&node).len() == before.len()),
        "{:?}",
        filters_of(&node)
    );
    let inside = Inside::enter(&node);
    for vip in [VIP4, VIP6] {
        let seen = rig::names_over_udp(&client.netns, at(vip, 53), 4);
        assert_eq!(seen, ["one"], "{vip}");
    }
    drop(inside);
}

#[test]
fn what_is_wrong_at_start_is_one_clear_line() {
    let Some(mut node) = Node::start("wrong") else {
        return;
    };
    let one_line = |said: &str, part: &str| {
        let lines: Vec<&str> = said
            .lines()
            .filter(|l| l.starts_with("kun-proxy: "))
            .collect();
        assert_eq!(lines.len(), 1, "{said}");
        assert!(lines[0].contains(part), "{said}");
    };
    one_line(&node.run_agent(&[]), "another agent answers there");
    // The dead one's socket is still there, and no obstacle.
    node.kill();
    node.configure(|config| config["agent"]["bpffsRoot"] = "/tmp".into());
    one_line(&node.run_agent(&[]), "bpffs");
    node.configure(|config| config["cluster"]["folder"] = "/nowhere".into());
    one_line(&node.run_agent(&[]), "/nowhere");
    node.configure(|config| config["proxy"]["cgroupRoot"] = "/proc".into());
    one_line(&node.run_agent(&[]), "/proc");
    node.configure(|config| config["proxy"]["maxServices"] = "many".into());
    let said = node.run_agent(&["--check-config"]);
    assert!(said.contains("proxy.maxServices"), "{said}");
    let held = node
        .netns
        .run(|| std::net::TcpListener::bind("[::1]:0"))
        .unwrap();
    let address = held.local_addr().unwrap().to_string();
    node.configure(|config| config["agent"]["metrics"] = address.clone().into());
    one_line(&node.run_agent(&[]), &address);
    // An agent that never ran leaves nothing behind.
    node.configure(|_| {});
    node.run_agent(&["--cleanup"]);
    for (section, key) in [("proxy", "cgroupRoot"), ("cluster", "folder")] {
        node.configure(|config| config[section][key] = "/proc/none".into());
        one_line(&node.run_agent(&[]), "/proc/none");
        assert_eq!(node.pins(), 0, "{section}.{key}");
    }
    node.configure(|_| {});
    node.spawn();
}

#[test]
fn the_runtime_list_stands_once_pods_can_have_addresses_and_until_cleanup() {
    let Some(mut node) = Node::start("lists") else {
        return;
    };
    node.terminate();
    let conf = node.path("net.d");
    let (list, config) = (conf.join("10-kun.conflist"), conf.join("kun/kun.yaml"));
    node.flags = vec!["--cni-conf-dir".into(), conf.display().to_string()];

    // Synced and programmed, but the node has no block: a pod would get no address.
    let this = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-a"}});
    node.manifest("node.yaml", std::slice::from_ref(&this));
    node.spawn();
    wait_for("readiness", SOON, || node.ready().then_some(())).unwrap();
    assert!(!conf.exists(), "placed too early");

    let block = json!({"apiVersion": "kun.network/v1alpha1", "kind": "IPAMBlock", "metadata": {"name": "block-10-64-0-0"},
        "spec": {"first": "10.64.0.0", "node": "node-a"}});
    node.manifest("node.yaml", &[this, block]);
    let stands = || list.is_file().then_some(());
    wait_for("the list", SOON, stands).unwrap();
    let text = fs::read_to_string(&list).unwrap();
    assert!(text.contains(&config.display().to_string()), "{text}");
    assert_eq!(
        fs::read(&config).unwrap(),
        fs::read(node.path("kun.yaml")).unwrap()
    );

    // Without an agent the plugin works by itself: the list stays, after SIGKILL as after SIGTERM.
    node.kill();
    assert!(list.is_file());
    node.spawn();
    // Somebody's uninstaller took it for its own.
    fs::remove_file(&list).unwrap();
    wait_for("the list again", SOON, stands).unwrap();
    node.terminate();
    assert!(list.is_file());

    let said = node.run_agent(&["--cleanup", "--cni-conf-dir", &conf.display().to_string()]);
    assert!(!list.exists() && !config.exists(), "{said}");
    assert_eq!(fs::read_dir(&conf).unwrap().count(), 0, "{said}");
}

#[test]
fn a_runtime_list_that_names_no_kun_is_told_at_start() {
    let Some(mut node) = Node::start("lists-no") else {
        return;
    };
    node.terminate();
    let list = node.path("list");
    fs::write(&list, r#"{"plugins": [{"type": "bridge"}]}"#).unwrap();
    let (conf, list) = (
        node.path("net.d").display().to_string(),
        list.display().to_string(),
    );
    let said = node.run_agent(&["--cni-conf-dir", &conf, "--cni-conflist", &list]);
    assert!(said.contains("no plugin has the type `kun-cni`"), "{said}");
}
