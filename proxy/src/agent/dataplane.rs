//! The thread that owns the eBPF dataplane: cluster events in, ops out, programs attached, flows expired, questions answered.
//!
//! One owner, no lock. Between the changes of a few Services it looks at its queue, so that a pod's ADD never waits for a whole
//! cold start.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError};
use std::time::{Duration, Instant};

use kun_bgp::Datapath;
use kun_cluster::{Event, Reached};
use kun_cni::clock;
use kun_config::Config;
use kun_control::{AttachmentKey, Fact};
use kun_ebpf_abi::Addr;
use kun_ebpf_loader::{FIRST_FILTERS, LAST_FILTERS};
use kun_proxy::{EbpfBackend, Proxy};
use kun_proxy_core::{Problem, Question, Reason};
use tokio::sync::watch;

use super::announce::Facts;
use super::attachments::{Attachment, Attachments};
use super::limits::Limiter;
use super::links::Taken;
use super::metrics::Metrics;
use super::node::Uplinks;
use super::translator::Translator;
use super::watermark::Applied;
use super::{links, node, sockets};

mod interfaces;
mod report;

/// Messages that may wait. The cluster source then waits too; nothing is lost.
pub(crate) const QUEUE: usize = 1024;

/// Changed Services between two looks at the queue: well below a millisecond.
const SERVICES_A_TURN: usize = 64;

/// How often counters are read and interfaces looked after.
const TICK: Duration = Duration::from_secs(1);

/// How often the flow table is swept, a fraction of any sensible idle time, and pods' filters are looked for.
const EXPIRE_EVERY: Duration = Duration::from_secs(15);

/// Under which a complaint about sockets is remembered: no interface has such a name.
const SOCKETS: &str = "UDP sockets";

/// The same of pins.
const PINS: &str = "pins of another version";

/// After an op failed: the first wait, doubled up to the last.
const RETRY_FIRST: Duration = Duration::from_millis(250);
const RETRY_LAST: Duration = Duration::from_secs(30);

/// Problems that status names one by one.
const PROBLEMS_NAMED: usize = 8;

/// What the thread is asked to do.
#[derive(Debug)]
pub(crate) enum Message {
    /// From the cluster source.
    Cluster(Event),
    /// A pod's host interfaces stand: link the programs, hold it to its limits, open its host ports, then answer.
    Attach {
        /// What is to be done.
        attachment: Box<Attachment>,
        /// Where the answer goes.
        done: SyncSender<Result<(), String>>,
    },
    /// Why would an attachment's host ports be refused?
    Refuses {
        /// What it will ask for.
        attachment: Box<Attachment>,
        /// Where the answer goes.
        reply: SyncSender<Option<String>>,
    },
    /// A pod is gone.
    Detach {
        /// Whose.
        key: AttachmentKey,
        /// The names that its interfaces had.
        interfaces: Vec<String>,
    },
    /// What of an attachment does not stand?
    Verify {
        /// What is to be.
        attachment: Box<Attachment>,
        /// Where the answer goes.
        reply: SyncSender<Vec<String>>,
    },
    /// Pods are gone: a gateway's entries that name their addresses go. How many there were.
    Forget {
        /// Theirs.
        addresses: HashSet<Addr>,
        /// Where the answer goes.
        reply: SyncSender<Result<u64, String>>,
    },
    /// The attachments that have an address.
    Live(BTreeSet<AttachmentKey>),
    /// `kunctl why`.
    Why {
        /// What is asked.
        question: Question,
        /// Where the answer goes.
        reply: SyncSender<Vec<Reason>>,
    },
    /// `kunctl status`.
    Status {
        /// Where the answer goes.
        reply: SyncSender<Report>,
    },
    /// The agent stops; everything stays pinned.
    Stop,
}

/// The dataplane's share of a status.
#[derive(Debug, Clone, Default)]
pub(crate) struct Report {
    /// Service dataplane.
    pub(crate) proxy: Vec<Fact>,
    /// Translator.
    pub(crate) nat64: Vec<Fact>,
}

