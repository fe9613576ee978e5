//! The cluster source: every event into the store, to the dataplane, and, where it is about blocks, to the addresses.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use ipnet::IpNet;
use kun_cluster::{
    Delta, Event, Following, IpamBlock, Kind, Object, Reached, Source, SourceError, Store,
    Troubles, Wanted,
};
use kun_cni::clock;
use kun_cni::ipam::{IpamError, IpamService};
use kun_config::types::{BlockId, SlotClass};
use kun_config::{ClusterSource, Config};
use tokio::sync::watch;

use super::announce::Facts;
use super::dataplane::Message;
use super::routes::{self, RouteError};

/// spec.epoch of a block that never had another owner.
const FIRST_EPOCH: i64 = 1;

/// The cluster as the agent knows it.
#[derive(Debug, Default)]
pub(crate) struct View {
    store: Mutex<Store>,
    /// Locked while the store is, or after.
    slices: Mutex<Slices>,
    synced: AtomicBool,
    /// Manifests are missing that an earlier life may have known.
    partial: AtomicBool,
    troubles: OnceLock<Troubles>,
}

impl View {
    /// The objects, for questions.
    pub(crate) fn store(&self) -> MutexGuard<'_, Store> {
        // Applying a delta does not panic half-way in a way that would matter to a reader.
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What happened to these addresses in EndpointSlices since the last call, which named some of them, and which revision the
    /// store is of. Asks for the store, so that all of it is said of one state.
    pub(crate) fn between_looks(
        &self,
        _store: &Store,
        addresses: impl Iterator<Item = IpAddr>,
    ) -> Between {
        let mut slices = self.slices.lock().unwrap_or_else(PoisonError::into_inner);
        slices.waited = addresses.collect();
        Between {
            touched: std::mem::take(&mut slices.touched),
            listed_anew: std::mem::take(&mut slices.listed_anew),
            revision: slices.reached.map(|r| r.changed),
        }
    }

    /// Whether the first snapshot is complete.
    pub(crate) fn synced(&self) -> bool {
        self.synced.load(Ordering::Acquire)
    }

    /// Whether every object is known that there is: an address that no object holds is then held by none.
    pub(crate) fn whole(&self) -> bool {
        self.synced() && !self.partial.load(Ordering::Acquire)
    }

    /// metadata.uid of a Node that is looked at.
    pub(crate) fn node_uid(&self, name: &str) -> Option<Arc<str>> {
        let store = self.store();
        store.node(name).map(|node| Arc::clone(&node.meta.uid))
    }

    /// The same, and what its condition says.
    pub(crate) fn nics_left(&self, name: &str) -> Option<(Arc<str>, Option<bool>)> {
        let store = self.store();
        let node = store.node(name)?;
        Some((Arc::clone(&node.meta.uid), node.nics_left))
    }

    /// What the source complains about now: its first line, and how many there are more.
    pub(crate) fn trouble(&self) -> Option<String> {
        let now = self.troubles.get()?.now();
        let first = now.first()?;
        Some(match now.len() {
            1 => first.clone(),
            n => format!("{first} (and {} more)", n - 1),
        })
    }
}

/// What a look has to know of EndpointSlices besides what is in the store.
#[derive(Debug, Default)]
struct Slices {
    /// `None` while changes are in the store whose revision has not been told yet.
    reached: Option<Reached>,
    /// The list that the view began with.
    since: Option<u64>,
    /// Addresses that the last look was about. Bounded by the slots that cool.
    waited: HashSet<IpAddr>,
    /// Of these, the ones that a slice has named since: a look that finds them gone again must not take them for never there.
    touched: HashSet<IpAddr>,
    /// What was between two lists, nobody told.
    listed_anew: bool,
}

/// What happened since the last look.
#[derive(Debug, Default)]
pub(crate) struct Between {
    /// Addresses that were in a slice at some time.
    pub(crate) touched: HashSet<IpAddr>,
    /// All of them may have been.
    pub(crate) listed_anew: bool,
    /// Since which revision the store has been as it is: other nodes need not wait for a bookmark that this one has had.
    pub(crate) revision: Option<u64>,
}

