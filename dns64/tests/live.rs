//! The program itself on loopback: Debian's nsd behind it, Debian's unbound and a current CoreDNS beside it.

#![allow(missing_docs)]

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::RecordType;
use kun_conformance::dns::{self, CASES, NAMES, PREF64, Subject};
use kun_harness::{Process, peers, require_tool, wait_for};
use rustix::process::Signal;
use tempfile::TempDir;

const UP: Duration = Duration::from_secs(20);

/// A port that is free for UDP and TCP on ::1 right now.
fn port() -> u16 {
    loop {
        let tcp = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).unwrap();
        let port = tcp.local_addr().unwrap().port();
        if UdpSocket::bind((Ipv6Addr::LOCALHOST, port)).is_ok() {
            return port;
        }
    }
}

fn at(port: u16) -> Subject {
    Subject {
        server: SocketAddr::new(Ipv6Addr::LOCALHOST.into(), port),
    }
}

fn quiet(command: &mut Command) -> Process {
    Process::spawn(command.stdout(Stdio::null()).stderr(Stdio::null())).unwrap()
}

fn answers(subject: Subject, name: &str, t: RecordType) {
    wait_for("a server to answer", UP, || {
        let m = subject.ask(name, t).ok()?;
        (m.metadata.response_code != ResponseCode::ServFail).then_some(())
    })
    .unwrap();
}

fn nsd(dir: &Path) -> (Process, u16) {
    let port = port();
    let zone = format!("{}{}", dns::ZONE, dns::many_addresses());
    fs::write(dir.join("zone"), zone).unwrap();
    fs::write(dir.join("reverse"), dns::REVERSE_ZONE).unwrap();
    let d = dir.display();
    let conf = format!(
        "server:\n ip-address: ::1@{port}\n username: \"\"\n zonesdir: \"{d}\"\n pidfile: \"\"\n database: \"\"\n xfrdfile: \"{d}/xfrd\"\n zonelistfile: \"{d}/zl\"\n\
         remote-control:\n control-enable: no\n\
         zone:\n name: example.test\n zonefile: zone\nzone:\n name: 100.51.198.in-addr.arpa\n zonefile: reverse\n"
    );
    fs::write(dir.join("nsd.conf"), conf).unwrap();
    let p = quiet(
        Command::new("nsd")
            .args(["-d", "-c"])
            .arg(dir.join("nsd.conf")),
    );
    answers(at(port), "v4.example.test.", RecordType::A);
    (p, port)
}

fn unbound(dir: &Path, upstream: u16) -> (Process, u16) {
    let port = port();
    let stub = |zone| format!("stub-zone:\n name: {zone}\n stub-addr: ::1@{upstream}\n");
    let conf = format!(
        "server:\n interface: ::1@{port}\n do-daemonize: no\n username: \"\"\n chroot: \"\"\n pidfile: \"\"\n directory: \"{}\"\n use-syslog: no\n \
         do-not-query-localhost: no\n module-config: \"dns64 iterator\"\n dns64-prefix: {PREF64}\n local-zone: 100.51.198.in-addr.arpa nodefault\n local-zone: test nodefault\n num-threads: 1\n\
         remote-control:\n control-enable: no\n{}{}",
        dir.display(),
        stub("example.test"),
        stub("100.51.198.in-addr.arpa")
    );
    fs::write(dir.join("unbound.conf"), conf).unwrap();
    let p = quiet(
        Command::new("unbound")
            .args(["-d", "-c"])
            .arg(dir.join("unbound.conf")),
    );
    answers(at(port), "v4.example.test.", RecordType::A);
    (p, port)
}

struct KunDns {
    process: Process,
    dir: PathBuf,
}

impl KunDns {
    fn command(dir: &Path) -> Command {
        fs::create_dir_all(dir.join("manifests")).unwrap();
        let config = format!(
            "node: {{name: n1}}\ncluster: {{folder: {d}/manifests}}\nipam: {{podPrefix: \"2001:db8:1::/96\"}}\ndns: {{corefile: {d}/Corefile, metrics: \"off\"}}\n",
            d = dir.display()
        );
        fs::write(dir.join("kun.yaml"), config).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_kun-dns"));
        command.arg("--config").arg(dir.join("kun.yaml"));
        command
    }

