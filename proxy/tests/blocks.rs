//! The node's blocks under the real agent: taken from a real API server and given back to it by an agent that is killed at every step, and
//! what a pod gets that does not say whether it needs IPv4.

#![allow(missing_docs)]

mod rig;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use kun_cluster::api::write::Writer;
use kun_cluster::{Kind, ObjectName, Resource, watermark};
use kun_config::types::{Slot, SlotClass};
use kun_control::{AttachmentKey, PodRef, Request, Response};
use kun_harness::control_plane::{ControlPlane, Part};
use kun_harness::wait_for;
use rig::Node;
use serde_json::{Value, json};

/// An agent that was refused waits up to 30 s before it asks again; a busy machine takes its time besides.
const SOON: Duration = Duration::from_secs(120);

const BLOCK: &str = "block-10-64-0-0";

fn key(container: &str) -> AttachmentKey {
    AttachmentKey {
        network: "kun".into(),
        container_id: container.into(),
        ifname: "eth0".into(),
    }
}

/// As another plugin asks, so that no interface is looked for.
fn ask_for(node: &Node, container: &str, namespace: &str, class: Option<SlotClass>) -> Response {
    node.ask(&Request::Allocate {
        key: key(container),
        pod: PodRef {
            namespace: namespace.into(),
            ..PodRef::default()
        },
        class,
        slot: None,
        within: Vec::new(),
        delegated: true,
        ports: Vec::new(),
    })
}

fn release(node: &Node, container: &str) {
    let key = key(container);
    let generation = None;
    let answer = node.ask(&Request::Release { key, generation });
    assert_eq!(answer, Response::Done);
}

/// Everything that was given: each slot's last generation, and who has it.
#[derive(Default)]
struct Given {
    generations: BTreeMap<Slot, u64>,
    live: BTreeMap<Slot, String>,
}

impl Given {
    /// `None`: the node has none to give.
    fn allocate(&mut self, node: &Node, container: &str) -> Option<Slot> {
        let allocation = match ask_for(node, container, "shop", Some(SlotClass::Dual)) {
            Response::Allocation { allocation } => allocation,
            Response::Exhausted { .. } => return None,
            other => panic!("{other:?}"),
        };
        let slot = allocation.slot;
        match self.live.get(&slot) {
            Some(owner) => assert_eq!(owner, container, "{slot} is given twice"),
            None => {
                let before = self.generations.insert(slot, allocation.generation);
                assert!(before.is_none_or(|before| before < allocation.generation));
            }
        }
        self.live.insert(slot, container.to_owned());
        Some(slot)
    }

    fn release_all(&mut self, node: &Node) {
        for container in std::mem::take(&mut self.live).into_values() {
            release(node, &container);
        }
    }
}

struct Lab {
    plane: ControlPlane,
    writer: Writer,
    node: Node,
}

impl Lab {
    fn new() -> Option<Self> {
        let builder = ControlPlane::builder()?;
        let node = Node::prepare("blocks")?;
        let plane = builder
            .netns(node.fabric.path())
            .bind("192.0.2.1".parse().unwrap())
            .controller_flags(&["--controllers=*,-node-lifecycle-controller"])
            .start()
            .unwrap();
        let deploy = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/crds");
        for kind in ["ipamblocks", "ippools"] {
            let crd = deploy.join(format!("kun.network_{kind}.yaml"));
            plane
                .kubectl(&["create", "-f", crd.to_str().unwrap()], "")
                .unwrap();
        }
        plane
            .kubectl(&["create", "namespace", watermark::NAMESPACE], "")
            .unwrap();
        let writer = Writer::open(Some(plane.kubeconfig())).unwrap();
        node.configure(|config| {
            config["cluster"] = json!({"kubernetes": {"kubeconfig": plane.kubeconfig()}});
            config["ipam"]["cooldown"] = json!("1s");
        });
        let lab = Self {
            plane,
            writer,
            node,
        };
        let blocks = Resource::of(Kind::IpamBlock);
        wait_for("our kind", SOON, || {
            lab.node.fabric.run(|| lab.writer.list(blocks, None)).ok()
        })
        .unwrap();
        Some(lab)
    }

    fn create(&self, kind: Kind, object: &Value) -> Value {
        let create = || self.writer.create(Resource::of(kind), object);
        self.node.fabric.run(create).unwrap()
    }

    /// As a person or the operator.
    fn write(&self, patch: &Value) {
        let name = ObjectName::new("", BLOCK);
        let write = || {
            self.writer
                .patch(Resource::of(Kind::IpamBlock), &name, patch)
        };
        self.node.fabric.run(write).unwrap();
    }

