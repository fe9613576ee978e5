//! What several kinds share: selectors, families, conditions, probes. Governing: the Kubernetes API conventions.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::check::{Checked, Rule, attach};
use super::text::{HttpPath, LabelKey, LabelValue, Moment, Text};
use crate::IpFamily;

/// The families of addresses.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
pub enum Family {
    /// IPv4.
    IPv4,
    /// IPv6.
    IPv6,
}

impl Family {
    /// Both, the default of whatever may have either.
    pub fn both() -> Vec<Family> {
        vec![Family::IPv4, Family::IPv6]
    }
}

impl From<IpFamily> for Family {
    fn from(family: IpFamily) -> Self {
        match family {
            IpFamily::V4 => Family::IPv4,
            IpFamily::V6 => Family::IPv6,
        }
    }
}

/// The family of an address.
pub(super) fn family(address: &Text<IpAddr>) -> Family {
    IpFamily::of(address.0).into()
}

/// Objects by their labels. Empty: all of them.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-map-type" = "atomic"))]
pub struct LabelSelector {
    /// Labels that an object must have, each with its value.
    #[serde(default)]
    #[schemars(extend("maxProperties" = 32))]
    pub match_labels: BTreeMap<String, Text<LabelValue>>,
    /// Requirements that an object must fulfil, all of them.
    #[serde(default)]
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "atomic"))]
    pub match_expressions: Vec<Requirement>,
}

/// One requirement of a label selector.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(transform = attach::<Self>)]
pub struct Requirement {
    /// The label's key.
    pub key: Text<LabelKey>,
    /// What is asked of its value.
    pub operator: Operator,
    /// The values, for `In` and `NotIn`.
    #[serde(default)]
    #[schemars(length(max = 64), extend("x-kubernetes-list-type" = "atomic"))]
    pub values: Vec<Text<LabelValue>>,
}

/// What a requirement asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Operator {
    /// The label has one of the values.
    In,
    /// The label is absent or has none of the values.
    NotIn,
    /// The label is there.
    Exists,
    /// The label is absent.
    DoesNotExist,
}

impl Checked for Requirement {
    const NAME: &'static str = "Requirement";
    const RULES: &'static [Rule<Self>] = &[Rule {
        cel: "(self.operator in ['In', 'NotIn']) == (has(self.values) && size(self.values) > 0)",
        holds: |r| matches!(r.operator, Operator::In | Operator::NotIn) != r.values.is_empty(),
        field: "",
        wrong: "`values` and `operator` do not fit",
        right: "write values with In and NotIn, and none with Exists and DoesNotExist",
    }];
}

impl LabelSelector {
    /// Whether an object with these labels is selected.
    pub fn matches(&self, labels: &BTreeMap<Arc<str>, Arc<str>>) -> bool {
        let has = |(key, value): (&String, &Text<LabelValue>)| {
            labels.get(&**key).is_some_and(|v| **v == *value.as_str())
        };
        self.match_labels.iter().all(has)
            && self.match_expressions.iter().all(|r| r.matches(labels))
    }
}

impl Requirement {
    fn matches(&self, labels: &BTreeMap<Arc<str>, Arc<str>>) -> bool {
        let value = labels.get(self.key.as_str());
        let listed = value.is_some_and(|value| self.values.iter().any(|v| *v.as_str() == **value));
        match self.operator {
            Operator::In => listed,
            Operator::NotIn => !listed,
            Operator::Exists => value.is_some(),
            Operator::DoesNotExist => value.is_none(),
        }
    }
}

/// One fact about an object, in the shape that `kubectl wait` and every other tool knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    /// The name of the fact, in CamelCase.
    #[schemars(length(min = 1, max = 316))]
    pub r#type: String,
    /// Whether it holds.
    pub status: Truth,
    /// The cause of the last transition, in one CamelCase word.
    #[schemars(length(min = 1, max = 1024))]
    pub reason: String,
    /// The cause for a person to read. May be empty.
    #[schemars(length(max = 32768))]
    pub message: String,
    /// The moment at which `status` became what it is.
    pub last_transition_time: Text<Moment>,
    /// The metadata.generation that the fact is about.
    #[schemars(range(min = 0))]
    pub observed_generation: Option<i64>,
}

/// Whether something holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Truth {
    /// It holds.
    True,
    /// It does not hold.
    False,
    /// Nobody can tell.
    Unknown,
}

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

/// Whether exactly one is there.
pub(super) fn one_of(there: &[bool]) -> bool {
    there.iter().filter(|there| **there).count() == 1
}

/// `true`, for serde.
pub(super) fn yes() -> bool {
    true
}

/// A unicast address.
pub(super) fn is_host(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(a) => !(a.is_unspecified() || a.is_multicast() || a.is_broadcast()),
        IpAddr::V6(a) => !(a.is_unspecified() || a.is_multicast()),
    }
}
