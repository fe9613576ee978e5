//! `cargo xtask tidy`: what reviewers would otherwise have to look for.
//!
//! The arrows between crates, the purity of the cores, module docs, where `unsafe` may stand, lengths of files, ledgers whose
//! tests exist, committed definitions that the types still say, and words that belong to one machine. Everything wrong is reported at once.

mod arrows;
mod ledgers;
mod sources;

use anyhow::{Result, bail};

use crate::{command, crds};

pub(crate) fn run() -> Result<()> {
    let root = command::root();
    let mut wrong = Vec::new();
    let metadata = cargo_metadata::MetadataCommand::new()
        .manifest_path(root.join("Cargo.toml"))
        .no_deps()
        .exec()?;
    arrows::check(&metadata, &mut wrong);
    let files = sources::rust_files(&root)?;
    sources::check(&root, &files, &mut wrong)?;
    ledgers::check(&root, &mut wrong)?;
    crds::differences(&root, &mut wrong)?;
    if wrong.is_empty() {
        println!("tidy: {} source files, all in order", files.len());
        return Ok(());
    }
    for line in &wrong {
        println!("{line}");
    }
    bail!("tidy: {} faults", wrong.len())
}
