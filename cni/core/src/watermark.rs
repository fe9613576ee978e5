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
//!
//! When storage is restored from a backup, revisions go back, and a number may name another state than it did. Whoever lived through
//! it finds its numbers too high, and that is where they are caught: a node that published more than it has now publishes anew
//! without waiting for its turn; the fold doubts what is above the newest revision that the server has ([`Fold::head`]), until
//! that node writes again; and a node believes no minimum above what it has applied itself, since it is one of those that were
//! folded ([`believed`]). What was restored along with the rest is older than the backup, and so holds nothing up and frees nothing. A
//! number that has come up again to what it was proves nothing; so nobody goes by a view whose stream is cut off, or has come back and is
//! not proven to be of the same history (`kun_cluster_core::watch`).

use std::collections::BTreeMap;
use std::time::Duration;

use crate::ipam::{BootTime, Revision, Watermark};

/// Nodes named as the slowest.
const MAX_LAGGING: usize = 3;

/// Within this part of a period nodes that began together publish: ten thousand are some 1,000 writes a second at a
/// cooldown of two minutes, once, and 83 later on.
const SPREAD: u32 = 12;

/// What is waited for at least where no period is longer: a node that is drained, updated and restarted is back by then.
const ABSENT_AFTER: Duration = Duration::from_secs(600);

/// Periods that a node may miss before it is silent.
const MISSED: u32 = 3;

/// Whether a node has something to publish.
#[derive(Debug, Clone)]
pub struct Publisher {
    period: Duration,
    told: Option<Revision>,
    not_before: BootTime,
    /// What was published is more than what is applied: the storage went back.
    too_much: bool,
}

impl Publisher {
    /// At most once a period: the cooldown, since nothing comes back sooner. `jitter`, from 0 to 1, is this node's own.
    pub fn new(period: Duration, now: BootTime, jitter: f64) -> Self {
        Self {
            period,
            told: None,
            // Everybody waits for this node until it has told something.
            not_before: later(now, spread(period, jitter)),
            too_much: false,
        }
    }

    /// The revision to publish now, if it is time and it is news. It counts as published once the server has taken it
    /// ([`Publisher::published`]).
    pub fn due(&mut self, applied: Revision, now: BootTime, jitter: f64) -> Option<Revision> {
        if self.told == Some(applied) {
            return None;
        }
        let too_much = self.told.is_some_and(|told| applied < told);
        if too_much && !self.too_much {
            // What others believe of this node is wrong: it does not wait for its turn.
            let soon = later(now, spread(self.period, jitter));
            self.not_before = self.not_before.min(soon);
        }
        self.too_much = too_much;
        (now >= self.not_before).then_some(applied)
    }

    /// The server has it.
    pub fn published(&mut self, revision: Revision, now: BootTime, jitter: f64) {
        self.told = Some(revision);
        self.too_much = false;
        self.not_before = later(now, self.period + spread(self.period, jitter));
    }

    /// The Lease may be gone or another's: tell it again when it is time.
    pub fn forget(&mut self) {
        self.told = None;
    }

    /// What the server has.
    pub fn told(&self) -> Option<Revision> {
        self.told
    }
}

fn spread(period: Duration, jitter: f64) -> Duration {
    (period / SPREAD).mul_f64(jitter.clamp(0.0, 1.0))
}

fn later(now: BootTime, by: Duration) -> BootTime {
    BootTime(now.0.saturating_add(by))
}

/// The minimum as a node may use it: this node is one of those that were folded, so that a minimum above what its own dataplane has
/// applied is of other data, from before the storage was restored.
pub fn believed(folded: Option<Watermark>, applied: Option<Revision>) -> Option<Watermark> {
    folded.filter(|watermark| applied.is_some_and(|applied| watermark.revision <= applied))
}

/// For whom the fold does not wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Absence {
    /// A node that never published, after so long.
    pub never: Duration,
    /// A node that is not ready and silent, after so long; `None`: never.
    pub silent: Option<Duration>,
}

