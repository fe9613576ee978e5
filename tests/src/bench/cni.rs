//! Figures of the part `cni`: what an ADD costs the runtime that waits for it, beside Debian's plugins in the same run, and how
//! many allocations a second become durable.
//!
//! Wall-clock here depends on the machine's cores and disk: an ADD is a process, some netlink and one flush. The ratio to the
//! peer and the CPU time are what to compare between machines.

use std::io::Write;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use kun_cni::clock;
use kun_cni::ipam::IpamService;
use kun_cni::netlink::{Query, Rtnl};
use kun_cni_core::names::Carries;
use kun_cni_core::plan::{Mac, Pair};
use kun_config::types::{BlockId, Slot, SlotClass};
use kun_control::{AttachmentKey, PodRef, Request, Response, Server};
use kun_harness::Netns;
use serde_json::{Value, json};

use super::{Context, Row};

pub mod dense;

/// Where Debian has the reference plugins.
const PEERS: &str = "/usr/lib/cni";
/// How many runtimes wait at once.
const PARALLEL: [usize; 3] = [1, 16, 100];
/// Rounds of one ADD at a time, after those that warm up.
const ROUNDS: usize = 60;
/// A peer's round that failed is tried so often.
const TRIES: usize = 3;
/// Callers of the service, as the agent has connections.
const CALLERS: usize = 256;

/// Measures the part.
pub fn run(context: &Context) -> Result<Vec<Row>> {
    let mut rows = vec![core_rate(), durable_rate(context)?];
    let pods: Vec<Netns> = (0..*PARALLEL.last().unwrap_or(&1))
        .map(|_| Netns::new("bench-pod"))
        .collect::<Result<_>>()?;

    let ours = kun(context)?;
    let peers: Vec<Plugin> = ["bridge", "ptp"]
        .into_iter()
        .filter_map(|name| peer(context, name))
        .collect::<Result<_>>()?;
    let alone = alone(context)?;
    for plugin in std::iter::once(&ours).chain(&peers).chain([&alone]) {
        // Bridges, sysctl defaults, page cache: what only the first ADD pays.
        plugin.round(&pods[..1], 1)?;
    }
    for parallel in PARALLEL {
        let rounds = (ROUNDS / parallel).max(1);
        let pods = &pods[..parallel];
        let mut mine = Figures::default();
        let mut theirs: Vec<Figures> = peers.iter().map(|_| Figures::default()).collect();
        let mut floor = Figures::default();
        // Turn by turn, so that what else the machine does falls on all alike.
        for _ in 0..rounds {
            floor.add(least(&ours, pods, parallel)?);
            mine.add(ours.round(pods, parallel)?);
            for (peer, figures) in peers.iter().zip(&mut theirs) {
                figures.add(peer.round_of_a_peer(pods, parallel)?);
            }
        }
        for (what, percent) in [("p50", 50), ("p99", 99)] {
            let name = format!("cni/floor-{what}@{parallel}");
            rows.push(Row::new(name, floor.percentile(percent), "ms"));
        }
        rows.extend(compare(parallel, &mine, &peers, &theirs));
    }
    let mut figures = Figures::default();
    for _ in 0..ROUNDS / 3 {
        figures.add(alone.round(&pods[..1], 1)?);
    }
    rows.push(Row::new(
        "cni/add-without-agent-p50@1",
        figures.percentile(50),
        "ms",
    ));
    Ok(rows)
}

fn compare(parallel: usize, mine: &Figures, peers: &[Plugin], theirs: &[Figures]) -> Vec<Row> {
    let mut rows = Vec::new();
    for (what, percent) in [("p50", 50), ("p99", 99)] {
        let name = format!("cni/add-{what}@{parallel}");
        let mut row = Row::new(&name, mine.percentile(percent), "ms");
        row = match (what, parallel) {
            ("p50", 1) => row.at_most(3.0),
            ("p99", 100) => row.at_most(15.0),
            _ => row,
        };
        for (peer, figures) in peers.iter().zip(theirs) {
            let figure = figures.percentile(percent);
            match row.peer {
                None => row = row.beside(&peer.name, figure),
                Some(_) => rows.push(
                    Row::new(format!("{name}-beside-{}", peer.program()), row.value, "ms")
                        .beside(&peer.name, figure),
                ),
            }
        }
        rows.push(row);
    }
    let ratio = theirs
        .first()
        .map(|bridge| bridge.percentile(50) / mine.percentile(50));
    if let Some(ratio) = ratio {
        rows.push(
            Row::new(format!("cni/add-faster-than-bridge@{parallel}"), ratio, "x").at_least(3.0),
        );
    }
    let mut del = Row::new(
        format!("cni/del-p50@{parallel}"),
        percentile(&mine.dels, 50),
        "ms",
    );
    if let (Some(peer), Some(figures)) = (peers.first(), theirs.first()) {
        del = del.beside(&peer.name, percentile(&figures.dels, 50));
    }
    rows.push(del);
    let mut cpu = Row::new(format!("cni/add-cpu@{parallel}"), mine.cpu(), "ms");
    if let (Some(peer), Some(figures)) = (peers.first(), theirs.first()) {
        cpu = cpu.beside(&peer.name, figures.cpu());
    }
    rows.push(cpu);
    rows
}

