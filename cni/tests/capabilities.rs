//! What runtimes and pods may ask for, from stdin to the kernel and to the agent, and how it is refused.

#![allow(missing_docs)]

mod node;

use std::io::Read;
use std::process::Stdio;
use std::time::{Duration, Instant};

use kun_config::types::SlotClass;
use kun_control::Request;
use kun_harness::require_root;
use node::{Node, Pod, address};
use serde_json::{Value, json};

/// ADD with more in `runtimeConfig`.
fn add(node: &Node, pod: &Pod, more: Value) -> Result<Value, Value> {
    let mut network = pod.network(node);
    for (key, value) in more.as_object().unwrap() {
        network["runtimeConfig"][key] = value.clone();
    }
    node.verb("ADD", pod, &network)
        .map(|v| v.expect("ADD has a result"))
}

fn details(error: &Value) -> &str {
    error["details"].as_str().unwrap()
}

#[test]
fn a_fixed_address_is_given_once_and_cools_like_any_other() {
    if !require_root() {
        return;
    }
    let node = Node::new("split");
    let (first, second) = (Pod::new("c1", true), Pod::new("c2", true));
    let ips = json!({"ips": ["10.64.0.9/26", "fd00:64::a40:9/122"]});
    let result = add(&node, &first, ips.clone()).unwrap();
    assert_eq!(address(&result, false).as_deref(), Some("10.64.0.9"));
    assert_eq!(address(&result, true).as_deref(), Some("fd00:64::a40:9"));
    let error = add(&node, &second, ips.clone()).unwrap_err();
    assert_eq!(error["code"], 11, "{error}");
    assert_eq!(
        details(&error),
        "10.64.0.9 (fd00:64::a40:9) is in use by pod default/c1; it can be had some time after that is gone"
    );
    node.del(&first).unwrap();
    let error = add(&node, &second, ips).unwrap_err();
    assert_eq!(error["code"], 11, "{error}");
    assert!(
        details(&error).contains("was released and cools; it is free in"),
        "{error}"
    );
    let table = [
        (
            json!({"ips": ["10.65.0.9"]}),
            7,
            "10.65.0.9 (fd00:64::a41:9) is in no block of this node",
        ),
        (
            json!({"ips": ["10.64.0.9", "fd00:64::a40:8"]}),
            7,
            "ips: 10.64.0.9, fd00:64::a40:8 cannot be had; a pod's IPv6 address ends in its IPv4 address",
        ),
        (
            json!({"ips": ["2001:db8::1"]}),
            7,
            "ips: 2001:db8::1 cannot be had; an IPv6 address lies under ipam.podPrefix",
        ),
    ];
    for (more, code, words) in table {
        let error = add(&node, &second, more).unwrap_err();
        assert_eq!(error["code"], code, "{error}");
        assert!(details(&error).starts_with(words), "{error}");
    }
    assert_eq!(node.leavings(), "");
}

#[test]
fn an_address_out_of_a_range_and_a_hardware_address_by_wish() {
    if !require_root() {
        return;
    }
    let node = Node::new("split");
    let pod = Pod::new("c1", true);
    let more = json!({
        "ipRanges": [[{"subnet": "10.64.0.0/26", "rangeStart": "10.64.0.40"}]],
        "mac": "02:00:00:00:be:ef",
        "dns": {"servers": ["192.0.2.53"], "searches": ["shop.svc"]},
    });
    let result = add(&node, &pod, more.clone()).unwrap();
    assert_eq!(address(&result, false).as_deref(), Some("10.64.0.40"));
    assert_eq!(result["interfaces"][0]["mac"], "02:00:00:00:be:ef");
    assert_eq!(
        result["dns"],
        json!({"nameservers": ["192.0.2.53"], "search": ["shop.svc"]})
    );
    let shown = pod.netns.exec("-br link show eth0").unwrap();
    assert!(shown.contains("02:00:00:00:be:ef"), "{shown}");
    // The node's static neighbour entry is of that address, and CHECK knows it.
    let mut network = pod.network(&node);
    for (key, value) in more.as_object().unwrap() {
        network["runtimeConfig"][key] = value.clone();
    }
    network["prevResult"] = result.clone();
    assert_eq!(node.verb("CHECK", &pod, &network), Ok(None));
    let host = result["interfaces"][2]["name"].as_str().unwrap();
    let neighbours = node.netns.exec(&format!("neigh show dev {host}")).unwrap();
    assert!(neighbours.contains("02:00:00:00:be:ef"), "{neighbours}");
}

