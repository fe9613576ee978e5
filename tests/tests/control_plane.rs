//! The control plane that tests use is a real one: its controllers make EndpointSlices, it can be broken in every way that a cluster's
//! breaks, and nothing of it stays, however the test ends.

#![allow(missing_docs)]

use std::io::{BufRead, BufReader};
use std::net::{IpAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use kun_harness::control_plane::{Namespace, Part};
use kun_harness::{ControlPlane, Netns, require_root, wait_for};

/// Controllers act within a second; a busy machine takes a few.
const ACTS_WITHIN: Duration = Duration::from_secs(60);

/// The controllers leave out pods of nodes that do not exist.
const NODE: &str = "{apiVersion: v1, kind: Node, metadata: {name: node-a}}";

const SHOP: &str = r#"
apiVersion: v1
kind: Service
metadata: {name: front}
spec:
  ipFamilyPolicy: RequireDualStack
  selector: {app: front}
  ports: [{name: http, port: 80, targetPort: 8080}]
---
apiVersion: v1
kind: Pod
metadata: {name: front-0, labels: {app: front}}
spec:
  nodeName: node-a
  automountServiceAccountToken: false
  containers: [{name: c, image: nothing}]
"#;

const CONFIG_MAP: &str = "{apiVersion: v1, kind: ConfigMap, metadata: {name: kept}}";

/// The shop's objects, and what a kubelet would say of its pod.
fn open_shop(plane: &ControlPlane, shop: &Namespace<'_>) {
    plane.kubectl(&["apply", "-f", "-"], NODE).unwrap();
    shop.kubectl(&["apply", "-f", "-"], SHOP).unwrap();
    let status = r#"{"status":{"phase":"Running","podIP":"10.64.0.1","podIPs":[{"ip":"10.64.0.1"},{"ip":"2001:db8::1"}],"conditions":[{"type":"Ready","status":"True"}]}}"#;
    let patch = [
        "patch",
        "pod",
        "front-0",
        "--subresource=status",
        "-p",
        status,
    ];
    shop.kubectl(&patch, "").unwrap();
}

/// The endpoints of the shop's slices.
fn slices(shop: &Namespace<'_>) -> Vec<String> {
    let service = "kubernetes.io/service-name=front";
    let addresses = "jsonpath={.items[*].endpoints[*].addresses[0]}";
    let text = shop
        .kubectl(
            &["get", "endpointslices", "-l", service, "-o", addresses],
            "",
        )
        .unwrap();
    let mut found: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
    found.sort();
    found
}

fn stocked(shop: &Namespace<'_>) {
    let want = ["10.64.0.1", "2001:db8::1"];
    wait_for("both EndpointSlices", ACTS_WITHIN, || {
        (slices(shop) == want).then_some(())
    })
    .unwrap();
}

fn is_alive(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

#[test]
fn controllers_make_endpointslices() {
    let Some(plane) = ControlPlane::shared() else {
        return;
    };
    let shop = plane.namespace("shop").unwrap();
    open_shop(plane, &shop);
    stocked(&shop);
    // What the namespace holds goes with it.
    let name = shop.name().to_owned();
    drop(shop);
    wait_for("the namespace's end", ACTS_WITHIN, || {
        plane
            .kubectl(&["get", "namespace", &name], "")
            .is_err()
            .then_some(())
    })
    .unwrap();
}

#[test]
fn a_token_is_good_for_its_lifetime() {
    let Some(plane) = ControlPlane::shared() else {
        return;
    };
    let space = plane.namespace("token").unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (file, config) = (dir.path().join("token"), dir.path().join("kubeconfig"));
    plane.token_kubeconfig(&file, &config).unwrap();
    let me = format!("system:serviceaccount:{}:default", space.name());
    let who = || {
        plane.kubectl_as(
            &config,
            &[
                "auth",
                "whoami",
                "-o",
                "jsonpath={.status.userInfo.username}",
            ],
            "",
        )
    };
    let write = |seconds| {
        let lifetime = Duration::from_secs(seconds);
        plane
            .write_token(space.name(), "default", lifetime, &file)
            .unwrap();
    };
    // Signed by the API, and by us.
    for seconds in [3600, 2] {
        write(seconds);
        assert_eq!(who().unwrap(), me, "{seconds} s");
    }
    // No rights come with it.
    let error = plane
        .kubectl_as(&config, &["get", "nodes"], "")
        .unwrap_err();
    assert!(
        format!("{error:#}").contains("orbidden") || format!("{error:#}").contains("nauthorized"),
        "{error:#}"
    );
    let refused = wait_for("the token's end", ACTS_WITHIN, || who().err()).unwrap();
    assert!(
        format!("{refused:#}").contains("nauthorized"),
        "{refused:#}"
    );
    write(3600);
    assert_eq!(who().unwrap(), me, "a fresh token in the same file");
}

#[test]
fn the_api_server_dies_freezes_and_changes_over() {
    let Some(builder) = ControlPlane::builder() else {
        return;
    };
    let mut plane = builder.start().unwrap();
    plane
        .kubectl(&["apply", "-n", "default", "-f", "-"], CONFIG_MAP)
        .unwrap();
    let get = [
        "get",
        "configmap",
        "kept",
        "-n",
        "default",
        "--request-timeout=2s",
    ];
    let server = plane.server().to_owned();
    let address = server.trim_start_matches("https://").to_owned();

    // Dead: the port is closed. Started: the same port, the same objects.
    let first = plane.pid(Part::ApiServer).unwrap();
    plane.kill(Part::ApiServer).unwrap();
    assert!(!is_alive(first));
    assert!(TcpStream::connect(&address).is_err(), "the port is closed");
    assert!(plane.kubectl(&get, "").is_err());
    let error = plane.kill(Part::ApiServer).unwrap_err().to_string();
    assert!(error.contains("does not run"), "{error}");
    plane
        .start(Part::ApiServer, &["--min-request-timeout=2"])
        .unwrap();
    assert_ne!(plane.pid(Part::ApiServer).unwrap(), first);
    plane.kubectl(&get, "").unwrap();

    // Frozen: it accepts and does not answer.
    plane.freeze(Part::ApiServer).unwrap();
    TcpStream::connect(&address).unwrap();
    assert!(plane.kubectl(&get, "").is_err());
    plane.thaw(Part::ApiServer).unwrap();
    plane.kubectl(&get, "").unwrap();

    // A second one over the same data, which outlives the first.
    let second = plane.add_api_server(&[]).unwrap();
    assert_ne!(second.server, server);
    plane.terminate(Part::ApiServer).unwrap();
    plane.kubectl_as(&second.kubeconfig, &get, "").unwrap();
    plane.start(Part::ApiServer, &[]).unwrap();
    plane.kill(Part::SecondApiServer).unwrap();

    // A wrong flag is an answer, and no end.
    plane.kill(Part::ApiServer).unwrap();
    let error = plane
        .start(Part::ApiServer, &["--no-such-flag"])
        .unwrap_err();
    assert!(format!("{error:#}").contains("no-such-flag"), "{error:#}");
    plane.start(Part::ApiServer, &[]).unwrap();
    plane.kubectl(&get, "").unwrap();
    assert_eq!(plane.server(), server);
}

#[test]
fn etcd_and_the_controllers_die_and_come_back() {
    let Some(builder) = ControlPlane::builder() else {
        return;
    };
    let mut plane = builder.start().unwrap();
    plane
        .kubectl(&["apply", "-n", "default", "-f", "-"], CONFIG_MAP)
        .unwrap();
    let get = [
        "get",
        "configmap",
        "kept",
        "-n",
        "default",
        "-o",
        "jsonpath={.metadata.resourceVersion}",
    ];
    let version = plane.kubectl(&get, "").unwrap();

    plane.kill(Part::Etcd).unwrap();
    let label = [
        "label",
        "configmap",
        "kept",
        "-n",
        "default",
        "--overwrite",
        "--request-timeout=2s",
    ];
    let write = |plane: &ControlPlane, label_value: &str| {
        let mut words = label.to_vec();
        words.push(label_value);
        plane.kubectl(&words, "")
    };
    assert!(write(&plane, "round=1").is_err(), "nowhere to write it");
    plane.start(Part::Etcd, &[]).unwrap();
    wait_for("the API server finding etcd", ACTS_WITHIN, || {
        write(&plane, "round=2").ok()
    })
    .unwrap();
    assert_ne!(plane.kubectl(&get, "").unwrap(), version);

    // History that is forgotten is said to be gone.
    let watch = format!(
        "/api/v1/namespaces/default/configmaps?watch=1&timeoutSeconds=1&resourceVersion={version}"
    );
    let events = plane.kubectl(&["get", "--raw", &watch], "").unwrap();
    assert!(events.contains("MODIFIED"), "{events}");
    plane.forget().unwrap();
    let gone = match plane.kubectl(&["get", "--raw", &watch], "") {
        Ok(events) => events,
        Err(error) => format!("{error:#}"),
    };
    assert!(gone.contains("too old resource version"), "{gone}");

    // Without controllers nobody makes slices; what was missed is made up for.
    plane.kill(Part::Controllers).unwrap();
    plane.kubectl(&["apply", "-f", "-"], NODE).unwrap();
    let name = "default";
    plane
        .kubectl(&["apply", "-n", name, "-f", "-"], SHOP)
        .unwrap();
    let count = || {
        let words = ["get", "endpointslices", "-n", name, "-o", "name"];
        plane.kubectl(&words, "").unwrap().lines().count()
    };
    assert_eq!(count(), 0);
    plane.start(Part::Controllers, &[]).unwrap();
    let count = || {
        let words = ["get", "endpointslices", "-n", name, "-o", "name"];
        plane.kubectl(&words, "").unwrap().lines().count()
    };
    wait_for("the slices", ACTS_WITHIN, || (count() == 2).then_some(())).unwrap();
}

#[test]
fn inside_a_network_namespace_in_either_family() {
    if !require_root() {
        return;
    }
    for (address, services) in [
        ("192.0.2.10", "10.96.0.0/16,fd00:10:96::/112"),
        ("2001:db8::10", "fd00:10:96::/112,10.96.0.0/16"),
    ] {
        let Some(builder) = ControlPlane::builder() else {
            return;
        };
        let netns = Netns::new("plane").unwrap();
        let bind: IpAddr = address.parse().unwrap();
        let length = if bind.is_ipv6() { 64 } else { 24 };
        netns
            .exec(&format!("addr add {address}/{length} dev lo"))
            .unwrap();
        let mut plane = builder
            .netns(netns.path())
            .bind(bind)
            .port(6443)
            .service_cidrs(services)
            .pod_cidrs("10.64.0.0/16,2001:db8:64::/56")
            .san("api.example")
            .scheduler()
            .nodes(["node-a"])
            .start()
            .unwrap();
        // The API server is a service as any other.
        let slice = [
            "get",
            "endpointslice",
            "kubernetes",
            "-n",
            "default",
            "-o",
            "jsonpath={.endpoints[0].addresses[0]}:{.ports[0].port}",
        ];
        let told = wait_for("Service kubernetes' endpoint", ACTS_WITHIN, || {
            plane.kubectl(&slice, "").ok()
        })
        .unwrap();
        assert_eq!(told, format!("{address}:6443"));
        // A kubelet's rights, the node CIDR controller, the scheduler.
        let node = plane.node_kubeconfig("node-a").unwrap().to_owned();
        plane
            .kubectl_as(&node, &["create", "-f", "-"], NODE)
            .unwrap();
        let cidrs = [
            "get",
            "node",
            "node-a",
            "-o",
            "jsonpath={.spec.podCIDRs[*]}",
        ];
        let cidrs = wait_for("pod CIDRs", ACTS_WITHIN, || {
            Some(plane.kubectl(&cidrs, "").unwrap()).filter(|text| !text.is_empty())
        })
        .unwrap();
        assert_eq!(cidrs, "10.64.0.0/24 2001:db8:64::/64");
        plane.kill(Part::Scheduler).unwrap();
        plane.start(Part::Scheduler, &[]).unwrap();
        assert!(
            TcpStream::connect((bind, 6443)).is_err(),
            "nothing outside of the namespace"
        );
    }
}

#[test]
fn nothing_stays() {
    let Some(builder) = ControlPlane::builder() else {
        return;
    };
    let began = Instant::now();
    let plane = builder.start().unwrap();
    println!("ready in {:?}", began.elapsed());
    let dir = plane.dir().to_owned();
    let pids = [Part::ApiServer, Part::Etcd, Part::Controllers].map(|p| plane.pid(p).unwrap());
    let server = plane.server().trim_start_matches("https://").to_owned();
    drop(plane);
    assert!(!dir.exists(), "{} is left", dir.display());
    assert!(!pids.into_iter().any(is_alive), "a process is left");
    assert!(
        TcpStream::connect(server).is_err(),
        "the API server still answers"
    );
}

const CHILD: &str = "KUN_CONTROL_PLANE_TEST_CHILD";

/// The test process that the next test kills.
#[test]
fn child() {
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    let Some(builder) = ControlPlane::builder() else {
        return;
    };
    let mut plane = builder.start().unwrap();
    // A part that cannot run must not stay for that.
    plane.freeze(Part::ApiServer).unwrap();
    let pids = [Part::ApiServer, Part::Etcd, Part::Controllers].map(|p| plane.pid(p).unwrap());
    eprintln!(
        "{} {} {} {}",
        plane.dir().display(),
        pids[0],
        pids[1],
        pids[2]
    );
    loop {
        std::thread::park();
    }
}

#[test]
fn a_killed_test_leaves_nothing() {
    if ControlPlane::builder().is_none() {
        return;
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "child", "--nocapture"])
        .env(CHILD, "1")
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let mut test = kun_harness::Process::spawn(&mut command).unwrap();
    let mut line = String::new();
    BufReader::new(test.stderr.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    let mut words = line.split_whitespace();
    let dir = PathBuf::from(words.next().unwrap());
    let pids: Vec<u32> = words.map(|pid| pid.parse().unwrap()).collect();
    assert_eq!(pids.len(), 3, "{line}");
    assert!(dir.exists() && pids.iter().all(|&pid| is_alive(pid)));
    drop(test); // SIGKILL
    wait_for("the control plane's end", ACTS_WITHIN, || {
        (!dir.exists() && !pids.iter().any(|&pid| is_alive(pid))).then_some(())
    })
    .unwrap();
}