    fn start(dir: &Path, corefile: &str) -> Self {
        let mut command = Self::command(dir);
        fs::write(dir.join("Corefile"), corefile).unwrap();
        command.stderr(fs::File::create(dir.join("log")).unwrap());
        Self {
            process: Process::spawn(&mut command).unwrap(),
            dir: dir.to_owned(),
        }
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.join("log")).unwrap()
    }

    fn wait_log(&self, text: &str) {
        let seen = wait_for(text, UP, || self.log().contains(text).then_some(()));
        seen.unwrap_or_else(|e| panic!("{e}: {}", self.log()));
    }
}

#[test]
fn metrics_are_served_where_kun_yaml_says_unless_the_corefile_does() {
    let (own, metrics) = (port(), port());
    let dir = tempfile::tempdir().unwrap();
    let mut command = KunDns::command(dir.path());
    let config = dir.path().join("kun.yaml");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(
        &config,
        text.replace("\"off\"", &format!("\"[::1]:{metrics}\"")),
    )
    .unwrap();
    let corefile = dir.path().join("Corefile");
    fs::write(&corefile, format!(".:{own} {{\nbind ::1\nerrors\n}}\n")).unwrap();
    let _server = quiet(&mut command);
    let said = wait_for("metrics", UP, || get(metrics, "/metrics")).unwrap();
    assert!(said.contains("\ncoredns_"), "{said}");
    for path in ["/healthz", "/readyz"] {
        let said = get(metrics, path).unwrap();
        assert!(said.starts_with("HTTP/1.1 200"), "{path}: {said}");
    }
}

fn corefile(port: u16, upstream: u16) -> String {
    format!(
        ".:{port} {{\nbind ::1\nerrors\ncache\ndns64 {PREF64}\nforward . [::1]:{upstream} {{\nhealth_check 200ms domain example.test\n}}\n}}\n"
    )
}

#[test]
fn the_suite_holds_over_nsd() {
    if !require_tool("nsd") {
        return;
    }
    let dir = TempDir::new().unwrap();
    let (_nsd, upstream) = nsd(dir.path());
    let own = port();
    let kun = KunDns::start(dir.path(), &corefile(own, upstream));
    kun.wait_log("listening");
    // Twice: from upstream, then from the cache.
    for round in 0..2 {
        for case in CASES {
            if let Err(e) = case.run(&at(own)) {
                panic!("{} (round {round}): {e:#}\n{}", case.name, kun.log());
            }
        }
    }
}

#[test]
fn it_says_what_unbounds_dns64_says() {
    if !require_tool("nsd") || !require_tool("unbound") {
        return;
    }
    let dir = TempDir::new().unwrap();
    let (_nsd, upstream) = nsd(dir.path());
    let (_unbound, peer) = unbound(dir.path(), upstream);
    let own = port();
    let kun = KunDns::start(dir.path(), &corefile(own, upstream));
    kun.wait_log("listening");
    agree(at(own), at(peer), "unbound");
}

#[test]
fn it_says_what_coredns_says_of_the_same_corefile() {
    if !require_tool("nsd") {
        return;
    }
    let Some(coredns) = peers::require("coredns") else {
        return;
    };
    let dir = TempDir::new().unwrap();
    let (_nsd, upstream) = nsd(dir.path());
    let (own, peer) = (port(), port());
    let file = dir.path().join("Corefile.peer");
    fs::write(&file, corefile(peer, upstream)).unwrap();
    let _coredns = quiet(Command::new(coredns).arg("-conf").arg(file));
    answers(at(peer), "v4.example.test.", RecordType::A);
    let kun = KunDns::start(dir.path(), &corefile(own, upstream));
    kun.wait_log("listening");
    agree(at(own), at(peer), "CoreDNS");
}

/// Two servers of the same zone and prefix give the same answers.
fn agree(own: Subject, peer: Subject, peer_name: &str) {
    for name in NAMES {
        let dot = if name.is_empty() { "" } else { "." };
        let name = format!("{name}{dot}example.test.");
        for t in [
            RecordType::A,
            RecordType::AAAA,
            RecordType::TXT,
            RecordType::SOA,
            RecordType::CNAME,
        ] {
            let texts = |s: Subject| {
                let m = &s.tcp(&[dns::question(&name, t)]).unwrap()[0];
                let record = |r: &hickory_proto::rr::Record| {
                    format!("{} {} {}", r.name, r.record_type(), r.data)
                };
                let mut all: Vec<String> = m.answers.iter().map(record).collect();
                all.sort();
                (m.metadata.response_code, all)
            };
            assert_eq!(
                texts(own),
                texts(peer),
                "{name} {t}: kun-dns, then {peer_name}"
            );
        }
    }
}

