//! The success result of ADD (CNI §5), written for any version and read back as `prevResult` of any.

use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::{Map, Value, json};

use super::version::Version;

/// `interfaces[]`
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Interface {
    /// Name.
    pub name: String,
    /// Hardware address.
    pub mac: Option<String>,
    /// MTU; told from 1.1.0 on.
    pub mtu: Option<u32>,
    /// The namespace, empty on the host.
    pub sandbox: String,
    /// Keys of other plugins (`socketPath`, `pciID`), passed through.
    pub rest: Map<String, Value>,
}

/// `ips[]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ip {
    /// Address and prefix length.
    pub address: IpNet,
    /// Default gateway.
    pub gateway: Option<IpAddr>,
    /// Index into `interfaces`. `None`: of the attachment as a whole.
    pub interface: Option<usize>,
}

/// `routes[]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// Destination.
    pub dst: IpNet,
    /// Next hop.
    pub gw: Option<IpAddr>,
    /// Keys of other plugins, passed through.
    pub rest: Map<String, Value>,
}

/// A success result.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Success {
    /// All interfaces, host-side ones too.
    pub interfaces: Vec<Interface>,
    /// All addresses.
    pub ips: Vec<Ip>,
    /// All routes.
    pub routes: Vec<Route>,
    /// Passed through.
    pub dns: Map<String, Value>,
}

/// What is wrong with a result.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ResultError {
    /// A key.
    #[error("{field}: {wrong}")]
    Field {
        /// Its path.
        field: String,
        /// What it is.
        wrong: String,
    },
}

impl Success {
    /// As it goes to stdout in this version.
    pub fn to_json(&self, version: Version) -> Value {
        let interfaces: Vec<Value> = self.interfaces.iter().map(|i| i.json(version)).collect();
        let ips: Vec<Value> = self.ips.iter().map(|ip| ip.json(version)).collect();
        let routes: Vec<Value> = self.routes.iter().map(|r| r.json(version)).collect();
        let mut json = json!({
            "cniVersion": version.as_str(),
            "ips": ips,
            "routes": routes,
            "dns": self.dns,
        });
        // An IPAM plugin's result must not have the key (§4).
        if !interfaces.is_empty() {
            json["interfaces"] = interfaces.into();
        }
        json
    }

    /// Of a `prevResult`. Every version from 0.3.0 on is a subset of the newest, so that one reader reads all.
    pub fn parse(value: &Value) -> Result<Self, ResultError> {
        let Value::Object(map) = value else {
            return Err(wrong("", value));
        };
        let mut result = Self {
            interfaces: list(map, "interfaces", Interface::parse)?,
            ips: list(map, "ips", Ip::parse)?,
            routes: list(map, "routes", Route::parse)?,
            dns: Map::new(),
        };
        match map.get("dns") {
            None | Some(Value::Null) => {}
            Some(Value::Object(dns)) => result.dns = dns.clone(),
            Some(other) => return Err(wrong("dns", other)),
        }
        for (i, ip) in result.ips.iter().enumerate() {
            if let Some(index) = ip.interface
                && index >= result.interfaces.len()
            {
                return Err(wrong(&format!("ips[{i}].interface"), &json!(index)));
            }
        }
        Ok(result)
    }

    /// This result after that of the plugin before (§2 ADD: `prevResult` is passed through).
    pub fn after(self, previous: Success) -> Self {
        let shift = previous.interfaces.len();
        let mut all = previous;
        all.interfaces.extend(self.interfaces);
        all.ips.extend(self.ips.into_iter().map(|mut ip| {
            ip.interface = ip.interface.map(|index| index + shift);
            ip
        }));
        all.routes.extend(self.routes);
        all.dns.extend(self.dns);
        all
    }
}

