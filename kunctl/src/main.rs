//! `kunctl`: asks the node agent over its socket and prints the answer.
//!
//! Exit codes: 0 all is well; 1 something is not as it should be (a session down, a drop, a request refused); 2 the command line or the
//! configuration is wrong; 3 no agent answers.

#![forbid(unsafe_code)]

mod release;
mod show;
mod target;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand, ValueEnum};
use kun_cni::allocator::{Allocator, AllocatorError};
use kun_config::Config;
use kun_control::{ClientError, Request, Response};
use kun_telemetry::LoadError;

use show::Shown;
use target::{Destination, QuestionError, ResolveError};

const WRONG: u8 = 1;
const USAGE: u8 = 2;
const NO_AGENT: u8 = 3;

/// Where the agent listens when there is no configuration to say it.
const DEFAULT_SOCKET: &str = "/run/kun/agent.sock";

/// Asks this node's agent.
#[derive(Debug, Parser)]
#[command(
    version,
    arg_required_else_help = true,
    after_help = "Exit codes: 0 all is well, 1 something is not as it should be, 2 usage or configuration, 3 no agent answers."
)]
struct Flags {
    /// The configuration, for the agent's socket and the cluster.
    #[arg(long, global = true, default_value = "/etc/kun/kun.yaml")]
    config: PathBuf,
    /// The agent's socket; overrides the configuration.
    #[arg(long, global = true)]
    socket: Option<PathBuf>,
    /// How to print.
    #[arg(long, global = true, value_enum, default_value_t = Output::Table)]
    output: Output,
    /// Check the configuration, print its faults or `ok`, and exit.
    #[arg(long)]
    check_config: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For people.
    Table,
    /// The agent's answer as it came.
    Json,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// How this node does: cluster view, proxy, addresses, NAT64, BGP, kernel.
    Status,
    /// Why a packet goes where it goes: which service, backend, endpoint and manifest decide.
    Why {
        /// Transport protocol.
        #[arg(value_parser = ["tcp", "udp", "sctp"])]
        protocol: String,
        /// `[source] <destination> <port>`; the destination is an address or a Service's name; `host:port` and `[v6]:port` will do.
        #[arg(required = true, num_args = 1..=3, value_name = "WORDS")]
        words: Vec<String>,
    },
    /// Pools, blocks and every slot that is not free: whose it is, and why it is not free yet. Without an agent: what the node's store
    /// holds.
    Ipam {
        #[command(subcommand)]
        action: Option<IpamAction>,
    },
}

#[derive(Debug, Subcommand)]
enum IpamAction {
    /// Lets an address go by hand; asks twice. An allocated one begins to cool, another waits for no evidence any more.
    Release {
        /// IPv6 or IPv4.
        address: std::net::IpAddr,
        /// The generation that `kunctl ipam` showed; another one by now: refused.
        #[arg(long)]
        generation: Option<u64>,
        /// Do not ask; needs --generation.
        #[arg(long)]
        yes: bool,
        /// Even if an interface still carries it, which is removed then, so that its pod is without network; needs --generation.
        #[arg(long)]
        force: bool,
    },
    /// Puts a new address store in the place of a damaged one. Run it on the node, with the agent stopped.
    Rebuild {
        /// Where the container runtime keeps the results of its plugins.
        #[arg(long, default_value = kun_cni::rebuild::RESULTS)]
        results: PathBuf,
    },
}

