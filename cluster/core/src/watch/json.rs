//! An API object's JSON as the tree that manifests become, so that one reader serves both. Borrows from the answer where it can, and
//! leaves out, without building it, what is large and read by nobody.

use std::borrow::Cow;
use std::fmt;

use kun_config::yaml::{Entry, Mark, Node, Value};
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use crate::Kind;

/// An answer of a server has no lines.
const NOWHERE: Mark = Mark { line: 0, column: 0 };

/// Fields at two levels that are not built: a Node's images and a Pod's containers are most of its bytes.
type Skip = &'static [(&'static str, &'static [&'static str])];

const METADATA: (&str, &[&str]) = (
    "metadata",
    &["managedFields", "ownerReferences", "finalizers"],
);

const PLAIN: Skip = &[METADATA];

const NODE: Skip = &[
    METADATA,
    ("spec", &["configSource"]),
    (
        "status",
        &[
            "images",
            "volumesAttached",
            "volumesInUse",
            "nodeInfo",
            "features",
            "runtimeHandlers",
        ],
    ),
];

const POD: Skip = &[
    METADATA,
    (
        "spec",
        &[
            "containers",
            "initContainers",
            "ephemeralContainers",
            "volumes",
            "tolerations",
            "affinity",
            "topologySpreadConstraints",
        ],
    ),
    (
        "status",
        &[
            "containerStatuses",
            "initContainerStatuses",
            "ephemeralContainerStatuses",
        ],
    ),
];

fn skip(kind: Kind) -> Skip {
    match kind {
        Kind::Node => NODE,
        Kind::Pod => POD,
        _ => PLAIN,
    }
}

/// An object of a kind.
pub(super) fn object<'a>(kind: Kind, json: &'a [u8]) -> Result<Node<'a>, serde_json::Error> {
    let mut reader = serde_json::Deserializer::from_slice(json);
    let tree = Tree::root(skip(kind)).deserialize(&mut reader)?;
    reader.end()?;
    Ok(tree)
}

/// A watch event: `{"type": …, "object": …}`.
#[derive(Debug)]
pub(super) struct WatchEvent<'a> {
    pub(super) kind: Cow<'a, str>,
    pub(super) object: Node<'a>,
}

/// An event about an object of a kind.
pub(super) fn event<'a>(kind: Kind, json: &'a [u8]) -> Result<WatchEvent<'a>, serde_json::Error> {
    let mut reader = serde_json::Deserializer::from_slice(json);
    let event = EventSeed(skip(kind)).deserialize(&mut reader)?;
    reader.end()?;
    Ok(event)
}

/// What a tree has at a path of keys.
pub(super) fn at<'n, 'a>(node: &'n Node<'a>, path: &[&str]) -> Option<&'n Node<'a>> {
    path.iter().try_fold(node, |node, key| match &node.value {
        Value::Mapping(entries) => entries.iter().find(|e| e.key == *key).map(|e| &e.node),
        Value::Null | Value::Scalar { .. } | Value::Sequence(_) => None,
    })
}

/// The text there, if any.
pub(super) fn text<'n>(node: &'n Node<'_>, path: &[&str]) -> Option<&'n str> {
    match &at(node, path)?.value {
        Value::Scalar { text, .. } => Some(text),
        Value::Null | Value::Sequence(_) | Value::Mapping(_) => None,
    }
}

/// Adds a field that the items of a list do not repeat.
pub(super) fn set(node: &mut Node<'_>, key: &'static str, value: String) {
    if let Value::Mapping(entries) = &mut node.value
        && !entries.iter().any(|e| e.key == key)
    {
        entries.push(Entry {
            key: Cow::Borrowed(key),
            at: NOWHERE,
            node: scalar(Cow::Owned(value), false),
        });
    }
}

fn scalar(text: Cow<'_, str>, plain: bool) -> Node<'_> {
    Node {
        at: NOWHERE,
        value: Value::Scalar { text, plain },
    }
}

#[derive(Clone, Copy)]
struct Tree {
    /// Below here, by key.
    below: Skip,
    /// Here.
    here: &'static [&'static str],
}

impl Tree {
    const ALL: Self = Self {
        below: &[],
        here: &[],
    };

    fn root(below: Skip) -> Self {
        Self { below, here: &[] }
    }

    fn child(self, key: &str) -> Self {
        let here = self.below.iter().find(|(name, _)| *name == key);
        Self {
            below: &[],
            here: here.map_or(&[], |(_, here)| here),
        }
    }
}

impl<'de> DeserializeSeed<'de> for Tree {
    type Value = Node<'de>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Node<'de>, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Tree {
    type Value = Node<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Node<'de>, E> {
        Ok(Node {
            at: NOWHERE,
            value: Value::Null,
        })
    }

