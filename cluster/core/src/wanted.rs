//! What a program wants to see of the cluster.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::{Kind, Object};

/// Which objects of a kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Scope {
    /// All of them.
    All,
    /// Those of one node: its Pods, its IPAMBlocks, its BGPSessions, the Node of that name. Ten thousand nodes that each read all Pods would be
    /// the API server's whole load.
    Node(Arc<str>),
}

impl Scope {
    /// Whether an object is in it.
    pub fn admits(&self, object: &Object) -> bool {
        match (self, object) {
            (Self::Node(node), Object::Pod(pod)) => pod.node.as_ref() == Some(node),
            (Self::Node(node), Object::IpamBlock(block)) => block.node() == node,
            (Self::Node(node), Object::BgpSession(session)) => session.spec.node.shared() == node,
            (Self::Node(node), Object::Node(own)) => own.meta.name.name == *node,
            // All of it, or a kind that has no node.
            _ => true,
        }
    }
}

/// What a program wants to see: kinds, each with its scope.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wanted(BTreeMap<Kind, Scope>);

impl Wanted {
    /// Nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// And all objects of these kinds.
    pub fn all(mut self, kinds: impl IntoIterator<Item = Kind>) -> Self {
        self.0
            .extend(kinds.into_iter().map(|kind| (kind, Scope::All)));
        self
    }

    /// And a node's objects of a kind.
    pub fn of_node(mut self, kind: Kind, node: &str) -> Self {
        self.0.insert(kind, Scope::Node(node.into()));
        self
    }

    /// Kinds and scopes, in order of the kinds.
    pub fn iter(&self) -> impl Iterator<Item = (Kind, &Scope)> {
        self.0.iter().map(|(kind, scope)| (*kind, scope))
    }

    /// The scope of a kind; `None`: not wanted.
    pub fn scope(&self, kind: Kind) -> Option<&Scope> {
        self.0.get(&kind)
    }

    /// Whether an object is among them.
    pub fn admits(&self, object: &Object) -> bool {
        self.scope(object.kind())
            .is_some_and(|scope| scope.admits(object))
    }
}
