//! What the socket answers: addresses from the store, attachments and reasons from the dataplane, the status from everybody.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::{Duration, Instant};

use kun_cluster::{ObjectName, Protocol};
use kun_cni::ipam::IpamService;
use kun_cni::{clock, host_interface_names};
use kun_config::types::{Slot, SlotClass};
use kun_config::{Config, Interfaces};
use kun_control::{Allocation, AttachmentKey, Fact, Request, Response, Status, Traffic, WhyStep};
use kun_proxy_core::{Question, Reason};

use super::addresses::Leaks;
use super::announce::Announcer;
use super::attachments::Attachment;
use super::blocks::Blocks;
use super::cluster::View;
use super::condition::Left;
use super::dataplane::{Message, Report, fact};
use super::node;
use super::records::{Record, Records};
use super::watermark::Watermarks;

/// How long the dataplane may take: it looks at its queue between the changes of a few Services, and a grace period takes 13 ms.
const DATAPLANE_WITHIN: Duration = Duration::from_secs(10);

/// Everything that answers.
#[derive(Debug)]
pub(crate) struct Answers {
    pub(crate) config: Config,
    pub(crate) started: Instant,
    pub(crate) ipam: Arc<IpamService>,
    pub(crate) records: Records,
    pub(crate) view: Arc<View>,
    pub(crate) blocks: Arc<Blocks>,
    pub(crate) dataplane: SyncSender<Message>,
    pub(crate) announcer: Option<Arc<Announcer>>,
    pub(crate) kernel: Vec<Fact>,
    pub(crate) programmed: Arc<AtomicBool>,
    pub(crate) leaks: Leaks,
    /// Where the cluster is read from an API server.
    pub(crate) watermark: Option<Watermarks>,
    /// What the node's condition says.
    pub(crate) left: Left,
}

impl Answers {
    /// Answers one request.
    pub(crate) fn answer(&self, request: &Request) -> Response {
        match request {
            Request::Attached {
                key,
                host_interfaces,
                traffic,
            } => self.attached(key, host_interfaces, traffic),
            Request::Verify {
                key,
                host_interfaces,
                traffic,
            } => self.verify(key, host_interfaces, traffic),
            Request::Release { key, .. } => self.release(request, key),
            Request::Status => Response::Status {
                status: self.status(),
            },
            Request::Why {
                protocol,
                source,
                destination,
                port,
            } => self.why(protocol, *source, *destination, *port),
            Request::Allocate { .. } => self.allocate(request),
            Request::Class { namespace } => match self.class(namespace) {
                Some(class) => Response::Class { class },
                None => self.ipam.handle(request, clock::now()),
            },
            Request::Lookup { .. } => self.ipam.handle(request, clock::now()),
            Request::Capacity { class } => {
                let class = class.or_else(|| self.class(""));
                self.ipam.handle(&Request::Capacity { class }, clock::now())
            }
            Request::Ipam => self.ipam_rows(request),
            Request::Free {
                slot,
                generation,
                forced,
            } => self.free(*slot, *generation, *forced),
        }
    }

    /// Whoever gets nothing hears what became of the wish for more. Host ports are looked at before there is a slot, which would
    /// have to cool; another pod may still have taken one when `Attached` asks for it.
    fn allocate(&self, request: &Request) -> Response {
        if let Request::Allocate {
            key, pod, ports, ..
        } = request
            && !ports.is_empty()
        {
            let attachment = Box::new(Attachment::wish(key, pod, ports));
            match self.ask_dataplane(|reply| Message::Refuses { attachment, reply }) {
                Ok(None) => {}
                Ok(Some(refused)) => return failed(refused),
                Err(response) => return *response,
            }
        }
        let mut request = request.clone();
        if let Request::Allocate { class, pod, .. } = &mut request {
            *class = class.or_else(|| self.class(&pod.namespace));
        }
        let mut response = self.ipam.handle(&request, clock::now());
        if let Response::Exhausted { exhausted } = &mut response {
            self.blocks.poke();
            exhausted.more = self.blocks.more(exhausted.class, clock::now());
        }
        response
    }

