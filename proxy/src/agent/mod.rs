//! The node agent: the shells of a node joined into one process.
//!
//! ```text
//! cluster source ─┬→ store (status, why)         socket ─┬→ IpamService (allocate, release, lookup)
//!                 ├→ Blocks thread → IpamService, routes, ├→ dataplane thread (attach, detach, why)
//!                 │                  status of IPAMBlocks │
//!                 └→ dataplane thread → eBPF maps         └→ status from everybody
//!                                    └→ Facts → announcer task → BGP speaker
//! ```
//!
//! Everything in the kernel is pinned: the agent may die at any moment, and the next one adopts. It stops on SIGTERM and SIGINT,
//! leaving the datapath as it is; only `--cleanup` takes it away.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kun_bgp::StartError;
use kun_cluster::{Source, SourceError};
use kun_cni::clock::{self, ClockError};
use kun_cni::ipam::{IpamError, IpamService};
use kun_config::types::SlotClass;
use kun_config::{ClusterSource, Config};
use kun_control::{Fact, Server, SocketError};
use kun_ebpf_loader::{Adopted, Error as EbpfError, FlowRecords, Nat64Error};
use kun_proxy::{EbpfBackend, Proxy};
use kun_proxy_core::Here;
use kun_telemetry::{Health, LoadError, LogsError, ServeError};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

mod addresses;
mod announce;
mod answers;
mod api_writes;
mod attachments;
mod blocks;
mod cluster;
mod condition;
mod dataplane;
mod flows;
mod home;
mod limits;
mod links;
mod lists;
mod metrics;
mod node;
mod records;
mod routes;
mod sockets;
mod translator;
mod watermark;

use announce::{Announcer, Facts};
use answers::Answers;
use api_writes::{Failures, TellError, Teller};
use attachments::Attachment;
use cluster::View;
use condition::Left;
use dataplane::{Dataplane, Message, fact};
use limits::Limiter;
use lists::Placed;
use metrics::Metrics;
use records::Records;
use translator::Translator;
use watermark::Watermarks;

/// How often slots are let go, blocks are tried again, and pods without programs are looked for.
const HOUSEKEEPING: Duration = Duration::from_secs(5);

/// Threads of the runtime: it carries the BGP sessions only.
const RUNTIME_THREADS: usize = 2;

/// How long the dataplane thread may take to end: it is between two ops at most.
const STOP_WITHIN: Duration = Duration::from_secs(5);

