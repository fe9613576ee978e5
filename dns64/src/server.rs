//! The whole server: start, follow the cluster, reload, stop.

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::SocketAddr;
use std::num::NonZero;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use kun_cluster::{Event, Following, Kind, SourceError, Wanted};
use kun_config::ClusterSource;
use kun_dns_core::wire::rtype;
use kun_dns_core::{Ask, ClusterView, Listen};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, mpsc};
use tokio::task::AbortHandle;

use crate::listen::{self, ListenError, Sockets};
use crate::load::{LoadError, Loaded, Source};
use crate::metrics::Metrics;
use crate::slow::{QUEUE, Shared};
use crate::{fast, http, slow, sys, tcp};

/// Changes of the cluster not yet taken in: the folder's thread waits beyond that.
const EVENTS: usize = 1024;

/// Why the server ended, or never began.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The configuration.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A socket.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// Where names of the cluster come from.
    #[error(transparent)]
    Cluster(#[from] SourceError),
    /// A thread, a signal handler.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// `loop` found one.
    #[error(
        "loop: queries come back to this server: a forward leads here, directly or around; see the plugin's page in CoreDNS's manual"
    )]
    Loop,
}

fn system(what: &'static str) -> impl Fn(io::Error) -> ServeError {
    move |source| ServeError::System { what, source }
}

/// What to serve.
#[derive(Debug, Clone)]
pub struct Options {
    /// The Corefile.
    pub corefile: PathBuf,
    /// Where metrics are served when the Corefile has no `prometheus`.
    pub metrics: Option<SocketAddr>,
    /// Where names of the cluster come from.
    pub cluster: ClusterSource,
}

struct Live {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
    tcp: AbortHandle,
}

#[derive(Default)]
struct Listeners {
    dns: HashMap<Listen, Live>,
    http: HashMap<SocketAddr, AbortHandle>,
}

/// New sockets that a configuration needs, bound but silent.
struct Bound {
    dns: Vec<(Listen, Sockets)>,
    http: Vec<(SocketAddr, std::net::TcpListener)>,
}

impl Listeners {
    fn bind(&self, loaded: &Loaded) -> Result<Bound, ListenError> {
        let threads = std::thread::available_parallelism().map_or(1, NonZero::get);
        let new = loaded
            .world
            .listens()
            .iter()
            .filter(|l| !self.dns.contains_key(l));
        let dns = new
            .map(|l| Ok((*l, listen::bind(*l, threads)?)))
            .collect::<Result<_, ListenError>>()?;
        let wanted: HashSet<SocketAddr> = loaded.endpoints().into_iter().map(|(a, _)| a).collect();
        let new = wanted.into_iter().filter(|a| !self.http.contains_key(a));
        let http = new
            .map(|a| Ok((a, listen::http(a)?)))
            .collect::<Result<_, ListenError>>()?;
        Ok(Bound { dns, http })
    }

    /// Lets the bound sockets speak, and those that nobody wants any more go.
    fn settle(&mut self, shared: &Arc<Shared>, bound: Bound) -> Result<(), ServeError> {
        for (key, sockets) in bound.dns {
            let stop = Arc::new(AtomicBool::new(false));
            let listener = tokio::net::TcpListener::from_std(sockets.tcp)
                .map_err(system("watching a socket"))?;
            let tcp = tokio::spawn(tcp::serve(shared.clone(), listener, key)).abort_handle();
            let mut threads = Vec::new();
            for socket in sockets.udp {
                let (shared, stop, socket) = (shared.clone(), stop.clone(), Arc::new(socket));
                let thread = std::thread::Builder::new().name(format!("dns-{}", key.port));
                let thread = thread
                    .spawn(move || fast::serve(&shared, &socket, key, &stop))
                    .map_err(system("starting a thread"))?;
                threads.push(thread);
            }
            self.dns.insert(key, Live { stop, threads, tcp });
        }
        for (address, listener) in bound.http {
            let listener =
                tokio::net::TcpListener::from_std(listener).map_err(system("watching a socket"))?;
            self.http.insert(
                address,
                tokio::spawn(http::serve(shared.clone(), listener, address)).abort_handle(),
            );
        }
        let loaded = shared.loaded.load();
        self.dns.retain(|key, live| {
            let keep = loaded.world.listens().contains(key);
            if !keep {
                live.stop.store(true, Ordering::Relaxed);
                live.tcp.abort();
            }
            keep
        });
        self.http.retain(|address, task| {
            let keep = loaded.endpoints().iter().any(|(a, _)| a == address);
            if !keep {
                task.abort();
            }
            keep
        });
        Ok(())
    }

    fn stop(self) {
        for live in self.dns.values() {
            live.stop.store(true, Ordering::Relaxed);
            live.tcp.abort();
        }
        for thread in self.dns.into_values().flat_map(|l| l.threads) {
            // A panicked thread has said so.
            let _ = thread.join();
        }
    }
}

