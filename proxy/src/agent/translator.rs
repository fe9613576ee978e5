//! The NAT64 gateway role: the translator's program on the uplink, its settings from `nat64`, its sessions expired.

use std::collections::HashSet;

use kun_config::Config;
use kun_control::Fact;
use kun_ebpf_abi::Addr;
use kun_ebpf_abi::reason::Reason;
use kun_ebpf_loader::{Nat64Config, Nat64Dataplane, Nat64Error};

use super::dataplane::fact;

/// A gateway's translator.
pub(crate) struct Translator {
    dataplane: Nat64Dataplane,
}

impl Translator {
    /// `None` on nodes without the role. Traffic of an earlier agent's program goes on until [`Translator::attach`].
    pub(crate) fn open(config: &Config) -> Result<Option<Self>, Nat64Error> {
        let Some(settings) = settings(config) else {
            return Ok(None);
        };
        let dataplane = Nat64Dataplane::open(&settings)?;
        for warning in dataplane.warnings() {
            tracing::warn!("nat64: {warning:?}");
        }
        Ok(Some(Self { dataplane }))
    }

    /// Takes the program off `uplinks` and frees its maps.
    pub(crate) fn remove(config: &Config, uplinks: &[String]) -> Result<(), Nat64Error> {
        let Some(settings) = settings(config) else {
            return Ok(());
        };
        let path = settings.directory();
        if !path.exists() {
            return Ok(());
        }
        let mut dataplane = Nat64Dataplane::open(&settings)?;
        uplinks.iter().for_each(|u| dataplane.detach(u));
        drop(dataplane);
        std::fs::remove_dir_all(&path).map_err(|source| Nat64Error::Directory { path, source })
    }

    /// Puts the program on the uplink, and the settings in force.
    pub(crate) fn attach(&mut self, uplink: &str) -> Result<(), Nat64Error> {
        let mechanism = self.dataplane.attach(uplink)?;
        tracing::info!(uplink, ?mechanism, "translating");
        Ok(())
    }

    /// Removes sessions that are out of time; how many.
    pub(crate) fn expire(&mut self) -> Result<usize, Nat64Error> {
        self.dataplane.expire(kun_ebpf_loader::nat64::now())
    }

    /// Removes entries and sessions of these inner hosts; how many entries.
    pub(crate) fn forget(&mut self, hosts: &HashSet<Addr>) -> Result<u64, Nat64Error> {
        self.dataplane.forget(hosts)
    }

    /// Figures for the metrics.
    pub(crate) fn counters(&self) -> Vec<(&'static str, u64)> {
        let Ok(stats) = self.dataplane.stats() else {
            return Vec::new();
        };
        let reasons = Reason::ALL
            .into_iter()
            .map(|r| (r.label(), stats.reason(r)))
            .filter(|(label, _)| label.starts_with("nat64_"));
        [
            ("bib_entries", stats.bib as u64),
            ("sessions", stats.sessions as u64),
        ]
        .into_iter()
        .chain(reasons)
        .collect()
    }

    /// Lines of the status.
    pub(crate) fn facts(&self) -> Vec<Fact> {
        let adopted = if self.dataplane.adopted() {
            "yes"
        } else {
            "no"
        };
        let mut facts = vec![fact("adopted", adopted.to_owned(), true)];
        facts.extend(
            self.counters()
                .into_iter()
                .map(|(name, value)| fact(name, value.to_string(), true)),
        );
        facts
    }
}

fn settings(config: &Config) -> Option<Nat64Config> {
    let gateway = config.nat64.gateway.as_ref()?;
    // kun.yaml is refused with the role and without a /96.
    let pref64 = config.nat64.pref64.iter().find(|p| p.prefix_len() == 96)?;
    let v4 = |nets: &[ipnet::Ipv4Net]| nets.iter().map(|n| (n.addr(), n.prefix_len())).collect();
    Some(Nat64Config {
        bpffs_root: config.agent.bpffs_root.clone(),
        pod_prefix: config.ipam.pod_prefix.net().addr(),
        pref64: (pref64.addr(), pref64.prefix_len()),
        pool: v4(&gateway.pool),
        clients: v4(&gateway.clients),
        port_block_bits: config.nat64.port_block_bits,
        local_port_base: config.nat64.local_port_base,
        slice: gateway.slice,
    })
}
