//! What a session is doing, for people, metrics and the agent's socket.

use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use rustbgpd_fsm::SessionState;

use crate::metrics::PeerMetrics;

/// A session as it stands. The fields of `kun_control::BgpSession` have the same names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionStatus {
    /// Peer name.
    pub peer: String,
    /// Peer address.
    pub address: IpAddr,
    /// FSM state in the words of RFC 4271 §8.2.2: `Idle`, `Connect`, `Active`, `OpenSent`, `OpenConfirm`, `Established`.
    pub state: &'static str,
    /// Seconds in this state.
    pub since_secs: u64,
    /// Prefixes in Adj-RIB-Out, all of them sent.
    pub announced: u32,
    /// Prefixes that the plan refused.
    pub refused: u32,
    /// Prefixes that the peer sent and that were ignored (RFC 8212).
    pub ignored: u64,
    /// Messages with malformed attributes that RFC 7606 lets a session survive.
    pub malformed: u64,
    /// Why it was last down, with code and subcode in words.
    pub last_error: Option<String>,
    /// What keeps an established session from carrying everything.
    pub condition: Option<String>,
}

/// Where a peer's task writes and [`crate::Speaker::status`] reads.
#[derive(Debug)]
pub(crate) struct Board {
    peer: String,
    address: IpAddr,
    metrics: PeerMetrics,
    entry: Mutex<Entry>,
}

#[derive(Debug)]
struct Entry {
    state: SessionState,
    since: Instant,
    announced: u32,
    refused: u32,
    ignored: u64,
    malformed: u64,
    last_error: Option<String>,
    condition: Option<String>,
}

impl Board {
    pub(crate) fn new(peer: String, address: IpAddr, metrics: PeerMetrics) -> Arc<Self> {
        let entry = Mutex::new(Entry {
            state: SessionState::Idle,
            since: Instant::now(),
            announced: 0,
            refused: 0,
            ignored: 0,
            malformed: 0,
            last_error: None,
            condition: None,
        });
        Arc::new(Self {
            peer,
            address,
            metrics,
            entry,
        })
    }

    pub(crate) fn metrics(&self) -> &PeerMetrics {
        &self.metrics
    }

    pub(crate) fn state(&self, state: SessionState) {
        let mut entry = self.entry();
        if entry.state == state {
            return;
        }
        tracing::debug!(peer = %self.peer, from = word(entry.state), to = word(state), "bgp session");
        let up = state == SessionState::Established;
        if up {
            tracing::info!(peer = %self.peer, address = %self.address, "bgp session established");
            self.metrics.established.inc();
        } else {
            entry.announced = 0;
            entry.condition = None;
            self.metrics.announced.set(0);
        }
        self.metrics.up.set(i64::from(up));
        entry.state = state;
        entry.since = Instant::now();
    }

    pub(crate) fn error(&self, error: String) {
        let mut entry = self.entry();
        // A peer that stays away is one line in the log, not one an attempt.
        if entry.last_error.as_ref() != Some(&error) {
            tracing::warn!(peer = %self.peer, address = %self.address, %error, "bgp session down");
        }
        entry.last_error = Some(error);
    }

    pub(crate) fn condition(&self, condition: Option<String>) {
        if let Some(condition) = &condition {
            tracing::warn!(peer = %self.peer, %condition, "bgp session");
        }
        self.entry().condition = condition;
    }

    pub(crate) fn sent(&self, announced: usize, refused: usize) {
        let mut entry = self.entry();
        entry.announced = announced as u32;
        entry.refused = refused as u32;
        self.metrics.announced.set(announced as i64);
        self.metrics.refused.set(refused as i64);
    }

    pub(crate) fn received(&self, prefixes: u64, malformed: bool) {
        let mut entry = self.entry();
        entry.ignored = entry.ignored.saturating_add(prefixes);
        self.metrics.ignored.inc_by(prefixes);
        if malformed {
            entry.malformed = entry.malformed.saturating_add(1);
            self.metrics.malformed.inc();
        }
    }

    pub(crate) fn status(&self) -> SessionStatus {
        let entry = self.entry();
        SessionStatus {
            peer: self.peer.clone(),
            address: self.address,
            state: word(entry.state),
            since_secs: entry.since.elapsed().as_secs(),
            announced: entry.announced,
            refused: entry.refused,
            ignored: entry.ignored,
            malformed: entry.malformed,
            last_error: entry.last_error.clone(),
            condition: entry.condition.clone(),
        }
    }

    /// Nothing panics while it holds the lock, and a stale status would be better than none.
    fn entry(&self) -> MutexGuard<'_, Entry> {
        self.entry.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// RFC 4271's spelling.
fn word(state: SessionState) -> &'static str {
    match state {
        SessionState::Idle => "Idle",
        SessionState::Connect => "Connect",
        SessionState::Active => "Active",
        SessionState::OpenSent => "OpenSent",
        SessionState::OpenConfirm => "OpenConfirm",
        SessionState::Established => "Established",
    }
}
