//! The fold of watermarks: what each node's proxy has applied goes in, what all have applied comes out, on one Lease. Beside the plan
//! and in nobody's way: a thread, watches and a client of its own, for as long as this operator leads.
//!
//! Nodes and their Leases are read again only now and then, so that 83 Leases a second at ten thousand nodes cost a parse each and no
//! pass. The write is a compare-and-swap, made at most once in [`every`] and only when something changed. What decides is
//! `kun_cni_core::watermark`; how it is written, `kun_cluster::watermark`.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::Thread;
use std::time::Duration;

use kun_cluster::api::write::{WriteError, Writer, micro_time};
use kun_cluster::watermark::{self as lease, Fold};
use kun_cluster::{Event, Following, Kind, Origin, Resource, Source, Store, Wanted};
use kun_cni_core::ipam::{BootTime, Revision};
use kun_cni_core::watermark::{self as core, Absence, Folded};
use kun_config::ClusterSource;
use kun_telemetry::Metrics;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use serde_json::{Value, json};

use crate::elect::{Seat, now};
use crate::lease::CALL_WITHIN;
use crate::run::RunError;

/// Ten thousand nodes hear of every write: 333 events a second at this.
const AT_MOST_EVERY: Duration = Duration::from_secs(30);

/// Of a cooldown; with the default of two minutes it is [`AT_MOST_EVERY`].
const PART: u32 = 4;

const AT_LEAST_EVERY: Duration = Duration::from_secs(1);

/// How often it is looked whether the first snapshot is there.
const UNTIL_SYNCED: Duration = Duration::from_millis(200);

/// What is counted: `kun_operator_watermark_…`.
#[derive(Debug, Clone, Default)]
pub struct Counted {
    revision: Gauge,
    lag: Gauge,
    unknown: Gauge,
    absent: Gauge,
    writes: Counter,
}

impl Counted {
    /// Registers all of it.
    pub fn register(metrics: &Metrics) -> Self {
        let counted = Self::default();
        metrics.register(|r| {
            r.register(
                "kun_operator_watermark_revision",
                "Revision of the EndpointSlices that all nodes have applied; 0: not known",
                counted.revision.clone(),
            );
            r.register(
                "kun_operator_watermark_lag",
                "Revisions between it and the newest",
                counted.lag.clone(),
            );
            r.register(
                "kun_operator_watermark_unknown_nodes",
                "Nodes that are waited for and have published nothing that can be believed",
                counted.unknown.clone(),
            );
            r.register(
                "kun_operator_watermark_absent_nodes",
                "Nodes that are not waited for",
                counted.absent.clone(),
            );
            r.register(
                "kun_operator_watermark_writes",
                "Times that the fold was written",
                counted.writes.clone(),
            );
        });
        counted
    }
}

/// How often is folded: the delay that it adds to an address's way back is a part of its cooldown.
pub fn every(cooldown: Duration) -> Duration {
    (cooldown / PART).clamp(AT_LEAST_EVERY, AT_MOST_EVERY)
}

/// The cluster as its watches tell it.
#[derive(Debug, Default)]
struct Seen {
    store: Store,
    synced: bool,
    /// The watch of Leases stands, and goes on from what it said before: else they may be of a storage that was restored since.
    stands: bool,
}

/// The fold at work; dropped, it ends after its current call, which is a compare-and-swap and hurts nobody who comes after.
#[derive(Debug)]
pub struct Folding {
    stop: Arc<AtomicBool>,
    wake: Thread,
    _following: Following,
}

impl Folding {
    /// For as long as `seat` may act. `me`: who is written as the one that folded.
    pub fn start(
        source: &ClusterSource,
        writer: Writer,
        seat: Seat,
        me: &str,
        cooldown: Duration,
        counted: Counted,
    ) -> Result<Self, RunError> {
        let seen = Arc::new(Mutex::new(Seen::default()));
        let wanted = Wanted::new()
            .all([Kind::Node])
            .of_namespace(Kind::Lease, lease::NAMESPACE)
            .revisions_of(Kind::Lease);
        let to = Arc::clone(&seen);
        let following = Source::open(source)?.follow(wanted, move |event| {
            let mut seen = to.lock().unwrap_or_else(PoisonError::into_inner);
            match event {
                Event::Deltas(deltas) => deltas
                    .into_iter()
                    .for_each(|delta| drop(seen.store.apply(delta))),
                Event::Synced => seen.synced = true,
                Event::Trouble(what) => tracing::warn!("watermark: {what}"),
                Event::Reached(_, reached) => seen.stands = reached.is_some(),
                Event::Partial | Event::Whole => {}
            }
            true
        })?;
        let folder = Folder {
            seen,
            writer: writer.within(CALL_WITHIN),
            seat,
            me: me.to_owned(),
            fold: core::Fold::new(Absence::of(cooldown)),
            stands: None,
            trouble: None,
            counted,
        };
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("kun-watermark".to_owned())
            .spawn(move || folder.run(every(cooldown), &stopped))
            .map_err(|source| RunError::System {
                what: "a thread",
                source,
            })?;
        Ok(Self {
            stop,
            wake: thread.thread().clone(),
            _following: following,
        })
    }
}

impl Drop for Folding {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        self.wake.unpark();
    }
}

/// The Lease as it stands, with what it says.
#[derive(Debug)]
struct Stands {
    object: Value,
    says: Fold,
}

struct Folder {
    seen: Arc<Mutex<Seen>>,
    writer: Writer,
    seat: Seat,
    me: String,
    fold: core::Fold,
    /// `None`: to be read.
    stands: Option<Stands>,
    trouble: Option<String>,
    counted: Counted,
}

