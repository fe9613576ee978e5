//! BGPSession: what a node knows of its session with a peer. The agent of the node writes it and nobody else; the spec only says which
//! session it is.

use std::net::IpAddr;
use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::bgp::Asn;
use super::check::{Rule, Step};
use super::condition::Condition;
use super::family::Family;
use super::text::{Moment, Name, Text};
use super::{Column, Custom, Spec};
use crate::Object;

/// Which session it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct BgpSessionSpec {
    /// The name of the Node.
    pub node: Text<Name>,
    /// The name of the BGPPeer.
    pub peer: Text<Name>,
    /// The router's address, where the node found it itself: a BGPPeer may have several then.
    pub address: Option<Text<IpAddr>>,
}

/// What the node says of it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct BgpSessionStatus {
    /// The metadata.generation that this is about.
    #[schemars(range(min = 0))]
    pub observed_generation: Option<i64>,
    /// The state of the session (RFC 4271 §8.2.2).
    pub state: Option<SessionState>,
    /// The moment at which `state` became what it is.
    pub since: Option<Text<Moment>>,
    /// The address that the session starts from.
    pub local_address: Option<Text<IpAddr>>,
    /// The address that it leads to.
    pub peer_address: Option<Text<IpAddr>>,
    /// The AS number that the peer told.
    #[serde(rename = "peerASN")]
    pub peer_asn: Option<Asn>,
    /// Why it was down last.
    pub last_error: Option<SessionError>,
    /// Capabilities that both ends have, such as `multiprotocol-ipv6`, `graceful-restart`, `extended-next-hop`.
    #[serde(default)]
    #[schemars(length(max = 32), inner(length(max = 64)), extend("x-kubernetes-list-type" = "set"))]
    pub capabilities: Vec<String>,
    /// The state of BFD, where there is a BFD session.
    pub bfd: Option<BfdState>,
    /// Counts of routes by family.
    #[serde(default)]
    #[schemars(length(max = 2), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["family"]))]
    pub prefixes: Vec<PrefixCount>,
    /// A sample of what the peer is told, for comparing nodes.
    pub digest: Option<RouteDigest>,
    /// `Established`, with the reason when it is not: `Connecting`, `WrongAS`, `AuthenticationSuspected`, `PeerRefuses`.
    #[serde(default)]
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// States of a session (RFC 4271 §8.2.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum SessionState {
    /// Not started.
    Idle,
    /// Connecting.
    Connect,
    /// Waiting for the peer to connect, or for the next attempt.
    Active,
    /// Connected; the peer's OPEN is waited for.
    OpenSent,
    /// OPEN received; its confirmation is waited for.
    OpenConfirm,
    /// Routes are exchanged.
    Established,
}

/// Why a session was down.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SessionError {
    /// The error code of the NOTIFICATION (RFC 4271 §4.5). Absent: there was none.
    #[schemars(range(min = 1))]
    pub code: Option<u8>,
    /// The error subcode.
    pub subcode: Option<u8>,
    /// Who sent the NOTIFICATION, or found the fault.
    pub by: ErrorBy,
    /// The error for a person to read.
    #[schemars(length(max = 1024))]
    pub message: String,
    /// The moment of it.
    pub at: Text<Moment>,
}

/// Which end told the error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ErrorBy {
    /// This node.
    Local,
    /// The peer.
    Peer,
}

/// States of BFD (RFC 5880 §6.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum BfdState {
    /// Held down by an operator.
    AdminDown,
    /// Nothing is heard.
    Down,
    /// The peer is heard, and does not hear yet.
    Init,
    /// Both ends hear each other.
    Up,
}

/// Counts of routes of one family.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PrefixCount {
    /// The family.
    pub family: Family,
    /// Routes that the peer announced.
    pub received: u32,
    /// Of these, routes that were taken.
    pub accepted: u32,
    /// Routes that the peer is told.
    pub advertised: u32,
}

/// A sample of what a peer is told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RouteDigest {
    /// The hash over the sorted routes, in hexadecimal.
    #[schemars(length(min = 16, max = 64))]
    pub value: String,
    /// The moment of the sample.
    pub at: Text<Moment>,
}

/// BGPSession (`kun.network/v1alpha1`): a node's session with a peer, as the node sees it.
pub type BgpSession = Custom<BgpSessionSpec, BgpSessionStatus>;

impl Spec for BgpSessionSpec {
    type Status = BgpSessionStatus;
    const KIND: &'static str = "BGPSession";
    const PLURAL: &'static str = "bgpsessions";
    const SHORT: &'static str = "ksess";
    const NAMESPACED: bool = false;
    const ABOUT: &'static str =
        "A node's session with a BGP peer, as the node sees it. Written by the agent of the node.";
    const COLUMNS: &'static [Column] = &[
        Column::new("Node", "string", ".spec.node", "The Node"),
        Column::new("Peer", "string", ".spec.peer", "The BGPPeer"),
        Column::new(
            "State",
            "string",
            ".status.state",
            "The state of the session",
        ),
        Column::new("Since", "date", ".status.since", "Time in this state"),
        Column::new("BFD", "string", ".status.bfd", "The state of BFD"),
        Column::new(
            "Advertised",
            "string",
            ".status.prefixes[*].advertised",
            "Routes that the peer is told, by family",
        ),
        Column::new(
            "Peer-Address",
            "string",
            ".status.peerAddress",
            "The address that it leads to",
        )
        .wide(),
        Column::new(
            "Peer-ASN",
            "integer",
            ".status.peerASN",
            "The AS number that the peer told",
        )
        .wide(),
        Column::new(
            "Received",
            "string",
            ".status.prefixes[*].received",
            "Routes that the peer announced, by family",
        )
        .wide(),
        Column::new(
            "Error",
            "string",
            ".status.lastError.message",
            "Why it was down last",
        )
        .wide(),
    ];
    const SELECTABLE: &'static [&'static str] = &[".spec.node", ".spec.peer"];
    const RULES: &'static [Rule<BgpSession>] = &[];
    const STEPS: &'static [Step<BgpSession>] = &[Step {
        cel: "self.spec == oldSelf.spec",
        holds: |old, new| old.spec == new.spec,
        field: ".spec",
        wrong: "another session than before",
        right: "make an object of its own for another session",
    }];

    fn object(object: Arc<BgpSession>) -> Object {
        Object::BgpSession(object)
    }

    fn of(object: &Object) -> Option<&Arc<BgpSession>> {
        match object {
            Object::BgpSession(object) => Some(object),
            _ => None,
        }
    }
}
