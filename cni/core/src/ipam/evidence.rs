//! What must be seen before a rested address may be used again, and what was seen so far.
//!
//! A look belongs to one release: it names the sequence number that the slot's record had before the look began, and one that
//! names another is dropped. All evidence must hold in one look. What was seen is kept in memory only: after a crash it is
//! looked for again.
//!
//! The *watermark* is the revision of the EndpointSlices that every node's proxy has applied (`crate::watermark`). When this
//! node's own view, at revision R, shows the address in no slice, a proxy that has applied R does not send to it either; so
//! the watermark has to reach R, the first revision since which the view has been clear.

use std::fmt;

use kun_config::types::Slot;

use super::types::BootTime;

/// Lines kept of what still knows an address: enough to act on.
const MAX_WHY: usize = 8;

/// Nodes named as the slowest.
const MAX_LAGGING: usize = 3;

/// A revision of the cluster's EndpointSlices: `metadata.resourceVersion`, which the API server's storage counts up and which
/// may be compared as a number within one storage (KEP-5504).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Revision(pub u64);

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Which evidence is asked for. What an installation cannot give is not asked for, by its type and never by accident.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Needs {
    /// Nothing on this node knows the address: no interface, route, neighbour or flow.
    pub node: bool,
    /// No Pod and no EndpointSlice that this node sees holds it.
    pub cluster: bool,
    /// Every node's proxy has applied a revision without it.
    pub watermark: bool,
}

impl Needs {
    /// Time alone.
    pub const NONE: Self = Self {
        node: false,
        cluster: false,
        watermark: false,
    };

    /// With a folder of manifests: files have no revision that nodes could compare, so no watermark can exist.
    pub const FOLDER: Self = Self {
        node: true,
        cluster: true,
        watermark: false,
    };

    /// With the Kubernetes API.
    pub const API: Self = Self {
        node: true,
        cluster: true,
        watermark: true,
    };
}

/// How far the proxies of all nodes are.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Watermark {
    /// Every node that counts has applied it.
    pub revision: Revision,
    /// The slowest nodes, slowest first.
    pub lagging: Vec<String>,
}

/// What somebody saw of one slot.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Look {
    /// The slot.
    pub slot: Slot,
    /// Its record's sequence number before the look began.
    pub sequence: u64,
    /// What on this node knows the address, one line each; `None`: nobody looked.
    pub node: Option<Vec<String>>,
    /// The cluster; `None`: it is not known, or not all of it.
    pub cluster: Option<ClusterLook>,
}

/// What the cluster's objects say of one slot.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ClusterLook {
    /// Objects that hold the address, one line each.
    pub held: Vec<String>,
    /// The revision that was looked at; `None`: the source has none.
    pub revision: Option<Revision>,
}

/// What was seen of one release.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Seen {
    /// The release.
    pub(super) sequence: u64,
    /// The first look.
    pub(super) first: BootTime,
    /// Since which revision no object has held it.
    clear_since: Option<Revision>,
    /// What was missing in the last look.
    pub(super) why: Vec<String>,
}

impl Seen {
    pub(super) fn new(sequence: u64, now: BootTime) -> Self {
        Self {
            sequence,
            first: now,
            clear_since: None,
            why: Vec::new(),
        }
    }

    /// Takes a look in; whether everything needed is seen in it.
    pub(super) fn take(
        &mut self,
        look: &Look,
        needs: Needs,
        watermark: Option<&Watermark>,
    ) -> bool {
        self.why.clear();
        if needs.node {
            match &look.node {
                None => self.why.push("this node was not looked at yet".to_owned()),
                Some(held) => self.why.extend(held.iter().cloned()),
            }
        }
        if needs.cluster {
            match &look.cluster {
                None => self.why.push("the cluster is not synced yet".to_owned()),
                Some(cluster) => self.why.extend(cluster.held.iter().cloned()),
            }
        }
        if needs.watermark {
            self.clear_since = self.clear(look.cluster.as_ref());
            if let Some(missing) = self.behind(watermark) {
                self.why.push(missing);
            }
        }
        let proven = self.why.is_empty();
        self.why.truncate(MAX_WHY);
        proven
    }

    fn clear(&self, cluster: Option<&ClusterLook>) -> Option<Revision> {
        let cluster = cluster?;
        if !cluster.held.is_empty() {
            return None;
        }
        let now = cluster.revision?;
        Some(match self.clear_since {
            Some(before) if before <= now => before,
            // The storage was restored from a backup and counts from an earlier number.
            Some(_) | None => now,
        })
    }

    fn behind(&self, watermark: Option<&Watermark>) -> Option<String> {
        let Some(wanted) = self.clear_since else {
            return Some("no revision without it was seen yet".to_owned());
        };
        let Some(watermark) = watermark else {
            return Some(format!(
                "what all nodes have applied is not known; revision {wanted} is waited for"
            ));
        };
        if watermark.revision >= wanted {
            return None;
        }
        let mut slowest = watermark.lagging.clone();
        slowest.truncate(MAX_LAGGING);
        Some(format!(
            "all nodes have applied revision {}; {wanted} is waited for, of {}",
            watermark.revision,
            slowest.join(", ")
        ))
    }
}
