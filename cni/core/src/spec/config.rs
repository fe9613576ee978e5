//! The network configuration on stdin (CNI §1, §3 "Deriving request configuration").
//!
//! Keys that kun does not know are let through: runtimes and other plugins add theirs. A key that kun would have to obey and
//! cannot is refused with code 2.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use serde_json::{Map, Value};

use super::env::{is_identifier, is_ifname};
use super::result::{ResultError, Success};
use super::version::{UnsupportedVersion, Version};

/// Where `kun.yaml` lies unless the configuration says otherwise.
pub const DEFAULT_KUN_CONFIG: &str = "/etc/kun/kun.yaml";

/// The pod's annotation that decides its class.
pub const IPV4_ANNOTATION: &str = "kun.network/ipv4";

/// A configuration with the previous result of a long chain has a few kilobytes.
const MAX_STDIN: usize = 1 << 20;

/// The capability under which containerd hands over the pod's annotations.
const ANNOTATIONS: &str = "io.kubernetes.cri.pod-annotations";

/// [`IPV4_ANNOTATION`] in CNI_ARGS, whose keys may only be letters, digits and `_`.
const IPV4_ARG: &str = "KUN_NETWORK_IPV4";

/// What is wrong with the configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Not JSON, or not an object.
    #[error("stdin: {0}; a network configuration is one JSON object")]
    NotJson(String),
    /// Longer than any configuration.
    #[error("stdin: longer than {MAX_STDIN} bytes")]
    TooLong,
    /// Its version.
    #[error(transparent)]
    Version(#[from] UnsupportedVersion),
    /// The verb is younger than the configuration's version.
    #[error("{verb} needs cniVersion {since} or newer; the configuration has {has}")]
    VerbNeeds {
        /// The verb.
        verb: &'static str,
        /// Its first version.
        since: Version,
        /// The configuration's.
        has: Version,
    },
    /// A key that must be obeyed and cannot.
    #[error("{field}: not supported; {instead}")]
    Unsupported {
        /// The key.
        field: &'static str,
        /// What to do.
        instead: &'static str,
    },
    /// A wrong value.
    #[error("{field}: {wrong}; {right}")]
    Field {
        /// Path of the key.
        field: String,
        /// What it is.
        wrong: String,
        /// What it should be.
        right: &'static str,
    },
}

/// Whose attachments are still valid (GC).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct AttachmentId {
    /// CNI_CONTAINERID of the ADD.
    pub container_id: String,
    /// CNI_IFNAME of the ADD.
    pub ifname: String,
}

/// A network configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct NetworkConfig {
    /// `cniVersion`
    pub version: Version,
    /// `name`
    pub name: String,
    /// `kunConfig`: where `kun.yaml` lies.
    pub kun_config: PathBuf,
    /// `prevResult`
    pub previous: Option<Success>,
    annotation: Option<bool>,
    raw: Map<String, Value>,
}

impl NetworkConfig {
    /// Parses stdin.
    pub fn parse(stdin: &[u8]) -> Result<Self, ConfigError> {
        if stdin.len() > MAX_STDIN {
            return Err(ConfigError::TooLong);
        }
        let raw: Map<String, Value> =
            serde_json::from_slice(stdin).map_err(|e| ConfigError::NotJson(e.to_string()))?;
        let version = match raw.get("cniVersion") {
            Some(Value::String(text)) => Version::parse(text)?,
            // §1: a file without a version is one of 0.1.0.
            None => Version::parse("0.1.0")?,
            Some(other) => return Err(field("cniVersion", other, "it is text, as \"1.1.0\"")),
        };
        let name = match raw.get("name") {
            Some(Value::String(name)) if is_identifier(name) => name.clone(),
            other => {
                return Err(field(
                    "name",
                    other.unwrap_or(&Value::Null),
                    "a network's name begins with a letter or digit, then letters, digits, `_`, `.` and `-`",
                ));
            }
        };
        let kun_config = match raw.get("kunConfig") {
            None => PathBuf::from(DEFAULT_KUN_CONFIG),
            Some(Value::String(path)) if path.starts_with('/') => PathBuf::from(path),
            Some(other) => return Err(field("kunConfig", other, "it is an absolute path")),
        };
        if raw.get("ipam").is_some_and(|ipam| !is_empty(ipam)) {
            return Err(ConfigError::Unsupported {
                field: "ipam",
                instead: "kun allocates by itself: leave the key out",
            });
        }
        let previous = match raw.get("prevResult") {
            None | Some(Value::Null) => None,
            Some(value) => Some(Success::parse(value).map_err(|e| match e {
                ResultError::Field { field, wrong } => ConfigError::Field {
                    field: format!("prevResult.{field}"),
                    wrong,
                    right: "it is the result of the plugin before",
                },
            })?),
        };
        let annotation = annotation(&raw)?;
        Ok(Self {
            version,
            name,
            kun_config,
            previous,
            annotation,
            raw,
        })
    }

