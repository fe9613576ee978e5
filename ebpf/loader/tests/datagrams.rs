//! UDP of the node's own processes: real sockets in the namespace and cgroup that the dataplane takes for the node's.

mod rig;

use std::fs;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kun_ebpf_abi::reason::Reason;
use kun_ebpf_abi::service::{Scope, ServiceValue, ViewKind, state};
use kun_harness::{Cgroup, Netns};
use rig::*;

const PORT: u16 = 5353;

/// Loopback takes microseconds; a busy machine takes its time.
const SOON: Duration = Duration::from_secs(5);

/// A process is in one cgroup at a time.
static TURN: Mutex<()> = Mutex::new(());

/// This process inside a cgroup: its sockets are that cgroup's.
struct Inside {
    home: PathBuf,
    _turn: MutexGuard<'static, ()>,
}

impl Inside {
    fn enter(cgroup: &Cgroup, turn: MutexGuard<'static, ()>) -> Self {
        let own = fs::read_to_string("/proc/self/cgroup").unwrap();
        let path = own.lines().find_map(|l| l.strip_prefix("0::")).unwrap();
        let root = kun_harness::cgroup2_mount().unwrap();
        cgroup.add(std::process::id()).unwrap();
        Inside {
            home: root.join(path.trim_start_matches('/')),
            _turn: turn,
        }
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        let file = self.home.join("cgroup.procs");
        fs::write(file, std::process::id().to_string()).expect("the way home is open");
    }
}

/// The node's namespace, whose loopback has the backends' addresses, and their sockets. Fields drop in order.
struct World {
    rig: Rig,
    servers: [[UdpSocket; 2]; 2],
    _inside: Inside,
    cgroup: Cgroup,
    node: Netns,
}

impl World {
    fn new() -> Self {
        // Before anything is started: what is born into another test's cgroup dies with it.
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let (cgroup, node) = (Cgroup::new().unwrap(), Netns::new("datagrams").unwrap());
        let servers = families().map(|f| {
            f.backends.map(|backend| {
                node.exec(&format!("addr add {backend} dev lo")).unwrap();
                bind(&node, SocketAddr::new(backend, PORT))
            })
        });
        let mut rig = node.run(|| Rig::with(1024, cgroup.path().to_owned()));
        rig.plane.attach_cgroup().unwrap();
        World {
            rig,
            servers,
            _inside: Inside::enter(&cgroup, turn),
            cgroup,
            node,
        }
    }

    /// The services of both families: ids 0 and 1, backends 0, 1 and 2, 3.
    fn services(&mut self) -> [ServiceValue; 2] {
        let mut id = 0;
        families().map(|f| {
            let value = self.rig.service(id, f.vip, 53, UDP, Scope::Cluster);
            let ids = self.rig.backends(id * 2, &f.backends.map(|b| (b, PORT)));
            self.rig.publish(id, ViewKind::Cluster, &ids);
            id += 1;
            value
        })
    }

    fn client(&self, family: usize) -> UdpSocket {
        let any = if family == 0 { "0.0.0.0:0" } else { "[::]:0" };
        bind(&self.node, any.parse().unwrap())
    }

    /// Which server has the next datagram, and from whom.
    fn got(&self, family: usize) -> (usize, SocketAddr) {
        let mut buffer = [0; 16];
        let got = kun_harness::wait_for("a datagram", SOON, || {
            let servers = self.servers[family].iter().enumerate();
            servers
                .filter_map(|(number, server)| {
                    let (_, from) = server.recv_from(&mut buffer).ok()?;
                    Some((number, from))
                })
                .next()
        });
        got.unwrap()
    }
}

/// Not to be waited for: who waits polls.
fn bind(netns: &Netns, at: SocketAddr) -> UdpSocket {
    let socket = netns.run(|| UdpSocket::bind(at)).unwrap();
    socket.set_nonblocking(true).unwrap();
    socket
}

fn receive(socket: &UdpSocket) -> (SocketAddr, Vec<u8>) {
    let mut buffer = [0; 16];
    let got = kun_harness::wait_for("an answer", SOON, || socket.recv_from(&mut buffer).ok());
    let (length, from) = got.unwrap();
    (from, buffer[..length].to_vec())
}

