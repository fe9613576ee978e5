//! Who gets which block and which virtual address. Pure: the cluster and what was assigned before go in, all assignments come out.
//!
//! Rules, in this order: what is assigned stays; no block has two nodes and no address two services; a new assignment is the
//! lowest free one of the first pool that has one, so that a run on the same input gives the same output.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net};
use kun_cluster::{IpFamily, IpamBlock, Node, ObjectName, Service, ServiceType, Store};
use kun_config::Ipam;
use kun_config::types::{BLOCK_SLOTS, BlockId, Slot, SlotClass};

/// Who has a block.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Owner {
    /// The Node's name.
    pub node: Arc<str>,
    /// The Node's metadata.uid: one that was deleted and made again under its name is another owner. `None` where nobody knows it, as
    /// in a folder: then the name is all.
    pub uid: Option<Arc<str>>,
}

impl Owner {
    /// Whether it is this Node.
    pub fn is(&self, node: &Node) -> bool {
        let uid = self
            .uid
            .as_ref()
            .is_none_or(|uid| node.meta.uid.is_empty() || *uid == node.meta.uid);
        uid && self.node == node.meta.name.name
    }

    /// The Node as an owner.
    pub fn of(node: &Node) -> Self {
        let uid = Some(&node.meta.uid).filter(|uid| !uid.is_empty());
        Self {
            node: Arc::clone(&node.meta.name.name),
            uid: uid.cloned(),
        }
    }
}

impl From<&str> for Owner {
    fn from(node: &str) -> Self {
        Self {
            node: node.into(),
            uid: None,
        }
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.node)
    }
}

/// What the operator has given out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Assignments {
    /// Owner of each block.
    pub blocks: BTreeMap<BlockId, Owner>,
    /// Those of them whose owner is gone for good: they may have another.
    pub returned: BTreeSet<BlockId>,
    /// Virtual addresses of each service, at most one of each family. Services that are gone keep theirs until a pool is empty.
    pub addresses: BTreeMap<ObjectName, Vec<IpAddr>>,
}

/// Where assignments come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pools {
    /// Ranges of dual slots.
    pub dual: Vec<Ipv4Net>,
    /// Ranges of IPv6-only slots, inside 240.0.0.0/4.
    pub v6_only: Vec<Ipv4Net>,
    /// Ranges of virtual addresses, both families.
    pub services: Vec<IpNet>,
}

impl Pools {
    /// From the IPPool objects; a class of slots that none of them has comes from `kun.yaml`.
    pub fn of(store: &Store, ipam: &Ipam) -> Self {
        let ranges = |class| {
            let ranges = store.pools().flat_map(|pool| &pool.spec.pods);
            let ranges = ranges.filter(move |range| range.class() == class);
            ranges.map(|range| ***range).collect::<Vec<Ipv4Net>>()
        };
        let (mut dual, mut v6_only) = (ranges(SlotClass::Dual), ranges(SlotClass::V6Only));
        if dual.is_empty() {
            dual.clone_from(&ipam.v4_pools);
        }
        if v6_only.is_empty() {
            v6_only.push(ipam.v6_only_pool);
        }
        let services = store.pools().flat_map(|pool| {
            let ranges = &pool.spec.services;
            let v4 = ranges.v4.iter().map(|net| IpNet::V4(net.0));
            v4.chain(ranges.v6.iter().map(|net| IpNet::V6(net.0)))
        });
        Self {
            dual,
            v6_only,
            services: services.collect(),
        }
    }

    /// Whether an address is out of one of them.
    pub fn has(&self, address: IpAddr) -> bool {
        self.services.iter().any(|net| net.contains(&address))
    }

    fn of_class(&self, class: SlotClass) -> &[Ipv4Net] {
        match class {
            SlotClass::Dual => &self.dual,
            SlotClass::V6Only => &self.v6_only,
        }
    }
}

/// What could not be given, or is given twice by hand.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Shortage {
    /// A node lacks blocks: every block of its class is taken.
    Blocks {
        /// The node.
        node: Arc<str>,
        /// `Dual` or `V6Only`.
        class: SlotClass,
        /// Blocks it has.
        has: u32,
        /// Blocks it should have.
        wanted: u32,
    },
    /// A service lacks an address: its pool is empty, or there is none.
    Address {
        /// The service.
        service: ObjectName,
        /// The family.
        family: IpFamily,
        /// Whether any pool has that family.
        pool_exists: bool,
    },
    /// Two IPAMBlock objects give one block to two nodes.
    Conflict {
        /// The block.
        block: BlockId,
        /// Both nodes.
        nodes: [Arc<str>; 2],
    },
}

