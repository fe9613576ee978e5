//! The slot state machine: `Free → Allocated(generation + 1) → Cooling → Free`, and `Cooling → Quarantined` when evidence never
//! comes.
//!
//! [`Ipam::step`] takes a command and the time and gives a reply and the effects that must be durable *before* the reply is
//! told. What it refuses: to hand out a slot before its cooldown has passed in true time, and before the evidence that
//! [`Needs`] asks for was seen after its release. Time is CLOCK_BOOTTIME within one boot; a new boot restarts every timer and
//! turns what was allocated into cooling, because no pod outlives its kernel. Wall clocks are never looked at. A clock that
//! steps back only makes slots cool for longer.
//!
//! Reuse is first in, first out, and slots that were never used go first. A slot that lacks evidence steps aside and keeps its
//! place in the order. The cooldown is the same for all slots, so when the oldest cooling slot has not rested none has: every
//! step is O(log n), save those that ask for a range or bring observations.

mod blocks;
mod evidence;
mod queues;
mod types;

use std::collections::BTreeMap;
use std::time::Duration;

use kun_config::types::{BLOCK_SLOTS, BlockId, Slot, SlotClass};

use evidence::Seen;
pub use evidence::{ClusterLook, Look, Needs, Revision, Watermark};
use queues::Queues;
pub use types::{
    Allocation, BootId, BootTime, Census, Choice, Claim, Command, Effect, Key, LoadError, Owner,
    Pod, Record, Reply, Rules, SlotState, Snapshot, Standing, Step, Unavailable,
};

/// Blocks one node may know: 65,536 slots, 26 times the densest node in use. Beyond that [`Reply::TooManyBlocks`].
pub const MAX_BLOCKS: usize = 1024;

/// Namespaces that a full pool's answer names.
const MAX_HOLDERS: usize = 3;

/// All slots of a node.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Ipam {
    rules: Rules,
    sequence: u64,
    /// The last allocation's.
    generation: u64,
    floor: u64,
    blocks: BTreeMap<BlockId, Claim>,
    records: BTreeMap<Slot, Record>,
    live: BTreeMap<Key, Slot>,
    dual: Queues,
    v6_only: Queues,
    /// In memory only. Slots that cool or are quarantined.
    seen: BTreeMap<Slot, Seen>,
}

/// A slot that something may still know, with what a look at it must name.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Unforgotten {
    /// The slot.
    pub slot: Slot,
    /// Its record's sequence number.
    pub sequence: u64,
    /// Its generation.
    pub generation: u64,
    /// The last owner's attachment.
    pub key: Option<Key>,
}

