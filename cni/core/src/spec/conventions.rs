//! What a runtime or a pod asks for beyond the specification (CNI CONVENTIONS.md): `runtimeConfig`, `args.cni`, CNI_ARGS, and the
//! pod's annotations. Of several places that say the same, the first counts: `runtimeConfig`, annotations, `args.cni`,
//! CNI_ARGS.
//!
//! A capability that kun would have to obey and cannot is refused; one that concerns others (`aliases`, `cgroupPath`) is let
//! through.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::num::{NonZeroU16, NonZeroU64};

use ipnet::IpNet;
use serde_json::{Map, Value};

use super::config::{ConfigError, field};
use super::quantity::quantity;
use crate::plan::Mac;

/// The pod's annotation that decides its class.
pub const IPV4_ANNOTATION: &str = "kun.network/ipv4";

/// The pod's annotation that asks for addresses: one, or one of each family, separated by commas.
pub const IPS_ANNOTATION: &str = "kun.network/ips";

/// The capability under which containerd hands over the pod's annotations.
const ANNOTATIONS: &str = "io.kubernetes.cri.pod-annotations";

/// Kubernetes' own, as kubenet read them: bits a second, as a quantity.
const INGRESS_ANNOTATION: &str = "kubernetes.io/ingress-bandwidth";
const EGRESS_ANNOTATION: &str = "kubernetes.io/egress-bandwidth";

/// [`IPV4_ANNOTATION`] in CNI_ARGS, whose keys may only be letters, digits and `_`.
const IPV4_ARG: &str = "KUN_NETWORK_IPV4";

/// Keys of CNI_ARGS that mean something to kun, or that Kubernetes' runtimes always send.
const KNOWN_ARGS: [&str; 8] = [
    "IgnoreUnknown",
    "IP",
    "MAC",
    IPV4_ARG,
    "K8S_POD_NAMESPACE",
    "K8S_POD_NAME",
    "K8S_POD_UID",
    "K8S_POD_INFRA_CONTAINER_ID",
];

/// Kubernetes lets a pod have between 1 kbit/s and 1 Pbit/s.
const RATES: std::ops::RangeInclusive<u64> = 1_000..=1_000_000_000_000_000;

/// Host ports of one pod: far more than any has, and few enough to be told in one message.
const MAX_PORTS: usize = 4096;

/// Ranges that one request may name.
const MAX_RANGES: usize = 256;

/// A limit in one direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RateLimit {
    /// Bits a second.
    pub rate: NonZeroU64,
    /// Bits at once; `None`: not said.
    pub burst: Option<NonZeroU64>,
}

/// Transport of a host port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

/// A port of the node that leads into the pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct PortMapping {
    /// On the node.
    pub host_port: NonZeroU16,
    /// In the pod.
    pub container_port: NonZeroU16,
    /// Which.
    pub protocol: Transport,
    /// On this address of the node alone.
    pub host_ip: Option<IpAddr>,
}

/// `ipRanges`: one range of addresses of one family, first and last included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AddressRange {
    /// First.
    pub first: IpAddr,
    /// Last.
    pub last: IpAddr,
}

/// Everything that is asked for.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Wishes {
    /// With IPv4 or without; `None`: the default class.
    pub ipv4: Option<bool>,
    /// `ips`: these addresses and no others.
    pub ips: Vec<IpAddr>,
    /// `ipRanges`: an address out of each set.
    pub ranges: Vec<Vec<AddressRange>>,
    /// `mac`: the hardware address of CNI_IFNAME.
    pub mac: Option<Mac>,
    /// `bandwidth` into the pod.
    pub ingress: Option<RateLimit>,
    /// `bandwidth` out of the pod.
    pub egress: Option<RateLimit>,
    /// `portMappings`
    pub ports: Vec<PortMapping>,
    /// `dns`, from the runtime or else from the configuration; `None`: nobody said.
    pub dns: Option<Map<String, Value>>,
}

