//! Slots for the verbs: asked for, given back, and the words for what cannot be had.

use kun_cni_core::choice::{Wanted, wanted};
use kun_cni_core::spec::{AddressRange, Attachment, Code, Failure, NetworkConfig, Success, Wishes};
use kun_config::Config;
use kun_config::types::{BlockId, SlotClass};
use kun_control::{Allocation, AttachmentKey, PodRef, Request, Response, SlotRange, Unavailable};

use crate::allocator::{Allocator, Meanwhile};
use crate::attach::port_mappings;
use crate::ipam::core_key;
use crate::spool::{Entry, Spool};

/// Ranges and blocks that an error names: a node may have a thousand.
const MAX_NAMED: usize = 4;

/// The attachment's key.
pub(crate) fn key(attachment: &Attachment, network: &NetworkConfig) -> AttachmentKey {
    AttachmentKey {
        network: network.name.clone(),
        container_id: attachment.container_id.clone(),
        ifname: attachment.ifname.clone(),
    }
}

/// What the runtime tells about the pod.
fn pod(attachment: &Attachment) -> PodRef {
    let arg = |name| attachment.args.get(name).cloned().unwrap_or_default();
    PodRef {
        namespace: arg("K8S_POD_NAMESPACE"),
        name: arg("K8S_POD_NAME"),
        uid: arg("K8S_POD_UID"),
    }
}

/// A durable slot as wished for. `meanwhile`: what is done with the interfaces while an agent makes it durable; `None`: another
/// plugin makes them.
pub(crate) fn allocate(
    allocator: &mut Allocator,
    attachment: &Attachment,
    network: &NetworkConfig,
    wishes: &Wishes,
    config: &Config,
    meanwhile: Option<Meanwhile<'_>>,
) -> Result<Allocation, Failure> {
    let (class, wanted) = wanted(wishes, config.ipam.pod_prefix)?;
    let (slot, within) = match wanted {
        Wanted::Any => (None, Vec::new()),
        Wanted::Slot(slot) => (Some(slot), Vec::new()),
        Wanted::Within(ranges) => (
            None,
            ranges
                .into_iter()
                .map(|(first, last)| SlotRange { first, last })
                .collect(),
        ),
    };
    let request = Request::Allocate {
        key: key(attachment, network),
        pod: pod(attachment),
        class,
        slot,
        within,
        delegated: meanwhile.is_none(),
        // What another plugin makes has its host ports from yet another.
        ports: match meanwhile {
            Some(_) => port_mappings(wishes),
            None => Vec::new(),
        },
    };
    let (response, not_gathered) = allocator.ask_for_slot(&request, config, meanwhile)?;
    let failure = match response {
        Response::Allocation { allocation } => return Ok(allocation),
        Response::Exhausted { exhausted } => Failure::new(Code::TryAgainLater, exhausted),
        Response::Unavailable { slot, because } => {
            let address = config.ipam.pod_prefix.address(slot);
            unavailable(
                &match slot.v4() {
                    Some(v4) => format!("{v4} ({address})"),
                    None => address.to_string(),
                },
                because,
            )
        }
        Response::Elsewhere { class, blocks } => elsewhere(&wishes.ranges, class, &blocks, config),
        other => unexpected("Allocate", other),
    };
    Err(failure.also(not_gathered.as_slice()))
}

/// Ranges that this node has no part in.
fn elsewhere(
    sets: &[Vec<AddressRange>],
    class: SlotClass,
    blocks: &[BlockId],
    config: &Config,
) -> Failure {
    let ranges = sets.iter().flatten();
    let ranges = named(ranges.map(|range| format!("{}-{}", range.first, range.last)));
    let (slots, blocks) = match class {
        SlotClass::Dual => {
            let both = |block: &BlockId| {
                format!("{} and {}", block.v4(), block.v6(config.ipam.pod_prefix))
            };
            ("slots with IPv4", named(blocks.iter().map(both)))
        }
        SlotClass::V6Only => {
            let v6 = |block: &BlockId| block.v6(config.ipam.pod_prefix).to_string();
            ("IPv6-only slots", named(blocks.iter().map(v6)))
        }
    };
    Failure::new(
        Code::InvalidConfig,
        format!(
            "ipRanges {ranges}: this node has none of these addresses; of {slots} it gives out {blocks}: ask for a range in those, or for none"
        ),
    )
}

