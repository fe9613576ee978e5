//! The fabric: a ToR router, the cluster's machines, and the internet host, joined by veth pairs.

use anyhow::{Context, Result};
use kun_harness::{Netns, veth};

use super::names::{
    CONTROL, DNS_V4, INTERNET_V4, LabName, MACHINES, Machine, TOR_INTERNET_V4, TOR_OUTSIDE_V6,
    WEB_V4,
};

/// The namespaces, left standing when this drops: [`super::down`] removes them by name.
#[derive(Debug)]
pub struct Topology {
    /// The ToR.
    pub tor: Netns,
    /// The internet host: IPv4 only.
    pub internet: Netns,
    /// Nodes and gateway, in the order of [`MACHINES`].
    pub machines: Vec<Netns>,
    /// Where a control plane runs, if there is one.
    pub control: Option<Netns>,
}

impl Topology {
    /// Makes everything up to layer 3; routes between machines are BGP's.
    pub fn build(name: &LabName, with_control: bool) -> Result<Self> {
        let tor = router(name, "tor")?;
        // Flows hash over addresses and ports, so that several nodes share a virtual address.
        tor.sysctl("net.ipv4.fib_multipath_hash_policy", "1")?;
        tor.sysctl("net.ipv6.fib_multipath_hash_policy", "1")?;
        let mut machines = Vec::new();
        for machine in &MACHINES {
            machines.push(build_machine(name, &tor, machine)?);
        }
        let control = match with_control {
            true => Some(build_machine(name, &tor, &CONTROL)?),
            false => None,
        };
        let internet = build_internet(name, &tor)?;
        Ok(Self {
            tor,
            internet,
            machines,
            control,
        })
    }

    /// A machine's namespace.
    pub fn machine(&self, machine: &Machine) -> &Netns {
        let index = MACHINES.iter().position(|m| m.name == machine.name);
        &self.machines[index.expect("every machine is in MACHINES")]
    }
}

fn router(name: &LabName, part: &str) -> Result<Netns> {
    let netns = Netns::create(name.netns(part))
        .with_context(|| format!("making the namespace of {part}"))?;
    netns.forward()?;
    Ok(netns)
}

fn build_machine(name: &LabName, tor: &Netns, machine: &Machine) -> Result<Netns> {
    let netns = router(name, machine.name)?;
    let tor_if = machine.tor_interface();
    veth(tor, &tor_if, &netns, "eth0")?;
    tor.exec(&format!("addr add {}/30 dev {tor_if}", machine.tor_v4()))?;
    tor.exec(&format!(
        "addr add {}/64 dev {tor_if} nodad",
        machine.tor_v6()
    ))?;
    netns.exec(&format!("addr add {}/30 dev eth0", machine.v4()))?;
    netns.exec(&format!("addr add {}/64 dev eth0 nodad", machine.v6()))?;
    netns.exec(&format!("route add default via {}", machine.tor_v4()))?;
    netns.exec(&format!("-6 route add default via {}", machine.tor_v6()))?;
    Ok(netns)
}

fn build_internet(name: &LabName, tor: &Netns) -> Result<Netns> {
    let netns = Netns::create(name.netns("internet"))
        .context("making the namespace of the internet host")?;
    // Not a single IPv6 address: what reaches it from an IPv6-only pod was translated.
    netns.sysctl("net.ipv6.conf.all.disable_ipv6", "1")?;
    netns.sysctl("net.ipv6.conf.default.disable_ipv6", "1")?;
    veth(tor, "internet", &netns, "eth0")?;
    tor.exec(&format!("addr add {TOR_INTERNET_V4}/24 dev internet"))?;
    tor.exec(&format!("addr add {TOR_OUTSIDE_V6}/64 dev lo nodad"))?;
    for address in [INTERNET_V4, WEB_V4, DNS_V4] {
        netns.exec(&format!("addr add {address}/24 dev eth0"))?;
    }
    netns.exec(&format!("route add default via {TOR_INTERNET_V4}"))?;
    Ok(netns)
}
