//! Figures of the part `ebpf`: nanoseconds of a run of each packet program, one endpoint change into the kernel among 100,000
//! services, and what the connect hook adds to a connect().
//!
//! Minima, because everything else on the machine only ever adds.

use std::hint::black_box;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use kun_ebpf_abi::bandwidth::{FASTEST, Limits, SLOWEST, Terms};
use kun_ebpf_abi::service::{Backend, Scope, ServiceKey, ServiceValue, View, ViewKind, state};
use kun_ebpf_abi::{Addr, Port};
use kun_ebpf_loader::{BandwidthDataplane, Hook, ServiceConfig, ServiceDataplane};
use kun_harness::{BpfFs, Cgroup};

use super::{Context, Row};

const SERVICES: u32 = 100_000;
const BACKENDS: u32 = 3;
/// Runs in one measurement, and measurements: the minimum over these is repeatable to some percent.
const REPEAT: u32 = 20_000;
const ROUNDS: usize = 15;
/// Room for the pairs of [`mirrors`] and the connects' service.
const EXTRA: u32 = 8;
/// Connects in one measurement.
const CONNECTS: u32 = 200;
const TCP: u8 = 6;
const UDP: u8 = 17;

/// Measures the part.
pub fn run(_context: &Context) -> Result<Vec<Row>> {
    if !kun_harness::require_root() {
        return Ok(Vec::new());
    }
    let bpffs = BpfFs::new()?;
    let cgroup = Cgroup::new()?;
    let config = ServiceConfig {
        bpffs_root: bpffs.path().to_owned(),
        mount_bpffs: false,
        cgroup_root: cgroup.path().to_owned(),
        max_services: SERVICES + EXTRA,
        max_backends: SERVICES * BACKENDS + EXTRA,
        max_slots: SERVICES * (BACKENDS + 1) * 2 + EXTRA,
        max_flows: 1 << 16,
    };
    let (mut plane, _) = ServiceDataplane::open(&config)?;
    let cold = fill(&mut plane)?;
    let mut rows = programs(&mut plane, &NANOSECONDS)?;
    rows.extend(limits(&NANOSECONDS)?);
    rows.extend(connects(&mut plane, &cgroup)?);
    rows.push(
        Row::new(
            "ebpf/cold_fill_100k_services_300k_endpoints",
            cold.as_secs_f64() * 1e3,
            "ms",
        )
        .at_most(2000.0),
    );
    rows.push(change(&mut plane)?);
    Ok(rows)
}

/// The same programs where the clock counts instructions: what a run costs, whatever else the machine does.
pub fn instructions() -> Result<Vec<Row>> {
    let bpffs = BpfFs::new()?;
    let config = ServiceConfig {
        bpffs_root: bpffs.path().to_owned(),
        mount_bpffs: false,
        cgroup_root: PathBuf::from("/nonexistent"),
        max_services: SERVICES + EXTRA,
        max_backends: SERVICES * BACKENDS + EXTRA,
        max_slots: SERVICES * (BACKENDS + 1) * 2 + EXTRA,
        max_flows: 1 << 16,
    };
    let (mut plane, _) = ServiceDataplane::open(&config)?;
    let mut rows = programs(&mut plane, &INSTRUCTIONS)?;
    rows.extend(limits(&INSTRUCTIONS)?);
    Ok(rows)
}

/// How a program is measured.
struct Measure {
    unit: &'static str,
    suffix: &'static str,
    repeat: u32,
    rounds: usize,
}

const NANOSECONDS: Measure = Measure {
    unit: "ns",
    suffix: "",
    repeat: REPEAT,
    rounds: ROUNDS,
};

/// Short, so that the minimum has no tick of the guest's timer in it.
const INSTRUCTIONS: Measure = Measure {
    unit: "instructions",
    suffix: "_instructions",
    repeat: 200,
    rounds: 10,
};

fn vip(service: u32) -> Addr {
    let [_, a, b, c] = service.to_be_bytes();
    Addr::v4([10, 100 + a, b, c])
}

fn frontend(addr: Addr, port: u16, proto: u8) -> ServiceKey {
    ServiceKey {
        addr,
        port: Port::new(port),
        proto,
        pad: 0,
    }
}

fn value(service: u32) -> ServiceValue {
    ServiceValue {
        service,
        scope: Scope::External as u8,
        internal_view: ViewKind::Cluster as u8,
        external_view: ViewKind::Cluster as u8,
        pad: 0,
        affinity_secs: 0,
    }
}

fn backend(service: u32, nth: u32) -> Backend {
    let [_, a, b, c] = service.to_be_bytes();
    Backend {
        addr: Addr::v4([11 + nth as u8, a, b, c]),
        port: Port::new(8080),
        state: state::ACTIVE,
        generation: 1,
        service,
        ..Backend::default()
    }
}

