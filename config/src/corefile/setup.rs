//! Raw blocks to validated server blocks: keys, chain order, and the plugins that serve operators. The ones that answer
//! queries are in `serving`.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use super::blocks::{RawBlock, fault};
use super::directive::{Directive, duration, split};
use super::lexer::Token;
use super::order::PLUGIN_ORDER;
use super::{
    Corefile, Health, LogClasses, LogPart, LogRule, Plugin, Reload, ServerBlock, ZoneAddress,
    address, serving,
};
use crate::types::DnsName;
use crate::{Fault, Faults};

/// What one directive adds.
enum Set {
    Plugins(Vec<Plugin>),
    Bind(Vec<IpAddr>),
}

pub(super) fn corefile(raw: Vec<RawBlock>, warnings: Vec<String>) -> Result<Corefile, Faults> {
    let mut faults = Vec::new();
    let mut servers = Vec::new();
    let mut taken: BTreeMap<ZoneAddress, (Vec<IpAddr>, u32)> = BTreeMap::new();
    for block in raw {
        match server(&block) {
            Ok(server) => {
                for zone in &server.zones {
                    match taken.get(zone) {
                        // The same key on disjoint addresses is two servers.
                        Some((bind, line))
                            if bind.is_empty()
                                || server.bind.is_empty()
                                || bind.iter().any(|b| server.bind.contains(b)) =>
                        {
                            faults.push(fault(
                                &block.keys[0],
                                format!("{zone} is already served by the block on line {line}"),
                                "one block a zone and port",
                            ))
                        }
                        _ => {
                            taken.insert(zone.clone(), (server.bind.clone(), server.at.1));
                        }
                    }
                }
                servers.push(server);
            }
            Err(more) => faults.extend(more),
        }
    }
    faults.sort_by(|a, b| (&a.file, a.at).cmp(&(&b.file, b.at)));
    if faults.is_empty() {
        Ok(Corefile { servers, warnings })
    } else {
        Err(Faults(faults))
    }
}

fn server(block: &RawBlock) -> Result<ServerBlock, Vec<Fault>> {
    let mut faults = Vec::new();
    let mut zones: Vec<ZoneAddress> = Vec::new();
    for token in &block.keys {
        // Names may hold braces, but nobody means one: this is a brace that lost its space or its partner.
        if token.text.contains(['{', '}'])
            && !token.text.contains("{$")
            && !token.text.contains("{%")
        {
            faults.push(fault(
                token,
                format!("a brace in the zone \"{}\"", token.text),
                "a { stands alone, behind a space; every } has a {",
            ));
            continue;
        }
        match address::key(&token.text) {
            Err(wrong) => faults.push(fault(
                token,
                wrong,
                "a zone, as in example.org or dns://example.org:1053",
            )),
            Ok(key) if key.scheme != "dns" => faults.push(fault(
                token,
                format!(
                    "{}:// is a known CoreDNS transport, not supported yet",
                    key.scheme
                ),
                "dns:// over UDP and TCP",
            )),
            Ok(key) => {
                for zone in key.zones {
                    let zone = ZoneAddress {
                        zone,
                        port: key.port.unwrap_or(53),
                    };
                    if zones.contains(&zone) {
                        faults.push(fault(
                            token,
                            format!("{zone} stands twice in one block"),
                            "name it once",
                        ));
                    } else {
                        zones.push(zone);
                    }
                }
            }
        }
    }
    let origins: Vec<DnsName> = zones.iter().map(|z| z.zone.clone()).collect();
    let mut plugins = Vec::new();
    let mut bind = Vec::new();
    for name in PLUGIN_ORDER {
        let Some(tokens) = block.directives.get(name) else {
            continue;
        };
        match directive(name, tokens, &origins) {
            Ok(Set::Plugins(set)) => plugins.extend(set),
            Ok(Set::Bind(set)) => bind = set,
            Err(f) => faults.push(f),
        }
    }
    let first = &block.keys[0];
    if faults.is_empty() {
        Ok(ServerBlock {
            zones,
            bind,
            plugins,
            at: (first.file.to_string(), first.line),
        })
    } else {
        Err(faults)
    }
}

