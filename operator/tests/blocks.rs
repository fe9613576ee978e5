//! One contract for a node's blocks, whoever gives them: manifests in a folder, and IPAMBlock objects of a real API server. What only
//! an API server can do (two writers at once, a Node made again, a server that restarts) is tried on it alone.

#![allow(missing_docs)]

use std::fs::{self, File};
use std::process::{Command, Stdio};
use std::sync::{Arc, Barrier, Mutex};
use std::thread;
use std::time::Duration;

use kun_cluster::api::write::{WriteError, Writer};
use kun_cluster::blocks::{ApiBlocks, Blocks, BlocksError, Held, ListedBlocks, Word};
use kun_cluster::crd::Phase;
use kun_cluster::{Event, Following, Kind, ObjectName, Resource, Source, Store, Wanted};
use kun_config::ClusterSource;
use kun_config::types::SlotClass;
use kun_harness::control_plane::{ControlPlane, Part};
use kun_harness::{Process, wait_for};
use serde_json::{Value, json};

/// A server restarts in seconds and a watch waits up to half a minute; a busy machine takes its time.
const SOON: Duration = Duration::from_secs(90);

const NODE: &str = "node-a";

/// A block as a person or the operator writes it.
fn manifest(first: &str, node: &str, uid: Option<&str>, more: &str) -> String {
    let name = first.replace('.', "-");
    let uid = uid.map_or(String::new(), |uid| format!(", nodeUID: {uid}"));
    format!(
        "---\napiVersion: kun.network/v1alpha1\nkind: IPAMBlock\nmetadata: {{name: block-{name}}}\nspec: {{first: {first}, node: {node}{uid}{more}}}\n"
    )
}

/// Something that blocks come from, and what it has told so far.
struct Ground {
    store: Arc<Mutex<Store>>,
    blocks: Box<dyn Blocks>,
    _following: Following,
    at: At,
}

enum At {
    Folder(tempfile::TempDir),
    Api(Box<ControlPlane>),
}

fn follow(source: &ClusterSource) -> (Arc<Mutex<Store>>, Following) {
    let store = Arc::new(Mutex::new(Store::new()));
    let seen = Arc::clone(&store);
    let wanted = Wanted::new()
        .of_node(Kind::Node, NODE)
        .of_node(Kind::IpamBlock, NODE);
    let following = Source::open(source)
        .unwrap()
        .follow(wanted, move |event| {
            if let Event::Deltas(deltas) = event {
                let mut store = seen.lock().unwrap();
                for delta in deltas {
                    store.apply(delta);
                }
            }
            true
        })
        .unwrap();
    (store, following)
}

