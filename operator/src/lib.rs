//! Gives nodes their IPAM blocks and LoadBalancer services their virtual addresses.
//!
//! An assignment never moves: not when its node or service goes, not when pools change. [`plan`] decides and is pure. What was decided
//! is remembered behind one seam ([`memory`]): [`generated`] holds it in two files of the manifest folder, [`claims`] in the objects
//! of the API server. [`run`] joins both to the cluster.
//!
//! In a folder there is no Service status to patch. The address of a Service is therefore an object of its own,
//! `ServiceAddress` of `kun.network/v1alpha1`, with the Service's namespace and name; the folder source merges it into the Service.
//!
//! Of several operators on one API server one acts: the holder of a Lease ([`lease`] decides, [`elect`] asks). It begins with nothing but
//! a fresh list of the cluster, every write says what it replaces ([`writes`]), and none begins that could end after its lease.

#![forbid(unsafe_code)]

pub mod claims;
pub mod elect;
pub mod events;
pub mod generated;
pub mod gone;
pub mod lease;
pub mod memory;
pub mod plan;
pub mod pools;
pub mod run;
pub mod watermark;
pub mod writes;
