//! Joins the manifest folder, the plan and the generated files, once or for good.

use std::collections::BTreeSet;
use std::path::Path;

use kun_cluster::folder::{FolderError, FolderSource};
use kun_cluster::{Event, Store};
use kun_config::{ClusterSource, Config};
use kun_telemetry::{Health, Metrics};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;

use crate::generated::{Generated, GeneratedError};
use crate::plan::{Pools, Shortage, plan};

/// Why the operator stops.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// Not a folder.
    #[error("cluster.kubernetes: this operator works on a folder of manifests; set cluster.folder")]
    NoFolder,
    /// The folder cannot be followed.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// Its own files.
    #[error(transparent)]
    Generated(#[from] GeneratedError),
}

/// What the operator counts: `kun_operator_…`.
#[derive(Debug, Default)]
struct Counted {
    blocks: Gauge,
    addresses: Gauge,
    shortages: Gauge,
    troubles: Counter,
}

impl Counted {
    fn register(metrics: &Metrics) -> Self {
        let counted = Self::default();
        metrics.register(|r| {
            r.register(
                "kun_operator_blocks",
                "Blocks assigned to nodes",
                counted.blocks.clone(),
            );
            r.register(
                "kun_operator_service_addresses",
                "Services with a virtual address from here",
                counted.addresses.clone(),
            );
            r.register(
                "kun_operator_shortages",
                "Blocks and addresses that could not be given",
                counted.shortages.clone(),
            );
            r.register(
                "kun_operator_manifest_troubles",
                "Manifests refused",
                counted.troubles.clone(),
            );
        });
        counted
    }
}

/// The operator, at work on one folder.
#[derive(Debug)]
pub struct Operator {
    config: Config,
    blocks_per_node: u32,
    store: Store,
    source: FolderSource,
    generated: Generated,
    told: BTreeSet<Shortage>,
    counted: Counted,
}

impl Operator {
    /// Takes the folder's lock; fails when another operator has it.
    pub fn open(config: Config, blocks_per_node: u32, metrics: &Metrics) -> Result<Self, RunError> {
        let folder: &Path = match &config.cluster {
            ClusterSource::Folder(folder) => folder,
            ClusterSource::Kubernetes { .. } => return Err(RunError::NoFolder),
        };
        let source = FolderSource::open(folder)?;
        let generated = Generated::open(folder)?;
        Ok(Self {
            config,
            blocks_per_node,
            store: Store::new(),
            source,
            generated,
            told: BTreeSet::new(),
            counted: Counted::register(metrics),
        })
    }

    /// One pass over the folder as it is; what is missing afterwards.
    pub fn once(&mut self) -> Result<BTreeSet<Shortage>, RunError> {
        while self.take_event() != Event::Synced {}
        self.settle()
    }

    /// Keeps the assignments complete for as long as the process lives.
    pub fn run(&mut self, health: &Health) -> Result<(), RunError> {
        self.once()?;
        health.set_ready(true);
        tracing::info!(
            blocks = self.counted.blocks.get(),
            services = self.counted.addresses.get(),
            "the operator runs"
        );
        loop {
            if let Event::Deltas(_) = self.take_event() {
                self.settle()?;
            }
        }
    }

    fn take_event(&mut self) -> Event {
        let event = self.source.next_event();
        match &event {
            Event::Deltas(deltas) => {
                for delta in deltas {
                    self.store.apply(delta.clone());
                }
            }
            Event::Synced | Event::Partial | Event::Whole => {}
            Event::Trouble(trouble) => {
                self.counted.troubles.inc();
                tracing::warn!("{trouble}");
            }
        }
        event
    }

    fn settle(&mut self) -> Result<BTreeSet<Shortage>, RunError> {
        let pools = Pools::of(&self.store, &self.config.ipam);
        let before = self.generated.assignments();
        let plan = plan(&self.store, &pools, before, self.blocks_per_node);
        for (block, node) in &plan.assignments.blocks {
            if !before.blocks.contains_key(block) {
                tracing::info!(%block, %node, "block assigned");
            }
        }
        for (service, addresses) in &plan.assignments.addresses {
            if before.addresses.get(service) != Some(addresses) {
                tracing::info!(%service, ?addresses, "virtual addresses assigned");
            }
        }
        self.generated.write(&plan.assignments)?;
        for shortage in plan.shortages.difference(&self.told) {
            tracing::warn!("{shortage}");
        }
        self.counted
            .blocks
            .set(plan.assignments.blocks.len() as i64);
        self.counted
            .addresses
            .set(plan.assignments.addresses.len() as i64);
        self.counted.shortages.set(plan.shortages.len() as i64);
        self.told.clone_from(&plan.shortages);
        Ok(plan.shortages)
    }
}
