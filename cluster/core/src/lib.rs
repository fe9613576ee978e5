//! The cluster's objects as every program sees them: types that hold only the fields that kun reads, the one reading that makes them
//! from a tree, whoever wrote it, and the store that joins them. Pure: no source is opened here.

#![forbid(unsafe_code)]

pub mod crd;
mod kubernetes;
mod model;
mod store;

pub use crd::{
    BgpAdvertisement, BgpPeer, BgpRouteAffinity, BgpSession, BrakeOverride, IpPool, IpamBlock,
    KunService,
};
pub use kubernetes::{Interner, Manifest, ServiceAddress, parse_manifest, parse_with};
pub use model::*;
pub use store::Store;
