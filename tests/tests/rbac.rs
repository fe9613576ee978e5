//! `deploy/base` on a real API server: it applies whole, each program reaches a complete view with nothing but its ServiceAccount's
//! token, asks for what its roles grant and for nothing else, and says which right is missing when one is taken away.
//!
//! What is asked is read from the API server's audit log, so a right that nobody uses fails as well as one that is missing.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{Ipv6Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use kun_harness::control_plane::ControlPlane;
use kun_harness::{BpfFs, Cgroup, Netns, Process, require_root, require_tool, wait_for};
use serde_json::{Value, json};

/// A program starts in a second or two; a busy machine takes its time.
const SOON: Duration = Duration::from_secs(60);

const NAMESPACE: &str = "kube-system";

/// Where nodes write Leases.
const NODE_LEASES: &str = "kun-node-lease";

/// The programs: its account, what it says when it is ready, and where.
const PROGRAMS: [(&str, u16, &str); 3] = [
    ("kun-proxy", 9466, "/readyz"),
    ("kun-dns", 8181, "/ready"),
    ("kun-operator", 9467, "/readyz"),
];

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

fn programs() -> PathBuf {
    let lab = Path::new(env!("CARGO_BIN_EXE_kun-lab"));
    lab.parent().unwrap_or(Path::new(".")).to_owned()
}

/// One thing that a role allows, and that a request asks for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Right {
    group: String,
    /// With its subresource: `services/status`.
    resource: String,
    verb: String,
}

impl fmt::Display for Right {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let of = if self.group.is_empty() { "" } else { " of " };
        write!(f, "`{}` `{}`{of}{}", self.verb, self.resource, self.group)
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

/// The rights of a list of rules.
fn rights(rules: &Value) -> BTreeSet<Right> {
    let mut rights = BTreeSet::new();
    for rule in list(rules) {
        for group in list(&rule["apiGroups"]) {
            for resource in list(&rule["resources"]) {
                for verb in list(&rule["verbs"]) {
                    rights.insert(Right {
                        group: text(group),
                        resource: text(resource),
                        verb: text(verb),
                    });
                }
            }
        }
    }
    rights
}

/// A server in a namespace, with everything of `deploy/base` in it.
struct Bench {
    plane: ControlPlane,
    netns: Netns,
    cgroup: Cgroup,
    bpffs: BpfFs,
    dir: tempfile::TempDir,
}

impl Bench {
    fn start() -> Option<Self> {
        if !require_root() || !require_tool("ip") {
            return None;
        }
        for (program, ..) in PROGRAMS {
            if !programs().join(program).is_file() {
                kun_harness::skip(&format!(
                    "{program} is not built: cargo build --workspace --bins"
                ));
                return None;
            }
        }
        let builder = ControlPlane::builder()?;
        let netns = Netns::new("rbac").unwrap();
        netns.exec("link set lo up").unwrap();
        let dir = tempfile::tempdir().unwrap();
        let policy = dir.path().join("audit.yaml");
        let users: Vec<String> = PROGRAMS.iter().map(|(p, ..)| user(p)).collect();
        let rules = json!({"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "omitStages": ["RequestReceived"],
            "rules": [{"level": "Metadata", "users": users}, {"level": "None"}]});
        fs::write(&policy, rules.to_string()).unwrap();
        let plane = builder
            .netns(netns.path())
            .apiserver_flags(&[
                &format!("--audit-policy-file={}", policy.display()),
                &format!(
                    "--audit-log-path={}",
                    dir.path().join("audit.log").display()
                ),
                // A server that has no streaming lists is listed: `list` is needed there from the beginning, elsewhere for checks.
                "--feature-gates=WatchList=false",
            ])
            .start()
            .unwrap_or_else(|e| panic!("{e:#}"));
        Some(Self {
            plane,
            cgroup: Cgroup::new().unwrap(),
            bpffs: BpfFs::new().unwrap(),
            netns,
            dir,
        })
    }

    fn kubectl(&self, words: &[&str], stdin: &str) -> String {
        self.plane
            .kubectl(words, stdin)
            .unwrap_or_else(|e| panic!("{e:#}"))
    }

    fn get(&self, words: &[&str]) -> Value {
        let words: Vec<&str> = ["get", "-o", "json"].iter().chain(words).copied().collect();
        serde_json::from_str(&self.kubectl(&words, "")).unwrap()
    }

