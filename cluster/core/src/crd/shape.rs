//! A structural schema, read once into what the walk needs.

use serde_json::Value;

use super::CHECKS;
use super::check::{CHECK, Check};

/// What a value must look like.
#[derive(Debug)]
pub(super) struct Shape {
    pub(super) what: What,
    /// Rules beyond the shape.
    pub(super) check: Option<&'static Check>,
    /// For a fault: what belongs here, from the field's description.
    pub(super) about: String,
}

/// The types that a schema has.
#[derive(Debug)]
pub(super) enum What {
    /// A mapping with known fields.
    Object { fields: Vec<Field> },
    /// A mapping whose keys are data.
    Map { values: Box<Shape>, most: usize },
    /// A list.
    List {
        items: Box<Shape>,
        least: usize,
        most: usize,
        unique: Unique,
    },
    /// Text.
    Text { least: usize, most: usize },
    /// One of some words.
    Word { words: Vec<String> },
    /// A whole number.
    Number { least: i64, most: i64 },
    /// `true` or `false`.
    Flag,
}

/// What no two items of a list have in common.
#[derive(Debug)]
pub(super) enum Unique {
    /// They may be equal.
    No,
    /// Their value: `x-kubernetes-list-type: set`.
    Value,
    /// These fields together: `x-kubernetes-list-type: map`.
    Keys(Vec<String>),
}

/// A field of an object.
#[derive(Debug)]
pub(super) struct Field {
    pub(super) name: String,
    pub(super) required: bool,
    pub(super) shape: Shape,
    /// Filled in when the field is absent and somebody compares it: list keys.
    pub(super) default: Option<Value>,
}

impl Shape {
    /// Reads a schema that [`super::manifest::schema`] made. Panics on one that it could not have made: a test reads all of them.
    pub(super) fn of(schema: &Value) -> Self {
        let text = |key: &str| schema.get(key).and_then(Value::as_str);
        let number = |key: &str| schema.get(key).and_then(Value::as_i64);
        let size = |key: &str| schema.get(key).and_then(Value::as_u64).map(|n| n as usize);
        let what = match text("type") {
            Some("object") => match schema.get("additionalProperties") {
                Some(values) => What::Map {
                    values: Box::new(Self::of(values)),
                    most: size("maxProperties").unwrap_or(usize::MAX),
                },
                None => What::Object {
                    fields: fields(schema),
                },
            },
            Some("array") => What::List {
                items: Box::new(Self::of(&schema["items"])),
                least: size("minItems").unwrap_or(0),
                most: size("maxItems").unwrap_or(usize::MAX),
                unique: match text("x-kubernetes-list-type") {
                    Some("set") => Unique::Value,
                    Some("map") => Unique::Keys(strings(&schema["x-kubernetes-list-map-keys"])),
                    _ => Unique::No,
                },
            },
            Some("string") => match schema.get("enum") {
                Some(words) => What::Word {
                    words: strings(words),
                },
                None => What::Text {
                    least: size("minLength").unwrap_or(0),
                    most: size("maxLength").unwrap_or(usize::MAX),
                },
            },
            Some("integer") => What::Number {
                least: number("minimum").unwrap_or(i64::MIN),
                most: number("maximum").unwrap_or(i64::MAX),
            },
            Some("boolean") => What::Flag,
            other => panic!("a schema of type {other:?}: {schema}"),
        };
        let check = text(CHECK).map(|name| {
            let check = CHECKS.iter().find(|check| check.name == name);
            check.unwrap_or_else(|| panic!("no check is called {name}"))
        });
        let about = text("description").unwrap_or_default();
        Self {
            what,
            check,
            about: first_sentence(about),
        }
    }
}

fn fields(schema: &Value) -> Vec<Field> {
    let required = schema.get("required").map(strings).unwrap_or_default();
    let properties = schema.get("properties").and_then(Value::as_object);
    let properties = properties.into_iter().flatten();
    properties
        .map(|(name, schema)| Field {
            required: required.contains(name),
            shape: Shape::of(schema),
            default: schema.get("default").cloned(),
            name: name.clone(),
        })
        .collect()
}

fn strings(list: &Value) -> Vec<String> {
    let list = list.as_array().into_iter().flatten();
    list.filter_map(Value::as_str).map(str::to_owned).collect()
}

/// `the name of the Node that owns it`, of "The name of the Node that owns it. More."
fn first_sentence(text: &str) -> String {
    let end = text
        .find(". ")
        .or_else(|| text.find(".\n"))
        .unwrap_or(text.len());
    let sentence = text[..end].trim_end_matches('.');
    let mut letters = sentence.chars();
    let first = letters.next();
    // `IPv4` stays what it is, and so does `A`.
    match (first, letters.as_str().chars().next()) {
        (Some(first), Some(second)) if !second.is_uppercase() && !second.is_ascii_digit() => {
            first.to_lowercase().chain(letters).collect()
        }
        _ => sentence.to_owned(),
    }
}
