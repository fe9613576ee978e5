//! What is not ours: BIRD on the ToR, nginx and nsd on the internet host. All from Debian, each with files of its own.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use kun_harness::{Process, wait_for};
use serde_json::Value;

use super::names::{DNS_V4, MACHINES, TOR_ASN, TOR_INTERNET_V4, WEB_V4};
use super::node::last_line;
use super::topology::Topology;

/// How long a daemon may take to answer.
const STARTS_WITHIN: Duration = Duration::from_secs(15);

/// The three daemons.
#[derive(Debug)]
pub struct Outside {
    /// BIRD.
    pub bird: Process,
    /// nginx.
    pub nginx: Process,
    /// nsd.
    pub nsd: Process,
}

impl Outside {
    /// Starts them and waits until they answer.
    pub fn start(topology: &Topology, directory: &Path) -> Result<Self> {
        let directory = directory.join("outside");
        fs::create_dir_all(&directory)?;
        let bird = start_bird(topology, &directory)?;
        let nginx = start_nginx(topology, &directory)?;
        let nsd = start_nsd(topology, &directory)?;
        wait_for("BIRD answering on its socket", STARTS_WITHIN, || {
            std::os::unix::net::UnixStream::connect(directory.join("bird.ctl")).ok()
        })
        .with_context(|| last_line(&directory.join("bird.out")))?;
        let web = (WEB_V4, 80);
        let dns = (DNS_V4, 53);
        for (what, address) in [("nginx", web), ("nsd", dns)] {
            wait_for(
                &format!("{what} answering on {}:{}", address.0, address.1),
                STARTS_WITHIN,
                || {
                    topology
                        .internet
                        .run(|| std::net::TcpStream::connect(address).ok())
                },
            )
            .with_context(|| format!("its log is in {}", directory.display()))?;
        }
        Ok(Self { bird, nginx, nsd })
    }
}

/// BIRD's control socket.
pub fn bird_socket(directory: &Path) -> PathBuf {
    directory.join("outside/bird.ctl")
}

/// A Debian daemon is in an sbin directory that PATH may lack.
fn daemon(name: &str) -> Result<Command> {
    let found = ["/usr/sbin", "/usr/local/sbin", "/sbin", "/usr/bin"]
        .iter()
        .map(|directory| Path::new(directory).join(name))
        .find(|path| path.is_file());
    let path =
        found.with_context(|| format!("{name} is not installed: run `cargo xtask setup`"))?;
    Ok(Command::new(path))
}

fn start_bird(topology: &Topology, directory: &Path) -> Result<Process> {
    let mut text = format!(
        "log \"{}\" all;\nrouter id {TOR_INTERNET_V4};\nprotocol device {{ scan time 1; }}\n\
         protocol kernel {{ ipv4 {{ export where source = RTS_BGP; }}; merge paths on; }}\n\
         protocol kernel {{ ipv6 {{ export where source = RTS_BGP; }}; merge paths on; }}\n",
        directory.join("bird.log").display()
    );
    for machine in &MACHINES {
        // One session carries both families; the cluster's machines dial.
        write!(
            text,
            "protocol bgp to_{} {{\n  local {} as {TOR_ASN};\n  neighbor {} as {};\n  passive on;\n  graceful restart on;\n  \
             ipv4 {{ import all; export none; extended next hop on; }};\n  ipv6 {{ import all; export none; }};\n}}\n",
            machine.name.replace('-', "_"),
            machine.tor_v6(),
            machine.v6(),
            machine.asn
        )?;
    }
    let file = directory.join("bird.conf");
    fs::write(&file, text)?;
    let mut bird = daemon("bird")?;
    bird.arg("-f")
        .arg("-c")
        .arg(&file)
        .arg("-s")
        .arg(directory.join("bird.ctl"));
    logged(&mut bird, &directory.join("bird.out"))?;
    topology.tor.spawn(bird)
}

