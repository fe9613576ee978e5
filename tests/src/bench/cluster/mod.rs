//! Figures of the part `cluster`: what a cluster of 10,000 Services with 100,000 endpoints on 10,000 nodes takes to become a synced
//! store, from a folder and from a real API server, and what it weighs. A process that does nothing else follows: what it weighs is
//! the highest it ever weighed, the snapshot and the reading of it included.

mod data;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use kun_cluster::api::ApiSource;
use kun_cluster::api::write::Writer;
use kun_cluster::folder::FolderSource;
use kun_cluster::{Event, Kind, Resource, Source, Store, Wanted};
use kun_harness::control_plane::ControlPlane;
use serde::{Deserialize, Serialize};

use super::{Context, Row};
use data::{ENDPOINTS, NODES, SERVICES, SERVICES_PER_FILE};

/// The best of these counts: the machine is shared.
const RUNS: usize = 3;

/// Changes measured; each is a rename over one file.
const CHANGES: u16 = 20;

/// Who writes the objects into the API server; more do not make it faster on two cores.
const WRITERS: usize = 6;

/// What a program that only follows has spent.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Followed {
    wall_secs: f64,
    cpu_secs: f64,
    peak_bytes: f64,
}

/// Measures the part.
pub fn run(context: &Context) -> anyhow::Result<Vec<Row>> {
    let folder = context.scratch().join("manifests");
    fs::create_dir(&folder).context("making the manifest folder")?;
    let bytes = data::write_files(&folder)?;
    let mut rows = Vec::new();
    let source = best(context, "folder", &folder)?;
    rows.extend(told("folder", source, 2.0));
    rows.push(Row::new(
        "cluster/folder: manifests read",
        bytes as f64 / 1e6,
        "MB",
    ));
    rows.push(changes(&folder)?);
    if let Some(builder) = ControlPlane::builder() {
        // Nodes without a kubelet stay as they are, and nothing of the server's own caution stands before the writes.
        let plane = builder
            .controller_flags(&["--controllers=serviceaccount-controller"])
            .apiserver_flags(&[
                "--max-requests-inflight=10000",
                "--max-mutating-requests-inflight=10000",
            ])
            .start()?;
        let bytes = fill(plane.kubeconfig())?;
        let source = best(context, "api", plane.kubeconfig())?;
        rows.extend(told("API", source, 5.0));
        rows.push(Row::new(
            "cluster/API: objects as JSON, as written",
            bytes as f64 / 1e6,
            "MB",
        ));
    }
    Ok(rows)
}

fn told(source: &str, followed: Followed, seconds: f64) -> [Row; 3] {
    let name = |what: &str| {
        format!("cluster/{source}: {what} of 10,000 services, 100,000 endpoints, 10,000 nodes")
    };
    [
        // CPU time of all threads is ours; the wall clock is the server's and the machine's too, and judged by nobody.
        Row::new(name("snapshot, CPU,"), followed.cpu_secs, "s").at_most(seconds),
        Row::new(name("snapshot, wall clock,"), followed.wall_secs, "s"),
        Row::new(name("peak memory"), followed.peak_bytes / 1e6, "MB").at_most(150.0),
    ]
}

/// Follows in a process of its own, some times.
fn best(context: &Context, source: &str, path: &Path) -> anyhow::Result<Followed> {
    let mut best: Option<Followed> = None;
    for _ in 0..RUNS {
        let mut follow = Command::new(context.program("kun-bench")?);
        let done = follow
            .args(["--follow", source, "--from"])
            .arg(path)
            .output()?;
        let said = String::from_utf8_lossy(&done.stderr);
        ensure!(
            done.status.success(),
            "following {}: {}",
            path.display(),
            said.trim()
        );
        let one: Followed = serde_json::from_slice(&done.stdout)?;
        best = Some(best.map_or(one, |best| Followed {
            wall_secs: best.wall_secs.min(one.wall_secs),
            cpu_secs: best.cpu_secs.min(one.cpu_secs),
            // Of memory the worst counts: it is there or it is not.
            peak_bytes: best.peak_bytes.max(one.peak_bytes),
        }));
    }
    best.context("no run")
}