impl Wishes {
    /// Reads all of them.
    pub fn parse(
        raw: &Map<String, Value>,
        args: &BTreeMap<String, String>,
    ) -> Result<Self, ConfigError> {
        known_args(args)?;
        let runtime = object(raw, "runtimeConfig", "runtimeConfig")?;
        for unable in ["deviceID", "infinibandGUID"] {
            if runtime.get(unable).is_some_and(|v| !v.is_null()) {
                return Err(ConfigError::Unsupported {
                    field: format!("runtimeConfig.{unable}"),
                    instead: "kun makes veth pairs: leave the capability out of its configuration",
                });
            }
        }
        let annotations = Annotations::of(&runtime)?;
        let all_args = object(raw, "args", "args")?;
        let cni = object(&all_args, "cni", "args.cni")?;
        labels(&cni)?;
        let (ingress, egress) = bandwidth(&runtime, &annotations)?;
        Ok(Self {
            ipv4: ipv4(&annotations, &cni, args)?,
            ips: ips(&runtime, &annotations, &cni, args)?,
            ranges: ranges(&runtime)?,
            mac: mac(&runtime, &cni, args)?,
            ingress,
            egress,
            ports: ports(&runtime)?,
            dns: dns(raw, &runtime)?,
        })
    }

    /// Whether the agent has to do anything beyond the interfaces.
    pub fn needs_agent(&self) -> bool {
        self.ingress.is_some() || self.egress.is_some() || !self.ports.is_empty()
    }
}

/// A key of CNI_ARGS that nobody knows is an error, unless `IgnoreUnknown` says that it is none.
fn known_args(args: &BTreeMap<String, String>) -> Result<(), ConfigError> {
    let ignore = match args.get("IgnoreUnknown").map(String::as_str) {
        None | Some("0" | "false" | "False" | "FALSE" | "f" | "F") => false,
        Some("1" | "true" | "True" | "TRUE" | "t" | "T") => true,
        Some(other) => {
            return Err(field(
                "CNI_ARGS IgnoreUnknown",
                &other.into(),
                "it is 1 or 0",
            ));
        }
    };
    let unknown: Vec<&str> = args
        .keys()
        .map(String::as_str)
        .filter(|key| !KNOWN_ARGS.contains(key))
        .collect();
    if ignore || unknown.is_empty() {
        return Ok(());
    }
    Err(field(
        "CNI_ARGS",
        &unknown.join(", ").into(),
        "kun does not know these keys; IgnoreUnknown=1 lets them pass",
    ))
}

/// The pod's annotations, where the runtime hands them over.
struct Annotations(BTreeMap<String, String>);

impl Annotations {
    fn of(runtime: &Map<String, Value>) -> Result<Self, ConfigError> {
        let path = format!("runtimeConfig.\"{ANNOTATIONS}\"");
        let map = object(runtime, ANNOTATIONS, &path)?;
        map.into_iter()
            .map(|(name, value)| match value {
                Value::String(text) => Ok((name, text)),
                // As `args.cni` may have it.
                Value::Bool(b) => Ok((name, b.to_string())),
                other => Err(field(
                    &annotation_path(&name),
                    &other,
                    "an annotation is text",
                )),
            })
            .collect::<Result<_, _>>()
            .map(Self)
    }

    fn get(&self, name: &str) -> Option<(String, &str)> {
        let value = self.0.get(name)?;
        Some((annotation_path(name), value))
    }
}

fn annotation_path(name: &str) -> String {
    format!("runtimeConfig.\"{ANNOTATIONS}\".\"{name}\"")
}

fn ipv4(
    annotations: &Annotations,
    cni: &Map<String, Value>,
    args: &BTreeMap<String, String>,
) -> Result<Option<bool>, ConfigError> {
    if let Some((path, text)) = annotations.get(IPV4_ANNOTATION) {
        return boolean(&path, text).map(Some);
    }
    match cni.get(IPV4_ANNOTATION) {
        Some(Value::Bool(b)) => return Ok(Some(*b)),
        Some(value) => {
            let path = format!("args.cni.\"{IPV4_ANNOTATION}\"");
            let text = value.as_str().unwrap_or_default();
            return boolean(&path, text).map(Some);
        }
        None => {}
    }
    args.get(IPV4_ARG)
        .map(|text| boolean(&format!("CNI_ARGS {IPV4_ARG}"), text))
        .transpose()
}

