//! connect() and getpeername() of real processes in a cgroup of their own. The client is this test binary, started again.

mod rig;

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::MetadataExt;
use std::process::Command;
use std::time::Duration;

use kun_ebpf_abi::reason::Reason;
use kun_ebpf_abi::service::{Scope, ServiceValue, ViewKind, state};
use kun_harness::{Cgroup, Netns};
use rig::*;

const ASK: &str = "KUN_CONNECT_TO";

/// The client: connects to each address that the environment names and tells what came of it, one word each.
#[test]
fn client() {
    let Ok(asked) = std::env::var(ASK) else {
        return;
    };
    for to in asked.split(',') {
        let answer = match to.strip_prefix("udp:") {
            Some(to) => {
                let to: SocketAddr = to.parse().unwrap();
                let socket =
                    UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }).unwrap();
                match socket.connect(to) {
                    Ok(()) => format!("peer={}", socket.peer_addr().unwrap()),
                    Err(e) => format!("errno={}", e.raw_os_error().unwrap_or(0)),
                }
            }
            None => {
                match TcpStream::connect_timeout(&to.parse().unwrap(), Duration::from_secs(5)) {
                    Ok(mut stream) => {
                        let mut greeting = String::new();
                        stream.read_to_string(&mut greeting).unwrap();
                        format!("peer={},said={greeting}", stream.peer_addr().unwrap())
                    }
                    Err(e) => format!("errno={}", e.raw_os_error().unwrap_or(0)),
                }
            }
        };
        println!("answer {answer}");
    }
}

/// A namespace whose loopback has the backends' addresses, servers there, and a cgroup that the dataplane serves.
struct World {
    rig: Rig,
    cgroup: Cgroup,
    netns: Netns,
}

const PORT: u16 = 8080;

impl World {
    fn new() -> Self {
        let cgroup = Cgroup::new().unwrap();
        let netns = Netns::new("connect").unwrap();
        for family in families() {
            for (i, backend) in family.backends.into_iter().enumerate() {
                netns.exec(&format!("addr add {backend} dev lo")).unwrap();
                serve(&netns, SocketAddr::new(backend, PORT), i);
            }
        }
        let mut rig = Rig::with(1024, cgroup.path().to_owned());
        rig.plane.attach_cgroup().unwrap();
        World { rig, cgroup, netns }
    }

    /// The services of both families: ids 0 and 1, backends 0, 1 and 2, 3.
    fn services(&mut self) -> [ServiceValue; 2] {
        let mut id = 0;
        families().map(|f| {
            let value = self.rig.service(id, f.vip, 80, TCP, Scope::Cluster);
            let ids = self.rig.backends(id * 2, &f.backends.map(|b| (b, PORT)));
            self.rig.publish(id, ViewKind::Cluster, &ids);
            id += 1;
            value
        })
    }

    fn ask(&self, cgroup: &Cgroup, to: &[String]) -> Vec<String> {
        ask(&self.netns, cgroup, to)
    }
}

/// Runs the client in a namespace and a cgroup.
fn ask(netns: &Netns, cgroup: &Cgroup, to: &[String]) -> Vec<String> {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "client", "--nocapture"])
        .env(ASK, to.join(","));
    let output = netns.output(cgroup.wrap(&command)).unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let answers: Vec<String> = text
        .lines()
        .filter_map(|l| l.split_once("answer "))
        .map(|(_, a)| a.to_owned())
        .collect();
    assert_eq!(
        answers.len(),
        to.len(),
        "{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    answers
}

/// Greets everybody with the server's number, as long as the test runs.
fn serve(netns: &Netns, at: SocketAddr, number: usize) {
    let listener = netns.run(|| TcpListener::bind(at)).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let _ = write!(stream, "{number}");
        }
    });
}

fn at(ip: IpAddr, port: u16) -> String {
    SocketAddr::new(ip, port).to_string()
}

