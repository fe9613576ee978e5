//! How a node answers to what is said of its blocks: one step at a time, and when it wants one more or one less. Pure; the protocol is
//! that of the IPAMBlock kind (`cluster/core/src/crd/ipamblock.rs`).
//!
//! What makes it safe, whenever the process dies and however old the view is that `Said` comes from:
//!
//! - A block is in the store before it is confirmed, and is given out from only after the confirmation was taken by compare-and-swap.
//!   A view that is too old fails there.
//! - A block has left the store before `Drained` is said, and left it empty. What is said of the same epoch later was written before, and does
//!   not bring it back; one that left with pods in it, because it was lost from sight, is ours until they are gone.
//! - Another epoch means that another node may have had the block in between, so everything in it cools.

use std::collections::BTreeMap;
use std::time::Duration;

use kun_config::types::{BLOCK_SLOTS, BlockId};

use crate::ipam::{BootTime, Claim, Standing};

/// A class with fewer free slots than this wants another block. To ask, be given and confirm takes a second, and half a minute where
/// ten thousand nodes ask together: a node starts less than a pod in two seconds for that long. A quarter of a block.
pub const LOW: u32 = 16;

/// A block is given back only if so many free slots remain: twice what makes a node ask, so that giving back is no reason to ask.
pub const SPARE: u32 = 2 * LOW;

/// How far the owner of a block is, as the giver has heard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// Nothing of this owner.
    Pending,
    /// It has the block.
    Confirmed,
    /// It gives out nothing more.
    Draining,
    /// It has let go.
    Drained,
}

/// What is said of a block that is this node's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Said {
    /// The number of owners so far.
    pub epoch: u64,
    /// The giver counts owners and waits to hear of each. A list that people write does neither: then nothing is told, and a block that
    /// comes back under the same number is taken again.
    pub counted: bool,
    /// The owner is to return it.
    pub draining: bool,
    /// How far this owner is.
    pub phase: Phase,
}

/// The next step of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Move {
    /// Durably, in the node's store.
    Store(Claim),
    /// Say `Confirmed`, under what was read; when that is taken, store this claim.
    Confirm(Claim),
    /// Say this, under what was read.
    Tell(Phase),
}

/// The next step; `None`: all is as it should be. `said`: `None` when the block is not this node's. `in_use`: slots that are not free.
/// `returning`: the node itself has no more use for it.
pub fn next(said: Option<Said>, held: Option<Claim>, in_use: u32, returning: bool) -> Option<Move> {
    let Some(said) = said else {
        let held = held.filter(|held| held.is_owned())?;
        return Some(Move::Store(held.to(Standing::Returned)));
    };
    let claim = |standing| Claim {
        epoch: said.epoch,
        standing,
    };
    let Some(standing) = held
        .filter(|held| held.epoch == said.epoch)
        .map(|held| held.standing)
    else {
        let mut taken = claim(Standing::Taken);
        if held.is_none() && said.counted && said.phase != Phase::Pending {
            // It was confirmed from here, so the store is another than then: nobody knows what is warm. As of an unknown epoch it cools.
            taken.epoch = 0;
        }
        return Some(Move::Store(taken));
    };
    let draining = said.draining || returning;
    if said.counted && said.phase == Phase::Drained && standing != Standing::Returned {
        // The store is older than what it said: restored, as a machine's disk is. Somebody else may have the block.
        return Some(Move::Store(claim(Standing::Returned)));
    }
    match standing {
        Standing::Returned if said.counted && said.phase == Phase::Drained => None,
        // It was lost from sight with pods in it, and is ours all the same. It is not drained before they are gone and forgotten, and used
        // again only after a confirmation that is taken.
        Standing::Returned if said.counted && in_use > 0 => {
            Some(Move::Store(claim(Standing::Draining)))
        }
        Standing::Returned if said.counted => Some(Move::Tell(Phase::Drained)),
        Standing::Returned => (!draining).then_some(Move::Store(claim(Standing::Taken))),
        Standing::Taken | Standing::Confirmed if draining => {
            Some(Move::Store(claim(Standing::Draining)))
        }
        Standing::Confirmed if said.phase == Phase::Confirmed || !said.counted => None,
        Standing::Taken | Standing::Confirmed => Some(Move::Confirm(claim(Standing::Confirmed))),
        Standing::Draining if !draining => Some(Move::Confirm(claim(Standing::Confirmed))),
        Standing::Draining if in_use == 0 => Some(Move::Store(claim(Standing::Returned))),
        Standing::Draining if said.counted && said.phase != Phase::Draining => {
            Some(Move::Tell(Phase::Draining))
        }
        Standing::Draining => None,
    }
}

