//! A store that is not there although there must have been one: it was removed, its directory is another one by now, or its disk is.
//! A new one in its place would give the addresses of living pods to others, so nobody makes one by the way,
//! a DEL that takes the last of their interfaces included. And one that is an older copy of itself, which would do the same
//! (`kun_cni_core::older`).

use std::path::Path;

use kun_cni_core::ipam::{Ipam, Key};
use kun_cni_core::leaks::Interface;
use kun_cni_core::older;
use kun_cni_core::spec::Failure;
use kun_config::Config;
use kun_config::types::PodPrefix;

use crate::kernel::KernelError;
use crate::look::{self, Sight};
use crate::netlink::NetlinkError;
use crate::spool::{Entry, Spool};
use crate::store::{FILE, StoreError};

/// Fails when there is no store at `path`, and pods of this node that it must have known.
pub(crate) fn not_lost(path: &Path, spool: &Spool, prefix: PodPrefix) -> Result<(), StoreError> {
    if path.exists() {
        return Ok(());
    }
    let sight = Sight::take().map_err(|e| unseen(path, &e))?;
    let interfaces = sight.interfaces(prefix).len();
    let releases = spool.entries().len();
    match interfaces + releases {
        0 => Ok(()),
        _ => Err(StoreError::Lost {
            path: path.to_owned(),
            interfaces,
            releases,
        }),
    }
}

/// The interfaces that carry kun's tag, in the calling thread's network namespace.
pub(crate) fn tagged(path: &Path) -> Result<Vec<Interface>, StoreError> {
    look::tagged().map_err(|e| unseen(path, &e))
}

/// Fails when one of these, which were seen before the state was read, was made by a later state than this.
pub(crate) fn not_older(
    path: &Path,
    core: &Ipam,
    interfaces: &[Interface],
) -> Result<(), StoreError> {
    match older::evidence(core, interfaces) {
        None => Ok(()),
        Some(interface) => Err(StoreError::Older {
            path: path.to_owned(),
            evidence: format!(
                "the last generation that it gave is {}, and {} of container {} is of generation {}, of which it knows nothing",
                core.newest(),
                interface.name,
                interface.key.container_id,
                interface.generation
            ),
        }),
    }
}

fn unseen(path: &Path, error: &NetlinkError) -> StoreError {
    StoreError::Io {
        path: path.to_owned(),
        what: error.to_string(),
    }
}

/// Where there is no store, spools the release of an attachment that has interfaces, before these are removed: [`not_lost`] finds it in
/// their place. The release itself would find nothing, and a new store in which the pod's address was never used.
pub(crate) fn remember(key: &Key, config: &Config) -> Result<(), Failure> {
    let directory = &config.agent.state_dir;
    if directory.join(FILE).exists() {
        return Ok(());
    }
    let sight = Sight::take().map_err(KernelError::from)?;
    let interfaces = sight.interfaces(config.ipam.pod_prefix);
    if let Some(interface) = interfaces.iter().find(|i| i.key == *key) {
        Spool::new(directory).put(&Entry {
            key: key.clone(),
            generation: Some(interface.generation),
        })?;
    }
    Ok(())
}
