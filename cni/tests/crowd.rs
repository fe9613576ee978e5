//! Many processes at once on one store, each as the plugin alone, some of them killed, many of these while they have the store; then an audit:
//! what each was told is there, and nothing was anybody's before it was given back. `KUN_CROWD=64x10000` makes it as large as that.

#![allow(missing_docs)]

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use kun_cni::clock;
use kun_cni::ipam::{ClusterLook, IpamService, Look};
use kun_config::types::{BlockId, Slot, SlotClass};
use kun_control::{AttachmentKey, PodRef, Request, Response};
use kun_harness::crowd::{self, Crowd};

/// Processes, operations of each, and kills of each that is killed, in `cargo test`.
const CROWD: (usize, usize, usize) = (16, 16, 2);

/// 64 processes hold 256 slots at most, and those killed leave some behind; as many rest.
const BLOCKS: u32 = 12;

/// Where a member finds its state directory, its name and its operations.
const MEMBER: &str = "KUN_CROWD_MEMBER";

/// A process has the store once in so many operations of all.
const HAS_IT_WITHIN: Duration = Duration::from_secs(2);

fn config() -> kun_config::Config {
    let text = "node: {name: n}\ncluster: {folder: /nonexistent}\nipam: {v4Pools: [10.64.0.0/14], cooldown: 0s}\n";
    kun_config::parse("kun.yaml", text).unwrap()
}

fn open(directory: &Path) -> IpamService {
    let boot = clock::boot().unwrap();
    // A hundred wait for one another here, on a busy machine.
    let patience = Duration::from_secs(300);
    IpamService::open_within(directory, &config(), boot, clock::now(), patience).unwrap()
}

fn key(member: &str, n: usize) -> AttachmentKey {
    AttachmentKey {
        network: "kun".into(),
        container_id: format!("{member}-{n}"),
        ifname: "eth0".into(),
    }
}

/// Every operation opens the store, asks, closes it, and only then says what it was told.
fn ask(directory: &Path, request: &Request) -> Response {
    open(directory).handle(request, clock::now())
}

/// A slot; where none is free for want of evidence, nothing is found to know the resting ones, as the plugin alone would find it.
fn allocate_one(directory: &Path, request: &Request) -> Response {
    let service = open(directory);
    let answer = service.handle(request, clock::now());
    if !matches!(answer, Response::Exhausted { .. }) {
        return answer;
    }
    let released = service.unforgotten(clock::now()).unwrap();
    let looks = released.iter().map(|slot| Look {
        slot: slot.slot,
        sequence: slot.sequence,
        node: Some(Vec::new()),
        cluster: Some(ClusterLook {
            held: Vec::new(),
            revision: None,
        }),
    });
    service
        .observe(looks.collect(), None, clock::now())
        .unwrap();
    service.handle(request, clock::now())
}

/// Not a test by itself: what the processes of the crowd run.
#[test]
fn member() {
    let Ok(text) = std::env::var(MEMBER) else {
        return;
    };
    let mut words = text.splitn(3, ' ');
    let mut word = || words.next().unwrap();
    let (member, operations, directory) = (word(), word().parse().unwrap(), Path::new(word()));
    let take = |n| {
        let allocate = Request::Allocate {
            key: key(member, n),
            pod: PodRef::default(),
            class: Some(SlotClass::Dual),
            slot: None,
            within: Vec::new(),
            delegated: false,
            ports: Vec::new(),
        };
        match allocate_one(directory, &allocate) {
            Response::Allocation { allocation: a } => (a.slot.0, a.generation),
            answer => panic!("no slot: {answer:?}"),
        }
    };
    let give = |n| {
        let (key, generation) = (key(member, n), None);
        let response = ask(directory, &Request::Release { key, generation });
        assert_eq!(response, Response::Done);
    };
    crowd::act(operations, take, give);
}

#[test]
fn many_processes_some_of_them_killed_and_then_an_audit() {
    let (members, operations, kills) = CROWD;
    let dir = tempfile::tempdir().unwrap();
    let blocks: Vec<BlockId> = (0..BLOCKS)
        .map(|i| BlockId::new(Slot(0x0a40_0000 + i * 64)).expect("aligned"))
        .collect();
    open(dir.path()).set_blocks(&blocks, clock::now()).unwrap();

    let crowd = Crowd::sized(members, operations, kills);
    let start = |name: &str, operations| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["member", "--exact", "--nocapture", "--test-threads", "1"])
            .env(
                MEMBER,
                format!("{name} {operations} {}", dir.path().display()),
            );
        command
    };
    // The first kill of each meets a process that has the store, the others mostly one that waits for it.
    let moment = |pid, nth| {
        if nth == 0 {
            crowd::has_a_lock(pid, HAS_IT_WITHIN);
        }
    };
    let told = crowd.run(start, moment).unwrap();
    let live: BTreeMap<String, (u32, u64)> = open(dir.path())
        .live(clock::now())
        .unwrap()
        .into_iter()
        .map(|a| (a.key.container_id, (a.slot.0, a.generation)))
        .collect();
    let found = crowd::audit(&told, &live).unwrap();
    println!("{found:?}");
    assert!(found.allocations > crowd.members, "{found:?}");
}
