//! Events in, ops out: the loop around the planner, with the way back after a failed op.

use std::collections::BTreeMap;
use std::net::IpAddr;

use kun_cluster::Event;
use kun_proxy_core::{Backend, Here, Limits, Observed, Op, Planner};

/// What [`Proxy::advance`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// Ops applied.
    pub ops: usize,
    /// Of these, ops that took something away.
    pub withdrawals: usize,
    /// Nothing is left to do.
    pub done: bool,
}

/// A dataplane and the planner that knows what it holds.
#[derive(Debug)]
pub struct Proxy<B> {
    planner: Planner,
    backend: B,
    /// An op failed: what the planner believes may be wrong until the maps are read back.
    doubtful: bool,
    vips: Option<BTreeMap<IpAddr, bool>>,
}

impl<B: Backend> Proxy<B> {
    /// Takes over what the dataplane holds; also says what that was.
    pub fn adopt(here: Here, limits: Limits, mut backend: B) -> Result<(Self, Observed), B::Error> {
        let observed = backend.observe()?;
        let proxy = Self {
            planner: Planner::adopt(here, limits, &observed),
            backend,
            doubtful: false,
            vips: None,
        };
        Ok((proxy, observed))
    }

    /// Takes in what the source says; nothing is applied yet.
    pub fn on_event(&mut self, event: &Event) {
        self.planner.on_event(event);
    }

    /// Applies the ops of up to `services` changed Services. After an error, call again later: the maps are then read back and
    /// everything is planned anew.
    pub fn advance(&mut self, services: usize) -> Result<Progress, B::Error> {
        if self.doubtful {
            let observed = self.backend.observe()?;
            self.planner.adopt_again(&observed);
            self.doubtful = false;
        }
        let mut progress = Progress::default();
        for _ in 0..services {
            let Some(ops) = self.planner.step() else {
                if self.planner.synced() {
                    self.vips = Some(self.planner.vips());
                }
                progress.done = true;
                break;
            };
            for op in &ops {
                if let Err(error) = self.backend.apply(op) {
                    self.doubtful = true;
                    return Err(error);
                }
                progress.ops += 1;
                progress.withdrawals += usize::from(Op::withdraws(op));
            }
        }
        Ok(progress)
    }

    /// [`Planner::vips`] as of the last plan that is in the dataplane as a whole; `None` before the first. A planner that starts
    /// over knows no addresses until it has planned each Service again, and nobody may hear of that: the dataplane serves them
    /// all the while.
    pub fn vips(&self) -> Option<&BTreeMap<IpAddr, bool>> {
        self.vips.as_ref()
    }

    /// The planner, for questions.
    pub fn planner(&self) -> &Planner {
        &self.planner
    }

    /// The dataplane, for what is not planned: attachments, flows, counters.
    pub fn backend(&mut self) -> &mut B {
        &mut self.backend
    }
}
