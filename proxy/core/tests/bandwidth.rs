//! Buckets over random lives: no two pods share one, a pod keeps its own through a restart, and a death between any two ops leaves
//! nothing that the next life does not put right.

use std::collections::{BTreeMap, BTreeSet};

use kun_ebpf_abi::bandwidth::{Limits, Terms};
use kun_proxy_core::{Buckets, Full, LimitOp, PodLimits};
use proptest::prelude::*;

/// The maps.
#[derive(Debug, Clone, Default)]
struct Maps {
    limited: BTreeMap<u32, Limits>,
    terms: BTreeMap<u32, Terms>,
    /// How often each bucket was filled anew.
    fills: BTreeMap<u32, u32>,
}

impl Maps {
    fn apply(&mut self, op: &LimitOp) {
        match *op {
            LimitOp::Fill { bucket, terms } => {
                let used = self
                    .limited
                    .values()
                    .any(|l| [l.sends, l.receives].contains(&(bucket + 1)));
                assert!(!used, "bucket {bucket} is filled while somebody has it");
                self.terms.insert(bucket, terms);
                *self.fills.entry(bucket).or_default() += 1;
            }
            LimitOp::Set { bucket, terms } => {
                self.terms.insert(bucket, terms);
            }
            LimitOp::Limit { interface, limits } => {
                for number in [limits.sends, limits.receives] {
                    assert!(
                        number == 0 || self.terms.contains_key(&(number - 1)),
                        "no terms yet"
                    );
                }
                self.limited.insert(interface, limits);
            }
            LimitOp::Unlimit { interface } => {
                self.limited.remove(&interface);
            }
        }
    }

    /// The terms of an interface: of what its pod sends and what reaches it.
    fn of(&self, interface: u32) -> (Option<Terms>, Option<Terms>) {
        let limits = self.limited.get(&interface).copied().unwrap_or_default();
        let terms = |number: u32| number.checked_sub(1).map(|n| self.terms[&n]);
        (terms(limits.sends), terms(limits.receives))
    }
}

fn terms() -> impl Strategy<Value = Option<Terms>> {
    prop_oneof![1 => Just(None), 3 => (1_u64..5).prop_map(|m| Some(Terms::new(m * 1_000_000, None, false)))]
}

/// A pod and what it is to be held to; `None`: it goes.
fn changes() -> impl Strategy<Value = Vec<(u32, Option<PodLimits>)>> {
    let one = (0_u32..5).prop_flat_map(|pod| {
        let limits =
            (1_usize..3, terms(), terms()).prop_map(move |(count, sends, receives)| PodLimits {
                interfaces: [10 + pod, 20 + pod][..count].to_vec(),
                sends,
                receives,
            });
        (Just(pod), prop::option::weighted(0.8, limits))
    });
    prop::collection::vec(one, 1..20)
}

proptest! {
    #[test]
    fn everybody_has_what_is_theirs(changes in changes(), dies in prop::collection::vec(0_usize..8, 20)) {
        let mut maps = Maps::default();
        let mut wanted: BTreeMap<u32, PodLimits> = BTreeMap::new();
        let mut buckets = Buckets::adopt([], 32);
        for ((pod, want), dies) in changes.into_iter().zip(dies) {
            let ops = match &want {
                Some(want) => buckets.put(pod, want).unwrap(),
                None => buckets.remove(&pod),
            };
            match want {
                Some(want) => drop(wanted.insert(pod, want)),
                None => drop(wanted.remove(&pod)),
            }
            for op in ops.iter().take(dies) {
                maps.apply(op);
            }
            if dies <= ops.len() {
                let before = maps.clone();
                buckets = Buckets::adopt(maps.limited.clone(), 32);
                for (pod, want) in &wanted {
                    buckets.put(*pod, want).unwrap().iter().for_each(|op| maps.apply(op));
                }
                buckets.settle().iter().for_each(|op| maps.apply(op));
                // Who had a bucket for a direction in both lives has the same one, and it was not filled anew.
                for (other, want) in wanted.iter().filter(|(other, _)| **other != pod) {
                    for interface in &want.interfaces {
                        let (old, new) = (before.limited.get(interface), maps.limited.get(interface));
                        prop_assert_eq!(old, new, "pod {}", other);
                        for number in old.iter().flat_map(|l| [l.sends, l.receives]).filter(|n| *n > 0) {
                            prop_assert_eq!(before.fills[&(number - 1)], maps.fills[&(number - 1)]);
                        }
                    }
                }
            }
            let mut owners: BTreeMap<u32, u32> = BTreeMap::new();
            let mut interfaces = BTreeSet::new();
            for (pod, want) in &wanted {
                for interface in &want.interfaces {
                    prop_assert_eq!(maps.of(*interface), (want.sends, want.receives));
                    interfaces.insert(*interface);
                    let limits = maps.limited.get(interface).copied().unwrap_or_default();
                    for number in [limits.sends, limits.receives].into_iter().filter(|n| *n > 0) {
                        prop_assert_eq!(*owners.entry(number).or_insert(*pod), *pod, "a bucket of two pods");
                    }
                }
            }
            prop_assert!(maps.limited.keys().all(|i| interfaces.contains(i)), "{:?}", maps.limited);
            prop_assert!(owners.keys().all(|n| *n <= 12), "numbers are used again");
        }
    }
}

#[test]
fn a_full_node_refuses_and_forgets_nothing() {
    let want = |interface| PodLimits {
        interfaces: vec![interface],
        sends: Some(Terms::new(1_000_000, None, false)),
        receives: Some(Terms::new(1_000_000, None, false)),
    };
    let mut buckets = Buckets::adopt([], 3);
    assert_eq!(buckets.put("a", &want(1)).unwrap().len(), 3);
    assert_eq!(buckets.put("b", &want(2)), Err(Full { capacity: 3 }));
    assert_eq!(buckets.of(&"a"), Some((Some(0), Some(1))));
    buckets.remove(&"a");
    assert_eq!(buckets.put("b", &want(2)).unwrap().len(), 3);
}