impl Absence {
    /// Where nodes publish once a period.
    pub fn of(period: Duration) -> Self {
        let limit = ABSENT_AFTER.max(period.saturating_mul(MISSED));
        Self {
            never: limit,
            silent: Some(limit),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Told {
    Never,
    Applied(Revision),
    /// More than there is.
    Doubtful,
}

#[derive(Debug, Clone)]
struct Entry {
    name: String,
    ready: bool,
    told: Told,
    /// Tells one publication from the next.
    mark: String,
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

/// What comes of folding.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Folded {
    /// `None` while a node that counts is unknown, and without nodes.
    pub minimum: Option<Watermark>,
    /// Nodes that count and of which nobody knows how far they are; some of them, by name.
    pub unknown: Vec<String>,
    /// How many these are.
    pub unknown_count: usize,
    /// Nodes that are not waited for.
    pub absent: usize,
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
                    told: Told::Never,
                    mark: String::new(),
                    heard: now,
                };
                self.nodes.insert(uid.to_owned(), entry);
            }
        }
    }

    /// Every Node but these was deleted.
    pub fn retain(&mut self, mut there: impl FnMut(&str) -> bool) {
        self.nodes.retain(|uid, _| there(uid));
    }

    /// What a node has published. The latest counts, also a lower one: the storage may have been restored from a backup. `mark`
    /// is another for each publication: one that was taken in before says nothing.
    pub fn published(&mut self, uid: &str, revision: Revision, mark: &str, now: BootTime) {
        if let Some(entry) = self.nodes.get_mut(uid)
            && entry.mark != mark
        {
            entry.told = Told::Applied(revision);
            entry.mark = mark.to_owned();
            entry.heard = now;
        }
    }

    /// The newest revision that the server has, asked for after all that was published had been taken in. Nobody can have applied
    /// more: who says so speaks of other data.
    pub fn head(&mut self, head: Revision) {
        for entry in self.nodes.values_mut() {
            if matches!(entry.told, Told::Applied(revision) if revision > head) {
                entry.told = Told::Doubtful;
            }
        }
    }

    /// The minimum over all nodes that count.
    pub fn fold(&self, now: BootTime) -> Folded {
        let mut counted: Vec<(Revision, &str)> = Vec::new();
        let mut unknown: Vec<&str> = Vec::new();
        for entry in self.nodes.values() {
            let silence = now.since(entry.heard);
            let absent = !entry.ready && self.absence.silent.is_some_and(|limit| silence >= limit);
            match entry.told {
                Told::Never if silence >= self.absence.never => {}
                Told::Never | Told::Doubtful if !absent => unknown.push(&entry.name),
                Told::Applied(revision) if !absent => counted.push((revision, &entry.name)),
                Told::Never | Told::Doubtful | Told::Applied(_) => {}
            }
        }
        counted.sort_unstable();
        unknown.sort_unstable();
        let lagging = counted.iter().take(MAX_LAGGING);
        let minimum = counted.first().filter(|_| unknown.is_empty());
        Folded {
            minimum: minimum.map(|(revision, _)| Watermark {
                revision: *revision,
                lagging: lagging.map(|(_, name)| (*name).to_owned()).collect(),
            }),
            unknown_count: unknown.len(),
            absent: self.nodes.len() - counted.len() - unknown.len(),
            unknown: (unknown.iter().take(MAX_LAGGING))
                .map(|name| (*name).to_owned())
                .collect(),
        }
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
        fold.fold(at(seconds)).minimum.map(|w| w.revision.0)
    }

    fn publish(fold: &mut Fold, uid: &str, revision: u64, seconds: u64) {
        let mark = format!("{seconds}-{revision}");
        fold.published(uid, Revision(revision), &mark, at(seconds));
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
        publish(&mut fold, "a", 9, 1);
        let folded = fold.fold(at(1));
        assert_eq!(folded.minimum, None, "nobody knows what b has");
        assert_eq!(folded.unknown, ["node-b"]);
        publish(&mut fold, "b", 7, 2);
        let watermark = fold.fold(at(2)).minimum.unwrap();
        assert_eq!(watermark.revision, Revision(7));
        assert_eq!(watermark.lagging, ["node-b", "node-a"]);
        // Restored from a backup.
        publish(&mut fold, "a", 3, 3);
        assert_eq!(minimum(&fold, 3), Some(3));
    }

    #[test]
    fn a_ready_node_is_waited_for_and_a_dead_one_for_a_while() {
        let mut fold = two();
        publish(&mut fold, "a", 9, 1);
        publish(&mut fold, "b", 7, 1);
        assert_eq!(minimum(&fold, 100_000), Some(7), "ready, and behind");
        fold.node("b", "node-b", false, at(100));
        assert_eq!(minimum(&fold, 600), Some(7));
        // The same publication again is no sign of life.
        fold.published("b", Revision(7), "1-7", at(600));
        assert_eq!(minimum(&fold, 601), Some(9));
        assert_eq!(fold.fold(at(601)).absent, 1);
        // It comes back, with what it had.
        fold.node("b", "node-b", true, at(700));
        assert_eq!(minimum(&fold, 700), Some(7));
        fold.retain(|uid| uid != "b");
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
        publish(&mut strict, "a", 1, 0);
        assert_eq!(minimum(&strict, 1_000_000), Some(1));
    }

    #[test]
    fn a_long_period_makes_nobody_absent_between_two_publications() {
        assert_eq!(Absence::of(Duration::from_secs(120)), ABSENCE);
        let hour = Duration::from_secs(3600);
        assert_eq!(Absence::of(hour).silent, Some(hour * 3));
    }

    #[test]
    fn who_has_more_than_there_is_is_doubted_until_it_publishes_again() {
        let mut fold = two();
        publish(&mut fold, "a", 1000, 1);
        publish(&mut fold, "b", 1001, 1);
        fold.head(Revision(1001));
        assert_eq!(minimum(&fold, 1), Some(1000));
        // Restored at 500; a has noticed, b has not.
        publish(&mut fold, "a", 510, 2);
        fold.head(Revision(511));
        assert_eq!(minimum(&fold, 2), None);
        assert_eq!(fold.fold(at(2)).unknown, ["node-b"]);
        // Numbers that come back up to it make it no truer.
        publish(&mut fold, "a", 1200, 3);
        fold.published("b", Revision(1001), "1-1001", at(3));
        fold.head(Revision(1200));
        assert_eq!(minimum(&fold, 3), None);
        publish(&mut fold, "b", 1150, 4);
        fold.head(Revision(1200));
        assert_eq!(minimum(&fold, 4), Some(1150));
        assert_eq!(minimum(&fold, 100_000), Some(1150));
    }

    #[test]
    fn a_node_believes_nothing_that_it_has_not_applied_itself() {
        let folded = |revision| {
            Some(Watermark {
                revision: Revision(revision),
                lagging: Vec::new(),
            })
        };
        assert_eq!(believed(folded(7), Some(Revision(7))), folded(7));
        assert_eq!(believed(folded(8), Some(Revision(7))), None);
        assert_eq!(believed(folded(7), None), None);
        assert_eq!(believed(None, Some(Revision(7))), None);
    }

    #[test]
    fn a_node_publishes_at_once_and_then_news_at_most_once_a_period() {
        let period = Duration::from_secs(120);
        let mut publisher = Publisher::new(period, at(0), 0.0);
        assert_eq!(publisher.due(Revision(5), at(0), 0.0), Some(Revision(5)));
        // The server did not take it.
        assert_eq!(publisher.due(Revision(6), at(1), 0.0), Some(Revision(6)));
        publisher.published(Revision(6), at(1), 0.0);
        assert_eq!(publisher.due(Revision(7), at(120), 0.0), None);
        assert_eq!(publisher.due(Revision(7), at(121), 0.0), Some(Revision(7)));
        assert_eq!(publisher.due(Revision(6), at(500), 0.0), None, "no news");
        publisher.forget();
        assert_eq!(publisher.due(Revision(6), at(500), 0.0), Some(Revision(6)));
    }

    #[test]
    fn nodes_that_begin_together_do_not_write_together() {
        let period = Duration::from_secs(120);
        let mut last = Publisher::new(period, at(0), 1.0);
        assert_eq!(last.due(Revision(5), at(9), 1.0), None);
        assert_eq!(last.due(Revision(5), at(10), 1.0), Some(Revision(5)));
        last.published(Revision(5), at(10), 1.0);
        assert_eq!(last.due(Revision(6), at(139), 1.0), None);
        assert_eq!(last.due(Revision(6), at(140), 1.0), Some(Revision(6)));
    }

    #[test]
    fn what_turned_out_to_be_too_much_waits_for_no_period() {
        let period = Duration::from_secs(120);
        let mut publisher = Publisher::new(period, at(0), 0.0);
        publisher.published(Revision(1000), at(0), 0.0);
        assert_eq!(publisher.due(Revision(510), at(5), 0.5), None);
        // The jitter is drawn once.
        assert_eq!(publisher.due(Revision(511), at(9), 1.0), None);
        assert_eq!(
            publisher.due(Revision(512), at(10), 1.0),
            Some(Revision(512))
        );
    }

    /// Ten thousand nodes that apply revisions at their own pace: what the fold says, every node that is alive has applied.
    #[test]
    fn what_is_folded_every_live_node_has_applied() {
        let period = Duration::from_secs(120);
        let mut fold = Fold::new(ABSENCE);
        // Even, and of one node's two draws none says anything about the other.
        let jitter =
            |n: usize, draw: usize| (n.wrapping_mul(6151 + 2 * draw) ^ ((n >> 3) * draw)) % 10_007;
        let jitter = |n, draw| jitter(n, draw) as f64 / 10_007.0;
        let mut publishers: Vec<(String, Publisher, u64)> = (0..10_000)
            .map(|n| {
                let uid = format!("u{n}");
                fold.node(&uid, &uid, true, at(0));
                (uid, Publisher::new(period, at(0), jitter(n, 0)), 0)
            })
            .collect();
        let (mut writes, mut most) = (0_u64, 0);
        for second in 0..600 {
            let before = writes;
            for (n, (uid, publisher, applied)) in publishers.iter_mut().enumerate() {
                // Each lags by its own time.
                *applied = (second + 1_u64).saturating_sub(n as u64 % 7);
                if let Some(revision) = publisher.due(Revision(*applied), at(second), 0.0) {
                    publisher.published(revision, at(second), jitter(n, 1));
                    publish(&mut fold, uid, revision.0, second);
                    writes += 1;
                }
            }
            most = most.max(writes - before);
            // As often as the operator does.
            if second % 30 == 29
                && let Some(w) = fold.fold(at(second)).minimum
            {
                let slowest = publishers.iter().map(|(.., applied)| *applied).min();
                assert!(Some(w.revision.0) <= slowest);
            }
        }
        assert!(minimum(&fold, 600).is_some_and(|r| r >= 600 - 130 - 8));
        assert!(writes / 600 <= 83, "{} writes a second", writes / 600);
        assert!(most <= 1_100, "{most} writes in one second");
    }
}