fn vip(family: usize) -> SocketAddr {
    SocketAddr::new(families()[family].vip, 53)
}

#[test]
fn a_datagram_reaches_a_backend_and_its_answer_is_the_services() {
    if !kun_harness::require_root() {
        return;
    }
    let mut world = World::new();
    world.services();
    for family in 0..2 {
        let mut chosen = [0, 0];
        for _ in 0..24 {
            let client = world.client(family);
            let mut mine = None;
            // A socket keeps its backend.
            for _ in 0..4 {
                client.send_to(b"?", vip(family)).unwrap();
                let (number, from) = world.got(family);
                assert!(mine.is_none_or(|m| m == number), "{mine:?} {number}");
                mine = Some(number);
                world.servers[family][number].send_to(b"!", from).unwrap();
                assert_eq!(receive(&client), (vip(family), b"!".to_vec()));
            }
            chosen[mine.unwrap()] += 1;
        }
        // One of 24 choices missing a server: 2^-23.
        assert!(chosen.iter().all(|n| *n > 0), "{chosen:?}");
        // What comes from nobody's service comes as it is.
        let client = world.client(family);
        let plain = SocketAddr::new(families()[family].backends[1], PORT);
        client.send_to(b"?", plain).unwrap();
        let (number, from) = world.got(family);
        world.servers[family][number].send_to(b"!", from).unwrap();
        assert_eq!((number, receive(&client).0), (1, plain));
    }
    // An IPv6 socket with an IPv4 destination is the IPv4 service's client.
    let IpAddr::V4(four) = families()[0].vip else {
        unreachable!("the first family is IPv4")
    };
    let mapped = SocketAddr::new(four.to_ipv6_mapped().into(), 53);
    let client = world.client(1);
    client.send_to(b"?", mapped).unwrap();
    let (number, from) = world.got(0);
    world.servers[0][number].send_to(b"!", from).unwrap();
    assert_eq!(receive(&client).0, mapped);
}

#[test]
fn a_socket_leaves_a_backend_that_is_gone_with_its_next_datagram() {
    if !kun_harness::require_root() {
        return;
    }
    let mut world = World::new();
    world.services();
    for family in 0..2 {
        let client = world.client(family);
        client.send_to(b"?", vip(family)).unwrap();
        let (first, from) = world.got(family);
        let id = (family * 2 + first) as u32;
        let backend = families()[family].backends[first];
        world.rig.backend(id, backend, PORT, state::DEAD, 2);
        // Whoever has its address next is not the service.
        world.servers[family][first].send_to(b"late", from).unwrap();
        let late = receive(&client);
        assert_eq!(late, (SocketAddr::new(backend, PORT), b"late".to_vec()));
        for _ in 0..3 {
            client.send_to(b"?", vip(family)).unwrap();
            let (next, from) = world.got(family);
            assert_eq!(next, 1 - first);
            world.servers[family][next].send_to(b"!", from).unwrap();
            assert_eq!(receive(&client).0, vip(family));
        }
    }
}

#[test]
fn answers_are_of_the_frontend_that_was_asked_last() {
    if !kun_harness::require_root() {
        return;
    }
    let mut world = World::new();
    for (family, f) in families().into_iter().enumerate() {
        let id = family as u32;
        world.rig.backends(id, &[(f.backends[0], PORT)]);
        let ports = [53, 54];
        for (at, port) in ports.into_iter().enumerate() {
            let service = id * 2 + at as u32;
            world.rig.service(service, f.vip, port, UDP, Scope::Cluster);
            world.rig.publish(service, ViewKind::Cluster, &[id]);
        }
        let client = world.client(family);
        for port in [53, 54, 53, 53, 54] {
            let to = SocketAddr::new(f.vip, port);
            client.send_to(b"?", to).unwrap();
            let (_, from) = world.got(family);
            world.servers[family][0].send_to(b"!", from).unwrap();
            assert_eq!(receive(&client).0, to);
        }
    }
}

