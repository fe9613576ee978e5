//! The watch protocol against an API server that cuts, lies, forgets, refuses, freezes and goes back, in virtual time. The oracle is
//! naive: once the faults are over, what was told adds up to what the server has.
//!
//! What holds at every step is checked too: one snapshot, no removal of what was never told, no other object under a name without a
//! removal, and no more requests than a server can bear.

mod sim {
    pub(crate) mod server;
}

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use kun_cluster_core::watch::{Action, Exchange, Hub, Input, Pace};
use kun_cluster_core::{Delta, Event, Kind, Object, ObjectName, Wanted};
use proptest::prelude::*;
use sim::server::{Connection, Lie, Server, Streams};

const KINDS: [Kind; 2] = [Kind::Namespace, Kind::IpamBlock];

#[derive(Debug, Clone)]
enum Step {
    Create(usize, u8),
    Update(usize, u8),
    Delete(usize, u8),
    /// Gone and back under its name, between two events.
    Recreate(usize, u8),
    /// Of our own kind: a version that cannot be read.
    Spoil(u8),
    Wait(u16),
    Cut,
    /// All streams end properly, as when a server shuts down.
    End,
    Freeze(u16),
    Compact,
    Refuse(u16, u8, Option<u8>),
    Lie(Lie),
    Streams(Streams),
    /// etcd is restored from a backup, and nobody writes for a while.
    GoBack,
    /// The same, and the versions are where they were, and further, before anybody asks.
    GoBackAndOn(Vec<(usize, u8)>),
    Backup,
}

fn step() -> impl Strategy<Value = Step> {
    let (kind, name) = (|| 0..KINDS.len(), || 0_u8..6);
    let status = prop::sample::select(vec![400_u16, 401, 403, 404, 410, 422, 429, 500, 503, 504]);
    prop_oneof![
        6 => (kind(), name()).prop_map(|(k, n)| Step::Create(k, n)),
        4 => (kind(), name()).prop_map(|(k, n)| Step::Update(k, n)),
        3 => (kind(), name()).prop_map(|(k, n)| Step::Delete(k, n)),
        2 => (kind(), name()).prop_map(|(k, n)| Step::Recreate(k, n)),
        1 => name().prop_map(Step::Spoil),
        4 => (0_u16..200).prop_map(Step::Wait),
        2 => Just(Step::Cut),
        1 => Just(Step::End),
        1 => (1_u16..400).prop_map(Step::Freeze),
        1 => Just(Step::Compact),
        2 => (status, 1_u8..6, prop::option::of(0_u8..20)).prop_map(|(s, n, r)| Step::Refuse(s, n, r)),
        2 => prop::sample::select(vec![Lie::Lose, Lie::Invent, Lie::Twice, Lie::Swap, Lie::Garbage]).prop_map(Step::Lie),
        1 => prop::sample::select(vec![Streams::Yes, Streams::Refused, Streams::Ignored]).prop_map(Step::Streams),
        1 => Just(Step::GoBack),
        1 => prop::collection::vec((kind(), name()), 0..4).prop_map(Step::GoBackAndOn),
        1 => Just(Step::Backup),
    ]
}

struct Sim {
    now: Duration,
    hub: Hub,
    server: Server,
    connections: HashMap<Exchange, Connection>,
    /// Probes are not answered for now; these.
    hold_probes: bool,
    held: HashMap<Exchange, Connection>,
    told: BTreeMap<(Kind, ObjectName), Object>,
    snapshots: usize,
    synced: bool,
    partial: bool,
    troubles: Vec<String>,
    requests: u64,
    renewals: u64,
    /// Revisions that were told, and were right.
    reached: u64,
}

impl Sim {
    fn new(seed: u64) -> Self {
        let now = Duration::from_secs(1_000);
        let wanted = Wanted::new().all(KINDS).revisions_of(Kind::Namespace);
        Self {
            now,
            hub: Hub::new(&wanted, Pace::default(), seed, now),
            server: Server::new(),
            connections: HashMap::new(),
            hold_probes: false,
            held: HashMap::new(),
            told: BTreeMap::new(),
            snapshots: 0,
            synced: false,
            partial: false,
            troubles: Vec::new(),
            requests: 0,
            renewals: 0,
            reached: 0,
        }
    }

