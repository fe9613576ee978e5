//! A real Kubernetes control plane for a test: kube-apiserver, etcd and the controllers, gone with the test.
//!
//! `cargo xtask peers` builds the binary once (`tests/control-plane/`); without it a test skips and says so. A test that only reads and
//! writes objects takes the test binary's one server and a namespace of its own:
//!
//! ```no_run
//! # use kun_harness::ControlPlane;
//! let Some(plane) = ControlPlane::shared() else { return }; // skipped: not built
//! let shop = plane.namespace("shop").unwrap();
//! shop.kubectl(&["apply", "-f", "-"], "{apiVersion: v1, kind: ConfigMap, metadata: {name: c}}").unwrap();
//! ```
//!
//! A test that breaks the server takes a fresh one; what breaks it takes `&mut self`, so nobody can break the shared one:
//!
//! ```no_run
//! # use kun_harness::control_plane::{ControlPlane, Part};
//! let Some(builder) = ControlPlane::builder() else { return };
//! let mut plane = builder.nodes(["node-a"]).start().unwrap();
//! plane.kill(Part::ApiServer).unwrap();
//! plane.start(Part::ApiServer, &[]).unwrap(); // same port, same objects
//! ```
//!
//! Clients get [`ControlPlane::kubeconfig`] (an administrator), [`ControlPlane::node_kubeconfig`] (a kubelet), or a ServiceAccount's
//! token in a file ([`ControlPlane::write_token`]) with a kubeconfig that names it ([`ControlPlane::token_kubeconfig`]). The server listens
//! on loopback, or inside a network namespace on an address of it ([`Builder::netns`], [`Builder::bind`]).
//!
//! The server's data lies in a temporary directory without fsync. The server ends when this process does, however it dies: it reads
//! our end of a pipe, and removes its directory.

mod builder;
mod faults;
mod namespace;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

pub use builder::Builder;
pub use faults::{ApiServer, Backup, Part};
pub use namespace::Namespace;

use crate::peers;

/// The binary's name below the peers' directory.
const PROGRAM: &str = "kun-control-plane";

/// What the server says of itself once it is ready.
#[derive(Debug, serde::Deserialize)]
#[serde(rename_all = "camelCase")]
struct Ready {
    server: String,
    kubeconfig: PathBuf,
    ca: PathBuf,
    node_kubeconfigs: BTreeMap<String, PathBuf>,
    pids: BTreeMap<String, u32>,
}

/// One line of what it says later.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default)]
struct Answer {
    error: Option<String>,
    pid: u32,
    server: String,
    kubeconfig: PathBuf,
    token: String,
    revision: i64,
}

/// Our ends of its pipes.
#[derive(Debug)]
struct Line {
    ask: ChildStdin,
    answers: BufReader<ChildStdout>,
}

/// A running control plane. Dropped, it is gone.
#[derive(Debug)]
pub struct ControlPlane {
    serve: Child,
    /// `None` once it is being taken down.
    line: Option<Mutex<Line>>,
    ready: Ready,
    dir: PathBuf,
    netns: Option<PathBuf>,
}

/// Where `cargo xtask peers` leaves the binary. It is also every Kubernetes program: `kun-control-plane kubelet …`.
pub fn binary() -> PathBuf {
    peers::path(PROGRAM)
}

