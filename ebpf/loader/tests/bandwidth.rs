//! Limits hold on real packets: iperf3 through a pod's two veth pairs, against the bytes on the wire; and single packets through
//! the programs.

mod rig;

use std::process::Command;
use std::time::Duration;

use kun_ebpf_abi::bandwidth::{Limits, Terms, duration};
use kun_ebpf_loader::BandwidthDataplane;
use kun_harness::{BpfFs, Netns, Process, require_root, require_tool, skip, veth, wait_for};
use rig::{PASS, SHOT, ip, udp};
use serde_json::Value;

/// Both directions of a pod under one rate; buckets `first` and `first + 1`.
fn limit(
    plane: &mut BandwidthDataplane,
    node: &Netns,
    first: u32,
    rate: u64,
    interfaces: &[String],
) {
    for bucket in [first, first + 1] {
        plane.fill(bucket, &Terms::new(rate, None, false)).unwrap();
    }
    node.run(|| {
        for name in interfaces {
            let index = index(name);
            let limits = Limits {
                sends: first + 1,
                receives: first + 2,
            };
            plane.limit(index, &limits).unwrap();
            plane.attach(name).unwrap();
        }
    });
}

fn index(name: &str) -> u32 {
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    rustix::net::netdevice::name_to_index(&socket, name).unwrap()
}

/// Where an object's file lies.
fn prebuilt(object: &str) -> String {
    format!("{}/prebuilt/{object}.o", env!("CARGO_MANIFEST_DIR"))
}

/// Filters of an interface's egress: `pref P` and the program.
fn egress_filters(netns: &Netns, name: &str) -> Vec<String> {
    let mut tc = Command::new("tc");
    tc.args(["filter", "show", "dev", name, "egress"]);
    let shown = String::from_utf8(netns.output(tc).unwrap().stdout).unwrap();
    let words = shown.lines().filter(|line| line.contains("handle"));
    words
        .map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            let at = |word: &str| words.iter().position(|w| *w == word).unwrap();
            format!("{} {}", words[at("pref") + 1], words[at("handle") + 2])
        })
        .collect()
}

/// Names of programs are anybody's.
#[test]
fn a_filter_of_somebody_elses_with_a_name_and_priority_of_ours_stays() {
    use aya::programs::tc::{NlOptions, TcAttachOptions, TcHandle};
    use aya::programs::{SchedClassifier, TcAttachType};

    if !require_root() || !require_tool("ip") || !require_tool("tc") {
        return;
    }
    let bpffs = BpfFs::new().unwrap();
    let netns = Netns::new("others").unwrap();
    netns
        .exec("link add pod type veth peer name other")
        .unwrap();
    let (mut plane, _) = BandwidthDataplane::open(bpffs.path(), false).unwrap();
    netns.run(|| plane.attach("pod")).unwrap();
    let mut theirs = aya::EbpfLoader::new()
        .load_file(prebuilt("bandwidth"))
        .unwrap();
    let program: &mut SchedClassifier = theirs
        .program_mut("limit_egress")
        .unwrap()
        .try_into()
        .unwrap();
    program.load().unwrap();
    // Our name and handle at a priority of theirs; our name and priority at a handle of theirs.
    for (priority, handle) in [(5, 1), (106, 2)] {
        let options = TcAttachOptions::Netlink(NlOptions {
            priority,
            handle: TcHandle::new(0, handle),
            classid: None,
        });
        netns.run(|| {
            let id = program
                .attach_with_options("pod", TcAttachType::Egress, options)
                .unwrap();
            std::mem::forget(program.take_link(id).unwrap());
        });
    }
    let all = egress_filters(&netns, "pod");
    assert_eq!(all.len(), 3, "{all:?}");
    let left = ["5 limit_egress", "106 limit_egress"];
    // What takes one pod's limit away, and what takes everything away.
    netns.run(|| plane.detach("pod")).unwrap();
    assert_eq!(egress_filters(&netns, "pod"), left);
    netns.run(|| plane.attach("pod")).unwrap();
    let interfaces = ["pod".to_owned(), "gone".to_owned()];
    netns
        .run(|| BandwidthDataplane::remove(bpffs.path(), &interfaces))
        .unwrap();
    assert_eq!(egress_filters(&netns, "pod"), left);
}

