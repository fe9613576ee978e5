//! Scenarios on a lab: it holds, it heals after `kill -9` of each program while pods talk, and it leaves nothing behind.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kun_harness::{Process, netns_names, require_root, require_tool, wait_for};
use kun_tests::lab::client::{Ask, Client, Told};
use kun_tests::lab::down::traces;
use kun_tests::lab::names::{CLUSTER_DNS_V4, CLUSTER_DNS_V6, LabName};
use kun_tests::lab::{Lab, Options, probes};

const HEALS_WITHIN: Duration = Duration::from_secs(20);

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn programs() -> PathBuf {
    let lab = Path::new(env!("CARGO_BIN_EXE_kun-lab"));
    lab.parent().unwrap_or(Path::new(".")).to_owned()
}

/// One scenario at a time: a lab is some thirty processes, and its deadlines are for a machine that is not swamped.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Other programs than the lab's own are built by `cargo build`, which `cargo xtask test` did.
fn can_run() -> bool {
    if !require_root()
        || !["bird", "nsd", "nginx"]
            .iter()
            .all(|tool| require_tool(tool))
    {
        return false;
    }
    for program in ["kun-proxy", "kun-cni", "kun-dns", "kun-operator"] {
        if !programs().join(program).is_file() {
            kun_harness::skip(&format!(
                "{program} is not built: cargo build --workspace --bins"
            ));
            return false;
        }
    }
    true
}

fn options(what: &str, manifests: PathBuf) -> Options {
    let name = LabName::new(&format!("{what}{}", std::process::id())).expect("letters and digits");
    Options {
        name,
        manifests,
        programs: programs(),
        keep: false,
        control_plane: false,
        deploy: root().join("deploy"),
    }
}

fn up(options: &Options) -> Result<Lab> {
    Lab::up(options, &mut |step| println!("{step}"))
}

/// A pod that keeps a connection of each family to a service, and uses it.
struct Talk {
    client: Client,
    connections: u32,
}

impl Talk {
    fn begin(lab: &Lab, pod: &str, service: &str) -> Result<Self> {
        let plan = lab
            .services
            .iter()
            .find(|s| s.object() == service)
            .context("no such service")?;
        let port = plan.service.spec.ports[0].port;
        let pod = lab.pod(pod)?;
        let mut client = lab.client(pod)?;
        let mut connections = 0;
        for address in &plan.cluster_ips {
            if pod.address(address.is_ipv6()).is_some() {
                let told = client.ask(&Ask::Open {
                    id: connections,
                    to: (*address, port).into(),
                })?;
                ensure!(told == Told::Done, "{service} at {address}: {told:?}");
                connections += 1;
            }
        }
        Ok(Self {
            client,
            connections,
        })
    }

    fn go_on(&mut self) -> Result<()> {
        for id in 0..self.connections {
            let told = self.client.ask(&Ask::Exchange { id })?;
            ensure!(
                matches!(told, Told::Hello(_)),
                "a connection that stood broke: {told:?}"
            );
        }
        Ok(())
    }
}

fn echo_addresses(lab: &Lab) -> Result<Vec<IpAddr>> {
    let echo = lab
        .services
        .iter()
        .find(|s| s.object() == "kun-lab/echo")
        .context("no echo service")?;
    Ok(echo.cluster_ips.clone())
}

/// New connections and datagrams to a service of the lab's own, once each; no second try.
fn reach_echo(lab: &Lab, client: &mut Client) -> Result<()> {
    reach(client, &echo_addresses(lab)?)
}

fn reach(client: &mut Client, addresses: &[IpAddr]) -> Result<()> {
    for &address in addresses {
        let tcp = client.ask(&Ask::Fetch {
            to: (address, 80).into(),
        })?;
        ensure!(matches!(tcp, Told::Hello(_)), "TCP to {address}: {tcp:?}");
        let udp = client.ask(&Ask::Datagram {
            to: SocketAddr::new(address, 7),
        })?;
        ensure!(matches!(udp, Told::Hello(_)), "UDP to {address}: {udp:?}");
    }
    Ok(())
}

fn resolves(client: &mut Client, server: IpAddr) -> Result<()> {
    let name = "echo.kun-lab.svc.cluster.local.".to_owned();
    let told = client.ask(&Ask::Resolve {
        server,
        name,
        v6: true,
        tcp: false,
    })?;
    ensure!(
        matches!(&told, Told::Addresses { addresses } if addresses.len() == 1),
        "{server}: {told:?}"
    );
    Ok(())
}

