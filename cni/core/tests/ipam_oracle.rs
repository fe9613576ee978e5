//! The slot machine against a naive reading of its rules: every history, reboots, crashes, stepping clocks and late looks included.
//!
//! The oracle keeps a plain list of slots, true time, and what the network still remembers; it knows no queues and no indices.
//! After every command the store (the effects, applied) must load to the same state as the one in memory: a crash at that point
//! loses nothing but what was seen.

#![allow(missing_docs)]

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use kun_cni_core::ipam::{
    BootId, BootTime, Census, Choice, Claim, ClusterLook, Command, Effect, Ipam, Key, LoadError,
    Look, Needs, Owner, Pod, Record, Reply, Rules, SlotState, Snapshot, Unavailable,
};
use kun_config::types::{BlockId, Slot, SlotClass};
use proptest::prelude::*;

const COOLDOWN: Duration = Duration::from_secs(30);
const QUARANTINE: Duration = Duration::from_secs(20);

#[derive(Debug, Clone)]
enum Act {
    Allocate(u8, SlotClass),
    /// A slot by its number in the two blocks of each class.
    Fixed(u8, SlotClass, u8),
    Release(u8, Meant),
    /// By hand, one of the slots that were ever used.
    Free(u8, Meant),
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
    /// The network forgets one of the addresses that it remembers.
    Forget(u8),
    /// Somebody looks, and tells at once.
    Look,
    /// Somebody looks, and is slow to tell.
    Capture,
    Deliver,
}

#[derive(Debug, Clone, Copy)]
enum Meant {
    Any,
    Right,
    Stale,
}

fn act() -> impl Strategy<Value = Act> {
    let class = || prop_oneof![Just(SlotClass::Dual), Just(SlotClass::V6Only)];
    let meant = || prop_oneof![Just(Meant::Any), Just(Meant::Right), Just(Meant::Stale)];
    prop_oneof![
        8 => (0..90_u8, class()).prop_map(|(k, c)| Act::Allocate(k, c)),
        2 => (0..90_u8, class(), 0..128_u8).prop_map(|(k, c, n)| Act::Fixed(k, c, n)),
        6 => (0..90_u8, meant()).prop_map(|(k, m)| Act::Release(k, m)),
        1 => (0..90_u8, meant()).prop_map(|(n, m)| Act::Free(n, m)),
        1 => proptest::collection::btree_set(0..4_u8, 0..4).prop_map(Act::Blocks),
        3 => (0..40_u16).prop_map(Act::Wait),
        1 => (0..40_u16).prop_map(Act::StepBack),
        1 => Just(Act::Crash),
        1 => (0..60_u8).prop_map(Act::Reboot),
        1 => Just(Act::Tick),
        3 => (0..20_u8).prop_map(Act::Forget),
        2 => Just(Act::Look),
        1 => Just(Act::Capture),
        1 => Just(Act::Deliver),
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
        delegated: false,
    }
}

/// What the oracle knows of a slot that was ever used or ever cooled.
#[derive(Debug, Clone, Default)]
struct Seen {
    generation: u64,
    owner: Option<u8>,
    /// Who had it last, as long as it cools.
    last: Option<u8>,
    /// True time of the last release.
    released: Option<Duration>,
    /// Boot clock at the last restart of the timer; `None`: neither cooling nor quarantined.
    cooling: Option<Duration>,
    /// The timer has been seen to run out.
    rested: bool,
    /// A person said that evidence is not needed.
    waived: bool,
    quarantined: bool,
    /// Boot clock at the first look of this process.
    looked: Option<Duration>,
    /// Order of reuse.
    order: u64,
}

impl Seen {
    /// A new process knows nothing of what the last one saw.
    fn forget_looks(&mut self) {
        self.rested = false;
        self.looked = None;
    }
}

#[derive(Debug, Default)]
struct Oracle {
    slots: BTreeMap<Slot, Seen>,
    owned: BTreeSet<BlockId>,
    ever: BTreeSet<BlockId>,
    /// Slots whose last owner something in the network still knows.
    remembered: BTreeSet<Slot>,
    order: u64,
    /// Allocations so far, over all slots.
    allocations: u64,
    truth: Duration,
    clock: Duration,
    needs_evidence: bool,
}

impl Oracle {
    fn cool(&mut self) {
        for class in [SlotClass::Dual, SlotClass::V6Only] {
            while let Some((slot, since)) = self.coolest(class) {
                if self.clock < since + COOLDOWN {
                    break;
                }
                let alone = !self.needs_evidence;
                let seen = self.slots.get_mut(&slot).expect("found");
                if alone || seen.waived {
                    seen.cooling = None;
                } else {
                    seen.rested = true;
                }
            }
        }
    }