fn boolean(path: &str, text: &str) -> Result<bool, ConfigError> {
    match text {
        "true" => Ok(true),
        "false" => Ok(false),
        other => Err(field(path, &other.into(), "it is \"true\" or \"false\"")),
    }
}

fn ips(
    runtime: &Map<String, Value>,
    annotations: &Annotations,
    cni: &Map<String, Value>,
    args: &BTreeMap<String, String>,
) -> Result<Vec<IpAddr>, ConfigError> {
    let listed = |map: &Map<String, Value>, path: &str| {
        let list = list(map, "ips", path)?;
        list.iter()
            .enumerate()
            .map(|(i, entry)| address(&format!("{path}[{i}]"), entry))
            .collect::<Result<Vec<_>, _>>()
    };
    let commas = |path: &str, text: &str| {
        text.split(',')
            .map(|part| address(path, &part.trim().into()))
            .collect::<Result<Vec<_>, _>>()
    };
    let of_runtime = listed(runtime, "runtimeConfig.ips")?;
    if !of_runtime.is_empty() {
        return one_a_family("runtimeConfig.ips", of_runtime);
    }
    if let Some((path, text)) = annotations.get(IPS_ANNOTATION) {
        return one_a_family(&path, commas(&path, text)?);
    }
    let of_args = listed(cni, "args.cni.ips")?;
    if !of_args.is_empty() {
        return one_a_family("args.cni.ips", of_args);
    }
    match args.get("IP") {
        Some(text) if !text.is_empty() => one_a_family("CNI_ARGS IP", commas("CNI_ARGS IP", text)?),
        Some(_) | None => Ok(Vec::new()),
    }
}

fn one_a_family(path: &str, ips: Vec<IpAddr>) -> Result<Vec<IpAddr>, ConfigError> {
    let families: BTreeSet<bool> = ips.iter().map(IpAddr::is_ipv4).collect();
    if families.len() == ips.len() {
        return Ok(ips);
    }
    let all: Vec<String> = ips.iter().map(ToString::to_string).collect();
    Err(field(
        path,
        &all.join(", ").into(),
        "a pod has one address of each family",
    ))
}

/// With or without a prefix length, which is the network's affair.
fn address(path: &str, value: &Value) -> Result<IpAddr, ConfigError> {
    let text = value.as_str().unwrap_or_default();
    text.parse()
        .or_else(|_| text.parse::<IpNet>().map(|net| net.addr()))
        .map_err(|_| field(path, value, "it is an address, as \"fd00::a40:9\""))
}

fn ranges(runtime: &Map<String, Value>) -> Result<Vec<Vec<AddressRange>>, ConfigError> {
    const RIGHT: &str = "it is a list of lists of {\"subnet\", \"rangeStart\", \"rangeEnd\"}";
    let path = "runtimeConfig.ipRanges";
    let sets = list(runtime, "ipRanges", path)?;
    let mut count = 0;
    let mut all: Vec<Vec<AddressRange>> = Vec::new();
    for (i, set) in sets.iter().enumerate() {
        let Value::Array(set) = set else {
            return Err(field(&format!("{path}[{i}]"), set, RIGHT));
        };
        let mut ranges = Vec::new();
        for (j, entry) in set.iter().enumerate() {
            count += 1;
            if count > MAX_RANGES {
                return Err(field(
                    path,
                    &sets.len().into(),
                    "at most 256 ranges are looked at",
                ));
            }
            ranges.push(range(&format!("{path}[{i}][{j}]"), entry)?);
        }
        if let [first, rest @ ..] = ranges.as_slice()
            && rest
                .iter()
                .any(|r| r.first.is_ipv4() != first.first.is_ipv4())
        {
            return Err(field(
                &format!("{path}[{i}]"),
                &Value::Array(set.clone()),
                "the ranges of one set are of one family",
            ));
        }
        if !ranges.is_empty() {
            all.push(ranges);
        }
    }
    let families: BTreeSet<bool> = all.iter().map(|set| set[0].first.is_ipv4()).collect();
    if families.len() < all.len() {
        return Err(field(
            path,
            &Value::Array(sets),
            "a pod has one address of each family: one set for IPv4, one for IPv6",
        ));
    }
    Ok(all)
}