/// A node, something outside, and pods with IPv6 on eth0 and IPv4 on eth1.
struct Net {
    node: Netns,
    outside: Netns,
    pods: Vec<Netns>,
}

/// Its addresses, IPv4 first.
const OUTSIDE: [&str; 2] = ["192.0.2.2", "2001:db8::2"];

fn pod_address(pod: usize, v6: bool) -> String {
    if v6 {
        format!("fd00::{:x}", pod + 1)
    } else {
        format!("10.0.0.{}", pod + 1)
    }
}

fn names(pod: usize) -> [String; 2] {
    [format!("p{pod}v6"), format!("p{pod}v4")]
}

impl Net {
    fn new(pods: usize) -> Self {
        let net = Net {
            node: Netns::new("node").unwrap(),
            outside: Netns::new("out").unwrap(),
            pods: (0..pods)
                .map(|i| Netns::new(&format!("pod{i}")).unwrap())
                .collect(),
        };
        net.node.forward().unwrap();
        veth(&net.node, "uplink", &net.outside, "eth0").unwrap();
        for (netns, interface, v4, v6) in [
            (&net.node, "uplink", "192.0.2.1/24", "2001:db8::1/64"),
            (&net.outside, "eth0", "192.0.2.2/24", "2001:db8::2/64"),
        ] {
            netns
                .exec(&format!("addr add {v4} dev {interface}"))
                .unwrap();
            netns
                .exec(&format!("addr add {v6} dev {interface} nodad"))
                .unwrap();
        }
        net.outside
            .exec("route add 10.0.0.0/24 via 192.0.2.1")
            .unwrap();
        net.outside
            .exec("-6 route add fd00::/64 via 2001:db8::1")
            .unwrap();
        for (i, pod) in net.pods.iter().enumerate() {
            for (v6, (host, inner)) in [true, false]
                .into_iter()
                .zip(names(i).iter().zip(["eth0", "eth1"]))
            {
                veth(&net.node, host, pod, inner).unwrap();
                let address = pod_address(i, v6);
                let (family, prefix, gateway) = if v6 {
                    ("-6", 128, "fe80::1")
                } else {
                    ("-4", 32, "169.254.1.1")
                };
                let mac = |netns: &Netns, name: &str| {
                    let shown = netns.exec(&format!("link show dev {name}")).unwrap();
                    let mut words = shown.split_whitespace().skip_while(|w| *w != "link/ether");
                    words.nth(1).unwrap().to_owned()
                };
                let (theirs, ours) = (mac(pod, inner), mac(&net.node, host));
                let nodad = if v6 { " nodad" } else { "" };
                pod.exec(&format!("addr add {address}/{prefix} dev {inner}{nodad}"))
                    .unwrap();
                pod.exec(&format!(
                    "neigh replace {gateway} lladdr {ours} dev {inner} nud permanent"
                ))
                .unwrap();
                pod.exec(&format!(
                    "{family} route add default via {gateway} dev {inner} onlink src {address}"
                ))
                .unwrap();
                net.node
                    .exec(&format!("{family} route add {address}/{prefix} dev {host}"))
                    .unwrap();
                net.node
                    .exec(&format!(
                        "neigh replace {address} lladdr {theirs} dev {host} nud permanent"
                    ))
                    .unwrap();
            }
        }
        net
    }
}

/// One stream of iperf3 between a pod and outside.
#[derive(Debug, Clone, Copy)]
struct Stream {
    pod: usize,
    v6: bool,
    tcp: bool,
    /// What the pod sends, else what it receives.
    sends: bool,
    /// Offered, for UDP.
    offer: u64,
    port: u16,
}

