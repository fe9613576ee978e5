//! A running pod, and what the lab plays of one where no kubelet does: namespace, cgroup, attachment, process.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use kun_harness::{Cgroup, Netns, Process, wait_for};
use serde_json::json;

use super::expand::PodPlan;
use super::manifests::ContainerPort;
use super::names::{CLUSTER_DOMAIN, DNS_V4, LabName, POD_PREFIX, PREF64};
use super::node::{Attachment, Node, Places, last_line, result_addresses};
use super::outside::logged;

const ANSWERS_WITHIN: Duration = Duration::from_secs(20);

/// What runs in a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Workload {
    /// The lab's server on the containers' ports.
    Server,
    /// `kun-dns`.
    Dns,
}

/// A pod that runs.
#[derive(Debug)]
pub struct Pod {
    /// As planned.
    pub plan: PodPlan,
    /// Its addresses, IPv6 first.
    pub addresses: Vec<IpAddr>,
    /// What the lab plays of it; `None`: a kubelet runs it.
    pub body: Option<Body>,
}

/// A pod that the lab itself started.
#[derive(Debug)]
pub struct Body {
    /// Its namespace.
    pub netns: Netns,
    /// Its cgroup.
    pub cgroup: Cgroup,
    /// Its process; `None` while it is down.
    pub process: Option<Process>,
    /// What a runtime would need for DEL.
    pub attachment: Attachment,
    /// What runs in it.
    pub workload: Workload,
    places: Places,
}

impl Pod {
    /// `namespace/name`
    pub fn object(&self) -> String {
        format!("{}/{}", self.plan.namespace, self.plan.name)
    }

    /// Its address of a family.
    pub fn address(&self, v6: bool) -> Option<IpAddr> {
        self.addresses.iter().copied().find(|a| a.is_ipv6() == v6)
    }

    /// Makes its namespace and cgroup, attaches it by `kun-cni`, and starts its process.
    pub fn start(
        name: &LabName,
        places: &Places,
        number: usize,
        plan: PodPlan,
        node: &Node,
        node_netns: &Netns,
        workload: Workload,
    ) -> Result<Self> {
        let object = format!("{}/{}", plan.namespace, plan.name);
        let netns =
            Netns::create(name.netns(&format!("pod-{number}"))).with_context(|| object.clone())?;
        // As container runtimes do: every group may send echo requests.
        netns.sysctl("net.ipv4.ping_group_range", "0 2147483647")?;
        // A pod may listen where the runtime lets it, as root inside.
        let cgroup = node.cgroup.child(&format!("pod-{number}"))?;
        let attachment = Attachment {
            container: format!("{}{number:08x}", name.as_str()),
            netns: netns.path(),
            namespace: plan.namespace.clone(),
            pod: plan.name.clone(),
            annotations: plan.annotations.clone(),
        };
        let result = node.cni(node_netns, "ADD", &attachment)?;
        let addresses =
            result_addresses(&result).with_context(|| format!("kun-cni ADD of {object}"))?;
        let body = Body {
            netns,
            cgroup,
            process: None,
            attachment,
            workload,
            places: places.clone(),
        };
        let mut pod = Self {
            plan,
            addresses,
            body: Some(body),
        };
        pod.start_process()?;
        Ok(pod)
    }

    /// What the lab plays of it.
    pub fn body_mut(&mut self) -> Result<(&PodPlan, &mut Body)> {
        match self.body.as_mut() {
            Some(body) => Ok((&self.plan, body)),
            None => anyhow::bail!(
                "{}/{}: a kubelet runs it, not the lab",
                self.plan.namespace,
                self.plan.name
            ),
        }
    }

    /// Starts, or starts again, what runs in it.
    pub fn start_process(&mut self) -> Result<()> {
        let (plan, body) = self.body_mut()?;
        body.start_process(plan)
    }

    /// Waits until it answers, seen from its node, as the kubelet would.
    pub fn wait_ready(&mut self, node_netns: &Netns) -> Result<()> {
        let Some(address) = self.addresses.first().copied() else {
            return Ok(());
        };
        let (plan, body) = self.body_mut()?;
        body.wait_ready(plan, address, node_netns)
    }
}

impl Body {
    fn start_process(&mut self, plan: &PodPlan) -> Result<()> {
        let command = match self.workload {
            Workload::Server => self.server(plan)?,
            Workload::Dns => self.dns(plan)?,
        };
        let mut command = self.cgroup.wrap(&command);
        logged(&mut command, &self.log(plan))?;
        self.process = Some(self.netns.spawn(command)?);
        Ok(())
    }

    fn log(&self, plan: &PodPlan) -> PathBuf {
        self.places
            .directory
            .join("pods")
            .join(format!("{}.{}.log", plan.namespace, plan.name))
    }