    /// What the operator would fold of the one node that there is.
    fn fold(&self) {
        let name = ObjectName::new(watermark::NAMESPACE, "node-a");
        let fold = || {
            let published = self.writer.get(Resource::LEASES, &name).ok()?;
            let annotations = &published["metadata"]["annotations"];
            let fold = watermark::fold_in(|key| annotations[key].as_str());
            let pairs = watermark::fold_annotations(&fold).map(|(k, v)| (k.to_owned(), json!(v)));
            let annotations = Value::Object(pairs.into_iter().collect());
            let (namespace, name) = watermark::FOLD;
            let mut lease = json!({"metadata": {"annotations": annotations}, "spec": {}});
            let patched = (self.writer).patch(Resource::LEASES, &watermark::fold_name(), &lease);
            if patched.is_err() {
                lease["metadata"]["namespace"] = json!(namespace);
                lease["metadata"]["name"] = json!(name);
                self.writer.create(Resource::LEASES, &lease).ok()?;
            }
            Some(())
        };
        // Not published yet: the next time.
        let _: Option<()> = self.node.fabric.run(fold);
    }

    /// Waits until the owner of this epoch has said so.
    fn says(&self, phase: &str, epoch: i64) {
        let name = ObjectName::new("", BLOCK);
        let mut last = Value::Null;
        let said = wait_for("the phase", SOON, || {
            let get = || self.writer.get(Resource::of(Kind::IpamBlock), &name);
            let status = self.node.fabric.run(get).ok()?["status"].take();
            let there = status["phase"] == phase && status["epoch"] == epoch;
            last = status;
            there.then_some(())
        });
        said.unwrap_or_else(|e| panic!("{e:#}: {phase}@{epoch}, {last}\n{}", self.node.log()));
    }

    /// Starts an agent, and kills it as soon as its log says one of these.
    fn killed_at(&mut self, lines: &[&str]) {
        self.node.spawn_until_answers();
        let said = || {
            let log = self.node.log();
            lines.iter().any(|line| log.contains(line)).then_some(())
        };
        wait_for("the line", SOON, said)
            .unwrap_or_else(|e| panic!("{lines:?}: {e:#}\n{}", self.node.log()));
        self.node.kill();
    }
}

#[test]
fn an_agent_killed_at_any_step_gives_no_address_twice() {
    let Some(mut lab) = Lab::new() else {
        return;
    };
    let mut given = Given::default();
    let this = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-a"}});
    let uid = lab.create(Kind::Node, &this)["metadata"]["uid"].take();
    let spec = json!({"first": "10.64.0.0", "node": "node-a", "nodeUID": uid});
    lab.create(
        Kind::IpamBlock,
        &json!({"metadata": {"name": BLOCK}, "spec": spec}),
    );

    // Taken: not confirmed perhaps, or confirmed and not known to be.
    lab.killed_at(&["standing=Taken"]);
    // The first may have come further before it died.
    lab.killed_at(&["standing=Confirmed", "blocks=1"]);
    lab.node.spawn();
    lab.says("Confirmed", 1);
    let first = given.allocate(&lab.node, "c0").unwrap();
    given.allocate(&lab.node, "c1").unwrap();
    lab.node.kill();

    // The API server is away: what is confirmed is given out, also by an agent that starts then.
    lab.plane.kill(Part::ApiServer).unwrap();
    lab.node.spawn_until("waiting for the cluster");
    assert_eq!(given.allocate(&lab.node, "c0"), Some(first));
    given.allocate(&lab.node, "c2").unwrap();
    lab.plane.start(Part::ApiServer, &[]).unwrap();
    lab.node.kill();

    // Called back: no more slots, whoever asks and whenever it died.
    lab.write(&json!({"spec": {"draining": true}}));
    lab.killed_at(&["standing=Draining"]);
    lab.node.spawn();
    lab.says("Draining", 1);
    assert_eq!(
        given.allocate(&lab.node, "c0"),
        Some(first),
        "whoever lives keeps it"
    );
    assert_eq!(given.allocate(&lab.node, "c3"), None);
    given.release_all(&lab.node);
    // It is let go of once all is forgotten, first in the store.
    let line = "standing=Returned";
    wait_for("the end of it", SOON, || {
        lab.fold();
        lab.node.log().contains(line).then_some(())
    })
    .unwrap_or_else(|e| panic!("{e:#}\n{}", lab.node.log()));
    lab.node.kill();
    lab.node.spawn();
    lab.says("Drained", 1);
    assert_eq!(given.allocate(&lab.node, "c4"), None);
    assert!(!lab.node.routes("-4").contains("10.64.0.0/26"));

    // It comes back under the next epoch, and cools first.
    lab.write(&json!({"spec": {"epoch": 2, "draining": null}}));
    lab.says("Confirmed", 2);
    wait_for("an address", SOON, || {
        lab.fold();
        given.allocate(&lab.node, "c5")
    })
    .unwrap();
    let shown = lab.node.ask(&Request::Ipam);
    let Response::Ipam { blocks, pools, .. } = shown else {
        panic!("{shown:?}");
    };
    assert_eq!(
        (blocks[0].standing.as_str(), blocks[0].epoch),
        ("confirmed", 2)
    );
    // Everything in it cooled when it came: another may have been asked for meanwhile.
    assert!((1..=2).contains(&pools[0].wanted), "{pools:?}");

    // Its Node is deleted, and made again under its name: it has no block, and says so to whoever asks.
    lab.plane
        .kubectl(&["delete", "node", "node-a"], "")
        .unwrap();
    lab.create(Kind::Node, &this);
    wait_for("no more", SOON, || {
        given.allocate(&lab.node, "c6").is_none().then_some(())
    })
    .unwrap();
}

