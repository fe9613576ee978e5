//! The lab: a whole cluster network on one machine, driven by a folder of manifests, and probed.
//!
//! Real are the programs of kun, BIRD, nginx, nsd and the kernel. The fabric's cables are played. What starts pods and makes
//! EndpointSlices of them is the lab's ground: the lab itself ([`played`]), or a real Kubernetes ([`cluster`]).

pub mod client;
pub mod cluster;
pub mod down;
pub mod expand;
pub mod folder;
pub mod manifests;
pub mod names;
pub mod node;
pub mod outside;
pub mod played;
pub mod pod;
pub mod probes;
pub mod report;
pub mod server;
pub mod topology;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kun_harness::{BpfFs, Cgroup, Process, cgroup2_mount, wait_for};
use serde_json::Value;

use client::Client;
use cluster::Cluster;
use expand::{PodPlan, ServicePlan};
use folder::Folder;
use manifests::Application;
use names::{LabName, MACHINES};
use node::{Node, Places, last_line};
use outside::Outside;
use pod::Pod;
use topology::Topology;

/// The operator hands out blocks within a moment; a busy machine needs longer.
const BLOCKS_WITHIN: Duration = Duration::from_secs(30);

/// What to bring up.
#[derive(Debug, Clone)]
pub struct Options {
    /// Its name.
    pub name: LabName,
    /// A file or folder of manifests.
    pub manifests: PathBuf,
    /// Where kun's programs lie.
    pub programs: PathBuf,
    /// Leave it standing when it cannot be brought up, to look inside.
    pub keep: bool,
    /// On a real Kubernetes.
    pub control_plane: bool,
    /// kun's manifests for a cluster: the folder `deploy`.
    pub deploy: PathBuf,
}

/// Who starts pods and writes what the cluster's programs read.
#[derive(Debug)]
pub enum Ground {
    /// The lab.
    Played,
    /// An API server, its controllers, kubelets.
    Cluster(Box<Cluster>),
}

/// A lab that stands; everything is gone when it drops, unless [`Lab::keep`].
#[derive(Debug)]
pub struct Lab {
    /// Its name.
    pub name: LabName,
    /// Its files.
    pub places: Places,
    /// The manifest folder.
    pub folder: Folder,
    /// Namespaces.
    pub topology: Topology,
    /// BIRD, nginx, nsd.
    pub outside: Outside,
    /// kun-operator.
    pub operator: Option<Process>,
    /// Nodes and gateway.
    pub nodes: Vec<Node>,
    /// Pods.
    pub pods: Vec<Pod>,
    /// Services.
    pub services: Vec<ServicePlan>,
    /// What the manifests held that the lab does not run.
    pub notes: Vec<String>,
    /// Who starts the pods.
    pub ground: Ground,
    /// Pods ever started by the lab: the next one's number.
    started: usize,
    _cgroup: Cgroup,
    _bpffs: BpfFs,
    // Last: it is released when all else is gone.
    _lock: down::Lock,
}

/// The pods that the lab adds to every application: clients on each node, and the DNS servers.
const OWN: &str = include_str!("own.yaml");

/// The namespace of the lab's own clients.
pub const OWN_NAMESPACE: &str = "kun-lab";