fn start_nginx(topology: &Topology, directory: &Path) -> Result<Process> {
    let at = directory.display();
    let text = format!(
        "daemon off;\nworker_processes 1;\nuser root;\npid {at}/nginx.pid;\nerror_log {at}/nginx.log;\nevents {{}}\nhttp {{\n  \
         access_log off;\n  client_body_temp_path {at}/nginx-body;\n  proxy_temp_path {at}/nginx-proxy;\n  \
         fastcgi_temp_path {at}/nginx-fastcgi;\n  uwsgi_temp_path {at}/nginx-uwsgi;\n  scgi_temp_path {at}/nginx-scgi;\n  \
         server {{\n    listen {WEB_V4}:80;\n    default_type application/json;\n    \
         location / {{ return 200 '{{\"pod\":\"internet\",\"peer\":\"$remote_addr:$remote_port\"}}'; }}\n  }}\n}}\n"
    );
    let file = directory.join("nginx.conf");
    fs::write(&file, text)?;
    let mut nginx = daemon("nginx")?;
    nginx
        .arg("-c")
        .arg(&file)
        .arg("-e")
        .arg(directory.join("nginx.log"));
    logged(&mut nginx, &directory.join("nginx.out"))?;
    topology.internet.spawn(nginx)
}

fn start_nsd(topology: &Topology, directory: &Path) -> Result<Process> {
    let at = directory.display();
    let zone = format!(
        "$ORIGIN example.net.\n$TTL 60\n@ SOA ns hostmaster 1 3600 600 86400 60\n@ NS ns\nns A {DNS_V4}\nweb A {WEB_V4}\n"
    );
    fs::write(directory.join("example.net.zone"), zone)?;
    let text = format!(
        "server:\n  ip-address: {DNS_V4}\n  server-count: 1\n  username: \"\"\n  chroot: \"\"\n  zonesdir: \"{at}\"\n  \
         pidfile: \"{at}/nsd.pid\"\n  xfrdfile: \"{at}/xfrd.state\"\n  zonelistfile: \"{at}/zone.list\"\n  xfrdir: \"{at}\"\n  \
         database: \"\"\n  do-ip6: no\n  logfile: \"{at}/nsd.log\"\nremote-control:\n  control-enable: no\n\
         zone:\n  name: example.net\n  zonefile: example.net.zone\n"
    );
    let file = directory.join("nsd.conf");
    fs::write(&file, text)?;
    let mut nsd = daemon("nsd")?;
    nsd.arg("-d").arg("-c").arg(&file);
    logged(&mut nsd, &directory.join("nsd.out"))?;
    topology.internet.spawn(nsd)
}

/// Both outputs into a file.
pub(super) fn logged(command: &mut Command, file: &Path) -> Result<()> {
    let log = File::options()
        .append(true)
        .create(true)
        .open(file)
        .with_context(|| format!("writing {}", file.display()))?;
    command.stdout(log.try_clone()?).stderr(log);
    Ok(())
}

/// A route in the ToR's kernel, as BIRD put it there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TorRoute {
    /// `10.64.0.0/26`, always with its length.
    pub prefix: String,
    /// The ToR's interfaces towards the next hops: the machines' names.
    pub towards: Vec<String>,
}

/// The ToR's kernel routes from BGP, both families.
pub fn tor_routes(topology: &Topology) -> Result<Vec<TorRoute>> {
    let mut routes = Vec::new();
    for (family, host) in [("-4", "/32"), ("-6", "/128")] {
        let text = topology
            .tor
            .exec(&format!("-j {family} route show proto bird"))?;
        let list: Vec<Value> = if text.trim().is_empty() {
            Vec::new()
        } else {
            serde_json::from_str(&text)?
        };
        for entry in list {
            let word = |value: &Value, key: &str| {
                value.get(key).and_then(Value::as_str).map(str::to_owned)
            };
            let Some(mut prefix) = word(&entry, "dst") else {
                continue;
            };
            if !prefix.contains('/') {
                prefix.push_str(host);
            }
            let mut towards: Vec<String> = word(&entry, "dev").into_iter().collect();
            for hop in entry
                .get("nexthops")
                .and_then(Value::as_array)
                .into_iter()
                .flatten()
            {
                towards.extend(word(hop, "dev"));
            }
            towards.sort();
            routes.push(TorRoute { prefix, towards });
        }
    }
    // IPv6 multipath routes may be listed hop by hop.
    routes.sort_by(|a, b| a.prefix.cmp(&b.prefix));
    routes.dedup_by(|next, kept| {
        let same = next.prefix == kept.prefix;
        if same {
            kept.towards.append(&mut next.towards);
            kept.towards.sort();
        }
        same
    });
    Ok(routes)
}
