//! One consumer of the API source under a fault: what it was told, what its thread spends, what a fresh list says.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use kun_cluster::api::ApiSource;
use kun_cluster::api::write::{Expected, Writer};
use kun_cluster::watch::{Counts, Pace};
use kun_cluster::{Following, Kind, Object, ObjectName, Origin, Resource, Source, Wanted};
use kun_harness::wait_for;
use kun_tests::rig;
use kun_tests::watcher::Watcher;
use serde_json::{Value, json};

pub(crate) const TOLD_WITHIN: Duration = Duration::from_secs(60);

/// Of one core, while something is wrong for as long as it likes. An idle thread spends a thousandth; one that spins spends all.
const CPU_AT_MOST: f64 = 0.25;

pub(crate) const KINDS: [Kind; 5] = [
    Kind::Service,
    Kind::EndpointSlice,
    Kind::Node,
    Kind::Namespace,
    Kind::Lease,
];

/// In a test's hurry.
pub(crate) fn pace() -> Pace {
    Pace {
        wait_first: Duration::from_millis(200),
        wait_at_most: Duration::from_secs(2),
        healthy_after: Duration::from_secs(2),
        answer_within: Duration::from_secs(8),
        ..Pace::default()
    }
}

/// One control plane at a time: the machine is small, and each case finds its own thread by name.
pub(crate) fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) struct Case {
    pub(crate) watcher: Watcher,
    pub(crate) writer: Writer,
    thread: u32,
}

impl Case {
    /// Follows with one kubeconfig and writes with another.
    pub(crate) fn new(follow: &Path, write: &Path, pace: Pace) -> Result<Self> {
        let before = threads()?;
        let source = ApiSource::open(Some(follow))?.with_pace(pace);
        let watcher = Watcher::new(Source::Api(Box::new(source)), Wanted::new().all(KINDS))?;
        let new = || Some(*threads().ok()?.difference(&before).next()?);
        let thread = wait_for("its thread", TOLD_WITHIN, new)?;
        Ok(Self {
            watcher,
            writer: Writer::open(Some(write))?,
            thread,
        })
    }

    pub(crate) fn synced(mut self) -> Result<Self> {
        self.watcher.until_synced(TOLD_WITHIN)?;
        Ok(self)
    }

    pub(crate) fn create(&self, object: &Value) -> Result<Value> {
        let resource = KINDS
            .map(Resource::of)
            .into_iter()
            .find(|r| object["kind"] == r.kind);
        Ok(self.writer.create(resource.context("a kind")?, object)?)
    }

    pub(crate) fn delete(&self, kind: Kind, namespace: &str, name: &str) -> Result<()> {
        let name = ObjectName::new(namespace, name);
        Ok(self
            .writer
            .delete(Resource::of(kind), &name, &Expected::default())?)
    }

    pub(crate) fn sees(&mut self, what: &str, is_so: impl Fn(&Watcher) -> bool) -> Result<()> {
        self.watcher.until(what, TOLD_WITHIN, is_so)
    }

    /// For whoever has the shared control plane next.
    pub(crate) fn clear(&self) -> Result<()> {
        let services = Resource::of(Kind::Service);
        let list = self.writer.list(services, Some("default"))?;
        for item in list["items"].as_array().into_iter().flatten() {
            let name = item["metadata"]["name"].as_str().unwrap_or_default();
            if name != "kubernetes" {
                self.delete(Kind::Service, "default", name)?;
            }
        }
        Ok(())
    }

    pub(crate) fn has_service(&mut self, name: &str) -> Result<()> {
        let name = ObjectName::new("default", name);
        self.sees(&name.to_string(), |w| w.store.service(&name).is_some())
    }

    pub(crate) fn counts(&self) -> Vec<(Kind, Counts)> {
        match self.watcher.following() {
            Following::Api(following) => following.counts(),
            Following::Folder(_) => Vec::new(),
        }
    }

