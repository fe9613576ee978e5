//! Names that say whose they are: `kt-<what>-<pid>-<n>`; the sweep of a dead maker's leavings rests on them.

use std::path::Path;
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};

const MARK: &str = "kt-";

static COUNTER: AtomicU32 = AtomicU32::new(0);
static SWEEP: Once = Once::new();

/// A name that no other process and no other call has.
pub(crate) fn unique(what: &str) -> String {
    let n = COUNTER.fetch_add(1, Ordering::Relaxed);
    format!("{MARK}{what}-{}-{n}", std::process::id())
}

/// Whether the name is one of ours and its maker is gone.
pub(crate) fn orphaned(name: &str) -> bool {
    let Some(rest) = name.strip_prefix(MARK) else {
        return false;
    };
    let mut parts = rest.rsplitn(3, '-');
    let (Some(_n), Some(pid)) = (parts.next(), parts.next()) else {
        return false;
    };
    pid.parse::<u32>()
        .is_ok_and(|pid| !Path::new(&format!("/proc/{pid}")).exists())
}

/// Removes what dead test processes left; once a process.
pub(crate) fn sweep_once() {
    SWEEP.call_once(|| {
        crate::netns::sweep();
        crate::cgroup::sweep();
        crate::bpffs::sweep();
        crate::control_plane::sweep();
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_dead_makers_are_orphans() {
        assert!(!orphaned(&unique("a-b")));
        assert!(
            orphaned("kt-a-b-4194999-0"),
            "above the kernel's largest pid"
        );
        assert!(!orphaned("kt-a-b-x-0"));
        assert!(!orphaned("cni-4194999-0"));
    }
}
