//! A router running BIRD and a node, joined by a veth pair, in namespaces of their own.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use ipnet::IpNet;
use kun_bgp::{Attributes, Options, Route, RouteSet, RouteSource, SessionStatus, Speaker};
use kun_config::{Advertise, Bgp, BgpPeer, Families};
use kun_harness::{Netns, Process, require_root, require_tool, veth, wait_for};
use prometheus_client::registry::Registry;
use tempfile::TempDir;

/// The name of the peer in every configuration here.
pub(crate) const TOR: &str = "tor";
/// Long enough for a busy machine; nothing waits for it to pass.
pub(crate) const SOON: Duration = Duration::from_secs(30);
/// The node's AS.
pub(crate) const NODE_ASN: u32 = 64513;
const TOR_ASN: u32 = 64512;

/// What BIRD is told about the node, besides addresses.
#[derive(Clone)]
pub(crate) struct BirdConfig {
    /// The transport: IPv4, or IPv6.
    pub(crate) over_v6: bool,
    /// The AS that BIRD has.
    pub(crate) asn: u32,
    /// The AS that BIRD expects of the node.
    pub(crate) expects: u32,
    /// BIRD does not dial.
    pub(crate) passive: bool,
    /// BIRD's TCP MD5 key.
    pub(crate) key: Option<&'static str>,
    /// TTL security.
    pub(crate) gtsm: bool,
    /// Static routes that BIRD offers.
    pub(crate) offers: Vec<&'static str>,
    /// Whether the session has an IPv6 channel.
    pub(crate) v6: bool,
    /// More lines for both channels.
    pub(crate) channel: &'static str,
}

impl Default for BirdConfig {
    fn default() -> Self {
        Self {
            over_v6: false,
            asn: TOR_ASN,
            expects: NODE_ASN,
            passive: true,
            key: None,
            gtsm: false,
            offers: Vec::new(),
            v6: true,
            channel: "",
        }
    }
}

impl BirdConfig {
    fn text(&self) -> String {
        let (ours, theirs) = match self.over_v6 {
            true => ("2001:db8::1", "2001:db8::2"),
            false => ("192.0.2.1", "192.0.2.2"),
        };
        let offers = |v4: bool| -> String {
            let routes = self.offers.iter().filter(|o| o.contains(':') != v4);
            routes
                .map(|o| format!("  route {o} blackhole;\n"))
                .collect()
        };
        let v6 = match self.v6 {
            true => format!(
                "  ipv6 {{ import all; export where source = RTS_STATIC; {} }};\n",
                self.channel
            ),
            false => String::new(),
        };
        format!(
            "router id 192.0.2.1;\n\
             protocol device {{ scan time 1; }}\n\
             protocol kernel {{ ipv4 {{ import none; export where source = RTS_BGP; }}; }}\n\
             protocol kernel {{ ipv6 {{ import none; export where source = RTS_BGP; }}; }}\n\
             protocol static {{ ipv4;\n{} }}\n\
             protocol static {{ ipv6;\n{} }}\n\
             protocol bgp node {{\n  local {ours} as {};\n  neighbor {theirs} as {};\n  passive {};\n  {}\n  ttl security {};\n\
             \x20 graceful restart on;\n  error wait time 1, 2;\n  connect retry time 1;\n  connect delay time 1;\n  hold time 9;\n\
             \x20 ipv4 {{ import all; export where source = RTS_STATIC; {} }};\n{v6}}}\n",
            offers(true),
            offers(false),
            self.asn,
            self.expects,
            if self.passive { "on" } else { "off" },
            self.key
                .map(|k| format!("password \"{k}\";"))
                .unwrap_or_default(),
            if self.gtsm { "on" } else { "off" },
            self.channel,
        )
    }
}

/// The two namespaces and the router's process.
pub(crate) struct Lab {
    pub(crate) tor: Netns,
    pub(crate) node: Netns,
    pub(crate) dir: TempDir,
    bird: Option<Process>,
}

