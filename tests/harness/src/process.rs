//! Processes that do not outlive their test.

use std::ops::{Deref, DerefMut};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};

/// A child that is killed and reaped on drop. Its standard input is closed.
#[derive(Debug)]
pub struct Process {
    child: Child,
    name: String,
}

impl Process {
    /// Starts it where the calling thread stands (see [`crate::Netns::spawn`]).
    pub fn spawn(command: &mut Command) -> Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        let child = command
            .stdin(Stdio::null())
            .spawn()
            .with_context(|| format!("starting {name}"))?;
        Ok(Self { child, name })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The program it was started from.
    pub fn program(&self) -> &str {
        &self.name
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_raw(self.child.id() as i32).context("a child has a pid")?;
        kill_process(pid, signal).with_context(|| format!("signalling {}", self.name))
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }
}

impl Deref for Process {
    type Target = Child;
    fn deref(&self) -> &Child {
        &self.child
    }
}

impl DerefMut for Process {
    fn deref_mut(&mut self) -> &mut Child {
        &mut self.child
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a command to its end: standard output, or an error with the command and its standard error.
pub fn run<'a>(words: impl IntoIterator<Item = &'a str>) -> Result<String> {
    let words: Vec<&str> = words.into_iter().collect();
    let (program, arguments) = words.split_first().context("an empty command")?;
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("running {program}: is it installed?"))?;
    anyhow::ensure!(
        output.status.success(),
        "{}: {}: {}",
        words.join(" "),
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Kills every process that the predicate picks, and those that they start meanwhile, until there is none. Never the caller.
pub(crate) fn kill_all(pick: impl Fn(u32) -> bool) {
    let _ = crate::wait_until(std::time::Duration::from_secs(10), || {
        let mut none = true;
        for pid in pids().filter(|&pid| pid != std::process::id() && pick(pid)) {
            kill_now(pid);
            none = false;
        }
        none
    });
}

/// SIGKILL; a process that is gone already is no error.
pub(crate) fn kill_now(pid: u32) {
    if pid != std::process::id()
        && let Some(pid) = Pid::from_raw(pid as i32)
    {
        let _ = kill_process(pid, Signal::KILL);
    }
}

fn pids() -> impl Iterator<Item = u32> {
    std::fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}
