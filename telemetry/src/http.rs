//! A small HTTP/1.1 server (RFC 9112) for `GET` and `HEAD` of `/metrics`, `/healthz` and `/readyz`: one thread a connection, few
//! connections, every request answered and closed. Refuses everything else: it is no web server, and faces only scrapers.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

/// A Prometheus pair, two probes and a person with curl fit twice; the next connection is closed at once.
const MAX_CONNECTIONS: usize = 16;

/// Request line and headers of any scraper are below 1 KiB.
const MAX_REQUEST: usize = 8 << 10;

/// Longest a request may take to arrive, and its answer to be taken.
const REQUEST_WITHIN: Duration = Duration::from_secs(5);

/// The metrics of a process, shared between the parts that register and the endpoint that encodes.
#[derive(Debug, Clone, Default)]
pub struct Metrics(Arc<Mutex<Registry>>);

impl Metrics {
    /// A registry with `kun_build_info{program, version}`.
    pub fn new(program: &'static str, version: &'static str) -> Self {
        let metrics = Self::default();
        metrics.register(|registry| {
            let build = Info::new(vec![("program", program), ("version", version)]);
            registry.register("kun_build", "The program that answers", build);
        });
        metrics
    }

    /// Registers metrics; call once a part, at start.
    pub fn register<T>(&self, register: impl FnOnce(&mut Registry) -> T) -> T {
        register(&mut self.lock())
    }

    /// OpenMetrics text, which Prometheus reads.
    pub fn encode(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        encode(&mut text, &self.lock())?;
        Ok(text)
    }

    fn lock(&self) -> MutexGuard<'_, Registry> {
        // A panic while registering leaves a registry that is short of a metric, not a broken one.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What `/readyz` says; `/healthz` is good as long as the process answers.
#[derive(Debug, Clone, Default)]
pub struct Health(Arc<AtomicBool>);

impl Health {
    /// Not ready yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// From now on ready, or not.
    pub fn set_ready(&self, ready: bool) {
        self.0.store(ready, Ordering::Relaxed);
    }

    /// As last set.
    pub fn is_ready(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Why the endpoint does not stand.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Somebody else listens there.
    #[error(
        "{address}: the metrics address is taken: `ss -ltnp 'sport = :{port}'` names who holds it (another instance of this program?); give another in kun.yaml, or `off`",
        port = address.port()
    )]
    Occupied {
        /// As configured.
        address: SocketAddr,
    },
    /// The address cannot be listened on.
    #[error(
        "{address}: cannot listen for metrics there ({source}); give an address of this host in kun.yaml, or `off`"
    )]
    Listen {
        /// As configured.
        address: SocketAddr,
        /// The system's word.
        source: io::Error,
    },
    /// No thread.
    #[error("no thread for the metrics endpoint ({0})")]
    Thread(#[source] io::Error),
}

/// A running endpoint; it stops when this is dropped.
#[derive(Debug)]
pub struct Endpoint {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Endpoint {
    /// The address, with the port that the system chose if 0 was asked for.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // Wakes accept(); a failure means that nothing listens any more, which is the aim.
        let mut wake = self.address;
        if wake.ip().is_unspecified() {
            wake.set_ip(match wake {
                SocketAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
                SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
            });
        }
        if TcpStream::connect_timeout(&wake, Duration::from_secs(1)).is_ok()
            && let Some(thread) = self.thread.take()
        {
            // A panicked endpoint thread has been reported by its own panic message.
            let _ = thread.join();
        }
    }
}

/// Answers on `address` from a thread of its own.
pub fn serve(
    address: SocketAddr,
    metrics: Metrics,
    health: Health,
) -> Result<Endpoint, ServeError> {
    let listener = TcpListener::bind(address).map_err(|source| match source.kind() {
        io::ErrorKind::AddrInUse => ServeError::Occupied { address },
        _ => ServeError::Listen { address, source },
    })?;
    let address = listener
        .local_addr()
        .map_err(|source| ServeError::Listen { address, source })?;
    let stop = Arc::new(AtomicBool::new(false));
    let stopping = Arc::clone(&stop);
    let thread = std::thread::Builder::new()
        .name("kun-metrics".to_owned())
        .spawn(move || accept_loop(&listener, &metrics, &health, &stopping))
        .map_err(ServeError::Thread)?;
    Ok(Endpoint {
        address,
        stop,
        thread: Some(thread),
    })
}

