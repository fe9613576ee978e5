//! Crashes, crowds and absences: what the plugin does when something is killed, slow, damaged or not there.

#![allow(missing_docs)]

mod node;

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::process::Stdio;
use std::time::Duration;

use kun_cni::ipam::IpamService;
use kun_cni::kernel::Kernel;
use kun_cni::spool::{Entry, Spool};
use kun_cni::{clock, host_interface_names, netns};
use kun_cni_core::ipam::Key;
use kun_cni_core::plan::{self, Facts, Op};
use kun_config::Interfaces;
use kun_config::types::{BlockId, Slot, SlotClass};
use kun_control::{AttachmentKey, PodRef, Request, Response, Traffic};
use kun_harness::{require_root, wait_for};
use node::{Node, Pod, address};
use serde_json::{Value, json};

fn key(pod: &Pod) -> AttachmentKey {
    AttachmentKey {
        network: "kun".into(),
        container_id: pod.id.clone(),
        ifname: "eth0".into(),
    }
}

fn counts(node: &Node) -> (u32, u32, u32) {
    node.service()
        .counts(SlotClass::Dual, clock::now())
        .unwrap()
}

/// Allocates as ADD does, and gives what ADD would make of it.
fn allocated(node: &Node, pod: &Pod) -> Facts {
    let request = Request::Allocate {
        key: key(pod),
        pod: PodRef::default(),
        class: Some(SlotClass::Dual),
        slot: None,
        within: Vec::new(),
        delegated: false,
        ports: Vec::new(),
    };
    let Response::Allocation { allocation } = node.service().handle(&request, clock::now()) else {
        panic!("no slot");
    };
    Facts {
        key: Key {
            container_id: pod.id.clone(),
            ifname: "eth0".into(),
            network: "kun".into(),
        },
        generation: allocation.generation,
        v6: allocation.v6,
        v4: allocation.v4,
        interfaces: Interfaces::Split,
        mtu: 1400,
        mac: None,
        local_ports: (64512, 65535),
    }
}

fn steps_of_add(facts: &Facts) -> Vec<Op> {
    let mut ops = plan::begin(&facts.draft().pairs(), facts.mtu);
    ops.extend(plan::link(&facts.pairs(), facts.local_ports));
    ops.extend(plan::finish(facts));
    ops
}

#[test]
fn a_crash_after_any_step_is_cleaned_by_del_and_add_works_again() {
    if !require_root() {
        return;
    }
    let node = Node::new("split");
    // Two slots a step, and none is reused within the test.
    let blocks: Vec<BlockId> = (0..4)
        .filter_map(|i| BlockId::new(Slot::from(std::net::Ipv4Addr::new(10, 64, i, 0))))
        .collect();
    node.service().set_blocks(&blocks, clock::now()).unwrap();
    let steps = {
        let pod = Pod::new("count", true);
        steps_of_add(&allocated(&node, &pod)).len()
    };
    for step in 0..=steps {
        let pod = Pod::new(&format!("c{step}"), true);
        let ops = steps_of_add(&allocated(&node, &pod));
        // As if killed here: nothing is undone.
        node.netns.run(|| {
            let inside = netns::Netns::open(&pod.netns.path()).unwrap();
            let mut kernel = Kernel::open(&inside).unwrap();
            kernel.apply(&ops[..step], &mut Vec::new()).unwrap();
        });
        node.del(&pod).unwrap();
        assert_eq!(node.leavings(), "", "after step {step}");
        let left = pod.netns.exec("-br link show type veth").unwrap();
        assert_eq!(left, "", "after step {step}");
        let result = node.add(&pod).unwrap();
        node.check(&pod, &result).unwrap();
        node.del(&pod).unwrap();
    }
    let (allocated, ..) = counts(&node);
    assert_eq!(allocated, 1, "only the one that counted");
}

