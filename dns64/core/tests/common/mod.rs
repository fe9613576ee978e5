//! A whole server without sockets: a Corefile, manifests, and upstreams that are a table.
#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    reason = "each test binary uses its part"
)]

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hickory_proto::op::{Message as Hickory, MessageType, OpCode, Query as Question};
use hickory_proto::rr::{Name, RecordType};
use kun_cluster_core::{Delta, Event};
use kun_config::corefile::{Alone, Hosts, parse};
use kun_dns_core::chain::{Handled, Materials};
use kun_dns_core::message::Message;
use kun_dns_core::{Answer, ClusterView, Query, Resolution, Transport, World};

/// What upstreams say: (name, type) to a message, or `None` for silence.
pub type Upstream = HashMap<(Vec<u8>, u16), Message>;

pub struct Server {
    pub world: World,
    pub upstream: RefCell<Upstream>,
    /// How many questions went upstream.
    pub asked: RefCell<Vec<(Vec<u8>, u16)>>,
    pub now: RefCell<Duration>,
}

struct Fixed(u64);

impl Materials for Fixed {
    fn hosts_text(&mut self, _: &Hosts) -> String {
        "192.0.2.1 h.example.org\n2001:db8::1 dual.example.org\n192.0.2.2 dual.example.org\n8.8.4.4 v4.example.org\n".to_owned()
    }
    fn seed(&mut self) -> u64 {
        self.0 += 1;
        self.0
    }
}

impl Server {
    pub fn new(corefile: &str, manifests: &str) -> Self {
        let manifest =
            kun_cluster_core::parse_manifest("m.yaml", manifests).expect("good manifests");
        let mut view = ClusterView::default();
        view.apply(&Event::Deltas(
            manifest.objects.into_iter().map(Delta::Upsert).collect(),
        ));
        view.apply(&Event::Synced);
        Self::with(corefile, &view)
    }

    pub fn plain(corefile: &str) -> Self {
        Self::new(corefile, "")
    }

    pub fn unsynced(corefile: &str) -> Self {
        Self::with(corefile, &ClusterView::default())
    }

    fn with(corefile: &str, view: &ClusterView) -> Self {
        let corefile = parse("Corefile", corefile, &Alone).expect("a good Corefile");
        Self {
            world: World::new(&corefile, None, view, &mut Fixed(1)),
            upstream: RefCell::default(),
            asked: RefCell::default(),
            now: RefCell::new(Duration::from_secs(1000)),
        }
    }

    /// One query to its end: what the client receives, `None` for nothing.
    pub fn exchange(&self, wire: &[u8], transport: Transport, client: &str) -> Option<Vec<u8>> {
        let client: SocketAddr = client.parse().expect("an address");
        let now = *self.now.borrow();
        let mut out = Vec::new();
        let (answered, job) = match self
            .world
            .handle(0, wire, transport, client, now, 42, &mut out)
        {
            Handled::Dropped | Handled::Loop => return None,
            Handled::Answered { refresh, .. } => (Some(out.clone()), refresh),
            Handled::Resolve(job) => (None, Some(job)),
        };
        if let Some(job) = job {
            let mut r = Resolution::start(&job, &self.world, now);
            let asks = r.take_asks();
            self.asked
                .borrow_mut()
                .extend(asks.iter().map(|a| (a.name.clone(), a.qtype)));
            // The A reply first: the order must not matter.
            for ask in asks.iter().rev() {
                let reply = self
                    .upstream
                    .borrow()
                    .get(&(ask.name.clone(), ask.qtype))
                    .cloned();
                r.reply(ask.qtype, reply.ok_or_else(|| "i/o timeout".to_owned()));
            }
            let outcome = r.take_outcome().expect("all replies are in");
            let (answer, ttl): (Arc<Answer>, _) = job.chain.settle(&job, outcome.answer, now);
            if answered.is_none() {
                let query = Query::parse(wire, transport).expect("it was handled");
                job.chain.write(&query, &answer, ttl, 42, &mut out);
                return Some(out);
            }
        }
        answered
    }
}

/// A question's octets, made by hickory.
pub fn question(name: &str, t: RecordType) -> Vec<u8> {
    let mut m = Hickory::new(4711, MessageType::Query, OpCode::Query);
    m.metadata.recursion_desired = true;
    m.add_query(Question::query(
        Name::from_ascii(format!("{name}.")).expect("a name"),
        t,
    ));
    m.to_vec().expect("it encodes")
}

/// Asks over TCP from an IPv6 client.
pub fn ask(s: &Server, name: &str, t: RecordType) -> Hickory {
    let answer = s
        .exchange(&question(name, t), Transport::Tcp, "[2001:db8:c::1]:5000")
        .expect("an answer");
    let m = Hickory::from_vec(&answer).unwrap_or_else(|e| panic!("{name} {t}: {e}: {answer:?}"));
    assert_eq!(m.metadata.id, 4711);
    assert_eq!(
        m.queries[0].name().to_string(),
        format!("{name}."),
        "the question comes back as it was written"
    );
    m
}

/// Answer records as `owner ttl type data`.
pub fn answer_texts(m: &Hickory) -> Vec<String> {
    m.answers
        .iter()
        .map(|r| format!("{} {} {} {}", r.name, r.ttl, r.record_type(), r.data))
        .collect()
}