    fn visit_bool<E>(self, value: bool) -> Result<Node<'de>, E> {
        let text = if value { "true" } else { "false" };
        Ok(scalar(Cow::Borrowed(text), true))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Node<'de>, E> {
        Ok(scalar(Cow::Owned(value.to_string()), true))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Node<'de>, E> {
        Ok(scalar(Cow::Owned(value.to_string()), true))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Node<'de>, E> {
        Ok(scalar(Cow::Owned(value.to_string()), true))
    }

    fn visit_borrowed_str<E>(self, value: &'de str) -> Result<Node<'de>, E> {
        Ok(scalar(Cow::Borrowed(value), false))
    }

    fn visit_str<E>(self, value: &str) -> Result<Node<'de>, E> {
        Ok(scalar(Cow::Owned(value.to_owned()), false))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Node<'de>, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element_seed(Tree::ALL)? {
            items.push(item);
        }
        Ok(Node {
            at: NOWHERE,
            value: Value::Sequence(items),
        })
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Node<'de>, A::Error> {
        let mut entries = Vec::new();
        while let Some(key) = map.next_key_seed(Text)? {
            if self.here.contains(&&*key) {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            let node = map.next_value_seed(self.child(&key))?;
            entries.push(Entry {
                key,
                at: NOWHERE,
                node,
            });
        }
        Ok(Node {
            at: NOWHERE,
            value: Value::Mapping(entries),
        })
    }
}

/// A string, borrowed where it has no escapes.
struct Text;

impl<'de> DeserializeSeed<'de> for Text {
    type Value = Cow<'de, str>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl<'de> Visitor<'de> for Text {
    type Value = Cow<'de, str>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string")
    }

    fn visit_borrowed_str<E>(self, value: &'de str) -> Result<Self::Value, E> {
        Ok(Cow::Borrowed(value))
    }

    fn visit_str<E>(self, value: &str) -> Result<Self::Value, E> {
        Ok(Cow::Owned(value.to_owned()))
    }
}

struct EventSeed(Skip);

impl<'de> DeserializeSeed<'de> for EventSeed {
    type Value = WatchEvent<'de>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for EventSeed {
    type Value = WatchEvent<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a watch event with `type` and `object`")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        use serde::de::Error;
        let (mut kind, mut object) = (None, None);
        while let Some(key) = map.next_key_seed(Text)? {
            match &*key {
                "type" => kind = Some(map.next_value_seed(Text)?),
                "object" => object = Some(map.next_value_seed(Tree::root(self.0))?),
                _ => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(WatchEvent {
            kind: kind.ok_or_else(|| A::Error::missing_field("type"))?,
            object: object.ok_or_else(|| A::Error::missing_field("object"))?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_are_borrowed_and_large_things_are_left_out() {
        let json = br#"{"metadata":{"name":"a","managedFields":[{"big":1}],"labels":{"managedFields":"stays"}},
            "status":{"images":[1,2],"phase":"x\ny","n":1.5,"on":true,"none":null}}"#;
        let tree = object(Kind::Node, json).expect("JSON");
        assert!(at(&tree, &["metadata", "managedFields"]).is_none());
        assert!(at(&tree, &["status", "images"]).is_none());
        assert_eq!(
            text(&tree, &["metadata", "labels", "managedFields"]),
            Some("stays")
        );
        assert_eq!(text(&tree, &["status", "phase"]), Some("x\ny"));
        assert_eq!(text(&tree, &["status", "n"]), Some("1.5"));
        assert_eq!(text(&tree, &["status", "on"]), Some("true"));
        assert!(matches!(
            at(&tree, &["status", "none"]).map(|n| &n.value),
            Some(Value::Null)
        ));
        let name = at(&tree, &["metadata", "name"]).expect("a name");
        assert!(matches!(
            &name.value,
            Value::Scalar {
                text: Cow::Borrowed("a"),
                ..
            }
        ));
        // A Service keeps what only a Node leaves out.
        let service = object(Kind::Service, json).expect("JSON");
        assert!(at(&service, &["status", "images"]).is_some());
    }

    #[test]
    fn half_an_event_is_none() {
        let whole = br#"{"type":"ADDED","object":{"metadata":{"name":"a"}}}"#;
        assert_eq!(event(Kind::Pod, whole).expect("an event").kind, "ADDED");
        for cut in 0..whole.len() {
            assert!(event(Kind::Pod, &whole[..cut]).is_err(), "{cut}");
        }
        let reversed = br#"{"object":{},"type":"BOOKMARK"}"#;
        assert_eq!(
            event(Kind::Pod, reversed).expect("an event").kind,
            "BOOKMARK"
        );
    }
}
