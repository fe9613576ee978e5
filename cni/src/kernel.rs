//! Applies plans to the kernel, undoes them, and compares the kernel with them.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use kun_cni_core::ipam::Key;
use kun_cni_core::plan::{Op, Side, Undo};
use kun_cni_core::tag::{UNFINISHED, generation_in};

use rustix::fs::{Mode, OFlags};

use crate::netlink::{Link, NetlinkError, Query, Rtnl};
use crate::netns::{Netns, NetnsError};

/// The kernel's link watch runs at once or, at worst, a second later.
const CARRIER_WITHIN: Duration = Duration::from_secs(3);

/// Two numbers, the longest of what is written below /proc/sys/net, and more.
const MAX_SYSCTL: usize = 64;

/// Between two looks at an interface that is coming up.
const LOOK_AGAIN: Duration = Duration::from_micros(200);

/// Why the kernel is not as planned.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The socket.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// The pod's namespace.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// It refused an op.
    #[error("{op}: {source}")]
    Refused {
        /// The op.
        op: String,
        /// Its word.
        source: io::Error,
    },
    /// An interface that was there is gone.
    #[error("{op}: the interface {ifname} is gone")]
    Gone {
        /// The op.
        op: String,
        /// The interface.
        ifname: String,
    },
    /// It never came up.
    #[error("{ifname}: no carrier after {CARRIER_WITHIN:?}")]
    NoCarrier {
        /// The interface.
        ifname: String,
    },
    /// An interface that must be made is there already (CNI §2 ADD).
    #[error(
        "the pod has an interface {ifname} already; a runtime calls DEL before it calls ADD again"
    )]
    Exists {
        /// The interface.
        ifname: String,
    },
    /// The attachment stands, in whichever pod.
    #[error(
        "the attachment stands already: {ifname} on the node is its interface; a runtime calls DEL before it calls ADD again"
    )]
    Stands {
        /// The node's end.
        ifname: String,
    },
    /// A name of ours on somebody else's interface.
    #[error("{ifname}: not ours (its alias is `{alias}`); it is left alone")]
    Foreign {
        /// The interface.
        ifname: String,
        /// What it says.
        alias: String,
    },
    /// No MTU to be had.
    #[error(
        "the uplink {ifname}: no such interface; name the right one in node.uplink, or set ipam.mtu"
    )]
    NoUplink {
        /// The name.
        ifname: String,
    },
}

/// The node's and one pod's part of the kernel.
#[derive(Debug)]
pub struct Kernel<'a> {
    netns: &'a Netns,
    host: Rtnl,
    pod: Rtnl,
}

impl<'a> Kernel<'a> {
    /// Opens both.
    pub fn open(netns: &'a Netns) -> Result<Self, KernelError> {
        let host = Rtnl::open()?;
        let pod = netns.inside(Rtnl::open)??;
        Ok(Self { netns, host, pod })
    }

    /// Applies the ops in order. What must be undone is pushed on `undo` before it is done, so that after a failure, or a part of
    /// the ops only, [`revert`] leaves nothing. A pair whose name another has is not undone: another ADD of the attachment made it.
    pub fn apply(&mut self, ops: &[Op], undo: &mut Vec<Undo>) -> Result<(), KernelError> {
        let netns = self.netns;
        for turn in ops.chunk_by(|a, b| a.side() == b.side()) {
            undo.extend(turn.iter().filter_map(Op::undo));
            let mut others = Vec::new();
            let done = match turn[0].side() {
                Side::Host => Applier::new(&mut self.host, Some(netns)).run(turn, &mut others),
                Side::Pod => netns
                    .inside(|| Applier::new(&mut self.pod, None).run(turn, &mut others))
                    .unwrap_or_else(|e| Err(e.into())),
            };
            undo.retain(|Undo::RemoveLink { host }| !others.contains(host));
            done?;
        }
        Ok(())
    }

