//! DNS64 (RFC 6147): AAAA records made from A records, reverse names led back, ipv4only.arpa (RFC 7050, RFC 8880).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use kun_config::corefile::Dns64 as Spec;
use kun_config::types::{Pref64, wire_is_within};

use crate::answer::Profile;
use crate::message::{Message, Record};
use crate::wire::{flag, rcode, reverse_address, reverse_name, rtype};

/// RFC 6147 §5.1.7: bound of a synthesised TTL when no SOA came with the denial.
const TTL_WITHOUT_SOA: u32 = 600;

/// TTL of the CNAME from ip6.arpa to in-addr.arpa, which is computed and never changes while the prefix stands.
const REVERSE_TTL: u32 = 600;

/// TTL of ipv4only.arpa: the well-known addresses never change (RFC 7050 §8.2: one day in the global zone).
const IPV4ONLY_TTL: u32 = 86_400;

/// ipv4only.arpa.
pub const IPV4ONLY: &[u8] = b"\x08ipv4only\x04arpa\0";

/// Its addresses (RFC 7050 §2.2).
const IPV4ONLY_ADDRESSES: [Ipv4Addr; 2] =
    [Ipv4Addr::new(192, 0, 0, 170), Ipv4Addr::new(192, 0, 0, 171)];

/// Whether AAAA records may be made for a client with this profile: never for one that validates itself (RFC 6147 §5.5, case 3:
/// DO and CD both set).
pub fn may_synthesise(profile: Profile) -> bool {
    profile.synthesise && !(profile.dnssec_ok && profile.checking_disabled)
}

/// Whether an IPv4 address may stand under `prefix`: under 64:ff9b::/96 only global ones (RFC 6052 §3.1, RFC 5735 §3).
fn representable(prefix: Pref64, a: Ipv4Addr) -> bool {
    !prefix.is_well_known() || is_global(a)
}

fn is_global(a: Ipv4Addr) -> bool {
    let [o0, o1, o2, _] = a.octets();
    !(o0 == 0
        || a.is_private()
        || a.is_loopback()
        || a.is_link_local()
        || a.is_multicast()
        || a.is_documentation()
        || o0 >= 240
        || (o0 == 100 && (64..128).contains(&o1))
        || (o0 == 192 && o1 == 0 && o2 == 0)
        || (o0 == 192 && o1 == 88 && o2 == 99)
        || (o0 == 198 && (18..20).contains(&o1)))
}

/// The addresses that `v4` is reached under, in the order of the prefixes.
pub fn synthesise_addresses(spec: &Spec, v4: Ipv4Addr) -> impl Iterator<Item = Ipv6Addr> + '_ {
    spec.prefixes
        .iter()
        .filter(move |p| representable(**p, v4))
        .map(move |p| p.embed(v4))
}

fn aaaa(record: &Record) -> Option<Ipv6Addr> {
    (record.rtype == rtype::AAAA)
        .then(|| <[u8; 16]>::try_from(&record.data[..]).ok())?
        .map(Ipv6Addr::from)
}

/// What is to be said, given the reply to the AAAA query.
#[derive(Debug, PartialEq, Eq)]
pub enum Native {
    /// This, as it is: there are real AAAA records, or the name does not exist.
    Use(Box<Message>),
    /// The A reply decides; this bounds the TTL of what is made.
    Synthesise {
        /// Seconds.
        bound: u32,
    },
}

