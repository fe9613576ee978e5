//! Nodes without an agent: addresses come back all the same, when time has passed and nothing knows them.

#![allow(missing_docs)]

mod node;

use std::cell::RefCell;
use std::net::Ipv4Addr;

use kun_cni::clock;
use kun_cni::spool::Spool;
use kun_config::types::Slot;
use kun_control::{AttachmentKey, PodRef, Request, Response};
use kun_harness::require_root;
use node::{DUAL, Node, Pod, address};
use serde_json::{Value, json};

/// More pods than a block has slots.
const PODS: usize = 64 + 8;

/// A node whose addresses need not rest: what is tried here is evidence.
fn node() -> Node {
    let node = Node::new("shared");
    let text = std::fs::read_to_string(&node.config).unwrap();
    let text = text.replace(&format!("cooldown: {}", node::COOLDOWN), "cooldown: 0s");
    let pins = node.dir.path().join("bpf");
    let text = format!("{text}  bpffsRoot: {}\n", pins.display());
    assert!(text.contains("cooldown: 0s"));
    std::fs::write(&node.config, text).unwrap();
    node
}

/// Nobody but the plugin is there to read which blocks the node has.
#[test]
fn listed_blocks_are_taken_by_the_plugin() {
    if !require_root() {
        return;
    }
    let node = Node::without_blocks("split");
    let pod = Pod::new("c1", true);
    let status = || {
        let vars = [("CNI_COMMAND", "STATUS")];
        node::answer(&node.execute(&vars, node.network().to_string().as_bytes()))
    };
    let refused = status().unwrap_err();
    assert!(details(&refused).contains("no slot is free"), "{refused}");
    let error = node.add(&pod).unwrap_err();
    assert_eq!(error["code"], 11, "{error}");
    let block = |first: &str, node: &str| {
        format!(
            "apiVersion: kun.network/v1alpha1\nkind: IPAMBlock\nmetadata: {{name: block-{}}}\nspec: {{first: {first}, node: {node}}}\n",
            first.replace('.', "-")
        )
    };
    let manifests = node.dir.path().join("manifests");
    let text = [block("10.64.0.64", "other"), block("10.64.0.128", "bench")].join("---\n");
    std::fs::write(manifests.join("blocks.yaml"), &text).unwrap();
    assert!(node.add(&pod).is_err(), "other nodes' blocks");
    let mine = [block("10.64.0.192", "\"n\""), block("240.0.0.64", "\"n\"")].join("---\n");
    std::fs::write(manifests.join("mine.yaml"), mine).unwrap();
    // What is wrong in a file may be what says whose the block is.
    std::fs::write(manifests.join("0.yaml"), "kind: [").unwrap();
    let error = node.add(&pod).unwrap_err();
    assert!(details(&error).contains("0.yaml"), "{error}");
    std::fs::remove_file(manifests.join("0.yaml")).unwrap();
    status().unwrap();
    let result = node.add(&pod).unwrap();
    assert_eq!(address(&result, false).unwrap(), "10.64.0.192");
    node.add(&Pod::new("c2", false)).unwrap();
}

/// All but so many slots of the block are somebody's.
fn leave(node: &Node, free: u32) {
    let service = node.service();
    for number in free..64 {
        let request = Request::Allocate {
            key: AttachmentKey {
                network: "others".into(),
                container_id: format!("other{number}"),
                ifname: "eth0".into(),
            },
            pod: PodRef::default(),
            class: None,
            slot: Some(Slot(u32::from(Ipv4Addr::from(DUAL)) + number)),
            within: Vec::new(),
            delegated: true,
            ports: Vec::new(),
        };
        let answer = service.handle(&request, clock::now());
        assert!(matches!(answer, Response::Allocation { .. }), "{answer:?}");
    }
}

fn details(error: &Value) -> &str {
    error["details"].as_str().unwrap()
}

/// ADD and DEL of the IPAM role, for a pod of which no interface is made.
fn delegate(node: &Node, verb: &str, pod: &Pod) -> Result<Option<Value>, Value> {
    let mut network = pod.network(node);
    network["type"] = "macvlan".into();
    network["ipam"] = json!({"type": "kun-cni", "kunConfig": node.config});
    node.verb(verb, pod, &network)
}

#[test]
fn more_pods_than_slots_live_one_after_another() {
    if !require_root() {
        return;
    }
    let node = node();
    let mut pod = Pod::new("c", true);
    for number in 0..PODS {
        pod.id = format!("c{number}");
        if let Err(error) = node.add(&pod) {
            panic!("pod {number}: {error}");
        }
        node.del(&pod).unwrap();
    }
    assert_eq!(node.leavings(), "");
}

#[test]
fn the_ipam_role_has_its_addresses_back_too() {
    if !require_root() {
        return;
    }
    let node = node();
    leave(&node, 4);
    // Where another plugin's pods are: the kernel learns their hardware addresses there, and never forgets so few.
    node.netns
        .exec("link add br0 type veth peer name br1")
        .unwrap();
    node.netns.exec("link set br0 up").unwrap();
    let mut pod = Pod::new("c", true);
    for number in 0..12 {
        pod.id = format!("c{number}");
        let result = match delegate(&node, "ADD", &pod) {
            Ok(result) => result.unwrap(),
            Err(error) => panic!("pod {number}: {error}"),
        };
        for v6 in [false, true] {
            let address = address(&result, v6).unwrap();
            let learnt =
                format!("neigh replace {address} lladdr 02:00:00:00:00:99 dev br0 nud stale");
            node.netns.exec(&learnt).unwrap();
        }
        delegate(&node, "DEL", &pod).unwrap();
    }
}

