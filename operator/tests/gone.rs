//! When a block may have another owner, and what a pool says about whom it serves.

#![allow(missing_docs)]

use std::collections::BTreeSet;
use std::time::Duration;

use kun_cluster::crd::Moment;
use kun_cluster::folder::parse_manifest;
use kun_cluster::{Delta, Kind, ObjectName, Store, parse_with_status};
use kun_config::types::{BlockId, SlotClass};
use kun_operator::gone::Gone;
use kun_operator::plan::{Assignments, Owner, Plan, is_let_go, owner_of, plan};
use kun_operator::pools::{self, Pools};
use kun_operator::writes::{Write, writes};

const SECOND: Duration = Duration::from_secs(1);

fn apply(store: &mut Store, text: &str) {
    for object in parse_manifest("cluster.yaml", text)
        .expect("good manifests")
        .objects
    {
        store.apply(Delta::Upsert(object));
    }
}

fn node(name: &str, uid: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Node\nmetadata: {{name: {name}, uid: {uid}, labels: {{role: {name}}}}}\n"
    )
}

fn block(first: &str, node: &str, uid: &str) -> String {
    let name = first.replace('.', "-");
    format!(
        "---\napiVersion: kun.network/v1alpha1\nkind: IPAMBlock\nmetadata: {{name: block-{name}}}\nspec: {{first: {first}, node: {node}, nodeUID: {uid}}}\n"
    )
}

const A: &str = "00000000-0000-4000-8000-00000000000a";
const B: &str = "00000000-0000-4000-8000-00000000000b";
const COOLDOWN: Duration = Duration::from_secs(120);

#[test]
fn a_block_rests_after_its_node_is_gone_and_never_while_it_is_there() {
    let (mut store, mut gone) = (Store::new(), Gone::default());
    apply(&mut store, &(node("a", A) + &block("10.64.0.0", "a", A)));
    gone.look(&store, SECOND);
    assert_eq!(
        gone.returned(&store, SECOND * 100_000, COOLDOWN),
        BTreeSet::new()
    );
    assert_eq!(gone.next(SECOND, COOLDOWN), None);

    store.apply(Delta::Remove(Kind::Node, ObjectName::new("", "a")));
    gone.look(&store, SECOND * 10);
    gone.look(&store, SECOND * 90);
    assert_eq!(gone.returned(&store, SECOND * 129, COOLDOWN).len(), 0);
    assert_eq!(gone.next(SECOND * 100, COOLDOWN), Some(SECOND * 30));
    assert_eq!(gone.returned(&store, SECOND * 130, COOLDOWN).len(), 1);

    // The same Node again: a watch that lost it and found it.
    apply(&mut store, &node("a", A));
    gone.look(&store, SECOND * 125);
    assert_eq!(gone.returned(&store, SECOND * 130, COOLDOWN).len(), 0);
    // Another under its name.
    apply(&mut store, &node("a", B));
    gone.look(&store, SECOND * 200);
    assert_eq!(gone.returned(&store, SECOND * 319, COOLDOWN).len(), 0);
    assert_eq!(gone.returned(&store, SECOND * 320, COOLDOWN).len(), 1);
}

fn before(store: &Store, returned: &[&str]) -> Assignments {
    let returned: Vec<String> = returned.iter().map(|r| (*r).to_owned()).collect();
    let blocks: Vec<(BlockId, Owner)> = store.blocks().map(|b| (b.block(), owner_of(b))).collect();
    let is_returned = |b: &&(BlockId, Owner)| returned.contains(&b.0.first().to_string());
    Assignments {
        returned: blocks.iter().filter(is_returned).map(|b| b.0).collect(),
        blocks: blocks.into_iter().collect(),
        ..Assignments::default()
    }
}

fn planned(store: &Store, before: &Assignments) -> Plan {
    let config = kun_config::parse("kun.yaml", "").expect("the defaults");
    plan(store, &Pools::of(store, &config.ipam), before, 1)
}

/// The dual blocks of a plan, with the owner's uid.
fn dual(plan: &Plan) -> Vec<String> {
    let blocks = plan.assignments.blocks.iter();
    let dual = blocks.filter(|(block, _)| !block.first().to_string().starts_with("240."));
    dual.map(|(block, owner)| {
        format!(
            "{block} {} {}",
            owner.node,
            &owner.uid.as_deref().unwrap_or("-")[35..]
        )
    })
    .collect()
}

const POOL: &str = "---\napiVersion: kun.network/v1alpha1\nkind: IPPool\nmetadata: {name: main}\nspec: {pods: [10.64.0.0/24]}\n";

#[test]
fn a_node_made_again_gets_blocks_of_its_own_and_later_perhaps_the_old_ones() {
    let mut store = Store::new();
    apply(
        &mut store,
        &(POOL.to_owned() + &node("a", B) + &block("10.64.0.0", "a", A)),
    );
    let plan = planned(&store, &before(&store, &[]));
    assert_eq!(dual(&plan), ["10.64.0.0/26 a a", "10.64.0.64/26 a b"]);
    let plan = planned(&store, &before(&store, &["10.64.0.0"]));
    assert_eq!(dual(&plan), ["10.64.0.0/26 a b"]);
    assert!(plan.assignments.returned.is_empty());
}

