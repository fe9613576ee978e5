//! Every history of two nodes, three containers and one block of two slots, within bounds: the real slot machine between a
//! store that survives, a network that forgets late, processes that crash between any two transactions, machines that reboot,
//! clocks that step back, DELs that come twice and late, looks that are told late, and a block that moves when its node is gone.
//!
//! The invariants are those of the ledger (`conformance/ledger/ipam.toml`). A model that finds nothing proves nothing unless it
//! finds bugs that are there: each mutant of `model/subject.rs` must be caught.

#![allow(missing_docs)]

#[path = "model/canonical.rs"]
mod canonical;
#[path = "model/subject.rs"]
mod subject;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use kun_cni_core::ipam::{
    BootId, BootTime, Claim, ClusterLook, Command, Effect, Key, Look, Owner, Pod, Reply, SlotState,
    Snapshot,
};
use kun_config::types::{BlockId, Slot, SlotClass};
use stateright::{Checker, Expectation, HasDiscoveries, Model, Property};
use subject::{COOLDOWN, MUTANTS, Mutant, SLOTS, Subject};

const FIRST: Slot = Slot(0x0a40_0000);

/// What the clocks show in the beginning: as much as they may step back.
const BEGIN: u64 = 1;

/// So often each kind of trouble comes at most.
const TROUBLE: u8 = 1;

pub(crate) fn key(container: u8) -> Key {
    Key {
        container_id: container.to_string(),
        ifname: String::new(),
        network: String::new(),
    }
}

pub(crate) fn owner(container: u8) -> Owner {
    Owner {
        key: key(container),
        pod: Pod::default(),
        delegated: false,
    }
}

fn block() -> BlockId {
    BlockId::new(FIRST).expect("aligned")
}

