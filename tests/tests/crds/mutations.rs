//! Every bound of a schema on both sides: objects made from a right one by changing it in one place, as the schema of that place
//! suggests. Nobody says which of them are right: the folder and the server have to agree.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

/// Texts that are right somewhere and wrong nearly everywhere.
const TEXTS: &[&str] = &[
    "",
    " ",
    "a",
    "a b",
    "A",
    "-a",
    "a-",
    "a.b",
    "a..b",
    ".a",
    "a.",
    "a/b",
    "a/b/c",
    "/a",
    "a/",
    "/",
    "//",
    "/a b",
    "a_b",
    "_a",
    "é",
    "a\n",
    "a\tb",
    "true",
    "5",
    "1.5",
    "null",
    "~",
    "@a",
    "a@b",
    "a:b",
    "eth0.100",
    "Zone",
    "10.0.0.0",
    "10.0.0.1",
    "10.0.0.64",
    "010.0.0.1",
    "10.0.0",
    "10.0.0.256",
    "10.0.0.1 ",
    "0.0.0.0",
    "255.255.255.255",
    "255.255.255.192",
    "127.0.0.1",
    "169.254.0.1",
    "224.0.0.1",
    "240.0.0.1",
    "192.0.2.1",
    "10.0.0.0/8",
    "10.0.0.0/26",
    "10.0.0.0/27",
    "10.0.0.1/8",
    "10.0.0.0/08",
    "10.0.0.0/33",
    "10.0.0.0/-1",
    "10.0.0.0/",
    "10.0.0.0/8/8",
    "0.0.0.0/0",
    "0.0.0.0/1",
    "127.0.0.0/8",
    "127.0.0.1/32",
    "128.0.0.0/1",
    "224.0.0.0/3",
    "224.0.0.0/4",
    "239.255.255.0/24",
    "240.0.0.0/4",
    "240.0.0.0/26",
    "126.0.0.0/7",
    "1.0.0.0/8",
    "255.255.255.192/26",
    "255.255.255.255/32",
    "2001:db8::",
    "2001:db8::1",
    "2001:DB8::1",
    "2001:db8:0:0::1",
    "2001:0db8::1",
    "2001:db8::1%eth0",
    "2001:db8:0:0:1:0:0:1",
    "2001:db8::1:0:0:1",
    "1:2:3:4:5:6:7:8",
    "1:2:3:4:5:6:7::",
    "1:2:3:4:5:6::8",
    "::",
    "::1",
    "fe80::1",
    "fe80::1%eth0",
    "ff02::1",
    "::ffff:10.0.0.1",
    "::ffff:a00:1",
    "::10.0.0.1",
    "::a00:1",
    "64:ff9b::10.0.0.1",
    "64:ff9b::a00:1",
    "[::1]",
    "fec0::1",
    "fc00::1",
    "2001:db8::/32",
    "2001:db8::1/32",
    "2001:DB8::/32",
    "2001:db8::/128",
    "2001:db8::/129",
    "2001:db8::/032",
    "::/0",
    "::/1",
    "::ffff:0:0/96",
    "::ffff:10.0.0.0/104",
    "fe80::/10",
    "ff00::/8",
    "2001:db8:0:0::/64",
    "0:0",
    "1:2",
    "64512:100",
    "65534:65535",
    "65535:0",
    "65535:65281",
    "1:65536",
    "100000:1",
    "01:2",
    "1:02",
    "+1:2",
    "-1:2",
    "1:",
    ":1",
    "1:2:3",
    "0:0:0",
    "4294967295:4294967295:4294967295",
    "4294967296:0:1",
    "0:4294967296:1",
    "01:2:3",
    "1:2:3:4",
    "9999999999:1:1",
    "no-export",
    "No-Export",
    "no-advertise",
    "no-export-subconfed",
    "graceful-shutdown",
    "blackhole",
    "internet",
    "2026-11-26T09:50:00Z",
    "2026-11-26t09:50:00z",
    "2026-11-26T09:50:00z",
    "2026-11-26 09:50:00Z",
    "2026-02-28T00:00:00Z",
    "2026-02-29T00:00:00Z",
    "2024-02-29T00:00:00Z",
    "2026-04-31T00:00:00Z",
    "2026-13-01T00:00:00Z",
    "2026-00-01T00:00:00Z",
    "2026-01-00T00:00:00Z",
    "2026-11-26T24:00:00Z",
    "2026-11-26T23:60:00Z",
    "2026-11-26T23:59:60Z",
    "2026-12-31T23:59:60Z",
    "0000-01-01T00:00:00Z",
    "0001-01-01T00:00:00Z",
    "1969-12-31T23:59:59Z",
    "9999-12-31T23:59:59Z",
    "2026-11-26T09:50:00+00:00",
    "2026-11-26T09:50:00.0Z",
    "2026-11-26T09:50Z",
    "2026-11-26",
    "12026-11-26T09:50:00Z",
    "-0001-11-26T09:50:00Z",
    "node.kubernetes.io/unschedulable",
    "node.kubernetes.io/out-of-service",
];