/// The thread's state.
pub(crate) struct Dataplane {
    config: Config,
    proxy: Proxy<EbpfBackend>,
    limiter: Limiter,
    attachments: Attachments,
    translator: Option<Translator>,
    metrics: Metrics,
    facts: Arc<watch::Sender<Facts>>,
    adopted: bool,
    /// Interface name to the index that carries our programs: a name may come back as another interface.
    pods: BTreeMap<String, u32>,
    uplinks: BTreeMap<String, u32>,
    /// Finds them.
    seek: Uplinks,
    /// Hears of filters that are taken away; `None`: it cannot.
    taken: Option<Taken>,
    complaints: BTreeMap<String, String>,
    programmed: Arc<AtomicBool>,
    /// The revision that was taken in last; what came before it may still be planned.
    reached: Option<Reached>,
    applied: Arc<Applied>,
    batch: Option<Batch>,
    synced_once: bool,
    /// What agents of another ABI version pinned is gone.
    succeeded: bool,
    failing: Option<Failing>,
    last_batch: Option<Duration>,
}

/// Work in progress.
struct Batch {
    since: Instant,
    ops: usize,
    withdrawals: usize,
}

/// Ops fail; try again later.
struct Failing {
    what: String,
    wait: Duration,
    again: Instant,
}

impl Dataplane {
    /// Over an opened dataplane, with the cgroup attached.
    pub(crate) fn new(
        config: Config,
        proxy: Proxy<EbpfBackend>,
        limiter: Limiter,
        translator: Option<Translator>,
        metrics: Metrics,
        facts: Arc<watch::Sender<Facts>>,
        adopted: bool,
    ) -> Self {
        Self {
            seek: Uplinks::new(config.node.uplink.as_deref()),
            // Before the first is put on: none goes unheard.
            taken: Taken::listen()
                .inspect_err(|error| tracing::warn!(%error, "pods' filters that are taken away are not told; they are looked for every 15 s"))
                .ok(),
            config,
            proxy,
            limiter,
            attachments: Attachments::default(),
            translator,
            metrics,
            facts,
            adopted,
            pods: BTreeMap::new(),
            uplinks: BTreeMap::new(),
            complaints: BTreeMap::new(),
            programmed: Arc::default(),
            reached: None,
            applied: Arc::default(),
            batch: None,
            synced_once: false,
            succeeded: false,
            failing: None,
            last_batch: None,
        }
    }