#[test]
fn killed_at_any_moment_del_cleans() {
    if !require_root() {
        return;
    }
    let node = Node::new("split");
    let mut met = BTreeSet::new();
    // Killed when the first trace of each stage is seen.
    for (i, stage) in ["start", "first", "second", "routes"]
        .into_iter()
        .enumerate()
    {
        let pod = Pod::new(&format!("c{i}"), true);
        let hosts = host_interface_names(&key(&pod), SlotClass::Dual, Interfaces::Split);
        let path = pod.netns.path();
        let vars = pod.variables("ADD", &path);
        let vars: Vec<(&str, &str)> = vars.iter().map(|(n, v)| (*n, v.as_str())).collect();
        let mut command = node.command(&vars, pod.network(&node).to_string().as_bytes());
        let mut child = node.netns.run(|| {
            let child = command.stdout(Stdio::null()).spawn().unwrap();
            let links = "/proc/thread-self/net/dev";
            let routes = "/proc/thread-self/net/route";
            let seen = |file: &str, text: &str| {
                std::fs::read_to_string(file).is_ok_and(|all| all.contains(text))
            };
            // Spinning, not polling with a rest: the stages pass within microseconds.
            let end = std::time::Instant::now() + Duration::from_secs(10);
            while std::time::Instant::now() < end {
                let there = match stage {
                    "start" => true,
                    "first" => seen(links, &hosts[0]),
                    "second" => seen(links, &hosts[1]),
                    _ => seen(routes, &hosts[1]),
                };
                if there {
                    break;
                }
            }
            child
        });
        child.kill().unwrap();
        child.wait().unwrap();
        met.insert(node.leavings().is_empty());
        node.del(&pod).unwrap();
        assert_eq!(node.leavings(), "", "{stage}");
    }
    assert!(
        met.contains(&false),
        "no kill left anything: nothing was tested"
    );
    let (allocated, ..) = counts(&node);
    assert_eq!(allocated, 0);
}

#[test]
fn thirty_two_at_once_alone_get_thirty_two_addresses() {
    if !require_root() {
        return;
    }
    let node = Node::new("split");
    let pods: Vec<Pod> = (0..32).map(|i| Pod::new(&format!("c{i}"), true)).collect();
    let added: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = pods
            .iter()
            .map(|pod| scope.spawn(|| node.add(pod)))
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    let addresses: BTreeSet<_> = added
        .iter()
        .map(|result| address(result.as_ref().unwrap(), true).unwrap())
        .collect();
    assert_eq!(addresses.len(), 32);
    for pod in &pods {
        node.del(pod).unwrap();
    }
    assert_eq!(counts(&node), (0, 32, 32));
    assert_eq!(node.leavings(), "");
}

#[test]
fn a_released_address_is_not_used_again_while_it_cools() {
    if !require_root() {
        return;
    }
    let node = Node::new("shared");
    let first = Pod::new("c1", true);
    let before = address(&node.add(&first).unwrap(), false);
    node.del(&first).unwrap();
    let second = Pod::new("c2", true);
    assert_ne!(address(&node.add(&second).unwrap(), false), before);
}

#[test]
fn exhaustion_says_when_to_come_again() {
    if !require_root() {
        return;
    }
    let node = Node::new("shared");
    let service = node.service();
    for i in 0..64 {
        let request = Request::Allocate {
            key: AttachmentKey {
                network: "kun".into(),
                container_id: format!("other{i}"),
                ifname: "eth0".into(),
            },
            pod: PodRef::default(),
            class: Some(SlotClass::Dual),
            slot: None,
            within: Vec::new(),
            delegated: false,
            ports: Vec::new(),
        };
        service.handle(&request, clock::now());
        if i == 0 {
            let Request::Allocate { key, .. } = request else {
                unreachable!()
            };
            let release = Request::Release {
                key,
                generation: None,
            };
            assert_eq!(service.handle(&release, clock::now()), Response::Done);
        }
    }
    drop(service);
    let error = node.add(&Pod::new("c1", true)).unwrap_err();
    assert_eq!(error["code"], 11, "{error}");
    let details = error["details"].as_str().unwrap();
    assert!(
        details.contains("63 allocated, 1 cooling; the next is free in"),
        "{details}"
    );
    assert!(details.ends_with(" s; held by kun (63)"), "{details}");
    assert_eq!(node.leavings(), "");
}

