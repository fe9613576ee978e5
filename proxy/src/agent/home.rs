//! Whether this agent is in the network namespace in which this node's pods are attached.
//!
//! What is not seen is evidence only where it would be seen. An agent that was started in another namespace (a DaemonSet without
//! `hostNetwork`) sees no pod's interface, route or neighbour: every slot would be a leak, and every address forgotten. So before
//! anything is concluded from absence one of three has to hold: an earlier look of this boot was made in this very namespace, an
//! interface of a living attachment stands here, or nobody has a slot. Which namespace it was is written down, so that an agent
//! that comes back when all pods have gone meanwhile still reclaims what they left.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::PoisonError;

use kun_cni::clock;

/// The file's name below the state directory.
const FILE: &str = "namespace";

/// The calling thread's.
const NAMESPACE: &str = "/proc/thread-self/ns/net";

/// What is known so far.
#[derive(Debug)]
pub(crate) struct Home {
    file: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Unknown,
    Here,
    /// So many attachments stand, and none of them here.
    Elsewhere(usize),
}

impl Home {
    /// Below this state directory. Nothing is read yet.
    pub(crate) fn new(state_dir: &Path) -> Self {
        Self {
            file: state_dir.join(FILE),
            state: Mutex::new(State::Unknown),
        }
    }

    /// Takes in how many attachments have slots and interfaces of kun's making, and of how many an interface stands here; whether
    /// absence here proves anything. Once it does it always will: a process stays where it is.
    pub(crate) fn is_here(&self, live: usize, standing: usize) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if *state == State::Here {
            return true;
        }
        let here = here()
            .inspect_err(|error| tracing::warn!(%error, "{NAMESPACE} cannot be read"))
            .ok();
        let known = here.is_some() && fs::read_to_string(&self.file).ok() == here;
        if !known && live > 0 && standing == 0 {
            if *state == State::Unknown {
                tracing::error!("{}", elsewhere(live));
            }
            *state = State::Elsewhere(live);
            return false;
        }
        if let (false, Some(here)) = (known, here)
            && let Err(error) = self.remember(&here)
        {
            // The next agent finds an interface, or asks for one.
            tracing::warn!(path = %self.file.display(), %error, "which namespace the pods are in cannot be written down");
        }
        *state = State::Here;
        true
    }

    /// What is wrong, for a status.
    pub(crate) fn trouble(&self) -> Option<String> {
        match *self.state.lock().unwrap_or_else(PoisonError::into_inner) {
            State::Elsewhere(live) => Some(elsewhere(live)),
            State::Unknown | State::Here => None,
        }
    }

    fn remember(&self, here: &str) -> io::Result<()> {
        // Not synced: what a crash takes is found out again.
        let new = self.file.with_extension("new");
        fs::write(&new, here)?;
        fs::rename(&new, &self.file)
    }
}

fn elsewhere(live: usize) -> String {
    format!(
        "{live} pods have addresses and none of their interfaces stands in this network namespace: no address comes back and nothing is reclaimed; run the agent in the node's (hostNetwork: true)"
    )
}

/// The boot and the namespace: the number of one that is gone may be given to another.
fn here() -> io::Result<String> {
    let boot = clock::boot().map_err(io::Error::other)?;
    let namespace = fs::metadata(NAMESPACE)?;
    Ok(format!(
        "{:032x} {} {}\n",
        boot.0,
        namespace.dev(),
        namespace.ino()
    ))
}

#[cfg(test)]
mod tests {
    use kun_harness::{Netns, require_root};

    use super::*;

    #[test]
    fn absence_proves_nothing_in_a_namespace_that_no_pod_was_seen_in() {
        if !require_root() {
            return;
        }
        let (node, other) = (Netns::new("home").unwrap(), Netns::new("away").unwrap());
        let state = tempfile::tempdir().unwrap();
        let agent = || Home::new(state.path());
        // A node's first pod.
        assert!(node.run(|| agent().is_here(0, 0)));
        // Its agent comes back, and all pods are gone.
        assert!(node.run(|| agent().is_here(3, 0)));

        let astray = agent();
        assert!(!other.run(|| astray.is_here(3, 0)));
        assert!(astray.trouble().unwrap().contains("hostNetwork"));
        assert!(!other.run(|| astray.is_here(3, 0)));
        assert!(node.run(|| agent().is_here(3, 0)), "it wrote nothing down");

        // A pod that stands shows that the node has another namespace by now: a node that is itself a container.
        assert!(other.run(|| astray.is_here(3, 1)));
        assert_eq!(astray.trouble(), None);
        assert!(other.run(|| astray.is_here(3, 0)), "for good");
        assert!(!node.run(|| agent().is_here(3, 0)));
        // Nobody is left to be harmed.
        assert!(node.run(|| agent().is_here(0, 0)));
    }
}
