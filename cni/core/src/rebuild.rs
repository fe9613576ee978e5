//! A new store in place of a damaged one: from what the kernel and the runtime still say of living attachments, never from a
//! guess. Every other slot of their blocks cools, and so does every block that comes later: nobody knows what it was before.
//!
//! What was lost are the generations of slots that nothing carries. New ones begin above a floor that no earlier allocation can
//! have reached, so that a late DEL still meets nothing newer.

use std::collections::BTreeMap;

use kun_config::types::{BlockId, Slot};

use crate::ipam::{BootId, BootTime, Claim, Effect, Key, Owner, Record, SlotState, Standing};

/// One allocation a nanosecond fills this in four seconds; one a second, in a hundred years.
const FLOOR_BITS: u32 = 32;

/// A block that was found: pods live in it, so it is this node's. Its epoch went with the store; whatever it is said to be cools the
/// free slots once more.
const REBUILT: Claim = Claim {
    epoch: 0,
    standing: Standing::Confirmed,
};

/// An attachment that lives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Whose.
    pub owner: Owner,
    /// Its slot.
    pub slot: Slot,
    /// Its generation; `None`: the runtime knows the attachment, and no interface tells.
    pub generation: Option<u64>,
}

/// Why nothing is rebuilt.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RebuildError {
    /// Two attachments carry one address.
    #[error(
        "slot {slot} is carried by container {first} and by container {second}: delete the pod that should not have it"
    )]
    TwoOwners {
        /// The slot.
        slot: Slot,
        /// One container.
        first: String,
        /// The other.
        second: String,
    },
    /// One attachment carries two.
    #[error("container {container} carries slots {first} and {second}: delete its pod")]
    TwoSlots {
        /// The container.
        container: String,
        /// One.
        first: Slot,
        /// The other.
        second: Slot,
    },
}

/// What the new store holds. `number`: how many stores of this node were rebuilt, this one included.
pub fn rebuild(
    found: &[Found],
    number: u64,
    boot: BootId,
    now: BootTime,
) -> Result<Vec<Effect>, RebuildError> {
    let mut by_slot: BTreeMap<Slot, &Found> = BTreeMap::new();
    let mut by_key: BTreeMap<&Key, Slot> = BTreeMap::new();
    for one in found {
        let container = || one.owner.key.container_id.clone();
        if let Some(first) = by_key.insert(&one.owner.key, one.slot)
            && first != one.slot
        {
            return Err(RebuildError::TwoSlots {
                container: container(),
                first,
                second: one.slot,
            });
        }
        if let Some(first) = by_slot.insert(one.slot, one)
            && first.owner.key != one.owner.key
        {
            return Err(RebuildError::TwoOwners {
                slot: one.slot,
                first: first.owner.key.container_id.clone(),
                second: container(),
            });
        }
    }
    let highest = found.iter().filter_map(|f| f.generation).max().unwrap_or(0);
    let floor = ((highest >> FLOOR_BITS) + 1).max(number) << FLOOR_BITS;
    let mut effects = vec![Effect::PutBoot(boot), Effect::PutFloor(floor)];
    let mut blocks: Vec<BlockId> = by_slot.keys().map(|slot| slot.block()).collect();
    blocks.dedup();
    let mut sequence = 0;
    // An allocation of an unknown generation gets one above the floor of its own.
    let mut above = floor;
    for block in blocks {
        effects.push(Effect::PutBlock {
            block,
            claim: REBUILT,
        });
        for slot in block.slots() {
            sequence += 1;
            let (generation, state) = match by_slot.get(&slot) {
                Some(found) => {
                    let generation = found.generation.unwrap_or_else(|| {
                        above += 1;
                        above
                    });
                    let owner = found.owner.clone();
                    (generation, SlotState::Allocated { owner, since: now })
                }
                None => {
                    let cooling = SlotState::Cooling {
                        owner: None,
                        since: now,
                        waived: false,
                    };
                    (floor, cooling)
                }
            };
            effects.push(Effect::PutSlot(Record {
                slot,
                generation,
                sequence,
                state,
            }));
        }
    }
    Ok(effects)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use kun_config::types::SlotClass;

    use super::*;
    use crate::ipam::{Command, Ipam, Pod, Reply, Rules, Snapshot};

    fn found(id: &str, slot: u32, generation: Option<u64>) -> Found {
        Found {
            owner: Owner {
                key: Key {
                    container_id: id.into(),
                    ifname: "eth0".into(),
                    network: "kun".into(),
                },
                pod: Pod::default(),
                delegated: generation.is_none(),
            },
            slot: Slot(0x0a40_0000 + slot),
            generation,
        }
    }

    fn at(seconds: u64) -> BootTime {
        BootTime(Duration::from_secs(seconds))
    }

    #[test]
    fn the_living_keep_what_they_have_and_everything_else_rests() {
        let rules = Rules::time_alone(Duration::from_secs(30));
        // Of two interfaces of one pod each is found.
        let all = [
            found("a", 3, Some(17)),
            found("a", 3, Some(17)),
            found("b", 70, None),
        ];
        let effects = rebuild(&all, 1, BootId(1), at(5)).unwrap();
        let mut store = Snapshot::default();
        effects.into_iter().for_each(|e| store.apply(e));
        let (mut ipam, effects) = Ipam::load(store, rules, BootId(1), at(6)).unwrap();
        assert_eq!(effects, []);
        assert_eq!(ipam.counts(SlotClass::Dual), (2, 126, 0));
        let a = ipam.lookup(&all[0].owner.key).unwrap();
        assert_eq!((a.slot, a.generation), (all[0].slot, 17));
        // A block that comes now may have been ours before.
        let third = BlockId::new(Slot(0x0a40_0080)).expect("aligned");
        let blocks = ipam.owned().chain([third]).collect();
        let _ = ipam.step(Command::SetBlocks(blocks), at(7));
        assert_eq!(ipam.counts(SlotClass::Dual), (2, 190, 0));
        let owner = found("c", 0, Some(0)).owner;
        let class = SlotClass::Dual;
        let Reply::Allocated(c) = ipam.step(Command::Allocate { owner, class }, at(40)).reply
        else {
            panic!("they have rested")
        };
        assert!(c.generation > 1 << 32);
    }

    #[test]
    fn contradictions_are_refused() {
        let twice = [found("a", 3, Some(1)), found("b", 3, Some(2))];
        assert!(matches!(
            rebuild(&twice, 1, BootId(1), at(0)),
            Err(RebuildError::TwoOwners { .. })
        ));
        let two = [found("a", 3, Some(1)), found("a", 4, Some(1))];
        assert!(matches!(
            rebuild(&two, 1, BootId(1), at(0)),
            Err(RebuildError::TwoSlots { .. })
        ));
    }
}