    /// Refuses when an interface of this name is in the pod already, or when the attachment stands in another pod. What an ADD
    /// that had no slot yet has made is met when the pairs are: it may be at work still.
    pub fn require_absent(
        &mut self,
        key: &Key,
        ifname: &str,
        hosts: &[&str],
    ) -> Result<(), KernelError> {
        if self.pod.link(ifname)?.is_some() {
            return Err(KernelError::Exists {
                ifname: ifname.to_owned(),
            });
        }
        let queries: Vec<Query> = hosts.iter().map(|host| Query::link(host)).collect();
        for found in self.host.batch(&queries)? {
            let Ok(Some(Link { name, alias, .. })) = found else {
                continue;
            };
            let generation = alias.and_then(|alias| generation_in(&alias, key));
            if generation.is_some_and(|generation| generation != UNFINISHED) {
                return Err(KernelError::Stands { ifname: name });
            }
        }
        Ok(())
    }

    /// What is not as the ops would have it: one line each. Sysctls are not looked at: a pod may set its own.
    pub fn differences(&mut self, ops: &[Op]) -> Result<Vec<String>, KernelError> {
        let mut found = Vec::new();
        for turn in ops.chunk_by(|a, b| a.side() == b.side()) {
            found.extend(match turn[0].side() {
                Side::Host => compare(turn, &mut self.host)?,
                Side::Pod => compare(turn, &mut self.pod)?,
            });
        }
        Ok(found)
    }
}

/// Applies ops of the node alone, of an attachment that stands.
pub fn apply_on_node(rtnl: &mut Rtnl, ops: &[Op]) -> Result<(), KernelError> {
    Applier::new(rtnl, None).run(ops, &mut Vec::new())
}

/// Applies ops of a pod alone, of an attachment that stands; `rtnl` is a socket of the pod's namespace. Addresses and routes that
/// are there already are left as they are: a pod, or a later plugin, may have chosen its own.
pub fn complete_in_pod(rtnl: &mut Rtnl, ops: &[Op]) -> Result<(), KernelError> {
    let mut applier = Applier::new(rtnl, None);
    applier.only_missing = true;
    applier.run(ops, &mut Vec::new())
}

/// What was removed, and what could not be.
#[derive(Debug, Default)]
pub struct Removed {
    /// The generation that the interfaces were tagged with; `None`: their ADD never knew it.
    pub generation: Option<u64>,
    /// What stays, and why.
    pub failed: Vec<KernelError>,
}

/// Removes the interface of this index; gone already is fine.
pub fn remove(rtnl: &mut Rtnl, index: u32, ifname: &str) -> Result<(), KernelError> {
    match rtnl.batch(&[Query::remove(index)])?.pop() {
        Some(Err(source)) if !is_gone(&source) => Err(KernelError::Refused {
            op: format!("remove {ifname}"),
            source,
        }),
        _ => Ok(()),
    }
}

/// Undoes the steps, all interfaces at once; gone already is fine.
pub fn revert(undo: &[Undo], key: &Key) -> Removed {
    let mut rtnl = match Rtnl::open() {
        Ok(rtnl) => rtnl,
        Err(e) => {
            return Removed {
                generation: None,
                failed: vec![e.into()],
            };
        }
    };
    let names: Vec<&str> = undo
        .iter()
        .rev()
        .map(|Undo::RemoveLink { host }| host.as_str())
        .collect();
    let mut removed = Removed::default();
    if let Err(e) = remove_links(&mut rtnl, &names, key, &mut removed) {
        removed.failed.push(e);
    }
    removed
}

/// There is no such interface.
fn is_gone(error: &io::Error) -> bool {
    error.raw_os_error() == Some(rustix::io::Errno::NODEV.raw_os_error())
}

/// Interfaces of a group of this number and up are being removed: whoever is put there goes, so that it does no harm should two
/// processes of two PID namespaces use one number.
const GOING: u32 = 0x6b00_0000;

