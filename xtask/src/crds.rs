//! `cargo xtask crds`: the CustomResourceDefinitions in `deploy/crds/`, made from the Rust types, and the list of them for kustomize.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use kun_cluster_core::crd::DEFINITIONS;

use crate::command;

const HEAD: &str =
    "# Made from the Rust types by `cargo xtask crds`; edit cluster/core/src/crd/ instead.\n";

pub(crate) fn crds(check: bool) -> Result<()> {
    let root = command::root();
    if check {
        let mut wrong = Vec::new();
        differences(&root, &mut wrong)?;
        if !wrong.is_empty() {
            bail!("{}", wrong.join("\n"));
        }
        println!(
            "crds: {} definitions are what the types say",
            DEFINITIONS.len()
        );
        return Ok(());
    }
    for (path, text) in made(&root)? {
        fs::write(&path, text).with_context(|| path.display().to_string())?;
        println!("{}", path.display());
    }
    Ok(())
}

/// What is committed and is not what the types say.
pub(crate) fn differences(root: &Path, wrong: &mut Vec<String>) -> Result<()> {
    let made = made(root)?;
    for (path, text) in &made {
        let is_same = fs::read_to_string(path).is_ok_and(|committed| committed == *text);
        if !is_same {
            wrong.push(format!(
                "{}: not what the Rust types say; run cargo xtask crds",
                path.strip_prefix(root).unwrap_or(path).display()
            ));
        }
    }
    let folder = root.join("deploy/crds");
    for entry in fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        let is_definition = path.file_name().is_some_and(|name| {
            let name = name.to_string_lossy();
            name.starts_with("kun.network_")
        });
        if is_definition && !made.contains_key(&path) {
            wrong.push(format!(
                "{}: no Rust type makes it; remove it",
                path.strip_prefix(root).unwrap_or(&path).display()
            ));
        }
    }
    Ok(())
}

fn made(root: &Path) -> Result<BTreeMap<PathBuf, String>> {
    let folder = root.join("deploy/crds");
    let of = DEFINITIONS.iter().map(|definition| {
        let text = serde_saphyr::to_string(&definition.manifest()).context("writing YAML")?;
        let path = folder.join(format!("kun.network_{}.yaml", definition.resource.plural));
        Ok((path, format!("{HEAD}{text}")))
    });
    let mut made = of.collect::<Result<BTreeMap<_, _>>>()?;
    // So that deploy/base takes all of them in.
    let mut list = format!(
        "{HEAD}apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nresources:\n"
    );
    for name in made.keys().filter_map(|path| path.file_name()) {
        list.push_str(&format!("  - {}\n", name.to_string_lossy()));
    }
    made.insert(folder.join("kustomization.yaml"), list);
    Ok(made)
}
