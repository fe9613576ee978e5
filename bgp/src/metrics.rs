//! Counters of the speaker: `kun_bgp_…`, one label, the peer's name.

use std::fmt;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Label {
    peer: String,
}

/// The families; [`Metrics::of`] gives one peer's.
#[derive(Debug, Default)]
pub(crate) struct Metrics {
    up: Family<Label, Gauge>,
    established: Family<Label, Counter>,
    announced: Family<Label, Gauge>,
    refused: Family<Label, Gauge>,
    ignored: Family<Label, Counter>,
    malformed: Family<Label, Counter>,
    sent: Family<Label, Counter>,
    received: Family<Label, Counter>,
}

/// One peer's counters.
#[derive(Clone)]
pub(crate) struct PeerMetrics {
    pub(crate) up: Gauge,
    pub(crate) established: Counter,
    pub(crate) announced: Gauge,
    pub(crate) refused: Gauge,
    pub(crate) ignored: Counter,
    pub(crate) malformed: Counter,
    pub(crate) sent: Counter,
    pub(crate) received: Counter,
}

impl fmt::Debug for PeerMetrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PeerMetrics").finish_non_exhaustive()
    }
}

impl Metrics {
    pub(crate) fn register(registry: &mut Registry) -> Self {
        let m = Self::default();
        registry.register(
            "kun_bgp_session_up",
            "1 while the session is Established",
            m.up.clone(),
        );
        registry.register(
            "kun_bgp_sessions_established",
            "Times the session reached Established",
            m.established.clone(),
        );
        registry.register(
            "kun_bgp_routes_announced",
            "Prefixes in Adj-RIB-Out",
            m.announced.clone(),
        );
        registry.register(
            "kun_bgp_routes_refused",
            "Prefixes asked for and refused",
            m.refused.clone(),
        );
        registry.register(
            "kun_bgp_routes_ignored",
            "Prefixes received and ignored (RFC 8212)",
            m.ignored.clone(),
        );
        registry.register(
            "kun_bgp_updates_malformed",
            "UPDATEs survived by RFC 7606",
            m.malformed.clone(),
        );
        registry.register("kun_bgp_messages_sent", "Messages sent", m.sent.clone());
        registry.register(
            "kun_bgp_messages_received",
            "Messages received",
            m.received.clone(),
        );
        m
    }

    pub(crate) fn of(&self, peer: &str) -> PeerMetrics {
        let label = Label {
            peer: peer.to_owned(),
        };
        PeerMetrics {
            up: self.up.get_or_create_owned(&label),
            established: self.established.get_or_create_owned(&label),
            announced: self.announced.get_or_create_owned(&label),
            refused: self.refused.get_or_create_owned(&label),
            ignored: self.ignored.get_or_create_owned(&label),
            malformed: self.malformed.get_or_create_owned(&label),
            sent: self.sent.get_or_create_owned(&label),
            received: self.received.get_or_create_owned(&label),
        }
    }
}