/// Counts a connection for as long as it lives.
struct Seat(Arc<AtomicUsize>);

impl Seat {
    fn take(seats: &Arc<AtomicUsize>) -> Option<Self> {
        let seat = Self(Arc::clone(seats));
        (seats.fetch_add(1, Ordering::Relaxed) < MAX_CONNECTIONS).then_some(seat)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn accept_loop(listener: &TcpListener, metrics: &Metrics, health: &Health, stop: &AtomicBool) {
    let seats = Arc::new(AtomicUsize::new(0));
    for stream in listener.incoming() {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let stream = match stream {
            Ok(stream) => stream,
            Err(error) => {
                // Out of descriptors: pause, or this loop would take the CPU as well.
                tracing::warn!(%error, "metrics: accept failed");
                std::thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        let Some(seat) = Seat::take(&seats) else {
            continue;
        };
        let (metrics, health) = (metrics.clone(), health.clone());
        let spawned = std::thread::Builder::new()
            .name("kun-scrape".to_owned())
            .spawn(move || {
                let _seat = seat;
                // A scraper that goes away mid-answer is its own affair.
                if let Err(error) = answer(stream, &metrics, &health) {
                    tracing::debug!(%error, "metrics: connection ended early");
                }
            });
        if let Err(error) = spawned {
            tracing::warn!(%error, "metrics: no thread for a connection");
        }
    }
}

fn answer(mut stream: TcpStream, metrics: &Metrics, health: &Health) -> io::Result<()> {
    stream.set_write_timeout(Some(REQUEST_WITHIN))?;
    let reply = match read_head(&mut stream)? {
        Some(head) => respond(&head, metrics, health),
        None => Reply::text("431 Request Header Fields Too Large", "request too large\n"),
    };
    let head = format!(
        "HTTP/1.1 {}\r\nContent-Type: {}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        reply.status,
        reply.content_type,
        reply.body.len()
    );
    stream.write_all(head.as_bytes())?;
    if !reply.head_only {
        stream.write_all(reply.body.as_bytes())?;
    }
    stream.flush()
}

/// The request up to its empty line; `None` when it is too long.
fn read_head(stream: &mut TcpStream) -> io::Result<Option<Vec<u8>>> {
    let deadline = Instant::now() + REQUEST_WITHIN;
    let mut head = Vec::new();
    let mut chunk = [0; 1024];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        let n = stream.read(&mut chunk)?;
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        head.extend_from_slice(&chunk[..n]);
        if head.windows(4).any(|w| w == b"\r\n\r\n") {
            return Ok(Some(head));
        }
        if head.len() > MAX_REQUEST {
            return Ok(None);
        }
    }
}

struct Reply {
    status: &'static str,
    content_type: &'static str,
    body: String,
    head_only: bool,
}

impl Reply {
    fn text(status: &'static str, body: &str) -> Self {
        Self {
            status,
            content_type: "text/plain; charset=utf-8",
            body: body.to_owned(),
            head_only: false,
        }
    }
}

fn respond(head: &[u8], metrics: &Metrics, health: &Health) -> Reply {
    let line = head.split(|b| *b == b'\r').next().unwrap_or_default();
    let mut words = line.split(|b| *b == b' ');
    let (method, target) = (
        words.next().unwrap_or_default(),
        words.next().unwrap_or_default(),
    );
    if !matches!(method, b"GET" | b"HEAD") {
        return Reply::text("405 Method Not Allowed", "GET only\n");
    }
    let path = target.split(|b| *b == b'?').next().unwrap_or_default();
    let reply = match path {
        b"/metrics" => match metrics.encode() {
            Ok(body) => Reply {
                status: "200 OK",
                content_type: "application/openmetrics-text; version=1.0.0; charset=utf-8",
                body,
                head_only: false,
            },
            Err(fmt::Error) => {
                Reply::text("500 Internal Server Error", "a metric cannot be encoded\n")
            }
        },
        b"/healthz" => Reply::text("200 OK", "ok\n"),
        b"/readyz" if health.is_ready() => Reply::text("200 OK", "ok\n"),
        b"/readyz" => Reply::text("503 Service Unavailable", "not ready\n"),
        _ => Reply::text("404 Not Found", "/metrics, /healthz, /readyz\n"),
    };
    Reply {
        head_only: method == b"HEAD",
        ..reply
    }
}
