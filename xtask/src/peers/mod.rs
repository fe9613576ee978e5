//! `cargo xtask peers`: builds what tests run beside kun and Debian has not in a current version, once, into the cache.
//!
//! One table says what (`table.rs`); any Go from 1.21 on builds it (`go.rs`) with one toolchain, which it fetches by itself. Each peer has a stamp of what it was built from; where that is unchanged nothing is done. Built one after the other, with a
//! low priority: a machine of two cores keeps working meanwhile.

mod control_plane;
mod go;
mod table;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use go::Go;
use table::{PEERS, Peer};

/// Flags of `peers`.
#[derive(clap::Args, Default)]
pub(crate) struct Arguments {
    /// These alone; may be given more than once.
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,
    /// Say what there is, in which version, whether it is built and what uses it; build nothing.
    #[arg(long)]
    list: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let directory = kun_ebpf_build::cache_dir().join("peers");
    let all = every()?;
    if arguments.list {
        println!("{}", listed(&all, &directory));
        return Ok(());
    }
    for wanted in &arguments.only {
        if !all.iter().any(|item| item.name == wanted) {
            let known: Vec<_> = all.iter().map(|item| item.name).collect();
            bail!(
                "peers --only {wanted}: no such peer; there are {}",
                known.join(", ")
            );
        }
    }
    let wanted = |item: &&Item| {
        arguments.only.is_empty() || arguments.only.iter().any(|name| name == item.name)
    };
    build(&all.iter().filter(wanted).collect::<Vec<_>>(), &directory)
}

/// Builds those that the tests of this part of the workspace run; of every part when `None`.
pub(crate) fn ensure(part: Option<&str>) -> Result<()> {
    let all = every()?;
    let wanted: Vec<_> = all
        .iter()
        .filter(|item| match part {
            Some(part) => item.parts.contains(&part),
            None => !item.parts.is_empty(),
        })
        .collect();
    build(&wanted, &kun_ebpf_build::cache_dir().join("peers"))
}

/// What the table and the control plane's module have in common.
struct Item {
    name: &'static str,
    version: String,
    what_for: &'static str,
    parts: &'static [&'static str],
    /// Where the programs go, from the peers' directory.
    programs: Vec<PathBuf>,
    /// All that the programs depend on; another stamp, another build.
    stamp: String,
    source: Source,
}

enum Source {
    ControlPlane,
    Module(&'static Peer),
}

fn every() -> Result<Vec<Item>> {
    let mut all = vec![control_plane::item()?];
    all.extend(PEERS.iter().map(|peer| Item {
        name: peer.name,
        version: peer.version.to_owned(),
        what_for: peer.what_for,
        parts: peer.parts,
        programs: peer.programs(),
        stamp: peer.stamp(),
        source: Source::Module(peer),
    }));
    Ok(all)
}

impl Item {
    fn stamp_file(&self, directory: &Path) -> PathBuf {
        directory.join("stamps").join(self.name)
    }

    fn is_built(&self, directory: &Path) -> bool {
        fs::read_to_string(self.stamp_file(directory)).is_ok_and(|stamp| stamp == self.stamp)
            && self.programs.iter().all(|p| directory.join(p).is_file())
    }
}

fn build(wanted: &[&Item], directory: &Path) -> Result<()> {
    let missing: Vec<_> = wanted.iter().filter(|i| !i.is_built(directory)).collect();
    if missing.is_empty() {
        println!("peers: {} of {} are built", wanted.len(), wanted.len());
        return Ok(());
    }
    sweep(directory);
    let go = Go::find_or_install()?;
    println!("peers: {} builds {}", go.describe(), directory.display());
    for (index, item) in missing.iter().enumerate() {
        println!(
            "peers: {} of {}: {} {}",
            index + 1,
            missing.len(),
            item.name,
            item.version
        );
        let began = Instant::now();
        // Programs that run are replaced, never written into: each is built beside its place and renamed.
        let fresh = directory.join(format!("new-{}", std::process::id()));
        let built = (|| {
            fs::create_dir_all(&fresh).with_context(|| fresh.display().to_string())?;
            match item.source {
                Source::ControlPlane => control_plane::build(&go, &fresh)?,
                Source::Module(peer) => go.install(peer, &fresh)?,
            }
            place(item, &fresh, directory)
        })();
        let _ = fs::remove_dir_all(&fresh);
        let bytes = built.with_context(|| format!("peers: {} {}", item.name, item.version))?;
        println!(
            "peers: {}: {:.0} s, {} MB",
            item.name,
            began.elapsed().as_secs_f64(),
            bytes >> 20
        );
    }
    Ok(())
}

/// Removes what builds that were killed have left.
fn sweep(directory: &Path) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let maker = name.to_str().and_then(|name| name.strip_prefix("new-"));
        if maker.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// Moves what was built to where it belongs, then stamps it; gives its size.
fn place(item: &Item, fresh: &Path, directory: &Path) -> Result<u64> {
    let mut bytes = 0;
    for program in &item.programs {
        let built = fresh.join(program.file_name().unwrap_or_default());
        let to = directory.join(program);
        if let Some(parent) = to.parent() {
            fs::create_dir_all(parent).with_context(|| parent.display().to_string())?;
        }
        bytes += fs::metadata(&built)
            .with_context(|| built.display().to_string())?
            .len();
        fs::rename(&built, &to).with_context(|| to.display().to_string())?;
    }
    let stamp = item.stamp_file(directory);
    fs::create_dir_all(directory.join("stamps"))?;
    fs::write(&stamp, &item.stamp).with_context(|| stamp.display().to_string())?;
    Ok(bytes)
}

fn listed(all: &[Item], directory: &Path) -> comfy_table::Table {
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::UTF8_BORDERS_ONLY);
    table.set_header(["name", "version", "built", "for"]);
    for item in all {
        let built = match item.is_built(directory) {
            true => "yes",
            false => "no",
        };
        table.add_row([item.name, &item.version, built, item.what_for]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_that_does_not_exist_names_those_that_do() {
        let arguments = Arguments {
            only: vec!["corends".to_owned()],
            list: false,
        };
        let error = run(&arguments).unwrap_err().to_string();
        assert!(
            error.contains("control-plane") && error.contains("coredns"),
            "{error}"
        );
    }

    #[test]
    fn names_and_programs_are_unique() {
        let all = every().unwrap();
        let names: std::collections::BTreeSet<_> = all.iter().map(|i| i.name).collect();
        assert_eq!(names.len(), all.len());
        let programs: Vec<_> = all.iter().flat_map(|i| &i.programs).collect();
        let unique: std::collections::BTreeSet<_> = programs.iter().collect();
        assert_eq!(unique.len(), programs.len());
    }

    #[test]
    fn only_the_stamp_of_the_same_sources_counts() {
        let directory = std::env::temp_dir().join(format!("kun-peers-{}", std::process::id()));
        let all = every().unwrap();
        let item = all.iter().find(|i| i.name == "cnitool").unwrap();
        let fresh = directory.join("new");
        fs::create_dir_all(&fresh).unwrap();
        fs::write(fresh.join("cnitool"), "x").unwrap();
        assert_eq!(place(item, &fresh, &directory).unwrap(), 1);
        assert!(item.is_built(&directory));
        fs::write(item.stamp_file(&directory), "another version").unwrap();
        assert!(!item.is_built(&directory));
        fs::remove_dir_all(&directory).unwrap();
    }
}