/// Judges the reply to the AAAA query; `None`: it timed out or failed, which counts as SERVFAIL, hence as empty (RFC 6147 §5.1.2,
/// §5.1.3).
pub fn judge(spec: &Spec, reply: Option<Message>) -> Native {
    let Some(mut m) = reply else {
        return Native::Synthesise {
            bound: TTL_WITHOUT_SOA,
        };
    };
    if m.rcode() == rcode::NXDOMAIN {
        return Native::Use(Box::new(m));
    }
    let bound = m
        .authority
        .iter()
        .find(|r| r.rtype == rtype::SOA)
        .map_or(TTL_WITHOUT_SOA, |r| r.ttl);
    if m.rcode() != rcode::NOERROR {
        return Native::Synthesise {
            bound: TTL_WITHOUT_SOA,
        };
    }
    let before = m.answers.len();
    // RFC 6147 §5.1.4: excluded records count as absent, alone or among others.
    m.answers.retain(|r| {
        aaaa(r)
            .is_none_or(|a| !spec.translate_all && !spec.exclude.iter().any(|net| net.contains(&a)))
    });
    let excluded = m.answers.len() != before;
    if !m.answers.iter().any(|r| r.rtype == rtype::AAAA) {
        return Native::Synthesise { bound };
    }
    if excluded {
        // The signature covered the whole set, and the set is no longer what was validated.
        m.answers.retain(|r| !signs(r, rtype::AAAA));
        m.flags &= !flag::AD;
    }
    Native::Use(Box::new(m))
}

fn signs(r: &Record, t: u16) -> bool {
    r.rtype == rtype::RRSIG && r.data.starts_with(&t.to_be_bytes())
}

/// The answer to the AAAA question, made from the reply to the A question (RFC 6147 §5.1.5 to 5.1.7, §5.3, §5.4).
///
/// An alias chain stays; authority and additional are the A reply's; an empty or failed A reply becomes the answer.
pub fn synthesise(spec: &Spec, a_reply: Option<Message>, name: &[u8], bound: u32) -> Message {
    let Some(mut m) = a_reply else {
        return Message::empty(name, rtype::AAAA, rcode::SERVFAIL);
    };
    m.qtype = rtype::AAAA;
    m.flags &= !flag::AD;
    let mut answers = Vec::with_capacity(m.answers.len());
    for record in std::mem::take(&mut m.answers) {
        let v4 = (record.rtype == rtype::A)
            .then(|| <[u8; 4]>::try_from(&record.data[..]).ok())
            .flatten();
        match v4 {
            Some(v4) => {
                answers.extend(
                    synthesise_addresses(spec, Ipv4Addr::from(v4)).map(|v6| Record {
                        rtype: rtype::AAAA,
                        ttl: record.ttl.min(bound),
                        data: v6.octets().to_vec(),
                        ..record.clone()
                    }),
                )
            }
            None if signs(&record, rtype::A) => {}
            None => answers.push(record),
        }
    }
    m.answers = answers;
    m
}

/// Where the reverse name of an address under one of the prefixes leads: the answer's first record, and the name to ask for PTR.
pub fn reverse(spec: &Spec, name: &[u8]) -> Option<(Record, Vec<u8>)> {
    let Some(IpAddr::V6(address)) = reverse_address(name) else {
        return None;
    };
    let v4 = spec.prefixes.iter().find_map(|p| p.extract(address))?;
    let target = reverse_name(v4.into());
    Some((
        Record::new(name, rtype::CNAME, REVERSE_TTL, target.clone()),
        target,
    ))
}

