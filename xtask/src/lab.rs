//! `cargo xtask lab`: installs what is missing, builds the programs, and hands over to `kun-lab`.

use std::process::Command;

use anyhow::{Result, bail};

use crate::{command, peers, setup};

/// Flags of `lab`, handed on to `kun-lab` as they are.
#[derive(clap::Args)]
#[command(disable_help_flag = true)]
pub(crate) struct Arguments {
    /// `[--manifests PATH] [--control-plane] [--keep] [--name NAME] [--output json]`, or `down [--name NAME | --all]`; `--help` for all.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    words: Vec<String>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let down = arguments.words.first().is_some_and(|word| word == "down");
    if !down {
        setup::packages(setup::PACKAGES)?;
    }
    if arguments.words.iter().any(|word| word == "--control-plane") {
        peers::ensure(Some("cluster"))?;
    }
    build()?;
    let status = program(&arguments.words).status()?;
    // The lab has said what was wrong; one line is enough.
    match status.code() {
        Some(0) => Ok(()),
        Some(code) => std::process::exit(code),
        None => bail!("kun-lab: {status}"),
    }
}

/// Builds the lab and every program that it runs.
pub(crate) fn build() -> Result<()> {
    // The whole workspace, as `cargo test` sees it: the same features, hence the same artefacts.
    command::run(&mut command::cargo(&["build", "--workspace", "--bins"]))
}

/// `kun-lab` with its words.
pub(crate) fn program(words: &[String]) -> Command {
    let mut lab = Command::new(command::target().join("debug/kun-lab"));
    lab.args(words).current_dir(command::root());
    lab
}
