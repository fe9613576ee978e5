//! What each plugin's directive says, as types that cannot be wrong. Defaults are CoreDNS's.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use ipnet::Ipv6Net;

use crate::types::{DnsName, Pref64};

/// One link of a chain.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs, reason = "each variant is the plugin of its name")]
pub enum Plugin {
    Reload(Reload),
    Bufsize(u16),
    Debug,
    Ready(SocketAddr),
    Health(Health),
    Prometheus(SocketAddr),
    Errors,
    Log(Vec<LogRule>),
    Dns64(Dns64),
    Loadbalance,
    Cache(Cache),
    Hosts(Hosts),
    Kubernetes(Kubernetes),
    Loop(Vec<DnsName>),
    Forward(Box<Forward>),
    Whoami,
}

/// `reload [INTERVAL] [JITTER]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reload {
    /// Time between looks at the file: at least 2 s.
    pub interval: Duration,
    /// Added at random: at least 1 s, at most half the interval.
    pub jitter: Duration,
}

/// `health [ADDRESS]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Health {
    /// Where `/health` is served.
    pub address: SocketAddr,
    /// How long to go on answering after being told to stop.
    pub lameduck: Duration,
}

/// One `log` directive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogRule {
    /// Names and all below them.
    pub names: Vec<DnsName>,
    /// The line.
    pub format: Vec<LogPart>,
    /// Which answers.
    pub classes: LogClasses,
}

/// Which answers a log rule writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LogClasses {
    /// Answers with data, delegations.
    pub success: bool,
    /// NXDOMAIN and NODATA.
    pub denial: bool,
    /// SERVFAIL, NOTIMP, REFUSED and whatever has no meaning.
    pub error: bool,
}

/// A piece of a log line.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(
    missing_docs,
    reason = "each variant is CoreDNS's placeholder of its name"
)]
pub enum LogPart {
    Text(String),
    Type,
    Name,
    Class,
    Proto,
    Remote,
    Local,
    Port,
    Size,
    Rcode,
    Rsize,
    Duration,
    Id,
    Opcode,
    Do,
    Bufsize,
    Rflags,
}

/// `dns64`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dns64 {
    /// At least one; an AAAA is synthesised under each.
    pub prefixes: Vec<Pref64>,
    /// Native AAAA records count as absent.
    pub translate_all: bool,
    /// Queries that came over IPv4 are served too.
    pub allow_ipv4: bool,
    /// AAAA records in these networks count as absent (RFC 6147 §5.1.4). Default ::ffff:0:0/96.
    pub exclude: Vec<Ipv6Net>,
}

/// Capacity and TTL bounds of one half of a cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheHalf {
    /// Entries; 0: off.
    pub capacity: usize,
    /// Upper bound of TTLs.
    pub max_ttl: Duration,
    /// Lower bound of TTLs.
    pub min_ttl: Duration,
}

/// `cache`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cache {
    /// Names that are cached; the block's zones where the directive names none.
    pub zones: Vec<DnsName>,
    /// Positive answers.
    pub success: CacheHalf,
    /// NXDOMAIN and NODATA.
    pub denial: CacheHalf,
    /// How long a SERVFAIL is remembered: at most 5 min (RFC 2308 §7.1); zero: not at all.
    pub servfail: Duration,
    /// Refresh of popular entries.
    pub prefetch: Option<Prefetch>,
    /// Expired entries as a last resort.
    pub serve_stale: Option<ServeStale>,
    /// Positive answers below these names are not cached.
    pub disable_success: Vec<DnsName>,
    /// Negative answers below these names are not cached.
    pub disable_denial: Vec<DnsName>,
    /// TTLs are handed out as they were stored.
    pub keep_ttl: bool,
}

/// `prefetch AMOUNT [DURATION [PERCENTAGE%]]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prefetch {
    /// Hits that make an entry popular.
    pub amount: u32,
    /// … with no gap longer than this between them.
    pub duration: Duration,
    /// Refresh when the TTL left falls below this share of the original; 10 to 90.
    pub percentage: u8,
}

/// `serve_stale [DURATION] [immediate|verify]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ServeStale {
    /// How long past expiry.
    pub duration: Duration,
    /// Ask upstream first, and fall back to the stale entry only on failure.
    pub verify: bool,
}

/// `hosts`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hosts {
    /// The hosts file. Default /etc/hosts.
    pub file: PathBuf,
    /// Names it answers for.
    pub zones: Vec<DnsName>,
    /// Entries in the Corefile itself.
    pub inline: Vec<(IpAddr, Vec<DnsName>)>,
    /// TTL of answers, seconds.
    pub ttl: u32,
    /// No PTR records.
    pub no_reverse: bool,
    /// Time between looks at the file; zero: never.
    pub reload: Duration,
    /// Unknown names go on to the next plugin.
    pub fallthrough: Fallthrough,
}

/// `fallthrough [ZONES…]`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Fallthrough(pub Vec<DnsName>);

impl Fallthrough {
    /// Whether a query for `name` (lower-case wire form) may go on.
    pub fn covers(&self, name: &[u8]) -> bool {
        self.0
            .iter()
            .any(|z| crate::types::wire_is_within(name, z.wire()))
    }
}

/// `pods`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PodMode {
    /// No pod records.
    #[default]
    Disabled,
    /// The address in the name is the answer.
    Insecure,
    /// … if a pod of that namespace has it.
    Verified,
}

/// `kubernetes`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kubernetes {
    /// Forward and reverse zones; the first forward one is where PTR records point to.
    pub zones: Vec<DnsName>,
    /// Only these namespaces; empty: all.
    pub namespaces: Vec<String>,
    /// Pod records.
    pub pods: PodMode,
    /// Endpoints without a hostname are named after their pod.
    pub endpoint_pod_names: bool,
    /// No endpoint records: headless services have no names.
    pub no_endpoints: bool,
    /// A service without endpoints does not exist: NXDOMAIN.
    pub ignore_empty_service: bool,
    /// TTL, 0 to 3600 s.
    pub ttl: u32,
    /// Unknown names go on to the next plugin.
    pub fallthrough: Fallthrough,
}

/// Where queries are forwarded to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ForwardTo {
    /// A server.
    Address(SocketAddr),
    /// A file in the form of resolv.conf: its `nameserver` lines.
    File(PathBuf),
}

/// How an upstream is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Policy {
    /// At random.
    #[default]
    Random,
    /// In turn.
    RoundRobin,
    /// The first healthy one.
    Sequential,
}

/// `forward`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Forward {
    /// Names it forwards.
    pub from: Vec<DnsName>,
    /// … except these.
    pub except: Vec<DnsName>,
    /// Upstreams, 1 to 15.
    pub to: Vec<ForwardTo>,
    /// Choice among them.
    pub policy: Policy,
    /// Failed health checks in a row that make an upstream unhealthy; 0: never.
    pub max_fails: u32,
    /// Time between health checks of a failing upstream.
    pub health_interval: Duration,
    /// Health checks without the RD flag.
    pub health_no_rec: bool,
    /// What health checks ask for (type NS).
    pub health_domain: DnsName,
    /// Queries in flight; `None`: the server's own limit.
    pub max_concurrent: Option<u32>,
    /// TCP even where the client used UDP.
    pub force_tcp: bool,
    /// UDP even where the client used TCP.
    pub prefer_udp: bool,
    /// Response codes that make the next upstream be asked.
    pub failover: Vec<u8>,
    /// With all upstreams unhealthy: SERVFAIL at once, not a try at random.
    pub failfast: bool,
}
