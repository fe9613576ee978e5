//! The state of the addresses as rows, for `kunctl ipam`.

use std::collections::BTreeMap;
use std::time::Duration;

use ipnet::IpNet;
use kun_cni_core::ipam::{BootTime, Claim, Ipam, Record, SlotState, Standing};
use kun_config::types::{BlockId, PodPrefix, SlotClass};
use kun_control::{AttachmentKey, BlockRow, PodRef, PoolRow, SlotRow};

use crate::ipam::{control_key, control_pod, round_up};

/// The ranges that blocks come from, for people.
#[derive(Debug, Clone)]
pub(crate) struct Pools {
    dual: Vec<IpNet>,
    v6_only: Vec<IpNet>,
}

impl Pools {
    pub(crate) fn of(ipam: &kun_config::Ipam) -> Self {
        Self {
            dual: ipam.v4_pools.iter().map(|net| IpNet::V4(*net)).collect(),
            v6_only: vec![IpNet::V4(ipam.v6_only_pool)],
        }
    }
}

/// Slots that are not free, blocks, classes.
pub(crate) fn all(
    core: &Ipam,
    prefix: PodPrefix,
    pools: &Pools,
    now: BootTime,
) -> (Vec<SlotRow>, Vec<BlockRow>, Vec<PoolRow>) {
    let mut blocks: BTreeMap<BlockId, BlockRow> = core
        .claims()
        .map(|(block, claim)| (block, empty(core, block, claim)))
        .collect();
    let mut slots = Vec::new();
    for record in core.records() {
        let block = blocks.get_mut(&record.slot.block());
        let row = slot(core, record, prefix, now);
        if let (Some(block), Some(row)) = (block, &row) {
            block.free = block.free.saturating_sub(1);
            match row.state.as_str() {
                "allocated" => block.allocated += 1,
                _ => block.cooling += 1,
            }
        }
        slots.extend(row);
    }
    let blocks: Vec<BlockRow> = blocks
        .into_values()
        .filter(|block| block.owned || block.allocated + block.cooling > 0)
        .collect();
    let classes = [
        (SlotClass::Dual, &pools.dual),
        (SlotClass::V6Only, &pools.v6_only),
    ];
    let pools = classes.map(|(class, ranges)| {
        let census = core.census(class);
        let owned = core.owned().filter(|block| block.class() == class).count();
        PoolRow {
            class,
            ranges: ranges.clone(),
            blocks: u32::try_from(owned).unwrap_or(u32::MAX),
            wanted: 0,
            allocated: census.allocated,
            cooling: census.cooling,
            waiting: census.waiting,
            quarantined: census.quarantined,
            free: census.free,
        }
    });
    (slots, blocks, pools.into())
}

/// A block before its records are counted. Of one that is another node's by now nothing is free here.
fn empty(core: &Ipam, block: BlockId, claim: Claim) -> BlockRow {
    let owned = claim.is_owned();
    let standing = match claim.standing {
        Standing::Returned => "returned",
        Standing::Taken => "taken",
        Standing::Confirmed => "confirmed",
        Standing::Draining => "draining",
    };
    BlockRow {
        block,
        class: block.class(),
        owned,
        standing: standing.to_owned(),
        epoch: claim.epoch,
        allocated: 0,
        cooling: 0,
        free: if owned {
            core.rules().slots_per_block
        } else {
            0
        },
    }
}

fn slot(core: &Ipam, record: &Record, prefix: PodPrefix, now: BootTime) -> Option<SlotRow> {
    let mut why = core.why(record.slot).to_vec();
    let (state, since, free_in_secs) = match &record.state {
        SlotState::Free => return None,
        SlotState::Allocated { since, .. } => ("allocated", *since, None),
        SlotState::Quarantined { since, .. } => ("quarantined", *since, None),
        SlotState::Cooling { since, waived, .. } => {
            let left = core.remaining(*since, now);
            match left.is_zero() {
                // Its time has passed and nothing else is asked for, only no command came since.
                true if *waived || core.rules().needs == kun_cni_core::ipam::Needs::NONE => {
                    return None;
                }
                true => {
                    if why.is_empty() {
                        why.push("nobody has looked yet whether the network has forgotten it; the agent does".to_owned());
                    }
                    ("waiting", *since, None)
                }
                false => ("cooling", *since, Some(round_up(left))),
            }
        }
    };
    let owner = record.state.owner();
    Some(SlotRow {
        slot: record.slot,
        state: state.into(),
        generation: record.generation,
        v6: prefix.address(record.slot),
        v4: record.slot.v4(),
        key: owner.map_or_else(no_key, |owner| control_key(&owner.key)),
        pod: owner.map_or_else(PodRef::default, |owner| control_pod(&owner.pod)),
        free_in_secs,
        age_secs: Some(whole(now.since(since))),
        why,
    })
}

fn whole(duration: Duration) -> u64 {
    duration.as_secs()
}

/// A slot that cools because its block was somebody else's.
fn no_key() -> AttachmentKey {
    AttachmentKey {
        network: String::new(),
        container_id: String::new(),
        ifname: String::new(),
    }
}
