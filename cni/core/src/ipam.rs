//! The slot state machine: `Free → Allocated(generation + 1) → Cooling → Free`.
//!
//! [`Ipam::step`] takes a command and the time and gives a reply and the effects that must be durable *before* the reply is
//! told. What it refuses: to hand out a slot before its cooldown has passed in true time. Time is CLOCK_BOOTTIME within one
//! boot; a new boot restarts every timer and turns what was allocated into cooling, because no pod outlives its kernel. Wall
//! clocks are never looked at. A clock that steps back only makes slots cool for longer.
//!
//! Reuse is first in, first out, and slots that were never used go first. The cooldown is the same for all slots, so when the
//! oldest cooling slot is not ready none is: every step is O(log n).

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use kun_config::types::{BlockId, Slot, SlotClass};
use serde::{Deserialize, Serialize};

/// Blocks one node may know: 65,536 slots, 26 times the densest node in use. Beyond that [`Reply::TooManyBlocks`].
pub const MAX_BLOCKS: usize = 1024;

/// CNI §2: network name, CNI_CONTAINERID, CNI_IFNAME.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Key {
    /// CNI_CONTAINERID. First, because it differs first: comparisons end here.
    pub container_id: String,
    /// CNI_IFNAME.
    pub ifname: String,
    /// Network name.
    pub network: String,
}

/// The pod behind a key, as the runtime told it; for people and for garbage collection.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pod {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// UID.
    pub uid: String,
}

/// Who holds, or last held, a slot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// The attachment.
    pub key: Key,
    /// The pod.
    pub pod: Pod,
}

/// One boot of one kernel (`/proc/sys/kernel/random/boot_id`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct BootId(pub u128);

/// CLOCK_BOOTTIME: time since this boot, suspension included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct BootTime(pub Duration);

/// Where a slot is in its life. A slot without a record is free and was never used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SlotState {
    /// In use.
    Allocated {
        /// By whom.
        owner: Owner,
    },
    /// Released, and not to be used before the cooldown has passed.
    Cooling {
        /// The last owner; `None` for a slot that cools because its block was somebody else's.
        owner: Option<Owner>,
        /// When the timer began, in this boot.
        since: BootTime,
    },
    /// Cooled down.
    Free,
}

/// The durable row of one slot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The slot.
    pub slot: Slot,
    /// Counts allocations of this slot; never goes back.
    pub generation: u64,
    /// Order of changes over all slots; never goes back. The order of reuse.
    pub sequence: u64,
    /// Its state.
    pub state: SlotState,
}

/// Something that must be durable before the reply is told, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Store the record under its slot.
    PutSlot(Record),
    /// Store whether the block is ours.
    PutBlock {
        /// The block.
        block: BlockId,
        /// `false`: it was.
        owned: bool,
    },
    /// Store the boot to which all `since` belong.
    PutBoot(BootId),
}

/// Everything a store holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// `None`: a new store.
    pub boot: Option<BootId>,
    /// Every block ever owned.
    pub blocks: BTreeMap<BlockId, bool>,
    /// Every slot ever used.
    pub records: BTreeMap<Slot, Record>,
}

impl Snapshot {
    /// What the store holds after the effect.
    pub fn apply(&mut self, effect: Effect) {
        match effect {
            Effect::PutSlot(record) => {
                self.records.insert(record.slot, record);
            }
            Effect::PutBlock { block, owned } => {
                self.blocks.insert(block, owned);
            }
            Effect::PutBoot(boot) => self.boot = Some(boot),
        }
    }
}

/// What is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// A slot for the key: the one it has, or the next free one of the class.
    Allocate {
        /// For whom.
        owner: Owner,
        /// With IPv4 or without.
        class: SlotClass,
    },
    /// A slot for the key out of these: the one it has if it is one of them, else the first that is free. A fixed address cools
    /// like any other.
    AllocateOf {
        /// For whom.
        owner: Owner,
        /// Which would do.
        choice: Choice,
    },
    /// The key's slot begins to cool.
    Release {
        /// Whose.
        key: Key,
        /// Only this generation, where the caller knows it.
        generation: Option<u64>,
    },
    /// The blocks that this node owns from now on. Live allocations in other blocks stay until released.
    SetBlocks(BTreeSet<BlockId>),
    /// Only let time pass.
    Tick,
}

