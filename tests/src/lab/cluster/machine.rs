//! A machine as Kubernetes has it: a containerd with runc, and a kubelet, in a room of their own.
//!
//! What the settings are for: the machine may have cgroup v1 controllers beside v2 (the kubelet refuses that unless told), has
//! no systemd, and must keep its sysctls, its iptables and the memory of its other programs. Everything else is default.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use kun_harness::{Netns, Process, cgroup_mounts, peers, wait_for};
use serde_json::json;

use super::super::names::{CLUSTER_DNS_V4, CLUSTER_DNS_V6, CLUSTER_DOMAIN, LabName, Machine};
use super::super::node::{Node, Places, last_line};
use super::super::outside::logged;
use super::image;
use super::room::{Plan, Room};
use crate::control_plane;

/// containerd answers in a second; a machine that starts three of them at once takes more.
const ANSWERS_WITHIN: Duration = Duration::from_secs(60);

/// Programs that `cargo xtask peers` builds beside the control plane.
pub const PEERS: [&str; 3] = ["containerd", "containerd-shim-runc-v2", "ctr"];

/// Debian's, by `cargo xtask setup`.
pub const RUNC: &str = "/usr/sbin/runc";

/// What runs on a machine besides kun.
#[derive(Debug)]
pub struct Runtime {
    /// Its view of the file system.
    pub room: Room,
    /// containerd.
    pub containerd: Process,
    /// The kubelet; `None` until the API server is there.
    pub kubelet: Option<Process>,
    machine: &'static Machine,
    directory: PathBuf,
}

impl Runtime {
    /// Starts containerd and gives it the image.
    pub fn start(
        name: &LabName,
        places: &Places,
        node: &Node,
        netns: &Netns,
        image: &Path,
    ) -> Result<Self> {
        let machine = node.machine;
        let directory = node.directory.clone();
        fs::write(directory.join("containerd.toml"), containerd_toml())?;
        // The kubelet wants its root in every hierarchy that there is; runc makes the rest.
        for root in cgroup_mounts()? {
            let path = name.cgroup(&root).join(machine.name);
            fs::create_dir_all(&path).with_context(|| path.display().to_string())?;
        }
        let plan = Plan {
            lab: places.directory.clone(),
            state: name.state().join(machine.name),
            hostname: machine.name.to_owned(),
        };
        let room = Room::open(&places.program("kun-lab")?, &plan, netns)?;
        let mut runtime = Self {
            containerd: spawn(&room, &directory, netns)?,
            room,
            kubelet: None,
            machine,
            directory,
        };
        runtime.answers(netns)?;
        runtime.import(netns, image)?;
        Ok(runtime)
    }

    /// Starts containerd again, after it was killed: sandboxes live on with their shims.
    pub fn start_containerd(&mut self, netns: &Netns) -> Result<()> {
        self.containerd = spawn(&self.room, &self.directory, netns)?;
        self.answers(netns)
    }

    fn answers(&mut self, netns: &Netns) -> Result<()> {
        let question = self.ctr(&["version"])?;
        let (containerd, room) = (&mut self.containerd, &self.room);
        let there = wait_for("containerd answering", ANSWERS_WITHIN, || {
            if !containerd.is_running() {
                return Some(false);
            }
            let output = netns.output(room.wrap(&question)).ok()?;
            output.status.success().then_some(true)
        });
        let told = || {
            format!(
                "{}: {}",
                self.machine.name,
                last_line(&log(&self.directory))
            )
        };
        match there.with_context(told)? {
            true => Ok(()),
            false => bail!("containerd ended: {}", told()),
        }
    }

    fn ctr(&self, words: &[&str]) -> Result<Command> {
        let mut ctr = Command::new(peers::path("ctr"));
        ctr.args(["--address", SOCKET, "--namespace", "k8s.io"])
            .args(words)
            .env("PATH", path()?);
        Ok(ctr)
    }

