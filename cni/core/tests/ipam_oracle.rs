//! The slot machine against a naive reading of its rules: every history, reboots, crashes and stepping clocks included.
//!
//! The oracle keeps a plain list of slots and true time; it knows no queues and no indices. After every command the store (the
//! effects, applied) must load to the same state as the one in memory: a crash at that point loses nothing.

#![allow(missing_docs)]

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use kun_cni_core::ipam::{
    BootId, BootTime, Command, Effect, Ipam, Key, LoadError, Owner, Pod, Record, Reply, SlotState,
    Snapshot,
};
use kun_config::types::{BlockId, Slot, SlotClass};
use proptest::prelude::*;

const COOLDOWN: Duration = Duration::from_secs(30);

#[derive(Debug, Clone)]
enum Act {
    Allocate(u8, SlotClass),
    Release(u8, Meant),
    Blocks(BTreeSet<u8>),
    /// True time passes, and the boot clock with it.
    Wait(u16),
    /// The boot clock alone jumps back.
    StepBack(u16),
    /// The process dies; the store stays.
    Crash,
    /// The machine restarts; this many seconds later the agent opens the store.
    Reboot(u8),
    Tick,
}

#[derive(Debug, Clone, Copy)]
enum Meant {
    Any,
    Right,
    Stale,
}

fn act() -> impl Strategy<Value = Act> {
    let class = prop_oneof![Just(SlotClass::Dual), Just(SlotClass::V6Only)];
    let meant = prop_oneof![Just(Meant::Any), Just(Meant::Right), Just(Meant::Stale)];
    prop_oneof![
        8 => (0..90_u8, class).prop_map(|(k, c)| Act::Allocate(k, c)),
        6 => (0..90_u8, meant).prop_map(|(k, m)| Act::Release(k, m)),
        1 => proptest::collection::btree_set(0..4_u8, 0..4).prop_map(Act::Blocks),
        3 => (0..40_u16).prop_map(Act::Wait),
        1 => (0..40_u16).prop_map(Act::StepBack),
        1 => Just(Act::Crash),
        1 => (0..60_u8).prop_map(Act::Reboot),
        1 => Just(Act::Tick),
    ]
}

/// Blocks 0 and 1 are dual, 2 and 3 IPv6-only.
fn block(i: u8) -> BlockId {
    let first = if i < 2 { 0x0a40_0000 } else { 0xf000_0000 };
    BlockId::new(Slot(first + u32::from(i) * 64)).expect("aligned")
}

fn key(i: u8) -> Key {
    Key {
        container_id: format!("c{i}"),
        ifname: "eth0".into(),
        network: "kun".into(),
    }
}

fn owner(i: u8) -> Owner {
    Owner {
        key: key(i),
        pod: Pod::default(),
    }
}

/// What the oracle knows of a slot that was ever used or ever cooled.
#[derive(Debug, Clone, Default)]
struct Seen {
    generation: u64,
    owner: Option<u8>,
    /// True time of the last release.
    released: Option<Duration>,
    /// Boot clock at the last restart of the timer; `None`: cooled down.
    cooling: Option<Duration>,
    /// Order of reuse.
    order: u64,
}

#[derive(Debug, Default)]
struct Oracle {
    slots: BTreeMap<Slot, Seen>,
    owned: BTreeSet<BlockId>,
    ever: BTreeSet<BlockId>,
    order: u64,
    truth: Duration,
    clock: Duration,
}

impl Oracle {
    fn cool(&mut self) {
        for class in [SlotClass::Dual, SlotClass::V6Only] {
            while let Some((slot, since)) = self.coolest(class) {
                if self.clock < since + COOLDOWN {
                    break;
                }
                self.slots.get_mut(&slot).expect("found").cooling = None;
            }
        }
    }

    fn coolest(&self, class: SlotClass) -> Option<(Slot, Duration)> {
        self.slots
            .iter()
            .filter(|(slot, _)| slot.class() == class && self.owned.contains(&slot.block()))
            .filter_map(|(slot, s)| Some((*slot, s.cooling?, s.order)))
            .min_by_key(|(.., order)| *order)
            .map(|(slot, since, _)| (slot, since))
    }

