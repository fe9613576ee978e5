//! The durable store: one redb file below the state directory, open in one process at a time.
//!
//! Owns the layout of the tables and nothing else. A file that cannot be read as written is refused, never repaired by
//! guessing: two pods with one address are worse than none started.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kun_cni_core::ipam::{BootId, Claim, Effect, Record, Snapshot, Standing};
use kun_config::types::{BlockId, Slot};
use redb::backends::FileBackend;
use redb::{
    Database, DatabaseError, ReadTransaction, ReadableDatabase, ReadableTable, StorageBackend,
    TableDefinition, TableError,
};

use crate::disk::Disk;
use crate::turn;

/// The file's name below the state directory.
pub const FILE: &str = "ipam.redb";

/// 16 bytes of boot id, 8 bytes of the least generation that a slot without a row had.
const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("meta");
const BOOT: &str = "boot";
const FLOOR: &str = "floor";
/// Slot → JSON of its record.
const SLOTS: TableDefinition<'_, u32, &[u8]> = TableDefinition::new("slots");
/// First slot → owned.
const BLOCKS: TableDefinition<'_, u32, bool> = TableDefinition::new("blocks");
/// First slot → JSON of the claim. Younger than the table above, which an older program still reads and writes: what that says of
/// whose a block is goes first.
const CLAIMS: TableDefinition<'_, u32, &[u8]> = TableDefinition::new("claims");

/// The whole store of the densest node is under 4 MB; redb's own default would be a gigabyte.
const CACHE: usize = 8 << 20;

/// When a process looks again whose turn it is and that finds the file in use all the same: by a program whose library locks in
/// another way.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// Why the store cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The state directory cannot be made.
    #[error("{}: {source}; the state directory must be a writable directory", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// The system's word.
        source: std::io::Error,
    },
    /// Another process has it open for longer than this one may wait.
    #[error("{}: another process has had the store open for {waited:?}; is an agent hung?", path.display())]
    Busy {
        /// The file.
        path: PathBuf,
        /// How long this process waited.
        waited: Duration,
    },
    /// The file is not as it was written.
    #[error(
        "{}: the store is damaged ({what}); it is left as it is: `kunctl ipam rebuild` makes a new one from the interfaces of this node's pods",
        path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What was found.
        what: String,
    },
    /// There is none, and there must have been one.
    #[error(
        "{}: there is no store, but {interfaces} interfaces of pods stand and {releases} releases wait for one: `kunctl ipam rebuild` makes a new one from what this node knows of its pods",
        path.display()
    )]
    Lost {
        /// The file.
        path: PathBuf,
        /// Interfaces of ours on the node.
        interfaces: usize,
        /// Releases in the spool.
        releases: usize,
    },
    /// It is whole, and was put there from an earlier time.
    #[error(
        "{}: the store is an older copy of itself: {evidence}; it is left as it is: `kunctl ipam rebuild` makes a new one from the interfaces of this node's pods",
        path.display()
    )]
    Older {
        /// The file.
        path: PathBuf,
        /// By what that was seen.
        evidence: String,
    },
    /// Reading or writing failed.
    #[error("{}: {what}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The library's word.
        what: String,
    },
}

/// The open store.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
    database: Database,
}

impl Store {
    /// Opens the store in this directory, made if it is not there; waits at most so long for another process to close it.
    pub fn open(state_dir: &Path, wait: Duration) -> Result<Self, StoreError> {
        std::fs::create_dir_all(state_dir).map_err(|source| StoreError::Directory {
            path: state_dir.to_owned(),
            source,
        })?;
        let path = state_dir.join(FILE);
        if !path.exists() {
            create(state_dir, &path)?;
        }
        let begin = Instant::now();
        loop {
            let waited = begin.elapsed();
            let left = wait.saturating_sub(waited);
            let Some(file) = locked(&path, left)? else {
                let waited = begin.elapsed();
                return Err(StoreError::Busy { path, waited });
            };
            match Self::on_file(&path, file) {
                Err(StoreError::Busy { path, .. }) if left.is_zero() => {
                    return Err(StoreError::Busy { path, waited });
                }
                Err(StoreError::Busy { .. }) => std::thread::sleep(LOOK_AGAIN.min(left)),
                opened => return opened,
            }
        }
    }

    /// The file is locked, or nobody else's: its header is read before the library takes its own lock.
    fn on_file(path: &Path, file: File) -> Result<Self, StoreError> {
        let backend = FileBackend::new(file).map_err(|e| cannot_open(path, e))?;
        Self::on(path, Disk::new(backend))
    }

