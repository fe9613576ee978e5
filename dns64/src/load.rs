//! A Corefile from disk, and everything that is made from it at once: a load either stands whole or changes nothing.

use std::cell::RefCell;
use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use kun_config::Faults;
use kun_config::corefile::{self, Corefile, ForwardTo, Hosts, Plugin, Reload, Surroundings};
use kun_dns_core::chain::Materials;
use kun_dns_core::{ClusterView, World};

use crate::sys;
use crate::upstream::Upstreams;

/// Corefiles and what they import: far above any written by hand.
const MAX_FILE: u64 = 4 << 20;

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A file cannot be read.
    #[error("{}: {source}; a readable file was expected", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The Corefile is wrong.
    #[error("{0}")]
    Faults(#[from] Faults),
    /// It serves nothing.
    #[error("{}: no server block; at least one zone, as in `.:53 {{ … }}`", .0.display())]
    Empty(PathBuf),
    /// A file in the form of resolv.conf names no server.
    #[error("{}: no nameserver line; forward needs at least one", .0.display())]
    NoNameserver(PathBuf),
}

/// Files and environment, with all that was read for telling changes.
struct Disk {
    read: RefCell<String>,
}

fn read(path: &Path) -> Result<String, LoadError> {
    let fault = |source| LoadError::Read {
        path: path.to_owned(),
        source,
    };
    if fs::metadata(path).map_err(fault)?.len() > MAX_FILE {
        return Err(fault(io::Error::new(
            io::ErrorKind::FileTooLarge,
            "larger than 4 MiB",
        )));
    }
    fs::read_to_string(path).map_err(fault)
}

impl Surroundings for Disk {
    fn env(&self, name: &str) -> Option<String> {
        std::env::var(name).ok()
    }

    fn import(&self, importing_file: &str, pattern: &str) -> Result<Vec<(String, String)>, String> {
        let folder = Path::new(importing_file).parent().unwrap_or(Path::new(""));
        let full = folder.join(pattern);
        let mut paths = Vec::new();
        match full
            .file_name()
            .and_then(|n| n.to_str())
            .and_then(|n| n.split_once('*'))
        {
            None if full.is_file() => paths.push(full),
            None => {}
            Some((head, tail)) => {
                let Ok(entries) = fs::read_dir(full.parent().unwrap_or(Path::new("."))) else {
                    return Ok(Vec::new());
                };
                for entry in entries.flatten() {
                    let name = entry.file_name();
                    let fits = name.to_str().is_some_and(|n| {
                        n.len() >= head.len() + tail.len()
                            && n.starts_with(head)
                            && n.ends_with(tail)
                    });
                    if fits && entry.path().is_file() {
                        paths.push(entry.path());
                    }
                }
                paths.sort();
            }
        }
        let mut out = Vec::new();
        for path in paths {
            let text = read(&path).map_err(|e| e.to_string())?;
            self.read.borrow_mut().push_str(&text);
            out.push((path.to_string_lossy().into_owned(), text));
        }
        Ok(out)
    }
}

/// A Corefile as read, with the text of all its files.
#[derive(Debug)]
pub struct Source {
    /// Parsed.
    pub corefile: Corefile,
    /// `dns.metrics` of kun.yaml.
    metrics: Option<SocketAddr>,
    text: String,
}

impl Source {
    /// Reads and parses. `metrics` is the endpoint of a Corefile that has no `prometheus`.
    pub fn read(path: &Path, metrics: Option<SocketAddr>) -> Result<Self, LoadError> {
        let text = read(path)?;
        let disk = Disk {
            read: RefCell::new(text.clone()),
        };
        let corefile = corefile::parse(&path.to_string_lossy(), &text, &disk)?;
        if corefile.servers.is_empty() {
            return Err(LoadError::Empty(path.to_owned()));
        }
        Ok(Self {
            corefile,
            metrics,
            text: disk.read.into_inner(),
        })
    }

    /// Whether `other` was read from the same octets.
    pub fn same_text(&self, other: &Source) -> bool {
        self.text == other.text
    }
}

/// Everything that answers, with its upstreams.
#[derive(Debug)]
pub struct Loaded {
    /// Zones, chains, names.
    pub world: World,
    /// For each `forward`.
    pub(crate) upstreams: Arc<Vec<Arc<Upstreams>>>,
    /// What it was made from.
    pub source: Arc<Source>,
    /// The hosts files as they were.
    pub hosts: Arc<Vec<(Hosts, String)>>,
}