    fn apply_whole(&self) {
        let deploy = deploy();
        // A namespace that is not kept either has nothing in it.
        self.kubectl(&["create", "namespace", NODE_LEASES], "");
        // What cannot stand beside the base is tried by the server and not kept.
        for overlay in ["overlays/dual-stack", "overlays/nat64-gateway", "uninstall"] {
            let path = deploy.join(overlay);
            let path = path.to_str().unwrap();
            self.kubectl(
                &["apply", "--server-side", "--dry-run=server", "-k", path],
                "",
            );
        }
        let base = deploy.join("base");
        let said = self.kubectl(
            &["apply", "--server-side", "-k", base.to_str().unwrap()],
            "",
        );
        assert!(
            said.lines().all(|l| l.ends_with("serverside-applied")),
            "{said}"
        );
        // Twice is once.
        self.kubectl(
            &["apply", "--server-side", "-k", base.to_str().unwrap()],
            "",
        );
        self.kubectl(
            &[
                "wait",
                "--for=condition=Established",
                "crd",
                "--all",
                "--timeout=60s",
            ],
            "",
        );
    }

    /// Everything that the program may ever write is to be done.
    fn much_to_do_for(&self, program: &str) {
        match program {
            // It writes nothing, and what it reads is always there.
            "kun-dns" => {}
            "kun-proxy" => {
                self.much_to_do();
                self.a_block_to_confirm();
            }
            _ => self.much_to_do(),
        }
    }

