//! Every history of one block between two nodes and whoever gives it, within bounds: the real decision (`kun_cni_core::claims`) over the
//! real slot machine and a store that survives, an object that is written by compare-and-swap, views of it that are old, processes that
//! die before and after every write, and a block that is revoked, returned, handed over and handed back.
//!
//! I1 is that no slot has two live owners in the whole cluster; I2 that none is given again before its cooldown. As in `model.rs`, each
//! known bug that is put back must be caught.

#![allow(missing_docs)]

use std::collections::BTreeMap;
use std::time::Duration;

use kun_cni_core::claims::{Move, Phase, Said, next};
use kun_cni_core::ipam::{
    BootId, BootTime, Claim, Command, Effect, Ipam, Key, Owner, Pod, Reply, Rules, Snapshot,
    Standing,
};
use kun_config::types::{BlockId, Slot, SlotClass};
use stateright::{Checker, Expectation, Model, Property};

const FIRST: Slot = Slot(0x0a40_0000);

/// In ticks. One is enough to tell at once from later.
const COOLDOWN: u64 = 1;

/// True time goes so far: a block is used, rests, is used elsewhere, rests.
const END: u64 = 4;

/// A block changes hands so often: to the other and back.
const OWNERS: u64 = 3;

/// So many processes die.
const CRASHES: u8 = 1;

fn block() -> BlockId {
    BlockId::new(FIRST).expect("aligned")
}

fn owner(node: usize) -> Owner {
    Owner {
        key: Key {
            container_id: node.to_string(),
            ifname: String::new(),
            network: String::new(),
        },
        pod: Pod::default(),
        delegated: false,
    }
}

/// A bug, put back in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Mutant {
    /// What is taken is given out from before anybody heard of it.
    UseBeforeConfirm,
    /// The confirmation is written over whatever stands there.
    BlindConfirm,
    /// A block that once was pending is handed over, whatever stands there now.
    BlindHandOver,
    /// A block is said to be drained while a pod lives in it.
    DrainedInUse,
    /// A block that is empty is said to be drained at once, and the store gives out of it still.
    DrainedBeforeHeld,
    /// An old view brings back what was returned.
    ReturnForgotten,
    /// What was lost from sight with a pod in it is said to be drained when it is seen again.
    LostIsDrained,
}

