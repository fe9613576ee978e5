//! A machine's own view of the file system and its own host name: what separates the container runtimes and kubelets of several
//! machines on one. A process holds the namespaces; whoever belongs to the machine is started inside them.
//!
//! Inside, a machine looks like one: `/run`, `/var/lib`, `/var/log`, `/opt` and the bpffs are its own, and so is what it writes below
//! `/etc`, so that containerd, the kubelet and kun's manifests find their default paths. Nothing of it is mounted outside, so it is
//! gone with the last process inside.

use std::ffi::{CStr, CString};
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::super::node::last_line;
use super::super::outside::logged;
use anyhow::{Context, Result, ensure};
use kun_harness::{Netns, Process};
use rustix::mount::{
    MountFlags, MountPropagationFlags, mount, mount_bind, mount_bind_recursive, mount_change,
};

/// What the kubelet would set on the whole machine; it leaves alone what has its value already, and finds these files instead
/// of the kernel's (`pkg/kubelet/cm`, `setupKernelTunables`).
const TUNABLES: &[(&str, &str)] = &[
    ("kernel/keys/root_maxbytes", "25000000"),
    ("kernel/keys/root_maxkeys", "1000000"),
    ("kernel/panic", "10"),
    ("kernel/panic_on_oops", "1"),
    ("vm/overcommit_memory", "1"),
    ("vm/panic_on_oom", "0"),
];

/// The namespaces of a machine, and who holds them.
#[derive(Debug)]
pub struct Room {
    holder: Process,
}

/// What a room is made of.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The lab's files: seen inside at the same path.
    pub lab: PathBuf,
    /// The machine's own files.
    pub state: PathBuf,
    /// The machine's name.
    pub hostname: String,
}

impl Room {
    /// Makes the namespaces, in the network namespace of the machine; mounts are done when this returns.
    pub fn open(lab_program: &Path, plan: &Plan, netns: &Netns) -> Result<Self> {
        let mut command = Command::new("unshare");
        make(&plan.state)?;
        let log = plan.state.join("room.log");
        logged(&mut command, &log)?;
        command
            .args(["--mount", "--uts", "--propagation", "private"])
            .arg(lab_program)
            .arg("room")
            .arg("--lab")
            .arg(&plan.lab)
            .arg("--state")
            .arg(&plan.state)
            .arg("--hostname")
            .arg(&plan.hostname)
            .stdout(Stdio::piped());
        let mut holder = netns.spawn(command)?;
        let output = holder
            .stdout
            .take()
            .context("a piped child has an output")?;
        let mut line = String::new();
        BufReader::new(output).read_line(&mut line)?;
        ensure!(
            line == READY,
            "{}: its namespaces could not be made: {}",
            plan.hostname,
            last_line(&log)
        );
        Ok(Self { holder })
    }

    /// The same command, inside. `nsenter` becomes the program: its pid is the program's.
    pub fn wrap(&self, command: &Command) -> Command {
        let mut wrapped = Command::new("nsenter");
        wrapped
            .arg("--target")
            .arg(self.holder.pid().to_string())
            .args(["--mount", "--uts", "--"])
            .arg(command.get_program())
            .args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => wrapped.env(name, value),
                None => wrapped.env_remove(name),
            };
        }
        wrapped
    }

    /// Who holds it.
    pub fn pid(&self) -> u32 {
        self.holder.pid()
    }
}

const READY: &str = "ready\n";

/// The holder: mounts, says so, and stays.
pub fn hold(plan: &Plan) -> Result<()> {
    furnish(plan)?;
    print!("{READY}");
    std::io::Write::flush(&mut std::io::stdout())?;
    loop {
        std::thread::park();
    }
}

fn furnish(plan: &Plan) -> Result<()> {
    rustix::system::sethostname(plan.hostname.as_bytes()).context("setting the host name")?;
    let state = &plan.state;
    for (file, value) in TUNABLES {
        let fake = state.join("sys").join(file);
        make(fake.parent().unwrap_or(state))?;
        fs::write(&fake, format!("{value}\n"))
            .with_context(|| format!("writing {}", fake.display()))?;
        bind(&fake, &Path::new("/proc/sys").join(file))?;
    }
    let run = state.join("run");
    make(&run)?;
    mount(
        c"tmpfs",
        &run,
        c"tmpfs",
        MountFlags::NOSUID | MountFlags::NODEV,
        None::<&CStr>,
    )
    .with_context(|| format!("mounting a tmpfs at {}", run.display()))?;
    let lab = run.join(plan.lab.strip_prefix("/run").unwrap_or(&plan.lab));
    make(&lab)?;
    mount_bind_recursive(&plan.lab, &lab)
        .with_context(|| format!("binding {}", plan.lab.display()))?;
    for inside in ["netns", "containerd", "lock"] {
        make(&run.join(inside))?;
    }
    let (log, lib) = (state.join("log"), state.join("lib"));
    for directory in [log.join("containers"), log.join("pods"), lib.clone()] {
        make(&directory)?;
    }
    mount_bind_recursive(&run, "/run").context("binding /run")?;
    bind(
        &plan.lab.join("bpf").join(&plan.hostname),
        Path::new("/sys/fs/bpf"),
    )?;
    let opt = state.join("opt");
    make(&opt)?;
    bind(&opt, Path::new("/opt"))?;
    over_etc(&state.join("etc"))?;
    bind(&log, Path::new("/var/log"))?;
    // Last: the machine's own files lie below it, too.
    bind(&lib, Path::new("/var/lib"))?;
    // The kubelet's mounts must reach containers that ask for them.
    mount_change(
        "/",
        MountPropagationFlags::SHARED | MountPropagationFlags::REC,
    )
    .context("sharing mounts among the machine's own")
}

/// The machine's own layer over the real `/etc`.
fn over_etc(layer: &Path) -> Result<()> {
    let (upper, work) = (layer.join("upper"), layer.join("work"));
    make(&upper)?;
    make(&work)?;
    let options = format!(
        "lowerdir=/etc,upperdir={},workdir={}",
        upper.display(),
        work.display()
    );
    let options = CString::new(options)?;
    let flags = MountFlags::empty();
    mount(
        c"overlay",
        "/etc",
        c"overlay",
        flags,
        Some(options.as_c_str()),
    )
    .context("mounting an overlay over /etc")
}

fn make(directory: &Path) -> Result<()> {
    fs::create_dir_all(directory).with_context(|| format!("making {}", directory.display()))
}

fn bind(what: &Path, onto: &Path) -> Result<()> {
    mount_bind(what, onto)
        .with_context(|| format!("binding {} onto {}", what.display(), onto.display()))
}
