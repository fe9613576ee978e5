//! `kunctl ipam rebuild`: puts a new store in the place of a damaged one, from the tags of this node's interfaces and from what
//! the container runtime's CNI library remembers (`/var/lib/cni/results`). A store that is sound,
//! no older copy of itself, and not empty is left alone.
//!
//! The damaged file is kept under another name, or an empty one where there was none: they are counted, so that generations only
//! grow. Nothing is changed before everything was read and fits together.

use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kun_cni_core::ipam::{Ipam, Key, Owner, Pod, Rules, Snapshot};
use kun_cni_core::rebuild::{Found, RebuildError as Contradiction, rebuild as plan};
use kun_config::Config;
use kun_config::types::{PodPrefix, Slot};
use serde_json::Value;

use crate::clock::{self, ClockError};
use crate::look::Sight;
use crate::lost::{not_older, tagged};
use crate::netlink::NetlinkError;
use crate::store::{FILE, Store, StoreError};

/// Where libcni keeps the result of each ADD until its DEL (CNI conventions; containerd and CRI-O).
pub const RESULTS: &str = "/var/lib/cni/results";

/// Results of one node: every slot of the largest, once for each of its interfaces.
const MAX_RESULTS: usize = 131_072;

/// A result with a whole network configuration in it.
const MAX_RESULT: u64 = 1 << 20;

/// Damaged stores that are kept: a node that has had more has a broken disk.
const MAX_KEPT: u64 = 1000;

/// Why there is no new store.
#[derive(Debug, thiserror::Error)]
pub enum RebuildError {
    /// It is good.
    #[error("{}: the store is sound and not empty; there is nothing to rebuild", path.display())]
    Sound {
        /// The file.
        path: PathBuf,
    },
    /// The store, or the process that has it.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The kernel.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// What was found does not fit together.
    #[error(transparent)]
    Contradiction(#[from] Contradiction),
    /// The boot.
    #[error(transparent)]
    Clock(#[from] ClockError),
    /// A file.
    #[error("{}: {source}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// The system's word.
        source: io::Error,
    },
    /// Too many.
    #[error("{}: more than {MAX_KEPT} damaged stores are kept there; the disk is broken", path.display())]
    TooMany {
        /// The directory.
        path: PathBuf,
    },
}

/// What was done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rebuilt {
    /// Attachments whose slots stay theirs.
    pub kept: usize,
    /// Where the damaged store is now; `None`: there was none.
    pub damaged: Option<PathBuf>,
}

/// Rebuilds the store of this node. Run it in the node's network namespace, with the agent stopped.
pub fn rebuild(config: &Config, results: &Path) -> Result<Rebuilt, RebuildError> {
    let directory = &config.agent.state_dir;
    let path = directory.join(FILE);
    let io = |path: &Path| {
        let path = path.to_owned();
        move |source| RebuildError::Io { path, source }
    };
    let there = path.exists();
    // One that can be read stays ours until another is in its place.
    let _held = match there.then(|| read(directory)) {
        None | Some(Err(StoreError::Damaged { .. })) => None,
        Some(Ok((_, snapshot))) if !snapshot.records.is_empty() && is_sound(&path, &snapshot)? => {
            return Err(RebuildError::Sound { path });
        }
        Some(Ok((store, _))) => Some(store),
        Some(Err(e)) => return Err(e.into()),
    };
    let found = find(config, results)?;
    let (number, kept_as) = (1..=MAX_KEPT)
        .map(|n| (n, directory.join(format!("{FILE}.damaged-{n}"))))
        .find(|(_, kept)| !kept.exists())
        .ok_or_else(|| RebuildError::TooMany {
            path: directory.clone(),
        })?;
    let effects = plan(&found, number, clock::boot()?, clock::now())?;
    // Whole before it has the name: an agent that is started again and again would make an empty one where there is none.
    let new = directory.join(format!("{FILE}.rebuilt-{}", std::process::id()));
    Store::make(&new)?.commit(&effects)?;
    if !there {
        // There is none to keep. An empty one counts in its place: the next one's generations begin above this one's.
        File::create_new(&kept_as)
            .and_then(|_| File::open(directory)?.sync_all())
            .map_err(io(&kept_as))?;
    }
    let placed = match there {
        true => std::fs::hard_link(&path, &kept_as).and_then(|()| std::fs::rename(&new, &path)),
        // Not over one that was made meanwhile.
        false => std::fs::hard_link(&new, &path).and_then(|()| std::fs::remove_file(&new)),
    };
    placed
        .and_then(|()| File::open(directory)?.sync_all())
        .map_err(io(&path))?;
    Ok(Rebuilt {
        kept: found.len(),
        damaged: there.then_some(kept_as),
    })
}

