//! Gives nodes their IPAM blocks and LoadBalancer services their virtual addresses.
//!
//! An assignment never moves: not when its node or service goes, not when pools change. [`plan`] decides and is pure,
//! [`generated`] holds what was decided in two files of the manifest folder, [`run`] joins them to the cluster.
//!
//! In a folder there is no Service status to patch. The address of a Service is therefore an object of its own,
//! `ServiceAddress` of `kun.network/v1alpha1`, with the Service's namespace and name; the folder source merges it into the Service.

#![forbid(unsafe_code)]

pub mod generated;
pub mod lease;
pub mod plan;
pub mod run;
