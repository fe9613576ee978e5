//! One door to the cluster, whichever source `kun.yaml` names: what a program wants to see goes in, events come out.
//!
//! Both sources keep one contract (`tests/tests/cluster_contract.rs`): the first snapshot is one event of deltas, then [`Event::Synced`];
//! after it, every event of deltas is a change that belongs together. Objects that were not wanted never appear.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};

use kun_config::ClusterSource;

use crate::api::{self, ApiError, ApiSource};
use crate::folder::{self, FolderError, FolderSource};
use crate::{Delta, Event, Kind, ObjectName, Scope, Wanted};

/// Lets through what is wanted of a source that reads everything.
#[derive(Debug)]
struct Lens {
    wanted: Wanted,
    /// Objects of kinds with a scope that were let through. Bounded by what one node has.
    seen: HashSet<(Kind, ObjectName)>,
}

impl Lens {
    fn new(wanted: Wanted) -> Self {
        Self {
            wanted,
            seen: HashSet::new(),
        }
    }

    /// What of an event is wanted; `None`: nothing.
    fn through(&mut self, event: Event) -> Option<Event> {
        let Event::Deltas(deltas) = event else {
            return Some(event);
        };
        let deltas: Vec<Delta> = deltas.into_iter().filter_map(|d| self.delta(d)).collect();
        (!deltas.is_empty()).then_some(Event::Deltas(deltas))
    }

    fn delta(&mut self, delta: Delta) -> Option<Delta> {
        let (kind, name) = match &delta {
            Delta::Upsert(object) => object.key(),
            Delta::Remove(kind, name) => (*kind, name.clone()),
        };
        match (self.wanted.scope(kind)?, &delta) {
            (Scope::All, _) => Some(delta),
            (_, Delta::Upsert(object)) if self.wanted.admits(object) => {
                self.seen.insert((kind, name));
                Some(delta)
            }
            // What leaves the scope is gone for whoever looks through it.
            (_, _) => {
                let key = (kind, name);
                self.seen
                    .remove(&key)
                    .then_some(Delta::Remove(key.0, key.1))
            }
        }
    }
}

/// Why there is no cluster.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The folder.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// The API.
    #[error(transparent)]
    Api(#[from] ApiError),
}

/// What is wrong now, for whoever asks: events tell each trouble once.
#[derive(Debug, Clone, Default)]
pub struct Troubles(Arc<Mutex<Vec<String>>>);

impl Troubles {
    /// One line each, sorted; empty when all is good.
    pub fn now(&self) -> Vec<String> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    pub(crate) fn set(&self, troubles: impl Iterator<Item = String>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = troubles.collect();
    }
}

/// The configured source, found to be there, not followed yet.
#[derive(Debug)]
pub enum Source {
    /// A folder of manifests.
    Folder(Box<FolderSource>),
    /// The Kubernetes API.
    Api(Box<ApiSource>),
}

impl Source {
    /// Finds the source. A folder has to be there; an API server may answer later.
    pub fn open(source: &ClusterSource) -> Result<Self, SourceError> {
        Ok(match source {
            ClusterSource::Folder(path) => Self::Folder(Box::new(FolderSource::open(path)?)),
            ClusterSource::Kubernetes { kubeconfig } => {
                Self::Api(Box::new(ApiSource::open(kubeconfig.as_deref())?))
            }
        })
    }

    /// Follows it from a thread that hands each event to `on_event`, until that says `false` or the handle is dropped. For tokio:
    /// `move |event| sender.blocking_send(event).is_ok()`.
    pub fn follow(
        self,
        wanted: Wanted,
        mut on_event: impl FnMut(Event) -> bool + Send + 'static,
    ) -> Result<Following, SourceError> {
        Ok(match self {
            Self::Folder(source) => {
                let mut lens = Lens::new(wanted);
                Following::Folder(
                    source.spawn(move |event| lens.through(event).is_none_or(&mut on_event))?,
                )
            }
            Self::Api(source) => Following::Api(source.spawn(wanted, on_event)?),
        })
    }
}

/// A source that is followed by a thread; dropped, the thread ends after its current event.
#[derive(Debug)]
pub enum Following {
    /// A folder.
    Folder(folder::Following),
    /// The API.
    Api(api::Following),
}

impl Following {
    /// What is wrong now.
    pub fn troubles(&self) -> Troubles {
        match self {
            Self::Folder(following) => following.troubles(),
            Self::Api(following) => following.troubles(),
        }
    }
}