/// Seconds that are measured, after [`SKIPPED`] in which the first burst goes by.
const MEASURED: u32 = 8;
const SKIPPED: u32 = 2;

/// Trials of what needs much of the processor.
const TRIES: usize = 3;

/// Payload of a datagram; fits a frame of 1500 in both families.
const DATAGRAM: u32 = 1400;

impl Stream {
    /// Octets on the wire for each of payload.
    fn overhead(&self) -> f64 {
        let ip = if self.v6 { 40 } else { 20 };
        let (payload, headers) = if self.tcp {
            let headers = 14 + ip + 32;
            (1514 - headers, headers)
        } else {
            (DATAGRAM, 14 + ip + 8)
        };
        f64::from(payload + headers) / f64::from(payload)
    }

    /// Starts both ends. The client is the one that receives, since its report is by its own clock and from its own count.
    fn start(&self, net: &Net) -> (Process, std::thread::JoinHandle<Value>) {
        let pod = &net.pods[self.pod];
        let (from, own, to) = if self.sends {
            (pod, pod_address(self.pod, self.v6), &net.outside)
        } else {
            (&net.outside, OUTSIDE[usize::from(self.v6)].to_owned(), pod)
        };
        let port = self.port.to_string();
        let mut server = Command::new("iperf3");
        server.args(["-s", "-1", "-B", &own, "-p", &port]);
        server.stdout(std::process::Stdio::null());
        let server = from.spawn(server).unwrap();
        // By looking: a probe of the port would take it, or be taken for the client.
        let listens = || {
            let mut look = Command::new("ss");
            look.args(["-ltnH", "sport", "=", &format!(":{port}")]);
            let seen = from.output(look).unwrap().stdout;
            (!seen.is_empty()).then_some(())
        };
        wait_for("iperf3 to listen", Duration::from_secs(20), listens).unwrap();
        let mut client = Command::new("ip");
        client.args(["netns", "exec", to.name(), "iperf3", "-R", "-J"]);
        client.args(["-c", &own, "-p", &port]);
        client.args(["-t", &MEASURED.to_string(), "-O", &SKIPPED.to_string()]);
        if !self.tcp {
            let (length, offer) = (DATAGRAM.to_string(), self.offer.to_string());
            client.args(["-u", "-l", &length, "-b", &offer]);
        }
        let what = *self;
        let client = std::thread::spawn(move || {
            let output = client.output().unwrap();
            let text = String::from_utf8_lossy(&output.stdout);
            let report: Value =
                serde_json::from_str(&text).unwrap_or_else(|e| panic!("{what:?}: {e}: {text}"));
            assert!(report.get("error").is_none(), "{what:?}: {report}");
            report
        });
        (server, client)
    }
}

/// Bits a second on the wire that got through, of all the streams together.
fn measure(net: &Net, streams: &[Stream]) -> f64 {
    let running: Vec<_> = streams.iter().map(|s| s.start(net)).collect();
    let mut sum = 0.0;
    for (stream, (_server, client)) in streams.iter().zip(running) {
        let report = client.join().unwrap();
        let got = received(&report, stream);
        eprintln!("{stream:?}: {:.3} Mbit/s of payload", got / 1e6);
        sum += got * stream.overhead();
    }
    sum
}

fn received(report: &Value, stream: &Stream) -> f64 {
    let end = &report["end"];
    if stream.tcp {
        return end["sum_received"]["bits_per_second"].as_f64().unwrap();
    }
    let sum = &end["sum"];
    let [packets, lost, seconds] =
        ["packets", "lost_packets", "seconds"].map(|field| sum[field].as_f64().unwrap());
    (packets - lost) * f64::from(DATAGRAM) * 8.0 / seconds
}

/// Within 5 % of the limit.
fn holds(rate: u64, measured: f64, what: &str) {
    let share = measured / rate as f64;
    eprintln!(
        "{what}: {:.1} % of {} Mbit/s",
        share * 100.0,
        rate / 1_000_000
    );
    assert!(share <= 1.05, "{what}: more than the limit");
    assert!(share >= 0.95, "{what}: the limit is not reached");
}

