//! The lines of `log` and `errors`, as CoreDNS writes them.

use std::fmt::Write;
use std::net::SocketAddr;
use std::time::Duration;

use kun_config::corefile::{LogClasses, LogPart, LogRule};
use kun_config::types::{DnsName, wire_is_within};

use crate::query::{Query, Transport};
use crate::wire::{HEADER, flag, rcode, rcode_text, rtype, skip_name, type_text, u16_at};

/// What a line is made of.
#[derive(Debug, Clone, Copy)]
pub struct Exchange<'a> {
    /// The request.
    pub query: &'a Query<'a>,
    /// What was sent.
    pub response: &'a [u8],
    /// From where.
    pub client: SocketAddr,
    /// How long it took.
    pub duration: Duration,
}

/// The lines that `rules` want for an exchange: at most one, the first rule's whose names and classes fit.
pub fn line(rules: &[LogRule], x: &Exchange<'_>) -> Option<String> {
    let name = x.query.name();
    let class = class(x);
    let wanted = |c: &LogClasses| {
        (class.success && c.success) || (class.denial && c.denial) || (class.error && c.error)
    };
    let rule = rules
        .iter()
        .find(|r| r.names.iter().any(|n| wire_is_within(name, n.wire())))?;
    wanted(&rule.classes).then(|| {
        let mut out = String::new();
        rule.format.iter().for_each(|part| piece(part, x, &mut out));
        out
    })
}

/// `errors`: `2 example.org. A: what`.
pub fn error_line(name: &[u8], qtype: u16, code: u8, error: &str) -> String {
    format!("{code} {} {}: {error}", name_text(name), type_name(qtype))
}

fn name_text(name: &[u8]) -> String {
    DnsName::from_wire(name).map_or_else(|_| "?".to_owned(), |n| n.to_string())
}

fn type_name(t: u16) -> String {
    type_text(t).map_or_else(|| format!("TYPE{t}"), str::to_owned)
}

fn class(x: &Exchange<'_>) -> LogClasses {
    let code = x.response.get(3).map_or(rcode::SERVFAIL, |b| b & 15);
    let mut c = LogClasses::default();
    match code {
        rcode::NXDOMAIN => c.denial = true,
        rcode::NOERROR => {
            let answers = u16_at(x.response, 6).unwrap_or(0);
            // NODATA: nothing but an SOA.
            c.denial = answers == 0 && first_authority(x.response) == Some(rtype::SOA);
            c.success = !c.denial;
        }
        _ => c.error = true,
    }
    c
}

fn first_authority(m: &[u8]) -> Option<u16> {
    let at = skip_name(m, HEADER)? + 4;
    (u16_at(m, 8)? > 0).then(|| skip_name(m, at).and_then(|at| u16_at(m, at)))?
}

fn piece(part: &LogPart, x: &Exchange<'_>, out: &mut String) {
    let q = x.query;
    // Writing to a String does not fail.
    let _ = match part {
        LogPart::Text(t) => write!(out, "{t}"),
        LogPart::Type => write!(out, "{}", type_name(q.qtype)),
        LogPart::Name => write!(out, "{}", name_text(q.name())),
        LogPart::Class => write!(out, "IN"),
        LogPart::Proto => write!(
            out,
            "{}",
            if q.transport == Transport::Udp {
                "udp"
            } else {
                "tcp"
            }
        ),
        LogPart::Remote => match x.client.ip().to_canonical() {
            std::net::IpAddr::V4(a) => write!(out, "{a}"),
            std::net::IpAddr::V6(a) => write!(out, "[{a}]"),
        },
        LogPart::Local => write!(out, "-"),
        LogPart::Port => write!(out, "{}", x.client.port()),
        LogPart::Size => write!(out, "{}", q.wire().len()),
        LogPart::Rcode => write!(
            out,
            "{}",
            x.response.get(3).map_or("-", |b| rcode_text(b & 15))
        ),
        LogPart::Rsize => write!(out, "{}", x.response.len()),
        LogPart::Duration => write!(out, "{:.9}s", x.duration.as_secs_f64()),
        LogPart::Id => write!(out, "{}", q.id()),
        LogPart::Opcode => write!(out, "{}", (q.flags() & flag::OPCODE) >> 11),
        LogPart::Do => write!(out, "{}", q.dnssec_ok()),
        LogPart::Bufsize => write!(out, "{}", q.edns.map_or(512, |e| e.udp_size)),
        LogPart::Rflags => {
            let flags = u16_at(x.response, 2).unwrap_or(0);
            let all = [
                (flag::QR, "qr"),
                (flag::AA, "aa"),
                (flag::TC, "tc"),
                (flag::RD, "rd"),
                (flag::RA, "ra"),
                (flag::AD, "ad"),
                (flag::CD, "cd"),
            ];
            let set: Vec<&str> = all
                .iter()
                .filter(|(f, _)| flags & f != 0)
                .map(|(_, t)| *t)
                .collect();
            write!(out, "{}", set.join(","))
        }
    };
}
