//! The lab on a real Kubernetes: pods have the addresses that kun-cni gave them, whatever `kubectl` does to a service's pods is not
//! felt by its clients, and nothing is left behind.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kun_harness::{Process, cgroup2_mount, require_root, require_tool, run, skip, wait_for};
use kun_tests::lab::client::{Ask, Client, Told};
use kun_tests::lab::cluster::Cluster;
use kun_tests::lab::down::traces;
use kun_tests::lab::names::{LabName, MACHINES};
use kun_tests::lab::{Lab, Options, probes};
use serde_json::Value;

/// What `kubectl` waits for; pods take seconds, a busy machine more.
const ROLLS_WITHIN: &str = "--timeout=180s";

/// At most two hundred questions a second and client: a pod has 1,024 ports to ask from, and what is tried here is not their number.
const BETWEEN_QUESTIONS: Duration = Duration::from_millis(5);

fn programs() -> PathBuf {
    let lab = Path::new(env!("CARGO_BIN_EXE_kun-lab"));
    lab.parent().unwrap_or(Path::new(".")).to_owned()
}

/// One lab at a time: it is a cluster's worth of processes.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

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
            skip(&format!(
                "{program} is not built: cargo build --workspace --bins"
            ));
            return false;
        }
    }
    match Cluster::missing() {
        Some(missing) => {
            skip(&missing);
            false
        }
        None => true,
    }
}

fn options(what: &str) -> Options {
    let name = LabName::new(&format!("{what}{}", std::process::id())).expect("letters and digits");
    Options {
        name,
        manifests: Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/lab"),
        programs: programs(),
        keep: false,
        control_plane: true,
        deploy: Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy"),
    }
}

fn holds(lab: &Lab) -> Result<()> {
    let report = probes::probe(lab, &mut |step| println!("{step}"))?;
    ensure!(report.holds(), "\n{}", report.table());
    Ok(())
}

/// One cluster for all of it: bringing one up costs most of the time.
#[test]
fn pods_come_and_go_and_nobody_notices() {
    if !can_run() {
        return;
    }
    let _alone = alone();
    let options = options("kube");
    let mut lab = Lab::up(&options, &mut |step| println!("{step}")).unwrap();
    holds(&lab).unwrap();
    nodes_are_whole(&lab).unwrap();
    status_shows_every_address(&lab).unwrap();
    readiness_is_the_kubelets(&lab).unwrap();
    logs_and_exec(&lab).unwrap();
    churn(&lab).unwrap();
    lab.refresh().unwrap();
    holds(&lab).unwrap();
    drop(lab);
    assert_eq!(traces(&options.name), Vec::<String>::new());
}

/// Every kubelet registered its machine: addresses of both families, IPv6 first, and the zone as a label.
fn nodes_are_whole(lab: &Lab) -> Result<()> {
    let nodes = lab.cluster()?.get("nodes")?;
    for machine in &MACHINES {
        let node = nodes
            .iter()
            .find(|node| node["metadata"]["name"] == machine.name)
            .with_context(|| format!("{}: no such Node", machine.name))?;
        let listed = node["status"]["addresses"].as_array();
        let addresses: Vec<&str> = listed
            .into_iter()
            .flatten()
            .filter(|a| a["type"] == "InternalIP")
            .filter_map(|a| a["address"].as_str())
            .collect();
        let wanted = [machine.v6().to_string(), machine.v4().to_string()];
        ensure!(addresses == wanted, "{}: {addresses:?}", machine.name);
        let zone = &node["metadata"]["labels"]["topology.kubernetes.io/zone"];
        ensure!(zone == machine.zone, "{}: zone {zone}", machine.name);
    }
    Ok(())
}

/// A dual-stack pod in split mode has IPv6 on eth0 and IPv4 on eth1, and `status.podIPs` shows both, IPv6 first, though containerd
/// looks at eth0 alone; an IPv6-only pod has no eth1, and shows one.
fn status_shows_every_address(lab: &Lab) -> Result<()> {
    let mut seen = BTreeMap::new();
    for pod in lab.cluster()?.get("pods")? {
        if pod["spec"]["hostNetwork"] == true {
            continue;
        }
        let name = pod["metadata"]["name"].as_str().context("a name")?;
        let shown: Vec<IpAddr> = pod["status"]["podIPs"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|ip| ip["ip"].as_str()?.parse().ok())
            .collect();
        let inside = addresses_inside(lab, &pod)?;
        let expected: Vec<(&str, bool)> = match shown.len() {
            2 => vec![("eth0", true), ("eth1", false)],
            _ => vec![("eth0", true)],
        };
        let found: Vec<(&str, IpAddr)> = inside.iter().map(|(i, a)| (i.as_str(), *a)).collect();
        let wanted: Vec<(&str, IpAddr)> = expected
            .iter()
            .zip(&shown)
            .map(|((interface, _), address)| (*interface, *address))
            .collect();
        ensure!(found == wanted, "{name}: inside {found:?}, shown {shown:?}");
        let families: Vec<bool> = shown.iter().map(IpAddr::is_ipv6).collect();
        ensure!(
            families == expected.iter().map(|(_, v6)| *v6).collect::<Vec<_>>(),
            "{name}: {shown:?}"
        );
        let v6_only = pod["metadata"]["annotations"]["kun.network/ipv4"] == "false";
        ensure!(
            shown.len() == if v6_only { 1 } else { 2 },
            "{name}: {shown:?}"
        );
        *seen.entry(v6_only).or_insert(0) += 1;
    }
    ensure!(seen.len() == 2, "pods of both kinds: {seen:?}");
    Ok(())
}