/// An object that was changed in one place.
pub(crate) struct Mutant {
    /// Where and how.
    pub(crate) what: String,
    pub(crate) object: Value,
}

/// Makes mutants, each change of each place of a kind's schema once.
#[derive(Default)]
pub(crate) struct Mutator {
    done: BTreeSet<String>,
    mutants: Vec<Mutant>,
}

impl Mutator {
    /// Changes `part` (spec or status) of an object in every place that it has.
    pub(crate) fn mutate(&mut self, object: &Value, part: &str, schema: &Value) {
        let kind = object["kind"].as_str().unwrap_or_default();
        let place = Place {
            object,
            pointer: format!("/{part}"),
            path: format!("{kind}.{part}"),
        };
        self.node(&place, &object[part], schema);
    }

    pub(crate) fn mutants(self) -> Vec<Mutant> {
        self.mutants
    }

    fn add(&mut self, place: &Place<'_>, how: &str, value: Option<Value>) {
        let what = format!("{}: {how}", place.path);
        if !self.done.insert(what.clone()) {
            return;
        }
        let mut object = place.object.clone();
        match value {
            Some(value) => {
                if let Some(at) = object.pointer_mut(&place.pointer) {
                    *at = value;
                }
            }
            None => {
                let (above, name) = place.pointer.rsplit_once('/').unwrap_or_default();
                if let Some(Value::Object(fields)) = object.pointer_mut(above) {
                    fields.remove(name);
                }
            }
        }
        // The name of a block's object follows from the block; the rule about it is tried elsewhere.
        let first = object.pointer("/spec/first").and_then(Value::as_str);
        if let Some(first) = first.filter(|first| first.parse::<std::net::Ipv4Addr>().is_ok()) {
            object["metadata"]["name"] = json!(format!("block-{}", first.replace('.', "-")));
        }
        self.mutants.push(Mutant { what, object });
    }

    fn node(&mut self, place: &Place<'_>, value: &Value, schema: &Value) {
        self.add(place, "null", Some(Value::Null));
        if !place.pointer.ends_with(|c: char| c.is_ascii_digit()) {
            self.add(place, "absent", None);
        }
        let others = [
            json!({}),
            json!([]),
            json!("a"),
            json!(""),
            json!(1),
            json!(true),
            json!("true"),
            json!("1"),
        ];
        for other in others {
            self.add(place, &format!("{other}"), Some(other));
        }
        match value {
            Value::Object(fields) => self.object(place, fields, schema),
            Value::Array(items) => self.list(place, items, schema),
            Value::String(_) => self.text(place, schema),
            Value::Number(_) => self.number(place, schema),
            Value::Bool(_) | Value::Null => {
                self.add(place, "true", Some(json!(true)));
                self.add(place, "false", Some(json!(false)));
            }
        }
    }

    fn object(&mut self, place: &Place<'_>, fields: &Map<String, Value>, schema: &Value) {
        let mut more = fields.clone();
        if let Some(values) = schema.get("additionalProperties") {
            let most = schema["maxProperties"].as_u64().unwrap_or(0);
            for n in [most, most + 1] {
                let entries = (0..n).map(|i| (format!("k{i}"), json!("v")));
                self.add(
                    place,
                    &format!("{n} entries"),
                    Some(Value::Object(entries.collect())),
                );
            }
            for (key, value) in fields {
                self.node(&place.below(key, "{}"), value, values);
            }
            return;
        }
        more.insert("colour".to_owned(), json!("blue"));
        self.add(place, "an unknown field", Some(Value::Object(more)));
        for (name, value) in fields {
            self.node(
                &place.below(name, &format!(".{name}")),
                value,
                &schema["properties"][name],
            );
        }
    }

    fn list(&mut self, place: &Place<'_>, items: &[Value], schema: &Value) {
        let most = schema["maxItems"].as_u64().unwrap_or(0);
        let least = schema["minItems"].as_u64().unwrap_or(0);
        let Some(first) = items.first() else { return };
        for n in [least.saturating_sub(1), least, least + 1, most, most + 1] {
            let list = (0..n).map(|i| distinct(first, &schema["items"], schema, i));
            self.add(place, &format!("{n} items"), Some(list.collect()));
        }
        self.add(place, "one item twice", Some(json!([first, first])));
        for (i, item) in items.iter().enumerate() {
            self.node(&place.below(&i.to_string(), "[]"), item, &schema["items"]);
        }
    }