    /// Everything that the operator may ever write is to be done: a block to claim, one to hand over whose owner is gone, a Service
    /// without an address, a pool without a status, a node that gets nothing yet, no lease.
    fn much_to_do(&self) {
        // In one go each: this is done for each right, and a kubectl takes a fifth of a second to begin.
        let all = ["delete", "--all", "--wait=true"];
        // Nodes with their conditions.
        let words = ["ipamblocks,ippools,nodes,events"];
        self.kubectl(&[&all[..], &words].concat(), "");
        let words = ["delete", "--ignore-not-found", "--wait=true", "-f", "-"];
        let lease = |namespace: &str, name: &str| json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"namespace": namespace, "name": name}});
        let web = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "default", "name": "web"}});
        let gone = [
            web,
            lease(NAMESPACE, "kun-operator"),
            lease(NAMESPACE, "kun-watermark"),
            lease(NODE_LEASES, "node-a"),
        ];
        let list = json!({"apiVersion": "v1", "kind": "List", "items": gone});
        self.kubectl(&words, &list.to_string());
        self.kubectl(
            &["apply", "--server-side", "-f", "-"],
            "
apiVersion: kun.network/v1alpha1
kind: IPPool
metadata: {name: main}
spec: {pods: [240.0.0.0/25], services: {v4: [192.0.2.0/24]}}
---
apiVersion: kun.network/v1alpha1
kind: IPAMBlock
metadata: {name: block-240-0-0-0}
spec: {first: 240.0.0.0, node: ghost, nodeUID: 7a9b1c7e-0000-4000-8000-000000000001, epoch: 1}
---
apiVersion: v1
kind: Node
metadata: {name: node-a}
---
apiVersion: v1
kind: Node
metadata: {name: node-b}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: default}
spec: {type: LoadBalancer, ports: [{port: 80}]}
",
        );
    }

    /// A block that the node's agent has to confirm. The operator would have nothing to claim beside it.
    fn a_block_to_confirm(&self) {
        let node = self.get(&["node", "node-a"]);
        let uid = text(&node["metadata"]["uid"]);
        self.kubectl(
            &["apply", "--server-side", "-f", "-"],
            &format!("{{apiVersion: kun.network/v1alpha1, kind: IPAMBlock, metadata: {{name: block-240-0-0-64}}, spec: {{first: 240.0.0.64, node: node-a, nodeUID: {uid}}}}}"),
        );
    }

    fn everything_is_done(&self) -> bool {
        let blocks = self.get(&["ipamblocks"]);
        let handed = list(&blocks["items"]).any(|b| b["spec"]["epoch"] == 2);
        let web = self.get(&["service", "web"]);
        let events = self.get(&["events"]);
        let pool = self.get(&["ippool", "main"]);
        handed
            && list(&blocks["items"]).count() == 2
            && web["status"]["loadBalancer"]["ingress"].is_array()
            && list(&events["items"]).any(|e| e["reason"] == "NoFreeBlock")
            && pool["status"]["blocks"] == 2
    }

    fn start_program(&self, program: &str) -> Running<'_> {
        let path = |name: &str| self.dir.path().join(name);
        let (token, kubeconfig) = (path("token"), path("kubeconfig"));
        let hour = Duration::from_secs(3600);
        self.plane
            .write_token(NAMESPACE, program, hour, &token)
            .unwrap();
        self.plane.token_kubeconfig(&token, &kubeconfig).unwrap();
        // The cluster's own kun.yaml, with this machine's places.
        let own = fs::read_to_string(deploy().join("agent/kun.yaml")).unwrap();
        let found = own.contains("kubernetes: {}");
        assert!(found, "deploy/agent/kun.yaml: {own}");
        let own = own.replace(
            "kubernetes: {}",
            &format!("kubernetes: {{kubeconfig: {}}}", kubeconfig.display()),
        );
        let more = json!({
            "node": {"name": "node-a"},
            "proxy": {"cgroupRoot": self.cgroup.path(), "maxServices": 1024, "maxBackends": 1024, "maxSlots": 4096, "maxFlows": 4096},
            "agent": {"stateDir": path("state"), "socket": path("agent.sock"), "bpffsRoot": self.bpffs.path().join("kun")},
        });
        let mut text = own + "  cooldown: 1s\n";
        for (section, value) in more.as_object().unwrap() {
            text.push_str(&format!("{section}: {value}\n"));
        }
        fs::write(path("kun.yaml"), text).unwrap();
        let mut command = Command::new(programs().join(program));
        command.arg("--config").arg(path("kun.yaml"));
        if program == "kun-dns" {
            command
                .arg("--corefile")
                .arg(deploy().join("base/Corefile"));
        }
        let log = path(&format!("{program}.log"));
        command
            .env_remove("RUST_LOG")
            .stdout(Stdio::null())
            .stderr(File::create(&log).unwrap());
        Running {
            bench: self,
            _process: self.netns.spawn(command).unwrap(),
            log,
        }
    }

    /// What a program asked for so far, and what it was refused.
    fn asked(&self, program: &str) -> (BTreeSet<Right>, BTreeSet<Right>) {
        let log = fs::read_to_string(self.dir.path().join("audit.log")).unwrap_or_default();
        let (mut asked, mut refused) = (BTreeSet::new(), BTreeSet::new());
        for line in log.lines() {
            // The last line may be half written.
            let Ok(event) = serde_json::from_str::<Value>(line) else {
                continue;
            };
            if event["user"]["username"] != user(program) {
                continue;
            }
            let object = &event["objectRef"];
            let sub = object["subresource"].as_str().map(|s| format!("/{s}"));
            let right = Right {
                group: text(&object["apiGroup"]),
                resource: text(&object["resource"]) + &sub.unwrap_or_default(),
                verb: text(&event["verb"]),
            };
            if event["responseStatus"]["code"] == 403 {
                refused.insert(right.clone());
            }
            asked.insert(right);
        }
        (asked, refused)
    }

    /// The roles of an account, as the server has them.
    fn roles(&self, program: &str) -> Vec<Value> {
        let mut roles = vec![self.get(&["clusterrole", program])];
        if program != "kun-dns" {
            let namespaces = [NAMESPACE, NODE_LEASES];
            roles.extend(namespaces.map(|n| self.get(&["-n", n, "role", program])));
        }
        roles
    }

    /// What the server says that an account may do in the namespaces that are its business.
    fn may(&self, account: &str) -> BTreeSet<Right> {
        let namespaces = [NAMESPACE, NODE_LEASES];
        let rights = namespaces.map(|namespace| self.may_in(account, namespace));
        rights.into_iter().flatten().collect()
    }

    fn may_in(&self, account: &str, namespace: &str) -> BTreeSet<Right> {
        let review =
            json!({"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectRulesReview",
            "spec": {"namespace": namespace}})
            .to_string();
        let words = [
            "create",
            "--validate=false",
            "-f",
            "-",
            "-o",
            "json",
            "--as",
            account,
            "--as-group",
            "system:authenticated",
        ];
        let answer: Value = serde_json::from_str(&self.kubectl(&words, &review)).unwrap();
        rights(&answer["status"]["resourceRules"])
    }

    /// The role without one right.
    fn take_away(&self, role: &Value, right: &Right) {
        let mut rules = Vec::new();
        for rule in list(&role["rules"]) {
            // One rule for each resource, so that nothing else goes with it.
            for resource in list(&rule["resources"]) {
                let mut rule = rule.clone();
                rule["resources"] = json!([resource]);
                let here =
                    text(&rule["apiGroups"][0]) == right.group && *resource == right.resource;
                let verbs = list(&rule["verbs"]).filter(|v| !here || **v != right.verb);
                rule["verbs"] = json!(verbs.cloned().collect::<Vec<_>>());
                if list(&rule["verbs"]).next().is_some() {
                    rules.push(rule);
                }
            }
        }
        self.put_rules(role, &json!(rules));
    }

    fn put_rules(&self, role: &Value, rules: &Value) {
        let kind = text(&role["kind"]).to_lowercase();
        let patch = json!({"rules": rules}).to_string();
        let name = text(&role["metadata"]["name"]);
        let namespace = role["metadata"]["namespace"].as_str();
        let words = [
            "-n",
            namespace.unwrap_or(NAMESPACE),
            "patch",
            &kind,
            &name,
            "--type=merge",
            "-p",
            &patch,
        ];
        self.kubectl(&words, "");
    }
}

