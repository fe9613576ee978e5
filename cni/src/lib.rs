//! The CNI shell: netlink, namespaces, the durable store, and the IPAM service that the agent embeds.
//!
//! The plugin is a process per verb and synchronous throughout; the agent embeds [`ipam::IpamService`], which commits many
//! requests with one flush. Both stand on one store, which one process has open at a time.

#![forbid(unsafe_code)]

mod addresses;
pub mod allocator;
mod alone;
mod attach;
pub mod clock;
mod delegate;
pub mod disk;
mod early;
pub mod install;
pub mod ipam;
pub mod keeper;
pub mod kernel;
pub mod look;
mod lost;
mod namespaces;
pub mod netlink;
pub mod netns;
pub mod plugin;
pub mod rebuild;
mod rows;
pub mod spool;
pub mod store;
mod turn;

pub use kun_cni_core::claims;
use kun_cni_core::names;
pub use kun_cni_core::watermark;
use kun_config::Interfaces;
use kun_config::types::SlotClass;
use kun_control::AttachmentKey;

/// The host-side interface names of an attachment, IPv6's first: one, or two for a dual pod with split interfaces.
pub fn host_interface_names(
    key: &AttachmentKey,
    class: SlotClass,
    interfaces: Interfaces,
) -> Vec<String> {
    let key = ipam::core_key(key);
    names::pairs(class, interfaces)
        .iter()
        .map(|carries| names::host_name(&key, *carries))
        .collect()
}
