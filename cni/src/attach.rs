//! The verbs of the main plugin: interfaces and addresses.
//!
//! ADD: slot (durable), kernel, agent's programs, result; whatever fails, everything before is undone in reverse. While an agent
//! makes the slot durable, what needs no address is made already: the two take as long as one another. DEL: kernel,
//! then slot; the slot is never released while an interface may still carry its address.

use std::path::Path;

use kun_cni_core::names::{self, Carries};
use kun_cni_core::plan::{self, Draft, Facts, Op, Side};
use kun_cni_core::spec::{self, Attachment, Code, Failure, NetworkConfig, Success, Wishes};
use kun_config::types::SlotClass;
use kun_config::{Config, Interfaces};
use kun_control::{
    Allocation, AttachmentKey, Bandwidth, Client, ClientError, PortMapping, RateLimit, Request,
    Response, Traffic, Transport,
};

use crate::addresses::{self, key, release, unexpected};
use crate::allocator::Allocator;
use crate::early::Early;
use crate::ipam::core_key;
use crate::kernel::{self, Kernel, KernelError};
use crate::netns::Netns;

pub(crate) fn add(
    attachment: &Attachment,
    netns_path: &Path,
    network: &NetworkConfig,
    config: &Config,
) -> Result<Success, Failure> {
    let wishes = network.wishes(&attachment.args)?;
    served(&wishes)?;
    let key = key(attachment, network);
    let netns = Netns::open(netns_path)?;
    let mtu = match config.ipam.mtu {
        Some(mtu) => mtu,
        None => kernel::uplink_mtu(config.node.uplink.as_deref())?,
    };
    // Before the slot: a second ADD of a live attachment must not release its slot when it fails.
    let mut kernel = Kernel::open(&netns)?;
    let draft = Draft {
        key: core_key(&key),
        // Both pairs of a dual one have their names looked for, whether it will be one or not.
        class: SlotClass::Dual,
        interfaces: config.ipam.interfaces,
        mtu,
        mac: wishes.mac,
    };
    let pairs = draft.pairs();
    let hosts: Vec<&str> = pairs.iter().map(|pair| pair.host.as_str()).collect();
    kernel.require_absent(&draft.key, &attachment.ifname, &hosts)?;

    let mut allocator = Allocator::open(config)?;
    if let (Allocator::Alone(_), true) = (&allocator, wishes.needs_agent()) {
        return Err(without_agent(&wishes, config));
    }
    let mut early = Early::new(kernel, draft, local_ports(config));
    let allocation = addresses::allocate(
        &mut allocator,
        attachment,
        network,
        &wishes,
        config,
        Some(&mut |class| early.make(class)),
    );
    let allocation = match allocation {
        Ok(allocation) => allocation,
        Err(failure) => return Err(failure.also(&early.undo())),
    };
    // Alone, the store is closed at once: others wait for it.
    let agent = match allocator {
        Allocator::Agent(client) => Some(client),
        Allocator::Alone(_) => None,
    };
    let facts = facts(&allocation, &wishes, config, mtu);
    let made = match early.finish(&facts) {
        // Another ADD of this attachment is at work, or left this to DEL: the slot is its.
        Err(stands @ KernelError::Stands { .. }) => {
            return Err(Failure::from(stands).also(&early.undo()));
        }
        made => made.map_err(Failure::from),
    };
    let made = made.and_then(|()| attached(agent, &facts, &key, &wishes, config));
    if let Err(failure) = made {
        return Err(failure.also(&give_up(&key, &allocation, &early, config)));
    }
    let mut success = plan::result(&facts, &netns_path.to_string_lossy());
    success.dns = wishes.dns.clone().unwrap_or_default();
    let mut all = match network.previous.clone() {
        Some(previous) => success.after(previous),
        None => success,
    };
    if let Some(dns) = wishes.dns {
        // Whoever is asked for a resolver's configuration gives it as a whole: one of two plugins' parts would be nobody's.
        all.dns = dns;
    }
    Ok(all)
}

/// What no program translates is refused at once and for good: trying again changes nothing.
fn served(wishes: &Wishes) -> Result<(), Failure> {
    match wishes
        .ports
        .iter()
        .find(|port| port.protocol == spec::Transport::Sctp)
    {
        None => Ok(()),
        Some(port) => Err(Failure::new(
            Code::UnsupportedField,
            format!(
                "portMappings: host port {} for SCTP: kun translates TCP and UDP alone; give the pod hostNetwork, or let its clients reach its own address",
                port.host_port
            ),
        )),
    }
}