#[derive(Default)]
struct Read {
    hosts: Vec<(Hosts, String)>,
}

impl Materials for Read {
    fn hosts_text(&mut self, spec: &Hosts) -> String {
        let text = hosts_text(spec);
        self.hosts.push((spec.clone(), text.clone()));
        text
    }
    fn seed(&mut self) -> u64 {
        u64::from_ne_bytes(sys::random())
    }
}

fn hosts_text(spec: &Hosts) -> String {
    // A missing hosts file is an empty one, as for the resolver library.
    read(&spec.file).unwrap_or_default()
}

impl Loaded {
    /// Makes all of it; caches of blocks that did not change come over from `old`.
    pub fn new(
        source: Arc<Source>,
        old: Option<&Loaded>,
        view: &ClusterView,
    ) -> Result<Self, LoadError> {
        let mut materials = Read::default();
        let world = World::new(
            &source.corefile,
            old.map(|o| &o.world),
            view,
            &mut materials,
        );
        let mut upstreams = Vec::new();
        for spec in world.forwards() {
            let mut servers = Vec::new();
            for to in &spec.to {
                match to {
                    ForwardTo::Address(a) => servers.push(*a),
                    ForwardTo::File(path) => servers.extend(nameservers(path)?),
                }
            }
            upstreams.push(Arc::new(Upstreams::new(spec.clone(), servers)));
        }
        Ok(Self {
            world,
            upstreams: Arc::new(upstreams),
            source,
            hosts: Arc::new(materials.hosts),
        })
    }

    /// The same with the names of a newer cluster.
    pub fn with_cluster(&self, view: &ClusterView) -> Self {
        Self {
            world: self.world.with_cluster(view),
            upstreams: self.upstreams.clone(),
            source: self.source.clone(),
            hosts: self.hosts.clone(),
        }
    }

    /// Whether a hosts file says something else now.
    pub fn hosts_changed(&self) -> bool {
        self.hosts
            .iter()
            .any(|(spec, text)| !spec.reload.is_zero() && hosts_text(spec) != *text)
    }

    /// How often to look at hosts files.
    pub fn hosts_interval(&self) -> Option<Duration> {
        self.hosts
            .iter()
            .map(|(s, _)| s.reload)
            .filter(|d| !d.is_zero())
            .min()
    }

    fn plugins(&self) -> impl Iterator<Item = &Plugin> {
        self.source.corefile.servers.iter().flat_map(|s| &s.plugins)
    }

    /// The first `reload`.
    pub fn reload(&self) -> Option<Reload> {
        self.plugins().find_map(|p| match p {
            Plugin::Reload(r) => Some(*r),
            _ => None,
        })
    }

    /// The longest lameduck.
    pub fn lameduck(&self) -> Duration {
        let each = self.plugins().filter_map(|p| match p {
            Plugin::Health(h) => Some(h.lameduck),
            _ => None,
        });
        each.max().unwrap_or_default()
    }

    /// Addresses of HTTP endpoints with the path that each serves.
    pub fn endpoints(&self) -> Vec<(SocketAddr, &'static str)> {
        let prometheus = self.plugins().any(|p| matches!(p, Plugin::Prometheus(_)));
        let own = self.source.metrics.filter(|_| !prometheus);
        let paths = ["/metrics", "/healthz", "/readyz"];
        let own = own.into_iter().flat_map(|a| paths.map(|path| (a, path)));
        self.plugins()
            .filter_map(|p| match p {
                Plugin::Health(h) => Some((h.address, "/health")),
                Plugin::Ready(a) => Some((*a, "/ready")),
                Plugin::Prometheus(a) => Some((*a, "/metrics")),
                _ => None,
            })
            .chain(own)
            .collect()
    }
}

/// The servers of a file in the form of resolv.conf(5).
fn nameservers(path: &Path) -> Result<Vec<SocketAddr>, LoadError> {
    let text = read(path)?;
    let servers = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let address = (words.next() == Some("nameserver")).then(|| words.next())??;
        address
            .parse::<IpAddr>()
            .ok()
            .map(|ip| SocketAddr::new(ip, 53))
    });
    let servers: Vec<SocketAddr> = servers.collect();
    if servers.is_empty() {
        return Err(LoadError::NoNameserver(path.to_owned()));
    }
    Ok(servers)
}
