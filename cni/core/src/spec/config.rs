//! The network configuration on stdin (CNI §1, §3 "Deriving request configuration").
//!
//! Keys that kun does not know are let through: runtimes and other plugins add theirs. A key that kun would have to obey and
//! cannot is refused with code 2.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use ipnet::IpNet;
use serde_json::{Map, Value};

use super::conventions::Wishes;
use super::env::{MAX_IDENTIFIER, is_identifier, is_ifname};
use super::result::{ResultError, Route, Success};
use super::version::{UnsupportedVersion, Version};

/// Where `kun.yaml` lies unless the configuration says otherwise.
pub const DEFAULT_KUN_CONFIG: &str = "/etc/kun/kun.yaml";

/// A configuration with the previous result of a long chain has a few kilobytes.
const MAX_STDIN: usize = 1 << 20;

/// The plugin's name in `type`.
const OURS: &str = "kun-cni";

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
        field: String,
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

/// In which part the plugin was called.
#[derive(Debug, Clone, PartialEq)]
pub enum Role {
    /// `"type": "kun-cni"`: interfaces and addresses.
    Main,
    /// `"ipam": {"type": "kun-cni"}` of another plugin: addresses alone.
    Ipam(IpamOptions),
}

/// What the `ipam` section says to kun.
#[derive(Debug, Clone, PartialEq)]
pub struct IpamOptions {
    /// `gateway`: whether the result names the block's first address as next hop. It is no pod's then.
    pub gateway: bool,
    /// `routes`; `None`: a default route for each family, where there is a gateway.
    pub routes: Option<Vec<Route>>,
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
    /// Whom it is for.
    pub role: Role,
    raw: Map<String, Value>,
}

