//! The network configuration list for this node's container runtime: placed once pods can be served, and kept.
//!
//! Until the list stands, the kubelet calls the node not ready and starts no pods on it. So it is placed when the cluster is synced, the
//! dataplane is programmed and the node has blocks; an agent that ends leaves it, since the plugin works without one and the
//! datapath goes on.

use std::path::Path;
use std::sync::Mutex;

use kun_cni::install::{InstallError, LIST, Lists, install, uninstall};

/// Where lists go on this host, and what the plugin is to read.
#[derive(Debug)]
pub(crate) struct Placed {
    lists: Lists,
    config: String,
    list: Option<std::path::PathBuf>,
    told: Mutex<Option<String>>,
}

impl Placed {
    /// `config` is the text of this agent's own `kun.yaml`; `list` a list that somebody wrote, else kun alone.
    pub(crate) fn new(
        conf_dir: &Path,
        list: Option<&Path>,
        config: String,
    ) -> Result<Self, InstallError> {
        let lists = Lists::new(conf_dir, LIST)?;
        // Refused at start rather than when the node is about to be ready.
        lists.wanted(&config, list)?;
        Ok(Self {
            lists,
            config,
            list: list.map(Path::to_owned),
            told: Mutex::new(None),
        })
    }

    /// Sees to it that both files stand. Cheap when they do; what fails is told once and tried again by the next call.
    pub(crate) fn keep(&self) {
        let done = self
            .lists
            .wanted(&self.config, self.list.as_deref())
            .and_then(|wanted| {
                let written = install(&wanted, |_| {})?;
                for path in written {
                    tracing::info!(path = %path.display(), "placed for the container runtime");
                }
                Ok(())
            });
        let trouble = match done {
            Ok(()) => self.lists.before().first().map(|other| {
                format!(
                    "{}: its name comes before {LIST}, so the runtime takes it; remove it",
                    other.display()
                )
            }),
            Err(error) => Some(format!("{error}; trying again")),
        };
        let mut told = self
            .told
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(trouble) = &trouble
            && *told != Some(trouble.clone())
        {
            tracing::warn!("the container runtime's lists: {trouble}");
        }
        *told = trouble;
    }
}

/// Takes list and configuration away. The plugin stays: pods that are still attached are deleted by it.
pub(crate) fn remove(conf_dir: &Path) -> Result<(), InstallError> {
    uninstall(Some(&Lists::new(conf_dir, LIST)?), None, |_| {}).map(drop)
}