fn range(path: &str, entry: &Value) -> Result<AddressRange, ConfigError> {
    let Value::Object(map) = entry else {
        return Err(field(path, entry, "it is {\"subnet\": \"10.64.0.0/24\"}"));
    };
    let map = spelled(map, &["gateway", "subnet", "rangeStart", "rangeEnd"]);
    // containerd writes what is not given as empty text.
    let given = |value: &&Value| !value.is_null() && value.as_str() != Some("");
    if map.get("gateway").filter(given).is_some() {
        return Err(ConfigError::Unsupported {
            field: format!("{path}.gateway"),
            instead: "a pod's next hop is link-local: leave it out",
        });
    }
    let subnet = map.get("subnet").unwrap_or(&Value::Null);
    let net: IpNet = subnet
        .as_str()
        .and_then(|text| text.parse().ok())
        .ok_or_else(|| field(&format!("{path}.subnet"), subnet, "it is a prefix"))?;
    if net.addr() != net.network() {
        return Err(field(
            &format!("{path}.subnet"),
            subnet,
            "its host bits are zero",
        ));
    }
    let bound = |key: &str, default: IpAddr| match map.get(key).filter(given) {
        None => Ok(default),
        Some(value) => {
            let path = format!("{path}.{key}");
            let ip = address(&path, value)?;
            match net.contains(&ip) {
                true => Ok(ip),
                false => Err(field(&path, value, "it lies in the subnet")),
            }
        }
    };
    let range = AddressRange {
        first: bound("rangeStart", net.network())?,
        last: bound("rangeEnd", net.broadcast())?,
    };
    if range.first > range.last {
        return Err(field(path, entry, "rangeStart is not after rangeEnd"));
    }
    Ok(range)
}

fn mac(
    runtime: &Map<String, Value>,
    cni: &Map<String, Value>,
    args: &BTreeMap<String, String>,
) -> Result<Option<Mac>, ConfigError> {
    const RIGHT: &str = "it is a unicast hardware address, as \"02:00:00:00:00:01\"";
    let said = [
        ("runtimeConfig.mac", runtime.get("mac").cloned()),
        ("args.cni.mac", cni.get("mac").cloned()),
        ("CNI_ARGS MAC", args.get("MAC").map(|t| t.as_str().into())),
    ];
    for (path, value) in said {
        let Some(value) = value.filter(|v| !v.is_null() && v.as_str() != Some("")) else {
            continue;
        };
        return value
            .as_str()
            .and_then(Mac::parse)
            .filter(|mac| mac.is_unicast())
            .map(Some)
            .ok_or_else(|| field(path, &value, RIGHT));
    }
    Ok(None)
}