/// With the store and with the agent.
#[test]
fn ranges_that_lie_elsewhere_are_named_with_the_blocks_that_the_node_has() {
    if !require_root() {
        return;
    }
    let node = Node::new("split");
    let table = [
        (
            true,
            json!([[{"subnet": "10.65.0.0/24", "rangeStart": "10.65.0.9"}]]),
            "ipRanges 10.65.0.9-10.65.0.255: this node has none of these addresses; of slots with IPv4 it gives out 10.64.0.0/26 and fd00:64::a40:0/122: ask for a range in those, or for none",
        ),
        (
            false,
            json!([[{"subnet": "fd00:64::f001:0/120"}]]),
            "ipRanges fd00:64::f001:0-fd00:64::f001:ff: this node has none of these addresses; of IPv6-only slots it gives out fd00:64::f000:40/122: ask for a range in those, or for none",
        ),
    ];
    let refused = |id: &str| {
        for (ipv4, ranges, words) in &table {
            let error = add(&node, &Pod::new(id, *ipv4), json!({"ipRanges": ranges})).unwrap_err();
            assert_eq!((&error["code"], details(&error)), (&json!(7), *words));
        }
    };
    refused("alone");
    let agent = node.agent(2);
    refused("agent");
    agent.join().unwrap();
    // One that is in use, or cools, is waited for.
    let pod = Pod::new("c1", true);
    let one = json!({"ipRanges": [[{"subnet": "10.64.0.0/24", "rangeStart": "10.64.0.63"}]]});
    add(&node, &pod, one.clone()).unwrap();
    let error = add(&node, &Pod::new("c2", true), one).unwrap_err();
    assert_eq!(error["code"], 11, "{error}");
    node.del(&pod).unwrap();
    assert_eq!(node.leavings(), "");
}

#[test]
fn limits_and_host_ports_reach_the_agent_and_are_refused_without_one() {
    if !require_root() {
        return;
    }
    let node = Node::new("split");
    let pod = Pod::new("c1", true);
    let more = json!({
        "bandwidth": {"ingressRate": 10_000_000, "egressRate": 5_000_000, "egressBurst": 80_000},
        "portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "udp", "hostIP": "::"}],
    });
    let error = add(&node, &pod, more.clone()).unwrap_err();
    assert_eq!(error["code"], 11, "{error}");
    assert!(
        details(&error)
            .starts_with("bandwidth, portMappings: the node agent does this, and none answers at "),
        "{error}"
    );
    assert_eq!(node.leavings(), "");
    let agent = node.agent(2);
    add(&node, &pod, more).unwrap();
    let asked = agent.join().unwrap();
    let Some(Request::Attached { traffic, .. }) = asked.last() else {
        panic!("{asked:?}")
    };
    assert_eq!(
        serde_json::to_value(traffic).unwrap(),
        json!({
            "bandwidth": {
                "ingress": {"rate": 10_000_000, "burst": null},
                "egress": {"rate": 5_000_000, "burst": 80_000},
            },
            "portMappings": [
                {"hostPort": 8080, "containerPort": 80, "protocol": "udp", "hostIp": "::"}
            ],
        })
    );
}