/// Slots that would do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Choice {
    /// This one and no other.
    Slot(Slot),
    /// One of the class in one of these ranges, first and last included.
    Within {
        /// With IPv4 or without.
        class: SlotClass,
        /// The ranges.
        ranges: Vec<(Slot, Slot)>,
    },
}

/// Why one slot cannot be had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unavailable {
    /// In no block of ours.
    NotOurs,
    /// In use.
    Allocated(Owner),
    /// Cooling, for so long still.
    Cooling(Duration),
    /// The key has this slot already.
    HasAnother(Slot),
}

/// A live allocation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Allocation {
    /// The slot.
    pub slot: Slot,
    /// Its generation.
    pub generation: u64,
    /// Whose.
    pub owner: Owner,
}

/// What is answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// The key's allocation.
    Allocated(Allocation),
    /// No slot of the class is free.
    Exhausted {
        /// Until the oldest cooling slot is free; `None`: nothing cools.
        retry_after: Option<Duration>,
        /// Slots of the class in use.
        allocated: u32,
        /// Slots of the class that cool.
        cooling: u32,
    },
    /// The one slot that was asked for cannot be had.
    Unavailable {
        /// Which.
        slot: Slot,
        /// Why not.
        because: Unavailable,
    },
    /// The slot cools.
    Released(Slot),
    /// The key has no allocation (of that generation): success all the same (CNI DEL).
    NothingToRelease,
    /// SetBlocks, Tick: done.
    Done,
    /// SetBlocks with more than [`MAX_BLOCKS`] blocks: refused, nothing changed.
    TooManyBlocks,
}

/// A reply and what must be durable before it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use]
pub struct Step {
    /// The answer.
    pub reply: Reply,
    /// First these.
    pub effects: Vec<Effect>,
}

/// What a store holds that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LoadError {
    /// Two slots for one attachment.
    #[error("slots {first} and {second} are both allocated to container {container_id}")]
    TwoSlots {
        /// One.
        first: Slot,
        /// The other.
        second: Slot,
        /// The key's container.
        container_id: String,
    },
    /// Two changes with one number.
    #[error("slots {first} and {second} have the same sequence number {sequence}")]
    SameSequence {
        /// One.
        first: Slot,
        /// The other.
        second: Slot,
        /// The number.
        sequence: u64,
    },
    /// A row under another slot's number.
    #[error("the row of slot {under} holds slot {holds}")]
    Misplaced {
        /// The row's key.
        under: Slot,
        /// The row's content.
        holds: Slot,
    },
    /// A slot outside every block that was ever ours.
    #[error("slot {slot} is in no block that this node ever had")]
    NoBlock {
        /// The slot.
        slot: Slot,
    },
}

/// Slots of one class that wait for an owner.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Waiting {
    fresh: BTreeSet<Slot>,
    /// By sequence. Everything in it was released before everything in `cooling`.
    free: BTreeMap<u64, Slot>,
    cooling: BTreeMap<u64, Slot>,
    allocated: u32,
}

/// All slots of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ipam {
    cooldown: Duration,
    sequence: u64,
    blocks: BTreeMap<BlockId, bool>,
    records: BTreeMap<Slot, Record>,
    live: BTreeMap<Key, Slot>,
    dual: Waiting,
    v6_only: Waiting,
}