    /// Delivers until nothing is left to be delivered now.
    fn settle(&mut self) {
        for round in 0.. {
            assert!(round < 10_000, "it never rests");
            self.hub.tick(self.now);
            let mut busy = false;
            while let Some(action) = self.hub.poll_action() {
                busy = true;
                match action {
                    Action::Send(request) => {
                        self.requests += 1;
                        let connection = self.server.open(&request.path, request.accept, self.now);
                        let probe = request.path.contains("metadata.name");
                        let open = match self.hold_probes && probe {
                            true => &mut self.held,
                            false => &mut self.connections,
                        };
                        assert!(open.insert(request.exchange, connection).is_none());
                    }
                    Action::Abort(exchange) => {
                        self.connections.remove(&exchange);
                        self.held.remove(&exchange);
                    }
                    Action::Renew => self.renewals += 1,
                }
            }
            let open: Vec<Exchange> = self.connections.keys().copied().collect();
            for exchange in open {
                busy |= self.deliver(exchange);
            }
            while let Some(event) = self.hub.poll_event() {
                busy = true;
                self.take(event);
            }
            if !busy {
                return;
            }
        }
    }

    fn deliver(&mut self, exchange: Exchange) -> bool {
        if self.server.frozen {
            return false;
        }
        let Some(connection) = self.connections.get_mut(&exchange) else {
            return false;
        };
        if let Some((status, retry_after)) = connection.head.take() {
            self.hub.input(
                exchange,
                Input::Head {
                    status,
                    retry_after,
                },
                self.now,
            );
            return true;
        }
        self.server.feed(connection, self.now);
        if !connection.out.is_empty() {
            let bytes = std::mem::take(&mut connection.out);
            // In pieces that end anywhere.
            for piece in bytes.chunks(97) {
                self.hub.input(exchange, Input::Body(piece), self.now);
            }
            return true;
        }
        if connection.over {
            self.connections.remove(&exchange);
            self.hub.input(exchange, Input::End, self.now);
            return true;
        }
        false
    }

    fn cut(&mut self, properly: bool) {
        for (exchange, mut connection) in std::mem::take(&mut self.connections) {
            if properly {
                self.hub.input(exchange, Input::End, self.now);
                continue;
            }
            // Half of what was about to be sent arrives.
            if connection.head.is_none() {
                self.server.feed(&mut connection, self.now);
                let half = connection.out.len() / 2;
                self.hub
                    .input(exchange, Input::Body(&connection.out[..half]), self.now);
            }
            self.hub.input(exchange, Input::Lost("reset"), self.now);
        }
    }

    /// Every watch is cut, and its version forgotten.
    fn forget(&mut self) {
        self.cut(false);
        self.server.update(Kind::Namespace, 0, false);
        self.server.compact();
    }

