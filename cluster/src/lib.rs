//! The cluster as every program sees it: one atomic first snapshot, then typed deltas, with `Synced` explicit.
//!
//! Types hold only the fields that kun reads (`kun-cluster-core`). Two sources, one contract: a folder of manifests, the Kubernetes
//! API. Nobody acts on half a view: before [`Event::Synced`] a consumer only collects.

#![forbid(unsafe_code)]

pub mod api;
pub mod blocks;
pub mod folder;
mod source;

pub use kun_cluster_core::*;
pub use source::{Following, Source, SourceError, Troubles};
