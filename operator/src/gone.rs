//! Blocks whose owner is no more: when they may have another. Pure.
//!
//! As long as a Node object exists its blocks are its own, however long the node is silent: it may be alive behind a broken network, and
//! its pods with it. When the object is deleted its blocks rest for the cooldown, counted from when this operator saw it: nobody's
//! clock is believed. A Node that is made again under its name has another uid and is another owner.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use kun_cluster::Store;
use kun_config::types::BlockId;

use crate::plan::{Owner, owner_of};

/// Owners without a Node, and since when. Bounded by the blocks there are.
#[derive(Debug, Default)]
pub struct Gone(BTreeMap<Owner, Duration>);

impl Gone {
    /// Looks at the cluster as it is at `now`; call whenever it changed.
    pub fn look(&mut self, store: &Store, now: Duration) {
        let owners: BTreeSet<Owner> = store.blocks().map(|block| owner_of(block)).collect();
        let exists = |owner: &Owner| store.node(&owner.node).is_some_and(|node| owner.is(node));
        // One that is there again, or has no block any more, is forgotten.
        self.0
            .retain(|owner, _| owners.contains(owner) && !exists(owner));
        for owner in owners {
            if !exists(&owner) {
                self.0.entry(owner).or_insert(now);
            }
        }
    }

    /// The blocks that have rested.
    pub fn returned(&self, store: &Store, now: Duration, cooldown: Duration) -> BTreeSet<BlockId> {
        let rested = |owner: &Owner| {
            self.0
                .get(owner)
                .is_some_and(|since| now >= *since + cooldown)
        };
        let blocks = store.blocks().filter(|block| rested(&owner_of(block)));
        blocks.map(|block| block.block()).collect()
    }

    /// How long until there are more of them.
    pub fn next(&self, now: Duration, cooldown: Duration) -> Option<Duration> {
        let ends = self.0.values().map(|since| *since + cooldown);
        ends.filter(|end| *end > now).min().map(|end| end - now)
    }
}
