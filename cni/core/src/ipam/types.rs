//! What the slot machine takes, keeps and gives: commands, records, effects, replies. No behaviour.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use kun_config::types::{BLOCK_SLOTS, BlockId, Slot, SlotClass};
use serde::{Deserialize, Serialize};

use super::evidence::{Look, Needs, Watermark};

/// CNI §2: network name, CNI_CONTAINERID, CNI_IFNAME.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Key {
    /// CNI_CONTAINERID. First, because it differs first: comparisons end here.
    pub container_id: String,
    /// CNI_IFNAME.
    pub ifname: String,
    /// Network name.
    pub network: String,
}

/// The pod behind a key, as the runtime told it; for people and for garbage collection.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Pod {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// UID.
    pub uid: String,
}

/// Who holds, or last held, a slot.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Owner {
    /// The attachment.
    pub key: Key,
    /// The pod.
    pub pod: Pod,
    /// Another plugin made the interfaces: that none of ours carries the address proves nothing.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub delegated: bool,
}

/// One boot of one kernel (`/proc/sys/kernel/random/boot_id`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct BootId(pub u128);

/// CLOCK_BOOTTIME: time since this boot, suspension included.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct BootTime(pub Duration);

impl BootTime {
    /// Time since `earlier`; zero on a clock that stepped back.
    pub fn since(self, earlier: BootTime) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

/// By which rules addresses come back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Rules {
    /// The least time between release and reuse.
    pub cooldown: Duration,
    /// So long evidence is looked for in vain before a slot is kept back for a person to see.
    pub quarantine_after: Duration,
    /// Which evidence is asked for.
    pub needs: Needs,
    /// Slots of a block that are used: all of them. A model checker takes two, to see reuse early.
    pub slots_per_block: u32,
}

impl Rules {
    /// These rules over whole blocks.
    pub fn new(cooldown: Duration, quarantine_after: Duration, needs: Needs) -> Self {
        Self {
            cooldown,
            quarantine_after,
            needs,
            slots_per_block: BLOCK_SLOTS,
        }
    }

    /// Time decides alone.
    pub fn time_alone(cooldown: Duration) -> Self {
        Self::new(cooldown, Duration::MAX, Needs::NONE)
    }

    pub(super) fn slots(&self, block: BlockId) -> impl Iterator<Item = Slot> + use<> {
        block
            .slots()
            .take(usize::try_from(self.slots_per_block).unwrap_or(usize::MAX))
    }
}

/// Where a slot is in its life. A slot without a record is free and was never used.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SlotState {
    /// In use.
    Allocated {
        /// By whom.
        owner: Owner,
        /// Since when, in this boot.
        #[serde(default)]
        since: BootTime,
    },
    /// Released, and not to be used before the cooldown has passed and the network has forgotten it.
    Cooling {
        /// The last owner; `None` for a slot that cools because its block was somebody else's.
        owner: Option<Owner>,
        /// When the timer began, in this boot.
        since: BootTime,
        /// A person said that no evidence need be waited for.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        waived: bool,
    },
    /// Evidence never came: kept back until it does, or until a person frees it.
    Quarantined {
        /// The last owner.
        owner: Option<Owner>,
        /// When it was released, in this boot.
        since: BootTime,
    },
    /// Cooled down and forgotten.
    Free,
}

impl SlotState {
    /// Who holds, or last held it.
    pub fn owner(&self) -> Option<&Owner> {
        match self {
            Self::Allocated { owner, .. } => Some(owner),
            Self::Cooling { owner, .. } | Self::Quarantined { owner, .. } => owner.as_ref(),
            Self::Free => None,
        }
    }
}

/// The durable row of one slot.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Record {
    /// The slot.
    pub slot: Slot,
    /// Its last allocation's number, of all allocations of the node; never goes back, and no two allocations share one.
    pub generation: u64,
    /// Order of changes over all slots; never goes back. The order of reuse, and what a look at the network refers to.
    pub sequence: u64,
    /// Its state.
    pub state: SlotState,
}

