//! containerd by itself, driven by crictl as a kubelet drives it (CRI v1): what a sandbox's status shows of both families, what its
//! configuration asks of the network, and that a containerd killed at the worst moment leaks nothing.

mod stand;

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use kun_harness::{Netns, Process, peers, run, skip, wait_for, wait_until};
use kun_tests::lab::cluster::image;
use kun_tests::lab::cluster::machine::{PEERS, RUNC, Runtime, SOCKET, write_script};
use rustix::process::Signal;
use serde_json::{Value, json};
use stand::{PORT, Stand, WITHIN, of_family, said, who};

const LIST: &str = "/etc/cni/net.d/10-kun.conflist";

/// A machine with containerd. Fields drop in order.
struct Crictl {
    runtime: Runtime,
    stand: Stand,
}

/// A sandbox that runs.
struct Sandbox {
    id: String,
    config: PathBuf,
    /// As `status.network` has them: the first, then the others.
    addresses: Vec<String>,
}

impl Crictl {
    fn new(what: &str) -> Option<Self> {
        for peer in PEERS.into_iter().chain(["crictl"]) {
            peers::require(peer)?;
        }
        if !std::path::Path::new(RUNC).is_file() {
            skip("runc is not installed; `cargo xtask setup` does it");
            return None;
        }
        let stand = Stand::new(what)?;
        let (node, netns) = (&stand.node, &stand.netns);
        let runtime = Runtime::start(&stand.name, &stand.places, node, netns, &stand.image());
        let runtime = runtime.unwrap_or_else(|e| panic!("{e:#}"));
        stand.install(&runtime.room);
        Some(Self { runtime, stand })
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(peers::path("crictl"));
        command
            .arg("--runtime-endpoint")
            .arg(format!("unix://{SOCKET}"))
            .args(["--timeout", "60s"])
            .args(words);
        self.runtime.room.wrap(&command)
    }

    fn output(&self, words: &[&str]) -> Output {
        self.stand.netns.output(self.command(words)).unwrap()
    }

    fn run(&self, words: &[&str]) -> Result<String, String> {
        said(&self.output(words)).map(|out| out.trim().to_owned())
    }

    /// A sandbox's configuration in a file, changed by `more`.
    fn config(&self, name: &str, more: &Value) -> PathBuf {
        let mut config = json!({
            "metadata": {"name": name, "namespace": "shop", "uid": format!("uid-{name}"), "attempt": 0},
            "hostname": name,
            "log_directory": "/var/log/pods",
            "linux": {"cgroup_parent": self.stand.cgroup_parent()},
        });
        for (key, value) in more.as_object().unwrap() {
            config[key] = value.clone();
        }
        let file = self.stand.places.directory.join(format!("{name}.json"));
        fs::write(&file, config.to_string()).unwrap();
        file
    }

    fn sandbox(&self, name: &str, more: &Value) -> Result<Sandbox, String> {
        let config = self.config(name, more);
        let id = self.run(&["runp", config.to_str().unwrap()])?;
        let status = self.inspect(&id);
        let network = &status["status"]["network"];
        let mut addresses = vec![network["ip"].as_str().unwrap_or_default().to_owned()];
        let others = network["additionalIps"].as_array().into_iter().flatten();
        addresses.extend(others.map(|o| o["ip"].as_str().unwrap_or_default().to_owned()));
        Ok(Sandbox {
            id,
            config,
            addresses,
        })
    }

    fn inspect(&self, id: &str) -> Value {
        let text = self.run(&["inspectp", "-o", "json", id]).unwrap();
        serde_json::from_str(&text).unwrap()
    }

    /// Starts a container in it that tells its name at [`PORT`].
    fn serve(&self, sandbox: &Sandbox, name: &str) {
        let config = json!({
            "metadata": {"name": name, "attempt": 0},
            "image": {"image": image::POD},
            "args": ["serve", "--name", name, "--tcp", PORT.to_string()],
            "log_path": format!("{name}.log"),
        });
        let file = self
            .stand
            .places
            .directory
            .join(format!("{name}-container.json"));
        fs::write(&file, config.to_string()).unwrap();
        let (container, pod) = (file.to_str().unwrap(), sandbox.config.to_str().unwrap());
        let id = self
            .run(&["create", "--no-pull", &sandbox.id, container, pod])
            .unwrap();
        self.run(&["start", &id]).unwrap();
    }

    fn remove(&self, id: &str) {
        self.run(&["stopp", id]).unwrap();
        self.run(&["rmp", "--force", id]).unwrap();
    }

