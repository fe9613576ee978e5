//! The chain of one server block: what answers from memory does so here; what must be asked upstream leaves as a [`Job`].
//!
//! DNS64 sits below the cache, so that a made answer is kept like any other, and above `forward` and `hosts` alone: Kubernetes
//! names are authoritative and never synthesised, `translate_all` or not. Names that hosts or Kubernetes know skip the cache.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use kun_config::corefile::{
    Dns64, Forward, Hosts as HostsSpec, Kubernetes, LogRule, Plugin, ServerBlock,
};
use kun_config::types::{DnsName, wire_is_within};

use crate::answer::{Answer, Key, Profile, Shape, begin, finish};
use crate::cache::{Cache, Found};
use crate::dns64::{ipv4only, may_synthesise, reverse, synthesise_addresses};
use crate::hosts::{Entry, Hosts};
use crate::kubernetes::{Said, Snapshot};
use crate::message::{Compressor, Message, Record};
use crate::query::Query;
use crate::wire::{HEADER, MAX_MESSAGE, UDP_PAYLOAD, flag, put_u16, rcode, rtype};

/// Probes that come back before `loop` calls it a loop: the first is the one that was sent.
const LOOP_SEEN: u32 = 2;

/// A chain.
#[derive(Debug)]
pub struct Chain {
    /// The block it was made from.
    pub block: ServerBlock,
    /// Largest UDP answer.
    pub cap: u16,
    /// `log`.
    pub log: Vec<LogRule>,
    /// `errors`.
    pub errors: bool,
    /// `debug`.
    pub debug: bool,
    /// `cache`.
    pub cache: Option<Arc<Cache>>,
    dns64: Option<Dns64>,
    shuffle: bool,
    links: Vec<Link>,
}

#[derive(Debug)]
enum Link {
    Hosts(HostsSpec, Arc<Hosts>),
    /// The index of its snapshot.
    Kubernetes(Kubernetes, usize),
    Loop(Arc<Probe>),
    /// The index of its upstreams.
    Forward(Box<Forward>, usize),
    Whoami,
}

/// `loop`'s probe: a name that nobody else asks for.
#[derive(Debug)]
pub struct Probe {
    /// The name, wire form.
    pub name: Vec<u8>,
    seen: AtomicU32,
}

/// Who answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "each variant is the plugin of its name")]
pub enum Source {
    Cache,
    Stale,
    Kubernetes,
    Hosts,
    Dns64,
    Whoami,
    /// No plugin did: SERVFAIL or REFUSED.
    Nobody,
}

/// What became of a query.
#[derive(Debug)]
pub enum Handled {
    /// Nothing is sent.
    Dropped,
    /// The answer is written.
    Answered {
        /// By whom.
        source: Source,
        /// Asked upstream behind the client's back.
        refresh: Option<Box<Job>>,
    },
    /// Upstream is to be asked.
    Resolve(Box<Job>),
    /// `loop`'s probe came back more often than it was sent.
    Loop,
}

/// A question that leaves the fast lane. Jobs with equal chain and key have one answer.
#[derive(Debug, Clone)]
pub struct Job {
    /// Where its answer is kept, logged and shaped.
    pub chain: Arc<Chain>,
    /// Which listener it came in by.
    pub listen: usize,
    /// The question and the profile.
    pub key: Key,
    /// Lower-case wire form.
    pub name: Vec<u8>,
    /// Type.
    pub qtype: u16,
    /// What else decides the answer.
    pub profile: Profile,
}

/// Where the walk along the chain ended.
#[derive(Debug)]
pub(crate) enum Walk {
    /// The answer is written; order, truncation and OPT are not.
    Answered(Source),
    /// To be found under another name.
    Alias(Record, Vec<u8>),
    /// To be asked at these upstreams.
    Forward(usize),
    /// No plugin answers.
    Nobody,
    /// A loop.
    Loop,
}

/// What the walk needs besides the query.
pub(crate) struct Scene<'a> {
    pub(crate) snapshots: &'a [Arc<Snapshot>],
    /// The client; `None` for questions of our own.
    pub(crate) client: Option<SocketAddr>,
}

/// What building a chain takes from outside.
pub trait Materials {
    /// The text of a hosts file; empty when there is none.
    fn hosts_text(&mut self, spec: &HostsSpec) -> String;
    /// A random number.
    fn seed(&mut self) -> u64;
}

