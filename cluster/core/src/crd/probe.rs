//! How a target is found to be alive: shared by what is announced and by what is balanced.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::check::{Checked, Rule, attach, one_of};
use super::text::{HttpPath, Text};

/// How a target is found to be alive. One of `http`, `tcp` and `datapath`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(transform = attach::<Self>)]
pub struct Probe {
    /// Alive when an HTTP GET is answered with a status from 200 to 399.
    pub http: Option<HttpProbe>,
    /// Alive when a TCP connection is accepted.
    pub tcp: Option<TcpProbe>,
    /// Alive when a packet takes the node's own datapath to the target and back.
    pub datapath: Option<DatapathProbe>,
    /// Milliseconds between two attempts; each has as long to succeed.
    #[serde(default = "second")]
    #[schemars(range(min = 100, max = 60_000))]
    pub interval_milliseconds: u32,
    /// Failures in a row after which the target is dead.
    #[serde(default = "three")]
    #[schemars(range(min = 1, max = 10))]
    pub fall: u32,
    /// Successes in a row after which it is alive.
    #[serde(default = "two")]
    #[schemars(range(min = 1, max = 10))]
    pub rise: u32,
}

fn second() -> u32 {
    1000
}

fn three() -> u32 {
    3
}

fn two() -> u32 {
    2
}

/// An HTTP GET.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct HttpProbe {
    /// The path that is asked for.
    pub path: Text<HttpPath>,
    /// The port, when it is not the target's own.
    #[schemars(range(min = 1))]
    pub port: Option<u16>,
    /// The scheme. A certificate is not verified.
    #[serde(default)]
    pub scheme: Scheme,
}

/// How HTTP is carried.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub enum Scheme {
    /// In the clear.
    #[default]
    HTTP,
    /// Over TLS.
    HTTPS,
}

/// A TCP connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct TcpProbe {
    /// The port, when it is not the target's own.
    #[schemars(range(min = 1))]
    pub port: Option<u16>,
}

/// A packet through the datapath.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DatapathProbe {}

impl Checked for Probe {
    const NAME: &'static str = "Probe";
    const RULES: &'static [Rule<Self>] = &[Rule {
        cel: "[has(self.http), has(self.tcp), has(self.datapath)].exists_one(x, x)",
        holds: |p| one_of(&[p.http.is_some(), p.tcp.is_some(), p.datapath.is_some()]),
        field: "",
        wrong: "not one kind of probe",
        right: "write one of `http`, `tcp` and `datapath`",
    }];
}