fn remove_links(
    rtnl: &mut Rtnl,
    names: &[&str],
    key: &Key,
    removed: &mut Removed,
) -> Result<(), KernelError> {
    let group = GOING | std::process::id();
    let queries: Vec<Query> = names.iter().map(|name| Query::link(name)).collect();
    let mut ours = Vec::new();
    for (name, found) in names.iter().zip(rtnl.batch(&queries)?) {
        let link = match found {
            Ok(Some(link)) => link,
            Ok(None) => continue,
            Err(e) if is_gone(&e) => continue,
            // Not to be seen is not gone.
            Err(source) => {
                removed.failed.push(KernelError::Refused {
                    op: format!("look for {name}"),
                    source,
                });
                continue;
            }
        };
        match &link.alias {
            // A crash between making and tagging it; the name alone is enough.
            None => ours.push(Query::group(link.index, group)),
            Some(alias) => match generation_in(alias, key) {
                Some(generation) => {
                    if generation != UNFINISHED {
                        removed.generation = Some(generation);
                    }
                    ours.push(Query::group(link.index, group));
                }
                None => removed.failed.push(KernelError::Foreign {
                    ifname: (*name).to_owned(),
                    alias: alias.clone(),
                }),
            },
        }
    }
    if ours.is_empty() {
        return Ok(());
    }
    ours.push(Query::remove_group(group));
    for verdict in rtnl.batch(&ours)? {
        match verdict {
            // The pod's namespace went away in between, and its interfaces with it.
            Err(e) if is_gone(&e) => {}
            Err(source) => removed.failed.push(KernelError::Refused {
                op: format!("remove {}", names.join(", ")),
                source,
            }),
            Ok(_) => {}
        }
    }
    Ok(())
}

/// The MTU for pods: the named uplink's, else that of the interface with the default route, else Ethernet's.
pub fn uplink_mtu(uplink: Option<&str>) -> Result<u32, KernelError> {
    const ETHERNET: u32 = 1500;
    // Documentation prefixes (RFC 3849, RFC 5737): only a default route leads there.
    const FAR: [std::net::IpAddr; 2] = [
        std::net::IpAddr::V6(std::net::Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)),
        std::net::IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1)),
    ];
    let mut rtnl = Rtnl::open()?;
    if let Some(name) = uplink {
        return match rtnl.link(name)? {
            Some(link) => Ok(link.mtu),
            None => Err(KernelError::NoUplink {
                ifname: name.to_owned(),
            }),
        };
    }
    for address in FAR {
        if let Some(index) = rtnl.route_to(address)?
            && let Some(link) = rtnl.link_by_index(index)?
        {
            return Ok(link.mtu);
        }
    }
    Ok(ETHERNET)
}

/// Ops of one namespace, gathered into as few conversations as their order allows. Runs inside that namespace.
struct Applier<'a> {
    rtnl: &'a mut Rtnl,
    /// Where pairs have their far end.
    far: Option<&'a Netns>,
    /// What is not sent yet, and for which op.
    pending: Vec<(&'a Op, Query)>,
    links: BTreeMap<String, Link>,
    indices: BTreeMap<&'a str, u32>,
    /// Addresses and routes that are there already stay.
    only_missing: bool,
    others: Vec<String>,
}

impl<'a> Applier<'a> {
    fn new(rtnl: &'a mut Rtnl, far: Option<&'a Netns>) -> Self {
        Self {
            rtnl,
            far,
            pending: Vec::new(),
            links: BTreeMap::new(),
            indices: BTreeMap::new(),
            only_missing: false,
            others: Vec::new(),
        }
    }

    /// `others`: the node's ends that it could not make, because another ADD has made them.
    fn run(mut self, ops: &'a [Op], others: &mut Vec<String>) -> Result<(), KernelError> {
        let done = self.all(ops);
        others.append(&mut self.others);
        done
    }

