//! The plan's promises as properties over random clusters, and its choices as examples.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use ipnet::{IpNet, Ipv4Net};
use kun_cluster::folder::parse_manifest;
use kun_cluster::{Delta, Kind, ObjectName, Store};
use kun_config::types::{BlockId, SlotClass};
use kun_operator::plan::{Assignments, Plan, Pools, Shortage, plan};
use proptest::prelude::*;

fn store(text: &str) -> Store {
    let mut store = Store::new();
    for object in parse_manifest("cluster.yaml", text)
        .expect("good manifests")
        .objects
    {
        store.apply(Delta::Upsert(object));
    }
    store
}

fn node(name: &str) -> String {
    format!("---\napiVersion: v1\nkind: Node\nmetadata: {{name: {name}}}\n")
}

fn balancer(name: &str, families: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{type: LoadBalancer, ipFamilies: [{families}], ports: [{{port: 80}}]}}\n"
    )
}

fn nets(list: &[&str]) -> Vec<Ipv4Net> {
    list.iter().map(|n| n.parse().expect("a prefix")).collect()
}

fn pools(dual: &[&str], v6_only: &[&str], services: &[&str]) -> Pools {
    Pools {
        dual: nets(dual),
        v6_only: nets(v6_only),
        services: services
            .iter()
            .map(|n| n.parse::<IpNet>().expect("a prefix"))
            .collect(),
    }
}

fn blocks(plan: &Plan) -> Vec<String> {
    plan.assignments
        .blocks
        .iter()
        .map(|(block, node)| format!("{block} {node}"))
        .collect()
}

fn addresses(plan: &Plan, service: &str) -> Vec<String> {
    let list = plan
        .assignments
        .addresses
        .get(&ObjectName::new("default", service));
    list.into_iter().flatten().map(IpAddr::to_string).collect()
}

#[test]
fn every_node_gets_a_block_of_each_class() {
    let store = store(&(node("a") + &node("b")));
    let plan = plan(
        &store,
        &pools(&["10.64.0.0/24"], &["240.0.0.0/24"], &[]),
        &Assignments::default(),
        1,
    );
    assert_eq!(
        blocks(&plan),
        [
            "10.64.0.0/26 a",
            "10.64.0.64/26 b",
            "240.0.0.0/26 a",
            "240.0.0.64/26 b"
        ]
    );
    assert!(plan.shortages.is_empty());
}

#[test]
fn a_removed_node_keeps_its_blocks() {
    let pools = pools(&["10.64.0.0/24"], &["240.0.0.0/24"], &[]);
    let first = plan(
        &store(&(node("a") + &node("b"))),
        &pools,
        &Assignments::default(),
        1,
    );
    let second = plan(
        &store(&(node("b") + &node("c"))),
        &pools,
        &first.assignments,
        1,
    );
    assert_eq!(
        blocks(&second),
        [
            "10.64.0.0/26 a",
            "10.64.0.64/26 b",
            "10.64.0.128/26 c",
            "240.0.0.0/26 a",
            "240.0.0.64/26 b",
            "240.0.0.128/26 c"
        ]
    );
}

#[test]
fn blocks_written_by_hand_are_respected_and_not_taken_over() {
    let by_hand = "---\napiVersion: kun.network/v1alpha1\nkind: IPAMBlock\nmetadata: {name: block-10-64-0-0}\nspec: {first: 10.64.0.0, node: b}\n";
    let store = store(&(node("a") + &node("b") + by_hand));
    let plan = plan(
        &store,
        &pools(&["10.64.0.0/24"], &["240.0.0.0/24"], &[]),
        &Assignments::default(),
        1,
    );
    assert_eq!(
        blocks(&plan),
        ["10.64.0.64/26 a", "240.0.0.0/26 a", "240.0.0.64/26 b"]
    );
}