/// What is followed of the cluster.
struct Followed {
    /// Which following an event is of: one that was given up may still have one on its way.
    number: u64,
    pods: bool,
    _following: Following,
}

/// Whether a configuration needs to see the Pods. A folder is read whole in any case, and its Pods tell which namespaces there are; an
/// API server has a Namespace for each, all Pods are by far the most objects it has, and nobody grants lightly to read them.
fn needs_pods(options: &Options, loaded: &Loaded) -> bool {
    matches!(options.cluster, ClusterSource::Folder(_)) || loaded.world.wants_pods()
}

fn follow(
    options: &Options,
    loaded: &Loaded,
    number: u64,
    events: &mpsc::Sender<(u64, Event)>,
) -> Result<Option<Followed>, ServeError> {
    if !loaded.world.wants_cluster() {
        return Ok(None);
    }
    let pods = needs_pods(options, loaded);
    let kinds = [Kind::Service, Kind::EndpointSlice, Kind::Namespace];
    let wanted = Wanted::new().all(kinds.into_iter().chain(pods.then_some(Kind::Pod)));
    let events = events.clone();
    let source = kun_cluster::Source::open(&options.cluster)?;
    let following = source.follow(wanted, move |event| {
        events.blocking_send((number, event)).is_ok()
    })?;
    Ok(Some(Followed {
        number,
        pods,
        _following: following,
    }))
}

/// Serves until SIGTERM or SIGINT. Call on a current-thread runtime.
pub async fn run(options: Options) -> Result<(), ServeError> {
    let view = ClusterView::default();
    let source = Arc::new(Source::read(&options.corefile, options.metrics)?);
    source
        .corefile
        .warnings
        .iter()
        .for_each(|w| tracing::warn!("{w}"));
    let loaded = Loaded::new(source, None, &view)?;
    let (events, event_queue) = mpsc::channel(EVENTS);
    let following = follow(&options, &loaded, 0, &events)?;
    let mut live = Listeners::default();
    let bound = live.bind(&loaded)?;
    let (jobs, queue) = mpsc::channel(QUEUE);
    let shared = Arc::new(Shared {
        loaded: ArcSwap::from_pointee(loaded),
        metrics: Metrics::default(),
        epoch: Instant::now(),
        jobs,
        looped: AtomicBool::new(false),
        looped_notify: Notify::new(),
    });
    tokio::spawn(slow::run(shared.clone(), queue));
    live.settle(&shared, bound)?;
    for listen in shared.loaded.load().world.listens() {
        tracing::info!(
            port = listen.port,
            address = listen.address.map(|a| a.to_string()),
            "listening"
        );
    }
    let mut server = Server {
        options,
        shared,
        live,
        view,
        next_view: None,
        events,
        following,
    };
    server.probe_loops();
    let ended = server.events(event_queue).await;
    let lameduck = server.shared.loaded.load().lameduck();
    if ended.is_ok() && !lameduck.is_zero() {
        tracing::info!(?lameduck, "stopping: still answering");
        tokio::time::sleep(lameduck).await;
    }
    server.live.stop();
    ended
}

struct Server {
    options: Options,
    shared: Arc<Shared>,
    live: Listeners,
    view: ClusterView,
    /// Of a following that began anew: it takes the place of `view` once it is complete.
    next_view: Option<ClusterView>,
    events: mpsc::Sender<(u64, Event)>,
    following: Option<Followed>,
}

impl Server {
    async fn events(
        &mut self,
        mut event_queue: mpsc::Receiver<(u64, Event)>,
    ) -> Result<(), ServeError> {
        let listen = |kind| signal(kind).map_err(system("listening for signals"));
        let (mut term, mut int) = (
            listen(SignalKind::terminate())?,
            listen(SignalKind::interrupt())?,
        );
        let (mut hup, mut usr1) = (
            listen(SignalKind::hangup())?,
            listen(SignalKind::user_defined1())?,
        );
        let mut next_look = self.next_look();
        let mut next_hosts = self.next_hosts();
        loop {
            let look = tokio::time::sleep_until(next_look.unwrap_or_else(far).into());
            let hosts = tokio::time::sleep_until(next_hosts.unwrap_or_else(far).into());
            tokio::select! {
                _ = term.recv() => return Ok(()),
                _ = int.recv() => return Ok(()),
                () = self.shared.looped_notify.notified() => return Err(ServeError::Loop),
                _ = hup.recv() => self.reload(true),
                _ = usr1.recv() => self.reload(true),
                () = look => self.reload(false),
                () = hosts => {
                    if self.shared.loaded.load().hosts_changed() {
                        self.rebuild();
                    }
                    next_hosts = self.next_hosts();
                    continue;
                }
                Some(event) = event_queue.recv() => {
                    let mut changed = self.take(&event);
                    // What came meanwhile is built once.
                    while let Ok(event) = event_queue.try_recv() {
                        changed |= self.take(&event);
                    }
                    if changed {
                        let next = self.shared.loaded.load().with_cluster(&self.view);
                        tracing::debug!(names = next.world.names(), "names of the cluster");
                        self.shared.loaded.store(Arc::new(next));
                    }
                    continue;
                }
            }
            next_look = self.next_look();
        }
    }