    /// What a pod of this namespace gets that does not say; `None`: kun.yaml decides.
    fn class(&self, namespace: &str) -> Option<SlotClass> {
        self.view.class(&self.config.node.name, namespace)
    }

    fn ipam_rows(&self, request: &Request) -> Response {
        let mut response = self.ipam.handle(request, clock::now());
        if let Response::Ipam { pools, .. } = &mut response {
            for pool in pools {
                pool.wanted = self.blocks.counted(pool.class).wanted;
            }
        }
        response
    }

    /// Whether the first synced plan is in the kernel.
    pub(crate) fn programmed(&self) -> bool {
        self.programmed.load(Ordering::Acquire)
    }

    /// Only interfaces that are the attachment's own by name are touched: the socket is no way to put programs elsewhere.
    fn attachment(
        &self,
        key: &AttachmentKey,
        interfaces: &[String],
        traffic: &Traffic,
    ) -> Result<(Box<Attachment>, u64), Box<Response>> {
        let lookup = Request::Lookup { key: key.clone() };
        let allocation = match self.ipam.handle(&lookup, clock::now()) {
            Response::Allocation { allocation } => allocation,
            Response::Unknown => {
                return Err(Box::new(failed(format!(
                    "{}/{} has no address here; ADD begins with `allocate`",
                    key.container_id, key.ifname
                ))));
            }
            other => return Err(Box::new(other)),
        };
        let own = self.names(&allocation);
        if let Some(foreign) = interfaces.iter().find(|i| !own.contains(i)) {
            return Err(Box::new(failed(format!(
                "{foreign} is no interface of {}/{}: those are {}",
                key.container_id,
                key.ifname,
                own.join(", ")
            ))));
        }
        let attachment = Attachment::new(&allocation, interfaces.to_vec(), traffic.clone());
        Ok((Box::new(attachment), allocation.generation))
    }

    /// Asks the dataplane's thread.
    fn ask_dataplane<T>(
        &self,
        message: impl FnOnce(SyncSender<T>) -> Message,
    ) -> Result<T, Box<Response>> {
        let (reply, wait) = sync_channel(1);
        if self.dataplane.send(message(reply)).is_err() {
            return Err(Box::new(failed("the agent is stopping".into())));
        }
        wait.recv_timeout(DATAPLANE_WITHIN).map_err(|_| {
            Box::new(failed(format!(
                "the dataplane did not answer in {DATAPLANE_WITHIN:?}"
            )))
        })
    }

    fn attached(&self, key: &AttachmentKey, interfaces: &[String], traffic: &Traffic) -> Response {
        let (attachment, generation) = match self.attachment(key, interfaces, traffic) {
            Ok(attachment) => attachment,
            Err(response) => return *response,
        };
        match self.ask_dataplane(|done| Message::Attach { attachment, done }) {
            Ok(Ok(())) => {}
            Ok(Err(message)) => return failed(message),
            Err(response) => return *response,
        }
        // Done, then durable, then told: an ADD that is not told is undone by its plugin or by the runtime's DEL.
        let kept = if traffic.is_empty() {
            self.records.remove(key)
        } else {
            self.records.put(&Record {
                key: key.clone(),
                generation,
                traffic: traffic.clone(),
            })
        };
        match kept {
            Ok(()) => Response::Done,
            Err(error) => failed(error.to_string()),
        }
    }

    fn verify(&self, key: &AttachmentKey, interfaces: &[String], traffic: &Traffic) -> Response {
        let attachment = match self.attachment(key, interfaces, traffic) {
            Ok((attachment, _)) => attachment,
            Err(response) => return *response,
        };
        match self.ask_dataplane(|reply| Message::Verify { attachment, reply }) {
            Ok(missing) if missing.is_empty() => Response::Done,
            Ok(missing) => Response::NotAsExpected { missing },
            Err(response) => *response,
        }
    }

    /// Whoever has an address is told to the dataplane, which lets go of others: a release may have been somebody's who did not
    /// ask the agent.
    pub(crate) fn tell_live(&self) {
        if let Ok(live) = self.ipam.live(clock::now()) {
            let keys = live.into_iter().map(|a| a.key).collect();
            // Full: the thread is busy, and the next look is soon.
            let _ = self.dataplane.try_send(Message::Live(keys));
        }
    }