/// Containers 0 and 1 are the first node's, 2 is the second's.
fn node_of(container: u8) -> usize {
    usize::from(container == 2)
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Node {
    subject: Subject,
    store: Snapshot,
    boot: u128,
    clock: u64,
    /// A look that was not told yet: slot, sequence, clear.
    captured: Vec<(Slot, u64, bool)>,
    /// Gone for good, and its pods with it.
    fenced: bool,
}

/// An interface that carries an address, whatever any store says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Interface {
    slot: Slot,
    generation: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Troubles {
    crashes: u8,
    reboots: u8,
    steps_back: u8,
    captures: u8,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct World {
    /// Shared with the world before, until it changes.
    nodes: [Arc<Node>; 2],
    interfaces: BTreeMap<u8, Interface>,
    /// DELs that may come again at any time.
    late: BTreeSet<(u8, u64)>,
    truth: u64,
    released: BTreeMap<Slot, u64>,
    remembered: BTreeSet<Slot>,
    /// The last generation that a node gave a slot.
    highest: BTreeMap<(usize, Slot), u64>,
    had: Troubles,
    /// An address was given that had been given before.
    twice: bool,
    broken: Option<&'static str>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Action {
    Add(u8),
    /// The process dies after the first transaction of the ADD and before the reply.
    AddCut(u8),
    Del(u8),
    /// The DEL of a container whose ADD was cut off.
    DelUnknown(u8),
    Late(u8, u64),
    Time,
    Tick(usize),
    /// The process dies after the first transaction of a look.
    LookCut(usize),
    /// The process dies between two transactions.
    Crash(usize),
    Forget(Slot),
    Look(usize),
    Capture(usize),
    Deliver(usize),
    Reboot(usize),
    StepBack(usize),
    /// The first node is gone, an administrator says so, and the second claims its block.
    Fence,
}

struct Histories {
    mutant: Option<Mutant>,
}

impl World {
    fn now(&self, node: usize) -> BootTime {
        BootTime(Duration::from_secs(self.nodes[node].clock))
    }

    /// Keys that pod status names: those of the second node; the first one's status lags for ever.
    fn status(&self) -> BTreeSet<Key> {
        BTreeSet::from([key(2)])
    }

    /// Steps, and commits so many of its transactions; the process dies if they are not all.
    fn step(&mut self, node: usize, command: Command, commits: usize) -> Option<Reply> {
        let (now, status) = (self.now(node), self.status());
        let at = self.at(node);
        let (reply, transactions) = at.subject.step(command, now, &status);
        let cut = commits != usize::MAX;
        for effect in transactions.into_iter().take(commits).flatten() {
            at.store.apply(effect);
        }
        if cut {
            self.reload(node);
            return None;
        }
        Some(reply)
    }

    fn at(&mut self, node: usize) -> &mut Node {
        Arc::make_mut(&mut self.nodes[node])
    }

    fn whole(&mut self, node: usize, command: Command) -> Reply {
        self.step(node, command, usize::MAX).expect("not cut")
    }

    fn reload(&mut self, node: usize) {
        let now = self.now(node);
        let at = self.at(node);
        let mutant = at.subject.mutant();
        let (subject, effects) = Subject::load(mutant, at.store.clone(), BootId(at.boot), now);
        for effect in effects {
            at.store.apply(effect);
        }
        at.subject = subject;
    }

    fn add(&mut self, container: u8, commits: usize) {
        let node = node_of(container);
        let command = Command::Allocate {
            owner: owner(container),
            class: SlotClass::Dual,
        };
        let Some(Reply::Allocated(a)) = self.step(node, command, commits) else {
            return;
        };
        let highest = self.highest.get(&(node, a.slot)).copied().unwrap_or(0);
        // An ADD that was cut off may have had it: its generation was not told to anybody.
        if a.generation <= highest {
            self.broken = Some("I7: a generation was given twice");
        }
        if let Some(released) = self.released.get(&a.slot)
            && self.truth < released + COOLDOWN
        {
            self.broken = Some("I2: an address is given again before its cooldown");
        }
        if self.remembered.contains(&a.slot) {
            self.broken = Some("I2: an address is given again that the network knows");
        }
        self.twice |= self.highest.keys().any(|(_, slot)| *slot == a.slot);
        self.highest.insert((node, a.slot), a.generation);
        let (slot, generation) = (a.slot, a.generation);
        self.interfaces
            .insert(container, Interface { slot, generation });
    }

    /// The interface goes, then the slot.
    fn del(&mut self, container: u8) {
        let Some(gone) = self.interfaces.remove(&container) else {
            return;
        };
        self.died(gone.slot);
        self.late.insert((container, gone.generation));
        let release = Command::Release {
            key: key(container),
            generation: Some(gone.generation),
        };
        self.whole(node_of(container), release);
        self.require_released(container);
    }

    /// A told release is durable: I4, and with it I6.
    fn require_released(&mut self, container: u8) {
        let node = &self.nodes[node_of(container)];
        let kept = node.store.records.values().any(|record| {
            matches!(&record.state, SlotState::Allocated { owner, .. } if owner.key == key(container))
        });
        if kept {
            self.broken = Some("I4: a release was told and is not stored");
        }
    }

    fn died(&mut self, slot: Slot) {
        self.released.insert(slot, self.truth);
        self.remembered.insert(slot);
    }

    fn look(&self, node: usize) -> Vec<(Slot, u64, bool)> {
        let all = self.nodes[node].subject.ipam.unforgotten();
        all.map(|u| (u.slot, u.sequence, !self.remembered.contains(&u.slot)))
            .collect()
    }

    fn observe(&mut self, node: usize, looks: Vec<(Slot, u64, bool)>, commits: usize) {
        let looks = looks
            .into_iter()
            .map(|(slot, sequence, clear)| Look {
                slot,
                sequence,
                node: Some(Vec::new()),
                cluster: Some(ClusterLook {
                    held: (!clear).then(String::new).into_iter().collect(),
                    revision: None,
                }),
            })
            .collect();
        let watermark = None;
        self.step(node, Command::Observe { looks, watermark }, commits);
    }

    fn kill_pods(&mut self, node: usize) {
        let dead: Vec<u8> = self
            .interfaces
            .keys()
            .copied()
            .filter(|container| node_of(*container) == node)
            .collect();
        for container in dead {
            if let Some(interface) = self.interfaces.remove(&container) {
                self.died(interface.slot);
                self.late.insert((container, interface.generation));
            }
        }
    }

    fn reboot(&mut self, node: usize) {
        self.kill_pods(node);
        let at = self.at(node);
        at.boot += 1;
        at.clock = 0;
        at.captured.clear();
        self.reload(node);
        if self.nodes[node].subject.ipam.live().next().is_some() {
            self.broken = Some("I6: a pod outlives its kernel");
        }
    }

    fn fence(&mut self) {
        self.kill_pods(0);
        self.at(0).fenced = true;
        // The claim's epoch says that it had an owner.
        let claim = Claim {
            epoch: 2,
            ..Claim::FIRST
        };
        self.whole(1, Command::SetClaims(BTreeMap::from([(block(), claim)])));
    }
}

impl Histories {
    fn all(&self, world: &World, actions: &mut Vec<Action>) {
        let had = &world.had;

        for container in 0..3 {
            if world.nodes[node_of(container)].fenced {
                continue;
            }
            if world.interfaces.contains_key(&container) {
                actions.push(Action::Del(container));
            } else {
                actions.push(Action::Add(container));
                let node = &world.nodes[node_of(container)];
                if node.subject.ipam.lookup(&key(container)).is_some() {
                    actions.push(Action::DelUnknown(container));
                }
                if had.crashes < TROUBLE {
                    actions.push(Action::AddCut(container));
                }
            }
        }
        for (container, generation) in &world.late {
            if !world.nodes[node_of(*container)].fenced {
                actions.push(Action::Late(*container, *generation));
            }
        }
        actions.push(Action::Time);
        actions.extend(world.remembered.iter().copied().map(Action::Forget));
        for node in 0..2 {
            if world.nodes[node].fenced {
                continue;
            }
            actions.push(Action::Tick(node));
            if !world.look(node).is_empty() {
                actions.push(Action::Look(node));
                if had.captures < TROUBLE {
                    actions.push(Action::Capture(node));
                }
                if had.crashes < TROUBLE {
                    actions.push(Action::LookCut(node));
                }
            }
            if !world.nodes[node].captured.is_empty() {
                actions.push(Action::Deliver(node));
            }
            if had.crashes < TROUBLE {
                actions.push(Action::Crash(node));
            }
            if had.reboots < TROUBLE {
                actions.push(Action::Reboot(node));
            }
            if had.steps_back < TROUBLE && world.nodes[node].clock > 0 {
                actions.push(Action::StepBack(node));
            }
        }
        if !world.nodes[0].fenced {
            actions.push(Action::Fence);
        }
    }
}

impl Model for Histories {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        let node = |blocks: &[BlockId]| {
            let mut store = Snapshot::default();
            let zero = BootTime(Duration::from_secs(BEGIN));
            let (mut subject, effects) = Subject::load(self.mutant, store.clone(), BootId(0), zero);
            let claims = blocks.iter().map(|block| (*block, Claim::FIRST)).collect();
            let set = Command::SetClaims(claims);
            // A mutant that stores late stores these with its first command.
            let (_, transactions) = subject.step(set, zero, &BTreeSet::new());
            let (_, more) = subject.step(Command::Tick, zero, &BTreeSet::new());
            let all = transactions.into_iter().chain(more).flatten();
            effects
                .into_iter()
                .chain(all)
                .for_each(|e: Effect| store.apply(e));
            Arc::new(Node {
                subject,
                store,
                boot: 0,
                clock: BEGIN,
                captured: Vec::new(),
                fenced: false,
            })
        };
        vec![World {
            nodes: [node(&[block()]), node(&[])],
            interfaces: BTreeMap::new(),
            late: BTreeSet::new(),
            truth: 0,
            released: BTreeMap::new(),
            remembered: BTreeSet::new(),
            highest: BTreeMap::new(),
            had: Troubles::default(),
            twice: false,
            broken: None,
        }]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        if world.broken.is_some() {
            return;
        }
        self.all(world, actions);
    }

    fn next_state(&self, world: &World, action: Action) -> Option<World> {
        let mut next = world.clone();
        match action {
            Action::Add(container) => next.add(container, usize::MAX),
            Action::AddCut(container) => {
                next.had.crashes += 1;
                next.add(container, 1);
            }
            Action::Del(container) => next.del(container),
            Action::DelUnknown(container) => {
                let key = key(container);
                let generation = None;
                next.whole(node_of(container), Command::Release { key, generation });
                next.require_released(container);
            }
            Action::Late(container, generation) => {
                let release = Command::Release {
                    key: key(container),
                    generation: Some(generation),
                };
                next.whole(node_of(container), release);
            }
            Action::Time => {
                next.truth += 1;
                (0..2).for_each(|node| next.at(node).clock += 1);
            }
            Action::Tick(node) => {
                next.whole(node, Command::Tick);
            }
            Action::LookCut(node) => {
                next.had.crashes += 1;
                let looks = next.look(node);
                next.observe(node, looks, 1);
            }
            Action::Crash(node) => {
                next.had.crashes += 1;
                next.reload(node);
            }
            Action::Forget(slot) => {
                next.remembered.remove(&slot);
            }
            Action::Look(node) => {
                let looks = next.look(node);
                next.observe(node, looks, usize::MAX);
            }
            Action::Capture(node) => {
                next.had.captures += 1;
                next.at(node).captured = next.look(node);
            }
            Action::Deliver(node) => {
                let looks = std::mem::take(&mut next.at(node).captured);
                next.observe(node, looks, usize::MAX);
            }
            Action::Reboot(node) => {
                next.had.reboots += 1;
                next.reboot(node);
            }
            Action::StepBack(node) => {
                next.had.steps_back += 1;
                next.at(node).clock -= 1;
            }
            Action::Fence => next.fence(),
        }
        (next != *world).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("I1: one address, one pod", |_, world: &World| {
                let slots: BTreeSet<Slot> = world.interfaces.values().map(|i| i.slot).collect();
                slots.len() == world.interfaces.len()
            }),
            Property::always("I2, I6, I7: as broken by a step", |_, world: &World| {
                world.broken.is_none()
            }),
            Property::always(
                "I4, I5: what was told is stored until it is taken back",
                |_, world: &World| {
                    world.interfaces.iter().all(|(container, interface)| {
                        let store = &world.nodes[node_of(*container)].store;
                        store.records.get(&interface.slot).is_some_and(|record| {
                            record.generation == interface.generation
                                && matches!(&record.state,
                                    SlotState::Allocated { owner, .. } if owner.key == key(*container))
                        })
                    })
                },
            ),
            Property::always("I6: no slot is lost", |_, world: &World| {
                world.nodes.iter().filter(|node| !node.fenced).all(|node| {
                    let (allocated, resting, free) = node.subject.ipam.counts(SlotClass::Dual);
                    let owned = u32::try_from(node.subject.ipam.owned().count()).unwrap_or(0);
                    let known = |k: &Key| (0..3).any(|container| *k == key(container));
                    allocated + resting + free == owned * SLOTS
                        && node.subject.ipam.live().all(|a| known(&a.owner.key))
                })
            }),
            Property::sometimes("an address is used twice", |_, world: &World| world.twice),
            Property::sometimes("a moved block is used", |_, world: &World| {
                world.nodes[0].fenced && world.interfaces.contains_key(&2)
            }),
            Property::sometimes("a slot is quarantined", |_, world: &World| {
                world.nodes[0]
                    .subject
                    .ipam
                    .census(SlotClass::Dual)
                    .quarantined
                    > 0
            }),
        ]
    }
}