    fn wait(&mut self, time: Duration) {
        let end = self.now + time;
        loop {
            self.settle();
            let timeout = self.hub.timeout();
            assert!(timeout > self.now, "a timeout that is over is a busy loop");
            let awake = self.connections.values().filter(|_| !self.server.frozen);
            let bookmark = awake.map(|c| c.next_bookmark).min();
            let next = timeout.min(bookmark.unwrap_or(Duration::MAX)).min(end);
            if next >= end {
                self.now = end;
                self.settle();
                return;
            }
            self.now = next.max(self.now + Duration::from_millis(1));
        }
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Deltas(deltas) => {
                if !self.synced {
                    self.snapshots += 1;
                    assert_eq!(self.snapshots, 1, "a second event before Synced");
                }
                deltas.into_iter().for_each(|delta| self.apply(delta));
            }
            Event::Synced => {
                assert!(!self.synced);
                self.synced = true;
            }
            Event::Partial => {
                assert!(!self.synced);
                self.partial = true;
            }
            Event::Whole => {
                assert!(self.synced && self.partial);
                self.partial = false;
            }
            Event::Reached(kind, reached) => {
                assert!(self.synced && kind == Kind::Namespace);
                if let Some(reached) = reached
                    && !self.server.lied
                {
                    let of_kind = self.told.values().filter(|o| o.kind() == kind);
                    let told = sim::server::names_and_uids(of_kind);
                    assert!(reached.since <= reached.changed && reached.changed <= reached.at);
                    assert_eq!(self.server.had(reached.at), told, "at {reached:?}");
                    assert_eq!(self.server.had(reached.changed), told, "at {reached:?}");
                    self.reached += 1;
                }
            }
            Event::Trouble(what) => self.troubles.push(what),
        }
    }

    fn apply(&mut self, delta: Delta) {
        match delta {
            Delta::Upsert(object) => {
                let uid = object.meta().uid.clone();
                if let Some(before) = self.told.insert(object.key(), object) {
                    assert_eq!(before.meta().uid, uid, "another object without a removal");
                }
            }
            Delta::Remove(kind, name) => {
                assert!(self.synced, "a removal in the snapshot");
                assert!(
                    self.told.remove(&(kind, name.clone())).is_some(),
                    "{name} was never told"
                );
            }
        }
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Create(kind, name) => self.server.create(KINDS[*kind], *name),
            Step::Update(kind, name) => self.server.update(KINDS[*kind], *name, false),
            Step::Delete(kind, name) => self.server.delete(KINDS[*kind], *name),
            Step::Recreate(kind, name) => {
                self.server.delete(KINDS[*kind], *name);
                self.server.create(KINDS[*kind], *name);
            }
            Step::Spoil(name) => self.server.update(Kind::IpamBlock, *name, true),
            Step::Wait(seconds) => self.wait(Duration::from_secs(u64::from(*seconds))),
            Step::Cut => self.cut(false),
            Step::End => self.cut(true),
            Step::Freeze(seconds) => {
                self.server.frozen = true;
                self.wait(Duration::from_secs(u64::from(*seconds)));
                self.server.frozen = false;
            }
            Step::Compact => self.server.compact(),
            Step::Refuse(status, times, retry_after) => {
                let after = retry_after.map(|s| Duration::from_secs(u64::from(s)));
                (0..*times).for_each(|_| self.server.refuse.push_back((*status, after)));
            }
            Step::Lie(lie) => self.server.lie = Some(*lie),
            Step::Streams(streams) => self.server.streams = *streams,
            Step::Backup => self.server.backup(),
            Step::GoBack => {
                self.server.go_back();
                self.cut(false);
                self.server.lie = None;
                self.server.refuse.clear();
                // The probe says it; the first bookmark would.
                self.wait(Duration::from_secs(600));
            }
            Step::GoBackAndOn(written) => {
                let before = self.server.revision();
                self.server.go_back();
                self.cut(false);
                let write = |server: &mut Server| {
                    for (kind, name) in written {
                        server.update(KINDS[*kind], *name, false);
                        server.delete(KINDS[*kind], *name);
                        server.create(KINDS[*kind], *name);
                    }
                };
                write(&mut self.server);
                self.server.count_on(before);
                write(&mut self.server);
            }
        }
        self.settle();
    }

    /// The faults are over; in the end everybody is of one mind.
    fn heal(&mut self) {
        self.server.refuse.clear();
        self.server.lie = None;
        // A check period with all its jitter, what confirms it, and another: the objects are few.
        self.wait(Duration::from_secs(2_400));
        assert!(self.synced, "{:?}", self.hub.troubles().collect::<Vec<_>>());
        self.server.agrees(&self.told);
        assert!(
            self.hub.troubles().all(|t| t.contains("spec.first")),
            "{:?}",
            self.hub.troubles().collect::<Vec<_>>()
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]
    #[test]
    fn whatever_happens_in_the_end_the_server_was_told(seed: u64, steps in prop::collection::vec(step(), 0..60)) {
        let mut sim = Sim::new(seed);
        let begin = sim.now;
        steps.iter().for_each(|step| sim.step(step));
        sim.heal();
        // Two watches, each asking at most every half second on average while it fails; each step may cut what has just healed.
        let seconds = (sim.now - begin).as_secs();
        let most = 40 + seconds / 2 + 12 * steps.len() as u64;
        prop_assert!(sim.requests <= most, "{} requests in {} s of {} steps", sim.requests, seconds, steps.len());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]
    /// Whenever a revision is told, what was told before it is what the server had at it. (In the histories above too, until the server
    /// lies for the first time.)
    #[test]
    fn what_was_told_is_what_the_server_had_at_the_revision_told(seed: u64, steps in prop::collection::vec(step(), 0..60)) {
        let mut sim = Sim::new(seed);
        let honest = steps.iter().filter(|step| !matches!(step, Step::Lie(_)));
        honest.for_each(|step| sim.step(step));
        sim.heal();
        prop_assert!(!sim.server.lied && sim.reached > 0);
    }
}

