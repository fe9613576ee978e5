//! The Kubernetes control plane for tests, which lives in the harness so that every crate's tests can have it.

pub use kun_harness::control_plane::*;
