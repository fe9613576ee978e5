//! The program: flags, configuration, and the shell.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use kun_dns::load::Source;
use kun_dns::server::{Options, run};

/// kun's DNS server: a Corefile, the names of the cluster, DNS64.
#[derive(Debug, Parser)]
#[command(version)]
struct Flags {
    /// kun.yaml
    #[arg(long, default_value = "/etc/kun/kun.yaml")]
    config: PathBuf,
    /// The Corefile, instead of the one that kun.yaml names
    #[arg(long)]
    corefile: Option<PathBuf>,
    /// Print faults, or `ok`, and exit
    #[arg(long)]
    check_config: bool,
    /// Print the chains as they will run, and exit
    #[arg(long)]
    explain: bool,
}

fn main() -> ExitCode {
    let flags = Flags::parse();
    match start(&flags) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("kun-dns: {e}");
            ExitCode::FAILURE
        }
    }
}

fn start(flags: &Flags) -> anyhow::Result<()> {
    let config = kun_telemetry::load(&flags.config)?;
    let corefile = flags
        .corefile
        .clone()
        .unwrap_or_else(|| config.dns.corefile.clone());
    if flags.check_config || flags.explain {
        let source = Source::read(&corefile, config.dns.metrics)?;
        for warning in config
            .warnings
            .0
            .iter()
            .map(ToString::to_string)
            .chain(source.corefile.warnings.clone())
        {
            eprintln!("warning: {warning}");
        }
        if flags.explain {
            print!("{}", source.corefile);
        } else {
            println!("ok");
        }
        return Ok(());
    }
    kun_telemetry::init_logs(&config.agent)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let options = Options {
        corefile,
        metrics: config.dns.metrics,
        cluster: config.cluster,
    };
    runtime.block_on(run(options))?;
    Ok(())
}
