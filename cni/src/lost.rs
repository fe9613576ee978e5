//! A store that is not there although there must have been one: it was removed, its directory is another one by now, or its disk is.
//! A new one in its place would give the addresses of living pods to others, so nobody makes one by the way. And one that is an older
//! copy of itself, which would do the same (`kun_cni_core::older`).

use std::path::Path;

use kun_cni_core::ipam::Ipam;
use kun_cni_core::leaks::Interface;
use kun_cni_core::older;
use kun_config::types::PodPrefix;

use crate::look::{self, Sight};
use crate::netlink::NetlinkError;
use crate::spool::Spool;
use crate::store::StoreError;

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