    /// Sandboxes that containerd knows, whatever their state.
    fn known(&self) -> Vec<String> {
        let text = self.run(&["pods", "-q"]).unwrap();
        text.lines().map(str::to_owned).collect()
    }

    fn kill(&mut self) {
        self.runtime.containerd.kill().unwrap();
        self.runtime.containerd.wait().unwrap();
    }

    fn start_again(&mut self) {
        let netns = &self.stand.netns;
        self.runtime
            .start_containerd(netns)
            .unwrap_or_else(|e| panic!("{e:#}"));
    }

    /// `crictl runp`, not waited for.
    fn begin(&self, name: &str) -> Process {
        let config = self.config(name, &json!({}));
        let command = self.command(&["runp", config.to_str().unwrap()]);
        self.stand.netns.spawn(command).unwrap()
    }

    /// Removes what containerd knows of, as the kubelet does after a restart; then nothing may be left.
    fn nothing_leaks(&self, when: &str) {
        for id in self.known() {
            self.remove(&id);
        }
        let gone = wait_until(WITHIN, || {
            self.stand.count("allocated") == 0 && self.stand.leavings(&self.runtime.room).is_empty()
        });
        assert!(
            gone,
            "{when}: {}\n{:?}",
            self.stand.leavings(&self.runtime.room),
            self.stand.slots()
        );
    }
}

#[test]
fn a_sandbox_has_the_families_limits_and_ports_that_its_configuration_asks_for() {
    let Some(crictl) = Crictl::new("crictl") else {
        return;
    };
    let stand = &crictl.stand;
    let dual = crictl
        .sandbox(
            "front",
            &json!({
                "annotations": {
                    "kun.network/ipv4": "true",
                    "kubernetes.io/ingress-bandwidth": "10M",
                    "kubernetes.io/egress-bandwidth": "10M",
                },
                "port_mappings": [{"protocol": 0, "container_port": PORT, "host_port": 18080}],
            }),
        )
        .unwrap();
    let single = crictl
        .sandbox(
            "back",
            &json!({"annotations": {"kun.network/ipv4": "false"}}),
        )
        .unwrap();

    // Split mode, which is the default: IPv4 is on eth1, and containerd looks at eth0 alone. Which of both it calls the first is its own
    // affair (`ip_pref`).
    assert_eq!(dual.addresses.len(), 2, "{:?}", dual.addresses);
    assert_eq!(single.addresses.len(), 1, "{:?}", single.addresses);
    let v6 = of_family(&dual.addresses, true).unwrap();
    let v4 = of_family(&dual.addresses, false).unwrap();
    let only = of_family(&single.addresses, true).unwrap();
    let rows = stand.slots();
    let pods: Vec<(&str, Option<String>)> = rows
        .iter()
        .map(|row| (row.pod.name.as_str(), row.v4.map(|a| a.to_string())))
        .collect();
    assert!(pods.contains(&("front", Some(v4.to_string()))), "{rows:?}");
    assert!(pods.contains(&("back", None)), "{rows:?}");

    crictl.serve(&dual, "front");
    crictl.serve(&single, "back");
    let machine = stand.node.machine;
    let asked = [
        (SocketAddr::new(v6, PORT), "front"),
        (SocketAddr::new(v4, PORT), "front"),
        (SocketAddr::new(only, PORT), "back"),
        (SocketAddr::new(machine.v4().into(), 18080), "front"),
        (SocketAddr::new(machine.v6().into(), 18080), "front"),
    ];
    for (to, name) in asked {
        let answer = wait_for("an answer", WITHIN, || stand.who(to).ok());
        assert_eq!(answer.unwrap_or_else(|e| panic!("{to}: {e}")), name, "{to}");
    }
    let limits = stand.fact("limits").unwrap();
    assert!(limits.contains("of 1 pods"), "{limits}");

    // What kun refuses is read by whoever looks at the pod's events, and leaves nothing.
    let refused = crictl
        .sandbox(
            "odd",
            &json!({"annotations": {"kun.network/ipv4": "perhaps"}}),
        )
        .map(|sandbox| sandbox.id)
        .unwrap_err();
    assert!(
        refused.contains("kun.network/ipv4") && refused.contains("perhaps"),
        "{refused}"
    );
    // The port is the first pod's.
    let refused = crictl
        .sandbox(
            "late",
            &json!({
                "port_mappings": [{"protocol": 0, "container_port": PORT, "host_port": 18080}],
            }),
        )
        .map(|sandbox| sandbox.id)
        .unwrap_err();
    assert!(refused.contains("18080"), "{refused}");

    for sandbox in [&dual, &single] {
        crictl.remove(&sandbox.id);
    }
    for (to, _) in asked {
        assert!(stand.who(to).is_err(), "{to}");
    }
    assert_eq!(stand.fact("limits"), None);
    crictl.nothing_leaks("after all");
    let cooling: Vec<String> = stand
        .slots()
        .iter()
        .map(|row| row.pod.name.clone())
        .collect();
    for name in ["front", "back"] {
        assert!(cooling.iter().any(|pod| pod == name), "{cooling:?}");
    }
}

