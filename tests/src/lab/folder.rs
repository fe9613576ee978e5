//! The manifest folder that stands in for the Kubernetes API: written file by file, each by one rename; read back for what the
//! operator added.

use std::collections::BTreeMap;
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use kun_config::types::{BlockId, Slot};
use serde_json::{Value, json};

use super::names::{MACHINES, POD_V4, POD_V6_ONLY, VIPS_V4, VIPS_V6};

/// The folder.
#[derive(Debug, Clone)]
pub struct Folder {
    path: PathBuf,
}

impl Folder {
    /// Makes it.
    pub fn create(path: PathBuf) -> Result<Self> {
        fs::create_dir_all(&path).with_context(|| format!("making {}", path.display()))?;
        Ok(Self { path })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Replaces a file by these objects, in one rename: no reader sees half of it.
    pub fn write(&self, file: &str, objects: &[Value]) -> Result<()> {
        let mut text = String::new();
        for object in objects {
            text.push_str("---\n");
            text.push_str(&serde_saphyr::to_string(object).context("writing YAML")?);
        }
        let path = self.path.join(file);
        let half = self.path.join(format!(".{file}.new"));
        fs::write(&half, text).with_context(|| format!("writing {}", half.display()))?;
        fs::rename(&half, &path).with_context(|| format!("writing {}", path.display()))
    }

    /// Every object in it now, the operator's included.
    pub fn objects(&self) -> Result<Vec<Value>> {
        let mut objects = Vec::new();
        collect(&self.path, &mut objects)?;
        Ok(objects)
    }
}

/// Blocks by node, from the operator's IPAMBlocks.
pub fn blocks(objects: &[Value]) -> BTreeMap<String, Vec<BlockId>> {
    let mut blocks: BTreeMap<String, Vec<BlockId>> = BTreeMap::new();
    for object in objects.iter().filter(|o| o["kind"] == "IPAMBlock") {
        let first = object["spec"]["first"]
            .as_str()
            .and_then(|t| t.parse::<std::net::Ipv4Addr>().ok());
        let node = object["spec"]["node"].as_str();
        let block = first.and_then(|first| BlockId::new(Slot::from(first)));
        if let (Some(block), Some(node)) = (block, node) {
            blocks.entry(node.to_owned()).or_default().push(block);
        }
    }
    blocks
}

/// LoadBalancer addresses by `namespace/name`, from the operator's ServiceAddresses.
pub fn load_balancers(objects: &[Value]) -> BTreeMap<String, Vec<IpAddr>> {
    let mut found: BTreeMap<String, Vec<IpAddr>> = BTreeMap::new();
    for object in objects.iter().filter(|o| o["kind"] == "ServiceAddress") {
        let namespace = object["metadata"]["namespace"]
            .as_str()
            .unwrap_or("default");
        let name = object["metadata"]["name"].as_str().unwrap_or_default();
        let addresses = object["spec"]["addresses"].as_array().into_iter().flatten();
        let ips = addresses
            .filter_map(|ip| ip.as_str()?.parse().ok())
            .collect();
        found.insert(format!("{namespace}/{name}"), ips);
    }
    found
}

fn collect(directory: &Path, objects: &mut Vec<Value>) -> Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let hidden = path
            .file_name()
            .is_some_and(|n| n.to_string_lossy().starts_with('.'));
        let manifest = path
            .extension()
            .is_some_and(|e| e == "yaml" || e == "yml" || e == "json");
        if path.is_dir() {
            collect(&path, objects)?;
        } else if manifest && !hidden
            // A file may be renamed away between the listing and here.
            && let Ok(text) = fs::read_to_string(&path)
        {
            objects.extend(
                super::manifests::documents(&text)
                    .with_context(|| format!("{}", path.display()))?,
            );
        }
    }
    Ok(())
}

/// Nodes, namespaces and the pool: what an administrator would have made.
pub fn ground(namespaces: &[String]) -> Vec<Value> {
    let mut objects: Vec<Value> = namespaces
        .iter()
        .map(|name| json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}))
        .collect();
    for machine in &MACHINES {
        objects.push(json!({
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {
                "name": machine.name,
                "labels": {"kubernetes.io/hostname": machine.name, "topology.kubernetes.io/zone": machine.zone},
            },
            "spec": {"unschedulable": !machine.schedulable},
            "status": {
                "addresses": [
                    {"type": "InternalIP", "address": machine.v6()},
                    {"type": "InternalIP", "address": machine.v4()},
                ],
                "conditions": [{"type": "Ready", "status": "True"}],
            },
        }));
    }
    objects.push(json!({
        "apiVersion": "kun.network/v1alpha1",
        "kind": "IPPool",
        "metadata": {"name": "lab"},
        "spec": {"pods": [POD_V4, POD_V6_ONLY], "services": {"v4": [VIPS_V4], "v6": [VIPS_V6]}},
    }));
    objects
}
