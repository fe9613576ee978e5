//! The verbs, from invocation to result.
//!
//! ADD: slot (durable), kernel, agent's programs, result; whatever fails, everything before is undone in reverse. DEL: kernel,
//! then slot; the slot is never released while an interface may still carry its address, and a release that nobody can take is
//! spooled. Nothing else is kept between two invocations.

use std::collections::BTreeSet;
use std::path::Path;

use kun_cni_core::ipam::Key;
use kun_cni_core::plan::{self, Facts, Side, Undo};
use kun_cni_core::spec::{
    Attachment, AttachmentId, Code, Failure, Invocation, NetworkConfig, Success, Version,
};
use kun_config::Config;
use kun_config::types::SlotClass;
use kun_control::{
    Allocation, AttachmentKey, Client, ClientError, PodRef, Request, Response, Traffic,
};
use serde_json::{Value, json};

use crate::allocator::Allocator;
use crate::ipam::core_key;
use crate::kernel::{self, Kernel, KernelError};
use crate::netlink::Rtnl;
use crate::netns::{Netns, NetnsError};
use crate::spool::{Entry, Spool};

/// What goes to stdout, and whether it is a failure.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// Exit code 0.
    Success(Option<Value>),
    /// Exit code 1.
    Failure(Value),
}

/// Runs a verb. `load` reads `kun.yaml` at the path that the network configuration names.
pub fn run(
    invocation: &Invocation,
    stdin: &[u8],
    load: impl Fn(&Path) -> Result<Config, String>,
) -> Outcome {
    if *invocation == Invocation::Version {
        return Outcome::Success(Some(versions()));
    }
    let network = match NetworkConfig::parse(stdin) {
        Ok(network) => network,
        Err(e) => return Outcome::Failure(Failure::from(e).to_json(Version::CURRENT)),
    };
    let outcome = load(&network.kun_config)
        .map_err(|what| Failure::new(Code::InvalidConfig, what))
        .and_then(|config| verb(invocation, &network, &config));
    match outcome {
        Ok(Some(success)) => Outcome::Success(Some(success.to_json(network.version))),
        Ok(None) => Outcome::Success(None),
        Err(failure) => Outcome::Failure(failure.to_json(network.version)),
    }
}

/// The VERSION result. Its `cniVersion` is the newest: stdin, which a caller may leave open, is not read.
fn versions() -> Value {
    json!({
        "cniVersion": Version::CURRENT.as_str(),
        "supportedVersions": Version::ALL.map(Version::as_str),
    })
}

fn verb(
    invocation: &Invocation,
    network: &NetworkConfig,
    config: &Config,
) -> Result<Option<Success>, Failure> {
    match invocation {
        Invocation::Add(attachment, netns) => add(attachment, netns, network, config).map(Some),
        Invocation::Del(attachment, _) => del(&key(attachment, network), config).map(|()| None),
        Invocation::Check(attachment, netns) => {
            network.require("CHECK", Version::V0_4_0)?;
            check(attachment, netns, network, config).map(|()| None)
        }
        Invocation::Status => {
            network.require("STATUS", Version::V1_1_0)?;
            status(config).map(|()| None)
        }
        Invocation::Gc => {
            network.require("GC", Version::V1_1_0)?;
            let valid = network.valid_attachments()?;
            gc(&network.name, &valid, config).map(|()| None)
        }
        Invocation::Version => Ok(None),
    }
}