fn ready() -> bool {
    require_root() && require_tool("ip") && require_tool("iperf3")
}

/// Every pod of its own, all at once: TCP and UDP, each family and both, in and out.
#[test]
fn ten_megabits_hold() {
    if !ready() {
        return;
    }
    const RATE: u64 = 10_000_000;
    let mut trials = Vec::new();
    for tcp in [true, false] {
        for sends in [true, false] {
            for families in [&[false][..], &[true], &[false, true]] {
                trials.push((tcp, sends, families));
            }
        }
    }
    let net = Net::new(trials.len());
    let bpffs = BpfFs::new().unwrap();
    let (mut plane, _) = BandwidthDataplane::open(bpffs.path(), false).unwrap();
    for pod in 0..trials.len() {
        limit(&mut plane, &net.node, pod as u32 * 2, RATE, &names(pod));
    }
    std::thread::scope(|scope| {
        let running: Vec<_> = (trials.iter().enumerate())
            .map(|(pod, (tcp, sends, families))| {
                let streams: Vec<Stream> = (families.iter())
                    .map(|v6| Stream {
                        pod,
                        v6: *v6,
                        tcp: *tcp,
                        sends: *sends,
                        offer: 2 * RATE,
                        port: 5201 + pod as u16 * 2 + u16::from(*v6),
                    })
                    .collect();
                let net = &net;
                scope.spawn(move || measure(net, &streams))
            })
            .collect();
        for (run, trial) in running.into_iter().zip(&trials) {
            holds(
                RATE,
                run.join().unwrap(),
                &format!("(tcp, pod sends, IPv6) {trial:?}"),
            );
        }
    });
    for bucket in 0..trials.len() as u32 * 2 {
        let counted = plane.bucket(bucket).unwrap();
        let (pod, receives) = (bucket as usize / 2, bucket % 2 == 1);
        let loaded = receives != trials[pod].1;
        assert_eq!(
            counted.dropped_packets > 0,
            loaded,
            "bucket {bucket}: {counted:?}"
        );
    }
}

/// Super-packets, and both families in one bucket.
#[test]
fn a_gigabit_holds() {
    if !ready() {
        return;
    }
    const RATE: u64 = 1_000_000_000;
    let net = Net::new(1);
    let bpffs = BpfFs::new().unwrap();
    let (mut plane, _) = BandwidthDataplane::open(bpffs.path(), false).unwrap();
    limit(&mut plane, &net.node, 0, RATE, &names(0));
    for (tcp, sends) in [(true, true), (true, false), (false, true), (false, false)] {
        let streams = [true, false].map(|v6| Stream {
            pod: 0,
            v6,
            tcp,
            sends,
            offer: RATE * 3 / 4,
            port: 5201 + u16::from(v6),
        });
        let what = format!("TCP: {tcp}, pod sends: {sends}");
        let reached = (0..TRIES).any(|_| {
            let share = measure(&net, &streams) / RATE as f64;
            eprintln!("{what}: {:.1} % of a gigabit", share * 100.0);
            assert!(share <= 1.05, "{what}: more than the limit");
            // A busy machine offers datagrams unevenly, and loses at the receiver's socket what the bucket let pass.
            share >= 0.95 || !tcp
        });
        if reached {
            continue;
        }
        // Is it the limit, or a machine that carries no gigabit beside what else it does?
        let bucket = u32::from(!sends);
        plane.set(bucket, &Terms::default()).unwrap();
        let unlimited = measure(&net, &streams) / RATE as f64;
        plane.set(bucket, &Terms::new(RATE, None, false)).unwrap();
        eprintln!("{what}: {:.1} % without a limit", unlimited * 100.0);
        assert!(unlimited < 3.0, "{what}: the limit is not reached");
    }
}

