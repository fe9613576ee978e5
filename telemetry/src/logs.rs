//! Logs: one subscriber a process, to stderr, since stdout belongs to results (a CNI plugin's, `kunctl`'s).

use std::io;

use kun_config::{Agent, LogFormat};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::writer::BoxMakeWriter;
use tracing_subscriber::util::SubscriberInitExt;

/// Why there are no logs.
#[derive(Debug, thiserror::Error)]
pub enum LogsError {
    /// The filter is wrong.
    #[error(
        "agent.log: `{filter}` is not a log filter ({why}); write a level, or pairs such as info,kun_bgp=debug"
    )]
    Filter {
        /// As configured, or from `RUST_LOG`.
        filter: String,
        /// What the parser said.
        why: String,
    },
    /// Called twice.
    #[error("logs are already set up in this process")]
    Twice,
}

/// Sets up the process's logs as `agent.log` and `agent.logFormat` say; `RUST_LOG` overrides the filter.
pub fn init_logs(agent: &Agent) -> Result<(), LogsError> {
    let filter = std::env::var("RUST_LOG").unwrap_or_else(|_| agent.log.clone());
    let env_filter = EnvFilter::try_new(&filter).map_err(|e| LogsError::Filter {
        filter: filter.clone(),
        why: e.to_string(),
    })?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(env_filter)
        .with_writer(BoxMakeWriter::new(io::stderr));
    match agent.log_format {
        LogFormat::Text => builder.with_ansi(false).finish().try_init(),
        LogFormat::Json => builder.json().flatten_event(true).finish().try_init(),
    }
    .map_err(|_| LogsError::Twice)
}