/// How deep the search goes within `cargo test`: 11,883 different worlds. `KUN_MODEL_DEPTH` sets another for the real thing; 10, which is
/// 56,821 of them, takes a minute or two unoptimised.
const DEPTH: usize = 8;

#[test]
fn no_history_breaks_an_invariant() {
    let depth = std::env::var("KUN_MODEL_DEPTH")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(DEPTH);
    // One thread: with more of them a world may be met by a longer way first, and what follows it is then searched less deep.
    let checker = Histories { mutant: None }
        .checker()
        .target_max_depth(depth)
        .spawn_bfs()
        .join();
    println!(
        "{} states, {} of them different, to depth {}",
        checker.state_count(),
        checker.unique_state_count(),
        checker.max_depth()
    );
    for name in checker.discoveries().keys() {
        let broken = Histories { mutant: None }
            .properties()
            .into_iter()
            .any(|p| p.name == *name && p.expectation == Expectation::Always);
        assert!(!broken, "{}", checker.discoveries()[name]);
    }
}

/// How deep every single world is kept.
const EXACT_DEPTH: usize = 4;

/// The forms of all worlds within so many actions. `exact`: worlds of one form are searched on from one by one, unless they are equal.
fn forms(mutant: Option<Mutant>, exact: bool) -> BTreeSet<Vec<u64>> {
    let model = Histories { mutant };
    let mut frontier = model.init_states();
    let mut forms: BTreeSet<Vec<u64>> = frontier.iter().map(World::form).collect();
    let mut whole = BTreeSet::new();
    for _ in 0..EXACT_DEPTH {
        let mut next = Vec::new();
        for world in &frontier {
            let mut actions = Vec::new();
            model.actions(world, &mut actions);
            for action in actions {
                let Some(after) = model.next_state(world, action) else {
                    continue;
                };
                let new = forms.insert(after.form());
                let follow = match exact {
                    true => whole.insert(format!("{after:?}")),
                    false => new,
                };
                if follow {
                    next.push(after);
                }
            }
        }
        frontier = next;
    }
    forms
}