/// What a class of slots has.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Supply {
    /// Blocks that are given out from or about to be, with their slots that are not free: allocated, and others.
    pub blocks: BTreeMap<BlockId, (u32, u32)>,
    /// Those of them that are about to be.
    pub coming: u32,
    /// Slots to be had at once.
    pub free: u32,
    /// The least blocks that the node keeps.
    pub least: u32,
}

/// Whether a class wants more or less. One of these a class; what it remembers is lost with the process and only delays.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Appetite {
    /// More is free than is of use, since when.
    idle: Option<BootTime>,
    /// Another block is wanted, since when.
    asks: Option<BootTime>,
    /// This one is on its way back.
    returning: Option<BlockId>,
}

/// What a class wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wants {
    /// So many blocks in all.
    pub blocks: u32,
    /// Without this one.
    pub returning: Option<BlockId>,
}

impl Appetite {
    /// Looks at the supply. `idle_for`: so long [`SPARE`] and a block must have been free before one goes back: what a nightly job took is
    /// kept until it ends. A block that changes hands costs five writes, two route changes in the whole fabric and a cooldown.
    pub fn look(&mut self, supply: &Supply, idle_for: Duration, now: BootTime) -> Wants {
        let has = u32::try_from(supply.blocks.len()).unwrap_or(u32::MAX);
        // One that left is nobody's business here any more.
        let mut returning = self
            .returning
            .filter(|block| supply.blocks.contains_key(block));
        // Blocks that another had cool when they come: with two of them more asking would bring more that cool.
        let rests = |used: &&(u32, u32)| used.0 == 0 && used.1 > BLOCK_SLOTS - LOW;
        let resting = supply.blocks.values().filter(rests).count();
        let low = supply.free < LOW && supply.coming == 0 && resting < 2;
        if low {
            // What was to go back is the nearest block there is.
            if returning.take().is_none() {
                self.asks.get_or_insert(now);
            }
        } else {
            self.asks = None;
        }
        let after = supply.free.saturating_sub(BLOCK_SLOTS);
        let too_many = returning.is_none() && has > supply.least && after >= SPARE;
        match (too_many, self.idle) {
            (false, _) => self.idle = None,
            (true, None) => self.idle = Some(now),
            (true, Some(since)) if now.since(since) >= idle_for => {
                // The last one that no pod lives in: what cools in it goes by itself, and the low ones are used first.
                let empty = supply.blocks.iter().rev().find(|(_, used)| used.0 == 0);
                if let Some((block, _)) = empty {
                    returning = Some(*block);
                    self.idle = None;
                }
            }
            (true, Some(_)) => {}
        }
        self.returning = returning;
        let blocks = match returning {
            Some(_) => has.saturating_sub(1),
            None => has.saturating_add(u32::from(self.asks.is_some())),
        };
        Wants { blocks, returning }
    }

    /// Since when another block is asked for in vain.
    pub fn asks(&self) -> Option<BootTime> {
        self.asks
    }
}

#[cfg(test)]
mod tests {
    use kun_config::types::Slot;

    use super::*;

    const IDLE: Duration = Duration::from_secs(1800);

    fn said(phase: Phase) -> Said {
        Said {
            epoch: 3,
            counted: true,
            draining: false,
            phase,
        }
    }

    fn held(epoch: u64, standing: Standing) -> Option<Claim> {
        Some(Claim { epoch, standing })
    }

