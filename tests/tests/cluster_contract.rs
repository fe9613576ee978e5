//! One contract, two sources: the same cases against a folder of manifests and against a real API server.
//!
//! What holds of every event (one snapshot, `Synced` once, no removal of what was never told, no other object under a name without a
//! removal, nothing that was not wanted) is checked by the watcher in each case.

use std::time::Duration;

use anyhow::{Result, ensure};
use kun_cluster::{Delta, Kind, Object, ObjectName, Wanted};
use kun_tests::control_plane::ControlPlane;
use kun_tests::rig::{self, FolderRig, Rig, ServerRig};
use kun_tests::watcher::Watcher;
use serde_json::json;

/// A change to be told: milliseconds in fact; a busy machine takes its time.
const TOLD_WITHIN: Duration = Duration::from_secs(30);

/// A block's object has one name, which follows from its first slot.
const ONE: &str = "block-10-64-0-0";
const TWO: &str = "block-10-64-0-64";

type Case = fn(&mut dyn Rig) -> Result<()>;

const CASES: &[(&str, Case)] = &[
    (
        "the snapshot is one event, then synced",
        the_snapshot_is_one_event,
    ),
    ("an empty cluster is synced too", an_empty_cluster_is_synced),
    (
        "changes and removals are told",
        changes_and_removals_are_told,
    ),
    (
        "a namespace takes its objects with it",
        a_namespace_takes_its_objects_with_it,
    ),
    (
        "another object under a name is a removal first",
        another_object_under_a_name,
    ),
    ("a node sees its own", a_node_sees_its_own),
    (
        "a wrong object keeps its last good version",
        a_wrong_object_keeps_its_last_good,
    ),
    (
        "a wrong object at the start is partial until it is right",
        a_wrong_object_at_the_start,
    ),
    ("every kind is read", every_kind_is_read),
];

