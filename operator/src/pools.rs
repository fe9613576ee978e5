//! Where assignments come from: the ranges of the IPPool objects, with the nodes and Services that each is for, and what is told about
//! a pool in its status. Pure.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net};
use kun_cluster::crd::{Condition, IpPoolStatus, Moment, Text, Truth};
use kun_cluster::{IpFamily, IpPool, Node, Service, Store};
use kun_config::Ipam;
use kun_config::types::{BLOCK_SLOTS, BlockId, Slot, SlotClass};

use crate::plan::{Assignments, Shortage};

/// A range, and the pool that says for whom it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Range<N> {
    /// The range.
    pub net: N,
    /// Its pool; `None`: of `kun.yaml`, for everybody.
    pub pool: Option<Arc<IpPool>>,
}

impl<N> From<N> for Range<N> {
    fn from(net: N) -> Self {
        Self { net, pool: None }
    }
}

impl<N> Range<N> {
    /// Whether a node may get something new out of it.
    pub fn serves_node(&self, node: &Node) -> bool {
        let serves = |pool: &Arc<IpPool>| !pool.spec.closed && pool.serves_node(&node.meta.labels);
        self.pool.as_ref().is_none_or(serves)
    }

    /// Whether a Service may.
    pub fn serves_service(&self, service: &Service) -> bool {
        let labels = &service.meta.labels;
        let serves = |pool: &Arc<IpPool>| !pool.spec.closed && pool.serves_service(labels);
        self.pool.as_ref().is_none_or(serves)
    }

    /// The most blocks of a class that a node has out of its pool.
    pub fn most(&self) -> u32 {
        let pool = self.pool.as_ref();
        pool.and_then(|pool| pool.spec.max_blocks_per_node)
            .unwrap_or(u32::MAX)
    }
}

impl Range<Ipv4Net> {
    /// The block of this number, ascending. A range smaller than a block has none.
    pub fn block(&self, number: u32) -> Option<BlockId> {
        (u64::from(number) < blocks_in(&self.net))
            .then(|| BlockId::new(Slot(u32::from(self.net.network()) + number * BLOCK_SLOTS)))?
    }

    /// How many of these blocks are of its pool.
    pub fn given_to(&self, blocks: &[BlockId]) -> u32 {
        let of_pool = |block: &&BlockId| match &self.pool {
            Some(pool) => has_block(pool, **block),
            None => self.net.contains(&block.v4()),
        };
        blocks.iter().filter(of_pool).count() as u32
    }
}

fn blocks_in(net: &Ipv4Net) -> u64 {
    let (first, last) = (u32::from(net.network()), u32::from(net.broadcast()));
    (u64::from(last) - u64::from(first) + 1) / u64::from(BLOCK_SLOTS)
}

fn has_block(pool: &IpPool, block: BlockId) -> bool {
    pool.spec
        .pods
        .iter()
        .any(|range| range.contains(&block.v4()))
}

/// All ranges, in the order in which they are used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pools {
    /// Ranges of dual slots.
    pub dual: Vec<Range<Ipv4Net>>,
    /// Ranges of IPv6-only slots, inside 240.0.0.0/4.
    pub v6_only: Vec<Range<Ipv4Net>>,
    /// Ranges of virtual addresses, both families.
    pub services: Vec<Range<IpNet>>,
}

