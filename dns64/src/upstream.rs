//! Upstream servers of one `forward`: choice, exchange over UDP and TCP, health.
//!
//! Against spoofing (RFC 5452): a fresh socket, hence source port, and a fresh id for each query, connected to the server's
//! address, and the question must come back.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use kun_config::corefile::{Forward, Policy};
use kun_dns_core::message::Message;
use kun_dns_core::wire::{flag, rtype};
use kun_dns_core::{Ask, Transport};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::{Instant, timeout, timeout_at};

use crate::sys;

/// All tries of one query together: CoreDNS's.
const DEADLINE: Duration = Duration::from_secs(5);
/// One try.
const TRY: Duration = Duration::from_secs(2);
/// One health check: CoreDNS's.
const CHECK: Duration = Duration::from_secs(1);

/// A server.
#[derive(Debug)]
struct Server {
    address: SocketAddr,
    /// Failed health checks in a row.
    fails: AtomicU32,
    checking: AtomicBool,
}

/// The servers of one `forward`.
#[derive(Debug)]
pub(crate) struct Upstreams {
    spec: Forward,
    servers: Vec<Arc<Server>>,
    turn: AtomicU32,
    in_flight: AtomicU32,
    /// Exchanges, failed exchanges.
    counts: [AtomicU64; 2],
}

/// Counts a query in flight for as long as it lives.
pub(crate) struct Seat<'a>(&'a AtomicU32);

impl Drop for Seat<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Upstreams {
    /// With at least one server.
    pub(crate) fn new(spec: Forward, servers: Vec<SocketAddr>) -> Self {
        let server = |address| {
            Arc::new(Server {
                address,
                fails: AtomicU32::new(0),
                checking: AtomicBool::new(false),
            })
        };
        Self {
            spec,
            servers: servers.into_iter().map(server).collect(),
            turn: AtomicU32::new(0),
            in_flight: AtomicU32::new(0),
            counts: Default::default(),
        }
    }

