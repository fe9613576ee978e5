//! The interfaces that carry the programs: pods' and uplinks.

use super::super::{links, node};
use super::{Dataplane, PINS};

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
}