fn directive(name: &str, tokens: &[Token], origins: &[DnsName]) -> Result<Set, Fault> {
    let serves = matches!(
        name,
        "reload"
            | "bufsize"
            | "bind"
            | "debug"
            | "ready"
            | "health"
            | "prometheus"
            | "errors"
            | "log"
            | "dns64"
            | "loadbalance"
            | "cache"
            | "hosts"
            | "kubernetes"
            | "loop"
            | "forward"
            | "whoami"
    );
    if !serves {
        let mut f = fault(
            &tokens[0],
            "known CoreDNS plugin, not supported yet",
            "remove it",
        );
        f.path = name.to_owned();
        return Err(f);
    }
    let all = split(tokens)?;
    if name == "bind" {
        return bind(&all).map(Set::Bind);
    }
    if name == "forward" {
        let each = all
            .iter()
            .map(|d| serving::forward(d).map(|f| Plugin::Forward(Box::new(f))));
        return each.collect::<Result<_, _>>().map(Set::Plugins);
    }
    if name == "log" {
        let rules = all
            .iter()
            .map(|d| log(d, origins))
            .collect::<Result<_, _>>()?;
        return Ok(Set::Plugins(vec![Plugin::Log(rules)]));
    }
    let [d] = &all[..] else {
        return Err(all[1].fault("stands twice in one block", "once a block"));
    };
    let plugin = match name {
        "reload" => Plugin::Reload(reload(d)?),
        "bufsize" => Plugin::Bufsize(bufsize(d)?),
        "debug" => bare(d, Plugin::Debug)?,
        "whoami" => bare(d, Plugin::Whoami)?,
        "ready" => Plugin::Ready(ready(d)?),
        "health" => Plugin::Health(health(d)?),
        "prometheus" => {
            d.at_most(1)?;
            d.no_options()?;
            Plugin::Prometheus(listen(
                d,
                0,
                SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 9153),
            )?)
        }
        "errors" => errors(d)?,
        "dns64" => Plugin::Dns64(serving::dns64(d)?),
        "loadbalance" => loadbalance(d)?,
        "cache" => Plugin::Cache(serving::cache(d, origins)?),
        "hosts" => Plugin::Hosts(serving::hosts(d, origins)?),
        "kubernetes" => Plugin::Kubernetes(serving::kubernetes(d, origins)?),
        "loop" => {
            d.at_most(0)?;
            d.no_options()?;
            Plugin::Loop(origins.to_vec())
        }
        _ => unreachable!("`serves` lists what stands here"),
    };
    Ok(Set::Plugins(vec![plugin]))
}

fn bare(d: &Directive, plugin: Plugin) -> Result<Plugin, Fault> {
    d.at_most(0)?;
    d.no_options()?;
    Ok(plugin)
}

fn bind(all: &[Directive]) -> Result<Vec<IpAddr>, Fault> {
    let mut out = Vec::new();
    for d in all {
        if let Some(option) = d.options.first() {
            return Err(match option.name.text.as_str() {
                "except" => d.unsupported(option, "bind the wanted addresses instead"),
                _ => d.unknown(option),
            });
        }
        if d.args.is_empty() {
            return Err(d.fault("no address", "bind ADDRESS…"));
        }
        for arg in &d.args {
            let address = arg.text.parse().map_err(|_| {
                d.fault(
                    format!(
                        "\"{}\" is not an address; names of interfaces are not supported yet",
                        arg.text
                    ),
                    "bind ADDRESS…",
                )
            })?;
            out.push(address);
        }
    }
    Ok(out)
}