/// The store, and what is in it.
fn read(directory: &Path) -> Result<(Store, Snapshot), StoreError> {
    let store = Store::open(directory, Duration::ZERO)?;
    let snapshot = store.load()?;
    Ok((store, snapshot))
}

/// Whether an agent would take it: it contradicts neither itself nor the interfaces that stand.
fn is_sound(path: &Path, snapshot: &Snapshot) -> Result<bool, RebuildError> {
    let interfaces = tagged(path)?;
    let rules = Rules::time_alone(Duration::ZERO);
    let loaded = Ipam::load(snapshot.clone(), rules, clock::boot()?, clock::now());
    Ok(loaded.is_ok_and(|(core, _)| not_older(path, &core, &interfaces).is_ok()))
}

/// Attachments by the kernel, and by the runtime where no interface of ours tells.
fn find(config: &Config, results: &Path) -> Result<Vec<Found>, RebuildError> {
    let prefix = config.ipam.pod_prefix;
    let remembered = remembered(results, config)?;
    let mut found: Vec<Found> = Vec::new();
    for interface in Sight::take()?.interfaces(prefix) {
        for slot in interface.slots {
            let owner = Owner {
                pod: pod_of(&remembered, &interface.key),
                key: interface.key.clone(),
                delegated: false,
            };
            let one = Found {
                owner,
                slot,
                generation: Some(interface.generation),
            };
            if !found.contains(&one) {
                found.push(one);
            }
        }
    }
    for one in remembered {
        if !found.iter().any(|f| f.owner.key == one.owner.key) {
            found.push(one);
        }
    }
    Ok(found)
}

fn pod_of(remembered: &[Found], key: &Key) -> Pod {
    let same = remembered.iter().find(|f| f.owner.key == *key);
    same.map_or_else(Pod::default, |f| f.owner.pod.clone())
}

/// What the runtime's CNI library remembers of addresses of ours. A file that cannot be read as a result is no attachment.
fn remembered(results: &Path, config: &Config) -> Result<Vec<Found>, RebuildError> {
    let io = |source| RebuildError::Io {
        path: results.to_owned(),
        source,
    };
    let files = match std::fs::read_dir(results) {
        Ok(files) => files,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(io(e)),
    };
    let mut found = Vec::new();
    for file in files.take(MAX_RESULTS) {
        let path = file.map_err(io)?.path();
        if std::fs::metadata(&path).is_ok_and(|m| m.len() > MAX_RESULT) {
            continue;
        }
        let text = std::fs::read(&path).map_err(io)?;
        let result = serde_json::from_slice(&text).ok();
        found.extend(result.and_then(|value| attachment(&value, config)));
    }
    Ok(found)
}

fn attachment(cached: &Value, config: &Config) -> Option<Found> {
    let text = |name: &str| Some(cached.get(name)?.as_str()?.to_owned());
    let addresses = cached.pointer("/result/ips")?.as_array()?;
    let slot = addresses
        .iter()
        .filter_map(|ip| ip.get("address")?.as_str())
        .filter_map(|net| net.split('/').next()?.parse().ok())
        .find_map(|address| slot_of(address, config))?;
    let arguments = cached.get("cniArgs").and_then(Value::as_array);
    let argument = |name: &str| {
        let pairs = arguments.into_iter().flatten();
        let mut values = pairs.filter_map(|pair| {
            (pair.get(0)?.as_str()? == name).then(|| pair.get(1)?.as_str().map(str::to_owned))?
        });
        values.next().unwrap_or_default()
    };
    Some(Found {
        owner: Owner {
            key: Key {
                container_id: text("containerId")?,
                ifname: text("ifName")?,
                network: text("networkName")?,
            },
            pod: Pod {
                namespace: argument("K8S_POD_NAMESPACE"),
                name: argument("K8S_POD_NAME"),
                uid: argument("K8S_POD_UID"),
            },
            // No interface tells of it, so another plugin made them.
            delegated: true,
        },
        slot,
        generation: None,
    })
}

fn slot_of(address: IpAddr, config: &Config) -> Option<Slot> {
    let prefix: PodPrefix = config.ipam.pod_prefix;
    match address {
        IpAddr::V6(a) => prefix.slot(a),
        IpAddr::V4(a) => {
            let ours = config.ipam.v4_pools.iter().any(|pool| pool.contains(&a));
            ours.then(|| Slot::from(a))
        }
    }
}
