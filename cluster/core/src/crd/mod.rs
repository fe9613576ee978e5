//! kun's own kinds, `kun.network/v1alpha1`: each a Rust type from which its schema, its validation and its definition for the API
//! server (`deploy/crds/`) are made. Governing: CustomResourceDefinition v1, structural schemas.
//!
//! One validation. A manifest of a folder is walked by the very schema that the API server gets, and the rules that a schema cannot say
//! stand once with both of their forms (`check`). What the server does before it validates is done alike: fields without a value are absent,
//! defaults are filled in. Status is not read strictly: the server drops the status of what is created, and an agent of an older version
//! must live with what a newer one reports.

use std::fmt;
use std::sync::{Arc, LazyLock};

use kun_config::yaml::{Cursor, Fields, Sink};
use schemars::JsonSchema;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::{KUN_GROUP, KUN_VERSION, Meta, Object, Origin, Resource};

mod bgp;
mod bgpadvertisement;
mod bgppeer;
mod bgprouteaffinity;
mod bgpsession;
mod brakeoverride;
mod check;
mod condition;
mod family;
mod ipamblock;
mod ippool;
mod kunservice;
mod manifest;
mod probe;
mod selector;
mod shape;
mod text;
mod walk;

pub use bgp::*;
pub use bgpadvertisement::*;
pub use bgppeer::*;
pub use bgprouteaffinity::*;
pub use bgpsession::*;
pub use brakeoverride::*;
pub use check::{Broken, Checked, Rule, Step};
pub use condition::*;
pub use family::*;
pub use ipamblock::*;
pub use ippool::*;
pub use kunservice::*;
pub use probe::*;
pub use selector::*;
pub use text::*;
pub use walk::Unknown;

use check::{Check, broken, broken_steps};
use shape::Shape;

/// Every type with checks, by the name that its schema carries.
static CHECKS: &[Check] = &[
    Check::of_text::<ipnet::Ipv4Net>(),
    Check::of_text::<ipnet::Ipv6Net>(),
    Check::of_text::<ipnet::IpNet>(),
    Check::of_text::<std::net::Ipv4Addr>(),
    Check::of_text::<std::net::Ipv6Addr>(),
    Check::of_text::<std::net::IpAddr>(),
    Check::of_text::<FirstSlot>(),
    Check::of_text::<PodRange>(),
    Check::of_text::<Name>(),
    Check::of_text::<Label>(),
    Check::of_text::<InterfaceName>(),
    Check::of_text::<LabelKey>(),
    Check::of_text::<LabelValue>(),
    Check::of_text::<Uid>(),
    Check::of_text::<HostName>(),
    Check::of_text::<HttpPath>(),
    Check::of_text::<UserName>(),
    Check::of_text::<Signature>(),
    Check::of_text::<Moment>(),
    Check::of_text::<Community>(),
    Check::of_text::<LargeCommunity>(),
    Check::of::<Asn>(),
    Check::of::<Requirement>(),
    Check::of::<Probe>(),
    Check::of::<IpPoolSpec>(),
    Check::of::<BgpPeerSpec>(),
    Check::of::<Auth>(),
    Check::of::<Timers>(),
    Check::of::<Ttl>(),
    Check::of::<ImportPrefix>(),
    Check::of::<Drain>(),
    Check::of::<BgpAdvertisementSpec>(),
    Check::of::<RouteSource>(),
    Check::of::<Aggregate>(),
    Check::of::<BgpRouteAffinitySpec>(),
    Check::of::<KunServiceSpec>(),
    Check::of::<Backend>(),
    Check::of::<ExternalBackend>(),
    Check::of::<Zone>(),
    Check::of::<BrakeOverrideSpec>(),
    Check::of::<BrakeScope>(),
];

/// An object of one of kun's kinds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Custom<S, T> {
    /// Name, labels, origin.
    pub meta: Meta,
    /// metadata.generation: counts the changes of `spec`. Of a manifest there is none that counts.
    pub generation: Option<i64>,
    /// What is asked for.
    pub spec: S,
    /// What became of it, where somebody said so.
    pub status: Option<T>,
}

/// A column of `kubectl get`.
#[derive(Debug, Clone, Copy)]
pub struct Column {
    name: &'static str,
    kind: &'static str,
    path: &'static str,
    about: &'static str,
    /// Shown with `-o wide` only.
    wide: bool,
}

