//! The program as scripts see it: exit codes, what goes to stdout, and what it asks the agent.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Output};
use std::thread::JoinHandle;

use kun_control::{Fact, Request, Response, Status, WhyStep};

/// Answers one request on `socket` and gives it back.
fn agent(socket: &Path, answer: Response) -> JoinHandle<Request> {
    let listener = UnixListener::bind(socket).expect("a socket");
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a caller");
        let mut line = String::new();
        BufReader::new(&stream)
            .read_line(&mut line)
            .expect("a request");
        let answer = serde_json::to_string(&answer).expect("an answer");
        writeln!(stream, "{answer}").expect("written");
        serde_json::from_str(&line).expect("a request of ours")
    })
}

fn kunctl(words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_kunctl"))
        .args(words)
        .output()
        .expect("runs")
}

fn status(ok: bool) -> Response {
    let fact = Fact {
        name: "synced".to_owned(),
        value: "yes".to_owned(),
        ok,
    };
    Response::Status {
        status: Status {
            cluster: vec![fact],
            ..Status::default()
        },
    }
}

#[test]
fn status_is_0_when_well_and_1_when_not() {
    for (ok, code) in [(true, 0), (false, 1)] {
        let dir = tempfile::tempdir().expect("a directory");
        let socket = dir.path().join("agent.sock");
        let agent = agent(&socket, status(ok));
        let output = kunctl(&["status", "--socket", &socket.to_string_lossy()]);
        assert_eq!(output.status.code(), Some(code), "{output:?}");
        assert_eq!(agent.join().expect("answered"), Request::Status);
    }
}

#[test]
fn json_is_the_answer_as_it_came() {
    let dir = tempfile::tempdir().expect("a directory");
    let socket = dir.path().join("agent.sock");
    let agent = agent(&socket, status(true));
    let output = kunctl(&[
        "--output",
        "json",
        "--socket",
        &socket.to_string_lossy(),
        "status",
    ]);
    agent.join().expect("answered");
    assert_eq!(
        serde_json::from_slice::<Response>(&output.stdout).expect("JSON"),
        status(true)
    );
}

#[test]
fn why_asks_what_it_was_asked() {
    let dir = tempfile::tempdir().expect("a directory");
    let socket = dir.path().join("agent.sock");
    let steps = vec![WhyStep {
        what: "drop".to_owned(),
        object: "default/web:http".to_owned(),
        detail: "no ready endpoint".to_owned(),
        source: None,
    }];
    let agent = agent(&socket, Response::Why { steps });
    let output = kunctl(&[
        "--socket",
        &socket.to_string_lossy(),
        "why",
        "udp",
        "fd00::9",
        "[fd00::1]:53",
    ]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let asked = agent.join().expect("answered");
    let want = Request::Why {
        protocol: "udp".to_owned(),
        source: "fd00::9".parse().ok(),
        destination: "fd00::1".parse().expect("an address"),
        port: 53,
    };
    assert_eq!(asked, want);
    assert!(
        String::from_utf8_lossy(&output.stdout).starts_with("udp fd00::9 → [fd00::1]:53\n"),
        "{output:?}"
    );
}

#[test]
fn a_refusal_is_1_and_its_reason_is_told() {
    let dir = tempfile::tempdir().expect("a directory");
    let socket = dir.path().join("agent.sock");
    let message = "not synced yet".to_owned();
    let agent = agent(&socket, Response::Failed { message });
    let output = kunctl(&["ipam", "--socket", &socket.to_string_lossy()]);
    agent.join().expect("answered");
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(
        String::from_utf8_lossy(&output.stderr),
        "kunctl: not synced yet\n"
    );
}

#[test]
fn usage_is_2_and_no_agent_is_3() {
    let none = ["--socket", "/nonexistent/agent.sock"];
    assert_eq!(kunctl(&["nonsense"]).status.code(), Some(2));
    assert_eq!(kunctl(&["why", "icmp", "::1", "1"]).status.code(), Some(2));
    assert_eq!(
        kunctl(&[&none[..], &["why", "tcp", "::1"]].concat())
            .status
            .code(),
        Some(2)
    );
    assert_eq!(
        kunctl(&["--config", "/nonexistent/kun.yaml", "status"])
            .status
            .code(),
        Some(2)
    );
    let output = kunctl(&[&none[..], &["status"]].concat());
    assert_eq!(output.status.code(), Some(3));
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        told.starts_with("kunctl: /nonexistent/agent.sock: no agent answers there"),
        "{told}"
    );
}

/// Where the plugin works alone nobody answers, and its errors name `kunctl ipam` all the same.
#[test]
fn without_an_agent_ipam_is_what_the_store_holds() {
    let dir = tempfile::tempdir().expect("a directory");
    let (path, state) = (dir.path().join("kun.yaml"), dir.path().join("state"));
    let text = format!(
        "node: {{name: n}}\nipam: {{v4Pools: [10.64.0.0/16]}}\nagent: {{stateDir: {}, socket: {}}}\n",
        state.display(),
        dir.path().join("agent.sock").display()
    );
    std::fs::write(&path, &text).expect("written");
    let shown = || kunctl(&["ipam", "--config", &path.to_string_lossy()]);
    assert_eq!(shown().status.code(), Some(3), "nothing holds anything");
    assert!(!state.exists(), "and nothing is made");

    let config = kun_config::parse("kun.yaml", &text).expect("right");
    let (boot, now) = (kun_cni::clock::boot().expect("one"), kun_cni::clock::now());
    let service = kun_cni::ipam::IpamService::open(&state, &config, boot, now).expect("opens");
    let block = kun_config::types::BlockId::new(std::net::Ipv4Addr::new(10, 64, 0, 64).into());
    service
        .set_blocks(&[block.expect("aligned")], now)
        .expect("stored");
    drop(service);
    let output = shown();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(told.contains("10.64.0.64/26"), "{told}");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("no agent answers"), "{said}");
}
