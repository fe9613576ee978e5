//! A consumer of a cluster source, for tests and benches: keeps a store, and holds every event to the contract that all consumers
//! rely on. What breaks it is kept and told.

use std::collections::HashSet;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use kun_cluster::{Delta, Event, Following, Kind, ObjectName, Source, Store, Troubles, Wanted};

/// Follows a source.
#[derive(Debug)]
pub struct Watcher {
    following: Following,
    events: Receiver<Event>,
    known: HashSet<(Kind, ObjectName)>,
    wanted: Wanted,
    /// Everything that was told, applied.
    pub store: Store,
    /// Deltas since the snapshot, in order.
    pub deltas: Vec<Delta>,
    /// Troubles that were told.
    pub told: Vec<String>,
    /// Synced was told.
    pub synced: bool,
    /// Partial was told, and no Whole since.
    pub partial: bool,
    snapshots: usize,
}

impl Watcher {
    /// Begins to follow.
    pub fn new(source: Source, wanted: Wanted) -> Result<Self> {
        let (sender, events) = channel();
        let following = source.follow(wanted.clone(), move |event| sender.send(event).is_ok())?;
        Ok(Self {
            following,
            events,
            known: HashSet::new(),
            wanted,
            store: Store::new(),
            deltas: Vec::new(),
            told: Vec::new(),
            synced: false,
            partial: false,
            snapshots: 0,
        })
    }

    /// What is followed.
    pub fn following(&self) -> &Following {
        &self.following
    }

    /// What is wrong now.
    pub fn troubles(&self) -> Troubles {
        self.following.troubles()
    }

    /// Takes events until `is_so`, or fails after `within`.
    pub fn until(
        &mut self,
        what: &str,
        within: Duration,
        is_so: impl Fn(&Self) -> bool,
    ) -> Result<()> {
        let end = Instant::now() + within;
        while !is_so(self) {
            let left = end.saturating_duration_since(Instant::now());
            match self.events.recv_timeout(left) {
                Ok(event) => self.take(event)?,
                Err(RecvTimeoutError::Timeout) => bail!(
                    "{what}: not within {within:?}; troubles: {:?}; counts: {:?}",
                    self.troubles().now(),
                    self.store.counts()
                ),
                Err(RecvTimeoutError::Disconnected) => bail!("{what}: the source has ended"),
            }
        }
        Ok(())
    }

    /// Takes events until the source is synced.
    pub fn until_synced(&mut self, within: Duration) -> Result<()> {
        self.until("synced", within, |w| w.synced)
    }

    /// Takes what has arrived.
    pub fn drain(&mut self) -> Result<()> {
        while let Ok(event) = self.events.try_recv() {
            self.take(event)?;
        }
        Ok(())
    }

    fn take(&mut self, event: Event) -> Result<()> {
        match event {
            Event::Deltas(deltas) => {
                ensure!(!deltas.is_empty(), "an event of no deltas");
                if !self.synced {
                    self.snapshots += 1;
                    ensure!(
                        self.snapshots == 1,
                        "a second event of deltas before Synced"
                    );
                }
                for delta in deltas {
                    self.apply(delta)?;
                }
            }
            Event::Partial => {
                ensure!(!self.synced, "Partial after Synced");
                self.partial = true;
            }
            Event::Synced => {
                ensure!(!self.synced, "Synced twice");
                self.synced = true;
            }
            // Not asked for.
            Event::Reached(..) => bail!("a revision that nobody wants"),
            Event::Whole => {
                ensure!(self.synced && self.partial, "Whole without Partial");
                self.partial = false;
            }
            Event::Trouble(trouble) => self.told.push(trouble),
        }
        Ok(())
    }

    fn apply(&mut self, delta: Delta) -> Result<()> {
        match &delta {
            Delta::Upsert(object) => {
                ensure!(self.wanted.admits(object), "not wanted: {:?}", object.key());
                self.known.insert(object.key());
            }
            Delta::Remove(kind, name) => {
                ensure!(self.synced, "{kind:?} {name} removed from the snapshot");
                ensure!(
                    self.known.remove(&(*kind, name.clone())),
                    "{kind:?} {name} removed, and was never told"
                );
            }
        }
        if self.synced {
            self.deltas.push(delta.clone());
        }
        let before = self.store.apply(delta.clone());
        if let (Some(before), Delta::Upsert(now)) = (before, delta) {
            let (before, now_uid) = (&before.meta().uid, &now.meta().uid);
            ensure!(
                before.is_empty() || now_uid.is_empty() || before == now_uid,
                "{:?} has become another object without a removal",
                now.key()
            );
        }
        Ok(())
    }
}