    fn server(&self, plan: &PodPlan) -> Result<Command> {
        let mut command = Command::new(self.places.program("kun-lab")?);
        command.args(server_words(&plan.name, &plan.ports));
        Ok(command)
    }

    fn dns(&self, plan: &PodPlan) -> Result<Command> {
        let directory = self.places.directory.join("pods").join(&plan.name);
        std::fs::create_dir_all(&directory)?;
        let corefile = directory.join("Corefile");
        std::fs::write(&corefile, corefile_text())?;
        let mut config = dns_configuration(&corefile);
        config["node"] = json!({"name": plan.node.name});
        config["cluster"] = json!({"folder": self.places.cluster()});
        let file = directory.join("kun.yaml");
        std::fs::write(&file, serde_saphyr::to_string(&config)?)?;
        let mut command = Command::new(self.places.program("kun-dns")?);
        command.arg("--config").arg(file);
        Ok(command)
    }

    fn wait_ready(&mut self, plan: &PodPlan, address: IpAddr, node_netns: &Netns) -> Result<()> {
        let port = match self.workload {
            Workload::Dns => Some(DNS_READY),
            Workload::Server => first_tcp(&plan.ports),
        };
        let Some(port) = port else {
            return Ok(());
        };
        let log = self.log(plan);
        let object = format!("{}/{}", plan.namespace, plan.name);
        let is_dns = self.workload == Workload::Dns;
        let Some(process) = self.process.as_mut() else {
            anyhow::bail!("{object}: not running");
        };
        let ready = wait_for("it to answer its node", ANSWERS_WITHIN, || {
            if !process.is_running() {
                return Some(false);
            }
            node_netns
                .run(|| {
                    let to = (address, port).into();
                    if is_dns {
                        ready_over_http(to)
                    } else {
                        super::server::connect(to, Duration::from_secs(1)).is_ok()
                    }
                })
                .then_some(true)
        });
        match ready {
            Ok(true) => Ok(()),
            Ok(false) => anyhow::bail!("{object}: its process ended: {}", last_line(&log)),
            Err(e) => Err(e)
                .with_context(|| format!("{object} at [{address}]:{port}: {}", last_line(&log))),
        }
    }
}

/// The port on which `kun-dns` says that it is ready, by [`corefile_text`].
const DNS_READY: u16 = 8181;

/// What `kun-lab` is told to serve.
pub fn server_words(name: &str, ports: &[ContainerPort]) -> Vec<String> {
    let mut words = vec!["serve".to_owned(), "--name".to_owned(), name.to_owned()];
    for port in ports {
        let flag = match port.protocol.as_str() {
            "TCP" => "--tcp",
            "UDP" => "--udp",
            _ => continue,
        };
        words.extend([flag.to_owned(), port.container_port.to_string()]);
    }
    words
}

/// The port that tells whether the server answers.
pub fn first_tcp(ports: &[ContainerPort]) -> Option<u16> {
    let tcp = ports.iter().find(|p| p.protocol == "TCP");
    tcp.map(|p| p.container_port)
}

/// The DNS server's kun.yaml, without its node and its source of objects.
fn dns_configuration(corefile: &Path) -> serde_json::Value {
    json!({
        "ipam": {"podPrefix": POD_PREFIX},
        "nat64": {"pref64": [PREF64]},
        "dns": {"corefile": corefile},
    })
}

/// `GET /ready` is 200.
fn ready_over_http(to: std::net::SocketAddr) -> bool {
    use std::io::{Read, Write};
    let asked = || -> Result<String> {
        let mut stream = super::server::connect(to, Duration::from_secs(1))?;
        write!(
            stream,
            "GET /ready HTTP/1.1\r\nHost: kun\r\nConnection: close\r\n\r\n"
        )?;
        let mut head = [0; 12];
        stream.read_exact(&mut head)?;
        Ok(String::from_utf8_lossy(&head).into_owned())
    };
    asked().is_ok_and(|head| head.ends_with("200"))
}

/// The cluster DNS server's configuration.
pub fn corefile_text() -> String {
    format!(
        ".:53 {{\n    errors\n    log\n    health :8080\n    ready :{DNS_READY}\n    kubernetes {CLUSTER_DOMAIN} in-addr.arpa ip6.arpa {{\n        \
         pods insecure\n        fallthrough in-addr.arpa ip6.arpa\n        ttl 30\n    }}\n    dns64 {{\n        prefix {PREF64}\n    }}\n    \
         forward . {DNS_V4}\n    cache 30\n    reload\n}}\n"
    )
}

/// A directory for the logs of pods.
pub fn make_log_directory(directory: &Path) -> Result<()> {
    std::fs::create_dir_all(directory.join("pods")).context("making the directory of pods' logs")
}
