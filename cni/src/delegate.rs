//! The verbs of the IPAM plugin (`"ipam": {"type": "kun-cni"}` of another plugin): addresses alone (CNI §4).
//!
//! The result has no interfaces, and addresses have the length of their block: that is the subnet in which the next hop lies.
//! Of such a subnet the first and the last address are no host's: the network and broadcast addresses of IPv4, the
//! subnet-router anycast address of IPv6 (RFC 4291 §2.6.1). The first is the next hop, which the main plugin gives to the node.

use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use kun_cni_core::spec::{
    Attachment, Code, Failure, Interface, Ip, IpamOptions, NetworkConfig, Route, Success,
};
use kun_config::Config;
use kun_config::types::{BLOCK_SLOTS, PodPrefix, Slot, SlotClass};
use kun_control::{Allocation, Request, Response};
use serde_json::Map;

use crate::addresses::{self, key, unexpected};
use crate::allocator::Allocator;

/// Times that ADD may meet a block's first or last slot: each is put aside for a cooldown, and a node has so many at most.
const MAX_ENDS: usize = 2 * kun_cni_core::ipam::MAX_BLOCKS;

pub(crate) fn add(
    attachment: &Attachment,
    network: &NetworkConfig,
    options: &IpamOptions,
    config: &Config,
) -> Result<Success, Failure> {
    let wishes = network.wishes(&attachment.args)?;
    let mut allocator = Allocator::open(config)?;
    for _ in 0..MAX_ENDS {
        let allocation =
            addresses::allocate(&mut allocator, attachment, network, &wishes, config, None)?;
        if !is_end(allocation.slot) {
            let mut success = result(&allocation, options, config.ipam.pod_prefix);
            success.dns = wishes.dns.unwrap_or_default();
            return Ok(success);
        }
        let release = Request::Release {
            key: key(attachment, network),
            generation: Some(allocation.generation),
        };
        match allocator.ask(&release)? {
            Response::Done => {}
            other => return Err(unexpected("Release", other)),
        }
        if !wishes.ips.is_empty() {
            return Err(Failure::new(
                Code::InvalidConfig,
                format!(
                    "ips: {} is the first or last of its block, and under another plugin no pod's; ask for another",
                    allocation.v6
                ),
            ));
        }
    }
    Err(Failure::new(
        Code::TryAgainLater,
        "only the first and last addresses of blocks were free; try again",
    ))
}

pub(crate) fn check(
    attachment: &Attachment,
    network: &NetworkConfig,
    options: &IpamOptions,
    config: &Config,
) -> Result<(), Failure> {
    let previous = addresses::previous(network)?;
    let allocation = addresses::known(&key(attachment, network), config)?;
    let told = result(&allocation, options, config.ipam.pod_prefix);
    addresses::as_expected(&addresses::missing(&told, previous))
}

fn result(allocation: &Allocation, options: &IpamOptions, prefix: PodPrefix) -> Success {
    let block = allocation.slot.block();
    let v6 = block.v6(prefix);
    let mut ips = vec![ip(
        IpNet::V6(Ipv6Net::new_assert(allocation.v6, v6.prefix_len())),
        prefix.address(block.first()).into(),
        options,
    )];
    if let (Some(v4), SlotClass::Dual) = (allocation.v4, allocation.slot.class()) {
        ips.push(ip(
            IpNet::V4(Ipv4Net::new_assert(v4, block.v4().prefix_len())),
            block.first().ipv4().into(),
            options,
        ));
    }
    let routes = match &options.routes {
        Some(routes) => routes.clone(),
        None => ips
            .iter()
            .filter(|ip| ip.gateway.is_some())
            .map(|ip| Route {
                dst: match ip.address {
                    IpNet::V6(_) => IpNet::V6(Ipv6Net::default()),
                    IpNet::V4(_) => IpNet::V4(Ipv4Net::default()),
                },
                gw: ip.gateway,
                rest: Map::new(),
            })
            .collect(),
    };
    Success {
        interfaces: Vec::<Interface>::new(),
        ips,
        routes,
        dns: Map::new(),
    }
}

fn is_end(slot: Slot) -> bool {
    let offset = slot.0 - slot.block().first().0;
    offset == 0 || offset == BLOCK_SLOTS - 1
}

fn ip(address: IpNet, gateway: IpAddr, options: &IpamOptions) -> Ip {
    Ip {
        address,
        gateway: options.gateway.then_some(gateway),
        interface: None,
    }
}
