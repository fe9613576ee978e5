//! The store's file, with only those flushes that durability needs.
//!
//! The plugin alone opens, changes and closes the store for each verb, and redb flushes on each of those steps. Three kinds of
//! flush protect nothing, and are left out:
//!
//! - one with nothing written since the last one;
//! - one with nothing written since but the header's first sector, which is when redb marks the file as open and as closed. The
//!   mark shares its byte with the choice of the valid commit slot, which only a commit changes, and a commit writes pages too
//!   and is flushed. If the mark of opening is lost in a crash, so is every page written after it or that page is in free space
//!   of the commit that stays valid; if the mark of closing is lost, the next open checks the file, which ours does anyway;
//! - one with nothing written since but that and a file made shorter: one that is longer than its header says is cut again. A
//!   file made longer is flushed, since a header that promises more than there is cannot be read.
//!
//! At most one commit stands between two flushes: redb flushes each before it begins the next. This holds for commits of one
//! phase, which is how the store commits. `cni/tests/torn.rs` crashes after every subset of the writes that a disk may keep.

use std::io;
use std::ops::Bound;
use std::sync::atomic::{AtomicBool, Ordering};

use redb::{BackendError, StorageBackend};

/// redb's header is 320 bytes; a disk writes no less than this at once.
const HEADER_SECTOR: u64 = 512;

/// The byte after redb's magic number, and its bit that says that the file is open or was not closed.
const MARK: usize = 9;
const MARKED_OPEN: u8 = 2;

/// A file, or what a test puts in its place.
#[derive(Debug)]
pub struct Disk<B> {
    inner: B,
    /// A page was written, or the file made longer, since the last flush.
    dirty: AtomicBool,
}

impl<B: StorageBackend> Disk<B> {
    /// Over this.
    pub fn new(inner: B) -> Self {
        // A process that was killed may have left a commit that is in the page cache and not on the disk. Whoever finds the file
        // marked as open finds that commit too and answers from it: the first flush is for that commit.
        let mut header = [0; MARK + 1];
        let clean = inner.read(0, &mut header).is_ok() && header[MARK] & MARKED_OPEN == 0;
        Self {
            inner,
            dirty: AtomicBool::new(!clean),
        }
    }
}

impl<B: StorageBackend> StorageBackend for Disk<B> {
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.inner.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        if len > self.inner.len()? {
            self.dirty.store(true, Ordering::Release);
        }
        self.inner.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        if !self.dirty.load(Ordering::Acquire) {
            return Ok(());
        }
        self.inner.sync_data()?;
        self.dirty.store(false, Ordering::Release);
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let end = offset.saturating_add(data.len() as u64);
        if end > HEADER_SECTOR {
            self.dirty.store(true, Ordering::Release);
        }
        self.inner.write(offset, data)
    }

    fn close(&self) -> io::Result<()> {
        self.inner.close()
    }

    fn try_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.inner.try_lock_range(start, end)
    }

    fn try_lock_shared_range(
        &self,
        start: Bound<u64>,
        end: Bound<u64>,
    ) -> Result<bool, BackendError> {
        self.inner.try_lock_shared_range(start, end)
    }

    fn lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.inner.lock_range(start, end)
    }

    fn lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.inner.lock_shared_range(start, end)
    }

    fn unlock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.inner.unlock_range(start, end)
    }

    fn query_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.inner.query_lock_range(start, end)
    }
}
