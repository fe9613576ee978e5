//! Applies plans to the kernel, undoes them, and compares the kernel with them.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use kun_cni_core::ipam::Key;
use kun_cni_core::plan::{Op, Side, Undo, generation_in};

use crate::netlink::{NetlinkError, Query, Rtnl};
use crate::netns::{Netns, NetnsError};
use std::os::fd::AsFd;

/// The kernel's link watch runs at once or, at worst, a second later.
const CARRIER_WITHIN: Duration = Duration::from_secs(3);

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

/// Applies the ops in order. What must be undone is pushed on `undo` before it is done, so that after a failure, or a part of
/// the ops only, [`revert`] leaves nothing.
pub fn apply(ops: &[Op], netns: &Netns, undo: &mut Vec<Undo>) -> Result<(), KernelError> {
    let mut host = Rtnl::open()?;
    for run in ops.chunk_by(|a, b| a.side() == b.side()) {
        undo.extend(run.iter().filter_map(Op::undo));
        match run[0].side() {
            Side::Host => Applier::new(&mut host, netns).run(run)?,
            Side::Pod => netns.inside(|| {
                let mut pod = Rtnl::open()?;
                Applier::new(&mut pod, netns).run(run)
            })??,
        }
    }
    Ok(())
}

/// Undoes in reverse order; carries on past failures and gives all of them.
pub fn revert(undo: &[Undo], key: &Key) -> Vec<KernelError> {
    let mut rtnl = match Rtnl::open() {
        Ok(rtnl) => rtnl,
        Err(e) => return vec![e.into()],
    };
    undo.iter()
        .rev()
        .filter_map(|step| {
            let Undo::RemoveLink { host } = step;
            remove_link(&mut rtnl, host, key).err()
        })
        .collect()
}

/// Removes a host-side interface of ours; gives the generation that it was tagged with. Gone already is fine.
pub fn remove_link(rtnl: &mut Rtnl, name: &str, key: &Key) -> Result<Option<u64>, KernelError> {
    let Some(link) = rtnl.link(name)? else {
        return Ok(None);
    };
    let generation = match &link.alias {
        // A crash between making and tagging it; the name alone is enough.
        None => None,
        Some(alias) => match generation_in(alias, key) {
            Some(generation) => Some(generation),
            None => {
                return Err(KernelError::Foreign {
                    ifname: name.to_owned(),
                    alias: alias.clone(),
                });
            }
        },
    };
    for verdict in rtnl.batch(&[Query::remove_link(link.index)])? {
        match verdict {
            // The pod's namespace went away in between, and its interfaces with it.
            Err(e) if e.raw_os_error() == Some(rustix::io::Errno::NODEV.raw_os_error()) => {}
            Err(source) => {
                return Err(KernelError::Refused {
                    op: format!("remove {name}"),
                    source,
                });
            }
            Ok(()) => {}
        }
    }
    Ok(generation)
}

/// Refuses when one of these interfaces is in the pod already.
pub fn require_absent(netns: &Netns, names: &[String]) -> Result<(), KernelError> {
    netns.inside(|| {
        let mut rtnl = Rtnl::open()?;
        for name in names {
            if rtnl.link(name)?.is_some() {
                return Err(KernelError::Exists {
                    ifname: name.clone(),
                });
            }
        }
        Ok(())
    })?
}

/// What is not as the ops would have it: one line each. Sysctls are not looked at: a pod may set its own.
pub fn differences(ops: &[Op], netns: &Netns) -> Result<Vec<String>, KernelError> {
    let mut host = Rtnl::open()?;
    let mut found = Vec::new();
    for run in ops.chunk_by(|a, b| a.side() == b.side()) {
        let more = match run[0].side() {
            Side::Host => compare(run, &mut host)?,
            Side::Pod => netns.inside(|| compare(run, &mut Rtnl::open()?))??,
        };
        found.extend(more);
    }
    Ok(found)
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

/// Ops of one namespace, gathered into as few batches as their order allows.
struct Applier<'a> {
    rtnl: &'a mut Rtnl,
    netns: &'a Netns,
    pending: Vec<(String, Query)>,
    indices: BTreeMap<String, u32>,
}

impl<'a> Applier<'a> {
    fn new(rtnl: &'a mut Rtnl, netns: &'a Netns) -> Self {
        Self {
            rtnl,
            netns,
            pending: Vec::new(),
            indices: BTreeMap::new(),
        }
    }

    fn run(mut self, ops: &[Op]) -> Result<(), KernelError> {
        for op in ops {
            match op {
                Op::CreatePair { pair, mtu } => {
                    self.push(op, Query::create_pair(pair, *mtu, self.netns.as_fd()));
                    // RTM_NEWLINK ignores an alias while it creates.
                    self.push(op, Query::alias(&pair.host, &pair.alias));
                }
                Op::NoLinkLocal { ifname, .. } => self.push(op, Query::no_link_local(ifname)),
                Op::Up { ifname, .. } => self.push(op, Query::up(ifname)),
                Op::Address {
                    ifname, address, ..
                } => {
                    let index = self.index(op, ifname)?;
                    self.push(op, Query::address(index, *address));
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
                    self.push(op, Query::route(index, *to, *via));
                }
                Op::Sysctl { path, value, .. } => {
                    self.flush()?;
                    set_sysctl(path, value).map_err(|source| KernelError::Refused {
                        op: op.to_string(),
                        source,
                    })?;
                }
                Op::AwaitCarrier { ifname, .. } => {
                    self.flush()?;
                    self.await_carrier(op, ifname)?;
                }
            }
        }
        self.flush()
    }

    fn push(&mut self, op: &Op, query: Query) {
        self.pending.push((op.to_string(), query));
    }

    fn flush(&mut self) -> Result<(), KernelError> {
        let (ops, queries): (Vec<String>, Vec<Query>) =
            std::mem::take(&mut self.pending).into_iter().unzip();
        for (op, verdict) in ops.into_iter().zip(self.rtnl.batch(&queries)?) {
            verdict.map_err(|source| KernelError::Refused { op, source })?;
        }
        Ok(())
    }

    fn index(&mut self, op: &Op, ifname: &str) -> Result<u32, KernelError> {
        if let Some(index) = self.indices.get(ifname) {
            return Ok(*index);
        }
        // It may be among what is pending.
        self.flush()?;
        let link = self.rtnl.link(ifname)?.ok_or_else(|| KernelError::Gone {
            op: op.to_string(),
            ifname: ifname.to_owned(),
        })?;
        self.indices.insert(ifname.to_owned(), link.index);
        Ok(link.index)
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

/// Writes only what differs: writing some of these takes the kernel's one big network lock, reading does not.
fn set_sysctl(path: &str, value: &str) -> io::Result<()> {
    let file = PathBuf::from("/proc/sys/net").join(path);
    if std::fs::read_to_string(&file)?.trim_end() == value {
        return Ok(());
    }
    std::fs::write(&file, value)
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
            Op::Sysctl { .. } | Op::NoLinkLocal { .. } => true,
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
