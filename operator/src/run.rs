//! Joins the cluster, the plan and the memory: once or for good, on a folder or as one of several on an API server.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

use kun_cluster::api::ApiError;
use kun_cluster::api::write::Writer;
use kun_cluster::folder::{FolderError, FolderSource};
use kun_cluster::{
    Delta, Event, Following, Kind, Object, ObjectName, Origin, Source, SourceError, Store, Wanted,
};
use kun_config::{ClusterSource, Config};
use kun_telemetry::{Health, Metrics};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use tokio::signal::unix::{SignalKind, signal};

use crate::claims::Claims;
use crate::elect::{Candidacy, Standing, identity};
use crate::generated::{Generated, GeneratedError};
use crate::lease::CALL_WITHIN;
use crate::memory::{Kept, Memory};
use crate::plan::{Pools, Shortage, plan};
use crate::watermark::{self, Folding};

/// The lease's name, in the operator's own namespace.
const LEASE: &str = "kun-operator";

/// Where a process lies that no pod's environment says it of.
const NAMESPACE: &str = "kube-system";

/// Events of the cluster that wait while the operator writes: then its source waits.
const EVENTS: usize = 1024;

/// Why the operator stops.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The folder cannot be followed.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// The API server cannot.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// No client for it.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// Its own files.
    #[error(transparent)]
    Generated(#[from] GeneratedError),
    /// Threads or signals.
    #[error("the system refuses {what}: {source}")]
    System {
        /// What was asked.
        what: &'static str,
        /// Its word.
        source: std::io::Error,
    },
}

fn system(what: &'static str) -> impl FnOnce(std::io::Error) -> RunError {
    move |source| RunError::System { what, source }
}

/// What the operator counts: `kun_operator_…`.
#[derive(Debug, Default)]
struct Counted {
    blocks: Gauge,
    addresses: Gauge,
    shortages: Gauge,
    troubles: Counter,
    leads: Gauge,
    watermark: watermark::Counted,
}

impl Counted {
    fn register(metrics: &Metrics) -> Self {
        let counted = Self {
            watermark: watermark::Counted::register(metrics),
            ..Self::default()
        };
        metrics.register(|r| {
            r.register(
                "kun_operator_blocks",
                "Blocks assigned to nodes",
                counted.blocks.clone(),
            );
            r.register(
                "kun_operator_service_addresses",
                "Services with a virtual address from here",
                counted.addresses.clone(),
            );
            r.register(
                "kun_operator_shortages",
                "Blocks and addresses that could not be given",
                counted.shortages.clone(),
            );
            r.register(
                "kun_operator_manifest_troubles",
                "Manifests refused, and troubles with the API server",
                counted.troubles.clone(),
            );
            r.register(
                "kun_operator_leads",
                "1 where this operator acts: on a folder always, on an API server with the lease",
                counted.leads.clone(),
            );
        });
        counted
    }
}

/// What is done with a cluster, whatever it was read from: plan, remember, tell.
#[derive(Debug)]
struct Desk {
    config: Config,
    blocks_per_node: u32,
    told: BTreeSet<Shortage>,
    counted: Counted,
}

impl Desk {
    /// One pass over the cluster as it is; what is missing afterwards, and when to look again.
    fn settle(&mut self, store: &mut Store, memory: &mut dyn Memory) -> Result<Settled, RunError> {
        let pools = Pools::of(store, &self.config.ipam);
        let before = memory.before(store, &pools);
        let plan = plan(store, &pools, &before, self.blocks_per_node);
        let kept = memory.keep(store, &plan)?;
        let new: BTreeSet<Shortage> = plan.shortages.difference(&self.told).cloned().collect();
        for shortage in &new {
            tracing::warn!("{shortage}");
        }
        memory.tell(store, &plan, &new);
        let counted = &self.counted;
        counted.blocks.set(plan.assignments.blocks.len() as i64);
        counted
            .addresses
            .set(plan.assignments.addresses.len() as i64);
        counted.shortages.set(plan.shortages.len() as i64);
        self.told.clone_from(&plan.shortages);
        let again = match kept {
            Kept::Whole => memory.look_again(),
            Kept::Again(wait) => Some(memory.look_again().map_or(wait, |look| look.min(wait))),
        };
        Ok(Settled {
            shortages: plan.shortages,
            whole: kept == Kept::Whole,
            again,
        })
    }

