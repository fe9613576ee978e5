//! The API server as the operator's memory: IPAMBlock objects and the status of Services are the assignments, and every write is a
//! compare-and-swap. Acts only with a [`Seat`]; what it cannot write now is planned anew later.
//!
//! The Service's status is fought over with nobody: one that another implementation filled is left alone, and one that somebody
//! empties again and again is given up.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use kun_cluster::api::read_answer;
use kun_cluster::api::write::{WriteError, Writer};
use kun_cluster::crd::{IpPoolSpec, Moment, status_to_json};
use kun_cluster::{Delta, Interner, Kind, ObjectName, Resource, Store};
use serde_json::{Value, json};

use crate::elect::{Seat, now};
use crate::events;
use crate::generated::GeneratedError;
use crate::gone::Gone;
use crate::memory::{Kept, Memory};
use crate::plan::{Assignments, Plan, Pools, Shortage, is_let_go, is_ours, owner_of};
use crate::pools;
use crate::writes::{self, Write, writes};

/// The first wait after a failure is at most this and at least half of it, each next one twice as long, …
const WAIT_FIRST: Duration = Duration::from_millis(500);

/// … and at most this: a right that is missing is granted by a person.
const WAIT_AT_MOST: Duration = Duration::from_secs(30);

/// A conflict means that the watch is about to tell what changed.
const AFTER_CONFLICT: Duration = Duration::from_secs(1);

/// The addresses of a Service are written so often in one life of this memory. It takes one write, or a few when families change; more
/// means that somebody undoes them.
const MAX_WRITES: u32 = 8;

/// The memory of one reign.
#[derive(Debug)]
pub struct Claims {
    writer: Writer,
    seat: Seat,
    cooldown: Duration,
    gone: Gone,
    /// Addresses of Services that are gone: one that was deleted by mistake gets its own back, as long as this reign lasts.
    kept: BTreeMap<ObjectName, Vec<IpAddr>>,
    /// How often the addresses of a Service were written.
    written: BTreeMap<ObjectName, u32>,
    /// When the counts of each pool were said last, and whether some wait to be said.
    counted: BTreeMap<ObjectName, Duration>,
    counts_wait: Option<Duration>,
    failures: u32,
    /// Troubles of the pass before and of this one: each is told when it begins.
    told: BTreeSet<String>,
    telling: BTreeSet<String>,
    names: Interner,
    /// Seeds the jitter.
    reporter: String,
}

/// How many blocks and addresses of a pool are given, every node's agent hears that watches pools: said at most so often. What people wait for,
/// a condition, is said at once.
const COUNTS_EVERY: Duration = Duration::from_secs(30);

/// Writes of one pass: in between is looked at what changed, and at whether the operator is to stop.
const PASS: usize = 256;

/// How a write ended.
enum Ended {
    Done,
    /// Somebody else was faster, or it is not there any more: the next plan knows.
    Overtaken,
    /// Told, and nothing that trying the others would not find too.
    Refused,
    /// The server is not to be had, or asks to be left alone.
    Stop(Duration),
}

impl Claims {
    /// A memory without memories: the cluster has them. `reporter` signs the Events.
    pub fn new(writer: Writer, seat: Seat, cooldown: Duration, reporter: String) -> Self {
        Self {
            writer,
            seat,
            cooldown,
            gone: Gone::default(),
            kept: BTreeMap::new(),
            written: BTreeMap::new(),
            counted: BTreeMap::new(),
            counts_wait: None,
            failures: 0,
            told: BTreeSet::new(),
            telling: BTreeSet::new(),
            names: Interner::default(),
            reporter,
        }
    }

    fn perform(&mut self, store: &mut Store, write: &Write) -> Ended {
        let done = match write {
            Write::Claim { block, owner } => {
                let object = writes::claim(*block, owner);
                let made = self.writer.create(Resource::of(Kind::IpamBlock), &object);
                made.map(|object| (Kind::IpamBlock, object))
            }
            Write::HandOver {
                name,
                owner,
                epoch,
                version,
                ..
            } => {
                let patch = writes::hand_over(owner, *epoch, version);
                let made = self
                    .writer
                    .patch(Resource::of(Kind::IpamBlock), name, &patch);
                made.map(|object| (Kind::IpamBlock, object))
            }
            Write::Addresses {
                service,
                addresses,
                version,
            } => {
                let count = self.written.entry(service.clone()).or_default();
                if *count >= MAX_WRITES {
                    let what = format!(
                        "Service {service}: its addresses were written {count} times and somebody takes them away; give it a spec.loadBalancerClass of its own"
                    );
                    return self.refused(what);
                }
                *count += 1;
                let patch = writes::addresses(addresses, version);
                let resource = Resource::of(Kind::Service);
                let made = self.writer.patch_status(resource, service, &patch);
                made.map(|object| (Kind::Service, object))
            }
        };
        match done {
            Ok((kind, object)) => {
                self.take(store, kind, &object);
                Ended::Done
            }
            Err(error) => self.failed(error),
        }
    }

    fn failed(&mut self, error: WriteError) -> Ended {
        match error {
            WriteError::Conflict { .. }
            | WriteError::Exists { .. }
            | WriteError::NotFound { .. }
            | WriteError::Gone { .. } => {
                tracing::debug!("{error}");
                Ended::Overtaken
            }
            WriteError::Forbidden { .. } | WriteError::Invalid { .. } => {
                self.refused(error.to_string())
            }
            WriteError::Busy { retry_after, .. } => {
                let wait = self.wait();
                Ended::Stop(retry_after.map_or(wait, |asked| asked.clamp(wait, WAIT_AT_MOST)))
            }
            other => {
                self.say(other.to_string());
                Ended::Stop(self.wait())
            }
        }
    }

