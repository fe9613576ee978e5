//! Events in, ops out: the loop around the planner, with the way back after a failed op.

use std::collections::BTreeMap;
use std::net::IpAddr;

use kun_cluster::{Event, ObjectName};
use kun_proxy_core::{Backend, Here, HostPorts, Limits, Observed, Op, Planner};

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
        self.recover()?;
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
                self.apply(op)?;
                progress.ops += 1;
                progress.withdrawals += usize::from(Op::withdraws(op));
            }
        }
        Ok(progress)
    }

    /// Opens or closes an attachment's host ports, out of turn. What is left over is [`Self::advance`]'s.
    pub fn set_host_ports(
        &mut self,
        name: &ObjectName,
        ports: Option<HostPorts>,
    ) -> Result<(), B::Error> {
        self.planner.set_host_ports(name.clone(), ports);
        self.recover()?;
        for op in self.planner.plan_attachment(name) {
            self.apply(&op)?;
        }
        Ok(())
    }

    /// The node's addresses; true: there is something to plan.
    pub fn set_node_addresses(&mut self, addresses: Vec<IpAddr>) -> bool {
        self.planner.set_node_addresses(addresses);
        self.planner.host_ports_wait()
    }

    /// [`Planner::attachments_known`].
    pub fn attachments_known(&mut self) {
        self.planner.attachments_known();
    }

    /// Reads the maps back after an op that failed.
    fn recover(&mut self) -> Result<(), B::Error> {
        if self.doubtful {
            let observed = self.backend.observe()?;
            self.planner.adopt_again(&observed);
            self.doubtful = false;
        }
        Ok(())
    }

    fn apply(&mut self, op: &Op) -> Result<(), B::Error> {
        self.backend.apply(op).inspect_err(|_| self.doubtful = true)
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
