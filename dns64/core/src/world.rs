//! Everything that answers at one moment: listeners, zones, chains and snapshots. Immutable: a reload or a change in the cluster
//! makes the next one.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use foldhash::fast::FixedState;
use kun_config::corefile::{Corefile, Forward, Kubernetes, PodMode};

use crate::chain::{Chain, Collected, Handled, Materials, Scene, Source};
use crate::cluster::ClusterView;
use crate::kubernetes::Snapshot;
use crate::query::{Query, Reject, Transport, reject};
use crate::wire::{rcode, rtype};

/// Where queries come in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Listen {
    /// `None`: every address.
    pub address: Option<IpAddr>,
    /// Port, UDP and TCP.
    pub port: u16,
}

#[derive(Debug)]
struct Routes {
    listens: Vec<Listen>,
    /// For each listener: zone to chain.
    zones: Vec<HashMap<Box<[u8]>, usize, FixedState>>,
    chains: Vec<Arc<Chain>>,
    kubernetes: Vec<Kubernetes>,
    forwards: Vec<Forward>,
}

/// The whole.
#[derive(Debug, Clone)]
pub struct World {
    routes: Arc<Routes>,
    snapshots: Vec<Arc<Snapshot>>,
}

impl World {
    /// Builds from a Corefile and the cluster as far as it is known; caches of unchanged blocks of `old` live on.
    pub fn new(
        corefile: &Corefile,
        old: Option<&World>,
        view: &ClusterView,
        materials: &mut dyn Materials,
    ) -> Self {
        let mut collected = Collected::default();
        let mut listens: Vec<Listen> = Vec::new();
        let mut zones: Vec<HashMap<Box<[u8]>, usize, FixedState>> = Vec::new();
        let mut chains = Vec::new();
        for (i, block) in corefile.servers.iter().enumerate() {
            let before = old.and_then(|o| {
                o.routes
                    .chains
                    .iter()
                    .find(|c| c.block.zones == block.zones && c.block.bind == block.bind)
            });
            chains.push(Arc::new(Chain::new(
                block,
                before.map(|c| &**c),
                materials,
                &mut collected,
            )));
            let addresses: Vec<Option<IpAddr>> = match &block.bind[..] {
                [] => vec![None],
                some => some.iter().copied().map(Some).collect(),
            };
            for zone in &block.zones {
                for address in &addresses {
                    let listen = Listen {
                        address: *address,
                        port: zone.port,
                    };
                    let at = listens
                        .iter()
                        .position(|l| *l == listen)
                        .unwrap_or_else(|| {
                            listens.push(listen);
                            zones.push(HashMap::with_hasher(FixedState::with_seed(
                                materials.seed(),
                            )));
                            listens.len() - 1
                        });
                    zones[at].insert(zone.zone.wire().into(), i);
                }
            }
        }
        let world = Self {
            routes: Arc::new(Routes {
                listens,
                zones,
                chains,
                kubernetes: collected.kubernetes,
                forwards: collected.forwards,
            }),
            snapshots: Vec::new(),
        };
        world.with_cluster(view)
    }

    /// The same with the names of a newer cluster.
    pub fn with_cluster(&self, view: &ClusterView) -> Self {
        Self {
            routes: self.routes.clone(),
            snapshots: self
                .routes
                .kubernetes
                .iter()
                .map(|spec| Arc::new(Snapshot::build(view, spec)))
                .collect(),
        }
    }

    /// Where to listen; the index is what [`World::handle`] takes.
    pub fn listens(&self) -> &[Listen] {
        &self.routes.listens
    }

    /// All chains.
    pub fn chains(&self) -> &[Arc<Chain>] {
        &self.routes.chains
    }

    /// All `forward` directives; the index is [`crate::Ask::forward`].
    pub fn forwards(&self) -> &[Forward] {
        &self.routes.forwards
    }

    /// Whether names of the cluster are served.
    pub fn wants_cluster(&self) -> bool {
        !self.routes.kubernetes.is_empty()
    }

    /// Whether some of them need every Pod.
    pub fn wants_pods(&self) -> bool {
        self.routes
            .kubernetes
            .iter()
            .any(|spec| spec.pods == PodMode::Verified)
    }

    /// Whether every snapshot holds a complete cluster.
    pub fn synced(&self) -> bool {
        self.snapshots.iter().all(|s| s.synced())
    }

    /// Names of the cluster, over all snapshots.
    pub fn names(&self) -> usize {
        self.snapshots.iter().map(|s| s.len()).sum()
    }

    pub(crate) fn scene(&self, client: Option<SocketAddr>) -> Scene<'_> {
        Scene {
            snapshots: &self.snapshots,
            client,
        }
    }

    /// The chain of the longest zone that `name` is in. A DS record lives in the parent zone (RFC 4035 §3.1.4.1).
    pub(crate) fn route(&self, listen: usize, name: &[u8], qtype: u16) -> Option<&Arc<Chain>> {
        let zones = self.routes.zones.get(listen)?;
        let mut own = None;
        let mut at = 0;
        loop {
            if let Some(&chain) = zones.get(&name[at..]) {
                if at > 0 || qtype != rtype::DS {
                    return Some(&self.routes.chains[chain]);
                }
                own = Some(&self.routes.chains[chain]);
            }
            match name[at] {
                0 => return own,
                n => at += 1 + usize::from(n),
            }
        }
    }

    /// Answers one message that came in by listener `listen`. `now` counts from any fixed moment; `seed` is any number.
    #[allow(
        clippy::too_many_arguments,
        reason = "the wire, where it came from, and what a core may not ask for itself"
    )]
    pub fn handle(
        &self,
        listen: usize,
        wire: &[u8],
        transport: Transport,
        client: SocketAddr,
        now: Duration,
        seed: u64,
        out: &mut Vec<u8>,
    ) -> Handled {
        let nobody = Handled::Answered {
            source: Source::Nobody,
            refresh: None,
        };
        let query = match Query::parse(wire, transport) {
            Ok(query) => query,
            Err(Reject::Silent) => return Handled::Dropped,
            Err(Reject::Rcode(code)) => {
                reject(wire, code, out);
                return nobody;
            }
        };
        match self.route(listen, query.name(), query.qtype) {
            Some(chain) => chain.handle(listen, &query, &self.scene(Some(client)), now, seed, out),
            None => {
                reject(wire, rcode::REFUSED, out);
                nobody
            }
        }
    }

    /// The chain that logs a query.
    pub fn chain_of(&self, listen: usize, query: &Query<'_>) -> Option<&Arc<Chain>> {
        self.route(listen, query.name(), query.qtype)
    }
}