    /// A new one in a file of another name, which nobody looks for; what had the name is removed.
    pub(crate) fn make(new: &Path) -> Result<Self, StoreError> {
        // Left by a process that had this number before.
        match std::fs::remove_file(new) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(io(new, &e)),
            Ok(()) | Err(_) => {}
        }
        let file = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(new)
            .map_err(|e| io(new, &e))?;
        Self::on_file(new, file)
    }

    /// On any backend; `path` is for messages.
    pub fn on(path: &Path, backend: impl StorageBackend) -> Result<Self, StoreError> {
        let database = Database::builder()
            .set_cache_size(CACHE)
            .set_check_integrity_on_open(true)
            .create_with_backend(backend)
            .map_err(|e| cannot_open(path, e))?;
        Ok(Self {
            path: path.to_owned(),
            database,
        })
    }

    /// Everything in it.
    pub fn load(&self) -> Result<Snapshot, StoreError> {
        let mut snapshot = Snapshot::default();
        let read = self.database.begin_read().map_err(|e| self.io(e))?;
        let meta = match read.open_table(META) {
            Ok(meta) => meta,
            // The first commit makes all of them.
            Err(TableError::TableDoesNotExist(_)) => return Ok(snapshot),
            Err(e) => return Err(self.io(e)),
        };
        if let Some(row) = meta.get(FLOOR).map_err(|e| self.io(e))? {
            let bytes: [u8; 8] = row
                .value()
                .try_into()
                .map_err(|_| self.damaged("the least generation has not 8 bytes"))?;
            snapshot.floor = u64::from_be_bytes(bytes);
        }
        if let Some(row) = meta.get(BOOT).map_err(|e| self.io(e))? {
            let bytes: [u8; 16] = row
                .value()
                .try_into()
                .map_err(|_| self.damaged("the boot id has not 16 bytes"))?;
            snapshot.boot = Some(BootId(u128::from_be_bytes(bytes)));
        }
        let blocks = read.open_table(BLOCKS).map_err(|e| self.io(e))?;
        for row in blocks.iter().map_err(|e| self.io(e))? {
            let (first, owned) = row.map_err(|e| self.io(e))?;
            let first = Slot(first.value());
            let block = BlockId::new(first)
                .ok_or_else(|| self.damaged(format!("block {first} is not aligned")))?;
            let standing = match owned.value() {
                true => Standing::Confirmed,
                false => Standing::Returned,
            };
            snapshot.blocks.insert(block, Claim::FIRST.to(standing));
        }
        self.refine(&read, &mut snapshot)?;
        let slots = read.open_table(SLOTS).map_err(|e| self.io(e))?;
        for row in slots.iter().map_err(|e| self.io(e))? {
            let (slot, bytes) = row.map_err(|e| self.io(e))?;
            let slot = Slot(slot.value());
            let record: Record = serde_json::from_slice(bytes.value())
                .map_err(|e| self.damaged(format!("the row of slot {slot}: {e}")))?;
            snapshot.records.insert(slot, record);
        }
        Ok(snapshot)
    }

    /// Epochs and standings, as far as they are stored.
    fn refine(&self, read: &ReadTransaction, snapshot: &mut Snapshot) -> Result<(), StoreError> {
        let claims = match read.open_table(CLAIMS) {
            Ok(claims) => claims,
            Err(TableError::TableDoesNotExist(_)) => return Ok(()),
            Err(e) => return Err(self.io(e)),
        };
        for (block, known) in &mut snapshot.blocks {
            let first = block.first();
            let Some(row) = claims.get(first.0).map_err(|e| self.io(e))? else {
                continue;
            };
            let claim: Claim = serde_json::from_slice(row.value())
                .map_err(|e| self.damaged(format!("the claim of block {first}: {e}")))?;
            *known = match claim.is_owned() == known.is_owned() {
                true => claim,
                false => claim.to(known.standing),
            };
        }
        Ok(())
    }

    /// Makes the effects durable, all or none: one transaction, one flush.
    pub fn commit(&self, effects: &[Effect]) -> Result<(), StoreError> {
        if effects.is_empty() {
            return Ok(());
        }
        let write = self.database.begin_write().map_err(|e| self.io(e))?;
        {
            let mut meta = write.open_table(META).map_err(|e| self.io(e))?;
            let mut blocks = write.open_table(BLOCKS).map_err(|e| self.io(e))?;
            let mut claims = write.open_table(CLAIMS).map_err(|e| self.io(e))?;
            let mut slots = write.open_table(SLOTS).map_err(|e| self.io(e))?;
            for effect in effects {
                match effect {
                    Effect::PutBoot(boot) => {
                        meta.insert(BOOT, boot.0.to_be_bytes().as_slice())
                            .map_err(|e| self.io(e))?;
                    }
                    Effect::PutFloor(floor) => {
                        meta.insert(FLOOR, floor.to_be_bytes().as_slice())
                            .map_err(|e| self.io(e))?;
                    }
                    Effect::PutBlock { block, claim } => {
                        let bytes = serde_json::to_vec(claim)
                            .expect("a claim holds only a number and a word");
                        blocks
                            .insert(block.first().0, claim.is_owned())
                            .map_err(|e| self.io(e))?;
                        claims
                            .insert(block.first().0, bytes.as_slice())
                            .map_err(|e| self.io(e))?;
                    }
                    Effect::PutSlot(record) => {
                        let bytes = serde_json::to_vec(record)
                            .expect("a record holds only strings and numbers");
                        slots
                            .insert(record.slot.0, bytes.as_slice())
                            .map_err(|e| self.io(e))?;
                    }
                }
            }
        }
        write.commit().map_err(|e| self.io(e))
    }

    /// The file, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// For whoever finds that the rows contradict each other.
    pub fn damaged(&self, what: impl ToString) -> StoreError {
        StoreError::Damaged {
            path: self.path.clone(),
            what: what.to_string(),
        }
    }

    fn io(&self, error: impl Into<redb::Error>) -> StoreError {
        let path = self.path.clone();
        match error.into() {
            redb::Error::Corrupted(what) => StoreError::Damaged { path, what },
            // A page that is named and not there.
            redb::Error::Io(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => {
                let what = e.to_string();
                StoreError::Damaged { path, what }
            }
            other => StoreError::Io {
                path,
                what: other.to_string(),
            },
        }
    }
}