/// With an agent or without, now or later: no program translates it.
#[test]
fn a_host_port_of_sctp_is_refused_before_anything_is_made() {
    if !require_root() {
        return;
    }
    let node = Node::new("split");
    let pod = Pod::new("c1", true);
    let ports = |protocol: &str| {
        json!({"portMappings": [
            {"hostPort": 8080, "containerPort": 80, "protocol": "tcp"},
            {"hostPort": 3868, "containerPort": 3868, "protocol": protocol},
        ]})
    };
    let error = add(&node, &pod, ports("sctp")).unwrap_err();
    assert_eq!(error["code"], 2, "{error}");
    assert!(
        details(&error).starts_with("portMappings: host port 3868 for SCTP: "),
        "{error}"
    );
    assert_eq!(node.leavings(), "");
    let (allocated, ..) = node
        .service()
        .counts(SlotClass::Dual, kun_cni::clock::now())
        .unwrap();
    assert_eq!(allocated, 0, "a slot was taken");
    // The same ports of TCP lack the agent alone.
    let error = add(&node, &pod, ports("tcp")).unwrap_err();
    assert_eq!(error["code"], 11, "{error}");
}

#[test]
fn an_agent_that_misses_programs_fails_check_and_one_without_slots_fails_status() {
    if !require_root() {
        return;
    }
    use kun_control::Response;
    use std::io::{BufRead, BufReader, Write};

    let node = Node::new("split");
    let pod = Pod::new("c1", true);
    let result = node.add(&pod).unwrap();
    let listener = std::os::unix::net::UnixListener::bind(node.parsed().agent.socket).unwrap();
    let service = node.service();
    let agent = std::thread::spawn(move || {
        // CHECK's two connections, then STATUS's.
        for _ in 0..3 {
            let (stream, _) = listener.accept().unwrap();
            let mut writer = stream.try_clone().unwrap();
            for line in BufReader::new(stream).lines() {
                let request: Request = serde_json::from_str(&line.unwrap()).unwrap();
                let response = match &request {
                    Request::Verify { .. } => Response::NotAsExpected {
                        missing: vec!["kun6: no program".to_owned()],
                    },
                    Request::Capacity { class: None } => Response::Capacity {
                        allocated: 60,
                        cooling: 4,
                        free: 0,
                    },
                    other => service.handle(other, kun_cni::clock::now()),
                };
                writeln!(writer, "{}", serde_json::to_string(&response).unwrap()).unwrap();
            }
        }
    });
    let error = node.check(&pod, &result).unwrap_err();
    assert_eq!(error["code"], 101, "{error}");
    assert_eq!(details(&error), "not as ADD left it: kun6: no program");
    let vars = [("CNI_COMMAND", "STATUS")];
    let network = node.network().to_string();
    let error = node::answer(&node.execute(&vars, network.as_bytes())).unwrap_err();
    assert_eq!(error["code"], 50, "{error}");
    assert_eq!(
        details(&error),
        "no slot is free: 60 allocated, 4 cooling; `kunctl ipam` shows whose"
    );
    agent.join().unwrap();
}

#[test]
fn version_repeats_the_callers_and_does_not_wait_for_an_open_stdin() {
    let run = |stdin: Stdio| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_kun-cni"));
        command
            .env_clear()
            .env("CNI_COMMAND", "VERSION")
            .stdin(stdin)
            .stdout(Stdio::piped());
        command.spawn().unwrap()
    };
    let told = |mut child: std::process::Child| {
        let mut text = String::new();
        child
            .stdout
            .take()
            .unwrap()
            .read_to_string(&mut text)
            .unwrap();
        assert!(child.wait().unwrap().success());
        let value: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(
            value["supportedVersions"],
            json!(["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"])
        );
        value["cniVersion"].as_str().unwrap().to_owned()
    };
    // Whole, ended; and with everything else a configuration has.
    for (stdin, version) in [
        ("{\"cniVersion\":\"0.4.0\"}", "0.4.0"),
        ("{\"cniVersion\":\"1.0.0\",\"name\":\"x\"}\n", "1.0.0"),
        ("{\"cniVersion\":\"0.2.0\"}", "0.2.0"),
        ("", "1.1.0"),
        ("nonsense", "1.1.0"),
        ("{\"cniVersion\":7}", "1.1.0"),
    ] {
        let file = node::file_with(stdin.as_bytes());
        assert_eq!(told(run(file.into())), version, "{stdin}");
    }
    // Written late, and never closed.
    let mut child = run(Stdio::piped());
    let mut stdin = child.stdin.take().unwrap();
    std::io::Write::write_all(&mut stdin, b"{\"cniVersion\":\"0.3.1\"}").unwrap();
    assert_eq!(told(child), "0.3.1");
    drop(stdin);
    // Never written, never closed.
    let begin = Instant::now();
    let mut child = run(Stdio::piped());
    let stdin = child.stdin.take().unwrap();
    assert_eq!(told(child), "1.1.0");
    assert!(begin.elapsed() < Duration::from_secs(10));
    drop(stdin);
}