#[test]
fn a_dead_upstream_is_servfail_and_comes_back() {
    if !require_tool("nsd") {
        return;
    }
    let dir = TempDir::new().unwrap();
    let (nsd_process, upstream) = nsd(dir.path());
    drop(nsd_process);
    let own = port();
    let without_cache = corefile(own, upstream).replace("cache\n", "");
    let kun = KunDns::start(dir.path(), &without_cache);
    kun.wait_log("listening");
    let m = at(own).ask("v4.example.test.", RecordType::A).unwrap();
    assert_eq!(m.metadata.response_code, ResponseCode::ServFail);
    kun.wait_log("plugin/errors: 2 v4.example.test. A: [::1]:");
    let conf = dir.path().join("nsd.conf");
    let _nsd = quiet(Command::new("nsd").args(["-d", "-c"]).arg(conf));
    answers(at(own), "v4.example.test.", RecordType::A);
}

#[test]
fn manifests_are_followed_and_ready_says_so() {
    let dir = TempDir::new().unwrap();
    let (own, ready, health) = (port(), port(), port());
    let kun = KunDns::start(
        dir.path(),
        &format!(
            ".:{own} {{\nready [::1]:{ready}\nhealth [::1]:{health}\nprometheus [::1]:{health}\nkubernetes cluster.local\nlog\n}}\n"
        ),
    );
    wait_for("ready", UP, || {
        get(ready, "/ready").filter(|a| a.starts_with("HTTP/1.1 200"))
    })
    .unwrap();
    let web = "web.shop.svc.cluster.local.";
    let before = at(own).ask(web, RecordType::A).unwrap();
    assert_eq!(before.metadata.response_code, ResponseCode::NXDomain);
    let manifest = "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: shop}\n\
                    spec: {clusterIP: 10.96.0.20, clusterIPs: [10.96.0.20], ports: [{port: 80}]}\n";
    fs::write(dir.path().join("manifests/web.yaml"), manifest).unwrap();
    let m = wait_for("the new service", UP, || {
        let m = at(own).ask(web, RecordType::A).ok()?;
        (!m.answers.is_empty()).then_some(m)
    })
    .unwrap();
    assert_eq!(m.answers[0].data.to_string(), "10.96.0.20");
    // Over IPv4 too: the wildcard socket serves both families, and answers from where it was asked.
    let v4 = Subject {
        server: SocketAddr::new([127, 0, 0, 2].into(), own),
    };
    assert_eq!(v4.ask(web, RecordType::A).unwrap().answers.len(), 1);
    assert!(get(health, "/health").unwrap().ends_with("OK"));
    let metrics = get(health, "/metrics").unwrap();
    assert!(metrics.contains("coredns_dns_responses_total{rcode=\"NXDOMAIN\"}"));
    assert!(get(ready, "/metrics").unwrap().starts_with("HTTP/1.1 404"));
    kun.wait_log("\"A IN web.shop.svc.cluster.local. udp 44 false 512\" NOERROR qr,aa,rd 60");
}

fn get(port: u16, path: &str) -> Option<String> {
    let mut stream = TcpStream::connect((Ipv6Addr::LOCALHOST, port)).ok()?;
    stream.set_read_timeout(Some(UP)).ok()?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    Some(text)
}

