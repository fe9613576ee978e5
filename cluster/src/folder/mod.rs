//! A folder of Kubernetes manifests as a source: the embedded default, no API server needed.
//!
//! `*.yaml`, `*.yml` and `*.json`, several documents a file, `List`s opened; sub-folders down to [`MAX_DEPTH`] levels; names that
//! begin with a dot are skipped, which reads a mounted ConfigMap (`..data` and its links) exactly once. A single file will do.
//!
//! * One event of deltas a scan, and a scan sees a swap of a folder or of a link as one change.
//! * What was read while files changed is not told: an object that moved to a file already read, from one not yet read, would be
//!   told as gone. It is read again when the change wakes us.
//! * A file that cannot be read or is wrong keeps the objects that it last had when it was right, and says so once.
//! * A file that has not been right since the source began has no last good objects: [`Event::Partial`] says so before
//!   [`Event::Synced`], and [`Event::Whole`] when that is over.
//! * The same object in two files: the first file in path order wins, and it is said.
//! * Inotify drives scans; hashes of contents decide what changed; a slow re-scan catches what inotify cannot see (network file
//!   systems). A file that somebody is just writing is read once it is closed. There is no debounce timer.

mod merge;
mod scan;
mod watch;

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::Duration;

pub use kun_cluster_core::parse_manifest;

use crate::{Event, Troubles};
use scan::Scanner;
use watch::{Wake, Watch};

/// Levels of sub-folders that are read.
pub const MAX_DEPTH: usize = 4;

/// Every this often all files are read anew, in case inotify is blind (NFS, overlay).
const SAFETY_RESCAN: Duration = Duration::from_secs(60);

/// The same where no watch can be set at all.
const POLL_UNWATCHED: Duration = Duration::from_secs(2);

/// A folder that changes in each of so many readings is told as it was read: who writes without end must not keep everybody waiting.
const MAX_READINGS: usize = 32;

/// Why the folder cannot be followed.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    /// It is not there, or not ours to read.
    #[error("{}: the manifest folder cannot be read ({source}); create it, or set cluster.folder in kun.yaml", path.display())]
    Unreadable {
        /// As configured.
        path: PathBuf,
        /// The system's word.
        source: io::Error,
    },
    /// No thread to follow it.
    #[error("no thread to follow the manifest folder ({0})")]
    Thread(#[source] io::Error),
}

/// A folder that is being followed. Pull events with [`FolderSource::next_event`], or have a thread push them with
/// [`FolderSource::spawn`].
#[derive(Debug)]
pub struct FolderSource {
    scanner: Scanner,
    watch: Watch,
    queue: VecDeque<Event>,
    synced: bool,
    /// [`Event::Partial`] was told, [`Event::Whole`] not yet.
    partial: bool,
    /// Readings in a row that files changed under, with changes in them that nobody was told of yet.
    untold: usize,
    troubles: Troubles,
}

impl FolderSource {
    /// Begins to follow `path`, a folder or one file. Reads nothing yet.
    pub fn open(path: &Path) -> Result<Self, FolderError> {
        let unreadable = |source| FolderError::Unreadable {
            path: path.to_owned(),
            source,
        };
        let meta = std::fs::metadata(path).map_err(unreadable)?;
        if meta.is_dir() {
            std::fs::read_dir(path).map_err(unreadable)?;
        } else {
            std::fs::File::open(path).map_err(unreadable)?;
        }
        Ok(Self {
            scanner: Scanner::new(path),
            watch: Watch::new(path),
            queue: VecDeque::new(),
            synced: false,
            partial: false,
            untold: 0,
            troubles: Troubles::default(),
        })
    }

    /// What is wrong now.
    pub fn troubles(&self) -> Troubles {
        self.troubles.clone()
    }

    /// Blocks until there is something to say. First the whole snapshot as one event of deltas and [`Event::Synced`], then an
    /// event whenever the files say something else.
    pub fn next_event(&mut self) -> Event {
        loop {
            if let Some(event) = self.poll() {
                return event;
            }
        }
    }

    /// The next event; `None` when woken without one, or told to stop.
    fn poll(&mut self) -> Option<Event> {
        if let Some(event) = self.queue.pop_front() {
            return Some(event);
        }
        let wake = if self.synced {
            let period = if self.watch.sees() {
                SAFETY_RESCAN
            } else {
                POLL_UNWATCHED
            };
            self.watch.wait(period)
        } else {
            Wake::everything()
        };
        if wake.stopped {
            return None;
        }
        self.scan(&wake);
        // The first snapshot waits for nothing that wakes us.
        while !self.synced && self.untold > 0 {
            self.scan(&wake);
        }
        let known = self.scanner.knows_all();
        if !self.synced {
            self.synced = true;
            self.partial = !known;
            self.queue.extend(self.partial.then_some(Event::Partial));
            self.queue.push_back(Event::Synced);
        } else if self.partial && known && self.untold == 0 {
            self.partial = false;
            self.queue.push_back(Event::Whole);
        }
        self.queue.pop_front()
    }

    fn scan(&mut self, wake: &Wake) {
        // Watch, then look: whatever happens in a folder after we looked wakes us again. A folder that the scan finds new
        // is watched and looked at once more.
        let mut changed = self.scanner.read_files(wake);
        let again = Wake::default();
        for _ in 0..MAX_DEPTH {
            if !self.watch.follow(self.scanner.folders()) {
                break;
            }
            changed |= self.scanner.read_files(&again);
        }
        changed |= self.untold > 0;
        // Where nothing wakes us the next look is far off.
        let may_wait = self.watch.sees() && self.untold < MAX_READINGS;
        let deltas = if changed && may_wait && !self.scanner.stands(wake) {
            self.untold += 1;
            Vec::new()
        } else if changed {
            self.untold = 0;
            self.scanner.merge()
        } else {
            Vec::new()
        };
        let troubles = self.scanner.new_troubles(self.watch.trouble());
        self.troubles.set(self.scanner.troubles().cloned());
        self.queue.extend(troubles.into_iter().map(Event::Trouble));
        if !deltas.is_empty() {
            self.queue.push_back(Event::Deltas(deltas));
        }
    }

    /// Follows the folder from a thread that hands each event to `on_event`, until that says `false` or the handle is dropped.
    pub fn spawn(
        mut self,
        mut on_event: impl FnMut(Event) -> bool + Send + 'static,
    ) -> Result<Following, FolderError> {
        let stop = self.watch.stopper();
        let stopped = stop.clone();
        let troubles = self.troubles();
        let thread = std::thread::Builder::new()
            .name("kun-folder".to_owned())
            .spawn(move || {
                while !stopped.is_set() {
                    if let Some(event) = self.poll()
                        && !on_event(event)
                    {
                        return;
                    }
                }
            })
            .map_err(FolderError::Thread)?;
        Ok(Following {
            stop,
            troubles,
            _thread: thread,
        })
    }
}

/// A folder followed by a thread; dropped, the thread ends after its current event.
#[derive(Debug)]
pub struct Following {
    stop: watch::Stopper,
    troubles: Troubles,
    // Not joined: `on_event` may be blocked in a full channel whose reader is the one who drops this.
    _thread: JoinHandle<()>,
}

impl Following {
    /// What is wrong now.
    pub fn troubles(&self) -> Troubles {
        self.troubles.clone()
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        self.stop.set();
    }
}