/// The first few of many.
fn named(all: impl Iterator<Item = String>) -> String {
    let mut all: Vec<String> = all.collect();
    let more = all.len().saturating_sub(MAX_NAMED);
    all.truncate(MAX_NAMED);
    let listed = all.join(", ");
    match more {
        0 => listed,
        more => format!("{listed} and {more} more"),
    }
}

fn unavailable(address: &str, because: Unavailable) -> Failure {
    match because {
        Unavailable::NotOurs => Failure::new(
            Code::InvalidConfig,
            format!("{address} is in no block of this node; `kunctl ipam` shows those that are"),
        ),
        Unavailable::Allocated { key, pod } => {
            let who = match pod.name.is_empty() {
                true => format!("container {} ({})", key.container_id, key.ifname),
                false => format!("pod {}/{}", pod.namespace, pod.name),
            };
            Failure::new(
                Code::TryAgainLater,
                format!("{address} is in use by {who}; it can be had some time after that is gone"),
            )
        }
        Unavailable::Cooling {
            free_in_secs: Some(seconds),
        } => Failure::new(
            Code::TryAgainLater,
            format!("{address} was released and cools; it is free in {seconds} s"),
        ),
        Unavailable::Cooling { free_in_secs: None } => Failure::new(
            Code::TryAgainLater,
            format!("{address} was released and is not forgotten yet; `kunctl ipam` says by whom"),
        ),
        Unavailable::HasAnother { slot } => Failure::new(
            Code::InvalidConfig,
            format!(
                "the attachment has the slot {slot} already, which is not what is asked for; a runtime calls DEL before it calls ADD with other parameters"
            ),
        ),
    }
}

/// The attachment's slot. `None`: it has none.
pub(crate) fn lookup(key: &AttachmentKey, config: &Config) -> Result<Option<Allocation>, Failure> {
    match Allocator::open(config)?.ask(&Request::Lookup { key: key.clone() })? {
        Response::Allocation { allocation } => Ok(Some(allocation)),
        Response::Unknown => Ok(None),
        other => Err(unexpected("Lookup", other)),
    }
}

/// [`lookup`] for CHECK.
pub(crate) fn known(key: &AttachmentKey, config: &Config) -> Result<Allocation, Failure> {
    lookup(key, config)?.ok_or_else(|| {
        Failure::new(
            Code::UnknownContainer,
            format!(
                "container {} has no slot for {} in network {}",
                key.container_id, key.ifname, key.network
            ),
        )
    })
}

/// The slot begins to cool, now or, when neither agent nor store can be had, as soon as one can.
pub(crate) fn release(
    key: &AttachmentKey,
    generation: Option<u64>,
    config: &Config,
) -> Result<(), Failure> {
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

/// STATUS: ready when a slot of the default class can be had.
pub(crate) fn status(config: &Config) -> Result<(), Failure> {
    let not_available = |what: String| Failure::new(Code::NotAvailable, what);
    let request = Request::Capacity { class: None };
    let (response, not_gathered) = Allocator::open(config)
        .and_then(|mut allocator| allocator.ask_for_slot(&request, config, None))
        .map_err(|e| not_available(e.to_string()))?;
    match response {
        Response::Capacity { free: 1.., .. } => Ok(()),
        Response::Capacity {
            allocated, cooling, ..
        } => Err(not_available(format!(
            "no slot is free: {allocated} allocated, {cooling} cooling; `kunctl ipam` shows whose"
        ))
        .also(not_gathered.as_slice())),
        other => Err(not_available(unexpected("Capacity", other).details)),
    }
}

/// An answer that does not fit the request.
pub(crate) fn unexpected(request: &str, response: Response) -> Failure {
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

/// CHECK's `prevResult`.
pub(crate) fn previous(network: &NetworkConfig) -> Result<&Success, Failure> {
    network.previous.as_ref().ok_or_else(|| {
        Failure::new(
            Code::InvalidConfig,
            "prevResult: missing; CHECK needs the result of ADD",
        )
    })
}

/// Addresses of ours that the previous result lacks.
pub(crate) fn missing(ours: &Success, previous: &Success) -> Vec<String> {
    ours.ips
        .iter()
        .filter(|ip| !previous.ips.iter().any(|p| p.address == ip.address))
        .map(|ip| format!("prevResult lacks our address {}", ip.address))
        .collect()
}

/// CHECK's verdict.
pub(crate) fn as_expected(wrong: &[String]) -> Result<(), Failure> {
    if wrong.is_empty() {
        return Ok(());
    }
    Err(Failure::new(
        Code::NotAsExpected,
        format!("not as ADD left it: {}", wrong.join("; ")),
    ))
}