/// Why the agent does not run. One line each.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AgentError {
    /// kun.yaml.
    #[error(transparent)]
    Config(#[from] LoadError),
    /// Logs.
    #[error(transparent)]
    Logs(#[from] LogsError),
    /// Not root.
    #[error("it must run as root: it loads eBPF programs and sets routes")]
    NotRoot,
    /// The state directory.
    #[error("agent.stateDir {}: {source}; it must be a directory that can be written", path.display())]
    State {
        /// Which.
        path: PathBuf,
        /// The system's word.
        source: io::Error,
    },
    /// The socket.
    #[error("agent.socket {0}")]
    Socket(#[from] SocketError),
    /// The metrics endpoint.
    #[error("agent.metrics {0}")]
    Metrics(#[from] ServeError),
    /// The boot.
    #[error(transparent)]
    Clock(#[from] ClockError),
    /// The address store.
    #[error(transparent)]
    Ipam(#[from] IpamError),
    /// Forwarding.
    #[error(transparent)]
    Sysctl(#[from] node::SysctlError),
    /// The eBPF dataplane.
    #[error(transparent)]
    Ebpf(#[from] EbpfError),
    /// The translator.
    #[error(transparent)]
    Nat64(#[from] Nat64Error),
    /// The speaker.
    #[error(transparent)]
    Bgp(#[from] StartError),
    /// The speaker needs a number.
    #[error(
        "bgp.routerId: the node has no address towards a default route to take it from; give one"
    )]
    NoRouterId,
    /// The cluster source.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// What is written to it.
    #[error(transparent)]
    Tell(#[from] TellError),
    /// The way to say how far the node is with its blocks.
    #[error(transparent)]
    Api(#[from] kun_cluster::api::ApiError),
    /// Threads or signals.
    #[error("the system refuses {what}: {source}")]
    System {
        /// What was asked.
        what: &'static str,
        /// Its word.
        source: io::Error,
    },
    /// Routes.
    #[error(transparent)]
    Route(#[from] routes::RouteError),
    /// The container runtime's lists.
    #[error(transparent)]
    Lists(#[from] kun_cni::install::InstallError),
}

fn prepare(path: &Path) -> Result<(Config, String), AgentError> {
    let (config, text) = kun_telemetry::load_with_text(path)?;
    if !rustix::process::geteuid().is_root() {
        return Err(AgentError::NotRoot);
    }
    kun_telemetry::init_logs(&config.agent)?;
    for warning in &config.warnings.0 {
        tracing::warn!("{warning}");
    }
    Ok((config, text))
}

/// A panic in any thread ends the process: a node whose dataplane thread is gone would go on to look ready, and one whose thread
/// panicked amid a commit would never give out an address again. The datapath is pinned, and the next agent adopts it.
fn end_on_panic() {
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        tell(panic);
        std::process::abort();
    }));
}

/// Runs until SIGTERM or SIGINT. `runtime`: where the container runtime reads its lists, and a list for it.
pub(crate) fn run(path: &Path, runtime: Option<(&Path, Option<&Path>)>) -> Result<(), AgentError> {
    let started = Instant::now();
    let (config, text) = prepare(path)?;
    let placed = runtime
        .map(|(conf_dir, list)| Placed::new(conf_dir, list, text))
        .transpose()?;
    end_on_panic();
    let server = Server::bind(&config.agent.socket)?;
    let telemetry = kun_telemetry::Metrics::new("kun-proxy", env!("CARGO_PKG_VERSION"));
    let metrics = telemetry.register(Metrics::new);
    let health = Health::new();
    let endpoint = config
        .agent
        .metrics
        .map(|address| kun_telemetry::serve(address, telemetry.clone(), health.clone()))
        .transpose()?;
    fs::create_dir_all(&config.agent.state_dir).map_err(|source| AgentError::State {
        path: config.agent.state_dir.clone(),
        source,
    })?;
    let ipam = Arc::new(IpamService::open(
        &config.agent.state_dir,
        &config,
        clock::boot()?,
        clock::now(),
    )?);
    // Before anybody is answered.
    ipam.believe_all(clock::now())?;
    let source = Source::open(&config.cluster)?;
    node::forward(&node::uplinks(config.node.uplink.as_deref()))?;

    let (facts, facts_seen) = watch::channel(Facts::default());
    let facts = Arc::new(facts);
    let Opened {
        dataplane,
        adopted,
        kernel,
        flows,
    } = open_dataplane(&config, metrics.clone(), Arc::clone(&facts))?;
    let system = |what| move |source| AgentError::System { what, source };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(RUNTIME_THREADS)
        .thread_name("kun-bgp")
        .enable_all()
        .build()
        .map_err(system("threads"))?;
    let announcer = start_bgp(&config, &runtime, adopted, &telemetry, facts_seen)?.map(Arc::new);

    kun_cni::keeper::start(Arc::clone(&ipam), config.clone())
        .map_err(|e| system("the watch over links")(std::io::Error::other(e)))?;
    let view = Arc::new(View::default());
    let blocks = blocks::start(&config, &ipam, facts, &view)?;
    let (queue, messages) = sync_channel(dataplane::QUEUE);
    let gateway = config.nat64.gateway.is_some().then(|| queue.clone());
    let failures = Failures::default();
    let watermark = match &config.cluster {
        ClusterSource::Folder(_) => None,
        source @ ClusterSource::Kubernetes { .. } => Some(Watermarks::follow(
            source,
            dataplane.applied(),
            failures.clone(),
        )?),
    };
    let answers = Arc::new(Answers {
        config: config.clone(),
        started,
        ipam,
        records: Records::new(&config.agent.state_dir),
        view: Arc::clone(&view),
        blocks: Arc::clone(&blocks),
        dataplane: queue.clone(),
        announcer: announcer.clone(),
        kernel,
        programmed: dataplane.programmed(),
        leaks: addresses::Leaks::new(
            flows::Flows::new(flows, gateway),
            home::Home::new(&config.agent.state_dir),
        ),
        watermark,
        left: Left::default(),
    });
    let dataplane = reattach(dataplane, &answers)?;
    let worker = std::thread::Builder::new()
        .name("kun-dataplane".to_owned())
        .spawn(move || dataplane.run(&messages))
        .map_err(system("a thread"))?;
    let following = cluster::follow(&config, source, Arc::clone(&view), blocks, queue.clone())?;
    tell(&answers, &metrics, failures)?;
    housekeeping(Arc::clone(&answers), metrics, health, placed)?;
    server.serve(move |request| answers.answer(request))?;
    tracing::info!(node = config.node.name, adopted, took = ?started.elapsed(), "the agent runs");

    runtime.block_on(until_stopped())?;
    tracing::info!("stopping; the datapath goes on without me");
    drop(server);
    drop(following);
    if let Some(announcer) = announcer {
        runtime.block_on(announcer.stop());
    }
    stop(&queue, worker);
    drop(endpoint);
    Ok(())
}

/// The dataplane before its thread runs.
struct Opened {
    dataplane: Dataplane,
    /// An earlier agent's maps were taken over.
    adopted: bool,
    /// What the kernel lacks.
    kernel: Vec<Fact>,
    /// The flow records, for a thread of its own.
    flows: FlowRecords,
}

fn open_dataplane(
    config: &Config,
    metrics: Metrics,
    facts: Arc<watch::Sender<Facts>>,
) -> Result<Opened, AgentError> {
    let (backend, found) = EbpfBackend::open(config)?;
    let fresh = found.maps == 0;
    let opened = join_dataplane(config, backend, &found, metrics, facts);
    if opened.is_err() && fresh {
        // Nothing stood before, so nothing stays. What is adopted goes on serving.
        let uplinks = node::uplinks(config.node.uplink.as_deref());
        let removed = EbpfBackend::remove(config, &[])
            .and_then(|()| Limiter::remove_all(config, &[]))
            .map_err(AgentError::from);
        if let Err(error) =
            removed.and_then(|()| Translator::remove(config, &uplinks).map_err(AgentError::from))
        {
            tracing::warn!(%error, "what was pinned just now stays; --cleanup removes it");
        }
    }
    opened
}

fn join_dataplane(
    config: &Config,
    mut backend: EbpfBackend,
    found: &Adopted,
    metrics: Metrics,
    facts: Arc<watch::Sender<Facts>>,
) -> Result<Opened, AgentError> {
    for kept in &found.capacities {
        tracing::warn!(
            map = kept.map,
            "an adopted map keeps its {} entries; proxy wants {}: run --cleanup once to change it",
            kept.has,
            kept.wanted
        );
    }
    let mut kernel = Vec::new();
    for missing in backend.missing() {
        tracing::warn!("{missing}");
        let since = format!("missing (kernel {}): {}", missing.since, missing.cost);
        kernel.push(fact(missing.feature, since, false));
    }
    if kernel.is_empty() {
        kernel.push(fact("features", "all that is used".into(), true));
    }
    backend.attach_cgroup()?;
    let here = Here {
        node: config.node.name.as_str().into(),
        zone: None,
    };
    let limits = backend.limits();
    let flows = backend.flow_records()?;
    let (proxy, observed) = Proxy::adopt(here, limits, backend)?;
    let adopted = found.maps > 0;
    if adopted {
        tracing::info!(
            frontends = observed.services.len(),
            backends = observed.backends.len(),
            "adopted what an earlier agent left"
        );
    }
    let limiter = Limiter::open(config)?;
    let translator = Translator::open(config)?;
    Ok(Opened {
        dataplane: Dataplane::new(
            config.clone(),
            proxy,
            limiter,
            translator,
            metrics,
            facts,
            adopted,
        ),
        adopted,
        kernel,
        flows,
    })
}

/// Puts the programs on the uplinks and on every live pod, also on those that came while no agent ran, with the limits and host
/// ports that their ADD asked for.
fn reattach(mut dataplane: Dataplane, answers: &Answers) -> Result<Dataplane, AgentError> {
    dataplane.attach_uplinks();
    dataplane.refresh_addresses();
    let mut records: BTreeMap<_, _> = (answers.records.all().into_iter())
        .map(|record| (record.key.clone(), record))
        .collect();
    for allocation in answers.ipam.live(clock::now())? {
        let record = records.remove(&allocation.key);
        let traffic = record.filter(|r| r.generation == allocation.generation);
        let traffic = traffic.map(|r| r.traffic).unwrap_or_default();
        // An ADD between its two halves has no interfaces yet, and says so when it has.
        let mut interfaces = answers.names(&allocation);
        interfaces.retain(|name| node::interface_index(name).is_some());
        let attachment = Attachment::new(&allocation, interfaces, traffic);
        if let Err(error) = dataplane.attach(&attachment) {
            tracing::error!(pod = attachment.pod, %error, "a pod is not served as its ADD asked");
        }
    }
    for stale in records.keys() {
        if let Err(error) = answers.records.remove(stale) {
            tracing::warn!(%error, "a record that no allocation has any more stays");
        }
    }
    dataplane.settle();
    Ok(dataplane)
}

fn start_bgp(
    config: &Config,
    runtime: &tokio::runtime::Runtime,
    restarted: bool,
    telemetry: &kun_telemetry::Metrics,
    facts: watch::Receiver<Facts>,
) -> Result<Option<Announcer>, AgentError> {
    if !config.bgp.enabled {
        return Ok(None);
    }
    let router_id = config
        .bgp
        .router_id
        .or_else(node::router_id)
        .ok_or(AgentError::NoRouterId)?;
    let _inside = runtime.enter();
    let announcer = telemetry
        .register(|registry| Announcer::start(config, router_id, restarted, registry, facts))?;
    Ok(Some(announcer))
}

/// What this node tells the API server, where there is one.
fn tell(answers: &Answers, metrics: &Metrics, failures: Failures) -> Result<(), TellError> {
    let ClusterSource::Kubernetes { kubeconfig } = &answers.config.cluster else {
        return Ok(());
    };
    let view = || Arc::clone(&answers.view);
    let condition = condition::Tell::new(&answers.config.node.name, view(), answers.left.clone());
    let mut tellers: Vec<Box<dyn Teller>> = vec![Box::new(condition)];
    if let Some(watermark) = &answers.watermark {
        tellers.push(Box::new(watermark.teller(
            &answers.config,
            view(),
            metrics.clone(),
        )));
    }
    api_writes::start(kubeconfig.as_deref(), tellers, failures)
}

/// A thread that wakes every few seconds for as long as the process lives.
fn housekeeping(
    answers: Arc<Answers>,
    metrics: Metrics,
    health: Health,
    placed: Option<Placed>,
) -> Result<(), AgentError> {
    std::thread::Builder::new()
        .name("kun-housekeeping".to_owned())
        .spawn(move || {
            loop {
                let ready = keep_house(&answers, &metrics);
                // Before it is told that this node is ready: then the runtime has its list.
                if let Some(placed) = &placed
                    && ready
                    && answers.blocks.any()
                {
                    placed.keep();
                }
                health.set_ready(ready);
                let pause = if health.is_ready() {
                    HOUSEKEEPING
                } else {
                    // Soon after start, so that readiness is told without delay.
                    Duration::from_millis(200)
                };
                std::thread::sleep(pause);
            }
        })
        .map_err(|source| AgentError::System {
            what: "a thread",
            source,
        })?;
    Ok(())
}

/// One round; whether this node is ready.
fn keep_house(answers: &Answers, metrics: &Metrics) -> bool {
    let now = clock::now();
    if let Err(error) = answers.ipam.tick(now) {
        tracing::warn!(%error, "cooled slots cannot be let go");
    }
    answers.tell_live();
    answers.blocks.poke();
    if let Some(round) = answers.leaks.round(answers, now) {
        metrics.leaks(&round);
        answers.left.set(round.left);
    }
    if let Some(watermark) = &answers.watermark {
        watermark.count(metrics);
    }
    for (name, class) in [("dual", SlotClass::Dual), ("v6-only", SlotClass::V6Only)] {
        if let Ok(counts) = answers.ipam.counts(class, now) {
            metrics.ipam(name, counts);
        }
        metrics.blocks(name, &answers.blocks.counted(class));
    }
    for (kind, count) in answers.view.store().counts() {
        metrics.objects(&format!("{kind:?}"), count);
    }
    let synced = answers.view.synced();
    metrics.synced(synced);
    synced && answers.programmed()
}

async fn until_stopped() -> Result<(), AgentError> {
    let system = |source| AgentError::System {
        what: "signals",
        source,
    };
    let mut terminate = signal(SignalKind::terminate()).map_err(system)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(system)?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

/// Ends the dataplane thread between two ops.
fn stop(queue: &SyncSender<Message>, worker: JoinHandle<()>) {
    let until = Instant::now() + STOP_WITHIN;
    // A full queue: the thread is at work and will look; it is no reason to wait for ever.
    while queue.try_send(Message::Stop).is_err() && Instant::now() < until {
        if worker.is_finished() {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    while !worker.is_finished() && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(10));
    }
    if worker.is_finished() {
        // A panic has been reported by its own message.
        let _ = worker.join();
    }
}

/// Removes programs, links, maps and routes of this node's agent, and before them the runtime's list, so that no pod comes any more.
/// The state directory stays: it says whose the addresses are.
pub(crate) fn cleanup(path: &Path, conf_dir: Option<&Path>) -> Result<(), AgentError> {
    let (config, _) = prepare(path)?;
    // A running agent would make it all again.
    let server = Server::bind(&config.agent.socket)?;
    conf_dir.map(lists::remove).transpose()?;
    let interfaces = links::named_with_filters()?;
    EbpfBackend::remove(&config, &interfaces)?;
    Limiter::remove_all(&config, &interfaces)?;
    Translator::remove(&config, &node::uplinks(config.node.uplink.as_deref()))?;
    kun_ebpf_loader::remove_other_versions(&config.agent.bpffs_root)?;
    routes::set(&std::collections::BTreeSet::new())?;
    drop(server);
    tracing::info!(
        "programs, maps, links and routes are gone; addresses stay in the state directory"
    );
    Ok(())
}