impl Ground {
    fn folder() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (store, following) = follow(&ClusterSource::Folder(dir.path().to_owned()));
        Self {
            store,
            blocks: Box::new(ListedBlocks::new(NODE)),
            _following: following,
            at: At::Folder(dir),
        }
    }

    fn api() -> Option<Self> {
        // Nodes here have no kubelet.
        let plane = ControlPlane::builder()?
            .controller_flags(&["--controllers=*,-node-lifecycle-controller"])
            .start()
            .unwrap_or_else(|e| panic!("{e:#}"));
        let crds = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/crds");
        for words in [
            &["apply", "--server-side", "-k", crds][..],
            &[
                "wait",
                "--for=condition=Established",
                "crd",
                "--all",
                "--timeout=60s",
            ],
        ] {
            plane.kubectl(words, "").unwrap();
        }
        let kubeconfig = Some(plane.kubeconfig().to_owned());
        let writer = Writer::open(kubeconfig.as_deref()).unwrap();
        let (store, following) = follow(&ClusterSource::Kubernetes { kubeconfig });
        let ground = Self {
            store,
            blocks: Box::new(ApiBlocks::new(NODE, writer)),
            _following: following,
            at: At::Api(Box::new(plane)),
        };
        ground.put(
            "node",
            &format!("apiVersion: v1\nkind: Node\nmetadata: {{name: {NODE}}}\n"),
        );
        Some(ground)
    }

    fn plane(&self) -> &ControlPlane {
        match &self.at {
            At::Api(plane) => plane,
            At::Folder(_) => panic!("a folder has none"),
        }
    }

    fn writer(&self) -> Writer {
        Writer::open(Some(self.plane().kubeconfig())).unwrap()
    }

    /// Objects, in a file of this name.
    fn put(&self, name: &str, text: &str) {
        match &self.at {
            At::Folder(dir) => {
                // Renamed into place: a half is never read.
                let (new, path) = (
                    dir.path().join(".new"),
                    dir.path().join(name.to_owned() + ".yaml"),
                );
                fs::write(&new, text).unwrap();
                fs::rename(new, path).unwrap();
            }
            At::Api(plane) => {
                let words = ["apply", "--server-side", "--force-conflicts", "-f", "-"];
                plane.kubectl(&words, text).unwrap();
            }
        }
    }

    /// metadata.uid of the node; `None` in a folder.
    fn uid(&self) -> Option<String> {
        match &self.at {
            At::Folder(_) => None,
            At::Api(_) => {
                let node = self.object(Kind::Node, NODE);
                Some(node["metadata"]["uid"].as_str().unwrap().to_owned())
            }
        }
    }

    fn object(&self, kind: Kind, name: &str) -> Value {
        let name = ObjectName::new("", name);
        self.writer().get(Resource::of(kind), &name).unwrap()
    }

    fn owned(&self) -> Vec<Held> {
        self.blocks.owned(&self.store.lock().unwrap())
    }

    /// First slot, epoch, draining, phase of each, once they are what is awaited.
    fn becomes(&self, what: &[(&str, i64, bool, Phase)]) -> Vec<Held> {
        let last = Mutex::new(Vec::new());
        wait_for("the blocks", SOON, || {
            let owned = self.owned();
            let found: Vec<_> = owned
                .iter()
                .map(|h| (h.block.first().to_string(), h.epoch, h.draining, h.phase))
                .collect();
            let same = found.len() == what.len()
                && found
                    .iter()
                    .zip(what)
                    .all(|(f, w)| (&*f.0, f.1, f.2, f.3) == *w);
            *last.lock().unwrap() = found;
            same.then_some(owned)
        })
        .unwrap_or_else(|e| {
            panic!(
                "{e:#}: {:?} where {what:?} was awaited",
                last.lock().unwrap()
            )
        })
    }
}

fn both() -> impl Iterator<Item = Ground> {
    [Some(Ground::folder()), Ground::api()]
        .into_iter()
        .flatten()
}

const OTHER: &str = "00000000-0000-4000-8000-00000000000b";

#[test]
fn the_contract() {
    for ground in both() {
        let uid = ground.uid();
        let api = uid.is_some();
        let uid = uid.as_deref();
        // A list waits for no word: what stands in it is the node's.
        let fresh = if api {
            Phase::Pending
        } else {
            Phase::Confirmed
        };
        // What a node owns: what names it, by name and uid.
        ground.put(
            "blocks",
            &(manifest("10.64.0.0", NODE, uid, "")
                + &manifest("10.64.0.64", "node-b", Some(OTHER), "")
                + &manifest("10.64.0.128", NODE, Some(OTHER), "")),
        );
        let owned = ground.becomes(&[("10.64.0.0", 1, false, fresh)]);
        let first = &owned[0];
        assert_eq!(first.is_counted(), api);
        // It takes it, and says how full it is.
        let word = Word {
            allocated: 3,
            cooling: 2,
            wanted: None,
        };
        ground.blocks.tell(first, Phase::Confirmed, word).unwrap();
        let owned = ground.becomes(&[("10.64.0.0", 1, false, Phase::Confirmed)]);
        if api {
            assert_eq!(owned[0].word, word, "as answered, before any watch tells");
        }
        // One more: asked for, or by hand.
        match ground.blocks.want(&owned, SlotClass::Dual, 2) {
            Ok(()) => assert_eq!(ground.owned()[0].word.wanted, Some(2)),
            Err(error) => {
                assert!(!api, "{error}");
                assert!(error.to_string().contains("add an IPAMBlock"), "{error}");
            }
        }
        assert!(ground.blocks.want(&owned, SlotClass::V6Only, 1).is_err());
        ground.put("more", &manifest("10.64.1.0", NODE, uid, ""));
        let owned = ground.becomes(&[
            ("10.64.0.0", 1, false, Phase::Confirmed),
            ("10.64.1.0", 1, false, fresh),
        ]);
        let second = owned.into_iter().nth(1).unwrap();
        ground
            .blocks
            .tell(&second, Phase::Confirmed, Word::default())
            .unwrap();
        // Called back, and returned.
        ground.put(
            "more",
            &manifest("10.64.1.0", NODE, uid, ", draining: true"),
        );
        let owned = ground.becomes(&[
            ("10.64.0.0", 1, false, Phase::Confirmed),
            ("10.64.1.0", 1, true, Phase::Confirmed),
        ]);
        for phase in [Phase::Draining, Phase::Drained] {
            let latest = ground
                .owned()
                .into_iter()
                .find(|h| h.block == owned[1].block);
            ground
                .blocks
                .tell(&latest.unwrap(), phase, Word::default())
                .unwrap();
        }
        if api {
            ground.becomes(&[
                ("10.64.0.0", 1, false, Phase::Confirmed),
                ("10.64.1.0", 1, true, Phase::Drained),
            ]);
        }
        // Another's.
        ground.put(
            "more",
            &manifest("10.64.1.0", "node-b", Some(OTHER), ", epoch: 2"),
        );
        ground.becomes(&[("10.64.0.0", 1, false, Phase::Confirmed)]);
        // Back under a higher epoch: what was said under the lower one says nothing.
        ground.put("more", &manifest("10.64.1.0", NODE, uid, ", epoch: 3"));
        ground.becomes(&[
            ("10.64.0.0", 1, false, Phase::Confirmed),
            ("10.64.1.0", 3, false, fresh),
        ]);
    }
}