fn user(program: &str) -> String {
    format!("system:serviceaccount:{NAMESPACE}:{program}")
}

/// A program at work; killed when it drops.
struct Running<'b> {
    bench: &'b Bench,
    _process: Process,
    log: PathBuf,
}

impl Running<'_> {
    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    fn is_ready(&self, port: u16, path: &str) -> bool {
        self.bench.netns.run(|| {
            let mut answer = String::new();
            TcpStream::connect((Ipv6Addr::LOCALHOST, port)).is_ok_and(|mut probe| {
                write!(probe, "GET {path} HTTP/1.1\r\n\r\n").is_ok()
                    && probe.read_to_string(&mut answer).is_ok()
                    && answer.starts_with("HTTP/1.1 200")
            })
        })
    }
}

#[test]
fn each_program_may_do_what_it_asks_and_nothing_else() {
    let Some(bench) = Bench::start() else {
        return;
    };
    bench.apply_whole();
    let nobody = bench.may(&format!("system:serviceaccount:{NAMESPACE}:nobody"));
    for (program, port, path) in PROGRAMS {
        let roles = bench.roles(program);
        let granted: BTreeSet<Right> = roles.iter().flat_map(|r| rights(&r["rules"])).collect();
        let may: BTreeSet<Right> = bench
            .may(&user(program))
            .difference(&nobody)
            .cloned()
            .collect();
        assert_eq!(may, granted, "{program}: more is bound to its account");

        bench.much_to_do_for(program);
        {
            let running = bench.start_program(program);
            wait_for(&format!("{program}: ready"), SOON, || {
                running.is_ready(port, path).then_some(())
            })
            .unwrap_or_else(|e| panic!("{e:#}\n{}", running.log()));
            let all_done = || {
                let (asked, refused) = bench.asked(program);
                assert_eq!(refused, BTreeSet::new(), "{program}: refused");
                let unused: Vec<String> =
                    granted.difference(&asked).map(Right::to_string).collect();
                let work = program != "kun-operator" || bench.everything_is_done();
                (unused.is_empty() && work).then_some(())
            };
            wait_for(&format!("{program}: every right used"), SOON, all_done).unwrap_or_else(|e| {
                let (asked, _) = bench.asked(program);
                let unused: Vec<String> =
                    granted.difference(&asked).map(Right::to_string).collect();
                panic!("{e:#}: never asked for {unused:?}\n{}", running.log())
            });
            let (asked, _) = bench.asked(program);
            assert_eq!(asked, granted, "{program}");
        }
        for role in &roles {
            for right in rights(&role["rules"]) {
                bench.much_to_do_for(program);
                bench.take_away(role, &right);
                let running = bench.start_program(program);
                let says = format!("no right to {right}");
                wait_for(&format!("{program} says: {says}"), SOON, || {
                    running.log().contains(&says).then_some(())
                })
                .unwrap_or_else(|e| panic!("{e:#}\n{}", running.log()));
                drop(running);
                bench.put_rules(role, &role["rules"]);
            }
        }
    }
}