impl Column {
    const fn new(
        name: &'static str,
        kind: &'static str,
        path: &'static str,
        about: &'static str,
    ) -> Self {
        Self {
            name,
            kind,
            path,
            about,
            wide: false,
        }
    }

    const fn wide(self) -> Self {
        Self { wide: true, ..self }
    }
}

/// The spec of one of kun's kinds: the type says everything about the kind.
pub trait Spec: DeserializeOwned + Serialize + JsonSchema + Clone + 'static {
    /// The type of its status.
    type Status: DeserializeOwned + Serialize + JsonSchema + Clone + 'static;
    /// Name.
    const KIND: &'static str;
    /// As it stands in a path of the API.
    const PLURAL: &'static str;
    /// For `kubectl`.
    const SHORT: &'static str;
    /// Whether its objects live in namespaces.
    const NAMESPACED: bool;
    /// One sentence.
    const ABOUT: &'static str;
    /// Columns of `kubectl get`, after the name and before the age.
    const COLUMNS: &'static [Column];
    /// Fields that `--field-selector` and a watch may select by.
    const SELECTABLE: &'static [&'static str] = &[];
    /// Rules about the object as a whole; `self` has metadata.name, spec and status.
    const RULES: &'static [Rule<Custom<Self, Self::Status>>];
    /// Rules about a change of it.
    const STEPS: &'static [Step<Custom<Self, Self::Status>>];

    /// Any object of it.
    fn object(object: Arc<Custom<Self, Self::Status>>) -> Object;
    /// It, of any object.
    fn of(object: &Object) -> Option<&Arc<Custom<Self, Self::Status>>>;
}

/// A kind without its type.
pub struct Definition {
    /// How it is called in the API.
    pub resource: Resource,
    manifest: fn() -> Value,
    read: fn(&'static Shapes, &Fields<'_, '_>, Meta, How) -> Option<Object>,
    broken_steps: fn(&Object, &Object) -> Vec<Broken>,
    shapes: LazyLock<Shapes>,
}

impl fmt::Debug for Definition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Definition")
            .field("resource", &self.resource)
            .finish_non_exhaustive()
    }
}

/// The schemas of a kind, ready to walk by.
#[derive(Debug)]
struct Shapes {
    spec: Shape,
    status: Shape,
}

/// How an object is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct How {
    /// What becomes of fields that the schema does not have.
    pub unknown: Unknown,
    /// Whether a wrong status is a fault; else it is no status.
    pub strict_status: bool,
}

impl How {
    /// A person's file: every word of the spec counts, and the status is somebody's report.
    pub const FOLDER: How = How {
        unknown: Unknown::Refuse,
        strict_status: false,
    };
    /// The API server's answer: it has been validated there, maybe by a newer definition than ours.
    pub const API: How = How {
        unknown: Unknown::Ignore,
        strict_status: false,
    };
    /// As the server sees an update of the status.
    pub const STATUS: How = How {
        unknown: Unknown::Refuse,
        strict_status: true,
    };
}

impl Definition {
    const fn of<S: Spec>() -> Self {
        Self {
            resource: Resource::of_spec::<S>(),
            manifest: manifest::manifest::<S>,
            read: read::<S>,
            broken_steps: steps::<S>,
            shapes: LazyLock::new(|| Shapes {
                spec: Shape::of(&manifest::schema::<S>()),
                status: Shape::of(&manifest::schema::<S::Status>()),
            }),
        }
    }

    /// The CustomResourceDefinition.
    pub fn manifest(&self) -> Value {
        (self.manifest)()
    }

    /// Reads an object; what is wrong goes where the fields' faults go.
    pub(crate) fn read(&'static self, f: &Fields<'_, '_>, meta: Meta, how: How) -> Option<Object> {
        (self.read)(&self.shapes, f, meta, how)
    }

    /// What is wrong with a change of an object that is one of this kind before and after.
    pub fn broken_steps(&self, old: &Object, new: &Object) -> Vec<Broken> {
        (self.broken_steps)(old, new)
    }
}