    /// Set once the first synced plan is in the kernel.
    pub(crate) fn programmed(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.programmed)
    }

    /// Which revision of the EndpointSlices the maps hold.
    pub(crate) fn applied(&self) -> Arc<Applied> {
        Arc::clone(&self.applied)
    }

    /// Does all that an attachment asks for, or nothing of its limits and host ports. What it had before is replaced.
    pub(crate) fn attach(&mut self, attachment: &Attachment) -> Result<(), String> {
        if let Some(refused) = self.attachments.refuses(attachment) {
            return Err(refused);
        }
        let done = self.try_attach(attachment);
        if done.is_err() {
            // Its ports may be open already, or half open: it is let go like one that stood.
            self.attachments.insert(attachment.clone());
            self.let_go(&attachment.key);
        }
        done
    }

    fn try_attach(&mut self, attachment: &Attachment) -> Result<(), String> {
        let Attachment {
            key,
            pod,
            interfaces,
            traffic,
            ..
        } = attachment;
        // First: not a packet passes unlimited.
        self.limiter.put(key, pod, interfaces, &traffic.bandwidth)?;
        interfaces.iter().try_for_each(|i| self.attach_pod(i))?;
        if !traffic.port_mappings.is_empty() || self.attachments.get(key).is_some() {
            self.open_ports(attachment)?;
        }
        if traffic.is_empty() {
            self.attachments.remove(key);
        } else {
            self.attachments.insert(attachment.clone());
        }
        Ok(())
    }

    fn open_ports(&mut self, attachment: &Attachment) -> Result<(), String> {
        let (pod, name) = (&attachment.pod, attachment.name());
        let ports = attachment.host_ports();
        let ports = (!ports.ports.is_empty()).then_some(ports);
        self.proxy.set_host_ports(&name, ports).map_err(|e| {
            format!("host ports of {pod} cannot be programmed: {e}; the agent reads the maps back")
        })?;
        self.plan();
        for problem in self.proxy.planner().problems_of(&name) {
            match problem {
                Problem::Taken { .. } => {
                    tracing::warn!(pod, "a host port is not served as asked: {problem}");
                }
                _ => return Err(format!("host ports of {pod}: {problem}")),
            }
        }
        Ok(())
    }

    /// Ends an attachment's limits and host ports.
    fn let_go(&mut self, key: &AttachmentKey) {
        for dropped in self.limiter.dropped_of(key) {
            self.metrics.forget(&dropped);
        }
        self.limiter.remove(key);
        let Some(attachment) = self.attachments.remove(key) else {
            return;
        };
        if let Err(error) = self.proxy.set_host_ports(&attachment.name(), None) {
            tracing::error!(%error, pod = attachment.pod, "its host ports cannot be closed yet; trying again");
        }
        self.plan();
    }

    /// Every live attachment has been told: what else an earlier agent served goes.
    pub(crate) fn settle(&mut self) {
        if let Err(error) = self.limiter.settle() {
            tracing::warn!(%error, "limits of pods that are gone stay");
        }
        self.proxy.attachments_known();
        self.plan();
    }

    /// Has the thread apply what is planned.
    fn plan(&mut self) {
        if self.batch.is_none() {
            self.batch = Some(Batch {
                since: Instant::now(),
                ops: 0,
                withdrawals: 0,
            });
        }
    }

    /// Tells the planner the node's addresses, where host ports are.
    pub(crate) fn refresh_addresses(&mut self) {
        match links::addresses() {
            Ok(addresses) => {
                if self.proxy.set_node_addresses(addresses) {
                    self.plan();
                }
            }
            Err(error) => tracing::warn!(%error, "the node's addresses cannot be read"),
        }
    }

    /// What of an attachment does not stand, one line each.
    fn verify(&self, attachment: &Attachment) -> Vec<String> {
        let Attachment {
            key,
            interfaces,
            traffic,
            ..
        } = attachment;
        let bare = |name: &String, priority| match node::interface_index(name) {
            Some(index) if self.pods.get(name) == Some(&index) => {
                !links::has_filters(index, priority).unwrap_or(false)
            }
            Some(_) | None => true,
        };
        let mut missing: Vec<String> = (interfaces.iter())
            .filter(|i| bare(i, LAST_FILTERS))
            .map(|i| format!("{i} carries no service programs"))
            .collect();
        if !traffic.bandwidth.is_unlimited() {
            let unlimited = interfaces.iter().filter(|i| bare(i, FIRST_FILTERS));
            missing.extend(unlimited.map(|i| format!("{i} carries no limiting programs")));
        }
        missing.extend(self.limiter.missing(key, interfaces, &traffic.bandwidth));
        let held = self.attachments.get(key);
        for mapping in &traffic.port_mappings {
            if !held.is_some_and(|h| h.traffic.port_mappings.contains(mapping)) {
                missing.push(format!("host port {} is not served", mapping.host_port));
            }
        }
        let problems = held.map(|h| h.name());
        missing.extend(problems.iter().flat_map(|name| {
            let problems = self.proxy.planner().problems_of(name);
            problems.map(ToString::to_string)
        }));
        missing
    }

    fn backend(&mut self) -> &mut EbpfBackend {
        self.proxy.backend()
    }

    /// Runs until [`Message::Stop`] or until nobody is left to send one.
    pub(crate) fn run(mut self, queue: &Receiver<Message>) {
        let mut next_tick = Instant::now();
        let mut next_expiry = Instant::now() + EXPIRE_EVERY;
        loop {
            let message = if self.busy() {
                match queue.try_recv() {
                    Ok(message) => Some(message),
                    Err(TryRecvError::Empty) => None,
                    Err(TryRecvError::Disconnected) => return,
                }
            } else {
                match queue.recv_timeout(self.patience(next_tick)) {
                    Ok(message) => Some(message),
                    Err(RecvTimeoutError::Timeout) => None,
                    Err(RecvTimeoutError::Disconnected) => return,
                }
            };
            // All that waits is taken in before anything is planned: changes that came together share one grace period, and a pod's
            // ADD waits for one turn, not for one turn each of the changes before it.
            for message in message.into_iter().chain(queue.try_iter()).take(QUEUE) {
                match message {
                    Message::Stop => return,
                    message => self.on_message(message),
                }
            }
            self.advance();
            let now = Instant::now();
            if now >= next_tick {
                next_tick = now + TICK;
                self.tick();
            }
            if now >= next_expiry && !self.busy() {
                next_expiry = now + EXPIRE_EVERY;
                self.expire();
                self.heal_pods();
            }
        }
    }

    fn busy(&self) -> bool {
        self.batch.is_some() && self.failing.is_none()
    }

    fn patience(&self, next_tick: Instant) -> Duration {
        let until = match &self.failing {
            Some(failing) => failing.again.min(next_tick),
            None => next_tick,
        };
        until.saturating_duration_since(Instant::now())
    }

    fn on_message(&mut self, message: Message) {
        match message {
            Message::Cluster(Event::Reached(_, reached)) => self.reach(reached),
            Message::Cluster(event) => {
                self.proxy.on_event(&event);
                if self.proxy.planner().synced() {
                    self.plan();
                }
            }
            Message::Attach { attachment, done } => {
                let attached = self.attach(&attachment);
                // Whoever asked may have given up.
                let _ = done.send(attached);
            }
            Message::Refuses { attachment, reply } => {
                let _ = reply.send(self.attachments.refuses(&attachment));
            }
            Message::Verify { attachment, reply } => {
                let _ = reply.send(self.verify(&attachment));
            }
            Message::Forget { addresses, reply } => {
                let forgotten = match &mut self.translator {
                    Some(translator) => translator.forget(&addresses),
                    None => Ok(0),
                };
                let _ = reply.send(forgotten.map_err(|error| error.to_string()));
            }
            Message::Live(keys) => {
                for key in self.attachments.gone(&keys) {
                    tracing::info!(
                        ?key,
                        "released while nobody told: its limits and host ports go"
                    );
                    self.let_go(&key);
                }
            }
            Message::Detach { key, interfaces } => {
                self.let_go(&key);
                for interface in interfaces {
                    self.pods.remove(&interface);
                    self.detach(&interface);
                }
            }
            Message::Why { question, reply } => {
                let _ = reply.send(self.proxy.planner().why(&question));
            }
            Message::Status { reply } => {
                let report = self.report();
                let _ = reply.send(report);
            }
            Message::Stop => {}
        }
    }

    /// A revision was taken in: everything before it came through the same queue.
    fn reach(&mut self, reached: Option<Reached>) {
        self.reached = reached;
        // What it takes back is taken back at once, also while ops fail.
        if reached.is_none() || self.batch.is_none() {
            self.tell_applied();
        }
    }

    /// Called when nothing that was taken in is left to plan and no op has failed. While adopted state is held that no object
    /// explains, it may be what a slice that nobody could read has long given up.
    fn tell_applied(&self) {
        let whole = self.synced_once && !self.proxy.planner().partial();
        self.applied.set(self.reached.filter(|_| whole));
    }

    fn advance(&mut self) {
        if self.batch.is_none() {
            return;
        }
        if let Some(failing) = &self.failing
            && Instant::now() < failing.again
        {
            return;
        }
        match self.proxy.advance(SERVICES_A_TURN) {
            Ok(progress) => {
                if self.failing.take().is_some() {
                    tracing::info!("the dataplane takes ops again");
                }
                if let Some(batch) = &mut self.batch {
                    batch.ops += progress.ops;
                    batch.withdrawals += progress.withdrawals;
                }
                if progress.done {
                    self.finish_batch();
                }
            }
            Err(error) => {
                let wait = self
                    .failing
                    .as_ref()
                    .map_or(RETRY_FIRST, |f| (f.wait * 2).min(RETRY_LAST));
                tracing::error!(%error, ?wait, "an op failed; the maps will be read back and planned anew");
                self.metrics.failures.inc();
                self.failing = Some(Failing {
                    what: error.to_string(),
                    wait,
                    again: Instant::now() + wait,
                });
            }
        }
    }

    fn finish_batch(&mut self) {
        let Some(batch) = self.batch.take() else {
            return;
        };
        let took = batch.since.elapsed();
        self.last_batch = Some(took);
        self.metrics
            .batch(took.as_secs_f64(), batch.ops, batch.withdrawals);
        if !self.proxy.planner().synced() {
            // Host ports alone: the cluster is still to come.
            return;
        }
        let totals = self.proxy.planner().totals();
        self.metrics.totals(&totals);
        self.programmed.store(true, Ordering::Release);
        if !self.synced_once {
            self.synced_once = true;
            tracing::info!(
                ?took,
                ops = batch.ops,
                frontends = totals.frontends,
                backends = totals.backends,
                "services programmed"
            );
        } else if batch.ops > 0 {
            tracing::debug!(
                ?took,
                ops = batch.ops,
                withdrawals = batch.withdrawals,
                "services changed"
            );
        }
        for (service, problem) in self.proxy.planner().problems().take(PROBLEMS_NAMED) {
            tracing::warn!(%service, "not served as written: {problem}");
        }
        self.tell_applied();
        self.publish_facts();
    }

    /// Tells the announcer, if anything changed for it.
    fn publish_facts(&self) {
        let vips = self.proxy.vips();
        let ready = self.synced_once && !self.uplinks.is_empty();
        let datapath = if ready {
            Datapath::Ready
        } else {
            Datapath::Starting
        };
        let nat64 = self.translator.is_some() && !self.uplinks.is_empty();
        self.facts.send_if_modified(|facts| {
            let same =
                facts.vips.as_ref() == vips && (facts.datapath, facts.nat64) == (datapath, nat64);
            if !same {
                facts.vips = vips.cloned();
                (facts.datapath, facts.nat64) = (datapath, nat64);
            }
            !same
        });
    }

    fn tick(&mut self) {
        self.heal_told();
        self.attach_uplinks();
        self.succeed();
        self.refresh_addresses();
        for dropped in self.limiter.dropped() {
            self.metrics.limited(&dropped);
        }
        self.metrics.attached(self.pods.len() + self.uplinks.len());
        match self.backend().reasons() {
            Ok(reasons) => self.metrics.drops(&reasons),
            Err(error) => tracing::warn!(%error, "drop counters cannot be read"),
        }
        if let Some(translator) = &self.translator {
            for (name, value) in translator.counters() {
                self.metrics.nat64(name, value);
            }
        }
    }

    fn expire(&mut self) {
        let idle = self.config.proxy.udp_idle;
        match self.backend().expire_flows(clock::now().0, idle) {
            Ok(expired) => self.metrics.expired(&expired),
            Err(error) => tracing::warn!(%error, "idle flows cannot be expired"),
        }
        match sockets::abort_stale(self.backend()) {
            Ok(0) => {}
            Ok(aborted) => {
                tracing::info!(
                    aborted,
                    "UDP sockets that were connected to endpoints that are gone"
                );
            }
            Err(error) => {
                // A kernel without it says so each time.
                let error = error.to_string();
                let before = self.complaints.insert(SOCKETS.to_owned(), error.clone());
                if before.as_ref() != Some(&error) {
                    tracing::warn!(
                        error,
                        "UDP sockets of this node stay connected to endpoints that are gone"
                    );
                }
            }
        }
        if let Some(translator) = &mut self.translator
            && let Err(error) = translator.expire()
        {
            tracing::warn!(%error, "idle sessions cannot be expired");
        }
    }
}

/// One line of a status.
pub(crate) fn fact(name: &str, value: String, ok: bool) -> Fact {
    Fact {
        name: name.to_owned(),
        value,
        ok,
    }
}