    fn release(&self, request: &Request, key: &AttachmentKey) -> Response {
        let response = self.ipam.handle(request, clock::now());
        // A late DEL of an older generation leaves the newer attachment alone.
        let lookup = Request::Lookup { key: key.clone() };
        if response == Response::Done
            && self.ipam.handle(&lookup, clock::now()) == Response::Unknown
        {
            let interfaces = host_interface_names(key, SlotClass::Dual, Interfaces::Split);
            // The agent may be stopping; the links go with the interfaces.
            let _ = self.dataplane.send(Message::Detach {
                key: key.clone(),
                interfaces,
            });
            if let Err(error) = self.records.remove(key) {
                tracing::warn!(%error, "a record that no allocation has any more stays");
            }
        }
        response
    }

    /// By hand. What a live pod has is not taken from it, unless the caller says so with the generation that it saw.
    fn free(&self, slot: Slot, generation: u64, forced: bool) -> Response {
        let now = clock::now();
        let live = match self.ipam.live(now) {
            Ok(live) => live.into_iter().find(|a| a.slot == slot),
            Err(e) => return failed(e.to_string()),
        };
        if let Some(allocation) = &live
            && !forced
        {
            let carrying: Vec<String> = self
                .names(allocation)
                .into_iter()
                .filter(|name| node::interface_index(name).is_some())
                .collect();
            if !carrying.is_empty() || allocation.delegated {
                let what = match allocation.delegated {
                    true => {
                        "another plugin made its interfaces, so nobody here knows whether it lives"
                            .to_owned()
                    }
                    false => format!("{} carries it", carrying.join(", ")),
                };
                return failed(format!(
                    "{slot} is pod {}/{}'s, container {}: {what}; delete the pod, or give --force",
                    allocation.pod.namespace, allocation.pod.name, allocation.key.container_id
                ));
            }
        }
        self.ipam.free(slot, generation, now)
    }

    /// The host-side interfaces that an allocation may have: `ipam.interfaces` may have been another when the pod was made, and the
    /// one interface of `shared` has the first name of `split`.
    pub(crate) fn names(&self, allocation: &Allocation) -> Vec<String> {
        let class = allocation.slot.class();
        host_interface_names(&allocation.key, class, Interfaces::Split)
    }

    fn why(
        &self,
        protocol: &str,
        source: Option<IpAddr>,
        destination: IpAddr,
        port: u16,
    ) -> Response {
        let protocol = match protocol.to_ascii_lowercase().as_str() {
            "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            "sctp" => Protocol::Sctp,
            other => return failed(format!("`{other}` is no protocol; say tcp, udp or sctp")),
        };
        let question = Question {
            protocol,
            source,
            external: source.is_some_and(|s| !self.is_inside(s)),
            destination,
            port,
        };
        match self.ask_dataplane(|reply| Message::Why { question, reply }) {
            Ok(reasons) => {
                let mut steps: Vec<WhyStep> = reasons.into_iter().map(|r| self.step(r)).collect();
                steps.extend(self.address(destination));
                Response::Why { steps }
            }
            Err(response) => *response,
        }
    }

    /// Pods and nodes are inside; everybody else comes through the uplink.
    fn is_inside(&self, address: IpAddr) -> bool {
        let ipam = &self.config.ipam;
        let pod = match address {
            IpAddr::V4(a) => ipam.v4_pools.iter().any(|p| p.contains(&a)),
            IpAddr::V6(a) => ipam.pod_prefix.slot(a).is_some(),
        };
        pod || self
            .view
            .store()
            .nodes()
            .any(|n| n.addresses.contains(&address))
    }

    /// The core knows Services and slices; the pod's own manifest is in the store.
    fn step(&self, reason: Reason) -> WhyStep {
        let source = reason.source.or_else(|| {
            let (namespace, name) = reason.object.split_once('/')?;
            let pod = (reason.what == "pod").then(|| ObjectName::new(namespace, name))?;
            let store = self.view.store();
            Some(store.pod(&pod)?.meta.origin.to_string())
        });
        WhyStep {
            what: reason.what.to_owned(),
            object: reason.object,
            detail: reason.detail,
            source,
        }
    }

