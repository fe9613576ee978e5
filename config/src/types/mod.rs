//! The domain's small types: each holds one fact and cannot hold a wrong one.

mod dns_name;
mod pref64;
mod slot;

pub use dns_name::{DnsName, NameError, wire_is_within};
pub use pref64::{Pref64, Pref64Error};
pub use slot::{BLOCK_SLOTS, BlockId, PodPrefix, Slot, SlotClass};
