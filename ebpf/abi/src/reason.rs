//! Why a packet was dropped or a connect refused. Numbers are append-only: operators' dashboards hold them.

/// Index into the `reasons` per-CPU counter array.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reason {
    /// A service without a ready endpoint.
    NoEndpoint = 0,
    /// The flow table is full, or the client's tuple is taken at the backend and no other was found.
    FlowTableFull = 1,
    /// Truncated or malformed header.
    Malformed = 2,
    /// NAT64: the source has no port block and no stateful slice is free.
    Nat64NoMapping = 3,
    /// NAT64: hop limit or TTL exceeded.
    Nat64HopLimit = 4,
    /// NAT64: protocol or header that RFC 7915 does not translate.
    Nat64Untranslatable = 5,
    /// NAT64: an IPv4 packet to the pool that maps to nobody.
    Nat64NoReverse = 6,
    /// A backend's record was recycled and no other was found.
    StaleBackend = 7,
    /// NAT64: a later fragment whose first one was not seen here, or a fragment that has no translation.
    Nat64Fragment = 8,
    /// NAT64: too big for the other side; answered with "fragmentation needed" where the packet allows.
    Nat64TooBig = 9,
    /// A fragment of a packet for a service: only the first one names the ports, so none is translated.
    Fragment = 10,
    /// The packet could not be rewritten: no memory, or a frontend and a backend of different families.
    Rewrite = 11,
}

impl Reason {
    /// All, in the order of their numbers.
    pub const ALL: [Reason; REASONS as usize] = [
        Reason::NoEndpoint,
        Reason::FlowTableFull,
        Reason::Malformed,
        Reason::Nat64NoMapping,
        Reason::Nat64HopLimit,
        Reason::Nat64Untranslatable,
        Reason::Nat64NoReverse,
        Reason::StaleBackend,
        Reason::Nat64Fragment,
        Reason::Nat64TooBig,
        Reason::Fragment,
        Reason::Rewrite,
    ];

    /// The value of the metric's `reason` label.
    pub const fn label(self) -> &'static str {
        match self {
            Reason::NoEndpoint => "no_endpoint",
            Reason::FlowTableFull => "flow_table_full",
            Reason::Malformed => "malformed",
            Reason::Nat64NoMapping => "nat64_no_mapping",
            Reason::Nat64HopLimit => "nat64_hop_limit",
            Reason::Nat64Untranslatable => "nat64_untranslatable",
            Reason::Nat64NoReverse => "nat64_no_reverse",
            Reason::StaleBackend => "stale_backend",
            Reason::Nat64Fragment => "nat64_fragment",
            Reason::Nat64TooBig => "nat64_too_big",
            Reason::Fragment => "fragment",
            Reason::Rewrite => "rewrite",
        }
    }
}

/// How many reasons there are.
pub const REASONS: u32 = 12;
