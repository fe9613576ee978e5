//! The Kubernetes API as a source.

use std::path::Path;

use crate::{Event, Troubles, Wanted};

/// Why the API cannot be followed.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// Not built yet.
    #[error("cluster.kubernetes: this version reads manifests only; give cluster.folder")]
    NotBuilt,
}

/// The API server, as configured.
#[derive(Debug)]
pub struct ApiSource {}

impl ApiSource {
    /// `None`: the ServiceAccount of the pod.
    pub fn open(_kubeconfig: Option<&Path>) -> Result<Self, ApiError> {
        Err(ApiError::NotBuilt)
    }

    /// Follows what is wanted from a thread that hands each event to `on_event`, until that says `false` or the handle is dropped.
    pub fn spawn(
        self,
        _wanted: Wanted,
        _on_event: impl FnMut(Event) -> bool + Send + 'static,
    ) -> Result<Following, ApiError> {
        Err(ApiError::NotBuilt)
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
