//! The lab's other ground: a real Kubernetes. An API server with etcd, the controllers and the scheduler run on a machine of the
//! fabric; every node has a real containerd and a real kubelet; pods are their work, and EndpointSlices the controllers'.
//!
//! Refuses what the lab plays elsewhere: it starts no pod, and writes no EndpointSlice.

pub mod image;
pub mod machine;
pub mod mirror;
pub mod objects;
pub mod room;
pub mod watch;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kun_harness::{Netns, Process, wait_for};
use serde_json::{Value, json};

use super::client::Client;
use super::expand::ServicePlan;
use super::names::{CONTROL, LabName, MACHINES};
use super::node::{Node, Places, last_line};
use super::pod::Pod;
use super::topology::Topology;
use crate::control_plane;
use machine::Runtime;
use watch::Watch;

/// The API server's port, on the control plane's address of the fabric.
const PORT: u16 = 6443;
/// Ranges of cluster addresses: IPv6 first, which makes it the first family of every Service.
const SERVICES: &str = "fd00:10:96::/112,10.96.0.0/16";
/// For the node controller alone: pods get theirs from kun.
const POD_RANGES: &str = "fd00:10:244::/56,10.244.0.0/16";
/// Pods are scheduled and started two by two on a small machine; a busy one takes its time.
const READY_WITHIN: Duration = Duration::from_secs(180);

/// What the control plane says of itself once it is ready.
#[derive(Debug, serde::Deserialize)]
#[serde(rename_all = "camelCase")]
struct Ready {
    kubeconfig: PathBuf,
    ca: PathBuf,
    node_kubeconfigs: BTreeMap<String, PathBuf>,
}

/// A control plane and its nodes.
#[derive(Debug)]
pub struct Cluster {
    /// Nodes and gateway, in the order of [`MACHINES`].
    pub runtimes: Vec<Runtime>,
    ready: Ready,
    control: PathBuf,
    _plane: Process,
}

impl Cluster {
    /// Whether everything that it needs is built; else what is missing.
    pub fn missing() -> Option<String> {
        if !control_plane::binary().is_file() {
            return Some("the control plane is not built: cargo xtask peers".to_owned());
        }
        if !Path::new(machine::RUNC).is_file() {
            return Some("runc is not installed: cargo xtask setup".to_owned());
        }
        let peers = machine::peers();
        machine::PEERS
            .iter()
            .find(|name| !peers.join(name).is_file())
            .map(|name| format!("{name} is not built: cargo xtask peers"))
    }

    /// Brings up the control plane, and at the same time a container runtime on every machine; then the kubelets.
    pub fn start(
        name: &LabName,
        places: &Places,
        topology: &Topology,
        nodes: &[Node],
    ) -> Result<Self> {
        let control = topology
            .control
            .as_ref()
            .context("a control plane has a machine")?;
        let (plane, mut runtimes) = std::thread::scope(|scope| {
            let plane = scope.spawn(|| start_plane(places, control));
            let runtimes = start_runtimes(name, places, topology, nodes);
            let plane = plane
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            Ok::<_, anyhow::Error>((plane?, runtimes?))
        })?;
        let (plane, ready) = plane;
        for (runtime, node) in runtimes.iter_mut().zip(nodes) {
            let kubeconfig = ready
                .node_kubeconfigs
                .get(node.machine.name)
                .context("the control plane made no kubeconfig for the node")?;
            let netns = topology.machine(node.machine);
            runtime.start_kubelet(name, netns, kubeconfig, &ready.ca)?;
        }
        let cluster = Self {
            runtimes,
            ready,
            control: control.path(),
            _plane: plane,
        };
        cluster.write_door(&places.directory)?;
        Ok(cluster)
    }

    /// Until every node is ready: the scheduler would put all pods on the first, and pods that name a node would be collected.
    /// A node is not ready before kun-cni's STATUS says so, hence not before its agent has its blocks.
    pub fn wait_for_nodes(&self) -> Result<()> {
        let watch = self.watch("nodes")?;
        wait_for("every node being ready", READY_WITHIN, || {
            let ready = watch.objects().iter().filter(|n| is_ready(n)).count();
            (ready == MACHINES.len()).then_some(())
        })
    }

    /// An administrator's kubeconfig.
    pub fn kubeconfig(&self) -> &Path {
        &self.ready.kubeconfig
    }

