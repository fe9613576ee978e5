//! Named network namespaces, under /run/netns so that `ip -n` sees them too.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::process::{Process, kill_all, run};
use crate::wait::wait_for;
use crate::{names, skips};

const DIRECTORY: &str = "/run/netns";

/// A network namespace with `lo` up and duplicate address detection off; removed, with every process in it, on drop.
#[derive(Debug)]
pub struct Netns {
    name: String,
}

impl Netns {
    /// A new namespace whose name begins with `kt-<what>`. Needs root.
    pub fn new(what: &str) -> Result<Self> {
        names::sweep_once();
        Self::create(names::unique(what))
    }

    /// A new namespace of exactly this name, for whoever keeps its own books (the lab). Fails if it exists.
    pub fn create(name: String) -> Result<Self> {
        anyhow::ensure!(skips::is_root(), "making a network namespace needs root");
        run(["ip", "netns", "add", &name])?;
        let netns = Self { name };
        // An address that is tentative for a second would make every test wait for it.
        netns.sysctl("net.ipv6.conf.all.accept_dad", "0")?;
        netns.sysctl("net.ipv6.conf.default.accept_dad", "0")?;
        netns.exec("link set lo up")?;
        Ok(netns)
    }

    /// A namespace that exists, adopted: it is removed on drop unless [`Netns::keep`] is called.
    pub fn adopt(name: &str) -> Result<Self> {
        let path = Path::new(DIRECTORY).join(name);
        anyhow::ensure!(
            path.exists(),
            "{}: no such network namespace",
            path.display()
        );
        Ok(Self {
            name: name.to_owned(),
        })
    }

    /// Its name, as `ip netns` shows it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its path, as CNI_NETNS takes it.
    pub fn path(&self) -> PathBuf {
        Path::new(DIRECTORY).join(&self.name)
    }

    /// Runs the closure on a thread of its own inside the namespace. A panic inside goes on outside.
    pub fn run<T: Send>(&self, inside: impl FnOnce() -> T + Send) -> T {
        run_inside(&self.path(), inside)
    }

    /// Starts the command inside; it is killed when the guard drops.
    pub fn spawn(&self, mut command: Command) -> Result<Process> {
        self.run(move || Process::spawn(&mut command))
    }

    /// Runs the command inside to its end: its output, whatever its exit status.
    pub fn output(&self, mut command: Command) -> Result<std::process::Output> {
        let program = command.get_program().to_string_lossy().into_owned();
        self.run(move || command.output())
            .with_context(|| format!("running {program}"))
    }

    /// `ip -n <name> <words>`; without the name of the namespace: `netns.exec("link set eth0 up")`. Its output, or what failed.
    /// IPv6 addresses are added with `nodad`: usable at once.
    pub fn exec(&self, ip_words: &str) -> Result<String> {
        let words = ip_words.strip_prefix("ip ").unwrap_or(ip_words);
        // `accept_dad` 0 still leaves an address tentative until a work queue has run, and nobody can bind to it meanwhile.
        let tentative =
            words.starts_with("addr add ") && words.contains(':') && !words.contains(" nodad");
        run(["ip", "-n", &self.name]
            .into_iter()
            .chain(words.split_whitespace())
            .chain(tentative.then_some("nodad")))
    }

    /// Writes a sysctl of the namespace, named with dots (`net.ipv4.ip_forward`).
    pub fn sysctl(&self, name: &str, value: &str) -> Result<()> {
        let path = Path::new("/proc/sys").join(name.replace('.', "/"));
        self.run(|| std::fs::write(&path, value))
            .with_context(|| format!("setting {name}={value} in {}", self.name))
    }

    /// Routes between its interfaces, in both families.
    pub fn forward(&self) -> Result<()> {
        self.sysctl("net.ipv4.ip_forward", "1")?;
        self.sysctl("net.ipv6.conf.all.forwarding", "1")
    }

    /// Lets it stand.
    pub fn keep(self) {
        std::mem::forget(self);
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        remove(&self.name);
    }
}