fn add(
    attachment: &Attachment,
    netns_path: &Path,
    network: &NetworkConfig,
    config: &Config,
) -> Result<Success, Failure> {
    let key = key(attachment, network);
    let class = network.wants_ipv4(&attachment.args)?.map(|v4| match v4 {
        true => SlotClass::Dual,
        false => SlotClass::V6Only,
    });
    let netns = Netns::open(netns_path)?;
    let mtu = match config.ipam.mtu {
        Some(mtu) => mtu,
        None => kernel::uplink_mtu(config.node.uplink.as_deref())?,
    };
    // Before the slot: a second ADD of a live attachment must not release its slot when it fails.
    let mut kernel = Kernel::open(&netns)?;
    kernel.require_absent(&attachment.ifname)?;

    let mut allocator = Allocator::open(config)?;
    let allocation = allocate(&mut allocator, &key, pod(attachment), class, config)?;
    // Alone, the store is closed at once: others wait for it.
    let agent = match allocator {
        Allocator::Agent(client) => Some(client),
        Allocator::Alone(_) => None,
    };
    let facts = facts(&allocation, config, mtu);
    let mut undo = Vec::new();
    let made = kernel
        .apply(&plan::add(&facts), &mut undo)
        .map_err(Failure::from)
        .and_then(|()| attached(agent, &facts, &key, config));
    if let Err(failure) = made {
        return Err(failure.also(&give_up(&key, &allocation, &undo, config)));
    }
    let success = plan::result(&facts, &netns_path.to_string_lossy());
    Ok(match network.previous.clone() {
        Some(previous) => success.after(previous),
        None => success,
    })
}

fn allocate(
    allocator: &mut Allocator,
    key: &AttachmentKey,
    pod: PodRef,
    class: Option<SlotClass>,
    config: &Config,
) -> Result<Allocation, Failure> {
    let response = allocator.ask(&Request::Allocate {
        key: key.clone(),
        pod,
        class,
        slot: None,
        within: Vec::new(),
        delegated: false,
    })?;
    match response {
        Response::Allocation { allocation } => Ok(allocation),
        Response::Exhausted {
            retry_after_secs,
            allocated,
            cooling,
        } => {
            let kind = match class.unwrap_or(config.ipam.default_class) {
                SlotClass::Dual => "dual (IPv4 and IPv6)",
                SlotClass::V6Only => "IPv6-only",
            };
            let when = match retry_after_secs {
                Some(seconds) => format!("the next is free in {seconds} s"),
                None if allocated == 0 => {
                    "this node has no block of them; is the agent running and did the operator give it one?".to_owned()
                }
                None => "none is cooling; give the pool more blocks".to_owned(),
            };
            Err(Failure::new(
                Code::TryAgainLater,
                format!("no {kind} slot is free: {allocated} allocated, {cooling} cooling; {when}"),
            ))
        }
        other => Err(unexpected("Allocate", other)),
    }
}

/// Tells the agent that the interfaces stand, so that it attaches its programs before the pod runs. One that started in the
/// meantime has listed the live attachments already, perhaps before these interfaces were there: it is told too.
fn attached(
    agent: Option<Client>,
    facts: &Facts,
    key: &AttachmentKey,
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
        host_interfaces: facts.pairs().into_iter().map(|pair| pair.host).collect(),
        traffic: Traffic::default(),
    };
    match client.ask(&request) {
        Ok(Response::Done) => Ok(()),
        Ok(other) => Err(unexpected("Attached", other)),
        Err(e) => Err(Failure::new(Code::TryAgainLater, e)),
    }
}

/// Undoes a failed ADD: interfaces, then the slot. Gives what could not be undone; the runtime's DEL will try again.
fn give_up(
    key: &AttachmentKey,
    allocation: &Allocation,
    undo: &[Undo],
    config: &Config,
) -> Vec<String> {
    let failed: Vec<String> = kernel::revert(undo, &core_key(key))
        .iter()
        .map(ToString::to_string)
        .collect();
    if !failed.is_empty() {
        return failed;
    }
    release(key, Some(allocation.generation), config)
        .err()
        .map(|failure| failure.details)
        .into_iter()
        .collect()
}

fn del(key: &AttachmentKey, config: &Config) -> Result<(), Failure> {
    let core = core_key(key);
    let mut rtnl = Rtnl::open().map_err(KernelError::from)?;
    let mut generation = None;
    let mut failed = Vec::new();
    for Undo::RemoveLink { host } in plan::del(&core) {
        match kernel::remove_link(&mut rtnl, &host, &core) {
            Ok(found) => generation = found.or(generation),
            Err(e) => failed.push(e.to_string()),
        }
    }
    match failed.split_first() {
        None => release(key, generation, config),
        // An interface may still carry the address: the slot stays allocated.
        Some((first, more)) => Err(Failure::new(Code::Kernel, first).also(more)),
    }
}

