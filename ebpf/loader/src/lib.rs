//! The only crate that knows aya: objects into the kernel, typed map handles, attach, pin, adopt.
//!
//! The BPF objects are part of the crate (`prebuilt/`, see `build.rs`). What the programs do is `kun_ebpf_abi`'s and
//! `ebpf/programs`'; this crate brings them into the kernel, keeps them there when the agent ends, and hands the next agent
//! what it finds. It decides nothing about services: callers write the maps.

mod bandwidth;
mod error;
mod features;
mod filters;
mod hook;
mod maps;
pub mod nat64;
mod object;
mod pins;
mod service;
mod sys;

pub use bandwidth::{BUCKETS, BandwidthDataplane};
pub use error::Error;
pub use features::{Features, Missing};
pub use hook::{HookError, Mechanism};
pub use maps::{Capacities, Expired, FlowRecords, PeerWay, ServiceMaps};
pub use nat64::{Nat64Config, Nat64Dataplane, Nat64Error, Nat64Stats, Nat64Warning};
pub use object::{Adopted, FIRST_FILTERS, LAST_FILTERS};
pub use pins::{KeptCapacity, remove_other_versions};
pub use service::{Hook, ServiceConfig, ServiceDataplane};
pub use sys::{Ran, account_run_time};

/// Name of the counters' map in every object.
const REASONS_MAP: &str = "reasons";
