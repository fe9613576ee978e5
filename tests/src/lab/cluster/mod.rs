//! The lab's other ground: a real Kubernetes. An API server with etcd, the controllers and the scheduler run on a machine of the
//! fabric; every node has a real containerd and a real kubelet; pods are their work, and EndpointSlices the controllers'. kun runs
//! as `deploy/` installs it.
//!
//! Refuses what the lab plays elsewhere: it starts no pod, and writes no EndpointSlice.

pub mod image;
pub mod install;
pub mod machine;
pub mod objects;
pub mod room;
pub mod watch;

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use kun_harness::{ControlPlane, Netns, peers, wait_for};
use serde_json::{Value, json};

use super::client::Client;
use super::expand::ServicePlan;
use super::names::{CONTROL, LabName, MACHINES};
use super::node::{Node, Places};
use super::pod::Pod;
use super::topology::Topology;
use crate::control_plane;
use machine::Runtime;
use watch::Watch;

/// The API server's port, on the control plane's address of the fabric.
const PORT: u16 = 6443;
/// Ranges of cluster addresses: IPv6 first, which makes it the first family of every Service.
const SERVICES: &str = "fd00:10:96::/112,10.96.0.0/16";
/// What the image holds: the pods' server, and all of kun.
const PROGRAMS: [&str; 6] = [
    "kun-lab",
    "kun-proxy",
    "kun-cni",
    "kun-dns",
    "kun-operator",
    "kunctl",
];
/// Pods are scheduled and started two by two on a small machine; a busy one takes its time.
const READY_WITHIN: Duration = Duration::from_secs(180);

/// A control plane and its nodes.
#[derive(Debug)]
pub struct Cluster {
    /// Nodes and gateway, in the order of [`MACHINES`].
    pub runtimes: Vec<Runtime>,
    plane: ControlPlane,
    control: PathBuf,
}

impl Cluster {
    /// Whether everything that it needs is built; else what is missing.
    pub fn missing() -> Option<String> {
        if !Path::new(machine::RUNC).is_file() {
            return Some("runc is not installed; `cargo xtask setup` does it".to_owned());
        }
        let mut programs = machine::PEERS.map(peers::path).to_vec();
        programs.push(control_plane::binary());
        let missing = programs.into_iter().find(|path| !path.is_file())?;
        let name = missing.file_name().unwrap_or_default().display();
        Some(format!("{name} is not built; `cargo xtask peers` does it"))
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
        for (runtime, node) in runtimes.iter_mut().zip(nodes) {
            let kubeconfig = plane
                .node_kubeconfig(node.machine.name)
                .context("the control plane made no kubeconfig for the node")?;
            let netns = topology.machine(node.machine);
            runtime.start_kubelet(name, netns, kubeconfig, plane.ca())?;
            runtime.write_door()?;
        }
        let cluster = Self {
            runtimes,
            plane,
            control: control.path(),
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
        self.plane.kubeconfig()
    }

    /// `kubectl` as the administrator, where the API server is in reach.
    pub fn kubectl_command(&self) -> Command {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net={}", self.control.display()))
            .arg(control_plane::binary())
            .arg("kubectl")
            .env("KUBECONFIG", self.kubeconfig())
            .env("KUBECACHEDIR", self.plane.dir().join("kubectl"));
        command
    }

    /// Runs `kubectl`; its standard output.
    pub fn kubectl(&self, words: &[&str], input: &str) -> Result<String> {
        self.plane.kubectl(words, input)
    }

    /// Installs kun by `deploy/`, and gives it its addresses.
    pub fn install(&self, deploy: &Path, nodes: &[Node], lab: &Path) -> Result<()> {
        let overlay = install::write(deploy, nodes, lab)?;
        let overlay = overlay.to_str().context("a path that is UTF-8")?;
        self.kubectl(&["apply", "--server-side", "-k", overlay], "")?;
        // A kind that was just defined is served a moment later.
        let words = ["wait", "--for=condition=Established", "crd", "--all"];
        self.kubectl(&words, "")?;
        self.apply(&[install::pool()])
    }

    /// Lets it stand when this process ends.
    pub fn keep(self) -> Result<()> {
        let Self {
            runtimes, plane, ..
        } = self;
        // Their processes go on: nobody drops them.
        std::mem::forget(runtimes);
        plane.keep().map(drop)
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

    /// Waits until there are so many pods in the pods' network and every pod is ready; they come as the probes want them.
    pub fn pods(&mut self, count: usize, step: &mut dyn FnMut(&str)) -> Result<Vec<Pod>> {
        let watch = self.watch("pods")?;
        let mut told_of = None;
        let waited = wait_for("every pod being ready", READY_WITHIN, || {
            let pods = watch.objects();
            let there = pods.iter().filter(|pod| !on_host(pod)).count();
            let ready = pods.iter().filter(|pod| is_ready(pod) && !on_host(pod));
            let ready = ready.count();
            let all = pods.iter().all(is_ready);
            if told_of != Some(ready) {
                step(&format!("pods ready: {ready} of {count}"));
                told_of = Some(ready);
            }
            let ended = self.runtimes.iter_mut().find_map(Runtime::ended);
            match ended {
                Some(ended) => Some(Err(ended)),
                None => (all && there == count).then_some(Ok(())),
            }
        });
        let pods = watch.objects();
        waited.with_context(|| {
            let waiting: Vec<String> = pods.iter().filter(|p| !is_ready(p)).map(told).collect();
            format!("{} of {count} pods; {}", pods.len(), waiting.join("; "))
        })??;
        pods.iter()
            .filter(|pod| !on_host(pod))
            .filter_map(|pod| pod_of(pod).transpose())
            .collect()
    }

    /// The pods that there are now and that do not end, ready or not.
    pub fn pods_now(&self) -> Result<Vec<Pod>> {
        self.get("pods")?
            .iter()
            .filter(|pod| pod["metadata"]["deletionTimestamp"].is_null() && !on_host(pod))
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
        let text = format!(
            "#!/bin/sh\nexport KUBECONFIG={}\nexec nsenter --net={} {} kubectl \"$@\"\n",
            self.kubeconfig().display(),
            self.control.display(),
            control_plane::binary().display(),
        );
        machine::write_script(&directory.join("kubectl"), &text)
    }
}

fn start_plane(places: &Places, control: &Netns) -> Result<ControlPlane> {
    // Seen from every machine, whose kubelet has its credentials there.
    let directory = places.directory.join("control");
    std::fs::create_dir_all(&directory)?;
    ControlPlane::builder()
        .context("the control plane is not built: cargo xtask peers")?
        .netns(control.path())
        .bind(CONTROL.v6().into())
        .port(PORT)
        .service_cidrs(SERVICES)
        // Pods get theirs from kun.
        .pod_cidrs("")
        .nodes(MACHINES.iter().map(|machine| machine.name))
        .scheduler()
        .dir(directory)
        .start()
}

fn start_runtimes(
    name: &LabName,
    places: &Places,
    topology: &Topology,
    nodes: &[Node],
) -> Result<Vec<Runtime>> {
    let archive = places.directory.join("image.tar");
    image::write(
        &PROGRAMS
            .iter()
            .map(|name| places.program(name))
            .collect::<Result<Vec<_>>>()?,
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

/// Whether it has its node's addresses.
fn on_host(pod: &Value) -> bool {
    pod["spec"]["hostNetwork"] == true
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
