//! kun's own kinds as a folder has them: what is right is read, what is wrong is told with its place, and nothing is left untried. The same
//! files are tried on a real API server by `tests/tests/crds/`.
//! `KUN_BLESS=1 cargo test -p kun-cluster-core` writes the expectations anew; read the diff.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use kun_cluster_core::crd::{Broken, DEFINITIONS, broken_by_change};
use kun_cluster_core::{Manifest, Object, parse_manifest, parse_with_status};
use kun_config::Faults;
use serde_json::Value;

/// A document of a file, with as many empty lines before it as bring its lines to their places.
struct Document {
    file: String,
    text: String,
}

fn documents(folder: &str) -> Vec<Document> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files: Vec<PathBuf> = fs::read_dir(here.join(folder))
        .expect("the cases")
        .flatten()
        .map(|e| e.path())
        .filter(|p| p.extension().is_some_and(|e| e == "yaml"))
        .collect();
    files.sort();
    let mut documents = Vec::new();
    for path in files {
        let whole = fs::read_to_string(&path).expect("readable");
        let file = path.file_name().unwrap_or_default().to_string_lossy();
        let mut lines = 0;
        for text in whole.split("---\n") {
            documents.push(Document {
                file: file.clone().into_owned(),
                text: "\n".repeat(lines) + text,
            });
            lines += text.lines().count() + 1;
        }
    }
    assert!(!documents.is_empty(), "{folder} has no cases");
    documents
}

type Parse = fn(&str, &str) -> Result<Manifest, Faults>;

fn object(document: &Document, parse: Parse) -> Object {
    let manifest = parse(&document.file, &document.text);
    let mut objects = manifest.unwrap_or_else(|faults| panic!("{faults}")).objects;
    assert_eq!(objects.len(), 1, "{}", document.text);
    objects.remove(0)
}

fn faults(document: &Document, parse: Parse) -> Faults {
    match parse(&document.file, &document.text) {
        Ok(_) => panic!("{}: accepted: {}", document.file, document.text),
        Err(faults) => faults,
    }
}

fn bless(folder: &str, got: &str) {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let expected = here.join(folder).with_extension("txt");
    if std::env::var_os("KUN_BLESS").is_some() {
        fs::write(&expected, got).expect("writable");
    }
    let want = fs::read_to_string(&expected).unwrap_or_default();
    assert_eq!(got, want, "{}", expected.display());
}

#[test]
fn what_is_right_is_read() {
    for folder in ["../../deploy/crds/examples", "tests/crd/good"] {
        for document in documents(folder) {
            object(&document, parse_manifest);
        }
    }
    for document in documents("tests/crd/status-good") {
        let object = object(&document, parse_with_status);
        let shown = format!("{object:?}");
        assert!(shown.contains("status: Some("), "{shown}");
    }
}

#[test]
fn what_is_wrong_is_refused_with_exactly_these_messages() {
    let told = |folder: &str, parse: Parse| {
        let documents = documents(folder);
        let told = documents.iter().map(|d| format!("{}\n", faults(d, parse)));
        told.collect::<Vec<String>>().join("\n")
    };
    bless("tests/crd/bad", &told("tests/crd/bad", parse_manifest));
    bless(
        "tests/crd/status-bad",
        &told("tests/crd/status-bad", parse_with_status),
    );
}

/// The server drops the status of what is created, and who reads an object of a later version must live with what it reports.
#[test]
fn a_wrong_status_in_a_folder_is_no_status() {
    for document in documents("tests/crd/status-bad").iter().skip(1) {
        let shown = format!("{:?}", object(document, parse_manifest));
        assert!(shown.contains("status: None"), "{shown}");
    }
}

/// The states before and after each change of a folder, the second maybe refused for itself.
fn changes(folder: &str) -> Vec<(Object, Document)> {
    let mut documents = documents(folder).into_iter();
    let mut changes = Vec::new();
    while let (Some(before), Some(after)) = (documents.next(), documents.next()) {
        changes.push((object(&before, parse_manifest), after));
    }
    changes
}

#[test]
fn changes_are_held_to_their_rules() {
    for (before, after) in changes("tests/crd/steps-good") {
        assert_eq!(
            broken_by_change(&before, &object(&after, parse_manifest)),
            []
        );
    }
    let mut told = String::new();
    for (before, after) in changes("tests/crd/steps-bad") {
        let of_change = match parse_manifest(&after.file, &after.text) {
            Err(faults) => faults.to_string(),
            Ok(manifest) => {
                let broken = broken_by_change(&before, &manifest.objects[0]);
                let line =
                    |b: &Broken| format!("{}: {}: {}; {}", after.file, b.field, b.wrong, b.right);
                broken.iter().map(line).collect::<Vec<_>>().join("\n")
            }
        };
        assert!(!of_change.is_empty(), "accepted: {}", after.text);
        told += &format!("{of_change}\n\n");
    }
    bless("tests/crd/steps-bad", &told);
}