/// Where snapshots and upstreams of a whole Corefile are collected while its chains are built.
#[derive(Debug, Default)]
pub struct Collected {
    /// One snapshot for each.
    pub kubernetes: Vec<Kubernetes>,
    /// One set of upstreams for each.
    pub forwards: Vec<Forward>,
}

impl Chain {
    /// Builds the chain of `block`; a cache of the same block from before lives on.
    pub fn new(
        block: &ServerBlock,
        old: Option<&Chain>,
        materials: &mut dyn Materials,
        collected: &mut Collected,
    ) -> Self {
        let mut chain = Self {
            block: block.clone(),
            cap: UDP_PAYLOAD,
            log: Vec::new(),
            errors: false,
            debug: false,
            cache: None,
            dns64: None,
            shuffle: false,
            links: Vec::new(),
        };
        for plugin in &block.plugins {
            match plugin {
                Plugin::Bufsize(n) => chain.cap = *n,
                Plugin::Log(rules) => chain.log.clone_from(rules),
                Plugin::Errors => chain.errors = true,
                Plugin::Debug => chain.debug = true,
                Plugin::Loadbalance => chain.shuffle = true,
                Plugin::Dns64(spec) => chain.dns64 = Some(spec.clone()),
                Plugin::Cache(spec) => {
                    let kept = old
                        .filter(|o| o.block.plugins == block.plugins)
                        .and_then(|o| o.cache.clone());
                    chain.cache =
                        Some(kept.unwrap_or_else(|| {
                            Arc::new(Cache::new(spec.clone(), materials.seed()))
                        }));
                }
                Plugin::Hosts(spec) => {
                    let table = Hosts::new(&materials.hosts_text(spec), spec);
                    chain.links.push(Link::Hosts(spec.clone(), Arc::new(table)));
                }
                Plugin::Kubernetes(spec) => {
                    chain
                        .links
                        .push(Link::Kubernetes(spec.clone(), collected.kubernetes.len()));
                    collected.kubernetes.push(spec.clone());
                }
                Plugin::Loop(zones) => chain
                    .links
                    .push(Link::Loop(Arc::new(probe(zones, materials)))),
                Plugin::Forward(spec) => {
                    chain
                        .links
                        .push(Link::Forward(spec.clone(), collected.forwards.len()));
                    collected.forwards.push((**spec).clone());
                }
                Plugin::Whoami => chain.links.push(Link::Whoami),
                // The shell's.
                Plugin::Reload(_)
                | Plugin::Ready(_)
                | Plugin::Health(_)
                | Plugin::Prometheus(_) => {}
            }
        }
        chain
    }

    /// `loop`'s probe, if the chain has one.
    pub fn probe(&self) -> Option<Arc<Probe>> {
        self.links.iter().find_map(|l| match l {
            Link::Loop(probe) => Some(probe.clone()),
            _ => None,
        })
    }

    /// The DNS64 specification.
    pub(crate) fn dns64(&self) -> Option<&Dns64> {
        self.dns64.as_ref()
    }

    fn profile(&self, query: &Query<'_>, client: Option<SocketAddr>) -> Profile {
        let made = matches!(query.qtype, rtype::AAAA | rtype::PTR);
        let over_v6 = client.is_some_and(|c| matches!(c.ip().to_canonical(), IpAddr::V6(_)));
        Profile {
            dnssec_ok: query.dnssec_ok(),
            checking_disabled: query.checking_disabled(),
            synthesise: made && self.dns64.as_ref().is_some_and(|d| d.allow_ipv4 || over_v6),
        }
    }