    /// Refuses a verb that this version does not have.
    pub fn require(&self, verb: &'static str, since: Version) -> Result<(), ConfigError> {
        if self.version >= since {
            return Ok(());
        }
        Err(ConfigError::VerbNeeds {
            verb,
            since,
            has: self.version,
        })
    }

    /// Whether the pod wants IPv4: the pod's annotation, else `args.cni`, else CNI_ARGS; `None`: the default class. By
    /// convention `args` beats CNI_ARGS.
    pub fn wants_ipv4(&self, args: &BTreeMap<String, String>) -> Result<Option<bool>, ConfigError> {
        if self.annotation.is_some() {
            return Ok(self.annotation);
        }
        args.get(IPV4_ARG)
            .map(|text| parse_bool(&format!("CNI_ARGS {IPV4_ARG}"), text))
            .transpose()
    }

    /// GC: the attachments that are still valid. Absent is not empty: an absent list frees nothing and is refused.
    pub fn valid_attachments(&self) -> Result<BTreeSet<AttachmentId>, ConfigError> {
        const RIGHT: &str =
            "GC needs the list of {\"containerID\", \"ifname\"} that are still valid";
        let list = self
            .raw
            .get("cni.dev/valid-attachments")
            // What libcni wrote before 1.1.0 was final.
            .or_else(|| self.raw.get("cni.dev/attachments"));
        let Some(Value::Array(list)) = list else {
            let found = list.unwrap_or(&Value::Null);
            return Err(field("cni.dev/valid-attachments", found, RIGHT));
        };
        list.iter()
            .map(|entry| {
                let part = |name| entry.get(name).and_then(Value::as_str).map(str::to_owned);
                match (part("containerID"), part("ifname")) {
                    (Some(container_id), Some(ifname))
                        if is_identifier(&container_id) && is_ifname(&ifname) =>
                    {
                        Ok(AttachmentId {
                            container_id,
                            ifname,
                        })
                    }
                    (_, _) => Err(field("cni.dev/valid-attachments", entry, RIGHT)),
                }
            })
            .collect()
    }
}

fn annotation(raw: &Map<String, Value>) -> Result<Option<bool>, ConfigError> {
    let pod = raw
        .get("runtimeConfig")
        .and_then(|c| c.get(ANNOTATIONS))
        .and_then(|a| a.get(IPV4_ANNOTATION));
    if let Some(value) = pod {
        let path = format!("runtimeConfig.\"{ANNOTATIONS}\".\"{IPV4_ANNOTATION}\"");
        return boolean(&path, value).map(Some);
    }
    raw.get("args")
        .and_then(|a| a.get("cni"))
        .and_then(|c| c.get(IPV4_ANNOTATION))
        .map(|value| boolean(&format!("args.cni.\"{IPV4_ANNOTATION}\""), value))
        .transpose()
}

fn boolean(path: &str, value: &Value) -> Result<bool, ConfigError> {
    match value {
        Value::Bool(b) => Ok(*b),
        Value::String(text) => parse_bool(path, text),
        other => Err(field(path, other, "it is \"true\" or \"false\"")),
    }
}

fn parse_bool(path: &str, text: &str) -> Result<bool, ConfigError> {
    match text {
        "true" => Ok(true),
        "false" => Ok(false),
        other => Err(field(
            path,
            &Value::from(other),
            "it is \"true\" or \"false\"",
        )),
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Object(map) => map.is_empty(),
        Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => false,
    }
}