impl fmt::Display for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Blocks {
                node,
                class,
                has,
                wanted,
            } => {
                let (class, place) = match class {
                    SlotClass::Dual => ("dual", "outside 240.0.0.0/4"),
                    SlotClass::V6Only => ("IPv6-only", "inside 240.0.0.0/4"),
                };
                write!(
                    f,
                    "node {node} has {has} of {wanted} {class} blocks: the pools are used up; add a range {place} to an IPPool's spec.pods"
                )
            }
            Self::Address {
                service,
                family,
                pool_exists,
            } => {
                let family = match family {
                    IpFamily::V4 => "v4",
                    IpFamily::V6 => "v6",
                };
                let why = if *pool_exists {
                    "the ranges are used up"
                } else {
                    "no IPPool has a range"
                };
                write!(
                    f,
                    "Service {service} has no IP{family} address: {why}; add one to an IPPool's spec.services.{family}"
                )
            }
            Self::Conflict {
                block,
                nodes: [a, b],
            } => {
                write!(
                    f,
                    "block {block} is given to {a} and to {b}; remove one of the two IPAMBlock objects"
                )
            }
        }
    }
}

/// All assignments, old and new, and what is missing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Everything that is to stand in the operator's files.
    pub assignments: Assignments,
    /// Sorted, without repetition.
    pub shortages: BTreeSet<Shortage>,
}

/// Plans for the cluster as `store` has it; `before` is what the operator gave out earlier. IPAMBlocks and service addresses that
/// somebody else wrote are respected and not taken over.
pub fn plan(store: &Store, pools: &Pools, before: &Assignments, blocks_per_node: u32) -> Plan {
    let mut shortages = BTreeSet::new();
    let blocks = plan_blocks(store, pools, before, blocks_per_node, &mut shortages);
    let addresses = plan_addresses(store, pools, &before.addresses, &mut shortages);
    let returned = before
        .returned
        .iter()
        .filter(|block| before.blocks.get(block) == blocks.get(block));
    Plan {
        assignments: Assignments {
            returned: returned.copied().collect(),
            blocks,
            addresses,
        },
        shortages,
    }
}

fn plan_blocks(
    store: &Store,
    pools: &Pools,
    before: &Assignments,
    wanted: u32,
    shortages: &mut BTreeSet<Shortage>,
) -> BTreeMap<BlockId, Owner> {
    let mut owners = before.blocks.clone();
    let mut draining: BTreeSet<BlockId> = BTreeSet::new();
    for object in store.blocks() {
        let (block, claimed) = (object.block(), owner_of(object));
        if object.spec.draining {
            draining.insert(block);
        }
        let owner = owners.entry(block).or_insert_with(|| claimed.clone());
        if owner.node != claimed.node {
            let nodes = [Arc::clone(&owner.node), claimed.node];
            shortages.insert(Shortage::Conflict { block, nodes });
        }
    }
    // By name: there may be one Node of a name, and blocks of several that had it.
    let mut blocks: BTreeMap<(Arc<str>, SlotClass), Vec<(BlockId, Owner)>> = BTreeMap::new();
    for (block, owner) in &owners {
        let key = (Arc::clone(&owner.node), block.class());
        blocks.entry(key).or_default().push((*block, owner.clone()));
    }
    let has = |node: &Node, class| {
        let list = blocks.get(&(Arc::clone(&node.meta.name.name), class));
        let own = list
            .into_iter()
            .flatten()
            .filter(|(block, owner)| owner.is(node) && !draining.contains(block));
        own.count() as u32
    };
    let mut ours = before.blocks.clone();
    let mut taken: BTreeSet<BlockId> = owners
        .keys()
        .filter(|block| !before.returned.contains(block))
        .copied()
        .collect();
    for class in [SlotClass::Dual, SlotClass::V6Only] {
        let ranges = pools.of_class(class);
        // A cluster without IPv4 for pods is no cluster that lacks it.
        if ranges.is_empty() {
            continue;
        }
        let mut free = ranges.iter().copied().flat_map(blocks_of);
        for node in store.nodes() {
            let mut has = has(node, class);
            while has < wanted {
                let Some(block) = free.by_ref().find(|block| !taken.contains(block)) else {
                    break;
                };
                taken.insert(block);
                ours.insert(block, Owner::of(node));
                has += 1;
            }
            if has < wanted {
                let node = Arc::clone(&node.meta.name.name);
                shortages.insert(Shortage::Blocks {
                    node,
                    class,
                    has,
                    wanted,
                });
            }
        }
    }
    ours
}

/// Whom an IPAMBlock object names.
pub fn owner_of(object: &IpamBlock) -> Owner {
    Owner {
        node: Arc::clone(object.node()),
        uid: object
            .spec
            .node_uid
            .as_ref()
            .map(|uid| Arc::clone(uid.shared())),
    }
}

/// The blocks of a range, ascending. A range smaller than a block has none.
fn blocks_of(range: Ipv4Net) -> impl Iterator<Item = BlockId> {
    let (first, last) = (u32::from(range.network()), u32::from(range.broadcast()));
    let whole = (u64::from(last) - u64::from(first) + 1) / u64::from(BLOCK_SLOTS);
    (0..whole).filter_map(move |i| BlockId::new(Slot(first + i as u32 * BLOCK_SLOTS)))
}

