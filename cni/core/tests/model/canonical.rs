//! Which worlds are one and the same to the search: those in which nothing that can still happen, and nothing that is asked of
//! them, differs. The search remembers a world by the words written here.
//!
//! - The first node's two containers are alike: of the two ways to name them the lesser text counts.
//! - Nobody looks at a clock but for how long ago something was, and nobody asks that of what has rested for longer than any
//!   rule, or any clock that may still step back, reaches.
//! - Sequence numbers and generations are compared, and counted on from the highest that the process knows. So of those up to it
//!   the order is written, and of those beyond it (only mutants have them) how far.
//! - A node that is gone does nothing any more.
//!
//! A form that hid a difference would hide bugs: the mutants are searched for in this form too, and near the beginning a search that
//! forgets nothing finds the same forms.

use std::collections::BTreeSet;
use std::hash::{Hash, Hasher};

use kun_cni_core::ipam::{Record, SlotState};
use kun_config::types::{Slot, SlotClass};

use super::subject::{COOLDOWN, QUARANTINE_AFTER, SLOTS};
use super::{FIRST, Node, TROUBLE, World, node_of};

/// More than any number of this model; what is beyond the highest known follows it.
const BEYOND: u64 = 100;

impl Hash for World {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.form().hash(state);
    }
}

fn slots() -> impl Iterator<Item = Slot> {
    (0..SLOTS).map(|n| Slot(FIRST.0 + n))
}

/// Numbers of which only the order counts.
struct Order {
    known: BTreeSet<u64>,
    highest: u64,
}

impl Order {
    fn word(&self, number: u64) -> u64 {
        match number.checked_sub(self.highest) {
            None | Some(0) => self.known.range(..number).count() as u64,
            Some(beyond) => BEYOND + beyond,
        }
    }
}

impl World {
    pub(super) fn form(&self) -> Vec<u64> {
        self.words(false).min(self.words(true))
    }

    fn words(&self, swapped: bool) -> Vec<u64> {
        let mut words = Vec::with_capacity(96);
        let name = |container: u8| match (swapped, container) {
            (true, 0) => 1,
            (true, 1) => 0,
            (_, other) => other,
        };
        for node in 0..2 {
            match self.nodes[node].fenced {
                true => words.push(BEYOND),
                false => self.node(node, &name, &mut words),
            }
        }
        for slot in slots() {
            let rested = self
                .released
                .get(&slot)
                .map_or(COOLDOWN, |released| COOLDOWN.min(self.truth - released));
            let given = self.highest.keys().any(|(_, other)| *other == slot);
            let remembered = self.remembered.contains(&slot);
            words.extend([rested, u64::from(remembered), u64::from(given)]);
        }
        let had = &self.had;
        let had = [had.crashes, had.reboots, had.steps_back, had.captures];
        words.extend(had.map(u64::from));
        words.extend([self.twice, self.broken.is_some()].map(u64::from));
        words
    }

    fn node(&self, number: usize, name: &impl Fn(u8) -> u8, words: &mut Vec<u64>) {
        let node = &self.nodes[number];
        let ipam = &node.subject.ipam;
        let all: Vec<&Record> = ipam.records().chain(node.store.records.values()).collect();
        let interfaces = self
            .interfaces
            .iter()
            .filter(|(c, _)| node_of(**c) == number);
        let generations = Order {
            known: all
                .iter()
                .map(|record| record.generation)
                .chain(interfaces.clone().map(|(_, i)| i.generation))
                .collect(),
            highest: ipam.records().map(|r| r.generation).max().unwrap_or(0),
        };
        let sequences = Order {
            known: all.iter().map(|record| record.sequence).collect(),
            highest: ipam.records().map(|r| r.sequence).max().unwrap_or(0),
        };
        words.extend([
            u64::from(node.store.boot.is_some_and(|boot| boot.0 == node.boot)),
            u64::from(node.clock == 0 && self.had.steps_back < TROUBLE),
            node.subject.owes(),
        ]);
        for (_, claim) in ipam
            .claims()
            .chain(node.store.blocks.iter().map(|(b, c)| (*b, *c)))
        {
            words.extend([claim.epoch, claim.standing as u64]);
        }
        words.push(BEYOND);
        for slot in slots() {
            for record in [ipam.record(slot), node.store.records.get(&slot)] {
                let Some(record) = record else {
                    words.push(BEYOND);
                    continue;
                };
                words.extend([
                    generations.word(record.generation),
                    sequences.word(record.sequence),
                ]);
                self.state(node, &record.state, name, words);
            }
            let waits = ipam
                .record(slot)
                .is_some_and(|record| ipam.is_waiting(record));
            let look = ipam.first_look(slot).map_or(0, |first| {
                self.ago(node, first.0.as_secs(), QUARANTINE_AFTER)
            });
            let given = self.highest.get(&(number, slot)).copied().unwrap_or(0);
            let given = match given.checked_sub(generations.highest) {
                None | Some(0) => u64::from(given > 0),
                Some(beyond) => BEYOND + beyond,
            };
            words.extend([u64::from(waits), look, given]);
        }
        for (slot, sequence, clear) in &node.captured {
            let stands = sequences.known.contains(sequence) || *sequence > sequences.highest;
            let word = if stands {
                sequences.word(*sequence)
            } else {
                BEYOND
            };
            words.extend([u64::from(slot.0 - FIRST.0), word, u64::from(*clear)]);
        }
        words.push(BEYOND);
        let mut held: Vec<[u64; 3]> = interfaces
            .map(|(container, interface)| {
                let slot = u64::from(interface.slot.0 - FIRST.0);
                [
                    u64::from(name(*container)),
                    slot,
                    generations.word(interface.generation),
                ]
            })
            .collect();
        held.sort_unstable();
        words.extend(held.into_iter().flatten());
        words.push(BEYOND);
        // Of a DEL that comes late only whether it means somebody counts.
        let late: BTreeSet<[u64; 2]> = self
            .late
            .iter()
            .filter(|(container, _)| node_of(*container) == number)
            .map(|(container, generation)| {
                let means =
                    generations.known.contains(generation) || *generation > generations.highest;
                let word = if means {
                    generations.word(*generation)
                } else {
                    BEYOND
                };
                [u64::from(name(*container)), word]
            })
            .collect();
        words.extend(late.into_iter().flatten());
        words.push(BEYOND);
        // What the properties ask of the indices.
        let (allocated, resting, free) = ipam.counts(SlotClass::Dual);
        let live = ipam.live().count() as u64;
        words.extend([
            u64::from(allocated),
            u64::from(resting),
            u64::from(free),
            live,
        ]);
    }

    fn state(
        &self,
        node: &Node,
        state: &SlotState,
        name: &impl Fn(u8) -> u8,
        words: &mut Vec<u64>,
    ) {
        match state {
            SlotState::Free => words.push(0),
            SlotState::Allocated { owner, .. } => {
                let container = owner.key.container_id.parse().expect("the model's own");
                words.extend([1, u64::from(name(container))]);
            }
            SlotState::Cooling { since, waived, .. } => {
                let ago = self.ago(node, since.0.as_secs(), COOLDOWN);
                words.extend([2, ago, u64::from(*waived)]);
            }
            SlotState::Quarantined { .. } => words.push(3),
        }
    }

    /// How long ago by the node's clock, as far as a rule of this length may still ask; the clock may have stepped back.
    fn ago(&self, node: &Node, then: u64, rule: u64) -> u64 {
        let slack = u64::from(TROUBLE - self.had.steps_back);
        (BEYOND + node.clock - then).min(BEYOND + rule + slack)
    }
}