impl Interface {
    fn json(&self, version: Version) -> Value {
        let mut map = self.rest.clone();
        map.insert("name".into(), self.name.clone().into());
        if let Some(mac) = &self.mac {
            map.insert("mac".into(), mac.clone().into());
        }
        if let Some(mtu) = self.mtu
            && version >= Version::V1_1_0
        {
            map.insert("mtu".into(), mtu.into());
        }
        if !self.sandbox.is_empty() {
            map.insert("sandbox".into(), self.sandbox.clone().into());
        }
        Value::Object(map)
    }

    fn parse(path: &str, map: &Map<String, Value>) -> Result<Self, ResultError> {
        let mut rest = map.clone();
        let mut text = |key: &str| match rest.remove(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(wrong(&format!("{path}.{key}"), &other)),
        };
        let name = text("name")?.ok_or_else(|| wrong(&format!("{path}.name"), &Value::Null))?;
        let mac = text("mac")?;
        let sandbox = text("sandbox")?.unwrap_or_default();
        let mtu = match rest.remove("mtu") {
            None | Some(Value::Null) => None,
            Some(value) => Some(
                value
                    .as_u64()
                    .and_then(|n| u32::try_from(n).ok())
                    .ok_or_else(|| wrong(&format!("{path}.mtu"), &value))?,
            ),
        };
        Ok(Self {
            name,
            mac,
            mtu,
            sandbox,
            rest,
        })
    }
}

impl Ip {
    fn json(&self, version: Version) -> Value {
        let mut map = Map::new();
        if version.tells_family() {
            let family = match self.address {
                IpNet::V4(_) => "4",
                IpNet::V6(_) => "6",
            };
            map.insert("version".into(), family.into());
        }
        map.insert("address".into(), self.address.to_string().into());
        if let Some(gateway) = self.gateway {
            map.insert("gateway".into(), gateway.to_string().into());
        }
        if let Some(interface) = self.interface {
            map.insert("interface".into(), interface.into());
        }
        Value::Object(map)
    }

    fn parse(path: &str, map: &Map<String, Value>) -> Result<Self, ResultError> {
        let interface = match map.get("interface") {
            None | Some(Value::Null) => None,
            Some(value) => Some(
                value
                    .as_u64()
                    .and_then(|n| usize::try_from(n).ok())
                    .ok_or_else(|| wrong(&format!("{path}.interface"), value))?,
            ),
        };
        Ok(Self {
            address: parsed(path, map, "address")?
                .ok_or_else(|| wrong(&format!("{path}.address"), &Value::Null))?,
            gateway: parsed(path, map, "gateway")?,
            interface,
        })
    }
}

impl Route {
    fn json(&self, version: Version) -> Value {
        let mut map = if version >= Version::V1_1_0 {
            self.rest.clone()
        } else {
            Map::new()
        };
        map.insert("dst".into(), self.dst.to_string().into());
        if let Some(gw) = self.gw {
            map.insert("gw".into(), gw.to_string().into());
        }
        Value::Object(map)
    }

    fn parse(path: &str, map: &Map<String, Value>) -> Result<Self, ResultError> {
        let dst =
            parsed(path, map, "dst")?.ok_or_else(|| wrong(&format!("{path}.dst"), &Value::Null))?;
        let gw = parsed(path, map, "gw")?;
        let mut rest = map.clone();
        rest.remove("dst");
        rest.remove("gw");
        Ok(Self { dst, gw, rest })
    }
}

/// A value that is text of a `T`; absent, null and empty are `None`.
fn parsed<T: std::str::FromStr>(
    path: &str,
    map: &Map<String, Value>,
    key: &str,
) -> Result<Option<T>, ResultError> {
    match map.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) if text.is_empty() => Ok(None),
        Some(value) => value
            .as_str()
            .and_then(|text| text.parse().ok())
            .map(Some)
            .ok_or_else(|| wrong(&format!("{path}.{key}"), value)),
    }
}

