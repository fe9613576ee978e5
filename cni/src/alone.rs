//! What the plugin does itself where no agent does it, when an ADD would fail without: it takes the blocks that manifests list for
//! this node, and gathers the evidence that released addresses are forgotten.
//!
//! What is asked for stays what the cluster's source can give ([`Needs`](kun_cni_core::ipam::Needs)), so that an agent that is
//! away for a while and a node that never had one are judged alike. The node is looked at as the agent does. A folder of manifests
//! is read here and now, as a whole; the API is not, so that under Kubernetes slots rest until an agent looks. So they do where an
//! agent's programs stand while it is away: the flows that those remember are the agent's to remove.

use std::collections::BTreeMap;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use kun_cluster_core::{Manifest, Object, parse_manifest};
use kun_config::types::{BlockId, PodPrefix};
use kun_config::{ClusterSource, Config};

use crate::ipam::{
    BootTime, Claim, ClusterLook, IpamError, IpamService, Look, Standing, Unforgotten,
};
use crate::look::{Sight, addresses};
use crate::netlink::NetlinkError;

/// Levels of sub-folders, as the agent reads them.
const MAX_DEPTH: usize = 4;

/// Files of a folder, and bytes of one: an ADD waits for this. A larger folder has an agent to read it.
const MAX_FILES: usize = 1024;
const MAX_FILE: u64 = 16 << 20;

/// The directory below a version's where the loader pins the service programs.
const SERVICE_PINS: &str = "service";