/// The slot begins to cool, now or, when neither agent nor store can be had, as soon as one can.
fn release(key: &AttachmentKey, generation: Option<u64>, config: &Config) -> Result<(), Failure> {
    let request = Request::Release {
        key: key.clone(),
        generation,
    };
    let asked = Allocator::open(config).and_then(|mut allocator| allocator.ask(&request));
    if let Ok(Response::Done) = asked {
        return Ok(());
    }
    Spool::new(&config.agent.state_dir).put(&Entry {
        key: core_key(key),
        generation,
    })?;
    Ok(())
}

fn check(
    attachment: &Attachment,
    netns_path: &Path,
    network: &NetworkConfig,
    config: &Config,
) -> Result<(), Failure> {
    let previous = network.previous.as_ref().ok_or_else(|| {
        Failure::new(
            Code::InvalidConfig,
            "prevResult: missing; CHECK needs the result of ADD",
        )
    })?;
    let key = key(attachment, network);
    let netns = Netns::open(netns_path)?;
    let response = Allocator::open(config)?.ask(&Request::Lookup { key: key.clone() })?;
    let allocation = match response {
        Response::Allocation { allocation } => allocation,
        Response::Unknown => {
            return Err(Failure::new(
                Code::UnknownContainer,
                format!(
                    "container {} has no slot for {} in network {}",
                    key.container_id, key.ifname, key.network
                ),
            ));
        }
        other => return Err(unexpected("Lookup", other)),
    };
    // The MTU that ADD saw: the uplink's may have changed since.
    let mtu = previous
        .interfaces
        .iter()
        .find(|i| i.name == key.ifname && !i.sandbox.is_empty())
        .and_then(|i| i.mtu);
    let mtu = match (mtu, config.ipam.mtu) {
        (Some(mtu), _) | (None, Some(mtu)) => mtu,
        (None, None) => kernel::uplink_mtu(config.node.uplink.as_deref())?,
    };
    let facts = facts(&allocation, config, mtu);
    let told = plan::result(&facts, &netns_path.to_string_lossy());
    let mut wrong: Vec<String> = told
        .ips
        .iter()
        .filter(|ip| !previous.ips.iter().any(|p| p.address == ip.address))
        .map(|ip| format!("prevResult lacks our address {}", ip.address))
        .collect();
    // A later plugin of the chain may have taken a route away; then it is not in the result either (§2 CHECK).
    let expected: Vec<_> = plan::add(&facts)
        .into_iter()
        .filter(|op| match op {
            plan::Op::Route {
                side: Side::Pod,
                to,
                ..
            } => previous.routes.iter().any(|route| route.dst == *to),
            _ => true,
        })
        .collect();
    wrong.extend(Kernel::open(&netns)?.differences(&expected)?);
    if wrong.is_empty() {
        return Ok(());
    }
    Err(Failure::new(
        Code::NotAsExpected,
        format!("not as ADD left it: {}", wrong.join("; ")),
    ))
}

/// Ready when an agent answers, or when a slot can be had without it.
fn status(config: &Config) -> Result<(), Failure> {
    let not_available = |what: String| Failure::new(Code::NotAvailable, what);
    match Allocator::open(config).map_err(|e| not_available(e.to_string()))? {
        Allocator::Agent(mut client) => match client.ask(&Request::Ipam) {
            Ok(Response::Ipam { .. }) => Ok(()),
            Ok(other) => Err(not_available(unexpected("Ipam", other).details)),
            Err(e) => Err(not_available(e.to_string())),
        },
        Allocator::Alone(service) => {
            let class = config.ipam.default_class;
            let (allocated, cooling, free) = service
                .counts(class, crate::clock::now())
                .map_err(|e| not_available(e.to_string()))?;
            if free > 0 {
                return Ok(());
            }
            Err(not_available(format!(
                "no slot is free: {allocated} allocated, {cooling} cooling, and no agent answers at {}",
                config.agent.socket.display()
            )))
        }
    }
}