#[test]
fn one_block_for_two_nodes_is_told() {
    // The name of the object follows from the block: the other claim is what the operator remembers.
    let by_hand = "---\napiVersion: kun.network/v1alpha1\nkind: IPAMBlock\nmetadata: {name: block-10-64-0-0}\nspec: {first: 10.64.0.0, node: b}\n";
    let before = Assignments {
        blocks: [("10.64.0.0", "a")]
            .map(|(first, node)| {
                let first: Ipv4Addr = first.parse().expect("an address");
                (BlockId::new(first.into()).expect("aligned"), node.into())
            })
            .into(),
        ..Assignments::default()
    };
    let plan = plan(
        &store(by_hand),
        &pools(&["10.64.0.0/24"], &["240.0.0.0/24"], &[]),
        &before,
        1,
    );
    let told: Vec<String> = plan.shortages.iter().map(Shortage::to_string).collect();
    assert_eq!(
        told,
        ["block 10.64.0.0/26 is given to a and to b; remove one of the two IPAMBlock objects"]
    );
}

#[test]
fn an_exhausted_pool_is_told_with_the_remedy() {
    let store = store(&(node("a") + &node("b") + &balancer("web", "IPv4, IPv6")));
    let plan = plan(
        &store,
        &pools(&["10.64.0.0/26"], &["240.0.0.0/24"], &["192.0.2.0/32"]),
        &Assignments::default(),
        1,
    );
    let told: Vec<String> = plan.shortages.iter().map(Shortage::to_string).collect();
    assert_eq!(
        told,
        [
            "node b has 0 of 1 dual blocks: the pools are used up; add a range outside 240.0.0.0/4 to an IPPool's spec.pods",
            "Service default/web has no IPv6 address: no IPPool has a range; add one to an IPPool's spec.services.v6",
        ]
    );
    assert_eq!(addresses(&plan, "web"), ["192.0.2.0"]);
}

#[test]
fn services_get_an_address_of_each_family_they_ask_for() {
    let pools = pools(&[], &["240.0.0.0/24"], &["192.0.2.0/30", "2001:db8::/120"]);
    let text = balancer("both", "IPv4, IPv6") + &balancer("six", "IPv6") + &balancer("open", "");
    let plan = plan(&store(&text), &pools, &Assignments::default(), 1);
    assert_eq!(addresses(&plan, "both"), ["192.0.2.1", "2001:db8::1"]);
    assert_eq!(addresses(&plan, "open"), ["192.0.2.2", "2001:db8::2"]);
    assert_eq!(addresses(&plan, "six"), ["2001:db8::3"]);
}

#[test]
fn a_service_deleted_by_mistake_gets_its_address_back_unless_the_pool_was_needed() {
    let pools = pools(&[], &["240.0.0.0/24"], &["192.0.2.0/30"]);
    let first = plan(
        &store(&balancer("a", "IPv4")),
        &pools,
        &Assignments::default(),
        1,
    );
    assert_eq!(addresses(&first, "a"), ["192.0.2.1"]);
    let second = plan(
        &store(&balancer("b", "IPv4")),
        &pools,
        &first.assignments,
        1,
    );
    assert_eq!(addresses(&second, "b"), ["192.0.2.2"]);
    let back = plan(
        &store(&(balancer("a", "IPv4") + &balancer("b", "IPv4"))),
        &pools,
        &second.assignments,
        1,
    );
    assert_eq!(addresses(&back, "a"), ["192.0.2.1"]);
    let full = plan(
        &store(&(balancer("b", "IPv4") + &balancer("c", "IPv4"))),
        &pools,
        &back.assignments,
        1,
    );
    assert_eq!(addresses(&full, "c"), ["192.0.2.1"]);
    assert_eq!(addresses(&full, "a"), [""; 0]);
}

#[test]
fn addresses_set_by_others_are_left_alone() {
    let status = balancer("web", "IPv4").trim_end().to_owned()
        + "\nstatus: {loadBalancer: {ingress: [{ip: 192.0.2.1}]}}\n";
    let foreign =
        balancer("lb", "IPv4").replace("type:", "loadBalancerClass: example.com/lb, type:");
    let text = status + &foreign + &balancer("new", "IPv4");
    let plan = plan(
        &store(&text),
        &pools(&[], &["240.0.0.0/24"], &["192.0.2.0/29"]),
        &Assignments::default(),
        1,
    );
    assert_eq!(addresses(&plan, "web"), [""; 0]);
    assert_eq!(addresses(&plan, "lb"), [""; 0]);
    assert_eq!(addresses(&plan, "new"), ["192.0.2.2"]);
}