#[test]
fn a_damaged_store_is_refused_and_left_and_del_is_spooled() {
    if !require_root() {
        return;
    }
    let node = Node::new("split");
    let pod = Pod::new("c1", true);
    node.add(&pod).unwrap();
    let file = node.state_dir().join(kun_cni::store::FILE);
    let good = std::fs::read(&file).unwrap();
    let mut bad = good.clone();
    for byte in &mut bad[..64] {
        *byte ^= 0x5a;
    }
    std::fs::write(&file, &bad).unwrap();

    let error = node.add(&Pod::new("c2", true)).unwrap_err();
    assert_eq!(error["code"], 102, "{error}");
    assert!(
        error["details"].as_str().unwrap().contains("ipam.redb"),
        "{error}"
    );
    assert_eq!(std::fs::read(&file).unwrap(), bad, "nothing was repaired");
    // The pod goes all the same; its slot waits in the spool, with its generation.
    node.del(&pod).unwrap();
    assert_eq!(node.leavings(), "");
    std::fs::write(&file, &good).unwrap();
    assert_eq!(counts(&node), (0, 1, 63), "opening drains the spool");
}

#[test]
fn with_an_agent_the_store_is_the_agents() {
    if !require_root() {
        return;
    }
    let node = Node::new("split");
    let pod = Pod::new("c1", true);
    let agent = node.agent(5);
    let result = node.add(&pod).unwrap();
    node.check(&pod, &result).unwrap();
    node.del(&pod).unwrap();
    let asked = agent.join().unwrap();
    let expected = [
        Request::Allocate {
            key: key(&pod),
            pod: PodRef {
                namespace: "default".into(),
                name: "c1".into(),
                uid: String::new(),
            },
            class: Some(SlotClass::Dual),
            slot: None,
            within: Vec::new(),
            delegated: false,
            ports: Vec::new(),
        },
        Request::Attached {
            key: key(&pod),
            host_interfaces: host_interface_names(&key(&pod), SlotClass::Dual, Interfaces::Split),
            traffic: Traffic::default(),
        },
        Request::Lookup { key: key(&pod) },
        Request::Verify {
            key: key(&pod),
            host_interfaces: host_interface_names(&key(&pod), SlotClass::Dual, Interfaces::Split),
            traffic: Traffic::default(),
        },
        Request::Release {
            key: key(&pod),
            generation: Some(1),
        },
    ];
    assert_eq!(asked, expected);
}

#[test]
fn an_agent_that_refuses_the_interfaces_fails_add_and_nothing_stays() {
    if !require_root() {
        return;
    }
    let node = Node::new("split");
    let pod = Pod::new("c1", true);
    let listener = UnixListener::bind(node.parsed().agent.socket).unwrap();
    let service = node.service();
    let agent = std::thread::spawn(move || {
        // The ADD's connection, then the undo's.
        for _ in 0..2 {
            let (stream, _) = listener.accept().unwrap();
            let mut writer = stream.try_clone().unwrap();
            for line in BufReader::new(stream).lines() {
                let request: Request = serde_json::from_str(&line.unwrap()).unwrap();
                let response = match &request {
                    Request::Attached { .. } => Response::Failed {
                        message: "no room for programs".into(),
                    },
                    other => service.handle(other, clock::now()),
                };
                writeln!(writer, "{}", serde_json::to_string(&response).unwrap()).unwrap();
            }
        }
    });
    let error = node.add(&pod).unwrap_err();
    assert_eq!(error["details"], "no room for programs");
    agent.join().unwrap();
    assert_eq!(node.leavings(), "");
    assert_eq!(counts(&node), (0, 1, 63));
}

#[test]
fn del_while_the_agent_is_gone_and_the_store_is_held_is_spooled_with_its_generation() {
    if !require_root() {
        return;
    }
    let node = Node::new("split");
    let pod = Pod::new("c1", true);
    node.add(&pod).unwrap();
    // An agent that is stuck: it has the store, and its socket breaks off.
    let service = node.service();
    let listener = UnixListener::bind(node.parsed().agent.socket).unwrap();
    let stuck = std::thread::spawn(move || drop(listener.accept().unwrap()));
    node.del(&pod).unwrap();
    stuck.join().unwrap();
    let spool = node.state_dir().join(kun_cni::spool::DIRECTORY);
    let entry = std::fs::read_dir(&spool).unwrap().next().unwrap().unwrap();
    let entry: Value = serde_json::from_slice(&std::fs::read(entry.path()).unwrap()).unwrap();
    assert_eq!(entry["generation"], 1);
    let live = || service.live(clock::now()).unwrap().len();
    assert_eq!(live(), 1);
    // The next command drains it before anything else.
    service.tick(clock::now()).unwrap();
    assert_eq!(live(), 0);
    assert_eq!(std::fs::read_dir(&spool).unwrap().count(), 0);
}

