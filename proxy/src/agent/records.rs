//! What the agent does for an attachment beyond its slot, on disk: limits and host ports, one file each below the state directory.
//!
//! The maps hold them too, but not for another version of the maps, and not which of them belong together. A record is written
//! before ADD is answered and removed with DEL; one whose allocation is gone, or is another generation's, is nobody's.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use kun_control::{AttachmentKey, Traffic};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// The directory's name below the state directory.
const DIRECTORY: &str = "traffic";

/// Names and a few hundred port mappings; anything longer was not written here.
const MAX_RECORD: u64 = 1 << 20;

/// One attachment's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Record {
    /// Whose.
    pub(crate) key: AttachmentKey,
    /// Of which allocation.
    pub(crate) generation: u64,
    /// What is to be done.
    pub(crate) traffic: Traffic,
}

/// The directory.
#[derive(Debug, Clone)]
pub(crate) struct Records {
    directory: PathBuf,
}

/// A record that is not on disk.
#[derive(Debug, thiserror::Error)]
#[error("{}: {source}; limits and host ports are kept there, in a directory that can be written", path.display())]
pub(crate) struct RecordError {
    path: PathBuf,
    source: io::Error,
}

impl Records {
    /// Below this state directory. Nothing is made yet.
    pub(crate) fn new(state_dir: &Path) -> Self {
        Self {
            directory: state_dir.join(DIRECTORY),
        }
    }

    fn path(&self, key: &AttachmentKey) -> PathBuf {
        let mut hash = Sha256::new();
        for part in [&key.network, &key.container_id, &key.ifname] {
            hash.update(part.as_bytes());
            // No part may contain a zero byte.
            hash.update([0]);
        }
        let name: String = hash.finalize()[..16]
            .iter()
            .map(|b| format!("{b:02x}"))
            .collect();
        self.directory.join(format!("{name}.json"))
    }

    /// Durable when this returns.
    pub(crate) fn put(&self, record: &Record) -> Result<(), RecordError> {
        let path = self.path(&record.key);
        let write = || {
            fs::create_dir_all(&self.directory)?;
            let bytes = serde_json::to_vec(record)?;
            let temporary = path.with_extension("new");
            let mut file = File::create(&temporary)?;
            file.write_all(&bytes)?;
            file.sync_all()?;
            fs::rename(&temporary, &path)?;
            File::open(&self.directory)?.sync_all()?;
            // The directory itself may be new.
            let parent = self.directory.parent().unwrap_or(&self.directory);
            File::open(parent)?.sync_all()
        };
        write().map_err(|source| RecordError { path, source })
    }

    /// Removes it, if it is there. A record that a crash brings back has no allocation.
    pub(crate) fn remove(&self, key: &AttachmentKey) -> Result<(), RecordError> {
        let path = self.path(key);
        match fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(RecordError { path, source })
            }
            _ => Ok(()),
        }
    }

    /// All. A file that cannot be read is named in the log and left.
    pub(crate) fn all(&self) -> Vec<Record> {
        let Ok(directory) = fs::read_dir(&self.directory) else {
            return Vec::new();
        };
        let mut records = Vec::new();
        for path in directory.flatten().map(|file| file.path()) {
            if path.extension().is_none_or(|e| e != "json") {
                continue;
            }
            match read(&path) {
                Ok(record) => records.push(record),
                Err(error) => {
                    tracing::error!(path = %path.display(), %error, "a pod's limits and host ports cannot be read");
                }
            }
        }
        records
    }
}

fn read(path: &Path) -> io::Result<Record> {
    if fs::metadata(path)?.len() > MAX_RECORD {
        return Err(io::Error::other("longer than any record"));
    }
    Ok(serde_json::from_slice(&fs::read(path)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(container: &str) -> Record {
        Record {
            key: AttachmentKey {
                network: "kun".into(),
                container_id: container.into(),
                ifname: "eth0".into(),
            },
            generation: 3,
            traffic: Traffic::default(),
        }
    }

    #[test]
    fn what_is_put_is_there_until_removed() {
        let directory = tempfile::tempdir().unwrap();
        let records = Records::new(directory.path());
        assert!(records.all().is_empty());
        records.put(&record("a")).unwrap();
        records.put(&record("a")).unwrap();
        records.put(&record("b")).unwrap();
        fs::write(directory.path().join(DIRECTORY).join("bad.json"), "{").unwrap();
        let mut all = records.all();
        all.sort_by(|a, b| a.key.cmp(&b.key));
        assert_eq!(all, [record("a"), record("b")]);
        records.remove(&record("a").key).unwrap();
        records.remove(&record("a").key).unwrap();
        assert_eq!(records.all(), [record("b")]);
    }
}