    /// Answers `query`, or says who can.
    pub(crate) fn handle(
        self: &Arc<Self>,
        listen: usize,
        query: &Query<'_>,
        scene: &Scene<'_>,
        now: Duration,
        seed: u64,
        out: &mut Vec<u8>,
    ) -> Handled {
        let profile = self.profile(query, scene.client);
        let key = || Key::new(query.name(), query.qtype, profile);
        let job = |key| {
            Box::new(Job {
                chain: self.clone(),
                listen,
                key,
                name: query.name().to_vec(),
                qtype: query.qtype,
                profile,
            })
        };
        let shuffle = self.shuffle.then_some(seed);
        match self.walk(query, profile, scene, out) {
            Walk::Answered(source) => {
                finish(query, self.cap, shuffle, out);
                Handled::Answered {
                    source,
                    refresh: None,
                }
            }
            Walk::Loop => Handled::Loop,
            Walk::Nobody => {
                begin(query, u16::from(rcode::SERVFAIL), out);
                finish(query, self.cap, None, out);
                Handled::Answered {
                    source: Source::Nobody,
                    refresh: None,
                }
            }
            // A found alias is kept with what it leads to: the target's own answer may come from upstream.
            Walk::Forward(_) | Walk::Alias(..) => {
                let key = key();
                let found = self.cached(query.name(), &key, now);
                let verify = self
                    .cache
                    .as_ref()
                    .and_then(|c| c.spec().serve_stale)
                    .is_some_and(|s| s.verify);
                let (answer, ttl, refresh, source) = match found {
                    Found::Fresh {
                        answer,
                        ttl,
                        refresh,
                    } => (answer, ttl, refresh, Source::Cache),
                    Found::Stale { answer, refresh } if !verify => {
                        (answer, Some(0), refresh, Source::Stale)
                    }
                    Found::Stale { .. } | Found::Miss => return Handled::Resolve(job(key)),
                };
                answer.write(query, self.shape(ttl, seed), out);
                Handled::Answered {
                    source,
                    refresh: refresh.then(|| job(key)),
                }
            }
        }
    }

    /// The cache's word.
    pub(crate) fn cached(&self, name: &[u8], key: &Key, now: Duration) -> Found {
        match &self.cache {
            Some(cache) if cache.covers(name) => cache.get(key, now),
            _ => Found::Miss,
        }
    }

    fn shape(&self, ttl: Option<u32>, seed: u64) -> Shape {
        Shape {
            cap: self.cap,
            ttl,
            shuffle: self.shuffle.then_some(seed),
        }
    }

    /// Keeps what a resolution found; a failure gives way to a stale answer. Returns what the clients get and its TTL.
    pub fn settle(
        &self,
        job: &Job,
        answer: Arc<Answer>,
        now: Duration,
    ) -> (Arc<Answer>, Option<u32>) {
        let Some(cache) = self.cache.as_ref().filter(|c| c.covers(&job.name)) else {
            return (answer, None);
        };
        if answer.rcode() == rcode::SERVFAIL {
            let stale = cache
                .spec()
                .serve_stale
                .and_then(|_| cache.get_stale(&job.key, now));
            // After the look, which itself counts as the one that orders a refresh.
            cache.refresh_failed(&job.key);
            if let Some(stale) = stale {
                return (stale, Some(0));
            }
        }
        let ttl = cache.put(&job.key, &job.name, &answer, now);
        (answer, ttl)
    }

    /// Writes a resolution's answer to one of its clients.
    pub fn write(
        &self,
        query: &Query<'_>,
        answer: &Answer,
        ttl: Option<u32>,
        seed: u64,
        out: &mut Vec<u8>,
    ) {
        answer.write(query, self.shape(ttl, seed), out);
    }

    /// Goes along the links until one answers.
    pub(crate) fn walk(
        &self,
        query: &Query<'_>,
        profile: Profile,
        scene: &Scene<'_>,
        out: &mut Vec<u8>,
    ) -> Walk {
        let name = query.name();
        if let Some(spec) = &self.dns64 {
            if let Some(m) = ipv4only(spec, name, query.qtype) {
                write_message(query, &m, out);
                return Walk::Answered(Source::Dns64);
            }
            if query.qtype == rtype::PTR
                && may_synthesise(profile)
                && let Some((record, target)) = reverse(spec, name)
            {
                return Walk::Alias(record, target);
            }
        }
        for link in &self.links {
            match link {
                Link::Hosts(spec, table) => match self.hosts(query, profile, spec, table, out) {
                    true => return Walk::Answered(Source::Hosts),
                    false => continue,
                },
                Link::Kubernetes(spec, at) => match scene.snapshots[*at].answer(query, spec, out) {
                    Said::Answered => return Walk::Answered(Source::Kubernetes),
                    Said::Alias { target, ttl } => {
                        let record = Record::new(name, rtype::CNAME, ttl, target.wire().to_vec());
                        return Walk::Alias(record, target.wire().to_vec());
                    }
                    Said::Next => {}
                },
                Link::Loop(probe) => {
                    if query.qtype == rtype::HINFO
                        && name == probe.name
                        && probe.seen.fetch_add(1, Ordering::Relaxed) >= LOOP_SEEN
                    {
                        return Walk::Loop;
                    }
                }
                Link::Forward(spec, at) => {
                    let within =
                        |zones: &[DnsName]| zones.iter().any(|z| wire_is_within(name, z.wire()));
                    if within(&spec.from) && !within(&spec.except) {
                        return Walk::Forward(*at);
                    }
                }
                Link::Whoami => {
                    whoami(query, scene.client, out);
                    return Walk::Answered(Source::Whoami);
                }
            }
        }
        Walk::Nobody
    }