/// Where the interface has a queue that keeps departure times, packets wait for theirs, and none is lost that can wait.
#[test]
fn packets_wait_for_their_time() {
    const RATE: u64 = 1_000_000;
    const SENT: u32 = 40;
    if !require_root() || !require_tool("ip") || !require_tool("tc") {
        return;
    }
    let net = Net::new(1);
    let [host, _] = names(0);
    let mut tc = Command::new("tc");
    tc.args(["qdisc", "replace", "dev", &host, "root", "fq"]);
    if !net.node.output(tc).unwrap().status.success() {
        skip("this kernel has no fq");
        return;
    }
    let bpffs = BpfFs::new().unwrap();
    let (mut plane, _) = BandwidthDataplane::open(bpffs.path(), false).unwrap();
    limit(&mut plane, &net.node, 0, RATE, &names(0));
    let terms = Terms::new(RATE, None, true);
    plane.fill(1, &terms).unwrap();
    let sink = net.pods[0]
        .run(|| std::net::UdpSocket::bind("[fd00::1]:9"))
        .unwrap();
    sink.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let socket = net
        .outside
        .run(|| std::net::UdpSocket::bind("[::]:0"))
        .unwrap();
    for _ in 0..SENT {
        socket.send_to(&[0; 1000], "[fd00::1]:9").unwrap();
    }
    let mut times = Vec::new();
    while times.len() < SENT as usize && sink.recv(&mut [0; 2000]).is_ok() {
        times.push(std::time::Instant::now());
    }
    assert_eq!(times.len(), SENT as usize, "{:?}", plane.bucket(1));
    let bytes = u64::from(SENT) * (14 + 40 + 8 + 1000);
    let least = Duration::from_nanos(duration(terms.per_byte, bytes) - terms.burst);
    let took = times[times.len() - 1] - times[0];
    // The first ones leave at once; how late the reader sees them is the machine's affair.
    assert!(took > least / 2, "{took:?} for what takes {least:?}");
    assert_eq!(plane.bucket(1).unwrap().dropped_packets, 0);
}

/// A packet for whom the bucket has no room is dropped and counted; what an agent leaves is what the next one finds.
#[test]
fn a_bucket_outlives_the_agent_that_filled_it() {
    if !require_root() {
        return;
    }
    let bpffs = BpfFs::new().unwrap();
    let (mut plane, _) = BandwidthDataplane::open(bpffs.path(), false).unwrap();
    let packet = udp((ip("fd00::1"), 1), (ip("fd00::2"), 2));
    let run =
        |plane: &BandwidthDataplane, sends| plane.test_run(sends, &packet, 1).unwrap().verdict;
    // Test runs pass the loopback interface, which has index 1.
    assert_eq!(run(&plane, true), PASS, "no limit");
    // A byte takes a second, and three packets fit.
    let terms = Terms {
        per_byte: 1 << 50,
        burst: (packet.len() as u64 * 3) << 30,
        horizon: 0,
    };
    plane.fill(6, &terms).unwrap();
    let limits = Limits {
        sends: 7,
        receives: 0,
    };
    plane.limit(1, &limits).unwrap();
    let verdicts = [PASS, PASS, PASS, SHOT];
    assert_eq!(verdicts.map(|_| run(&plane, true)), verdicts);
    assert_eq!(run(&plane, false), PASS, "the other direction has none");
    drop(plane);
    let (mut plane, adopted) = BandwidthDataplane::open(bpffs.path(), false).unwrap();
    assert_eq!(adopted.maps, 2);
    assert_eq!(run(&plane, true), SHOT);
    assert_eq!(plane.limited().unwrap(), [(1, limits)]);
    let bucket = plane.bucket(6).unwrap();
    assert_eq!(bucket.terms, terms);
    assert_eq!(
        (bucket.dropped_packets, bucket.dropped_bytes),
        (2, 2 * packet.len() as u64)
    );
    assert!(plane.unlimit(1).unwrap() && !plane.unlimit(1).unwrap());
    assert_eq!(run(&plane, true), PASS);
    assert!(plane.bucket(kun_ebpf_loader::BUCKETS).is_err());
}
