//! From a type to its CustomResourceDefinition: a structural schema out of what `schemars` derives, and the few fields around it.

use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};

use super::check::{CHECK, VALIDATIONS, validation};
use super::{Column, Spec};
use crate::{KUN_GROUP, KUN_VERSION};

/// The schema of a type, structural, still with the names of its checks.
pub(super) fn schema<T: JsonSchema>() -> Value {
    let settings = SchemaSettings::draft2020_12().with(|s| {
        // A structural schema has no references.
        s.inline_subschemas = true;
        s.meta_schema = None;
    });
    let mut schema = settings
        .into_generator()
        .into_root_schema_for::<T>()
        .to_value();
    structural(&mut schema);
    schema
}

/// Turns what is derived into what the API server takes: no null types, no `oneOf` around names, no formats that it does not know, no
/// defaults that say nothing.
fn structural(schema: &mut Value) {
    let Value::Object(fields) = schema else {
        return;
    };
    without_null(fields);
    names(fields);
    fields.remove("$schema");
    fields.remove("title");
    if fields.get("type") == Some(&json!("integer")) {
        bounds(fields);
    }
    if let Some(default) = fields.remove("default").and_then(said) {
        fields.insert("default".to_owned(), default);
    }
    if let Some(Value::String(text)) = fields.get_mut("description") {
        // Lines of a source file are no lines of a text.
        *text = text
            .replace("\n\n", "\u{1}")
            .replace('\n', " ")
            .replace('\u{1}', "\n");
    }
    if let Some(Value::Object(properties)) = fields.get_mut("properties") {
        properties.values_mut().for_each(structural);
    }
    for below in ["items", "additionalProperties"] {
        if let Some(schema) = fields.get_mut(below) {
            structural(schema);
        }
    }
}

/// The server knows no unsigned formats, and bounds say the same.
fn bounds(fields: &mut Map<String, Value>) {
    let (least, most): (i64, i64) = match fields.remove("format").as_ref().and_then(Value::as_str) {
        Some("uint8") => (0, u8::MAX.into()),
        Some("uint16") => (0, u16::MAX.into()),
        Some("uint32") => (0, u32::MAX.into()),
        Some("int32") => (i32::MIN.into(), i32::MAX.into()),
        _ => return,
    };
    fields.entry("minimum").or_insert(json!(least));
    fields.entry("maximum").or_insert(json!(most));
}

/// What of a default says something: absent, the rest is the same.
fn said(default: Value) -> Option<Value> {
    match default {
        Value::Null => None,
        Value::Array(items) => (!items.is_empty()).then_some(Value::Array(items)),
        Value::Object(fields) => {
            let fields = fields.into_iter();
            let fields: Map<_, _> = fields
                .filter_map(|(key, value)| Some((key, said(value)?)))
                .collect();
            (!fields.is_empty()).then_some(Value::Object(fields))
        }
        other => Some(other),
    }
}

/// An optional field is one that may be absent; null is no value of its own.
fn without_null(fields: &mut Map<String, Value>) {
    if let Some(Value::Array(types)) = fields.get_mut("type") {
        types.retain(|t| t != "null");
        if let [only] = &types[..] {
            let only = only.clone();
            fields.insert("type".to_owned(), only);
        }
    }
    if let Some(Value::Array(words)) = fields.get_mut("enum") {
        words.retain(|word| !word.is_null());
    }
    if let Some(Value::Array(choices)) = fields.remove("anyOf") {
        for choice in choices {
            if let Value::Object(choice) = choice
                && choice.get("type") != Some(&json!("null"))
            {
                for (key, value) in choice {
                    fields.entry(key).or_insert(value);
                }
            }
        }
    }
}

/// The names of an enum, and what each means in the description.
fn names(fields: &mut Map<String, Value>) {
    let Some(Value::Array(choices)) = fields.remove("oneOf") else {
        return;
    };
    let mut about: String = fields
        .get("description")
        .and_then(Value::as_str)
        .unwrap_or_default()
        .to_owned();
    let mut words = Vec::new();
    for choice in &choices {
        let of_choice = match choice.get("enum").and_then(Value::as_array) {
            Some(words) => words.clone(),
            None => choice.get("const").cloned().into_iter().collect(),
        };
        if let (Some(what), [word]) = (
            choice.get("description").and_then(Value::as_str),
            &of_choice[..],
        ) {
            let word = word.as_str().unwrap_or_default();
            about.push_str(&format!("\n\n{word}: {what}"));
        }
        words.extend(of_choice);
    }
    fields.insert("description".to_owned(), json!(about));
    fields.insert("type".to_owned(), json!("string"));
    fields.insert("enum".to_owned(), Value::Array(words));
}

/// Takes out what only our own walk reads.
fn committed(mut schema: Value) -> Value {
    fn strip(schema: &mut Value) {
        match schema {
            Value::Object(fields) => {
                fields.remove(CHECK);
                fields.values_mut().for_each(strip);
            }
            Value::Array(items) => items.iter_mut().for_each(strip),
            _ => {}
        }
    }
    strip(&mut schema);
    schema
}

fn column(column: &Column) -> Value {
    let mut entry = json!({
        "name": column.name, "type": column.kind, "jsonPath": column.path, "description": column.about,
    });
    if column.wide {
        // Zero is what `kubectl get` shows in any case.
        entry["priority"] = json!(1);
    }
    entry
}

/// The CustomResourceDefinition of a kind.
pub(super) fn manifest<S: Spec>() -> Value {
    let rules = S::RULES
        .iter()
        .map(|r| validation(r.cel, r.field, r.wrong, r.right));
    let steps = S::STEPS
        .iter()
        .map(|s| validation(s.cel, s.field, s.wrong, s.right));
    let rules: Vec<Value> = rules.chain(steps).collect();
    let age = Column::new(
        "Age",
        "date",
        ".metadata.creationTimestamp",
        "Time since it was made",
    );
    let columns: Vec<Value> = S::COLUMNS.iter().chain([&age]).map(column).collect();
    let mut root = json!({
        "description": S::ABOUT,
        "type": "object",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string", "description": format!("{KUN_GROUP}/{KUN_VERSION}")},
            "kind": {"type": "string", "description": S::KIND},
            "metadata": {"type": "object"},
            "spec": committed(schema::<S>()),
            "status": committed(schema::<S::Status>()),
        },
    });
    if !rules.is_empty() {
        root[VALIDATIONS] = json!(rules);
    }
    let mut version = json!({
        "name": KUN_VERSION,
        "served": true,
        "storage": true,
        "subresources": {"status": {}},
        "additionalPrinterColumns": columns,
        "schema": {"openAPIV3Schema": root},
    });
    if !S::SELECTABLE.is_empty() {
        let paths = S::SELECTABLE.iter().map(|path| json!({"jsonPath": path}));
        version["selectableFields"] = paths.collect();
    }
    json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": format!("{}.{KUN_GROUP}", S::PLURAL)},
        "spec": {
            "group": KUN_GROUP,
            "scope": if S::NAMESPACED { "Namespaced" } else { "Cluster" },
            "names": {
                "kind": S::KIND,
                "listKind": format!("{}List", S::KIND),
                "plural": S::PLURAL,
                "singular": S::KIND.to_lowercase(),
                "shortNames": [S::SHORT],
                "categories": ["kun"],
            },
            "versions": [version],
        },
    })
}
