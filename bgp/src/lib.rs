//! The embedded BGP speaker: announces route sets to its peers and imports nothing (RFC 4271, 4760, 4724, 8212).
//!
//! One task a peer owns the peer's sockets and its Adj-RIB-Out. No session is opened before the first [`Speaker::announce`], so that a
//! restarted speaker never tells a peer less than the peer remembers.

mod encode;
mod frames;
mod metrics;
mod open;
mod retry;
mod session;
mod speaker;
mod status;
mod sys;
mod transport;

/// Where [`Speaker::start`] registers its metrics.
pub use prometheus_client::registry::Registry;

pub use kun_bgp_core::{
    Attributes, Community, Datapath, Delta, Hold, Inputs, MAX_ROUTES_PER_PEER, Refusal, Refused,
    Route, RouteSet, RouteSource, plan,
};
pub use speaker::{Options, Speaker, StartError, StopMode};
pub use status::SessionStatus;
