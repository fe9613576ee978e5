//! BrakeOverride: lets withdrawals past the brakes, for a while, within a scope, signed off by two people who did not ask for it.
//! The object is complete when it is made and never changes: another override is another object, and the audit log has both.

use std::fmt::Write as _;
use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::check::{Checked, Rule, Step, attach};
use super::condition::Condition;
use super::text::{Label, Moment, Name, Signature, Text, UserName};
use super::{Column, Custom, Spec};
use crate::{KUN_GROUP, KUN_VERSION, Object};

/// The longest that brakes are off: whoever needs longer needs another signature.
const LONGEST: i64 = 24 * 3600;

/// Who may withdraw what until when, and who answers for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(transform = attach::<Self>)]
pub struct BrakeOverrideSpec {
    /// What it is for.
    pub scope: BrakeScope,
    /// The reason, for whoever reads the audit log.
    #[schemars(length(min = 10, max = 1024))]
    pub reason: String,
    /// The user who asks for it.
    pub requested_by: Text<UserName>,
    /// The moment from which it counts.
    pub not_before: Text<Moment>,
    /// The moment from which it counts no more: 24 hours after `notBefore` at most.
    pub expires_at: Text<Moment>,
    /// The users who signed it off: two at least, and not the one who asked.
    #[schemars(length(min = 2, max = 8), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["approver"]))]
    pub approvals: Vec<Approval>,
}

/// What an override is for: places, or everything.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(transform = attach::<Self>)]
pub struct BrakeScope {
    /// The brakes.
    #[schemars(length(min = 1, max = 4), extend("x-kubernetes-list-type" = "set"))]
    pub brakes: Vec<Brake>,
    /// The namespaces of the objects.
    #[serde(default)]
    #[schemars(length(max = 32), extend("x-kubernetes-list-type" = "set"))]
    pub namespaces: Vec<Text<Label>>,
    /// The names of the Nodes.
    #[serde(default)]
    #[schemars(length(max = 64), extend("x-kubernetes-list-type" = "set"))]
    pub nodes: Vec<Text<Name>>,
    /// The whole cluster. It has to be said.
    #[serde(default)]
    pub everything: bool,
    /// Withdrawals that it lets through in all. Absent: any number.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub max_withdrawals: Option<u32>,
}

/// What a brake holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Brake {
    /// Virtual addresses of services.
    VirtualAddresses,
    /// Services that lose their last endpoint.
    Endpoints,
    /// Prefixes announced by BGP.
    Prefixes,
    /// Slots freed by garbage collection.
    Slots,
}

impl Brake {
    fn word(self) -> &'static str {
        match self {
            Brake::VirtualAddresses => "VirtualAddresses",
            Brake::Endpoints => "Endpoints",
            Brake::Prefixes => "Prefixes",
            Brake::Slots => "Slots",
        }
    }
}

/// One person's signature.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Approval {
    /// The user who signs.
    pub approver: Text<UserName>,
    /// The moment of the signature.
    pub at: Text<Moment>,
    /// The Ed25519 signature of the override's text, by the approver's key.
    pub signature: Text<Signature>,
}

/// What became of an override.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct BrakeOverrideStatus {
    /// The metadata.generation that this is about.
    #[schemars(range(min = 0))]
    pub observed_generation: Option<i64>,
    /// Withdrawals that it let through.
    #[schemars(range(min = 0))]
    pub withdrawals: Option<i64>,
    /// `Active`: brakes are off within its scope. `Verified`: the signatures are those of the approvers.
    #[serde(default)]
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

impl BrakeOverrideSpec {
    /// Whether it counts at a moment, given as seconds since 1970. Signatures are another question.
    pub fn counts_at(&self, now: i64) -> bool {
        (self.not_before.unix()..self.expires_at.unix()).contains(&now)
    }

    /// The text that approvers sign: every word that decides, one a line, in one order whatever the object's.
    pub fn text_to_sign(&self, name: &str) -> String {
        let mut text = format!("{KUN_GROUP}/{KUN_VERSION} BrakeOverride\nname {name}\n");
        let mut list = |what: &str, mut words: Vec<&str>| {
            words.sort_unstable();
            for word in words {
                // Writing to a String cannot fail.
                let _ = writeln!(text, "{what} {word}");
            }
        };
        let scope = &self.scope;
        list("brake", scope.brakes.iter().map(|b| b.word()).collect());
        list(
            "namespace",
            scope.namespaces.iter().map(|n| n.as_str()).collect(),
        );
        list("node", scope.nodes.iter().map(|n| n.as_str()).collect());
        let most = scope
            .max_withdrawals
            .map_or("any".to_owned(), |most| most.to_string());
        let _ = write!(
            text,
            "everything {}\nwithdrawals {most}\nfrom {}\nuntil {}\nrequested by {}\nreason {}\n",
            scope.everything, self.not_before, self.expires_at, self.requested_by, self.reason
        );
        text
    }
}