/// Answers for ipv4only.arpa, all below it, and the reverse names of its addresses; these are never asked upstream (RFC 8880 §7).
///
/// Synthesis here heeds neither CD nor DO: the zone is not signed, and finding the prefix is what the name is for.
pub fn ipv4only(spec: &Spec, name: &[u8], qtype: u16) -> Option<Message> {
    let mut m = Message::empty(name, qtype, rcode::NOERROR);
    m.flags |= flag::AA;
    if wire_is_within(name, IPV4ONLY) {
        if name != IPV4ONLY {
            m.flags |= u16::from(rcode::NXDOMAIN);
        }
        let record = |t, data: &[u8]| Record::new(name, t, IPV4ONLY_TTL, data.to_vec());
        match qtype {
            _ if name != IPV4ONLY => {}
            rtype::A => {
                m.answers = IPV4ONLY_ADDRESSES
                    .iter()
                    .map(|a| record(rtype::A, &a.octets()))
                    .collect()
            }
            rtype::AAAA => {
                let each = spec
                    .prefixes
                    .iter()
                    .flat_map(|p| IPV4ONLY_ADDRESSES.map(|a| p.embed(a)));
                m.answers = each.map(|a| record(rtype::AAAA, &a.octets())).collect();
            }
            _ => {}
        }
        return Some(m);
    }
    match reverse_address(name) {
        Some(IpAddr::V4(a)) if IPV4ONLY_ADDRESSES.contains(&a) => {
            if qtype == rtype::PTR {
                m.answers = vec![Record::new(
                    name,
                    rtype::PTR,
                    IPV4ONLY_TTL,
                    IPV4ONLY.to_vec(),
                )];
            }
            Some(m)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kun_config::corefile::{Alone, Plugin, parse};

    const NAME: &[u8] = b"\x03www\x07example\x03org\0";

    fn spec(options: &str) -> Spec {
        let c = parse("t", &format!(". {{\ndns64 {options}\n}}"), &Alone).unwrap();
        let Plugin::Dns64(spec) = &c.servers[0].plugins[0] else {
            panic!()
        };
        spec.clone()
    }

    fn reply(qtype: u16, code: u8, answers: Vec<Record>, soa_ttl: Option<u32>) -> Option<Message> {
        let mut m = Message::empty(NAME, qtype, code);
        m.answers = answers;
        if let Some(ttl) = soa_ttl {
            m.authority = vec![Record::new(b"\x03org\0", rtype::SOA, ttl, vec![0; 22])];
        }
        Some(m)
    }

    fn a(v4: &str, ttl: u32) -> Record {
        Record::new(
            NAME,
            rtype::A,
            ttl,
            v4.parse::<Ipv4Addr>().unwrap().octets().to_vec(),
        )
    }

    fn quad(v6: &str) -> Record {
        Record::new(
            NAME,
            rtype::AAAA,
            300,
            v6.parse::<Ipv6Addr>().unwrap().octets().to_vec(),
        )
    }

    fn texts(m: &Message) -> Vec<String> {
        m.answers
            .iter()
            .filter_map(aaaa)
            .map(|a| a.to_string())
            .collect()
    }

    #[test]
    fn native_records_end_it() {
        let m = reply(rtype::AAAA, 0, vec![quad("2001:db8::1")], None).unwrap();
        assert_eq!(
            judge(&spec("64:ff9b::/96"), Some(m.clone())),
            Native::Use(Box::new(m))
        );
    }

    #[test]
    fn nxdomain_passes_and_other_codes_count_as_empty() {
        let s = spec("64:ff9b::/96");
        assert!(
            matches!(judge(&s, reply(rtype::AAAA, rcode::NXDOMAIN, vec![], Some(60))), Native::Use(m) if m.rcode() == 3)
        );
        for code in [
            rcode::FORMERR,
            rcode::SERVFAIL,
            rcode::NOTIMP,
            rcode::REFUSED,
            9,
        ] {
            assert_eq!(
                judge(&s, reply(rtype::AAAA, code, vec![], Some(60))),
                Native::Synthesise { bound: 600 },
                "{code}"
            );
        }
        assert_eq!(
            judge(&s, None),
            Native::Synthesise { bound: 600 },
            "a timeout is a SERVFAIL"
        );
    }

    #[test]
    fn excluded_aaaa_is_ignored() {
        let s = spec("64:ff9b::/96");
        assert_eq!(
            judge(
                &s,
                reply(rtype::AAAA, 0, vec![quad("::ffff:192.0.2.1")], None)
            ),
            Native::Synthesise { bound: 600 }
        );
        let mixed = judge(
            &s,
            reply(
                rtype::AAAA,
                0,
                vec![quad("::ffff:192.0.2.1"), quad("2001:db8::1")],
                None,
            ),
        );
        assert!(matches!(mixed, Native::Use(m) if texts(&m) == ["2001:db8::1"]));
        let own = spec("{\nexclude 2001:db8::/32\n}");
        assert_eq!(
            judge(&own, reply(rtype::AAAA, 0, vec![quad("2001:db8::1")], None)),
            Native::Synthesise { bound: 600 }
        );
        assert!(matches!(
            judge(&own, reply(rtype::AAAA, 0, vec![quad("2001:db9::1")], None)),
            Native::Use(_)
        ));
    }

    #[test]
    fn translate_all_ignores_every_native_record() {
        let s = spec("{\ntranslate_all\n}");
        assert_eq!(
            judge(&s, reply(rtype::AAAA, 0, vec![quad("2001:db8::1")], None)),
            Native::Synthesise { bound: 600 }
        );
        assert!(matches!(
            judge(&s, reply(rtype::AAAA, 3, vec![], None)),
            Native::Use(_)
        ));
    }

    #[test]
    fn ttl_is_bounded_by_the_soa_or_600() {
        let s = spec("64:ff9b::/96");
        for (a_ttl, soa, want) in [
            (300, Some(60), 60),
            (30, Some(60), 30),
            (7200, None, 600),
            (300, None, 300),
            (7200, Some(3600), 3600),
        ] {
            let Native::Synthesise { bound } = judge(&s, reply(rtype::AAAA, 0, vec![], soa)) else {
                panic!()
            };
            let m = synthesise(
                &s,
                reply(rtype::A, 0, vec![a("8.8.8.8", a_ttl)], None),
                NAME,
                bound,
            );
            assert_eq!(m.answers[0].ttl, want, "A {a_ttl} SOA {soa:?}");
        }
    }

    #[test]
    fn the_alias_chain_stays() {
        let target = b"\x01t\x07example\x03net\0";
        let alias = Record::new(NAME, rtype::CNAME, 100, target.to_vec());
        let mut last = a("8.8.8.8", 100);
        last.owner = target.to_vec();
        let m = synthesise(
            &spec("64:ff9b::/96"),
            reply(rtype::A, 0, vec![alias.clone(), last], Some(5)),
            NAME,
            600,
        );
        assert_eq!((m.qtype, &m.answers[0]), (rtype::AAAA, &alias));
        assert_eq!(m.answers[1].owner, target);
        assert_eq!(texts(&m), ["64:ff9b::808:808"]);
        assert_eq!(m.authority.len(), 1, "authority is the A reply's");
    }

    #[test]
    fn an_empty_or_failed_a_reply_is_the_answer() {
        let s = spec("64:ff9b::/96");
        let m = synthesise(&s, reply(rtype::A, 0, vec![], Some(60)), NAME, 600);
        assert_eq!((m.rcode(), m.answers.len(), m.authority.len()), (0, 0, 1));
        assert_eq!(
            synthesise(&s, reply(rtype::A, rcode::REFUSED, vec![], None), NAME, 600).rcode(),
            rcode::REFUSED
        );
        assert_eq!(synthesise(&s, None, NAME, 600).rcode(), rcode::SERVFAIL);
    }

    #[test]
    fn several_prefixes_and_all_lengths() {
        let s = spec("{\nprefix 64:ff9b::/96\nprefix 2001:db8:122:300::/56\n}");
        let m = synthesise(
            &s,
            reply(rtype::A, 0, vec![a("8.8.4.4", 60)], None),
            NAME,
            600,
        );
        assert_eq!(texts(&m), ["64:ff9b::808:404", "2001:db8:122:308:8:404::"]);
    }

    #[test]
    fn the_well_known_prefix_takes_global_addresses_only() {
        for v4 in [
            "10.0.0.1",
            "192.0.2.33",
            "100.64.0.1",
            "127.0.0.1",
            "169.254.0.1",
            "198.18.0.1",
            "240.0.0.1",
            "0.0.0.1",
            "224.0.0.1",
            "192.168.0.1",
            "172.16.0.1",
        ] {
            let m = |s: &Spec| synthesise(s, reply(rtype::A, 0, vec![a(v4, 60)], None), NAME, 600);
            assert!(m(&spec("64:ff9b::/96")).answers.is_empty(), "{v4}");
            assert_eq!(m(&spec("64:ff9b:1::/96")).answers.len(), 1, "{v4}");
        }
    }

    #[test]
    fn cd_with_do_never_synthesises() {
        for (dnssec_ok, checking_disabled, want) in [
            (false, false, true),
            (false, true, true),
            (true, false, true),
            (true, true, false),
        ] {
            let p = Profile {
                dnssec_ok,
                checking_disabled,
                synthesise: true,
            };
            assert_eq!(may_synthesise(p), want, "{p:?}");
            assert!(!may_synthesise(Profile {
                synthesise: false,
                ..p
            }));
        }
    }

    #[test]
    fn signatures_over_what_was_changed_are_dropped_and_ad_is_cleared() {
        let s = spec("64:ff9b::/96");
        let sig = |t: u16| {
            Record::new(
                NAME,
                rtype::RRSIG,
                60,
                [&t.to_be_bytes()[..], &[0; 20]].concat(),
            )
        };
        let mut m = reply(
            rtype::A,
            0,
            vec![a("8.8.8.8", 60), sig(rtype::A), sig(rtype::CNAME)],
            None,
        )
        .unwrap();
        m.flags |= flag::AD;
        let m = synthesise(&s, Some(m), NAME, 600);
        assert_eq!(
            m.answers.iter().filter(|r| r.rtype == rtype::RRSIG).count(),
            1
        );
        assert_eq!(m.flags & flag::AD, 0);
        let mut m = reply(
            rtype::AAAA,
            0,
            vec![
                quad("::ffff:1.2.3.4"),
                quad("2001:db8::1"),
                sig(rtype::AAAA),
            ],
            None,
        )
        .unwrap();
        m.flags |= flag::AD;
        let Native::Use(m) = judge(&s, Some(m)) else {
            panic!()
        };
        assert_eq!((m.answers.len(), m.flags & flag::AD), (1, 0));
    }

    #[test]
    fn reverse_names_lead_to_in_addr_arpa_at_every_length() {
        for prefix in [
            "2001:db8::/32",
            "2001:db8:100::/40",
            "2001:db8:122::/48",
            "2001:db8:122:300::/56",
            "2001:db8:122:344::/64",
            "64:ff9b::/96",
        ] {
            let s = spec(prefix);
            let name = reverse_name(s.prefixes[0].embed("192.0.2.33".parse().unwrap()).into());
            let (cname, target) = reverse(&s, &name).unwrap();
            assert_eq!(
                target,
                reverse_name("192.0.2.33".parse::<IpAddr>().unwrap()),
                "{prefix}"
            );
            assert_eq!((cname.owner, cname.data), (name, target));
        }
        let s = spec("64:ff9b::/96");
        assert_eq!(
            reverse(&s, &reverse_name("2001:db8::1".parse().unwrap())),
            None
        );
        assert_eq!(reverse(&s, NAME), None);
    }

    #[test]
    fn ipv4only_arpa_is_local() {
        let s = spec("{\nprefix 64:ff9b::/96\nprefix 2001:db8:64::/96\n}");
        let m = ipv4only(&s, IPV4ONLY, rtype::AAAA).unwrap();
        assert_eq!(
            texts(&m),
            [
                "64:ff9b::c000:aa",
                "64:ff9b::c000:ab",
                "2001:db8:64::c000:aa",
                "2001:db8:64::c000:ab"
            ]
        );
        assert_eq!(ipv4only(&s, IPV4ONLY, rtype::A).unwrap().answers.len(), 2);
        let none = ipv4only(&s, IPV4ONLY, rtype::MX).unwrap();
        assert_eq!((none.rcode(), none.answers.len()), (0, 0));
        assert_eq!(
            ipv4only(&s, b"\x01x\x08ipv4only\x04arpa\0", rtype::A)
                .unwrap()
                .rcode(),
            rcode::NXDOMAIN
        );
        let ptr = ipv4only(
            &s,
            &reverse_name("192.0.0.171".parse::<IpAddr>().unwrap()),
            rtype::PTR,
        )
        .unwrap();
        assert_eq!(ptr.answers[0].data, IPV4ONLY);
        assert_eq!(ipv4only(&s, NAME, rtype::A), None);
    }
}
