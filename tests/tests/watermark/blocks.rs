//! A block comes when a node runs low and goes back when it has been of no use for a while: agent, operator and API server, none of them
//! a stand-in.

use kun_harness::wait_for;
use serde_json::Value;

use crate::lab::{Lab, Node, SOON};

/// Of a block's 64 slots: fewer than 16 are left, which is when a node asks.
const CROWD: usize = 56;

/// The node's dual blocks by their first address, once they are so.
fn blocks(lab: &Lab, node: &Node, what: &str, so: impl Fn(&[Value]) -> bool) -> Vec<Value> {
    let read = || {
        let all = lab.get(&["ipamblocks"]);
        let mut blocks = all["items"].as_array().cloned().unwrap_or_default();
        let dual = |b: &Value| {
            b["spec"]["first"]
                .as_str()
                .is_some_and(|a| a.starts_with("10."))
        };
        blocks.retain(|b| b["spec"]["node"] == node.name && dual(b));
        blocks.sort_by_key(|b| b["status"]["phase"] == "Drained");
        blocks
    };
    wait_for(what, SOON, || Some(read()).filter(|blocks| so(blocks)))
        .unwrap_or_else(|e| panic!("{e:#}: {:#?}\n{}", read(), node.log()))
}

/// How many blocks the node has, if all have said how far they are with what is asked for now.
fn confirmed(blocks: &[Value]) -> Option<usize> {
    let said = |b: &Value| {
        let generation = &b["metadata"]["generation"];
        generation.is_i64() && b["status"]["observedGeneration"] == *generation
    };
    let is = |b: &Value, phase: &str| b["status"]["phase"] == phase;
    let settled = |b: &&Value| said(b) && (is(b, "Confirmed") || is(b, "Drained"));
    let all = blocks.iter().filter(settled).count() == blocks.len();
    all.then(|| blocks.iter().filter(|b| is(b, "Confirmed")).count())
}

fn wanted(blocks: &[Value]) -> Option<u64> {
    let wishes = blocks.iter().filter_map(|b| b["status"]["wanted"].as_u64());
    wishes.max()
}

/// Twice: need that comes back finds blocks again, under later epochs. One that had an owner cools first, so that for a moment there may
/// be one more.
pub(crate) fn a_block_comes_on_need_and_goes_back(lab: &Lab) {
    let node = &lab.nodes[0];
    blocks(lab, node, "the first block", |b| confirmed(b) == Some(1));
    let mut epochs = Vec::new();
    for round in 0..2 {
        let name = |n| format!("crowd-{round}-{n}");
        for n in 0..CROWD {
            node.allocate(&name(n));
        }
        let more = |b: &[Value]| confirmed(b) > Some(1) && wanted(b) > Some(1);
        let more = blocks(lab, node, "another block", more);
        epochs.push(
            more.iter()
                .filter_map(|b| b["spec"]["epoch"].as_i64())
                .max(),
        );
        (0..CROWD).for_each(|n| node.release(&name(n)));
        let back = |b: &[Value]| confirmed(b) == Some(1) && wanted(b) == Some(1);
        let back = blocks(lab, node, "the blocks to go back", back);
        let routes = node.netns.exec("-4 route show").unwrap();
        for gone in &back[1..] {
            let first = gone["spec"]["first"].as_str().unwrap();
            let routed = routes.contains(&format!("{first}/26"));
            assert!(!routed, "{first} in {routes}");
        }
    }
    assert!(epochs[0] < epochs[1], "{epochs:?}");
}
