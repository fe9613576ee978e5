//! `kun-lab`: brings a lab up, probes it, takes it down. `cargo xtask lab` builds everything and calls this.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use kun_tests::lab::cluster::room;
use kun_tests::lab::names::LabName;
use kun_tests::lab::{Lab, Options, client, down, probes, server};

/// A whole IPv6-first cluster network on one machine.
#[derive(Parser)]
#[command(
    name = "cargo xtask lab",
    bin_name = "cargo xtask lab",
    subcommand_negates_reqs = true
)]
struct Arguments {
    #[command(subcommand)]
    task: Option<Task>,
    /// A file or a folder of Kubernetes manifests; default: deploy/lab.
    #[arg(long)]
    manifests: Option<PathBuf>,
    /// On a real Kubernetes: API server, controllers, and a containerd and kubelet on every node.
    #[arg(long)]
    control_plane: bool,
    /// Leave the lab standing after the probes.
    #[arg(long)]
    keep: bool,
    /// The lab's name; labs of different names stand side by side.
    #[arg(long, default_value = "lab")]
    name: String,
    /// `table` or `json`.
    #[arg(long, default_value = "table", value_parser = ["table", "json"])]
    output: String,
}

#[derive(Subcommand)]
enum Task {
    /// Remove everything of a lab, also after a crash.
    Down {
        /// The lab's name.
        #[arg(long, default_value = "lab")]
        name: String,
        /// Every lab of this machine.
        #[arg(long)]
        all: bool,
    },
    /// Inside a pod: the server.
    #[command(hide = true)]
    Serve {
        #[arg(long)]
        name: String,
        #[arg(long)]
        tcp: Vec<u16>,
        #[arg(long)]
        udp: Vec<u16>,
    },
    /// Inside a pod: the client.
    #[command(hide = true)]
    Client,
    /// Inside a pod's sandbox: what holds it.
    #[command(hide = true)]
    Pause,
    /// Holds a machine's namespaces.
    #[command(hide = true)]
    Room {
        #[arg(long)]
        lab: PathBuf,
        #[arg(long)]
        state: PathBuf,
        #[arg(long)]
        hostname: String,
    },
}

/// A signal asked for the end.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let done = match &arguments.task {
        None => up(&arguments),
        Some(Task::Down { name, all }) => take_down(name, *all).map(|()| true),
        Some(Task::Serve { name, tcp, udp }) => server::serve(name, tcp, udp).map(|()| true),
        Some(Task::Client) => client::serve().map(|()| true),
        Some(Task::Pause) => server::pause().map(|()| true),
        Some(Task::Room {
            lab,
            state,
            hostname,
        }) => room::hold(&room::Plan {
            lab: lab.clone(),
            state: state.clone(),
            hostname: hostname.clone(),
        })
        .map(|()| true),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(_) if INTERRUPTED.load(Ordering::Relaxed) => loop {
            // What failed is what the signal's thread took away; that thread ends the program.
            std::thread::park();
        },
        Err(e) => {
            eprintln!("lab: {e:#}");
            ExitCode::from(2)
        }
    }
}

/// Whether every probe held.
fn up(arguments: &Arguments) -> Result<bool> {
    let began = Instant::now();
    let me = std::env::current_exe().context("finding the running program")?;
    let options = Options {
        name: LabName::new(&arguments.name)?,
        manifests: arguments
            .manifests
            .clone()
            .unwrap_or_else(|| PathBuf::from("deploy/lab")),
        programs: me.parent().unwrap_or(Path::new(".")).to_owned(),
        keep: arguments.keep,
        control_plane: arguments.control_plane,
        deploy: PathBuf::from("deploy"),
    };
    down_on_signal(options.name.clone())?;
    let progress = Progress::new();
    let lab = Lab::up(&options, &mut |what| progress.step(what))?;
    let report = probes::probe(&lab, &mut |what| progress.step(what))?;
    progress.end();
    for note in &lab.notes {
        eprintln!("note: {note}");
    }
    let holds = report.holds();
    if arguments.output == "json" {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        println!("{}", report.table());
        let made: u32 = report.lines.iter().map(|line| line.made).sum();
        let held: u32 = report.lines.iter().map(|line| line.held).sum();
        println!(
            "{held} of {made} probes held, {} pods, {:.0} s",
            lab.pods.len(),
            began.elapsed().as_secs_f64()
        );
    }
    if arguments.keep {
        eprintln!("{}", lab.doors());
        lab.keep();
    }
    Ok(holds)
}

fn take_down(name: &str, all: bool) -> Result<()> {
    let names = if all {
        down::all()
    } else {
        vec![LabName::new(name)?]
    };
    for name in names {
        let _lock = down::Lock::take(&name)?;
        let stood = down::stands(&name);
        down::down(&name);
        println!(
            "lab `{}`: {}",
            name.as_str(),
            if stood {
                "removed"
            } else {
                "nothing was there"
            }
        );
    }
    Ok(())
}

/// Ctrl-C and SIGTERM take the lab down before the program ends.
fn down_on_signal(name: LabName) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let (mut interrupt, mut terminate) = {
        use tokio::signal::unix::{SignalKind, signal};
        let _guard = runtime.enter();
        (
            signal(SignalKind::interrupt())?,
            signal(SignalKind::terminate())?,
        )
    };
    std::thread::spawn(move || {
        runtime.block_on(async {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        });
        INTERRUPTED.store(true, Ordering::Relaxed);
        eprintln!("taking the lab down …");
        down::down_and_release(&name);
        std::process::exit(130);
    });
    Ok(())
}

/// A spinner with the step that runs, for a person at a terminal; one line a step elsewhere.
struct Progress {
    bar: ProgressBar,
    plain: bool,
}

impl Progress {
    fn new() -> Self {
        let bar = ProgressBar::new_spinner();
        if let Ok(style) = ProgressStyle::with_template("{spinner} {elapsed:>3} {msg}") {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(100));
        Self {
            plain: bar.is_hidden(),
            bar,
        }
    }

    fn step(&self, what: &str) {
        if self.plain {
            eprintln!("   {what}");
        } else {
            self.bar.set_message(what.to_owned());
        }
    }

    fn end(&self) {
        self.bar.finish_and_clear();
    }
}