/// What the process of its own does.
pub fn follow(source: &str, path: &Path) -> anyhow::Result<Followed> {
    let (begin, cpu) = (Instant::now(), cpu_time());
    let source = match source {
        "folder" => Source::Folder(Box::new(FolderSource::open(path)?)),
        _ => Source::Api(Box::new(ApiSource::open(Some(path))?)),
    };
    let (sender, events) = std::sync::mpsc::sync_channel(1);
    let wanted = Wanted::new().all([Kind::Service, Kind::EndpointSlice, Kind::Node]);
    let following = source.follow(wanted, move |event| sender.send(event).is_ok())?;
    let mut store = Store::new();
    loop {
        match events.recv()? {
            Event::Deltas(deltas) => deltas
                .into_iter()
                .for_each(|delta| drop(store.apply(delta))),
            Event::Synced => break,
            Event::Trouble(trouble) => anyhow::bail!("{trouble}"),
            Event::Partial | Event::Whole | Event::Reached(..) => anyhow::bail!("not whole"),
        }
    }
    let followed = Followed {
        wall_secs: begin.elapsed().as_secs_f64(),
        cpu_secs: (cpu_time() - cpu).as_secs_f64(),
        peak_bytes: peak()?,
    };
    let services = store
        .services()
        .filter(|s| s.meta.name.name.starts_with("service-"));
    ensure!(services.count() == SERVICES && store.nodes().count() == NODES);
    let endpoints: usize = store.slices().map(|s| s.endpoints.len()).sum();
    ensure!(endpoints >= ENDPOINTS, "{endpoints} endpoints");
    drop(following);
    Ok(followed)
}

/// How long one changed file takes to become deltas.
fn changes(folder: &Path) -> anyhow::Result<Row> {
    let mut source = FolderSource::open(folder)?;
    let mut store = Store::new();
    while source.next_event() != Event::Synced {}
    let mut change = Duration::MAX;
    for port in 0..CHANGES {
        let new = folder.join(".new");
        fs::write(&new, data::manifests(0, 9000 + port))?;
        let begin = cpu_time();
        fs::rename(&new, data::path(folder, 0))?;
        let Event::Deltas(deltas) = source.next_event() else {
            anyhow::bail!("a changed file made no deltas");
        };
        ensure!(
            deltas.len() == SERVICES_PER_FILE,
            "{} deltas for {SERVICES_PER_FILE} changed slices",
            deltas.len()
        );
        deltas
            .into_iter()
            .for_each(|delta| drop(store.apply(delta)));
        change = change.min(cpu_time() - begin);
    }
    Ok(Row::new(
        "cluster/folder: one changed file of 100 services to deltas, CPU",
        change.as_secs_f64() * 1e3,
        "ms",
    ))
}

/// Puts everything into the API server; how many bytes it was.
fn fill(kubeconfig: &Path) -> anyhow::Result<usize> {
    let admin = Writer::open(Some(kubeconfig))?;
    for team in 0..data::TEAMS {
        let namespace = serde_json::json!({"metadata": {"name": format!("team-{team}")}});
        admin.create(Resource::of(Kind::Namespace), &namespace)?;
    }
    let write = |first: usize| -> anyhow::Result<usize> {
        let writer = Writer::open(Some(kubeconfig))?;
        let mut bytes = 0;
        for i in (first..SERVICES.max(NODES)).step_by(WRITERS) {
            let mut objects = Vec::new();
            if i < SERVICES {
                objects.push((Kind::Service, data::service(i)));
                objects.push((Kind::EndpointSlice, data::slice(i)));
            }
            if i < NODES {
                objects.push((Kind::Node, data::node(i)));
            }
            for (kind, object) in objects {
                let made = writer.create(Resource::of(kind), &object)?;
                bytes += made.to_string().len();
            }
        }
        Ok(bytes)
    };
    std::thread::scope(|scope| {
        let write = &write;
        let writers: Vec<_> = (0..WRITERS)
            .map(|first| scope.spawn(move || write(first)))
            .collect();
        let mut bytes = 0;
        for writer in writers {
            bytes += writer
                .join()
                .map_err(|_| anyhow::anyhow!("a writer panicked"))??;
        }
        Ok(bytes)
    })
}

fn cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// The most that this process ever had resident.
fn peak() -> anyhow::Result<f64> {
    let status = fs::read_to_string("/proc/self/status").context("reading /proc/self/status")?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
    let kilobytes = line.and_then(|l| l.trim().trim_end_matches(" kB").parse::<f64>().ok());
    Ok(kilobytes.context("VmHWM")? * 1024.0)
}
