//! What this node's kernel knows of addresses and attachments: one dump of links, routes and neighbours, then questions.
//!
//! It is the node's part of the evidence that an address is forgotten, and what leaks are found by. Routes, neighbours and tc
//! filters end with their interface, and kun makes no rules: a leaked interface is all that can be left of a pod.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use kun_cni_core::ipam::{Ipam, Key, Unforgotten};
use kun_cni_core::leaks::Interface;
pub use kun_cni_core::leaks::{Leak, Watch};
use kun_cni_core::names::{self, Carries};
use kun_cni_core::plan::ROUTE_PROTOCOL;
use kun_cni_core::tag::{generation_in, key_in};
use kun_config::types::{PodPrefix, Slot};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use crate::kernel::{self, KernelError};
use crate::netlink::{Answer, Link, NetlinkError, Query, Rtnl};

/// One look may fall into an ADD, three in a row hardly do; the next ones are five seconds away.
const LOOKS: usize = 3;

/// RT_TABLE_LOCAL (rtnetlink(7)).
const LOCAL_TABLE: u8 = 255;

/// A route to one address.
#[derive(Debug, Clone, PartialEq, Eq)]
struct HostRoute {
    through: Option<u32>,
    /// kun made it.
    ours: bool,
}

/// The kernel at one time.
#[derive(Debug, Clone, Default)]
pub struct Sight {
    links: BTreeMap<u32, Link>,
    routes: BTreeMap<IpAddr, Vec<HostRoute>>,
    /// Interface, and whether somebody set it.
    neighbours: BTreeMap<IpAddr, BTreeSet<(u32, bool)>>,
}

impl Sight {
    /// Looks at the namespace of the calling thread. What is not seen is taken to be absent, so a look that something changed under
    /// is thrown away.
    pub fn take() -> Result<Self, NetlinkError> {
        let mut rtnl = Rtnl::open()?;
        for _ in 0..LOOKS {
            if let Some(sight) = Self::undisturbed(&mut rtnl)? {
                return Ok(sight);
            }
        }
        Err(NetlinkError::Disturbed)
    }

    fn undisturbed(rtnl: &mut Rtnl) -> Result<Option<Self>, NetlinkError> {
        let mut sight = Self::default();
        let (links, mut whole) = rtnl.links_and_whether_all()?;
        for link in links {
            sight.links.insert(link.index, link);
        }
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut message = RouteMessage::default();
            message.header.address_family = family;
            whole &= rtnl.dump(RouteNetlinkMessage::GetRoute(message), |answer| {
                if let Answer::Other(RouteNetlinkMessage::NewRoute(route)) = answer {
                    sight.route(&route);
                }
            })?;
        }
        let all = RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default());
        whole &= rtnl.dump(all, |answer| {
            if let Answer::Other(RouteNetlinkMessage::NewNeighbour(neighbour)) = answer {
                sight.neighbour(&neighbour);
            }
        })?;
        Ok(whole.then_some(sight))
    }

    fn route(&mut self, route: &RouteMessage) {
        let full = match route.header.address_family {
            AddressFamily::Inet => 32,
            _ => 128,
        };
        // The local table holds the node's own addresses; a block's route is no address's.
        if route.header.destination_prefix_length != full || route.header.table == LOCAL_TABLE {
            return;
        }
        let mut to = None;
        let mut through = None;
        for attribute in &route.attributes {
            match attribute {
                RouteAttribute::Destination(RouteAddress::Inet(a)) => to = Some(IpAddr::V4(*a)),
                RouteAttribute::Destination(RouteAddress::Inet6(a)) => to = Some(IpAddr::V6(*a)),
                RouteAttribute::Oif(index) => through = Some(*index),
                _ => {}
            }
        }
        if let Some(to) = to {
            let ours = u8::from(route.header.protocol) == ROUTE_PROTOCOL;
            self.routes
                .entry(to)
                .or_default()
                .push(HostRoute { through, ours });
        }
    }

    fn neighbour(&mut self, neighbour: &NeighbourMessage) {
        // An entry that failed knows nothing of its address but that nobody answered.
        let known = neighbour
            .attributes
            .iter()
            .any(|a| matches!(a, NeighbourAttribute::LinkLayerAddress(_)));
        if !known || neighbour.header.state == NeighbourState::Failed {
            return;
        }
        let permanent = neighbour.header.state == NeighbourState::Permanent;
        for attribute in &neighbour.attributes {
            let address = match attribute {
                NeighbourAttribute::Destination(NeighbourAddress::Inet(a)) => IpAddr::V4(*a),
                NeighbourAttribute::Destination(NeighbourAddress::Inet6(a)) => IpAddr::V6(*a),
                _ => continue,
            };
            self.neighbours
                .entry(address)
                .or_default()
                .insert((neighbour.header.ifindex, permanent));
        }
    }

    fn name(&self, index: u32) -> String {
        self.links
            .get(&index)
            .map_or_else(|| format!("interface {index}"), |link| link.name.clone())
    }

    /// What here still knows a released slot, one line each.
    pub fn knows(&self, released: &Unforgotten, prefix: PodPrefix) -> Vec<String> {
        let mut known = Vec::new();
        if let Some(key) = &released.key {
            let names = [Carries::V6, Carries::V4].map(|carries| names::host_name(key, carries));
            for link in self.links.values() {
                let of_it = match &link.alias {
                    // One that a crash left without its tag: the name alone is enough.
                    None => names.contains(&link.name),
                    Some(alias) => generation_in(alias, key) == Some(released.generation),
                };
                if of_it {
                    known.push(format!("interface {} is still there", link.name));
                }
            }
        }
        for address in addresses(released.slot, prefix) {
            for route in self.routes.get(&address).into_iter().flatten() {
                let through = route.through.map(|index| self.name(index));
                known.push(format!(
                    "a route leads to {address} through {}",
                    through.unwrap_or_else(|| "nothing".to_owned())
                ));
            }
            for (index, _) in self.neighbours.get(&address).into_iter().flatten() {
                let name = self.name(*index);
                known.push(format!("{name} has a neighbour entry for {address}"));
            }
        }
        known
    }

    /// Removes the neighbour entries that the kernel learnt of released slots; whether there were any. Below its first threshold
    /// of entries it never forgets one itself, and the next owner would have another hardware address.
    pub fn remove_learnt(
        &self,
        released: &[Unforgotten],
        prefix: PodPrefix,
    ) -> Result<bool, NetlinkError> {
        let theirs = released
            .iter()
            .flat_map(|release| addresses(release.slot, prefix));
        let queries: Vec<Query> = theirs
            .filter_map(|address| Some((address, self.neighbours.get(&address)?)))
            .flat_map(|(address, entries)| entries.iter().map(move |entry| (address, entry)))
            .filter(|(_, (_, permanent))| !permanent)
            .map(|(address, (index, _))| Query::remove_neighbour(*index, address))
            .collect();
        // One that is gone already is what was wanted.
        Rtnl::open()?.batch(&queries)?;
        Ok(!queries.is_empty())
    }

    /// The interfaces that carry kun's tag, with the slots that routes of ours lead to through them.
    pub fn interfaces(&self, prefix: PodPrefix) -> Vec<Interface> {
        let mut slots: BTreeMap<u32, BTreeSet<Slot>> = BTreeMap::new();
        for (to, routes) in &self.routes {
            for route in routes.iter().filter(|route| route.ours) {
                if let (Some(index), Some(slot)) = (route.through, slot_of(*to, prefix)) {
                    slots.entry(index).or_default().insert(slot);
                }
            }
        }
        self.links
            .values()
            .filter_map(|link| {
                let slots = slots.get(&link.index).cloned().unwrap_or_default();
                interface(link, slots)
            })
            .collect()
    }
}