/// Wall-clock of each ADD, and the CPU of their processes.
#[derive(Debug, Default)]
struct Figures {
    adds: Vec<Duration>,
    dels: Vec<Duration>,
    cpu: Duration,
}

impl Figures {
    fn add(&mut self, more: Figures) {
        self.adds.extend(more.adds);
        self.dels.extend(more.dels);
        self.cpu += more.cpu;
    }

    /// Of ADD, in milliseconds.
    fn percentile(&self, percent: usize) -> f64 {
        percentile(&self.adds, percent)
    }

    /// Milliseconds an ADD.
    fn cpu(&self) -> f64 {
        self.cpu.as_secs_f64() * 1000.0 / self.adds.len().max(1) as f64
    }
}

/// Milliseconds.
fn percentile(times: &[Duration], percent: usize) -> f64 {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    let index = (sorted.len() * percent).div_ceil(100).max(1) - 1;
    sorted.get(index).map_or(0.0, |d| d.as_secs_f64() * 1000.0)
}

/// A plugin on a node of its own.
struct Plugin {
    name: String,
    program: PathBuf,
    network: Value,
    node: Netns,
    /// Serves ours while the plugin lives.
    _agent: Option<Server>,
}

impl Plugin {
    fn program(&self) -> String {
        self.program
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned()
    }

    /// ADD for every pod, so many at once, then DEL for all.
    fn round(&self, pods: &[Netns], parallel: usize) -> Result<Figures> {
        let before = children_cpu()?;
        let adds = self.all("ADD", pods, parallel)?;
        let cpu = children_cpu()?.saturating_sub(before);
        let dels = self.all("DEL", pods, parallel)?;
        Ok(Figures { adds, dels, cpu })
    }

    /// [`Plugin::round`], again when it failed: ptp asks for a route from an address that the kernel still looks for duplicates of,
    /// and on a busy machine loses that race.
    fn round_of_a_peer(&self, pods: &[Netns], parallel: usize) -> Result<Figures> {
        let mut last = self.round(pods, parallel);
        for _ in 1..TRIES {
            let Err(error) = &last else { break };
            eprintln!("{}: {error:#}; once more", self.name);
            // What it has made must not be in the way; of what it has not it complains.
            let _ = self.all("DEL", pods, parallel);
            last = self.round(pods, parallel);
        }
        last
    }

    fn all(&self, verb: &str, pods: &[Netns], parallel: usize) -> Result<Vec<Duration>> {
        let next = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..parallel)
                .map(|_| {
                    scope.spawn(|| {
                        self.node.run(|| {
                            let mut took = Vec::new();
                            while let Some(pod) = pods.get(next.fetch_add(1, Ordering::Relaxed)) {
                                took.push(self.execute(verb, pod)?);
                            }
                            Ok(took)
                        })
                    })
                })
                .collect();
            let mut took = Vec::new();
            for thread in threads {
                let more: Result<Vec<Duration>> = thread
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                took.extend(more?);
            }
            Ok(took)
        })
    }

    /// A process, and two pairs with nothing on them; removed again after the time is taken.
    fn bare(&self, index: usize, pod: &Netns, rtnl: &mut Rtnl) -> Result<Duration> {
        let netns = std::fs::File::open(pod.path())?;
        let pairs: Vec<Pair> = [Carries::V6, Carries::V4]
            .into_iter()
            .enumerate()
            .map(|(i, carries)| {
                let mac = |end: u8| Mac([2, end, i as u8, 0, (index >> 8) as u8, index as u8]);
                Pair {
                    carries,
                    host: format!("bare{i}x{index}"),
                    pod: format!("eth{i}"),
                    host_mac: mac(0),
                    pod_mac: mac(1),
                    alias: String::new(),
                    addresses: Vec::new(),
                }
            })
            .collect();
        let begin = Instant::now();
        let version = Command::new(&self.program)
            .env_clear()
            .env("CNI_COMMAND", "VERSION")
            .stdin(Stdio::null())
            .output()?;
        ensure!(version.status.success(), "VERSION failed");
        let queries: Vec<Query> = pairs
            .iter()
            .map(|pair| Query::create_pair(pair, 1500, netns.as_fd()))
            .collect();
        for verdict in rtnl.batch(&queries)? {
            verdict?;
        }
        let took = begin.elapsed();
        let group = 0x6b00_0000 + u32::try_from(index)?;
        for pair in &pairs {
            if let Some(link) = rtnl.link(&pair.host)? {
                rtnl.batch(&[Query::group(link.index, group)])?;
            }
        }
        rtnl.batch(&[Query::remove_group(group)])?;
        Ok(took)
    }

    fn execute(&self, verb: &str, pod: &Netns) -> Result<Duration> {
        self.one(verb, pod, "eth0")
    }

    fn one(&self, verb: &str, pod: &Netns, ifname: &str) -> Result<Duration> {
        let begin = Instant::now();
        let mut child = Command::new(&self.program)
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", pod.name())
            .env("CNI_NETNS", pod.path())
            .env("CNI_IFNAME", ifname)
            .env("CNI_PATH", self.program.parent().unwrap_or(Path::new("/")))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting {}", self.program.display()))?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(self.network.to_string().as_bytes())?;
        }
        let output = child.wait_with_output()?;
        let took = begin.elapsed();
        ensure!(
            output.status.success(),
            "{} {verb}: {}",
            self.name,
            String::from_utf8_lossy(&output.stdout)
        );
        Ok(took)
    }
}