fn quiet() -> Sim {
    let mut sim = Sim::new(7);
    (0..4).for_each(|name| sim.server.create(Kind::Namespace, name));
    sim.settle();
    assert!(
        sim.synced && sim.told.len() == 4 && sim.requests == 2,
        "{}",
        sim.requests
    );
    sim
}

#[test]
fn a_resumed_watch_costs_no_list() {
    let mut sim = quiet();
    // Where revisions are wanted, by a change that a watch has told.
    sim.server.update(Kind::Namespace, 2, false);
    sim.settle();
    sim.cut(false);
    sim.server.update(Kind::Namespace, 1, false);
    sim.wait(Duration::from_secs(5));
    sim.server.agrees(&sim.told);
    let counts = sim.hub.counts().map(|(_, c)| c).collect::<Vec<_>>();
    assert!(counts.iter().all(|c| c.lists == 1), "{counts:?}");
}

#[test]
fn an_answer_about_the_stream_before_says_nothing_of_the_next() {
    let mut sim = quiet();
    sim.server.update(Kind::Namespace, 2, false);
    sim.settle();
    sim.hold_probes = true;
    sim.cut(false);
    sim.wait(Duration::from_secs(5));
    assert_eq!(sim.held.len(), 1, "one asks for its witness");
    // Another object is the last that changed when the stream is lost once more, and the probe is still under way.
    sim.server.update(Kind::Namespace, 1, false);
    sim.settle();
    sim.cut(false);
    sim.wait(Duration::from_secs(2));
    sim.hold_probes = false;
    let held = std::mem::take(&mut sim.held);
    sim.connections.extend(held);
    sim.wait(Duration::from_secs(30));
    sim.server.agrees(&sim.told);
    let counts = sim.hub.counts().map(|(_, c)| c).collect::<Vec<_>>();
    assert!(counts.iter().all(|c| c.went_back == 0), "{counts:?}");
    assert!(counts.iter().all(|c| c.lists == 1), "{counts:?}");
}

#[test]
fn bookmarks_carry_a_quiet_watch_over_a_compaction() {
    let mut sim = quiet();
    // Others write; this kind is quiet. Without bookmarks its version would be forgotten.
    (0..9).for_each(|_| sim.server.update(Kind::Namespace, 0, false));
    sim.wait(Duration::from_secs(70));
    sim.server.compact();
    sim.cut(false);
    sim.wait(Duration::from_secs(5));
    let counts = sim.hub.counts().map(|(_, c)| c).collect::<Vec<_>>();
    assert!(
        counts.iter().all(|c| c.lists == 1 && c.gone == 0),
        "{counts:?}"
    );
}

#[test]
fn a_forgotten_version_finds_missed_deletions_and_new_identities() {
    for in_stream in [false, true] {
        let mut sim = quiet();
        sim.server.gone_in_stream = in_stream;
        sim.server.update(Kind::Namespace, 2, false);
        sim.settle();
        sim.cut(false);
        sim.server.delete(Kind::Namespace, 0);
        sim.step(&Step::Recreate(0, 1));
        sim.server.compact();
        let deltas_before = sim.told.clone();
        sim.wait(Duration::from_secs(20));
        sim.server.agrees(&sim.told);
        assert_ne!(sim.told, deltas_before);
        let gone: u64 = sim.hub.counts().map(|(_, c)| c.gone).sum();
        assert_eq!(gone, 2, "both kinds were forgotten");
        assert!(sim.troubles.is_empty(), "{:?}", sim.troubles);
    }
}

