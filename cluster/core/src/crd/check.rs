//! Rules that a schema cannot say: each stands once, with its CEL text for the API server and its check for a folder side by side.
//! A test holds the two to the same verdict on a real server.
//!
//! A type with rules implements [`Checked`] and puts them into its own schema by `#[schemars(transform = attach::<Self>)]`. The walk
//! meets the type's name there and runs its checks on the value that stood at that place, so a fault has its line.

use std::borrow::Cow;

use kun_config::Fault;
use schemars::Schema;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::{Object, Origin};

/// Where the name of a checked type stands in a schema; not part of what is committed.
pub(super) const CHECK: &str = "x-kun-check";

/// Where the API server looks for CEL rules.
pub(super) const VALIDATIONS: &str = "x-kubernetes-validations";

/// What is always true of a value.
#[derive(Debug)]
pub struct Rule<T: 'static> {
    /// For the API server; `self` is the value.
    pub cel: &'static str,
    /// For a folder.
    pub holds: fn(&T) -> bool,
    /// The field that is to blame, as `.timers.hold`; empty: the value itself.
    pub field: &'static str,
    /// What is wrong when it does not hold.
    pub wrong: &'static str,
    /// What would be right.
    pub right: &'static str,
}

/// What is always true of a change.
#[derive(Debug)]
pub struct Step<T: 'static> {
    /// For the API server; `oldSelf` is what the value was.
    pub cel: &'static str,
    /// For a folder: what it was, what it is to be.
    pub holds: fn(&T, &T) -> bool,
    /// The field that is to blame.
    pub field: &'static str,
    /// What is wrong when it does not hold.
    pub wrong: &'static str,
    /// What would be right.
    pub right: &'static str,
}

/// A type with rules of its own.
pub trait Checked: DeserializeOwned + Sized + 'static {
    /// Names it in [`CHECKS`](super::CHECKS).
    const NAME: &'static str;
    /// Its rules.
    const RULES: &'static [Rule<Self>];
}

/// A broken rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Broken {
    /// The field to blame, below the value.
    pub field: &'static str,
    /// What is wrong.
    pub wrong: Cow<'static, str>,
    /// What would be right.
    pub right: Cow<'static, str>,
}

impl Broken {
    /// As a fault of an object that was read from a file.
    pub fn fault(self, object: &Object) -> Fault {
        let (file, at) = match &object.meta().origin {
            Origin::File { path, line } => (path.to_string(), Some((*line, 1))),
            Origin::Api { .. } => (String::new(), None),
        };
        Fault {
            file,
            at,
            path: self.field.trim_start_matches('.').to_owned(),
            wrong: self.wrong.into_owned(),
            right: self.right.into_owned(),
        }
    }
}

/// A checked type without its type.
#[derive(Debug)]
pub(super) struct Check {
    pub(super) name: &'static str,
    /// Every rule that the value breaks. The value fits the schema already.
    pub(super) run: fn(&Value) -> Vec<Broken>,
}

impl Check {
    /// Of a type with rules.
    pub(super) const fn of<T: Checked>() -> Self {
        Self {
            name: T::NAME,
            run: |value| match T::deserialize(value) {
                Ok(typed) => broken(T::RULES, &typed),
                Err(error) => vec![Broken {
                    field: "",
                    wrong: error.to_string().into(),
                    right: Cow::Borrowed(""),
                }],
            },
        }
    }
}

/// The rules that a value breaks.
pub(super) fn broken<T>(rules: &[Rule<T>], value: &T) -> Vec<Broken> {
    let broken = rules.iter().filter(|rule| !(rule.holds)(value));
    broken
        .map(|rule| Broken {
            field: rule.field,
            wrong: rule.wrong.into(),
            right: rule.right.into(),
        })
        .collect()
}

/// The rules that a change breaks.
pub(super) fn broken_steps<T>(steps: &[Step<T>], old: &T, new: &T) -> Vec<Broken> {
    let broken = steps.iter().filter(|step| !(step.holds)(old, new));
    broken
        .map(|step| Broken {
            field: step.field,
            wrong: step.wrong.into(),
            right: step.right.into(),
        })
        .collect()
}

/// Puts a type's rules into its schema.
pub(super) fn attach<T: Checked>(schema: &mut Schema) {
    schema.insert(CHECK.to_owned(), json!(T::NAME));
    let rules = T::RULES.iter();
    let rules = rules.map(|r| validation(r.cel, r.field, r.wrong, r.right));
    schema.insert(VALIDATIONS.to_owned(), rules.collect());
}

/// One entry of `x-kubernetes-validations`.
pub(super) fn validation(cel: &str, field: &str, wrong: &str, right: &str) -> Value {
    let mut entry = json!({"rule": cel, "message": format!("{wrong}; {right}")});
    if !field.is_empty() {
        entry["fieldPath"] = json!(field);
    }
    entry
}

/// Whether exactly one is there.
pub(super) fn one_of(there: &[bool]) -> bool {
    there.iter().filter(|there| **there).count() == 1
}

/// `true`, for serde.
pub(super) fn yes() -> bool {
    true
}
