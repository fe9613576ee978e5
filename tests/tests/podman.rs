//! podman with its CNI backend: a client that is no Kubernetes. What `podman inspect` shows of both families, host ports, a network
//! that is taken away and set up again under a running container, and what `podman rm` gives back.
//!
//! podman drops addresses that are on no interface of the result, as IPv4 has to be in `split` for containerd's sake, and sets a container's
//! network up anew on any one of its interfaces: README gives podman's machines `shared`, and what does not hold in `split` is said here.
//!
//! Debian 12's podman is the last that has the backend. Its files are the machine's own, in a room of its own.

mod stand;

use std::net::{IpAddr, SocketAddr};
use std::process::{Command, Output};

use kun_harness::{require_tool, skip, wait_for, wait_until};
use kun_tests::lab::cluster::image;
use kun_tests::lab::cluster::room::Room;
use serde_json::Value;
use stand::{PORT, Stand, WITHIN, of_family, said};

const HOST_PORT: u16 = 18080;

/// The IPv6 address of 10.64.0.40.
const FIXED: &str = "2001:db8:10::a40:28";

/// Nothing of this machine's /etc decides; its hard limits may be lower than what podman asks for.
const SETTINGS: &str = r#"
[containers]
cgroups = "no-conmon"
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
log_driver = "k8s-file"
[network]
network_backend = "cni"
cni_plugin_dirs = ["/opt/cni/bin"]
network_config_dir = "/etc/cni/net.d"
default_network = "kun"
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "none"
"#;

/// A machine with podman. Fields drop in order.
struct Podman {
    interfaces: &'static str,
    room: Room,
    stand: Stand,
}

/// What `podman inspect` says of a container's network.
#[derive(Debug, PartialEq)]
struct Shown {
    addresses: Vec<String>,
}

impl Podman {
    fn new(what: &str, interfaces: &'static str) -> Option<Self> {
        if !require_tool("podman") || !require_tool("runc") || !require_tool("conmon") {
            return None;
        }
        let stand = Stand::with(what, |config| {
            config["ipam"]["interfaces"] = interfaces.into();
        })?;
        let room = stand.room();
        stand.install(&room);
        let podman = Self {
            interfaces,
            room,
            stand,
        };
        std::fs::write(podman.settings(), SETTINGS).unwrap();
        let backend = podman
            .run(&["info", "--format", "{{.Host.NetworkBackend}}"])
            .unwrap();
        if backend != "cni" {
            skip(&format!(
                "because this podman has no CNI backend: {backend}"
            ));
            return None;
        }
        let archive = podman.stand.image();
        let from = format!("oci-archive:{}:{}", archive.display(), image::POD);
        podman.run(&["pull", "--quiet", &from]).unwrap();
        Some(podman)
    }

    fn settings(&self) -> std::path::PathBuf {
        self.stand.places.directory.join("containers.conf")
    }

    fn output(&self, arguments: &str, words: &[&str]) -> Output {
        let mut podman = Command::new("podman");
        podman
            .args(["--storage-driver", "vfs"])
            .args(words)
            .env("CONTAINERS_CONF", self.settings());
        // podman hands this variable on to the plugins.
        match arguments.is_empty() {
            true => podman.env_remove("CNI_ARGS"),
            false => podman.env("CNI_ARGS", arguments),
        };
        self.stand.inside(&self.room, &podman)
    }

    fn run(&self, words: &[&str]) -> Result<String, String> {
        said(&self.output("", words)).map(|out| out.trim().to_owned())
    }

    /// A container that tells its name at [`PORT`].
    fn serve(&self, name: &str, arguments: &str, more: &[&str]) -> Result<Shown, String> {
        let (parent, port) = (self.stand.cgroup_parent(), PORT.to_string());
        let mut words = vec![
            "run",
            "--detach",
            "--name",
            name,
            "--cgroup-parent",
            &parent,
        ];
        words.extend_from_slice(more);
        words.extend([image::POD, "serve", "--name", name, "--tcp", &port]);
        said(&self.output(arguments, &words))?;
        Ok(self.shown(name))
    }

    fn shown(&self, name: &str) -> Shown {
        let text = self.run(&["inspect", name]).unwrap();
        let all: Value = serde_json::from_str(&text).unwrap();
        let network = &all[0]["NetworkSettings"]["Networks"]["kun"];
        let texts = ["IPAddress", "GlobalIPv6Address"].map(|key| network[key].as_str());
        let addresses = texts.into_iter().flatten().filter(|text| !text.is_empty());
        Shown {
            addresses: addresses.map(str::to_owned).collect(),
        }
    }

