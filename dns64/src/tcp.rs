//! DNS over TCP (RFC 7766): pipelined requests, answers as they come, idle connections closed.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kun_dns_core::chain::Handled;
use kun_dns_core::query::reject;
use kun_dns_core::wire::rcode;
use kun_dns_core::{Listen, Transport};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::timeout;

use crate::metrics::Counters;
use crate::slow::{Reply, Shared, Submit, Waiter};

/// Connections a listener: each holds some kilobytes; past that the next waits in the backlog.
const MAX_CONNECTIONS: usize = 2048;

/// Between two requests (RFC 7766 §6.2.3: "of the order of a few seconds"; CoreDNS: 10 s).
const IDLE: Duration = Duration::from_secs(10);

/// Answers not yet taken by a client, per connection; a client that pipelines more loses what is beyond.
const MAX_PIPELINED: usize = 128;

/// Longest request, as over UDP: it is kept while upstream is asked.
const MAX_REQUEST: usize = 2048;

/// Serves until dropped.
pub(crate) async fn serve(shared: Arc<Shared>, listener: TcpListener, listen: Listen) {
    let counters = shared.metrics.thread();
    let seats = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(seat) = seats.clone().acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, client)) => {
                let (shared, counters) = (shared.clone(), counters.clone());
                tokio::spawn(async move {
                    connection(&shared, &counters, stream, client, listen).await;
                    drop(seat);
                });
            }
            Err(e) => {
                tracing::warn!(error = %e, "accepting a TCP connection");
                // Out of descriptors: the next accept would fail at once.
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn connection(
    shared: &Shared,
    counters: &Counters,
    stream: TcpStream,
    client: SocketAddr,
    listen: Listen,
) {
    let (mut reader, mut writer) = stream.into_split();
    let (sender, mut answers) = mpsc::channel::<Vec<u8>>(MAX_PIPELINED);
    let write = tokio::spawn(async move {
        while let Some(answer) = answers.recv().await {
            let mut framed = (answer.len() as u16).to_be_bytes().to_vec();
            framed.extend_from_slice(&answer);
            if !matches!(timeout(IDLE, writer.write_all(&framed)).await, Ok(Ok(()))) {
                return;
            }
        }
    });
    let mut out = Vec::new();
    while let Ok(Ok(len)) = timeout(IDLE, reader.read_u16()).await {
        let mut wire = vec![0; usize::from(len)];
        if !matches!(timeout(IDLE, reader.read_exact(&mut wire)).await, Ok(Ok(_))) {
            break;
        }
        let received = Instant::now();
        let loaded = shared.loaded.load_full();
        let Some(at) = loaded.world.listens().iter().position(|l| *l == listen) else {
            break;
        };
        counters.request(Transport::Tcp);
        let now = received.duration_since(shared.epoch);
        let seed = u64::from_ne_bytes(crate::sys::random());
        if wire.len() > MAX_REQUEST {
            reject(&wire, rcode::FORMERR, &mut out);
            counters.answer(&out, None);
            if sender.try_send(out.clone()).is_err() {
                break;
            }
            continue;
        }
        let (answered, job) =
            match loaded
                .world
                .handle(at, &wire, Transport::Tcp, client, now, seed, &mut out)
            {
                Handled::Answered { source, refresh } => (Some(source), refresh),
                Handled::Resolve(job) => (None, Some(job)),
                Handled::Dropped => {
                    counters.dropped();
                    break;
                }
                Handled::Loop => {
                    shared.loop_found();
                    break;
                }
            };
        if answered.is_some() {
            counters.answer(&out, answered);
            shared.log(
                &loaded.world,
                at,
                &wire,
                Transport::Tcp,
                client,
                received,
                &out,
            );
            if sender.try_send(out.clone()).is_err() {
                break;
            }
        }
        if let Some(job) = job {
            let waiter = answered.is_none().then(|| Waiter {
                query: wire.clone(),
                transport: Transport::Tcp,
                client,
                received,
                reply: Reply::Tcp(sender.clone()),
            });
            if answered.is_none() {
                counters.miss();
            }
            if !shared.submit(Submit {
                loaded,
                job,
                waiter,
            }) && answered.is_none()
            {
                counters.overload();
                reject(&wire, rcode::SERVFAIL, &mut out);
                if sender.try_send(out.clone()).is_err() {
                    break;
                }
            }
        }
    }
    // Waiters hold senders: the writer ends when the last answer is out.
    drop(sender);
    let _ = write.await;
}
