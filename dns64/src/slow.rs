//! The slow lane: questions that must be asked upstream, each once however many clients wait.

use std::collections::HashMap;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use arc_swap::ArcSwap;
use kun_dns_core::chain::Job;
use kun_dns_core::logline::{Exchange, error_line, line};
use kun_dns_core::query::reject;
use kun_dns_core::wire::rcode;
use kun_dns_core::{Outcome, Query, Resolution, Transport};
use tokio::sync::mpsc;
use tokio::task::{self, JoinSet};

use crate::load::Loaded;
use crate::metrics::{Counters, Metrics};
use crate::sys::{self, Path};

/// Questions between the lanes: half a second of misses at the rate the slow lane can do.
pub(crate) const QUEUE: usize = 16_384;

/// Different questions in flight; each holds a socket or two, and the limit on descriptors is often 1024 … 65536.
const MAX_IN_FLIGHT: usize = 4096;

/// Clients on one question: what comes beyond has a forged source more likely than not.
const MAX_WAITERS: usize = 512;

/// Clients that wait in all, each with its query: some 20 MB. Upstream has five seconds for each, so this is 6,500 misses a second of
/// an upstream that is dead.
const MAX_WAITING: usize = 32_768;

/// How an answer reaches its client.
pub(crate) enum Reply {
    Udp(Arc<UdpSocket>, Box<Path>),
    Tcp(mpsc::Sender<Vec<u8>>),
}

/// A client that waits.
pub(crate) struct Waiter {
    pub(crate) query: Vec<u8>,
    pub(crate) transport: Transport,
    pub(crate) client: SocketAddr,
    pub(crate) received: Instant,
    pub(crate) reply: Reply,
}

/// A question for the slow lane; without a waiter, a refresh.
pub(crate) struct Submit {
    pub(crate) loaded: Arc<Loaded>,
    pub(crate) job: Box<Job>,
    pub(crate) waiter: Option<Waiter>,
}

/// What all threads share.
pub(crate) struct Shared {
    pub(crate) loaded: ArcSwap<Loaded>,
    pub(crate) metrics: Metrics,
    pub(crate) epoch: Instant,
    pub(crate) jobs: mpsc::Sender<Submit>,
    pub(crate) looped: AtomicBool,
    pub(crate) looped_notify: tokio::sync::Notify,
}

impl Shared {
    /// Hands a question over; false: too many wait already.
    pub(crate) fn submit(&self, submit: Submit) -> bool {
        self.jobs.try_send(submit).is_ok()
    }

    /// `loop`'s probe came back.
    pub(crate) fn loop_found(&self) {
        self.looped.store(true, Ordering::Relaxed);
        self.looped_notify.notify_one();
    }
}

type FlightKey = (usize, Box<[u8]>);

struct Flight {
    job: Arc<Job>,
    task: task::Id,
    waiters: Vec<Waiter>,
}

/// Questions in flight.
#[derive(Default)]
struct Flights {
    by_key: HashMap<FlightKey, Flight>,
    /// Waiters of all of them.
    waiting: usize,
}

impl Flights {
    fn remove(&mut self, key: &FlightKey) -> Option<Flight> {
        let flight = self.by_key.remove(key)?;
        self.waiting -= flight.waiters.len();
        Some(flight)
    }
}

enum Done {
    Outcome(FlightKey, Outcome),
    /// `max_concurrent` are in flight.
    Limit(FlightKey),
}

/// Runs until the queue closes.
pub(crate) async fn run(shared: Arc<Shared>, mut queue: mpsc::Receiver<Submit>) {
    let counters = shared.metrics.thread();
    let mut flights = Flights::default();
    let mut tasks: JoinSet<Done> = JoinSet::new();
    loop {
        tokio::select! {
            submit = queue.recv() => match submit {
                None => return,
                Some(submit) => take(&shared, &counters, &mut flights, &mut tasks, submit),
            },
            Some(done) = tasks.join_next() => match done {
                Ok(done) => finish(&shared, &counters, &mut flights, done),
                // A task that panicked has said so. Its question must not look like one that is under way for ever.
                Err(e) => {
                    tracing::error!(error = %e, "a resolution broke off");
                    abandon(&counters, &mut flights, e.id());
                }
            },
        }
    }
}

