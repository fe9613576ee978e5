//! An address comes back only when every node's dataplane has applied a revision of the EndpointSlices without it: a real control
//! plane, the real operator, and two real agents with the rights that `deploy/base` gives them. One agent reaches the API server
//! through a proxy that spoils answers.
//!
//! One history for all of it, as a control plane takes longer to start than most of the steps take.

mod blocks;
mod full;
mod lab;
mod restored;

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::time::Duration;

use kun_config::types::Slot;
use kun_harness::{wait_for, wait_until};
use lab::{Lab, NODES, SOON, WATCHED, value};
use rustix::process::Signal;

/// Nothing is in the way; how long that takes.
fn comes_back_when_all_have_applied(lab: &mut Lab) -> Duration {
    let (slot, _) = lab.used_and_released("one");
    let held = lab.nodes[0].row(slot).expect("a slice has it");
    assert_ne!(held.state, "free");
    let without = lab.endpoints(&[]);
    let took = lab.nodes[0].comes_back(slot);
    assert!(lab.folded() >= without, "{} of {without}", lab.folded());
    for node in NODES {
        let has = lab.published(node);
        assert!(has >= without, "{node}: {has} of {without}");
    }
    took
}

/// The other node's agent is frozen: its dataplane still sends to the address.
fn a_frozen_agent_is_waited_for(lab: &mut Lab, time: Duration) {
    let (slot, _) = lab.used_and_released("two");
    lab.nodes[1].agent.signal(Signal::STOP).unwrap();
    lab.endpoints(&[]);
    lab.nodes[0].waits(slot, time, "a frozen agent");
    let why = lab.nodes[0].row(slot).unwrap().why;
    assert!(why.iter().any(|w| w.contains("of node-b")), "{why:?}");
    let status = lab.nodes[0].status().unwrap();
    let watermark = value(&status.ipam, "watermark").unwrap();
    assert!(watermark.contains("slowest: node-b"), "{watermark}");
    lab.nodes[1].agent.signal(Signal::CONT).unwrap();
    lab.nodes[0].comes_back(slot);
}

/// Nobody folds: the slot waits, is quarantined, and comes back once somebody does. What needs no operator is tried meanwhile. `slot`: one
/// that a slice of its own has held for a while; the time until it is quarantined began with its release.
fn without_an_operator_it_waits(lab: &mut Lab, slot: Slot) {
    lab.retire();
    lab.let_go();
    let other = what_cannot_be_reclaimed_is_a_condition(lab);
    let row = || lab.nodes[0].row(slot);
    wait_for("quarantine", SOON, || {
        let row = row().expect("it came back without anybody to say so");
        let waits = row.why.iter().any(|why| why.contains("is waited for"));
        (row.state == "quarantined" && waits).then_some(())
    })
    .unwrap_or_else(|e| panic!("{e:#}: {:?}", row()));
    lab.nodes[0].waits(slot, Duration::ZERO, "quarantined");
    lab.operate();
    for slot in [slot, other] {
        lab.nodes[0].comes_back(slot);
    }
}

/// Refused, and cut off again and again: the dataplane keeps what it has, and what it has is published once the server takes it.
fn faults_in_between_cost_time_alone(lab: &Lab) {
    let (slot, _) = lab.used_and_released("four");
    let backends = |lab: &Lab| value(&lab.nodes[1].status().unwrap().proxy, "backends").unwrap();
    let before = backends(lab);
    // The API server's own, and the one.
    assert!(before.starts_with("2 of"), "{before}");
    {
        let mut faults = lab.proxy.faults();
        for _ in 0..10 {
            faults.refuse.extend([(429, Some(1)), (500, None)]);
        }
    }
    lab.proxy.cut();
    // Every answer but a few is a refusal until they are used up.
    wait_for("the refusals to be used up", SOON, || {
        assert_eq!(backends(lab), before, "the dataplane lost what it had");
        lab.proxy.faults().refuse.is_empty().then_some(())
    })
    .unwrap();
    lab.proxy.cut();
    let without = lab.endpoints(&[]);
    lab.nodes[0].comes_back(slot);
    assert!(lab.published("node-b") >= without);
    let failed = lab.nodes[1].log().contains("the proxy says");
    assert!(failed, "no publication met a fault: {}", lab.nodes[1].log());
}