    fn of(&self, k: u8) -> Option<Slot> {
        self.slots
            .iter()
            .find(|(_, s)| s.owner == Some(k))
            .map(|(slot, _)| *slot)
    }

    fn next(&self, class: SlotClass) -> Option<Slot> {
        let ours = || {
            self.owned
                .iter()
                .filter(move |b| b.class() == class)
                .flat_map(|b| b.slots())
        };
        let fresh = ours().filter(|slot| !self.slots.contains_key(slot)).min();
        fresh.or_else(|| {
            ours()
                .filter_map(|slot| Some((slot, self.slots.get(&slot)?)))
                .filter(|(_, s)| s.owner.is_none() && s.cooling.is_none())
                .min_by_key(|(_, s)| s.order)
                .map(|(slot, _)| slot)
        })
    }

    fn start_cooling(&mut self, slot: Slot) {
        self.order += 1;
        let seen = self.slots.entry(slot).or_default();
        seen.owner = None;
        seen.cooling = Some(self.clock);
        seen.order = self.order;
    }
}

struct World {
    ipam: Ipam,
    store: Snapshot,
    boot: BootId,
    oracle: Oracle,
    highest: BTreeMap<Slot, u64>,
}

impl World {
    fn new() -> Self {
        let store = Snapshot {
            boot: Some(BootId(0)),
            ..Snapshot::default()
        };
        let zero = BootTime(Duration::ZERO);
        let (ipam, _) = Ipam::load(store.clone(), COOLDOWN, BootId(0), zero).expect("empty");
        let mut world = Self {
            ipam,
            store,
            boot: BootId(0),
            oracle: Oracle::default(),
            highest: BTreeMap::new(),
        };
        world.act(&Act::Blocks(BTreeSet::from([0, 2])));
        world
    }

    fn now(&self) -> BootTime {
        BootTime(self.oracle.clock)
    }

    fn step(&mut self, command: Command) -> Reply {
        let step = self.ipam.step(command, self.now());
        for effect in step.effects {
            self.store.apply(effect);
        }
        step.reply
    }

    fn reload(&mut self) {
        let (ipam, effects) = Ipam::load(self.store.clone(), COOLDOWN, self.boot, self.now())
            .expect("what was stored is sound");
        for effect in effects {
            self.store.apply(effect);
        }
        self.ipam = ipam;
    }

    fn act(&mut self, act: &Act) {
        match act {
            Act::Allocate(k, class) => self.allocate(*k, *class),
            Act::Release(k, meant) => self.release(*k, *meant),
            Act::Blocks(wanted) => self.blocks(wanted),
            Act::Wait(seconds) => {
                let passed = Duration::from_secs(u64::from(*seconds));
                self.oracle.truth += passed;
                self.oracle.clock += passed;
            }
            Act::StepBack(seconds) => {
                let back = Duration::from_secs(u64::from(*seconds));
                self.oracle.clock = self.oracle.clock.saturating_sub(back);
            }
            Act::Crash => self.reload(),
            Act::Reboot(seconds) => self.reboot(*seconds),
            Act::Tick => {
                self.oracle.cool();
                assert_eq!(self.step(Command::Tick), Reply::Done);
            }
        }
        self.compare();
    }

