//! The store against a naive reading of the same deltas, and the parser against noise.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use kun_cluster::folder::parse_manifest;
use kun_cluster::{Delta, Kind, Object, ObjectName, Store};
use proptest::prelude::*;

/// A slice or a pod, of few names so that they collide.
fn object() -> impl Strategy<Value = Object> {
    let slice = (0_u8..4, 0_u8..4).prop_map(|(name, service)| {
        format!(
            "{{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {{name: s{name}, labels: {{kubernetes.io/service-name: v{service}}}}}, addressType: IPv4}}"
        )
    });
    let pod = (0_u8..4, prop::collection::btree_set(1_u8..5, 0..3), any::<bool>(), any::<bool>()).prop_map(|(name, ips, host, finished)| {
        let ips: Vec<String> = ips.iter().map(|ip| format!("{{ip: 10.0.0.{ip}}}")).collect();
        let phase = if finished { "Failed" } else { "Running" };
        format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: p{name}}}, spec: {{hostNetwork: {host}}}, status: {{phase: {phase}, podIPs: [{}]}}}}",
            ips.join(", ")
        )
    });
    prop_oneof![slice, pod].prop_map(|text| {
        let mut objects = parse_manifest("m.yaml", &text).expect("good").objects;
        objects.remove(0)
    })
}

fn delta() -> impl Strategy<Value = Delta> {
    prop_oneof![
        3 => object().prop_map(Delta::Upsert),
        1 => object().prop_map(|o| Delta::Remove(o.kind(), o.meta().name.clone())),
    ]
}

proptest! {
    #[test]
    fn the_indexes_say_what_the_objects_say(deltas in prop::collection::vec(delta(), 0..40)) {
        let mut store = Store::new();
        let mut naive: BTreeMap<(Kind, ObjectName), Object> = BTreeMap::new();
        for delta in deltas {
            let before = match &delta {
                Delta::Upsert(object) => naive.insert(object.key(), object.clone()),
                Delta::Remove(kind, name) => naive.remove(&(*kind, name.clone())),
            };
            prop_assert_eq!(store.apply(delta), before);
        }
        for service in 0..4 {
            let service = ObjectName::new("default", &format!("v{service}"));
            let indexed: BTreeSet<ObjectName> = store.slices_of(&service).map(|s| s.meta.name.clone()).collect();
            let read: BTreeSet<ObjectName> = naive
                .values()
                .filter_map(|o| match o {
                    Object::EndpointSlice(s) if s.service == service => Some(s.meta.name.clone()),
                    _ => None,
                })
                .collect();
            prop_assert_eq!(indexed, read);
        }
        for last in 1..5_u8 {
            let ip = IpAddr::from([10, 0, 0, last]);
            let holders: BTreeSet<ObjectName> = naive
                .values()
                .filter_map(|o| match o {
                    Object::Pod(p) if p.ips.contains(&ip) && !p.host_network && !p.finished => Some(p.meta.name.clone()),
                    _ => None,
                })
                .collect();
            match store.pod_at(ip) {
                Some(pod) => prop_assert!(holders.contains(&pod.meta.name), "{ip} is not {}'s", pod.meta.name),
                None => prop_assert!(holders.is_empty(), "{ip} is {holders:?}'s"),
            }
        }
    }

    #[test]
    fn no_text_makes_the_parser_panic(text in "[ -~\n\t]{0,200}|([a-c\\-:{}\\[\\]&*!|>'\"#,? \n]{0,80})") {
        // Accepted or refused: both are answers.
        let _ = parse_manifest("m.yaml", &text);
        let _ = kun_config::parse("kun.yaml", &text);
    }

    #[test]
    fn a_torn_manifest_never_panics(cut in 0_usize..600) {
        let text = include_str!("torn.yaml");
        if let Some(torn) = text.get(..cut.min(text.len())) {
            let _ = parse_manifest("m.yaml", torn);
        }
    }
}
