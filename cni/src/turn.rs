//! Whose turn it is with the store: a lock on its file (flock(2)), waited for in line and for no longer than asked.
//!
//! The kernel wakes the next in line when a process closes the file or is killed. Who looks every few milliseconds instead is late
//! whenever it is early, takes the processor from the one that has the store, and may starve beside others that have more luck.
//!
//! The library that reads the file locks it too, and does not wait. It gets this very open file, on which the lock is held already.

use std::fs::{File, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

/// The file, locked until it is closed; `None`: another process had it all the time.
pub(crate) fn wait_for(file: File, patience: Duration) -> io::Result<Option<File>> {
    match file.try_lock() {
        Ok(()) => return Ok(Some(file)),
        Err(TryLockError::WouldBlock) if patience.is_zero() => return Ok(None),
        Err(TryLockError::WouldBlock) => {}
        Err(TryLockError::Error(e)) => return Err(e),
    }
    // flock(2) knows no deadline and is ended only by a signal, so a thread of its own waits. One that is not waited for any more
    // stays in line until its turn, and closes the file at once.
    let (tell, told) = mpsc::channel();
    thread::Builder::new()
        .name("store-turn".to_owned())
        .spawn(move || {
            let locked = lock(&file).map(|()| file);
            // Nobody listens any more: the file is closed here.
            drop(tell.send(locked));
        })?;
    match told.recv_timeout(patience) {
        Ok(locked) => locked.map(Some),
        Err(mpsc::RecvTimeoutError::Timeout) => Ok(None),
        Err(mpsc::RecvTimeoutError::Disconnected) => Err(io::Error::other(
            "the thread that waited for the lock is gone",
        )),
    }
}

fn lock(file: &File) -> io::Result<()> {
    loop {
        match file.lock() {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            done => return done,
        }
    }
}

/// Whether the file still has this name: while it was waited for, another may have been put in its place.
pub(crate) fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let ours = file.metadata()?;
    match std::fs::metadata(path) {
        Ok(there) => Ok((ours.dev(), ours.ino()) == (there.dev(), there.ino())),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    fn opened(path: &Path) -> File {
        File::options().write(true).open(path).unwrap()
    }

    /// Somebody stands in line for the lock of this file.
    fn is_waited_for(file: &File) -> bool {
        let inode = format!(":{} ", file.metadata().unwrap().ino());
        let locks = std::fs::read_to_string("/proc/locks").unwrap();
        locks
            .lines()
            .any(|line| line.contains("->") && line.contains(&inode))
    }

    #[test]
    fn who_waits_has_it_when_the_other_closes_and_who_gave_up_is_not_in_the_way() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let first = wait_for(opened(file.path()), Duration::ZERO).unwrap();
        assert!(first.is_some());
        for patience in [Duration::ZERO, Duration::from_millis(1)] {
            let other = wait_for(opened(file.path()), patience).unwrap();
            assert!(other.is_none(), "the first one has it");
        }
        assert!(is_waited_for(file.as_file()), "who gave up stays in line");
        let next = opened(file.path());
        let waiting = thread::spawn(move || wait_for(next, PATIENCE).unwrap());
        drop(first);
        assert!(waiting.join().unwrap().is_some());
    }

    #[test]
    fn a_file_that_was_replaced_is_not_at_its_name() {
        let directory = tempfile::tempdir().unwrap();
        let (path, new) = (directory.path().join("a"), directory.path().join("b"));
        std::fs::write(&path, b"old").unwrap();
        let file = opened(&path);
        assert!(is_at(&file, &path).unwrap());
        std::fs::write(&new, b"new").unwrap();
        std::fs::rename(&new, &path).unwrap();
        assert!(!is_at(&file, &path).unwrap());
        std::fs::remove_file(&path).unwrap();
        assert!(!is_at(&file, &path).unwrap());
    }
}
