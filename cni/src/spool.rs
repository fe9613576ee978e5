//! Releases that could not be told to anybody: one file each below the state directory, applied before any allocation.
//!
//! CNI §2: DEL succeeds to the fullest extent possible. A pod must be deletable while the agent is down and the store is not to
//! be had; its slot then waits here.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use kun_cni_core::ipam::Key;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// The directory's name below the state directory.
pub const DIRECTORY: &str = "spool";

/// Entries the spool takes: every slot of the largest node once. Beyond that DEL fails, and the runtime tries again.
const MAX_ENTRIES: usize = 65_536;

/// A key and a number; anything longer was not written here.
const MAX_ENTRY: u64 = 4096;

/// A release that waits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// Whose slot.
    pub key: Key,
    /// Which generation, where the interfaces still told it.
    pub generation: Option<u64>,
}

/// Why an entry was not taken.
#[derive(Debug, thiserror::Error)]
pub enum SpoolError {
    /// The directory or the file.
    #[error("{}: {source}; the spool must be a writable directory", path.display())]
    Io {
        /// Where.
        path: PathBuf,
        /// The system's word.
        source: io::Error,
    },
    /// Too many wait already.
    #[error("{}: {MAX_ENTRIES} releases wait already; start the agent to drain them", path.display())]
    Full {
        /// Where.
        path: PathBuf,
    },
}

/// The directory of waiting releases.
#[derive(Debug, Clone)]
pub struct Spool {
    directory: PathBuf,
}

impl Spool {
    /// Below this state directory. Nothing is made yet.
    pub fn new(state_dir: &Path) -> Self {
        Self {
            directory: state_dir.join(DIRECTORY),
        }
    }

    /// Takes the entry; it is durable when this returns.
    pub fn put(&self, entry: &Entry) -> Result<(), SpoolError> {
        let io = |source| SpoolError::Io {
            path: self.directory.clone(),
            source,
        };
        fs::create_dir_all(&self.directory).map_err(io)?;
        if fs::read_dir(&self.directory).map_err(io)?.count() >= MAX_ENTRIES {
            return Err(SpoolError::Full {
                path: self.directory.clone(),
            });
        }
        let bytes = serde_json::to_vec(entry).expect("an entry holds only strings and numbers");
        // Named by content: the same release twice is one file.
        let name = hex(&Sha256::digest(&bytes)[..16]);
        let temporary = self
            .directory
            .join(format!(".{name}.{}", std::process::id()));
        let placed = File::create(&temporary)
            .and_then(|mut file| {
                file.write_all(&bytes)?;
                file.sync_all()
            })
            .and_then(|()| fs::rename(&temporary, self.directory.join(format!("{name}.json"))));
        if placed.is_err() {
            // A runtime tries DEL again and again while the disk is full: each would leave a file, and they count.
            let _ = fs::remove_file(&temporary);
        }
        placed.map_err(io)?;
        self.sync().map_err(io)?;
        // The directory itself may be new.
        if let Some(parent) = self.directory.parent() {
            File::open(parent).and_then(|d| d.sync_all()).map_err(io)?;
        }
        Ok(())
    }

    /// What waits. A file that cannot be read is named in the log and left.
    pub fn entries(&self) -> Vec<(PathBuf, Entry)> {
        let Ok(directory) = fs::read_dir(&self.directory) else {
            return Vec::new();
        };
        let mut entries = Vec::new();
        for file in directory.flatten() {
            let path = file.path();
            if path.extension().is_none_or(|e| e != "json") {
                continue;
            }
            match read(&path) {
                Ok(entry) => entries.push((path, entry)),
                Err(e) => {
                    tracing::warn!(path = %path.display(), error = %e, "unreadable entry in the spool");
                }
            }
        }
        entries
    }

    /// Removes applied entries; durable when this returns.
    pub fn remove(&self, paths: &[PathBuf]) -> io::Result<()> {
        for path in paths {
            match fs::remove_file(path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                Ok(()) | Err(_) => {}
            }
        }
        self.sync()
    }

    fn sync(&self) -> io::Result<()> {
        File::open(&self.directory)?.sync_all()
    }
}

fn read(path: &Path) -> io::Result<Entry> {
    if fs::metadata(path)?.len() > MAX_ENTRY {
        return Err(io::Error::other("longer than any entry"));
    }
    Ok(serde_json::from_slice(&fs::read(path)?)?)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(id: &str) -> Entry {
        Entry {
            key: Key {
                container_id: id.into(),
                ifname: "eth0".into(),
                network: "kun".into(),
            },
            generation: Some(7),
        }
    }

    #[test]
    fn the_same_release_is_one_entry_until_removed() {
        let dir = tempfile::tempdir().unwrap();
        let spool = Spool::new(dir.path());
        assert!(spool.entries().is_empty());
        spool.put(&entry("a")).unwrap();
        spool.put(&entry("a")).unwrap();
        spool.put(&entry("b")).unwrap();
        let waiting = spool.entries();
        assert_eq!(waiting.len(), 2);
        assert!(waiting.iter().any(|(_, e)| *e == entry("a")));
        let paths: Vec<_> = waiting.into_iter().map(|(p, _)| p).collect();
        spool.remove(&paths).unwrap();
        spool.remove(&paths).unwrap();
        assert!(spool.entries().is_empty());
    }

    #[test]
    fn what_cannot_be_placed_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let spool = Spool::new(dir.path());
        spool.put(&entry("a")).unwrap();
        let (path, _) = spool.entries().remove(0);
        // A directory in the file's place: the rename fails, as all of it does on a full disk.
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert!(spool.put(&entry("a")).is_err());
        let left = fs::read_dir(path.parent().unwrap()).unwrap().count();
        assert_eq!(left, 1, "the directory alone");
    }

    #[test]
    fn an_unreadable_entry_is_left_and_the_others_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let spool = Spool::new(dir.path());
        spool.put(&entry("a")).unwrap();
        let bad = dir.path().join(DIRECTORY).join("x.json");
        fs::write(&bad, b"{").unwrap();
        assert_eq!(spool.entries().len(), 1);
        assert!(bad.exists());
    }
}
