//! `kun-operator`: flags, configuration, and the loop. Exit codes: 0 done, 1 failed or (with `--once`) something could not be
//! given, 2 usage.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use kun_operator::run::Operator;
use kun_telemetry::{Health, Metrics, check_config, init_logs, load, serve};

/// Gives nodes their IPAM blocks and LoadBalancer services their virtual addresses.
#[derive(Debug, Parser)]
#[command(version)]
struct Flags {
    /// The configuration.
    #[arg(long, default_value = "/etc/kun/kun.yaml")]
    config: PathBuf,
    /// Check the configuration, print faults or `ok`, and exit.
    #[arg(long)]
    check_config: bool,
    /// One pass over the folder, then exit: 0 when nothing is missing, else 1.
    #[arg(long)]
    once: bool,
    /// Blocks of each class that every node gets at least; overrides operator.blocksPerNode.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1000))]
    blocks_per_node: Option<u32>,
}

fn main() -> ExitCode {
    let flags = Flags::parse();
    if flags.check_config {
        return check_config(&flags.config);
    }
    match run(&flags) {
        Ok(code) => code,
        Err(error) => {
            // Not `{:#}`: these errors say their cause themselves.
            eprintln!("kun-operator: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(flags: &Flags) -> anyhow::Result<ExitCode> {
    let config = load(&flags.config)?;
    init_logs(&config.agent)?;
    for warning in &config.warnings.0 {
        tracing::warn!("{warning}");
    }
    let metrics = Metrics::new("kun-operator", env!("CARGO_PKG_VERSION"));
    let blocks_per_node = flags
        .blocks_per_node
        .unwrap_or(config.operator.blocks_per_node);
    let address = config.operator.metrics;
    let mut operator = Operator::open(config, blocks_per_node, &metrics)?;
    if flags.once {
        let shortages = operator.once()?;
        return Ok(if shortages.is_empty() {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        });
    }
    let health = Health::new();
    let _endpoint = address
        .map(|address| serve(address, metrics, health.clone()))
        .transpose()?;
    operator.run(&health)?;
    Ok(ExitCode::SUCCESS)
}
