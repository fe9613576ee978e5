//! What must be seen before a rested address may be used again, and what was seen so far.
//!
//! A look belongs to one release: it names the sequence number that the slot's record had before the look began, and one that
//! names another is dropped. All evidence must hold in one look. What was seen is kept in memory only: after a crash it is
//! looked for again.
//!
//! The *watermark* is the revision of the EndpointSlices that every node's proxy has applied (`crate::watermark`). The revision that
//! it has to reach is the R of the first look after the release since which no look has found the address in a slice. Why that is
//! enough: the slices are one sequence of states, numbered by revisions, the same for all nodes. This node's view *is* the state
//! at R, and at every revision from R to now it has had no slice with the address; whoever looks sees to that, and calls the
//! address held when it was so for a moment between two looks, or when the view began anew and nobody knows
//! (`cluster` of [`Look`]). A proxy that has applied some revision from R on therefore has the state of a revision between R and
//! now, in which the address is not, or one later than what this node has seen. In a later one it could only be again because
//! something wrote the address of a pod that is gone into a slice, and then the next look finds it; or because the slot was
//! given out again, which is what all this is about. What was released, and when, needs no revision of its own: a release
//! is known on this node alone, and looks begin after it.

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
    /// Objects that hold the address, or held it since the last look, one line each.
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
            let revision = look.cluster.as_ref().and_then(|c| c.revision);
            match (revision, self.behind(watermark)) {
                (_, Some(missing)) => self.why.push(missing),
                // Changes came in just now: what was clear so far still is, but this look is none to decide by.
                (None, None) => self
                    .why
                    .push("the revision looked at is not known yet".to_owned()),
                (Some(_), None) => {}
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
        let Some(now) = cluster.revision else {
            return self.clear_since;
        };
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn look(held: &[&str], revision: Option<u64>) -> Look {
        Look {
            slot: std::net::Ipv4Addr::new(10, 64, 0, 5).into(),
            sequence: 7,
            node: Some(Vec::new()),
            cluster: Some(ClusterLook {
                held: held.iter().map(|h| (*h).to_owned()).collect(),
                revision: revision.map(Revision),
            }),
        }
    }

    fn seen() -> Seen {
        Seen::new(7, BootTime(Duration::ZERO))
    }

    fn watermark(revision: u64) -> Watermark {
        Watermark {
            revision: Revision(revision),
            lagging: vec!["node-b".to_owned()],
        }
    }

    #[test]
    fn the_watermark_has_to_reach_the_first_clear_look() {
        let mut seen = seen();
        let mut take = |look: &Look, mark| seen.take(look, Needs::API, Some(&watermark(mark)));
        assert!(!take(&look(&["EndpointSlice a"], Some(10)), 10));
        assert!(!take(&look(&[], Some(20)), 19));
        // Later looks do not move it, and one between two revisions neither.
        assert!(!take(&look(&[], Some(30)), 19));
        assert!(!take(&look(&[], None), 20), "nobody knows which state");
        assert!(take(&look(&[], Some(40)), 20));
        // It was there again.
        assert!(!take(&look(&["EndpointSlice a"], Some(50)), 50));
        assert!(!take(&look(&[], None), 50));
        assert!(!take(&look(&[], Some(60)), 59));
        assert!(take(&look(&[], Some(70)), 60));
    }

    #[test]
    fn revisions_that_go_back_are_waited_for_anew_and_not_for_ever() {
        let mut seen = seen();
        assert!(!seen.take(&look(&[], Some(1000)), Needs::API, Some(&watermark(990))));
        assert!(!seen.take(&look(&[], Some(505)), Needs::API, Some(&watermark(500))));
        assert!(seen.take(&look(&[], Some(510)), Needs::API, Some(&watermark(505))));
    }

    #[test]
    fn what_is_missing_is_said() {
        let mut seen = seen();
        assert!(!seen.take(&look(&[], None), Needs::API, None));
        assert_eq!(seen.why, ["no revision without it was seen yet"]);
        assert!(!seen.take(&look(&[], Some(20)), Needs::API, None));
        assert!(seen.why[0].contains("revision 20 is waited for"));
        assert!(!seen.take(&look(&[], Some(30)), Needs::API, Some(&watermark(19))));
        let why = "all nodes have applied revision 19; 20 is waited for, of node-b";
        assert_eq!(seen.why, [why]);
        // Files have no revisions.
        assert!(seen.take(&look(&[], None), Needs::FOLDER, None));
    }
}