/// A release that was spooled while its attachment was being added again: the agent had let the first allocation go and could not say so.
#[test]
fn a_spooled_release_that_comes_late_frees_no_newer_allocation() {
    let dir = tempfile::tempdir().unwrap();
    let text = "node: {name: n}\nipam: {v4Pools: [10.64.0.0/16], cooldown: 30s}\n";
    let config = kun_config::parse("kun.yaml", text).unwrap();
    let now = clock::now();
    let open = || IpamService::open(dir.path(), &config, clock::boot().unwrap(), now).unwrap();
    let service = open();
    let block = BlockId::new(Slot(0x0a40_0000)).expect("aligned");
    service.set_blocks(&[block], now).unwrap();
    let key = AttachmentKey {
        network: "kun".into(),
        container_id: "c1".into(),
        ifname: "eth0".into(),
    };
    let allocate = || {
        let request = Request::Allocate {
            key: key.clone(),
            pod: PodRef::default(),
            class: Some(SlotClass::Dual),
            slot: None,
            within: Vec::new(),
            delegated: false,
            ports: Vec::new(),
        };
        match service.handle(&request, now) {
            Response::Allocation { allocation } => allocation,
            other => panic!("{other:?}"),
        }
    };
    let first = allocate();
    let release = Request::Release {
        key: key.clone(),
        generation: Some(first.generation),
    };
    assert_eq!(service.handle(&release, now), Response::Done);
    let second = allocate();
    let spool = Spool::new(dir.path());
    let entry = Entry {
        key: Key {
            container_id: key.container_id.clone(),
            ifname: key.ifname.clone(),
            network: key.network.clone(),
        },
        generation: Some(first.generation),
    };
    spool.put(&entry).unwrap();
    service.tick(now).unwrap();
    assert_eq!(spool.entries().len(), 0, "it is drained");
    assert_eq!(
        service.live(now).unwrap().as_slice(),
        std::slice::from_ref(&second)
    );
    // The same where opening the store drains it.
    spool.put(&entry).unwrap();
    drop(service);
    let service = open();
    assert_eq!(spool.entries(), []);
    assert_eq!(service.live(now).unwrap(), [second]);
}

#[test]
fn gc_removes_what_is_not_valid_and_nothing_else() {
    if !require_root() {
        return;
    }
    let node = Node::new("split");
    let (stays, goes) = (Pod::new("c1", true), Pod::new("c2", true));
    let result = node.add(&stays).unwrap();
    node.add(&goes).unwrap();
    let mut network = node.network();
    network["cni.dev/valid-attachments"] = json!([{"containerID": "c1", "ifname": "eth0"}]);
    let vars = [("CNI_COMMAND", "GC"), ("CNI_PATH", "/opt/cni/bin")];
    let out = node.execute(&vars, network.to_string().as_bytes());
    assert_eq!(node::answer(&out), Ok(None));
    node.check(&stays, &result).unwrap();
    assert_eq!(counts(&node), (1, 1, 62));
    let left = goes.netns.exec("-br link show type veth").unwrap();
    assert_eq!(left, "");
    // Another network's list says nothing about ours.
    network["name"] = "other".into();
    network["cni.dev/valid-attachments"] = json!([]);
    let out = node.execute(&vars, network.to_string().as_bytes());
    assert_eq!(node::answer(&out), Ok(None));
    node.check(&stays, &result).unwrap();
}

/// One DEL that cannot be done keeps no other from being done (CNI §2 GC), and is told.
#[test]
fn gc_carries_on_past_what_it_cannot_remove() {
    if !require_root() {
        return;
    }
    let node = Node::new("split");
    // In the order in which they are gone through.
    let pods = ["c1", "c2", "c3"].map(|id| Pod::new(id, true));
    for pod in &pods {
        node.add(pod).unwrap();
    }
    let kept = &host_interface_names(&key(&pods[0]), SlotClass::Dual, Interfaces::Split)[0];
    node.netns
        .exec(&format!("link set {kept} alias somebodys"))
        .unwrap();
    let mut network = node.network();
    network["cni.dev/valid-attachments"] = json!([]);
    let error = node.verb("GC", &pods[0], &network).unwrap_err();
    assert!(error.to_string().contains(kept.as_str()), "{error}");
    for pod in &pods[1..] {
        let left = pod.netns.exec("-br link show type veth").unwrap();
        assert_eq!(left, "", "of {}", pod.id);
    }
    // What still has an interface keeps its slot.
    assert_eq!(counts(&node), (1, 2, 61));
}