    fn all(&mut self, ops: &'a [Op]) -> Result<(), KernelError> {
        for (done, op) in ops.iter().enumerate() {
            let rest = &ops[done..];
            match op {
                Op::CreatePair { pair, mtu } => {
                    let far = self.far.ok_or_else(|| KernelError::Gone {
                        op: op.to_string(),
                        ifname: pair.host.clone(),
                    })?;
                    self.push(op, Query::create_pair(pair, *mtu, far.as_fd()));
                }
                Op::Configure {
                    ifname,
                    alias,
                    ipv4,
                    ..
                } => self.push(op, Query::configure(ifname, alias.as_deref(), ipv4)),
                Op::Up { ifname, .. } => self.push(op, Query::up(ifname)),
                Op::Address {
                    ifname, address, ..
                } => {
                    let index = self.index(op, ifname)?;
                    self.push_missing(op, Query::address(index, *address));
                }
                Op::Neighbour {
                    ifname,
                    address,
                    mac,
                    ..
                } => {
                    let index = self.index(op, ifname)?;
                    self.push(op, Query::neighbour(index, *address, *mac));
                }
                Op::Route {
                    ifname, to, via, ..
                } => {
                    let index = self.index(op, ifname)?;
                    self.push_missing(op, Query::route(index, *to, *via));
                }
                Op::Ipv6 {
                    side,
                    ifname,
                    settings,
                } => {
                    for setting in *settings {
                        let (key, value) = setting.file();
                        let path = format!("ipv6/conf/{ifname}/{key}");
                        // The pod's turn begins with files: asking for the link would cost it a conversation.
                        let holds = match side {
                            Side::Host => self.link(op, ifname, rest)?.has(*setting),
                            Side::Pod => false,
                        };
                        if !holds {
                            set_sysctl(&path, value).map_err(|source| KernelError::Refused {
                                op: format!("/proc/sys/net/{path} = {value}"),
                                source,
                            })?;
                        }
                    }
                }
                Op::Sysctl { path, value, .. } => {
                    set_sysctl(path, value).map_err(|source| KernelError::Refused {
                        op: op.to_string(),
                        source,
                    })?;
                }
                Op::AwaitCarrier { ifname, .. } => {
                    if !self.link(op, ifname, rest)?.running {
                        self.flush()?;
                        self.await_carrier(op, ifname)?;
                    }
                }
            }
        }
        self.flush()
    }

    fn push(&mut self, op: &'a Op, query: Query) {
        self.pending.push((op, query));
    }

    fn push_missing(&mut self, op: &'a Op, query: Query) {
        let query = match self.only_missing {
            true => query.unless_there(),
            false => query,
        };
        self.push(op, query);
    }

    fn flush(&mut self) -> Result<(), KernelError> {
        let (ops, queries): (Vec<&Op>, Vec<Query>) =
            std::mem::take(&mut self.pending).into_iter().unzip();
        let mut stands = None;
        let mut refused = None;
        for (op, verdict) in ops.into_iter().zip(self.rtnl.batch(&queries)?) {
            match (verdict, op) {
                // EEXIST is told of a name in the pod too.
                (Err(e), Op::CreatePair { pair, .. })
                    if e.kind() == io::ErrorKind::AlreadyExists
                        && self.rtnl.link(&pair.host)?.is_some() =>
                {
                    self.others.push(pair.host.clone());
                    stands.get_or_insert(KernelError::Stands {
                        ifname: pair.host.clone(),
                    });
                }
                (Ok(Some(link)), _) => {
                    self.links.insert(link.name.clone(), link);
                }
                (Ok(None), _) => {}
                (Err(e), _) if self.only_missing && e.kind() == io::ErrorKind::AlreadyExists => {}
                (Err(source), op) => {
                    refused.get_or_insert_with(|| KernelError::Refused {
                        op: op.to_string(),
                        source,
                    });
                }
            }
        }
        stands.or(refused).map_or(Ok(()), Err)
    }

    /// Its index, which needs no conversation and none of the kernel's big lock. The interface was made in an earlier turn.
    fn index(&mut self, op: &Op, ifname: &'a str) -> Result<u32, KernelError> {
        if let Some(index) = self.indices.get(ifname) {
            return Ok(*index);
        }
        let index = self.rtnl.index(ifname)?.ok_or_else(|| KernelError::Gone {
            op: op.to_string(),
            ifname: ifname.to_owned(),
        })?;
        self.indices.insert(ifname, index);
        Ok(index)
    }

    /// The interface, asked for together with all others that the rest will need, at the end of what is pending.
    fn link(&mut self, op: &'a Op, ifname: &str, rest: &[Op]) -> Result<&Link, KernelError> {
        if !self.links.contains_key(ifname) {
            let mut names: Vec<&str> = rest.iter().filter_map(needs_link).collect();
            names.sort_unstable();
            names.dedup();
            for name in names {
                if !self.links.contains_key(name) {
                    self.push(op, Query::link(name));
                }
            }
            self.flush()?;
        }
        self.links.get(ifname).ok_or_else(|| KernelError::Gone {
            op: op.to_string(),
            ifname: ifname.to_owned(),
        })
    }

