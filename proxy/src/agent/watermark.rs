//! This node's part in watermarks: what its dataplane has applied is published, and what all nodes have applied is read.
//!
//! *Applied* means that the maps hold it: the revision travels behind its changes through the dataplane's queue, and counts when
//! nothing that was taken in before it is left to plan and no op has failed. What decides is `kun_cni_core::watermark`; how it is
//! written, `kun_cluster::watermark`. With a folder there is none of this.

use std::sync::{Arc, Mutex, PoisonError};

use kun_cluster::api::write::{WriteError, Writer, micro_time};
use kun_cluster::watermark::{self as lease, Fold};
use kun_cluster::{
    Delta, Event, Following, Kind, Object, ObjectName, Reached, Resource, Source, SourceError,
    Wanted,
};
use kun_cni::clock;
use kun_cni::ipam::{BootTime, Revision, Watermark};
use kun_cni::watermark::{Publisher, believed};
use kun_config::{ClusterSource, Config};
use kun_control::Fact;

use super::api_writes::{Failures, Teller, random};
use super::cluster::View;
use super::dataplane::fact;
use super::metrics::Metrics;

const WHAT: &str = "watermark";

/// Which revision of the EndpointSlices the maps hold; `None`: nobody knows.
#[derive(Debug, Default)]
pub(crate) struct Applied(Mutex<Option<Reached>>);

impl Applied {
    /// The dataplane's word.
    pub(crate) fn set(&self, reached: Option<Reached>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = reached;
    }

    fn revision(&self) -> Option<Revision> {
        let applied = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        applied.map(|reached| Revision(reached.at))
    }
}

/// What the operator folded, as this node reads it.
#[derive(Debug, Default)]
struct Read {
    fold: Option<Fold>,
    /// Its watch stands, and goes on from what it said before: else the fold may be of a storage that was restored since.
    stands: bool,
    trouble: Option<String>,
}

/// Watermarks as this node sees them.
#[derive(Debug)]
pub(crate) struct Watermarks {
    applied: Arc<Applied>,
    read: Arc<Mutex<Read>>,
    published: Arc<Mutex<Option<(Revision, BootTime)>>>,
    failures: Failures,
    _following: Following,
}

impl Watermarks {
    /// Follows what is folded. Apart from the other kinds: a right that is missing here costs addresses that come back, and must not
    /// cost the first snapshot.
    pub(crate) fn follow(
        source: &ClusterSource,
        applied: Arc<Applied>,
        failures: Failures,
    ) -> Result<Self, SourceError> {
        let read = Arc::new(Mutex::new(Read::default()));
        let wanted = Wanted::new()
            .named(Kind::Lease, lease::fold_name())
            .revisions_of(Kind::Lease);
        let to = Arc::clone(&read);
        let following = Source::open(source)?.follow(wanted, move |event| {
            on_event(
                &mut to.lock().unwrap_or_else(PoisonError::into_inner),
                event,
            );
            true
        })?;
        Ok(Self {
            applied,
            read,
            published: Arc::default(),
            failures,
            _following: following,
        })
    }

    /// What all nodes have applied, as far as this one may believe it.
    pub(crate) fn believed(&self) -> Option<Watermark> {
        let fold = self.fold().filter(|_| self.stands())?;
        let folded = fold.revision.map(|revision| Watermark {
            revision: Revision(revision),
            lagging: fold.slowest,
        });
        believed(folded, self.applied.revision())
    }

    fn fold(&self) -> Option<Fold> {
        let read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        read.fold.clone()
    }

    fn stands(&self) -> bool {
        let read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        read.stands
    }

    /// Publishes what is applied, at most once a period.
    pub(crate) fn teller(&self, config: &Config, view: Arc<View>, metrics: Metrics) -> Tell {
        let period = config.ipam.cooldown;
        Tell {
            node: config.node.name.clone(),
            view,
            metrics,
            applied: Arc::clone(&self.applied),
            published: Arc::clone(&self.published),
            publisher: Publisher::new(period, clock::now(), random()),
            owner: None,
        }
    }