/// Runs both at the same moment.
fn race<T: Send>(one: impl FnOnce() -> T + Send, two: impl FnOnce() -> T + Send) -> (T, T) {
    let start = Barrier::new(2);
    thread::scope(|scope| {
        let one = scope.spawn(|| {
            start.wait();
            one()
        });
        start.wait();
        let two = two();
        (one.join().unwrap(), two)
    })
}

const ROUNDS: u32 = 16;

#[test]
fn of_two_that_write_at_once_one_is_refused() {
    let Some(ground) = Ground::api() else {
        return;
    };
    let uid = ground.uid().unwrap();
    let resource = Resource::of(Kind::IpamBlock);
    let (one, two) = (ground.writer(), ground.writer());
    let mut confirmed = 0;
    for round in 0..ROUNDS {
        let first = format!("10.64.{round}.0");
        let name = format!("block-10-64-{round}-0");
        // Two claim one block.
        let claim = |node: &str, uid: &str| json!({"metadata": {"name": name}, "spec": {"first": first, "node": node, "nodeUID": uid}});
        let (mine, theirs) = (claim(NODE, &uid), claim("node-b", OTHER));
        let (a, b) = race(
            || one.create(resource, &mine),
            || two.create(resource, &theirs),
        );
        let refused = match (&a, &b) {
            (Ok(_), Err(error)) | (Err(error), Ok(_)) => error,
            both => panic!("{both:?}"),
        };
        assert!(matches!(refused, WriteError::Exists { .. }), "{refused}");
        let name = ObjectName::new("", &name);
        if b.is_ok() {
            // Handed over, so that there is something to confirm.
            let version = &b.unwrap()["metadata"]["resourceVersion"];
            let patch = json!({"metadata": {"resourceVersion": version}, "spec": {"node": NODE, "nodeUID": uid, "epoch": 2}});
            one.patch(resource, &name, &patch).unwrap();
        }
        let held = wait_for("the block", SOON, || {
            let owned = ground.owned().into_iter();
            owned
                .into_iter()
                .find(|h| h.block.first().to_string() == first)
        })
        .unwrap();
        // The owner confirms what the operator takes away, from the same version.
        let object = one.get(resource, &name).unwrap();
        let away = json!({
            "metadata": {"resourceVersion": object["metadata"]["resourceVersion"]},
            "spec": {"node": "node-b", "nodeUID": OTHER, "epoch": held.epoch + 1},
        });
        let (told, taken) = race(
            || {
                ground
                    .blocks
                    .tell(&held, Phase::Confirmed, Word::default())
                    .map_err(|e| e.to_string())
            },
            || {
                one.patch(resource, &name, &away)
                    .map(drop)
                    .map_err(|e| e.to_string())
            },
        );
        assert_ne!(told.is_ok(), taken.is_ok(), "{told:?} {taken:?}");
        confirmed += u32::from(told.is_ok());
        let object = one.get(resource, &name).unwrap();
        let owner = if told.is_ok() { NODE } else { "node-b" };
        assert_eq!(object["spec"]["node"], owner);
        assert_eq!(object["status"]["phase"] == "Confirmed", told.is_ok());
        // From a view that is old: refused, and nothing changed.
        let again = ground.blocks.tell(&held, Phase::Drained, Word::default());
        assert!(
            matches!(again, Err(BlocksError::Overtaken { .. })),
            "{again:?}"
        );
        assert_eq!(one.get(resource, &name).unwrap(), object);
    }
    println!("{confirmed} of {ROUNDS} confirmations were faster");
}

