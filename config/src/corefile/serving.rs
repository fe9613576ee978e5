//! The plugins that answer queries: cache, dns64, forward, hosts, kubernetes.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use ipnet::Ipv6Net;

use super::directive::{Directive, OptionLine, duration};
use super::{
    Cache, CacheHalf, Dns64, Fallthrough, Forward, ForwardTo, Hosts, Kubernetes, PodMode, Policy,
    Prefetch, ServeStale,
};
use crate::Fault;
use crate::types::{DnsName, Pref64};

/// CoreDNS's own bound.
const MAX_UPSTREAMS: usize = 15;

pub(super) fn cache(d: &Directive, origins: &[DnsName]) -> Result<Cache, Fault> {
    let half = |max_ttl| CacheHalf {
        capacity: 9984,
        max_ttl: Duration::from_secs(max_ttl),
        min_ttl: Duration::from_secs(5),
    };
    let mut c = Cache {
        zones: Vec::new(),
        success: half(3600),
        denial: half(1800),
        servfail: Duration::from_secs(5),
        prefetch: None,
        serve_stale: None,
        disable_success: Vec::new(),
        disable_denial: Vec::new(),
        keep_ttl: false,
    };
    let mut from = 0;
    if let Some(ttl) = d.args.first().and_then(|t| t.text.parse::<u64>().ok()) {
        if ttl == 0 || ttl > 604_800 {
            return Err(d.fault(format!("TTL {ttl}"), "1 to 604800 s"));
        }
        let ttl = Duration::from_secs(ttl);
        c.success.max_ttl = ttl;
        c.denial.max_ttl = ttl;
        from = 1;
    }
    c.zones = d.zones(from, origins)?;
    for o in &d.options {
        match o.name.text.as_str() {
            "success" => cache_half(d, o, &mut c.success)?,
            "denial" => cache_half(d, o, &mut c.denial)?,
            "prefetch" => c.prefetch = Some(prefetch(d, o)?),
            "serve_stale" => c.serve_stale = Some(serve_stale(d, o)?),
            "servfail" => {
                c.servfail = d.duration(o)?;
                if c.servfail > Duration::from_secs(300) {
                    return Err(d.at(o, "longer than 5 minutes", "at most 5m (RFC 2308 §7.1)"));
                }
            }
            "disable" => {
                let names = match o.args.get(1..) {
                    Some(rest) if !rest.is_empty() => d.option_zones(
                        &OptionLine {
                            name: o.name.clone(),
                            args: rest.to_vec(),
                        },
                        &c.zones,
                    )?,
                    _ => c.zones.clone(),
                };
                match o.args.first().map(|t| t.text.as_str()) {
                    Some("success") => c.disable_success = names,
                    Some("denial") => c.disable_denial = names,
                    _ => {
                        return Err(d.at(
                            o,
                            "neither success nor denial",
                            "disable success|denial [ZONES…]",
                        ));
                    }
                }
            }
            "keepttl" => c.keep_ttl = d.flag(o)?,
            _ => return Err(d.unknown(o)),
        }
    }
    Ok(c)
}

fn cache_half(d: &Directive, o: &OptionLine, half: &mut CacheHalf) -> Result<(), Fault> {
    const RIGHT: &str =
        "CAPACITY [TTL [MINTTL]]: numbers, 0 to 10000000 entries, seconds up to 604800";
    if o.args.is_empty() || o.args.len() > 3 {
        return Err(d.at(o, format!("{} arguments", o.args.len()), RIGHT));
    }
    let number = |i: usize, max: u64| match o.args.get(i) {
        None => Ok(None),
        Some(t) => t
            .text
            .parse()
            .ok()
            .filter(|n| *n <= max)
            .map(Some)
            .ok_or_else(|| d.at(o, format!("\"{}\"", t.text), RIGHT)),
    };
    if let Some(capacity) = number(0, 10_000_000)? {
        half.capacity = capacity as usize;
    }
    if let Some(ttl) = number(1, 604_800)? {
        half.max_ttl = Duration::from_secs(ttl);
    }
    if let Some(ttl) = number(2, 604_800)? {
        half.min_ttl = Duration::from_secs(ttl);
    }
    if half.min_ttl > half.max_ttl && o.args.len() == 3 {
        return Err(d.at(o, "the minimum TTL is above the maximum", RIGHT));
    }
    Ok(())
}

