//! The bench: every part measures itself into [`Row`]s of one shape, against the budget of the design and, where there is one,
//! a peer in the same run. Instruction counts, CPU-ns minima and ratios; never Gbit/s.

pub mod bgp;
pub mod cluster;
pub mod cni;
pub mod counts;
pub mod dns;
pub mod ebpf;
pub mod nat64;
pub mod proxy;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

/// One figure.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// `part/what`, the same in every run.
    pub name: String,
    /// The figure.
    pub value: f64,
    /// Its unit: `ns`, `1/s`, `instructions`, `x` for ratios.
    pub unit: String,
    /// What the design allows.
    pub budget: Option<f64>,
    /// Whether the figure is within the budget; `None` without one.
    pub holds: Option<bool>,
    /// The peer measured beside it.
    pub peer: Option<String>,
    /// The peer's figure, in the same unit.
    pub peer_value: Option<f64>,
}

impl Row {
    /// A figure without a budget or a peer.
    pub fn new(name: impl Into<String>, value: f64, unit: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            value,
            unit: unit.into(),
            budget: None,
            holds: None,
            peer: None,
            peer_value: None,
        }
    }

    /// The figure may be at most this.
    pub fn at_most(mut self, budget: f64) -> Self {
        self.budget = Some(budget);
        self.holds = Some(self.value <= budget);
        self
    }

    /// The figure must be at least this.
    pub fn at_least(mut self, budget: f64) -> Self {
        self.budget = Some(budget);
        self.holds = Some(self.value >= budget);
        self
    }

    /// Beside a peer, in the same unit.
    pub fn beside(mut self, peer: impl Into<String>, value: f64) -> Self {
        self.peer = Some(peer.into());
        self.peer_value = Some(value);
        self
    }
}

/// What a part may use.
#[derive(Debug)]
pub struct Context {
    programs: PathBuf,
    scratch: tempfile::TempDir,
}

impl Context {
    /// With our programs beside the running one.
    pub fn new() -> Result<Self> {
        let me = std::env::current_exe().context("finding the running program")?;
        let programs = me
            .parent()
            .context("a program lies in a directory")?
            .to_owned();
        Ok(Self {
            programs,
            scratch: tempfile::tempdir().context("making a scratch directory")?,
        })
    }

    /// The path of one of our programs (`kun-dns`), built in the same profile as the bench.
    pub fn program(&self, name: &str) -> Result<PathBuf> {
        let path = self.programs.join(name);
        anyhow::ensure!(
            path.is_file(),
            "{}: not built; `cargo xtask bench` builds it",
            path.display()
        );
        Ok(path)
    }

    /// A directory that is removed after the run.
    pub fn scratch(&self) -> &Path {
        self.scratch.path()
    }

    /// Where a program of the system lies; `None`: not installed, and the peer's columns stay empty.
    pub fn peer(&self, name: &str) -> Option<PathBuf> {
        let path = std::env::var("PATH").unwrap_or_default();
        path.split(':')
            .chain(["/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/lib/cni"])
            .map(|directory| Path::new(directory).join(name))
            .find(|candidate| candidate.is_file())
    }
}

/// A part's figures.
pub type Part = fn(&Context) -> Result<Vec<Row>>;

/// Every part, in the order in which they run.
pub const PARTS: &[(&str, Part)] = &[
    ("ebpf", ebpf::run),
    ("cni", cni::run),
    ("dense", cni::dense::run),
    ("proxy", proxy::run),
    ("dns", dns::run),
    ("nat64", nat64::run),
    ("bgp", bgp::run),
    ("cluster", cluster::run),
];
