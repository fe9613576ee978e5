//! Who gets which block and which virtual address. Pure: the cluster and what was assigned before go in, all assignments come out.
//!
//! Rules, in this order: what is assigned stays; no block has two nodes and no address two services; a new assignment is the
//! lowest free one of the first pool that has one, so that a run on the same input gives the same output.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net};
use kun_cluster::crd::Phase;
use kun_cluster::{IpFamily, IpamBlock, Node, ObjectName, Service, ServiceType, Store};
use kun_config::types::{BlockId, SlotClass};

pub use crate::pools::{Pools, Range};

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
    /// Those of them that may have another owner: theirs is gone for good, or has let go.
    pub returned: BTreeSet<BlockId>,
    /// Virtual addresses of each service, at most one of each family. Services that are gone keep theirs until a pool is empty.
    pub addresses: BTreeMap<ObjectName, Vec<IpAddr>>,
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
    let (blocks, given) = plan_blocks(store, pools, before, blocks_per_node, &mut shortages);
    let addresses = plan_addresses(store, pools, &before.addresses, &mut shortages);
    Plan {
        assignments: Assignments {
            returned: before.returned.difference(&given).copied().collect(),
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
    least: u32,
    shortages: &mut BTreeSet<Shortage>,
) -> (BTreeMap<BlockId, Owner>, BTreeSet<BlockId>) {
    let mut owners = before.blocks.clone();
    // Blocks that are on their way back: no new pod gets an address of them.
    let mut draining: BTreeSet<BlockId> = BTreeSet::new();
    let mut asked: BTreeMap<(Owner, SlotClass), u32> = BTreeMap::new();
    for object in store.blocks() {
        let (block, claimed) = (object.block(), owner_of(object));
        if object.spec.draining || matches!(object.phase(), Phase::Draining | Phase::Drained) {
            draining.insert(block);
        } else if let Some(wanted) = wish_of(object) {
            let most = asked.entry((claimed.clone(), block.class())).or_default();
            *most = wanted.max(*most);
        }
        let owner = owners.entry(block).or_insert_with(|| claimed.clone());
        if owner.node != claimed.node {
            let nodes = [Arc::clone(&owner.node), claimed.node];
            shortages.insert(Shortage::Conflict { block, nodes });
        }
    }
    // By name: there may be one Node of a name, and blocks of several that had it.
    let mut blocks: BTreeMap<_, Vec<(BlockId, Owner)>> = BTreeMap::new();
    for (block, owner) in &owners {
        let key = (Arc::clone(&owner.node), block.class());
        blocks.entry(key).or_default().push((*block, owner.clone()));
    }
    let own = |node: &Node, class| -> Vec<BlockId> {
        let list = blocks.get(&(Arc::clone(&node.meta.name.name), class));
        let own = list
            .into_iter()
            .flatten()
            .filter(|(block, owner)| owner.is(node) && !draining.contains(block));
        own.map(|(block, _)| *block).collect()
    };
    let mut ours = before.blocks.clone();
    let mut given = BTreeSet::new();
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
        let mut free = FreeBlocks::new(ranges);
        for node in store.nodes() {
            let mut own = own(node, class);
            let asked = asked.get(&(Owner::of(node), class)).copied();
            let wanted = asked.unwrap_or(0).max(least);
            while (own.len() as u32) < wanted {
                let Some(block) = free.next(node, &own, &taken) else {
                    break;
                };
                taken.insert(block);
                given.insert(block);
                ours.insert(block, Owner::of(node));
                own.push(block);
            }
            let has = own.len() as u32;
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
    (ours, given)
}

/// How many blocks of its class the present owner of a block wants to have in all. Said of a block that it has not confirmed it is an
/// earlier owner's.
fn wish_of(object: &IpamBlock) -> Option<u32> {
    let status = object.status.as_ref()?;
    (object.phase() == Phase::Confirmed).then_some(status.wanted)?
}

/// Whether the owner of a block has let go of it, or never took it and is not to: it may have another owner at once.
pub fn is_let_go(object: &IpamBlock) -> bool {
    match object.phase() {
        Phase::Drained => true,
        // It may be about to confirm: then one of the two writes is refused.
        Phase::Pending => object.spec.draining,
        Phase::Confirmed | Phase::Draining => false,
    }
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

/// Walks each range once: what lies behind is taken.
struct FreeBlocks<'p> {
    /// A range, and how many of its blocks lie behind.
    ranges: Vec<(&'p Range<Ipv4Net>, u32)>,
}

impl<'p> FreeBlocks<'p> {
    fn new(ranges: &'p [Range<Ipv4Net>]) -> Self {
        Self {
            ranges: ranges.iter().map(|range| (range, 0)).collect(),
        }
    }

    /// The first block for a node out of a pool that serves it, and of which it does not have the most already.
    fn next(&mut self, node: &Node, own: &[BlockId], taken: &BTreeSet<BlockId>) -> Option<BlockId> {
        for (range, behind) in &mut self.ranges {
            if !range.serves_node(node) || range.given_to(own) >= range.most() {
                continue;
            }
            while let Some(block) = range.block(*behind) {
                if !taken.contains(&block) {
                    return Some(block);
                }
                *behind += 1;
            }
        }
        None
    }
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
    let serving = pools
        .services
        .iter()
        .filter(|range| range.serves_service(service));
    serving
        .map(|range| IpFamily::of(range.net.addr()))
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
                .next(service, family, &taken)
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
                        .any(|range| IpFamily::of(range.net.addr()) == family);
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

/// Family, first and last address of what is left of a range.
type Ends = (IpFamily, u128, u128);

/// Walks the ranges once: what lies behind is taken.
struct FreeAddresses<'p> {
    ranges: Vec<(&'p Range<IpNet>, Ends)>,
}

impl<'p> FreeAddresses<'p> {
    fn new(ranges: &'p [Range<IpNet>]) -> Self {
        let ends = |range: &Range<IpNet>| match &range.net {
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
        };
        Self {
            ranges: ranges.iter().map(|range| (range, ends(range))).collect(),
        }
    }

    fn next(
        &mut self,
        service: &Service,
        family: IpFamily,
        taken: &BTreeSet<IpAddr>,
    ) -> Option<IpAddr> {
        for (range, (of, next, last)) in &mut self.ranges {
            if *of != family || !range.serves_service(service) {
                continue;
            }
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