fn reload(d: &Directive) -> Result<Reload, Fault> {
    d.at_most(2)?;
    d.no_options()?;
    let at = |i: usize, default: u64, min: u64| match d.args.get(i) {
        None => Ok(Duration::from_secs(default)),
        Some(t) => duration(&t.text)
            .map(|x| x.max(Duration::from_secs(min)))
            .ok_or_else(|| {
                d.fault(
                    format!("\"{}\" is not a duration", t.text),
                    "reload [INTERVAL] [JITTER], as in 30s",
                )
            }),
    };
    let interval = at(0, 30, 2)?;
    Ok(Reload {
        interval,
        jitter: at(1, 15, 1)?.min(interval / 2),
    })
}

fn bufsize(d: &Directive) -> Result<u16, Fault> {
    d.at_most(1)?;
    d.no_options()?;
    let Some(arg) = d.args.first() else {
        return Ok(1232);
    };
    let size = arg.text.parse().ok().filter(|n| (512..=4096).contains(n));
    size.ok_or_else(|| d.fault(format!("size \"{}\"", arg.text), "512 to 4096"))
}

/// `host:port`, `:port`, `localhost:port`; an empty host is every address.
fn listen(d: &Directive, arg: usize, default: SocketAddr) -> Result<SocketAddr, Fault> {
    let Some(token) = d.args.get(arg) else {
        return Ok(default);
    };
    let text = token.text.as_str();
    let parsed = match text.rsplit_once(':') {
        Some((host, port)) => port.parse().ok().and_then(|port: u16| {
            let ip = match host {
                "" => Some(Ipv6Addr::UNSPECIFIED.into()),
                "localhost" => Some(Ipv4Addr::LOCALHOST.into()),
                host => host
                    .trim_start_matches('[')
                    .trim_end_matches(']')
                    .parse::<IpAddr>()
                    .ok(),
            };
            ip.map(|ip| SocketAddr::new(ip, port))
        }),
        None => None,
    };
    parsed.ok_or_else(|| {
        d.fault(
            format!("\"{text}\" is not ADDRESS:PORT"),
            "as in :8080 or 127.0.0.1:8080",
        )
    })
}

fn ready(d: &Directive) -> Result<SocketAddr, Fault> {
    d.at_most(1)?;
    for option in &d.options {
        // The cluster view never becomes unsynced again, so both ways of watching are one.
        match (
            option.name.text.as_str(),
            d.one(option, "until-ready or continuously"),
        ) {
            ("monitor", Ok("until-ready" | "continuously")) => {}
            ("monitor", Ok(other)) => {
                return Err(d.at(
                    option,
                    format!("\"{other}\""),
                    "until-ready or continuously",
                ));
            }
            ("monitor", Err(f)) => return Err(f),
            _ => return Err(d.unknown(option)),
        }
    }
    listen(d, 0, SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), 8181))
}

fn health(d: &Directive) -> Result<Health, Fault> {
    d.at_most(1)?;
    let mut lameduck = Duration::ZERO;
    for option in &d.options {
        match option.name.text.as_str() {
            "lameduck" => lameduck = d.duration(option)?,
            _ => return Err(d.unknown(option)),
        }
    }
    Ok(Health {
        address: listen(d, 0, SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), 8080))?,
        lameduck,
    })
}

fn errors(d: &Directive) -> Result<Plugin, Fault> {
    d.at_most(0)?;
    match d.options.first() {
        None => Ok(Plugin::Errors),
        Some(option) => Err(match option.name.text.as_str() {
            "consolidate" | "stacktrace" => d.unsupported(
                option,
                "remove it: every error is written, on a line of its own",
            ),
            _ => d.unknown(option),
        }),
    }
}

fn loadbalance(d: &Directive) -> Result<Plugin, Fault> {
    match d.args.first().map(|t| t.text.as_str()) {
        None | Some("round_robin") => d.at_most(1)?,
        Some("weighted") => {
            return Err(d.fault(
                "policy \"weighted\" is known to CoreDNS, not supported yet",
                "round_robin",
            ));
        }
        Some(other) => return Err(d.fault(format!("unknown policy \"{other}\""), "round_robin")),
    }
    match d.options.first() {
        None => Ok(Plugin::Loadbalance),
        Some(option) if option.name.text == "prefer" => {
            Err(d.unsupported(option, "round_robin without preference"))
        }
        Some(option) => Err(d.unknown(option)),
    }
}