    /// Waits until the container answers there.
    fn answers(&self, to: SocketAddr, name: &str) {
        let answer = wait_for("an answer", WITHIN, || self.stand.who(to).ok());
        assert_eq!(answer.unwrap_or_else(|e| panic!("{to}: {e}")), name, "{to}");
    }

    /// Both of its addresses answer, and are shown as far as podman can.
    fn answers_at(&self, shown: &Shown, name: &str) {
        let v6 = of_family(&shown.addresses, true).unwrap();
        let rows = self.stand.slots();
        let row = rows.iter().find(|row| IpAddr::V6(row.v6) == v6).unwrap();
        assert_eq!(
            (row.state.as_str(), row.pod.name.as_str()),
            ("allocated", name)
        );
        let v4 = IpAddr::V4(row.v4.unwrap());
        let expected = (self.interfaces == "shared").then_some(v4);
        assert_eq!(of_family(&shown.addresses, false), expected, "{shown:?}");
        for address in [v4, v6] {
            self.answers(SocketAddr::new(address, PORT), name);
        }
    }

    fn host_ports(&self) -> [SocketAddr; 2] {
        let machine = self.stand.node.machine;
        [
            SocketAddr::new(machine.v4().into(), HOST_PORT),
            SocketAddr::new(machine.v6().into(), HOST_PORT),
        ]
    }
}

#[test]
fn containers_of_podman_have_both_families_host_ports_and_give_back_what_they_had() {
    for interfaces in ["split", "shared"] {
        let Some(podman) = Podman::new(&format!("podman{}", &interfaces[..2]), interfaces) else {
            return;
        };
        let publish = format!("{HOST_PORT}:{PORT}");
        let front = podman.serve("front", "", &["--publish", &publish]).unwrap();
        podman.answers_at(&front, "front");
        for to in podman.host_ports() {
            podman.answers(to, "front");
        }
        // What decides the family is no annotation here.
        let back = podman
            .serve("back", "IgnoreUnknown=1;KUN_NETWORK_IPV4=false", &[])
            .unwrap();
        assert_eq!(back.addresses.len(), 1, "{back:?}");
        let v6 = of_family(&back.addresses, true).unwrap();
        podman.answers(SocketAddr::new(v6, PORT), "back");
        let row = podman.stand.slots();
        let row = row.iter().find(|row| IpAddr::V6(row.v6) == v6).unwrap();
        assert_eq!((row.pod.name.as_str(), row.v4), ("back", None));
        // The port is taken, and podman tells why.
        let refused = podman
            .serve("late", "", &["--publish", &publish])
            .unwrap_err();
        assert!(refused.contains(&HOST_PORT.to_string()), "{refused}");
        podman.run(&["rm", "--force", "late"]).unwrap();
        // An address by wish, of either family.
        let fixed = podman.serve("fixed", "", &["--ip", "10.64.0.40"]).unwrap();
        assert!(fixed.addresses.contains(&FIXED.to_owned()), "{fixed:?}");
        podman.answers_at(&fixed, "fixed");

        let mut again = podman.shown("front");
        if interfaces == "shared" {
            // Taken away and set up again under a container that runs: podman asks for the address that it had a moment ago.
            podman.run(&["network", "reload", "front"]).unwrap();
            again = podman.shown("front");
            assert_eq!(again, front);
            podman.answers_at(&again, "front");
            for to in podman.host_ports() {
                podman.answers(to, "front");
            }
        }
        // So does a container with an address of its own that is started again.
        podman.run(&["restart", "--time", "0", "fixed"]).unwrap();
        assert_eq!(podman.shown("fixed"), fixed);
        podman.answers_at(&fixed, "fixed");
        // Another life of the container is another namespace, with another address: the old one cools.
        podman.run(&["restart", "--time", "0", "front"]).unwrap();
        let second = podman.shown("front");
        podman.answers_at(&second, "front");
        assert_ne!(second, again);

        podman
            .run(&["rm", "--force", "--time", "0", "front", "back", "fixed"])
            .unwrap();
        let gone = wait_until(WITHIN, || {
            podman.stand.count("allocated") == 0 && podman.stand.leavings(&podman.room).is_empty()
        });
        assert!(gone, "{}", podman.stand.leavings(&podman.room));
        for to in podman.host_ports() {
            assert!(podman.stand.who(to).is_err(), "{to}");
        }
        // It rests: who asks for it now is told so.
        let early = podman
            .serve("early", "", &["--ip", "10.64.0.40"])
            .unwrap_err();
        assert!(
            early.contains("10.64.0.40") && early.contains("cools"),
            "{early}"
        );
        podman.run(&["rm", "--force", "early"]).unwrap();
        assert_eq!(podman.stand.count("allocated"), 0);
    }
}
