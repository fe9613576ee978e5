//! The slots of one class, by what they wait for. An index over the records: it decides nothing.

use std::collections::{BTreeMap, BTreeSet};

use kun_config::types::{BlockId, Slot};

use super::types::{Census, Choice, Claim, Owner, Record, SlotState};

/// Slots of one class. All but the allocated ones are of owned blocks, and those that are to be had of blocks that are given out from.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub(super) struct Queues {
    /// Never used.
    pub(super) fresh: BTreeSet<Slot>,
    /// By sequence: the order of their release.
    pub(super) free: BTreeMap<u64, Slot>,
    /// The cooldown has not been seen to pass.
    pub(super) cooling: BTreeMap<u64, Slot>,
    /// It has, and evidence is missing.
    pub(super) waiting: BTreeMap<u64, Slot>,
    /// Evidence never came.
    pub(super) quarantined: BTreeMap<u64, Slot>,
    allocated: u32,
    /// Slots in use by whom they are counted for.
    holders: BTreeMap<String, u32>,
}

impl Queues {
    pub(super) fn put(&mut self, record: &Record, claim: Option<Claim>) {
        let (slot, sequence) = (record.slot, record.sequence);
        self.fresh.remove(&slot);
        let queue = match &record.state {
            SlotState::Allocated { owner, .. } => {
                self.allocated += 1;
                match self.holders.get_mut(holder(owner)) {
                    Some(held) => *held += 1,
                    None => {
                        self.holders.insert(holder(owner).to_owned(), 1);
                    }
                }
                return;
            }
            SlotState::Cooling { .. } => &mut self.cooling,
            SlotState::Quarantined { .. } => &mut self.quarantined,
            SlotState::Free if claim.is_some_and(Claim::gives) => &mut self.free,
            SlotState::Free => return,
        };
        if claim.is_some_and(Claim::is_owned) {
            queue.insert(sequence, slot);
        }
    }

    /// Nothing of the block is given out any more.
    pub(super) fn hold(&mut self, block: BlockId) {
        self.fresh.retain(|slot| slot.block() != block);
        self.free.retain(|_, slot| slot.block() != block);
    }

    pub(super) fn remove(&mut self, record: &Record) {
        if let SlotState::Allocated { owner, .. } = &record.state {
            self.allocated -= 1;
            let name = holder(owner);
            match self.holders.get_mut(name) {
                Some(held) if *held > 1 => *held -= 1,
                Some(_) | None => {
                    self.holders.remove(name);
                }
            }
            return;
        }
        // What cools may be among those that wait.
        let queues = match &record.state {
            SlotState::Free => [Some(&mut self.free), None],
            SlotState::Quarantined { .. } => [Some(&mut self.quarantined), None],
            SlotState::Cooling { .. } => [Some(&mut self.cooling), Some(&mut self.waiting)],
            SlotState::Allocated { .. } => [None, None],
        };
        for queue in queues.into_iter().flatten() {
            queue.remove(&record.sequence);
        }
    }

    /// The block is another node's from now on.
    pub(super) fn lose(&mut self, block: BlockId) {
        self.hold(block);
        for queue in self.all() {
            queue.retain(|_, slot| slot.block() != block);
        }
    }

    fn all(&mut self) -> [&mut BTreeMap<u64, Slot>; 4] {
        [
            &mut self.free,
            &mut self.cooling,
            &mut self.waiting,
            &mut self.quarantined,
        ]
    }

    pub(super) fn next(&self) -> Option<Slot> {
        let fresh = self.fresh.first();
        fresh.or_else(|| self.free.values().next()).copied()
    }

    pub(super) fn next_of(&self, choice: &Choice) -> Option<Slot> {
        let mut all = self.fresh.iter().chain(self.free.values());
        all.find(|slot| choice.admits(**slot)).copied()
    }

    pub(super) fn census(&self) -> Census {
        Census {
            allocated: self.allocated,
            cooling: count(self.cooling.len()),
            waiting: count(self.waiting.len()),
            quarantined: count(self.quarantined.len()),
            free: count(self.free.len() + self.fresh.len()),
        }
    }

    /// Who has most slots, most first.
    pub(super) fn top(&self, most: usize) -> Vec<(String, u32)> {
        let mut all: Vec<(String, u32)> = self
            .holders
            .iter()
            .map(|(n, held)| (n.clone(), *held))
            .collect();
        all.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
        all.truncate(most);
        all
    }
}

/// Namespaces, since that is where quotas are set; the CNI network for what is no pod.
fn holder(owner: &Owner) -> &str {
    match owner.pod.namespace.as_str() {
        "" => &owner.key.network,
        namespace => namespace,
    }
}

fn count(n: usize) -> u32 {
    u32::try_from(n).expect("MAX_BLOCKS bounds every set of slots")
}