fn bandwidth(
    runtime: &Map<String, Value>,
    annotations: &Annotations,
) -> Result<(Option<RateLimit>, Option<RateLimit>), ConfigError> {
    const PATH: &str = "runtimeConfig.bandwidth";
    let map = object(runtime, "bandwidth", PATH)?;
    let keys = ["ingressRate", "ingressBurst", "egressRate", "egressBurst"];
    let map = spelled(&map, &keys);
    let number = |key: &str| match map.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => value
            .as_u64()
            .map(NonZeroU64::new)
            .ok_or_else(|| field(&format!("{PATH}.{key}"), value, "it is a number of bits")),
    };
    let direction = |rate: &str, burst: &str, annotation: &str| {
        let (rate_bits, burst_bits) = (number(rate)?, number(burst)?);
        let path = format!("{PATH}.{rate}");
        match (rate_bits, burst_bits) {
            (Some(bits), burst) => Ok(Some(RateLimit {
                rate: sane(&path, bits)?,
                burst,
            })),
            (None, Some(bits)) => Err(field(
                &format!("{PATH}.{burst}"),
                &bits.get().into(),
                "a burst needs a rate",
            )),
            (None, None) => annotations
                .get(annotation)
                .map(|(path, text)| {
                    let bits = quantity(text).ok_or_else(|| {
                        field(
                            &path,
                            &text.into(),
                            "it is bits a second as a quantity, as \"10M\"",
                        )
                    })?;
                    Ok(RateLimit {
                        rate: sane(&path, bits)?,
                        burst: None,
                    })
                })
                .transpose(),
        }
    };
    Ok((
        direction("ingressRate", "ingressBurst", INGRESS_ANNOTATION)?,
        direction("egressRate", "egressBurst", EGRESS_ANNOTATION)?,
    ))
}

fn sane(path: &str, bits: NonZeroU64) -> Result<NonZeroU64, ConfigError> {
    match RATES.contains(&bits.get()) {
        true => Ok(bits),
        false => Err(field(
            path,
            &bits.get().into(),
            "it is between 1 kbit/s and 1 Pbit/s",
        )),
    }
}

fn ports(runtime: &Map<String, Value>) -> Result<Vec<PortMapping>, ConfigError> {
    let path = "runtimeConfig.portMappings";
    let entries = list(runtime, "portMappings", path)?;
    if entries.len() > MAX_PORTS {
        return Err(field(
            path,
            &entries.len().into(),
            "at most 4096 host ports are mapped",
        ));
    }
    let mut ports: Vec<PortMapping> = Vec::new();
    for (i, entry) in entries.iter().enumerate() {
        let path = format!("{path}[{i}]");
        let port = port(&path, entry)?;
        if ports.iter().any(|other| {
            (other.host_port, other.protocol, other.host_ip)
                == (port.host_port, port.protocol, port.host_ip)
        }) {
            return Err(field(&path, entry, "each host port is mapped once"));
        }
        ports.push(port);
    }
    Ok(ports)
}

/// The conventions' spelling of keys that differ from it in case: Go's decoder, which every other plugin reads with, takes them all,
/// and containerd writes `HostPort`.
fn spelled(map: &Map<String, Value>, keys: &[&str]) -> Map<String, Value> {
    let mut out = map.clone();
    for &key in keys {
        let other = map.iter().find(|(k, _)| k.eq_ignore_ascii_case(key));
        if let Some((_, value)) = other.filter(|_| !map.contains_key(key)) {
            out.insert(key.to_owned(), value.clone());
        }
    }
    out
}

fn port(path: &str, entry: &Value) -> Result<PortMapping, ConfigError> {
    let Value::Object(map) = entry else {
        return Err(field(
            path,
            entry,
            "it is {\"hostPort\", \"containerPort\", \"protocol\", \"hostIP\"}",
        ));
    };
    let map = spelled(map, &["hostPort", "containerPort", "protocol", "hostIP"]);
    let number = |key: &str| {
        let value = map.get(key).unwrap_or(&Value::Null);
        value
            .as_u64()
            .and_then(|n| u16::try_from(n).ok())
            .and_then(NonZeroU16::new)
            .ok_or_else(|| field(&format!("{path}.{key}"), value, "it is a port, 1 to 65535"))
    };
    let protocol = match map.get("protocol") {
        None | Some(Value::Null) => Transport::Tcp,
        Some(value) => {
            let text = value.as_str().unwrap_or_default().to_ascii_lowercase();
            match text.as_str() {
                "tcp" => Transport::Tcp,
                "udp" => Transport::Udp,
                "sctp" => Transport::Sctp,
                _ => {
                    let path = format!("{path}.protocol");
                    return Err(field(&path, value, "it is tcp, udp or sctp"));
                }
            }
        }
    };
    let host_ip = match map.get("hostIP") {
        None | Some(Value::Null) => None,
        Some(Value::String(text)) if text.is_empty() => None,
        Some(value) => Some(address(&format!("{path}.hostIP"), value)?),
    };
    Ok(PortMapping {
        host_port: number("hostPort")?,
        container_port: number("containerPort")?,
        protocol,
        host_ip,
    })
}