impl Checked for BrakeScope {
    const NAME: &'static str = "BrakeScope";
    const RULES: &'static [Rule<Self>] = &[Rule {
        cel: "self.everything != ((has(self.namespaces) && size(self.namespaces) > 0) || (has(self.nodes) && size(self.nodes) > 0))",
        holds: |s| s.everything == (s.namespaces.is_empty() && s.nodes.is_empty()),
        field: "",
        wrong: "neither places nor everything, or both",
        right: "write `namespaces` or `nodes`, or `everything: true` alone",
    }];
}

impl Checked for BrakeOverrideSpec {
    const NAME: &'static str = "BrakeOverrideSpec";
    const RULES: &'static [Rule<Self>] = &[
        Rule {
            cel: "timestamp(self.expiresAt) > timestamp(self.notBefore)",
            holds: |s| s.expires_at > s.not_before,
            field: ".expiresAt",
            wrong: "not after `notBefore`",
            right: "write a later moment",
        },
        Rule {
            cel: "timestamp(self.expiresAt) - timestamp(self.notBefore) <= duration('24h')",
            holds: |s| s.expires_at.unix() - s.not_before.unix() <= LONGEST,
            field: ".expiresAt",
            wrong: "more than 24 hours after `notBefore`",
            right: "write an earlier moment; a longer need is another override",
        },
        Rule {
            cel: "!self.approvals.exists(a, a.approver == self.requestedBy)",
            holds: |s| s.approvals.iter().all(|a| a.approver != s.requested_by),
            field: ".approvals",
            wrong: "the one who asked is among those who signed",
            right: "have two others sign",
        },
        Rule {
            cel: "self.approvals.all(a, timestamp(a.at) < timestamp(self.expiresAt))",
            holds: |s| s.approvals.iter().all(|a| a.at < s.expires_at),
            field: ".approvals",
            wrong: "signed after it expired",
            right: "have it signed before",
        },
    ];
}

/// BrakeOverride (`kun.network/v1alpha1`): lets withdrawals past the brakes.
pub type BrakeOverride = Custom<BrakeOverrideSpec, BrakeOverrideStatus>;

impl Spec for BrakeOverrideSpec {
    type Status = BrakeOverrideStatus;
    const KIND: &'static str = "BrakeOverride";
    const PLURAL: &'static str = "brakeoverrides";
    const SHORT: &'static str = "kbrake";
    const NAMESPACED: bool = false;
    const ABOUT: &'static str =
        "Lets withdrawals past the brakes: within a scope, for a while, signed off by two.";
    const COLUMNS: &'static [Column] = &[
        Column::new(
            "Brakes",
            "string",
            ".spec.scope.brakes",
            "Brakes that it is for",
        ),
        Column::new(
            "Requested-By",
            "string",
            ".spec.requestedBy",
            "User who asked for it",
        ),
        Column::new(
            "Approvers",
            "string",
            ".spec.approvals[*].approver",
            "Users who signed it off",
        ),
        Column::new(
            "Expires",
            "string",
            ".spec.expiresAt",
            "From then on it counts no more",
        ),
        Column::new(
            "Active",
            "string",
            ".status.conditions[?(@.type=='Active')].status",
            "Whether brakes are off within its scope",
        ),
        Column::new(
            "Withdrawals",
            "integer",
            ".status.withdrawals",
            "Withdrawals that it let through",
        )
        .wide(),
        Column::new("Reason", "string", ".spec.reason", "Why").wide(),
    ];
    const RULES: &'static [Rule<BrakeOverride>] = &[];
    const STEPS: &'static [Step<BrakeOverride>] = &[Step {
        cel: "self.spec == oldSelf.spec",
        holds: |old, new| old.spec == new.spec,
        field: ".spec",
        wrong: "not what was signed",
        right: "make another override, and have it signed",
    }];

    fn object(object: Arc<BrakeOverride>) -> Object {
        Object::BrakeOverride(object)
    }

    fn of(object: &Object) -> Option<&Arc<BrakeOverride>> {
        match object {
            Object::BrakeOverride(object) => Some(object),
            _ => None,
        }
    }
}
