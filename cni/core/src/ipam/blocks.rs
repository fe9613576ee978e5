//! Blocks come and go: which slots can be had, which cool first, and what is kept of a block that was returned.

use std::collections::BTreeMap;

use kun_config::types::{BlockId, Slot};

use super::types::{BootTime, Claim, Effect, Reply, SlotState, Standing};
use super::{Ipam, MAX_BLOCKS};

impl Ipam {
    pub(super) fn set_claims(
        &mut self,
        wanted: &BTreeMap<BlockId, Claim>,
        now: BootTime,
        effects: &mut Vec<Effect>,
    ) -> Reply {
        let known = wanted
            .keys()
            .filter(|block| !self.blocks.contains_key(block))
            .count();
        if self.blocks.len() + known > MAX_BLOCKS {
            return Reply::TooManyBlocks;
        }
        let lost: Vec<BlockId> = self.owned().filter(|b| !wanted.contains_key(b)).collect();
        for block in lost {
            // The epoch stays: a claim of the same epoch that is heard of later is an old one.
            let claim = self.blocks[&block].to(Standing::Returned);
            self.blocks.insert(block, claim);
            effects.push(Effect::PutBlock { block, claim });
            self.queues(block.class()).lose(block);
            self.seen.retain(|slot, _| slot.block() != block);
        }
        for (block, claim) in wanted {
            let (block, claim) = (*block, *claim);
            let before = self.blocks.insert(block, claim);
            if before == Some(claim) {
                continue;
            }
            let stayed = before.is_some_and(|b| b.is_owned() && b.epoch == claim.epoch);
            let never_used = before.is_none() && claim.epoch == 1 && self.floor == 0;
            // It was ours, then perhaps another node's, or only another's, or the store was lost: nobody here knows how warm its
            // addresses are.
            if !stayed && !never_used {
                self.cool_block(block, now, effects);
            }
            self.offer(block, claim);
            effects.push(Effect::PutBlock { block, claim });
        }
        Reply::Done
    }

    /// Puts the free slots of a block where they can be had, or takes them away from there.
    fn offer(&mut self, block: BlockId, claim: Claim) {
        self.queues(block.class()).hold(block);
        if !claim.gives() {
            return;
        }
        let slots: Vec<Slot> = self.rules.slots(block).collect();
        for slot in slots {
            match self.records.get(&slot) {
                None => {
                    self.queues(block.class()).fresh.insert(slot);
                }
                Some(record) if record.state == SlotState::Free => {
                    let sequence = record.sequence;
                    self.queues(block.class()).free.insert(sequence, slot);
                }
                Some(_) => {}
            }
        }
    }

    fn cool_block(&mut self, block: BlockId, now: BootTime, effects: &mut Vec<Effect>) {
        for slot in self.rules.slots(block) {
            let generation = match self.records.get(&slot) {
                None => self.floor,
                Some(record) => match &record.state {
                    SlotState::Allocated { .. } => continue,
                    _ => record.generation,
                },
            };
            // Whom we know to have had it need not be the last.
            self.start_cooling(slot, generation, None, now, effects);
        }
    }
}