impl Ipam {
    /// The state in a store. When the store was written in another boot, the effects restart every timer.
    pub fn load(
        snapshot: Snapshot,
        cooldown: Duration,
        boot: BootId,
        now: BootTime,
    ) -> Result<(Self, Vec<Effect>), LoadError> {
        let rebooted = snapshot.boot != Some(boot);
        let mut ipam = Self {
            cooldown,
            sequence: 0,
            blocks: snapshot.blocks,
            records: BTreeMap::new(),
            live: BTreeMap::new(),
            dual: Waiting::default(),
            v6_only: Waiting::default(),
        };
        let owned: Vec<BlockId> = ipam.owned().collect();
        for block in owned {
            ipam.waiting(block.class()).fresh.extend(block.slots());
        }

        let mut by_sequence: BTreeMap<u64, Record> = BTreeMap::new();
        for (under, record) in snapshot.records {
            if under != record.slot {
                return Err(LoadError::Misplaced {
                    under,
                    holds: record.slot,
                });
            }
            if !ipam.blocks.contains_key(&record.slot.block()) {
                return Err(LoadError::NoBlock { slot: record.slot });
            }
            let (slot, sequence) = (record.slot, record.sequence);
            if let Some(other) = by_sequence.insert(sequence, record) {
                return Err(LoadError::SameSequence {
                    first: other.slot,
                    second: slot,
                    sequence,
                });
            }
        }

        let mut effects = Vec::new();
        if rebooted {
            effects.push(Effect::PutBoot(boot));
        }
        ipam.sequence = by_sequence.keys().next_back().copied().unwrap_or(0);
        for mut record in by_sequence.into_values() {
            if rebooted {
                let owner = match &record.state {
                    SlotState::Allocated { owner } => Some(Some(owner.clone())),
                    SlotState::Cooling { owner, .. } => Some(owner.clone()),
                    SlotState::Free => None,
                };
                if let Some(owner) = owner {
                    // The old sequence keeps the old order.
                    record.state = SlotState::Cooling { owner, since: now };
                    effects.push(Effect::PutSlot(record.clone()));
                }
            }
            if let SlotState::Allocated { owner } = &record.state
                && let Some(first) = ipam.live.insert(owner.key.clone(), record.slot)
            {
                return Err(LoadError::TwoSlots {
                    first,
                    second: record.slot,
                    container_id: owner.key.container_id.clone(),
                });
            }
            ipam.place(record);
        }
        Ok((ipam, effects))
    }

    /// One command at one time. Whoever calls this tells the reply only once the effects are durable; if they cannot be made
    /// durable, this state is ahead of the store and must be dropped.
    pub fn step(&mut self, command: Command, now: BootTime) -> Step {
        let mut effects = Vec::new();
        self.cool(SlotClass::Dual, now, &mut effects);
        self.cool(SlotClass::V6Only, now, &mut effects);
        let reply = match command {
            Command::Allocate { owner, class } => self.allocate(owner, class, now, &mut effects),
            Command::AllocateOf { owner, choice } => {
                self.allocate_of(owner, &choice, now, &mut effects)
            }
            Command::Release { key, generation } => {
                self.release(&key, generation, now, &mut effects)
            }
            Command::SetBlocks(blocks) => self.set_blocks(&blocks, now, &mut effects),
            Command::Tick => Reply::Done,
        };
        Step { reply, effects }
    }

    /// The key's allocation.
    pub fn lookup(&self, key: &Key) -> Option<Allocation> {
        let slot = self.live.get(key)?;
        allocation(&self.records[slot])
    }

    /// Every live allocation, by key.
    pub fn live(&self) -> impl Iterator<Item = Allocation> {
        self.live
            .values()
            .filter_map(|slot| allocation(&self.records[slot]))
    }

    /// Every slot that was ever used.
    pub fn records(&self) -> impl Iterator<Item = &Record> {
        self.records.values()
    }

    /// The blocks that are ours.
    pub fn owned(&self) -> impl Iterator<Item = BlockId> {
        self.blocks
            .iter()
            .filter_map(|(block, owned)| owned.then_some(*block))
    }

    /// Slots of the class: allocated, cooling, free. The last two count owned blocks only.
    pub fn counts(&self, class: SlotClass) -> (u32, u32, u32) {
        let w = match class {
            SlotClass::Dual => &self.dual,
            SlotClass::V6Only => &self.v6_only,
        };
        (
            w.allocated,
            count(w.cooling.len()),
            count(w.free.len() + w.fresh.len()),
        )
    }

    /// How long until a cooling record may be reused; zero when it is due.
    pub fn remaining(&self, since: BootTime, now: BootTime) -> Duration {
        (since.0 + self.cooldown).saturating_sub(now.0)
    }

    fn waiting(&mut self, class: SlotClass) -> &mut Waiting {
        match class {
            SlotClass::Dual => &mut self.dual,
            SlotClass::V6Only => &mut self.v6_only,
        }
    }

    fn is_owned(&self, block: BlockId) -> bool {
        self.blocks.get(&block).copied().unwrap_or(false)
    }

    fn next_sequence(&mut self) -> u64 {
        self.sequence += 1;
        self.sequence
    }