/// Services, each with its backends, as an agent that starts would write them.
fn fill(plane: &mut ServiceDataplane) -> Result<Duration> {
    let mut keys = Vec::new();
    let mut values = Vec::new();
    for service in 0..SERVICES {
        keys.push(frontend(vip(service), 53, UDP));
        values.push(value(service));
    }
    let start = Instant::now();
    let maps = plane.maps();
    for service in 0..SERVICES {
        let first = service * BACKENDS;
        let ids: [u32; BACKENDS as usize] = std::array::from_fn(|i| first + i as u32);
        for id in ids {
            maps.write_backend(id, &backend(service, id - first))?;
        }
        maps.write_slots(first, &ids)?;
        let view = View {
            epoch: 1,
            count: BACKENDS as u16,
            base: first,
        };
        maps.publish(service, ViewKind::Cluster, view)?;
    }
    maps.upsert_services(&keys, &values)?;
    Ok(start.elapsed())
}

/// One endpoint appears: its record, the service's new extent, one publication.
fn change(plane: &mut ServiceDataplane) -> Result<Row> {
    let maps = plane.maps();
    let service = SERVICES / 2;
    let first = service * BACKENDS;
    let extents = SERVICES * BACKENDS;
    let mut best = Duration::MAX;
    for round in 0..1000u32 {
        let base = extents + (round % 1000) * 4;
        let start = Instant::now();
        maps.write_backend(black_box(first + 2), &backend(service, 2 + round % 2))?;
        maps.write_slots(base, &[first, first + 1, first + 2])?;
        let view = View {
            epoch: round as u16,
            count: 3,
            base,
        };
        maps.publish(service, ViewKind::Cluster, black_box(view))?;
        best = best.min(start.elapsed());
    }
    Ok(Row::new(
        "ebpf/one_endpoint_change_at_100k_services",
        best.as_secs_f64() * 1e6,
        "µs",
    )
    .at_most(10.0))
}

/// Two services of a family, each of which has the other as its backend: a packet that is translated is then one for the other,
/// so that every repetition of a test run is a hit that changes address and port.
fn mirrors(plane: &mut ServiceDataplane, ends: [(Addr, u16); 2], first: u32) -> Result<()> {
    let maps = plane.maps();
    for (nth, (addr, port)) in ends.into_iter().enumerate() {
        let nth = nth as u32;
        let (service, id) = (SERVICES + first + nth, SERVICES * BACKENDS + first + nth);
        let other = ends[1 - nth as usize];
        let backend = Backend {
            addr: other.0,
            port: Port::new(other.1),
            ..backend(service, 0)
        };
        maps.write_backend(id, &backend)?;
        let base = SERVICES * (BACKENDS + 1) * 2 + first + nth;
        maps.write_slots(base, &[id])?;
        let view = View {
            epoch: 1,
            count: 1,
            base,
        };
        maps.publish(service, ViewKind::Cluster, view)?;
        maps.upsert_service(&frontend(addr, port, UDP), &value(service))?;
    }
    Ok(())
}

fn programs(plane: &mut ServiceDataplane, how: &Measure) -> Result<Vec<Row>> {
    let v6 = |last: u8| Addr::v6([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last]);
    let v4 = |last: u8| Addr::v4([192, 0, 2, last]);
    mirrors(plane, [(v4(1), 53), (v4(2), 54)], 0)?;
    mirrors(plane, [(v6(1), 53), (v6(2), 54)], 2)?;
    let mut rows = Vec::new();
    let mut measure = |name: String, hook: Hook, packet: &[u8]| -> Result<()> {
        let mut best = u32::MAX;
        for _ in 0..how.rounds {
            best = best.min(plane.test_run(hook, packet, how.repeat)?.nanoseconds);
        }
        rows.push(Row::new(
            format!("ebpf/{}_{name}{}", hook.program(), how.suffix),
            f64::from(best),
            how.unit,
        ));
        Ok(())
    };
    for (family, client, mirror, stranger) in
        [("v4", v4(5), v4(1), v4(9)), ("v6", v6(5), v6(1), v6(9))]
    {
        let there = udp((client, 40000), (mirror, 53));
        let back = udp((mirror, 53), (client, 40000));
        let other = udp((client, 40000), (stranger, 53));
        // The requests first: they make the records that the answers meet.
        for hook in [Hook::PodIngress, Hook::UplinkIngress] {
            measure(format!("{family}_known_flow"), hook, &there)?;
        }
        for hook in [Hook::PodEgress, Hook::UplinkEgress] {
            measure(format!("{family}_known_flow"), hook, &back)?;
        }
        for hook in Hook::ALL {
            measure(format!("{family}_not_a_service"), hook, &other)?;
        }
    }
    Ok(rows)
}