#[test]
fn without_an_endpoint_a_datagram_is_refused_at_once() {
    if !kun_harness::require_root() {
        return;
    }
    let mut world = World::new();
    world.services();
    for family in 0..2 {
        world.rig.publish(family as u32, ViewKind::Cluster, &[]);
        let before = world.rig.counted(Reason::NoEndpoint);
        let client = world.client(family);
        for _ in 0..2 {
            let refused = client.send_to(b"?", vip(family)).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
        }
        let connected = client.connect(vip(family)).unwrap_err();
        assert_eq!(connected.kind(), ErrorKind::ConnectionRefused);
        assert_eq!(world.rig.counted(Reason::NoEndpoint), before + 3);
    }
}

#[test]
fn a_connected_socket_sees_the_service() {
    if !kun_harness::require_root() {
        return;
    }
    let mut world = World::new();
    world.services();
    for family in 0..2 {
        let client = world.client(family);
        client.connect(vip(family)).unwrap();
        assert_eq!(client.peer_addr().unwrap(), vip(family));
        let mut mine = None;
        for _ in 0..4 {
            client.send(b"?").unwrap();
            let (number, from) = world.got(family);
            assert!(mine.is_none_or(|m| m == number));
            mine = Some(number);
            world.servers[family][number].send_to(b"!", from).unwrap();
            assert_eq!(receive(&client), (vip(family), b"!".to_vec()));
        }
        // To one address with another one's socket.
        let other = world.client(family);
        other.connect(vip(family)).unwrap();
        let plain = SocketAddr::new(families()[family].backends[0], PORT);
        other.connect(plain).unwrap();
        if other.peer_addr().unwrap() != plain {
            // By chance it had been connected to this very backend: nothing tells the two apart.
            assert_eq!(other.peer_addr().unwrap(), vip(family));
        }
    }
}

#[test]
fn affinity_holds_all_sockets_of_the_node() {
    if !kun_harness::require_root() {
        return;
    }
    let mut world = World::new();
    let values = world.services();
    for (family, value) in values.into_iter().enumerate() {
        let value = ServiceValue {
            affinity_secs: 3600,
            ..value
        };
        let key = key(families()[family].vip, 53, UDP);
        world.rig.plane.maps().upsert_service(&key, &value).unwrap();
        let mut mine = None;
        for _ in 0..24 {
            world.client(family).send_to(b"?", vip(family)).unwrap();
            let (number, _) = world.got(family);
            assert!(mine.is_none_or(|m| m == number));
            mine = Some(number);
        }
    }
}

/// Pods' datagrams are translated on their way, where a backend's end is seen with each one.
#[test]
fn pods_and_who_opted_out_keep_the_service_address() {
    if !kun_harness::require_root() {
        return;
    }
    let mut world = World::new();
    world.services();
    let pod = Netns::new("datagrams-p").unwrap();
    for family in 0..2 {
        for netns in [&pod, &world.node] {
            netns
                .exec(&format!("addr add {} dev lo", families()[family].vip))
                .unwrap();
        }
        let there = bind(&pod, vip(family));
        let any = if family == 0 { "0.0.0.0:0" } else { "[::]:0" };
        let client = bind(&pod, any.parse().unwrap());
        client.send_to(b"?", vip(family)).unwrap();
        let (from, _) = receive(&there);
        there.send_to(b"!", from).unwrap();
        assert_eq!(receive(&client).0, vip(family));
        client.connect(vip(family)).unwrap();
        client.send(b"again").unwrap();
        assert_eq!(receive(&there).1, b"again");

        let id = cgroup_id(&world.cgroup);
        world.rig.plane.maps().opt_out(id).unwrap();
        let there = bind(&world.node, vip(family));
        world.client(family).send_to(b"?", vip(family)).unwrap();
        receive(&there);
        assert!(world.rig.plane.maps().opt_in(id).unwrap());
        world.client(family).send_to(b"?", vip(family)).unwrap();
        world.got(family);
    }
}

fn cgroup_id(cgroup: &Cgroup) -> u64 {
    use std::os::unix::fs::MetadataExt;
    fs::metadata(cgroup.path()).unwrap().ino()
}