/// CoreDNS's `{common}`; `{combined}` is the same plus nothing that kun lacks.
const COMMON: &str = r#"{remote}:{port} - {>id} "{type} {class} {name} {proto} {size} {>do} {>bufsize}" {rcode} {>rflags} {rsize} {duration}"#;

fn log(d: &Directive, origins: &[DnsName]) -> Result<LogRule, Fault> {
    let (names, format) = match &d.args[..] {
        [] => (origins.to_vec(), COMMON),
        // Names until the format: CoreDNS takes the last argument as format when it holds a brace.
        [names @ .., last] if last.text.contains('{') => {
            let mut out = Vec::new();
            for name in names {
                out.extend(
                    address::zones(&name.text).map_err(|w| d.fault(w, "log [NAMES…] [FORMAT]"))?,
                );
            }
            let format = match last.text.as_str() {
                "{common}" | "{combined}" => COMMON,
                other => other,
            };
            (
                if out.is_empty() {
                    origins.to_vec()
                } else {
                    out
                },
                format,
            )
        }
        _ => (d.zones(0, origins)?, COMMON),
    };
    let mut classes = LogClasses::default();
    for option in &d.options {
        if option.name.text != "class" {
            return Err(d.unknown(option));
        }
        if option.args.is_empty() {
            return Err(d.at(option, "no class", "success, denial, error or all"));
        }
        for arg in &option.args {
            match arg.text.as_str() {
                "success" => classes.success = true,
                "denial" => classes.denial = true,
                "error" => classes.error = true,
                "all" => classes = ALL,
                other => {
                    return Err(d.at(
                        option,
                        format!("unknown class \"{other}\""),
                        "success, denial, error or all",
                    ));
                }
            }
        }
    }
    if classes == LogClasses::default() {
        classes = ALL;
    }
    Ok(LogRule {
        names,
        format: log_format(d, format)?,
        classes,
    })
}

const ALL: LogClasses = LogClasses {
    success: true,
    denial: true,
    error: true,
};

fn log_format(d: &Directive, format: &str) -> Result<Vec<LogPart>, Fault> {
    let mut out = Vec::new();
    let mut rest = format;
    while let Some(open) = rest.find('{') {
        let Some(len) = rest[open..].find('}') else {
            break;
        };
        if open > 0 {
            out.push(LogPart::Text(rest[..open].to_owned()));
        }
        let placeholder = &rest[open..=open + len];
        out.push(match placeholder {
            "{type}" => LogPart::Type,
            "{name}" => LogPart::Name,
            "{class}" => LogPart::Class,
            "{proto}" => LogPart::Proto,
            "{remote}" => LogPart::Remote,
            "{local}" => LogPart::Local,
            "{port}" => LogPart::Port,
            "{size}" => LogPart::Size,
            "{rcode}" => LogPart::Rcode,
            "{rsize}" => LogPart::Rsize,
            "{duration}" => LogPart::Duration,
            "{>id}" => LogPart::Id,
            "{>opcode}" => LogPart::Opcode,
            "{>do}" => LogPart::Do,
            "{>bufsize}" => LogPart::Bufsize,
            "{>rflags}" => LogPart::Rflags,
            // Metadata of plugins, and what nobody knows: CoreDNS writes a dash.
            other if other.starts_with("{/") => LogPart::Text("-".to_owned()),
            other => {
                return Err(d.fault(
                    format!("unknown placeholder {other} in the format"),
                    "one that CoreDNS documents for log",
                ));
            }
        });
        rest = &rest[open + len + 1..];
    }
    if !rest.is_empty() {
        out.push(LogPart::Text(rest.to_owned()));
    }
    Ok(out)
}