fn take(
    shared: &Arc<Shared>,
    counters: &Counters,
    flights: &mut Flights,
    tasks: &mut JoinSet<Done>,
    submit: Submit,
) {
    let Submit {
        loaded,
        job,
        waiter,
    } = submit;
    let key: FlightKey = (Arc::as_ptr(&job.chain).addr(), job.key.bytes().into());
    let full = flights.waiting >= MAX_WAITING;
    if let Some(flight) = flights.by_key.get_mut(&key) {
        match waiter {
            Some(w) if flight.waiters.len() < MAX_WAITERS && !full => {
                flight.waiters.push(w);
                flights.waiting += 1;
            }
            Some(w) => refuse(counters, &w, rcode::SERVFAIL),
            None => {}
        }
        return;
    }
    if flights.by_key.len() >= MAX_IN_FLIGHT || full {
        waiter
            .iter()
            .for_each(|w| refuse(counters, w, rcode::SERVFAIL));
        counters.overload();
        return;
    }
    let job: Arc<Job> = Arc::from(job);
    let transport = waiter.as_ref().map_or(Transport::Udp, |w| w.transport);
    let resolution = resolve(shared.clone(), loaded, job.clone(), transport, key.clone());
    let task = tasks.spawn(resolution).id();
    flights.waiting += usize::from(waiter.is_some());
    flights.by_key.insert(
        key,
        Flight {
            job,
            task,
            waiters: waiter.into_iter().collect(),
        },
    );
}

/// Ends the flight of a task that is gone without an outcome: its clients hear that it failed, the next one asks anew.
fn abandon(counters: &Counters, flights: &mut Flights, task: task::Id) {
    let key = flights.by_key.iter().find(|(_, f)| f.task == task);
    let key = key.map(|(key, _)| key.clone());
    if let Some(flight) = key.and_then(|key| flights.remove(&key)) {
        let waiters = flight.waiters.iter();
        waiters.for_each(|w| refuse(counters, w, rcode::SERVFAIL));
    }
}

async fn resolve(
    shared: Arc<Shared>,
    loaded: Arc<Loaded>,
    job: Arc<Job>,
    transport: Transport,
    key: FlightKey,
) -> Done {
    let mut resolution = Resolution::start(&job, &loaded.world, shared.epoch.elapsed());
    let asks = resolution.take_asks();
    let upstreams = asks.first().map(|a| loaded.upstreams[a.forward].clone());
    let seat = upstreams.as_ref().map(|u| u.seat());
    if matches!(seat, Some(None)) {
        return Done::Limit(key);
    }
    let mut exchanges = JoinSet::new();
    for ask in asks {
        let upstreams = loaded.upstreams[ask.forward].clone();
        exchanges.spawn(async move { (ask.qtype, upstreams.exchange(&ask, transport).await) });
    }
    loop {
        // What is not needed any more is dropped with the set.
        if let Some(outcome) = resolution.take_outcome() {
            return Done::Outcome(key, outcome);
        }
        match exchanges.join_next().await {
            Some(Ok((qtype, reply))) => resolution.reply(qtype, reply),
            Some(Err(e)) => resolution.reply(job.qtype, Err(e.to_string())),
            None => resolution.reply(job.qtype, Err("no reply".to_owned())),
        }
    }
}