/// The rules of a schema: what each says, and its CEL text.
fn collect(schema: &Value, into: &mut BTreeSet<(String, String)>) {
    match schema {
        Value::Object(fields) => {
            let rules = fields.get("x-kubernetes-validations");
            for rule in rules.and_then(Value::as_array).into_iter().flatten() {
                let text = |key: &str| rule[key].as_str().unwrap_or_default().to_owned();
                into.insert((text("message"), text("rule")));
            }
            fields.values().for_each(|below| collect(below, into));
        }
        Value::Array(items) => items.iter().for_each(|below| collect(below, into)),
        _ => {}
    }
}
#[test]
fn every_rule_is_broken_once() {
    let read = |name: &str| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/crd")
            .join(name);
        fs::read_to_string(path).expect("blessed")
    };
    let told = ["bad.txt", "status-bad.txt", "steps-bad.txt"]
        .map(read)
        .concat();
    let mut all = BTreeSet::new();
    DEFINITIONS
        .iter()
        .for_each(|d| collect(&d.manifest(), &mut all));
    assert!(all.len() > 50, "{} rules found", all.len());
    let unbroken: Vec<&(String, String)> = all
        .iter()
        .filter(|(message, _)| {
            // A fault of a text quotes it, and may know what was meant.
            let of_text = message
                .split("; write one such as")
                .next()
                .unwrap_or_default();
            !told.contains(message) && !told.contains(&format!("is {of_text}"))
        })
        .collect();
    assert!(unbroken.is_empty(), "{unbroken:#?}");
}

/// The paths of a schema's fields, list items written `[]`.
fn schema_paths(schema: &Value, at: &str, into: &mut BTreeSet<String>) {
    for (name, below) in schema["properties"].as_object().into_iter().flatten() {
        let at = format!("{at}.{name}");
        into.insert(at.clone());
        schema_paths(below, &at, into);
    }
    if schema.get("items").is_some() {
        schema_paths(&schema["items"], &format!("{at}[]"), into);
    }
}

fn value_paths(value: &Value, at: &str, into: &mut BTreeSet<String>) {
    match value {
        Value::Object(fields) => {
            for (name, below) in fields {
                let at = format!("{at}.{name}");
                into.insert(at.clone());
                value_paths(below, &at, into);
            }
        }
        Value::Array(items) => {
            for item in items {
                value_paths(item, &format!("{at}[]"), into);
            }
        }
        _ => {}
    }
}

#[test]
fn every_field_stands_in_an_example_and_says_what_it_is() {
    let mut shown = BTreeSet::new();
    for (folder, part) in [
        ("../../deploy/crds/examples", "spec"),
        ("tests/crd/status-good", "status"),
    ] {
        for document in documents(folder) {
            let value: Value = serde_saphyr::from_str(&document.text).expect("YAML");
            let at = format!("{}.{part}", value["kind"].as_str().unwrap_or_default());
            value_paths(&value[part], &at, &mut shown);
        }
    }
    let mut missing = Vec::new();
    for definition in &DEFINITIONS {
        let manifest = definition.manifest();
        let schema = &manifest["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"];
        for part in ["spec", "status"] {
            let mut paths = BTreeSet::new();
            let at = format!("{}.{part}", definition.resource.kind);
            schema_paths(&schema[part], &at, &mut paths);
            // Of selectors, which are the same everywhere, one example is enough.
            let is_shown = |path: &String| {
                path.contains("Selector.") || path.contains(".selector.") || shown.contains(path)
            };
            missing.extend(paths.into_iter().filter(|path| !is_shown(path)));
        }
    }
    assert!(missing.is_empty(), "{missing:#?}");
    let selector = "IPPool.spec.nodeSelector.matchExpressions[].values";
    assert!(shown.contains(selector), "{shown:#?}");
}

/// What a structural schema may not have, and what `kubectl explain` needs.
fn unstructural(schema: &Value, at: &str, wrong: &mut Vec<String>) {
    let Value::Object(fields) = schema else {
        wrong.push(format!("{at}: no schema"));
        return;
    };
    for key in [
        "$ref",
        "anyOf",
        "oneOf",
        "allOf",
        "not",
        "patternProperties",
        "x-kun-check",
    ] {
        if fields.contains_key(key) {
            wrong.push(format!("{at}: {key}"));
        }
    }
    if !fields.get("type").is_some_and(Value::is_string) {
        wrong.push(format!("{at}: no type"));
    }
    let is_entry = at.ends_with("[]") || at.ends_with("{}");
    if !is_entry && fields.get("description").is_none_or(|d| d == "") {
        wrong.push(format!("{at}: no description"));
    }
    // Without these a rule below has no bounded cost.
    let bound = match fields.get("type").and_then(Value::as_str) {
        Some("array") => Some("maxItems"),
        Some("string") if !fields.contains_key("enum") => Some("maxLength"),
        Some("object") if fields.contains_key("additionalProperties") => Some("maxProperties"),
        _ => None,
    };
    if let Some(bound) = bound.filter(|bound| !fields.contains_key(*bound)) {
        wrong.push(format!("{at}: no {bound}"));
    }
    for (name, below) in schema["properties"].as_object().into_iter().flatten() {
        unstructural(below, &format!("{at}.{name}"), wrong);
    }
    for (key, mark) in [("items", "[]"), ("additionalProperties", "{}")] {
        if let Some(below) = fields.get(key) {
            unstructural(below, &format!("{at}{mark}"), wrong);
        }
    }
}

#[test]
fn schemas_are_structural_bounded_and_described() {
    let mut wrong = Vec::new();
    for definition in &DEFINITIONS {
        let manifest = definition.manifest();
        let schema = &manifest["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"];
        for part in ["spec", "status"] {
            let at = format!("{}.{part}", definition.resource.kind);
            unstructural(&schema[part], &at, &mut wrong);
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
