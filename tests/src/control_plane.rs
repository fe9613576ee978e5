//! A real Kubernetes control plane for a test: kube-apiserver, etcd and the controllers, on loopback, gone with the test.
//!
//! `cargo xtask peers` builds the binary once (`tests/control-plane/`); without it a test skips and says so. The server's data lies
//! in a temporary directory without fsync. It ends when this process does: it reads our end of a pipe.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

/// Where `cargo xtask peers` leaves the binary.
pub fn binary() -> PathBuf {
    kun_ebpf_build::cache_dir().join("peers/bin/kun-control-plane")
}

/// What the server says of itself once it is ready.
#[derive(Debug, serde::Deserialize)]
#[serde(rename_all = "camelCase")]
struct Ready {
    server: String,
    kubeconfig: PathBuf,
    node_kubeconfigs: std::collections::BTreeMap<String, PathBuf>,
}

/// A running control plane.
#[derive(Debug)]
pub struct ControlPlane {
    server: Child,
    ready: Ready,
    dir: tempfile::TempDir,
}

impl ControlPlane {
    /// Starts one, with kubelet credentials for `nodes`; returns when the API server and the controllers answer.
    pub fn start(nodes: &[&str]) -> Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix("kun-control-plane-")
            .tempdir()
            .context("a directory for the control plane")?;
        let mut server = Command::new(binary())
            .arg("serve")
            .arg("--dir")
            .arg(dir.path())
            .arg("--nodes")
            .arg(nodes.join(","))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| binary().display().to_string())?;
        let mut line = String::new();
        let out = server
            .stdout
            .take()
            .context("the control plane has no stdout")?;
        BufReader::new(out).read_line(&mut line)?;
        if line.is_empty() {
            let ended = server.wait_with_output()?;
            let said = String::from_utf8_lossy(&ended.stderr);
            bail!("the control plane did not come up: {}", said.trim());
        }
        let ready = serde_json::from_str(&line)
            .with_context(|| format!("the control plane said {line:?}"))?;
        Ok(Self { server, ready, dir })
    }

    /// `https://…` of the API server.
    pub fn server(&self) -> &str {
        &self.ready.server
    }

    /// An administrator's kubeconfig.
    pub fn kubeconfig(&self) -> &PathBuf {
        &self.ready.kubeconfig
    }

    /// A node's kubeconfig, as its kubelet has it.
    pub fn node_kubeconfig(&self, node: &str) -> Option<&PathBuf> {
        self.ready.node_kubeconfigs.get(node)
    }

    /// Where data, certificates and logs lie.
    pub fn dir(&self) -> &std::path::Path {
        self.dir.path()
    }

    /// `kubectl` as the administrator; its standard output.
    pub fn kubectl(&self, words: &[&str], stdin: &str) -> Result<String> {
        let mut kubectl = Command::new(binary())
            .arg("kubectl")
            .args(words)
            .env("KUBECONFIG", self.kubeconfig())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        {
            use std::io::Write;
            let mut pipe = kubectl.stdin.take().context("kubectl has no stdin")?;
            pipe.write_all(stdin.as_bytes())?;
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
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        drop(self.server.stdin.take());
        // It ends by itself when its standard input does; the data directory goes after it.
        let _ = self.server.wait();
    }
}