fn field(path: &str, value: &Value, right: &'static str) -> ConfigError {
    ConfigError::Field {
        field: path.to_owned(),
        wrong: match value {
            Value::Null => "missing".to_owned(),
            other => format!("{other} is wrong"),
        },
        right,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(value: Value) -> Result<NetworkConfig, ConfigError> {
        NetworkConfig::parse(value.to_string().as_bytes())
    }

    fn base() -> Value {
        json!({"cniVersion": "1.1.0", "name": "kun", "type": "kun-cni"})
    }

    fn with(key: &str, value: Value) -> Value {
        let mut config = base();
        config[key] = value;
        config
    }

    #[test]
    fn the_least_configuration() {
        let config = parse(base()).unwrap();
        assert_eq!(config.version, Version::V1_1_0);
        assert_eq!(config.kun_config, PathBuf::from(DEFAULT_KUN_CONFIG));
        assert_eq!(config.wants_ipv4(&BTreeMap::new()).unwrap(), None);
    }

    #[test]
    fn what_is_refused_says_where_and_what_would_be_right() {
        let table = [
            (
                with("cniVersion", json!("2.0.0")),
                "cniVersion `2.0.0` is not supported; supported: 0.3.0, 0.3.1, 0.4.0, 1.0.0, 1.1.0",
            ),
            (
                json!({"name": "kun"}),
                "cniVersion `0.1.0` is not supported; supported: 0.3.0, 0.3.1, 0.4.0, 1.0.0, 1.1.0",
            ),
            (
                with("cniVersion", json!(1)),
                "cniVersion: 1 is wrong; it is text, as \"1.1.0\"",
            ),
            (
                json!({"cniVersion": "1.0.0"}),
                "name: missing; a network's name begins with a letter or digit, then letters, digits, `_`, `.` and `-`",
            ),
            (
                with("kunConfig", json!("kun.yaml")),
                "kunConfig: \"kun.yaml\" is wrong; it is an absolute path",
            ),
            (
                with("ipam", json!({"type": "host-local"})),
                "ipam: not supported; kun allocates by itself: leave the key out",
            ),
            (
                with(
                    "runtimeConfig",
                    json!({ANNOTATIONS: {IPV4_ANNOTATION: "yes"}}),
                ),
                "runtimeConfig.\"io.kubernetes.cri.pod-annotations\".\"kun.network/ipv4\": \"yes\" is wrong; it is \"true\" or \"false\"",
            ),
            (
                with(
                    "prevResult",
                    json!({"cniVersion": "1.1.0", "ips": [{"address": "10.0.0.1"}]}),
                ),
                "prevResult.ips[0].address: \"10.0.0.1\" is wrong; it is the result of the plugin before",
            ),
        ];
        for (config, message) in table {
            assert_eq!(parse(config).unwrap_err().to_string(), message);
        }
        assert!(matches!(
            NetworkConfig::parse(b"{"),
            Err(ConfigError::NotJson(_))
        ));
        assert!(matches!(
            NetworkConfig::parse(b"[]"),
            Err(ConfigError::NotJson(_))
        ));
        assert!(matches!(
            NetworkConfig::parse(&vec![b' '; MAX_STDIN + 1]),
            Err(ConfigError::TooLong)
        ));
    }

    #[test]
    fn the_annotation_beats_args_and_args_beat_the_environment() {
        let env = BTreeMap::from([(IPV4_ARG.to_owned(), "true".to_owned())]);
        let args = json!({"cni": {IPV4_ANNOTATION: false}});
        let annotations = json!({ANNOTATIONS: {IPV4_ANNOTATION: "true", "other": "x"}});

        let mut config = base();
        assert_eq!(
            parse(config.clone()).unwrap().wants_ipv4(&env).unwrap(),
            Some(true)
        );
        config["args"] = args;
        assert_eq!(
            parse(config.clone()).unwrap().wants_ipv4(&env).unwrap(),
            Some(false)
        );
        config["runtimeConfig"] = annotations;
        assert_eq!(parse(config).unwrap().wants_ipv4(&env).unwrap(), Some(true));
    }

    #[test]
    fn an_absent_list_is_not_an_empty_one() {
        assert!(parse(base()).unwrap().valid_attachments().is_err());
        let empty = parse(with("cni.dev/valid-attachments", json!([]))).unwrap();
        assert!(empty.valid_attachments().unwrap().is_empty());
        let one = json!([{"containerID": "c", "ifname": "eth0"}]);
        let old = parse(with("cni.dev/attachments", one)).unwrap();
        assert_eq!(old.valid_attachments().unwrap().len(), 1);
        let bad = parse(with(
            "cni.dev/valid-attachments",
            json!([{"containerID": "c"}]),
        ))
        .unwrap();
        assert!(bad.valid_attachments().is_err());
    }
}