/// What a bandwidth limit costs the packets of a pod that has one: of those that pass, and of those that are too many.
fn limits(how: &Measure) -> Result<Vec<Row>> {
    let bpffs = BpfFs::new()?;
    let (mut plane, _) = BandwidthDataplane::open(bpffs.path(), false)?;
    let packet = udp(
        (Addr::v4([192, 0, 2, 5]), 40000),
        (Addr::v4([192, 0, 2, 9]), 53),
    );
    // Test runs pass the loopback interface, which has index 1.
    plane.limit(
        1,
        &Limits {
            sends: 1,
            receives: 0,
        },
    )?;
    let mut rows = Vec::new();
    for (name, rate) in [("passes", FASTEST), ("dropped", SLOWEST)] {
        plane.fill(0, &Terms::new(rate, None, false))?;
        let mut best = u32::MAX;
        for _ in 0..how.rounds {
            best = best.min(plane.test_run(true, &packet, how.repeat)?.nanoseconds);
        }
        rows.push(Row::new(
            format!("ebpf/limit_ingress_{name}{}", how.suffix),
            f64::from(best),
            how.unit,
        ));
    }
    Ok(rows)
}

/// The time in the connect hook, as the kernel accounts it (which adds some 25 ns a run), for destinations that are a service
/// and ones that are not: the difference is what a service costs.
fn connects(plane: &mut ServiceDataplane, cgroup: &Cgroup) -> Result<Vec<Row>> {
    plane.attach_cgroup()?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    std::thread::spawn(move || listener.incoming().for_each(drop));
    let service = 7;
    let maps = plane.maps();
    let target = Backend {
        addr: Addr::v4([127, 0, 0, 1]),
        port: Port::new(port),
        ..backend(service, 0)
    };
    for nth in 0..BACKENDS {
        maps.write_backend(service * BACKENDS + nth, &target)?;
    }
    let vip = Ipv4Addr::new(10, 96, 0, 10);
    maps.upsert_service(&frontend(Addr::v4(vip.octets()), 80, TCP), &value(service))?;
    let home = Home::leave(cgroup)?;
    let _stats = kun_ebpf_loader::account_run_time()
        .context("switching on the kernel's accounting of programs")?;
    let mut best = [f64::MAX; 2];
    for _ in 0..ROUNDS {
        for (best, to) in best
            .iter_mut()
            .zip([(Ipv4Addr::LOCALHOST, port), (vip, 80)])
        {
            let (time, runs) = plane.run_time("connect4")?;
            for _ in 0..CONNECTS {
                TcpStream::connect(to)?;
            }
            let (time_after, runs_after) = plane.run_time("connect4")?;
            anyhow::ensure!(runs_after > runs, "the connect hook did not run");
            *best = best.min((time_after - time) as f64 / (runs_after - runs) as f64);
        }
    }
    drop(home);
    Ok(vec![
        Row::new("ebpf/connect4_not_a_service", best[0], "ns"),
        Row::new(
            "ebpf/connect4_service_over_not_a_service",
            best[1] - best[0],
            "ns",
        )
        .at_most(250.0),
    ])
}

/// This process, moved to another cgroup until dropped.
struct Home(PathBuf);

impl Home {
    fn leave(to: &Cgroup) -> Result<Self> {
        let text = std::fs::read_to_string("/proc/self/cgroup")?;
        let home = text
            .lines()
            .find_map(|l| l.strip_prefix("0::/"))
            .context("this process has no cgroup v2")?;
        let home = kun_harness::cgroup2_mount()?
            .join(home)
            .join("cgroup.procs");
        to.add(std::process::id())?;
        Ok(Home(home))
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        if let Err(e) = std::fs::write(&self.0, std::process::id().to_string()) {
            eprintln!("ebpf: cannot return to {}: {e}", self.0.display());
        }
    }
}

/// An Ethernet frame with a UDP datagram of 18 octets. Its checksum is any: the programs only ever change it by a difference.
fn udp(src: (Addr, u16), dst: (Addr, u16)) -> Vec<u8> {
    const PAYLOAD: u16 = 18;
    const LENGTH: u16 = 8 + PAYLOAD;
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    match (src.0.as_v4(), dst.0.as_v4()) {
        (Some(s), Some(d)) => {
            frame.extend([8, 0, 0x45, 0]);
            frame.extend((20 + LENGTH).to_be_bytes());
            frame.extend([0, 0, 0, 0, 64, UDP, 0, 0]);
            frame.extend(s.iter().chain(&d));
        }
        _ => {
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            frame.extend(LENGTH.to_be_bytes());
            frame.extend([UDP, 64]);
            frame.extend(src.0.octets().iter().chain(&dst.0.octets()));
        }
    }
    for half in [src.1, dst.1, LENGTH, 0x1234] {
        frame.extend(half.to_be_bytes());
    }
    frame.extend([0; PAYLOAD as usize]);
    frame
}