#[test]
fn an_error_is_told_in_the_configurations_version_and_an_old_caller_gets_code_1() {
    if !require_root() {
        return;
    }
    let node = Node::new("split");
    let told = |vars: &[(&str, &str)], stdin: &str| {
        node::answer(&node.execute(vars, stdin.as_bytes())).unwrap_err()
    };
    // The environment is judged first, and in that version.
    let error = told(
        &[("CNI_COMMAND", "ADD")],
        "{\"cniVersion\":\"0.4.0\",\"name\":\"kun\",\"type\":\"kun-cni\"}",
    );
    assert_eq!(
        (error["code"].clone(), error["cniVersion"].clone()),
        (json!(4), json!("0.4.0"))
    );
    let error = told(
        &[
            ("CNI_COMMAND", "ADD"),
            ("CNI_CONTAINERID", "c"),
            ("CNI_NETNS", "/n"),
            ("CNI_IFNAME", "eth0"),
        ],
        "{\"cniVersion\":\"1.0.0\"}",
    );
    assert_eq!(
        (error["code"].clone(), error["cniVersion"].clone()),
        (json!(7), json!("1.0.0"))
    );
    let pod = Pod::new("c1", true);
    for version in ["0.1.0", "0.2.0", "1.2.0", ""] {
        let mut network = pod.network(&node);
        network["cniVersion"] = version.into();
        for verb in ["ADD", "DEL", "CHECK", "GC", "STATUS"] {
            let error = node.verb(verb, &pod, &network).unwrap_err();
            assert_eq!(error["code"], 1, "{verb} {version}: {error}");
            let asked = match version {
                "" => "cniVersion: missing, which stands for 0.1.0, and that".to_owned(),
                version => format!("cniVersion `{version}`"),
            };
            assert_eq!(
                error["details"],
                format!("{asked} is not supported; supported: 0.3.0, 0.3.1, 0.4.0, 1.0.0, 1.1.0")
            );
        }
    }
    assert_eq!(node.leavings(), "");
}