/// Runs the closure on a thread of its own inside the namespace at `path`, which must exist.
pub(crate) fn run_inside<T: Send>(path: &Path, inside: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        scope
            .spawn(|| {
                enter(path).expect("the namespace lives as long as its guard");
                inside()
            })
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Moves the calling thread, for good, into the namespace at `path`.
pub fn enter(path: &Path) -> Result<()> {
    let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
        .with_context(|| format!("entering {}", path.display()))
}

/// The kernel tells IPv6 of a carrier from a work queue, which a busy machine may keep waiting.
const CARRIER_WITHIN: Duration = Duration::from_secs(20);

/// A veth pair between two namespaces, up on both ends, and known to be: until IPv6 has heard of the carrier, it refuses routes'
/// next hops on it.
pub fn veth(a: &Netns, a_name: &str, b: &Netns, b_name: &str) -> Result<()> {
    run([
        "ip",
        "link",
        "add",
        a_name,
        "netns",
        a.name(),
        "type",
        "veth",
        "peer",
        "name",
        b_name,
        "netns",
        b.name(),
    ])?;
    a.exec(&format!("link set {a_name} up"))?;
    b.exec(&format!("link set {b_name} up"))?;
    for (ns, name) in [(a, a_name), (b, b_name)] {
        let question = format!("link show dev {name} up");
        wait_for(&format!("the carrier of {name}"), CARRIER_WITHIN, || {
            let answer = ns.exec(&question).ok()?;
            answer.contains("state UP").then_some(())
        })?;
    }
    Ok(())
}

/// Kills what runs inside and deletes the name; a namespace that is gone already is no error.
fn remove(name: &str) {
    let path = Path::new(DIRECTORY).join(name);
    if let Ok(meta) = std::fs::metadata(&path) {
        kill_all(|pid| is_in(pid, &meta));
        let _ = run(["ip", "netns", "del", name]);
    }
}

fn is_in(pid: u32, netns: &std::fs::Metadata) -> bool {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(format!("/proc/{pid}/ns/net"))
        .is_ok_and(|m| m.ino() == netns.ino() && m.dev() == netns.dev())
}

pub(crate) fn sweep() {
    for name in netns_names().filter(|name| names::orphaned(name)) {
        remove(&name);
    }
}

/// The named network namespaces of this machine.
pub fn netns_names() -> impl Iterator<Item = String> {
    let entries = std::fs::read_dir(DIRECTORY).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok())
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn two_namespaces_talk_and_vanish() {
        if !crate::require_root() {
            return;
        }
        let (a, b) = (Netns::new("a").unwrap(), Netns::new("b").unwrap());
        veth(&a, "eth0", &b, "eth0").unwrap();
        a.exec("addr add 2001:db8::a/64 dev eth0").unwrap();
        b.exec("addr add 2001:db8::b/64 dev eth0").unwrap();
        let listener = b.run(|| TcpListener::bind("[2001:db8::b]:80").unwrap());
        a.run(|| TcpStream::connect("[2001:db8::b]:80").unwrap());
        listener.accept().unwrap();

        let mut sleep = Command::new("sleep");
        sleep.arg("1000");
        let process = a.spawn(sleep).unwrap();
        let pid = process.pid();
        let path = a.path();
        drop(process);
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
        drop(a);
        assert!(!path.exists());
    }

    #[test]
    fn a_panic_inside_leaves_nothing() {
        if !crate::require_root() {
            return;
        }
        let netns = Netns::new("p").unwrap();
        let path = netns.path();
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(move || {
            netns.run(|| panic!("on purpose"));
        }));
        assert!(panicked.is_err());
        assert!(!path.exists());
    }

    #[test]
    fn a_wrong_command_says_what_failed() {
        if !crate::require_root() {
            return;
        }
        let netns = Netns::new("e").unwrap();
        let error = netns.exec("link set nosuch up").unwrap_err().to_string();
        assert!(error.contains("nosuch"), "{error}");
    }
}
