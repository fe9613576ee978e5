//! A machine of the cluster: its `kun.yaml`, its node agent, and the runtime's side of CNI.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use kun_harness::{Cgroup, Netns, Process, wait_for};
use serde_json::{Value, json};

use super::names::{
    MACHINES, Machine, NAT64_POOL, POD_PREFIX, POD_V4, POD_V6_ONLY, PREF64, TOR_ASN,
};
use super::outside::logged;

/// An agent loads its programs first, on a machine that may be busy.
const AGENT_STARTS_WITHIN: Duration = Duration::from_secs(60);

/// What every part of the lab shares.
#[derive(Debug, Clone)]
pub struct Places {
    /// The lab's files.
    pub directory: PathBuf,
    /// Where the programs of kun lie.
    pub programs: PathBuf,
}

impl Places {
    /// The manifest folder, which stands in for the Kubernetes API.
    pub fn cluster(&self) -> PathBuf {
        self.directory.join("cluster")
    }

    /// The lab's bpffs.
    pub fn bpffs(&self) -> PathBuf {
        self.directory.join("bpf")
    }

    /// One of our programs.
    pub fn program(&self, name: &str) -> Result<PathBuf> {
        let path = self.programs.join(name);
        anyhow::ensure!(
            path.is_file(),
            "{}: not built; `cargo xtask lab` builds it",
            path.display()
        );
        Ok(path)
    }
}

/// A machine with its agent.
#[derive(Debug)]
pub struct Node {
    /// Which.
    pub machine: &'static Machine,
    /// Its files.
    pub directory: PathBuf,
    /// Pods' cgroups lie below it.
    pub cgroup: Cgroup,
    /// kun-proxy; `None` while it is down.
    pub agent: Option<Process>,
    places: Places,
}

impl Node {
    /// Writes its configuration and makes its directories; nothing runs yet. `on_kubernetes`: the agent will be a pod.
    pub fn prepare(
        machine: &'static Machine,
        places: &Places,
        cgroup: Cgroup,
        on_kubernetes: bool,
    ) -> Result<Self> {
        let directory = places.directory.join(machine.name);
        fs::create_dir_all(directory.join("state"))?;
        fs::create_dir_all(places.bpffs().join(machine.name))?;
        let node = Self {
            machine,
            directory,
            cgroup,
            agent: None,
            places: places.clone(),
        };
        let text = serde_saphyr::to_string(&node.configuration(on_kubernetes))
            .context("writing kun.yaml")?;
        fs::write(node.config(), text)?;
        Ok(node)
    }

    /// Its kun.yaml.
    pub fn config(&self) -> PathBuf {
        self.directory.join("kun.yaml")
    }

    /// The agent's socket.
    pub fn socket(&self) -> PathBuf {
        self.directory.join("agent.sock")
    }

    fn configuration(&self, on_kubernetes: bool) -> Value {
        let machine = self.machine;
        let mut config = shared_configuration();
        config["node"] = json!({"name": machine.name, "uplink": "eth0"});
        if machine.gateway {
            config["nat64"]["gateway"] =
                json!({"pool": [NAT64_POOL], "clients": [POD_V6_ONLY, POD_V4], "slice": 0});
        }
        config["proxy"] = json!({
            "cgroupRoot": self.cgroup.path(),
            "maxServices": 4096, "maxBackends": 16384, "maxSlots": 65536, "maxFlows": 16384,
        });
        config["bgp"] = json!({
            "enabled": true,
            "asn": machine.asn,
            "routerId": machine.v4(),
            "peers": [{"name": "tor", "address": machine.tor_v6(), "asn": TOR_ASN, "source": machine.v6(), "hold": "9s"}],
        });
        if on_kubernetes {
            // Files and sockets are where every machine has them: this one has its own.
            config["cluster"] = json!({"kubernetes": {}});
        } else {
            config["cluster"] = json!({"folder": self.places.cluster()});
            config["agent"] = json!({
                "stateDir": self.directory.join("state"),
                "socket": self.socket(),
                "bpffsRoot": self.places.bpffs().join(machine.name),
                "metrics": "[::1]:9466",
                "log": "info",
            });
        }
        config
    }

    /// Starts the agent and waits until its socket answers.
    pub fn start_agent(&mut self, netns: &Netns) -> Result<()> {
        let mut command = Command::new(self.places.program("kun-proxy")?);
        command.arg("--config").arg(self.config());
        let log = self.directory.join("kun-proxy.log");
        logged(&mut command, &log)?;
        let mut agent = netns.spawn(command)?;
        let socket = self.socket();
        let answered = wait_for(
            "kun-proxy answering on its socket",
            AGENT_STARTS_WITHIN,
            || {
                if !agent.is_running() {
                    return Some(false);
                }
                kun_control::ask(&socket, &kun_control::Request::Status)
                    .is_ok()
                    .then_some(true)
            },
        );
        match answered {
            Ok(true) => {
                self.agent = Some(agent);
                Ok(())
            }
            Ok(false) => bail!(
                "{}: kun-proxy ended: {}",
                self.machine.name,
                last_line(&log)
            ),
            Err(e) => Err(e).with_context(|| format!("{}: {}", self.machine.name, last_line(&log))),
        }
    }