/// Global addresses by interface, as the kernel has them in the pod's namespace.
fn addresses_inside(lab: &Lab, pod: &Value) -> Result<Vec<(String, IpAddr)>> {
    let uid = pod["metadata"]["uid"].as_str().context("a uid")?;
    let node = pod["spec"]["nodeName"].as_str().context("a node")?;
    let pods = lab.name.cgroup(&cgroup2_mount()?).join(node);
    let pid = first_process(&pods, uid).with_context(|| format!("{uid}: no process of it"))?;
    let text = run([
        "nsenter", "--net", "--target", &pid, "ip", "-j", "addr", "show", "scope", "global",
    ])?;
    let links: Vec<Value> = serde_json::from_str(&text)?;
    let mut found = Vec::new();
    for link in links {
        for info in link["addr_info"].as_array().into_iter().flatten() {
            let name = link["ifname"].as_str().unwrap_or_default();
            // Those of another scope are listed as empty.
            if let Some(address) = info["local"].as_str() {
                found.push((name.to_owned(), address.parse()?));
            }
        }
    }
    Ok(found)
}

fn first_process(group: &Path, uid: &str) -> Option<String> {
    for entry in std::fs::read_dir(group).ok()?.flatten() {
        let path = entry.path();
        if !path.is_dir() {
            continue;
        }
        if path.to_string_lossy().contains(uid)
            && let Ok(text) = std::fs::read_to_string(path.join("cgroup.procs"))
            && let Some(pid) = text.lines().next()
        {
            return Some(pid.to_owned());
        }
        if let Some(pid) = first_process(&path, uid) {
            return Some(pid);
        }
    }
    None
}

/// The kubelet's probes reach pods through what kun-cni made: over HTTP and plain TCP, and a pod that does not answer is not ready.
fn readiness_is_the_kubelets(lab: &Lab) -> Result<()> {
    let cluster = lab.cluster()?;
    let mut kinds = BTreeMap::new();
    for pod in cluster.get("pods")? {
        let probe = &pod["spec"]["containers"][0]["readinessProbe"];
        for kind in ["httpGet", "tcpSocket"] {
            if probe[kind].is_object() {
                *kinds.entry(kind).or_insert(0) += 1;
            }
        }
    }
    ensure!(kinds.len() == 2, "probes of both kinds: {kinds:?}");
    let words = [
        "patch",
        "deployment",
        "catalog",
        "--namespace",
        "shop",
        "--type",
        "json",
        "-p",
        r#"[{"op": "replace", "path": "/spec/template/spec/containers/0/readinessProbe/httpGet/port", "value": 9}]"#,
    ];
    cluster.kubectl(&words, "")?;
    let watch = cluster.watch("pods")?;
    wait_for(
        "a new pod that runs and is not ready",
        Duration::from_secs(60),
        || {
            let pods = watch.objects();
            pods.iter()
                .any(|pod| {
                    let probe = &pod["spec"]["containers"][0]["readinessProbe"]["httpGet"]["port"];
                    let status = &pod["status"]["containerStatuses"][0];
                    *probe == 9
                        && status["state"]["running"].is_object()
                        && status["ready"] == false
                })
                .then_some(())
        },
    )?;
    cluster.kubectl(
        &[
            "rollout",
            "undo",
            "deployment/catalog",
            "--namespace",
            "shop",
        ],
        "",
    )?;
    rolled_out(cluster, "shop", "deployment/catalog")
}

fn logs_and_exec(lab: &Lab) -> Result<()> {
    let cluster = lab.cluster()?;
    let words = ["logs", "deployment/kun-dns", "--namespace", "kube-system"];
    let said = cluster.kubectl(&words, "")?;
    ensure!(!said.trim().is_empty(), "kubectl logs: nothing");
    let ask = serde_json::to_string(&Ask::OwnV4)?;
    let words = [
        "exec",
        "-i",
        "--namespace",
        "kun-lab",
        "island-a",
        "--",
        "kun-lab",
        "client",
    ];
    let told = cluster.kubectl(&words, &format!("{ask}\n"))?;
    ensure!(told.contains("addresses"), "kubectl exec: {told}");
    Ok(())
}

