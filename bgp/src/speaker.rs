//! The speaker: a task a peer, a task that accepts, and the handle that the agent holds.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use kun_bgp_core::RouteSet;
use kun_config::{Bgp, BgpPeer};
use prometheus_client::registry::Registry;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::metrics::Metrics;
use crate::open::Local;
use crate::retry::Jitter;
use crate::session::{Order, Peer};
use crate::status::{Board, SessionStatus};
use crate::sys;
use crate::transport::{self, Key};

/// Accepted connections that wait for a peer's task: one that collides and one behind it; a third is closed.
const INBOUND_WAITING: usize = 2;

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
        address: SocketAddr,
        /// The system's word.
        source: std::io::Error,
    },
    /// A key file cannot be read, or holds no key of 1 to 80 bytes.
    #[error("bgp.peers[{peer}].md5File: {}: {wrong}; one line of 1 to {} bytes is expected", file.display(), sys::MD5_KEY_MAX)]
    Key {
        /// Peer name.
        peer: String,
        /// The file.
        file: PathBuf,
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
pub struct Speaker {
    peers: Vec<Handle>,
    order: watch::Sender<Order>,
    tasks: JoinSet<()>,
    /// Accepts; aborted with the handle.
    acceptor: Option<JoinSet<()>>,
    listening: Option<SocketAddr>,
}

#[derive(Debug)]
struct Handle {
    name: String,
    desired: watch::Sender<Option<Arc<RouteSet>>>,
    board: Arc<Board>,
}

impl Speaker {
    /// Reads keys, binds the listener and starts a task for every peer; must be called inside a tokio runtime. No session opens
    /// before the first [`Speaker::announce`].
    pub fn start(
        config: &Bgp,
        options: Options,
        registry: &mut Registry,
    ) -> Result<Self, StartError> {
        let metrics = Metrics::register(registry);
        let (order, ordered) = watch::channel(Order::Run);
        let local = Local {
            asn: config.asn,
            router_id: config.router_id.unwrap_or(options.router_id),
            restart_time: config.graceful_restart,
        };
        let keys = config
            .peers
            .iter()
            .map(key_of)
            .collect::<Result<Vec<_>, _>>()?;
        let listener = match config.listen {
            None => None,
            Some(address) => {
                let with_keys = config
                    .peers
                    .iter()
                    .zip(&keys)
                    .filter_map(|(p, k)| Some((p, k.as_ref()?)));
                let listener = transport::listen(address, with_keys)
                    .map_err(|source| StartError::Listen { address, source })?;
                Some(listener)
            }
        };
        let mut tasks = JoinSet::new();
        let mut peers = Vec::new();
        let mut doors = Vec::new();
        for (i, (peer, key)) in config.peers.iter().zip(keys).enumerate() {
            let (desired, wanted) = watch::channel(None);
            let (door, inbound) = mpsc::channel(INBOUND_WAITING);
            let board = Board::new(peer.name.clone(), peer.address, metrics.of(&peer.name));
            doors.push((peer.clone(), door));
            peers.push(Handle {
                name: peer.name.clone(),
                desired,
                board: board.clone(),
            });
            let task = Peer {
                local: local.clone(),
                peer: peer.clone(),
                key,
                desired: wanted,
                order: ordered.clone(),
                inbound,
                board,
                jitter: Jitter::new(options.seed.wrapping_add(i as u64)),
                restarted: options.restarted,
                preserved: options.restarted,
            };
            tasks.spawn(task.run());
        }
        let listening = listener.as_ref().and_then(|l| l.local_addr().ok());
        let acceptor = listener.map(|listener| {
            let mut set = JoinSet::new();
            set.spawn(accept(listener, doors));
            set
        });
        Ok(Self {
            peers,
            order,
            tasks,
            acceptor,
            listening,
        })
    }

    /// Where it listens.
    pub fn listening(&self) -> Option<SocketAddr> {
        self.listening
    }

    /// Replaces what every peer is to hold, by peer name; a peer that is not named is to hold nothing. Returns at once.
    pub fn announce(&self, mut sets: BTreeMap<String, RouteSet>) {
        for peer in &self.peers {
            let set = Arc::new(sets.remove(&peer.name).unwrap_or_default());
            peer.desired.send_if_modified(|now| {
                let changed = now.as_ref() != Some(&set);
                if changed {
                    *now = Some(set);
                }
                changed
            });
        }
    }

    /// Every session, in the order of the configuration.
    pub fn status(&self) -> Vec<SessionStatus> {
        self.peers.iter().map(|p| p.board.status()).collect()
    }

    /// Ends all sessions; returns when every peer was told, or after `within`.
    pub async fn shutdown(mut self, mode: StopMode, within: Duration) {
        self.acceptor = None;
        let _ = self.order.send(Order::Stop(mode));
        let told = async { while self.tasks.join_next().await.is_some() {} };
        if tokio::time::timeout(within, told).await.is_err() {
            tracing::warn!(?within, "some bgp peers were not told in time");
        }
    }
}

/// Hands connections to the peers they come from; strangers are closed without a word.
async fn accept(listener: TcpListener, doors: Vec<(BgpPeer, mpsc::Sender<TcpStream>)>) {
    /// Out of descriptors, most likely: trying again at once would spin.
    const AFTER_AN_ERROR: Duration = Duration::from_millis(200);
    loop {
        let (stream, remote) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "bgp listener");
                tokio::time::sleep(AFTER_AN_ERROR).await;
                continue;
            }
        };
        let Some((peer, door)) = doors
            .iter()
            .find(|(peer, _)| transport::is_from(remote, peer))
        else {
            tracing::debug!(%remote, "bgp connection from no configured peer");
            continue;
        };
        match transport::accepted(&stream, peer) {
            // A full door closes the connection; the peer tries again.
            Ok(()) => drop(door.try_send(stream)),
            Err(error) => tracing::warn!(peer = %peer.name, %error, "bgp connection"),
        }
    }
}

fn key_of(peer: &BgpPeer) -> Result<Option<Key>, StartError> {
    let Some(file) = &peer.md5_file else {
        return Ok(None);
    };
    read_key(file)
        .map(|key| Some(Key(key)))
        .map_err(|wrong| StartError::Key {
            peer: peer.name.clone(),
            file: file.clone(),
            wrong,
        })
}

fn read_key(file: &Path) -> Result<Vec<u8>, String> {
    let text = std::fs::read(file).map_err(|e| e.to_string())?;
    let key = text.strip_suffix(b"\n").unwrap_or(&text);
    let key = key.strip_suffix(b"\r").unwrap_or(key);
    match key.len() {
        0 => Err("it is empty".to_owned()),
        n if n > sys::MD5_KEY_MAX => Err(format!("it holds {n} bytes")),
        _ if key.contains(&b'\n') => Err("it holds more than one line".to_owned()),
        _ => Ok(key.to_owned()),
    }
}
