//! One machine with an agent, for container runtimes that are tried by themselves: a room with their default paths, kun placed there as
//! on any machine, and a neighbour on the fabric. Everything has a lab's name, and goes as a lab goes: whatever became of the test.

#![allow(dead_code, reason = "each test program uses its part")]

use std::fs;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use kun_control::{Fact, Request, Response, SlotRow};
use kun_harness::{BpfFs, Cgroup, Netns, cgroup2_mount, require_root, skip, veth, wait_for};
use kun_tests::lab::cluster::image;
use kun_tests::lab::cluster::room::{Plan, Room};
use kun_tests::lab::down;
use kun_tests::lab::names::{LabName, MACHINES};
use kun_tests::lab::node::{Node, Places};
use kun_tests::lab::server;
use serde_json::{Value, json};

/// The port that pods serve their name at.
pub(crate) const PORT: u16 = 8080;

/// What a runtime makes of a pod takes a second or two; a busy machine takes its time.
pub(crate) const WITHIN: Duration = Duration::from_secs(60);

/// One that does not answer has lost the packet.
const ANSWERS_WITHIN: Duration = Duration::from_secs(5);

/// The machine. Fields drop in order, and what they leave goes by the lab's name.
pub(crate) struct Stand {
    pub(crate) node: Node,
    pub(crate) netns: Netns,
    pub(crate) fabric: Netns,
    pub(crate) places: Places,
    pub(crate) name: LabName,
    _cgroup: Cgroup,
    _bpffs: BpfFs,
    _down: Down,
    _lock: down::Lock,
}

/// Takes away all that has the name.
struct Down(LabName);

impl Drop for Down {
    fn drop(&mut self) {
        down::down(&self.0);
    }
}

/// Where the programs are that the tests run.
pub(crate) fn programs() -> PathBuf {
    let lab = Path::new(env!("CARGO_BIN_EXE_kun-lab"));
    lab.parent().unwrap_or(Path::new(".")).to_owned()
}

impl Stand {
    /// Its agent runs and has its blocks. `None`: skipped, and said so.
    pub(crate) fn new(what: &str) -> Option<Self> {
        Self::with(what, |_| {})
    }

    /// The same, with a `kun.yaml` changed by `change`.
    pub(crate) fn with(what: &str, change: impl FnOnce(&mut Value)) -> Option<Self> {
        if !require_root() {
            return None;
        }
        if cgroup2_mount().is_err() {
            skip("because no cgroup v2 tree is mounted");
            return None;
        }
        for program in ["kun-proxy", "kun-cni", "kunctl"] {
            if !programs().join(program).is_file() {
                skip(&format!(
                    "{program} is not built: cargo build --workspace --bins"
                ));
                return None;
            }
        }
        Some(Self::build(what, change).unwrap_or_else(|e| panic!("{e:#}")))
    }

