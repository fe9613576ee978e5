//! The lines on the wire, byte for byte in both directions, and what the client makes of an agent that misbehaves.

use std::io::{BufRead, BufReader, Write};
use std::net::Ipv4Addr;
use std::num::{NonZeroU16, NonZeroU64};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use kun_config::types::{BlockId, Slot, SlotClass};
use kun_control::{
    Allocation, AttachmentKey, Bandwidth, BgpSession, BlockRow, ClientError, Exhausted, Fact,
    Holder, MAX_LINE, PodRef, PoolRow, PortMapping, RateLimit, Request, Response, SlotRange,
    SlotRow, Status, Traffic, Transport, Unavailable, WhyStep, ask,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

fn key() -> AttachmentKey {
    AttachmentKey {
        network: "kun".to_owned(),
        container_id: "c1".to_owned(),
        ifname: "eth0".to_owned(),
    }
}

fn pod() -> PodRef {
    PodRef {
        namespace: "shop".to_owned(),
        name: "web-1".to_owned(),
        uid: "u".to_owned(),
    }
}

fn golden<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(value: &T, line: &str) {
    assert_eq!(serde_json::to_string(value).expect("JSON"), line);
    assert_eq!(serde_json::from_str::<T>(line).expect("ours"), *value);
}

const KEY: &str = r#"{"network":"kun","containerId":"c1","ifname":"eth0"}"#;
const POD: &str = r#"{"namespace":"shop","name":"web-1","uid":"u"}"#;

#[test]
fn requests() {
    let class = Some(SlotClass::V6Only);
    golden(
        &Request::Allocate {
            key: key(),
            pod: pod(),
            class,
            slot: None,
            within: Vec::new(),
            delegated: false,
            ports: Vec::new(),
        },
        &format!(r#"{{"op":"allocate","key":{KEY},"pod":{POD},"class":"v6-only"}}"#),
    );
    golden(
        &Request::Attached {
            key: key(),
            host_interfaces: vec!["kun0a".to_owned()],
            traffic: Traffic::default(),
        },
        &format!(r#"{{"op":"attached","key":{KEY},"host_interfaces":["kun0a"]}}"#),
    );
    golden(
        &Request::Allocate {
            key: key(),
            pod: pod(),
            class: None,
            slot: Some(Slot(0x0a40_0001)),
            within: vec![SlotRange {
                first: Slot(1),
                last: Slot(2),
            }],
            delegated: true,
            ports: vec![PortMapping {
                host_port: NonZeroU16::MIN,
                container_port: NonZeroU16::MAX,
                protocol: Transport::Tcp,
                host_ip: None,
            }],
        },
        &format!(
            r#"{{"op":"allocate","key":{KEY},"pod":{POD},"class":null,"slot":171966465,"within":[{{"first":1,"last":2}}],"delegated":true,"ports":[{{"hostPort":1,"containerPort":65535,"protocol":"tcp","hostIp":null}}]}}"#
        ),
    );
    let traffic = Traffic {
        bandwidth: Bandwidth {
            ingress: Some(RateLimit {
                rate: NonZeroU64::MIN,
                burst: None,
            }),
            egress: None,
        },
        port_mappings: vec![PortMapping {
            host_port: NonZeroU16::MIN,
            container_port: NonZeroU16::MAX,
            protocol: Transport::Udp,
            host_ip: "::".parse().ok(),
        }],
    };
    const TRAFFIC: &str = r#"{"bandwidth":{"ingress":{"rate":1,"burst":null},"egress":null},"portMappings":[{"hostPort":1,"containerPort":65535,"protocol":"udp","hostIp":"::"}]}"#;
    golden(
        &Request::Attached {
            key: key(),
            host_interfaces: vec![],
            traffic: traffic.clone(),
        },
        &format!(r#"{{"op":"attached","key":{KEY},"host_interfaces":[],"traffic":{TRAFFIC}}}"#),
    );
    golden(
        &Request::Verify {
            key: key(),
            host_interfaces: vec![],
            traffic,
        },
        &format!(r#"{{"op":"verify","key":{KEY},"host_interfaces":[],"traffic":{TRAFFIC}}}"#),
    );
    golden(
        &Request::Class {
            namespace: "shop".into(),
        },
        r#"{"op":"class","namespace":"shop"}"#,
    );
    golden(
        &Request::Capacity { class: None },
        r#"{"op":"capacity","class":null}"#,
    );
    for (generation, told) in [(None, "null"), (Some(3), "3")] {
        let release = Request::Release {
            key: key(),
            generation,
        };
        golden(
            &release,
            &format!(r#"{{"op":"release","key":{KEY},"generation":{told}}}"#),
        );
    }
    golden(
        &Request::Lookup { key: key() },
        &format!(r#"{{"op":"lookup","key":{KEY}}}"#),
    );
    golden(&Request::Status, r#"{"op":"status"}"#);
    golden(&Request::Ipam, r#"{"op":"ipam"}"#);
    golden(
        &Request::Free {
            slot: Slot(1),
            generation: 2,
            forced: false,
        },
        r#"{"op":"free","slot":1,"generation":2,"forced":false}"#,
    );
    golden(
        &Request::Why {
            protocol: "tcp".to_owned(),
            source: None,
            destination: "fd00::1".parse().expect("an address"),
            port: 80,
        },
        r#"{"op":"why","protocol":"tcp","source":null,"destination":"fd00::1","port":80}"#,
    );
}

#[test]
fn answers() {
    let (slot, v6) = (
        Slot(0x0a40_0001),
        "fd00::a40:1".parse().expect("an address"),
    );
    let v4 = "10.64.0.1".parse().ok();
    let allocation = Allocation {
        key: key(),
        slot,
        generation: 3,
        v6,
        v4,
        pod: pod(),
        delegated: false,
    };
    golden(
        &Response::Allocation { allocation },
        &format!(
            r#"{{"is":"allocation","allocation":{{"key":{KEY},"slot":171966465,"generation":3,"v6":"fd00::a40:1","v4":"10.64.0.1","pod":{POD}}}}}"#
        ),
    );
    golden(&Response::Done, r#"{"is":"done"}"#);
    golden(
        &Response::NotAsExpected {
            missing: vec!["x".to_owned()],
        },
        r#"{"is":"not-as-expected","missing":["x"]}"#,
    );
    golden(
        &Response::Capacity {
            allocated: 1,
            cooling: 2,
            free: 3,
        },
        r#"{"is":"capacity","allocated":1,"cooling":2,"free":3}"#,
    );
    let reasons = [
        (Unavailable::NotOurs, r#"{"is":"not-ours"}"#.to_owned()),
        (
            Unavailable::Allocated {
                key: key(),
                pod: pod(),
            },
            format!(r#"{{"is":"allocated","key":{KEY},"pod":{POD}}}"#),
        ),
        (
            Unavailable::Cooling {
                free_in_secs: Some(9),
            },
            r#"{"is":"cooling","free_in_secs":9}"#.to_owned(),
        ),
        (
            Unavailable::HasAnother { slot },
            r#"{"is":"has-another","slot":171966465}"#.to_owned(),
        ),
    ];
    for (because, told) in reasons {
        golden(
            &Response::Unavailable { slot, because },
            &format!(r#"{{"is":"unavailable","slot":171966465,"because":{told}}}"#),
        );
    }
    golden(&Response::Unknown, r#"{"is":"unknown"}"#);
    golden(
        &Response::Elsewhere {
            class: SlotClass::Dual,
            blocks: vec![BlockId::new(Slot::from(Ipv4Addr::new(10, 64, 0, 0))).unwrap()],
        },
        r#"{"is":"elsewhere","class":"dual","blocks":[171966464]}"#,
    );
    golden(
        &Response::Exhausted {
            exhausted: Exhausted {
                class: SlotClass::Dual,
                retry_after_secs: Some(9),
                allocated: 60,
                cooling: 2,
                waiting: 1,
                quarantined: 1,
                holders: vec![Holder {
                    name: "shop".to_owned(),
                    slots: 60,
                }],
                more: None,
            },
        },
        r#"{"is":"exhausted","exhausted":{"class":"dual","retryAfterSecs":9,"allocated":60,"cooling":2,"waiting":1,"quarantined":1,"holders":[{"name":"shop","slots":60}]}}"#,
    );
    golden(
        &Response::Failed {
            message: "no".to_owned(),
        },
        r#"{"is":"failed","message":"no"}"#,
    );
    let row = SlotRow {
        slot,
        state: "cooling".to_owned(),
        generation: 3,
        v6,
        v4: None,
        key: key(),
        pod: pod(),
        free_in_secs: Some(5),
        age_secs: Some(7),
        why: vec!["route".to_owned()],
    };
    let block = BlockRow {
        block: BlockId::new(Slot(0x0a40_0000)).expect("aligned"),
        class: SlotClass::Dual,
        owned: true,
        standing: "draining".to_owned(),
        epoch: 2,
        allocated: 1,
        cooling: 2,
        free: 61,
    };
    let pool = PoolRow {
        class: SlotClass::Dual,
        ranges: vec!["10.64.0.0/16".parse().expect("a prefix")],
        blocks: 1,
        wanted: 2,
        allocated: 1,
        cooling: 1,
        waiting: 1,
        quarantined: 0,
        free: 61,
    };
    golden(
        &Response::Ipam {
            slots: vec![row],
            blocks: vec![block],
            pools: vec![pool],
        },
        &format!(
            r#"{{"is":"ipam","slots":[{{"slot":171966465,"state":"cooling","generation":3,"v6":"fd00::a40:1","v4":null,"key":{KEY},"pod":{POD},"freeInSecs":5,"ageSecs":7,"why":["route"]}}],"blocks":[{{"block":171966464,"class":"dual","owned":true,"standing":"draining","epoch":2,"allocated":1,"cooling":2,"free":61}}],"pools":[{{"class":"dual","ranges":["10.64.0.0/16"],"blocks":1,"wanted":2,"allocated":1,"cooling":1,"waiting":1,"quarantined":0,"free":61}}]}}"#
        ),
    );
    let step = WhyStep {
        what: "service".to_owned(),
        object: "shop/web:http".to_owned(),
        detail: "d".to_owned(),
        source: Some("a.yaml:3".to_owned()),
    };
    golden(
        &Response::Why { steps: vec![step] },
        r#"{"is":"why","steps":[{"what":"service","object":"shop/web:http","detail":"d","source":"a.yaml:3"}]}"#,
    );
    let status = Status {
        node: "n".to_owned(),
        version: "1".to_owned(),
        uptime_secs: 2,
        cluster: vec![Fact {
            name: "synced".to_owned(),
            value: "yes".to_owned(),
            ok: true,
        }],
        bgp: vec![BgpSession {
            peer: "tor".to_owned(),
            address: "192.0.2.1".parse().expect("an address"),
            state: "Established".to_owned(),
            since_secs: 1,
            announced: 4,
            last_error: None,
        }],
        ..Status::default()
    };
    golden(
        &Response::Status { status },
        r#"{"is":"status","status":{"node":"n","version":"1","uptimeSecs":2,"cluster":[{"name":"synced","value":"yes","ok":true}],"proxy":[],"ipam":[],"nat64":[],"bgp":[{"peer":"tor","address":"192.0.2.1","state":"Established","sinceSecs":1,"announced":4,"lastError":null}],"kernel":[]}}"#,
    );
}

#[test]
fn requests_of_another_version_are_refused() {
    for line in [
        r#"{"op":"why","protocol":"tcp","source":null,"destination":"::1","port":80,"more":1}"#,
        r#"{"op":"nonsense"}"#,
        r#"{"op":"release","key":{"network":"kun","containerId":"c1","ifname":"eth0","more":1}}"#,
        r#"{"op":"release"}"#,
        "{}",
    ] {
        assert!(serde_json::from_str::<Request>(line).is_err(), "{line}");
    }
}

/// An agent that answers `answer`, whatever it is asked, and hangs up.
fn agent(answer: Vec<u8>) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().expect("a directory");
    let socket = dir.path().join("agent.sock");
    let listener = UnixListener::bind(&socket).expect("a socket");
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a caller");
        let mut line = String::new();
        BufReader::new(&stream)
            .read_line(&mut line)
            .expect("a request");
        // The client may hang up first: that is what one test wants.
        let _ = stream.write_all(&answer);
    });
    (dir, socket)
}

#[test]
fn a_good_answer() {
    let (_dir, socket) = agent(b"{\"is\":\"done\"}\n".to_vec());
    assert_eq!(
        ask(&socket, &Request::Status).expect("answered"),
        Response::Done
    );
}

#[test]
fn bad_answers_are_told_apart() {
    let (_dir, socket) = agent(b"{\"is\":\"do".to_vec());
    assert!(matches!(
        ask(&socket, &Request::Status),
        Err(ClientError::Broken(_))
    ));
    let (_dir, socket) = agent(b"hello\n".to_vec());
    assert!(matches!(
        ask(&socket, &Request::Status),
        Err(ClientError::Answer(_))
    ));
    let (_dir, socket) = agent(vec![b'x'; MAX_LINE + 2]);
    assert!(matches!(
        ask(&socket, &Request::Status),
        Err(ClientError::TooLong)
    ));
    let missing = PathBuf::from("/nonexistent/agent.sock");
    let error = ask(&missing, &Request::Status).expect_err("nobody");
    assert!(matches!(error, ClientError::NoAgent { .. }));
    assert!(
        error
            .to_string()
            .starts_with("/nonexistent/agent.sock: no agent answers there"),
        "{error}"
    );
}
