//! IPAMBlock: a block of 64 slots and the node that owns it. The object is the claim: whoever creates or updates it under the
//! resourceVersion that it read has the block, and nobody else.
//!
//! How a block goes from hand to hand:
//!
//! 1. *Claim.* The operator creates `block-10-64-0-64` with `spec.first`, `node`, `nodeUID` and `epoch: 1`. The name follows from
//!    the block, so of two operators one is told `AlreadyExists`. The block is **Pending**.
//! 2. *Confirm.* The node's agent reads it, takes it into its durable store and writes `status.phase: Confirmed` with
//!    `status.epoch` = `spec.epoch`, under the resourceVersion that it read. Only then does it give out slots and announce.
//!    A `status.epoch` that is not `spec.epoch` is about an earlier owner and says nothing: the block is Pending.
//! 3. *Want.* An owner that runs low writes into `status.wanted` of one of its confirmed blocks how many of that class it wants to have
//!    in all, and the operator gives what lacks. A wish that is said twice is the same wish.
//! 4. *Drain.* The operator sets `spec.draining`, or the owner has more than it uses. The agent gives out no more slots, writes
//!    `Draining`, and, once every slot is free again, which includes the cooldown and what the network has to forget, lets go of the block
//!    in its store and writes `Drained`. It never takes a block again under an epoch in which it let go of it.
//! 5. *Hand over.* The operator writes the new `node` and `nodeUID` with a higher `epoch` and without `draining`, in one update.
//!    It may do so when the block is Pending or Drained; of a node that does not answer, only when its Node object is gone or
//!    fenced, and a full cooldown has passed since. A Node of the same name with another UID is another node.
//!
//! Both write under resourceVersion, which spec and status share, so a revocation and a confirmation cannot both succeed.

use std::sync::Arc;

use kun_config::types::BlockId;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::check::{Rule, Step};
use super::condition::Condition;
use super::text::{FirstSlot, Name, Text, Uid};
use super::{Column, Custom, Spec};
use crate::Object;

/// A block and its owner.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct IpamBlockSpec {
    /// The first of the block's 64 slots, as an IPv4 address that is a multiple of 64.
    pub first: Text<FirstSlot>,
    /// The name of the Node that owns it.
    pub node: Text<Name>,
    /// The UID of that Node: one that was deleted and made again under its name is another owner. Absent in a folder.
    #[serde(rename = "nodeUID")]
    pub node_uid: Option<Text<Uid>>,
    /// The number of owners so far. Each new owner has a higher one.
    #[serde(default = "first_epoch")]
    #[schemars(range(min = 1))]
    pub epoch: i64,
    /// The owner gives out no more slots of it and returns it when all are free.
    #[serde(default)]
    pub draining: bool,
}

fn first_epoch() -> i64 {
    1
}

/// What the owner says of the block.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct IpamBlockStatus {
    /// The metadata.generation that this is about.
    #[schemars(range(min = 0))]
    pub observed_generation: Option<i64>,
    /// The spec.epoch that this is about. Another one than that: the status is an earlier owner's.
    #[schemars(range(min = 1))]
    pub epoch: Option<i64>,
    /// How far the owner is.
    pub phase: Option<Phase>,
    /// Slots that pods have.
    #[schemars(range(min = 0, max = 64))]
    pub allocated: Option<u32>,
    /// Slots that wait until the network has forgotten them.
    #[schemars(range(min = 0, max = 64))]
    pub cooling: Option<u32>,
    /// The blocks of this class that the owner wants to have in all, this one included: one more than it has, when it runs low; one less,
    /// when it returns one. The owner says it on one of its blocks. Absent: as many as the operator gives without being asked.
    #[schemars(range(min = 0, max = 1024))]
    pub wanted: Option<u32>,
    /// `Announced`: the routes of the block are with the peers.
    #[serde(default)]
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// How far the owner of a block is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Phase {
    /// The owner has not taken it yet.
    Pending,
    /// The owner has it in its durable store and gives out its slots.
    Confirmed,
    /// The owner gives out no more slots.
    Draining,
    /// Every slot is free and forgotten; the block may have another owner.
    Drained,
}

/// IPAMBlock (`kun.network/v1alpha1`): a block and the node that owns it.
pub type IpamBlock = Custom<IpamBlockSpec, IpamBlockStatus>;