/// Limits and host ports are programs, and those are the agent's: they are not silently left out.
fn without_agent(wishes: &Wishes, config: &Config) -> Failure {
    let mut what = Vec::new();
    if wishes.ingress.is_some() || wishes.egress.is_some() {
        what.push("bandwidth");
    }
    if !wishes.ports.is_empty() {
        what.push("portMappings");
    }
    Failure::new(
        Code::TryAgainLater,
        format!(
            "{}: the node agent does this, and none answers at {}; start kun-proxy, or give the capability to another plugin of the chain",
            what.join(", "),
            config.agent.socket.display()
        ),
    )
}

/// Tells the agent that the interfaces stand, so that it attaches its programs before the pod runs. One that started in the
/// meantime has listed the live attachments already, perhaps before these interfaces were there: it is told too.
fn attached(
    agent: Option<Client>,
    facts: &Facts,
    key: &AttachmentKey,
    wishes: &Wishes,
    config: &Config,
) -> Result<(), Failure> {
    let mut client = match agent {
        Some(client) => client,
        None => match Client::connect(&config.agent.socket) {
            Ok(client) => client,
            Err(ClientError::NoAgent { .. }) => return Ok(()),
            Err(e) => return Err(Failure::new(Code::TryAgainLater, e)),
        },
    };
    let request = Request::Attached {
        key: key.clone(),
        host_interfaces: host_interfaces(facts),
        traffic: traffic(wishes),
    };
    match client.ask(&request) {
        Ok(Response::Done) => Ok(()),
        Ok(other) => Err(unexpected("Attached", other)),
        Err(e) => Err(Failure::new(Code::TryAgainLater, e)),
    }
}

/// What the agent holds of an attachment, where there is one.
fn verify(
    facts: &Facts,
    key: &AttachmentKey,
    wishes: &Wishes,
    config: &Config,
) -> Result<Vec<String>, Failure> {
    let mut client = match Client::connect(&config.agent.socket) {
        Ok(client) => client,
        Err(ClientError::NoAgent { .. }) if !wishes.needs_agent() => return Ok(Vec::new()),
        Err(ClientError::NoAgent { .. }) => return Err(without_agent(wishes, config)),
        Err(e) => return Err(Failure::new(Code::TryAgainLater, e)),
    };
    let request = Request::Verify {
        key: key.clone(),
        host_interfaces: host_interfaces(facts),
        traffic: traffic(wishes),
    };
    match client.ask(&request) {
        Ok(Response::Done) => Ok(Vec::new()),
        Ok(Response::NotAsExpected { missing }) => Ok(missing),
        Ok(other) => Err(unexpected("Verify", other)),
        Err(e) => Err(Failure::new(Code::TryAgainLater, e)),
    }
}

fn host_interfaces(facts: &Facts) -> Vec<String> {
    facts.pairs().into_iter().map(|pair| pair.host).collect()
}

/// In the agent's words.
fn traffic(wishes: &Wishes) -> Traffic {
    let limit = |limit: spec::RateLimit| RateLimit {
        rate: limit.rate,
        burst: limit.burst,
    };
    Traffic {
        bandwidth: Bandwidth {
            ingress: wishes.ingress.map(limit),
            egress: wishes.egress.map(limit),
        },
        port_mappings: port_mappings(wishes),
    }
}

/// In the agent's words.
pub(crate) fn port_mappings(wishes: &Wishes) -> Vec<PortMapping> {
    let mappings = wishes.ports.iter().map(|port| PortMapping {
        host_port: port.host_port,
        container_port: port.container_port,
        protocol: match port.protocol {
            spec::Transport::Tcp => Transport::Tcp,
            spec::Transport::Udp => Transport::Udp,
            spec::Transport::Sctp => Transport::Sctp,
        },
        host_ip: port.host_ip,
    });
    mappings.collect()
}

/// Undoes a failed ADD: interfaces, then the slot. Gives what could not be undone; the runtime's DEL will try again.
fn give_up(
    key: &AttachmentKey,
    allocation: &Allocation,
    early: &Early<'_>,
    config: &Config,
) -> Vec<String> {
    let failed = early.undo();
    if !failed.is_empty() {
        return failed;
    }
    release(key, Some(allocation.generation), config)
        .err()
        .map(|failure| failure.details)
        .into_iter()
        .collect()
}

