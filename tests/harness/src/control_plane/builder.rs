//! What a control plane is asked to be before it starts.

use std::io::BufReader;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;

use anyhow::{Context, Result, bail};

use super::{Answer, ControlPlane, Line, Ready, binary, read};
use crate::names;

/// A control plane that is not started yet: by default on loopback, on a free port, without scheduler, with a directory of its own.
#[derive(Debug, Default)]
pub struct Builder {
    flags: Vec<String>,
    netns: Option<PathBuf>,
    dir: Option<PathBuf>,
}

impl Builder {
    fn flag(mut self, name: &str, value: impl std::fmt::Display) -> Self {
        self.flags.push(format!("--{name}={value}"));
        self
    }

    /// Issues kubelet credentials for these nodes. It makes no Node objects.
    pub fn nodes<'a>(self, nodes: impl IntoIterator<Item = &'a str>) -> Self {
        let nodes: Vec<&str> = nodes.into_iter().collect();
        self.flag("nodes", nodes.join(","))
    }

    /// Runs it inside the network namespace at this path (see [`crate::Netns::path`]), `kubectl` too.
    pub fn netns(mut self, path: impl Into<PathBuf>) -> Self {
        self.netns = Some(path.into());
        self
    }

    /// The API server's address. On other than loopback it is the endpoint of Service `kubernetes`, and the first service range must be
    /// of its family.
    pub fn bind(self, address: IpAddr) -> Self {
        self.flag("bind", address)
    }

    /// The address that clients and Service `kubernetes` use, where `bind` is `::` to serve both families.
    pub fn advertise(self, address: IpAddr) -> Self {
        self.flag("advertise", address)
    }

    /// The API server's port.
    pub fn port(self, port: u16) -> Self {
        self.flag("port", port)
    }

    /// Ranges of ClusterIPs, comma separated, at most one a family.
    pub fn service_cidrs(self, ranges: &str) -> Self {
        self.flag("service-cidr", ranges)
    }

    /// Ranges that nodes get their pod CIDRs from, comma separated; empty: nodes get none.
    pub fn pod_cidrs(self, ranges: &str) -> Self {
        self.flag("pod-cidr", ranges)
    }

    /// Runs kube-scheduler too.
    pub fn scheduler(self) -> Self {
        self.flag("scheduler", true)
    }

    /// Further names and addresses in the API server's certificate, comma separated.
    pub fn san(self, names: &str) -> Self {
        self.flag("san", names)
    }

    /// Further flags of every API server, such as `--min-request-timeout=2` (watches end after two to four seconds) or
    /// `--watch-cache=false`.
    pub fn apiserver_flags(self, flags: &[&str]) -> Self {
        self.flag("apiserver-flags", flags.join(" "))
    }

    /// Further flags of kube-controller-manager, such as `--controllers=*,-node-lifecycle-controller`, with which Nodes that have no
    /// kubelet stay as they are.
    pub fn controller_flags(self, flags: &[&str]) -> Self {
        self.flag("controller-flags", flags.join(" "))
    }

    /// A directory of the caller's, which must exist, and which the caller removes.
    pub fn dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.dir = Some(dir.into());
        self
    }

    /// Starts it; returns when the API server and the controllers answer, which takes about four CPU seconds.
    pub fn start(self) -> Result<ControlPlane> {
        names::sweep_once();
        let own = self.dir.is_none();
        let dir = self
            .dir
            .unwrap_or_else(|| std::env::temp_dir().join(names::unique("plane")));
        std::fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
        let mut command = Command::new(binary());
        command
            .arg("serve")
            .arg("--dir")
            .arg(&dir)
            .args(own.then_some("--remove"))
            .args(&self.flags)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let started = match &self.netns {
            Some(netns) => crate::netns::run_inside(netns, || spawn(&mut command)),
            None => spawn(&mut command),
        };
        let (mut serve, mut line) = started
            .inspect_err(|_| forget(own, &dir))
            .with_context(|| binary().display().to_string())?;
        let ready = match read::<Said>(&mut line.answers) {
            Ok(Some(Said::Ready(ready))) => ready,
            other => {
                let _ = serve.kill();
                let _ = serve.wait();
                forget(own, &dir);
                match other? {
                    Some(Said::Not(answer)) => {
                        bail!(
                            "the control plane did not come up: {}",
                            answer.error.unwrap_or_default()
                        )
                    }
                    _ => bail!("the control plane did not come up, and said nothing"),
                }
            }
        };
        Ok(ControlPlane {
            serve,
            line: Some(Mutex::new(line)),
            ready,
            dir,
            netns: self.netns,
        })
    }
}

/// Its first line.
#[derive(serde::Deserialize)]
#[serde(untagged)]
enum Said {
    Ready(Ready),
    Not(Answer),
}

fn spawn(command: &mut Command) -> Result<(std::process::Child, Line)> {
    let mut serve = command.spawn()?;
    let ask = serve.stdin.take().context("it has no stdin")?;
    let out = serve.stdout.take().context("it has no stdout")?;
    let answers = BufReader::new(out);
    Ok((serve, Line { ask, answers }))
}

/// What a server that did not come up may have left.
fn forget(own: bool, dir: &Path) {
    if own {
        let _ = std::fs::remove_dir_all(dir);
    }
}