impl Pools {
    /// From the IPPool objects; a class of slots that none of them has comes from `kun.yaml`.
    pub fn of(store: &Store, ipam: &Ipam) -> Self {
        let ranges = |class| {
            let of_pool = move |pool: &'_ Arc<IpPool>| {
                let ranges = pool
                    .spec
                    .pods
                    .iter()
                    .filter(move |range| range.class() == class);
                let pool = Some(Arc::clone(pool));
                let ranges = ranges.map(move |range| Range {
                    net: ***range,
                    pool: pool.clone(),
                });
                ranges.collect::<Vec<_>>()
            };
            store.pools().flat_map(of_pool).collect::<Vec<_>>()
        };
        let (mut dual, mut v6_only) = (ranges(SlotClass::Dual), ranges(SlotClass::V6Only));
        if dual.is_empty() {
            dual.extend(ipam.v4_pools.iter().copied().map(Range::from));
        }
        if v6_only.is_empty() {
            v6_only.push(ipam.v6_only_pool.into());
        }
        let services = store.pools().flat_map(|pool| {
            let ranges = &pool.spec.services;
            let v4 = ranges.v4.iter().map(|net| IpNet::V4(net.0));
            let nets = v4.chain(ranges.v6.iter().map(|net| IpNet::V6(net.0)));
            nets.map(|net| Range {
                net,
                pool: Some(Arc::clone(pool)),
            })
        });
        Self {
            dual,
            v6_only,
            services: services.collect(),
        }
    }

    /// Whether an address is out of one of them.
    pub fn has(&self, address: IpAddr) -> bool {
        self.services
            .iter()
            .any(|range| range.net.contains(&address))
    }

    pub(crate) fn of_class(&self, class: SlotClass) -> &[Range<Ipv4Net>] {
        match class {
            SlotClass::Dual => &self.dual,
            SlotClass::V6Only => &self.v6_only,
        }
    }
}

/// What is to be said of a pool. A condition that holds as it did before holds since then.
pub fn status(
    pool: &IpPool,
    given: &Assignments,
    shortages: &BTreeSet<Shortage>,
    now: Moment,
) -> IpPoolStatus {
    let blocks = given
        .blocks
        .keys()
        .filter(|block| has_block(pool, **block) && !given.returned.contains(*block));
    let has = |address: &IpAddr| match address {
        IpAddr::V4(a) => pool.spec.services.v4.iter().any(|net| net.contains(a)),
        IpAddr::V6(a) => pool.spec.services.v6.iter().any(|net| net.contains(a)),
    };
    let addresses = given.addresses.values().flatten().filter(|a| has(a));
    let lacks = shortages.iter().find(|shortage| match shortage {
        Shortage::Blocks { class, .. } => {
            pool.spec.pods.iter().any(|range| range.class() == *class)
        }
        Shortage::Address { family, .. } => match family {
            IpFamily::V4 => !pool.spec.services.v4.is_empty(),
            IpFamily::V6 => !pool.spec.services.v6.is_empty(),
        },
        Shortage::Conflict { .. } => false,
    });
    let condition = |kind: &str, holds: bool, reason: &str, message: String| {
        let status = if holds { Truth::True } else { Truth::False };
        let before = pool
            .status
            .iter()
            .flat_map(|s| &s.conditions)
            .find(|c| c.r#type == kind);
        let since = before
            .filter(|c| c.status == status)
            .map(|c| c.last_transition_time);
        Condition {
            r#type: kind.to_owned(),
            status,
            reason: reason.to_owned(),
            message,
            last_transition_time: since.unwrap_or(Text(now)),
            observed_generation: pool.generation,
        }
    };
    let ready = match pool.spec.closed {
        false => condition("Ready", true, "Open", String::new()),
        true => condition(
            "Ready",
            false,
            "Closed",
            "gives out nothing more".to_owned(),
        ),
    };
    let exhausted = match lacks {
        None => condition("Exhausted", false, "Sufficient", String::new()),
        Some(shortage) => condition("Exhausted", true, "Shortage", shortage.to_string()),
    };
    IpPoolStatus {
        observed_generation: pool.generation,
        blocks: Some(
            pool.spec
                .pods
                .iter()
                .map(|range| blocks_in(range) as i64)
                .sum(),
        ),
        blocks_given: Some(blocks.count() as i64),
        addresses_given: Some(addresses.count() as i64),
        conditions: vec![ready, exhausted],
    }
}