fn holds(lab: &Lab) -> Result<()> {
    let report = probes::probe(lab, &mut |step| println!("{step}"))?;
    ensure!(report.holds(), "\n{}", report.table());
    Ok(())
}

/// One lab for all of it: bringing one up costs most of the time.
#[test]
fn the_sample_holds_heals_and_vanishes() {
    if !can_run() {
        return;
    }
    let _alone = alone();
    let options = options("heal", root().join("deploy/lab"));
    let mut lab = up(&options).unwrap();
    holds(&lab).unwrap();
    kill_the_agent(&mut lab).unwrap();
    kill_a_dns_server(&mut lab).unwrap();
    kill_the_operator(&mut lab).unwrap();
    kill_the_gateway(&mut lab).unwrap();
    holds(&lab).unwrap();
    drop(lab);
    assert_eq!(traces(&options.name), Vec::<String>::new());
}

/// A pod that never stops talking, until told: standing connections, new ones, datagrams, in both families.
struct Chatter {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<u32>>,
}

impl Chatter {
    fn begin(lab: &Lab, pod: &str) -> Result<Self> {
        let mut talk = Talk::begin(lab, pod, "kun-lab/echo")?;
        let stop = Arc::new(AtomicBool::new(false));
        let told = stop.clone();
        let addresses = echo_addresses(lab)?;
        let thread = std::thread::spawn(move || {
            let mut rounds = 0;
            while !told.load(Ordering::Relaxed) {
                talk.go_on()?;
                reach(&mut talk.client, &addresses)?;
                rounds += 1;
            }
            Ok(rounds)
        });
        Ok(Self { stop, thread })
    }