    /// `kubectl` as the administrator, where the API server is in reach.
    pub fn kubectl_command(&self) -> Command {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net={}", self.control.display()))
            .arg(control_plane::binary())
            .arg("kubectl")
            .env("KUBECONFIG", self.kubeconfig());
        command
    }

    /// Runs `kubectl`; its standard output.
    pub fn kubectl(&self, words: &[&str], input: &str) -> Result<String> {
        let mut command = self.kubectl_command();
        command
            .args(words)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut kubectl = command.spawn().context("starting kubectl")?;
        {
            let mut pipe = kubectl.stdin.take().context("kubectl has an input")?;
            pipe.write_all(input.as_bytes())?;
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

    /// Every object of these kinds, `pods,services`.
    pub fn get(&self, kinds: &str) -> Result<Vec<Value>> {
        let text = self.kubectl(&["get", kinds, "--all-namespaces", "-o", "json"], "")?;
        let list: Value = serde_json::from_str(&text).context("kubectl's JSON")?;
        Ok(list["items"].as_array().cloned().unwrap_or_default())
    }

    /// Makes or changes objects.
    pub fn apply(&self, objects: &[Value]) -> Result<()> {
        let list = json!({"apiVersion": "v1", "kind": "List", "items": objects});
        self.kubectl(&["apply", "--server-side", "-f", "-"], &list.to_string())
            .map(drop)
    }

    /// Follows every object of a kind.
    pub fn watch(&self, kind: &str) -> Result<Watch> {
        Watch::start(self.kubectl_command(), kind)
    }

    /// Waits until there are so many pods and all are ready; they come as the probes want them.
    pub fn pods(&mut self, count: usize, step: &mut dyn FnMut(&str)) -> Result<Vec<Pod>> {
        let watch = self.watch("pods")?;
        let mut told_of = None;
        let waited = wait_for("every pod being ready", READY_WITHIN, || {
            let pods = watch.objects();
            let ready = pods.iter().filter(|pod| is_ready(pod)).count();
            if told_of != Some(ready) {
                step(&format!("pods ready: {ready} of {count}"));
                told_of = Some(ready);
            }
            let ended = self.runtimes.iter_mut().find_map(Runtime::ended);
            match ended {
                Some(ended) => Some(Err(ended)),
                None => (pods.len() == count && ready == count).then_some(Ok(())),
            }
        });
        let pods = watch.objects();
        waited.with_context(|| {
            let waiting: Vec<String> = pods.iter().filter(|p| !is_ready(p)).map(told).collect();
            format!("{} of {count} pods; {}", pods.len(), waiting.join("; "))
        })??;
        pods.iter()
            .filter_map(|pod| pod_of(pod).transpose())
            .collect()
    }

    /// The pods that there are now and that do not end, ready or not.
    pub fn pods_now(&self) -> Result<Vec<Pod>> {
        self.get("pods")?
            .iter()
            .filter(|pod| pod["metadata"]["deletionTimestamp"].is_null())
            .filter_map(|pod| pod_of(pod).transpose())
            .collect()
    }

    /// The addresses that the API server gave the services.
    pub fn address(&self, services: &mut [ServicePlan]) -> Result<()> {
        let objects = self.get("services")?;
        for plan in services {
            let meta = &plan.service.metadata;
            let object = objects
                .iter()
                .find(|o| {
                    o["metadata"]["name"] == meta.name.as_str()
                        && o["metadata"]["namespace"] == meta.namespace.as_str()
                })
                .with_context(|| format!("{}: the API server does not have it", plan.object()))?;
            plan.cluster_ips = object["spec"]["clusterIPs"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(|ip| ip.as_str()?.parse().ok())
                .collect();
        }
        Ok(())
    }

    /// A client inside the pod's container, by `kubectl exec`.
    pub fn client(&self, pod: &Pod) -> Result<Client> {
        let mut command = self.kubectl_command();
        command
            .args(["exec", "--stdin", "--quiet", "--namespace"])
            .arg(&pod.plan.namespace)
            .arg(&pod.plan.name)
            .arg("--")
            .arg(format!("{}/kun-lab", image::PROGRAMS))
            .arg("client");
        Client::spawn(command)
    }

    /// A `kubectl` for people, who are not in the API server's network.
    fn write_door(&self, directory: &Path) -> Result<()> {
        use std::os::unix::fs::PermissionsExt;
        let path = directory.join("kubectl");
        let text = format!(
            "#!/bin/sh\nexport KUBECONFIG={}\nexec nsenter --net={} {} kubectl \"$@\"\n",
            self.kubeconfig().display(),
            self.control.display(),
            control_plane::binary().display(),
        );
        std::fs::write(&path, text)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))
            .with_context(|| path.display().to_string())
    }
}

fn start_plane(places: &Places, control: &Netns) -> Result<(Process, Ready)> {
    // Seen from every machine, whose kubelet has its credentials there.
    let directory = places.directory.join("control");
    std::fs::create_dir_all(&directory)?;
    let nodes: Vec<&str> = MACHINES.iter().map(|m| m.name).collect();
    // It ends when its standard input does. This one never does, so that the cluster may outlive us; what is in its
    // namespace goes with that.
    let fifo = directory.join("stdin");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o600),
        0,
    )
    .with_context(|| format!("making {}", fifo.display()))?;
    let log = places.directory.join("control-plane.log");
    let mut command = Command::new("/bin/sh");
    command
        .args(["-c", "fifo=$1; shift; exec \"$@\" <>\"$fifo\"", "sh"])
        .arg(&fifo)
        .arg(control_plane::binary())
        .arg("serve")
        .arg("--dir")
        .arg(&directory)
        .args(["--bind", &CONTROL.v6().to_string()])
        .args(["--port", &PORT.to_string()])
        .args(["--service-cidr", SERVICES, "--pod-cidr", POD_RANGES])
        .args(["--nodes", &nodes.join(","), "--scheduler"]);
    super::outside::logged(&mut command, &log)?;
    command.stdout(Stdio::piped());
    let mut plane = control.spawn(command)?;
    let output = plane.stdout.take().context("a piped child has an output")?;
    let mut line = String::new();
    BufReader::new(output).read_line(&mut line)?;
    ensure!(
        !line.is_empty(),
        "the control plane did not come up: {}",
        last_line(&log)
    );
    let ready =
        serde_json::from_str(&line).with_context(|| format!("the control plane said {line:?}"))?;
    Ok((plane, ready))
}