    fn store(epoch: u64, standing: Standing) -> Option<Move> {
        Some(Move::Store(Claim { epoch, standing }))
    }

    #[test]
    fn taken_then_confirmed_then_used() {
        use Standing::{Confirmed, Taken};
        let pending = Some(said(Phase::Pending));
        assert_eq!(next(pending, None, 0, false), store(3, Taken));
        let confirm = next(pending, held(3, Taken), 0, false);
        assert_eq!(
            confirm,
            Some(Move::Confirm(Claim {
                epoch: 3,
                standing: Confirmed
            }))
        );
        let confirmed = Some(said(Phase::Confirmed));
        assert_eq!(next(confirmed, held(3, Confirmed), 9, false), None);
        // Killed between the two: what the view says is no proof.
        assert_eq!(next(confirmed, held(3, Taken), 0, false), confirm);
        // Somebody emptied the status.
        assert_eq!(next(pending, held(3, Confirmed), 9, false), confirm);
    }

    #[test]
    fn drained_in_this_order() {
        use Standing::{Confirmed, Draining, Returned};
        let revoked = |phase| {
            Some(Said {
                draining: true,
                ..said(phase)
            })
        };
        let (confirmed, draining) = (revoked(Phase::Confirmed), revoked(Phase::Draining));
        assert_eq!(
            next(confirmed, held(3, Confirmed), 2, false),
            store(3, Draining)
        );
        assert_eq!(
            next(confirmed, held(3, Draining), 2, false),
            Some(Move::Tell(Phase::Draining))
        );
        assert_eq!(next(draining, held(3, Draining), 1, false), None);
        assert_eq!(
            next(draining, held(3, Draining), 0, false),
            store(3, Returned)
        );
        assert_eq!(
            next(draining, held(3, Returned), 0, false),
            Some(Move::Tell(Phase::Drained))
        );
        assert_eq!(
            next(revoked(Phase::Drained), held(3, Returned), 0, false),
            None
        );
        // Of one's own accord, and changed one's mind.
        assert_eq!(
            next(Some(said(Phase::Confirmed)), held(3, Confirmed), 0, true),
            store(3, Draining)
        );
        assert!(matches!(
            next(Some(said(Phase::Draining)), held(3, Draining), 0, false),
            Some(Move::Confirm(_))
        ));
    }

    #[test]
    fn old_words_bring_nothing_back() {
        use Standing::{Confirmed, Draining, Returned, Taken};
        // The view is from before the block was returned.
        for phase in [Phase::Pending, Phase::Confirmed, Phase::Draining] {
            assert_eq!(
                next(Some(said(phase)), held(3, Returned), 0, false),
                Some(Move::Tell(Phase::Drained))
            );
        }
        // It was lost from sight, with a pod in it.
        assert_eq!(
            next(Some(said(Phase::Confirmed)), held(3, Returned), 1, false),
            store(3, Draining)
        );
        assert!(matches!(
            next(Some(said(Phase::Confirmed)), held(3, Draining), 1, false),
            Some(Move::Confirm(_))
        ));
        // The store is.
        for standing in [Taken, Confirmed, Draining] {
            assert_eq!(
                next(Some(said(Phase::Drained)), held(3, standing), 5, false),
                store(3, Returned)
            );
        }
        // A new epoch is a new claim; a lost store is taken as of an unknown one first.
        assert_eq!(
            next(Some(said(Phase::Pending)), held(2, Returned), 0, false),
            store(3, Taken)
        );
        assert_eq!(
            next(Some(said(Phase::Confirmed)), None, 0, false),
            store(0, Taken)
        );
        assert_eq!(
            next(Some(said(Phase::Confirmed)), held(0, Taken), 64, false),
            store(3, Taken)
        );
        assert_eq!(next(None, held(3, Confirmed), 5, false), store(3, Returned));
        assert_eq!(next(None, held(3, Returned), 5, false), None);
    }