#[test]
fn status_is_not_available_without_a_slot() {
    if !require_root() {
        return;
    }
    let node = Node::new("split");
    let vars = [("CNI_COMMAND", "STATUS")];
    let network = node.network().to_string();
    // The default class of this node has a block.
    assert_eq!(
        node::answer(&node.execute(&vars, network.as_bytes())),
        Ok(None)
    );
    node.service().set_blocks(&[], clock::now()).unwrap();
    let error = node::answer(&node.execute(&vars, network.as_bytes())).unwrap_err();
    assert_eq!(error["code"], 50, "{error}");
}

#[test]
fn the_store_waits_for_the_one_who_has_it() {
    let node_dir = tempfile::tempdir().unwrap();
    let config = kun_config::parse("kun.yaml", "node: {name: n}\n").unwrap();
    let open = |wait| {
        IpamService::open_within(
            node_dir.path(),
            &config,
            clock::boot().unwrap(),
            clock::now(),
            wait,
        )
    };
    let first = open(Duration::ZERO).unwrap();
    let error = open(Duration::from_millis(50)).unwrap_err().to_string();
    assert!(
        error.contains("another process has had the store"),
        "{error}"
    );
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| open(Duration::from_secs(10)).map(drop));
        drop(first);
        wait_for("the second", Duration::from_secs(5), || {
            waiting.is_finished().then_some(())
        })
        .unwrap();
        waiting.join().unwrap().unwrap();
    });
}

#[test]
fn verbs_younger_than_the_configuration_are_refused() {
    if !require_root() {
        return;
    }
    let node = Node::new("split");
    let pod = Pod::new("c1", true);
    for (verb, version) in [("CHECK", "0.3.1"), ("STATUS", "1.0.0"), ("GC", "1.0.0")] {
        let mut network = node.network();
        network["cniVersion"] = version.into();
        let error = node.verb(verb, &pod, &network).unwrap_err();
        assert_eq!(error["code"], 1, "{error}");
        assert_eq!(error["cniVersion"], version);
    }
}

#[test]
fn what_many_callers_were_told_is_in_the_store() {
    let dir = tempfile::tempdir().unwrap();
    let text = "node: {name: n}\nipam: {v4Pools: [10.64.0.0/16], cooldown: 30s}\n";
    let config = kun_config::parse("kun.yaml", text).unwrap();
    let open =
        || IpamService::open(dir.path(), &config, clock::boot().unwrap(), clock::now()).unwrap();
    let service = open();
    let block = |i: u32| BlockId::new(Slot(0x0a40_0000 + i * 64)).expect("aligned");
    service
        .set_blocks(&[block(0), block(1), block(2), block(3)], clock::now())
        .unwrap();
    let mut told: Vec<kun_control::Allocation> = std::thread::scope(|scope| {
        let callers: Vec<_> = (0..40)
            .map(|caller| {
                let service = &service;
                scope.spawn(move || {
                    (0..5)
                        .filter_map(|n| {
                            let key = AttachmentKey {
                                network: "kun".into(),
                                container_id: format!("{caller}-{n}"),
                                ifname: "eth0".into(),
                            };
                            let allocate = Request::Allocate {
                                key: key.clone(),
                                pod: PodRef::default(),
                                class: Some(SlotClass::Dual),
                                slot: None,
                                within: Vec::new(),
                                delegated: false,
                                ports: Vec::new(),
                            };
                            let response = service.handle(&allocate, clock::now());
                            let Response::Allocation { allocation } = response else {
                                panic!("{response:?}")
                            };
                            let generation = Some(allocation.generation);
                            let release = Request::Release { key, generation };
                            // Every other one goes again.
                            if n % 2 == 1 {
                                service.handle(&release, clock::now());
                                return None;
                            }
                            Some(allocation)
                        })
                        .collect::<Vec<_>>()
                })
            })
            .collect();
        callers
            .into_iter()
            .flat_map(|caller| caller.join().unwrap())
            .collect()
    });
    drop(service);
    let mut stored = open().live(clock::now()).unwrap();
    told.sort_by_key(|a| a.slot);
    stored.sort_by_key(|a| a.slot);
    assert_eq!(told.len(), 120);
    assert_eq!(told, stored);
}
