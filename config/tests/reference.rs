//! `deploy/kun.yaml` says what the programs do: its values are the defaults, its examples are right, and no field is missing.

use std::collections::BTreeSet;

use kun_config::{known_fields, parse};

const REFERENCE: &str = include_str!("../../deploy/kun.yaml");

/// The reference with its examples in force: `#key: …` lines uncommented, and the defaults that they replace gone.
fn with_examples() -> String {
    let indent = |line: &str| line.len() - line.trim_start().len();
    let example = |line: &str| {
        let rest = line.trim_start().strip_prefix('#')?;
        (!rest.is_empty() && !rest.starts_with(' '))
            .then(|| format!("{}{rest}", " ".repeat(indent(line))))
    };
    // Deeper lines of an example are `  #  key: …`.
    let mut lines: Vec<String> = Vec::new();
    let mut inside = false;
    for line in REFERENCE.lines() {
        if let Some(line) = example(line) {
            let key = line
                .split(':')
                .next()
                .map(|k| format!("{k}:"))
                .unwrap_or_default();
            lines.retain(|l| !l.starts_with(&key));
            lines.push(line);
            inside = true;
        } else if inside && line.trim_start().starts_with("#  ") {
            lines.push(line.replacen('#', "", 1));
        } else {
            inside = false;
            lines.push(line.to_owned());
        }
    }
    // A cluster has one source.
    lines.retain(|l| !l.trim_start().starts_with("folder:"));
    lines.join("\n")
}

#[test]
fn its_values_are_the_defaults() {
    let reference = parse("kun.yaml", REFERENCE).unwrap_or_else(|faults| panic!("{faults}"));
    let empty = parse("kun.yaml", "").unwrap_or_else(|faults| panic!("{faults}"));
    assert_eq!(reference, empty);
}

#[test]
fn its_examples_are_right() {
    let config = parse("kun.yaml", &with_examples()).unwrap_or_else(|faults| panic!("{faults}"));
    assert_eq!(config.bgp.peers[0].name, "tor-a");
    assert!(config.nat64.gateway.is_some());
    assert_eq!(config.node.name, "node-a");
}

#[test]
fn it_documents_every_field() {
    let text = with_examples() + "\n";
    let known = known_fields("kun.yaml", &text).unwrap_or_else(|faults| panic!("{faults}"));
    assert!(
        known.len() > 60,
        "only {} fields: the walk sees too little",
        known.len()
    );
    let documented = documented(&text);
    let missing: BTreeSet<&String> = known
        .iter()
        .filter(|path| !documented.contains(*path))
        .collect();
    // Left out above because it excludes `kubernetes`; `its_values_are_the_defaults` covers it.
    assert_eq!(missing, BTreeSet::from([&"cluster.folder".to_owned()]));
}

/// Paths of the keys of block style YAML, by indentation: independent of the parser under test.
fn documented(text: &str) -> BTreeSet<String> {
    let mut paths = BTreeSet::new();
    let mut open: Vec<(usize, String)> = Vec::new();
    for line in text.lines() {
        let mut indent = line.len() - line.trim_start().len();
        let mut rest = line.trim_start();
        if let Some(item) = rest.strip_prefix("- ") {
            indent += 2;
            rest = item;
            if let Some((_, last)) = open.iter_mut().rfind(|(i, _)| *i < indent - 1)
                && !last.ends_with("[]")
            {
                last.push_str("[]");
            }
        }
        if rest.is_empty() || rest.starts_with('#') {
            continue;
        }
        let Some((key, _)) = rest.split_once(':') else {
            continue;
        };
        open.retain(|(i, _)| *i < indent);
        let path = match open.last() {
            Some((_, parent)) => format!("{parent}.{key}"),
            None => key.to_owned(),
        };
        paths.insert(path.clone());
        open.push((indent, path));
    }
    paths
}

/// Each `key: value` line of the reference, with the line's number, indentation and key.
fn leaves(text: &str) -> Vec<(usize, String, String)> {
    let leaf = |(number, line): (usize, &str)| {
        let trimmed = line.trim_start();
        let indent = " ".repeat(line.len() - trimmed.len());
        let (key, value) = trimmed.split_once(": ")?;
        (!trimmed.starts_with(['#', '-']) && !value.is_empty())
            .then(|| (number, indent, key.to_owned()))
    };
    text.lines().enumerate().filter_map(leaf).collect()
}

fn with_line(text: &str, number: usize, new: &str) -> String {
    let lines = text.lines().enumerate();
    lines
        .map(|(i, line)| {
            if i == number {
                format!("{new}\n")
            } else {
                format!("{line}\n")
            }
        })
        .collect()
}

#[test]
fn a_value_of_the_wrong_shape_is_refused_at_its_line_in_every_field() {
    let text = with_examples();
    let leaves = leaves(&text);
    assert!(leaves.len() > 45, "only {} fields", leaves.len());
    for (number, indent, key) in leaves {
        let broken = with_line(&text, number, &format!("{indent}{key}: {{wrong: {{}}}}"));
        let faults = parse("kun.yaml", &broken)
            .err()
            .unwrap_or_else(|| panic!("{key} took a mapping"));
        let here = faults.0.iter().any(|f| {
            f.at.is_some_and(|(line, _)| line as usize == number + 1) && f.path.contains(&key)
        });
        assert!(here, "{key} on line {}:\n{faults}", number + 1);
    }
}

#[test]
fn a_misspelt_field_is_refused_with_the_right_name_everywhere() {
    let text = with_examples();
    for (number, indent, key) in leaves(&text) {
        let value = text
            .lines()
            .nth(number)
            .and_then(|line| line.split_once(": "))
            .map_or("", |(_, value)| value);
        let broken = with_line(&text, number, &format!("{indent}{key}x: {value}"));
        let faults = parse("kun.yaml", &broken)
            .err()
            .unwrap_or_else(|| panic!("{key}x was taken"));
        let unknown = faults
            .0
            .iter()
            .find(|f| f.wrong == "unknown field")
            .unwrap_or_else(|| panic!("{key}: {faults}"));
        assert_eq!(
            unknown.at.map(|(line, _)| line as usize),
            Some(number + 1),
            "{unknown}"
        );
        // Two letters are too few to guess from.
        if key.len() > 2 {
            assert_eq!(unknown.right, format!("did you mean `{key}`?"), "{unknown}");
        }
    }
}