fn start_runtimes(
    name: &LabName,
    places: &Places,
    topology: &Topology,
    nodes: &[Node],
) -> Result<Vec<Runtime>> {
    let archive = places.directory.join("image.tar");
    image::write(
        &[places.program("kun-lab")?, places.program("kun-dns")?],
        &archive,
    )?;
    let runtimes = std::thread::scope(|scope| {
        let starting: Vec<_> = nodes
            .iter()
            .map(|node| {
                let netns = topology.machine(node.machine);
                let archive = &archive;
                scope.spawn(move || Runtime::start(name, places, node, netns, archive))
            })
            .collect();
        starting
            .into_iter()
            .map(|thread| {
                thread
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })
            .collect::<Result<Vec<_>>>()
    })?;
    // Every containerd has its own copy now.
    std::fs::remove_file(&archive).with_context(|| archive.display().to_string())?;
    Ok(runtimes)
}

/// By its condition, and not on its way out.
pub fn is_ready(pod: &Value) -> bool {
    let conditions = pod["status"]["conditions"].as_array();
    let ready = conditions
        .into_iter()
        .flatten()
        .any(|c| c["type"] == "Ready" && c["status"] == "True");
    ready && pod["metadata"]["deletionTimestamp"].is_null()
}

/// Why a pod is not ready, in a few words.
fn told(pod: &Value) -> String {
    let containers = pod["status"]["containerStatuses"].as_array();
    let state = containers.and_then(|c| c.first()).map(|c| &c["state"]);
    let because = state.map_or_else(|| pod["status"]["phase"].to_string(), Value::to_string);
    format!(
        "{}/{} on {}: {because}",
        pod["metadata"]["namespace"].as_str().unwrap_or_default(),
        pod["metadata"]["name"].as_str().unwrap_or_default(),
        pod["spec"]["nodeName"].as_str().unwrap_or("no node"),
    )
}

fn pod_of(object: &Value) -> Result<Option<Pod>> {
    let Some(plan) = objects::pod_plan(object)? else {
        return Ok(None);
    };
    let addresses: Vec<IpAddr> = object["status"]["podIPs"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|ip| ip["ip"].as_str()?.parse().ok())
        .collect();
    Ok(Some(Pod {
        plan,
        addresses,
        body: None,
    }))
}
