//! What a session is doing, for people and for the agent's socket.

use std::net::IpAddr;

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
    /// Prefixes in Adj-RIB-Out.
    pub announced: u32,
    /// Prefixes refused by the plan, or held back for want of a next hop.
    pub refused: u32,
    /// Prefixes that the peer sent and that were ignored (RFC 8212).
    pub ignored: u64,
    /// Why it was last down, with code and subcode in words.
    pub last_error: Option<String>,
}