/// Whether the address of a Service is this operator's business.
pub fn is_ours(service: &Service) -> bool {
    let class = service.load_balancer_class.as_deref();
    service.kind == ServiceType::LoadBalancer
        && class.is_none_or(|class| class.starts_with("kun.network/"))
}

/// The families that a Service asks for; one that leaves it open gets what there are pools for.
fn families_of(service: &Service, pools: &Pools) -> BTreeSet<IpFamily> {
    if !service.families.is_empty() {
        return service.families.iter().copied().collect();
    }
    if !service.cluster_ips.is_empty() {
        return service
            .cluster_ips
            .iter()
            .copied()
            .map(IpFamily::of)
            .collect();
    }
    pools
        .services
        .iter()
        .map(|net| IpFamily::of(net.addr()))
        .collect()
}

fn plan_addresses(
    store: &Store,
    pools: &Pools,
    before: &BTreeMap<ObjectName, Vec<IpAddr>>,
    shortages: &mut BTreeSet<Shortage>,
) -> BTreeMap<ObjectName, Vec<IpAddr>> {
    let mut ours = before.clone();
    let mut taken: BTreeSet<IpAddr> = before.values().flatten().copied().collect();
    for service in store.services() {
        taken.extend(
            service
                .load_balancer_ips
                .iter()
                .chain(&service.cluster_ips)
                .copied(),
        );
    }
    let mut ranges = FreeAddresses::new(&pools.services);
    for service in store.services().filter(|service| is_ours(service)) {
        let name = &service.meta.name;
        // Of a person or of another implementation: it would be a fight.
        let by_hand = !before.contains_key(name)
            && (!service.load_balancer_ips.is_empty() || service.load_balancer_named);
        if by_hand {
            continue;
        }
        for family in families_of(service, pools) {
            let has = ours
                .get(name)
                .is_some_and(|list| list.iter().any(|a| IpFamily::of(*a) == family));
            if has {
                continue;
            }
            let found = ranges
                .next(family, &taken)
                .or_else(|| reclaim(store, &mut ours, family));
            match found {
                Some(address) => {
                    taken.insert(address);
                    let addresses = ours.entry(name.clone()).or_default();
                    addresses.push(address);
                    addresses.sort();
                }
                None => {
                    let pool_exists = pools
                        .services
                        .iter()
                        .any(|net| IpFamily::of(net.addr()) == family);
                    let service = name.clone();
                    shortages.insert(Shortage::Address {
                        service,
                        family,
                        pool_exists,
                    });
                }
            }
        }
    }
    ours
}

/// Takes the address of a service that is gone. Only an empty pool comes to this: until then a Service that is deleted by mistake
/// gets its own address back.
fn reclaim(
    store: &Store,
    ours: &mut BTreeMap<ObjectName, Vec<IpAddr>>,
    family: IpFamily,
) -> Option<IpAddr> {
    let is_gone = |name: &ObjectName| store.service(name).is_none_or(|service| !is_ours(service));
    let of_family = |a: &IpAddr| IpFamily::of(*a) == family;
    let (name, addresses) = ours
        .iter_mut()
        .find(|(name, list)| list.iter().any(of_family) && is_gone(name))?;
    let name = name.clone();
    let index = addresses.iter().position(of_family)?;
    let address = addresses.remove(index);
    if addresses.is_empty() {
        ours.remove(&name);
    }
    Some(address)
}

/// Walks the ranges once: what lies behind is taken.
struct FreeAddresses {
    ranges: Vec<(IpFamily, u128, u128)>,
}

impl FreeAddresses {
    fn new(nets: &[IpNet]) -> Self {
        let ranges = nets.iter().map(|net| match net {
            IpNet::V4(net) => {
                let (first, last) = (
                    u128::from(u32::from(net.network())),
                    u128::from(u32::from(net.broadcast())),
                );
                // Hosts and filters exist that take a prefix's first and last address for its broadcast.
                let inset = u128::from(net.prefix_len() < 31);
                (IpFamily::V4, first + inset, last - inset)
            }
            IpNet::V6(net) => {
                let (first, last) = (u128::from(net.network()), u128::from(net.broadcast()));
                // RFC 4291 §2.6.1: the first address is the subnet-router anycast address.
                (
                    IpFamily::V6,
                    first + u128::from(net.prefix_len() < 127),
                    last,
                )
            }
        });
        Self {
            ranges: ranges.collect(),
        }
    }

    fn next(&mut self, family: IpFamily, taken: &BTreeSet<IpAddr>) -> Option<IpAddr> {
        for (of, next, last) in self.ranges.iter_mut().filter(|(of, _, _)| *of == family) {
            while *next <= *last {
                let address = match of {
                    IpFamily::V4 => IpAddr::V4(Ipv4Addr::from(*next as u32)),
                    IpFamily::V6 => IpAddr::V6(Ipv6Addr::from(*next)),
                };
                if !taken.contains(&address) {
                    return Some(address);
                }
                // The very last IPv6 address ends the walk of its range by emptying it.
                match next.checked_add(1) {
                    Some(following) => *next = following,
                    None => *last = 0,
                }
            }
        }
        None
    }
}
