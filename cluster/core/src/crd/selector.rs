//! Objects by their labels, as metav1.LabelSelector says it.

use std::collections::BTreeMap;
use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::check::{Checked, Rule, attach};
use super::text::{LabelKey, LabelValue, Text};

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

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> BTreeMap<Arc<str>, Arc<str>> {
        let pairs = pairs.iter();
        pairs.map(|(k, v)| ((*k).into(), (*v).into())).collect()
    }

    #[test]
    fn selectors_select_as_kubernetes_does() {
        let selects = |selector: &str, of: &[(&str, &str)]| {
            let selector: LabelSelector = serde_json::from_str(selector).expect("a selector");
            selector.matches(&labels(of))
        };
        let a = [("a", "x")];
        assert!(selects("{}", &[]) && selects("{}", &a));
        assert!(selects(r#"{"matchLabels":{"a":"x"}}"#, &a));
        assert!(!selects(r#"{"matchLabels":{"a":"x","b":"x"}}"#, &a));
        let expression = |key: &str, operator: &str, values: &str| {
            format!(
                r#"{{"matchExpressions":[{{"key":"{key}","operator":"{operator}","values":[{values}]}}]}}"#
            )
        };
        for (key, operator, values, selected) in [
            ("a", "In", r#""x","y""#, true),
            ("a", "In", r#""y""#, false),
            ("b", "In", r#""x""#, false),
            ("a", "NotIn", r#""y""#, true),
            ("a", "NotIn", r#""x""#, false),
            ("b", "NotIn", r#""x""#, true),
            ("a", "Exists", "", true),
            ("b", "Exists", "", false),
            ("a", "DoesNotExist", "", false),
            ("b", "DoesNotExist", "", true),
        ] {
            let selector = expression(key, operator, values);
            assert_eq!(selects(&selector, &a), selected, "{selector}");
        }
    }
}
