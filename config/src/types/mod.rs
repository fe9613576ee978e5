//! The domain's small types: each holds one fact and cannot hold a wrong one.

mod slot;

pub use slot::{BLOCK_SLOTS, BlockId, PodPrefix, Slot, SlotClass};