    fn take(&self, store: &mut Store, event: &Event) {
        match event {
            Event::Deltas(deltas) => deltas.iter().for_each(|delta| apply(store, delta)),
            Event::Synced | Event::Partial | Event::Whole | Event::Reached(..) => {}
            Event::Trouble(trouble) => {
                self.counted.troubles.inc();
                tracing::warn!("{trouble}");
            }
        }
    }
}

/// A pass.
struct Settled {
    shortages: BTreeSet<Shortage>,
    /// Everything is written.
    whole: bool,
    again: Option<Duration>,
}

/// A watch may still tell what was before our own write: what the store has of later is kept.
fn apply(store: &mut Store, delta: &Delta) {
    if let Delta::Upsert(object) = delta
        && let Some(known) = version_of(store, object)
        && let Some(told) = number(&object.meta().origin)
        && told < known
    {
        return;
    }
    store.apply(delta.clone());
}

/// The version that the store has of the same object. Of the kinds that we write.
fn version_of(store: &Store, object: &Object) -> Option<u64> {
    let meta = match object {
        Object::Service(service) => &store.service(&service.meta.name)?.meta,
        Object::IpamBlock(block) => &store.block(&block.meta.name)?.meta,
        _ => return None,
    };
    // One that was deleted and made again begins anew.
    (meta.uid == object.meta().uid).then(|| number(&meta.origin))?
}

/// resourceVersions are numbers that grow (KEP-5504); of others nothing is concluded.
fn number(origin: &Origin) -> Option<u64> {
    match origin {
        Origin::Api { resource_version } => resource_version.parse().ok(),
        Origin::File { .. } => None,
    }
}

/// The operator, on what `kun.yaml` says.
#[derive(Debug)]
pub struct Operator {
    desk: Desk,
    at: At,
}

#[derive(Debug)]
enum At {
    Folder(Box<OnFolder>),
    Api(Box<OnApi>),
}

#[derive(Debug)]
struct OnFolder {
    source: FolderSource,
    store: Store,
    memory: Generated,
}

#[derive(Debug)]
struct OnApi {
    source: ClusterSource,
    /// For the lease: its calls wait for no other.
    lease: Writer,
    kubeconfig: Option<std::path::PathBuf>,
    name: ObjectName,
    me: String,
}

impl Operator {
    /// On a folder takes its lock, and fails when another operator has it. On an API server finds that there is a way to it.
    pub fn open(config: Config, blocks_per_node: u32, metrics: &Metrics) -> Result<Self, RunError> {
        let at = match &config.cluster {
            ClusterSource::Folder(folder) => At::Folder(Box::new(OnFolder::open(folder)?)),
            source @ ClusterSource::Kubernetes { kubeconfig } => {
                let variable = |name| std::env::var(name).ok().filter(|v| !v.is_empty());
                let namespace = variable("POD_NAMESPACE").unwrap_or_else(|| NAMESPACE.to_owned());
                At::Api(Box::new(OnApi {
                    source: source.clone(),
                    lease: Writer::open(kubeconfig.as_deref())?.within(CALL_WITHIN),
                    kubeconfig: kubeconfig.clone(),
                    name: ObjectName::new(&namespace, LEASE),
                    me: identity(variable("POD_NAME").as_deref()),
                }))
            }
        };
        Ok(Self {
            desk: Desk {
                config,
                blocks_per_node,
                told: BTreeSet::new(),
                counted: Counted::register(metrics),
            },
            at,
        })
    }

