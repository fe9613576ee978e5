//! Many processes at once on the socket of a real agent, which is killed and started again in their midst, as some of them are; then an
//! audit: what each was told is in the store, and nothing was anybody's before it was given back. `KUN_CROWD=64x10000` makes it as large as that.

#![allow(missing_docs)]

mod rig;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::sync::mpsc;
use std::time::Duration;

use kun_cni::clock;
use kun_cni::ipam::IpamService;
use kun_config::types::SlotClass;
use kun_control::{AttachmentKey, Client, PodRef, Request, Response};
use kun_harness::crowd::{self, Crowd};
use kun_harness::wait_for;
use rig::Node;
use serde_json::{Value, json};

/// Processes, operations of each, and kills of each that is killed, in `cargo test`.
const CROWD: (usize, usize, usize) = (16, 64, 4);

/// After so many killed clients the agent is killed.
const AGENT_EVERY: usize = 4;

/// Slots come back every five seconds, when the agent looks. So few that they come back in a small crowd, and so many that a large one does
/// not wait for them.
const OPERATIONS_A_BLOCK: usize = 256;
const BLOCKS: (usize, usize) = (4, 256);

/// Where a member finds the socket, its name and its operations.
const MEMBER: &str = "KUN_CROWD_MEMBER";

/// A killed agent is back in seconds, on a busy machine in tens of them; a slot that rests comes back within two looks.
const ANSWERS_WITHIN: Duration = Duration::from_secs(120);

/// Who asks the agent as a runtime does: what broke off is asked again.
struct Asker<'a> {
    socket: &'a Path,
    client: Option<Client>,
}

impl Asker<'_> {
    fn once(&mut self, request: &Request) -> Option<Response> {
        let mut client = match self.client.take() {
            Some(client) => client,
            None => Client::connect(self.socket).ok()?,
        };
        let answer = client.ask(request).ok()?;
        self.client = Some(client);
        Some(answer)
    }

    /// The first answer that is neither lost nor a refusal for want of free slots.
    fn ask(&mut self, request: &Request) -> Response {
        wait_for("an answer", ANSWERS_WITHIN, || {
            let answer = self.once(request)?;
            (!matches!(answer, Response::Exhausted { .. })).then_some(answer)
        })
        .unwrap()
    }
}

/// Not a test by itself: what the processes of the crowd run.
#[test]
fn member() {
    let Ok(text) = std::env::var(MEMBER) else {
        return;
    };
    let mut words = text.splitn(3, ' ');
    let mut word = || words.next().unwrap();
    let (member, operations, socket) = (word(), word().parse().unwrap(), Path::new(word()));
    let key = |n: usize| AttachmentKey {
        network: "kun".into(),
        container_id: format!("{member}-{n}"),
        ifname: "eth0".into(),
    };
    let asker = std::cell::RefCell::new(Asker {
        socket,
        client: None,
    });
    let take = |n| {
        let allocate = Request::Allocate {
            key: key(n),
            pod: PodRef::default(),
            class: Some(SlotClass::Dual),
            slot: None,
            within: Vec::new(),
            // Else it would be let go again, for want of an interface.
            delegated: true,
            ports: Vec::new(),
        };
        match asker.borrow_mut().ask(&allocate) {
            Response::Allocation { allocation: a } => (a.slot.0, a.generation),
            answer => panic!("no slot: {answer:?}"),
        }
    };
    let give = |n| {
        let (key, generation) = (key(n), None);
        let answer = asker
            .borrow_mut()
            .ask(&Request::Release { key, generation });
        assert_eq!(answer, Response::Done);
    };
    crowd::act(operations, take, give);
}

fn block(number: usize) -> Value {
    let (third, fourth) = (number / 4, number % 4 * 64);
    json!({"apiVersion": "kun.network/v1alpha1", "kind": "IPAMBlock",
        "metadata": {"name": format!("block-10-64-{third}-{fourth}")},
        "spec": {"first": format!("10.64.{third}.{fourth}"), "node": "node-a"}})
}

#[test]
fn many_processes_and_an_agent_that_is_killed_and_then_an_audit() {
    let Some(mut node) = Node::prepare("crowd") else {
        return;
    };
    let (members, operations, kills) = CROWD;
    let crowd = Crowd::sized(members, operations, kills);
    let blocks = (crowd.members * crowd.operations / OPERATIONS_A_BLOCK).clamp(BLOCKS.0, BLOCKS.1);
    // The first one is the node's already.
    let more: Vec<Value> = (1..blocks).map(block).collect();
    node.manifest("blocks.yaml", &more);
    node.configure(|config| config["ipam"]["cooldown"] = json!("0s"));
    node.spawn();

    let socket = node.path("agent.sock");
    let (killed, kills) = mpsc::channel();
    let told = std::thread::scope(|scope| {
        let run = scope.spawn(move || {
            let start = |name: &str, operations| {
                let mut command = Command::new(std::env::current_exe().unwrap());
                command
                    .args(["member", "--exact", "--nocapture", "--test-threads", "1"])
                    .env(MEMBER, format!("{name} {operations} {}", socket.display()));
                command
            };
            let moment = |_, _| killed.send(()).unwrap();
            crowd.run(start, moment)
        });
        let mut agents = 0;
        for n in 1.. {
            if kills.recv().is_err() {
                break;
            }
            if n % AGENT_EVERY == 0 {
                node.kill();
                node.spawn();
                agents += 1;
            }
        }
        println!("{agents} agents were killed");
        assert!(agents > 1, "{agents} agents were killed");
        run.join().unwrap().unwrap()
    });
    node.terminate();

    let text = std::fs::read_to_string(node.path("kun.yaml")).unwrap();
    let config = kun_config::parse("kun.yaml", &text).unwrap();
    let (boot, now) = (clock::boot().unwrap(), clock::now());
    let store = IpamService::open(&config.agent.state_dir, &config, boot, now).unwrap();
    let live: BTreeMap<String, (u32, u64)> = store
        .live(now)
        .unwrap()
        .into_iter()
        .map(|a| (a.key.container_id, (a.slot.0, a.generation)))
        .collect();
    let found = crowd::audit(&told, &live).unwrap();
    println!("{found:?}");
    assert!(found.allocations > found.slots, "{found:?}");
}
