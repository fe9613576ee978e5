//! From assignments to the writes that make the API server say so, each a compare-and-swap. Pure.

use std::net::IpAddr;
use std::sync::Arc;

use kun_cluster::crd::block_name;
use kun_cluster::{IpamBlock, Meta, ObjectName, Origin, Service, Store};
use kun_config::types::BlockId;
use serde_json::{Value, json};

use crate::plan::{Assignments, Owner, is_let_go, owner_of};

/// One write. What it replaces it names by resourceVersion: if that is not what stands there, nothing is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Write {
    /// A block that has no object yet: its name follows from the block, so only one can make it.
    Claim {
        /// The block.
        block: BlockId,
        /// Its first owner.
        owner: Owner,
    },
    /// A block whose owner is gone for good, or has let go of it; perhaps to the same node, which takes it under a higher epoch alone.
    HandOver {
        /// The block.
        block: BlockId,
        /// The object's name.
        name: ObjectName,
        /// Its next owner.
        owner: Owner,
        /// Higher than that of every owner before.
        epoch: i64,
        /// What is replaced.
        version: Arc<str>,
    },
    /// status.loadBalancer of a Service.
    Addresses {
        /// The Service.
        service: ObjectName,
        /// All of them.
        addresses: Vec<IpAddr>,
        /// What is replaced.
        version: Arc<str>,
    },
}

/// What has to be written for the cluster as `store` has it to hold `wanted`; blocks first, since pods wait for them.
pub fn writes(store: &Store, wanted: &Assignments) -> Vec<Write> {
    let objects: std::collections::BTreeMap<BlockId, &Arc<IpamBlock>> = store
        .blocks()
        .map(|object| (object.block(), object))
        .collect();
    let blocks = wanted.blocks.iter().filter_map(|(block, owner)| {
        let (block, owner) = (*block, owner.clone());
        let Some(object) = objects.get(&block) else {
            return Some(Write::Claim { block, owner });
        };
        let again = is_let_go(object) && !wanted.returned.contains(&block);
        (owner_of(object) != owner || again).then(|| Write::HandOver {
            block,
            name: object.meta.name.clone(),
            owner,
            epoch: object.spec.epoch + 1,
            version: version(&object.meta),
        })
    });
    // A Service that is gone keeps its addresses here, and has no status to write.
    let addresses = wanted.addresses.iter().filter_map(|(name, addresses)| {
        let service = store.service(name)?;
        differs(service, addresses).then(|| Write::Addresses {
            service: name.clone(),
            addresses: addresses.clone(),
            version: version(&service.meta),
        })
    });
    blocks.chain(addresses).collect()
}

fn differs(service: &Service, addresses: &[IpAddr]) -> bool {
    let mut stand = service.load_balancer_ips.clone();
    stand.sort();
    stand != addresses
}

fn version(meta: &Meta) -> Arc<str> {
    match &meta.origin {
        Origin::Api { resource_version } => Arc::clone(resource_version),
        // Not read from a server, so no server has it.
        Origin::File { .. } => "".into(),
    }
}

/// An IPAMBlock that is new.
pub fn claim(block: BlockId, owner: &Owner) -> Value {
    let mut spec = json!({"first": block.first().to_string(), "node": *owner.node, "epoch": 1});
    if let Some(uid) = &owner.uid {
        spec["nodeUID"] = json!(**uid);
    }
    json!({"metadata": {"name": block_name(block)}, "spec": spec})
}

/// A merge patch (RFC 7386) to another owner.
pub fn hand_over(owner: &Owner, epoch: i64, version: &str) -> Value {
    // `null` removes: an owner without a uid must not inherit one, nor the wish that the one before return the block.
    json!({
        "metadata": {"resourceVersion": version},
        "spec": {"node": *owner.node, "nodeUID": owner.uid.as_deref(), "epoch": epoch, "draining": null},
    })
}

/// A merge patch of a Service's status.
pub fn addresses(list: &[IpAddr], version: &str) -> Value {
    let ingress: Vec<Value> = list
        .iter()
        .map(|ip| json!({"ip": ip.to_string()}))
        .collect();
    json!({
        "metadata": {"resourceVersion": version},
        "status": {"loadBalancer": {"ingress": ingress}},
    })
}
