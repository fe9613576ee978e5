//! Who has which bucket: the limits of pods to ordered ops on the bandwidth maps, and the way back from what the maps hold.
//!
//! The order is the safety: terms before an interface leads to them, the interface's entry away before its buckets are another's.
//! A packet that is under way meanwhile may be charged to the bucket's next owner: one packet, once.

use std::collections::BTreeMap;

use kun_ebpf_abi::bandwidth::{Limits, Terms};

use crate::ids::Ids;

/// What a pod is held to, on all its interfaces together.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PodLimits {
    /// Its interfaces on the node, by index.
    pub interfaces: Vec<u32>,
    /// What it sends; `None`: no limit.
    pub sends: Option<Terms>,
    /// What reaches it.
    pub receives: Option<Terms>,
}

/// One step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LimitOp {
    /// A bucket for somebody new: full, nothing dropped.
    Fill {
        /// Number.
        bucket: u32,
        /// What it is held to.
        terms: Terms,
    },
    /// Other terms for its owner.
    Set {
        /// Number.
        bucket: u32,
        /// What it is held to.
        terms: Terms,
    },
    /// The interface has these buckets.
    Limit {
        /// Index.
        interface: u32,
        /// Its buckets.
        limits: Limits,
    },
    /// The interface has none.
    Unlimit {
        /// Index.
        interface: u32,
    },
}

/// No bucket is free.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "all {capacity} bandwidth buckets of the node are in use; a pod with limits takes one for each direction"
)]
pub struct Full {
    /// How many there are.
    pub capacity: u32,
}

/// A pod's buckets.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Held {
    interfaces: Vec<u32>,
    limits: Limits,
}

/// The assignment. `K` names a pod.
#[derive(Debug, Clone)]
pub struct Buckets<K> {
    pods: BTreeMap<K, Held>,
    /// Interfaces that an earlier life limited and nobody has claimed yet.
    orphans: BTreeMap<u32, Limits>,
    ids: Ids,
    capacity: u32,
}

impl<K: Ord + Clone> Buckets<K> {
    /// Over maps that hold `observed`, with `capacity` buckets.
    pub fn adopt(observed: impl IntoIterator<Item = (u32, Limits)>, capacity: u32) -> Self {
        let orphans: BTreeMap<u32, Limits> = observed.into_iter().collect();
        let mut ids = Ids::new(capacity);
        for limits in orphans.values() {
            for number in numbers(limits) {
                // The second interface of a pod names the same ones.
                ids.reserve(number);
            }
        }
        Self {
            pods: BTreeMap::new(),
            orphans,
            ids,
            capacity,
        }
    }

    /// Holds a pod to `want`. A pod that is known keeps its buckets, and so does one that an earlier life limited.
    pub fn put(&mut self, pod: K, want: &PodLimits) -> Result<Vec<LimitOp>, Full> {
        let mut ops = Vec::new();
        let old = self.pods.remove(&pod).unwrap_or_else(|| self.claim(want));
        let mut limits = Limits::default();
        let (sends, receives) = (want.sends.as_ref(), want.receives.as_ref());
        let taken = self
            .bucket(old.limits.sends, sends, &mut ops)
            .and_then(|number| {
                limits.sends = number;
                limits.receives = self.bucket(old.limits.receives, receives, &mut ops)?;
                Ok(())
            });
        if let Err(full) = taken {
            if limits.sends != old.limits.sends && limits.sends != 0 {
                self.ids.give(limits.sends - 1);
            }
            self.pods.insert(pod, old);
            return Err(full);
        }
        let interfaces = if limits == Limits::default() {
            Vec::new()
        } else {
            want.interfaces.clone()
        };
        for interface in &interfaces {
            let known = old.limits == limits && old.interfaces.contains(interface);
            if !known {
                ops.push(LimitOp::Limit {
                    interface: *interface,
                    limits,
                });
            }
        }
        self.leave(&old, &interfaces, &limits, &mut ops);
        if !interfaces.is_empty() {
            self.pods.insert(pod, Held { interfaces, limits });
        }
        Ok(ops)
    }

    /// The pod is gone.
    pub fn remove(&mut self, pod: &K) -> Vec<LimitOp> {
        let mut ops = Vec::new();
        if let Some(old) = self.pods.remove(pod) {
            self.leave(&old, &[], &Limits::default(), &mut ops);
        }
        ops
    }

    /// Every pod that an earlier life limited has been put by now: what is left is nobody's.
    pub fn settle(&mut self) -> Vec<LimitOp> {
        let mut ops = Vec::new();
        while let Some((interface, limits)) = self.orphans.pop_first() {
            ops.push(LimitOp::Unlimit { interface });
            for number in numbers(&limits) {
                // The other interface of the pod may have given it already.
                if !self.is_used(number) {
                    self.ids.give(number);
                }
            }
        }
        ops
    }

    /// The bucket numbers of a pod: of what it sends, of what reaches it.
    pub fn of(&self, pod: &K) -> Option<(Option<u32>, Option<u32>)> {
        let limits = self.pods.get(pod)?.limits;
        Some((limits.sends.checked_sub(1), limits.receives.checked_sub(1)))
    }

    /// All pods with a limit.
    pub fn pods(&self) -> impl Iterator<Item = &K> {
        self.pods.keys()
    }

    fn is_used(&self, number: u32) -> bool {
        let held = self.pods.values().map(|h| &h.limits);
        held.chain(self.orphans.values())
            .any(|limits| numbers(limits).any(|n| n == number))
    }

    /// What an earlier life gave to these interfaces: the first's, if they disagree, as they do after a death between two ops.
    fn claim(&mut self, want: &PodLimits) -> Held {
        let mut found = Held::default();
        let mut strays = Vec::new();
        for interface in &want.interfaces {
            let Some(limits) = self.orphans.remove(interface) else {
                continue;
            };
            if found.interfaces.is_empty() {
                found.limits = limits;
            }
            if found.limits == limits {
                found.interfaces.push(*interface);
            } else {
                strays.extend(numbers(&limits));
            }
        }
        for number in strays {
            if !numbers(&found.limits).any(|n| n == number) && !self.is_used(number) {
                self.ids.give(number);
            }
        }
        found
    }

    /// The number, plus one, for a direction that wants `terms` and had `old`.
    fn bucket(
        &mut self,
        old: u32,
        terms: Option<&Terms>,
        ops: &mut Vec<LimitOp>,
    ) -> Result<u32, Full> {
        let Some(terms) = terms.copied().filter(Terms::limits) else {
            return Ok(0);
        };
        if let Some(bucket) = old.checked_sub(1) {
            ops.push(LimitOp::Set { bucket, terms });
            return Ok(old);
        }
        let bucket = self.ids.take().ok_or(Full {
            capacity: self.capacity,
        })?;
        ops.push(LimitOp::Fill { bucket, terms });
        Ok(bucket + 1)
    }

    /// Takes away what `old` had and the pod has no longer.
    fn leave(&mut self, old: &Held, interfaces: &[u32], limits: &Limits, ops: &mut Vec<LimitOp>) {
        let gone = old.interfaces.iter().filter(|i| !interfaces.contains(i));
        ops.extend(gone.map(|interface| LimitOp::Unlimit {
            interface: *interface,
        }));
        for number in numbers(&old.limits) {
            if !numbers(limits).any(|n| n == number) && !self.is_used(number) {
                self.ids.give(number);
            }
        }
    }
}

fn numbers(limits: &Limits) -> impl Iterator<Item = u32> + use<> {
    [limits.sends, limits.receives]
        .into_iter()
        .filter_map(|n| n.checked_sub(1))
}