/// The interfaces that carry kun's tag, by themselves: one dump, whatever leads to them. One that comes or goes meanwhile may hide another.
pub(crate) fn tagged() -> Result<Vec<Interface>, NetlinkError> {
    let links = Rtnl::open()?.links()?;
    let tagged = links
        .iter()
        .filter_map(|link| interface(link, BTreeSet::new()));
    Ok(tagged.collect())
}

fn interface(link: &Link, slots: BTreeSet<Slot>) -> Option<Interface> {
    let alias = link.alias.as_deref()?;
    let key = key_in(alias)?;
    Some(Interface {
        index: link.index,
        name: link.name.clone(),
        generation: generation_in(alias, &key)?,
        key,
        slots,
    })
}

/// How many attachments have a slot and interfaces of kun's making, and of how many of these an interface is among the given.
pub fn standing(ipam: &Ipam, interfaces: &[Interface]) -> (usize, usize) {
    let tagged: BTreeSet<(&Key, u64)> = interfaces.iter().map(|i| (&i.key, i.generation)).collect();
    let live = ipam.live().filter(|a| !a.owner.delegated);
    live.fold((0, 0), |(live, standing), a| {
        let stands = tagged.contains(&(&a.owner.key, a.generation));
        (live + 1, standing + usize::from(stands))
    })
}

/// Both addresses of a slot.
pub fn addresses(slot: Slot, prefix: PodPrefix) -> Vec<IpAddr> {
    let v6 = IpAddr::V6(prefix.address(slot));
    std::iter::once(v6)
        .chain(slot.v4().map(IpAddr::V4))
        .collect()
}

fn slot_of(address: IpAddr, prefix: PodPrefix) -> Option<Slot> {
    match address {
        IpAddr::V4(a) => Some(Slot::from(a)),
        IpAddr::V6(a) => prefix.slot(a),
    }
}

/// Removes a leaked interface, if it is the very one that was seen: same index, same tag. By its index, which no other gets: its name
/// may be another's by the time that the kernel comes to it.
pub fn reclaim(index: u32, name: &str, key: &Key, generation: u64) -> Result<(), KernelError> {
    let mut rtnl = Rtnl::open()?;
    let found = rtnl.link_by_index(index)?;
    let same = found.is_some_and(|link| {
        link.name == name
            && link.alias.as_deref().and_then(|a| generation_in(a, key)) == Some(generation)
    });
    if !same {
        return Ok(());
    }
    kernel::remove(&mut rtnl, index, name)
}
