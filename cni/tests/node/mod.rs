//! A node for tests: a namespace with an uplink, a state directory, a `kun.yaml`, and the plugin executed as a runtime does.
#![allow(dead_code, reason = "each test program uses its part")]

use std::fs::File;
use std::io::{BufRead, BufReader, Seek, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use kun_cni::clock;
use kun_cni::ipam::IpamService;
use kun_config::types::{BlockId, Slot};
use kun_control::Request;
use kun_harness::Netns;
use serde_json::{Value, json};
use tempfile::TempDir;

pub(crate) const DUAL: [u8; 4] = [10, 64, 0, 0];
pub(crate) const V6_ONLY: [u8; 4] = [240, 0, 0, 64];
pub(crate) const COOLDOWN: &str = "30s";

pub(crate) struct Node {
    pub(crate) netns: Netns,
    pub(crate) dir: TempDir,
    pub(crate) config: PathBuf,
}

impl Node {
    /// A forwarding namespace with one block of each class.
    pub(crate) fn new(interfaces: &str) -> Self {
        let node = Self::without_blocks(interfaces);
        node.give_blocks();
        node
    }

    /// A forwarding namespace that owns no block yet.
    pub(crate) fn without_blocks(interfaces: &str) -> Self {
        let netns = Netns::new("cni-node").unwrap();
        netns.forward().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("kun.yaml");
        let text = format!(
            "node: {{name: n}}\ncluster: {{folder: {0}/manifests}}\nipam:\n  podPrefix: fd00:64::/96\n  v4Pools: [10.64.0.0/16]\n  interfaces: {interfaces}\n  cooldown: {COOLDOWN}\n  mtu: 1400\nagent:\n  stateDir: {0}/state\n  socket: {0}/agent.sock\n",
            dir.path().display()
        );
        std::fs::create_dir(dir.path().join("manifests")).unwrap();
        std::fs::write(&config, text).unwrap();
        Self { netns, dir, config }
    }

    /// One block of each class, as the agent is told of them.
    pub(crate) fn give_blocks(&self) {
        let blocks = [DUAL, V6_ONLY].map(|first| {
            BlockId::new(Slot::from(std::net::Ipv4Addr::from(first))).expect("aligned")
        });
        self.service().set_blocks(&blocks, clock::now()).unwrap();
    }

    pub(crate) fn state_dir(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    pub(crate) fn parsed(&self) -> kun_config::Config {
        let text = std::fs::read_to_string(&self.config).unwrap();
        kun_config::parse("kun.yaml", &text).unwrap()
    }

    /// The service as the agent opens it; the store is closed when it drops.
    pub(crate) fn service(&self) -> IpamService {
        IpamService::open_within(
            &self.state_dir(),
            &self.parsed(),
            clock::boot().unwrap(),
            clock::now(),
            Duration::from_secs(10),
        )
        .unwrap()
    }

    pub(crate) fn network(&self) -> Value {
        json!({
            "cniVersion": "1.1.0",
            "name": "kun",
            "type": "kun-cni",
            "kunConfig": self.config,
        })
    }

    /// The plugin with these variables and this stdin, run on the node.
    pub(crate) fn execute(&self, vars: &[(&str, &str)], stdin: &[u8]) -> Output {
        self.netns.output(self.command(vars, stdin)).unwrap()
    }

    pub(crate) fn command(&self, vars: &[(&str, &str)], stdin: &[u8]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kun-cni"));
        command
            .env_clear()
            .envs(vars.iter().copied())
            .stdin(file_with(stdin))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// One verb for one pod.
    pub(crate) fn verb(
        &self,
        verb: &str,
        pod: &Pod,
        network: &Value,
    ) -> Result<Option<Value>, Value> {
        let netns = pod.netns.path();
        let vars = pod.variables(verb, &netns);
        let vars: Vec<(&str, &str)> = vars.iter().map(|(n, v)| (*n, v.as_str())).collect();
        answer(&self.execute(&vars, network.to_string().as_bytes()))
    }

    /// Any plugin with these variables and this stdin, run on the node.
    pub(crate) fn plugin(
        &self,
        program: &Path,
        verb: &str,
        pod: &Pod,
        network: &Value,
    ) -> Result<Option<Value>, Value> {
        let netns = pod.netns.path();
        let mut vars = pod.variables(verb, &netns);
        for (name, value) in &mut vars {
            if *name == "CNI_PATH" {
                *value = cni_path();
            }
        }
        let mut command = Command::new(program);
        command
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .envs(vars)
            .stdin(file_with(network.to_string().as_bytes()))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        answer(&self.netns.output(command).unwrap())
    }

    /// An agent that answers so many requests from the real service, and tells what it was asked.
    pub(crate) fn agent(&self, requests: usize) -> std::thread::JoinHandle<Vec<Request>> {
        let listener = UnixListener::bind(self.parsed().agent.socket).unwrap();
        let service = self.service();
        std::thread::spawn(move || {
            let mut asked = Vec::new();
            while asked.len() < requests {
                let (stream, _) = listener.accept().unwrap();
                let mut writer = stream.try_clone().unwrap();
                for line in BufReader::new(stream).lines() {
                    let request: Request = serde_json::from_str(&line.unwrap()).unwrap();
                    let answer = service.handle(&request, clock::now());
                    writeln!(writer, "{}", serde_json::to_string(&answer).unwrap()).unwrap();
                    asked.push(request);
                }
            }
            asked
        })
    }

    pub(crate) fn add(&self, pod: &Pod) -> Result<Value, Value> {
        self.verb("ADD", pod, &pod.network(self))
            .map(|v| v.expect("ADD has a result"))
    }

    pub(crate) fn del(&self, pod: &Pod) -> Result<(), Value> {
        self.verb("DEL", pod, &pod.network(self)).map(|out| {
            assert_eq!(out, None, "DEL has no result");
        })
    }

    pub(crate) fn check(&self, pod: &Pod, previous: &Value) -> Result<(), Value> {
        let mut network = pod.network(self);
        network["prevResult"] = previous.clone();
        self.verb("CHECK", pod, &network).map(|out| {
            assert_eq!(out, None, "CHECK has no result");
        })
    }

    /// What the node has of ours: interfaces and routes, by name.
    pub(crate) fn leavings(&self) -> String {
        let links = self.netns.exec("-br link show type veth").unwrap();
        let v4 = self.netns.exec("-4 route show proto 0x6b").unwrap();
        let v6 = self.netns.exec("-6 route show proto 0x6b").unwrap();
        links + &v4 + &v6
    }
}

/// A pod's namespace as a runtime makes it.
pub(crate) struct Pod {
    pub(crate) netns: Netns,
    pub(crate) id: String,
    pub(crate) ipv4: bool,
}

impl Pod {
    pub(crate) fn new(id: &str, ipv4: bool) -> Self {
        let netns = Netns::new("cni-pod").unwrap();
        // The kernel's own defaults: with them an address takes a second to be usable.
        netns.sysctl("net.ipv6.conf.all.accept_dad", "0").unwrap();
        netns
            .sysctl("net.ipv6.conf.default.accept_dad", "1")
            .unwrap();
        Self {
            netns,
            id: id.to_owned(),
            ipv4,
        }
    }

    pub(crate) fn network(&self, node: &Node) -> Value {
        let mut network = node.network();
        network["runtimeConfig"] = json!({
            "io.kubernetes.cri.pod-annotations": {"kun.network/ipv4": self.ipv4.to_string()}
        });
        network
    }

    pub(crate) fn variables(&self, verb: &str, netns: &Path) -> Vec<(&'static str, String)> {
        vec![
            ("CNI_COMMAND", verb.to_owned()),
            ("CNI_CONTAINERID", self.id.clone()),
            ("CNI_NETNS", netns.display().to_string()),
            ("CNI_IFNAME", "eth0".to_owned()),
            ("CNI_PATH", "/opt/cni/bin".to_owned()),
            (
                "CNI_ARGS",
                format!(
                    "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME={}",
                    self.id
                ),
            ),
        ]
    }
}

/// Where Debian has the reference plugins.
pub(crate) const DEBIAN: &str = "/usr/lib/cni";

/// Debian's plugins, and ours for them to call.
pub(crate) fn cni_path() -> String {
    let ours = Path::new(env!("CARGO_BIN_EXE_kun-cni")).parent().unwrap();
    format!("{DEBIAN}:{}", ours.display())
}

/// Exit code and stdout, as libcni reads them.
pub(crate) fn answer(output: &Output) -> Result<Option<Value>, Value> {
    let text = String::from_utf8_lossy(&output.stdout);
    let value = (!text.trim().is_empty()).then(|| {
        serde_json::from_str(&text)
            .unwrap_or_else(|e| panic!("{e}: {text} {}", String::from_utf8_lossy(&output.stderr)))
    });
    if output.status.success() {
        return Ok(value);
    }
    Err(value.unwrap_or_else(|| {
        panic!(
            "no error result: {} {}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        )
    }))
}

/// The address of this family in a result.
pub(crate) fn address(result: &Value, v6: bool) -> Option<String> {
    result["ips"].as_array()?.iter().find_map(|ip| {
        let text = ip["address"].as_str()?;
        (text.contains(':') == v6).then(|| text.split('/').next().unwrap_or_default().to_owned())
    })
}

pub(crate) fn file_with(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file.rewind().unwrap();
    file
}
