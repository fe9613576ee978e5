//! How far the proxies of all nodes are, cheaply: what each node publishes, and how one fold makes one number of it.
//!
//! Each node publishes the revision of the EndpointSlices that its proxy has applied on a Lease of its own, at most once a
//! cooldown ([`Publisher`]). The operator folds all of them into one minimum ([`Fold`]) on one object, which all nodes watch. The
//! costs at 10,000 nodes stand in ARCHITECTURE.md.
//!
//! Who counts: every Node, from its creation to its deletion.
//! - One that never published has no proxy of ours, and after [`Absence::never`] is not waited for. Until then it is: it may have
//!   listed an old state. (A source's first list is of the newest state, so that a later node begins beyond all that was folded.)
//! - One that is ready and behind is waited for without end: its packets go where its old view says.
//! - One that is not ready and has been silent for [`Absence::silent`] is not waited for: its endpoints are withdrawn, its pods
//!   are evicted, and one dead node of ten thousand would otherwise keep every address of the cluster from coming back. What
//!   remains is a node that is cut off from the API server and not from the pods; `None` waits for it too.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::ipam::{BootTime, Revision, Watermark};

/// Nodes named as the slowest.
const MAX_LAGGING: usize = 3;

/// Whether a node has something to publish.
#[derive(Debug, Clone)]
pub struct Publisher {
    period: Duration,
    last: Option<(Revision, BootTime)>,
}

impl Publisher {
    /// At most once a period: the cooldown, since nothing comes back sooner.
    pub fn new(period: Duration) -> Self {
        Self { period, last: None }
    }

    /// The revision to publish now, if it is time and it is news. It counts as published once the server has taken it
    /// ([`Publisher::published`]).
    pub fn due(&self, applied: Revision, now: BootTime) -> Option<Revision> {
        match self.last {
            // The first is told at once: until then everybody waits for this node.
            None => Some(applied),
            Some((told, at)) if told != applied && now.since(at) >= self.period => Some(applied),
            Some(_) => None,
        }
    }

    /// The server has it.
    pub fn published(&mut self, revision: Revision, now: BootTime) {
        self.last = Some((revision, now));
    }
}

/// For whom the fold does not wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Absence {
    /// A node that never published, after so long.
    pub never: Duration,
    /// A node that is not ready and silent, after so long; `None`: never.
    pub silent: Option<Duration>,
}

#[derive(Debug, Clone)]
struct Entry {
    name: String,
    ready: bool,
    revision: Option<Revision>,
    /// When it was last heard of, on the fold's own clock: no other clock is believed.
    heard: BootTime,
}

/// All nodes, and their minimum. Nodes are told apart by UID: one that is made again under its name is another.
#[derive(Debug, Clone)]
pub struct Fold {
    absence: Absence,
    /// Bounded by the cluster's nodes.
    nodes: BTreeMap<String, Entry>,
}

impl Fold {
    /// Without nodes.
    pub fn new(absence: Absence) -> Self {
        Self {
            absence,
            nodes: BTreeMap::new(),
        }
    }

    /// A Node is there, and ready or not.
    pub fn node(&mut self, uid: &str, name: &str, ready: bool, now: BootTime) {
        match self.nodes.get_mut(uid) {
            Some(entry) => entry.ready = ready,
            None => {
                let entry = Entry {
                    name: name.to_owned(),
                    ready,
                    revision: None,
                    heard: now,
                };
                self.nodes.insert(uid.to_owned(), entry);
            }
        }
    }

    /// The Node was deleted.
    pub fn gone(&mut self, uid: &str) {
        self.nodes.remove(uid);
    }

    /// A node has published. The latest counts, also a lower one: the storage may have been restored from a backup.
    pub fn published(&mut self, uid: &str, revision: Revision, now: BootTime) {
        if let Some(entry) = self.nodes.get_mut(uid) {
            entry.revision = Some(revision);
            entry.heard = now;
        }
    }