impl Slices {
    /// Called with the store locked, before anybody else sees the change in it.
    fn change(&mut self, delta: &Delta) {
        match delta {
            Delta::Upsert(Object::EndpointSlice(slice)) => {
                self.reached = None;
                let named = slice.endpoints.iter().map(|e| e.address);
                self.touched
                    .extend(named.filter(|a| self.waited.contains(a)));
            }
            // What it had was in the store, or was touched, since the last look.
            Delta::Remove(Kind::EndpointSlice, _) => self.reached = None,
            Delta::Upsert(_) | Delta::Remove(..) => {}
        }
    }

    fn reach(&mut self, reached: Option<Reached>) {
        self.reached = reached;
        let since = reached.map(|r| r.since);
        self.listed_anew |= since.is_some() && since != self.since;
        // Unknown for a while: what comes next counts as another list.
        self.since = since;
    }
}

/// What a node looks at. Of nodes, pods and blocks, a node that asks the API reads its own: ten thousand that each read all would be
/// the API server's whole load. A folder is read whole in any case, and who else owns a block is told while it is partial.
fn wanted(config: &Config) -> Wanted {
    let own = [Kind::Node, Kind::Pod, Kind::IpamBlock];
    let wanted = Wanted::new().all([Kind::Service, Kind::EndpointSlice]);
    match &config.cluster {
        ClusterSource::Folder(_) => wanted.all(own),
        ClusterSource::Kubernetes { .. } => own
            .into_iter()
            .fold(wanted, |wanted, kind| {
                wanted.of_node(kind, &config.node.name)
            })
            .revisions_of(Kind::EndpointSlice),
    }
}

/// Follows the source until the returned handle is dropped.
pub(crate) fn follow(
    config: &Config,
    source: Source,
    view: Arc<View>,
    blocks: Arc<Blocks>,
    dataplane: SyncSender<Message>,
) -> Result<Following, SourceError> {
    let seen = Arc::clone(&view);
    let following = source.follow(wanted(config), move |event| {
        on_event(&event, &seen, &blocks);
        // Full: the dataplane is busy, and this source waits for it. Closed: the agent stops.
        dataplane.send(Message::Cluster(event)).is_ok()
    })?;
    view.troubles.get_or_init(|| following.troubles());
    Ok(following)
}

fn on_event(event: &Event, view: &View, blocks: &Blocks) {
    match event {
        Event::Deltas(deltas) => {
            let mut store = view.store();
            let mut slices = view.slices.lock().unwrap_or_else(PoisonError::into_inner);
            for delta in deltas {
                slices.change(delta);
                store.apply(delta.clone());
            }
            drop((slices, store));
            if view.synced() && deltas.iter().any(about_blocks) {
                blocks.refresh(view);
            }
        }
        Event::Synced => {
            view.synced.store(true, Ordering::Release);
            tracing::info!("the cluster is synced");
            blocks.refresh(view);
        }
        Event::Partial => {
            view.partial.store(true, Ordering::Release);
            tracing::warn!(
                "some manifests cannot be read: adopted services and blocks in no other manifest are kept until they can"
            );
        }
        Event::Whole => {
            view.partial.store(false, Ordering::Release);
            tracing::info!("all manifests are read: what none of them explains goes");
            blocks.refresh(view);
        }
        Event::Reached(_, reached) => {
            let mut slices = view.slices.lock().unwrap_or_else(PoisonError::into_inner);
            slices.reach(*reached);
        }
        Event::Trouble(what) => tracing::warn!("{what}"),
    }
}

/// Whose a block is, is said by the block and by which Node has our name now.
fn about_blocks(delta: &Delta) -> bool {
    let kind = match delta {
        Delta::Upsert(object) => object.kind(),
        Delta::Remove(kind, _) => *kind,
    };
    matches!(kind, Kind::IpamBlock | Kind::Node)
}

/// The blocks of this node: told to the address store, routed, announced.
#[derive(Debug)]
pub(crate) struct Blocks {
    config: Config,
    ipam: Arc<IpamService>,
    facts: Arc<watch::Sender<Facts>>,
    done: Mutex<Done>,
}

/// What stands.
#[derive(Debug, Default)]
struct Done {
    owned: Option<BTreeMap<BlockId, bool>>,
    routed: Option<BTreeSet<BlockId>>,
    failed: Option<String>,
}