#[test]
fn a_server_without_streaming_lists_is_listed_by_pages_and_remembered() {
    for streams in [Streams::Refused, Streams::Ignored] {
        let mut sim = Sim::new(3);
        sim.server.streams = streams;
        (0..3).for_each(|name| sim.server.create(Kind::Namespace, name));
        sim.wait(Duration::from_secs(400));
        assert!(sim.synced, "{streams:?}");
        sim.server.agrees(&sim.told);
        let streamed = sim.server.streams_asked;
        sim.forget();
        sim.wait(Duration::from_secs(30));
        assert_eq!(
            sim.server.streams_asked, streamed,
            "{streams:?}: asked again at once"
        );
        sim.wait(Duration::from_secs(3_700));
        sim.forget();
        sim.wait(Duration::from_secs(400));
        assert!(
            sim.server.streams_asked > streamed,
            "{streams:?}: an updated server is never found"
        );
    }
}

#[test]
fn an_expired_page_begins_the_list_again() {
    let mut sim = Sim::new(3);
    sim.server.streams = Streams::Refused;
    sim.server.page = 2;
    sim.server.expire_tokens = 3;
    (0..6).for_each(|name| sim.server.create(Kind::Namespace, name));
    sim.wait(Duration::from_secs(120));
    assert!(sim.synced);
    sim.server.agrees(&sim.told);
}

#[test]
fn a_lost_event_is_found_and_said() {
    for (lie, name) in [(Lie::Lose, 1), (Lie::Invent, 9)] {
        let mut sim = quiet();
        sim.server.lie = Some(lie);
        sim.server.update(Kind::Namespace, 1, false);
        sim.wait(Duration::from_secs(10));
        sim.server.lie = None;
        assert!(sim.troubles.is_empty());
        // A period is five minutes and half of it at most for few objects; then the second look.
        sim.wait(Duration::from_secs(450 + 140));
        sim.server.agrees(&sim.told);
        assert!(
            sim.troubles.iter().any(|t| t.contains("lost or invented")),
            "{lie:?} {name}: {:?}",
            sim.troubles
        );
        let repaired: u64 = sim.hub.counts().map(|(_, c)| c.repaired).sum();
        assert_eq!(repaired, 1, "{lie:?}");
        // And it is over once a check finds nothing.
        sim.wait(Duration::from_secs(500));
        assert_eq!(sim.hub.troubles().count(), 0);
    }
}

#[test]
fn a_frozen_server_is_noticed_and_waited_for() {
    let mut sim = quiet();
    sim.server.frozen = true;
    sim.wait(Duration::from_secs(140));
    assert!(sim.troubles.is_empty(), "{:?}", sim.troubles);
    sim.wait(Duration::from_secs(300));
    assert!(
        sim.troubles.iter().any(|t| t.contains("silent for")),
        "{:?}",
        sim.troubles
    );
    let spent = sim.requests;
    sim.wait(Duration::from_secs(3_600));
    assert!(
        sim.requests - spent < 120,
        "{} requests to a frozen server in an hour",
        sim.requests - spent
    );
    sim.server.frozen = false;
    sim.server.update(Kind::Namespace, 2, false);
    sim.wait(Duration::from_secs(120));
    sim.server.agrees(&sim.told);
    assert_eq!(sim.hub.troubles().count(), 0);
}

#[test]
fn data_that_goes_back_is_never_taken_in_silence() {
    let mut sim = quiet();
    sim.server.backup();
    (0..3).for_each(|name| sim.server.delete(Kind::Namespace, name));
    sim.server.create(Kind::Namespace, 5);
    sim.settle();
    assert_eq!(sim.told.len(), 2);
    sim.step(&Step::GoBack);
    sim.server.agrees(&sim.told);
    assert!(
        sim.troubles
            .iter()
            .any(|t| t.contains("older than resourceVersion")),
        "{:?}",
        sim.troubles
    );
}