    /// The minimum over all nodes that count; `None` while one of them is unknown, and without nodes.
    pub fn minimum(&self, now: BootTime) -> Option<Watermark> {
        let mut counted: Vec<(Revision, &str)> = Vec::new();
        for entry in self.nodes.values() {
            let silence = now.since(entry.heard);
            let absent = !entry.ready && self.absence.silent.is_some_and(|limit| silence >= limit);
            match entry.revision {
                None if silence >= self.absence.never => {}
                None => return None,
                Some(_) if absent => {}
                Some(revision) => counted.push((revision, &entry.name)),
            }
        }
        counted.sort_unstable();
        let (revision, _) = *counted.first()?;
        let lagging = counted.iter().take(MAX_LAGGING);
        Some(Watermark {
            revision,
            lagging: lagging.map(|(_, name)| (*name).to_owned()).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ABSENCE: Absence = Absence {
        never: Duration::from_secs(600),
        silent: Some(Duration::from_secs(600)),
    };

    fn at(seconds: u64) -> BootTime {
        BootTime(Duration::from_secs(seconds))
    }

    fn minimum(fold: &Fold, seconds: u64) -> Option<u64> {
        fold.minimum(at(seconds)).map(|w| w.revision.0)
    }

    fn two() -> Fold {
        let mut fold = Fold::new(ABSENCE);
        fold.node("a", "node-a", true, at(0));
        fold.node("b", "node-b", true, at(0));
        fold
    }

    #[test]
    fn the_slowest_decides_and_is_named() {
        let mut fold = two();
        assert_eq!(minimum(&fold, 1), None);
        fold.published("a", Revision(9), at(1));
        assert_eq!(minimum(&fold, 1), None, "nobody knows what b has");
        fold.published("b", Revision(7), at(2));
        let watermark = fold.minimum(at(2)).unwrap();
        assert_eq!(watermark.revision, Revision(7));
        assert_eq!(watermark.lagging, ["node-b", "node-a"]);
        // Restored from a backup.
        fold.published("a", Revision(3), at(3));
        assert_eq!(minimum(&fold, 3), Some(3));
    }

    #[test]
    fn a_ready_node_is_waited_for_and_a_dead_one_for_a_while() {
        let mut fold = two();
        fold.published("a", Revision(9), at(1));
        fold.published("b", Revision(7), at(1));
        assert_eq!(minimum(&fold, 100_000), Some(7), "ready, and behind");
        fold.node("b", "node-b", false, at(100));
        assert_eq!(minimum(&fold, 600), Some(7));
        assert_eq!(minimum(&fold, 601), Some(9));
        // It comes back, with what it had.
        fold.node("b", "node-b", true, at(700));
        assert_eq!(minimum(&fold, 700), Some(7));
        fold.gone("b");
        assert_eq!(minimum(&fold, 700), Some(9));
        // Under its name, but another.
        fold.node("b2", "node-b", true, at(800));
        assert_eq!(minimum(&fold, 801), None);
        assert_eq!(minimum(&fold, 1400), Some(9), "it has no proxy of ours");
        let mut strict = Fold::new(Absence {
            silent: None,
            ..ABSENCE
        });
        strict.node("a", "node-a", false, at(0));
        strict.published("a", Revision(1), at(0));
        assert_eq!(minimum(&strict, 1_000_000), Some(1));
    }

    #[test]
    fn a_node_publishes_at_once_and_then_news_at_most_once_a_period() {
        let mut publisher = Publisher::new(Duration::from_secs(120));
        assert_eq!(publisher.due(Revision(5), at(0)), Some(Revision(5)));
        // The server did not take it.
        assert_eq!(publisher.due(Revision(6), at(1)), Some(Revision(6)));
        publisher.published(Revision(6), at(1));
        assert_eq!(publisher.due(Revision(7), at(120)), None);
        assert_eq!(publisher.due(Revision(7), at(121)), Some(Revision(7)));
        assert_eq!(publisher.due(Revision(6), at(500)), None, "no news");
    }

    /// Ten thousand nodes that apply revisions at their own pace: what the fold says, every node that is alive has applied.
    #[test]
    fn what_is_folded_every_live_node_has_applied() {
        let mut fold = Fold::new(ABSENCE);
        let mut publishers: Vec<(String, Publisher, u64)> = (0..10_000)
            .map(|n| {
                let uid = format!("u{n}");
                fold.node(&uid, &uid, true, at(0));
                (uid, Publisher::new(Duration::from_secs(120)), 0)
            })
            .collect();
        let mut writes = 0_u64;
        for second in 0..600 {
            for (n, (uid, publisher, applied)) in publishers.iter_mut().enumerate() {
                // Each lags by its own time, and publishes in its own second of the period.
                *applied = (second + 1_u64).saturating_sub(n as u64 % 7);
                if second % 120 == n as u64 % 120
                    && let Some(revision) = publisher.due(Revision(*applied), at(second))
                {
                    publisher.published(revision, at(second));
                    fold.published(uid, revision, at(second));
                    writes += 1;
                }
            }
            if let Some(w) = fold.minimum(at(second)) {
                let slowest = publishers.iter().map(|(.., applied)| *applied).min();
                assert!(Some(w.revision.0) <= slowest);
            }
        }
        assert!(minimum(&fold, 600).is_some_and(|r| r >= 600 - 120 - 8));
        assert_eq!(writes / 600, 83, "writes a second");
    }
}
