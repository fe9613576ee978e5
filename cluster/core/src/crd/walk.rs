//! Walks a tree by a schema: every fault is told with its place, and what is right becomes a value to deserialise.

use std::collections::BTreeSet;

use kun_config::yaml::{Cursor, Value as Tree};
use serde_json::{Map, Value};

use super::check::Broken;
use super::shape::{Field, Shape, Unique, What};

/// What becomes of fields that the schema does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unknown {
    /// They are faults, as for `kubectl`, which asks the server to be strict.
    Refuse,
    /// They are left out, as by the server.
    Ignore,
}

/// The value at a place; `None`: something in it is wrong, and was told.
pub(super) fn walk(c: &Cursor<'_, '_>, shape: &'static Shape, unknown: Unknown) -> Option<Value> {
    let value = match &shape.what {
        What::Object { fields } => object(c, fields, unknown)?,
        What::Map { values, most } => map(c, values, *most, unknown)?,
        What::List {
            items,
            least,
            most,
            unique,
        } => {
            let list = list(c, items, unknown)?;
            let mut right = within(c, list.len(), *least, *most, "items");
            right &= are_unique(c, items, unique, &list);
            right.then_some(Value::Array(list))?
        }
        What::Text { least, most } => {
            let text = text(c)?;
            // A text with a check has a length of its own, and a better word for it.
            let fits = shape.check.is_some()
                || within(c, text.chars().count(), *least, *most, "characters");
            fits.then(|| text.into())?
        }
        What::Word { words } => {
            let text = text(c)?;
            if !words.iter().any(|word| word == text) {
                let right = format!("write {}", words.join(" or "));
                c.fault(
                    format_args!("`{}` is not known here", shortened(text)),
                    right,
                );
                return None;
            }
            text.into()
        }
        What::Number { least, most } => number(c, *least, *most)?.into(),
        What::Flag => flag(c)?.into(),
    };
    let faults = shape
        .check
        .map(|check| (check.run)(&value))
        .unwrap_or_default();
    for fault in &faults {
        fault_below(c, fault);
    }
    faults.is_empty().then_some(value)
}

/// Notes a broken rule at the field that is to blame, or at the nearest one around it that is there.
pub(super) fn fault_below(c: &Cursor<'_, '_>, fault: &Broken) {
    let steps: Vec<&str> = fault
        .field
        .split('.')
        .filter(|step| !step.is_empty())
        .collect();
    descend(c, &steps, &mut |c| c.fault(&fault.wrong, &fault.right));
}

fn descend(c: &Cursor<'_, '_>, steps: &[&str], then: &mut dyn FnMut(&Cursor<'_, '_>)) {
    if let Some((first, rest)) = steps.split_first()
        && matches!(c.value(), Tree::Mapping(_))
    {
        let mut pairs = c.pairs();
        if let Some((_, below)) = pairs.find(|(key, _)| key == first) {
            return descend(&below, rest, then);
        }
    }
    then(c);
}

fn object(c: &Cursor<'_, '_>, fields: &'static [Field], unknown: Unknown) -> Option<Value> {
    if !matches!(c.value(), Tree::Mapping(_)) {
        // Says that it is none.
        drop(c.fields());
        return None;
    }
    let f = c.fields();
    let mut object = Map::new();
    let mut right = true;
    for field in fields {
        match f.get(&field.name) {
            Some(c) => match walk(&c, &field.shape, unknown) {
                Some(value) => drop(object.insert(field.name.clone(), value)),
                None => right = false,
            },
            None if field.required => {
                let name = &field.name;
                let belongs = match &field.shape.what {
                    What::Flag => "write true or false".to_owned(),
                    _ => format!("write {}", field.shape.about),
                };
                c.fault(format_args!("the field `{name}` is missing"), belongs);
                right = false;
            }
            None => {}
        }
    }
    if unknown == Unknown::Refuse {
        right &= f.finish();
    }
    right.then_some(Value::Object(object))
}

fn map(c: &Cursor<'_, '_>, values: &'static Shape, most: usize, unknown: Unknown) -> Option<Value> {
    if !matches!(c.value(), Tree::Mapping(_)) {
        drop(c.fields());
        return None;
    }
    let mut map = Map::new();
    let mut right = true;
    // An entry without a value is none, as a field is.
    for (key, c) in c.pairs().filter(|(_, c)| !matches!(c.value(), Tree::Null)) {
        match walk(&c, values, unknown) {
            Some(value) => drop(map.insert(key.to_owned(), value)),
            None => right = false,
        }
    }
    right &= within(c, map.len(), 0, most, "entries");
    right.then_some(Value::Object(map))
}