    /// Takes a seat for one query; `None`: `max_concurrent` are in flight.
    pub(crate) fn seat(&self) -> Option<Seat<'_>> {
        let seat = Seat(&self.in_flight);
        let before = self.in_flight.fetch_add(1, Ordering::Relaxed);
        (self.spec.max_concurrent.is_none_or(|max| before < max)).then_some(seat)
    }

    /// Exchanges, failed exchanges, unhealthy servers.
    pub(crate) fn counts(&self) -> (u64, u64, usize) {
        let [all, failed] = &self.counts;
        let down = self.servers.iter().filter(|s| self.is_down(s)).count();
        (
            all.load(Ordering::Relaxed),
            failed.load(Ordering::Relaxed),
            down,
        )
    }

    fn is_down(&self, server: &Server) -> bool {
        self.spec.max_fails > 0 && server.fails.load(Ordering::Relaxed) > self.spec.max_fails
    }

    /// The servers in the order in which they are to be tried.
    fn order(&self) -> Vec<Arc<Server>> {
        let n = self.servers.len();
        let mut all = self.servers.clone();
        match self.spec.policy {
            Policy::Sequential => {}
            Policy::RoundRobin => {
                all.rotate_left(self.turn.fetch_add(1, Ordering::Relaxed) as usize % n)
            }
            Policy::Random => {
                for i in (1..n).rev() {
                    all.swap(i, usize::from(u16::from_ne_bytes(sys::random())) % (i + 1));
                }
            }
        }
        let (up, down): (Vec<_>, Vec<_>) = all.into_iter().partition(|s| !self.is_down(s));
        if up.is_empty() && !self.spec.failfast {
            // Health checks may be what is broken: one is tried all the same.
            return down.into_iter().take(1).collect();
        }
        up
    }

    /// Asks until one answers.
    pub(crate) async fn exchange(
        &self,
        ask: &Ask,
        transport: Transport,
    ) -> Result<Message, String> {
        let deadline = Instant::now() + DEADLINE;
        let tcp = self.spec.force_tcp || (transport == Transport::Tcp && !self.spec.prefer_udp);
        let mut last = Err("no healthy upstream".to_owned());
        for server in self.order() {
            if Instant::now() >= deadline {
                break;
            }
            self.counts[0].fetch_add(1, Ordering::Relaxed);
            let until = deadline.min(Instant::now() + TRY);
            match once(server.address, ask, tcp, until).await {
                Ok(m) if self.spec.failover.contains(&m.rcode()) => last = Ok(m),
                Ok(m) => return Ok(m),
                Err(e) => {
                    self.counts[1].fetch_add(1, Ordering::Relaxed);
                    let kind = if e.kind() == io::ErrorKind::TimedOut {
                        "i/o timeout".to_owned()
                    } else {
                        e.to_string()
                    };
                    if last.is_err() {
                        last = Err(format!("{}: {kind}", server.address));
                    }
                    self.check(&server);
                }
            }
        }
        last
    }

    /// Begins health checks of a server that failed, unless some are under way or nobody heeds them.
    fn check(&self, server: &Arc<Server>) {
        if self.spec.max_fails == 0 || server.checking.swap(true, Ordering::Relaxed) {
            return;
        }
        let weak: Weak<Server> = Arc::downgrade(server);
        let probe = Ask {
            forward: 0,
            name: self.spec.health_domain.wire().to_vec(),
            qtype: rtype::NS,
            dnssec_ok: false,
            checking_disabled: false,
        };
        let (interval, tcp) = (self.spec.health_interval, self.spec.force_tcp);
        tokio::spawn(async move {
            // Ends with an answer, or with the configuration that wanted it.
            while let Some(server) = weak.upgrade() {
                if once(server.address, &probe, tcp, Instant::now() + CHECK)
                    .await
                    .is_ok()
                {
                    server.fails.store(0, Ordering::Relaxed);
                    server.checking.store(false, Ordering::Relaxed);
                    return;
                }
                server.fails.fetch_add(1, Ordering::Relaxed);
                drop(server);
                tokio::time::sleep(interval).await;
            }
        });
    }
}

async fn once(server: SocketAddr, ask: &Ask, tcp: bool, until: Instant) -> io::Result<Message> {
    if tcp {
        return timeout_at(until, over_tcp(server, ask)).await?;
    }
    let m = timeout_at(until, over_udp(server, ask)).await??;
    if m.flags & flag::TC == 0 {
        return Ok(m);
    }
    timeout(TRY, over_tcp(server, ask)).await?
}

async fn over_udp(server: SocketAddr, ask: &Ask) -> io::Result<Message> {
    let any: SocketAddr = match server {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any).await?;
    socket.connect(server).await?;
    let id = u16::from_ne_bytes(sys::random());
    socket.send(&ask.encode(id)).await?;
    let mut buffer = [0; 4096];
    loop {
        let n = socket.recv(&mut buffer).await?;
        // What does not match is somebody's guess: the true answer may still come.
        if let Some(m) = check(&buffer[..n], id, ask) {
            return Ok(m);
        }
    }
}

async fn over_tcp(server: SocketAddr, ask: &Ask) -> io::Result<Message> {
    let mut stream = TcpStream::connect(server).await?;
    let id = u16::from_ne_bytes(sys::random());
    let query = ask.encode(id);
    let mut framed = (query.len() as u16).to_be_bytes().to_vec();
    framed.extend_from_slice(&query);
    stream.write_all(&framed).await?;
    let len = stream.read_u16().await?;
    let mut answer = vec![0; usize::from(len)];
    stream.read_exact(&mut answer).await?;
    check(&answer, id, ask).ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            "answer to another question, or malformed",
        )
    })
}

fn check(answer: &[u8], id: u16, ask: &Ask) -> Option<Message> {
    if answer.get(..2)? != id.to_be_bytes() {
        return None;
    }
    Message::parse(answer)
        .ok()
        .filter(|m| ask.is_answered_by(m))
}