/// How a node stands to a block that is or was its own.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum Standing {
    /// It is another's by now, or nobody's.
    Returned,
    /// It is in the store, and whoever gives blocks has not heard so: nothing of it is given out.
    Taken,
    /// Its slots are given out.
    #[default]
    Confirmed,
    /// Nothing more of it is given out. Its slots cool and are looked at as ever, until it can be returned.
    Draining,
}

/// A block that is or was this node's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Claim {
    /// The number of owners so far, this one included (`IPAMBlock` spec.epoch): with 1 nobody had the block before; 0: not known.
    pub epoch: u64,
    /// How this node stands to it.
    pub standing: Standing,
}

impl Claim {
    /// Given out from, by the first owner.
    pub const FIRST: Self = Self {
        epoch: 1,
        standing: Standing::Confirmed,
    };

    /// The same claim, another standing.
    pub fn to(self, standing: Standing) -> Self {
        Self { standing, ..self }
    }

    /// Whether it is this node's.
    pub fn is_owned(self) -> bool {
        self.standing != Standing::Returned
    }

    /// Whether slots of it are given out.
    pub fn gives(self) -> bool {
        self.standing == Standing::Confirmed
    }
}

/// Something that must be durable before the reply is told, in order.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Effect {
    /// Store the record under its slot.
    PutSlot(Record),
    /// Store how the node stands to the block.
    PutBlock {
        /// The block.
        block: BlockId,
        /// How.
        claim: Claim,
    },
    /// Store the boot to which all `since` belong.
    PutBoot(BootId),
    /// Store that the store was rebuilt; see [`Snapshot::floor`].
    PutFloor(u64),
}

/// Everything a store holds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Snapshot {
    /// `None`: a new store.
    pub boot: Option<BootId>,
    /// Not zero: the store was rebuilt, and what an unknown slot's generation was is not known, except that it was lower.
    pub floor: u64,
    /// Every block ever owned.
    pub blocks: BTreeMap<BlockId, Claim>,
    /// Every slot ever used.
    pub records: BTreeMap<Slot, Record>,
}

impl Snapshot {
    /// What the store holds after the effect.
    pub fn apply(&mut self, effect: Effect) {
        match effect {
            Effect::PutSlot(record) => {
                self.records.insert(record.slot, record);
            }
            Effect::PutBlock { block, claim } => {
                self.blocks.insert(block, claim);
            }
            Effect::PutBoot(boot) => self.boot = Some(boot),
            Effect::PutFloor(floor) => self.floor = floor,
        }
    }
}

/// Slots that would do.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Choice {
    /// This one and no other.
    Slot(Slot),
    /// One of the class in one of these ranges, first and last included.
    Within {
        /// With IPv4 or without.
        class: SlotClass,
        /// The ranges.
        ranges: Vec<(Slot, Slot)>,
    },
}

impl Choice {
    /// Whether a slot of a block would do.
    pub fn meets(&self, block: BlockId) -> bool {
        let first = block.first();
        let last = Slot(first.0 + (BLOCK_SLOTS - 1));
        match self {
            Self::Slot(wanted) => wanted.block() == block,
            Self::Within { class, ranges } => {
                block.class() == *class && ranges.iter().any(|(a, b)| *a <= last && first <= *b)
            }
        }
    }

    /// Whether a slot would do.
    pub fn admits(&self, slot: Slot) -> bool {
        match self {
            Self::Slot(wanted) => slot == *wanted,
            Self::Within { class, ranges } => {
                slot.class() == *class
                    && ranges
                        .iter()
                        .any(|(first, last)| (*first..=*last).contains(&slot))
            }
        }
    }
}

/// Why one slot cannot be had.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Unavailable {
    /// In no block of ours.
    NotOurs,
    /// In use.
    Allocated(Owner),
    /// Cooling, for so long still.
    Cooling(Duration),
    /// It has rested, and something still knows it; or it is quarantined.
    Known,
    /// The key has this slot already.
    HasAnother(Slot),
}