    /// `kill -9`; gone when this returns.
    pub fn kill_agent(&mut self) {
        self.agent = None;
    }
}

/// What every program of the cluster must agree on.
pub fn shared_configuration() -> Value {
    json!({
        "ipam": {
            "podPrefix": POD_PREFIX,
            "v4Pools": [POD_V4],
            "v6OnlyPool": POD_V6_ONLY,
            "defaultClass": "dual",
            "interfaces": "split",
            "cooldown": "30s",
        },
        "nat64": {"pref64": [PREF64], "portBlockBits": 10},
    })
}

/// The last line of a log, for the one line that a person gets.
pub fn last_line(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let last = text
        .lines()
        .rev()
        .find(|line| !line.trim().is_empty())
        .unwrap_or("it said nothing");
    format!("{last} ({})", log.display())
}

/// CNI's error code 11: "try again later".
const TRY_AGAIN: u64 = 11;

/// A node has its blocks within a moment of its agent's start.
const TRIES_AGAIN_FOR: Duration = Duration::from_secs(20);

/// What a plugin answers.
enum Answer {
    Result(Value),
    TryAgain(String),
}

/// One CNI attachment, as a runtime knows it.
#[derive(Debug, Clone)]
pub struct Attachment {
    /// CNI_CONTAINERID
    pub container: String,
    /// CNI_NETNS
    pub netns: PathBuf,
    /// Namespace of the pod.
    pub namespace: String,
    /// Name of the pod.
    pub pod: String,
    /// Annotations, which containerd hands over by capability.
    pub annotations: BTreeMap<String, String>,
}

impl Node {
    /// Executes `kun-cni` as a container runtime does, and tries again where it is told to, as the kubelet does.
    pub fn cni(&self, netns: &Netns, verb: &str, attachment: &Attachment) -> Result<Value> {
        let mut why = String::new();
        let result = wait_for("kun-cni", TRIES_AGAIN_FOR, || {
            match self.cni_once(netns, verb, attachment) {
                Ok(Answer::Result(result)) => Some(Ok(result)),
                Ok(Answer::TryAgain(reason)) => {
                    why = reason;
                    None
                }
                Err(e) => Some(Err(e)),
            }
        });
        result.with_context(|| {
            format!(
                "{verb} of {}/{}: {why}",
                attachment.namespace, attachment.pod
            )
        })?
    }

    /// Once: environment, standard input, standard output.
    fn cni_once(&self, netns: &Netns, verb: &str, attachment: &Attachment) -> Result<Answer> {
        let network = json!({
            "cniVersion": "1.1.0",
            "name": "kun",
            "type": "kun-cni",
            "kunConfig": self.config(),
            "capabilities": {"io.kubernetes.cri.pod-annotations": true},
            "runtimeConfig": {"io.kubernetes.cri.pod-annotations": attachment.annotations},
        });
        let program = self.places.program("kun-cni")?;
        let arguments = format!(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME={};K8S_POD_INFRA_CONTAINER_ID={}",
            attachment.namespace, attachment.pod, attachment.container
        );
        let mut command = Command::new(&program);
        command
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", &attachment.container)
            .env("CNI_NETNS", &attachment.netns)
            .env("CNI_IFNAME", "eth0")
            .env("CNI_ARGS", arguments)
            .env("CNI_PATH", &self.places.programs)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let output = netns.run(|| -> Result<std::process::Output> {
            let mut child = command.spawn().context("starting kun-cni")?;
            let mut input = child.stdin.take().context("a piped child has an input")?;
            input.write_all(network.to_string().as_bytes())?;
            drop(input);
            Ok(child.wait_with_output()?)
        })?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        if !output.status.success() {
            let error: Value = serde_json::from_str(&said).unwrap_or_default();
            if error["code"] == TRY_AGAIN {
                return Ok(Answer::TryAgain(
                    error["details"].as_str().unwrap_or_default().to_owned(),
                ));
            }
            let word = |key: &str| {
                error
                    .get(key)
                    .and_then(Value::as_str)
                    .unwrap_or_default()
                    .to_owned()
            };
            bail!(
                "kun-cni {verb} of {}/{}: {} {} {}",
                attachment.namespace,
                attachment.pod,
                word("msg"),
                word("details"),
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        if said.trim().is_empty() {
            return Ok(Answer::Result(Value::Null));
        }
        let result = serde_json::from_str(&said)
            .with_context(|| format!("kun-cni {verb}: its result is not JSON"))?;
        Ok(Answer::Result(result))
    }
}

/// The addresses of a CNI result, IPv6 first.
pub fn result_addresses(result: &Value) -> Result<Vec<IpAddr>> {
    let mut addresses = Vec::new();
    for ip in result
        .get("ips")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
    {
        let text = ip
            .get("address")
            .and_then(Value::as_str)
            .context("ips[].address: missing")?;
        let host = text.split('/').next().unwrap_or_default();
        addresses.push(
            host.parse()
                .with_context(|| format!("ips[].address: {text}"))?,
        );
    }
    anyhow::ensure!(!addresses.is_empty(), "the CNI result has no address");
    addresses.sort_by_key(IpAddr::is_ipv4);
    Ok(addresses)
}

/// A machine by name.
pub fn machine(name: &str) -> Option<&'static Machine> {
    MACHINES.iter().find(|machine| machine.name == name)
}
