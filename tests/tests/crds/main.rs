//! kun's own kinds on a real API server: their definitions are taken without a word, people can look at them, and the server's verdict about
//! every object of the corpus, and about every bound and word of the schemas, is the folder's.

mod mutations;
mod server;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, Once, PoisonError};
use std::time::Duration;

use kun_cluster::crd::{DEFINITIONS, broken_by_change};
use kun_cluster::{Manifest, Object, parse_manifest, parse_with_status};
use kun_config::Faults;
use kun_harness::control_plane::binary;
use kun_harness::{ControlPlane, wait_for};
use serde_json::Value;

use mutations::{Mutant, Mutator};
use server::{Server, Verdict};

/// A definition is established in a second; a busy machine takes a few.
const ACTS_WITHIN: Duration = Duration::from_secs(60);

/// Questions to the server at once: it answers one in a few milliseconds, most of them waiting for us.
const AT_ONCE: usize = 8;

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The YAML documents of a folder below the workspace, as JSON, with their places.
fn documents(folder: &str) -> Vec<(String, Value)> {
    let folder = workspace().join(folder);
    let mut files: Vec<PathBuf> = fs::read_dir(&folder)
        .unwrap_or_else(|e| panic!("{}: {e}", folder.display()))
        .map(|e| e.expect("readable").path())
        .filter(|p| p.extension().is_some_and(|e| e == "yaml"))
        .collect();
    files.sort();
    let mut documents = Vec::new();
    for file in files {
        let text = fs::read_to_string(&file).expect("readable");
        for (i, document) in text.split("---\n").enumerate() {
            let object = serde_saphyr::from_str(document).expect("YAML");
            let name = file.file_name().unwrap_or_default().to_string_lossy();
            documents.push((format!("{name}, document {}", i + 1), object));
        }
    }
    documents
}

fn corpus(name: &str) -> Vec<(String, Value)> {
    documents(&format!("cluster/core/tests/crd/{name}"))
}

type Parse = fn(&str, &str) -> Result<Manifest, Faults>;

/// The folder's verdict, about what the server gets: JSON.
fn folder_says(object: &Value, parse: Parse) -> Verdict {
    let text = object.to_string();
    parse("object.json", &text)
        .map(drop)
        .map_err(|faults| faults.to_string())
}

fn parsed(object: &Value) -> Option<Object> {
    let manifest = parse_manifest("object.json", &object.to_string());
    manifest.ok()?.objects.into_iter().next()
}

/// The server with the definitions, for one test at a time: the objects of all are cluster-wide. `None` when there is no control plane.
fn plane() -> Option<(&'static ControlPlane, MutexGuard<'static, ()>)> {
    static APPLIED: Once = Once::new();
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let plane = ControlPlane::shared()?;
    let turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    APPLIED.call_once(|| {
        let folder = workspace().join("deploy/crds");
        let folder = folder.to_string_lossy();
        let said = kubectl(plane, &["apply", "--server-side", "-k", &folder]);
        // Such as an unknown format, or a rule that is too costly.
        assert!(!said.contains("Warning"), "{said}");
        for definition in &DEFINITIONS {
            let name = format!("crd/{}.kun.network", definition.resource.plural);
            let established = [
                "wait",
                "--for=condition=Established",
                "--timeout=60s",
                &name,
            ];
            kubectl(plane, &established);
        }
        wait_for("the kinds in discovery", ACTS_WITHIN, || {
            let words = [
                "api-resources",
                "--api-group=kun.network",
                "-o",
                "name",
                "--cached=false",
            ];
            let kinds = plane.kubectl(&words, "").ok()?;
            (kinds.lines().count() == DEFINITIONS.len()).then_some(())
        })
        .unwrap();
    });
    Some((plane, turn))
}

/// `kubectl`, with what it says on both outputs.
fn kubectl(plane: &ControlPlane, words: &[&str]) -> String {
    let done = Command::new(binary())
        .arg("kubectl")
        .args(words)
        .env("KUBECONFIG", plane.kubeconfig())
        .output()
        .expect("kubectl runs");
    let said = [done.stdout, done.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    assert!(done.status.success(), "kubectl {}: {said}", words.join(" "));
    said
}

fn block_on<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(work)
}

#[test]
fn definitions_are_established_and_structural() {
    let Some((plane, _turn)) = plane() else {
        return;
    };
    for definition in &DEFINITIONS {
        let name = format!("{}.kun.network", definition.resource.plural);
        let text = plane
            .kubectl(&["get", "crd", &name, "-o", "json"], "")
            .unwrap();
        let crd: Value = serde_json::from_str(&text).unwrap();
        let conditions = crd["status"]["conditions"].as_array().unwrap();
        let conditions: BTreeMap<&str, &str> = conditions
            .iter()
            .map(|c| (c["type"].as_str().unwrap(), c["status"].as_str().unwrap()))
            .collect();
        assert_eq!(
            conditions,
            BTreeMap::from([("Established", "True"), ("NamesAccepted", "True")]),
            "{name}"
        );
    }
}

