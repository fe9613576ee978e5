//! The interfaces that carry the programs: pods' and uplinks.

use kun_ebpf_loader::{FIRST_FILTERS, LAST_FILTERS};

use super::super::links::{self, Losses};
use super::super::node;
use super::{Dataplane, PINS};

/// Priorities of filters of ours.
const OURS: [u16; 2] = [FIRST_FILTERS, LAST_FILTERS];

impl Dataplane {
    /// Puts the programs on a pod's host interface, unless it carries them already.
    pub(crate) fn attach_pod(&mut self, interface: &str) -> Result<(), String> {
        let Some(index) = node::interface_index(interface) else {
            return Err(format!("{interface}: there is no such interface"));
        };
        if self.pods.get(interface) == Some(&index) {
            return Ok(());
        }
        if self.pods.remove(interface).is_some() {
            self.detach(interface);
        }
        self.backend()
            .attach_pod(interface)
            .map_err(|e| format!("{interface}: {e}"))?;
        self.pods.insert(interface.to_owned(), index);
        Ok(())
    }

    /// Puts the programs on the uplinks that are there and do not carry them yet.
    pub(crate) fn attach_uplinks(&mut self) {
        for name in self.seek.find() {
            let Some(index) = node::interface_index(&name) else {
                continue;
            };
            if self.uplinks.get(&name) == Some(&index) {
                continue;
            }
            if self.uplinks.remove(&name).is_some() {
                self.detach(&name);
            }
            match self.attach_uplink(&name) {
                Ok(()) => {
                    tracing::info!(uplink = name, "attached");
                    self.uplinks.insert(name.clone(), index);
                    self.complaints.remove(&name);
                }
                // Tried again every second: said once.
                Err(error) => {
                    if self.complaints.get(&name) != Some(&error) {
                        tracing::error!(uplink = name, "cannot attach: {error}; trying again");
                    }
                    self.complaints.insert(name, error);
                }
            }
        }
        self.publish_facts();
    }

    fn attach_uplink(&mut self, name: &str) -> Result<(), String> {
        self.backend()
            .attach_uplink(name)
            .map_err(|e| e.to_string())?;
        if let Some(translator) = &mut self.translator {
            translator.attach(name).map_err(|e| e.to_string())?;
        }
        Ok(())
    }

    /// Ends what agents of another ABI version left at work, once these programs do all that those did: twice over a packet does no
    /// harm meanwhile, since it is translated already.
    pub(super) fn succeed(&mut self) {
        let whole = self.synced_once && !self.proxy.planner().partial();
        if self.succeeded || !whole || self.busy() {
            return;
        }
        if !(self.seek.find().iter()).all(|uplink| self.uplinks.contains_key(uplink)) {
            return;
        }
        match kun_ebpf_loader::remove_other_versions(&self.config.agent.bpffs_root) {
            Ok(versions) => {
                self.succeeded = true;
                self.complaints.remove(PINS);
                if !versions.is_empty() {
                    tracing::info!(
                        ?versions,
                        "removed what agents of other versions had pinned"
                    );
                }
            }
            // Tried again every second: said once.
            Err(error) => {
                let error = error.to_string();
                if self.complaints.get(PINS) != Some(&error) {
                    tracing::error!("pins of another version stay: {error}; trying again");
                }
                self.complaints.insert(PINS.to_owned(), error);
            }
        }
    }

    pub(super) fn detach(&mut self, interface: &str) {
        if let Err(error) = self.backend().detach(interface) {
            tracing::warn!(interface, %error, "cannot detach");
        }
    }

    /// Puts the programs back on pods' interfaces whose filters somebody took away (`tc qdisc del dev … clsact`).
    pub(super) fn heal_pods(&mut self) {
        let filtered = match links::with_filters() {
            Ok(filtered) => filtered,
            Err(error) => {
                tracing::warn!(%error, "pods' filters cannot be looked at");
                return;
            }
        };
        let bare: Vec<String> = (self.pods.iter())
            .filter(|(name, index)| {
                !filtered.contains(index) && node::interface_index(name) == Some(**index)
            })
            .map(|(name, _)| name.clone())
            .collect();
        for name in bare {
            self.heal(name);
        }
    }

    /// The same at once, of what the kernel told; also of single filters (`tc filter del`), and of uplinks that have filters.
    pub(super) fn heal_told(&mut self) {
        let Some(taken) = &mut self.taken else {
            return;
        };
        let losses = match taken.look(&OURS) {
            Ok(losses) => losses,
            Err(error) => {
                tracing::warn!(%error, "nobody hears any more of pods' filters that are taken away; they are looked for every 15 s");
                self.taken = None;
                return;
            }
        };
        if losses == Losses::default() {
            return;
        }
        let lost = |index: &u32| losses.unsure || losses.interfaces.contains(index);
        let pods: Vec<(String, u32)> = (self.pods.iter())
            .filter(|(_, index)| lost(index))
            .map(|(name, index)| (name.clone(), *index))
            .collect();
        // Attached again, what stands stays as it is.
        self.uplinks.retain(|_, index| !lost(index));
        for (name, index) in pods {
            if node::interface_index(&name) == Some(index) && self.lacks_filters(&name, index) {
                self.heal(name);
            }
        }
    }

    fn lacks_filters(&self, name: &str, index: u32) -> bool {
        let lacks = |priority| !links::has_filters(index, priority).unwrap_or(true);
        lacks(LAST_FILTERS) || (self.limiter.limits(name) && lacks(FIRST_FILTERS))
    }

    fn heal(&mut self, name: String) {
        self.pods.remove(&name);
        match self
            .attach_pod(&name)
            .and_then(|()| self.limiter.attach_again(&name))
        {
            Ok(()) => {
                tracing::warn!(
                    interface = name,
                    "its filters were taken away by somebody, and are there again"
                );
            }
            Err(error) => {
                tracing::error!("its filters are gone, and cannot be put back: {error}")
            }
        }
    }
}
