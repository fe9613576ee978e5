//! The watches of a program as one source: one first snapshot over all kinds, then what changes, and troubles, each told once.

use std::collections::{BTreeSet, HashSet, VecDeque};
use std::time::Duration;

use super::backoff::Jitter;
use super::{Action, Context, Counts, Exchange, Input, Pace, Watch};
use crate::{Delta, Event, Interner, Kind, ObjectName, Reached, Wanted};

/// Deltas of one event after the first snapshot. Consumers act once an event; one that never ends would never be acted on.
const MAX_BATCH: usize = 1_000;

/// Before the snapshot is told, changes on top of it are folded into it whenever it has grown by this.
const FOLD_AFTER: usize = 10_000;

/// See the module.
#[derive(Debug)]
pub struct Hub {
    watches: Vec<Watch>,
    names: Interner,
    actions: VecDeque<Action>,
    gathered: Vec<Delta>,
    fold_at: usize,
    queue: VecDeque<Event>,
    synced: bool,
    partial: bool,
    /// The shell's own: no credentials.
    trouble: Option<String>,
    told: BTreeSet<String>,
    /// Of the watches whose revisions are wanted, by index, what was told last.
    reached: Vec<(usize, Option<Reached>)>,
}

impl Hub {
    /// Nothing is asked before the first [`Hub::tick`].
    pub fn new(wanted: &Wanted, pace: Pace, seed: u64, now: Duration) -> Self {
        let mut seeds = Jitter::new(seed);
        let watches = wanted.iter().enumerate().map(|(index, (kind, scope))| {
            let seed = seeds
                .between(Duration::ZERO, Duration::from_nanos(u64::MAX))
                .as_nanos() as u64;
            let mut watch = Watch::new(index, kind, scope.clone(), pace, seed, now);
            if wanted.wants_revisions(kind) {
                watch.go_by_revisions();
            }
            watch
        });
        Self {
            watches: watches.collect(),
            names: Interner::default(),
            actions: VecDeque::new(),
            gathered: Vec::new(),
            fold_at: FOLD_AFTER,
            queue: VecDeque::new(),
            synced: false,
            partial: false,
            trouble: None,
            told: BTreeSet::new(),
            reached: (wanted.iter().enumerate())
                .filter(|(_, (kind, _))| wanted.wants_revisions(*kind))
                .map(|(index, _)| (index, None))
                .collect(),
        }
    }

    /// What is due by now.
    pub fn tick(&mut self, now: Duration) {
        for index in 0..self.watches.len() {
            if self.watches[index].timeout() <= now {
                self.with(index, now, |watch, cx| watch.tick(cx));
            }
        }
        self.settle();
    }

    /// What has arrived for a request.
    pub fn input(&mut self, exchange: Exchange, input: Input<'_>, now: Duration) {
        if exchange.watch < self.watches.len() {
            self.with(exchange.watch, now, |watch, cx| {
                watch.input(exchange, input, cx)
            });
        }
        self.settle();
    }

    fn with(
        &mut self,
        index: usize,
        now: Duration,
        what: impl FnOnce(&mut Watch, &mut Context<'_>),
    ) {
        let mut actions = Vec::new();
        let mut cx = Context {
            now,
            names: &mut self.names,
            actions: &mut actions,
            deltas: &mut self.gathered,
        };
        what(&mut self.watches[index], &mut cx);
        self.actions.extend(actions);
    }

    /// The shell cannot send at all, or can again.
    pub fn set_trouble(&mut self, trouble: Option<String>) {
        self.trouble = trouble;
        self.settle();
    }

    fn settle(&mut self) {
        if !self.synced {
            if self.watches.iter().all(Watch::synced) {
                self.synced = true;
                self.fold();
                self.flush();
                self.partial = self.watches.iter().any(Watch::partial);
                self.tell();
                self.queue.extend(self.partial.then_some(Event::Partial));
                self.queue.push_back(Event::Synced);
            } else if self.gathered.len() > self.fold_at {
                self.fold();
                self.fold_at = self.gathered.len() * 2 + FOLD_AFTER;
            }
        } else if self.gathered.len() >= MAX_BATCH {
            self.flush();
        }
    }

    /// Of what nobody has heard yet only the last word on each object matters, and no removal.
    fn fold(&mut self) {
        let mut seen: HashSet<(Kind, ObjectName)> = HashSet::new();
        let mut last: Vec<Delta> = Vec::with_capacity(self.gathered.len());
        for delta in std::mem::take(&mut self.gathered).into_iter().rev() {
            let key = match &delta {
                Delta::Upsert(object) => object.key(),
                Delta::Remove(kind, name) => (*kind, name.clone()),
            };
            if seen.insert(key) && matches!(delta, Delta::Upsert(_)) {
                last.push(delta);
            }
        }
        last.reverse();
        self.gathered = last;
    }

    fn flush(&mut self) {
        if !self.gathered.is_empty() {
            let deltas = std::mem::take(&mut self.gathered);
            self.queue.push_back(Event::Deltas(deltas));
        }
    }

    /// Troubles that were not there before; one that went away and comes back is told again.
    fn tell(&mut self) {
        let now: BTreeSet<String> = self.troubles().collect();
        let new = now.difference(&self.told).cloned().map(Event::Trouble);
        self.queue.extend(new);
        self.told = now;
    }

    /// Everything that is wrong now.
    pub fn troubles(&self) -> impl Iterator<Item = String> {
        let own = self.trouble.clone().into_iter();
        own.chain(self.watches.iter().flat_map(Watch::troubles))
    }

    /// The next thing for the shell to do.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// Whether there is an event, once everything that has arrived was given in: what arrived together is one event.
    pub fn poll_event(&mut self) -> Option<Event> {
        if let Some(event) = self.queue.pop_front() {
            return Some(event);
        }
        if self.synced {
            self.flush();
        }
        self.tell();
        if self.synced && self.partial && !self.watches.iter().any(Watch::partial) {
            self.partial = false;
            self.queue.push_back(Event::Whole);
        }
        if self.synced {
            self.reach();
        }
        self.queue.pop_front()
    }

    /// Everything that was gathered is in the queue: what the watches have reached goes behind it.
    fn reach(&mut self) {
        for (index, told) in &mut self.reached {
            let watch = &self.watches[*index];
            let now = watch.reached();
            if *told != now {
                *told = now;
                self.queue.push_back(Event::Reached(watch.kind, now));
            }
        }
    }

    /// When [`Hub::tick`] has something to do.
    pub fn timeout(&self) -> Duration {
        let timeouts = self.watches.iter().map(Watch::timeout);
        timeouts.min().unwrap_or(Duration::MAX)
    }

    /// What has happened, by kind.
    pub fn counts(&self) -> impl Iterator<Item = (Kind, Counts)> {
        self.watches
            .iter()
            .map(|watch| (watch.kind, watch.counts()))
    }
}
