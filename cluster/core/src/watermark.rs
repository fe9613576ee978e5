//! How watermarks stand on the API server: what each node's proxy has applied of the EndpointSlices, on a Lease of its own, and what
//! the operator made of all of them, on one. Names, annotations, and both directions between them and values. Who writes when:
//! `kun_cni_core::watermark`.
//!
//! Leases, since they are the API's own for "I am this far", small, and never validated by webhooks that cost. The nodes' are in a
//! namespace of their own: who may write one may write all of a namespace, and other Leases say who leads a cluster's controllers.
//! The fold's is elsewhere, so that nodes can be given the right to read it and none to write it; ten thousand nodes watch it by
//! name, which costs an API server what its own events cost and nothing for other Leases.
//! Governing: coordination.k8s.io/v1 Lease; KEP-5504 for the numbers.

use std::sync::Arc;

use serde_json::{Value, json};

use crate::{Lease, ObjectName};

/// Where nodes' Leases are; each has its node's name.
pub const NAMESPACE: &str = "kun-node-lease";

/// Namespace and name of the fold.
pub const FOLD: (&str, &str) = ("kube-system", "kun-watermark");

const REVISION: &str = "kun.network/endpoints-revision";
const NODE_UID: &str = "kun.network/node-uid";
const SLOWEST: &str = "kun.network/slowest";

/// Of an annotation's names: three nodes with names of 253 bytes, and room.
const MAX_NAMES: usize = 8;

/// What a node has published.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    /// metadata.uid of its Node.
    pub uid: Arc<str>,
    /// What its proxy has applied.
    pub revision: u64,
}

/// What was folded.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Fold {
    /// What every node that counts has applied; `None`: never known so far.
    pub revision: Option<u64>,
    /// Who is waited for: those of whom nothing is known, else the slowest first.
    pub slowest: Vec<String>,
}

/// The name of the fold's Lease.
pub fn fold_name() -> ObjectName {
    ObjectName::new(FOLD.0, FOLD.1)
}

/// A node's Lease as it is created. It goes with its Node.
pub fn node_lease(node: &str, uid: &str, revision: u64, now: &str) -> Value {
    let mut lease = node_patch(node, uid, revision, now);
    lease["metadata"]["namespace"] = json!(NAMESPACE);
    lease["metadata"]["name"] = json!(node);
    lease
}

/// The same as a merge patch of one that is there, whoever's it was: a Node made again under its name takes it over.
pub fn node_patch(node: &str, uid: &str, revision: u64, now: &str) -> Value {
    json!({
        "metadata": {
            "annotations": {REVISION: revision.to_string(), NODE_UID: uid},
            "ownerReferences": [{"apiVersion": "v1", "kind": "Node", "name": node, "uid": uid}],
        },
        "spec": {"holderIdentity": node, "renewTime": now},
    })
}

/// What a node's Lease says; `None`: it is not one of ours.
pub fn published(lease: &Lease) -> Option<Published> {
    let text = |key| lease.meta.annotations.get(key);
    Some(Published {
        uid: Arc::clone(text(NODE_UID)?),
        revision: text(REVISION)?.parse().ok()?,
    })
}

/// The fold's annotations. Empty: not known.
pub fn fold_annotations(fold: &Fold) -> [(&'static str, String); 2] {
    let names: Vec<&str> = (fold.slowest.iter().take(MAX_NAMES))
        .map(String::as_str)
        .collect();
    let revision = fold.revision.map(|r| r.to_string());
    [
        (REVISION, revision.unwrap_or_default()),
        (SLOWEST, names.join(",")),
    ]
}

/// What the fold's Lease says.
pub fn fold(lease: &Lease) -> Fold {
    fold_in(|key| lease.meta.annotations.get(key).map(|text| &**text))
}

/// The same of annotations, wherever they are.
pub fn fold_in<'a>(text: impl Fn(&str) -> Option<&'a str>) -> Fold {
    let names = text(SLOWEST).map(|names| names.split(','));
    let names = names.into_iter().flatten().filter(|name| !name.is_empty());
    Fold {
        revision: text(REVISION).and_then(|r| r.parse().ok()),
        slowest: names.take(MAX_NAMES).map(str::to_owned).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Meta, Origin};

    fn read(annotations: &Value) -> Lease {
        let pairs = annotations.as_object().into_iter().flatten();
        let annotations = pairs.map(|(k, v)| (k.as_str().into(), v.as_str().unwrap().into()));
        Lease {
            meta: Meta {
                name: fold_name(),
                uid: "u".into(),
                labels: Default::default(),
                annotations: annotations.collect(),
                origin: Origin::Api {
                    resource_version: "1".into(),
                },
            },
            holder: None,
            duration_secs: None,
            acquire_time: None,
            renew_time: None,
            transitions: 0,
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let lease = node_lease("node-a", "7a9b", 12, "2026-01-01T00:00:00.000000Z");
        assert_eq!(lease["metadata"]["ownerReferences"][0]["uid"], "7a9b");
        let said = published(&read(&lease["metadata"]["annotations"])).unwrap();
        assert_eq!((&*said.uid, said.revision), ("7a9b", 12));
        let wanted = Fold {
            revision: Some(7),
            slowest: vec!["node-b".to_owned(), "node-a".to_owned()],
        };
        let pairs = fold_annotations(&wanted).map(|(k, v)| (k.to_owned(), json!(v)));
        let object = Value::Object(pairs.into_iter().collect());
        assert_eq!(fold(&read(&object)), wanted);
    }

    #[test]
    fn what_is_no_number_says_nothing() {
        assert_eq!(published(&read(&json!({REVISION: "12"}))), None);
        assert_eq!(
            published(&read(&json!({REVISION: "x", NODE_UID: "u"}))),
            None
        );
        assert_eq!(fold(&read(&json!({REVISION: "-1"}))), Fold::default());
    }
}