#[test]
fn a_server_that_restarts_and_a_node_made_again() {
    let Some(mut ground) = Ground::api() else {
        return;
    };
    let uid = ground.uid().unwrap();
    ground.put("blocks", &manifest("10.64.0.0", NODE, Some(&uid), ""));
    let held = ground.becomes(&[("10.64.0.0", 1, false, Phase::Pending)]);
    let At::Api(plane) = &mut ground.at else {
        unreachable!("it is an API server");
    };
    plane.kill(Part::ApiServer).unwrap();
    let told = ground
        .blocks
        .tell(&held[0], Phase::Confirmed, Word::default());
    assert!(matches!(told, Err(BlocksError::Away { .. })), "{told:?}");
    // What was known stays known.
    ground.becomes(&[("10.64.0.0", 1, false, Phase::Pending)]);
    let At::Api(plane) = &mut ground.at else {
        unreachable!("it is an API server");
    };
    plane.start(Part::ApiServer, &[]).unwrap();
    wait_for("the word", SOON, || {
        let held = ground.owned();
        ground
            .blocks
            .tell(&held[0], Phase::Confirmed, Word::default())
            .ok()
    })
    .unwrap();
    ground.becomes(&[("10.64.0.0", 1, false, Phase::Confirmed)]);
    // The Node under its name is another: the block is not its own, though the name is.
    ground
        .plane()
        .kubectl(&["delete", "node", NODE], "")
        .unwrap();
    ground.put(
        "node",
        &format!("apiVersion: v1\nkind: Node\nmetadata: {{name: {NODE}}}\n"),
    );
    assert_ne!(ground.uid().unwrap(), uid);
    ground.becomes(&[]);
}

