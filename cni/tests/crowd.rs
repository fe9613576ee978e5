//! Many processes at once on one store, each as the plugin alone, some of them killed at any moment; then an audit: what each was
//! told is there, and nothing was told twice. `KUN_CROWD=64x10000` makes it as large as that.

#![allow(missing_docs)]

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use kun_cni::clock;
use kun_cni::ipam::{ClusterLook, IpamService, Look};
use kun_config::types::{BlockId, Slot, SlotClass};
use kun_control::{AttachmentKey, PodRef, Request, Response};

/// Processes and operations of each, in `cargo test`.
const CROWD: (usize, usize) = (16, 8);

/// What a member has at once: more is given back first. Slots are few, so that in a large crowd each has many owners.
const HELD: usize = 4;

/// 64 processes hold 256 slots at most; as many rest.
const BLOCKS: u32 = 8;

/// Where a member finds its state directory, its number and its operations.
const MEMBER: &str = "KUN_CROWD_MEMBER";

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

fn key(member: usize, n: usize) -> AttachmentKey {
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
fn allocate(directory: &Path, request: &Request) -> Response {
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
    let mut number = || words.next().unwrap().parse::<usize>().unwrap();
    let (member, operations) = (number(), number());
    let directory = Path::new(words.next().unwrap());
    let mut out = std::io::stdout();
    let mut held = VecDeque::new();
    for n in 0..operations {
        // Every third operation gives something back, and so does each that would have too much.
        if n % 3 == 2 || held.len() == HELD {
            let oldest = held.pop_front().expect("two of three take something");
            let (key, generation) = (key(member, oldest), None);
            let response = ask(directory, &Request::Release { key, generation });
            assert_eq!(response, Response::Done);
            writeln!(out, "\nreleased {oldest}").unwrap();
        } else {
            held.push_back(n);
            let allocate = Request::Allocate {
                key: key(member, n),
                pod: PodRef::default(),
                class: Some(SlotClass::Dual),
                slot: None,
                within: Vec::new(),
                delegated: false,
            };
            let answer = self::allocate(directory, &allocate);
            let Response::Allocation { allocation: a } = answer else {
                panic!("no slot: {answer:?}")
            };
            writeln!(out, "\nallocated {n} {} {}", a.slot.0, a.generation).unwrap();
        }
        out.flush().unwrap();
    }
}

fn spawn(member: usize, operations: usize, directory: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["member", "--exact", "--nocapture", "--test-threads", "1"])
        .env(
            MEMBER,
            format!("{member} {operations} {}", directory.display()),
        )
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .unwrap()
}

#[test]
fn many_processes_some_of_them_killed_and_then_an_audit() {
    let (members, operations) = std::env::var("KUN_CROWD")
        .ok()
        .and_then(|text| {
            let (members, operations) = text.split_once('x')?;
            Some((members.parse().ok()?, operations.parse().ok()?))
        })
        .unwrap_or(CROWD);
    let dir = tempfile::tempdir().unwrap();
    let blocks: Vec<BlockId> = (0..BLOCKS)
        .map(|i| BlockId::new(Slot(0x0a40_0000 + i * 64)).expect("aligned"))
        .collect();
    open(dir.path()).set_blocks(&blocks, clock::now()).unwrap();

    let mut children: Vec<Child> = (0..members)
        .map(|member| spawn(member, operations, dir.path()))
        .collect();
    // Every fourth is killed as soon as it has said something: wherever it is by then.
    let mut told: Vec<(bool, String)> = Vec::new();
    for (member, child) in children.iter_mut().enumerate() {
        let mut out = child.stdout.take().unwrap();
        let killed = member % 4 == 3;
        let mut text = Vec::new();
        if killed {
            let mut some = [0; 64];
            let n = std::io::Read::read(&mut out, &mut some).unwrap();
            text.extend_from_slice(&some[..n]);
            child.kill().unwrap();
        }
        std::io::Read::read_to_end(&mut out, &mut text).unwrap();
        let status = child.wait().unwrap();
        assert!(killed || status.success(), "member {member}: {status}");
        told.push((killed, String::from_utf8(text).unwrap()));
    }

    let service = open(dir.path());
    let live: BTreeMap<String, (u32, u64)> = service
        .live(clock::now())
        .unwrap()
        .into_iter()
        .map(|a| (a.key.container_id, (a.slot.0, a.generation)))
        .collect();
    let slots: BTreeSet<u32> = live.values().map(|(slot, _)| *slot).collect();
    assert_eq!(slots.len(), live.len(), "one slot, one attachment");
    let mut generations = BTreeSet::new();
    let mut allocations = 0;
    for (member, (killed, text)) in told.iter().enumerate() {
        let mut has: BTreeMap<usize, (u32, u64)> = BTreeMap::new();
        // A killed member's last line may be cut off.
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        for line in whole.lines() {
            let words: Vec<&str> = line.split(' ').collect();
            match words.as_slice() {
                ["allocated", n, slot, generation] => {
                    let (slot, generation) = (slot.parse().unwrap(), generation.parse().unwrap());
                    assert!(
                        generations.insert(generation),
                        "{generation} was told twice"
                    );
                    has.insert(n.parse().unwrap(), (slot, generation));
                    allocations += 1;
                }
                ["released", n] => {
                    has.remove(&n.parse().unwrap()).unwrap();
                }
                _ => {}
            }
        }
        let oldest = has.keys().next().copied();
        for (n, told) in has {
            let stored = live.get(&format!("{member}-{n}"));
            // What was on its way when it was killed may have been the release of the oldest.
            let open_end = *killed && Some(n) == oldest;
            assert!(
                stored == Some(&told) || (open_end && stored.is_none()),
                "member {member} was told {told:?} for {n}, the store has {stored:?}"
            );
        }
    }
    assert!(
        allocations > members,
        "{allocations} allocations by {members} processes"
    );
}