/// The IPAMBlock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Object {
    version: u64,
    node: usize,
    epoch: u64,
    draining: bool,
    phase: Phase,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Node {
    ipam: Ipam,
    store: Snapshot,
    /// What it has read last, or was answered.
    view: Object,
    /// The slot of its pod.
    pod: Option<Slot>,
    /// It wants to return the block.
    returning: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct World {
    object: Object,
    /// Versions that a server may still show: after a restart a process may be told any of them.
    past: Vec<Object>,
    nodes: [Node; 2],
    truth: u64,
    released: BTreeMap<Slot, u64>,
    crashes: u8,
    lost: bool,
    moved: bool,
    broken: Option<&'static str>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Action {
    /// The node reads the newest.
    Watch(usize),
    /// The view loses the block, though it is there: a Node that is not seen for a while.
    Lose(usize),
    /// The next step of the block.
    Step(usize),
    /// The same, and the process dies between its write to the object and its write to the store; it reads what is so old then.
    StepCut(usize, usize),
    Add(usize),
    Del(usize),
    Return(usize),
    Revoke,
    HandOver,
    Time,
}

struct Histories {
    mutant: Option<Mutant>,
}

fn rules() -> Rules {
    Rules {
        slots_per_block: 1,
        ..Rules::time_alone(Duration::from_secs(COOLDOWN))
    }
}

impl World {
    fn now(&self) -> BootTime {
        BootTime(Duration::from_secs(self.truth))
    }

    fn write(&mut self, object: Object) {
        self.past.push(self.object);
        self.object = Object {
            version: self.object.version + 1,
            ..object
        };
    }

    fn run(&mut self, node: usize, command: Command) -> Reply {
        let now = self.now();
        let at = &mut self.nodes[node];
        let step = at.ipam.step(command, now);
        for effect in step.effects {
            at.store.apply(effect);
        }
        step.reply
    }

    fn store(&mut self, node: usize, claim: Claim) {
        let claims = BTreeMap::from([(block(), claim)]);
        self.run(node, Command::SetClaims(claims));
    }

    /// Whether it was taken.
    fn tell(&mut self, node: usize, phase: Phase, blind: bool) -> bool {
        let view = self.nodes[node].view;
        if view.version != self.object.version && !blind {
            return false;
        }
        self.write(Object {
            phase,
            ..self.object
        });
        self.nodes[node].view = self.object;
        true
    }

    fn die(&mut self, node: usize, sees: Option<Object>) {
        let now = self.now();
        let at = &mut self.nodes[node];
        let (ipam, effects) = Ipam::load(at.store.clone(), rules(), BootId(0), now).expect("sound");
        effects.into_iter().for_each(|e: Effect| at.store.apply(e));
        at.ipam = ipam;
        at.returning = false;
        at.view = sees.unwrap_or(at.view);
        self.crashes += 1;
    }
}

impl Histories {
    fn decide(&self, world: &World, node: usize) -> Option<Move> {
        let at = &world.nodes[node];
        let held = at.ipam.claim(block());
        let said = (at.view.node == node).then_some(Said {
            epoch: at.view.epoch,
            counted: true,
            draining: at.view.draining,
            phase: at.view.phase,
        });
        let (allocated, cooling) = at.ipam.in_use(block());
        let mut in_use = allocated + cooling;
        match self.mutant {
            Some(Mutant::DrainedInUse) => in_use = 0,
            Some(Mutant::LostIsDrained) if held.is_some_and(|h| !h.is_owned()) => in_use = 0,
            Some(Mutant::DrainedBeforeHeld)
                if in_use == 0
                    && held.is_some_and(Claim::gives)
                    && said.is_some_and(|s| s.draining && s.phase != Phase::Drained) =>
            {
                return Some(Move::Tell(Phase::Drained));
            }
            Some(Mutant::ReturnForgotten)
                if !at.returning && held.is_some_and(|h| !h.is_owned()) =>
            {
                return match said?.phase {
                    Phase::Confirmed if !said?.draining => Some(Move::Store(Claim {
                        epoch: said?.epoch,
                        standing: Standing::Confirmed,
                    })),
                    _ => next(said, held, in_use, at.returning),
                };
            }
            _ => {}
        }
        let step = next(said, held, in_use, at.returning);
        match (self.mutant, step) {
            (Some(Mutant::UseBeforeConfirm), Some(Move::Store(claim)))
                if claim.standing == Standing::Taken =>
            {
                Some(Move::Store(claim.to(Standing::Confirmed)))
            }
            (_, step) => step,
        }
    }

    /// `cut`: the process dies after the object and before the store.
    fn step(&self, world: &mut World, node: usize, cut: Option<Object>) {
        let step = self.decide(world, node);
        let blind = self.mutant == Some(Mutant::BlindConfirm);
        match step {
            Some(Move::Confirm(claim)) => {
                let told = world.tell(node, Phase::Confirmed, blind);
                if told && cut.is_none() {
                    world.store(node, claim);
                }
            }
            Some(Move::Tell(phase)) => {
                world.tell(node, phase, false);
            }
            Some(Move::Store(claim)) if cut.is_none() => world.store(node, claim),
            // Died before it was stored.
            Some(Move::Store(_)) | None => {}
        }
        if cut.is_some() {
            world.die(node, cut);
        }
    }
}

impl Model for Histories {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        let object = Object {
            version: 1,
            node: 0,
            epoch: 1,
            draining: false,
            phase: Phase::Pending,
        };
        let node = || {
            let store = Snapshot::default();
            let zero = BootTime::default();
            let (ipam, effects) =
                Ipam::load(store.clone(), rules(), BootId(0), zero).expect("sound");
            let mut node = Node {
                ipam,
                store,
                view: object,
                pod: None,
                returning: false,
            };
            effects.into_iter().for_each(|e| node.store.apply(e));
            node
        };
        vec![World {
            object,
            past: Vec::new(),
            nodes: [node(), node()],
            truth: 0,
            released: BTreeMap::new(),
            crashes: 0,
            lost: false,
            moved: false,
            broken: None,
        }]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        if world.broken.is_some() {
            return;
        }
        for node in 0..2 {
            let at = &world.nodes[node];
            if at.view != world.object {
                actions.push(Action::Watch(node));
            }
            if !world.lost && at.view.node == node {
                actions.push(Action::Lose(node));
            }
            if self.decide(world, node).is_some() {
                actions.push(Action::Step(node));
                if world.crashes < CRASHES {
                    let seen = world.past.len() + 1;
                    actions.extend((0..seen).map(|view| Action::StepCut(node, view)));
                }
            }
            actions.push(match at.pod {
                None => Action::Add(node),
                Some(_) => Action::Del(node),
            });
            if !at.returning && world.object.node == node {
                actions.push(Action::Return(node));
            }
        }
        let object = world.object;
        if !object.draining {
            actions.push(Action::Revoke);
        }
        let free = matches!(object.phase, Phase::Pending | Phase::Drained);
        if (free || self.mutant == Some(Mutant::BlindHandOver)) && object.epoch < OWNERS {
            actions.push(Action::HandOver);
        }
        if world.truth < END {
            actions.push(Action::Time);
        }
    }

    fn next_state(&self, world: &World, action: Action) -> Option<World> {
        let mut after = world.clone();
        match action {
            Action::Lose(node) => {
                after.lost = true;
                after.nodes[node].view = Object {
                    version: 0,
                    node: 1 - node,
                    ..after.object
                };
            }
            Action::Watch(node) => after.nodes[node].view = after.object,
            Action::Step(node) => self.step(&mut after, node, None),
            Action::StepCut(node, view) => {
                let sees = after.past.get(view).copied().unwrap_or(after.object);
                self.step(&mut after, node, Some(sees));
            }
            Action::Add(node) => {
                let class = SlotClass::Dual;
                let owner = owner(node);
                if let Reply::Allocated(a) = after.run(node, Command::Allocate { owner, class }) {
                    let released = after.released.get(&a.slot);
                    if released.is_some_and(|at| after.truth < at + COOLDOWN) {
                        after.broken = Some("I2: an address is given again before its cooldown");
                    }
                    after.nodes[node].pod = Some(a.slot);
                    after.moved |= after.object.epoch > 1;
                }
            }
            Action::Del(node) => {
                let slot = after.nodes[node].pod.take()?;
                after.released.insert(slot, after.truth);
                let (key, generation) = (owner(node).key, None);
                after.run(node, Command::Release { key, generation });
            }
            Action::Return(node) => after.nodes[node].returning = true,
            Action::Revoke => {
                let object = after.object;
                after.write(Object {
                    draining: true,
                    ..object
                });
            }
            Action::HandOver => {
                let object = after.object;
                after.write(Object {
                    node: 1 - object.node,
                    epoch: object.epoch + 1,
                    draining: false,
                    phase: Phase::Pending,
                    ..object
                });
            }
            Action::Time => {
                after.truth += 1;
                for node in 0..2 {
                    after.run(node, Command::Tick);
                }
            }
        }
        (after != *world).then_some(after)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(
                "I1: one slot, one pod in the whole cluster",
                |_, world: &World| {
                    let [one, two] = &world.nodes;
                    one.pod.is_none() || one.pod != two.pod
                },
            ),
            Property::always(
                "I1: one store gives out from the block",
                |_, world: &World| {
                    let gives = |node: &Node| node.ipam.claim(block()).is_some_and(Claim::gives);
                    !world.nodes.iter().all(gives)
                },
            ),
            Property::always("I2: as broken by a step", |_, world: &World| {
                world.broken.is_none()
            }),
            Property::always("what is in memory is stored", |_, world: &World| {
                world.nodes.iter().all(|node| {
                    node.store.blocks.get(&block()).copied() == node.ipam.claim(block())
                })
            }),
            Property::sometimes("a moved block is used", |_, world: &World| world.moved),
        ]
    }
}