/// What no plugin that makes two pairs can be faster than here: a process that says its version, and two pairs made and removed
/// through an open socket, with nothing on them.
fn least(ours: &Plugin, pods: &[Netns], parallel: usize) -> Result<Figures> {
    let next = AtomicUsize::new(0);
    let adds = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..parallel)
            .map(|_| {
                scope.spawn(|| {
                    ours.node.run(|| {
                        let mut rtnl = Rtnl::open()?;
                        let mut took = Vec::new();
                        loop {
                            let index = next.fetch_add(1, Ordering::Relaxed);
                            let Some(pod) = pods.get(index) else {
                                return Ok(took);
                            };
                            took.push(ours.bare(index, pod, &mut rtnl)?);
                        }
                    })
                })
            })
            .collect();
        let mut all = Vec::new();
        for thread in threads {
            let more: Result<Vec<Duration>> = thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            all.extend(more?);
        }
        anyhow::Ok(all)
    })?;
    Ok(Figures {
        adds,
        ..Figures::default()
    })
}

/// Ours with an agent that answers for the addresses alone.
fn kun(context: &Context) -> Result<Plugin> {
    plugin(context, "kun-cni", true)
}

/// Ours with nobody at the socket: each ADD opens and closes the store.
fn alone(context: &Context) -> Result<Plugin> {
    plugin(context, "kun-cni without agent", false)
}

fn plugin(context: &Context, name: &str, with_agent: bool) -> Result<Plugin> {
    let dir = context.scratch().join(name.replace(' ', "-"));
    std::fs::create_dir_all(dir.join("manifests"))?;
    let file = dir.join("kun.yaml");
    let text = json!({
        "node": {"name": "n"},
        "cluster": {"folder": dir.join("manifests")},
        "ipam": {
            "podPrefix": "fd00:64::/96",
            "v4Pools": ["10.64.0.0/16"],
            "defaultClass": "dual",
            "cooldown": "1s",
            "mtu": 1500,
        },
        "agent": {"stateDir": dir.join("state"), "socket": dir.join("agent.sock")},
    });
    std::fs::write(&file, text.to_string())?;
    let config = kun_config::parse("kun.yaml", &text.to_string())?;
    let service = IpamService::open(
        &config.agent.state_dir,
        &config,
        clock::boot()?,
        clock::now(),
    )?;
    service.set_blocks(&blocks(64), clock::now())?;
    let node = Netns::new("bench-node")?;
    node.forward()?;
    let agent = match with_agent {
        true => {
            let server = Server::bind(&config.agent.socket)?;
            server.serve(move |request| service.handle(request, clock::now()))?;
            Some(server)
        }
        false => None,
    };
    Ok(Plugin {
        name: name.to_owned(),
        program: context.program("kun-cni")?,
        network: json!({
            "cniVersion": "1.0.0", "name": "kun", "type": "kun-cni", "kunConfig": file,
        }),
        node,
        _agent: agent,
    })
}

fn peer(context: &Context, name: &str) -> Option<Result<Plugin>> {
    // Not by PATH: iproute2 has a `bridge` too.
    let program = Path::new(PEERS).join(name);
    if !program.is_file() {
        return None;
    }
    Some(Netns::new("bench-node").map(|node| Plugin {
        name: format!("{name}+host-local"),
        program,
        network: json!({
            "cniVersion": "1.0.0",
            "name": "peer",
            "type": name,
            "bridge": "peer0",
            "isGateway": true,
            "ipam": {
                "type": "host-local",
                "dataDir": context.scratch().join(name),
                "ranges": [[{"subnet": "10.99.0.0/16"}], [{"subnet": "fd00:99::/112"}]],
            },
        }),
        node,
        _agent: None,
    }))
}