    fn take(&mut self, (of, event): &(u64, Event)) -> bool {
        if self.following.as_ref().is_none_or(|f| f.number != *of) {
            return false;
        }
        if let Event::Trouble(trouble) = event {
            tracing::warn!("{trouble}");
        }
        let Some(next) = &mut self.next_view else {
            return self.view.apply(event);
        };
        let changed = next.apply(event);
        if next.synced()
            && let Some(next) = self.next_view.take()
        {
            self.view = next;
        }
        changed
    }

    /// When to look at the Corefile: the interval and up to as much as the jitter, so that a hundred servers do not all look at once.
    fn next_look(&self) -> Option<Instant> {
        let reload = self.shared.loaded.load().reload()?;
        let share = f64::from(u16::from_ne_bytes(sys::random())) / f64::from(u16::MAX);
        Some(Instant::now() + reload.interval + reload.jitter.mul_f64(share))
    }

    fn next_hosts(&self) -> Option<Instant> {
        self.shared
            .loaded
            .load()
            .hosts_interval()
            .map(|i| Instant::now() + i)
    }

    /// Reads the Corefile again; what is broken changes nothing.
    fn reload(&mut self, told: bool) {
        let old = self.shared.loaded.load_full();
        let source = match Source::read(&self.options.corefile, self.options.metrics) {
            Ok(source) if !told && source.same_text(&old.source) => return,
            Ok(source) => Arc::new(source),
            Err(e) => return self.kept(&e),
        };
        match self.replace(source) {
            Ok(()) => {
                self.shared.metrics.reloaded(true);
                tracing::info!(corefile = %self.options.corefile.display(), "reloaded");
                self.probe_loops();
            }
            Err(e) => self.kept(&e),
        }
    }

    fn kept(&self, error: &dyn std::fmt::Display) {
        self.shared.metrics.reloaded(false);
        tracing::error!("reload refused, the old configuration stays: {error}");
    }

    fn replace(&mut self, source: Arc<Source>) -> Result<(), ServeError> {
        let old = self.shared.loaded.load_full();
        let loaded = Loaded::new(source, Some(&old), &self.view)?;
        let missing = match &self.following {
            None => true,
            Some(followed) => !followed.pods && needs_pods(&self.options, &loaded),
        };
        if missing {
            let number = self.following.as_ref().map_or(0, |f| f.number + 1);
            let next = follow(&self.options, &loaded, number, &self.events)?;
            if self.following.is_some() && next.is_some() {
                self.next_view = Some(self.view.successor());
            }
            self.following = next;
        }
        let bound = self.live.bind(&loaded)?;
        self.shared.loaded.store(Arc::new(loaded));
        self.live.settle(&self.shared, bound)
    }

    /// The same Corefile with hosts files read anew.
    fn rebuild(&mut self) {
        let source = self.shared.loaded.load().source.clone();
        if let Err(e) = self.replace(source) {
            self.kept(&e);
        }
    }

    /// Sends each `loop` its probe.
    fn probe_loops(&self) {
        let loaded = self.shared.loaded.load();
        for chain in loaded.world.chains() {
            let (Some(probe), Some(zone)) = (chain.probe(), chain.block.zones.first()) else {
                continue;
            };
            let address = chain
                .block
                .bind
                .first()
                .copied()
                .unwrap_or(std::net::Ipv4Addr::LOCALHOST.into());
            let ask = Ask {
                forward: 0,
                name: probe.name.clone(),
                qtype: rtype::HINFO,
                dnssec_ok: false,
                checking_disabled: false,
            };
            let to = SocketAddr::new(address, zone.port);
            tokio::spawn(async move {
                let any = SocketAddr::new(
                    if to.is_ipv4() {
                        std::net::Ipv4Addr::UNSPECIFIED.into()
                    } else {
                        std::net::Ipv6Addr::UNSPECIFIED.into()
                    },
                    0,
                );
                // A probe that is lost proves nothing, and nothing is claimed.
                if let Ok(socket) = tokio::net::UdpSocket::bind(any).await {
                    let _ = socket
                        .send_to(&ask.encode(u16::from_ne_bytes(sys::random())), to)
                        .await;
                }
            });
        }
    }
}

/// A moment that does not come.
fn far() -> Instant {
    Instant::now() + Duration::from_secs(86_400 * 365)
}