impl IpamBlock {
    /// The block.
    pub fn block(&self) -> BlockId {
        self.spec.first.0.0
    }

    /// The name of its owner.
    pub fn node(&self) -> &Arc<str> {
        self.spec.node.shared()
    }

    /// How far the present owner is; what an earlier one said does not count.
    pub fn phase(&self) -> Phase {
        match &self.status {
            Some(status) if status.epoch == Some(self.spec.epoch) => {
                status.phase.unwrap_or(Phase::Pending)
            }
            _ => Phase::Pending,
        }
    }
}

/// The one name that the object of a block may have: whoever claims it, claims it under this name.
pub fn block_name(block: BlockId) -> String {
    format!("block-{}", block.first().to_string().replace('.', "-"))
}

impl Spec for IpamBlockSpec {
    type Status = IpamBlockStatus;
    const KIND: &'static str = "IPAMBlock";
    const PLURAL: &'static str = "ipamblocks";
    const SHORT: &'static str = "kblock";
    const NAMESPACED: bool = false;
    const ABOUT: &'static str =
        "A block of 64 slots (a /26 of IPv4 and a /122 of IPv6) and the node that owns it.";
    const COLUMNS: &'static [Column] = &[
        Column::new("First", "string", ".spec.first", "First slot"),
        Column::new("Node", "string", ".spec.node", "Owner"),
        Column::new("Phase", "string", ".status.phase", "How far the owner is"),
        Column::new(
            "Allocated",
            "integer",
            ".status.allocated",
            "Slots that pods have",
        ),
        Column::new(
            "Cooling",
            "integer",
            ".status.cooling",
            "Slots that wait until the network has forgotten them",
        )
        .wide(),
        Column::new(
            "Wanted",
            "integer",
            ".status.wanted",
            "Blocks of this class that the owner wants in all",
        )
        .wide(),
        Column::new("Epoch", "integer", ".spec.epoch", "Number of owners so far").wide(),
        Column::new(
            "Draining",
            "boolean",
            ".spec.draining",
            "Whether the owner returns it",
        )
        .wide(),
    ];
    const SELECTABLE: &'static [&'static str] = &[".spec.node"];
    const RULES: &'static [Rule<IpamBlock>] = &[
        Rule {
            cel: "self.metadata.name == 'block-' + self.spec.first.replace('.', '-')",
            holds: |b| *b.meta.name.name == *block_name(b.block()),
            field: "",
            wrong: "the name is not the block's",
            right: "write block- and the first slot with `-` for each dot, such as block-10-64-0-64: two objects cannot claim one block",
        },
        Rule {
            cel: "!has(self.status) || !has(self.status.epoch) || self.status.epoch <= self.spec.epoch",
            holds: |b| {
                let epoch = b.status.as_ref().and_then(|s| s.epoch);
                epoch.is_none_or(|epoch| epoch <= b.spec.epoch)
            },
            field: ".status.epoch",
            wrong: "later than spec.epoch",
            right: "write the spec.epoch that the owner has read",
        },
    ];
    const STEPS: &'static [Step<IpamBlock>] = &[
        Step {
            cel: "self.spec.epoch >= oldSelf.spec.epoch",
            holds: |old, new| new.spec.epoch >= old.spec.epoch,
            field: ".spec.epoch",
            wrong: "lower than before",
            right: "write a higher one with each new owner",
        },
        Step {
            cel: "self.spec.epoch > oldSelf.spec.epoch || (self.spec.node == oldSelf.spec.node && (has(self.spec.nodeUID) ? self.spec.nodeUID : '') == (has(oldSelf.spec.nodeUID) ? oldSelf.spec.nodeUID : ''))",
            holds: |old, new| {
                new.spec.epoch > old.spec.epoch
                    || (new.spec.node == old.spec.node && new.spec.node_uid == old.spec.node_uid)
            },
            field: ".spec.epoch",
            wrong: "another owner in the same epoch",
            right: "write a higher epoch with each new owner",
        },
    ];

    fn object(object: Arc<IpamBlock>) -> Object {
        Object::IpamBlock(object)
    }

    fn of(object: &Object) -> Option<&Arc<IpamBlock>> {
        match object {
            Object::IpamBlock(object) => Some(object),
            _ => None,
        }
    }
}
