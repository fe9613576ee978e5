//! A store that is not there although there must have been one: it was removed, its directory is another one by now, or its disk is.
//! A new one in its place would give the addresses of living pods to others, so nobody makes one by the way,
//! a DEL that takes the last of their interfaces included.

use std::path::Path;

use kun_cni_core::ipam::Key;
use kun_cni_core::spec::Failure;
use kun_config::Config;
use kun_config::types::PodPrefix;

use crate::kernel::KernelError;
use crate::look::Sight;
use crate::spool::{Entry, Spool};
use crate::store::{FILE, StoreError};

/// Fails when there is no store at `path`, and pods of this node that it must have known.
pub(crate) fn not_lost(path: &Path, spool: &Spool, prefix: PodPrefix) -> Result<(), StoreError> {
    if path.exists() {
        return Ok(());
    }
    let sight = Sight::take().map_err(|e| StoreError::Io {
        path: path.to_owned(),
        what: e.to_string(),
    })?;
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
