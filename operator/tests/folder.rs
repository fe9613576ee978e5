//! The operator on a real folder: what it writes, what it refuses, and that a second run changes nothing.

use std::fs;
use std::path::Path;

use kun_cluster::folder::FolderSource;
use kun_cluster::{Event, ObjectName, Store};
use kun_config::Config;
use kun_operator::generated::{FOLDER, Generated, GeneratedError};
use kun_operator::run::{Operator, RunError};
use kun_telemetry::Metrics;

const CLUSTER: &str = r#"
apiVersion: kun.network/v1alpha1
kind: IPPool
metadata: {name: main}
spec:
  pods: [10.64.0.0/16, 240.0.0.0/20]
  services: {v4: [192.0.2.0/24], v6: ["2001:db8:1::/112"]}
---
apiVersion: v1
kind: Node
metadata: {name: node-a}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {type: LoadBalancer, ipFamilies: [IPv6, IPv4], ports: [{port: 80}]}
"#;

fn config(folder: &Path) -> Config {
    kun_config::parse(
        "kun.yaml",
        &format!("cluster: {{folder: {}}}", folder.display()),
    )
    .expect("a good configuration")
}

fn once(folder: &Path) -> Result<usize, RunError> {
    let mut operator = Operator::open(config(folder), 1, &Metrics::default())?;
    Ok(operator.once()?.len())
}

fn snapshot(folder: &Path) -> Store {
    let mut source = FolderSource::open(folder).expect("a folder");
    let mut store = Store::new();
    loop {
        match source.next_event() {
            Event::Deltas(deltas) => deltas
                .into_iter()
                .for_each(|delta| drop(store.apply(delta))),
            Event::Synced => return store,
            trouble @ (Event::Trouble(_) | Event::Partial | Event::Whole | Event::Reached(..)) => {
                panic!("{trouble:?}")
            }
        }
    }
}

#[test]
fn what_it_writes_is_what_every_program_reads() {
    let dir = tempfile::tempdir().expect("a directory");
    fs::write(dir.path().join("cluster.yaml"), CLUSTER).expect("writable");
    assert_eq!(once(dir.path()).expect("works"), 0);
    let store = snapshot(dir.path());
    let blocks: Vec<String> = store
        .blocks_of("node-a")
        .map(|b| b.block().to_string())
        .collect();
    assert_eq!(blocks, ["10.64.0.0/26", "240.0.0.0/26"]);
    let web = store
        .service(&ObjectName::new("shop", "web"))
        .expect("there");
    let addresses: Vec<String> = web
        .load_balancer_ips
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(addresses, ["192.0.2.1", "2001:db8:1::1"]);

    let text = fs::read_to_string(dir.path().join(FOLDER).join("service-addresses.yaml"))
        .expect("written");
    assert_eq!(
        text,
        "# Written by kun-operator, and its memory: an assignment stays as long as it stands here.\n\
         ---\napiVersion: kun.network/v1alpha1\nkind: ServiceAddress\nmetadata:\n  namespace: \"shop\"\n  name: \"web\"\n\
         spec:\n  addresses: [\"192.0.2.1\", \"2001:db8:1::1\"]\n"
    );
    assert_eq!(once(dir.path()).expect("works"), 0);
    let again = fs::read_to_string(dir.path().join(FOLDER).join("service-addresses.yaml"))
        .expect("written");
    assert_eq!(again, text);
    let mut left: Vec<_> = fs::read_dir(dir.path().join(FOLDER))
        .expect("there")
        .flatten()
        .map(|e| e.file_name())
        .collect();
    left.sort();
    assert_eq!(
        left,
        [".lock", "ipam-blocks.yaml", "service-addresses.yaml"]
    );
}

#[test]
fn nothing_moves_when_the_cluster_file_breaks_or_goes() {
    let dir = tempfile::tempdir().expect("a directory");
    let cluster = dir.path().join("cluster.yaml");
    fs::write(&cluster, CLUSTER).expect("writable");
    once(dir.path()).expect("works");
    let before = Generated::open(dir.path())
        .expect("free")
        .assignments()
        .clone();
    for broken in ["kind: [", ""] {
        fs::write(&cluster, broken).expect("writable");
        once(dir.path()).expect("works");
        assert_eq!(
            *Generated::open(dir.path()).expect("free").assignments(),
            before
        );
    }
}

#[test]
fn a_damaged_memory_is_not_overwritten() {
    let dir = tempfile::tempdir().expect("a directory");
    fs::write(dir.path().join("cluster.yaml"), CLUSTER).expect("writable");
    once(dir.path()).expect("works");
    let file = dir.path().join(FOLDER).join("ipam-blocks.yaml");
    let damaged = fs::read_to_string(&file)
        .expect("there")
        .replace("10.64.0.0", "10.64.0.1");
    fs::write(&file, &damaged).expect("writable");
    let error = once(dir.path()).expect_err("refused").to_string();
    assert!(
        error.contains(
            "ipam-blocks.yaml:8:10: spec.first: `10.64.0.1` is not the first slot of a block: an IPv4 address that is a multiple of 64; write 10.64.0.0"
        ),
        "{error}"
    );
    assert_eq!(fs::read_to_string(&file).expect("there"), damaged);
}

#[test]
fn two_operators_do_not_share_a_folder() {
    let dir = tempfile::tempdir().expect("a directory");
    let _first = Generated::open(dir.path()).expect("free");
    assert!(matches!(
        Generated::open(dir.path()),
        Err(GeneratedError::Locked(_))
    ));
}

#[test]
fn a_single_file_is_refused() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("cluster.yaml");
    fs::write(&file, CLUSTER).expect("writable");
    let error = once(&file).expect_err("refused").to_string();
    assert!(
        error.contains("is a file; the operator writes into kun-generated/ below a folder"),
        "{error}"
    );
}
