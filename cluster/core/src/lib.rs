//! The cluster's objects as every program sees them: types that hold only the fields that kun reads, the one reading that makes them
//! from a tree, whoever wrote it, and the store that joins them. Pure: no source is opened here.

#![forbid(unsafe_code)]

pub mod crd;
mod interner;
mod kubernetes;
mod model;
mod resource;
mod service_address;
mod store;
mod wanted;
pub mod watch;
pub mod watermark;

pub use crd::{
    BgpAdvertisement, BgpPeer, BgpRouteAffinity, BgpSession, BrakeOverride, IpPool, IpamBlock,
    KunService,
};
pub use interner::Interner;
pub use kubernetes::{Manifest, Reading, parse_manifest, parse_with, parse_with_status, read_api};
pub use model::*;
pub use resource::{KUN_GROUP, KUN_VERSION, Resource};
pub use service_address::ServiceAddress;
pub use store::Store;
pub use wanted::{Scope, Wanted};
