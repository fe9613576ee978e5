//! Figures of the part `cluster`: how long 10,000 Services and their EndpointSlices in a folder take to become a synced store, what that
//! store weighs, and how long one changed file takes to become deltas.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use kun_cluster::folder::FolderSource;
use kun_cluster::{Event, Kind, Store};

use super::{Context, Row};

const FILES: usize = 100;
const SERVICES_PER_FILE: usize = 100;
const SERVICES: usize = FILES * SERVICES_PER_FILE;

/// The best of these counts: the machine is shared.
const RUNS: usize = 5;

/// Changes measured; each is a rename over one file.
const CHANGES: u16 = 20;

/// Measures the part.
pub fn run(context: &Context) -> anyhow::Result<Vec<Row>> {
    let folder = context.scratch().join("manifests");
    fs::create_dir(&folder).context("making the manifest folder")?;
    let mut bytes = 0;
    for file in 0..FILES {
        let text = manifests(file, 8080);
        bytes += text.len();
        fs::write(path(&folder, file), text).context("writing a manifest")?;
    }

    // Before anything else has grown the heap: freed pages are kept and would hide the store's.
    let resident_before = resident()?;
    let (mut wall, mut cpu, mut source, mut store) = snapshot(&folder)?;
    let weight = resident()?.saturating_sub(resident_before);
    for _ in 1..RUNS {
        let again = snapshot(&folder)?;
        wall = wall.min(again.0);
        cpu = cpu.min(again.1);
        (source, store) = (again.2, again.3);
    }
    let mut change = Duration::MAX;
    for port in 0..CHANGES {
        let new = folder.join(".new");
        fs::write(&new, manifests(0, 9000 + port))?;
        let begin = cpu_time();
        fs::rename(&new, path(&folder, 0))?;
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
    let megabytes = |n: usize| n as f64 / 1e6;
    Ok(vec![
        // CPU time of all threads: the wall clock of a shared machine is told, and judged by nobody.
        Row::new(
            "cluster/snapshot of 10,000 services and slices, CPU",
            cpu.as_secs_f64() * 1e3,
            "ms",
        )
        .at_most(2000.0),
        Row::new(
            "cluster/snapshot, wall clock",
            wall.as_secs_f64() * 1e3,
            "ms",
        ),
        Row::new(
            "cluster/snapshot, CPU per object",
            cpu.as_secs_f64() * 1e6 / (2 * SERVICES) as f64,
            "µs",
        ),
        Row::new("cluster/manifests read", megabytes(bytes), "MB"),
        Row::new(
            "cluster/resident memory of 10,000 services and slices",
            megabytes(weight),
            "MB",
        )
        .at_most(64.0),
        Row::new(
            "cluster/one changed file of 100 services to deltas, CPU",
            change.as_secs_f64() * 1e3,
            "ms",
        ),
    ])
}

fn path(folder: &Path, file: usize) -> std::path::PathBuf {
    folder.join(format!("services-{file:03}.yaml"))
}

/// Reads the folder from nothing; wall time, CPU time of all threads, and what came of it.
fn snapshot(folder: &Path) -> anyhow::Result<(Duration, Duration, FolderSource, Store)> {
    let (begin, cpu) = (Instant::now(), cpu_time());
    let mut source = FolderSource::open(folder)?;
    let mut store = Store::new();
    loop {
        match source.next_event() {
            Event::Deltas(deltas) => deltas
                .into_iter()
                .for_each(|delta| drop(store.apply(delta))),
            Event::Synced => break,
            Event::Trouble(trouble) => anyhow::bail!("{trouble}"),
            Event::Partial | Event::Whole => {}
        }
    }
    let (wall, cpu) = (begin.elapsed(), cpu_time() - cpu);
    let counts = store.counts();
    ensure!(
        counts[..2] == [(Kind::Service, SERVICES), (Kind::EndpointSlice, SERVICES)],
        "{counts:?}"
    );
    Ok((wall, cpu, source, store))
}

fn cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Resident bytes of this process.
fn resident() -> anyhow::Result<usize> {
    let statm = fs::read_to_string("/proc/self/statm").context("reading /proc/self/statm")?;
    let pages: usize = statm
        .split_whitespace()
        .nth(1)
        .context("statm has two fields")?
        .parse()?;
    Ok(pages * rustix::param::page_size())
}

/// Services as kubectl prints them, each with a slice of three endpoints.
fn manifests(file: usize, target_port: u16) -> String {
    let mut text = String::new();
    for i in file * SERVICES_PER_FILE..(file + 1) * SERVICES_PER_FILE {
        let (namespace, high, low) = (i % 50, i / 250, i % 250 + 1);
        // Writing to a String cannot fail.
        let _ = write!(
            text,
            "---\napiVersion: v1\nkind: Service\nmetadata:\n  name: service-{i}\n  namespace: team-{namespace}\n  labels:\n    \
             app: service-{i}\nspec:\n  type: ClusterIP\n  clusterIP: 10.96.{high}.{low}\n  clusterIPs:\n  - 10.96.{high}.{low}\n  \
             ipFamilies:\n  - IPv4\n  ipFamilyPolicy: SingleStack\n  selector:\n    app: service-{i}\n  ports:\n  - name: http\n    \
             port: 80\n    protocol: TCP\n    targetPort: {target_port}\n---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
             metadata:\n  name: service-{i}-x\n  namespace: team-{namespace}\n  labels:\n    kubernetes.io/service-name: service-{i}\n\
             addressType: IPv4\nports:\n- name: http\n  port: {target_port}\n  protocol: TCP\nendpoints:\n"
        );
        for endpoint in 0..3 {
            let _ = write!(
                text,
                "- addresses:\n  - 10.{}.{high}.{low}\n  conditions:\n    ready: true\n    serving: true\n    terminating: false\n  \
                 nodeName: node-{}\n  zone: zone-{endpoint}\n  targetRef:\n    kind: Pod\n    namespace: team-{namespace}\n    \
                 name: service-{i}-{endpoint}\n",
                64 + endpoint,
                i % 100
            );
        }
    }
    text
}