fn list(c: &Cursor<'_, '_>, items: &'static Shape, unknown: Unknown) -> Option<Vec<Value>> {
    if !matches!(c.value(), Tree::Sequence(_)) {
        c.elements().for_each(drop);
        return None;
    }
    let read: Vec<Option<Value>> = c.elements().map(|c| walk(&c, items, unknown)).collect();
    read.into_iter().collect()
}

/// Whether there are enough and not too many.
fn within(c: &Cursor<'_, '_>, n: usize, least: usize, most: usize, of: &str) -> bool {
    let fits = (least..=most).contains(&n);
    if !fits && most == usize::MAX {
        c.fault(
            format_args!("{n} {of}"),
            format_args!("write at least {least}"),
        );
    } else if !fits {
        c.fault(
            format_args!("{n} {of}"),
            format_args!("write {least} to {most}"),
        );
    }
    fits
}

fn are_unique(c: &Cursor<'_, '_>, items: &Shape, unique: &Unique, list: &[Value]) -> bool {
    let plain = |value: &Value| match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let key_of = |value: &Value| match unique {
        Unique::No => None,
        Unique::Value => Some(plain(value)),
        Unique::Keys(keys) => {
            let What::Object { fields } = &items.what else {
                return None;
            };
            let of = |key: &String| {
                let field = fields.iter().find(|f| f.name == *key);
                let default = field.and_then(|f| f.default.as_ref());
                let value = value.get(key).or(default).map(plain).unwrap_or_default();
                format!("{key} {value}")
            };
            Some(keys.iter().map(of).collect::<Vec<_>>().join(", "))
        }
    };
    let mut seen = BTreeSet::new();
    let mut right = true;
    for (c, value) in c.elements().zip(list) {
        if let Some(key) = key_of(value)
            && !seen.insert(key.clone())
        {
            c.fault(format_args!("a second `{key}`"), "keep one of them");
            right = false;
        }
    }
    right
}

/// Text. A plain scalar that YAML takes for a number or a truth value is none for the API server either.
fn text<'p>(c: &Cursor<'p, '_>) -> Option<&'p str> {
    let text = c.text()?;
    if c.is_plain() && is_other_than_text(text) {
        c.fault(
            format_args!("`{text}` is a number or a truth value, and text belongs here"),
            format_args!("write \"{text}\""),
        );
        return None;
    }
    Some(text)
}

/// What YAML 1.1, which `kubectl` reads, takes for something else than text.
fn is_other_than_text(text: &str) -> bool {
    const WORDS: [&str; 8] = ["true", "false", "yes", "no", "on", "off", "y", "n"];
    let is_number = || {
        let digits = text.trim_start_matches(['+', '-']);
        let starts = digits.starts_with(|c: char| c.is_ascii_digit() || c == '.');
        starts && (digits.replace('_', "").parse::<f64>().is_ok() || is_radix(digits))
    };
    WORDS.iter().any(|word| text.eq_ignore_ascii_case(word)) || is_number()
}

/// `0x1f`, `0o17`, `0b11`.
fn is_radix(digits: &str) -> bool {
    let of = |prefix, radix| {
        let digits: Option<&str> = digits.strip_prefix(prefix);
        digits.is_some_and(|d| !d.is_empty() && d.chars().all(|c| c.is_digit(radix)))
    };
    of("0x", 16) || of("0o", 8) || of("0b", 2)
}

fn number(c: &Cursor<'_, '_>, least: i64, most: i64) -> Option<i64> {
    let right = match (least, most) {
        (i64::MIN, i64::MAX) => "write a whole number".to_owned(),
        (_, i64::MAX) => format!("write a whole number from {least}"),
        _ => format!("write a whole number from {least} to {most}"),
    };
    let text = c.text()?;
    let value = text
        .parse::<i64>()
        .ok()
        .filter(|n| n.to_string() == text && c.is_plain());
    let Some(value) = value else {
        let quoted = if c.is_plain() { "" } else { "\"" };
        c.fault(
            format_args!("{quoted}{}{quoted} is not a whole number", shortened(text)),
            right,
        );
        return None;
    };
    if !(least..=most).contains(&value) {
        c.fault(format_args!("{value} is out of range"), right);
        return None;
    }
    Some(value)
}

fn flag(c: &Cursor<'_, '_>) -> Option<bool> {
    let text = c.text()?;
    match text {
        "true" if c.is_plain() => Some(true),
        "false" if c.is_plain() => Some(false),
        _ => {
            c.fault(
                format_args!("`{}` is not true or false", shortened(text)),
                "write true or false, without quotes",
            );
            None
        }
    }
}

/// A value as it is quoted in a fault: whole when short.
fn shortened(text: &str) -> String {
    const SHOWN: usize = 60;
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}