fn prefetch(d: &Directive, o: &OptionLine) -> Result<Prefetch, Fault> {
    const RIGHT: &str = "AMOUNT [DURATION [PERCENTAGE%]], as in prefetch 10 1m 10%";
    let bad = || d.at(o, "not understood", RIGHT);
    let amount = o
        .args
        .first()
        .and_then(|t| t.text.parse().ok())
        .ok_or_else(bad)?;
    let gap = match o.args.get(1) {
        None => Duration::from_secs(60),
        Some(t) => duration(&t.text).ok_or_else(bad)?,
    };
    let percentage = match o.args.get(2) {
        None => 10,
        Some(t) => {
            let n = t
                .text
                .strip_suffix('%')
                .and_then(|n| n.parse::<u8>().ok())
                .ok_or_else(bad)?;
            if !(10..=90).contains(&n) {
                return Err(d.at(o, format!("{n}%"), "10% to 90%"));
            }
            n
        }
    };
    if o.args.len() > 3 {
        return Err(bad());
    }
    Ok(Prefetch {
        amount,
        duration: gap,
        percentage,
    })
}

fn serve_stale(d: &Directive, o: &OptionLine) -> Result<ServeStale, Fault> {
    const RIGHT: &str = "serve_stale [DURATION] [immediate|verify]";
    let bad = || d.at(o, "not understood", RIGHT);
    if o.args.len() > 2 {
        return Err(d.at(
            o,
            "a verify timeout is known to CoreDNS, not supported yet",
            RIGHT,
        ));
    }
    Ok(ServeStale {
        duration: match o.args.first() {
            None => Duration::from_secs(3600),
            Some(t) => duration(&t.text).ok_or_else(bad)?,
        },
        verify: match o
            .args
            .get(1)
            .map(|t| t.text.to_ascii_lowercase())
            .as_deref()
        {
            None | Some("immediate") => false,
            Some("verify") => true,
            _ => return Err(bad()),
        },
    })
}

pub(super) fn dns64(d: &Directive) -> Result<Dns64, Fault> {
    d.at_most(1)?;
    let mut spec = Dns64 {
        prefixes: Vec::new(),
        translate_all: false,
        allow_ipv4: false,
        exclude: Vec::new(),
    };
    let prefix = |text: &str| {
        let net: Ipv6Net = text
            .parse()
            .map_err(|_| format!("\"{text}\" is not an IPv6 prefix"))?;
        Pref64::new(net).map_err(|e| format!("{text}: {e}"))
    };
    const RIGHT: &str = "an IPv6 prefix like 64:ff9b::/96 (RFC 6052 §2.2)";
    if let Some(t) = d.args.first() {
        spec.prefixes
            .push(prefix(&t.text).map_err(|w| d.fault(w, RIGHT))?);
    }
    for o in &d.options {
        match o.name.text.as_str() {
            "prefix" => {
                let p = prefix(d.one(o, RIGHT)?).map_err(|w| d.at(o, w, RIGHT))?;
                if !spec.prefixes.contains(&p) {
                    spec.prefixes.push(p);
                }
            }
            "translate_all" => spec.translate_all = d.flag(o)?,
            "allow_ipv4" => spec.allow_ipv4 = d.flag(o)?,
            // kun's own: CoreDNS has no exclusion set.
            "exclude" => {
                if o.args.is_empty() {
                    return Err(d.at(o, "no network", "exclude NETWORK…"));
                }
                for t in &o.args {
                    let net = t.text.parse().map_err(|_| {
                        d.at(
                            o,
                            format!("\"{}\" is not an IPv6 prefix", t.text),
                            "exclude NETWORK…",
                        )
                    })?;
                    spec.exclude.push(net);
                }
            }
            _ => return Err(d.unknown(o)),
        }
    }
    if spec.prefixes.is_empty() {
        spec.prefixes.push(Pref64::WELL_KNOWN);
    }
    // More AAAA records than this would not fit an answer of 1232 octets together with a few addresses.
    if spec.prefixes.len() > 8 {
        return Err(d.fault("more than 8 prefixes", "at most 8"));
    }
    if spec.exclude.is_empty() {
        spec.exclude
            .push("::ffff:0:0/96".parse().expect("a prefix"));
    }
    Ok(spec)
}

