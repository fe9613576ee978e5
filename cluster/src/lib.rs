//! The cluster as every program sees it: one atomic first snapshot, then typed deltas, with `Synced` explicit.
//!
//! Types hold only the fields that kun reads. Two sources, one contract: a folder of manifests here, the Kubernetes API beside
//! it. Nobody acts on half a view: before [`Event::Synced`] a consumer only collects.

#![forbid(unsafe_code)]

pub mod folder;

mod kubernetes;
mod model;
mod store;

pub use kubernetes::{Manifest, ServiceAddress};

pub use model::*;
pub use store::Store;