#[test]
fn people_can_look_at_them() {
    let Some((plane, _turn)) = plane() else {
        return;
    };
    let examples = workspace().join("deploy/crds/examples");
    let examples = examples.to_string_lossy();
    let said = kubectl(plane, &["apply", "-f", &examples]);
    assert!(!said.contains("Warning"), "{said}");

    let all = plane
        .kubectl(&["get", "kun", "-A", "-o", "name"], "")
        .unwrap();
    for definition in &DEFINITIONS {
        assert!(
            all.contains(definition.resource.kind.to_lowercase().as_str()),
            "{all}"
        );
    }
    let head = |words: &[&str]| {
        let table = plane.kubectl(words, "").unwrap();
        let head = table.lines().next().unwrap_or_default();
        head.split_whitespace()
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    assert_eq!(
        head(&["get", "kblock"]),
        ["NAME", "FIRST", "NODE", "PHASE", "ALLOCATED", "AGE"]
    );
    assert_eq!(
        head(&["get", "kblock", "-o", "wide"]),
        [
            "NAME",
            "FIRST",
            "NODE",
            "PHASE",
            "ALLOCATED",
            "COOLING",
            "WANTED",
            "EPOCH",
            "DRAINING",
            "AGE"
        ]
    );
    assert_eq!(
        head(&["get", "kpeer"]),
        [
            "NAME",
            "ADDRESS",
            "INTERFACE",
            "ASN",
            "SESSIONS",
            "ESTABLISHED",
            "READY",
            "AGE"
        ]
    );
    let of_node = |kind: &str, selector: &str| {
        let words = ["get", kind, "--field-selector", selector, "-o", "name"];
        plane.kubectl(&words, "").unwrap().lines().count()
    };
    assert_eq!(of_node("ipamblocks", "spec.node=node-a"), 2);
    assert_eq!(of_node("ipamblocks", "spec.node=node-b"), 0);
    assert_eq!(of_node("bgpsessions", "spec.node=node-a,spec.peer=tor"), 1);
    assert_eq!(of_node("bgpsessions", "spec.peer=spine"), 0);
    let explained = plane
        .kubectl(&["explain", "bgppeer.spec.timers.keepaliveSeconds"], "")
        .unwrap();
    assert!(
        explained.contains("a third of the hold time at most"),
        "{explained}"
    );
    let words = [
        "get",
        "bgppeer",
        "uplink",
        "-o",
        "jsonpath={.spec.timers} {.spec.drain} {.spec.port}",
    ];
    // Defaults are the server's to fill in, and the same as the folder's.
    assert_eq!(
        plane.kubectl(&words, "").unwrap(),
        r#"{"connectRetrySeconds":5,"holdSeconds":9} {"gshut":true,"waitSeconds":10} 179"#
    );
    kubectl(plane, &["delete", "-f", &examples]);
}

/// Asks both about each object; every one that they disagree about.
async fn compare(server: &Server, cases: Vec<Case>) -> (Vec<String>, usize) {
    let mut refused = 0;
    let mut disagreements = Vec::new();
    let mut tasks = tokio::task::JoinSet::new();
    let share = cases.len().div_ceil(AT_ONCE).max(1);
    let mut cases = cases.into_iter().peekable();
    while cases.peek().is_some() {
        let cases: Vec<Case> = cases.by_ref().take(share).collect();
        let server = server.clone();
        tasks.spawn(async move {
            let mut verdicts = Vec::new();
            for case in cases {
                let verdict = match case.ask {
                    Ask::Create => server.would_create(&case.object).await,
                    Ask::Report => server.would_report(&case.object).await,
                };
                let verdict = verdict.unwrap_or_else(|e| panic!("{}: {e:#}", case.what));
                verdicts.push((case, verdict));
            }
            verdicts
        });
    }
    while let Some(verdicts) = tasks.join_next().await {
        for (case, verdict) in verdicts.unwrap() {
            refused += usize::from(verdict.is_err());
            let parse = match case.ask {
                Ask::Create => parse_manifest,
                Ask::Report => parse_with_status,
            };
            let folder = folder_says(&case.object, parse);
            if folder.is_ok() != verdict.is_ok() {
                disagreements.push(format!(
                    "{}\n  server: {verdict:?}\n  folder: {folder:?}",
                    case.what
                ));
            }
        }
    }
    (disagreements, refused)
}

/// What the server is asked.
#[derive(Clone, Copy)]
enum Ask {
    Create,
    Report,
}

struct Case {
    what: String,
    ask: Ask,
    object: Value,
}

/// The schema of a part of a kind.
fn schema(kind: &str, part: &str) -> Value {
    let definition = kun_cluster::crd::definition(kind).expect("ours");
    let manifest = definition.manifest();
    manifest["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"][part].clone()
}

#[test]
fn the_corpus_has_the_same_verdicts() {
    let Some((plane, _turn)) = plane() else {
        return;
    };
    block_on(async {
        let server = Server::of(plane).await.unwrap();
        for (folder, good) in [("good", true), ("bad", false)] {
            for (what, object) in corpus(folder) {
                let verdict = server.would_create(&object).await.unwrap();
                assert_eq!(verdict.is_ok(), good, "{folder}/{what}: {verdict:?}");
                let folder_too = folder_says(&object, parse_manifest);
                assert_eq!(folder_too.is_ok(), good, "{folder}/{what}: {folder_too:?}");
            }
        }
        for (folder, good) in [("status-good", true), ("status-bad", false)] {
            for (what, mut object) in corpus(folder) {
                let made = server.create(&object).await.unwrap();
                object["metadata"] = made["metadata"].clone();
                let verdict = server.would_report(&object).await.unwrap();
                server.delete(&object).await.unwrap();
                assert_eq!(verdict.is_ok(), good, "{folder}/{what}: {verdict:?}");
                let folder_too = folder_says(&object, parse_with_status);
                assert_eq!(folder_too.is_ok(), good, "{folder}/{what}: {folder_too:?}");
            }
        }
    });
}

#[test]
fn changes_have_the_same_verdicts() {
    let Some((plane, _turn)) = plane() else {
        return;
    };
    block_on(async {
        let server = Server::of(plane).await.unwrap();
        for (folder, good) in [("steps-good", true), ("steps-bad", false)] {
            let mut documents = corpus(folder).into_iter();
            while let (Some((_, before)), Some((what, mut after))) =
                (documents.next(), documents.next())
            {
                let made = server.create(&before).await.unwrap();
                let unchanged = parsed(&before).unwrap();
                let broken = parsed(&after).map(|after| broken_by_change(&unchanged, &after));
                after["metadata"] = made["metadata"].clone();
                let verdict = server.would_replace(&after).await.unwrap();
                server.delete(&after).await.unwrap();
                assert_eq!(verdict.is_ok(), good, "{folder}/{what}: {verdict:?}");
                let folder_too = broken.is_some_and(|broken| broken.is_empty());
                assert_eq!(folder_too, good, "{folder}/{what}");
            }
        }
    });
}

#[test]
fn every_bound_and_every_word_has_the_same_verdict() {
    let Some((plane, _turn)) = plane() else {
        return;
    };
    let case = |ask| {
        move |mutant: Mutant| Case {
            what: mutant.what,
            ask,
            object: mutant.object,
        }
    };
    block_on(async {
        let server = Server::of(plane).await.unwrap();
        let mut mutator = Mutator::default();
        for (_, object) in documents("deploy/crds/examples")
            .iter()
            .chain(&corpus("good"))
        {
            let kind = object["kind"].as_str().unwrap();
            mutator.mutate(object, "spec", &schema(kind, "spec"));
        }
        let mut cases: Vec<Case> = mutator
            .mutants()
            .into_iter()
            .map(case(Ask::Create))
            .collect();

        let mut mutator = Mutator::default();
        let mut made = Vec::new();
        for (_, mut object) in corpus("status-good") {
            // Names of its own: the other tests of this server make objects too.
            if object["kind"] != "IPAMBlock" {
                object["metadata"]["name"] = "bounds".into();
            } else {
                object["metadata"]["name"] = "block-10-99-0-0".into();
                object["spec"]["first"] = "10.99.0.0".into();
            }
            let answer = server.create(&object).await.unwrap();
            object["metadata"] = answer["metadata"].clone();
            let kind = object["kind"].as_str().unwrap();
            mutator.mutate(&object, "status", &schema(kind, "status"));
            made.push(object);
        }
        cases.extend(mutator.mutants().into_iter().map(case(Ask::Report)));

        let all = cases.len();
        let (disagreements, refused) = compare(&server, cases).await;
        for object in &made {
            server.delete(object).await.unwrap();
        }
        assert!(
            disagreements.is_empty(),
            "{} of {all}:\n{}",
            disagreements.len(),
            disagreements.join("\n")
        );
        // A test that compares nothing but refusals compares nothing.
        println!("{all} objects, {refused} refused by both");
        assert!(
            refused > all / 4 && all - refused > all / 10,
            "{refused} of {all} refused"
        );
    });
}
