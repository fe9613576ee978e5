//! The agent's own metrics; the BGP speaker registers its own.

use std::sync::atomic::{AtomicU64, Ordering};

use kun_ebpf_abi::reason::Reason;
use kun_proxy_core::Totals;
use kun_telemetry::Registry;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;

use super::addresses::Round;
use super::blocks::Counted;
use super::limits::Dropped;

/// From a tenth of a millisecond, one endpoint's change, to 13 s, a cold start on a busy node.
const SYNC_BUCKETS: usize = 18;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SlotLabels {
    class: &'static str,
    state: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct BlockLabels {
    class: &'static str,
    standing: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ClassLabel {
    class: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PodLabels {
    /// Namespace and name.
    pod: String,
    direction: &'static str,
}

impl PodLabels {
    fn of(dropped: &Dropped) -> Self {
        Self {
            pod: dropped.pod.clone(),
            direction: dropped.direction,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabel {
    kind: String,
}

/// Everything that the agent counts.
#[derive(Debug, Clone)]
pub(crate) struct Metrics {
    sync_seconds: Histogram,
    frontends: Gauge,
    services: Gauge,
    backends: Gauge,
    slots: Gauge,
    problems: Gauge,
    ops: Counter,
    withdrawals: Counter,
    /// Ops that failed, each followed by a new adoption.
    pub(crate) failures: Counter,
    attached: Gauge,
    drops: Family<ReasonLabel, Counter>,
    limited_packets: Family<PodLabels, Counter>,
    limited_bytes: Family<PodLabels, Counter>,
    expired: Counter,
    flows: Gauge,
    slots_by_state: Family<SlotLabels, Gauge>,
    blocks_by_standing: Family<BlockLabels, Gauge>,
    blocks_wanted: Family<ClassLabel, Gauge>,
    leaks_reclaimed: Counter,
    nics_not_reclaimed: Gauge,
    objects: Family<KindLabel, Gauge>,
    synced: Gauge,
    applied_revision: Gauge,
    watermark: Gauge,
    published: Counter,
    publish_failures: Counter,
    nat64: Family<ReasonLabel, Gauge>,
}

impl Metrics {
    /// Registers all of them.
    pub(crate) fn new(registry: &mut Registry) -> Self {
        let metrics = Self {
            sync_seconds: Histogram::new(
                prometheus_client::metrics::histogram::exponential_buckets(
                    0.000_1,
                    2.0,
                    SYNC_BUCKETS as u16,
                ),
            ),
            frontends: Gauge::default(),
            services: Gauge::default(),
            backends: Gauge::default(),
            slots: Gauge::default(),
            problems: Gauge::default(),
            ops: Counter::default(),
            withdrawals: Counter::default(),
            failures: Counter::default(),
            attached: Gauge::default(),
            drops: Family::default(),
            limited_packets: Family::default(),
            limited_bytes: Family::default(),
            expired: Counter::default(),
            flows: Gauge::default(),
            slots_by_state: Family::default(),
            blocks_by_standing: Family::default(),
            blocks_wanted: Family::default(),
            leaks_reclaimed: Counter::default(),
            nics_not_reclaimed: Gauge::default(),
            objects: Family::default(),
            synced: Gauge::default(),
            applied_revision: Gauge::default(),
            watermark: Gauge::default(),
            published: Counter::default(),
            publish_failures: Counter::default(),
            nat64: Family::default(),
        };
        let m = metrics.clone();
        registry.register(
            "kun_proxy_sync_seconds",
            "From the first change of a batch to its last op",
            m.sync_seconds,
        );
        registry.register("kun_proxy_frontends", "Frontends programmed", m.frontends);
        registry.register("kun_proxy_services", "Service ids in use", m.services);
        registry.register("kun_proxy_backends", "Backend records in use", m.backends);
        registry.register(
            "kun_proxy_slots",
            "Slots in use, extents' rounding included",
            m.slots,
        );
        registry.register(
            "kun_proxy_problems",
            "Services that are not served as written",
            m.problems,
        );
        registry.register("kun_proxy_ops", "Ops applied to the dataplane", m.ops);
        registry.register(
            "kun_proxy_withdrawals",
            "Ops that took a frontend or a whole backend set away",
            m.withdrawals,
        );
        registry.register(
            "kun_proxy_failures",
            "Ops that failed, each followed by reading the maps back",
            m.failures,
        );
        registry.register(
            "kun_proxy_attached_interfaces",
            "Interfaces that carry the service programs",
            m.attached,
        );
        registry.register(
            "kun_proxy_drops",
            "Packets dropped and connects refused, by reason",
            m.drops,
        );
        registry.register(
            "kun_pod_bandwidth_dropped_packets",
            "Packets beyond a pod's bandwidth limit; a super-packet is one",
            m.limited_packets,
        );
        registry.register(
            "kun_pod_bandwidth_dropped_bytes",
            "Their bytes on the wire",
            m.limited_bytes,
        );
        registry.register(
            "kun_proxy_flows_expired",
            "Idle flows removed from the flow table",
            m.expired,
        );
        registry.register(
            "kun_proxy_flows",
            "Records in the flow table at the last sweep; two a flow",
            m.flows,
        );
        registry.register(
            "kun_ipam_slots",
            "Slots of this node's blocks, by class and state",
            m.slots_by_state,
        );
        registry.register(
            "kun_ipam_blocks",
            "Blocks of this node, by class and standing",
            m.blocks_by_standing,
        );
        registry.register(
            "kun_ipam_blocks_wanted",
            "Blocks that this node wants to have in all, by class; more than it has: another is asked for",
            m.blocks_wanted,
        );
        registry.register(
            "kun_ipam_leaks_reclaimed",
            "Slots and interfaces of pods that are gone, reclaimed by the agent itself",
            m.leaks_reclaimed,
        );
        registry.register(
            "kun_ipam_nics_not_reclaimed",
            "Interfaces that are still there although their pods are gone",
            m.nics_not_reclaimed,
        );
        registry.register("kun_cluster_objects", "Objects known, by kind", m.objects);
        registry.register(
            "kun_cluster_synced",
            "1 once the first snapshot of the cluster is complete",
            m.synced,
        );
        registry.register(
            "kun_watermark_applied_revision",
            "Revision of the EndpointSlices that this node's dataplane holds; 0: not known",
            m.applied_revision,
        );
        registry.register(
            "kun_watermark_revision",
            "Revision that all nodes have applied; 0: not known",
            m.watermark,
        );
        registry.register(
            "kun_watermark_published",
            "Revisions that this node has published",
            m.published,
        );
        registry.register(
            "kun_watermark_publish_failures",
            "Publications that the API server did not take; each is tried again",
            m.publish_failures,
        );
        registry.register(
            "kun_nat64_stats",
            "Counters of the translator, by name",
            m.nat64,
        );
        metrics
    }

    /// A batch is done.
    pub(crate) fn batch(&self, seconds: f64, ops: usize, withdrawals: usize) {
        self.sync_seconds.observe(seconds);
        self.ops.inc_by(ops as u64);
        self.withdrawals.inc_by(withdrawals as u64);
    }

    /// How full the maps are.
    pub(crate) fn totals(&self, totals: &Totals) {
        self.frontends.set(totals.frontends as i64);
        self.services.set(i64::from(totals.services));
        self.backends.set(i64::from(totals.backends));
        self.slots.set(i64::from(totals.slots));
        self.problems.set(totals.problems as i64);
    }

    /// How many interfaces carry programs.
    pub(crate) fn attached(&self, interfaces: usize) {
        self.attached.set(interfaces as i64);
    }

    /// What a sweep of the flow table found.
    pub(crate) fn expired(&self, expired: &kun_ebpf_loader::Expired) {
        self.expired.inc_by(expired.removed);
        self.flows
            .set(i64::try_from(expired.live).unwrap_or(i64::MAX));
    }

    /// The kernel's drop counters, which only grow while their map is pinned.
    pub(crate) fn drops(&self, reasons: &[(Reason, u64)]) {
        for (reason, count) in reasons {
            let counter = self.drops.get_or_create(&ReasonLabel {
                reason: reason.label(),
            });
            let seen: &AtomicU64 = counter.inner();
            seen.fetch_max(*count, Ordering::Relaxed);
        }
    }

    /// What a pod's bucket has dropped, which only grows while the pod lives.
    pub(crate) fn limited(&self, dropped: &Dropped) {
        for (family, count) in [
            (&self.limited_packets, dropped.packets),
            (&self.limited_bytes, dropped.bytes),
        ] {
            let counter = family.get_or_create(&PodLabels::of(dropped));
            let seen: &AtomicU64 = counter.inner();
            seen.fetch_max(count, Ordering::Relaxed);
        }
    }

    /// The pod is gone.
    pub(crate) fn forget(&self, dropped: &Dropped) {
        for family in [&self.limited_packets, &self.limited_bytes] {
            family.remove(&PodLabels::of(dropped));
        }
    }

    /// The translator's counters.
    pub(crate) fn nat64(&self, name: &'static str, value: u64) {
        self.nat64
            .get_or_create(&ReasonLabel { reason: name })
            .set(i64::try_from(value).unwrap_or(i64::MAX));
    }

    /// Slots of a class.
    pub(crate) fn leaks(&self, round: &Round) {
        self.leaks_reclaimed.inc_by(round.reclaimed);
        self.nics_not_reclaimed
            .set(i64::try_from(round.not_reclaimed).unwrap_or(i64::MAX));
    }

    /// Slots of a class: allocated, not free yet, free.
    pub(crate) fn ipam(&self, class: &'static str, counts: (u32, u32, u32)) {
        let (allocated, cooling, free) = counts;
        for (state, count) in [
            ("allocated", allocated),
            ("cooling", cooling),
            ("free", free),
        ] {
            self.slots_by_state
                .get_or_create(&SlotLabels { class, state })
                .set(i64::from(count));
        }
    }

    /// Blocks of a class.
    pub(crate) fn blocks(&self, class: &'static str, counted: &Counted) {
        for (standing, count) in [
            ("taken", counted.taken),
            ("confirmed", counted.confirmed),
            ("draining", counted.draining),
        ] {
            self.blocks_by_standing
                .get_or_create(&BlockLabels { class, standing })
                .set(i64::from(count));
        }
        self.blocks_wanted
            .get_or_create(&ClassLabel { class })
            .set(i64::from(counted.wanted));
    }

    /// Objects of a kind.
    pub(crate) fn objects(&self, kind: &str, count: usize) {
        self.objects
            .get_or_create(&KindLabel {
                kind: kind.to_owned(),
            })
            .set(count as i64);
    }

    /// What is applied here, and everywhere.
    pub(crate) fn watermark(&self, applied: Option<i64>, all: Option<i64>) {
        self.applied_revision.set(applied.unwrap_or_default());
        self.watermark.set(all.unwrap_or_default());
    }

    /// A publication was taken, or not.
    pub(crate) fn published(&self, taken: bool) {
        if taken {
            self.published.inc();
        } else {
            self.publish_failures.inc();
        }
    }

    /// The cluster is synced, or not.
    pub(crate) fn synced(&self, synced: bool) {
        self.synced.set(i64::from(synced));
    }
}
