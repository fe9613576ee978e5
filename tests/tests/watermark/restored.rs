//! etcd is restored from a backup below living agents and a living operator: revisions go back, and their numbers come up again and name
//! other states than they did.

use std::time::Duration;

use anyhow::Context as _;
use kun_cluster::api::write::{WriteError, Writer};
use kun_cluster::{ObjectName, Resource};
use kun_control::SlotRow;
use kun_harness::{wait_for, wait_until};
use rustix::process::Signal;
use serde_json::json;

use crate::lab::{Lab, Node, SOON, value};

/// More than is written while everything comes back, so that the revisions before and after do not overlap by themselves.
const LOST: usize = 1_500;

/// Of one core, what an agent or the operator may spend while the API server is away and comes back. One that spins spends all.
const CPU_AT_MOST: f64 = 0.5;

/// Somebody writes; gives the revision.
fn write(lab: &Lab, times: usize) -> u64 {
    let kubeconfig = lab.plane.kubeconfig().to_owned();
    lab.fabric
        .run(|| {
            let writer = Writer::open(Some(&kubeconfig))?;
            let name = ObjectName::new("kube-system", "somebody");
            let metadata = json!({"namespace": "kube-system", "name": "somebody"});
            match writer.create(Resource::LEASES, &json!({"metadata": metadata})) {
                Ok(_) | Err(WriteError::Exists { .. }) => {}
                Err(error) => return Err(error.into()),
            }
            let mut revision = 0;
            for _ in 0..times {
                let patch = json!({"metadata": {"annotations": {"after": format!("{revision}")}}});
                let written = writer.patch(Resource::LEASES, &name, &patch)?;
                let version = written["metadata"]["resourceVersion"].as_str();
                revision = version.and_then(|v| v.parse().ok()).context("a number")?;
            }
            anyhow::Ok(revision)
        })
        .unwrap()
}

/// CPU seconds of a process.
fn spent(pid: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let after = stat.rsplit_once(") ").unwrap().1;
    let ticks: u64 = (after.split(' ').skip(11).take(2))
        .map(|ticks| ticks.parse::<u64>().unwrap())
        .sum();
    // USER_HZ.
    ticks as f64 / 100.0
}

fn says(row: Option<SlotRow>, text: &str) -> bool {
    row.is_some_and(|row| row.why.iter().any(|why| why.contains(text)))
}

fn backends(node: &Node) -> String {
    value(&node.status().unwrap().proxy, "backends").unwrap()
}

/// A slot that a slice of the backup names, and one that only what was lost named. One agent was frozen through all of it, with both.
pub(crate) fn a_restored_backup_frees_nothing_early_and_keeps_nothing_for_ever(
    lab: &mut Lab,
    time: Duration,
) {
    let (kept, _) = lab.nodes[0].allocate("kept");
    lab.all_have(lab.endpoints(&[kept]));
    let backup = lab.plane.back_up().unwrap();
    let (lost, _) = lab.nodes[0].allocate("lost");
    lab.all_have(lab.endpoints(&[kept, lost]));
    let before = write(lab, LOST);
    lab.nodes[1].agent.signal(Signal::STOP).unwrap();
    lab.endpoints(&[]);
    for container in ["kept", "lost"] {
        lab.nodes[0].release(container);
    }

    let pids = [
        lab.nodes[0].agent.pid(),
        lab.operator.as_ref().unwrap().pid(),
    ];
    let (begin, cpu) = (std::time::Instant::now(), pids.map(spent));
    lab.plane.restore(backup).unwrap();
    let row = |slot| lab.nodes[0].row(slot);
    // What is gone from the storage is gone from the view, and what is back is back.
    wait_for("the old slice", SOON, || {
        says(row(kept), "EndpointSlice default/web-4 has").then_some(())
    })
    .unwrap_or_else(|e| panic!("{e:#}: {:?}\n{}", row(kept), lab.nodes[0].log()));
    assert!(backends(&lab.nodes[0]).starts_with("2 of"));
    let without = lab.endpoints(&[]);
    assert!(without < before, "{without} of {before}: nothing went back");
    let neither = |what: &str| {
        let back = wait_until(time, || row(kept).is_none() || row(lost).is_none());
        assert!(!back, "{what}: a slot came back while node-b sends to it");
    };
    neither("lower revisions");
    // The numbers come back up to what was published and folded of what is lost, and make it no truer.
    while write(lab, 100) <= before {}
    neither("the same revisions anew");
    for slot in [kept, lost] {
        assert!(says(row(slot), "is waited for"), "{:?}", row(slot));
    }
    let (took, cpu_now) = (begin.elapsed().as_secs_f64(), pids.map(spent));
    for (before, now) in cpu.into_iter().zip(cpu_now) {
        let share = (now - before) / took;
        assert!(share < CPU_AT_MOST, "{share} of a core for {took} s");
    }
    // The frozen agent resumes its watches where the numbers are by now.
    assert!(
        lab.published("node-b") < without,
        "node-b published while it was frozen"
    );
    lab.nodes[1].agent.signal(Signal::CONT).unwrap();
    for slot in [kept, lost] {
        lab.nodes[0].comes_back(slot);
    }
    assert!(
        backends(&lab.nodes[1]).starts_with("1 of"),
        "{}",
        backends(&lab.nodes[1])
    );
    let folded = lab.folded();
    assert!(folded >= without, "{folded} of {without}");
    let seen = ["older than resourceVersion"].map(|text| lab.nodes[1].log().contains(text));
    assert_eq!(seen, [true], "{}", lab.nodes[1].log());
}