    pub(crate) fn lists(&self) -> u64 {
        self.counts().iter().map(|(_, c)| c.lists).sum()
    }

    /// CPU time of the thread that follows.
    pub(crate) fn cpu(&self) -> Result<Duration> {
        let stat = std::fs::read_to_string(format!("/proc/self/task/{}/stat", self.thread))?;
        let fields: Vec<&str> = stat
            .rsplit_once(')')
            .context("stat")?
            .1
            .split_whitespace()
            .collect();
        let ticks: u64 = fields[11].parse::<u64>()? + fields[12].parse::<u64>()?;
        Ok(Duration::from_secs_f64(
            ticks as f64 / rustix::param::clock_ticks_per_second() as f64,
        ))
    }

    /// Does it, and says how much of a core was spent meanwhile.
    pub(crate) fn while_it(
        &mut self,
        what: &str,
        it: impl FnOnce(&mut Self) -> Result<()>,
    ) -> Result<()> {
        let (begin, cpu) = (Instant::now(), self.cpu()?);
        it(self)?;
        let part = (self.cpu()? - cpu).as_secs_f64() / begin.elapsed().as_secs_f64().max(1.0);
        ensure!(part <= CPU_AT_MOST, "{what}: {part:.2} of a core");
        Ok(())
    }

    /// What was told is what a fresh list says.
    pub(crate) fn equals_a_fresh_list(&mut self, kubeconfig: &Path) -> Result<()> {
        let end = Instant::now() + TOLD_WITHIN;
        loop {
            let mut fresh = Watcher::new(
                Source::Api(Box::new(ApiSource::open(Some(kubeconfig))?)),
                Wanted::new().all(KINDS),
            )?;
            fresh.until_synced(TOLD_WITHIN)?;
            self.watcher.drain()?;
            let (told, listed) = (objects(&self.watcher), objects(&fresh));
            if told == listed {
                return Ok(());
            }
            // Controllers go on writing.
            let differ: BTreeSet<_> = told
                .iter()
                .chain(&listed)
                .filter(|(k, o)| told.get(*k) != Some(o) || listed.get(*k) != Some(o))
                .map(|(k, _)| format!("{k:?}"))
                .collect();
            ensure!(
                Instant::now() < end,
                "differ from a fresh list: {differ:?}; troubles {:?}",
                self.watcher.troubles().now()
            );
        }
    }
}

/// Everything in a store. A Node that was only written and not changed keeps its older resourceVersion.
fn objects(watcher: &Watcher) -> BTreeMap<(Kind, ObjectName), Object> {
    let store = &watcher.store;
    let nodes = store.nodes().map(|node| {
        let mut node = kun_cluster::Node::clone(node);
        node.meta.origin = Origin::Api {
            resource_version: "".into(),
        };
        Object::Node(node.into())
    });
    let all = (store.services().cloned().map(Object::Service))
        .chain(store.slices().cloned().map(Object::EndpointSlice))
        .chain(store.namespaces().cloned().map(Object::Namespace))
        .chain(store.leases().cloned().map(Object::Lease))
        .chain(nodes);
    // The server's own leases are renewed all the time.
    all.filter(|o| o.kind() != Kind::Lease || !rig::is_of_the_server(&o.meta().name))
        .map(|o| (o.key(), o))
        .collect()
}

fn threads() -> Result<BTreeSet<u32>> {
    let mut found = BTreeSet::new();
    for entry in std::fs::read_dir("/proc/self/task")? {
        let path = entry?.path();
        // A thread may end meanwhile.
        let name = std::fs::read_to_string(path.join("comm")).unwrap_or_default();
        if name.trim() == "kun-api" {
            found.extend(
                path.file_name()
                    .and_then(|n| n.to_str()?.parse::<u32>().ok()),
            );
        }
    }
    Ok(found)
}

pub(crate) fn service(name: &str) -> Value {
    let mut service = rig::service("default", name, 80);
    service["spec"]["clusterIP"] = json!("None");
    service
}