#[test]
fn what_a_pod_gets_that_does_not_say() {
    let Some(mut node) = Node::start("classes") else {
        return;
    };
    let pool = |name: &str, default: Value, selects: &str| {
        json!({"apiVersion": "kun.network/v1alpha1", "kind": "IPPool", "metadata": {"name": name},
            "spec": {"pods": ["10.64.0.0/16"], "ipv4ByDefault": default,
                "nodeSelector": {"matchLabels": {"role": selects}}}})
    };
    let given = |node: &Node, namespace: &str, class| {
        let answer = ask_for(node, "one", namespace, class);
        let class = match answer {
            Response::Allocation { allocation } => allocation.slot.class(),
            other => panic!("{other:?}"),
        };
        release(node, "one");
        class
    };
    let becomes = |node: &Node, namespace: &str, what: SlotClass| {
        wait_for("the class", SOON, || {
            (given(node, namespace, None) == what).then_some(())
        })
        .unwrap_or_else(|e| panic!("{namespace}: {what:?}: {e:#}\n{}", node.log()));
    };
    node.manifest(
        "more.yaml",
        &[
            json!({"apiVersion": "kun.network/v1alpha1", "kind": "IPAMBlock", "metadata": {"name": "block-240-0-0-0"},
                "spec": {"first": "240.0.0.0", "node": "node-a"}}),
            json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-b", "labels": {"role": "edge"}}}),
        ],
    );
    wait_for("the second block", SOON, || {
        match node.ask(&Request::Ipam) {
            Response::Ipam { blocks, .. } => (blocks.len() == 2).then_some(()),
            other => panic!("{other:?}"),
        }
    })
    .unwrap();
    // Nobody says anything: kun.yaml.
    becomes(&node, "shop", SlotClass::Dual);
    // A pool of other nodes says nothing here; of those of this node the first by name.
    node.manifest(
        "pools.yaml",
        &[
            pool("a", json!(true), "edge"),
            pool("b", json!(false), "plain"),
        ],
    );
    node.manifest(
        "node.yaml",
        &[
            json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-a", "labels": {"role": "plain"}}}),
            json!({"apiVersion": "kun.network/v1alpha1", "kind": "IPAMBlock", "metadata": {"name": "block-10-64-0-0"},
                "spec": {"first": "10.64.0.0", "node": "node-a"}}),
        ],
    );
    becomes(&node, "shop", SlotClass::V6Only);
    // Before it the namespace, before that the pod.
    node.manifest(
        "namespace.yaml",
        &[json!({"apiVersion": "v1", "kind": "Namespace",
            "metadata": {"name": "shop", "annotations": {"kun.network/ipv4": "true"}}})],
    );
    becomes(&node, "shop", SlotClass::Dual);
    assert_eq!(given(&node, "other", None), SlotClass::V6Only);
    assert_eq!(
        given(&node, "shop", Some(SlotClass::V6Only)),
        SlotClass::V6Only
    );
    assert_eq!(
        given(&node, "other", Some(SlotClass::Dual)),
        SlotClass::Dual
    );
    node.terminate();
}

#[test]
fn a_full_node_says_who_holds_and_what_became_of_its_wish() {
    let Some(node) = Node::start("full") else {
        return;
    };
    let mut given = Given::default();
    // What is asked for is a level: below 16 free.
    for n in 0..64 {
        given.allocate(&node, &format!("c{n}")).unwrap();
    }
    let told = wait_for("the wish", SOON, || {
        match ask_for(&node, "more", "shop", Some(SlotClass::Dual)) {
            Response::Exhausted { exhausted } => {
                exhausted.more.is_some().then_some(exhausted.to_string())
            }
            other => panic!("{other:?}"),
        }
    })
    .unwrap();
    assert!(told.contains("held by shop (64)"), "{told}");
    assert!(told.contains("add an IPAMBlock"), "{told}");
    wait_for("the metric", SOON, || {
        let text = node.get("/metrics");
        text.contains("kun_ipam_blocks_wanted{class=\"dual\"} 2")
            .then_some(())
    })
    .unwrap();
    // Pods without IPv4 are another class.
    node.manifest(
        "v6.yaml",
        &[json!({"apiVersion": "kun.network/v1alpha1", "kind": "IPAMBlock", "metadata": {"name": "block-240-0-0-0"},
            "spec": {"first": "240.0.0.0", "node": "node-a"}})],
    );
    wait_for("an IPv6-only slot", SOON, || {
        let answer = ask_for(&node, "v6", "shop", Some(SlotClass::V6Only));
        matches!(answer, Response::Allocation { .. }).then_some(())
    })
    .unwrap();
}
