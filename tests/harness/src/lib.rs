//! Network namespaces, processes, a Kubernetes control plane and skips for tests: everything a test makes is gone when it drops, panics included.
//!
//! What a killed test run could not remove is removed by the next one: every name carries the process id of its maker, and
//! the first namespace, cgroup or bpffs made in a process sweeps those of dead makers. No test sleeps: [`wait_for`] polls a
//! condition until a deadline. A test that cannot run says so with [`skip`], which also records it for `cargo xtask test`.

mod bpffs;
mod cgroup;
pub mod control_plane;
pub mod crowd;
mod names;
mod netns;
pub mod peers;
mod process;
mod skips;
mod wait;

pub use bpffs::BpfFs;
pub use cgroup::{Cgroup, cgroup_mounts, cgroup2_mount};
pub use control_plane::ControlPlane;
pub use netns::{Netns, enter, netns_names, veth};
pub use process::{Process, run};
pub use skips::{require_root, require_tool, skip};
pub use wait::{wait_for, wait_until};
