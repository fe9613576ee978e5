//! Where assignments are remembered, behind one seam: two files of the manifest folder, or the objects of the API server themselves.

use std::collections::BTreeSet;
use std::time::Duration;

use kun_cluster::Store;

use crate::generated::{Generated, GeneratedError};
use crate::plan::{Assignments, Plan, Pools, Shortage};

/// What came of remembering a plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kept {
    /// All of it, durably.
    Whole,
    /// Not all: what is missing is planned anew after this long, or as soon as the cluster changes.
    Again(Duration),
}

/// A memory. One process has it at a time.
pub trait Memory: std::fmt::Debug {
    /// What was given out before.
    fn before(&mut self, store: &Store, pools: &Pools) -> Assignments;

    /// Makes it what the plan says. What was written stands in `store` afterwards, as if it had been read.
    fn keep(&mut self, store: &mut Store, plan: &Plan) -> Result<Kept, GeneratedError>;

    /// Tells people: the shortages of this plan, of which `new` were not told before.
    fn tell(&mut self, store: &Store, pools: &Pools, plan: &Plan, new: &BTreeSet<Shortage>);

    /// When to look again although nothing changes.
    fn look_again(&self) -> Option<Duration>;
}

impl Memory for Generated {
    fn before(&mut self, _store: &Store, _pools: &Pools) -> Assignments {
        self.assignments().clone()
    }

    fn keep(&mut self, _store: &mut Store, plan: &Plan) -> Result<Kept, GeneratedError> {
        let before = self.assignments();
        for (block, owner) in &plan.assignments.blocks {
            if !before.blocks.contains_key(block) {
                tracing::info!(%block, node = %owner, "block assigned");
            }
        }
        for (service, addresses) in &plan.assignments.addresses {
            if before.addresses.get(service) != Some(addresses) {
                tracing::info!(%service, ?addresses, "virtual addresses assigned");
            }
        }
        self.write(&plan.assignments)?;
        Ok(Kept::Whole)
    }

    /// The log says it.
    fn tell(&mut self, _: &Store, _: &Pools, _: &Plan, _: &BTreeSet<Shortage>) {}

    fn look_again(&self) -> Option<Duration> {
        None
    }
}