fn rolled_out(cluster: &Cluster, namespace: &str, what: &str) -> Result<()> {
    let words = [
        "rollout",
        "status",
        what,
        "--namespace",
        namespace,
        ROLLS_WITHIN,
    ];
    cluster.kubectl(&words, "").map(drop)
}

/// Somebody who asks a service again and again, each time over a new connection or from a new port, and notes what failed.
struct Asker {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Asked>>,
}

#[derive(Debug, Default)]
struct Asked {
    made: u32,
    failed: Vec<String>,
}

impl Asker {
    fn begin(mut client: Client, questions: Vec<Ask>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let told = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut asked = Asked::default();
            while !told.load(Ordering::Relaxed) {
                for question in &questions {
                    std::thread::sleep(BETWEEN_QUESTIONS);
                    asked.made += 1;
                    match client.ask(question)? {
                        Told::Hello(_) => {}
                        other => asked.failed.push(format!("{question:?}: {other:?}")),
                    }
                }
            }
            Ok(asked)
        });
        Self { stop, thread }
    }

    fn end(self) -> Result<Asked> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

/// `kubectl scale`, `rollout restart` and `delete pod` while clients ask: not one question fails.
fn churn(lab: &Lab) -> Result<()> {
    let cluster = lab.cluster()?;
    let mut askers = Vec::new();
    for name in ["client-a", "client-b"] {
        let pod = lab.pod(name)?;
        let mut questions = Vec::new();
        for (service, port, udp) in [("shop/front", 80, false), ("kun-lab/echo", 7, true)] {
            let plan = lab
                .services
                .iter()
                .find(|s| s.object() == service)
                .with_context(|| format!("{service}: no such service"))?;
            questions.extend(plan.cluster_ips.iter().map(|&ip| {
                let to = SocketAddr::new(ip, port);
                if udp {
                    Ask::Datagram { to }
                } else {
                    Ask::Fetch { to }
                }
            }));
        }
        askers.push((name, Asker::begin(lab.client(pod)?, questions)));
    }
    let shop = |words: &[&str]| {
        let words: Vec<&str> = words
            .iter()
            .copied()
            .chain(["--namespace", "shop"])
            .collect();
        cluster.kubectl(&words, "")
    };
    shop(&["scale", "deployment/front", "--replicas=6"])?;
    rolled_out(cluster, "shop", "deployment/front")?;
    shop(&["scale", "deployment/front", "--replicas=2"])?;
    shop(&["rollout", "restart", "deployment/front"])?;
    rolled_out(cluster, "shop", "deployment/front")?;
    let words = [
        "rollout",
        "restart",
        "daemonset/echo",
        "--namespace",
        "kun-lab",
    ];
    cluster.kubectl(&words, "")?;
    rolled_out(cluster, "kun-lab", "daemonset/echo")?;
    shop(&["scale", "deployment/front", "--replicas=3"])?;
    rolled_out(cluster, "shop", "deployment/front")?;
    let victims = shop(&["get", "pods", "-l", "app=front", "-o", "name"])?;
    for victim in victims.split_whitespace().take(2) {
        // Returns when it is gone; its successor may not be ready yet, but others are.
        shop(&["delete", victim])?;
        rolled_out(cluster, "shop", "deployment/front")?;
    }
    let mut failed = Vec::new();
    let mut made = 0;
    for (name, asker) in askers {
        let asked = asker.end().context(name)?;
        made += asked.made;
        failed.extend(asked.failed);
    }
    println!("{made} questions while pods came and went");
    ensure!(made > 100, "only {made} questions were asked");
    ensure!(
        failed.is_empty(),
        "{} of {made} failed: {}",
        failed.len(),
        failed
            .iter()
            .take(5)
            .cloned()
            .collect::<Vec<_>>()
            .join("; ")
    );
    Ok(())
}

/// `kill -9` of the lab itself while pods start, then `down`.
#[test]
fn down_removes_a_whole_cluster_after_a_crash() {
    if !can_run() {
        return;
    }
    let _alone = alone();
    let options = options("kubecrash");
    let mut lab = Command::new(env!("CARGO_BIN_EXE_kun-lab"));
    lab.args([
        "--control-plane",
        "--name",
        options.name.as_str(),
        "--manifests",
    ])
    .arg(&options.manifests)
    // Where it finds `deploy`.
    .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."));
    let mut lab = Process::spawn(lab.stdout(Stdio::null()).stderr(Stdio::null())).unwrap();
    let pods = options
        .name
        .cgroup(&cgroup2_mount().unwrap())
        .join("node-a/kubepods/besteffort");
    wait_for("the first pod's cgroup", Duration::from_secs(180), || {
        assert!(lab.is_running(), "the lab ended by itself");
        std::fs::read_dir(&pods)
            .ok()?
            .flatten()
            .any(|entry| entry.path().is_dir())
            .then_some(())
    })
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