    /// Everything once, as the cluster is; what is missing afterwards. On an API server waits for the lease, and gives it back.
    pub fn once(&mut self) -> Result<BTreeSet<Shortage>, RunError> {
        match &mut self.at {
            At::Folder(folder) => folder.once(&mut self.desk),
            At::Api(api) => api.run(&mut self.desk, &Health::new(), true),
        }
    }

    /// Keeps the assignments complete: on a folder for as long as the process lives, on an API server until SIGTERM.
    pub fn run(&mut self, health: &Health) -> Result<(), RunError> {
        match &mut self.at {
            At::Folder(folder) => folder.run(&mut self.desk, health),
            At::Api(api) => api.run(&mut self.desk, health, false).map(drop),
        }
    }
}

impl OnFolder {
    fn open(folder: &Path) -> Result<Self, RunError> {
        Ok(Self {
            source: FolderSource::open(folder)?,
            store: Store::new(),
            memory: Generated::open(folder)?,
        })
    }

    fn once(&mut self, desk: &mut Desk) -> Result<BTreeSet<Shortage>, RunError> {
        while self.take_event(desk) != Event::Synced {}
        Ok(desk.settle(&mut self.store, &mut self.memory)?.shortages)
    }

    fn run(&mut self, desk: &mut Desk, health: &Health) -> Result<(), RunError> {
        self.once(desk)?;
        health.set_ready(true);
        desk.counted.leads.set(1);
        tracing::info!(
            blocks = desk.counted.blocks.get(),
            services = desk.counted.addresses.get(),
            "the operator runs"
        );
        loop {
            if let Event::Deltas(_) = self.take_event(desk) {
                desk.settle(&mut self.store, &mut self.memory)?;
            }
        }
    }

    fn take_event(&mut self, desk: &Desk) -> Event {
        let event = self.source.next_event();
        desk.take(&mut self.store, &event);
        event
    }
}

/// What the thread that acts hears.
#[derive(Debug)]
enum Message {
    Standing(Standing),
    /// Of which reign, and what.
    Cluster(u64, Event),
    Stop,
}

/// From getting the lease to losing it. Knows nothing of reigns before: others may have acted since.
struct Reign {
    store: Store,
    memory: Claims,
    synced: bool,
    _following: Following,
    /// Not of a pass that is made once.
    _folding: Option<Folding>,
}

impl OnApi {
    fn run(
        &mut self,
        desk: &mut Desk,
        health: &Health,
        once: bool,
    ) -> Result<BTreeSet<Shortage>, RunError> {
        let (tell, told) = sync_channel(EVENTS);
        stop_on_signal(tell.clone())?;
        let lease = Writer::open(self.kubeconfig.as_deref())?.within(CALL_WITHIN);
        let lease = std::mem::replace(&mut self.lease, lease);
        let standing = tell.clone();
        let candidacy = Candidacy::stand(lease, self.name.clone(), self.me.clone(), move |s| {
            // Closed: the operator stops.
            let _ = standing.send(Message::Standing(s));
        })
        .map_err(system("a thread"))?;
        tracing::info!(lease = %self.name, me = self.me, "the operator runs");
        let ended = self.reigns(desk, health, once, &candidacy, &tell, &told);
        // The candidate's thread may be about to tell something.
        drop(told);
        drop(candidacy);
        ended
    }