/// The runtime's capability, else the configuration's own `dns`; each as a whole.
fn dns(
    raw: &Map<String, Value>,
    runtime: &Map<String, Value>,
) -> Result<Option<Map<String, Value>>, ConfigError> {
    for (map, path) in [(runtime, "runtimeConfig.dns"), (raw, "dns")] {
        let Some(value) = map.get("dns").filter(|v| !v.is_null()) else {
            continue;
        };
        let dns = object(map, "dns", path)?;
        let keys = [
            "nameservers",
            "servers",
            "search",
            "searches",
            "options",
            "domain",
        ];
        let dns = spelled(&dns, &keys);
        // The `dns` capability calls them otherwise than the result does.
        let pairs = [
            ("nameservers", "servers", "nameservers"),
            ("search", "searches", "search"),
            ("options", "options", "options"),
        ];
        let mut out = Map::new();
        for (key, other, told) in pairs {
            let key = if dns.contains_key(key) { key } else { other };
            let path = format!("{path}.{key}");
            let list = list(&dns, key, &path)?;
            for (i, entry) in list.iter().enumerate() {
                let right = match (told, entry.as_str()) {
                    // A host's resolv.conf may name one on a link: `fe80::1%eth0`.
                    ("nameservers", Some(text)) => {
                        let address = text.split_once('%').map_or(text, |(address, _)| address);
                        address.parse::<IpAddr>().is_ok()
                    }
                    (_, text) => text.is_some_and(|t| !t.is_empty()),
                };
                if !right {
                    let path = format!("{path}[{i}]");
                    let what = match told {
                        "nameservers" => "it is an address",
                        _ => "it is text",
                    };
                    return Err(field(&path, entry, what));
                }
            }
            if !list.is_empty() {
                out.insert(told.to_owned(), Value::Array(list));
            }
        }
        match dns.get("domain") {
            None | Some(Value::Null) => {}
            Some(Value::String(domain)) => {
                if !domain.is_empty() {
                    out.insert("domain".to_owned(), domain.as_str().into());
                }
            }
            Some(_) => return Err(field(&format!("{path}.domain"), value, "it is text")),
        }
        return Ok(Some(out));
    }
    Ok(None)
}

/// `args.cni.labels` are for people; their shape is checked, because a wrong one hides what its author meant.
fn labels(cni: &Map<String, Value>) -> Result<(), ConfigError> {
    for (i, label) in list(cni, "labels", "args.cni.labels")?.iter().enumerate() {
        let text = |key: &str| label.get(key).is_some_and(Value::is_string);
        if !(text("key") && text("value")) {
            return Err(field(
                &format!("args.cni.labels[{i}]"),
                label,
                "it is {\"key\", \"value\"}",
            ));
        }
    }
    Ok(())
}

fn object(
    map: &Map<String, Value>,
    key: &str,
    path: &str,
) -> Result<Map<String, Value>, ConfigError> {
    match map.get(key) {
        None | Some(Value::Null) => Ok(Map::new()),
        Some(Value::Object(object)) => Ok(object.clone()),
        Some(other) => Err(field(path, other, "it is an object")),
    }
}

fn list(map: &Map<String, Value>, key: &str, path: &str) -> Result<Vec<Value>, ConfigError> {
    match map.get(key) {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(list)) => Ok(list.clone()),
        Some(other) => Err(field(path, other, "it is a list")),
    }
}