impl Ipam {
    /// The state in a store. When the store was written in another boot, the effects restart every timer.
    pub fn load(
        snapshot: Snapshot,
        rules: Rules,
        boot: BootId,
        now: BootTime,
    ) -> Result<(Self, Vec<Effect>), LoadError> {
        let rebooted = snapshot.boot != Some(boot);
        let mut ipam = Self {
            rules,
            sequence: 0,
            generation: snapshot.floor,
            floor: snapshot.floor,
            blocks: snapshot.blocks,
            records: BTreeMap::new(),
            live: BTreeMap::new(),
            dual: Queues::default(),
            v6_only: Queues::default(),
            seen: BTreeMap::new(),
        };
        let gives: Vec<BlockId> = ipam.owned().filter(|block| ipam.gives(*block)).collect();
        for block in gives {
            ipam.queues(block.class()).fresh.extend(rules.slots(block));
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
            ipam.generation = ipam.generation.max(record.generation);
            if rebooted && let Some(restarted) = after_boot(&record.state, now) {
                // The old sequence keeps the old order.
                record.state = restarted;
                effects.push(Effect::PutSlot(record.clone()));
            }
            if let SlotState::Allocated { owner, .. } = &record.state
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
            Command::Free { slot, generation } => self.free(slot, generation, now, &mut effects),
            Command::Observe { looks, watermark } => {
                for look in &looks {
                    self.observe(look, watermark.as_ref(), now, &mut effects);
                }
                Reply::Done
            }
            Command::SetBlocks(blocks) => {
                let new = blocks.into_iter().map(|block| (block, Claim::FIRST));
                self.set_claims(&new.collect(), now, &mut effects)
            }
            Command::SetClaims(mut claims) => {
                claims.retain(|_, claim| claim.is_owned());
                self.set_claims(&claims, now, &mut effects)
            }
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

    /// The record of a slot that was ever used.
    pub fn record(&self, slot: Slot) -> Option<&Record> {
        self.records.get(&slot)
    }

    /// The blocks that are ours.
    pub fn owned(&self) -> impl Iterator<Item = BlockId> {
        self.blocks
            .iter()
            .filter_map(|(block, claim)| claim.is_owned().then_some(*block))
    }

    /// Every block that is or was ours, and how we stand to it.
    pub fn claims(&self) -> impl Iterator<Item = (BlockId, Claim)> {
        self.blocks.iter().map(|(block, claim)| (*block, *claim))
    }

    /// How we stand to a block; `None`: it never was ours.
    pub fn claim(&self, block: BlockId) -> Option<Claim> {
        self.blocks.get(&block).copied()
    }

    /// Slots of a block that pods have, and those that are not free for another reason.
    pub fn in_use(&self, block: BlockId) -> (u32, u32) {
        let first = block.first();
        let last = Slot(first.0 + (BLOCK_SLOTS - 1));
        let mut in_use = (0, 0);
        for record in self.records.range(first..=last).map(|(_, record)| record) {
            match record.state {
                SlotState::Allocated { .. } => in_use.0 += 1,
                SlotState::Cooling { .. } | SlotState::Quarantined { .. } => in_use.1 += 1,
                SlotState::Free => {}
            }
        }
        in_use
    }

    /// How many slots of the class are in which state.
    pub fn census(&self, class: SlotClass) -> Census {
        self.of(class).census()
    }

    /// Who has slots of the class, most first: namespaces, or networks for attachments of no pod.
    pub fn holders(&self, class: SlotClass) -> Vec<(String, u32)> {
        self.of(class).top(usize::MAX)
    }

    /// Slots of the class: allocated, not free yet for whatever reason, free. The last two count owned blocks only, the last only
    /// those that are given out from.
    pub fn counts(&self, class: SlotClass) -> (u32, u32, u32) {
        let c = self.census(class);
        (c.allocated, c.cooling + c.waiting + c.quarantined, c.free)
    }

    /// How long until a cooling record has rested; zero when it has.
    pub fn remaining(&self, since: BootTime, now: BootTime) -> Duration {
        (since.0.saturating_add(self.rules.cooldown)).saturating_sub(now.0)
    }

    /// The last allocation's generation; no interface that the store knows of has a higher one.
    pub fn newest(&self) -> u64 {
        self.generation
    }

    /// Not zero: the store was rebuilt; the generation of a slot that it knew nothing of.
    pub fn floor(&self) -> u64 {
        self.floor
    }

    /// The rules.
    pub fn rules(&self) -> Rules {
        self.rules
    }

    /// What to look at: every slot that cools or is quarantined in a block of ours, in order of release. Slots of other nodes'
    /// blocks are looked at by whoever owns them now.
    pub fn unforgotten(&self) -> impl Iterator<Item = Unforgotten> {
        let queues = [&self.dual, &self.v6_only];
        queues
            .into_iter()
            .flat_map(|q| q.cooling.iter().chain(&q.waiting).chain(&q.quarantined))
            .filter_map(|(sequence, slot)| {
                let record = self.records.get(slot)?;
                if let SlotState::Cooling { waived: true, .. } = record.state {
                    return None;
                }
                Some(Unforgotten {
                    slot: *slot,
                    sequence: *sequence,
                    generation: record.generation,
                    key: record.state.owner().map(|owner| owner.key.clone()),
                })
            })
    }

    /// What the last look at a slot missed, one line each.
    pub fn why(&self, slot: Slot) -> &[String] {
        self.seen.get(&slot).map_or(&[], |seen| &seen.why)
    }

    /// When the release of a slot that is not forgotten was first looked at in this process.
    pub fn first_look(&self, slot: Slot) -> Option<BootTime> {
        self.seen.get(&slot).map(|seen| seen.first)
    }

    /// Drops all that was seen: the next looks begin anew.
    pub fn forget_looks(&mut self) {
        self.seen.clear();
    }

    /// Whether a cooling slot waits for evidence alone.
    pub fn is_waiting(&self, record: &Record) -> bool {
        self.of(record.slot.class())
            .waiting
            .contains_key(&record.sequence)
    }

    fn of(&self, class: SlotClass) -> &Queues {
        match class {
            SlotClass::Dual => &self.dual,
            SlotClass::V6Only => &self.v6_only,
        }
    }

    fn queues(&mut self, class: SlotClass) -> &mut Queues {
        match class {
            SlotClass::Dual => &mut self.dual,
            SlotClass::V6Only => &mut self.v6_only,
        }
    }

    fn is_owned(&self, block: BlockId) -> bool {
        self.claim(block).is_some_and(Claim::is_owned)
    }

    fn gives(&self, block: BlockId) -> bool {
        self.claim(block).is_some_and(Claim::gives)
    }

    fn next_sequence(&mut self) -> u64 {
        self.sequence += 1;
        self.sequence
    }

    /// Puts the record where it belongs, and takes what stood in its place away. Free slots of other nodes' blocks belong to no queue.
    fn place(&mut self, record: Record) {
        let slot = record.slot;
        let claim = self.claim(slot.block());
        let queues = match slot.class() {
            SlotClass::Dual => &mut self.dual,
            SlotClass::V6Only => &mut self.v6_only,
        };
        if let Some(before) = self.records.insert(slot, record) {
            queues.remove(&before);
        }
        queues.put(&self.records[&slot], claim);
    }

    /// Places a changed record and makes it durable.
    fn put(&mut self, record: Record, effects: &mut Vec<Effect>) {
        effects.push(Effect::PutSlot(record.clone()));
        self.place(record);
    }

    /// Whether a cooling slot asks for nothing but time.
    fn by_time_alone(&self, waived: bool) -> bool {
        waived || self.rules.needs == Needs::NONE
    }

    /// Every slot whose cooldown has passed goes on: to Free, or to wait for evidence.
    fn cool(&mut self, class: SlotClass, now: BootTime, effects: &mut Vec<Effect>) {
        while let Some((&sequence, &slot)) = self.of(class).cooling.first_key_value() {
            let Some(&SlotState::Cooling { since, waived, .. }) =
                self.records.get(&slot).map(|r| &r.state)
            else {
                unreachable!("what is queued as cooling has a cooling record");
            };
            if !self.remaining(since, now).is_zero() {
                return;
            }
            if self.by_time_alone(waived) {
                self.become_free(slot, effects);
            } else {
                let queues = self.queues(class);
                queues.cooling.remove(&sequence);
                queues.waiting.insert(sequence, slot);
            }
        }
    }

    fn become_free(&mut self, slot: Slot, effects: &mut Vec<Effect>) {
        let before = &self.records[&slot];
        let record = Record {
            slot,
            generation: before.generation,
            sequence: before.sequence,
            state: SlotState::Free,
        };
        self.seen.remove(&slot);
        self.put(record, effects);
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
        match self.of(class).next() {
            Some(slot) => self.take(slot, owner, now, effects),
            None => self.exhausted(class, None, now),
        }
    }

    fn allocate_of(
        &mut self,
        owner: Owner,
        choice: &Choice,
        now: BootTime,
        effects: &mut Vec<Effect>,
    ) -> Reply {
        let unavailable = |slot, because| Reply::Unavailable { slot, because };
        match (self.lookup(&owner.key), choice) {
            (Some(live), _) if choice.admits(live.slot) => Reply::Allocated(live),
            (Some(live), Choice::Slot(slot)) => {
                unavailable(*slot, Unavailable::HasAnother(live.slot))
            }
            (Some(live), Choice::Within { .. }) => {
                unavailable(live.slot, Unavailable::HasAnother(live.slot))
            }
            (None, Choice::Slot(slot)) => match self.obstacle(*slot, &owner.key, now) {
                Some(because) => unavailable(*slot, because),
                None => self.take(*slot, owner, now, effects),
            },
            (None, Choice::Within { class, .. }) => match self.of(*class).next_of(choice) {
                Some(slot) => self.take(slot, owner, now, effects),
                None => self.none_of(*class, choice, now),
            },
        }
    }

    /// Gives a slot that nothing is in the way of to its owner.
    fn take(
        &mut self,
        slot: Slot,
        owner: Owner,
        now: BootTime,
        effects: &mut Vec<Effect>,
    ) -> Reply {
        // Counted over all slots: a late DEL names a key and a generation, and the key may have another slot by now.
        self.generation += 1;
        let generation = self.generation;
        let record = Record {
            slot,
            generation,
            sequence: self.next_sequence(),
            state: SlotState::Allocated {
                owner: owner.clone(),
                since: now,
            },
        };
        self.live.insert(owner.key.clone(), slot);
        self.seen.remove(&slot);
        self.put(record, effects);
        Reply::Allocated(Allocation {
            slot,
            generation,
            owner,
        })
    }

    /// Why one slot cannot be had now by this attachment; `None`: it can.
    fn obstacle(&self, slot: Slot, key: &Key, now: BootTime) -> Option<Unavailable> {
        let in_use = slot.0 - slot.block().first().0 < self.rules.slots_per_block;
        let state = self.records.get(&slot).map(|record| &record.state);
        match state {
            Some(SlotState::Allocated { owner, .. }) => Some(Unavailable::Allocated(owner.clone())),
            _ if !self.gives(slot.block()) || !in_use => Some(Unavailable::NotOurs),
            // Whoever still sends there means this very container: a runtime sets its network up anew, or starts it again.
            Some(
                SlotState::Cooling {
                    owner: Some(last), ..
                }
                | SlotState::Quarantined {
                    owner: Some(last), ..
                },
            ) if last.key == *key => None,
            Some(SlotState::Cooling { since, .. }) => {
                let left = self.remaining(*since, now);
                Some(match left.is_zero() {
                    true => Unavailable::Known,
                    false => Unavailable::Cooling(left),
                })
            }
            Some(SlotState::Quarantined { .. }) => Some(Unavailable::Known),
            Some(SlotState::Free) | None => None,
        }
    }

    /// Why no slot of a choice is to be had: they rest or are in use, or none of them ever is this node's to give.
    fn none_of(&self, class: SlotClass, choice: &Choice, now: BootTime) -> Reply {
        let blocks: Vec<BlockId> = (self.owned())
            .filter(|block| block.class() == class && self.gives(*block))
            .collect();
        if blocks.is_empty() || blocks.iter().any(|block| choice.meets(*block)) {
            return self.exhausted(class, Some(choice), now);
        }
        Reply::Elsewhere { class, blocks }
    }

    fn exhausted(&self, class: SlotClass, choice: Option<&Choice>, now: BootTime) -> Reply {
        let queues = self.of(class);
        let mut cooling = queues.cooling.values();
        let next = cooling.find(|slot| choice.is_none_or(|choice| choice.admits(**slot)));
        let retry_after = next.and_then(|slot| match self.records[slot].state {
            SlotState::Cooling { since, .. } => Some(self.remaining(since, now)),
            SlotState::Allocated { .. } | SlotState::Quarantined { .. } | SlotState::Free => None,
        });
        Reply::Exhausted {
            class,
            retry_after,
            census: queues.census(),
            holders: queues.top(MAX_HOLDERS),
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
        self.start_cooling(live.slot, live.generation, Some(live.owner), now, effects);
        Reply::Released(live.slot)
    }

    fn free(
        &mut self,
        slot: Slot,
        generation: u64,
        now: BootTime,
        effects: &mut Vec<Effect>,
    ) -> Reply {
        let Some(record) = self.records.get(&slot) else {
            return Reply::NothingToRelease;
        };
        if record.generation != generation {
            return Reply::Changed {
                generation: record.generation,
            };
        }
        let mut record = record.clone();
        match record.state.clone() {
            SlotState::Free => return Reply::NothingToRelease,
            SlotState::Allocated { owner, .. } => {
                return self.release(&owner.key, Some(generation), now, effects);
            }
            SlotState::Cooling { owner, since, .. } => {
                record.state = SlotState::Cooling {
                    owner,
                    since,
                    waived: true,
                };
            }
            // Evidence is not waited for; time is, once more: what kept it back may have been true until now.
            SlotState::Quarantined { owner, .. } => {
                record.sequence = self.next_sequence();
                record.state = SlotState::Cooling {
                    owner,
                    since: now,
                    waived: true,
                };
            }
        }
        self.seen.remove(&slot);
        self.put(record, effects);
        // It may have rested already.
        self.cool(slot.class(), now, effects);
        Reply::Released(slot)
    }

    fn observe(
        &mut self,
        look: &Look,
        watermark: Option<&Watermark>,
        now: BootTime,
        effects: &mut Vec<Effect>,
    ) {
        let Some(record) = self.records.get(&look.slot) else {
            return;
        };
        if self.rules.needs == Needs::NONE {
            return;
        }
        // Allocated, or released again, since the look began: it says nothing of this release.
        if record.sequence != look.sequence || !self.is_owned(look.slot.block()) {
            return;
        }
        let state = record.state.clone();
        let (SlotState::Cooling { waived: false, .. } | SlotState::Quarantined { .. }) = state
        else {
            return;
        };
        let needs = self.rules.needs;
        let seen = self
            .seen
            .entry(look.slot)
            .or_insert_with(|| Seen::new(look.sequence, now));
        if seen.sequence != look.sequence {
            *seen = Seen::new(look.sequence, now);
        }
        let proven = seen.take(look, needs, watermark);
        let in_vain = now.since(seen.first);
        match state {
            SlotState::Cooling { since, owner, .. } if self.remaining(since, now).is_zero() => {
                if proven {
                    self.become_free(look.slot, effects);
                } else if in_vain >= self.rules.quarantine_after {
                    let mut record = self.records[&look.slot].clone();
                    record.state = SlotState::Quarantined { owner, since };
                    self.put(record, effects);
                }
            }
            // What held it for so long let go of it only now: it cools from now on.
            SlotState::Quarantined { owner, .. } if proven => {
                let generation = self.records[&look.slot].generation;
                self.start_cooling(look.slot, generation, owner, now, effects);
            }
            SlotState::Allocated { .. }
            | SlotState::Cooling { .. }
            | SlotState::Quarantined { .. }
            | SlotState::Free => {}
        }
    }

    fn start_cooling(
        &mut self,
        slot: Slot,
        generation: u64,
        owner: Option<Owner>,
        now: BootTime,
        effects: &mut Vec<Effect>,
    ) {
        self.seen.remove(&slot);
        let record = Record {
            slot,
            generation,
            sequence: self.next_sequence(),
            state: SlotState::Cooling {
                owner,
                since: now,
                waived: false,
            },
        };
        self.put(record, effects);
    }
}

/// What a state becomes in a new boot; `None`: it stays.
fn after_boot(state: &SlotState, now: BootTime) -> Option<SlotState> {
    match state {
        // No pod outlives its kernel.
        SlotState::Allocated { owner, .. } => Some(SlotState::Cooling {
            owner: Some(owner.clone()),
            since: now,
            waived: false,
        }),
        SlotState::Cooling { owner, waived, .. } => Some(SlotState::Cooling {
            owner: owner.clone(),
            since: now,
            waived: *waived,
        }),
        SlotState::Quarantined { owner, .. } => Some(SlotState::Quarantined {
            owner: owner.clone(),
            since: now,
        }),
        SlotState::Free => None,
    }
}

fn allocation(record: &Record) -> Option<Allocation> {
    match &record.state {
        SlotState::Allocated { owner, .. } => Some(Allocation {
            slot: record.slot,
            generation: record.generation,
            owner: owner.clone(),
        }),
        SlotState::Cooling { .. } | SlotState::Quarantined { .. } | SlotState::Free => None,
    }
}