/// What is asked.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Command {
    /// A slot for the key: the one it has, or the next free one of the class.
    Allocate {
        /// For whom.
        owner: Owner,
        /// With IPv4 or without.
        class: SlotClass,
    },
    /// A slot for the key out of these: the one it has if it is one of them, else the first that is free. A fixed address cools
    /// like any other, but for the attachment that had it last: it alone can be meant by whoever still sends there.
    AllocateOf {
        /// For whom.
        owner: Owner,
        /// Which would do.
        choice: Choice,
    },
    /// The key's slot begins to cool.
    Release {
        /// Whose.
        key: Key,
        /// Only this generation, where the caller knows it.
        generation: Option<u64>,
    },
    /// By hand: an allocated slot begins to cool; one that cools or is quarantined waits for no evidence.
    Free {
        /// The slot.
        slot: Slot,
        /// Only this generation.
        generation: u64,
    },
    /// What somebody saw of cooling slots; see [`super::Ipam::unforgotten`].
    Observe {
        /// One a slot.
        looks: Vec<Look>,
        /// How far every node's proxy is.
        watermark: Option<Watermark>,
    },
    /// The blocks that this node owns and gives out from now on, where nobody had them before. Live allocations in other blocks stay
    /// until released.
    SetBlocks(BTreeSet<BlockId>),
    /// The same, with how the node stands to each. Addresses of a block that another node had, or may have had since this one did,
    /// cool before they are used here.
    SetClaims(BTreeMap<BlockId, Claim>),
    /// Only let time pass.
    Tick,
}

/// A live allocation.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Allocation {
    /// The slot.
    pub slot: Slot,
    /// Its generation.
    pub generation: u64,
    /// Whose.
    pub owner: Owner,
}

/// How many slots of a class are in which state. All but the first count owned blocks only, and the last only those that are given
/// out from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Census {
    /// In use.
    pub allocated: u32,
    /// The cooldown has not passed.
    pub cooling: u32,
    /// It has, and evidence is missing.
    pub waiting: u32,
    /// Evidence never came.
    pub quarantined: u32,
    /// Ready.
    pub free: u32,
}

/// What is answered.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Reply {
    /// The key's allocation.
    Allocated(Allocation),
    /// No slot that would do is free.
    Exhausted {
        /// The class.
        class: SlotClass,
        /// Until the oldest cooling slot that would do has rested; `None`: none cools.
        retry_after: Option<Duration>,
        /// All slots of the class.
        census: Census,
        /// Who has most of them, most first: namespaces, or networks for attachments of no pod.
        holders: Vec<(String, u32)>,
    },
    /// None of the slots that would do lies in a block that this node gives out.
    Elsewhere {
        /// Of this class.
        class: SlotClass,
        /// It gives out these.
        blocks: Vec<BlockId>,
    },
    /// The slot that was asked for cannot be had.
    Unavailable {
        /// Which.
        slot: Slot,
        /// Why not.
        because: Unavailable,
    },
    /// The slot cools.
    Released(Slot),
    /// The key has no allocation (of that generation): success all the same (CNI DEL).
    NothingToRelease,
    /// Free: the slot has another generation by now.
    Changed {
        /// This one.
        generation: u64,
    },
    /// Done.
    Done,
    /// SetBlocks with more than [`super::MAX_BLOCKS`] blocks: refused, nothing changed.
    TooManyBlocks,
}

/// A reply and what must be durable before it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[must_use]
pub struct Step {
    /// The answer.
    pub reply: Reply,
    /// First these.
    pub effects: Vec<Effect>,
}

/// What a store holds that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LoadError {
    /// Two slots for one attachment.
    #[error("slots {first} and {second} are both allocated to container {container_id}")]
    TwoSlots {
        /// One.
        first: Slot,
        /// The other.
        second: Slot,
        /// The key's container.
        container_id: String,
    },
    /// Two changes with one number.
    #[error("slots {first} and {second} have the same sequence number {sequence}")]
    SameSequence {
        /// One.
        first: Slot,
        /// The other.
        second: Slot,
        /// The number.
        sequence: u64,
    },
    /// A row under another slot's number.
    #[error("the row of slot {under} holds slot {holds}")]
    Misplaced {
        /// The row's key.
        under: Slot,
        /// The row's content.
        holds: Slot,
    },
    /// A slot outside every block that was ever ours.
    #[error("slot {slot} is in no block that this node ever had")]
    NoBlock {
        /// The slot.
        slot: Slot,
    },
}