/// Its numbers have come back up to ours before anybody asks: a watch resumes as if nothing had been. However the two histories
/// differ, it is seen at once, and no revision is told of what is of the other one.
#[test]
fn data_that_went_back_and_came_up_again_is_seen_by_its_newest_object() {
    let lost: [fn(&mut Server); 5] = [
        |s| s.create(Kind::Namespace, 5),
        |s| s.update(Kind::Namespace, 1, false),
        |s| s.delete(Kind::Namespace, 1),
        |s| {
            s.delete(Kind::Namespace, 1);
            s.create(Kind::Namespace, 1);
        },
        |s| {
            (0..4).for_each(|name| s.delete(Kind::Namespace, name));
            s.create(Kind::Namespace, 5);
            s.delete(Kind::Namespace, 5);
        },
    ];
    let written: [fn(&mut Server); 4] = [
        |_| {},
        |s| s.create(Kind::Namespace, 4),
        |s| s.update(Kind::Namespace, 1, false),
        |s| s.delete(Kind::Namespace, 2),
    ];
    for (i, lost) in lost.iter().enumerate() {
        for (j, written) in written.iter().enumerate() {
            for properly in [false, true] {
                let mut sim = quiet();
                sim.server.backup();
                lost(&mut sim.server);
                // A stream that ends properly has lived.
                sim.wait(Duration::from_secs(20));
                let before = sim.server.revision();
                sim.cut(properly);
                sim.server.go_back();
                written(&mut sim.server);
                sim.server.count_on(before + 10);
                written(&mut sim.server);
                sim.wait(Duration::from_secs(60));
                println!("lost {i}, written {j}, ended properly: {properly}");
                sim.server.agrees(&sim.told);
                assert_eq!(sim.hub.counts().map(|(_, c)| c.checks).sum::<u64>(), 0);
            }
        }
    }
}

#[test]
fn a_server_that_asks_to_wait_is_given_the_time() {
    let mut sim = Sim::new(5);
    for _ in 0..2 {
        sim.server
            .refuse
            .push_back((429, Some(Duration::from_secs(60))));
    }
    sim.wait(Duration::from_secs(59));
    assert_eq!(sim.requests, 2, "asked again before the time");
    sim.wait(Duration::from_secs(10));
    assert!(sim.synced);
}

#[test]
fn every_status_has_its_word() {
    // Status, what the trouble must say (`""`: nothing is said of one), for a kind of Kubernetes' and one of ours.
    let cases: [(u16, &str, &str); 10] = [
        (400, "", ""),
        (401, "does not know us", "does not know us"),
        (
            403,
            "no right to `watch` `namespaces` of the cluster",
            "no right to `watch` `ipamblocks` of kun.network of the cluster",
        ),
        (404, "has no namespaces", "apply deploy/crds"),
        (410, "", ""),
        (422, "", ""),
        (429, "answers 429", "answers 429"),
        (500, "answers 500", "answers 500"),
        (503, "answers 503", "answers 503"),
        (504, "answers 504", "answers 504"),
    ];
    for (status, theirs, ours) in cases {
        let mut sim = Sim::new(11);
        // Three times each kind: what passes by itself is told when it does not.
        (0..6).for_each(|_| sim.server.refuse.push_back((status, None)));
        sim.wait(Duration::from_secs(60));
        for (what, plural) in [(theirs, "namespaces"), (ours, "ipamblocks")] {
            let told: Vec<_> = sim.troubles.iter().filter(|t| t.contains(plural)).collect();
            let right = if what.is_empty() {
                told.is_empty() || matches!(status, 400 | 422)
            } else {
                told.iter().any(|t| t.contains(what))
            };
            assert!(right, "{status}: {what:?} not in {:?}", sim.troubles);
        }
        assert_eq!(sim.renewals > 0, status == 401, "{status}");
        assert!(sim.synced, "{status}: it is over and nobody noticed");
        assert_eq!(sim.hub.troubles().count(), 0, "{status}");
    }
}