    /// Rounds without a single failure.
    fn end(self) -> Result<u32> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

/// Everything works while the agent is down and while it comes back, without one failed try; a pod that came meanwhile is served
/// too; the address of a pod that went is not given to the next.
fn kill_the_agent(lab: &mut Lab) -> Result<()> {
    let chatter = Chatter::begin(lab, "client-a")?;
    let mut client = lab.client(lab.pod("client-a")?)?;
    let node = lab
        .nodes
        .iter_mut()
        .find(|node| node.machine.name == "node-a")
        .context("node-a")?;
    node.kill_agent();
    reach_echo(lab, &mut client)?;
    resolves(&mut client, CLUSTER_DNS_V6.into())?;

    let mut late = lab.pod("client-a")?.plan.clone();
    late.name = "late-a".to_owned();
    lab.add_pod(late.clone())
        .context("a pod while the agent is down")?;

    lab.restart_agent("node-a")?;
    lab.publish()?;
    let mut from_late = lab.client(lab.pod("late-a")?)?;
    wait_for("the late pod reaching a service", HEALS_WITHIN, || {
        reach_echo(lab, &mut from_late).ok()
    })?;
    let rounds = chatter
        .end()
        .context("while the agent was killed and started again")?;
    ensure!(rounds > 0, "nobody talked");

    let had = lab.pod("late-a")?.addresses.clone();
    lab.remove_pod("late-a")?;
    late.name = "later-a".to_owned();
    lab.add_pod(late)?;
    let has = lab.pod("later-a")?.addresses.clone();
    ensure!(
        !has.iter().any(|address| had.contains(address)),
        "{has:?} was handed out again before it cooled"
    );
    lab.publish()
}

/// While one server of two is dead, and known to be, every name resolves.
fn kill_a_dns_server(lab: &mut Lab) -> Result<()> {
    let servers: Vec<String> = lab
        .pods
        .iter()
        .filter(|p| p.plan.namespace == "kube-system")
        .map(|p| p.plan.name.clone())
        .collect();
    let victim = servers.first().context("no DNS pods")?;
    lab.kill_in_pod(victim)?;
    lab.publish()?;
    let mut client = lab.client(lab.pod("client-b")?)?;
    for server in [IpAddr::from(CLUSTER_DNS_V6), CLUSTER_DNS_V4.into()] {
        // Twenty sockets in a row would meet the dead server if it still had a share.
        let mut in_a_row = 0;
        wait_for("twenty names in a row", HEALS_WITHIN, || {
            in_a_row = if resolves(&mut client, server).is_ok() {
                in_a_row + 1
            } else {
                0
            };
            (in_a_row == 20).then_some(())
        })?;
    }
    lab.restart_in_pod(victim)?;
    lab.publish()
}

/// Assignments are kept over a restart.
fn kill_the_operator(lab: &mut Lab) -> Result<()> {
    let before = (lab.blocks()?, lab.load_balancers()?);
    lab.operator = None;
    ensure!(
        (lab.blocks()?, lab.load_balancers()?) == before,
        "assignments went with the operator"
    );
    lab.start_operator()?;
    // A service that comes now is given an address by the new one, and nobody loses his.
    let after = (lab.blocks()?, lab.load_balancers()?);
    ensure!(
        after == before,
        "the new operator moved an assignment: {before:?} → {after:?}"
    );
    Ok(())
}

/// Translation goes on while the gateway's agent is down: its programs stay, and the ToR keeps its routes by graceful restart.
fn kill_the_gateway(lab: &mut Lab) -> Result<()> {
    let mut client = lab.client(lab.pod("island-b")?)?;
    let web: IpAddr = "2001:db8:64:64::cb00:7150".parse()?;
    let fetch = Ask::Fetch {
        to: (web, 80).into(),
    };
    let node = lab
        .nodes
        .iter_mut()
        .find(|node| node.machine.gateway)
        .context("the gateway")?;
    node.kill_agent();
    let told = client.ask(&fetch)?;
    ensure!(
        matches!(told, Told::Hello(_)),
        "with the gateway's agent dead: {told:?}"
    );
    lab.restart_agent("gateway")?;
    wait_for("the gateway translating", HEALS_WITHIN, || {
        matches!(client.ask(&fetch), Ok(Told::Hello(_))).then_some(())
    })
}

#[test]
fn a_broken_manifest_is_one_clear_line_and_leaves_nothing() {
    if !require_root() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("broken.yaml");
    std::fs::write(
        &file,
        "kind: Service\nmetadata: {name: web}\nspec: {ports: [{port: eighty}]}\n",
    )
    .unwrap();
    let name = LabName::new(&format!("bad{}", std::process::id())).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_kun-lab"))
        .args(["--name", name.as_str(), "--manifests"])
        .arg(&file)
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    let said: BTreeSet<&str> = errors
        .lines()
        .filter(|line| line.starts_with("lab: "))
        .collect();
    assert_eq!(output.status.code(), Some(2), "{errors}");
    assert_eq!(said.len(), 1, "{errors}");
    for word in ["broken.yaml", "Service web", "spec"] {
        assert!(errors.contains(word), "{errors}");
    }
    assert_eq!(traces(&name), Vec::<String>::new());
}

/// `kill -9` of the lab itself in the midst of it, then `down`.
#[test]
fn down_removes_what_a_crash_left() {
    if !can_run() {
        return;
    }
    let _alone = alone();
    let options = options("crash", root().join("deploy/lab"));
    let mut lab = Command::new(env!("CARGO_BIN_EXE_kun-lab"));
    lab.args(["--name", options.name.as_str(), "--manifests"])
        .arg(&options.manifests);
    let mut lab = Process::spawn(lab.stdout(Stdio::null()).stderr(Stdio::null())).unwrap();
    let first_pod = options.name.netns("pod-0");
    wait_for(
        "the first pod's namespace",
        Duration::from_secs(120),
        || {
            assert!(lab.is_running(), "the lab ended by itself");
            netns_names().any(|netns| netns == first_pod).then_some(())
        },
    )
    .unwrap();
    drop(lab);
    assert_ne!(
        traces(&options.name),
        Vec::<String>::new(),
        "nothing was left, so nothing was shown"
    );
    let down = Command::new(env!("CARGO_BIN_EXE_kun-lab"))
        .args(["down", "--name", options.name.as_str()])
        .status()
        .unwrap();
    assert!(down.success());
    assert_eq!(traces(&options.name), Vec::<String>::new());
}

/// Two labs on one machine, both whole; taking one down leaves the other.
#[test]
fn two_labs_stand_side_by_side() {
    if !can_run() {
        return;
    }
    let _alone = alone();
    let directory = tempfile::tempdir().unwrap();
    let pod = "kind: Pod\nmetadata: {name: one, labels: {app: one}}\nspec: {containers: [{name: c, ports: [{containerPort: 80}]}]}\n";
    std::fs::write(directory.path().join("pod.yaml"), pod).unwrap();
    let (a, b) = (
        options("left", directory.path().into()),
        options("right", directory.path().into()),
    );
    let left = up(&a).unwrap();
    let right = up(&b).unwrap();
    holds(&left).unwrap();
    drop(left);
    assert_eq!(traces(&a.name), Vec::<String>::new());
    holds(&right).unwrap();
    drop(right);
    assert_eq!(traces(&b.name), Vec::<String>::new());
}