pub(crate) fn del(key: &AttachmentKey, config: &Config) -> Result<(), Failure> {
    let core = core_key(key);
    let removed = kernel::revert(&plan::del(&core), &core);
    let failed: Vec<String> = removed.failed.iter().map(ToString::to_string).collect();
    match failed.split_first() {
        None => release(key, removed.generation, config),
        // An interface may still carry the address: the slot stays allocated.
        Some((first, more)) => Err(Failure::new(Code::Kernel, first).also(more)),
    }
}

pub(crate) fn check(
    attachment: &Attachment,
    netns_path: &Path,
    network: &NetworkConfig,
    config: &Config,
) -> Result<(), Failure> {
    let previous = addresses::previous(network)?;
    let wishes = network.wishes(&attachment.args)?;
    let key = key(attachment, network);
    let netns = Netns::open(netns_path)?;
    let allocation = addresses::known(&key, config)?;
    let mut facts = facts(&allocation, &wishes, config, 0);
    // The layout in which ADD made it: the node's may be another by now.
    let second = names::host_name(&facts.key, Carries::V4);
    let of_host = |i: &spec::Interface| i.sandbox.is_empty() && i.name == second;
    facts.interfaces = match previous.interfaces.iter().any(of_host) {
        true => Interfaces::Split,
        false => Interfaces::Shared,
    };
    // The MTU that ADD saw: the uplink's may have changed since, and a later plugin may have changed the pod's.
    let of_host = facts.pairs().first().and_then(|pair| {
        let ours = |i: &&spec::Interface| i.sandbox.is_empty() && i.name == pair.host;
        previous.interfaces.iter().find(ours)?.mtu
    });
    facts.mtu = match (of_host, config.ipam.mtu) {
        (Some(mtu), _) | (None, Some(mtu)) => mtu,
        (None, None) => kernel::uplink_mtu(config.node.uplink.as_deref())?,
    };
    let mut wrong = addresses::missing(
        &plan::result(&facts, &netns_path.to_string_lossy()),
        previous,
    );
    wrong.extend(changed_macs(
        &facts,
        previous,
        &netns_path.to_string_lossy(),
    ));
    // A later plugin of the chain may have taken a route away; then it is not in the result either (§2 CHECK).
    let expected: Vec<_> = plan::standing(&facts)
        .into_iter()
        .filter(|op| match op {
            Op::Route {
                side: Side::Pod,
                to,
                ..
            } => previous.routes.iter().any(|route| route.dst == *to),
            _ => true,
        })
        .collect();
    wrong.extend(Kernel::open(&netns)?.differences(&expected)?);
    wrong.extend(verify(&facts, &key, &wishes, config)?);
    addresses::as_expected(&wrong)
}

/// The node's neighbour entries are static. A later plugin that gives an interface another hardware address cuts it off.
fn changed_macs(facts: &Facts, previous: &Success, netns: &str) -> Vec<String> {
    facts
        .pairs()
        .iter()
        .filter_map(|pair| {
            let of_pod =
                |i: &&spec::Interface| i.sandbox == netns && i.name == pair.pod && i.mac.is_some();
            let told = previous.interfaces.iter().find(of_pod)?.mac.as_deref()?;
            let ours = pair.pod_mac.to_string();
            (!told.eq_ignore_ascii_case(&ours)).then(|| {
                format!(
                    "{}: hardware address {told}, not {ours}; give the `mac` capability to kun-cni, whose neighbour entries are static",
                    pair.pod
                )
            })
        })
        .collect()
}

/// What ADD makes of an allocation.
pub(crate) fn facts(allocation: &Allocation, wishes: &Wishes, config: &Config, mtu: u32) -> Facts {
    Facts {
        key: core_key(&allocation.key),
        generation: allocation.generation,
        v6: allocation.v6,
        v4: allocation.v4,
        interfaces: config.ipam.interfaces,
        mtu,
        mac: wishes.mac,
        local_ports: local_ports(config),
    }
}

/// First and last of the ports that a pod's connections come from.
fn local_ports(config: &Config) -> (u16, u16) {
    let base = config.nat64.local_port_base;
    let ports = (1_u32 << config.nat64.port_block_bits) - 1;
    let last = u16::try_from(u32::from(base) + ports).unwrap_or(u16::MAX);
    (base, last)
}