#[test]
fn a_containerd_killed_while_it_starts_a_sandbox_leaks_nothing() {
    let Some(mut crictl) = Crictl::new("crikill") else {
        return;
    };
    // In the midst of our ADD: the agent is held, so the plugin waits for it.
    let agent = crictl.stand.node.agent.as_ref().unwrap();
    agent.signal(Signal::STOP).unwrap();
    let asking = crictl.begin("first");
    wait_for("the plugin", WITHIN, || crictl.plugin_runs().then_some(())).unwrap();
    crictl.kill();
    drop(asking);
    let agent = crictl.stand.node.agent.as_ref().unwrap();
    agent.signal(Signal::CONT).unwrap();
    // It goes on: nobody told it to stop.
    wait_for("its end", WITHIN, || (!crictl.plugin_runs()).then_some(())).unwrap();
    crictl.start_again();
    crictl.nothing_leaks("killed while kun-cni ran");

    // After our ADD, before containerd heard of it: the next plugin of the list hangs.
    crictl.chain_one_that_hangs();
    let asking = crictl.begin("second");
    wait_for("our part done", WITHIN, || {
        (crictl.stand.count("allocated") == 1).then_some(())
    })
    .unwrap();
    let reached = crictl.gate().with_extension("reached");
    wait_for("the plugin after us", WITHIN, || {
        reached.exists().then_some(())
    })
    .unwrap();
    crictl.kill();
    drop(asking);
    fs::write(crictl.gate(), "go on\n").unwrap();
    crictl.stand.install(&crictl.runtime.room);
    crictl.start_again();
    crictl.nothing_leaks("killed after kun-cni was done");

    // And all is well.
    let sandbox = crictl.sandbox("third", &json!({})).unwrap();
    assert_eq!(sandbox.addresses.len(), 2);
    // A sandbox that ran is there after another kill, with what it had.
    crictl.serve(&sandbox, "third");
    crictl.kill();
    let v6 = of_family(&sandbox.addresses, true).unwrap();
    let answer = wait_for("an answer", WITHIN, || {
        crictl.stand.who(SocketAddr::new(v6, PORT)).ok()
    });
    assert_eq!(answer.unwrap(), "third");
    crictl.start_again();
    assert_eq!(crictl.known(), std::slice::from_ref(&sandbox.id));
    crictl.nothing_leaks("after all");
}

/// A node whose store is lost: the sandboxes live on, and containerd's memory and the kernel's say whose what is.
#[test]
fn a_damaged_store_is_rebuilt_under_sandboxes_that_live_on() {
    let Some(mut crictl) = Crictl::new("crirebuild") else {
        return;
    };
    let only_v6 = json!({"annotations": {"kun.network/ipv4": "false"}});
    let front = crictl.sandbox("front", &json!({})).unwrap();
    let back = crictl.sandbox("back", &only_v6).unwrap();
    let gone = crictl.sandbox("gone", &json!({})).unwrap();
    crictl.remove(&gone.id);
    crictl.serve(&front, "front");
    crictl.serve(&back, "back");
    let to: Vec<SocketAddr> = front
        .addresses
        .iter()
        .chain(&back.addresses)
        .map(|address| SocketAddr::new(address.parse().unwrap(), PORT))
        .collect();
    for to in &to {
        wait_for("an answer", WITHIN, || crictl.stand.who(*to).ok()).unwrap();
    }
    let (stop, made) = (AtomicBool::new(false), AtomicUsize::new(0));
    let fabric = Netns::adopt(crictl.stand.fabric.name()).unwrap();
    let failed = std::thread::scope(|scope| {
        let client = scope.spawn(|| traffic(&fabric, &to, &stop, &made));
        let done = catch_unwind(AssertUnwindSafe(|| crictl.lose_the_store_and_rebuild_it()));
        stop.store(true, Ordering::Relaxed);
        let failed = client.join().unwrap();
        done.unwrap_or_else(|panic| resume_unwind(panic));
        failed
    });
    // The namespace is the stand's.
    fabric.keep();
    assert_eq!(failed, Vec::<String>::new(), "traffic went on");
    assert!(made.load(Ordering::Relaxed) > 100, "{made:?}");

    let rows = crictl.stand.slots();
    let of = |sandbox: &Sandbox| {
        let v6 = of_family(&sandbox.addresses, true).unwrap();
        rows.iter()
            .find(|row| IpAddr::V6(row.v6) == v6)
            .unwrap_or_else(|| panic!("{v6}: {rows:?}"))
    };
    for (sandbox, name) in [(&front, "front"), (&back, "back")] {
        let row = of(sandbox);
        assert_eq!(row.state, "allocated", "{row:?}");
        // The name is in no interface's tag.
        assert_eq!(
            (row.pod.namespace.as_str(), row.pod.name.as_str()),
            ("shop", name)
        );
        assert_eq!(row.key.container_id, sandbox.id);
    }
    assert_eq!(of(&gone).state, "cooling");
    crictl.nothing_leaks("after all");
}

