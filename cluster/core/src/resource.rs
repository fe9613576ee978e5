//! How each kind is called in the API: group, version, plural, and by which field an object belongs to a node.
//! Governing: the Kubernetes API conventions ("Resource paths").

use std::fmt::Write as _;

use crate::crd::{
    BgpAdvertisementSpec, BgpPeerSpec, BgpRouteAffinitySpec, BgpSessionSpec, BrakeOverrideSpec,
    IpPoolSpec, IpamBlockSpec, KunServiceSpec, Spec,
};
use crate::{Kind, ObjectName, Scope};

/// A resource of the API server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resource {
    /// `kind` of its objects.
    pub kind: &'static str,
    /// Group, empty for core.
    pub group: &'static str,
    /// Version.
    pub version: &'static str,
    /// Its name in paths and in RBAC rules.
    pub plural: &'static str,
    /// Whether its objects have a namespace.
    pub namespaced: bool,
}

/// The group of kun's own kinds.
pub const KUN_GROUP: &str = "kun.network";

/// Their version.
pub const KUN_VERSION: &str = "v1alpha1";

impl Resource {
    /// Of the kind that a spec belongs to.
    pub const fn of_spec<S: Spec>() -> Self {
        Self::kun(S::KIND, S::PLURAL, S::NAMESPACED)
    }

    /// A resource of kun's own.
    pub const fn kun(kind: &'static str, plural: &'static str, namespaced: bool) -> Self {
        Self {
            kind,
            group: KUN_GROUP,
            version: KUN_VERSION,
            plural,
            namespaced,
        }
    }

    const fn core(kind: &'static str, plural: &'static str, namespaced: bool) -> Self {
        Self {
            kind,
            group: "",
            version: "v1",
            plural,
            namespaced,
        }
    }

    const fn v1(group: &'static str, kind: &'static str, plural: &'static str) -> Self {
        Self {
            kind,
            group,
            version: "v1",
            plural,
            namespaced: true,
        }
    }

    /// coordination.k8s.io/v1 Lease.
    pub const LEASES: Self = Self::v1("coordination.k8s.io", "Lease", "leases");
    /// events.k8s.io/v1 Event.
    pub const EVENTS: Self = Self::v1("events.k8s.io", "Event", "events");

    /// The resource of a kind.
    pub const fn of(kind: Kind) -> Self {
        match kind {
            Kind::Service => Self::core("Service", "services", true),
            Kind::EndpointSlice => Self::v1("discovery.k8s.io", "EndpointSlice", "endpointslices"),
            Kind::Node => Self::core("Node", "nodes", false),
            Kind::Pod => Self::core("Pod", "pods", true),
            Kind::Namespace => Self::core("Namespace", "namespaces", false),
            Kind::Lease => Self::LEASES,
            Kind::IpPool => Self::of_spec::<IpPoolSpec>(),
            Kind::IpamBlock => Self::of_spec::<IpamBlockSpec>(),
            Kind::BgpPeer => Self::of_spec::<BgpPeerSpec>(),
            Kind::BgpAdvertisement => Self::of_spec::<BgpAdvertisementSpec>(),
            Kind::BgpRouteAffinity => Self::of_spec::<BgpRouteAffinitySpec>(),
            Kind::BgpSession => Self::of_spec::<BgpSessionSpec>(),
            Kind::KunService => Self::of_spec::<KunServiceSpec>(),
            Kind::BrakeOverride => Self::of_spec::<BrakeOverrideSpec>(),
        }
    }

    /// Whether kun defines it.
    pub fn is_ours(&self) -> bool {
        self.group == KUN_GROUP
    }

    /// `v1`, `discovery.k8s.io/v1`.
    pub fn api_version(&self) -> String {
        if self.group.is_empty() {
            self.version.to_owned()
        } else {
            format!("{}/{}", self.group, self.version)
        }
    }