impl Lab {
    /// Brings a lab up. Each step is told before it begins. On failure nothing stays, unless it is to be kept.
    pub fn up(options: &Options, step: &mut dyn FnMut(&str)) -> Result<Self> {
        ensure!(
            rustix::process::geteuid().is_root(),
            "the lab makes network namespaces and loads eBPF programs: run it as root"
        );
        step("manifests");
        let mut application = manifests::read(&options.manifests)?;
        let mut own = manifests::parse("the lab's own manifests", OWN)?;
        if options.control_plane {
            // The DNS server is part of kun's own manifests.
            own.workloads.retain(|w| w.namespace == OWN_NAMESPACE);
            own.services
                .retain(|s| s.metadata.namespace == OWN_NAMESPACE);
        }
        application.workloads.extend(own.workloads);
        application.services.extend(own.services);
        let mut notes = std::mem::take(&mut application.notes);
        let mut plans = expand::pods(&application, &mut notes)?;
        let services = expand::services(&application)?;
        expand::listen_where_services_point(&mut plans, &services);

        let lock = down::Lock::take(&options.name)?;
        if down::stands(&options.name) {
            step("removing what a lab of this name left");
            down::down(&options.name);
        }
        let undo = Undo(&options.name, options.keep);
        step("fabric: ToR, nodes, gateway, internet host");
        let places = Places {
            directory: options.name.directory(),
            programs: options.programs.clone(),
        };
        std::fs::create_dir_all(&places.directory)
            .with_context(|| format!("making {}", places.directory.display()))?;
        pod::make_log_directory(&places.directory)?;
        let bpffs = BpfFs::create(places.bpffs())?;
        let cgroup = Cgroup::create(options.name.cgroup(&cgroup2_mount()?))?;
        let topology = Topology::build(&options.name, options.control_plane)?;
        step("BIRD, nginx, nsd");
        let outside = Outside::start(&topology, &places.directory)?;
        let folder = Folder::create(places.cluster())?;
        let mut nodes = Vec::new();
        for machine in &MACHINES {
            nodes.push(Node::prepare(
                machine,
                &places,
                cgroup.child(machine.name)?,
                options.control_plane,
            )?);
        }
        let mut lab = Self {
            name: options.name.clone(),
            places,
            folder,
            topology,
            outside,
            operator: None,
            nodes,
            pods: Vec::new(),
            services,
            notes,
            ground: Ground::Played,
            started: 0,
            _cgroup: cgroup,
            _bpffs: bpffs,
            _lock: lock,
        };
        let raised = match options.control_plane {
            true => lab.raise_cluster(&application, plans.len(), &options.deploy, step),
            false => lab.raise(plans, &application.others, step),
        };
        if let Err(e) = raised {
            if options.keep {
                lab.keep();
            }
            return Err(e);
        }
        std::mem::forget(undo);
        Ok(lab)
    }

    fn raise(
        &mut self,
        plans: Vec<PodPlan>,
        others: &[Value],
        step: &mut dyn FnMut(&str),
    ) -> Result<()> {
        self.write_ground(&plans, others)?;
        self.start_programs(step)?;
        let count = plans.len();
        for (number, plan) in plans.into_iter().enumerate() {
            step(&format!("pod {} of {count}: {}", number + 1, plan.name));
            self.start_pod(plan)?;
        }
        step("pods answering");
        for pod in &mut self.pods {
            let machine = pod.plan.node;
            pod.wait_ready(self.topology.machine(machine))?;
        }
        self.publish()
    }

    fn raise_cluster(
        &mut self,
        application: &Application,
        count: usize,
        deploy: &Path,
        step: &mut dyn FnMut(&str),
    ) -> Result<()> {
        step("control plane, containerd and kubelet on every machine");
        let cluster = Cluster::start(&self.name, &self.places, &self.topology, &self.nodes)?;
        self.ground = Ground::Cluster(Box::new(cluster));
        let Ground::Cluster(cluster) = &mut self.ground else {
            unreachable!("it was just made");
        };
        step("kun, by deploy/");
        cluster.install(deploy, &self.nodes, &self.places.directory)?;
        step("nodes ready");
        cluster.wait_for_nodes()?;
        step("objects");
        cluster.apply(&cluster::objects::of(application, &self.services))?;
        cluster.address(&mut self.services)?;
        self.pods = cluster.pods(count + cluster::install::DNS_PODS, step)?;
        Ok(())
    }

    /// kun's own, but for what runs in pods.
    fn start_programs(&mut self, step: &mut dyn FnMut(&str)) -> Result<()> {
        step("kun-operator");
        self.start_operator()?;
        self.wait_for_blocks()?;
        step("kun-proxy on every machine");
        self.start_agents()
    }