    #[test]
    fn a_list_is_obeyed_without_a_word() {
        use Standing::{Confirmed, Draining, Returned, Taken};
        let listed = |draining| {
            Some(Said {
                epoch: 1,
                counted: false,
                draining,
                phase: Phase::Confirmed,
            })
        };
        assert_eq!(next(listed(false), None, 0, false), store(1, Taken));
        assert!(matches!(
            next(listed(false), held(1, Taken), 0, false),
            Some(Move::Confirm(_))
        ));
        assert_eq!(next(listed(false), held(1, Confirmed), 0, false), None);
        assert_eq!(
            next(listed(true), held(1, Confirmed), 1, false),
            store(1, Draining)
        );
        assert_eq!(next(listed(true), held(1, Draining), 1, false), None);
        assert_eq!(
            next(listed(true), held(1, Draining), 0, false),
            store(1, Returned)
        );
        assert_eq!(next(listed(true), held(1, Returned), 0, false), None);
        assert_eq!(
            next(listed(false), held(1, Returned), 0, false),
            store(1, Taken)
        );
    }

    fn block(n: u32) -> BlockId {
        BlockId::new(Slot(0x0a40_0000 + n * BLOCK_SLOTS)).expect("aligned")
    }

    fn supply(used: &[(u32, u32)], coming: u32) -> Supply {
        let blocks: BTreeMap<_, _> = (0..).map(block).zip(used.iter().copied()).collect();
        let not_free: u32 = used.iter().map(|(a, c)| a + c).sum();
        let given = u32::try_from(used.len()).expect("few") - coming;
        Supply {
            blocks,
            coming,
            free: (given * BLOCK_SLOTS).saturating_sub(not_free),
            least: 1,
        }
    }

    fn at(secs: u64) -> BootTime {
        BootTime(Duration::from_secs(secs))
    }

    #[test]
    fn low_asks_once_and_until_it_is_given() {
        let mut appetite = Appetite::default();
        let mut wants = |used: &[(u32, u32)], coming, secs| {
            let wants = appetite.look(&supply(used, coming), IDLE, at(secs));
            (wants.blocks, appetite.asks())
        };
        assert_eq!(wants(&[(48, 0)], 0, 1), (1, None));
        assert_eq!(
            wants(&[(30, 19)], 0, 2),
            (2, Some(at(2))),
            "what cools is not to be had"
        );
        assert_eq!(wants(&[(64, 0)], 0, 9), (2, Some(at(2))));
        // Given and not confirmed yet: not asked for twice.
        assert_eq!(wants(&[(64, 0), (0, 0)], 1, 10), (2, None));
        assert_eq!(wants(&[(64, 0), (0, 0)], 0, 11), (2, None));
        // What comes was another's and cools: one more is worth asking for, and not one after the other.
        assert_eq!(wants(&[(64, 0), (0, 64)], 0, 12), (3, Some(at(12))));
        assert_eq!(wants(&[(64, 0), (0, 64), (0, 64)], 0, 13), (3, None));
    }

    #[test]
    fn an_empty_block_goes_back_after_a_while_and_not_the_last() {
        let mut appetite = Appetite::default();
        let half = IDLE.as_secs() / 2;
        let busy = supply(&[(5, 0), (1, 3)], 0);
        let idle = supply(&[(5, 0), (0, 3)], 0);
        assert_eq!(appetite.look(&idle, IDLE, at(0)).returning, None);
        assert_eq!(appetite.look(&busy, IDLE, at(half)).returning, None);
        // Pods live in both: there is too much, and nothing that could go.
        assert_eq!(appetite.look(&busy, IDLE, at(2 * half)).returning, None);
        let wants = appetite.look(&idle, IDLE, at(2 * half + 1));
        assert_eq!((wants.blocks, wants.returning), (1, Some(block(1))));
        // While it goes nothing else does, and need calls it back.
        let wants = appetite.look(&supply(&[(60, 0), (0, 60)], 0), IDLE, at(9 * half));
        assert_eq!((wants.blocks, wants.returning), (2, None));
        let one = supply(&[(0, 0)], 0);
        for secs in [10 * half, 20 * half] {
            assert_eq!(appetite.look(&one, IDLE, at(secs)).returning, None);
        }
    }
}