    /// The path of all objects, of one namespace if one is given.
    pub fn collection(&self, namespace: Option<&str>) -> String {
        let mut path = if self.group.is_empty() {
            format!("/api/{}", self.version)
        } else {
            format!("/apis/{}/{}", self.group, self.version)
        };
        if let Some(namespace) = namespace.filter(|_| self.namespaced) {
            path.push_str("/namespaces/");
            encode(&mut path, namespace);
        }
        path.push('/');
        path.push_str(self.plural);
        path
    }

    /// The path of one object.
    pub fn item(&self, name: &ObjectName) -> String {
        let mut path = self.collection(Some(&name.namespace));
        path.push('/');
        encode(&mut path, &name.name);
        path
    }
}

/// Selectors that leave out at the server what would be left out here.
pub(crate) fn selectors(kind: Kind, scope: &Scope) -> Vec<(&'static str, String)> {
    let mut selectors = Vec::new();
    // Not `!service.kubernetes.io/headless`: names of headless services are answered from their slices.
    if kind == Kind::EndpointSlice {
        selectors.push(("labelSelector", "kubernetes.io/service-name".to_owned()));
    }
    if let (Scope::Node(node), Some(field)) = (scope, node_field(kind)) {
        selectors.push(("fieldSelector", format!("{field}={node}")));
    }
    if let Scope::Named(name) = scope {
        selectors.push(("fieldSelector", format!("metadata.name={}", name.name)));
    }
    selectors
}

/// The field by which an object belongs to a node, where the API server can select by it.
const fn node_field(kind: Kind) -> Option<&'static str> {
    match kind {
        Kind::Pod => Some("spec.nodeName"),
        Kind::Node => Some("metadata.name"),
        // Declared as a selectable field by its CustomResourceDefinition.
        Kind::IpamBlock | Kind::BgpSession => Some("spec.node"),
        _ => None,
    }
}

/// RFC 3986: what is not unreserved is percent-encoded.
pub(crate) fn encode(into: &mut String, text: &str) {
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                into.push(char::from(byte));
            }
            _ => {
                // Writing to a String cannot fail.
                let _ = write!(into, "%{byte:02X}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_those_of_the_api() {
        let service = ObjectName::new("shop", "front");
        let cases = [
            (
                Resource::of(Kind::Service).item(&service),
                "/api/v1/namespaces/shop/services/front",
            ),
            (
                Resource::of(Kind::EndpointSlice).collection(None),
                "/apis/discovery.k8s.io/v1/endpointslices",
            ),
            (
                Resource::of(Kind::Node).item(&ObjectName::new("", "a b")),
                "/api/v1/nodes/a%20b",
            ),
            (
                Resource::of(Kind::IpPool).collection(Some("shop")),
                "/apis/kun.network/v1alpha1/ippools",
            ),
        ];
        for (path, expected) in cases {
            assert_eq!(path, expected);
        }
    }

    #[test]
    fn a_node_selects_its_own() {
        let scope = Scope::Node("a".into());
        let selectors = |kind| selectors(kind, &scope);
        assert_eq!(
            selectors(Kind::Pod),
            [("fieldSelector", "spec.nodeName=a".to_owned())]
        );
        assert_eq!(
            selectors(Kind::Node),
            [("fieldSelector", "metadata.name=a".to_owned())]
        );
        assert_eq!(
            selectors(Kind::IpamBlock),
            [("fieldSelector", "spec.node=a".to_owned())]
        );
        assert_eq!(
            selectors(Kind::EndpointSlice),
            [("labelSelector", "kubernetes.io/service-name".to_owned())]
        );
        let one = Scope::Named(ObjectName::new("kube-system", "w"));
        assert_eq!(one.namespace(), Some("kube-system"));
        assert_eq!(
            super::selectors(Kind::Lease, &one),
            [("fieldSelector", "metadata.name=w".to_owned())]
        );
    }
}