    fn write_ground(&self, plans: &[PodPlan], others: &[Value]) -> Result<()> {
        let mut namespaces: BTreeSet<String> =
            plans.iter().map(|plan| plan.namespace.clone()).collect();
        namespaces.insert("kube-system".to_owned());
        namespaces.extend(
            self.services
                .iter()
                .map(|s| s.service.metadata.namespace.clone()),
        );
        let namespaces: Vec<String> = namespaces.into_iter().collect();
        self.folder
            .write("ground.yaml", &folder::ground(&namespaces))?;
        let services: Vec<Value> = self.services.iter().map(expand::service_json).collect();
        self.folder.write("services.yaml", &services)?;
        let kept: Vec<Value> = others
            .iter()
            .filter(|o| o["kind"] != "Namespace")
            .cloned()
            .collect();
        if !kept.is_empty() {
            self.folder.write("given.yaml", &kept)?;
        }
        Ok(())
    }

    /// Starts, or starts again, the operator.
    pub fn start_operator(&mut self) -> Result<()> {
        let gateway = self.node("gateway")?;
        let mut command = Command::new(self.places.program("kun-operator")?);
        command.arg("--config").arg(gateway.config());
        outside::logged(
            &mut command,
            &self.places.directory.join("kun-operator.log"),
        )?;
        let netns = self.topology.machine(gateway.machine);
        self.operator = Some(netns.spawn(command)?);
        Ok(())
    }

    fn wait_for_blocks(&mut self) -> Result<()> {
        let log = self.places.directory.join("kun-operator.log");
        let Some(operator) = self.operator.as_mut() else {
            anyhow::bail!("kun-operator is not running");
        };
        let folder = &self.folder;
        let owned = wait_for(
            "kun-operator giving every node its blocks",
            BLOCKS_WITHIN,
            || {
                if !operator.is_running() {
                    return Some(false);
                }
                let blocks = folder::blocks(&folder.objects().ok()?);
                MACHINES
                    .iter()
                    .filter(|m| m.schedulable)
                    .all(|m| blocks.contains_key(m.name))
                    .then_some(true)
            },
        )
        .with_context(|| last_line(&log))?;
        ensure!(owned, "kun-operator ended: {}", last_line(&log));
        Ok(())
    }

    fn start_agents(&mut self) -> Result<()> {
        let topology = &self.topology;
        std::thread::scope(|scope| {
            let starting: Vec<_> = self
                .nodes
                .iter_mut()
                .map(|node| scope.spawn(move || node.start_agent(topology.machine(node.machine))))
                .collect();
            starting.into_iter().try_for_each(|thread| {
                thread
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })
        })
    }

    /// The Kubernetes that it stands on.
    pub fn cluster(&self) -> Result<&Cluster> {
        match &self.ground {
            Ground::Cluster(cluster) => Ok(cluster),
            Ground::Played => anyhow::bail!("the lab does not stand on a Kubernetes"),
        }
    }

    /// Looks at the pods again: controllers make others whenever they are told to.
    pub fn refresh(&mut self) -> Result<()> {
        self.pods = self.cluster()?.pods_now()?;
        Ok(())
    }

    /// A machine.
    pub fn node(&self, name: &str) -> Result<&Node> {
        self.nodes
            .iter()
            .find(|node| node.machine.name == name)
            .with_context(|| format!("{name}: no such machine"))
    }

    /// `kill -9` of a node's agent, then a new one.
    pub fn restart_agent(&mut self, name: &str) -> Result<()> {
        let topology = &self.topology;
        let node = self
            .nodes
            .iter_mut()
            .find(|node| node.machine.name == name)
            .with_context(|| format!("{name}: no such machine"))?;
        node.kill_agent();
        node.start_agent(topology.machine(node.machine))
    }

    /// A pod.
    pub fn pod(&self, name: &str) -> Result<&Pod> {
        self.pods
            .iter()
            .find(|pod| pod.plan.name == name)
            .with_context(|| format!("{name}: no such pod"))
    }