fn run(rig: &mut dyn Rig) {
    let mut failed = Vec::new();
    for (name, case) in CASES {
        if let Err(error) = case(rig) {
            failed.push(format!("{name}: {error:#}"));
        }
        rig.clear().unwrap();
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

#[test]
fn a_folder_keeps_the_contract() {
    run(&mut FolderRig::new().unwrap());
}

#[test]
fn the_api_keeps_the_contract() {
    let Some(builder) = ControlPlane::builder() else {
        return;
    };
    let plane = builder.start().unwrap();
    run(&mut ServerRig::new(plane.kubeconfig()).unwrap());
}

fn name(namespace: &str, name: &str) -> ObjectName {
    ObjectName::new(namespace, name)
}

fn follow(rig: &dyn Rig, wanted: Wanted) -> Result<Watcher> {
    let mut watcher = Watcher::new(rig.source()?, wanted)?;
    watcher.until_synced(TOLD_WITHIN)?;
    Ok(watcher)
}

fn services(watcher: &Watcher) -> Vec<String> {
    let of_case = |n: &ObjectName| !rig::is_of_the_server(n);
    let names = watcher.store.services().map(|s| s.meta.name.clone());
    names.filter(of_case).map(|n| n.to_string()).collect()
}

fn the_snapshot_is_one_event(rig: &mut dyn Rig) -> Result<()> {
    rig.put(&[
        rig::namespace("shop"),
        rig::service("shop", "front", 80),
        rig::service("shop", "back", 81),
        rig::node("a"),
    ])?;
    let watcher = follow(rig, Wanted::new().all([Kind::Service, Kind::Node]))?;
    ensure!(
        services(&watcher) == ["shop/back", "shop/front"],
        "{:?}",
        services(&watcher)
    );
    ensure!(watcher.store.node("a").is_some(), "no node");
    ensure!(!watcher.partial && watcher.deltas.is_empty());
    ensure!(
        watcher.store.namespaces().next().is_none(),
        "a namespace, which was not wanted"
    );
    Ok(())
}

fn an_empty_cluster_is_synced(rig: &mut dyn Rig) -> Result<()> {
    let watcher = follow(rig, Wanted::new().all([Kind::Node, Kind::IpPool]))?;
    ensure!(watcher.store.counts().iter().all(|(_, n)| *n == 0));
    Ok(())
}

fn changes_and_removals_are_told(rig: &mut dyn Rig) -> Result<()> {
    rig.put(&[
        rig::namespace("shop"),
        rig::service("shop", "front", 80),
        rig::slice("shop", "front", 2),
    ])?;
    let mut watcher = follow(rig, Wanted::new().all([Kind::Service, Kind::EndpointSlice]))?;
    rig.put(&[rig::service("shop", "front", 8080)])?;
    let front = name("shop", "front");
    let port = |w: &Watcher| w.store.service(&front).map(|s| s.ports[0].port);
    watcher.until("the new port", TOLD_WITHIN, |w| port(w) == Some(8080))?;
    let endpoints = |w: &Watcher| {
        w.store
            .slices_of(&front)
            .map(|s| s.endpoints.len())
            .sum::<usize>()
    };
    ensure!(endpoints(&watcher) == 2);
    rig.put(&[rig::slice("shop", "front", 100)])?;
    watcher.until("100 endpoints", TOLD_WITHIN, |w| endpoints(w) == 100)?;
    rig.remove("EndpointSlice", &name("shop", "front-x"))?;
    watcher.until("no slice", TOLD_WITHIN, |w| {
        w.store.slices_of(&front).next().is_none()
    })?;
    rig.remove("Service", &front)?;
    watcher.until("no service", TOLD_WITHIN, |w| {
        w.store.service(&front).is_none()
    })?;
    // And it may come back.
    rig.put(&[rig::service("shop", "front", 80)])?;
    watcher.until("the service again", TOLD_WITHIN, |w| port(w) == Some(80))
}

fn a_namespace_takes_its_objects_with_it(rig: &mut dyn Rig) -> Result<()> {
    rig.put(&[rig::namespace("shop"), rig::namespace("bank")])?;
    rig.put(&[
        rig::service("shop", "front", 80),
        rig::service("bank", "desk", 80),
    ])?;
    let mut watcher = follow(rig, Wanted::new().all([Kind::Service, Kind::Namespace]))?;
    rig.remove_namespace("shop")?;
    watcher.until("an empty shop", TOLD_WITHIN, |w| {
        w.store.namespace("shop").is_none() && services(w) == ["bank/desk"]
    })
}

fn another_object_under_a_name(rig: &mut dyn Rig) -> Result<()> {
    rig.put(&[rig::node_with_uid(
        "a",
        "11111111-1111-4111-8111-111111111111",
    )])?;
    let mut watcher = follow(rig, Wanted::new().all([Kind::Node]))?;
    let first = watcher.store.node("a").map(|n| n.meta.uid.clone());
    rig.replace(&rig::node_with_uid(
        "a",
        "22222222-2222-4222-8222-222222222222",
    ))?;
    watcher.until("another node", TOLD_WITHIN, |w| {
        w.store
            .node("a")
            .is_some_and(|n| Some(&n.meta.uid) != first.as_ref())
    })?;
    let removed =
        matches!(watcher.deltas.first(), Some(Delta::Remove(Kind::Node, n)) if *n.name == *"a");
    ensure!(removed, "{:?}", watcher.deltas);
    Ok(())
}

fn a_node_sees_its_own(rig: &mut dyn Rig) -> Result<()> {
    rig.put(&[
        rig::namespace("shop"),
        rig::node("a"),
        rig::node("b"),
        rig::block(ONE, "10.64.0.0", "a", 1),
        rig::block(TWO, "10.64.0.64", "b", 1),
    ])?;
    rig.put(&[
        rig::pod("shop", "here", "a"),
        rig::pod("shop", "there", "b"),
    ])?;
    let wanted = Wanted::new()
        .of_node(Kind::Pod, "a")
        .of_node(Kind::IpamBlock, "a")
        .of_node(Kind::Node, "a");
    let mut watcher = follow(rig, wanted)?;
    let pods = |w: &Watcher| {
        w.store
            .pods()
            .map(|p| p.meta.name.to_string())
            .collect::<Vec<_>>()
    };
    ensure!(pods(&watcher) == ["shop/here"], "{:?}", pods(&watcher));
    ensure!(watcher.store.node("a").is_some() && watcher.store.node("b").is_none());
    let blocks = |w: &Watcher| {
        w.store
            .blocks()
            .map(|b| b.meta.name.to_string())
            .collect::<Vec<_>>()
    };
    ensure!(blocks(&watcher) == [ONE], "{:?}", blocks(&watcher));
    rig.put(&[
        rig::pod("shop", "there-too", "b"),
        rig::pod("shop", "here-too", "a"),
    ])?;
    watcher.until("the second pod", TOLD_WITHIN, |w| {
        pods(w) == ["shop/here", "shop/here-too"]
    })?;
    // What leaves the scope is gone for whoever looks through it, and what enters is new.
    rig.put(&[
        rig::block(ONE, "10.64.0.0", "b", 2),
        rig::block(TWO, "10.64.0.64", "a", 2),
    ])?;
    watcher.until("the other block", TOLD_WITHIN, |w| blocks(w) == [TWO])
}

fn a_wrong_object_keeps_its_last_good(rig: &mut dyn Rig) -> Result<()> {
    rig.put(&[
        rig::block(ONE, "10.64.0.0", "a", 1),
        rig::block(TWO, "10.64.0.64", "a", 1),
    ])?;
    let mut watcher = follow(rig, Wanted::new().all([Kind::IpamBlock]))?;
    rig.put(&[rig::block(ONE, "10.64.0.1", "b", 1)])?;
    watcher.until("the trouble", TOLD_WITHIN, |w| !w.told.is_empty())?;
    let told = &watcher.told[0];
    ensure!(
        told.contains(ONE) && told.contains("spec.first") && told.contains("10.64.0.1"),
        "{told}"
    );
    ensure!(
        watcher.troubles().now().contains(told),
        "{:?}",
        watcher.troubles().now()
    );
    let node_of_one = |w: &Watcher| {
        w.store
            .blocks()
            .find(|b| &*b.meta.name.name == ONE)
            .map(|b| b.node().clone())
    };
    ensure!(
        node_of_one(&watcher).as_deref() == Some("a"),
        "the last good version is not kept"
    );
    // The others go on meanwhile.
    rig.put(&[rig::block(TWO, "10.64.0.64", "c", 2)])?;
    watcher.until("the other", TOLD_WITHIN, |w| {
        w.store.blocks_of("c").next().is_some()
    })?;
    rig.put(&[rig::block(ONE, "10.64.0.0", "d", 2)])?;
    watcher.until("the right one", TOLD_WITHIN, |w| {
        node_of_one(w).as_deref() == Some("d")
    })?;
    watcher.until("no trouble", TOLD_WITHIN, |w| w.troubles().now().is_empty())?;
    ensure!(!watcher.partial);
    // Wrong, then gone: gone.
    let before = watcher.told.len();
    rig.put(&[rig::block(ONE, "10.64.0.1", "b", 1)])?;
    watcher.until("the trouble again", TOLD_WITHIN, |w| w.told.len() > before)?;
    rig.remove("IPAMBlock", &name("", ONE))?;
    watcher.until("one is gone", TOLD_WITHIN, |w| node_of_one(w).is_none())
}

fn a_wrong_object_at_the_start(rig: &mut dyn Rig) -> Result<()> {
    rig.put(&[
        rig::block(ONE, "10.64.0.1", "a", 1),
        rig::block(TWO, "10.64.0.64", "a", 1),
    ])?;
    let mut watcher = follow(rig, Wanted::new().all([Kind::IpamBlock]))?;
    ensure!(
        watcher.partial,
        "the view lacks an object and nobody was told"
    );
    ensure!(watcher.store.blocks().count() == 1);
    rig.put(&[rig::block(ONE, "10.64.0.0", "a", 1)])?;
    watcher.until("whole", TOLD_WITHIN, |w| {
        !w.partial && w.store.blocks().count() == 2
    })
}

fn every_kind_is_read(rig: &mut dyn Rig) -> Result<()> {
    rig.put(&[rig::namespace("shop"), rig::node("a")])?;
    rig.put(&[
        rig::service("shop", "front", 80),
        rig::slice("shop", "front", 3),
        rig::pod("shop", "front-0", "a"),
        rig::lease("shop", "leader", "me"),
        rig::pool("pods", "10.64.0.0/16"),
        rig::block(ONE, "10.64.0.0", "a", 1),
    ])?;
    let kinds = [
        Kind::Service,
        Kind::EndpointSlice,
        Kind::Node,
        Kind::Pod,
        Kind::Namespace,
        Kind::Lease,
        Kind::IpPool,
        Kind::IpamBlock,
    ];
    let watcher = follow(rig, Wanted::new().all(kinds))?;
    let store = &watcher.store;
    let service = store
        .service(&name("shop", "front"))
        .map(|s| s.ports.clone());
    ensure!(service.is_some_and(|p| p.len() == 1 && p[0].port == 80 && &*p[0].name == "http"));
    let slice = store.slice(&name("shop", "front-x"));
    ensure!(slice.is_some_and(|s| s.endpoints.len() == 3 && s.service == name("shop", "front")));
    ensure!(
        store
            .node("a")
            .is_some_and(|n| n.zone().map(|z| &**z) == Some("z1"))
    );
    let pod = store.pod(&name("shop", "front-0"));
    ensure!(
        pod.is_some_and(|p| p.node.as_deref() == Some("a")),
        "{pod:?}"
    );
    ensure!(store.namespace("shop").is_some());
    let lease = store.lease(&name("shop", "leader"));
    ensure!(
        lease.is_some_and(|l| l.holder.as_deref() == Some("me") && l.duration_secs == Some(15)),
        "{lease:?}"
    );
    ensure!(store.pools().next().is_some_and(|p| p.spec.pods.len() == 1));
    ensure!(store.blocks_of("a").count() == 1);
    // A property of a kind that kun has no field for is nobody's trouble.
    rig.put(&[{
        let mut service = rig::service("shop", "front", 80);
        service["spec"]["selector"] = json!({"app": "front"});
        service
    }])?;
    ensure!(
        watcher.troubles().now().is_empty(),
        "{:?}",
        watcher.troubles().now()
    );
    let origin = |o: Object| o.meta().origin.to_string();
    let service = store.service(&name("shop", "front")).cloned();
    let origin = service
        .map(|s| origin(Object::Service(s)))
        .unwrap_or_default();
    ensure!(origin.contains(rig.origin()), "{origin}");
    Ok(())
}