    fn coolest(&self, class: SlotClass) -> Option<(Slot, Duration)> {
        self.slots
            .iter()
            .filter(|(slot, _)| slot.class() == class && self.owned.contains(&slot.block()))
            .filter(|(_, s)| !s.rested && !s.quarantined)
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
        *seen = Seen {
            generation: seen.generation,
            last: seen.owner.or(seen.last),
            released: seen.released,
            cooling: Some(self.clock),
            order: self.order,
            ..Seen::default()
        };
    }

    fn release(&mut self, slot: Slot) {
        self.start_cooling(slot);
        let truth = self.truth;
        self.slots.get_mut(&slot).expect("live").released = Some(truth);
        self.remembered.insert(slot);
    }

    /// A look of this release, which found the address known or not.
    fn observe(&mut self, slot: Slot, order: u64, clear: bool) {
        let clock = self.clock;
        let ours = self.owned.contains(&slot.block());
        let Some(seen) = self.slots.get_mut(&slot) else {
            return;
        };
        let Some(since) = seen.cooling else { return };
        if !ours || seen.order != order || seen.waived || !self.needs_evidence {
            return;
        }
        let first = *seen.looked.get_or_insert(clock);
        let rested = clock >= since + COOLDOWN;
        if seen.quarantined {
            if clear {
                self.start_cooling(slot);
            }
        } else if rested && clear {
            seen.cooling = None;
            seen.rested = false;
        } else if rested && clock.saturating_sub(first) >= QUARANTINE {
            seen.quarantined = true;
            seen.rested = false;
        }
    }
}

/// A look on its way, with what the oracle knows it by.
type Captured = Vec<(Look, u64, bool)>;

struct World {
    ipam: Ipam,
    rules: Rules,
    store: Snapshot,
    boot: BootId,
    oracle: Oracle,
    highest: BTreeMap<Slot, u64>,
    captured: Captured,
}

