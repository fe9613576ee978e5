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

/// Phases, and for each whether it is about what is asked for now.
fn are(blocks: &[Value], phases: &[&str]) -> bool {
    let said = |b: &Value| {
        let generation = &b["metadata"]["generation"];
        generation.is_i64() && b["status"]["observedGeneration"] == *generation
    };
    blocks.len() == phases.len()
        && blocks.iter().all(said)
        && blocks
            .iter()
            .zip(phases)
            .all(|(b, p)| b["status"]["phase"] == *p)
}

fn wanted(blocks: &[Value]) -> Option<u64> {
    let wishes = blocks.iter().filter_map(|b| b["status"]["wanted"].as_u64());
    wishes.max()
}

/// Twice: need that comes back finds a block again, under a later epoch.
pub(crate) fn a_block_comes_on_need_and_goes_back(lab: &Lab) {
    let node = &lab.nodes[0];
    blocks(lab, node, "the first block", |b| are(b, &["Confirmed"]));
    let mut epochs = Vec::new();
    for round in 0..2 {
        let name = |n| format!("crowd-{round}-{n}");
        for n in 0..CROWD {
            node.allocate(&name(n));
        }
        let two = |b: &[Value]| are(b, &["Confirmed", "Confirmed"]) && wanted(b) == Some(2);
        let two = blocks(lab, node, "another block", two);
        epochs.push(
            two.iter()
                .filter_map(|b| b["spec"]["epoch"].as_i64())
                .sum::<i64>(),
        );
        (0..CROWD).for_each(|n| node.release(&name(n)));
        let back = |b: &[Value]| are(b, &["Confirmed", "Drained"]) && wanted(b) == Some(1);
        let back = blocks(lab, node, "a block to go back", back);
        let first = back[1]["spec"]["first"].as_str().unwrap();
        let routes = node.netns.exec("-4 route show").unwrap();
        assert!(
            !routes.contains(&format!("{first}/26")),
            "{first} in {routes}"
        );
    }
    assert!(epochs[0] < epochs[1], "{epochs:?}");
}