    /// For status.
    pub(crate) fn facts(&self) -> Vec<Fact> {
        let applied = self.applied.revision();
        let fold = self.fold();
        let slowest = |fold: &Fold| match fold.slowest.is_empty() {
            true => String::new(),
            false => format!(", slowest: {}", fold.slowest.join(", ")),
        };
        let (text, good) = match (&fold, self.believed(), applied) {
            (_, _, None) => (
                "this node has applied no known revision yet".to_owned(),
                false,
            ),
            (Some(fold), Some(watermark), _) => {
                let revision = watermark.revision;
                let all = format!("all nodes have applied revision {revision}");
                (all + &slowest(fold), true)
            }
            (Some(_), None, Some(_)) if !self.stands() => (
                "what was folded is not known to be of the storage that there is now: its watch is cut off, or has just come back"
                    .to_owned(),
                false,
            ),
            (Some(fold), None, Some(applied)) => match fold.revision {
                Some(revision) => (
                    format!(
                        "{revision} was folded, above {applied} applied here: the storage was restored, or this node begins"
                    ),
                    false,
                ),
                None => (format!("not all nodes are known{}", slowest(fold)), false),
            },
            (None, ..) => {
                let (namespace, name) = lease::FOLD;
                (
                    format!(
                        "nobody folds: Lease {namespace}/{name} is not there; released addresses rest until kun-operator has written it"
                    ),
                    false,
                )
            }
        };
        let mut facts = vec![fact("watermark", text, good)];
        let published = *self
            .published
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let told = match (published, applied) {
            (Some((told, at)), Some(applied)) => {
                let ago = clock::now().since(at).as_secs();
                format!("revision {told}, {ago} s ago; {applied} applied")
            }
            (Some((told, _)), None) => format!("revision {told}"),
            (None, _) => "nothing yet".to_owned(),
        };
        facts.push(fact("published", told, true));
        let trouble = {
            let read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
            read.trouble.clone()
        };
        let wrong = [trouble, self.failures.of(WHAT)];
        facts.extend(
            wrong
                .into_iter()
                .flatten()
                .map(|what| fact("watermark trouble", what, false)),
        );
        facts
    }

    /// For metrics.
    pub(crate) fn count(&self, metrics: &Metrics) {
        let number = |revision: Option<u64>| revision.and_then(|r| i64::try_from(r).ok());
        metrics.watermark(
            number(self.applied.revision().map(|r| r.0)),
            number(self.believed().map(|w| w.revision.0)),
        );
    }
}

fn on_event(read: &mut Read, event: Event) {
    match event {
        Event::Deltas(deltas) => {
            for delta in deltas {
                match delta {
                    Delta::Upsert(Object::Lease(found)) => read.fold = Some(lease::fold(&found)),
                    Delta::Remove(Kind::Lease, _) => read.fold = None,
                    Delta::Upsert(_) | Delta::Remove(..) => {}
                }
            }
            read.trouble = None;
        }
        Event::Synced => read.trouble = None,
        Event::Trouble(what) => {
            tracing::warn!("watermark: {what}");
            read.trouble = Some(what);
        }
        Event::Reached(_, reached) => read.stands = reached.is_some(),
        Event::Partial | Event::Whole => {}
    }
}

/// The publisher's shell.
#[derive(Debug)]
pub(crate) struct Tell {
    node: String,
    view: Arc<View>,
    metrics: Metrics,
    applied: Arc<Applied>,
    published: Arc<Mutex<Option<(Revision, BootTime)>>>,
    publisher: Publisher,
    /// The Node whose Lease was written.
    owner: Option<Arc<str>>,
}

impl Teller for Tell {
    fn what(&self) -> &'static str {
        WHAT
    }

    fn turn(&mut self, writer: &Writer, now: BootTime) -> Result<(), WriteError> {
        let Some(applied) = self.applied.revision() else {
            return Ok(());
        };
        // Without a Node nobody waits for us, and there is nothing for the Lease to go with.
        let Some(uid) = self.view.node_uid(&self.node) else {
            return Ok(());
        };
        if self.owner.as_ref() != Some(&uid) {
            // The Lease of a Node that had our name goes with it.
            self.publisher.forget();
        }
        let Some(revision) = self.publisher.due(applied, now, random()) else {
            return Ok(());
        };
        let written = self.write(writer, &uid, revision);
        self.metrics.published(written.is_ok());
        written?;
        self.owner = Some(uid);
        self.publisher.published(revision, now, random());
        *self
            .published
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some((revision, now));
        Ok(())
    }
}

impl Tell {
    /// One request as a rule: the Lease is there from the first one on.
    fn write(&self, writer: &Writer, uid: &str, revision: Revision) -> Result<(), WriteError> {
        let name = ObjectName::new(lease::NAMESPACE, &self.node);
        let patch = lease::node_patch(&self.node, uid, revision.0, &micro_time());
        match writer.patch(Resource::LEASES, &name, &patch) {
            Err(WriteError::NotFound { .. }) => {
                let made = lease::node_lease(&self.node, uid, revision.0, &micro_time());
                writer.create(Resource::LEASES, &made).map(drop)
            }
            patched => patched.map(drop),
        }
    }
}
