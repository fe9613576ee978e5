//! The fast lane: a thread on its own socket, answering from memory.

use std::io;
use std::net::UdpSocket;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use kun_dns_core::chain::Handled;
use kun_dns_core::logline::{Exchange, line};
use kun_dns_core::query::reject;
use kun_dns_core::wire::rcode;
use kun_dns_core::{Listen, Query, Transport};

use crate::slow::{Reply, Shared, Submit, Waiter};
use crate::sys::{self, Batch};

/// Serves `socket` until `stop`, or until no configuration knows `listen` any more.
pub(crate) fn serve(shared: &Shared, socket: &Arc<UdpSocket>, listen: Listen, stop: &AtomicBool) {
    let counters = shared.metrics.thread();
    let mut batch = Batch::default();
    let mut seed = u64::from_ne_bytes(sys::random());
    while !stop.load(Ordering::Relaxed) {
        let mut guard = shared.loaded.load();
        let mut at = None;
        let served = batch.serve(socket, |wire, path, out| {
            let received = Instant::now();
            let at = *at.get_or_insert_with(|| {
                // The wait for the first datagram may have been long.
                guard = shared.loaded.load();
                guard.world.listens().iter().position(|l| *l == listen)
            });
            let Some(at) = at else { return false };
            counters.request(Transport::Udp);
            seed = seed
                .wrapping_mul(0x5851_f42d_4c95_7f2d)
                .wrapping_add(0x1405_7b7e_f767_814f);
            let client = path.client();
            let now = received.duration_since(shared.epoch);
            let (source, job) =
                match guard
                    .world
                    .handle(at, wire, Transport::Udp, client, now, seed >> 11, out)
                {
                    Handled::Answered { source, refresh } => (Some(source), refresh),
                    Handled::Resolve(job) => (None, Some(job)),
                    Handled::Dropped => {
                        counters.dropped();
                        return false;
                    }
                    Handled::Loop => {
                        shared.loop_found();
                        return false;
                    }
                };
            if let Some(job) = job {
                let waiter = source.is_none().then(|| Waiter {
                    query: wire.to_vec(),
                    transport: Transport::Udp,
                    client,
                    received,
                    reply: Reply::Udp(socket.clone(), Box::new(*path)),
                });
                if source.is_none() {
                    counters.miss();
                }
                let submitted = shared.submit(Submit {
                    loaded: guard.clone(),
                    job,
                    waiter,
                });
                if source.is_none() {
                    if !submitted {
                        counters.overload();
                        reject(wire, rcode::SERVFAIL, out);
                    }
                    return !submitted;
                }
            }
            counters.answer(out, source);
            shared.log(
                &guard.world,
                at,
                wire,
                Transport::Udp,
                client,
                received,
                out,
            );
            true
        });
        match served {
            Ok(_) => {}
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::WouldBlock
                        | io::ErrorKind::TimedOut
                        | io::ErrorKind::Interrupted
                ) => {}
            Err(e) => {
                // An ICMP error of an earlier answer, or memory pressure: the socket stays good.
                tracing::debug!(error = %e, "receiving");
            }
        }
    }
}

impl Shared {
    /// Writes the `log` line of an exchange, where a rule wants one.
    #[allow(clippy::too_many_arguments, reason = "they are the exchange")]
    pub(crate) fn log(
        &self,
        world: &kun_dns_core::World,
        at: usize,
        wire: &[u8],
        transport: Transport,
        client: std::net::SocketAddr,
        received: Instant,
        out: &[u8],
    ) {
        if !world.chains().iter().any(|c| !c.log.is_empty()) {
            return;
        }
        let Ok(query) = Query::parse(wire, transport) else {
            return;
        };
        let Some(chain) = world.chain_of(at, &query) else {
            return;
        };
        let exchange = Exchange {
            query: &query,
            response: out,
            client,
            duration: received.elapsed(),
        };
        if let Some(line) = line(&chain.log, &exchange) {
            tracing::info!(target: "kun_dns::log", "{line}");
        }
    }
}
