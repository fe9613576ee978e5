//! The folder source against a writer that never waits: files written in any order, objects that stand in two files or move from one
//! to another, mounts swapped in quick succession. Whatever it sees of that, nothing is invented, nothing that was there all the
//! time is lost in between, and in the end it says what a fresh reading says.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use kun_cluster::folder::{FolderSource, Following};
use kun_cluster::{Delta, Event, Kind, Object, ObjectName};
use proptest::prelude::*;

/// Longer than any scan; a source that is still wrong then stays so.
const WITHIN: Duration = Duration::from_secs(20);

/// The object that is somewhere all the time.
const KEPT: u8 = 0;

const FILES: u8 = 4;

/// Services by number, and their ports.
type Content = BTreeMap<u8, u16>;

#[derive(Debug, Clone)]
enum Step {
    Write(u8, Content),
    Remove(u8),
    /// The kept object goes to this file: written there first, then taken from where it was.
    Move(u8),
    /// Both files of the mount at once.
    Swap(Content, Content),
}

fn content() -> impl Strategy<Value = Content> {
    // The kept object's number is never drawn; the others collide often.
    prop::collection::btree_map(KEPT + 1..5, 1_u16..4, 0..4)
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (0..FILES, content()).prop_map(|(file, content)| Step::Write(file, content)),
        1 => (0..FILES).prop_map(Step::Remove),
        4 => (0..FILES).prop_map(Step::Move),
        1 => (content(), content()).prop_map(|(a, b)| Step::Swap(a, b)),
    ]
}

/// Writes the folder, and remembers what was ever in it.
struct Folder<'a> {
    root: &'a Path,
    files: BTreeMap<u8, Content>,
    kept_in: u8,
    swaps: u32,
    ever: BTreeSet<(u8, u16)>,
}

impl<'a> Folder<'a> {
    /// With the kept object in the first file, and an empty mount.
    fn new(root: &'a Path) -> Self {
        let mut folder = Self {
            root,
            files: BTreeMap::new(),
            kept_in: 0,
            swaps: 0,
            ever: BTreeSet::new(),
        };
        folder.write(0, Content::from([(KEPT, 1)]));
        fs::create_dir(root.join("mount")).unwrap();
        folder.swap([Content::new(), Content::new()]);
        for name in ["a.yaml", "b.yaml"] {
            symlink(format!("..data/{name}"), root.join("mount").join(name)).unwrap();
        }
        folder
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Write(file, mut content) => {
                if file == self.kept_in {
                    content.insert(KEPT, 1);
                }
                self.write(file, content);
            }
            Step::Remove(file) if file == self.kept_in => {
                self.write(file, Content::from([(KEPT, 1)]));
            }
            Step::Remove(file) => {
                if self.files.remove(&file).is_some() {
                    fs::remove_file(self.path(file)).unwrap();
                }
            }
            Step::Move(file) if file == self.kept_in => {}
            Step::Move(file) => {
                let mut to = self.files.get(&file).cloned().unwrap_or_default();
                to.insert(KEPT, 1);
                self.write(file, to);
                let mut from = self.files.remove(&self.kept_in).unwrap();
                from.remove(&KEPT);
                self.write(self.kept_in, from);
                self.kept_in = file;
            }
            Step::Swap(a, b) => self.swap([a, b]),
        }
    }

    fn path(&self, file: u8) -> std::path::PathBuf {
        self.root.join(format!("{file}.yaml"))
    }

    fn write(&mut self, file: u8, content: Content) {
        let new = self.root.join(".new");
        fs::write(&new, self.text(&content)).unwrap();
        fs::rename(&new, self.path(file)).unwrap();
        self.files.insert(file, content);
    }

    fn swap(&mut self, files: [Content; 2]) {
        self.swaps += 1;
        let (mount, version) = (self.root.join("mount"), format!("..{}", self.swaps));
        let below = mount.join(&version);
        fs::create_dir(&below).unwrap();
        for (name, content) in ["a.yaml", "b.yaml"].iter().zip(&files) {
            fs::write(below.join(name), self.text(content)).unwrap();
        }
        symlink(&version, mount.join("..new")).unwrap();
        fs::rename(mount.join("..new"), mount.join("..data")).unwrap();
    }

    fn text(&mut self, content: &Content) -> String {
        self.ever.extend(content.iter().map(|(n, p)| (*n, *p)));
        let documents = content.iter().map(|(name, port)| {
            format!("apiVersion: v1\nkind: Service\nmetadata: {{name: s{name}}}\nspec: {{ports: [{{port: {port}}}]}}\n---\n")
        });
        documents.collect()
    }
}

/// What a source has told.
#[derive(Default)]
struct Told {
    objects: BTreeMap<(Kind, ObjectName), Object>,
    upserted: BTreeSet<(String, u16)>,
    kept_was_lost: bool,
}

impl Told {
    fn take(&mut self, event: Event) {
        let Event::Deltas(deltas) = event else {
            return;
        };
        for delta in deltas {
            match delta {
                Delta::Upsert(object) => {
                    if let Object::Service(service) = &object {
                        let port = service.ports[0].port;
                        self.upserted
                            .insert((object.meta().name.name.to_string(), port));
                    }
                    self.objects.insert(object.key(), object);
                }
                Delta::Remove(kind, name) => {
                    self.kept_was_lost |= *name.name == *format!("s{KEPT}");
                    let known = self.objects.remove(&(kind, name.clone()));
                    assert!(known.is_some(), "{name} removed, and was never told");
                }
            }
        }
    }
}

fn fresh(root: &Path) -> Told {
    let mut source = FolderSource::open(root).unwrap();
    let mut told = Told::default();
    loop {
        match source.next_event() {
            Event::Synced => return told,
            event => told.take(event),
        }
    }
}

fn follow(root: &Path) -> (Following, Receiver<Event>) {
    let (sender, events) = channel();
    let source = FolderSource::open(root).unwrap();
    let following = source
        .spawn(move |event| sender.send(event).is_ok())
        .unwrap();
    (following, events)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn nothing_is_lost_and_nothing_invented(steps in prop::collection::vec(step(), 1..60)) {
        let dir = tempfile::tempdir().unwrap();
        let mut folder = Folder::new(dir.path());
        let (_following, events) = follow(dir.path());
        let mut told = Told::default();
        for event in events.iter() {
            let synced = event == Event::Synced;
            told.take(event);
            if synced {
                break;
            }
        }
        for step in steps {
            folder.take(step);
        }
        let last = fresh(dir.path());
        let end = Instant::now() + WITHIN;
        while told.objects != last.objects {
            let left = end.saturating_duration_since(Instant::now());
            match events.recv_timeout(left) {
                Ok(event) => told.take(event),
                Err(_) => break,
            }
        }
        prop_assert_eq!(&told.objects, &last.objects, "not what a fresh reading says");
        let invented: Vec<_> = told
            .upserted
            .iter()
            .filter(|(name, port)| !folder.ever.iter().any(|(n, p)| *name == format!("s{n}") && p == port))
            .collect();
        prop_assert!(invented.is_empty(), "invented: {invented:?}");
        prop_assert!(!told.kept_was_lost, "an object that was in some file all the time was lost in between");
    }
}