#[test]
fn what_is_known_to_somebody_does_not_come_back() {
    if !require_root() {
        return;
    }
    let node = node();
    leave(&node, 4);
    let [a, b, c, d] = DUAL;
    let held = format!("{a}.{b}.{c}.{d}");
    let slice = node.dir.path().join("manifests/slice.yaml");
    let manifest = json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {"name": "s", "namespace": "default", "labels": {"kubernetes.io/service-name": "s"}},
        "addressType": "IPv4", "ports": [{"name": "", "port": 80}],
        "endpoints": [{"addresses": [held]}]});
    std::fs::write(&slice, manifest.to_string()).unwrap();
    let route = format!("route add {a}.{b}.{c}.{}/32 dev lo", d + 1);
    let mut pod = Pod::new("c", true);
    let seen = RefCell::new(Vec::new());
    let mut add = |number: usize| {
        pod.id = format!("c{number}");
        let result = node.add(&pod).map_err(|error| details(&error).to_owned())?;
        seen.borrow_mut().push(address(&result, false).unwrap());
        node.del(&pod).unwrap();
        Ok::<_, String>(())
    };
    (0..4).for_each(|number| add(number).unwrap());
    node.netns.exec(&route).unwrap();
    // Of four slots two are known: they are stepped over.
    (4..10).for_each(|number| add(number).unwrap());

    // The next ADD finds none that was looked at.
    std::fs::write(node.dir.path().join("manifests/bad.yaml"), "kind: [").unwrap();
    let refused = add(200).unwrap_err();
    assert!(refused.contains("bad.yaml"), "{refused}");
    assert!(refused.contains("without an agent"), "{refused}");
    std::fs::remove_file(node.dir.path().join("manifests/bad.yaml")).unwrap();
    // An agent's programs remember flows that only it can remove.
    let pins = node.dir.path().join("bpf/v1/service");
    std::fs::create_dir_all(&pins).unwrap();
    let refused = add(201).unwrap_err();
    assert!(refused.contains("start kun-proxy"), "{refused}");
    std::fs::remove_dir(&pins).unwrap();

    (202..208).for_each(|number| add(number).unwrap());
    let known = [held.clone(), format!("{a}.{b}.{c}.{}", d + 1)];
    let again = seen.borrow()[4..].iter().any(|a| known.contains(a));
    assert!(!again, "{seen:?}");
    std::fs::remove_file(slice).unwrap();
    (300..304).for_each(|number| add(number).unwrap());
    let seen = seen.into_inner();
    assert!(seen[seen.len() - 4..].contains(&held), "{seen:?}");
}

/// GC carries on past errors (CNI §2): a store that nobody can read is told, and does not keep what its pods left.
#[test]
fn gc_takes_the_interfaces_of_what_is_gone_from_a_node_whose_store_is_damaged() {
    if !require_root() {
        return;
    }
    let node = node();
    let (stays, goes) = (Pod::new("c1", true), Pod::new("c2", true));
    let result = node.add(&stays).unwrap();
    node.add(&goes).unwrap();
    let file = node.state_dir().join(kun_cni::store::FILE);
    let good = std::fs::read(&file).unwrap();
    std::fs::write(&file, b"not a store").unwrap();

    let mut network = node.network();
    network["cni.dev/valid-attachments"] = json!([{"containerID": "c1", "ifname": "eth0"}]);
    let vars = [("CNI_COMMAND", "GC"), ("CNI_PATH", "/opt/cni/bin")];
    let gc = |network: &Value| node::answer(&node.execute(&vars, network.to_string().as_bytes()));
    let error = gc(&network).unwrap_err();
    assert_eq!(error["code"], 102, "{error}");
    let left = goes.netns.exec("-br link show type veth").unwrap();
    assert_eq!(left, "", "of the pod that is gone");

    // Its release waited for the store.
    std::fs::write(&file, &good).unwrap();
    node.check(&stays, &result).unwrap();
    let live = node.service().live(clock::now()).unwrap();
    assert_eq!(live.len(), 1, "{live:?}");
    assert_eq!(live[0].key.container_id, "c1");
}

/// No interface tells of pods any more, and the spool does: their addresses are still warm, and no new store knows how long.
#[test]
fn a_store_that_is_gone_while_releases_wait_for_it_is_refused() {
    if !require_root() {
        return;
    }
    for verb in ["DEL", "GC"] {
        let node = Node::new("split");
        let pod = Pod::new("c1", true);
        node.add(&pod).unwrap();
        let file = node.state_dir().join(kun_cni::store::FILE);
        std::fs::remove_file(&file).unwrap();
        // The pod goes all the same; nobody else comes.
        let mut network = node.network();
        network["cni.dev/valid-attachments"] = json!([]);
        let done = node.verb(verb, &pod, &network);
        // GC tells that it could not ask whom else there is.
        assert_eq!(done.is_ok(), verb == "DEL", "{done:?}");
        assert_eq!(node.leavings(), "");
        let error = node.add(&Pod::new("c2", true)).unwrap_err();
        let told = error.to_string().contains("`kunctl ipam rebuild`");
        assert!(told && !file.exists(), "{error}: none is made by the way");
        assert_eq!(Spool::new(&node.state_dir()).entries().len(), 1);
    }
}
