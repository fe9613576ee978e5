//! Figures of the part `bgp`: how fast a route set is in BIRD's tables, over a veth pair between two namespaces.
//!
//! Arrival is read from BIRD's own counters, which cost it nothing; counting its tables would slow what is measured.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use ipnet::IpNet;
use kun_bgp::{Attributes, Options, Registry, Route, RouteSet, RouteSource, Speaker};
use kun_config::{Advertise, Bgp, BgpPeer, Families};
use kun_harness::{Netns, Process, veth, wait_until};

use super::{Context, Row};

/// Route sets of this size: the limit of a peer.
const ROUTES: u32 = 20_000;
/// Times that the whole set is announced; the median counts.
const ROUNDS: usize = 5;
/// Single routes announced, one after the other.
const SINGLES: u32 = 400;
/// A busy machine is slow; a broken one stops here.
const LONG: Duration = Duration::from_secs(60);

/// Measures the part.
pub fn run(context: &Context) -> Result<Vec<Row>> {
    let Some(bird) = context.peer("bird") else {
        anyhow::bail!("bird is not installed; `cargo xtask setup` brings it");
    };
    let (tor, node) = (Netns::new("tor")?, Netns::new("node")?);
    veth(&tor, "down0", &node, "up0")?;
    for (netns, interface, n) in [(&tor, "down0", 1), (&node, "up0", 2)] {
        netns.exec(&format!("addr add 192.0.2.{n}/24 dev {interface}"))?;
        netns.exec(&format!("addr add 2001:db8::{n}/64 dev {interface} nodad"))?;
    }
    let router = Router::start(&bird, &tor, context.scratch())?;
    let before = resident()?;
    node.run(|| measure(&router, before))
}

fn measure(router: &Router, before: u64) -> Result<Vec<Row>> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?;
    let inside = runtime.enter();
    let options = Options {
        router_id: Ipv4Addr::new(192, 0, 2, 2),
        restarted: false,
        seed: 1,
    };
    let speaker = Speaker::start(&config(), options, &mut Registry::default())?;
    drop(inside);
    let announce = |set: RouteSet| speaker.announce(BTreeMap::from([("tor".to_owned(), set)]));

    announce(RouteSet::default());
    ensure!(
        wait_until(LONG, || speaker.status()[0].state == "Established"),
        "no session: {:?}",
        speaker.status()
    );
    let mut rounds = Vec::new();
    let mut resident_full = 0;
    for _ in 0..ROUNDS {
        let full = blocks(ROUTES);
        let began = Instant::now();
        announce(full);
        router.holds(ROUTES)?;
        rounds.push(began.elapsed());
        resident_full = resident()?;
        announce(RouteSet::default());
        router.holds(0)?;
    }
    let mut singles = Vec::new();
    for n in 1..=SINGLES {
        let set = blocks(2 * n);
        let began = Instant::now();
        announce(set);
        router.holds(2 * n)?;
        singles.push(began.elapsed());
    }
    rounds.sort_unstable();
    singles.sort_unstable();
    let ms = |d: Duration| d.as_secs_f64() * 1e3;
    let at = |percent: usize| ms(singles[(singles.len() - 1) * percent / 100]);
    Ok(vec![
        Row::new(
            "bgp/20000-routes-in-peer",
            rounds[ROUNDS / 2].as_secs_f64(),
            "s",
        )
        .at_most(0.3),
        Row::new("bgp/route-pair-in-peer-p50", at(50), "ms"),
        Row::new("bgp/route-pair-in-peer-p99", at(99), "ms"),
        Row::new(
            "bgp/resident-for-20000-routes",
            resident_full.saturating_sub(before) as f64 / f64::from(1 << 20),
            "MiB",
        ),
    ])
}

/// BIRD, and its control socket.
struct Router {
    control: PathBuf,
    _process: Process,
}