/// Asks until it is stopped; what failed.
fn traffic(from: &Netns, to: &[SocketAddr], stop: &AtomicBool, made: &AtomicUsize) -> Vec<String> {
    let mut failed = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        for to in to {
            match who(from, *to) {
                Ok(_) => drop(made.fetch_add(1, Ordering::Relaxed)),
                Err(e) => failed.push(format!("{to}: {e:#}")),
            }
        }
    }
    failed
}

impl Crictl {
    fn lose_the_store_and_rebuild_it(&mut self) {
        self.stand.node.kill_agent();
        let store = self.stand.node.directory.join("state/ipam.redb");
        let length = fs::metadata(&store).unwrap().len();
        let file = fs::File::options().write(true).open(&store).unwrap();
        file.set_len(length / 2).unwrap();
        // Neither the agent nor the plugin alone goes on from here, and both say what to do.
        let refused = self.stand.node.start_agent(&self.stand.netns).unwrap_err();
        assert!(
            format!("{refused:#}").contains("`kunctl ipam rebuild`"),
            "{refused:#}"
        );
        let refused = self.sandbox("early", &json!({})).map(|s| s.id).unwrap_err();
        assert!(refused.contains("`kunctl ipam rebuild`"), "{refused}");
        let state = self.stand.name.state().join(self.stand.node.machine.name);
        let results = state.join("lib/cni/results").display().to_string();
        let told = self
            .stand
            .kunctl(&["ipam", "rebuild", "--results", &results]);
        let told = said(&told).unwrap();
        assert!(told.starts_with("2 attachments keep their slots"), "{told}");
        self.stand.node.start_agent(&self.stand.netns).unwrap();
    }

    /// Whether kun-cni runs on this machine.
    fn plugin_runs(&self) -> bool {
        let mut list = Command::new("ip");
        list.args(["netns", "pids", self.stand.netns.name()]);
        let pids = said(&list.output().unwrap()).unwrap();
        pids.lines().any(|pid| {
            fs::read_to_string(format!("/proc/{pid}/comm"))
                .is_ok_and(|name| name.trim() == "kun-cni")
        })
    }

    fn gate(&self) -> PathBuf {
        self.stand.places.directory.join("gate")
    }

    /// Adds to the list a plugin whose ADD waits at the gate, and fails once that was opened.
    fn chain_one_that_hangs(&self) {
        let gate = self.gate();
        run(["mkfifo", gate.to_str().unwrap()]).unwrap();
        let at = gate.display();
        self.place(
            "/opt/cni/bin/hangs",
            &format!("#!/bin/sh\n[ \"$CNI_COMMAND\" = ADD ] || exit 0\n: > {at}.reached\nread -r line < {at}\nexit 1\n"),
        );
        let mut cat = Command::new("cat");
        cat.arg(LIST);
        let list = said(&self.stand.inside(&self.runtime.room, &cat)).unwrap();
        let mut list: Value = serde_json::from_str(&list).unwrap();
        let plugins = list["plugins"].as_array_mut().unwrap();
        plugins.push(json!({"type": "hangs"}));
        self.place(LIST, &list.to_string());
    }

    /// Writes a file of the machine.
    fn place(&self, path: &str, text: &str) {
        let file = self.stand.places.directory.join("placed");
        write_script(&file, text).unwrap();
        let mut copy = Command::new("cp");
        copy.arg("--preserve=mode").arg(&file).arg(path);
        said(&self.stand.inside(&self.runtime.room, &copy)).unwrap();
    }
}