/// The whole way: a node asks, the operator gives, the node returns, the operator gives it to another, and takes nothing that was confirmed.
#[test]
fn the_operator_gives_what_is_asked_for_and_takes_what_is_returned() {
    let Some(ground) = Ground::api() else {
        return;
    };
    let config = ground.plane().dir().join("operator.yaml");
    let kubeconfig = ground.plane().kubeconfig().display();
    fs::write(
        &config,
        format!("cluster: {{kubernetes: {{kubeconfig: {kubeconfig}}}}}\noperator: {{metrics: \"off\"}}\nipam: {{cooldown: 1s}}\n"),
    )
    .unwrap();
    let log = ground.plane().dir().join("operator.log");
    let mut command = Command::new(env!("CARGO_BIN_EXE_kun-operator"));
    command
        .arg("--config")
        .arg(config)
        .env_remove("RUST_LOG")
        .stdout(Stdio::null())
        .stderr(File::create(&log).unwrap());
    // Three dual blocks in all.
    ground.put(
        "pool",
        "{apiVersion: kun.network/v1alpha1, kind: IPPool, metadata: {name: main}, spec: {pods: [10.64.0.0/25, 10.65.0.0/26, 240.0.0.0/25]}}",
    );
    let _operator = Process::spawn(&mut command).unwrap();
    let dual = |ground: &Ground| -> Vec<Held> {
        let owned = ground.owned().into_iter();
        owned
            .filter(|h| h.block.class() == SlotClass::Dual)
            .collect()
    };
    let confirm = |count: usize| {
        wait_for("blocks, confirmed", SOON, || {
            for held in ground.owned().iter().filter(|h| h.phase == Phase::Pending) {
                // Overtaken: looked at again.
                let _ = ground.blocks.tell(held, Phase::Confirmed, Word::default());
            }
            let held = dual(&ground);
            let all = held.iter().all(|h| h.phase == Phase::Confirmed);
            (held.len() == count && all).then_some(held)
        })
        .unwrap_or_else(|e| panic!("{e:#}\n{}", fs::read_to_string(&log).unwrap()))
    };
    let one = confirm(1);
    ground.blocks.want(&one, SlotClass::Dual, 2).unwrap();
    let two = confirm(2);
    // Said twice it is one wish.
    ground.blocks.want(&two, SlotClass::Dual, 2).unwrap();
    // More than there is: said where people look.
    ground
        .blocks
        .want(&dual(&ground), SlotClass::Dual, 4)
        .unwrap();
    let three = confirm(3);
    wait_for("the shortage", SOON, || {
        let pool = ground.object(Kind::IpPool, "main");
        let conditions = pool["status"]["conditions"].as_array()?;
        let exhausted = conditions.iter().find(|c| c["type"] == "Exhausted")?;
        (exhausted["status"] == "True"
            && exhausted["message"]
                .as_str()?
                .contains("node-a has 3 of 4 dual blocks"))
        .then_some(())
    })
    .unwrap();
    // Another node wants its first one. There is none, and nothing is taken for it.
    ground.put(
        "b",
        "apiVersion: v1\nkind: Node\nmetadata: {name: node-b}\n",
    );
    wait_for("the other's shortage", SOON, || {
        let log = fs::read_to_string(&log).unwrap();
        log.contains("node node-b has 0 of 1 dual").then_some(())
    })
    .unwrap();
    assert_eq!(dual(&ground).len(), 3);
    // One is returned: it is the other's, in the next epoch.
    ground.blocks.want(&three, SlotClass::Dual, 2).unwrap();
    let last = dual(&ground).pop().unwrap();
    ground
        .blocks
        .tell(&last, Phase::Drained, Word::default())
        .unwrap();
    let name = format!("block-{}", last.block.first().to_string().replace('.', "-"));
    wait_for("the heir", SOON, || {
        let block = ground.object(Kind::IpamBlock, &name);
        (block["spec"]["node"] == "node-b" && block["spec"]["epoch"] == 2).then_some(())
    })
    .unwrap_or_else(|e| panic!("{e:#}\n{}", fs::read_to_string(&log).unwrap()));
    // One that a person calls back moves only when its owner has let go.
    let held = wait_for("the watch", SOON, || {
        let held = dual(&ground);
        (held.len() == 2).then_some(held)
    })
    .unwrap();
    let called = &held[1];
    let name = format!(
        "block-{}",
        called.block.first().to_string().replace('.', "-")
    );
    let patch = json!({"spec": {"draining": true}}).to_string();
    ground
        .plane()
        .kubectl(
            &["patch", "ipamblock", &name, "--type=merge", "-p", &patch],
            "",
        )
        .unwrap();
    let called = wait_for("the call", SOON, || {
        dual(&ground).into_iter().find(|h| h.draining)
    })
    .unwrap();
    ground
        .blocks
        .tell(&called, Phase::Draining, called.word)
        .unwrap();
    let called = wait_for("its own word", SOON, || {
        dual(&ground)
            .into_iter()
            .find(|h| h.phase == Phase::Draining)
    })
    .unwrap();
    assert_eq!(ground.object(Kind::IpamBlock, &name)["spec"]["epoch"], 1);
    ground
        .blocks
        .tell(&called, Phase::Drained, Word::default())
        .unwrap();
    // node-a wants two and has one: the block is its own again, under a new epoch.
    wait_for("the next epoch", SOON, || {
        let block = ground.object(Kind::IpamBlock, &name);
        (block["spec"]["epoch"] == 2 && block["spec"]["draining"] != true).then_some(())
    })
    .unwrap_or_else(|e| panic!("{e:#}\n{}", fs::read_to_string(&log).unwrap()));
}
