//! `--explain`: the chain as it will run, for people.

use std::fmt;

use super::{Corefile, ForwardTo, Plugin, ServerBlock};

impl fmt::Display for Corefile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, server) in self.servers.iter().enumerate() {
            if i > 0 {
                writeln!(f)?;
            }
            write!(f, "{server}")?;
        }
        Ok(())
    }
}

impl fmt::Display for ServerBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for zone in &self.zones {
            writeln!(f, "{zone}")?;
        }
        writeln!(f, "  from {}:{}", self.at.0, self.at.1)?;
        if !self.bind.is_empty() {
            writeln!(f, "  bind {}", join(&self.bind))?;
        }
        for (i, plugin) in self.plugins.iter().enumerate() {
            writeln!(f, "  {:>2}. {plugin}", i + 1)?;
        }
        Ok(())
    }
}

impl Plugin {
    /// The directive's name.
    pub fn name(&self) -> &'static str {
        match self {
            Plugin::Reload(_) => "reload",
            Plugin::Bufsize(_) => "bufsize",
            Plugin::Debug => "debug",
            Plugin::Ready(_) => "ready",
            Plugin::Health(_) => "health",
            Plugin::Prometheus(_) => "prometheus",
            Plugin::Errors => "errors",
            Plugin::Log(_) => "log",
            Plugin::Dns64(_) => "dns64",
            Plugin::Loadbalance => "loadbalance",
            Plugin::Cache(_) => "cache",
            Plugin::Hosts(_) => "hosts",
            Plugin::Kubernetes(_) => "kubernetes",
            Plugin::Loop(_) => "loop",
            Plugin::Forward(_) => "forward",
            Plugin::Whoami => "whoami",
        }
    }
}

impl fmt::Display for Plugin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())?;
        match self {
            Plugin::Debug
            | Plugin::Errors
            | Plugin::Loadbalance
            | Plugin::Whoami
            | Plugin::Loop(_) => Ok(()),
            Plugin::Reload(r) => write!(f, " every {:?} + up to {:?}", r.interval, r.jitter),
            Plugin::Bufsize(n) => write!(f, " {n}"),
            Plugin::Ready(a) | Plugin::Prometheus(a) => write!(f, " at {a}"),
            Plugin::Health(h) => write!(f, " at {}, lameduck {:?}", h.address, h.lameduck),
            Plugin::Log(rules) => write!(f, " {} rule(s)", rules.len()),
            Plugin::Dns64(d) => {
                write!(f, " {}, without {}", join(&d.prefixes), join(&d.exclude))?;
                if d.translate_all {
                    f.write_str(", native AAAA ignored")?;
                }
                if !d.allow_ipv4 {
                    f.write_str(", only for clients that ask over IPv6 (allow_ipv4 is off)")?;
                }
                f.write_str("; asked below the cache, kubernetes and hosts names exempt")
            }
            Plugin::Cache(c) => {
                write!(
                    f,
                    " {}: {} positive up to {:?}, {} negative up to {:?}",
                    join(&c.zones),
                    c.success.capacity,
                    c.success.max_ttl,
                    c.denial.capacity,
                    c.denial.max_ttl
                )?;
                if let Some(s) = c.serve_stale {
                    write!(
                        f,
                        ", stale for {:?}{}",
                        s.duration,
                        if s.verify { " if upstream fails" } else { "" }
                    )?;
                }
                Ok(())
            }
            Plugin::Hosts(h) => write!(
                f,
                " {} and {} inline, for {}{}",
                h.file.display(),
                h.inline.len(),
                join(&h.zones),
                falls(&h.fallthrough.0)
            ),
            Plugin::Kubernetes(k) => write!(
                f,
                " {}, pods {:?}, ttl {}{}",
                join(&k.zones),
                k.pods,
                k.ttl,
                falls(&k.fallthrough.0)
            ),
            Plugin::Forward(x) => {
                let to: Vec<String> =
                    x.to.iter()
                        .map(|t| match t {
                            ForwardTo::Address(a) => a.to_string(),
                            ForwardTo::File(p) => p.display().to_string(),
                        })
                        .collect();
                write!(f, " {} to {} ({:?})", join(&x.from), join(&to), x.policy)?;
                if !x.except.is_empty() {
                    write!(f, ", except {}", join(&x.except))?;
                }
                Ok(())
            }
        }
    }
}

fn falls(zones: &[crate::types::DnsName]) -> String {
    if zones.is_empty() {
        String::new()
    } else {
        format!(", falls through for {}", join(zones))
    }
}

fn join<T: ToString>(items: &[T]) -> String {
    items
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(" ")
}