#[test]
fn a_connect_reaches_a_backend_and_still_sees_the_service() {
    if !kun_harness::require_root() {
        return;
    }
    let mut world = World::new();
    world.services();
    for f in families() {
        let asked = vec![at(f.vip, 80); 24];
        let answers = world.ask(&world.cgroup, &asked);
        for answer in &answers {
            assert!(
                answer.starts_with(&format!("peer={},said=", at(f.vip, 80))),
                "{answer}"
            );
        }
        for number in 0..2 {
            let said = format!("said={number}");
            // One of 24 random choices missing a server: 2^-23.
            assert!(
                answers.iter().any(|a| a.ends_with(&said)),
                "server {number} was never chosen: {answers:?}"
            );
        }
    }
    // An IPv6 socket with an IPv4 destination is the IPv4 service's client.
    let [v4, _] = families();
    let IpAddr::V4(vip) = v4.vip else {
        unreachable!("the first family is IPv4")
    };
    let mapped = format!("[{}]:80", vip.to_ipv6_mapped());
    let answer = &world.ask(&world.cgroup, &[mapped])[0];
    assert!(answer.contains("said="), "{answer}");
    assert!(answer.contains(&vip.to_string()), "{answer}");
}

#[test]
fn without_an_endpoint_connect_is_refused_at_once() {
    if !kun_harness::require_root() {
        return;
    }
    let mut world = World::new();
    world.services();
    for (id, f) in families().into_iter().enumerate() {
        world.rig.publish(id as u32, ViewKind::Cluster, &[]);
        let before = world.rig.counted(Reason::NoEndpoint);
        assert_eq!(
            world.ask(&world.cgroup, &[at(f.vip, 80)]),
            [format!("errno={}", libc::ECONNREFUSED)]
        );
        assert_eq!(world.rig.counted(Reason::NoEndpoint), before + 1);
    }
}

#[test]
fn a_dead_backend_is_passed_over_before_the_next_publication() {
    if !kun_harness::require_root() {
        return;
    }
    let mut world = World::new();
    world.services();
    for (id, f) in families().into_iter().enumerate() {
        let first = id as u32 * 2;
        world
            .rig
            .backend(first, f.backends[0], PORT, state::DEAD, 2);
        let answers = world.ask(&world.cgroup, &vec![at(f.vip, 80); 8]);
        assert!(answers.iter().all(|a| a.ends_with("said=1")), "{answers:?}");
        // Draining serves only while nothing better does.
        world
            .rig
            .backend(first, f.backends[0], PORT, state::DRAINING, 2);
        let answers = world.ask(&world.cgroup, &vec![at(f.vip, 80); 8]);
        assert!(answers.iter().all(|a| a.ends_with("said=1")), "{answers:?}");
        world
            .rig
            .backend(first + 1, f.backends[1], PORT, state::DEAD, 2);
        let answers = world.ask(&world.cgroup, &vec![at(f.vip, 80); 8]);
        assert!(answers.iter().all(|a| a.ends_with("said=0")), "{answers:?}");
        world
            .rig
            .backend(first, f.backends[0], PORT, state::DEAD, 3);
        let before = world.rig.counted(Reason::StaleBackend);
        assert_eq!(
            world.ask(&world.cgroup, &[at(f.vip, 80)]),
            [format!("errno={}", libc::ECONNREFUSED)]
        );
        assert_eq!(world.rig.counted(Reason::StaleBackend), before + 1);
    }
}

#[test]
fn affinity_keeps_a_namespace_at_its_backend_until_that_dies() {
    if !kun_harness::require_root() {
        return;
    }
    let mut world = World::new();
    let values = world.services();
    for (id, f) in families().into_iter().enumerate() {
        let value = ServiceValue {
            affinity_secs: 3600,
            ..values[id]
        };
        world
            .rig
            .plane
            .maps()
            .upsert_service(&key(f.vip, 80, TCP), &value)
            .unwrap();
        let asked = vec![at(f.vip, 80); 24];
        let answers = world.ask(&world.cgroup, &asked);
        let first = answers[0].clone();
        assert!(answers.iter().all(|a| *a == first), "{answers:?}");
        let held: u32 = first.rsplit('=').next().unwrap().parse().unwrap();
        let dead = id as u32 * 2 + held;
        world
            .rig
            .backend(dead, f.backends[held as usize], PORT, state::DEAD, 2);
        let other = format!("said={}", 1 - held);
        let answers = world.ask(&world.cgroup, &asked);
        assert!(answers.iter().all(|a| a.ends_with(&other)), "{answers:?}");
    }
}