/// One step in a cluster's life: which nodes and services exist.
type Step = (BTreeSet<u8>, BTreeMap<u8, u8>);

fn life() -> impl Strategy<Value = Vec<Step>> {
    let nodes = prop::collection::btree_set(0_u8..8, 0..8);
    let services = prop::collection::btree_map(0_u8..8, 0_u8..4, 0..8);
    prop::collection::vec((nodes, services), 1..6)
}

proptest! {
    #[test]
    fn nothing_is_given_twice_nothing_moves_and_a_second_run_changes_nothing(
        life in life(),
        wanted in 1_u32..4,
        v4_bits in 28_u8..=32,
    ) {
        // Small enough that some lives run out: 16 dual blocks, and 1 to 14 addresses.
        let pools = pools(&["10.64.0.0/23", "10.70.0.0/23"], &["240.0.0.0/22"], &["2001:db8::/125"]);
        let v4: IpNet = format!("192.0.2.0/{v4_bits}").parse().expect("a prefix");
        let pools = Pools { services: [pools.services, vec![v4]].concat(), ..pools };
        let mut held = Assignments::default();
        for (nodes, services) in life {
            let mut text: String = nodes.iter().map(|n| node(&format!("node-{n}"))).collect();
            let families = ["IPv4", "IPv6", "IPv4, IPv6", ""];
            text.extend(services.iter().map(|(s, f)| balancer(&format!("service-{s}"), families[usize::from(*f)])));
            let store = store(&text);
            let planned = plan(&store, &pools, &held, wanted);

            let mut seen = BTreeSet::new();
            for address in planned.assignments.addresses.values().flatten() {
                prop_assert!(seen.insert(*address), "{address} given twice");
                prop_assert!(pools.services.iter().any(|net| net.contains(address)));
            }
            for (block, owner) in &held.blocks {
                prop_assert_eq!(planned.assignments.blocks.get(block), Some(owner), "a block moved");
            }
            for service in store.services() {
                let name = &service.meta.name;
                let now = planned.assignments.addresses.get(name).cloned().unwrap_or_default();
                for address in held.addresses.get(name).into_iter().flatten() {
                    prop_assert!(now.contains(address), "{name} lost {address}");
                }
                let families: BTreeSet<bool> = now.iter().map(IpAddr::is_ipv4).collect();
                prop_assert_eq!(families.len(), now.len(), "two addresses of one family");
            }
            for node in store.nodes() {
                for class in [SlotClass::Dual, SlotClass::V6Only] {
                    let has = planned.assignments.blocks.iter().filter(|(b, n)| n.node == node.meta.name.name && b.class() == class).count();
                    let short = planned.shortages.iter().any(|s| {
                        matches!(s, Shortage::Blocks { node: n, class: c, .. } if *n == node.meta.name.name && *c == class)
                    });
                    prop_assert_eq!(has < wanted as usize, short);
                }
            }
            // A pool is never said to be used up while it has a free block.
            let dual = planned.assignments.blocks.keys().filter(|b| b.class() == SlotClass::Dual).count();
            let short = planned.shortages.iter().any(|s| matches!(s, Shortage::Blocks { class: SlotClass::Dual, .. }));
            prop_assert!(!short || dual == 16, "short with {} of 16 blocks given", dual);

            let again = plan(&store, &pools, &planned.assignments, wanted);
            prop_assert_eq!(&again, &planned, "a second run changed something");
            held = planned.assignments;
        }
    }
}

#[test]
fn ten_thousand_nodes_in_one_plan() {
    let text: String = (0..10_000).map(|n| node(&format!("node-{n:05}"))).collect();
    let store = store(&text);
    assert_eq!(store.counts()[2], (Kind::Node, 10_000));
    let plan = plan(
        &store,
        &pools(&["10.64.0.0/10"], &["240.0.0.0/8"], &[]),
        &Assignments::default(),
        2,
    );
    assert_eq!(plan.assignments.blocks.len(), 40_000);
    assert!(plan.shortages.is_empty());
}
