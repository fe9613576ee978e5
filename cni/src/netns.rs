//! A pod's network namespace.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// `f_type` of nsfs, where namespaces live (linux/magic.h).
const NSFS_MAGIC: i64 = 0x6e73_6673;

/// The calling thread's own.
const OWN: &str = "/proc/thread-self/ns/net";

/// Why a namespace is of no use.
#[derive(Debug, thiserror::Error)]
pub enum NetnsError {
    /// Not there, or not allowed.
    #[error("CNI_NETNS {}: {source}; it is the path of the pod's network namespace", path.display())]
    Open {
        /// The path.
        path: PathBuf,
        /// The system's word.
        source: io::Error,
    },
    /// Some other file.
    #[error("CNI_NETNS {}: not a namespace", path.display())]
    NotNamespace {
        /// The path.
        path: PathBuf,
    },
    /// The node's own: interfaces would be made on the node.
    #[error("CNI_NETNS {}: this is the node's own network namespace", path.display())]
    Own {
        /// The path.
        path: PathBuf,
    },
    /// setns.
    #[error("CNI_NETNS {}: entering it: {source}", path.display())]
    Enter {
        /// The path.
        path: PathBuf,
        /// The system's word.
        source: io::Error,
    },
}

/// An open namespace; it lives on while this does. Bound to the thread that opened it, and with it to the namespace to go back to.
#[derive(Debug)]
pub struct Netns {
    path: PathBuf,
    fd: OwnedFd,
    home: OwnedFd,
    of_its_thread: PhantomData<*const ()>,
}

impl Netns {
    /// Opens the namespace at this path; refuses what is none, and the caller's own.
    pub fn open(path: &Path) -> Result<Self, NetnsError> {
        let failed = |e: rustix::io::Errno| NetnsError::Open {
            path: path.to_owned(),
            source: e.into(),
        };
        let fd = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .map_err(failed)?;
        let kind = rustix::fs::fstatfs(&fd).map_err(failed)?.f_type;
        if i128::from(kind) != i128::from(NSFS_MAGIC) {
            return Err(NetnsError::NotNamespace {
                path: path.to_owned(),
            });
        }
        let theirs = rustix::fs::fstat(&fd).map_err(failed)?;
        let home = rustix::fs::open(OWN, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .map_err(failed)?;
        let ours = rustix::fs::fstat(&home).map_err(failed)?;
        if (theirs.st_dev, theirs.st_ino) == (ours.st_dev, ours.st_ino) {
            return Err(NetnsError::Own {
                path: path.to_owned(),
            });
        }
        Ok(Self {
            path: path.to_owned(),
            fd,
            home,
            of_its_thread: PhantomData,
        })
    }

    /// Runs the closure inside, on this thread, which goes back whatever happens; a thread of its own would cost a tenth of an
    /// ADD. A process that cannot go back ends: it must not do on a pod what it meant for the node.
    pub fn inside<T>(&self, work: impl FnOnce() -> T) -> Result<T, NetnsError> {
        let failed = |e: rustix::io::Errno| NetnsError::Enter {
            path: self.path.clone(),
            source: e.into(),
        };
        move_into_link_name_space(self.fd.as_fd(), Some(LinkNameSpaceType::Network))
            .map_err(failed)?;
        let _back = Back(self.home.as_fd());
        Ok(work())
    }
}

/// Returns to the namespace that was left.
struct Back<'a>(BorrowedFd<'a>);

impl Drop for Back<'_> {
    fn drop(&mut self) {
        if move_into_link_name_space(self.0, Some(LinkNameSpaceType::Network)).is_err() {
            std::process::abort();
        }
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_comes_back_even_after_a_panic() {
        if !kun_harness::require_root() {
            return;
        }
        let pod = kun_harness::Netns::new("cni-pod").unwrap();
        let netns = Netns::open(&pod.path()).unwrap();
        let inode = || rustix::fs::stat(OWN).unwrap().st_ino;
        let home = inode();
        assert_ne!(netns.inside(inode).unwrap(), home);
        assert_eq!(inode(), home);
        let panics = std::panic::AssertUnwindSafe(|| netns.inside(|| panic!("inside")));
        assert!(std::panic::catch_unwind(panics).is_err());
        assert_eq!(inode(), home);
    }

    #[test]
    fn what_is_no_foreign_namespace_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(matches!(
            Netns::open(file.path()),
            Err(NetnsError::NotNamespace { .. })
        ));
        assert!(matches!(
            Netns::open(Path::new("/nonexistent/netns")),
            Err(NetnsError::Open { .. })
        ));
        assert!(matches!(
            Netns::open(Path::new("/proc/self/ns/net")),
            Err(NetnsError::Own { .. })
        ));
    }
}
