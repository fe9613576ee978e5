//! `kun-proxy`, the node agent: service proxy, node addresses, routes, BGP, and NAT64 on gateways, joined into one process.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

mod agent;

/// The node agent of kun.
#[derive(Debug, Parser)]
#[command(version, about)]
struct Flags {
    /// The configuration file.
    #[arg(long, default_value = "/etc/kun/kun.yaml", env = "KUN_CONFIG")]
    config: PathBuf,
    /// Check the configuration, print its faults or `ok`, and exit.
    #[arg(long)]
    check_config: bool,
    /// Remove this node's programs, maps, links and routes, and exit. Addresses given to pods stay in the state directory.
    #[arg(long)]
    cleanup: bool,
    /// Where the container runtime reads network configuration lists, as /etc/cni/net.d: once pods can be served, 10-kun.conflist and
    /// the kun.yaml that it names are placed there and kept; --cleanup removes them.
    #[arg(long, value_name = "DIR")]
    cni_conf_dir: Option<PathBuf>,
    /// The list to place, where kun-cni is not the only plugin.
    #[arg(long, value_name = "PATH", requires = "cni_conf_dir")]
    cni_conflist: Option<PathBuf>,
}

fn main() -> ExitCode {
    let flags = Flags::parse();
    if flags.check_config {
        return kun_telemetry::check_config(&flags.config);
    }
    let done = if flags.cleanup {
        agent::cleanup(&flags.config, flags.cni_conf_dir.as_deref())
    } else {
        let runtime = flags.cni_conf_dir.as_deref();
        agent::run(
            &flags.config,
            runtime.map(|dir| (dir, flags.cni_conflist.as_deref())),
        )
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kun-proxy: {error}");
            ExitCode::FAILURE
        }
    }
}
