//! Advertisements and readiness to route sets, one a peer. Pure: no sockets, no clock, no randomness.
//!
//! [`plan`] turns what this node owns and what is ready into a [`RouteSet`] for every peer; [`RouteSet::delta_from`] says what
//! that changes on the wire. Next hops are the speaker's business: it announces itself (RFC 4271 §5.1.3), by the session's
//! own addresses. Nothing is ever imported, so there is no decision process here (RFC 8212).

#![forbid(unsafe_code)]

mod plan;
mod route;

pub use plan::{Datapath, Hold, Inputs, plan};
pub use route::{
    Attributes, Community, Delta, MAX_ROUTES_PER_PEER, Refusal, Refused, Route, RouteSet,
    RouteSource,
};