    /// What is known of the destination besides Services: a pod's slot on this node, or an IPv4 address behind the translator.
    fn address(&self, destination: IpAddr) -> Vec<WhyStep> {
        let mut steps = Vec::new();
        let slot = match destination {
            IpAddr::V6(a) => self.config.ipam.pod_prefix.slot(a),
            IpAddr::V4(a) => Some(a.into()),
        };
        let live = self.ipam.live(clock::now()).unwrap_or_default();
        if let Some(allocation) = live.into_iter().find(|a| Some(a.slot) == slot) {
            let mut interfaces = self.names(&allocation);
            interfaces.retain(|name| node::interface_index(name).is_some());
            steps.push(WhyStep {
                what: "slot".into(),
                object: allocation.slot.to_string(),
                detail: format!(
                    "generation {}, pod {}/{}, container {}, interfaces {}",
                    allocation.generation,
                    allocation.pod.namespace,
                    allocation.pod.name,
                    allocation.key.container_id,
                    interfaces.join(", ")
                ),
                source: None,
            });
        }
        if let IpAddr::V6(a) = destination
            && let Some(pref64) = self.config.nat64.pref64.iter().find(|p| p.contains(&a))
            && pref64.prefix_len() == 96
        {
            let embedded = std::net::Ipv4Addr::from(u128::from(a) as u32);
            steps.push(WhyStep {
                what: "route".into(),
                object: pref64.to_string(),
                detail: format!("Pref64: a NAT64 gateway makes this {embedded}"),
                source: None,
            });
        }
        steps
    }

    fn status(&self) -> Status {
        let report = self.report();
        Status {
            node: self.config.node.name.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            uptime_secs: self.started.elapsed().as_secs(),
            cluster: self.cluster_facts(),
            proxy: report.proxy,
            ipam: self.ipam_facts(),
            nat64: report.nat64,
            bgp: self
                .announcer
                .as_ref()
                .map_or_else(Vec::new, |a| a.status()),
            kernel: self.kernel.clone(),
        }
    }

    fn report(&self) -> Report {
        let (reply, wait) = sync_channel(1);
        let silent = |what: &str| Report {
            proxy: vec![fact("state", what.to_owned(), false)],
            nat64: Vec::new(),
        };
        if self.dataplane.send(Message::Status { reply }).is_err() {
            return silent("stopping");
        }
        wait.recv_timeout(DATAPLANE_WITHIN)
            .unwrap_or_else(|_| silent("does not answer"))
    }

    fn cluster_facts(&self) -> Vec<Fact> {
        let synced = self.view.synced();
        let mut facts = vec![fact(
            "synced",
            if synced { "yes" } else { "no" }.to_owned(),
            synced,
        )];
        if let Some(trouble) = self.view.trouble() {
            facts.push(fact("trouble", trouble, false));
        }
        for (kind, count) in self.view.store().counts() {
            facts.push(fact(&format!("{kind:?}"), count.to_string(), true));
        }
        facts
    }

    fn ipam_facts(&self) -> Vec<Fact> {
        let now = clock::now();
        let mut facts = Vec::new();
        match self.ipam.blocks(now) {
            Ok(blocks) => facts.push(fact(
                "blocks",
                blocks
                    .iter()
                    .map(ToString::to_string)
                    .collect::<Vec<_>>()
                    .join(", "),
                !blocks.is_empty(),
            )),
            Err(e) => facts.push(fact("store", e.to_string(), false)),
        }
        for (name, class) in [("dual", SlotClass::Dual), ("v6-only", SlotClass::V6Only)] {
            if let Ok((allocated, cooling, free)) = self.ipam.counts(class, now) {
                facts.push(fact(
                    name,
                    format!("{allocated} allocated, {cooling} cooling, {free} free"),
                    true,
                ));
            }
        }
        facts.extend(self.watermark.iter().flat_map(Watermarks::facts));
        facts.extend(
            self.leaks
                .trouble()
                .map(|what| fact("namespace", what, false)),
        );
        facts.extend(
            self.blocks
                .trouble()
                .map(|what| fact("routes", what, false)),
        );
        facts
    }
}

fn failed(message: String) -> Response {
    Response::Failed { message }
}
