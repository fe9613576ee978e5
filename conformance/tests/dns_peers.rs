//! The DNS suite against unbound and against CoreDNS, over nsd: what it asks for is what established resolvers do, and where they differ
//! is listed.

#![allow(missing_docs)]

use std::fs;
use std::net::{Ipv6Addr, SocketAddr, UdpSocket};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::RecordType;
use kun_conformance::dns::{self, CASES, PREF64, Subject};
use kun_harness::{Process, peers, require_tool, wait_for};

/// unbound has no exclusion set, keeps the A record's TTL, and forwards ipv4only.arpa.
const UNBOUND: [&str; 4] = [
    "the_ttl_is_at_most_the_soas",
    "excluded_aaaa_counts_as_absent",
    "excluded_aaaa_is_left_out_of_a_mixed_set",
    "ipv4only_arpa_tells_the_prefix",
];

/// CoreDNS's dns64 has no exclusion set, no reverse names, no ipv4only.arpa, and synthesises for validators as well.
const COREDNS: [&str; 5] = [
    "excluded_aaaa_counts_as_absent",
    "excluded_aaaa_is_left_out_of_a_mixed_set",
    "the_reverse_name_leads_to_in_addr_arpa",
    "cd_with_do_never_synthesises",
    "ipv4only_arpa_tells_the_prefix",
];

fn start(program: &Path, arguments: &[&str], dir: &Path, port: u16, conf: &str) -> Process {
    let name = program.file_name().unwrap().to_string_lossy();
    let file = dir.join(format!("{name}.conf"));
    fs::write(&file, conf).unwrap();
    let process = Process::spawn(
        Command::new(program)
            .args(arguments)
            .arg(file)
            .stdout(Stdio::null())
            .stderr(Stdio::null()),
    )
    .unwrap();
    wait_for(&name, Duration::from_secs(20), || {
        let m = at(port).ask("v4.example.test.", RecordType::A).ok()?;
        (m.metadata.response_code == ResponseCode::NoError).then_some(())
    })
    .unwrap();
    process
}

fn at(port: u16) -> Subject {
    Subject {
        server: SocketAddr::new(Ipv6Addr::LOCALHOST.into(), port),
    }
}

fn port() -> u16 {
    let socket = UdpSocket::bind((Ipv6Addr::LOCALHOST, 0)).unwrap();
    socket.local_addr().unwrap().port()
}

/// nsd with the suite's zones, and its port.
fn nsd(dir: &Path) -> (Process, u16) {
    let zone = format!("{}{}", dns::ZONE, dns::many_addresses());
    fs::write(dir.join("zone"), zone).unwrap();
    fs::write(dir.join("reverse"), dns::REVERSE_ZONE).unwrap();
    let (port, d) = (port(), dir.display());
    let conf = format!(
        "server:\n ip-address: ::1@{port}\n username: \"\"\n zonesdir: \"{d}\"\n pidfile: \"\"\n database: \"\"\n xfrdfile: \"{d}/xfrd\"\n \
         zonelistfile: \"{d}/zl\"\nremote-control:\n control-enable: no\n\
         zone:\n name: example.test\n zonefile: zone\nzone:\n name: 100.51.198.in-addr.arpa\n zonefile: reverse\n"
    );
    let nsd = start(Path::new("nsd"), &["-d", "-c"], dir, port, &conf);
    (nsd, port)
}

/// What fails is what is listed, neither more nor less.
fn deviates(subject: &Subject, known: &[&str]) {
    let failed = CASES
        .iter()
        .filter_map(|c| Some((c.name, c.run(subject).err()?)));
    let failed: Vec<String> = failed.map(|(name, e)| format!("{name}: {e:#}")).collect();
    let names: Vec<&str> = failed.iter().filter_map(|f| f.split(':').next()).collect();
    let unknown: Vec<&String> = failed
        .iter()
        .zip(&names)
        .filter(|(_, n)| !known.contains(n))
        .map(|(f, _)| f)
        .collect();
    assert!(unknown.is_empty(), "{unknown:#?}");
    let mended: Vec<&&str> = known.iter().filter(|d| !names.contains(d)).collect();
    assert!(mended.is_empty(), "no deviation any more: {mended:?}");
}

#[test]
fn unbound_over_nsd() {
    if !require_tool("nsd") || !require_tool("unbound") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (_nsd, upstream) = nsd(dir.path());
    let (own, d) = (port(), dir.path().display());
    let conf = format!(
        "server:\n interface: ::1@{own}\n do-daemonize: no\n username: \"\"\n chroot: \"\"\n pidfile: \"\"\n directory: \"{d}\"\n use-syslog: no\n \
         do-not-query-localhost: no\n module-config: \"dns64 iterator\"\n dns64-prefix: {PREF64}\n num-threads: 1\n \
         local-zone: test nodefault\n local-zone: 100.51.198.in-addr.arpa nodefault\n local-zone: 8.b.d.0.1.0.0.2.ip6.arpa nodefault\nremote-control:\n control-enable: no\n\
         stub-zone:\n name: example.test\n stub-addr: ::1@{upstream}\nstub-zone:\n name: 100.51.198.in-addr.arpa\n stub-addr: ::1@{upstream}\n"
    );
    let _unbound = start(Path::new("unbound"), &["-d", "-c"], dir.path(), own, &conf);
    deviates(&at(own), &UNBOUND);
}

#[test]
fn coredns_over_nsd() {
    if !require_tool("nsd") {
        return;
    }
    let Some(coredns) = peers::require("coredns") else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let (_nsd, upstream) = nsd(dir.path());
    let own = port();
    let corefile = format!(
        ".:{own} {{\n bind ::1\n cache\n dns64 {{\n prefix {PREF64}\n }}\n forward . [::1]:{upstream}\n}}\n"
    );
    let _coredns = start(&coredns, &["-conf"], dir.path(), own, &corefile);
    deviates(&at(own), &COREDNS);
}
