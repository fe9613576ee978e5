//! Keeps routes and neighbour entries, of the node and of its pods, when somebody takes an end of a pod's pair down and up
//! again: the kernel drops them with the first and brings none back with the second.
//!
//! It listens for link messages of the node and acts only on interfaces that it saw going down or losing their carrier, so that
//! an ADD costs it nothing. The carrier of the node's end goes and comes with the pod's end; the kernel counts that, so that a
//! flap is seen even if both changes are told in one message. In the pod it enters a namespace only if the kernel's own record
//! of the pair leads there, and touches an interface only if index, name, hardware address and peer are those of the pair. It
//! puts back what is missing; what the pod has put there itself stays.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kun_cni_core::names::{Carries, host_name};
use kun_cni_core::plan::{self, Facts};
use kun_cni_core::spec::Wishes;
use kun_cni_core::tag;
use kun_config::{Config, Interfaces};
use kun_control::{AttachmentKey, Request, Response};

use crate::ipam::IpamService;
use crate::kernel::{KernelError, apply_on_node, complete_in_pod};
use crate::netlink::{Link, LinkChange, NetlinkError, Rtnl};
use crate::netns::Netns;
use crate::{attach, clock, namespaces};

/// Interfaces that a node's pods may have: two for each slot. Beyond, one more is not remembered.
const MAX_INTERFACES: usize = 2 * 64 * kun_cni_core::ipam::MAX_BLOCKS;

/// A pod may flap for ever, and each visit looks for its namespace among all: so often at most, all pods that wait together.
/// The first flap after a pause is answered at once.
const VISIT_EVERY: Duration = Duration::from_secs(1);

/// How long nothing need be done while no pod waits for a visit.
const IDLE: Duration = Duration::from_secs(60);

/// A new pair begins without carrier: that is its first loss, and no flap.
const AT_BIRTH: u32 = 1;

/// Starts the thread, in the caller's network namespace. It ends with the process.
pub fn start(ipam: Arc<IpamService>, config: Config) -> Result<(), NetlinkError> {
    let listening = Rtnl::listen_to_links()?;
    let asking = Rtnl::open()?;
    let keeper = Keeper {
        ipam,
        config,
        asking,
        down: BTreeSet::new(),
        losses: BTreeMap::new(),
        unvisited: BTreeSet::new(),
        visited: None,
    };
    std::thread::Builder::new()
        .name("kun-keeper".into())
        .spawn(move || keeper.run(listening))?;
    Ok(())
}

struct Keeper {
    ipam: Arc<IpamService>,
    config: Config,
    asking: Rtnl,
    /// The node's ends that are down.
    down: BTreeSet<u32>,
    /// How often their carriers were gone when they were last seen at work.
    losses: BTreeMap<u32, u32>,
    /// Whose pods' ends came back and were not looked at yet.
    unvisited: BTreeSet<u32>,
    visited: Option<Instant>,
}

impl Keeper {
    fn run(mut self, mut listening: Rtnl) {
        // Before the first message there may have been a flap that nobody saw.
        self.look_at_all();
        loop {
            match listening.link_changes(self.pause()) {
                Ok(changes) => changes.into_iter().for_each(|change| self.see(change)),
                Err(NetlinkError::Socket(e)) if e.kind() == io::ErrorKind::WouldBlock => {}
                // ENOBUFS: messages were lost.
                Err(_) => self.look_at_all(),
            }
            if !self.unvisited.is_empty() && self.pause().is_zero() {
                self.visit_pods();
            }
        }
    }

    /// Until pods may be visited.
    fn pause(&self) -> Duration {
        if self.unvisited.is_empty() {
            return IDLE;
        }
        match self.visited {
            Some(at) => VISIT_EVERY.saturating_sub(at.elapsed()),
            None => Duration::ZERO,
        }
    }

    fn see(&mut self, change: LinkChange) {
        match change {
            LinkChange::Gone(index) => {
                self.down.remove(&index);
                self.losses.remove(&index);
                self.unvisited.remove(&index);
            }
            LinkChange::Now(link) if link.up => {
                if self.down.remove(&link.index) {
                    self.restore(&link);
                }
                self.see_carrier(&link);
            }
            // One that is just being made has no tag yet.
            LinkChange::Now(link) => {
                if link.alias.is_some() && self.down.len() < MAX_INTERFACES {
                    self.down.insert(link.index);
                }
            }
        }
    }

    fn see_carrier(&mut self, link: &Link) {
        if !link.running || link.alias.as_deref().and_then(tag::key_in).is_none() {
            return;
        }
        let now = link.carrier_losses;
        let flapped = match self.losses.get(&link.index) {
            Some(before) => now != *before,
            None if self.losses.len() >= MAX_INTERFACES => return,
            None => now > AT_BIRTH,
        };
        self.losses.insert(link.index, now);
        if flapped {
            self.unvisited.insert(link.index);
        }
    }