    fn build(what: &str, change: impl FnOnce(&mut Value)) -> anyhow::Result<Self> {
        let machine = &MACHINES[0];
        let name = LabName::new(&format!("{what}{}", std::process::id()))?;
        let lock = down::Lock::take(&name)?;
        let removed = Down(name.clone());
        let places = Places {
            directory: name.directory(),
            programs: programs(),
        };
        fs::create_dir_all(places.cluster())?;
        let bpffs = BpfFs::create(places.bpffs())?;
        let cgroup = Cgroup::create(name.cgroup(&cgroup2_mount()?))?;
        let (fabric, netns) = (
            Netns::create(name.netns("tor"))?,
            Netns::create(name.netns(machine.name))?,
        );
        netns.forward()?;
        veth(&fabric, machine.name, &netns, "eth0")?;
        for (ns, interface, v4, v6) in [
            (&fabric, machine.name, machine.tor_v4(), machine.tor_v6()),
            (&netns, "eth0", machine.v4(), machine.v6()),
        ] {
            ns.exec(&format!("addr add {v4}/30 dev {interface}"))?;
            ns.exec(&format!("addr add {v6}/64 dev {interface}"))?;
        }
        for (ns, v4, v6) in [
            (&netns, machine.tor_v4(), machine.tor_v6()),
            // What a speaker would have told.
            (&fabric, machine.v4(), machine.v6()),
        ] {
            ns.exec(&format!("route add default via {v4}"))?;
            ns.exec(&format!("-6 route add default via {v6}"))?;
        }
        let blocks = ["10.64.0.0", "240.0.0.0"].map(|first| {
            json!({"apiVersion": "kun.network/v1alpha1", "kind": "IPAMBlock",
                "metadata": {"name": format!("block-{}", first.replace('.', "-"))},
                "spec": {"first": first, "node": machine.name}})
        });
        let here = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": machine.name},
            "status": {"addresses": [{"type": "InternalIP", "address": machine.v4()}]}});
        let documents = [
            here.to_string(),
            blocks[0].to_string(),
            blocks[1].to_string(),
        ];
        fs::write(
            places.cluster().join("node.yaml"),
            documents.join("\n---\n"),
        )?;
        let mut node = Node::prepare(machine, &places, cgroup.child(machine.name)?, false)?;
        // Nobody speaks BGP here.
        let text = fs::read_to_string(node.config())?;
        let mut config: Value = serde_saphyr::from_str(&text)?;
        config["bgp"] = json!({"enabled": false});
        change(&mut config);
        fs::write(node.config(), config.to_string())?;
        node.start_agent(&netns)?;
        let stand = Self {
            node,
            netns,
            fabric,
            places,
            name,
            _cgroup: cgroup,
            _bpffs: bpffs,
            _down: removed,
            _lock: lock,
        };
        wait_for(
            "the agent having its blocks",
            WITHIN,
            || match kun_control::ask(&stand.node.socket(), &Request::Ipam).ok()? {
                Response::Ipam { blocks, .. } => (blocks.len() == 2).then_some(()),
                _ => None,
            },
        )?;
        Ok(stand)
    }

    /// A room of this machine.
    pub(crate) fn room(&self) -> Room {
        let plan = Plan {
            lab: self.places.directory.clone(),
            state: self.name.state().join(self.node.machine.name),
            hostname: self.node.machine.name.to_owned(),
        };
        Room::open(&self.places.program("kun-lab").unwrap(), &plan, &self.netns).unwrap()
    }

    /// The image of pods, in a file that is seen in the room too.
    pub(crate) fn image(&self) -> PathBuf {
        let archive = self.places.directory.join("image.tar");
        if !archive.is_file() {
            image::write(&[programs().join("kun-lab")], &archive).unwrap();
        }
        archive
    }

    /// Where runtimes may put cgroups, below the root of every hierarchy.
    pub(crate) fn cgroup_parent(&self) -> String {
        format!("/{}/{}", self.name.cgroup_name(), self.node.machine.name)
    }

    /// Places plugin, `kun.yaml` and list where runtimes look, by the plugin's own `install`.
    pub(crate) fn install(&self, room: &Room) {
        let mut command = Command::new(programs().join("kun-cni"));
        command
            .args([
                "install",
                "--bin-dir",
                "/opt/cni/bin",
                "--conf-dir",
                "/etc/cni/net.d",
                "--config",
            ])
            .arg(self.node.config());
        said(&self.inside(room, &command)).unwrap();
    }

    /// Runs the command on the machine, in its room, to its end.
    pub(crate) fn inside(&self, room: &Room, command: &Command) -> Output {
        self.netns.output(room.wrap(command)).unwrap()
    }

    /// `kunctl`, of this machine.
    pub(crate) fn kunctl(&self, words: &[&str]) -> Output {
        let mut command = Command::new(programs().join("kunctl"));
        command.arg("--config").arg(self.node.config()).args(words);
        self.netns.output(command).unwrap()
    }

    /// Slots that are not free.
    pub(crate) fn slots(&self) -> Vec<SlotRow> {
        match kun_control::ask(&self.node.socket(), &Request::Ipam) {
            Ok(Response::Ipam { slots, .. }) => slots,
            other => panic!("{other:?}"),
        }
    }

    /// Slots in this state.
    pub(crate) fn count(&self, state: &str) -> usize {
        self.slots().iter().filter(|row| row.state == state).count()
    }

    /// What the agent says of its dataplane under this name.
    pub(crate) fn fact(&self, name: &str) -> Option<String> {
        let Ok(Response::Status { status }) =
            kun_control::ask(&self.node.socket(), &Request::Status)
        else {
            panic!("the agent does not answer");
        };
        let same = |fact: &Fact| (fact.name == name).then(|| fact.value.clone());
        status.proxy.iter().find_map(same)
    }

    /// What of pods is on the machine, by name: interfaces, routes, namespaces in the room.
    pub(crate) fn leavings(&self, room: &Room) -> String {
        let links = self.netns.exec("-br link show type veth").unwrap();
        let links: Vec<&str> = links.lines().filter(|l| !l.starts_with("eth0")).collect();
        let v4 = self.netns.exec("-4 route show proto 0x6b").unwrap();
        let v6 = self.netns.exec("-6 route show proto 0x6b").unwrap();
        // The blocks' own routes stay with the blocks.
        let pods: Vec<&str> = v4
            .lines()
            .chain(v6.lines())
            .filter(|route| route.contains(" dev ") && !route.contains("dev lo"))
            .collect();
        let mut list = Command::new("ls");
        list.arg("/run/netns");
        let namespaces = said(&self.inside(room, &list)).unwrap();
        [
            links.join("\n"),
            pods.join("\n"),
            namespaces.trim().to_owned(),
        ]
        .join("\n")
        .trim()
        .to_owned()
    }

    /// Who answers there, asked from the fabric.
    pub(crate) fn who(&self, to: SocketAddr) -> anyhow::Result<String> {
        who(&self.fabric, to)
    }
}

/// Who answers there over a new connection.
pub(crate) fn who(from: &Netns, to: SocketAddr) -> anyhow::Result<String> {
    let mut stream = from.run(|| TcpStream::connect_timeout(&to, ANSWERS_WITHIN))?;
    stream.set_read_timeout(Some(ANSWERS_WITHIN))?;
    Ok(server::exchange(&mut stream, "pod")?.pod)
}

/// The standard output of a command that did what it should, or all that it said.
pub(crate) fn said(output: &Output) -> Result<String, String> {
    let out = String::from_utf8_lossy(&output.stdout).into_owned();
    match output.status.success() {
        true => Ok(out),
        false => Err(format!(
            "{}: {out}{}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        )),
    }
}

/// The first of these texts that is an address of this family.
pub(crate) fn of_family(texts: &[String], v6: bool) -> Option<IpAddr> {
    let mut addresses = texts.iter().filter_map(|text| text.parse::<IpAddr>().ok());
    addresses.find(|address| address.is_ipv6() == v6)
}