    fn allocate(&mut self, k: u8, class: SlotClass) {
        self.oracle.cool();
        let owner = owner(k);
        let reply = self.step(Command::Allocate { owner, class });
        if let Some(slot) = self.oracle.of(k) {
            let Reply::Allocated(a) = reply else {
                panic!("a live key keeps its slot: {reply:?}")
            };
            let generation = self.oracle.slots[&slot].generation;
            assert_eq!((a.slot, a.generation), (slot, generation));
            return;
        }
        let Some(slot) = self.oracle.next(class) else {
            assert!(matches!(reply, Reply::Exhausted { .. }), "{reply:?}");
            return;
        };
        let Reply::Allocated(a) = reply else {
            panic!("{slot} is free: {reply:?}")
        };
        assert_eq!(a.slot, slot, "first in, first out");
        self.oracle.order += 1;
        let order = self.oracle.order;
        let seen = self.oracle.slots.entry(slot).or_default();
        // The rule itself, in true time: nobody gets an address that was released less than a cooldown ago.
        if let Some(released) = seen.released {
            let earliest = released + COOLDOWN;
            assert!(self.oracle.truth >= earliest, "{slot} again too soon");
        }
        seen.generation += 1;
        seen.owner = Some(k);
        seen.cooling = None;
        seen.order = order;
        assert_eq!(a.generation, seen.generation);
        let highest = self.highest.entry(slot).or_default();
        assert!(a.generation > *highest, "generations only grow");
        *highest = a.generation;
    }

    fn release(&mut self, k: u8, meant: Meant) {
        self.oracle.cool();
        let live = self.oracle.of(k);
        let right = live.map_or(1, |slot| self.oracle.slots[&slot].generation);
        let generation = match meant {
            Meant::Any => None,
            Meant::Right => Some(right),
            Meant::Stale => Some(right - 1),
        };
        let key = key(k);
        let reply = self.step(Command::Release { key, generation });
        match (live, meant) {
            (Some(slot), Meant::Any | Meant::Right) => {
                assert_eq!(reply, Reply::Released(slot));
                self.oracle.start_cooling(slot);
                let truth = self.oracle.truth;
                self.oracle.slots.get_mut(&slot).expect("live").released = Some(truth);
            }
            (Some(_), Meant::Stale) | (None, _) => assert_eq!(reply, Reply::NothingToRelease),
        }
    }

    fn blocks(&mut self, wanted: &BTreeSet<u8>) {
        self.oracle.cool();
        let wanted: BTreeSet<BlockId> = wanted.iter().map(|i| block(*i)).collect();
        assert_eq!(self.step(Command::SetBlocks(wanted.clone())), Reply::Done);
        for block in &wanted {
            if !self.oracle.owned.contains(block) && self.oracle.ever.contains(block) {
                for slot in block.slots() {
                    let seen = self.oracle.slots.get(&slot);
                    if seen.is_none_or(|s| s.owner.is_none()) {
                        self.oracle.start_cooling(slot);
                    }
                }
            }
        }
        self.oracle.ever.extend(wanted.iter().copied());
        self.oracle.owned = wanted;
    }

    fn reboot(&mut self, seconds: u8) {
        self.boot = BootId(self.boot.0 + 1);
        let passed = Duration::from_secs(u64::from(seconds));
        self.oracle.truth += passed;
        self.oracle.clock = passed;
        let (clock, truth) = (self.oracle.clock, self.oracle.truth);
        for seen in self.oracle.slots.values_mut() {
            if seen.owner.take().is_some() {
                // The pod died with its kernel, at the latest now.
                seen.released = Some(truth);
                seen.cooling = Some(clock);
            } else if seen.cooling.is_some() {
                seen.cooling = Some(clock);
            }
        }
        self.reload();
    }