/// DEL for every attachment of the network that is not valid any more, by the store and by the interfaces' tags; carries on past
/// failures and tells all of them.
fn gc(network: &str, valid: &BTreeSet<AttachmentId>, config: &Config) -> Result<(), Failure> {
    let mut stale: BTreeSet<AttachmentKey> = BTreeSet::new();
    match Allocator::open(config)?.ask(&Request::Ipam)? {
        Response::Ipam { slots } => stale.extend(
            slots
                .into_iter()
                .filter(|row| row.state == "allocated")
                .map(|row| row.key),
        ),
        other => return Err(unexpected("Ipam", other)),
    }
    let links = Rtnl::open()
        .and_then(|mut rtnl| rtnl.links())
        .map_err(KernelError::from)?;
    stale.extend(
        links
            .iter()
            .filter_map(|link| plan::key_in(link.alias.as_deref()?))
            .map(|key: Key| AttachmentKey {
                network: key.network,
                container_id: key.container_id,
                ifname: key.ifname,
            }),
    );
    let failed: Vec<String> = stale
        .into_iter()
        .filter(|key| {
            key.network == network
                && !valid.contains(&AttachmentId {
                    container_id: key.container_id.clone(),
                    ifname: key.ifname.clone(),
                })
        })
        .filter_map(|key| del(&key, config).err())
        .map(|failure| failure.details)
        .collect();
    match failed.split_first() {
        None => Ok(()),
        Some((first, more)) => Err(Failure::new(Code::Kernel, first).also(more)),
    }
}

fn key(attachment: &Attachment, network: &NetworkConfig) -> AttachmentKey {
    AttachmentKey {
        network: network.name.clone(),
        container_id: attachment.container_id.clone(),
        ifname: attachment.ifname.clone(),
    }
}

fn pod(attachment: &Attachment) -> PodRef {
    let arg = |name| attachment.args.get(name).cloned().unwrap_or_default();
    PodRef {
        namespace: arg("K8S_POD_NAMESPACE"),
        name: arg("K8S_POD_NAME"),
        uid: arg("K8S_POD_UID"),
    }
}

fn facts(allocation: &Allocation, config: &Config, mtu: u32) -> Facts {
    let base = config.nat64.local_port_base;
    let ports = (1_u32 << config.nat64.port_block_bits) - 1;
    let last = u16::try_from(u32::from(base) + ports).unwrap_or(u16::MAX);
    Facts {
        key: core_key(&allocation.key),
        generation: allocation.generation,
        v6: allocation.v6,
        v4: allocation.v4,
        interfaces: config.ipam.interfaces,
        mtu,
        local_ports: (base, last),
    }
}

fn unexpected(request: &str, response: Response) -> Failure {
    match response {
        Response::Failed { message } => Failure::new(Code::TryAgainLater, message),
        other => Failure::new(
            Code::TryAgainLater,
            format!(
                "the agent answered {request} with {other:?}; are both programs of one version?"
            ),
        ),
    }
}

impl From<KernelError> for Failure {
    fn from(e: KernelError) -> Self {
        match e {
            KernelError::Netns(e) => e.into(),
            e @ (KernelError::Netlink(_)
            | KernelError::Refused { .. }
            | KernelError::Gone { .. }
            | KernelError::NoCarrier { .. }
            | KernelError::Exists { .. }
            | KernelError::Foreign { .. }) => Failure::new(Code::Kernel, e),
            e @ KernelError::NoUplink { .. } => Failure::new(Code::InvalidConfig, e),
        }
    }
}

impl From<NetnsError> for Failure {
    fn from(e: NetnsError) -> Self {
        Failure::new(Code::InvalidNamespace, e)
    }
}
