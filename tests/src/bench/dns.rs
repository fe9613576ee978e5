//! Figures of the part `dns`: queries per CPU-second of `kun-dns` beside Debian's unbound in the same run, and beside the least
//! that any such server costs, a bare recvmmsg/sendmmsg echo.
//!
//! A closed-loop client keeps a fixed number of questions in flight from many source ports; the server's CPU time comes from
//! /proc. Wall-clock rates are not reported: they depend on who else uses the machine.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use super::{Context, Row};

/// Names asked for in turn: more than fit a processor's first cache, all of them cached.
const NAMES: usize = 1000;
/// Source ports: enough that SO_REUSEPORT spreads them over the sockets.
const FLOWS: usize = 64;
/// Questions in flight for each source port.
const WINDOW: usize = 8;
/// Measured time of one run; three runs, the best counts (CPU-ns minima: noise only adds).
const RUN: Duration = Duration::from_millis(1500);
const RUNS: usize = 3;
const UP: Duration = Duration::from_secs(20);

const PREF64: &str = "2001:db8:64::/96";

/// A server that ends with the bench.
struct Server {
    child: Child,
    address: SocketAddr,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Measures the part.
pub fn run(context: &Context) -> Result<Vec<Row>> {
    let dir = context.scratch();
    let echo = echo_ns_per_query()?;
    let Some(unbound) = context.peer("unbound") else {
        // Without it there is no upstream either: only the cluster's names can be measured.
        let kun = kun_dns(context, dir, None)?;
        let service = per_query(&kun, &service_queries())?;
        return Ok(vec![Row::new("dns/service_a", per_second(service), "1/s")]);
    };
    let authority = unbound_server(&unbound, dir, "authority", None)?;
    let peer = unbound_server(&unbound, dir, "peer", Some(authority.address))?;
    let kun = kun_dns(context, dir, Some(authority.address))?;
    let cached = queries(|i| format!("n{i}.bench.example."), 1);
    let made = queries(|i| format!("n{i}.bench.example."), 28);
    for (server, questions) in [
        (&kun, &cached),
        (&kun, &made),
        (&peer, &cached),
        (&peer, &made),
    ] {
        warm(server.address, questions)?;
    }
    // Interleaved, so that a busy moment of the machine hits all alike.
    let service = service_queries();
    let mut best = [f64::MAX; 5];
    for _ in 0..RUNS {
        let runs = [
            (&kun, &cached),
            (&peer, &cached),
            (&kun, &made),
            (&peer, &made),
            (&kun, &service),
        ];
        for (slot, (server, questions)) in best.iter_mut().zip(runs) {
            *slot = slot.min(measure(server, questions)?);
        }
    }
    let [a, a_peer, aaaa, aaaa_peer, svc] = best;
    Ok(vec![
        Row::new("dns/cached_a", per_second(a), "1/s")
            .at_least(1.5 * per_second(a_peer))
            .beside("unbound", per_second(a_peer)),
        Row::new("dns/cached_dns64", per_second(aaaa), "1/s")
            .at_least(1.5 * per_second(aaaa_peer))
            .beside("unbound", per_second(aaaa_peer)),
        Row::new("dns/service_a", per_second(svc), "1/s"),
        Row::new("dns/cached_a_over_echo", a / echo, "x")
            .at_most(1.3)
            .beside("recvmmsg/sendmmsg echo", 1.0),
        Row::new("dns/dns64_over_plain", aaaa / a, "x").at_most(1.1),
    ])
}

fn per_second(ns_per_query: f64) -> f64 {
    1e9 / ns_per_query
}

fn per_query(server: &Server, questions: &[Vec<u8>]) -> Result<f64> {
    let mut best = f64::MAX;
    for _ in 0..RUNS {
        best = best.min(measure(server, questions)?);
    }
    Ok(best)
}

fn queries(name: impl Fn(usize) -> String, qtype: u8) -> Vec<Vec<u8>> {
    let question = |i| {
        let mut q = vec![0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        for label in name(i).split('.') {
            q.push(label.len() as u8);
            q.extend_from_slice(label.as_bytes());
        }
        q.extend_from_slice(&[0, qtype, 0, 1]);
        q
    };
    (0..NAMES).map(question).collect()
}

fn service_queries() -> Vec<Vec<u8>> {
    queries(|i| format!("s{i}.bench.svc.cluster.local."), 1)
}

fn free_port() -> Result<u16> {
    Ok(UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?
        .local_addr()?
        .port())
}

fn start(command: &mut Command, address: SocketAddr, question: &[u8]) -> Result<Server> {
    let program = command.get_program().to_string_lossy().into_owned();
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let mut server = Server {
        child: child.with_context(|| format!("starting {program}"))?,
        address,
    };
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    socket.set_read_timeout(Some(Duration::from_millis(200)))?;
    let end = Instant::now() + UP;
    let mut buffer = [0; 2048];
    while Instant::now() < end {
        ensure!(
            server.child.try_wait()?.is_none(),
            "{program} ended at once"
        );
        socket.send_to(question, address)?;
        // NOERROR with an answer, however long the first names take.
        if let Ok(n) = socket.recv(&mut buffer)
            && n > 12
            && buffer[3] & 15 == 0
            && buffer[7] > 0
        {
            return Ok(server);
        }
    }
    anyhow::bail!("{program}: no answer at {address} within {UP:?}")
}

/// unbound: with `upstream` a DNS64 resolver of one thread, without one the authority over the names.
fn unbound_server(
    program: &Path,
    dir: &Path,
    role: &str,
    upstream: Option<SocketAddr>,
) -> Result<Server> {
    let port = free_port()?;
    let mut conf = format!(
        "server:\n interface: 127.0.0.1@{port}\n do-daemonize: no\n username: \"\"\n chroot: \"\"\n pidfile: \"\"\n directory: \"{}\"\n use-syslog: no\n num-threads: 1\n \
         do-not-query-localhost: no\n so-reuseport: yes\n msg-cache-size: 64m\n rrset-cache-size: 64m\n",
        dir.display()
    );
    match upstream {
        None => {
            conf.push_str(" local-zone: \"bench.example.\" static\n local-data: \"bench.example. 86400 IN SOA ns.bench.example. h.bench.example. 1 3600 600 86400 86400\"\n");
            for i in 0..NAMES {
                conf.push_str(&format!(
                    " local-data: \"n{i}.bench.example. 86400 IN A 198.51.{}.{}\"\n",
                    i / 250,
                    i % 250
                ));
            }
        }
        Some(_) => conf.push_str(&format!(
            " module-config: \"dns64 iterator\"\n dns64-prefix: {PREF64}\n"
        )),
    }
    conf.push_str("remote-control:\n control-enable: no\n");
    if let Some(up) = upstream {
        conf.push_str(&format!(
            "forward-zone:\n name: bench.example.\n forward-addr: {}@{}\n",
            up.ip(),
            up.port()
        ));
    }
    let file = dir.join(format!("unbound-{role}.conf"));
    std::fs::write(&file, conf)?;
    let address = (Ipv4Addr::LOCALHOST, port).into();
    let first = &queries(|i| format!("n{i}.bench.example."), 1)[0];
    start(
        Command::new(program).arg("-d").arg("-c").arg(file),
        address,
        first,
    )
}

fn kun_dns(context: &Context, dir: &Path, upstream: Option<SocketAddr>) -> Result<Server> {
    let port = free_port()?;
    let manifests = dir.join("manifests");
    std::fs::create_dir_all(&manifests)?;
    let service = |i: usize| {
        format!(
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: s{i}, namespace: bench}}\nspec: {{clusterIP: 10.96.{0}.{1}, clusterIPs: [10.96.{0}.{1}], ports: [{{port: 80}}]}}\n",
            i / 250,
            i % 250
        )
    };
    std::fs::write(
        manifests.join("services.yaml"),
        (0..NAMES).map(service).collect::<String>(),
    )?;
    let forward = upstream
        .map(|u| format!("forward . {u}\n"))
        .unwrap_or_default();
    let corefile = dir.join("Corefile");
    std::fs::write(
        &corefile,
        format!(
            ".:{port} {{\nbind 127.0.0.1\nkubernetes cluster.local\ncache\ndns64 {{\nprefix {PREF64}\nallow_ipv4\n}}\n{forward}}}\n"
        ),
    )?;
    let config = dir.join("kun.yaml");
    std::fs::write(
        &config,
        format!(
            "node: {{name: bench}}\ncluster: {{folder: {}}}\nipam: {{podPrefix: \"2001:db8:1::/96\"}}\ndns: {{corefile: {}, metrics: \"off\"}}\n",
            manifests.display(),
            corefile.display()
        ),
    )?;
    let address = (Ipv4Addr::LOCALHOST, port).into();
    start(
        Command::new(context.program("kun-dns")?)
            .arg("--config")
            .arg(config),
        address,
        &service_queries()[0],
    )
}