#[test]
fn a_block_that_is_to_be_returned_is_not_counted() {
    let mut store = Store::new();
    let draining = block("10.64.0.0", "a", A).replace("nodeUID", "draining: true, nodeUID");
    apply(&mut store, &(POOL.to_owned() + &node("a", A) + &draining));
    let plan = planned(&store, &before(&store, &[]));
    assert_eq!(dual(&plan), ["10.64.0.0/26 a a", "10.64.0.64/26 a a"]);
}

#[test]
fn what_its_owner_wants_and_what_it_has_let_go_of() {
    let status = |first: &str, spec: &str, status: &str| {
        block(first, "a", A).replace("nodeUID", &format!("{spec}nodeUID"))
            + &format!("status: {{{status}}}\n")
    };
    let read = |text: &str| {
        let mut store = Store::new();
        for object in parse_with_status("cluster.yaml", text)
            .expect("good")
            .objects
        {
            store.apply(Delta::Upsert(object));
        }
        store
    };
    let given = |text: &str| {
        let store = read(&(POOL.to_owned() + &node("a", A) + text));
        let let_go = store.blocks().filter(|b| is_let_go(b));
        let let_go: Vec<String> = let_go.map(|b| b.block().first().to_string()).collect();
        let returned: Vec<&str> = let_go.iter().map(String::as_str).collect();
        let plan = planned(&store, &before(&store, &returned));
        let again: Vec<String> = writes(&store, &plan.assignments)
            .iter()
            .filter_map(|write| match write {
                Write::HandOver { block, epoch, .. } => Some(format!("{block} {epoch}")),
                Write::Claim { block, .. } if block.class() == SlotClass::Dual => {
                    Some(block.to_string())
                }
                _ => None,
            })
            .collect();
        again
    };
    let none: [&str; 0] = [];
    let confirmed = "epoch: 1, phase: Confirmed";
    assert_eq!(given(&status("10.64.0.0", "", confirmed)), none);
    let wants = |n: u32| status("10.64.0.0", "", &format!("{confirmed}, wanted: {n}"));
    assert_eq!(given(&wants(1)), none);
    assert_eq!(given(&wants(3)), ["10.64.0.64/26", "10.64.0.128/26"]);
    // A wish is the present owner's, and of one that has confirmed.
    assert_eq!(
        given(&status(
            "10.64.0.0",
            "epoch: 2, ",
            &format!("{confirmed}, wanted: 3")
        )),
        none
    );
    // What was given and is not confirmed yet counts: a wish is served once.
    assert_eq!(given(&(wants(2) + &block("10.64.0.64", "a", A))), none);
    // On its way back, of its own accord: not made up for by itself, and not free.
    let second = |phase: &str| status("10.64.0.64", "", &format!("epoch: 1, phase: {phase}"));
    assert_eq!(given(&(wants(1) + &second("Draining"))), none);
    assert_eq!(given(&(wants(2) + &second("Draining"))), ["10.64.0.128/26"]);
    // Let go of: it may be its own again, under another epoch.
    assert_eq!(given(&(wants(1) + &second("Drained"))), none);
    assert_eq!(given(&(wants(2) + &second("Drained"))), ["10.64.0.64/26 2"]);
    // Called back before it was taken.
    let called = status("10.64.0.64", "draining: true, ", "");
    assert_eq!(given(&(wants(2) + &called)), ["10.64.0.64/26 2"]);
}

#[test]
fn pools_serve_whom_they_select_as_far_as_they_are_open() {
    let pool = |name: &str, spec: &str| {
        format!(
            "---\napiVersion: kun.network/v1alpha1\nkind: IPPool\nmetadata: {{name: {name}}}\nspec: {{{spec}}}\n"
        )
    };
    let mut store = Store::new();
    let text = pool("a-closed", "pods: [10.60.0.0/24], closed: true")
        + &pool("b-few", "pods: [10.61.0.0/24], maxBlocksPerNode: 1")
        + &pool(
            "c-only-b",
            "pods: [10.62.0.0/24], nodeSelector: {matchLabels: {role: b}}",
        )
        + &node("a", A)
        + &node("b", B);
    apply(&mut store, &text);
    let config = kun_config::parse("kun.yaml", "").expect("the defaults");
    let plan = plan(
        &store,
        &Pools::of(&store, &config.ipam),
        &Assignments::default(),
        2,
    );
    assert_eq!(
        dual(&plan),
        ["10.61.0.0/26 a a", "10.61.0.64/26 b b", "10.62.0.0/26 b b"]
    );
    let told: Vec<String> = plan.shortages.iter().map(ToString::to_string).collect();
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(
        told[0].starts_with("node a has 1 of 2 dual blocks"),
        "{told:?}"
    );

    let now = Moment::from_unix(1_700_000_000).expect("a time");
    let later = Moment::from_unix(1_700_000_900).expect("a time");
    let few = store
        .pools()
        .find(|p| &*p.meta.name.name == "b-few")
        .expect("there");
    let status = pools::status(few, &plan.assignments, &plan.shortages, now);
    assert_eq!(
        (status.blocks, status.blocks_given, status.addresses_given),
        (Some(4), Some(2), Some(0))
    );
    let conditions: Vec<String> = status
        .conditions
        .iter()
        .map(|c| format!("{} {:?} {}", c.r#type, c.status, c.reason))
        .collect();
    assert_eq!(conditions, ["Ready True Open", "Exhausted True Shortage"]);
    // What holds already holds since then.
    let mut told = (**few).clone();
    told.status = Some(status.clone());
    assert_eq!(
        pools::status(&told, &plan.assignments, &plan.shortages, later),
        status
    );
}