impl Lab {
    /// `None`, recorded as a skip, where it cannot be had.
    pub(crate) fn new(bird: &BirdConfig) -> Option<Self> {
        if !require_root() || !require_tool("bird") {
            return None;
        }
        let (tor, node) = (Netns::new("tor").unwrap(), Netns::new("node").unwrap());
        veth(&tor, "down0", &node, "up0").unwrap();
        for (netns, interface, n) in [(&tor, "down0", 1), (&node, "up0", 2)] {
            netns
                .exec(&format!("addr add 192.0.2.{n}/24 dev {interface}"))
                .unwrap();
            netns
                .exec(&format!("addr add 2001:db8::{n}/64 dev {interface} nodad"))
                .unwrap();
        }
        let dir = tempfile::tempdir().unwrap();
        let mut lab = Self {
            tor,
            node,
            dir,
            bird: None,
        };
        lab.start_bird(bird);
        Some(lab)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Starts BIRD and waits until it answers.
    pub(crate) fn start_bird(&mut self, config: &BirdConfig) {
        std::fs::write(self.file("bird.conf"), config.text()).unwrap();
        let log = std::fs::File::create(self.file("bird.log")).unwrap();
        let mut command = Command::new("/usr/sbin/bird");
        command
            .arg("-f")
            .arg("-c")
            .arg(self.file("bird.conf"))
            .arg("-s")
            .arg(self.file("bird.ctl"));
        command.stdout(log.try_clone().unwrap()).stderr(log);
        self.bird = Some(self.tor.spawn(command).unwrap());
        wait_for("BIRD answering", SOON, || {
            self.birdc("show status")
                .contains("up and running")
                .then_some(())
        })
        .unwrap_or_else(|e| {
            panic!(
                "{e}: {}",
                std::fs::read_to_string(self.file("bird.log")).unwrap_or_default()
            )
        });
    }

    /// SIGKILL: no NOTIFICATION, no withdrawal.
    pub(crate) fn kill_bird(&mut self) {
        self.bird = None;
    }

    /// What BIRD answers on its control socket; empty while it does not. (birdc gives up when its stdin ends before a busy BIRD answers.)
    pub(crate) fn birdc(&self, words: &str) -> String {
        let mut answer = String::new();
        let Ok(mut socket) = UnixStream::connect(self.file("bird.ctl")) else {
            return answer;
        };
        socket.set_read_timeout(Some(SOON)).unwrap();
        if writeln!(socket, "{words}").is_err() {
            return answer;
        }
        // A reply's last line has a space after its four-digit code; the greeting is a reply too.
        let mut replies = 0;
        for line in BufReader::new(socket).lines() {
            let Ok(line) = line else { break };
            let code = line
                .get(..4)
                .is_some_and(|c| c.bytes().all(|b| b.is_ascii_digit()));
            replies += usize::from(code && line.as_bytes().get(4) == Some(&b' '));
            answer.push_str(if code {
                line.get(5..).unwrap_or_default()
            } else {
                &line
            });
            answer.push('\n');
            if replies == 2 {
                break;
            }
        }
        answer
    }

    /// How many routes BIRD holds from the node.
    pub(crate) fn bird_holds(&self) -> usize {
        // "7 of 9 routes for 8 networks in table master4", a line a table, or one total line.
        let answer = self.birdc("show route protocol node count");
        let total = answer.lines().filter(|l| l.contains("in table"));
        total
            .filter_map(|l| l.split_whitespace().next()?.parse::<usize>().ok())
            .sum()
    }

    /// Routes that the router's kernel has from BIRD.
    pub(crate) fn kernel_routes(&self) -> Vec<String> {
        let lines = |family| {
            self.tor
                .exec(&format!("{family} route show proto bird"))
                .unwrap()
        };
        [lines("-4"), lines("-6")]
            .concat()
            .lines()
            .map(|l| l.trim().to_owned())
            .collect()
    }

    /// Every route of the node's kernel.
    pub(crate) fn node_routes(&self) -> String {
        [
            self.node.exec("-4 route show table all").unwrap(),
            self.node.exec("-6 route show table all").unwrap(),
        ]
        .concat()
    }

    /// Runs the closure beside a speaker inside the node's namespace.
    pub(crate) fn with_speaker<T: Send>(
        &self,
        config: Bgp,
        restarted: bool,
        test: impl FnOnce(&Handle) -> T + Send,
    ) -> T {
        self.node.run(move || {
            let handle = Handle::start(&config, restarted);
            test(&handle)
        })
    }
}

/// A speaker and the runtime that it lives on; threads of the runtime are in the namespace of the thread that made it.
pub(crate) struct Handle {
    pub(crate) speaker: Option<Speaker>,
    runtime: tokio::runtime::Runtime,
}

impl Handle {
    /// In the namespace of the calling thread.
    pub(crate) fn start(config: &Bgp, restarted: bool) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let inside = runtime.enter();
        let options = Options {
            router_id: Ipv4Addr::new(192, 0, 2, 2),
            restarted,
            seed: 1,
        };
        let speaker = Speaker::start(config, options, &mut Registry::default()).unwrap();
        drop(inside);
        Self {
            speaker: Some(speaker),
            runtime,
        }
    }

