//! The cluster source: every event into the store, to the dataplane, and, where it is about blocks, to the addresses.

use std::collections::HashSet;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use kun_cluster::crd::ipv4_by_default;
use kun_cluster::{
    Delta, Event, Following, Kind, Object, Reached, Source, SourceError, Store, Troubles, Wanted,
};
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
    // The last two are few and change rarely: what pods without a word of their own get.
    let wanted = Wanted::new().all([
        Kind::Service,
        Kind::EndpointSlice,
        Kind::Namespace,
        Kind::IpPool,
    ]);
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

#[cfg(test)]
mod tests {
    use kun_cluster::folder::parse_manifest;

    use super::*;

    const WAITED: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 64, 0, 5));

    /// A slice with these endpoints.
    fn slice(endpoints: &str) -> Delta {
        let text = format!(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: s, namespace: shop, labels: {{kubernetes.io/service-name: s}}}}\n\
             addressType: IPv4\nports: [{{name: '', port: 80}}]\nendpoints: [{endpoints}]\n"
        );
        let mut objects = parse_manifest("slice.yaml", &text).unwrap().objects;
        Delta::Upsert(objects.remove(0))
    }

    fn reached(since: u64, changed: u64) -> Option<Reached> {
        Some(Reached {
            since,
            changed,
            at: changed,
        })
    }

    fn change(view: &View, delta: &Delta) {
        view.slices.lock().unwrap().change(delta);
    }

    fn reach(view: &View, reached: Option<Reached>) {
        view.slices.lock().unwrap().reach(reached);
    }

    fn look(view: &View) -> (Vec<IpAddr>, bool, Option<u64>) {
        let between = view.between_looks(&view.store(), [WAITED].into_iter());
        let touched = between.touched.into_iter().collect();
        (touched, between.listed_anew, between.revision)
    }

    #[test]
    fn an_address_that_came_and_went_between_two_looks_is_told_once() {
        let view = View::default();
        reach(&view, reached(1, 1));
        look(&view);
        assert_eq!(look(&view), (vec![], false, Some(1)));
        for endpoints in ["{addresses: [10.64.0.5]}, {addresses: [10.64.0.6]}", ""] {
            change(&view, &slice(endpoints));
        }
        assert_eq!(
            look(&view),
            (vec![WAITED], false, None),
            "nobody has said yet of which revision that is"
        );
        reach(&view, reached(1, 7));
        assert_eq!(look(&view), (vec![], false, Some(7)));
        // What is taken away is of a later revision as well.
        let name = kun_cluster::ObjectName::new("shop", "s");
        change(&view, &Delta::Remove(Kind::EndpointSlice, name));
        assert_eq!(look(&view), (vec![], false, None));
    }

    #[test]
    fn nobody_knows_what_was_between_two_lists() {
        let view = View::default();
        reach(&view, reached(1, 1));
        look(&view);
        reach(&view, reached(5, 5));
        assert_eq!(look(&view), (vec![], true, Some(5)));
        assert_eq!(look(&view), (vec![], false, Some(5)), "told once");
        // Cut off, and back: as another list, whichever it says.
        reach(&view, None);
        assert_eq!(look(&view), (vec![], false, None));
        reach(&view, reached(5, 5));
        assert_eq!(look(&view), (vec![], true, Some(5)));
    }
}
