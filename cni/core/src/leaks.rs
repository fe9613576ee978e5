//! What is left of pods that are gone: interfaces without a slot, slots without an interface.
//!
//! One look is no proof: an ADD or a DEL may be between its halves. A leak is what two looks, [`BETWEEN`] apart, show with the
//! same generation. What is freed is never decided by pod status, which lags behind ADD, but by what carries the address:
//!
//! - A *slot* is leaked when no interface of its attachment and generation exists. The interfaces end with the pod's network
//!   namespace, so nothing can send from the address; it begins to cool. Attachments whose interfaces another plugin made are
//!   left to DEL, GC and people.
//! - An *interface* is leaked when the store knows that its allocation is over: its slots' records say so by their generation. A
//!   store that knows nothing of a slot proves nothing, and a lost store must not take the network from living pods. An
//!   interface that no route leads to carries no pod's traffic, and goes when its attachment has no slot of its generation: so
//!   does one of an ADD that was killed before it knew its slot.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use kun_config::types::Slot;

use crate::ipam::{BootTime, Ipam, Key, SlotState};
use crate::tag::UNFINISHED;

/// Least time between two looks that agree: longer than an ADD takes between its halves on a busy node.
pub const BETWEEN: Duration = Duration::from_secs(20);

/// A host-side interface with our tag.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Index: a name may come back as another interface.
    pub index: u32,
    /// Name.
    pub name: String,
    /// The attachment in its tag.
    pub key: Key,
    /// The generation in its tag.
    pub generation: u64,
    /// Slots that routes lead to through it.
    pub slots: BTreeSet<Slot>,
}

/// Something that is left.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Leak {
    /// A slot whose attachment has no interface.
    Slot {
        /// Which.
        slot: Slot,
        /// Of this generation: released by it.
        generation: u64,
        /// Whose.
        key: Key,
    },
    /// An interface whose allocation is over: the pod's virtual NIC was not reclaimed.
    Interface {
        /// Index.
        index: u32,
        /// Name.
        name: String,
        /// The generation in its tag.
        generation: u64,
        /// The attachment in its tag.
        key: Key,
    },
}

/// What looks have shown so far. Bounded by what a node has of interfaces and slots.
#[derive(Debug, Clone, Default)]
pub struct Watch {
    first: BTreeMap<Leak, BootTime>,
}

impl Watch {
    /// Nothing seen yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes in what is there now and gives what was there, and as leaked, in a look long enough ago. What is not in this look
    /// any more is forgotten.
    pub fn look(&mut self, ipam: &Ipam, interfaces: &[Interface], now: BootTime) -> Vec<Leak> {
        let found = suspects(ipam, interfaces);
        self.first.retain(|leak, _| found.contains(leak));
        let mut leaks = Vec::new();
        for leak in found {
            let first = *self.first.entry(leak.clone()).or_insert(now);
            if now.since(first) >= BETWEEN {
                leaks.push(leak);
            }
        }
        leaks
    }

    /// Interfaces that look leaked, whether proven yet or not. One whose ADD may be waiting for its slot does not.
    pub fn suspected_interfaces(&self) -> usize {
        let all = self.first.keys();
        all.filter(
            |leak| matches!(leak, Leak::Interface { generation, .. } if *generation != UNFINISHED),
        )
        .count()
    }
}

fn suspects(ipam: &Ipam, interfaces: &[Interface]) -> BTreeSet<Leak> {
    let standing: BTreeSet<(&Key, u64)> =
        interfaces.iter().map(|i| (&i.key, i.generation)).collect();
    let slots = ipam
        .live()
        .filter(|a| !a.owner.delegated && !standing.contains(&(&a.owner.key, a.generation)))
        .map(|a| Leak::Slot {
            slot: a.slot,
            generation: a.generation,
            key: a.owner.key,
        });
    let left = interfaces
        .iter()
        .filter(|interface| is_over(ipam, interface))
        .map(|interface| Leak::Interface {
            index: interface.index,
            name: interface.name.clone(),
            generation: interface.generation,
            key: interface.key.clone(),
        });
    slots.chain(left).collect()
}

fn is_over(ipam: &Ipam, interface: &Interface) -> bool {
    let live = ipam.lookup(&interface.key);
    if live.is_some_and(|a| a.generation == interface.generation) {
        return false;
    }
    interface.slots.iter().all(|slot| {
        ipam.record(*slot).is_some_and(|record| {
            let ended = match record.state {
                // Somebody else's by now, or its own next one's.
                SlotState::Allocated { .. } => record.generation > interface.generation,
                SlotState::Cooling { .. } | SlotState::Quarantined { .. } | SlotState::Free => {
                    record.generation >= interface.generation
                }
            };
            // A rebuilt store's least generation is no knowledge of this allocation.
            ended && (ipam.floor() == 0 || record.generation != ipam.floor())
        })
    })
}

#[cfg(test)]
mod tests {
    use kun_config::types::{BlockId, SlotClass};

    use super::*;
    use crate::ipam::{BootId, Command, Owner, Pod, Reply, Rules, Snapshot};

    fn at(seconds: u64) -> BootTime {
        BootTime(Duration::from_secs(seconds))
    }