#[test]
fn worlds_of_one_form_have_one_future() {
    for mutant in [None, Some(Mutant::TwoTransactionExit)] {
        let (exact, merged) = (forms(mutant, true), forms(mutant, false));
        println!("{mutant:?}: {} forms", exact.len());
        assert!(exact == merged, "{} and {}", exact.len(), merged.len());
    }
}

/// Bugs that a search meets only beyond the depth of a test, with a history that meets them.
fn deep() -> [(Mutant, Vec<Action>); 2] {
    let again = |n| std::iter::repeat_n(Action::Time, n);
    let mut stale_look = vec![
        Action::Add(0),
        Action::Add(1),
        Action::Del(0),
        Action::Forget(FIRST),
        Action::Capture(0),
    ];
    stale_look.extend(again(2));
    stale_look.extend([Action::Look(0), Action::Add(0), Action::Del(0)]);
    stale_look.extend(again(2));
    stale_look.extend([Action::Deliver(0), Action::Add(0)]);
    let mut lost = vec![Action::Add(0), Action::Del(0), Action::Forget(FIRST)];
    lost.extend(again(2));
    lost.extend([Action::Look(0), Action::Crash(0), Action::Add(0)]);
    [
        (Mutant::NoSequenceCheck, stale_look),
        (Mutant::GenerationLost, lost),
    ]
}