    /// Puts the record into the index it belongs to. Free slots of other nodes' blocks belong to none.
    fn place(&mut self, record: Record) {
        let (slot, sequence) = (record.slot, record.sequence);
        let owned = self.is_owned(slot.block());
        let waiting = self.waiting(slot.class());
        waiting.fresh.remove(&slot);
        match record.state {
            SlotState::Allocated { .. } => waiting.allocated += 1,
            SlotState::Cooling { .. } if owned => {
                waiting.cooling.insert(sequence, slot);
            }
            SlotState::Free if owned => {
                waiting.free.insert(sequence, slot);
            }
            SlotState::Cooling { .. } | SlotState::Free => {}
        }
        self.records.insert(slot, record);
    }

    /// Cooling → Free, for every slot whose time has passed.
    fn cool(&mut self, class: SlotClass, now: BootTime, effects: &mut Vec<Effect>) {
        while let Some((&sequence, &slot)) = self.waiting(class).cooling.first_key_value() {
            let Some(SlotState::Cooling { since, .. }) =
                self.records.get(&slot).map(|r| r.state.clone())
            else {
                unreachable!("what is queued as cooling has a cooling record");
            };
            if !self.remaining(since, now).is_zero() {
                return;
            }
            let waiting = self.waiting(class);
            waiting.cooling.remove(&sequence);
            waiting.free.insert(sequence, slot);
            let record = self.records.get_mut(&slot).expect("it was just read");
            record.state = SlotState::Free;
            effects.push(Effect::PutSlot(record.clone()));
        }
    }

    fn allocate(
        &mut self,
        owner: Owner,
        class: SlotClass,
        now: BootTime,
        effects: &mut Vec<Effect>,
    ) -> Reply {
        if let Some(live) = self.lookup(&owner.key) {
            return Reply::Allocated(live);
        }
        let waiting = self.waiting(class);
        let Some(slot) = waiting
            .fresh
            .pop_first()
            .or_else(|| waiting.free.pop_first().map(|(_, slot)| slot))
        else {
            return self.exhausted(class, now);
        };
        self.take(slot, owner, effects)
    }

    fn allocate_of(
        &mut self,
        owner: Owner,
        choice: &Choice,
        now: BootTime,
        effects: &mut Vec<Effect>,
    ) -> Reply {
        let live = self.lookup(&owner.key);
        let slot = match choice {
            Choice::Slot(slot) => {
                let slot = *slot;
                let because = match (live, self.records.get(&slot).map(|r| &r.state)) {
                    (Some(live), _) if live.slot == slot => return Reply::Allocated(live),
                    (Some(live), _) => Some(Unavailable::HasAnother(live.slot)),
                    (None, Some(SlotState::Allocated { owner })) => {
                        Some(Unavailable::Allocated(owner.clone()))
                    }
                    (None, _) if !self.is_owned(slot.block()) => Some(Unavailable::NotOurs),
                    (None, Some(SlotState::Cooling { since, .. })) => {
                        Some(Unavailable::Cooling(self.remaining(*since, now)))
                    }
                    (None, Some(SlotState::Free) | None) => None,
                };
                if let Some(because) = because {
                    return Reply::Unavailable { slot, because };
                }
                slot
            }
            Choice::Within { class, ranges } => {
                let within = |slot: &Slot| {
                    ranges
                        .iter()
                        .any(|(first, last)| (first..=last).contains(&slot))
                };
                if let Some(live) = live {
                    return match within(&live.slot) {
                        true => Reply::Allocated(live),
                        false => Reply::Unavailable {
                            slot: live.slot,
                            because: Unavailable::HasAnother(live.slot),
                        },
                    };
                }
                let waiting = self.waiting(*class);
                let found = waiting.fresh.iter().copied().find(within).or_else(|| {
                    let mut free = waiting.free.values();
                    free.find(|slot| within(slot)).copied()
                });
                match found {
                    Some(slot) => slot,
                    None => return self.exhausted(*class, now),
                }
            }
        };
        let sequence = self.records.get(&slot).map(|r| r.sequence);
        let waiting = self.waiting(slot.class());
        waiting.fresh.remove(&slot);
        if let Some(sequence) = sequence {
            waiting.free.remove(&sequence);
        }
        self.take(slot, owner, effects)
    }