fn finish(shared: &Shared, counters: &Counters, flights: &mut Flights, done: Done) {
    let (key, outcome) = match done {
        Done::Outcome(key, outcome) => (key, Some(outcome)),
        Done::Limit(key) => (key, None),
    };
    let Some(Flight { job, waiters, .. }) = flights.remove(&key) else {
        return;
    };
    let chain = &job.chain;
    let Some(outcome) = outcome else {
        // CoreDNS: above max_concurrent a query is refused.
        waiters
            .iter()
            .for_each(|w| refuse(counters, w, rcode::REFUSED));
        return;
    };
    let failed = outcome.answer.rcode() == rcode::SERVFAIL;
    if let (true, Some(error), true) = (chain.errors, &outcome.error, failed) {
        tracing::error!(target: "kun_dns::errors", "plugin/errors: {}", error_line(&job.name, job.qtype, rcode::SERVFAIL, error));
    }
    let (answer, ttl) = chain.settle(&job, outcome.answer, shared.epoch.elapsed());
    let mut out = Vec::new();
    for waiter in waiters {
        let Ok(query) = Query::parse(&waiter.query, waiter.transport) else {
            continue;
        };
        chain.write(
            &query,
            &answer,
            ttl,
            u64::from_ne_bytes(sys::random()),
            &mut out,
        );
        counters.answer(&out, None);
        let exchange = Exchange {
            query: &query,
            response: &out,
            client: waiter.client,
            duration: waiter.received.elapsed(),
        };
        if let Some(line) = line(&chain.log, &exchange) {
            tracing::info!(target: "kun_dns::log", "{line}");
        }
        send(&waiter.reply, &out);
    }
}

fn refuse(counters: &Counters, waiter: &Waiter, code: u8) {
    let mut out = Vec::new();
    reject(&waiter.query, code, &mut out);
    counters.answer(&out, None);
    send(&waiter.reply, &out);
}

fn send(reply: &Reply, answer: &[u8]) {
    // A client that is gone, or takes nothing, loses its answer: that is its loss alone.
    match reply {
        Reply::Udp(socket, path) => drop(sys::send(socket, path, answer)),
        Reply::Tcp(sender) => drop(sender.try_send(answer.to_vec())),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use kun_dns_core::ClusterView;
    use kun_dns_core::chain::Handled;

    use super::*;
    use crate::load::Source;

    #[tokio::test]
    async fn a_resolution_that_breaks_off_leaves_nothing_in_flight() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("Corefile");
        std::fs::write(&path, ".:53 {\n forward . 127.0.0.1:1\n}\n").unwrap();
        let source = Arc::new(Source::read(&path, None).unwrap());
        let loaded = Arc::new(Loaded::new(source, None, &ClusterView::default()).unwrap());
        let again = Loaded::new(loaded.source.clone(), None, &ClusterView::default()).unwrap();
        let shared = Arc::new(Shared {
            loaded: ArcSwap::from_pointee(again),
            metrics: Metrics::default(),
            epoch: Instant::now(),
            jobs: mpsc::channel(1).0,
            looped: AtomicBool::new(false),
            looped_notify: tokio::sync::Notify::new(),
        });
        let counters = shared.metrics.thread();
        let client = SocketAddr::from(([127, 0, 0, 1], 4000));
        let query = b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0\x01a\x01b\0\0\x01\0\x01".to_vec();
        let (mut flights, mut tasks) = (Flights::default(), JoinSet::new());
        let (sender, mut answers) = mpsc::channel(2);
        for _ in 0..2 {
            let (udp, mut out) = (Transport::Udp, Vec::new());
            let world = &loaded.world;
            let Handled::Resolve(job) =
                world.handle(0, &query, udp, client, Duration::ZERO, 0, &mut out)
            else {
                panic!("nothing but upstream knows it")
            };
            let waiter = Some(Waiter {
                query: query.clone(),
                transport: udp,
                client,
                received: Instant::now(),
                reply: Reply::Tcp(sender.clone()),
            });
            let loaded = loaded.clone();
            let submit = Submit {
                loaded,
                job,
                waiter,
            };
            take(&shared, &counters, &mut flights, &mut tasks, submit);
        }
        assert_eq!(
            (flights.by_key.len(), flights.waiting, tasks.len()),
            (1, 2, 1)
        );
        tasks.abort_all();
        let broken = tasks.join_next().await.unwrap().err().unwrap();
        abandon(&counters, &mut flights, broken.id());
        assert_eq!((flights.by_key.len(), flights.waiting), (0, 0));
        for _ in 0..2 {
            assert_eq!(answers.try_recv().unwrap()[3] & 15, rcode::SERVFAIL);
        }
    }
}