    fn compare(&self) {
        let live: BTreeMap<Slot, u8> = self
            .oracle
            .slots
            .iter()
            .filter_map(|(slot, s)| Some((*slot, s.owner?)))
            .collect();
        let told: BTreeMap<Slot, Key> = self.ipam.live().map(|a| (a.slot, a.owner.key)).collect();
        let expected: BTreeMap<Slot, Key> = live.iter().map(|(s, k)| (*s, key(*k))).collect();
        assert_eq!(told, expected, "who lives where");
        for record in self.ipam.records() {
            let cooling = matches!(record.state, SlotState::Cooling { .. });
            let seen = &self.oracle.slots[&record.slot];
            assert_eq!(cooling, seen.cooling.is_some(), "{}", record.slot);
        }
        for class in [SlotClass::Dual, SlotClass::V6Only] {
            let (allocated, cooling, free) = self.ipam.counts(class);
            let ours = self.oracle.owned.iter().filter(|b| b.class() == class);
            let elsewhere = live
                .keys()
                .filter(|s| s.class() == class && !self.oracle.owned.contains(&s.block()));
            let all = usize::try_from(allocated + cooling + free).expect("small");
            assert_eq!(
                all - elsewhere.count(),
                ours.count() * 64,
                "every slot of ours is in exactly one state"
            );
        }
        let (again, effects) =
            Ipam::load(self.store.clone(), COOLDOWN, self.boot, self.now()).expect("sound");
        assert_eq!(effects, [], "same boot: nothing restarts");
        assert_eq!(again, self.ipam, "a crash here loses nothing");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn every_history_is_as_the_rules_say(acts in proptest::collection::vec(act(), 1..120)) {
        let mut world = World::new();
        for act in &acts {
            world.act(act);
        }
    }
}

#[test]
fn retry_after_is_when_the_head_is_free() {
    let mut world = World::new();
    for k in 0..64 {
        world.act(&Act::Allocate(k, SlotClass::Dual));
    }
    world.act(&Act::Release(7, Meant::Right));
    world.act(&Act::Wait(12));
    let reply = world.step(Command::Allocate {
        owner: owner(80),
        class: SlotClass::Dual,
    });
    let expected = Reply::Exhausted {
        retry_after: Some(Duration::from_secs(18)),
        allocated: 63,
        cooling: 1,
    };
    assert_eq!(reply, expected);
    world.act(&Act::Wait(18));
    world.act(&Act::Allocate(80, SlotClass::Dual));
    assert_eq!(world.oracle.of(80), Some(Slot(0x0a40_0000 + 7)));
}

#[test]
fn a_reboot_in_the_cooldown_starts_it_again() {
    let mut world = World::new();
    for k in 0..64 {
        world.act(&Act::Allocate(k, SlotClass::Dual));
    }
    world.act(&Act::Release(7, Meant::Right));
    world.act(&Act::Wait(29));
    world.act(&Act::Reboot(5));
    for k in [7, 8] {
        // Every pod died: all 64 cool, and none is handed out before 30 s of this boot have passed since it was looked at.
        let reply = world.step(Command::Allocate {
            owner: owner(k),
            class: SlotClass::Dual,
        });
        let expected = Reply::Exhausted {
            retry_after: Some(COOLDOWN),
            allocated: 0,
            cooling: 64,
        };
        assert_eq!(reply, expected);
    }
}

#[test]
fn a_store_that_cannot_be_is_refused() {
    let load = |store| Ipam::load(store, COOLDOWN, BootId(0), BootTime(Duration::ZERO));
    let base = 0x0a40_0000;
    let record = |slot: u32, sequence, k| Record {
        slot: Slot(slot),
        generation: 1,
        sequence,
        state: SlotState::Allocated { owner: owner(k) },
    };
    let store = |records: &[Record]| {
        let mut store = Snapshot::default();
        store.apply(Effect::PutBoot(BootId(0)));
        store.apply(Effect::PutBlock {
            block: block(0),
            owned: true,
        });
        for record in records {
            store.apply(Effect::PutSlot(record.clone()));
        }
        store
    };
    assert!(load(store(&[record(base, 1, 1), record(base + 1, 2, 2)])).is_ok());
    assert!(matches!(
        load(store(&[record(base, 1, 1), record(base + 1, 2, 1)])),
        Err(LoadError::TwoSlots { .. })
    ));
    assert!(matches!(
        load(store(&[record(base, 1, 1), record(base + 1, 1, 2)])),
        Err(LoadError::SameSequence { .. })
    ));
    assert!(matches!(
        load(store(&[record(base + 640, 1, 1)])),
        Err(LoadError::NoBlock { .. })
    ));
    let mut misplaced = store(&[record(base, 1, 1)]);
    let wrong = record(base + 6, 9, 3);
    misplaced.records.insert(Slot(base + 5), wrong);
    assert!(matches!(load(misplaced), Err(LoadError::Misplaced { .. })));
}
