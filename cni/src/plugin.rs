//! The verbs, from invocation to result: which part is played, and what becomes of it on stdout.
//!
//! Nothing is kept between two invocations but what the store holds and the kernel shows.

use std::collections::BTreeSet;
use std::path::Path;

use kun_cni_core::ipam::Key;
use kun_cni_core::spec::{
    AttachmentId, Code, Failure, Invocation, NetworkConfig, Role, Success, Version,
};
use kun_cni_core::tag;
use kun_config::Config;
use kun_control::{AttachmentKey, Request, Response};
use serde_json::{Value, json};

use crate::addresses::{self, key, unexpected};
use crate::allocator::Allocator;
use crate::ipam::core_key;
use crate::kernel::KernelError;
use crate::netlink::Rtnl;
use crate::netns::NetnsError;
use crate::{attach, delegate, lost};

/// Longest `cniVersion` that VERSION repeats.
const MAX_VERSION: usize = 64;

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
        return Outcome::Success(Some(versions(stdin)));
    }
    let network = match NetworkConfig::parse(stdin) {
        Ok(network) => network,
        Err(e) => return refused(e.into(), stdin),
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

/// An error result before the configuration is understood: in the configuration's version where that can be read.
pub fn refused(failure: Failure, stdin: &[u8]) -> Outcome {
    let version = told_version(stdin).and_then(|text| Version::parse(&text).ok());
    Outcome::Failure(failure.to_json(version.unwrap_or(Version::CURRENT)))
}

/// The VERSION result: the caller's own `cniVersion`, else the newest.
fn versions(stdin: &[u8]) -> Value {
    let told = told_version(stdin).unwrap_or_else(|| Version::CURRENT.as_str().to_owned());
    json!({
        "cniVersion": told,
        "supportedVersions": Version::ALL.map(Version::as_str),
    })
}

fn told_version(stdin: &[u8]) -> Option<String> {
    let value: Value = serde_json::from_slice(stdin).ok()?;
    let text = value.get("cniVersion")?.as_str()?;
    (1..=MAX_VERSION)
        .contains(&text.len())
        .then(|| text.to_owned())
}

fn verb(
    invocation: &Invocation,
    network: &NetworkConfig,
    config: &Config,
) -> Result<Option<Success>, Failure> {
    if let Invocation::Add(..) = invocation {
        network.require_short_name()?;
    }
    match (invocation, &network.role) {
        (Invocation::Add(attachment, netns), Role::Main) => {
            attach::add(attachment, netns, network, config).map(Some)
        }
        (Invocation::Add(attachment, _), Role::Ipam(options)) => {
            delegate::add(attachment, network, options, config).map(Some)
        }
        (Invocation::Del(attachment, _), Role::Main) => {
            del(&key(attachment, network), config).map(|()| None)
        }
        (Invocation::Del(attachment, _), Role::Ipam(_)) => {
            addresses::release(&key(attachment, network), None, config).map(|()| None)
        }
        (Invocation::Check(attachment, netns), role) => {
            network.require("CHECK", Version::V0_4_0)?;
            match role {
                Role::Main => attach::check(attachment, netns, network, config),
                Role::Ipam(options) => delegate::check(attachment, network, options, config),
            }
            .map(|()| None)
        }
        (Invocation::Status, _) => {
            network.require("STATUS", Version::V1_1_0)?;
            addresses::status(config).map(|()| None)
        }
        (Invocation::Gc, role) => {
            network.require("GC", Version::V1_1_0)?;
            let valid = network.valid_attachments()?;
            gc(&network.name, role, &valid, config).map(|()| None)
        }
        (Invocation::Version, _) => Ok(None),
    }
}

/// DEL of the main plugin.
fn del(key: &AttachmentKey, config: &Config) -> Result<(), Failure> {
    // Once its interfaces are gone, nothing tells any more that there must have been a store.
    lost::remember(&core_key(key), config)?;
    attach::del(key, config)
}

/// DEL for every attachment of the network that is not valid any more, by the store and by the interfaces' tags; carries on past
/// failures and tells all of them. Who is asked to come again is: each DEL would wait as long.
fn gc(
    network: &str,
    role: &Role,
    valid: &BTreeSet<AttachmentId>,
    config: &Config,
) -> Result<(), Failure> {
    let mut stale: BTreeSet<AttachmentKey> = BTreeSet::new();
    let mut failed: Vec<Failure> = Vec::new();
    match allocated(config) {
        Ok(keys) => stale.extend(keys),
        Err(failure) if failure.code == Code::TryAgainLater => return Err(failure),
        // The interfaces of pods that are gone tell enough to go.
        Err(failure) => failed.push(failure),
    }
    match Rtnl::open().and_then(|mut rtnl| rtnl.links()) {
        Ok(links) => stale.extend(
            links
                .iter()
                .filter_map(|link| tag::key_in(link.alias.as_deref()?))
                .map(|key: Key| AttachmentKey {
                    network: key.network,
                    container_id: key.container_id,
                    ifname: key.ifname,
                }),
        ),
        Err(e) => failed.push(KernelError::from(e).into()),
    }
    let gone = stale.into_iter().filter(|key| {
        key.network == network
            && !valid.contains(&AttachmentId {
                container_id: key.container_id.clone(),
                ifname: key.ifname.clone(),
            })
    });
    failed.extend(gone.filter_map(|key| match role {
        Role::Main => del(&key, config).err(),
        Role::Ipam(_) => addresses::release(&key, None, config).err(),
    }));
    let mut failed = failed.into_iter();
    let Some(first) = failed.next() else {
        return Ok(());
    };
    let more: Vec<String> = failed.map(|failure| failure.details).collect();
    Err(first.also(&more))
}

/// Who has a slot by the store.
fn allocated(config: &Config) -> Result<Vec<AttachmentKey>, Failure> {
    match Allocator::open(config)?.ask(&Request::Ipam)? {
        Response::Ipam { slots, .. } => Ok(slots
            .into_iter()
            .filter(|row| row.state == "allocated")
            .map(|row| row.key)
            .collect()),
        other => Err(unexpected("Ipam", other)),
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
            | KernelError::Stands { .. }
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
