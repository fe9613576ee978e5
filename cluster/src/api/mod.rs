//! The Kubernetes API as a source, and the door for what the operator writes to it.
//!
//! The protocol is `kun_cluster_core::watch`, which decides what to ask and what an answer means; here is a thread that asks. `kube`
//! carries requests: kubeconfig, TLS, tokens, plugins.

mod access;
mod body;
mod follow;
pub mod write;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use kube::config::{InClusterError, KubeconfigError};
use kun_config::yaml::documents;
use tokio::sync::Notify;

use access::Access;

use crate::watch::{Counts, Pace};
use crate::{Event, Interner, Kind, Object, Resource, Troubles, Wanted, read_api};

/// The object that the server answered a write with, read as a watch would.
pub fn read_answer(names: &mut Interner, kind: Kind, answer: &serde_json::Value) -> Option<Object> {
    let (title, text) = (Resource::of(kind).kind, answer.to_string());
    let trees = documents(title, &text).ok()?;
    read_api(names, kind, title, trees.first()?).object
}

/// Why the API cannot be followed.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// The kubeconfig is not there or not whole.
    #[error("{}: {}; {}", path.display(), access::one_line(.source), access::kubeconfig_wants(.source))]
    Kubeconfig {
        /// As configured.
        path: PathBuf,
        /// What is wrong.
        source: Box<KubeconfigError>,
    },
    /// Not in a pod, or in one without a ServiceAccount.
    #[error("cluster.kubernetes without a kubeconfig: {source}; {}", access::pod_wants(.source))]
    InCluster {
        /// What is wrong.
        source: Box<InClusterError>,
    },
    /// The credentials make no client: a certificate that is none, a plugin that fails.
    #[error("{origin}: no client for the API server: {source}")]
    Credentials {
        /// The kubeconfig, or the ServiceAccount.
        origin: String,
        /// What is wrong.
        source: Box<kube::Error>,
    },
    /// A credential plugin does not end.
    #[error("{origin}: the credential plugin gave nothing within {} s", within.as_secs())]
    Login {
        /// The kubeconfig.
        origin: String,
        /// How long it was given.
        within: Duration,
    },
    /// No thread or runtime to follow it.
    #[error("no thread to follow the API server ({0})")]
    Thread(#[source] io::Error),
}

/// The API server, as configured.
#[derive(Debug)]
pub struct ApiSource {
    access: Access,
    pace: Pace,
}

impl ApiSource {
    /// `None`: the ServiceAccount of the pod. Fails if that is not whole; a server that does not answer is a trouble for later.
    pub fn open(kubeconfig: Option<&Path>) -> Result<Self, ApiError> {
        let access = Access::open(kubeconfig)?;
        Ok(Self {
            access,
            pace: Pace::default(),
        })
    }

    /// In more or less of a hurry than is good for a large cluster.
    pub fn with_pace(mut self, pace: Pace) -> Self {
        self.access = self.access.connect_within(pace.answer_within);
        self.pace = pace;
        self
    }

    /// Follows what is wanted from a thread that hands each event to `on_event`, until that says `false` or the handle is dropped.
    pub fn spawn(
        self,
        wanted: Wanted,
        on_event: impl FnMut(Event) -> bool + Send + 'static,
    ) -> Result<Following, ApiError> {
        follow::spawn(self.access, self.pace, wanted, on_event)
    }
}

/// Tells a thread to stop.
#[derive(Debug, Default)]
struct Stop {
    set: AtomicBool,
    woken: Notify,
}

/// An API server that is followed by a thread; dropped, the thread ends after its current event.
#[derive(Debug)]
pub struct Following {
    stop: Arc<Stop>,
    troubles: Troubles,
    counts: Arc<Mutex<Vec<(Kind, Counts)>>>,
    // Not joined: `on_event` may be blocked in a full channel whose reader is the one who drops this.
    _thread: JoinHandle<()>,
}

impl Following {
    /// What is wrong now.
    pub fn troubles(&self) -> Troubles {
        self.troubles.clone()
    }

    /// What the watches have been through, by kind.
    pub fn counts(&self) -> Vec<(Kind, Counts)> {
        self.counts
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        self.stop.set.store(true, Ordering::Release);
        // Kept for a thread that is not waiting just now.
        self.stop.woken.notify_one();
    }
}