/// Asks every question until it is answered with data.
fn warm(server: SocketAddr, questions: &[Vec<u8>]) -> Result<()> {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    socket.connect(server)?;
    socket.set_read_timeout(Some(Duration::from_secs(2)))?;
    let mut buffer = [0; 2048];
    for q in questions {
        let mut tries = 0;
        loop {
            tries += 1;
            ensure!(tries < 20, "{server}: a question stays without data");
            socket.send(q)?;
            if socket.recv(&mut buffer).is_ok() && buffer[3] & 15 == 0 && buffer[7] > 0 {
                break;
            }
        }
    }
    Ok(())
}

/// CPU nanoseconds of the server for each query, over one run.
fn measure(server: &Server, questions: &[Vec<u8>]) -> Result<f64> {
    let before = cpu_ns(server.child.id())?;
    let answered = load(server.address, questions)?;
    let spent = cpu_ns(server.child.id())? - before;
    ensure!(
        answered > 10_000,
        "{}: only {answered} answers",
        server.address
    );
    Ok(spent as f64 / answered as f64)
}

/// Keeps [`WINDOW`] questions in flight on each of [`FLOWS`] sockets for [`RUN`]; the number of answers.
fn load(server: SocketAddr, questions: &[Vec<u8>]) -> Result<u64> {
    let mut flows = Vec::new();
    for _ in 0..FLOWS {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        socket.connect(server)?;
        socket.set_nonblocking(true)?;
        flows.push((socket, 0usize, Instant::now()));
    }
    let mut next = 0;
    let mut answered = 0;
    let mut buffer = [0; 2048];
    let end = Instant::now() + RUN;
    loop {
        let now = Instant::now();
        if now >= end {
            return Ok(answered);
        }
        for (socket, in_flight, heard) in &mut flows {
            loop {
                match socket.recv(&mut buffer) {
                    Ok(_) => {
                        *in_flight = in_flight.saturating_sub(1);
                        *heard = now;
                        answered += 1;
                    }
                    Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                    Err(e) => return Err(e).context("the server went away"),
                }
            }
            // A datagram that was dropped is not waited for.
            if now.duration_since(*heard) > Duration::from_millis(200) {
                (*in_flight, *heard) = (0, now);
            }
            while *in_flight < WINDOW {
                match socket.send(&questions[next % questions.len()]) {
                    Ok(_) => *in_flight += 1,
                    Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                    Err(e) => return Err(e).context("sending"),
                }
                next += 1;
            }
        }
    }
}

