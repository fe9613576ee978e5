//! The cluster source: every event into the store, to the dataplane, and, where it is about blocks, to the addresses.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use kun_cluster::crd::ipv4_by_default;
use kun_cluster::{Delta, Event, Following, Kind, Source, SourceError, Store, Troubles, Wanted};
use kun_config::types::SlotClass;
use kun_config::{ClusterSource, Config};

use super::blocks::Blocks;
use super::dataplane::Message;

/// On a namespace, for its pods; on a pod the plugin reads it (`kun_cni_core::spec`).
const IPV4_ANNOTATION: &str = "kun.network/ipv4";

/// The cluster as the agent knows it.
#[derive(Debug, Default)]
pub(crate) struct View {
    store: Mutex<Store>,
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

    /// Whether the first snapshot is complete.
    pub(crate) fn synced(&self) -> bool {
        self.synced.load(Ordering::Acquire)
    }

    /// What a pod gets that says nothing of IPv4 itself: what its namespace says, else the pools of this node. `None`: neither does.
    pub(crate) fn class(&self, node: &str, namespace: &str) -> Option<SlotClass> {
        let store = self.store();
        let said = store.namespace(namespace).and_then(|namespace| {
            // Anything else is no word; the pod's own annotation is refused for less.
            match &**namespace.meta.annotations.get(IPV4_ANNOTATION)? {
                "true" => Some(true),
                "false" => Some(false),
                _ => None,
            }
        });
        let of_pools = || ipv4_by_default(store.pools(), &store.node(node)?.meta.labels);
        Some(match said.or_else(of_pools)? {
            true => SlotClass::Dual,
            false => SlotClass::V6Only,
        })
    }

    /// Whether manifests are missing that an earlier life may have known.
    pub(crate) fn partial(&self) -> bool {
        self.partial.load(Ordering::Acquire)
    }

    /// Whether every object is known that there is: an address that no object holds is then held by none.
    pub(crate) fn whole(&self) -> bool {
        self.synced() && !self.partial()
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

/// What a node looks at. Of nodes, pods and blocks, a node that asks the API reads its own: ten thousand that each read all would be
/// the API server's whole load. A folder is read whole in any case, and who else owns a block is told while it is partial.
fn wanted(config: &Config) -> Wanted {
    let own = [Kind::Node, Kind::Pod, Kind::IpamBlock];
    // The last two are few and change rarely: what pods without a word of their own get.
    let wanted = Wanted::new().all([
        Kind::Service,
        Kind::EndpointSlice,
        Kind::Namespace,
        Kind::IpPool,
    ]);
    match &config.cluster {
        ClusterSource::Folder(_) => wanted.all(own),
        ClusterSource::Kubernetes { .. } => own.into_iter().fold(wanted, |wanted, kind| {
            wanted.of_node(kind, &config.node.name)
        }),
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
            for delta in deltas {
                store.apply(delta.clone());
            }
            drop(store);
            if view.synced() && deltas.iter().any(about_blocks) {
                blocks.poke();
            }
        }
        Event::Synced => {
            view.synced.store(true, Ordering::Release);
            tracing::info!("the cluster is synced");
            blocks.first_round();
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
            blocks.poke();
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