    fn look_at_all(&mut self) {
        let links = match self.asking.links() {
            Ok(links) => links,
            Err(error) => {
                tracing::error!(%error, "links cannot be listed");
                return;
            }
        };
        self.down.clear();
        let there: BTreeSet<u32> = links.iter().map(|link| link.index).collect();
        self.losses.retain(|index, _| there.contains(index));
        self.unvisited.retain(|index| there.contains(index));
        for link in links {
            if link.up {
                self.restore(&link);
            }
            self.see(LinkChange::Now(link));
        }
    }

    /// Only what is tagged as ours and what the store knows.
    fn facts(&mut self, link: &Link) -> Option<Facts> {
        let alias = link.alias.as_deref().unwrap_or_default();
        let key = tag::key_in(alias)?;
        let generation = tag::generation_in(alias, &key)?;
        let lookup = Request::Lookup {
            key: AttachmentKey {
                network: key.network,
                container_id: key.container_id,
                ifname: key.ifname,
            },
        };
        let Response::Allocation { allocation } = self.ipam.handle(&lookup, clock::now()) else {
            return None;
        };
        // One that a later ADD of the same attachment has nothing to do with.
        if allocation.generation != generation {
            return None;
        }
        let wishes = Wishes {
            mac: tag::mac_in(alias),
            ..Wishes::default()
        };
        let mut facts = attach::facts(&allocation, &wishes, &self.config, link.mtu);
        facts.interfaces = self.layout(&facts);
        Some(facts)
    }

    /// In which layout the pod was made: `ipam.interfaces` may have been another then.
    fn layout(&mut self, facts: &Facts) -> Interfaces {
        if facts.v4.is_none() {
            return facts.interfaces;
        }
        match self.asking.link(&host_name(&facts.key, Carries::V4)) {
            Ok(Some(_)) => Interfaces::Split,
            Ok(None) => Interfaces::Shared,
            Err(_) => facts.interfaces,
        }
    }

    fn restore(&mut self, link: &Link) {
        let Some(facts) = self.facts(link) else {
            return;
        };
        let ops = plan::restore(&facts, &link.name);
        match apply_on_node(&mut self.asking, &ops) {
            Ok(()) | Err(KernelError::Gone { .. }) => {}
            Err(error) => tracing::warn!(interface = link.name, %error, "routes not restored"),
        }
    }

    /// All pods whose ends came back, in one search for their namespaces.
    fn visit_pods(&mut self) {
        let waiting = std::mem::take(&mut self.unvisited);
        let mut links = Vec::new();
        for index in waiting {
            // As it is now: it may have been removed, and its index be another's.
            if let Ok(Some(link)) = self.asking.link_by_index(index) {
                links.push(link);
            }
        }
        let wanted = links.iter().filter_map(|link| link.peer_netns).collect();
        let found = match namespaces::find(&mut self.asking, wanted) {
            Ok(found) => found,
            Err(error) => {
                tracing::warn!(%error, "pods' namespaces cannot be looked for");
                BTreeMap::new()
            }
        };
        for link in links {
            let Some(facts) = self.facts(&link) else {
                continue;
            };
            let netns = link.peer_netns.and_then(|id| found.get(&id));
            let done = match netns {
                Some(netns) => visit(netns, &link, &facts),
                None => Ok(Visit::NotFound),
            };
            match done {
                Ok(Visit::Done) | Err(KernelError::Gone { .. }) => {}
                Ok(Visit::NotFound) => tracing::warn!(
                    interface = link.name,
                    "its pod's end was down and came back; the pod's network namespace is not to be found, so its routes are not restored"
                ),
                Ok(Visit::Changed) => tracing::warn!(
                    interface = link.name,
                    "its pod's end was down and came back, and is not as it was made; it is left alone"
                ),
                // It is down again: its next coming up is told.
                Err(KernelError::Refused { source, .. })
                    if source.kind() == io::ErrorKind::NetworkDown => {}
                Err(error) => {
                    tracing::warn!(interface = link.name, %error, "the pod's routes are not restored");
                }
            }
        }
        self.visited = Some(Instant::now());
    }
}

/// What came of a visit.
enum Visit {
    Done,
    NotFound,
    Changed,
}

/// Completes the pod's end of the pair whose other end is `link`, if the interface there is that very one.
fn visit(netns: &Netns, link: &Link, facts: &Facts) -> Result<Visit, KernelError> {
    let pairs = facts.pairs();
    let Some(pair) = pairs.iter().find(|pair| pair.host == link.name) else {
        return Ok(Visit::Changed);
    };
    // The socket belongs to the pod's namespace; this thread is back before anything is asked.
    let mut rtnl = netns.inside(Rtnl::open)??;
    let theirs = match link.peer {
        Some(index) => rtnl.link_by_index(index)?,
        None => None,
    };
    let same = theirs.is_some_and(|theirs| {
        theirs.name == pair.pod && theirs.mac == pair.pod_mac.0 && theirs.peer == Some(link.index)
    });
    if !same {
        return Ok(Visit::Changed);
    }
    complete_in_pod(&mut rtnl, &plan::restore_in_pod(facts, &link.name))?;
    Ok(Visit::Done)
}
