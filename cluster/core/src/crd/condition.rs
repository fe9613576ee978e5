//! Facts about an object, in the one shape that every tool knows. Governing: the Kubernetes API conventions.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::text::{Moment, Text};

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