/// The fold's Lease is deleted: the operator makes it anew, with the next news. Without any it would be a bookmark's, a minute later.
fn a_deleted_fold_is_made_anew(lab: &mut Lab) {
    let words = ["-n", "kube-system", "delete", "lease", "kun-watermark"];
    lab.plane.kubectl(&words, "").unwrap();
    assert_eq!(lab.folded(), 0);
    let news = lab.endpoints(&[Slot::from(Ipv4Addr::new(198, 51, 100, 9))]);
    wait_for("the fold", SOON, || (lab.folded() >= news).then_some(()))
        .unwrap_or_else(|e| panic!("{e:#}\n{}", lab.operator_log()));
}

/// An interface that carries the tag of a pod that is gone, and that the kernel does not remove: the loopback.
fn what_cannot_be_reclaimed_is_a_condition(lab: &Lab) -> Slot {
    let node = &lab.nodes[0];
    let before = lab.turns(node, "False");
    assert_eq!(before["reason"], "AllReclaimed");
    let (slot, generation) = node.allocate("five");
    node.release("five");
    let tag = format!("link set lo alias kun:{generation}:kun/five/eth0");
    node.netns.exec(&tag).unwrap();
    let stays = lab.turns(node, "True");
    assert_eq!(stays["reason"], "InterfacesStay");
    let message = stays["message"].as_str().unwrap();
    assert!(message.contains("lo: "), "{message}");
    assert!(stays["lastTransitionTime"].as_str() > before["lastTransitionTime"].as_str());
    // Others' conditions are theirs, and a second round writes nothing.
    let version = |lab: &Lab| lab.get(&["node", node.name])["metadata"]["resourceVersion"].clone();
    let written = version(lab);
    assert!(!wait_until(Duration::from_secs(12), || version(lab) != written));
    // `ip` takes no empty alias.
    let index = "/sys/class/net/lo/ifalias";
    let words = [
        "ip",
        "netns",
        "exec",
        node.netns.name(),
        "sh",
        "-c",
        &format!("echo > {index}"),
    ];
    kun_harness::run(words).unwrap();
    let gone = lab.turns(node, "False");
    assert!(gone["lastTransitionTime"].as_str() > stays["lastTransitionTime"].as_str());
    slot
}

/// A node that is gone is waited for by nobody, and its Lease goes with it.
fn a_deleted_node_takes_its_lease_along(lab: &mut Lab) {
    let (slot, _) = lab.used_and_released("six");
    lab.nodes[1].agent.signal(Signal::STOP).unwrap();
    lab.endpoints(&[]);
    wait_for("the frozen agent to be waited for", SOON, || {
        let row = lab.nodes[0].row(slot).expect("it came back");
        let named = row.why.iter().any(|why| why.contains("of node-b"));
        named.then_some(())
    })
    .unwrap();
    lab.plane
        .kubectl(&["delete", "node", "node-b"], "")
        .unwrap();
    lab.nodes[0].comes_back(slot);
    wait_for("the Lease to go", SOON, || {
        let leases = lab.get(&["-n", "kun-node-lease", "leases"]);
        let names: BTreeSet<String> = (leases["items"].as_array().into_iter().flatten())
            .map(|l| l["metadata"]["name"].to_string())
            .collect();
        (names == BTreeSet::from(["\"node-a\"".to_owned()])).then_some(())
    })
    .unwrap();
    lab.nodes[1].agent.signal(Signal::CONT).unwrap();
}

/// Both at once: they wait more than they compute.
fn together(one: impl FnOnce() + Send, two: impl FnOnce()) {
    std::thread::scope(|scope| {
        let one = scope.spawn(one);
        two();
        one.join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}

#[test]
fn an_address_comes_back_only_after_every_nodes_dataplane_has_forgotten_it() {
    let Some(mut lab) = Lab::new() else {
        return;
    };
    let took = comes_back_when_all_have_applied(&mut lab);
    eprintln!("a slot came back {took:?} after its last slice");
    let held = lab.held_and_released("three");
    full::what_the_dataplane_refused_is_not_published(&lab);
    a_frozen_agent_is_waited_for(&mut lab, WATCHED.max(took * 2));
    without_an_operator_it_waits(&mut lab, held);
    together(
        || blocks::a_block_comes_on_need_and_goes_back(&lab),
        || faults_in_between_cost_time_alone(&lab),
    );
    a_deleted_fold_is_made_anew(&mut lab);
    restored::a_restored_backup_frees_nothing_early_and_keeps_nothing_for_ever(&mut lab, WATCHED);
    a_deleted_node_takes_its_lease_along(&mut lab);
}