impl World {
    fn new(needs: Needs) -> Self {
        let store = Snapshot {
            boot: Some(BootId(0)),
            ..Snapshot::default()
        };
        let zero = BootTime(Duration::ZERO);
        let rules = Rules::new(COOLDOWN, QUARANTINE, needs);
        let (ipam, _) = Ipam::load(store.clone(), rules, BootId(0), zero).expect("empty");
        let mut world = Self {
            ipam,
            rules,
            store,
            boot: BootId(0),
            oracle: Oracle {
                needs_evidence: needs != Needs::NONE,
                ..Oracle::default()
            },
            highest: BTreeMap::new(),
            captured: Vec::new(),
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
        let (ipam, effects) = Ipam::load(self.store.clone(), self.rules, self.boot, self.now())
            .expect("what was stored is sound");
        for effect in effects {
            self.store.apply(effect);
        }
        self.ipam = ipam;
        self.oracle.slots.values_mut().for_each(Seen::forget_looks);
    }

    fn act(&mut self, act: &Act) {
        match act {
            Act::Allocate(k, class) => self.allocate(*k, *class),
            Act::Fixed(k, class, n) => self.fixed(*k, *class, *n),
            Act::Release(k, meant) => self.release(*k, *meant),
            Act::Free(n, meant) => self.free(*n, *meant),
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
            Act::Forget(n) => {
                let nth = self.oracle.remembered.iter().nth(usize::from(*n)).copied();
                if let Some(slot) = nth {
                    self.oracle.remembered.remove(&slot);
                }
            }
            Act::Look => {
                let looks = self.look();
                self.deliver(looks);
            }
            Act::Capture => self.captured = self.look(),
            Act::Deliver => {
                let looks = std::mem::take(&mut self.captured);
                self.deliver(looks);
            }
        }
        self.compare();
    }

    /// What the shell does: the core says what to look at, somebody looks.
    fn look(&self) -> Captured {
        self.ipam
            .unforgotten()
            .map(|u| {
                let known = self.oracle.remembered.contains(&u.slot);
                let look = Look {
                    slot: u.slot,
                    sequence: u.sequence,
                    node: Some(Vec::new()),
                    cluster: Some(ClusterLook {
                        held: known.then(|| "a slice".to_owned()).into_iter().collect(),
                        revision: None,
                    }),
                };
                (look, self.oracle.slots[&u.slot].order, !known)
            })
            .collect()
    }

    fn deliver(&mut self, captured: Captured) {
        self.oracle.cool();
        let looks = captured.iter().map(|(look, ..)| look.clone()).collect();
        let reply = self.step(Command::Observe {
            looks,
            watermark: None,
        });
        assert_eq!(reply, Reply::Done);
        for (look, order, clear) in captured {
            self.oracle.observe(look.slot, order, clear);
        }
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
        match self.oracle.next(class) {
            None => assert!(matches!(reply, Reply::Exhausted { .. }), "{reply:?}"),
            Some(slot) => self.given(k, slot, reply),
        }
    }

    fn fixed(&mut self, k: u8, class: SlotClass, n: u8) {
        self.oracle.cool();
        let first = block(if class == SlotClass::Dual { 0 } else { 2 }).first();
        let slot = Slot(first.0 + u32::from(n));
        let owner = owner(k);
        let choice = Choice::Slot(slot);
        let reply = self.step(Command::AllocateOf { owner, choice });
        let because = match self.oracle.of(k) {
            Some(has) if has == slot => {
                assert!(matches!(reply, Reply::Allocated(_)), "{reply:?}");
                return;
            }
            Some(has) => Unavailable::HasAnother(has),
            None => {
                let seen = self.oracle.slots.get(&slot);
                let cooling = seen.and_then(|s| s.cooling);
                match (seen.and_then(|s| s.owner), cooling) {
                    (Some(k), _) => Unavailable::Allocated(self::owner(k)),
                    (None, _) if !self.oracle.owned.contains(&slot.block()) => Unavailable::NotOurs,
                    // It is still the same container that is meant.
                    (None, Some(_)) if seen.is_some_and(|s| s.last == Some(k)) => {
                        self.given(k, slot, reply);
                        return;
                    }
                    (None, Some(since)) => {
                        let left = (since + COOLDOWN).saturating_sub(self.oracle.clock);
                        let quarantined = seen.is_some_and(|s| s.quarantined);
                        match left.is_zero() || quarantined {
                            true => Unavailable::Known,
                            false => Unavailable::Cooling(left),
                        }
                    }
                    (None, None) => {
                        self.given(k, slot, reply);
                        return;
                    }
                }
            }
        };
        assert_eq!(reply, Reply::Unavailable { slot, because });
    }

    /// The slot was free and was asked for, or its turn had come; or it was its own, and was asked for.
    fn given(&mut self, k: u8, slot: Slot, reply: Reply) {
        let Reply::Allocated(a) = reply else {
            panic!("{slot} is free: {reply:?}")
        };
        assert_eq!(a.slot, slot, "first in, first out");
        self.oracle.order += 1;
        let order = self.oracle.order;
        self.oracle.allocations += 1;
        let generation = self.oracle.allocations;
        let seen = self.oracle.slots.entry(slot).or_default();
        let own = seen.cooling.is_some() && seen.last == Some(k);
        // The rule itself, in true time: nobody gets another's address that was released less than a cooldown ago,
        if let Some(released) = seen.released.filter(|_| !own) {
            let earliest = released + COOLDOWN;
            assert!(self.oracle.truth >= earliest, "{slot} again too soon");
        }
        // nor one that the network still knows.
        if self.oracle.needs_evidence && !own {
            assert!(
                !self.oracle.remembered.contains(&slot),
                "{slot} is remembered"
            );
        }
        *seen = Seen {
            generation,
            owner: Some(k),
            released: seen.released,
            order,
            ..Seen::default()
        };
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
                self.oracle.release(slot);
            }
            (Some(_), Meant::Stale) | (None, _) => assert_eq!(reply, Reply::NothingToRelease),
        }
    }

    fn free(&mut self, n: u8, meant: Meant) {
        let nth = self.oracle.slots.iter().nth(usize::from(n));
        let Some((slot, generation)) = nth.map(|(slot, seen)| (*slot, seen.generation)) else {
            return;
        };
        self.oracle.cool();
        let stale = matches!(meant, Meant::Stale);
        let reply = self.step(Command::Free {
            slot,
            generation: generation + u64::from(stale),
        });
        if stale {
            assert_eq!(reply, Reply::Changed { generation });
            return;
        }
        let seen = self.oracle.slots[&slot].clone();
        match (seen.owner, seen.cooling, seen.quarantined) {
            (None, None, _) => return assert_eq!(reply, Reply::NothingToRelease),
            (Some(_), ..) => self.oracle.release(slot),
            (None, Some(_), true) => {
                self.oracle.start_cooling(slot);
                self.waive(slot);
            }
            (None, Some(_), false) => self.waive(slot),
        }
        assert_eq!(reply, Reply::Released(slot));
        if seen.owner.is_none() {
            self.oracle.cool();
        }
    }

    fn waive(&mut self, slot: Slot) {
        let seen = self.oracle.slots.get_mut(&slot).expect("known");
        seen.waived = true;
        seen.forget_looks();
        // A person knows better than the network.
        self.oracle.remembered.remove(&slot);
    }

    fn blocks(&mut self, wanted: &BTreeSet<u8>) {
        self.oracle.cool();
        let wanted: BTreeSet<BlockId> = wanted.iter().map(|i| block(*i)).collect();
        assert_eq!(self.step(Command::SetBlocks(wanted.clone())), Reply::Done);
        for (slot, seen) in &mut self.oracle.slots {
            if !wanted.contains(&slot.block()) {
                seen.forget_looks();
            }
        }
        for block in &wanted {
            if !self.oracle.owned.contains(block) && self.oracle.ever.contains(block) {
                for slot in block.slots() {
                    let seen = self.oracle.slots.get(&slot);
                    if seen.is_none_or(|s| s.owner.is_none()) {
                        self.oracle.start_cooling(slot);
                        // Another node may have had it meanwhile.
                        self.oracle.slots.entry(slot).or_default().last = None;
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
        for (slot, seen) in &mut self.oracle.slots {
            if let Some(owner) = seen.owner.take() {
                seen.last = Some(owner);
                // The pod died with its kernel, at the latest now.
                seen.released = Some(truth);
                seen.cooling = Some(clock);
                seen.waived = false;
                self.oracle.remembered.insert(*slot);
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
            let seen = &self.oracle.slots[&record.slot];
            let (cooling, quarantined) = match record.state {
                SlotState::Cooling { .. } => (true, false),
                SlotState::Quarantined { .. } => (true, true),
                SlotState::Allocated { .. } | SlotState::Free => (false, false),
            };
            assert_eq!(cooling, seen.cooling.is_some(), "{}", record.slot);
            assert_eq!(
                quarantined,
                cooling && seen.quarantined,
                "quarantine of {}",
                record.slot
            );
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
            let held: u32 = self.ipam.holders(class).iter().map(|(_, n)| n).sum();
            assert_eq!(held, allocated, "each allocation is somebody's");
        }
        let (again, effects) =
            Ipam::load(self.store.clone(), self.rules, self.boot, self.now()).expect("sound");
        assert_eq!(effects, [], "same boot: nothing restarts");
        assert!(
            again.records().eq(self.ipam.records())
                && again.live().eq(self.ipam.live())
                && again.claims().eq(self.ipam.claims()),
            "a crash here loses nothing"
        );
        for class in [SlotClass::Dual, SlotClass::V6Only] {
            assert_eq!(again.counts(class), self.ipam.counts(class));
        }
        if !self.oracle.needs_evidence {
            assert_eq!(again, self.ipam, "by time alone nothing is kept in memory");
        }
    }
}

fn run(needs: Needs, acts: &[Act]) {
    let mut world = World::new(needs);
    for act in acts {
        world.act(act);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn every_history_is_as_the_rules_say(acts in proptest::collection::vec(act(), 1..120)) {
        run(Needs::NONE, &acts);
    }

    #[test]
    fn every_history_with_evidence_is_as_the_rules_say(acts in proptest::collection::vec(act(), 1..120)) {
        run(Needs::FOLDER, &acts);
    }
}

#[test]
fn retry_after_is_when_the_head_is_free() {
    let mut world = World::new(Needs::NONE);
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
        class: SlotClass::Dual,
        retry_after: Some(Duration::from_secs(18)),
        census: Census {
            allocated: 63,
            cooling: 1,
            ..Census::default()
        },
        holders: vec![("kun".to_owned(), 63)],
    };
    assert_eq!(reply, expected);
    world.act(&Act::Wait(18));
    world.act(&Act::Allocate(80, SlotClass::Dual));
    assert_eq!(world.oracle.of(80), Some(Slot(0x0a40_0000 + 7)));
}

#[test]
fn a_reboot_in_the_cooldown_starts_it_again() {
    let mut world = World::new(Needs::NONE);
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
            class: SlotClass::Dual,
            retry_after: Some(COOLDOWN),
            census: Census {
                cooling: 64,
                ..Census::default()
            },
            holders: Vec::new(),
        };
        assert_eq!(reply, expected);
    }
}

#[test]
fn a_store_that_cannot_be_is_refused() {
    let load = |store| {
        Ipam::load(
            store,
            Rules::time_alone(COOLDOWN),
            BootId(0),
            BootTime(Duration::ZERO),
        )
    };
    let base = 0x0a40_0000;
    let record = |slot: u32, sequence, k| Record {
        slot: Slot(slot),
        generation: 1,
        sequence,
        state: SlotState::Allocated {
            owner: owner(k),
            since: BootTime::default(),
        },
    };
    let store = |records: &[Record]| {
        let mut store = Snapshot::default();
        store.apply(Effect::PutBoot(BootId(0)));
        store.apply(Effect::PutBlock {
            block: block(0),
            claim: Claim::FIRST,
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
