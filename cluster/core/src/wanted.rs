//! What a program wants to see of the cluster.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::{Kind, Object, ObjectName};

/// Which objects of a kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Scope {
    /// All of them.
    All,
    /// Those of one node: its Pods, its IPAMBlocks, its BGPSessions, the Node of that name. Ten thousand nodes that each read all Pods would be
    /// the API server's whole load.
    Node(Arc<str>),
    /// Those of one namespace.
    Namespace(Arc<str>),
    /// One of them. An API server keeps who watches one object apart from who watches a kind, so that many may.
    Named(ObjectName),
}

impl Scope {
    /// The namespace that all of it is in; `None`: several, or none.
    pub fn namespace(&self) -> Option<&str> {
        match self {
            Self::All | Self::Node(_) => None,
            Self::Namespace(namespace) => Some(namespace),
            Self::Named(name) => Some(&name.namespace)
                .filter(|n| !n.is_empty())
                .map(|n| &**n),
        }
    }

    /// Whether an object is in it.
    pub fn admits(&self, object: &Object) -> bool {
        match (self, object) {
            (Self::Node(node), Object::Pod(pod)) => pod.node.as_ref() == Some(node),
            (Self::Node(node), Object::IpamBlock(block)) => block.node() == node,
            (Self::Node(node), Object::BgpSession(session)) => session.spec.node.shared() == node,
            (Self::Node(node), Object::Node(own)) => own.meta.name.name == *node,
            (Self::Namespace(namespace), object) => object.meta().name.namespace == *namespace,
            (Self::Named(name), object) => object.meta().name == *name,
            // All of it, or a kind that has no node.
            _ => true,
        }
    }
}

/// What a program wants to see: kinds, each with its scope.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wanted {
    scopes: BTreeMap<Kind, Scope>,
    revisions: BTreeSet<Kind>,
}

impl Wanted {
    /// Nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// And all objects of these kinds.
    pub fn all(mut self, kinds: impl IntoIterator<Item = Kind>) -> Self {
        self.scopes
            .extend(kinds.into_iter().map(|kind| (kind, Scope::All)));
        self
    }

    /// And a node's objects of a kind.
    pub fn of_node(mut self, kind: Kind, node: &str) -> Self {
        self.scopes.insert(kind, Scope::Node(node.into()));
        self
    }

    /// And a namespace's objects of a kind.
    pub fn of_namespace(mut self, kind: Kind, namespace: &str) -> Self {
        self.scopes.insert(kind, Scope::Namespace(namespace.into()));
        self
    }

    /// And one object.
    pub fn named(mut self, kind: Kind, name: ObjectName) -> Self {
        self.scopes.insert(kind, Scope::Named(name));
        self
    }

    /// And, of a kind that is wanted, which revision the view has reached ([`crate::Event::Reached`]).
    pub fn revisions_of(mut self, kind: Kind) -> Self {
        self.revisions.insert(kind);
        self
    }

    /// Whether that is wanted.
    pub fn wants_revisions(&self, kind: Kind) -> bool {
        self.revisions.contains(&kind)
    }

    /// Kinds and scopes, in order of the kinds.
    pub fn iter(&self) -> impl Iterator<Item = (Kind, &Scope)> {
        self.scopes.iter().map(|(kind, scope)| (*kind, scope))
    }

    /// The scope of a kind; `None`: not wanted.
    pub fn scope(&self, kind: Kind) -> Option<&Scope> {
        self.scopes.get(&kind)
    }

    /// Whether an object is among them.
    pub fn admits(&self, object: &Object) -> bool {
        self.scope(object.kind())
            .is_some_and(|scope| scope.admits(object))
    }
}
