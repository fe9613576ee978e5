//! Files that are refused, each with its exact messages beside it, and files that are accepted, each with what became of it.
//! `KUN_BLESS=1 cargo test -p kun-config` writes the expectations anew; read the diff.

use std::fs;
use std::path::{Path, PathBuf};

use kun_config::parse;

fn cases(folder: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests")
        .join(folder);
    let entries = fs::read_dir(folder)
        .expect("the cases")
        .flatten()
        .map(|e| e.path());
    let mut cases: Vec<PathBuf> = entries
        .filter(|p| p.extension().is_some_and(|e| e == "yaml"))
        .collect();
    cases.sort();
    cases
}

fn check(case: &Path, got: &str) {
    let expected = case.with_extension("txt");
    if std::env::var_os("KUN_BLESS").is_some() {
        fs::write(&expected, got).expect("writable");
    }
    let want = fs::read_to_string(&expected).unwrap_or_default();
    assert_eq!(got, want, "{}", case.display());
}

#[test]
fn refused_with_exactly_these_messages() {
    let cases = cases("rejected");
    assert!(cases.len() > 15, "the cases are not found");
    for case in cases {
        let text = fs::read_to_string(&case).expect("readable");
        let faults = parse("kun.yaml", &text)
            .err()
            .unwrap_or_else(|| panic!("{} was accepted", case.display()));
        check(&case, &format!("{faults}\n"));
    }
}

#[test]
fn accepted_as_exactly_this() {
    for case in cases("accepted") {
        let text = fs::read_to_string(&case).expect("readable");
        let mut config = parse("kun.yaml", &text)
            .unwrap_or_else(|faults| panic!("{}: {faults}", case.display()));
        let warnings = std::mem::take(&mut config.warnings);
        check(&case, &format!("{warnings}\n{config:#?}\n"));
    }
}