    /// Gives a slot that waits in no index any more to its owner.
    fn take(&mut self, slot: Slot, owner: Owner, effects: &mut Vec<Effect>) -> Reply {
        let generation = self.records.get(&slot).map_or(0, |r| r.generation) + 1;
        let record = Record {
            slot,
            generation,
            sequence: self.next_sequence(),
            state: SlotState::Allocated {
                owner: owner.clone(),
            },
        };
        effects.push(Effect::PutSlot(record.clone()));
        self.live.insert(owner.key.clone(), slot);
        self.place(record);
        Reply::Allocated(Allocation {
            slot,
            generation,
            owner,
        })
    }

    fn exhausted(&self, class: SlotClass, now: BootTime) -> Reply {
        let waiting = match class {
            SlotClass::Dual => &self.dual,
            SlotClass::V6Only => &self.v6_only,
        };
        let retry_after =
            waiting
                .cooling
                .values()
                .next()
                .and_then(|slot| match self.records[slot].state {
                    SlotState::Cooling { since, .. } => Some(self.remaining(since, now)),
                    SlotState::Allocated { .. } | SlotState::Free => None,
                });
        Reply::Exhausted {
            retry_after,
            allocated: waiting.allocated,
            cooling: count(waiting.cooling.len()),
        }
    }

    fn release(
        &mut self,
        key: &Key,
        generation: Option<u64>,
        now: BootTime,
        effects: &mut Vec<Effect>,
    ) -> Reply {
        let Some(live) = self.lookup(key) else {
            return Reply::NothingToRelease;
        };
        if generation.is_some_and(|meant| meant != live.generation) {
            return Reply::NothingToRelease;
        }
        self.live.remove(key);
        self.waiting(live.slot.class()).allocated -= 1;
        self.start_cooling(live.slot, live.generation, Some(live.owner), now, effects);
        Reply::Released(live.slot)
    }

    fn start_cooling(
        &mut self,
        slot: Slot,
        generation: u64,
        owner: Option<Owner>,
        now: BootTime,
        effects: &mut Vec<Effect>,
    ) {
        let record = Record {
            slot,
            generation,
            sequence: self.next_sequence(),
            state: SlotState::Cooling { owner, since: now },
        };
        effects.push(Effect::PutSlot(record.clone()));
        self.place(record);
    }

    fn set_blocks(
        &mut self,
        wanted: &BTreeSet<BlockId>,
        now: BootTime,
        effects: &mut Vec<Effect>,
    ) -> Reply {
        let known = wanted
            .iter()
            .filter(|block| !self.blocks.contains_key(block))
            .count();
        if self.blocks.len() + known > MAX_BLOCKS {
            return Reply::TooManyBlocks;
        }
        let lost: Vec<BlockId> = self.owned().filter(|b| !wanted.contains(b)).collect();
        for block in lost {
            self.blocks.insert(block, false);
            effects.push(Effect::PutBlock {
                block,
                owned: false,
            });
            let waiting = self.waiting(block.class());
            waiting.fresh.retain(|slot| slot.block() != block);
            waiting.free.retain(|_, slot| slot.block() != block);
            waiting.cooling.retain(|_, slot| slot.block() != block);
        }
        for block in wanted {
            match self.blocks.insert(*block, true) {
                Some(true) => continue,
                None => self.waiting(block.class()).fresh.extend(block.slots()),
                // It was ours, then perhaps another node's: nobody knows how warm its addresses are.
                Some(false) => {
                    for slot in block.slots() {
                        let (generation, owner) = match self.records.get(&slot) {
                            None => (0, None),
                            Some(record) => match &record.state {
                                SlotState::Allocated { .. } => continue,
                                SlotState::Cooling { owner, .. } => {
                                    (record.generation, owner.clone())
                                }
                                SlotState::Free => (record.generation, None),
                            },
                        };
                        self.start_cooling(slot, generation, owner, now, effects);
                    }
                }
            }
            effects.push(Effect::PutBlock {
                block: *block,
                owned: true,
            });
        }
        Reply::Done
    }
}

fn allocation(record: &Record) -> Option<Allocation> {
    match &record.state {
        SlotState::Allocated { owner } => Some(Allocation {
            slot: record.slot,
            generation: record.generation,
            owner: owner.clone(),
        }),
        SlotState::Cooling { .. } | SlotState::Free => None,
    }
}

fn count(n: usize) -> u32 {
    u32::try_from(n).expect("MAX_BLOCKS bounds every set of slots")
}