    /// The lab's own client pods.
    pub fn clients(&self) -> impl Iterator<Item = &Pod> {
        self.pods
            .iter()
            .filter(|pod| pod.plan.namespace == OWN_NAMESPACE && pod.plan.ports.is_empty())
    }

    /// A client in a pod.
    pub fn client(&self, pod: &Pod) -> Result<Client> {
        match (&pod.body, &self.ground) {
            (Some(body), _) => {
                let mut command = Command::new(self.places.program("kun-lab")?);
                command.arg("client");
                Client::start(command, &body.netns, Some(&body.cgroup))
            }
            (None, Ground::Cluster(cluster)) => cluster.client(pod),
            (None, Ground::Played) => anyhow::bail!("{}: nobody runs it", pod.object()),
        }
    }

    /// A client in a namespace that is no pod's.
    pub fn outside_client(&self, netns: &kun_harness::Netns) -> Result<Client> {
        let mut command = Command::new(self.places.program("kun-lab")?);
        command.arg("client");
        Client::start(command, netns, None)
    }

    /// What each node owns, by the operator's word.
    pub fn blocks(&self) -> Result<BTreeMap<String, Vec<kun_config::types::BlockId>>> {
        Ok(folder::blocks(&match &self.ground {
            Ground::Played => self.folder.objects()?,
            Ground::Cluster(cluster) => cluster.get("ipamblocks.kun.network")?,
        }))
    }

    /// LoadBalancer addresses by `namespace/name`, by the operator's word.
    pub fn load_balancers(&self) -> Result<BTreeMap<String, Vec<IpAddr>>> {
        match &self.ground {
            Ground::Played => Ok(folder::load_balancers(&self.folder.objects()?)),
            Ground::Cluster(cluster) => {
                Ok(cluster::objects::load_balancers(&cluster.get("services")?))
            }
        }
    }

    /// How to look inside, for people.
    pub fn doors(&self) -> String {
        let mut text = String::from("The lab stands. Look inside:\n");
        let kunctl = self.places.programs.join("kunctl");
        for node in &self.nodes {
            let door = match &self.ground {
                Ground::Played => String::new(),
                Ground::Cluster(_) => format!("{}/enter ", node.directory.display()),
            };
            text.push_str(&format!(
                "  {door}{} --config {} status\n",
                kunctl.display(),
                node.config().display()
            ));
        }
        for pod in self.clients() {
            let Some(body) = &pod.body else { continue };
            // The proxy serves whoever is in the pod's cgroup.
            text.push_str(&format!(
                "  sh -c 'echo $$ > {}/cgroup.procs; exec nsenter --net={} sh'    # in pod {}\n",
                body.cgroup.path().display(),
                body.netns.path().display(),
                pod.object()
            ));
        }
        if let Ground::Cluster(cluster) = &self.ground {
            text.push_str(&format!(
                "  {}/kubectl get pods --all-namespaces -o wide    # kubeconfig: {}\n",
                self.places.directory.display(),
                cluster.kubeconfig().display()
            ));
        }
        text.push_str(&format!(
            "  nsenter --net={} birdc -s {} show route\n",
            self.topology.tor.path().display(),
            outside::bird_socket(&self.places.directory).display()
        ));
        text.push_str(&format!(
            "  logs, manifests, configuration: {}\n",
            self.places.directory.display()
        ));
        text.push_str(&format!(
            "Take it down: cargo xtask lab down --name {}",
            self.name.as_str()
        ));
        text
    }

    /// Lets it stand.
    pub fn keep(mut self) {
        if let Ground::Cluster(cluster) = std::mem::replace(&mut self.ground, Ground::Played)
            && let Err(e) = cluster.keep()
        {
            eprintln!("lab: the control plane ends with this program: {e:#}");
        }
        // Its processes go on: nobody drops them. The lock goes with this process.
        std::mem::forget(self);
    }
}

/// Takes down what a failed `up` made, unless it is kept.
struct Undo<'a>(&'a LabName, bool);

impl Drop for Undo<'_> {
    fn drop(&mut self) {
        if !self.1 {
            down::down(self.0);
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        down::down(&self.name);
    }
}
