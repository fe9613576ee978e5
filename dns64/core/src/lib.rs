//! The DNS server without its sockets: wire format, zones and chains, cache, Kubernetes records, DNS64 synthesis.
//!
//! Pure: time comes in as an argument, randomness as a seed, and what must be asked upstream goes out as [`Ask`]s of a
//! [`Resolution`]. One datagram goes through [`World::handle`]; what cannot be answered from memory comes back as a [`Job`].

#![forbid(unsafe_code)]

pub mod answer;
pub mod cache;
pub mod chain;
pub mod cluster;
pub mod dns64;
pub mod hosts;
pub mod kubernetes;
pub mod logline;
pub mod message;
pub mod query;
pub mod resolution;
pub mod wire;
pub mod world;

pub use answer::Answer;
pub use chain::{Chain, Handled, Job, Source};
pub use cluster::ClusterView;
pub use kubernetes::Snapshot;
pub use query::{Query, Reject, Transport};
pub use resolution::{Ask, Outcome, Resolution};
pub use world::{Listen, World};