/// The file of this name, once it is this process's turn; `None`: it was not within so long.
fn locked(path: &Path, wait: Duration) -> Result<Option<File>, StoreError> {
    let begin = Instant::now();
    loop {
        let file = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .map_err(|e| io(path, &e))?;
        let left = wait.saturating_sub(begin.elapsed());
        let Some(file) = turn::wait_for(file, left).map_err(|e| io(path, &e))? else {
            return Ok(None);
        };
        // Else a rebuilt store has the name by now.
        if !turn::is_at(&file, path).map_err(|e| io(path, &e))? {
            continue;
        }
        // It would be taken for a new one, in which nobody has an address. Ours have their name only once they are whole.
        if file.metadata().map_err(|e| io(path, &e))?.len() == 0 {
            return Err(StoreError::Damaged {
                path: path.to_owned(),
                what: "the file is empty".to_owned(),
            });
        }
        return Ok(Some(file));
    }
}

fn cannot_open(path: &Path, error: DatabaseError) -> StoreError {
    let path = path.to_owned();
    let what = error.to_string();
    match error {
        DatabaseError::DatabaseAlreadyOpen => StoreError::Busy {
            path,
            waited: Duration::ZERO,
        },
        DatabaseError::RepairAborted
        | DatabaseError::UpgradeRequired(_)
        | DatabaseError::Storage(redb::StorageError::Corrupted(_)) => {
            StoreError::Damaged { path, what }
        }
        // Not a redb file at all is told as InvalidData; one that is shorter than its head says, as UnexpectedEof.
        DatabaseError::Storage(redb::StorageError::Io(e))
            if matches!(
                e.kind(),
                std::io::ErrorKind::InvalidData | std::io::ErrorKind::UnexpectedEof
            ) =>
        {
            StoreError::Damaged { path, what }
        }
        _ => StoreError::Io { path, what },
    }
}

/// A new file gets its name once it is whole: one that a crash cut off while it was made would be taken for a damaged store.
fn create(state_dir: &Path, path: &Path) -> Result<(), StoreError> {
    let new = state_dir.join(format!("{FILE}.new-{}", std::process::id()));
    drop(Store::make(&new)?);
    let placed = File::open(&new)
        .and_then(|file| file.sync_all())
        // Not renamed over: another process may have been faster, and somebody may have an address from its store.
        .and_then(|()| std::fs::hard_link(&new, path));
    let removed = std::fs::remove_file(&new);
    match placed {
        Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => return Err(io(path, &e)),
        Ok(()) | Err(_) => {}
    }
    removed
        .and_then(|()| File::open(state_dir)?.sync_all())
        .map_err(|e| io(state_dir, &e))
}

fn io(path: &Path, error: &std::io::Error) -> StoreError {
    StoreError::Io {
        path: path.to_owned(),
        what: error.to_string(),
    }
}