    fn refused(&mut self, what: String) -> Ended {
        self.say(what);
        Ended::Refused
    }

    fn say(&mut self, what: String) {
        if !self.told.contains(&what) && !self.telling.contains(&what) {
            tracing::warn!("{what}");
        }
        self.telling.insert(what);
    }

    /// Longer with every failure, and not the same for everybody who failed together.
    fn wait(&mut self) -> Duration {
        let full = WAIT_FIRST * 2_u32.saturating_pow(self.failures.min(16));
        self.failures += 1;
        let full = full.min(WAIT_AT_MOST);
        let seed = self.reporter.bytes().fold(self.failures, |n, b| {
            n.wrapping_mul(31).wrapping_add(u32::from(b))
        });
        full / 2 + full.mul_f64(f64::from(seed % 1000) / 2000.0)
    }

    /// What the server answered is what the cluster now says; the watch will say it again.
    fn take(&mut self, store: &mut Store, kind: Kind, object: &Value) {
        let read = read_answer(&mut self.names, kind, object);
        if let Some(object) = read {
            store.apply(Delta::Upsert(object));
        }
    }
}

impl Memory for Claims {
    fn before(&mut self, store: &Store, pools: &Pools) -> Assignments {
        let now = now();
        self.gone.look(store, now);
        self.kept.retain(|name, _| store.service(name).is_none());
        let mut addresses = self.kept.clone();
        for service in store.services().filter(|service| is_ours(service)) {
            let list = &service.load_balancer_ips;
            let ours = |ip: &IpAddr| pools.has(*ip);
            if list.is_empty() || service.load_balancer_named || !list.iter().all(ours) {
                continue;
            }
            let mut list = list.clone();
            list.sort();
            addresses.insert(service.meta.name.clone(), list);
        }
        let let_go = store.blocks().filter(|b| is_let_go(b)).map(|b| b.block());
        let mut returned = self.gone.returned(store, now, self.cooldown);
        returned.extend(let_go);
        Assignments {
            blocks: store.blocks().map(|b| (b.block(), owner_of(b))).collect(),
            returned,
            addresses,
        }
    }

    fn keep(&mut self, store: &mut Store, plan: &Plan) -> Result<Kept, GeneratedError> {
        self.told = std::mem::take(&mut self.telling);
        self.written.retain(|name, _| store.service(name).is_some());
        self.kept.clone_from(&plan.assignments.addresses);
        let mut again: Option<Duration> = None;
        for (count, write) in writes(store, &plan.assignments).into_iter().enumerate() {
            if count == PASS {
                return Ok(Kept::Again(Duration::ZERO));
            }
            if !self.seat.may_call() {
                // Whether we lead still is told soon; until then nothing is written.
                return Ok(Kept::Again(AFTER_CONFLICT));
            }
            match self.perform(store, &write) {
                Ended::Done => {
                    tell(&write);
                    self.failures = 0;
                }
                Ended::Overtaken => again = Some(again.unwrap_or(AFTER_CONFLICT)),
                Ended::Refused => again = Some(WAIT_AT_MOST),
                Ended::Stop(wait) => return Ok(Kept::Again(wait)),
            }
        }
        Ok(again.map_or(Kept::Whole, Kept::Again))
    }

    fn tell(&mut self, store: &mut Store, plan: &Plan, new: &BTreeSet<Shortage>) {
        let pools: Vec<_> = store.pools().cloned().collect();
        self.counts_wait = None;
        self.counted
            .retain(|name, _| pools.iter().any(|pool| pool.meta.name == *name));
        for pool in pools {
            let Some(moment) = Moment::from_unix(Timestamp::now().as_second()) else {
                break;
            };
            let status = pools::status(&pool, &plan.assignments, &plan.shortages, moment);
            if pool.status.as_ref() == Some(&status) || !self.seat.may_call() {
                continue;
            }
            let at = now();
            let before = pool.status.as_ref();
            if before.is_some_and(|before| before.conditions == status.conditions)
                && let Some(said) = self.counted.get(&pool.meta.name)
                && at < *said + COUNTS_EVERY
            {
                let wait = *said + COUNTS_EVERY - at;
                self.counts_wait = Some(self.counts_wait.map_or(wait, |other| other.min(wait)));
                continue;
            }
            self.counted.insert(pool.meta.name.clone(), at);
            let patch = json!({"status": status_to_json::<IpPoolSpec>(&status)});
            let resource = Resource::of(Kind::IpPool);
            match self.writer.patch_status(resource, &pool.meta.name, &patch) {
                Ok(object) => self.take(store, Kind::IpPool, &object),
                Err(error) => self.say(error.to_string()),
            }
        }
        let events: Vec<_> = events::of(new, store, &self.reporter).collect();
        for event in events {
            if !self.seat.may_call() {
                return;
            }
            if let Err(error) = self.writer.record(&event) {
                self.say(format!("an Event is not recorded: {error}"));
                break;
            }
        }
    }

    fn look_again(&self) -> Option<Duration> {
        let next = self.gone.next(now(), self.cooldown);
        [next, self.counts_wait].into_iter().flatten().min()
    }
}

fn tell(write: &Write) {
    match write {
        Write::Claim { block, owner } => tracing::info!(%block, node = %owner, "block assigned"),
        Write::HandOver {
            block,
            owner,
            epoch,
            ..
        } => {
            tracing::info!(%block, node = %owner, epoch, "block handed over: its owner is gone or has let go")
        }
        Write::Addresses {
            service, addresses, ..
        } => tracing::info!(%service, ?addresses, "virtual addresses assigned"),
    }
}
