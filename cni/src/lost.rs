//! A store that is not there although there must have been one: it was removed, its directory is another one by now, or its disk is.
//! A new one in its place would give the addresses of living pods to others, so nobody makes one by the way.

use std::path::Path;

use kun_config::types::PodPrefix;

use crate::look::Sight;
use crate::spool::Spool;
use crate::store::StoreError;

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
