//! Whether a store is an older copy of itself: a state directory that was restored from a backup, a disk that was rolled back.
//!
//! Such a store is whole and contradicts nothing in itself. But a generation is durable before its plugin hears of it, and interfaces
//! end with their boot: an interface with a generation that the store has not given yet, or has given to another attachment, was
//! made by what the store has forgotten. What else it has forgotten nobody knows; so none of it is believed.
//!
//! What cannot be seen so: that the addresses of pods which came and went since the copy was made still cool.

use std::collections::{BTreeMap, BTreeSet};

use crate::ipam::{Ipam, Key};
use crate::leaks::Interface;
use crate::tag::UNFINISHED;

/// An interface that such a store cannot have made. Look at the interfaces first, at the store then: it may have given more meanwhile.
pub fn evidence<'a>(ipam: &Ipam, interfaces: &'a [Interface]) -> Option<&'a Interface> {
    // A rebuilt store's least generation, which slots have that it knows nothing of, has no owner. One rebuilt from two histories may have
    // a generation twice.
    let mut given: BTreeMap<u64, BTreeSet<&Key>> = BTreeMap::new();
    for record in ipam.records() {
        if let Some(owner) = record.state.owner() {
            given
                .entry(record.generation)
                .or_default()
                .insert(&owner.key);
        }
    }
    interfaces.iter().find(|interface| {
        let another = |keys: &BTreeSet<&Key>| !keys.contains(&interface.key);
        interface.generation != UNFINISHED
            && (interface.generation > ipam.newest()
                || given.get(&interface.generation).is_some_and(another))
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use kun_config::types::{BlockId, Slot, SlotClass};

    use super::*;
    use crate::ipam::{BootId, BootTime, Command, Key, Owner, Pod, Reply, Rules, Snapshot};

    const NOW: BootTime = BootTime(Duration::ZERO);

    fn key(id: &str) -> Key {
        Key {
            container_id: id.into(),
            ifname: "eth0".into(),
            network: "kun".into(),
        }
    }

    fn ipam() -> Ipam {
        let rules = Rules::time_alone(Duration::from_secs(60));
        let (mut ipam, _) = Ipam::load(Snapshot::default(), rules, BootId(1), NOW).unwrap();
        let block = BlockId::new(Slot(0x0a40_0000)).expect("aligned");
        let _ = ipam.step(Command::SetBlocks([block].into()), NOW);
        ipam
    }

    fn add(ipam: &mut Ipam, id: &str) -> Interface {
        let owner = Owner {
            key: key(id),
            pod: Pod::default(),
            delegated: false,
        };
        let class = SlotClass::Dual;
        let Reply::Allocated(a) = ipam.step(Command::Allocate { owner, class }, NOW).reply else {
            panic!("there are slots")
        };
        Interface {
            index: 7,
            name: format!("kun-{id}"),
            key: key(id),
            generation: a.generation,
            slots: [a.slot].into(),
        }
    }

    #[test]
    fn an_older_copy_is_told_by_what_it_cannot_have_made() {
        let mut ipam = ipam();
        let a = add(&mut ipam, "a");
        let backup = ipam.clone();
        let b = add(&mut ipam, "b");
        let mut all = vec![a, b];
        assert_eq!(evidence(&ipam, &all), None);
        assert_eq!(evidence(&backup, &all).map(|i| &*i.name), Some("kun-b"));
        // It has caught up with what it forgot, under another's name.
        let mut ahead = backup.clone();
        add(&mut ahead, "c");
        assert_eq!(evidence(&ahead, &all).map(|i| &*i.name), Some("kun-b"));
        // What ended stays known, and an ADD that has no slot yet is no evidence.
        let (key, generation) = (key("b"), None);
        let _ = ipam.step(Command::Release { key, generation }, NOW);
        assert_eq!(evidence(&ipam, &all), None);
        all[1].generation = UNFINISHED;
        assert_eq!(evidence(&backup, &all), None);
    }
}