    pub(crate) fn announce(&self, set: RouteSet) {
        let speaker = self.speaker.as_ref().expect("it runs");
        speaker.announce(BTreeMap::from([(TOR.to_owned(), set)]));
    }

    pub(crate) fn status(&self) -> SessionStatus {
        self.speaker.as_ref().expect("it runs").status().remove(0)
    }

    pub(crate) fn wait_established(&self) {
        wait_for("Established", SOON, || {
            (self.status().state == "Established").then_some(())
        })
        .unwrap_or_else(|e| panic!("{e}: {:?}", self.status()));
    }

    pub(crate) fn shutdown(mut self, mode: kun_bgp::StopMode) {
        let speaker = self.speaker.take().expect("it runs");
        self.runtime.block_on(speaker.shutdown(mode, SOON));
    }
}

/// The node's configuration towards the router.
pub(crate) fn config(over_v6: bool) -> Bgp {
    let address: IpAddr = if over_v6 { "2001:db8::1" } else { "192.0.2.1" }
        .parse()
        .unwrap();
    Bgp {
        enabled: true,
        asn: NODE_ASN,
        router_id: None,
        listen: None,
        peers: vec![BgpPeer {
            name: TOR.to_owned(),
            address,
            interface: None,
            asn: TOR_ASN,
            port: 179,
            source: None,
            families: Families { v4: true, v6: true },
            hold: Duration::from_secs(9),
            md5_file: None,
            gtsm: false,
        }],
        advertise: Advertise {
            blocks: true,
            vips: true,
            nat64: true,
            extra: Vec::new(),
        },
        graceful_restart: Duration::from_secs(60),
    }
}

/// A route set of these prefixes.
pub(crate) fn routes<'a>(prefixes: impl IntoIterator<Item = &'a str>) -> RouteSet {
    set(prefixes.into_iter().map(|p| p.parse().unwrap()), [])
}

/// A route set of these prefixes with these communities.
pub(crate) fn set(
    prefixes: impl IntoIterator<Item = IpNet>,
    communities: impl IntoIterator<Item = kun_bgp::Community>,
) -> RouteSet {
    let attributes = Attributes {
        communities: communities.into_iter().collect(),
    };
    let routes = prefixes.into_iter().map(|prefix| Route {
        prefix,
        source: RouteSource::Extra,
        attributes: attributes.clone(),
    });
    RouteSet::build(
        routes,
        Families { v4: true, v6: true },
        &RouteSet::default(),
    )
}

/// `n` block pairs: n/2 of 10.0.0.0/26 and on, n/2 of fd00::/122 and on.
pub(crate) fn blocks(n: u32) -> RouteSet {
    let prefixes = (0..n / 2).flat_map(|i| {
        let v4 = IpNet::new(IpAddr::from((0x0a00_0000 + i * 64).to_be_bytes()), 26).unwrap();
        let v6 = IpNet::new(
            IpAddr::from((0xfd00_u128 << 112 | u128::from(i * 64)).to_be_bytes()),
            122,
        )
        .unwrap();
        [v4, v6]
    });
    set(prefixes, [])
}
