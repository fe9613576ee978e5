//! Keeps the node's routes and neighbour entries of its pods when somebody takes an interface down and up again: the kernel drops them with the first
//! and brings none back with the second.
//!
//! It listens for link messages and acts only on interfaces that it saw going down, so that an ADD costs it nothing. What a pod
//! does to its own end is the pod's.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;

use kun_cni_core::plan;
use kun_cni_core::spec::Wishes;
use kun_config::Config;
use kun_control::{AttachmentKey, Request, Response};

use crate::ipam::IpamService;
use crate::kernel::{KernelError, apply_on_node};
use crate::netlink::{Link, LinkChange, NetlinkError, Rtnl};
use crate::{attach, clock};

/// Interfaces that may be down at once: two for each slot that a node can have. Beyond, one more is not remembered.
const MAX_DOWN: usize = 2 * 64 * kun_cni_core::ipam::MAX_BLOCKS;

/// Starts the thread, in the caller's network namespace. It ends with the process.
pub fn start(ipam: Arc<IpamService>, config: Config) -> Result<(), NetlinkError> {
    let listening = Rtnl::listen_to_links()?;
    let asking = Rtnl::open()?;
    let keeper = Keeper {
        ipam,
        config,
        asking,
        down: BTreeSet::new(),
    };
    std::thread::Builder::new()
        .name("kun-keeper".into())
        .spawn(move || keeper.run(listening))?;
    Ok(())
}

struct Keeper {
    ipam: Arc<IpamService>,
    config: Config,
    asking: Rtnl,
    down: BTreeSet<u32>,
}

impl Keeper {
    fn run(mut self, mut listening: Rtnl) {
        // Before the first message there may have been a flap that nobody saw.
        self.look_at_all();
        loop {
            match listening.link_changes() {
                Ok(changes) => changes.into_iter().for_each(|change| self.see(change)),
                Err(NetlinkError::Socket(e)) if e.kind() == io::ErrorKind::WouldBlock => {}
                // ENOBUFS: messages were lost.
                Err(_) => self.look_at_all(),
            }
        }
    }

    fn see(&mut self, change: LinkChange) {
        match change {
            LinkChange::Gone(index) => {
                self.down.remove(&index);
            }
            LinkChange::Now(link) if link.up => {
                if self.down.remove(&link.index) {
                    self.restore(&link);
                }
            }
            // One that is just being made has no tag yet.
            LinkChange::Now(link) => {
                if link.alias.is_some() && self.down.len() < MAX_DOWN {
                    self.down.insert(link.index);
                }
            }
        }
    }

    fn look_at_all(&mut self) {
        let links = match self.asking.links() {
            Ok(links) => links,
            Err(error) => {
                tracing::error!(%error, "links cannot be listed");
                return;
            }
        };
        self.down.clear();
        for link in links {
            match link.up {
                true => self.restore(&link),
                false => self.see(LinkChange::Now(link)),
            }
        }
    }

    /// Only what is tagged as ours and what the store knows.
    fn restore(&mut self, link: &Link) {
        let alias = link.alias.as_deref().unwrap_or_default();
        let Some(key) = plan::key_in(alias) else {
            return;
        };
        let lookup = Request::Lookup {
            key: AttachmentKey {
                network: key.network,
                container_id: key.container_id,
                ifname: key.ifname,
            },
        };
        let Response::Allocation { allocation } = self.ipam.handle(&lookup, clock::now()) else {
            return;
        };
        let wishes = Wishes {
            mac: plan::mac_in(alias),
            ..Wishes::default()
        };
        let facts = attach::facts(&allocation, &wishes, &self.config, link.mtu);
        let ops = plan::restore(&facts, &link.name);
        match apply_on_node(&mut self.asking, &ops) {
            Ok(()) | Err(KernelError::Gone { .. }) => {}
            Err(error) => tracing::warn!(interface = link.name, %error, "routes not restored"),
        }
    }
}