impl ControlPlane {
    /// The one server of this test binary, on loopback, started by who asks first, gone when the binary ends. `None`, with a skip
    /// recorded, when the control plane is not built. Tests keep apart by namespaces ([`ControlPlane::namespace`]).
    ///
    /// # Panics
    /// When it does not come up.
    pub fn shared() -> Option<&'static Self> {
        static SHARED: OnceLock<Result<ControlPlane, String>> = OnceLock::new();
        let builder = Self::builder()?;
        let shared = SHARED.get_or_init(|| builder.start().map_err(|e| format!("{e:#}")));
        Some(
            shared
                .as_ref()
                .unwrap_or_else(|e| panic!("the shared control plane: {e}")),
        )
    }

    /// Makes a server of a test's own. `None`, with a skip recorded, when the control plane is not built.
    pub fn builder() -> Option<Builder> {
        peers::require(PROGRAM).map(|_| Builder::default())
    }

    /// `https://…` of the API server.
    pub fn server(&self) -> &str {
        &self.ready.server
    }

    /// The authority that the API server's certificate is from, a PEM file.
    pub fn ca(&self) -> &Path {
        &self.ready.ca
    }

    /// An administrator's kubeconfig (a client certificate).
    pub fn kubeconfig(&self) -> &Path {
        &self.ready.kubeconfig
    }

    /// A node's kubeconfig, as its kubelet has it; of the nodes that [`Builder::nodes`] named.
    pub fn node_kubeconfig(&self, node: &str) -> Option<&Path> {
        self.ready.node_kubeconfigs.get(node).map(PathBuf::as_path)
    }

    /// Where data, certificates, kubeconfigs and logs (`kube-apiserver.log` and so on) lie.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A namespace for one test, with its `default` ServiceAccount; deleted when the guard drops.
    pub fn namespace(&self, what: &str) -> Result<Namespace<'_>> {
        Namespace::new(self, what)
    }

    /// A token of a ServiceAccount that is refused after `lifetime` (and never less than a second). From ten minutes on it is one
    /// of the TokenRequest API; shorter ones, which that API refuses, are signed with the server's key and no less valid. The API
    /// server remembers a token that it accepted for ten seconds, and accepts it so much longer.
    pub fn token(&self, namespace: &str, account: &str, lifetime: Duration) -> Result<String> {
        let seconds = lifetime.as_secs().max(1);
        Ok(self
            .ask(&format!("token {namespace} {account} {seconds}"))?
            .token)
    }

    /// Writes such a token into a file, atomically, as a kubelet renews a mounted one.
    pub fn write_token(
        &self,
        namespace: &str,
        account: &str,
        lifetime: Duration,
        file: &Path,
    ) -> Result<()> {
        let token = self.token(namespace, account, lifetime)?;
        let fresh = file.with_extension("new");
        std::fs::write(&fresh, token)
            .and_then(|()| std::fs::rename(&fresh, file))
            .with_context(|| file.display().to_string())
    }

    /// Writes a kubeconfig whose user is the token in `token_file`, read anew by the client as it sees fit.
    pub fn token_kubeconfig(&self, token_file: &Path, out: &Path) -> Result<()> {
        let text = format!(
            "apiVersion: v1\nkind: Config\nclusters: [{{name: test, cluster: {{server: {:?}, certificate-authority: {:?}}}}}]\n\
             users: [{{name: token, user: {{tokenFile: {token_file:?}}}}}]\ncontexts: [{{name: test, context: {{cluster: test, user: token}}}}]\n\
             current-context: test\n",
            self.server(),
            self.ca()
        );
        std::fs::write(out, text).with_context(|| out.display().to_string())
    }

    /// `kubectl` as the administrator, with `stdin` as its input; its standard output.
    pub fn kubectl(&self, words: &[&str], stdin: &str) -> Result<String> {
        self.kubectl_as(self.kubeconfig(), words, stdin)
    }

    /// `kubectl` as whom the kubeconfig says.
    pub fn kubectl_as(&self, kubeconfig: &Path, words: &[&str], stdin: &str) -> Result<String> {
        let mut command = Command::new(binary());
        command
            .arg("kubectl")
            .args(words)
            .env("KUBECONFIG", kubeconfig)
            // What it learns of the server goes with the server, not into the home of whoever runs the test.
            .env("KUBECACHEDIR", self.dir.join("kubectl"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut kubectl = self.inside(&mut command).context("starting kubectl")?;
        if let Some(mut pipe) = kubectl.stdin.take() {
            match pipe.write_all(stdin.as_bytes()) {
                // One that refuses its flags does not read; its error tells more than a broken pipe does.
                Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => return Err(e.into()),
                _ => {}
            }
        }
        let done = kubectl.wait_with_output()?;
        ensure!(
            done.status.success(),
            "kubectl {}: {}",
            words.join(" "),
            String::from_utf8_lossy(&done.stderr).trim()
        );
        Ok(String::from_utf8(done.stdout)?)
    }

    /// Starts a command where the server is.
    fn inside(&self, command: &mut Command) -> Result<Child> {
        Ok(match &self.netns {
            Some(netns) => crate::netns::run_inside(netns, || command.spawn()),
            None => command.spawn(),
        }?)
    }

    /// Tells `serve` to do something, and waits until it has.
    fn ask(&self, command: &str) -> Result<Answer> {
        let line = self.line.as_ref().context("the control plane is gone")?;
        let mut line = line.lock().unwrap_or_else(PoisonError::into_inner);
        writeln!(line.ask, "{command}")
            .with_context(|| format!("{command}: the control plane is gone"))?;
        let answer: Answer =
            read(&mut line.answers)?.with_context(|| format!("{command}: no answer"))?;
        match answer.error {
            Some(error) => bail!("{command}: {error}"),
            None => Ok(answer),
        }
    }

    /// Lets it stand when this process ends; whoever keeps the books ends it by SIGTERM to the process id that is returned.
    pub fn keep(mut self) -> Result<u32> {
        self.ask("keep")?;
        drop(self.line.take());
        let pid = self.serve.id();
        std::mem::forget(self);
        Ok(pid)
    }
}

/// The next line, parsed; `None` at the end.
fn read<T: serde::de::DeserializeOwned>(from: &mut BufReader<ChildStdout>) -> Result<Option<T>> {
    let mut line = String::new();
    if from.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    serde_json::from_str(&line)
        .map(Some)
        .with_context(|| format!("the control plane said {line:?}"))
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        // It ends by itself when its standard input does, and takes its directory along.
        drop(self.line.take());
        let _ = self.serve.wait();
    }
}

pub(crate) fn sweep() {
    for entry in std::fs::read_dir(std::env::temp_dir())
        .into_iter()
        .flatten()
        .flatten()
    {
        let name = entry.file_name();
        // Others' leavings carry the mark too, but only ours are in the temporary directory.
        if name.to_str().is_some_and(crate::names::orphaned) {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}