    fn text(&mut self, place: &Place<'_>, schema: &Value) {
        for word in schema["enum"].as_array().into_iter().flatten() {
            self.add(place, &format!("the word {word}"), Some(word.clone()));
            let lower = word.as_str().unwrap_or_default().to_lowercase();
            self.add(place, &format!("the word {lower}"), Some(json!(lower)));
        }
        if schema.get("enum").is_some() {
            return;
        }
        // What the rules of a kind look at is tried at its own place; of what is the same everywhere, one place is enough.
        let mut plain = schema.clone();
        plain["description"] = Value::Null;
        let is_common = ["elector", "probe", ".status"]
            .iter()
            .any(|part| place.path.contains(part));
        if is_common && !self.done.insert(format!("texts of {plain}")) {
            return;
        }
        for text in TEXTS {
            self.add(place, &format!("the text {text:?}"), Some(json!(text)));
        }
        let most = schema["maxLength"].as_u64().unwrap_or(0) as usize;
        let least = schema["minLength"].as_u64().unwrap_or(0) as usize;
        // Letters of two octets: lengths are counted in characters.
        for letter in ["a", "é"] {
            for n in [least.saturating_sub(1), least, most, most + 1] {
                self.add(
                    place,
                    &format!("{n} times {letter}"),
                    Some(json!(letter.repeat(n))),
                );
            }
        }
        for n in [15, 16, 63, 64, 253, 254] {
            self.add(place, &format!("{n} times a"), Some(json!("a".repeat(n))));
            self.add(
                place,
                &format!("{n} times a, under a prefix"),
                Some(json!(format!("a.example/{}", "a".repeat(n)))),
            );
        }
    }

    fn number(&mut self, place: &Place<'_>, schema: &Value) {
        let least = schema["minimum"].as_i64().unwrap_or(i64::MIN);
        let most = schema["maximum"].as_i64().unwrap_or(i64::MAX);
        let around = [least.saturating_sub(1), least, most, most.saturating_add(1)];
        let known = [
            0,
            1,
            2,
            3,
            4,
            5,
            10,
            23455,
            23456,
            23457,
            65534,
            65535,
            65536,
            i64::MAX,
        ];
        for n in around.into_iter().chain(known) {
            self.add(place, &format!("{n}"), Some(json!(n)));
        }
        self.add(place, "1.5", Some(json!(1.5)));
    }
}

/// A place in an object.
struct Place<'o> {
    object: &'o Value,
    /// For serde_json.
    pointer: String,
    /// For people, and the same for every item of a list.
    path: String,
}

impl Place<'_> {
    fn below(&self, step: &str, shown: &str) -> Self {
        let step = step.replace('~', "~0").replace('/', "~1");
        Self {
            object: self.object,
            pointer: format!("{}/{step}", self.pointer),
            path: format!("{}{shown}", self.path),
        }
    }
}

/// The `i`th of items that differ where items must.
fn distinct(first: &Value, schema: &Value, list: &Value, i: u64) -> Value {
    match first {
        Value::Object(fields) => {
            let keys = list["x-kubernetes-list-map-keys"].as_array();
            let mut item = fields.clone();
            for key in keys.into_iter().flatten().filter_map(Value::as_str) {
                let of_key = &schema["properties"][key];
                let value = item.get(key).cloned().unwrap_or_default();
                if of_key.get("enum").is_none() {
                    item.insert(key.to_owned(), distinct(&value, of_key, list, i));
                }
            }
            // Ports have names of their own.
            if list["x-kubernetes-list-map-keys"] == json!(["port", "protocol"]) {
                item.insert("name".to_owned(), json!(format!("n{i}")));
            }
            Value::Object(item)
        }
        Value::String(text) => match schema["enum"].as_array() {
            Some(words) => words[i as usize % words.len()].clone(),
            None => json!(another(text, i)),
        },
        Value::Number(_) => json!(i + 1),
        other => other.clone(),
    }
}

/// A text of the same kind.
fn another(text: &str, i: u64) -> String {
    if text.parse::<std::net::Ipv6Addr>().is_ok() {
        format!("2001:db8::{:x}", i + 1)
    } else if text.parse::<std::net::Ipv4Addr>().is_ok() {
        format!("10.0.{}.{}", i >> 8, i & 255)
    } else if text.contains("::/") {
        format!("2001:db8:{:x}::/48", i + 1)
    } else if text.contains('/') && text.starts_with(|c: char| c.is_ascii_digit()) {
        format!("10.0.{i}.0/26")
    } else if text.matches(':').count() == 2 {
        format!("1:1:{i}")
    } else if text.contains(':') {
        format!("1:{i}")
    } else {
        format!("n{i}")
    }
}