pub(super) fn hosts(d: &Directive, origins: &[DnsName]) -> Result<Hosts, Fault> {
    let mut spec = Hosts {
        file: d.args.first().map_or("/etc/hosts", |t| &t.text).into(),
        zones: d.zones(1, origins)?,
        inline: Vec::new(),
        ttl: 3600,
        no_reverse: false,
        reload: Duration::from_secs(5),
        fallthrough: Fallthrough::default(),
    };
    for o in &d.options {
        match o.name.text.as_str() {
            "fallthrough" => spec.fallthrough = Fallthrough(d.option_zones(o, &[DnsName::root()])?),
            "no_reverse" => spec.no_reverse = d.flag(o)?,
            "ttl" => spec.ttl = d.number(o, 1, 65_535)? as u32,
            "reload" => spec.reload = d.duration(o)?,
            text => {
                let Ok(address) = text.parse::<IpAddr>() else {
                    return Err(d.unknown(o));
                };
                if o.args.is_empty() {
                    return Err(d.at(o, "no name", "ADDRESS NAME…"));
                }
                let names = o.args.iter().map(|t| {
                    DnsName::parse(&t.text)
                        .map_err(|e| d.at(o, format!("\"{}\": {e}", t.text), "ADDRESS NAME…"))
                });
                spec.inline
                    .push((address, names.collect::<Result<_, _>>()?));
            }
        }
    }
    Ok(spec)
}

pub(super) fn kubernetes(d: &Directive, origins: &[DnsName]) -> Result<Kubernetes, Fault> {
    let mut spec = Kubernetes {
        zones: d.zones(0, origins)?,
        namespaces: Vec::new(),
        pods: PodMode::Disabled,
        endpoint_pod_names: false,
        no_endpoints: false,
        ignore_empty_service: false,
        ttl: 5,
        fallthrough: Fallthrough::default(),
    };
    for o in &d.options {
        match o.name.text.as_str() {
            "pods" => {
                spec.pods = match d.one(o, "disabled, insecure or verified")? {
                    "disabled" => PodMode::Disabled,
                    "insecure" => PodMode::Insecure,
                    "verified" => PodMode::Verified,
                    other => {
                        return Err(d.at(
                            o,
                            format!("\"{other}\""),
                            "disabled, insecure or verified",
                        ));
                    }
                }
            }
            "namespaces" => {
                if o.args.is_empty() {
                    return Err(d.at(o, "no namespace", "namespaces NAMESPACE…"));
                }
                spec.namespaces
                    .extend(o.args.iter().map(|t| t.text.clone()));
            }
            "endpoint_pod_names" => spec.endpoint_pod_names = d.flag(o)?,
            "noendpoints" => spec.no_endpoints = d.flag(o)?,
            "ignore" => match d.one(o, "empty_service")? {
                "empty_service" => spec.ignore_empty_service = true,
                other => return Err(d.at(o, format!("\"{other}\""), "empty_service")),
            },
            "ttl" => spec.ttl = d.number(o, 0, 3600)? as u32,
            "fallthrough" => spec.fallthrough = Fallthrough(d.option_zones(o, &spec.zones)?),
            "endpoint"
            | "tls"
            | "kubeconfig"
            | "apiserver_qps"
            | "apiserver_burst"
            | "apiserver_max_inflight" => {
                return Err(d.unsupported(
                    o,
                    "where cluster objects come from is said in kun.yaml, section cluster",
                ));
            }
            "labels" | "namespace_labels" | "multicluster" | "startup_timeout" => {
                return Err(d.unsupported(o, "remove it"));
            }
            _ => return Err(d.unknown(o)),
        }
    }
    Ok(spec)
}