#[test]
fn who_is_outside_or_opted_out_keeps_the_service_address() {
    if !kun_harness::require_root() {
        return;
    }
    let mut world = World::new();
    world.services();
    let pod = world.cgroup.child("pod").unwrap();
    let container = pod.child("container").unwrap();
    let outside = Cgroup::new().unwrap();
    let unreachable = format!("errno={}", libc::ENETUNREACH);
    let served = |answer: &str| answer.contains("said=");
    for f in families() {
        let to = [at(f.vip, 80)];
        assert!(
            served(&world.ask(&container, &to)[0]),
            "a nested cgroup is served"
        );
        assert_eq!(world.ask(&outside, &to), std::slice::from_ref(&unreachable));
        let id = std::fs::metadata(pod.path()).unwrap().ino();
        world.rig.plane.maps().opt_out(id).unwrap();
        assert_eq!(
            world.ask(&container, &to),
            std::slice::from_ref(&unreachable)
        );
        assert!(
            served(&world.ask(&world.cgroup, &to)[0]),
            "its parent is served still"
        );
        assert!(world.rig.plane.maps().opt_in(id).unwrap());
        assert!(served(&world.ask(&container, &to)[0]), "and so is it again");
    }
}

#[test]
fn udp_and_other_destinations_pass_untouched() {
    if !kun_harness::require_root() {
        return;
    }
    let mut world = World::new();
    world.services();
    for f in families() {
        // The same address and port over UDP is another key, and the socket hooks leave a pod's UDP to the packets' path.
        world.rig.service(9, f.vip, 80, UDP, Scope::Cluster);
        world
            .netns
            .exec(&format!("addr add {} dev lo", f.vip))
            .unwrap();
        let answers = world.ask(
            &world.cgroup,
            &[
                format!("udp:{}", at(f.vip, 80)),
                at(f.backends[1], PORT),
                at(f.vip, 81),
            ],
        );
        assert_eq!(answers[0], format!("peer={}", at(f.vip, 80)));
        assert_eq!(
            answers[1],
            format!("peer={},said=1", at(f.backends[1], PORT))
        );
        assert_eq!(
            answers[2],
            format!("errno={}", libc::ECONNREFUSED),
            "nobody listens there"
        );
    }
}

#[test]
fn the_next_agent_adopts_the_hooks_without_a_gap() {
    if !kun_harness::require_root() {
        return;
    }
    let mut world = World::new();
    world.services();
    let asked: Vec<String> = families().map(|f| at(f.vip, 80)).to_vec();
    let World { rig, cgroup, netns } = world;
    // The agent is gone, the hooks are not.
    let (rig, adopted) = rig.restart_after(|| {
        assert!(
            ask(&netns, &cgroup, &asked)
                .iter()
                .all(|a| a.contains("said=")),
            "served while no agent runs"
        );
    });
    assert_eq!(
        adopted.links,
        [
            "connect4",
            "connect6",
            "getpeername4",
            "getpeername6",
            "recvmsg4",
            "recvmsg6",
            "sendmsg4",
            "sendmsg6"
        ]
    );
    assert_eq!(adopted.maps, 10);
    assert_eq!((adopted.stale.len(), adopted.capacities.len()), (0, 0));
    let mut world = World { rig, cgroup, netns };
    assert!(
        world
            .ask(&world.cgroup, &asked)
            .iter()
            .all(|a| a.contains("said="))
    );
    // Attaching again is no second link.
    world.rig.plane.attach_cgroup().unwrap();
    // And the adopted maps are the ones that the programs read.
    world.rig.publish(0, ViewKind::Cluster, &[]);
    assert_eq!(
        world.ask(&world.cgroup, &asked[..1]),
        [format!("errno={}", libc::ECONNREFUSED)]
    );
}