/// How deep the search for the real thing goes within `cargo test`; `KUN_MODEL_DEPTH` sets another.
const DEPTH: usize = 10;

#[test]
fn no_history_breaks_an_invariant() {
    let depth = std::env::var("KUN_MODEL_DEPTH")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(DEPTH);
    let checker = Histories { mutant: None }
        .checker()
        .threads(2)
        .target_max_depth(depth)
        .spawn_bfs()
        .join();
    println!(
        "{} states, {} of them different, to depth {}",
        checker.state_count(),
        checker.unique_state_count(),
        checker.max_depth()
    );
    let always: Vec<&str> = Histories { mutant: None }
        .properties()
        .into_iter()
        .filter(|p| p.expectation == Expectation::Always)
        .map(|p| p.name)
        .collect();
    for (name, path) in checker.discoveries() {
        assert!(!always.contains(&name), "{path}");
    }
}

/// Each bug with a history that meets it; some lie deeper than a test searches.
fn histories() -> [(Mutant, Vec<Action>); 7] {
    use Action::{Add, HandOver, Lose, Return, Revoke, Step, StepCut, Time, Watch};
    let confirmed = [Step(0), Step(0)];
    let other = [HandOver, Watch(1), Step(1), Step(1)];
    let list = |parts: &[&[Action]]| parts.concat();
    [
        (Mutant::UseBeforeConfirm, list(&[&[Step(0)], &other])),
        (
            Mutant::BlindConfirm,
            list(&[&[Step(0)], &other, &[Step(0)]]),
        ),
        (Mutant::BlindHandOver, list(&[&confirmed, &other])),
        (
            Mutant::DrainedInUse,
            list(&[
                &confirmed,
                &[Add(0), Revoke, Watch(0), Step(0), Step(0), Step(0)],
                &other,
                &[Time, Add(1)],
            ]),
        ),
        (
            Mutant::DrainedBeforeHeld,
            list(&[&confirmed, &[Revoke, Watch(0), Step(0)], &other]),
        ),
        (
            Mutant::LostIsDrained,
            list(&[
                &confirmed,
                &[Add(0), Lose(0), Step(0), Watch(0), Step(0)],
                &other,
                &[Time, Add(1)],
            ]),
        ),
        (
            Mutant::ReturnForgotten,
            list(&[
                &confirmed,
                &[Return(0), Step(0), Step(0), StepCut(0, 1)],
                &other,
                &[Step(0)],
            ]),
        ),
    ]
}

