//! Inotify on every folder of the walk, and on the parent of the root, so that a swap of the root itself is seen. Says when to
//! look and which files to read; reads nothing.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use notify::event::{AccessKind, AccessMode, CreateKind, ModifyKind};
use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher};

/// Past this many named files the next scan reads all of them.
const MAX_NAMED: usize = 10_000;

/// A file that is being written this long without being closed is read as it stands.
const WRITE_WITHIN: Duration = Duration::from_secs(5);

/// Why to look.
#[derive(Debug, Clone, Default)]
pub(super) struct Wake {
    /// Read every file, whatever its times say.
    pub(super) all: bool,
    /// Read these.
    pub(super) dirty: HashSet<PathBuf>,
    /// Leave these as they were: somebody is writing them, and closing them wakes us.
    pub(super) writing: HashSet<PathBuf>,
    /// Do nothing more.
    pub(super) stopped: bool,
}

impl Wake {
    pub(super) fn everything() -> Self {
        Self {
            all: true,
            ..Self::default()
        }
    }
}

#[derive(Debug, Default)]
struct Pending {
    all: bool,
    looked_for: bool,
    dirty: HashSet<PathBuf>,
    writing: HashMap<PathBuf, Instant>,
    stopped: bool,
}

#[derive(Debug, Default)]
struct Shared {
    pending: Mutex<Pending>,
    woken: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Pending> {
        // Every critical section leaves the set in order; a poisoned one only lost a wake, which the re-scan makes up.
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Tells a source to stop.
#[derive(Debug, Clone)]
pub(super) struct Stopper(Arc<Shared>);

impl Stopper {
    pub(super) fn set(&self) {
        self.0.lock().stopped = true;
        self.0.woken.notify_all();
    }

    pub(super) fn is_set(&self) -> bool {
        self.0.lock().stopped
    }
}

#[derive(Debug)]
pub(super) struct Watch {
    root: PathBuf,
    shared: Arc<Shared>,
    watcher: Option<RecommendedWatcher>,
    /// Watched folders, and which inode each was.
    watched: HashMap<PathBuf, (u64, u64)>,
    trouble: Option<String>,
}

impl Watch {
    pub(super) fn new(root: &Path) -> Self {
        let shared = Arc::new(Shared::default());
        let (sink, sink_root) = (Arc::clone(&shared), root.to_owned());
        let watcher = notify::recommended_watcher(move |event| note(&sink, &sink_root, event));
        let trouble = watcher.as_ref().err().map(|error| blind(root, error));
        let mut watch = Self {
            root: root.to_owned(),
            shared,
            watcher: watcher.ok(),
            watched: HashMap::new(),
            trouble,
        };
        let initial = BTreeSet::from([root.to_owned()]);
        watch.follow(&initial);
        watch
    }

    pub(super) fn stopper(&self) -> Stopper {
        Stopper(Arc::clone(&self.shared))
    }

    /// Whether changes will wake us.
    pub(super) fn sees(&self) -> bool {
        self.trouble.is_none()
    }

    /// Why they will not.
    pub(super) fn trouble(&self) -> Option<String> {
        self.trouble.clone()
    }

    /// Watches exactly these folders and the root's parent; whether one of them is newly watched and must be looked at again.
    pub(super) fn follow(&mut self, folders: &BTreeSet<PathBuf>) -> bool {
        let Some(watcher) = &mut self.watcher else {
            return false;
        };
        let parent = self.root.parent().map(|p| {
            if p.as_os_str().is_empty() {
                Path::new(".")
            } else {
                p
            }
        });
        let wanted: BTreeSet<&Path> = folders.iter().map(PathBuf::as_path).chain(parent).collect();
        let stale: Vec<PathBuf> = self
            .watched
            .keys()
            .filter(|p| !wanted.contains(p.as_path()))
            .cloned()
            .collect();
        for path in stale {
            self.watched.remove(&path);
            // A folder that is gone has lost its watch already.
            let _ = watcher.unwatch(&path);
        }
        let mut new = false;
        self.trouble = None;
        for path in wanted {
            let Ok(meta) = std::fs::metadata(path) else {
                continue;
            };
            let identity = (meta.dev(), meta.ino());
            if self.watched.get(path) == Some(&identity) {
                continue;
            }
            if self.watched.remove(path).is_some() {
                // Another folder stands under this name: the old watch belongs to the old one.
                let _ = watcher.unwatch(path);
            }
            match watcher.watch(path, RecursiveMode::NonRecursive) {
                Ok(()) => {
                    self.watched.insert(path.to_owned(), identity);
                    new = true;
                }
                Err(error) => self.trouble = Some(blind(path, &error)),
            }
        }
        new
    }

    /// Waits until something may have changed, at most `longest`, after which everything is to be read.
    pub(super) fn wait(&self, longest: Duration) -> Wake {
        let end = Instant::now() + longest;
        let mut pending = self.shared.lock();
        loop {
            let now = Instant::now();
            let overdue: Vec<PathBuf> = pending
                .writing
                .iter()
                .filter(|(_, since)| now - **since >= WRITE_WITHIN)
                .map(|(p, _)| p.clone())
                .collect();
            for path in overdue {
                pending.writing.remove(&path);
                pending.dirty.insert(path);
                pending.looked_for = true;
            }
            if pending.stopped || pending.looked_for || now >= end {
                return Wake {
                    all: std::mem::take(&mut pending.all) || now >= end,
                    dirty: std::mem::take(&mut pending.dirty),
                    writing: pending.writing.keys().cloned().collect(),
                    stopped: {
                        pending.looked_for = false;
                        pending.stopped
                    },
                };
            }
            let first_write = pending
                .writing
                .values()
                .min()
                .map(|since| *since + WRITE_WITHIN);
            let until = first_write.map_or(end, |w| w.min(end));
            let (guard, _) = (self.shared.woken)
                .wait_timeout(pending, until.saturating_duration_since(now))
                .unwrap_or_else(PoisonError::into_inner);
            pending = guard;
        }
    }
}

fn blind(path: &Path, error: &notify::Error) -> String {
    let seconds = super::POLL_UNWATCHED.as_secs();
    format!(
        "{}: cannot be watched ({error}); reading it every {seconds} s instead: raise fs.inotify.max_user_watches and \
         fs.inotify.max_user_instances",
        path.display()
    )
}

/// Runs on the watcher's thread.
fn note(shared: &Shared, root: &Path, event: notify::Result<notify::Event>) {
    let mut pending = shared.lock();
    let Ok(event) = event else {
        pending.all = true;
        pending.looked_for = true;
        shared.woken.notify_all();
        return;
    };
    if event.need_rescan() {
        pending.all = true;
        pending.looked_for = true;
    }
    for path in event.paths {
        // From the root's parent only the root matters.
        if !path.starts_with(root) {
            continue;
        }
        match event.kind {
            // Our own reading.
            EventKind::Access(AccessKind::Close(AccessMode::Write)) => {}
            EventKind::Access(_) => continue,
            EventKind::Modify(ModifyKind::Data(_)) => {
                pending.begin_write(path);
                continue;
            }
            EventKind::Create(CreateKind::File) if is_open_for_writing(&path) => {
                pending.begin_write(path);
                continue;
            }
            _ => {}
        }
        pending.writing.remove(&path);
        pending.looked_for = true;
        if pending.dirty.len() < MAX_NAMED {
            pending.dirty.insert(path);
        } else {
            pending.all = true;
        }
    }
    shared.woken.notify_all();
}

impl Pending {
    fn begin_write(&mut self, path: PathBuf) {
        if self.writing.len() < MAX_NAMED {
            self.writing.entry(path).or_insert_with(Instant::now);
        } else {
            self.all = true;
            self.looked_for = true;
        }
    }
}

/// A new link appears complete; a new regular file was just opened by whoever will write and close it.
fn is_open_for_writing(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok_and(|meta| meta.is_file() && meta.nlink() == 1)
}