/// The first invariant that a history breaks.
fn replay(mutant: Option<Mutant>, history: &[Action]) -> Option<&'static str> {
    let model = Histories { mutant };
    let mut world = model.init_states().remove(0);
    for action in history {
        // An action that changes nothing leaves the world as it is.
        world = model.next_state(&world, action.clone()).unwrap_or(world);
        let broken = model
            .properties()
            .into_iter()
            .find(|p| p.expectation == Expectation::Always && !(p.condition)(&model, &world));
        if let Some(property) = broken {
            return Some(property.name);
        }
    }
    None
}

#[test]
fn each_known_bug_is_caught() {
    let deep = deep();
    for (mutant, history) in &deep {
        assert_eq!(replay(None, history), None);
        let found = replay(Some(*mutant), history);
        println!("{mutant:?}: {found:?} by its history");
        assert!(found.is_some(), "{mutant:?} survives");
    }
    let deep = deep.map(|(mutant, _)| mutant);
    for mutant in MUTANTS.into_iter().filter(|m| !deep.contains(m)) {
        let model = Histories {
            mutant: Some(mutant),
        };
        let breakable = model
            .properties()
            .into_iter()
            .filter(|p| p.expectation == Expectation::Always)
            .map(|p| p.name);
        let checker = model
            .checker()
            .threads(2)
            .finish_when(HasDiscoveries::AnyOf(breakable.collect()))
            .target_max_depth(DEPTH)
            .spawn_bfs()
            .join();
        let found: Vec<&str> = checker
            .discoveries()
            .keys()
            .copied()
            .filter(|name| name.starts_with('I'))
            .collect();
        println!(
            "{mutant:?}: {found:?} after {} states, depth {}",
            checker.unique_state_count(),
            checker.max_depth()
        );
        assert!(!found.is_empty(), "{mutant:?} survives");
    }
}