    fn await_carrier(&mut self, op: &Op, ifname: &str) -> Result<(), KernelError> {
        let begin = Instant::now();
        loop {
            match self.rtnl.link(ifname)? {
                Some(link) if link.running => return Ok(()),
                Some(_) if begin.elapsed() < CARRIER_WITHIN => std::thread::sleep(LOOK_AGAIN),
                Some(_) => {
                    return Err(KernelError::NoCarrier {
                        ifname: ifname.to_owned(),
                    });
                }
                None => {
                    return Err(KernelError::Gone {
                        op: op.to_string(),
                        ifname: ifname.to_owned(),
                    });
                }
            }
        }
    }
}

/// The interface of which an op must know more than its index.
fn needs_link(op: &Op) -> Option<&str> {
    match op {
        Op::AwaitCarrier { ifname, .. } => Some(ifname),
        Op::Ipv6 { side, ifname, .. } => (*side == Side::Host).then_some(ifname),
        Op::CreatePair { .. }
        | Op::Configure { .. }
        | Op::Sysctl { .. }
        | Op::Up { .. }
        | Op::Address { .. }
        | Op::Neighbour { .. }
        | Op::Route { .. } => None,
    }
}

/// Writes only what differs: writing some of these takes the kernel's one big network lock, reading does not.
fn set_sysctl(path: &str, value: &str) -> io::Result<()> {
    let path = PathBuf::from("/proc/sys/net").join(path);
    let open = |how| rustix::fs::open(&path, how | OFlags::CLOEXEC, Mode::empty());
    // Where nothing may be written it may be as it should be all the same.
    let (file, refused) = match open(OFlags::RDWR) {
        Ok(file) => (file, None),
        Err(refused) => (open(OFlags::RDONLY)?, Some(refused)),
    };
    let mut is = [0; MAX_SYSCTL];
    let length = rustix::io::read(&file, &mut is)?;
    if is[..length].trim_ascii_end() == value.as_bytes() {
        return Ok(());
    }
    if let Some(refused) = refused {
        return Err(refused.into());
    }
    // From the beginning, whatever was read: elsewhere the kernel takes nothing.
    rustix::io::pwrite(&file, value.as_bytes(), 0)?;
    Ok(())
}

fn compare(ops: &[Op], rtnl: &mut Rtnl) -> Result<Vec<String>, KernelError> {
    let mut found = Vec::new();
    for op in ops {
        let holds = match op {
            Op::CreatePair { pair, mtu } => rtnl.link(&pair.host)?.is_some_and(|link| {
                link.alias.as_deref() == Some(pair.alias.as_str())
                    && link.mac == pair.host_mac.0
                    && link.mtu == *mtu
            }),
            Op::Up { ifname, .. } => rtnl.link(ifname)?.is_some_and(|link| link.up),
            Op::AwaitCarrier { ifname, .. } => rtnl.link(ifname)?.is_some_and(|link| link.running),
            Op::Address {
                ifname, address, ..
            } => match rtnl.link(ifname)? {
                Some(link) => rtnl.addresses(link.index)?.contains(address),
                None => false,
            },
            Op::Neighbour {
                ifname,
                address,
                mac,
                ..
            } => match rtnl.link(ifname)? {
                Some(link) => {
                    rtnl.permanent_neighbour(link.index, *address)?.as_deref()
                        == Some(mac.0.as_slice())
                }
                None => false,
            },
            Op::Route { ifname, to, .. } => match rtnl.link(ifname)? {
                // A default route is looked for with an address that no other route has.
                Some(link) => rtnl.route_to(sample(to))? == Some(link.index),
                None => false,
            },
            Op::Configure { .. } | Op::Sysctl { .. } | Op::Ipv6 { .. } => true,
        };
        if !holds {
            found.push(op.to_string());
        }
    }
    Ok(found)
}

fn sample(to: &ipnet::IpNet) -> std::net::IpAddr {
    match to {
        ipnet::IpNet::V6(net) if net.prefix_len() == 0 => {
            std::net::Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).into()
        }
        ipnet::IpNet::V4(net) if net.prefix_len() == 0 => {
            std::net::Ipv4Addr::new(192, 0, 2, 1).into()
        }
        net => net.addr(),
    }
}
