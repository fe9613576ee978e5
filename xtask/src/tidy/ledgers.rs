//! The ledgers: requirement → status → test. A claim without a test that exists is a fault.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Deserialize;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Ledger {
    #[allow(dead_code, reason = "required of every file")]
    spec: String,
    #[allow(dead_code, reason = "required of every file")]
    title: String,
    #[serde(default)]
    requirement: Vec<Requirement>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Requirement {
    id: String,
    text: String,
    status: Status,
    #[serde(default)]
    tests: Vec<String>,
    #[serde(default)]
    note: String,
}

#[derive(Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
#[serde(rename_all = "kebab-case")]
enum Status {
    Met,
    Partial,
    Unmet,
    OutOfScope,
}

pub(super) fn check(root: &Path, wrong: &mut Vec<String>) -> Result<()> {
    let directory = root.join("conformance/ledger");
    let Ok(entries) = fs::read_dir(&directory) else {
        return Ok(());
    };
    for entry in entries.flatten() {
        let path = entry.path();
        if path.extension().is_some_and(|e| e == "toml") {
            let text =
                fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
            let name = format!("conformance/ledger/{}", entry.file_name().to_string_lossy());
            check_ledger(
                &name,
                &text,
                |file| fs::read_to_string(root.join(file)).ok(),
                wrong,
            );
        }
    }
    Ok(())
}

fn check_ledger(
    name: &str,
    text: &str,
    read: impl Fn(&str) -> Option<String>,
    wrong: &mut Vec<String>,
) {
    let ledger: Ledger = match toml::from_str(text) {
        Ok(ledger) => ledger,
        Err(e) => {
            wrong.push(format!("{name}: {e}"));
            return;
        }
    };
    let mut ids = BTreeSet::new();
    for row in &ledger.requirement {
        let id = &row.id;
        if !ids.insert(id) {
            wrong.push(format!("{name}: {id}: the id stands twice"));
        }
        if row.text.trim().is_empty() {
            wrong.push(format!("{name}: {id}: says nothing"));
        }
        if matches!(row.status, Status::Met | Status::Partial) && row.tests.is_empty() {
            wrong.push(format!("{name}: {id}: {:?} without a test", row.status));
        }
        if row.status != Status::Met && row.note.trim().is_empty() {
            wrong.push(format!("{name}: {id}: {:?} without a note", row.status));
        }
        for test in &row.tests {
            if let Some(fault) = fault_of(test, &read) {
                wrong.push(format!("{name}: {id}: {test}: {fault}"));
            }
        }
    }
}

/// A test is `file#function`, and the function is there.
fn fault_of(test: &str, read: impl Fn(&str) -> Option<String>) -> Option<String> {
    let Some((file, function)) = test.split_once('#') else {
        return Some("not of the form file#function".into());
    };
    let Some(text) = read(file) else {
        return Some("no such file".into());
    };
    let defined = text.split("fn ").skip(1).any(|rest| {
        rest.strip_prefix(function)
            .is_some_and(|after| after.starts_with(['(', '<']))
    });
    (!defined).then(|| "no such function in it".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn faults(rows: &str) -> Vec<String> {
        let mut wrong = Vec::new();
        let text = format!("spec = \"RFC 1\"\ntitle = \"x\"\n{rows}");
        let read = |file: &str| (file == "a.rs").then(|| "#[test]\nfn it_holds() {}".to_owned());
        check_ledger("l.toml", &text, read, &mut wrong);
        wrong
    }

    #[test]
    fn a_claim_needs_a_test_that_exists() {
        let row = |status: &str, tests: &str| {
            format!(
                "[[requirement]]\nid = \"1\"\ntext = \"t\"\nstatus = \"{status}\"\ntests = [{tests}]\nnote = \"n\"\n"
            )
        };
        assert_eq!(
            faults(&row("met", "\"a.rs#it_holds\"")),
            Vec::<String>::new()
        );
        assert_eq!(faults(&row("unmet", "")), Vec::<String>::new());
        assert!(faults(&row("met", ""))[0].contains("without a test"));
        assert!(faults(&row("met", "\"a.rs#it_hold\""))[0].contains("no such function"));
        assert!(faults(&row("met", "\"b.rs#it_holds\""))[0].contains("no such file"));
        assert!(faults(&row("done", ""))[0].contains("done"));
        let twice = row("unmet", "").repeat(2);
        assert!(faults(&twice)[0].contains("twice"));
    }
}