/// Why blocks are not as they should be.
#[derive(Debug, thiserror::Error)]
enum BlocksError {
    #[error("the address store: {0}")]
    Ipam(#[from] IpamError),
    #[error(transparent)]
    Route(#[from] RouteError),
}

impl Blocks {
    /// Nothing is done before the cluster is synced.
    pub(crate) fn new(
        config: Config,
        ipam: Arc<IpamService>,
        facts: Arc<watch::Sender<Facts>>,
    ) -> Self {
        Self {
            config,
            ipam,
            facts,
            done: Mutex::default(),
        }
    }

    /// Brings store, routes and announcements to what the cluster says. Cheap when nothing changed; what failed is tried again by
    /// the next call.
    pub(crate) fn refresh(&self, view: &View) {
        if !view.synced() {
            return;
        }
        let mut done = self.lock();
        let failed = self
            .owned(view)
            .and_then(|owned| self.bring(&mut done, owned))
            .err()
            .map(|e| e.to_string());
        if let Some(what) = &failed
            && done.failed != failed
        {
            tracing::error!("blocks: {what}; trying again");
        }
        done.failed = failed;
    }

    /// The blocks that this node gives addresses from: its own, unless it is to return them. A Node that had this name before was another
    /// owner, whose blocks are not ours. While the view is partial also those that the store knew, unless a manifest gives them to another.
    /// With each, whether another node had it before: its addresses cool here before they are used.
    fn owned(&self, view: &View) -> Result<BTreeMap<BlockId, bool>, BlocksError> {
        let own = &self.config.node.name;
        let mut owned: BTreeMap<BlockId, bool> = {
            let store = view.store();
            let uid = store.node(own).map(|node| Arc::clone(&node.meta.uid));
            let ours = |block: &IpamBlock| match &block.spec.node_uid {
                Some(owner) => uid.as_ref().is_some_and(|uid| uid == owner.shared()),
                // In a folder a name is all there is.
                None => true,
            };
            let blocks = store
                .blocks_of(own)
                .filter(|block| ours(block) && !block.spec.draining);
            blocks
                .map(|block| (block.block(), block.spec.epoch > FIRST_EPOCH))
                .collect()
        };
        if view.partial.load(Ordering::Acquire) {
            let elsewhere: BTreeSet<BlockId> = view.store().blocks().map(|b| b.block()).collect();
            let known = self.ipam.blocks(clock::now())?;
            let kept = known.into_iter().filter(|b| !elsewhere.contains(b));
            for block in kept {
                owned.entry(block).or_insert(false);
            }
        }
        Ok(owned)
    }

    /// Whether there is any address to give.
    pub(crate) fn any(&self) -> bool {
        self.lock()
            .owned
            .as_ref()
            .is_some_and(|owned| !owned.is_empty())
    }

    /// What does not stand, for status.
    pub(crate) fn trouble(&self) -> Option<String> {
        self.lock().failed.clone()
    }

    fn bring(&self, done: &mut Done, owned: BTreeMap<BlockId, bool>) -> Result<(), BlocksError> {
        let now = clock::now();
        if done.owned.as_ref() != Some(&owned) {
            self.ipam.set_claims(&owned, now)?;
            tracing::info!(blocks = owned.len(), "blocks of this node");
            done.owned = Some(owned.clone());
        }
        // A block that is taken away while pods still live in it stays routed until the last one is gone.
        let mut routed: BTreeSet<BlockId> = owned.into_keys().collect();
        routed.extend(self.ipam.live(now)?.iter().map(|a| a.slot.block()));
        if done.routed.as_ref() == Some(&routed) {
            return Ok(());
        }
        routes::set(&self.nets(&routed))?;
        let list = routed.iter().copied().collect();
        self.facts.send_modify(|facts| facts.blocks = Some(list));
        done.routed = Some(routed);
        Ok(())
    }

    /// What has to end here: both halves of each block, and on a gateway the addresses that it translates to.
    fn nets(&self, blocks: &BTreeSet<BlockId>) -> BTreeSet<IpNet> {
        let prefix = self.config.ipam.pod_prefix;
        let v6 = blocks.iter().map(|b| IpNet::V6(b.v6(prefix)));
        let v4 = blocks
            .iter()
            .filter(|b| b.class() == SlotClass::Dual)
            .map(|b| IpNet::V4(b.v4()));
        let gateway = self.config.nat64.gateway.iter();
        let pool = gateway.flat_map(|g| g.pool.iter()).map(|p| IpNet::V4(*p));
        v6.chain(v4).chain(pool).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Done> {
        self.done.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
