//! Counters under CoreDNS's metric names, so that its dashboards go on working; one set of counters a thread, added up on scrape.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use kun_dns_core::Transport;
use kun_dns_core::chain::Source;
use kun_dns_core::wire::rcode_text;

use crate::load::Loaded;

/// Counters of one thread.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct Counters {
    requests: [AtomicU64; 2],
    rcodes: [AtomicU64; 16],
    cache_hits: AtomicU64,
    cache_stale: AtomicU64,
    cache_misses: AtomicU64,
    kubernetes: AtomicU64,
    dropped: AtomicU64,
    overload: AtomicU64,
}

fn one(c: &AtomicU64) {
    c.fetch_add(1, Ordering::Relaxed);
}

impl Counters {
    pub(crate) fn request(&self, transport: Transport) {
        one(&self.requests[usize::from(transport == Transport::Tcp)]);
    }

    pub(crate) fn answer(&self, answer: &[u8], source: Option<Source>) {
        if let Some(flags) = answer.get(3) {
            one(&self.rcodes[usize::from(flags & 15)]);
        }
        match source {
            Some(Source::Cache) => one(&self.cache_hits),
            Some(Source::Stale) => one(&self.cache_stale),
            Some(Source::Kubernetes) => one(&self.kubernetes),
            _ => {}
        }
    }

    pub(crate) fn miss(&self) {
        one(&self.cache_misses);
    }

    pub(crate) fn dropped(&self) {
        one(&self.dropped);
    }

    pub(crate) fn overload(&self) {
        one(&self.overload);
    }
}

/// All threads' counters.
#[derive(Debug, Default)]
pub(crate) struct Metrics {
    threads: Mutex<Vec<Arc<Counters>>>,
    reloads: [AtomicU64; 2],
}

impl Metrics {
    /// A set for a new thread. Threads live as long as their listener: the list grows with reloads that move listeners, no faster.
    pub(crate) fn thread(&self) -> Arc<Counters> {
        let counters = Arc::new(Counters::default());
        self.threads
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(counters.clone());
        counters
    }

    pub(crate) fn reloaded(&self, ok: bool) {
        one(&self.reloads[usize::from(!ok)]);
    }

    /// Prometheus text format 0.0.4.
    pub(crate) fn text(&self, loaded: &Loaded) -> String {
        let threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        let sum = |pick: &dyn Fn(&Counters) -> &AtomicU64| {
            threads
                .iter()
                .map(|c| pick(c).load(Ordering::Relaxed))
                .sum::<u64>()
        };
        let mut out = String::new();
        let mut metric = |name: &str, kind: &str, help: &str, rows: &[(String, u64)]| {
            // Writing to a String does not fail.
            let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
            for (labels, value) in rows {
                let _ = writeln!(out, "{name}{labels} {value}");
            }
        };
        let plain = |value| [(String::new(), value)];
        metric(
            "coredns_build_info",
            "gauge",
            "A metric with a constant '1' value labeled by version.",
            &[(
                format!("{{version=\"kun-{}\"}}", env!("CARGO_PKG_VERSION")),
                1,
            )],
        );
        let proto = |i: usize, p: &str| (format!("{{proto=\"{p}\"}}"), sum(&|c| &c.requests[i]));
        metric(
            "coredns_dns_requests_total",
            "counter",
            "Counter of DNS requests made per protocol.",
            &[proto(0, "udp"), proto(1, "tcp")],
        );
        let rcodes: Vec<_> = (0..11u8)
            .map(|i| {
                (
                    format!("{{rcode=\"{}\"}}", rcode_text(i)),
                    sum(&|c| &c.rcodes[usize::from(i)]),
                )
            })
            .filter(|(_, n)| *n > 0)
            .collect();
        metric(
            "coredns_dns_responses_total",
            "counter",
            "Counter of response status codes.",
            &rcodes,
        );
        metric(
            "coredns_cache_hits_total",
            "counter",
            "The count of cache hits.",
            &plain(sum(&|c| &c.cache_hits)),
        );
        metric(
            "coredns_cache_served_stale_total",
            "counter",
            "The number of requests served from stale cache entries.",
            &plain(sum(&|c| &c.cache_stale)),
        );
        metric(
            "coredns_cache_misses_total",
            "counter",
            "The count of questions that went upstream.",
            &plain(sum(&|c| &c.cache_misses)),
        );
        let entries = loaded
            .world
            .chains()
            .iter()
            .filter_map(|c| c.cache.as_ref())
            .map(|c| c.len());
        let (success, denial) = entries.fold((0, 0), |a, b| (a.0 + b.0, a.1 + b.1));
        metric(
            "coredns_cache_entries",
            "gauge",
            "The number of elements in the cache.",
            &[
                ("{type=\"success\"}".to_owned(), success as u64),
                ("{type=\"denial\"}".to_owned(), denial as u64),
            ],
        );
        let forwards: Vec<_> = loaded
            .upstreams
            .iter()
            .enumerate()
            .map(|(i, u)| (format!("{{forward=\"{i}\"}}"), u.counts()))
            .collect();
        let pick = |f: fn(&(u64, u64, usize)) -> u64| {
            forwards
                .iter()
                .map(|(l, c)| (l.clone(), f(c)))
                .collect::<Vec<_>>()
        };
        metric(
            "coredns_forward_requests_total",
            "counter",
            "Counter of exchanges with upstreams.",
            &pick(|c| c.0),
        );
        metric(
            "kun_dns_forward_failures_total",
            "counter",
            "Counter of exchanges that failed.",
            &pick(|c| c.1),
        );
        metric(
            "kun_dns_forward_unhealthy",
            "gauge",
            "Upstreams that fail their health checks.",
            &pick(|c| c.2 as u64),
        );
        metric(
            "kun_dns_kubernetes_answers_total",
            "counter",
            "Counter of answers from the cluster's names.",
            &plain(sum(&|c| &c.kubernetes)),
        );
        metric(
            "kun_dns_kubernetes_names",
            "gauge",
            "Names of the cluster.",
            &plain(loaded.world.names() as u64),
        );
        metric(
            "kun_dns_dropped_total",
            "counter",
            "Counter of messages that are no requests.",
            &plain(sum(&|c| &c.dropped)),
        );
        metric(
            "kun_dns_overload_total",
            "counter",
            "Counter of queries refused because too many wait.",
            &plain(sum(&|c| &c.overload)),
        );
        let reload = |i: usize| self.reloads[i].load(Ordering::Relaxed);
        metric(
            "kun_dns_reloads_total",
            "counter",
            "Counter of reloads.",
            &[
                ("{result=\"ok\"}".to_owned(), reload(0)),
                ("{result=\"failed\"}".to_owned(), reload(1)),
            ],
        );
        out
    }
}