pub(super) fn forward(d: &Directive) -> Result<Forward, Fault> {
    let Some((from, to)) = d.args.split_first() else {
        return Err(d.fault("nothing to forward", "forward FROM TO…"));
    };
    let from = super::address::zones(&from.text).map_err(|w| d.fault(w, "forward FROM TO…"))?;
    if to.is_empty() {
        return Err(d.fault("no upstream", "forward FROM TO…"));
    }
    if to.len() > MAX_UPSTREAMS {
        return Err(d.fault(
            format!("{} upstreams", to.len()),
            format!("at most {MAX_UPSTREAMS}"),
        ));
    }
    let to = to
        .iter()
        .map(|t| upstream(d, &t.text))
        .collect::<Result<_, _>>()?;
    let mut spec = Forward {
        from,
        except: Vec::new(),
        to,
        policy: Policy::Random,
        max_fails: 2,
        health_interval: Duration::from_millis(500),
        health_no_rec: false,
        health_domain: DnsName::root(),
        max_concurrent: None,
        force_tcp: false,
        prefer_udp: false,
        failover: Vec::new(),
        failfast: false,
    };
    for o in &d.options {
        match o.name.text.as_str() {
            "except" => spec.except.extend(d.option_zones(o, &[])?),
            "force_tcp" => spec.force_tcp = d.flag(o)?,
            "prefer_udp" => spec.prefer_udp = d.flag(o)?,
            "failfast_all_unhealthy_upstreams" => spec.failfast = d.flag(o)?,
            "max_fails" => spec.max_fails = d.number(o, 0, u64::from(u32::MAX))? as u32,
            "max_concurrent" => {
                spec.max_concurrent = Some(d.number(o, 1, u64::from(u32::MAX))? as u32)
            }
            "policy" => {
                spec.policy = match d.one(o, "random, round_robin or sequential")? {
                    "random" => Policy::Random,
                    "round_robin" => Policy::RoundRobin,
                    "sequential" => Policy::Sequential,
                    other => {
                        return Err(d.at(
                            o,
                            format!("\"{other}\""),
                            "random, round_robin or sequential",
                        ));
                    }
                }
            }
            "health_check" => health_check(d, o, &mut spec)?,
            "failover" => {
                if o.args.is_empty() {
                    return Err(d.at(o, "no response code", "failover RCODE…"));
                }
                for t in &o.args {
                    spec.failover.push(match t.text.as_str() {
                        "FORMERR" => 1,
                        "SERVFAIL" => 2,
                        "NXDOMAIN" => 3,
                        "NOTIMP" => 4,
                        "REFUSED" => 5,
                        other => {
                            return Err(d.at(
                                o,
                                format!("\"{other}\""),
                                "FORMERR, SERVFAIL, NXDOMAIN, NOTIMP or REFUSED",
                            ));
                        }
                    });
                }
            }
            // Upstream sockets are made for each query: nothing idles, so nothing expires.
            "expire" | "max_age" => {
                d.duration(o)?;
            }
            "max_idle_conns" => {
                d.number(o, 0, u64::from(u32::MAX))?;
            }
            "tls" | "tls_servername" | "next" | "max_connect_attempts" | "resolver" => {
                return Err(d.unsupported(o, "remove it"));
            }
            _ => return Err(d.unknown(o)),
        }
    }
    Ok(spec)
}

fn upstream(d: &Directive, text: &str) -> Result<ForwardTo, Fault> {
    let plain = match text.split_once("://") {
        None => text,
        Some(("dns", rest)) => rest,
        Some((scheme @ ("tls" | "https" | "quic" | "grpc"), _)) => {
            return Err(d.fault(
                format!(
                    "\"{text}\": {scheme}:// upstreams are known to CoreDNS, not supported yet"
                ),
                "an address, as in 192.0.2.1 or [2001:db8::1]:53",
            ));
        }
        Some((scheme, _)) => {
            return Err(d.fault(
                format!("\"{text}\": unknown scheme {scheme}://"),
                "an address or a file",
            ));
        }
    };
    if let Ok(address) = plain.parse::<SocketAddr>() {
        return Ok(ForwardTo::Address(address));
    }
    if let Ok(ip) = plain
        .trim_start_matches('[')
        .trim_end_matches(']')
        .parse::<IpAddr>()
    {
        return Ok(ForwardTo::Address(SocketAddr::new(ip, 53)));
    }
    // CoreDNS takes whatever names an existing file; a path is what a person means by that.
    if plain.contains('/') {
        return Ok(ForwardTo::File(PathBuf::from(plain)));
    }
    Err(d.fault(
        format!("\"{text}\" is neither an address nor a path"),
        "an address, as in 192.0.2.1 or [2001:db8::1]:53, or a path like /etc/resolv.conf",
    ))
}

fn health_check(d: &Directive, o: &OptionLine, spec: &mut Forward) -> Result<(), Fault> {
    const RIGHT: &str = "health_check DURATION [no_rec] [domain FQDN]";
    let mut args = o.args.iter().map(|t| t.text.as_str());
    let interval = args.next().and_then(duration).filter(|i| !i.is_zero());
    spec.health_interval = interval.ok_or_else(|| d.at(o, "no interval", RIGHT))?;
    while let Some(arg) = args.next() {
        match arg {
            "no_rec" => spec.health_no_rec = true,
            "domain" => {
                let name = args.next().and_then(|n| DnsName::parse(n).ok());
                spec.health_domain = name.ok_or_else(|| d.at(o, "domain without a name", RIGHT))?;
            }
            other => return Err(d.at(o, format!("\"{other}\""), RIGHT)),
        }
    }
    Ok(())
}
