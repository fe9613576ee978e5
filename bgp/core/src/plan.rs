//! From what this node owns and what is ready to a route set for every peer.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::{Ipv4Net, Ipv6Net};
use kun_config::Bgp;
use kun_config::types::{BlockId, PodPrefix};

use crate::RouteSet;

/// Whether the kernel would forward what we announce.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Datapath {
    /// Not yet: nothing is announced for the first time, and nothing that stands is withdrawn.
    #[default]
    Starting,
    /// Programs are attached and maps are filled.
    Ready,
    /// It was there and broke: VIPs and the translator's prefixes go, blocks (plain routes) stay.
    Failed,
}

/// What the plan depends on, besides the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inputs {
    /// The /96 under which blocks have their IPv6 half.
    pub pod_prefix: PodPrefix,
    /// Blocks that this node owns.
    pub blocks: Vec<BlockId>,
    /// Virtual addresses of LoadBalancer services, and whether this node has a ready endpoint for each.
    pub vips: BTreeMap<IpAddr, bool>,
    /// Prefixes that this gateway translates; empty elsewhere.
    pub pref64: Vec<Ipv6Net>,
    /// IPv4 addresses that this gateway translates to; empty elsewhere.
    pub nat64_pool: Vec<Ipv4Net>,
    /// Services, EndpointSlices and blocks were read to the end once, and are read still.
    pub synced: bool,
    /// The kernel side.
    pub datapath: Datapath,
    /// This node is to be emptied: every route carries GRACEFUL_SHUTDOWN (RFC 8326) before it goes.
    pub draining: bool,
}

/// Why there is no plan: whoever asked keeps what it announces now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Hold {
    /// Half a view of the cluster withdraws what the other half needs.
    #[error("the cluster view is not complete; routes stay as they are")]
    NotSynced,
    /// A route announced before its datapath stands is a black hole.
    #[error("the datapath is not ready; routes stay as they are")]
    DatapathStarting,
}

/// The route set of every peer of `config`, by the peer's name. `held` is what the last plan gave: over the limit of a peer, what it
/// holds already stays.
pub fn plan(
    config: &Bgp,
    inputs: &Inputs,
    held: &BTreeMap<String, RouteSet>,
) -> Result<BTreeMap<String, RouteSet>, Hold> {
    let _ = (config, held);
    if !inputs.synced {
        return Err(Hold::NotSynced);
    }
    if inputs.datapath == Datapath::Starting {
        return Err(Hold::DatapathStarting);
    }
    Ok(BTreeMap::new())
}