/// All kinds, by name.
pub static DEFINITIONS: [Definition; 8] = [
    Definition::of::<BgpAdvertisementSpec>(),
    Definition::of::<BgpPeerSpec>(),
    Definition::of::<BgpRouteAffinitySpec>(),
    Definition::of::<BgpSessionSpec>(),
    Definition::of::<BrakeOverrideSpec>(),
    Definition::of::<IpamBlockSpec>(),
    Definition::of::<IpPoolSpec>(),
    Definition::of::<KunServiceSpec>(),
];

/// The kind of this name.
pub fn definition(kind: &str) -> Option<&'static Definition> {
    DEFINITIONS.iter().find(|d| d.resource.kind == kind)
}

/// Reads `spec` and `status`, then checks the object as a whole. The other fields of the top are the caller's.
fn read<S: Spec>(
    shapes: &'static Shapes,
    f: &Fields<'_, '_>,
    meta: Meta,
    how: How,
) -> Option<Object> {
    let spec = f.require("spec", format_args!("every {} has one", S::KIND));
    let spec = spec.and_then(|c| walk::walk(&c, &shapes.spec, how.unknown));
    let status = f.get("status").map(|c| match how.strict_status {
        true => walk::walk(&c, &shapes.status, how.unknown),
        false => {
            // What is wrong here was said to nobody.
            let sink = Sink::new("");
            walk::walk(&c.with_sink(&sink), &shapes.status, Unknown::Ignore)
        }
    });
    if how.strict_status && matches!(status, Some(None)) {
        return None;
    }
    let spec = typed::<S>(spec?, f.cursor())?;
    let status = status
        .flatten()
        .and_then(|status| typed::<S::Status>(status, f.cursor()));
    let generation = generation(f).filter(|_| matches!(meta.origin, Origin::Api { .. }));
    let object = Custom {
        meta,
        generation,
        spec,
        status,
    };
    let faults = broken(S::RULES, &object);
    for fault in &faults {
        walk::fault_below(f.cursor(), fault);
    }
    faults.is_empty().then(|| S::object(Arc::new(object)))
}

fn generation(f: &Fields<'_, '_>) -> Option<i64> {
    let metadata = f.get("metadata")?.fields();
    metadata.get("generation")?.text()?.parse().ok()
}

/// The schema of a type and its `Deserialize` are of one derive: a value that fits one fits the other.
fn typed<T: DeserializeOwned>(value: Value, at: &Cursor<'_, '_>) -> Option<T> {
    match serde_json::from_value(value) {
        Ok(typed) => Some(typed),
        Err(error) => {
            at.fault(error, "");
            None
        }
    }
}

fn steps<S: Spec>(old: &Object, new: &Object) -> Vec<Broken> {
    match (S::of(old), S::of(new)) {
        (Some(old), Some(new)) => broken_steps(S::STEPS, &**old, &**new),
        _ => Vec::new(),
    }
}

/// What the change from `old` to `new` breaks, for objects of any kind: those of Kubernetes are the API server's business.
pub fn broken_by_change(old: &Object, new: &Object) -> Vec<Broken> {
    let definition = definition(Resource::of(new.kind()).kind);
    definition.map_or_else(Vec::new, |d| d.broken_steps(old, new))
}

/// An object as JSON, to be sent to the API server or written to a file: without the fields that have no value.
pub fn to_json<S: Spec>(namespace: Option<&str>, name: &str, spec: &S) -> Value {
    let mut object = json!({
        "apiVersion": format!("{KUN_GROUP}/{KUN_VERSION}"),
        "kind": S::KIND,
        "metadata": {"name": name},
        "spec": without_nulls(json!(spec)),
    });
    if let Some(namespace) = namespace {
        object["metadata"]["namespace"] = json!(namespace);
    }
    object
}

/// A status as JSON, to be sent as the `status` of a patch of the status.
pub fn status_to_json<S: Spec>(status: &S::Status) -> Value {
    without_nulls(json!(status))
}

fn without_nulls(value: Value) -> Value {
    match value {
        Value::Object(fields) => {
            let fields = fields.into_iter().filter(|(_, value)| !value.is_null());
            Value::Object(
                fields
                    .map(|(key, value)| (key, without_nulls(value)))
                    .collect(),
            )
        }
        Value::Array(items) => items.into_iter().map(without_nulls).collect(),
        other => other,
    }
}