impl Folder {
    fn run(mut self, every: Duration, stop: &AtomicBool) {
        while !stop.load(Ordering::Acquire) {
            let wait = if self.take_in(BootTime(now())) {
                match self.pass() {
                    Ok(()) => self.trouble = None,
                    Err(error) => self.say(error.to_string()),
                }
                every
            } else {
                UNTIL_SYNCED
            };
            std::thread::park_timeout(wait);
        }
        self.count(None, &Folded::default());
    }

    fn say(&mut self, what: String) {
        if self.trouble.as_ref() != Some(&what) {
            tracing::warn!("watermark: {what}");
        }
        self.trouble = Some(what);
    }

    /// What has been told since; `false`: not everything has been told once, or nobody knows whether it still holds.
    fn take_in(&mut self, now: BootTime) -> bool {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if !(seen.synced && seen.stands) {
            return false;
        }
        let mut there: BTreeSet<&str> = BTreeSet::new();
        for node in seen.store.nodes() {
            there.insert(&node.meta.uid);
            self.fold
                .node(&node.meta.uid, &node.meta.name.name, node.ready, now);
        }
        self.fold.retain(|uid| there.contains(uid));
        for found in seen.store.leases() {
            if let Some(published) = lease::published(found)
                && let Origin::Api { resource_version } = &found.meta.origin
            {
                let revision = Revision(published.revision);
                self.fold
                    .published(&published.uid, revision, resource_version, now);
            }
        }
        true
    }

    fn pass(&mut self) -> Result<(), WriteError> {
        // After all that was taken in, so that nobody can rightly have more.
        let head = self.writer.head(Resource::of(Kind::EndpointSlice))?;
        if let Some(head) = head {
            self.fold.head(Revision(head));
        }
        let folded = self.fold.fold(BootTime(now()));
        self.count(head, &folded);
        // Once for each reign, and after somebody else wrote.
        let before = match self.stands.take() {
            Some(stands) => Some(stands),
            None => self.read()?,
        };
        let said = before.as_ref().map(|stands| &stands.says);
        let says = says(said, &folded);
        if said == Some(&says) || !self.seat.may_call() {
            self.stands = before;
            return Ok(());
        }
        // Whatever comes of it, what stands is read again unless the server has said it.
        let object = match &before {
            Some(stands) => self
                .writer
                .replace(Resource::LEASES, &self.object(stands.object.clone(), &says)),
            None => {
                let name = lease::fold_name();
                let new = json!({"metadata": {"namespace": *name.namespace, "name": *name.name}});
                self.writer
                    .create(Resource::LEASES, &self.object(new, &says))
            }
        };
        match object {
            Ok(object) => {
                self.counted.writes.inc();
                self.stands = Some(Stands { object, says });
                Ok(())
            }
            // Somebody else wrote; the next pass sees what.
            Err(WriteError::Conflict { .. } | WriteError::Exists { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn read(&self) -> Result<Option<Stands>, WriteError> {
        match self.writer.get(Resource::LEASES, &lease::fold_name()) {
            Ok(object) => {
                let annotations = &object["metadata"]["annotations"];
                let says = lease::fold_in(|key| annotations[key].as_str());
                Ok(Some(Stands { object, says }))
            }
            Err(WriteError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn object(&self, mut object: Value, says: &Fold) -> Value {
        for (key, value) in lease::fold_annotations(says) {
            object["metadata"]["annotations"][key] = json!(value);
        }
        object["spec"] = json!({"holderIdentity": self.me, "renewTime": micro_time()});
        object
    }

    fn count(&self, head: Option<u64>, folded: &Folded) {
        let number = |revision: u64| i64::try_from(revision).unwrap_or(i64::MAX);
        let minimum = folded.minimum.as_ref().map(|w| w.revision.0);
        let lag = minimum.and_then(|minimum| head?.checked_sub(minimum));
        let counted = &self.counted;
        counted
            .revision
            .set(minimum.map(number).unwrap_or_default());
        counted.lag.set(lag.map(number).unwrap_or_default());
        counted.unknown.set(folded.unknown_count as i64);
        counted.absent.set(folded.absent as i64);
    }
}

/// What is to be said. While somebody is unknown the last minimum stays: what all nodes have applied they have applied, whoever has
/// come since; and who is waited for is named.
fn says(said: Option<&Fold>, folded: &Folded) -> Fold {
    match &folded.minimum {
        Some(minimum) => Fold {
            revision: Some(minimum.revision.0),
            slowest: minimum.lagging.clone(),
        },
        None => Fold {
            revision: said.and_then(|said| said.revision),
            slowest: folded.unknown.clone(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kun_cni_core::ipam::Watermark;

    #[test]
    fn the_pace_is_a_part_of_the_cooldown() {
        let seconds = |s| every(Duration::from_secs(s)).as_secs();
        assert_eq!((seconds(0), seconds(8), seconds(120)), (1, 2, 30));
        assert_eq!(seconds(86_400), 30);
    }

    #[test]
    fn a_minimum_stays_while_somebody_is_unknown() {
        let known = Folded {
            minimum: Some(Watermark {
                revision: Revision(7),
                lagging: vec!["b".to_owned()],
            }),
            ..Folded::default()
        };
        let first = says(None, &known);
        assert_eq!(first.revision, Some(7));
        let unknown = Folded {
            unknown: vec!["c".to_owned()],
            unknown_count: 1,
            ..Folded::default()
        };
        let then = says(Some(&first), &unknown);
        assert_eq!(
            (then.revision, then.slowest),
            (Some(7), vec!["c".to_owned()])
        );
        assert_eq!(says(None, &unknown).revision, None);
    }
}