/// The first invariant that a history breaks, and how the world is then. What may not happen in a world does not.
fn replay(mutant: Option<Mutant>, history: &[Action]) -> (Option<&'static str>, World) {
    let model = Histories { mutant };
    let mut world = model.init_states().remove(0);
    for action in history {
        let mut may = Vec::new();
        model.actions(&world, &mut may);
        if may.contains(action) {
            world = model.next_state(&world, action.clone()).unwrap_or(world);
        }
        let broken = model
            .properties()
            .into_iter()
            .find(|p| p.expectation == Expectation::Always && !(p.condition)(&model, &world));
        if let Some(property) = broken {
            return (Some(property.name), world);
        }
    }
    (None, world)
}

#[test]
fn each_bug_is_caught() {
    for (mutant, history) in histories() {
        assert_eq!(replay(None, &history).0, None, "{mutant:?}");
        let (found, _) = replay(Some(mutant), &history);
        println!("{mutant:?}: {found:?}");
        assert!(
            found.is_some_and(|name| name.starts_with('I')),
            "{mutant:?} survives"
        );
    }
}

/// The search does not go this far: there and back again.
#[test]
fn a_block_goes_to_another_node_and_comes_back() {
    use Action::{Add, Del, HandOver, Revoke, Step, Time, Watch};
    let leaves = |node| {
        vec![
            Add(node),
            Revoke,
            Watch(node),
            Step(node),
            Step(node),
            Del(node),
            Time,
        ]
        .into_iter()
        .chain([
            Step(node),
            Step(node),
            HandOver,
            Watch(1 - node),
            Step(1 - node),
            Step(1 - node),
            Time,
        ])
    };
    let history: Vec<Action> = [Step(0), Step(0)]
        .into_iter()
        .chain(leaves(0))
        .chain(leaves(1))
        .collect();
    let (broken, world) = replay(None, &history);
    assert_eq!(broken, None);
    assert_eq!((world.object.node, world.object.epoch), (0, OWNERS));
    assert_eq!(world.object.phase, Phase::Confirmed);
    assert!(world.moved);
    let claim = Claim {
        epoch: OWNERS,
        standing: Standing::Confirmed,
    };
    assert_eq!(world.nodes[0].ipam.claim(block()), Some(claim));
}