    fn reigns(
        &self,
        desk: &mut Desk,
        health: &Health,
        once: bool,
        candidacy: &Candidacy,
        tell: &SyncSender<Message>,
        told: &Receiver<Message>,
    ) -> Result<BTreeSet<Shortage>, RunError> {
        let mut number = 0;
        let mut reign: Option<Reign> = None;
        let mut again: Option<Duration> = None;
        loop {
            let mut changed = false;
            let mut next = match again {
                None => told.recv().ok(),
                Some(wait) => match told.recv_timeout(wait) {
                    Ok(message) => Some(message),
                    Err(RecvTimeoutError::Timeout) => {
                        changed = true;
                        None
                    }
                    Err(RecvTimeoutError::Disconnected) => None,
                },
            };
            // What came meanwhile is planned once.
            while let Some(message) = next {
                match message {
                    Message::Stop => return Ok(desk.told.clone()),
                    Message::Standing(Standing::Leads) => {
                        number += 1;
                        desk.told.clear();
                        health.set_ready(false);
                        reign = Some(self.begin(desk, number, candidacy, tell.clone(), once)?);
                    }
                    Message::Standing(Standing::Waits) => {
                        if reign.take().is_some() {
                            tracing::warn!("the lease is another's, or may be: nothing is written");
                        }
                        // Who waits is as ready as who acts.
                        health.set_ready(true);
                        desk.counted.leads.set(0);
                    }
                    Message::Cluster(of, event) if of == number => {
                        if let Some(reign) = &mut reign {
                            desk.take(&mut reign.store, &event);
                            reign.synced |= event == Event::Synced;
                            changed |= matches!(event, Event::Deltas(_) | Event::Synced);
                        }
                    }
                    Message::Cluster(..) => {}
                }
                next = told.try_recv().ok();
            }
            let Some(reign) = reign.as_mut().filter(|reign| reign.synced) else {
                again = None;
                continue;
            };
            if !changed {
                continue;
            }
            let settled = desk.settle(&mut reign.store, &mut reign.memory)?;
            again = settled.again;
            if once && settled.whole {
                return Ok(settled.shortages);
            }
            if desk.counted.leads.get() == 0 {
                desk.counted.leads.set(1);
                health.set_ready(true);
                tracing::info!(
                    blocks = desk.counted.blocks.get(),
                    services = desk.counted.addresses.get(),
                    "the operator acts"
                );
            }
        }
    }

    /// A fresh list of the newest data: what a leader before wrote is in it.
    fn begin(
        &self,
        desk: &Desk,
        number: u64,
        candidacy: &Candidacy,
        tell: SyncSender<Message>,
        once: bool,
    ) -> Result<Reign, RunError> {
        let wanted = Wanted::new().all([Kind::Service, Kind::Node, Kind::IpPool, Kind::IpamBlock]);
        let following = Source::open(&self.source)?.follow(wanted, move |event| {
            tell.send(Message::Cluster(number, event)).is_ok()
        })?;
        let writer = Writer::open(self.kubeconfig.as_deref())?.within(CALL_WITHIN);
        let memory = Claims::new(
            writer,
            candidacy.seat().clone(),
            desk.config.ipam.cooldown,
            self.me.clone(),
        );
        let fold = || {
            Folding::start(
                &self.source,
                Writer::open(self.kubeconfig.as_deref())?,
                candidacy.seat().clone(),
                &self.me,
                desk.config.ipam.cooldown,
                desk.counted.watermark.clone(),
            )
        };
        let folding = (!once).then(fold).transpose()?;
        Ok(Reign {
            store: Store::new(),
            memory,
            synced: false,
            _following: following,
            _folding: folding,
        })
    }
}

/// SIGTERM and SIGINT end the operator in its own way: it gives the lease back. A second one ends it at once.
fn stop_on_signal(tell: SyncSender<Message>) -> Result<(), RunError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .map_err(system("a runtime for signals"))?;
    let (mut terminate, mut interrupt) = {
        let _inside = runtime.enter();
        let listen = |kind| signal(kind).map_err(system("signals"));
        (
            listen(SignalKind::terminate())?,
            listen(SignalKind::interrupt())?,
        )
    };
    std::thread::Builder::new()
        .name("kun-signals".to_owned())
        .spawn(move || {
            let mut next = || {
                runtime.block_on(async {
                    tokio::select! {
                        _ = terminate.recv() => {}
                        _ = interrupt.recv() => {}
                    }
                });
            };
            next();
            if tell.send(Message::Stop).is_ok() {
                next();
            }
            std::process::exit(1);
        })
        .map(drop)
        .map_err(system("a thread"))
}