impl Router {
    fn start(bird: &Path, tor: &Netns, scratch: &Path) -> Result<Self> {
        let (conf, control) = (scratch.join("bird.conf"), scratch.join("bird.ctl"));
        std::fs::write(
            &conf,
            "router id 192.0.2.1;\n\
             protocol device {}\n\
             protocol bgp node {\n\
             \x20 local 192.0.2.1 as 64512;\n\
             \x20 neighbor 192.0.2.2 as 64513;\n\
             \x20 passive on;\n\
             \x20 ipv4 { import all; export none; };\n\
             \x20 ipv6 { import all; export none; };\n\
             }\n",
        )?;
        let mut command = Command::new(bird);
        command
            .arg("-f")
            .arg("-c")
            .arg(&conf)
            .arg("-s")
            .arg(&control);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let router = Self {
            _process: tor.spawn(command)?,
            control,
        };
        ensure!(
            wait_until(LONG, || router.imported().is_ok()),
            "BIRD does not answer"
        );
        Ok(router)
    }

    /// Waits without a pause: a poll is a tenth of a millisecond, and what is measured may be little more.
    fn holds(&self, n: u32) -> Result<()> {
        let end = Instant::now() + LONG;
        while self.imported()? != n {
            ensure!(
                Instant::now() < end,
                "BIRD holds {} of {n} routes",
                self.imported()?
            );
        }
        Ok(())
    }

    /// `Routes: 10000 imported, …` of both channels; 0 while the session is down.
    fn imported(&self) -> Result<u32> {
        let mut socket = UnixStream::connect(&self.control)?;
        socket.set_read_timeout(Some(LONG))?;
        writeln!(socket, "show protocols all node")?;
        let mut sum = 0;
        for line in BufReader::new(socket).lines() {
            let line = line?;
            if let Some(routes) = line.trim_start().strip_prefix("Routes:") {
                let number = routes.split_whitespace().next();
                sum += number
                    .and_then(|n| n.parse::<u32>().ok())
                    .context("BIRD counts its routes")?;
            }
            if line.starts_with("0000") {
                return Ok(sum);
            }
        }
        anyhow::bail!("BIRD broke off")
    }
}

fn config() -> Bgp {
    Bgp {
        enabled: true,
        asn: 64513,
        router_id: None,
        listen: None,
        peers: vec![BgpPeer {
            name: "tor".to_owned(),
            address: Ipv4Addr::new(192, 0, 2, 1).into(),
            interface: None,
            asn: 64512,
            port: 179,
            source: None,
            families: Families { v4: true, v6: true },
            hold: Duration::from_secs(90),
            md5_file: None,
            gtsm: false,
        }],
        advertise: Advertise {
            blocks: true,
            vips: false,
            nat64: false,
            extra: Vec::new(),
        },
        graceful_restart: Duration::ZERO,
    }
}

/// `n` routes: half of them /26, half /122.
fn blocks(n: u32) -> RouteSet {
    let families = Families { v4: true, v6: true };
    let routes = (0..n / 2).flat_map(|i| {
        let first = i * 64;
        let v4 = (IpAddr::from((0x0a00_0000 + first).to_be_bytes()), 26);
        let v6 = (
            IpAddr::from(((0xfd00_u128 << 112) | u128::from(first)).to_be_bytes()),
            122,
        );
        [v4, v6].map(|(address, len)| Route {
            prefix: IpNet::new(address, len).expect("26 and 122 are prefix lengths"),
            source: RouteSource::Extra,
            attributes: Attributes::default(),
        })
    });
    RouteSet::build(routes, families, &RouteSet::default())
}

/// Resident bytes of this process.
fn resident() -> Result<u64> {
    let statm = std::fs::read_to_string("/proc/self/statm")?;
    let pages: u64 = statm
        .split_whitespace()
        .nth(1)
        .context("/proc/self/statm")?
        .parse()?;
    Ok(pages * rustix::param::page_size() as u64)
}