    fn owner(id: &str, delegated: bool) -> Owner {
        Owner {
            key: Key {
                container_id: id.into(),
                ifname: "eth0".into(),
                network: "kun".into(),
            },
            pod: Pod::default(),
            delegated,
        }
    }

    fn ipam() -> Ipam {
        let rules = Rules::time_alone(Duration::from_secs(60));
        let (mut ipam, _) = Ipam::load(Snapshot::default(), rules, BootId(1), at(0)).unwrap();
        let block = BlockId::new(Slot(0x0a40_0000)).expect("aligned");
        let _ = ipam.step(Command::SetBlocks([block].into()), at(0));
        ipam
    }

    fn add(ipam: &mut Ipam, owner: Owner) -> Interface {
        let key = owner.key.clone();
        let class = SlotClass::Dual;
        let step = ipam.step(Command::Allocate { owner, class }, at(0));
        let Reply::Allocated(a) = step.reply else {
            panic!("{step:?}")
        };
        Interface {
            index: 7,
            name: "kun0".into(),
            key,
            generation: a.generation,
            slots: [a.slot].into(),
        }
    }

    fn del(ipam: &mut Ipam, interface: &Interface) {
        let key = interface.key.clone();
        let generation = Some(interface.generation);
        let _ = ipam.step(Command::Release { key, generation }, at(1));
    }

    #[test]
    fn a_slot_without_an_interface_is_leaked_at_the_second_look() {
        let mut ipam = ipam();
        let interface = add(&mut ipam, owner("a", false));
        let mut watch = Watch::new();
        assert_eq!(watch.look(&ipam, &[], at(1)), []);
        assert_eq!(watch.look(&ipam, &[], at(20)), []);
        let leaks = watch.look(&ipam, &[], at(21));
        assert!(
            matches!(&leaks[..], [Leak::Slot { generation: 1, .. }]),
            "{leaks:?}"
        );
        // It came after all: an ADD that took its time. The next absence counts anew.
        assert_eq!(
            watch.look(&ipam, std::slice::from_ref(&interface), at(22)),
            []
        );
        assert_eq!(watch.look(&ipam, &[], at(60)), []);
        // Another generation of the same key is another suspect.
        del(&mut ipam, &interface);
        add(&mut ipam, owner("a", false));
        assert_eq!(watch.look(&ipam, &[], at(90)), []);
    }

    #[test]
    fn what_another_plugin_made_is_not_judged_by_our_interfaces() {
        let mut ipam = ipam();
        add(&mut ipam, owner("a", true));
        let mut watch = Watch::new();
        watch.look(&ipam, &[], at(1));
        assert_eq!(watch.look(&ipam, &[], at(100)), []);
    }

    #[test]
    fn an_interface_is_leaked_when_the_store_knows_that_its_allocation_is_over() {
        let mut ipam = ipam();
        let interface = add(&mut ipam, owner("a", false));
        let seen = std::slice::from_ref(&interface);
        let mut watch = Watch::new();
        watch.look(&ipam, seen, at(1));
        assert_eq!(watch.look(&ipam, seen, at(100)), [], "it lives");
        del(&mut ipam, &interface);
        assert_eq!(watch.look(&ipam, seen, at(101)), []);
        assert_eq!(watch.suspected_interfaces(), 1);
        let leaks = watch.look(&ipam, seen, at(121));
        assert!(
            matches!(&leaks[..], [Leak::Interface { index: 7, .. }]),
            "{leaks:?}"
        );
    }

    #[test]
    fn what_an_add_left_that_never_knew_its_slot_is_leaked_and_one_that_waits_is_not() {
        let mut ipam = ipam();
        let waiting = Interface {
            index: 7,
            name: "kun0".into(),
            key: owner("a", false).key,
            generation: UNFINISHED,
            slots: BTreeSet::new(),
        };
        let seen = std::slice::from_ref(&waiting);
        let mut watch = Watch::new();
        assert_eq!(watch.look(&ipam, seen, at(1)), []);
        assert_eq!(watch.suspected_interfaces(), 0, "an ADD may be at work");
        // It knew its slot a moment later, and tagged the interface.
        let interface = add(&mut ipam, owner("a", false));
        assert_eq!(watch.look(&ipam, &[interface], at(60)), []);
        // Another was killed.
        assert_eq!(watch.look(&ipam, seen, at(61)), []);
        let leaks = watch.look(&ipam, seen, at(81));
        assert!(
            leaks.iter().any(|leak| matches!(
                leak,
                Leak::Interface {
                    generation: UNFINISHED,
                    ..
                }
            )),
            "{leaks:?}"
        );
    }

    #[test]
    fn a_store_that_lost_everything_takes_no_living_pods_network() {
        let interface = add(&mut ipam(), owner("a", false));
        let empty = ipam();
        let seen = std::slice::from_ref(&interface);
        let mut watch = Watch::new();
        watch.look(&empty, seen, at(1));
        assert_eq!(watch.look(&empty, seen, at(100)), []);
        // Nothing leads to it: it is half made.
        let bare = Interface {
            slots: BTreeSet::new(),
            ..interface
        };
        let seen = std::slice::from_ref(&bare);
        watch.look(&empty, seen, at(101));
        assert_eq!(watch.look(&empty, seen, at(121)).len(), 1);
    }
}