#[test]
fn reload_takes_what_is_good_and_refuses_what_is_broken() {
    let dir = TempDir::new().unwrap();
    let (own, second) = (port(), port());
    let code = |port: u16, name: &str| {
        let m = at(port).ask(name, RecordType::A).ok()?;
        Some(m.metadata.response_code)
    };
    let mut kun = KunDns::start(dir.path(), &format!("one.test:{own} {{\nwhoami\n}}\n"));
    kun.wait_log("listening");
    assert_eq!(code(own, "one.test."), Some(ResponseCode::NoError));
    assert_eq!(code(own, "two.test."), Some(ResponseCode::Refused));
    let write = |text: &str| fs::write(dir.path().join("Corefile"), text).unwrap();
    write(&format!("one.test:{own} {{\nwhoamy\n}}\n"));
    kun.process.signal(Signal::HUP).unwrap();
    kun.wait_log("reload refused, the old configuration stays");
    kun.wait_log("Corefile:2:1: unknown plugin \"whoamy\"; did you mean \"whoami\"?");
    assert_eq!(code(own, "one.test."), Some(ResponseCode::NoError));
    write(&format!(
        "two.test:{own} two.test:{second} {{\nwhoami\nhealth [::1]:{} {{\nlameduck 300ms\n}}\n}}\n",
        port()
    ));
    kun.process.signal(Signal::USR1).unwrap();
    wait_for("the new zone", UP, || {
        (code(second, "two.test.") == Some(ResponseCode::NoError)).then_some(())
    })
    .unwrap();
    assert_eq!(code(own, "two.test."), Some(ResponseCode::NoError));
    assert_eq!(code(own, "one.test."), Some(ResponseCode::Refused));
    // SIGTERM: still answering for the lameduck time, then gone with status 0.
    kun.process.signal(Signal::TERM).unwrap();
    kun.wait_log("still answering");
    assert_eq!(code(own, "two.test."), Some(ResponseCode::NoError));
    let status = wait_for("the end", UP, || kun.process.try_wait().unwrap()).unwrap();
    assert!(status.success(), "{status}");
}

#[test]
fn the_reload_plugin_looks_by_itself() {
    let dir = TempDir::new().unwrap();
    let own = port();
    let text = |zone: &str| format!("{zone}:{own} {{\nwhoami\nreload 2s 1s\n}}\n");
    let kun = KunDns::start(dir.path(), &text("one.test"));
    kun.wait_log("listening");
    fs::write(dir.path().join("Corefile"), text("two.test")).unwrap();
    kun.wait_log("reloaded");
    let m = at(own).ask("two.test.", RecordType::A).unwrap();
    assert_eq!(m.metadata.response_code, ResponseCode::NoError);
}

#[test]
fn a_taken_address_is_one_line_with_a_name() {
    let dir = TempDir::new().unwrap();
    let own = port();
    let _holder = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, own)).unwrap();
    let mut command = KunDns::command(dir.path());
    fs::write(
        dir.path().join("Corefile"),
        format!(".:{own} {{\nwhoami\n}}\n"),
    )
    .unwrap();
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(error.lines().count(), 1, "{error}");
    let head = format!("kun-dns: [::]:{own}/udp: taken by ");
    let pid = format!("(pid {})", std::process::id());
    assert!(error.starts_with(&head) && error.contains(&pid), "{error}");
}

#[test]
fn a_forwarding_loop_ends_it() {
    let dir = TempDir::new().unwrap();
    let own = port();
    let text = format!(".:{own} {{\nbind ::1\nloop\nforward . [::1]:{own}\n}}\n");
    let mut kun = KunDns::start(dir.path(), &text);
    let status = wait_for("the end", UP, || kun.process.try_wait().unwrap()).unwrap();
    assert_eq!(status.code(), Some(1));
    assert!(
        kun.log().contains("kun-dns: loop: queries come back"),
        "{}",
        kun.log()
    );
}

#[test]
fn check_config_and_explain() {
    let dir = TempDir::new().unwrap();
    let run = |corefile: &str, flag: &str| {
        let mut command = KunDns::command(dir.path());
        fs::write(dir.path().join("Corefile"), corefile).unwrap();
        let output = command.arg(flag).output().unwrap();
        let text = |octets| String::from_utf8(octets).unwrap();
        (
            output.status.code(),
            text(output.stdout),
            text(output.stderr),
        )
    };
    let (code, out, _) = run(". {\nwhoami\n}", "--check-config");
    assert_eq!((code, out.as_str()), (Some(0), "ok\n"));
    let (code, out, err) = run(". {\nany\n}", "--check-config");
    assert_eq!((code, out.as_str()), (Some(1), ""));
    assert!(
        err.ends_with("Corefile:2:1: any: known CoreDNS plugin, not supported yet; remove it\n"),
        "{err}"
    );
    let (_, out, _) = run(". {\nwhoami\ncache\nerrors\n}", "--explain");
    let names: Vec<&str> = out
        .lines()
        .skip(2)
        .filter_map(|l| l.split_whitespace().nth(1))
        .collect();
    assert_eq!(names, ["errors", "cache", "whoami"]);
}