#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Question(#[from] QuestionError),
    #[error(transparent)]
    Resolve(#[from] ResolveError),
    #[error(transparent)]
    Agent(#[from] ClientError),
    #[error(transparent)]
    Store(#[from] AllocatorError),
    #[error(transparent)]
    Release(#[from] release::ReleaseError),
    #[error(transparent)]
    Rebuild(#[from] kun_cni::rebuild::RebuildError),
    #[error("{}: there is no configuration; the store's directory is in it", .0.display())]
    NoConfig(PathBuf),
    #[error("{0}")]
    Refused(String),
    #[error("the agent answered something else than was asked; are both programs of one version?")]
    OtherAnswer,
    #[error("the answer cannot be written ({0})")]
    Json(#[from] serde_json::Error),
    #[error("the answer cannot be written ({0})")]
    Output(#[from] std::io::Error),
}

impl Failure {
    fn code(&self) -> u8 {
        match self {
            Self::Load(_) | Self::Question(_) | Self::Resolve(_) | Self::NoConfig(_) => USAGE,
            Self::Agent(_) | Self::OtherAnswer => NO_AGENT,
            Self::Refused(_)
            | Self::Store(_)
            | Self::Release(_)
            | Self::Rebuild(_)
            | Self::Json(_)
            | Self::Output(_) => WRONG,
        }
    }
}

fn main() -> ExitCode {
    let flags = Flags::parse();
    if flags.check_config {
        return kun_telemetry::check_config(&flags.config);
    }
    let Some(command) = &flags.command else {
        Flags::command()
            .error(
                clap::error::ErrorKind::MissingSubcommand,
                "what to ask: status, why or ipam",
            )
            .exit()
    };
    match run(&flags, command) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(WRONG),
        Err(failure) => {
            eprintln!("kunctl: {failure}");
            ExitCode::from(failure.code())
        }
    }
}

/// Whether all is as it should be.
fn run(flags: &Flags, command: &Command) -> Result<bool, Failure> {
    let config = config(flags)?;
    let socket = match (&flags.socket, &config) {
        (Some(socket), _) => socket.as_path(),
        (None, Some(config)) => config.agent.socket.as_path(),
        (None, None) => Path::new(DEFAULT_SOCKET),
    };
    match command {
        Command::Status => {
            let answer = ask(socket, &Request::Status)?;
            let Response::Status { status } = &answer else {
                return Err(Failure::OtherAnswer);
            };
            print(flags.output, &answer, &show::status(status, columns()))
        }
        Command::Ipam { action: None } => {
            let answer = rows(flags, socket, config.as_ref())?;
            let Response::Ipam {
                slots,
                blocks,
                pools,
            } = &answer
            else {
                return Err(Failure::OtherAnswer);
            };
            let shown = show::ipam(pools, blocks, slots, columns());
            print(flags.output, &answer, &shown)
        }
        Command::Ipam {
            action:
                Some(IpamAction::Release {
                    address,
                    generation,
                    yes,
                    force,
                }),
        } => {
            let wish = release::Wish {
                address: *address,
                generation: *generation,
                yes: *yes,
                force: *force,
            };
            let answer = ask(socket, &Request::Ipam)?;
            let Response::Ipam { slots, .. } = &answer else {
                return Err(Failure::OtherAnswer);
            };
            let row = release::agreed(wish, slots, release::from_terminal)?;
            let answer = ask(
                socket,
                &Request::Free {
                    slot: row.slot,
                    generation: row.generation,
                    forced: wish.force,
                },
            )?;
            let shown = Shown {
                text: format!("{address}: let go; it is used again once it has rested\n"),
                good: true,
            };
            print(flags.output, &answer, &shown)
        }
        Command::Ipam {
            action: Some(IpamAction::Rebuild { results }),
        } => {
            let config = config
                .as_ref()
                .ok_or_else(|| Failure::NoConfig(flags.config.clone()))?;
            let rebuilt = kun_cni::rebuild::rebuild(config, results)?;
            let kept = rebuilt.damaged.map_or_else(String::new, |at| {
                format!("; the damaged store is {}", at.display())
            });
            let shown = Shown {
                text: format!(
                    "{} attachments keep their slots, every other slot cools{kept}\n",
                    rebuilt.kept
                ),
                good: true,
            };
            print(flags.output, &Response::Done, &shown)
        }
        Command::Why { protocol, words } => {
            let question = target::question(words)?;
            let destinations = match &question.destination {
                Destination::Address(address) => vec![*address],
                Destination::Name(name) => {
                    target::resolve(name, config.as_ref().map(|c| &c.cluster))?
                }
            };
            let mut good = true;
            for destination in destinations {
                let answer = ask(
                    socket,
                    &Request::Why {
                        protocol: protocol.clone(),
                        source: question.source,
                        destination,
                        port: question.port,
                    },
                )?;
                let Response::Why { steps } = &answer else {
                    return Err(Failure::OtherAnswer);
                };
                let to = std::net::SocketAddr::new(destination, question.port);
                let from = question.source.map(|s| format!("{s} ")).unwrap_or_default();
                good &= print(
                    flags.output,
                    &answer,
                    &show::why(&format!("{protocol} {from}→ {to}"), steps, columns()),
                )?;
            }
            Ok(good)
        }
    }
}

/// With `--socket` a configuration is welcome, not needed; nor is the default one when it does not exist.
fn config(flags: &Flags) -> Result<Option<Config>, Failure> {
    match kun_telemetry::load(&flags.config) {
        Ok(config) => Ok(Some(config)),
        Err(_) if flags.socket.is_some() => Ok(None),
        Err(LoadError::Read { source, .. })
            if source.kind() == std::io::ErrorKind::NotFound
                && flags.config == Path::new("/etc/kun/kun.yaml") =>
        {
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}

fn ask(socket: &Path, request: &Request) -> Result<Response, Failure> {
    match kun_control::ask(socket, request)? {
        Response::Failed { message } => Err(Failure::Refused(message)),
        answer => Ok(answer),
    }
}

/// All slots, of the agent; where none answers, of the store that the plugin alone uses. None is made where there is none.
fn rows(flags: &Flags, socket: &Path, config: Option<&Config>) -> Result<Response, Failure> {
    let no_agent = match ask(socket, &Request::Ipam) {
        Err(Failure::Agent(error @ ClientError::NoAgent { .. })) => error,
        asked => return asked,
    };
    let named = config.filter(|_| flags.socket.is_none());
    let store = named.map(|config| (config, config.agent.state_dir.join(kun_cni::store::FILE)));
    let Some((config, store)) = store.filter(|(_, store)| store.exists()) else {
        return Err(no_agent.into());
    };
    eprintln!("kunctl: {no_agent} This is what {} holds.", store.display());
    match Allocator::open(config)?.ask(&Request::Ipam)? {
        Response::Failed { message } => Err(Failure::Refused(message)),
        answer => Ok(answer),
    }
}

/// What the shell says of the terminal, also of one that is not ours: `kunctl ipam | less`. `None`: the terminal is asked.
fn columns() -> Option<u16> {
    std::env::var("COLUMNS")
        .ok()?
        .parse()
        .ok()
        .filter(|columns| *columns > 0)
}

fn print(output: Output, answer: &Response, shown: &Shown) -> Result<bool, Failure> {
    let mut out = std::io::stdout().lock();
    let written = match output {
        Output::Table => out.write_all(shown.text.as_bytes()),
        Output::Json => writeln!(out, "{}", serde_json::to_string(answer)?),
    };
    match written.and_then(|()| out.flush()) {
        // Whoever reads has seen enough: `kunctl ipam | head`.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(shown.good),
        Err(error) => Err(error.into()),
        Ok(()) => Ok(shown.good),
    }
}
