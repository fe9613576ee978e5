//! The service proxy shell: keeps a dataplane in step with the cluster, one batch of changes at a time.
//!
//! [`Proxy`] drives the planner of the core over any [`kun_proxy_core::Backend`]; [`EbpfBackend`] is the one over the eBPF maps.
//! Nothing is withdrawn before the cluster is synced, and an op that failed leads to reading the maps back, never to guessing.

mod ebpf;
mod sync;

pub use ebpf::EbpfBackend;
pub use sync::{Progress, Proxy};