    fn hosts(
        &self,
        query: &Query<'_>,
        profile: Profile,
        spec: &HostsSpec,
        table: &Hosts,
        out: &mut Vec<u8>,
    ) -> bool {
        let name = query.name();
        let record = |t, data: &[u8]| Record::new(name, t, spec.ttl, data.to_vec());
        let mut m = Message::empty(name, query.qtype, rcode::NOERROR);
        m.flags = flag::QR | flag::AA;
        match (table.get(name, spec), query.qtype) {
            (Some(Entry::Addresses(v4, _)), rtype::A) => {
                m.answers = v4.iter().map(|a| record(rtype::A, &a.octets())).collect()
            }
            (Some(Entry::Addresses(v4, v6)), rtype::AAAA) => {
                let native = self.dns64.as_ref().is_none_or(|d| !d.translate_all) && !v6.is_empty();
                m.answers = match &self.dns64 {
                    Some(d) if !native && may_synthesise(profile) => v4
                        .iter()
                        .flat_map(|a| synthesise_addresses(d, *a))
                        .map(|a| record(rtype::AAAA, &a.octets()))
                        .collect(),
                    _ => v6
                        .iter()
                        .map(|a| record(rtype::AAAA, &a.octets()))
                        .collect(),
                }
            }
            (Some(Entry::Names(names)), rtype::PTR) => {
                m.answers = names.iter().map(|n| record(rtype::PTR, n.wire())).collect()
            }
            // CoreDNS: only names without the type asked for end here; unknown names go on where that was asked for.
            (Some(Entry::Addresses(..)), _) => {}
            _ => return false,
        }
        if m.answers.is_empty() && spec.fallthrough.covers(name) {
            return false;
        }
        write_message(query, &m, out);
        true
    }
}

fn probe(zones: &[DnsName], materials: &mut dyn Materials) -> Probe {
    let mut name = Vec::new();
    for _ in 0..2 {
        let text = materials.seed().to_string();
        name.push(text.len() as u8);
        name.extend_from_slice(text.as_bytes());
    }
    name.extend_from_slice(zones.first().map_or(&[0], |z| z.wire()));
    Probe {
        name,
        seen: AtomicU32::new(0),
    }
}

/// Writes a message made here, with the client's own question.
fn write_message(query: &Query<'_>, m: &Message, out: &mut Vec<u8>) {
    begin(query, m.flags & (flag::AA | flag::RCODE), out);
    let mut compressor = Compressor::question(query.name());
    for record in &m.answers {
        let before = out.len();
        compressor.record(record, out);
        if out.len() > MAX_MESSAGE - 11 {
            out.truncate(before);
            break;
        }
        let count = u16::from_be_bytes([out[6], out[7]]);
        put_u16(out, 6, count + 1);
    }
}

/// CoreDNS's `whoami`: the client's address and port in the additional section.
fn whoami(query: &Query<'_>, client: Option<SocketAddr>, out: &mut Vec<u8>) {
    begin(query, flag::AA, out);
    let Some(client) = client else { return };
    let owner = [0xc0, HEADER as u8];
    let mut record = |owner: &[u8], t: u16, data: &[u8]| {
        out.extend_from_slice(owner);
        out.extend_from_slice(&t.to_be_bytes());
        out.extend_from_slice(&[0, 1, 0, 0, 0, 0]);
        out.extend_from_slice(&(data.len() as u16).to_be_bytes());
        out.extend_from_slice(data);
    };
    match client.ip().to_canonical() {
        IpAddr::V4(a) => record(&owner, rtype::A, &a.octets()),
        IpAddr::V6(a) => record(&owner, rtype::AAAA, &a.octets()),
    }
    let proto: &[u8] = match query.transport {
        crate::Transport::Udp => b"\x04_udp",
        crate::Transport::Tcp => b"\x04_tcp",
    };
    let [high, low] = client.port().to_be_bytes();
    record(
        &[proto, &owner].concat(),
        rtype::SRV,
        &[0, 0, 0, 0, high, low, 0],
    );
    put_u16(out, 10, 2);
}