fn list<T>(
    map: &Map<String, Value>,
    key: &str,
    parse: impl Fn(&str, &Map<String, Value>) -> Result<T, ResultError>,
) -> Result<Vec<T>, ResultError> {
    let entries = match map.get(key) {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Array(entries)) => entries,
        Some(other) => return Err(wrong(key, other)),
    };
    entries
        .iter()
        .enumerate()
        .map(|(i, entry)| {
            let path = format!("{key}[{i}]");
            match entry {
                Value::Object(map) => parse(&path, map),
                other => Err(wrong(&path, other)),
            }
        })
        .collect()
}

fn wrong(field: &str, value: &Value) -> ResultError {
    ResultError::Field {
        field: field.to_owned(),
        wrong: match value {
            Value::Null => "missing".to_owned(),
            other => format!("{other} is wrong"),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result() -> Success {
        Success {
            interfaces: vec![
                Interface {
                    name: "eth0".into(),
                    mac: Some("02:00:00:00:00:01".into()),
                    mtu: Some(1400),
                    sandbox: "/run/netns/x".into(),
                    rest: Map::new(),
                },
                Interface {
                    name: "host0".into(),
                    ..Interface::default()
                },
            ],
            ips: vec![
                Ip {
                    address: "fd00::1/128".parse().unwrap(),
                    gateway: Some("fe80::1".parse().unwrap()),
                    interface: Some(0),
                },
                Ip {
                    address: "10.0.0.1/32".parse().unwrap(),
                    gateway: None,
                    interface: None,
                },
            ],
            routes: vec![Route {
                dst: "::/0".parse().unwrap(),
                gw: Some("fe80::1".parse().unwrap()),
                rest: Map::from_iter([("mtu".to_owned(), json!(1400))]),
            }],
            dns: Map::new(),
        }
    }

    #[test]
    fn golden_of_the_newest_and_the_oldest() {
        assert_eq!(
            result().to_json(Version::V1_1_0),
            json!({
                "cniVersion": "1.1.0",
                "interfaces": [
                    {"name": "eth0", "mac": "02:00:00:00:00:01", "mtu": 1400, "sandbox": "/run/netns/x"},
                    {"name": "host0"},
                ],
                "ips": [
                    {"address": "fd00::1/128", "gateway": "fe80::1", "interface": 0},
                    {"address": "10.0.0.1/32"},
                ],
                "routes": [{"dst": "::/0", "gw": "fe80::1", "mtu": 1400}],
                "dns": {},
            })
        );
        assert_eq!(
            result().to_json(Version::V0_3_0),
            json!({
                "cniVersion": "0.3.0",
                "interfaces": [
                    {"name": "eth0", "mac": "02:00:00:00:00:01", "sandbox": "/run/netns/x"},
                    {"name": "host0"},
                ],
                "ips": [
                    {"version": "6", "address": "fd00::1/128", "gateway": "fe80::1", "interface": 0},
                    {"version": "4", "address": "10.0.0.1/32"},
                ],
                "routes": [{"dst": "::/0", "gw": "fe80::1"}],
                "dns": {},
            })
        );
    }

    #[test]
    fn every_version_is_read_back() {
        for version in Version::ALL {
            let read = Success::parse(&result().to_json(version)).unwrap();
            assert_eq!(read.ips, result().ips, "{version}");
            assert_eq!(read.to_json(version), result().to_json(version));
        }
        assert_eq!(
            Success::parse(&result().to_json(Version::V1_1_0)).unwrap(),
            result()
        );
    }

    #[test]
    fn a_chained_result_keeps_what_was_before_and_moves_our_indices() {
        let all = result().after(result());
        assert_eq!(all.interfaces.len(), 4);
        let indices: Vec<_> = all.ips.iter().map(|ip| ip.interface).collect();
        assert_eq!(indices, [Some(0), None, Some(2), None]);
    }

    #[test]
    fn an_index_must_be_of_an_interface() {
        let bad = json!({"interfaces": [], "ips": [{"address": "10.0.0.1/32", "interface": 0}]});
        assert_eq!(
            Success::parse(&bad).unwrap_err().to_string(),
            "ips[0].interface: 0 is wrong"
        );
    }
}
