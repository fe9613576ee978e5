//! What is said about addresses: why there is none, and the rows of `kunctl ipam`.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use kun_config::types::{BlockId, Slot, SlotClass};
use serde::{Deserialize, Serialize};

use crate::{AttachmentKey, PodRef};

/// Why there is no slot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Exhausted {
    /// Of this class.
    pub class: SlotClass,
    /// Seconds until the first cooling slot has rested long enough; `None`: none is cooling.
    pub retry_after_secs: Option<u64>,
    /// Slots in use.
    pub allocated: u32,
    /// Slots that rest.
    pub cooling: u32,
    /// Slots that have rested, and of which something still knows the last owner.
    #[serde(default)]
    pub waiting: u32,
    /// Slots that are kept back because evidence never came.
    #[serde(default)]
    pub quarantined: u32,
    /// Who has most of those in use, most first.
    #[serde(default)]
    pub holders: Vec<Holder>,
    /// What became of the wish for another block, one line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub more: Option<String>,
}

/// A namespace, and how many slots its pods have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// The namespace; for attachments of no pod, the CNI network.
    pub name: String,
    /// Slots.
    pub slots: u32,
}

impl fmt::Display for Exhausted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let class = match self.class {
            SlotClass::Dual => "dual (IPv4 and IPv6)",
            SlotClass::V6Only => "IPv6-only",
        };
        write!(
            f,
            "no {class} slot is free: {} allocated, {} cooling",
            self.allocated, self.cooling
        )?;
        if self.waiting > 0 {
            write!(f, ", {} not forgotten yet", self.waiting)?;
        }
        if self.quarantined > 0 {
            write!(f, ", {} quarantined", self.quarantined)?;
        }
        match self.retry_after_secs {
            Some(seconds) => write!(f, "; the next is free in {seconds} s")?,
            None if self.waiting > 0 => {
                f.write_str("; `kunctl ipam` says what still knows their addresses")?;
            }
            None if self.allocated + self.quarantined == 0 => f.write_str(
                "; this node has no block of them; is the agent running and did the operator give it one?",
            )?,
            None => f.write_str("; none is cooling; give the pool more blocks")?,
        }
        if let Some((first, more)) = self.holders.split_first() {
            write!(f, "; held by {} ({})", first.name, first.slots)?;
            for holder in more {
                write!(f, ", {} ({})", holder.name, holder.slots)?;
            }
        }
        if let Some(more) = &self.more {
            write!(f, "; {more}")?;
        }
        Ok(())
    }
}

/// A slot in `kunctl ipam`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SlotRow {
    /// The slot.
    pub slot: Slot,
    /// `allocated`, `cooling`, `waiting` (rested, not forgotten), `quarantined`.
    pub state: String,
    /// Generation.
    pub generation: u64,
    /// IPv6 address.
    pub v6: Ipv6Addr,
    /// IPv4 address of dual slots.
    pub v4: Option<Ipv4Addr>,
    /// Owner, or last owner.
    pub key: AttachmentKey,
    /// The pod.
    pub pod: PodRef,
    /// Cooling: seconds until it has rested long enough.
    pub free_in_secs: Option<u64>,
    /// Seconds since it was allocated or released, as far as this boot knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub age_secs: Option<u64>,
    /// Why it is not free yet, one line each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub why: Vec<String>,
}

/// A block in `kunctl ipam`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BlockRow {
    /// The block.
    pub block: BlockId,
    /// Its class.
    pub class: SlotClass,
    /// `false`: it was this node's, and slots of it are still in use or known.
    pub owned: bool,
    /// `confirmed`: given out from. `taken`: the node has it, and the API server has not heard so yet. `draining`: nothing more is given
    /// out. `returned`: it is not this node's any more.
    #[serde(default)]
    pub standing: String,
    /// The number of its owners so far.
    #[serde(default)]
    pub epoch: u64,
    /// Slots in use.
    pub allocated: u32,
    /// Slots that rest, wait or are quarantined.
    pub cooling: u32,
    /// Slots that are free.
    pub free: u32,
}

/// A class of slots in `kunctl ipam`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PoolRow {
    /// The class.
    pub class: SlotClass,
    /// The ranges that blocks of it come from.
    pub ranges: Vec<IpNet>,
    /// Blocks of this node.
    pub blocks: u32,
    /// Blocks that it wants to have in all; 0: it does not say.
    #[serde(default)]
    pub wanted: u32,
    /// Slots in use.
    pub allocated: u32,
    /// Slots that rest.
    pub cooling: u32,
    /// Slots that have rested and are not forgotten.
    pub waiting: u32,
    /// Slots that are kept back.
    pub quarantined: u32,
    /// Slots that are free.
    pub free: u32,
}