/// Why nothing could be gathered.
#[derive(Debug, thiserror::Error)]
pub(crate) enum GatherError {
    /// The store.
    #[error(transparent)]
    Ipam(#[from] IpamError),
    /// The kernel.
    #[error("this node cannot be looked at: {0}")]
    Node(#[from] NetlinkError),
    /// The manifests.
    #[error("{}: {what}; without an agent addresses come back only when all manifests can be read (an empty folder will do)", path.display())]
    Folder { path: PathBuf, what: String },
    /// An agent is away for a while.
    #[error("{}: the node agent's programs are at work there, and the flows that they remember are its to remove; start kun-proxy, or run kun-proxy --cleanup", path.display())]
    Programs { path: PathBuf },
    /// Kubernetes.
    #[error("the cluster is read from the API, by the node agent alone; start kun-proxy")]
    Api,
}

/// Takes the blocks that the folder lists for this node and the store knows nothing of; whether there was one. None is given back here:
/// that a block is listed no more an agent will see.
pub(crate) fn take_listed(
    service: &IpamService,
    config: &Config,
    now: BootTime,
) -> Result<bool, GatherError> {
    let ClusterSource::Folder(path) = &config.cluster else {
        return Ok(false);
    };
    let mut listed: BTreeMap<BlockId, Option<Claim>> = BTreeMap::new();
    read(path, |file, text| {
        for object in &manifest(file, text)?.objects {
            if let Object::IpamBlock(block) = object {
                let spec = &block.spec;
                // Which Node has this UID an agent knows.
                let ours = **block.node() == *config.node.name && spec.node_uid.is_none();
                let claim = (ours && !spec.draining).then(|| Claim {
                    epoch: u64::try_from(spec.epoch).unwrap_or_default(),
                    standing: Standing::Confirmed,
                });
                // Of two files with one object the first in path order wins.
                listed.entry(block.block()).or_insert(claim);
            }
        }
        Ok(())
    })
    .map_err(|what| GatherError::Folder {
        path: path.to_owned(),
        what,
    })?;
    let known = service.standings(now)?;
    let mut claims: BTreeMap<BlockId, Claim> = known
        .iter()
        .map(|(block, (claim, ..))| (*block, *claim))
        .collect();
    for (block, claim) in listed {
        if let Some(claim) = claim {
            claims.entry(block).or_insert(claim);
        }
    }
    if claims.len() == known.len() {
        return Ok(false);
    }
    service.set_claims(&claims, now)?;
    Ok(true)
}

/// Looks at everything that rests. What is missing is remembered as the reason why a slot is not free.
pub(crate) fn gather(
    service: &IpamService,
    config: &Config,
    now: BootTime,
) -> Result<(), GatherError> {
    if let Some(path) = programs(&config.agent.bpffs_root) {
        return Err(GatherError::Programs { path });
    }
    let prefix = service.prefix();
    // A look begins after the question was read: it names the release that it is about.
    let released = service.unforgotten(now)?;
    if released.is_empty() {
        return Ok(());
    }
    let mut sight = Sight::take()?;
    if sight.remove_learnt(&released, prefix)? {
        sight = Sight::take()?;
    }
    let holders = match &config.cluster {
        ClusterSource::Folder(path) => in_folder(path, &released, prefix)?,
        ClusterSource::Kubernetes { .. } => return Err(GatherError::Api),
    };
    let looks = released
        .iter()
        .map(|slot| Look {
            slot: slot.slot,
            sequence: slot.sequence,
            node: Some(sight.knows(slot, prefix)),
            cluster: Some(ClusterLook {
                held: addresses(slot.slot, prefix)
                    .iter()
                    .filter_map(|address| holders.get(address).cloned())
                    .collect(),
                revision: None,
            }),
        })
        .collect();
    service.observe(looks, None, now)?;
    Ok(())
}

/// Where an agent, of this version or another, has pinned its service programs.
fn programs(bpffs_root: &Path) -> Option<PathBuf> {
    let versions = fs::read_dir(bpffs_root).ok()?;
    versions
        .flatten()
        .map(|version| version.path().join(SERVICE_PINS))
        .find(|path| path.exists())
}

/// The first object of the folder that holds each of these slots' addresses.
fn in_folder(
    path: &Path,
    released: &[Unforgotten],
    prefix: PodPrefix,
) -> Result<BTreeMap<IpAddr, String>, GatherError> {
    let failed = |what: String| GatherError::Folder {
        path: path.to_owned(),
        what,
    };
    let wanted: Vec<IpAddr> = released
        .iter()
        .flat_map(|slot| addresses(slot.slot, prefix))
        .collect();
    let mut held = BTreeMap::new();
    let first = read(path, |file, text| {
        for (address, line) in holders(file, text)? {
            if wanted.contains(&address) {
                held.entry(address).or_insert(line);
            }
        }
        Ok(())
    })
    .map_err(failed)?;
    // An object that moved meanwhile from a file not read yet into one that was would not have been seen.
    let second = read(path, |_, _| Ok(())).map_err(failed)?;
    if first != second {
        return Err(failed("it changed while it was read".to_owned()));
    }
    Ok(held)
}

fn manifest(file: &Path, text: &str) -> Result<Manifest, String> {
    parse_manifest(&file.to_string_lossy(), text).map_err(|faults| {
        let first = faults.0.first();
        first.map_or_else(|| "it is wrong".to_owned(), ToString::to_string)
    })
}

/// Addresses that the objects of a file hold.
fn holders(file: &Path, text: &str) -> Result<Vec<(IpAddr, String)>, String> {
    let mut held = Vec::new();
    for object in &manifest(file, text)?.objects {
        match object {
            Object::EndpointSlice(slice) => held.extend(slice.endpoints.iter().map(|endpoint| {
                let (name, address) = (&slice.meta.name, endpoint.address);
                (address, format!("EndpointSlice {name} has {address}"))
            })),
            Object::Pod(pod) => held.extend(pod.own_ips().iter().map(|address| {
                let line = format!("Pod {} has {address}", pod.meta.name);
                (*address, line)
            })),
            _ => {}
        }
    }
    Ok(held)
}

/// Hands every manifest over; gives what tells one reading from another.
fn read(
    root: &Path,
    mut each: impl FnMut(&Path, &str) -> Result<(), String>,
) -> Result<BTreeMap<PathBuf, u64>, String> {
    let mut files = Vec::new();
    list(root, 0, &mut files)?;
    files.sort();
    let mut seen = BTreeMap::new();
    for file in files {
        let what = |e: io::Error| format!("{}: {e}", file.display());
        if fs::metadata(&file).map_err(what)?.len() > MAX_FILE {
            return Err(format!("{}: longer than {MAX_FILE} bytes", file.display()));
        }
        let text = fs::read_to_string(&file).map_err(what)?;
        each(&file, &text)?;
        let mut hasher = DefaultHasher::new();
        text.hash(&mut hasher);
        seen.insert(file, hasher.finish());
    }
    Ok(seen)
}

fn list(path: &Path, depth: usize, files: &mut Vec<PathBuf>) -> Result<(), String> {
    let what = |e: io::Error| format!("{}: {e}", path.display());
    if fs::metadata(path).map_err(what)?.is_file() {
        files.push(path.to_owned());
        return Ok(());
    }
    for entry in fs::read_dir(path).map_err(what)? {
        let path = entry.map_err(what)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with('.') {
            continue;
        }
        if fs::metadata(&path).map_err(what)?.is_dir() {
            if depth < MAX_DEPTH {
                list(&path, depth + 1, files)?;
            }
        } else if path
            .extension()
            .is_some_and(|e| e == "yaml" || e == "yml" || e == "json")
        {
            files.push(path);
        }
        if files.len() > MAX_FILES {
            return Err(format!("more than {MAX_FILES} files"));
        }
    }
    Ok(())
}