/// User and system time of all threads, from the scheduler: nanoseconds.
fn cpu_ns(pid: u32) -> Result<u64> {
    let mut total = 0;
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
        let text = std::fs::read_to_string(task.path().join("schedstat")).unwrap_or_default();
        total += text
            .split_whitespace()
            .next()
            .and_then(|n| n.parse::<u64>().ok())
            .unwrap_or(0);
    }
    ensure!(
        total > 0,
        "/proc/{pid}/task/*/schedstat holds nothing; the kernel needs CONFIG_SCHED_INFO"
    );
    Ok(total)
}

/// What a question costs a server that does nothing: the same batches, echoed by a thread of this program.
fn echo_ns_per_query() -> Result<f64> {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    socket.set_read_timeout(Some(Duration::from_millis(100)))?;
    let address = socket.local_addr()?;
    let stop = AtomicBool::new(false);
    let questions = service_queries();
    std::thread::scope(|scope| {
        let echo = std::thread::Builder::new()
            .name(ECHO.to_owned())
            .spawn_scoped(scope, || kun_dns::echo::serve(&socket, &stop))?;
        let all = || -> Result<f64> {
            // A thread has its name once it runs.
            kun_harness::wait_for("the echo's thread", Duration::from_secs(5), || {
                echo_cpu_ns().ok()
            })?;
            let mut best = f64::MAX;
            for _ in 0..RUNS {
                let before = echo_cpu_ns()?;
                let answered = load(address, &questions)?;
                best = best.min((echo_cpu_ns()? - before) as f64 / answered as f64);
            }
            Ok(best)
        };
        let result = all();
        stop.store(true, Ordering::Relaxed);
        echo.join()
            .map_err(|_| anyhow::anyhow!("the echo panicked"))??;
        result
    })
}

const ECHO: &str = "bench-echo";

fn echo_cpu_ns() -> Result<u64> {
    for task in std::fs::read_dir("/proc/self/task")?.flatten() {
        if std::fs::read_to_string(task.path().join("comm")).is_ok_and(|c| c.trim() == ECHO) {
            let text = std::fs::read_to_string(task.path().join("schedstat"))?;
            return text
                .split_whitespace()
                .next()
                .and_then(|n| n.parse().ok())
                .context("schedstat holds nothing");
        }
    }
    anyhow::bail!("the echo's thread is not there")
}