/// Golden: what a person reads when an ADD is refused.
#[test]
fn refusals_name_the_thing_and_the_remedy() {
    if !require_root() {
        return;
    }
    let node = Node::new("split");
    let pod = Pod::new("c1", true);
    let vars = |netns: &str, ifname: &str| {
        vec![
            ("CNI_COMMAND", "ADD".to_owned()),
            ("CNI_CONTAINERID", "c1".to_owned()),
            ("CNI_NETNS", netns.to_owned()),
            ("CNI_IFNAME", ifname.to_owned()),
        ]
    };
    let file = node.config.display().to_string();
    let mut wrong = pod.network(&node);
    wrong["kunConfig"] = "/nonexistent/kun.yaml".into();
    let mut long = pod.network(&node);
    long["name"] = "n".repeat(97).into();
    let netns = pod.netns.path().display().to_string();
    let mut of_long = vars(&netns, "eth0");
    of_long[1].1 = "c".repeat(241);
    let table = [
        (
            of_long.clone(),
            pod.network(&node),
            4,
            "CNI_CONTAINERID has 241 bytes; it has at most 96: it stands in the aliases of the container's interfaces, beside the network's name".to_owned(),
        ),
        (
            vars(&netns, "eth0"),
            long.clone(),
            7,
            "name: 97 bytes, more than 96; give the network a shorter name: it stands in the aliases of pods' interfaces, beside the container's id".to_owned(),
        ),
        (
            vars("/run/netns/gone", "eth0"),
            pod.network(&node),
            8,
            "CNI_NETNS /run/netns/gone: No such file or directory (os error 2); it is the path of the pod's network namespace".to_owned(),
        ),
        (
            vars(&file, "eth0"),
            pod.network(&node),
            8,
            format!("CNI_NETNS {file}: not a namespace"),
        ),
        (
            vars("/proc/self/ns/net", "eth0"),
            pod.network(&node),
            8,
            "CNI_NETNS /proc/self/ns/net: this is the node's own network namespace".to_owned(),
        ),
        (
            vars(&netns, "lo"),
            pod.network(&node),
            100,
            "the pod has an interface lo already; a runtime calls DEL before it calls ADD again".to_owned(),
        ),
        (
            vars(&netns, "eth/0"),
            pod.network(&node),
            4,
            "CNI_IFNAME `eth/0` is invalid; an interface name has 1 to 15 bytes, is not `.` or `..`, and has no `/`, `:` or space".to_owned(),
        ),
        (
            vars(&netns, "eth0"),
            wrong,
            7,
            "/nonexistent/kun.yaml: cannot be read (No such file or directory (os error 2)); `kunConfig` in the network configuration, or --config by hand, names kun.yaml".to_owned(),
        ),
    ];
    for (vars, network, code, words) in table {
        let vars: Vec<(&str, &str)> = vars.iter().map(|(n, v)| (*n, v.as_str())).collect();
        let out = node.execute(&vars, network.to_string().as_bytes());
        let error = node::answer(&out).unwrap_err();
        assert_eq!(error["code"], code, "{error}");
        assert_eq!(details(&error), words);
        assert_eq!(error["cniVersion"], "1.1.0");
    }
    // DEL works, also of what an earlier version made.
    for (mut vars, network) in [(of_long, pod.network(&node)), (vars(&netns, "eth0"), long)] {
        vars[0].1 = "DEL".to_owned();
        let vars: Vec<(&str, &str)> = vars.iter().map(|(n, v)| (*n, v.as_str())).collect();
        let out = node.execute(&vars, network.to_string().as_bytes());
        assert_eq!(node::answer(&out), Ok(None));
    }
    assert_eq!(node.leavings(), "");
}

/// A second ADD with other parameters is a second ADD.
#[test]
fn a_duplicate_add_with_other_parameters_changes_nothing() {
    if !require_root() {
        return;
    }
    let node = Node::new("split");
    let pod = Pod::new("c1", true);
    let result = node.add(&pod).unwrap();
    for more in [
        json!({"ips": ["10.64.0.33"]}),
        json!({"mac": "02:00:00:00:00:09"}),
        json!({"io.kubernetes.cri.pod-annotations": {"kun.network/ipv4": "false"}}),
    ] {
        let error = add(&node, &pod, more).unwrap_err();
        assert_eq!(
            details(&error),
            "the pod has an interface eth0 already; a runtime calls DEL before it calls ADD again"
        );
    }
    node.check(&pod, &result).unwrap();
    // With the interfaces gone and the slot still allocated, another address is refused and nothing is taken back.
    pod.netns.exec("link del eth0").unwrap();
    pod.netns.exec("link del eth1").unwrap();
    let error = add(&node, &pod, json!({"ips": ["10.64.0.33"]})).unwrap_err();
    assert_eq!(error["code"], 7, "{error}");
    assert!(
        details(&error).starts_with("the attachment has the slot 10.64.0.0 already"),
        "{error}"
    );
    let again = node.add(&pod).unwrap();
    assert_eq!(address(&again, false), address(&result, false));
}