fn blocks(count: u32) -> Vec<BlockId> {
    (0..count)
        .filter_map(|i| BlockId::new(Slot(0x0a40_0000 + i * kun_config::types::BLOCK_SLOTS)))
        .collect()
}

fn key(caller: usize, n: usize) -> AttachmentKey {
    AttachmentKey {
        network: "kun".into(),
        // As long as a container id is.
        container_id: format!("{caller:032x}{n:032x}"),
        ifname: "eth0".into(),
    }
}

/// Allocations that were on disk before they were answered, with [`CALLERS`] waiting at once, until the largest node is full.
fn durable_rate(context: &Context) -> Result<Row> {
    let dir = context.scratch().join("durable");
    let text = "node: {name: n}\nipam: {v4Pools: [10.64.0.0/14]}\n";
    let config = kun_config::parse("kun.yaml", text)?;
    let service = IpamService::open(&dir, &config, clock::boot()?, clock::now())?;
    let blocks = blocks(1024);
    service.set_blocks(&blocks, clock::now())?;
    let begin = Instant::now();
    let allocated: usize = std::thread::scope(|scope| {
        let service = &service;
        let threads: Vec<_> = (0..CALLERS)
            .map(|caller| {
                scope.spawn(move || -> Result<usize> {
                    for n in 0.. {
                        let allocate = Request::Allocate {
                            key: key(caller, n),
                            pod: PodRef::default(),
                            class: Some(SlotClass::Dual),
                            slot: None,
                            within: Vec::new(),
                            delegated: false,
                            ports: Vec::new(),
                        };
                        match service.handle(&allocate, clock::now()) {
                            Response::Allocation { .. } => {}
                            Response::Exhausted { .. } => return Ok(n),
                            other => anyhow::bail!("{other:?}"),
                        }
                    }
                    Ok(0)
                })
            })
            .collect();
        let mut all = 0;
        for thread in threads {
            all += thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        }
        anyhow::Ok(all)
    })?;
    let seconds = begin.elapsed().as_secs_f64();
    ensure!(
        allocated == blocks.len() * 64,
        "{allocated} slots of {}",
        blocks.len() * 64
    );
    Ok(Row::new("cni/durable-allocations", allocated as f64 / seconds, "1/s").at_least(20_000.0))
}

/// The core alone, allocation and release, by the CPU time of this thread: others on the machine do not count.
fn core_rate() -> Row {
    use kun_cni_core::ipam::{BootId, BootTime, Command, Ipam, Key, Owner, Pod, Rules, Snapshot};
    const CHANGES: u32 = 200_000;
    let zero = BootTime(Duration::ZERO);
    let (mut ipam, _) = Ipam::load(
        Snapshot::default(),
        Rules::time_alone(Duration::ZERO),
        BootId(1),
        zero,
    )
    .expect("an empty store is sound");
    let _ = ipam.step(Command::SetBlocks(blocks(64).into_iter().collect()), zero);
    let owners: Vec<Owner> = (0..CHANGES)
        .map(|i| Owner {
            key: Key {
                container_id: format!("{i:064x}"),
                ifname: "eth0".into(),
                network: "kun".into(),
            },
            pod: Pod::default(),
            delegated: false,
        })
        .collect();
    let begin = thread_cpu();
    for owner in owners {
        let key = owner.key.clone();
        let _ = ipam.step(
            Command::Allocate {
                owner,
                class: SlotClass::Dual,
            },
            zero,
        );
        let release = Command::Release {
            key,
            generation: None,
        };
        let _ = ipam.step(release, zero);
    }
    let rate = 2.0 * f64::from(CHANGES) / (thread_cpu() - begin).as_secs_f64();
    Row::new("cni/core-changes", rate, "1/s").at_least(1_000_000.0)
}

fn thread_cpu() -> Duration {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(
        t.tv_sec.try_into().unwrap_or_default(),
        t.tv_nsec.try_into().unwrap_or_default(),
    )
}

/// CPU time of this process's ended children, from /proc/self/stat (proc(5): cutime, cstime, in ticks of 10 ms).
fn children_cpu() -> Result<Duration> {
    ticks(&std::fs::read_to_string("/proc/self/stat")?, 13)
}

/// The sum of two neighbouring fields of a stat file, the first of them so many after the process's name.
fn ticks(stat: &str, first: usize) -> Result<Duration> {
    let fields = stat.rsplit(')').next().unwrap_or_default();
    let ticks: u64 = fields
        .split_whitespace()
        .skip(first)
        .take(2)
        .map(|field| field.parse::<u64>())
        .sum::<Result<u64, _>>()?;
    Ok(Duration::from_millis(ticks * 10))
}