impl NetworkConfig {
    /// ADD: the name has room in the tags of an attachment's interfaces, beside the container's id.
    pub fn require_short_name(&self) -> Result<(), ConfigError> {
        match self.name.len() {
            ..=MAX_IDENTIFIER => Ok(()),
            bytes => Err(ConfigError::Field {
                field: "name".to_owned(),
                wrong: format!("{bytes} bytes, more than {MAX_IDENTIFIER}"),
                right: "give the network a shorter name: it stands in the aliases of pods' interfaces, beside the container's id",
            }),
        }
    }

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
            None => Version::parse("")?,
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
        let role = role(&raw)?;
        let section = match &role {
            Role::Main => None,
            Role::Ipam(_) => raw.get("ipam").and_then(|i| i.get("kunConfig")),
        };
        let kun_config = match section.or(raw.get("kunConfig")) {
            None => PathBuf::from(DEFAULT_KUN_CONFIG),
            Some(Value::String(path)) if path.starts_with('/') => PathBuf::from(path),
            Some(other) => return Err(field("kunConfig", other, "it is an absolute path")),
        };
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
        Ok(Self {
            version,
            name,
            kun_config,
            previous,
            role,
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

    /// What the runtime and the pod ask for. ADD and CHECK look at it; DEL does not fail for it.
    pub fn wishes(&self, args: &BTreeMap<String, String>) -> Result<Wishes, ConfigError> {
        Wishes::parse(&self.raw, args)
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

fn role(raw: &Map<String, Value>) -> Result<Role, ConfigError> {
    let text = |value: Option<&Value>| value.and_then(Value::as_str).map(str::to_owned);
    let main = text(raw.get("type"));
    let section = match raw.get("ipam") {
        None | Some(Value::Null) => return Ok(Role::Main),
        Some(Value::Object(section)) if section.is_empty() => return Ok(Role::Main),
        Some(Value::Object(section)) => section,
        Some(other) => return Err(field("ipam", other, "it is an object")),
    };
    if text(section.get("type")).as_deref() != Some(OURS) {
        return Err(ConfigError::Unsupported {
            field: "ipam".to_owned(),
            instead: "kun allocates by itself: leave the key out",
        });
    }
    if main.as_deref() == Some(OURS) {
        return Ok(Role::Main);
    }
    let gateway = match section.get("gateway") {
        None | Some(Value::Null) => true,
        Some(Value::Bool(b)) => *b,
        Some(other) => return Err(field("ipam.gateway", other, "it is true or false")),
    };
    let routes = match section.get("routes") {
        None | Some(Value::Null) => None,
        Some(Value::Array(list)) => Some(
            list.iter()
                .enumerate()
                .map(|(i, entry)| route(&format!("ipam.routes[{i}]"), entry))
                .collect::<Result<_, _>>()?,
        ),
        Some(other) => return Err(field("ipam.routes", other, "it is a list")),
    };
    Ok(Role::Ipam(IpamOptions { gateway, routes }))
}

fn route(path: &str, entry: &Value) -> Result<Route, ConfigError> {
    const RIGHT: &str = "it is {\"dst\": \"::/0\", \"gw\": \"fd00::1\"}";
    let Value::Object(map) = entry else {
        return Err(field(path, entry, RIGHT));
    };
    let dst = map.get("dst").unwrap_or(&Value::Null);
    let to: IpNet = dst
        .as_str()
        .and_then(|text| text.parse().ok())
        .ok_or_else(|| field(&format!("{path}.dst"), dst, "it is a prefix"))?;
    let gw = match map.get("gw") {
        None | Some(Value::Null) => None,
        Some(value) => Some(
            value
                .as_str()
                .and_then(|text| text.parse().ok())
                .filter(|gw: &std::net::IpAddr| gw.is_ipv4() == to.addr().is_ipv4())
                .ok_or_else(|| {
                    field(
                        &format!("{path}.gw"),
                        value,
                        "it is an address of dst's family",
                    )
                })?,
        ),
    };
    let mut rest = map.clone();
    rest.remove("dst");
    rest.remove("gw");
    Ok(Route { dst: to, gw, rest })
}

pub(super) fn field(path: &str, value: &Value, right: &'static str) -> ConfigError {
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
        assert_eq!(config.role, Role::Main);
        assert_eq!(config.wishes(&BTreeMap::new()).unwrap(), Wishes::default());
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
                "cniVersion: missing, which stands for 0.1.0, and that is not supported; supported: 0.3.0, 0.3.1, 0.4.0, 1.0.0, 1.1.0",
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
                with("ipam", json!([])),
                "ipam: [] is wrong; it is an object",
            ),
            (
                delegated(json!({"gateway": 1})),
                "ipam.gateway: 1 is wrong; it is true or false",
            ),
            (
                delegated(json!({"routes": [{"gw": "10.0.0.1"}]})),
                "ipam.routes[0].dst: missing; it is a prefix",
            ),
            (
                delegated(json!({"routes": [{"dst": "::/0", "gw": "10.0.0.1"}]})),
                "ipam.routes[0].gw: \"10.0.0.1\" is wrong; it is an address of dst's family",
            ),
            (
                delegated(json!({"kunConfig": 7})),
                "kunConfig: 7 is wrong; it is an absolute path",
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

    /// As `bridge` hands its whole configuration to its delegate.
    fn delegated(mut section: Value) -> Value {
        section["type"] = OURS.into();
        json!({"cniVersion": "1.1.0", "name": "kun", "type": "bridge", "ipam": section})
    }

    #[test]
    fn the_part_is_told_by_both_types() {
        let role = |value| parse(value).unwrap().role;
        assert_eq!(role(with("ipam", json!({}))), Role::Main);
        assert_eq!(role(with("ipam", json!({"type": OURS}))), Role::Main);
        let Role::Ipam(options) = role(delegated(json!({}))) else {
            panic!("ipam")
        };
        assert!(options.gateway && options.routes.is_none());
        let routes = json!([{"dst": "10.0.0.0/8", "mtu": 1400}]);
        let config = delegated(json!({"gateway": false, "routes": routes, "kunConfig": "/k"}));
        let config = parse(config).unwrap();
        assert_eq!(config.kun_config, PathBuf::from("/k"));
        let Role::Ipam(options) = config.role else {
            panic!("ipam")
        };
        let routes = options.routes.unwrap();
        assert!(!options.gateway && routes[0].rest["mtu"] == 1400);
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