    fn import(&self, netns: &Netns, image: &Path) -> Result<()> {
        let image = image.to_str().context("a path that is UTF-8")?;
        let command = self.ctr(&["images", "import", image])?;
        let output = netns.output(self.room.wrap(&command))?;
        anyhow::ensure!(
            output.status.success(),
            "{}: importing {image}: {}{}",
            self.machine.name,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(())
    }

    /// A way in for people, as a script.
    pub fn write_door(&self) -> Result<()> {
        let text = format!(
            "#!/bin/sh\n# Runs a command on {}; a shell without one.\n[ $# -gt 0 ] || set -- sh\n\
             export PATH={}:$PATH CONTAINER_RUNTIME_ENDPOINT=unix://{SOCKET}\n\
             exec nsenter --target {} --mount --uts --net -- \"$@\"\n",
            self.machine.name,
            peers::directory().display(),
            self.room.pid()
        );
        write_script(&self.directory.join("enter"), &text)
    }

    /// What ended that should not have.
    pub fn ended(&mut self) -> Option<anyhow::Error> {
        let kubelet = self.kubelet.as_mut().map(|p| ("kubelet", p));
        let all = [("containerd", &mut self.containerd)]
            .into_iter()
            .chain(kubelet);
        let (name, _) = all.into_iter().find_map(|(name, process)| {
            let ended = !process.is_running();
            ended.then_some((name, ()))
        })?;
        let log = self.directory.join(format!("{name}.log"));
        let machine = self.machine.name;
        Some(anyhow::anyhow!(
            "{machine}: {name} ended: {}",
            last_line(&log)
        ))
    }

    /// Starts, or starts again, the kubelet.
    pub fn start_kubelet(
        &mut self,
        name: &LabName,
        netns: &Netns,
        kubeconfig: &Path,
        ca: &Path,
    ) -> Result<()> {
        let config = self.directory.join("kubelet.yaml");
        // No pod of the lab looks names up through its node.
        let resolv = self.directory.join("resolv.conf");
        fs::write(&resolv, "")?;
        let machine = self.machine;
        let root = format!("/{}/{}", name.cgroup_name(), machine.name);
        let taints = match machine.schedulable {
            true => json!([]),
            false => json!([{"key": "kun.network/gateway", "effect": "NoSchedule"}]),
        };
        let settings = json!({
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "failCgroupV1": false,
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": root,
            "enforceNodeAllocatable": [],
            "oomScoreAdj": 0,
            "containerRuntimeEndpoint": format!("unix://{SOCKET}"),
            "address": "::",
            "authentication": {"anonymous": {"enabled": false}, "webhook": {"enabled": true}, "x509": {"clientCAFile": ca}},
            "authorization": {"mode": "Webhook"},
            "clusterDNS": [CLUSTER_DNS_V6, CLUSTER_DNS_V4],
            "clusterDomain": CLUSTER_DOMAIN,
            "resolvConf": resolv,
            // Without /dev/kmsg, as in a container, the kubelet goes on.
            "featureGates": {"KubeletInUserNamespace": true},
            "failSwapOn": false,
            "makeIPTablesUtilChains": false,
            "imageGCHighThresholdPercent": 100,
            "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
            "volumePluginDir": "/var/lib/kubelet/volumeplugins",
            "registerWithTaints": taints,
            "maxPods": 200,
        });
        fs::write(&config, serde_saphyr::to_string(&settings)?)?;
        let mut kubelet = Command::new(control_plane::binary());
        kubelet
            .arg("kubelet")
            .arg("--config")
            .arg(config)
            .arg("--kubeconfig")
            .arg(kubeconfig)
            .args(["--hostname-override", machine.name])
            .arg("--node-ip")
            .arg(format!("{},{}", machine.v6(), machine.v4()))
            .arg("--node-labels")
            .arg(format!("topology.kubernetes.io/zone={}", machine.zone))
            .env("PATH", path()?);
        let mut kubelet = self.room.wrap(&kubelet);
        logged(&mut kubelet, &self.directory.join("kubelet.log"))?;
        self.kubelet = Some(netns.spawn(kubelet)?);
        Ok(())
    }
}

fn log(directory: &Path) -> PathBuf {
    directory.join("containerd.log")
}

fn spawn(room: &Room, directory: &Path, netns: &Netns) -> Result<Process> {
    let mut containerd = Command::new(peers::path("containerd"));
    containerd
        .arg("--config")
        .arg(directory.join("containerd.toml"))
        .env("PATH", path()?);
    let mut containerd = room.wrap(&containerd);
    logged(&mut containerd, &log(directory))?;
    netns.spawn(containerd)
}

/// Inside the room.
pub const SOCKET: &str = "/run/containerd/containerd.sock";

/// containerd finds its shim, and the kubelet its mount helpers, by PATH.
fn path() -> Result<std::ffi::OsString> {
    let mut directories = vec![peers::directory()];
    let given = std::env::var_os("PATH").unwrap_or_default();
    directories.extend(std::env::split_paths(&given));
    std::env::join_paths(directories).context("PATH")
}

/// Plugins and their lists are where everybody has them: kun's manifests place them.
fn containerd_toml() -> String {
    format!(
        r#"version = 4
imports = []
disabled_plugins = ["io.containerd.nri.v1.nri", "io.containerd.internal.v1.opt"]

[plugins."io.containerd.metadata.v1.bolt"]
no_sync = true

[plugins."io.containerd.cri.v1.images".pinned_images]
sandbox = "{pause}"

[plugins."io.containerd.cri.v1.runtime"]
disable_apparmor = true
restrict_oom_score_adj = true

[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"

[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
BinaryName = "{RUNC}"

[plugins."io.containerd.cri.v1.runtime".cni]
bin_dirs = ["/opt/cni/bin"]
conf_dir = "/etc/cni/net.d"
use_internal_loopback = true
"#,
        pause = image::PAUSE,
    )
}

/// A file that people execute.
pub fn write_script(path: &Path, text: &str) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::write(path, text)
        .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(0o755)))
        .with_context(|| format!("writing {}", path.display()))
}
