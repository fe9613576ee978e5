//! Whole exchanges: routing, cache, DNS64 and its truth table, truncation, letter case, and octets nobody should send.

mod common;

use common::{Server, answer_texts, ask, question};
use hickory_proto::op::{Message as Hickory, ResponseCode};
use hickory_proto::rr::RecordType::{A, AAAA, CNAME, PTR};
use kun_dns_core::message::{Message, Record};
use kun_dns_core::wire::{flag, rcode, rtype};
use kun_dns_core::{Query, Transport};
use proptest::prelude::*;
use std::time::Duration;

const NAME: &[u8] = b"\x03www\x07example\x03net\0";
const V6: &str = "[2001:db8:c::1]:5000";
const V4: &str = "192.0.2.77:5000";

fn reply(name: &[u8], t: u16, code: u8, answers: Vec<Record>) -> ((Vec<u8>, u16), Message) {
    let mut m = Message::empty(name, t, code);
    m.answers = answers;
    if m.answers.is_empty() {
        let soa = [&b"\x02ns\0\x01h\0"[..], &[0; 16], &60u32.to_be_bytes()].concat();
        m.authority = vec![Record::new(b"\x03net\0", rtype::SOA, 120, soa)];
    }
    ((name.to_vec(), t), m)
}

fn a(ttl: u32, last: u8) -> Record {
    Record::new(NAME, rtype::A, ttl, vec![8, 8, 8, last])
}

fn dns64() -> Server {
    let s = Server::plain(". {\nforward . 192.0.2.53\ncache\ndns64 2001:db8:64::/96\n}");
    s.upstream.borrow_mut().extend([
        reply(NAME, rtype::A, 0, vec![a(300, 8)]),
        reply(NAME, rtype::AAAA, 0, vec![]),
    ]);
    s
}

#[test]
fn a_made_answer_is_cached_like_any_other() {
    let s = dns64();
    let m = ask(&s, "www.example.net", AAAA);
    assert_eq!(
        answer_texts(&m),
        ["www.example.net. 120 AAAA 2001:db8:64::808:808"]
    );
    assert_eq!(s.asked.borrow().len(), 2, "AAAA and A are asked together");
    *s.now.borrow_mut() += Duration::from_secs(20);
    assert_eq!(
        answer_texts(&ask(&s, "WWW.example.NET", AAAA)),
        ["WWW.example.NET. 100 AAAA 2001:db8:64::808:808"]
    );
    assert_eq!(s.asked.borrow().len(), 2, "and then never again");
    assert_eq!(
        answer_texts(&ask(&s, "www.example.net", A)),
        ["www.example.net. 300 A 8.8.8.8"]
    );
    assert_eq!(s.asked.borrow().len(), 3);
    *s.now.borrow_mut() += Duration::from_secs(100);
    ask(&s, "www.example.net", AAAA);
    assert_eq!(s.asked.borrow().len(), 5, "expired");
}

/// RFC 6147 §5.5 over DO and CD, and CoreDNS's allow_ipv4 over the client's family.
#[test]
fn who_gets_synthesis() {
    for (flags, dnssec_ok, client, want) in [
        (0, false, V6, true),
        (flag::CD, false, V6, true),
        (0, true, V6, true),
        (flag::CD, true, V6, false),
        (0, false, V4, false),
        (0, false, "[::ffff:192.0.2.77]:5000", false),
    ] {
        let s = dns64();
        let mut q = question("www.example.net", AAAA);
        q[2] |= (flags >> 8) as u8;
        q[3] |= flags as u8;
        q[11] = 1;
        q.extend_from_slice(&[
            0,
            0,
            41,
            16,
            0,
            0,
            0,
            if dnssec_ok { 0x80 } else { 0 },
            0,
            0,
            0,
        ]);
        let m = Hickory::from_vec(&s.exchange(&q, Transport::Udp, client).unwrap()).unwrap();
        assert_eq!(
            m.answers.len() == 1,
            want,
            "flags {flags:#x} DO {dnssec_ok} {client}"
        );
        assert_eq!(m.metadata.checking_disabled, flags & flag::CD != 0);
        assert!(!m.metadata.authentic_data);
        // Both kinds of client on one server: neither spoils the other's answer.
        let other = if want { V4 } else { V6 };
        let plain = s
            .exchange(&question("www.example.net", AAAA), Transport::Udp, other)
            .unwrap();
        assert_eq!(
            Hickory::from_vec(&plain).unwrap().answers.len(),
            usize::from(other == V6),
            "{other} after {client}"
        );
    }
}

#[test]
fn reverse_of_a_made_address() {
    let s = dns64();
    let name = b"\x018\x018\x018\x018\x07in-addr\x04arpa\0";
    let ptr = Record::new(name, rtype::PTR, 99, b"\x03dns\x06google\0".to_vec());
    s.upstream
        .borrow_mut()
        .extend([reply(name, rtype::PTR, 0, vec![ptr])]);
    let own = "8.0.8.0.8.0.8.0.0.0.0.0.0.0.0.0.0.0.0.0.4.6.0.0.8.b.d.0.1.0.0.2.ip6.arpa";
    let texts = answer_texts(&ask(&s, own, PTR));
    assert_eq!(
        texts,
        [
            format!("{own}. 99 CNAME 8.8.8.8.in-addr.arpa."),
            "8.8.8.8.in-addr.arpa. 99 PTR dns.google.".to_owned()
        ]
    );
}

#[test]
fn ipv4only_arpa_never_leaves() {
    let s = dns64();
    assert_eq!(ask(&s, "ipv4only.arpa", AAAA).answers.len(), 2);
    assert_eq!(ask(&s, "ipv4only.arpa", A).answers.len(), 2);
    assert_eq!(
        ask(&s, "x.ipv4only.arpa", A).metadata.response_code,
        ResponseCode::NXDomain
    );
    assert!(s.asked.borrow().is_empty());
}

#[test]
fn silence_is_servfail_and_a_stale_answer_is_better() {
    let s = dns64();
    s.upstream.borrow_mut().clear();
    assert_eq!(
        ask(&s, "www.example.net", AAAA).metadata.response_code,
        ResponseCode::ServFail
    );
    let s = Server::plain(". {\nforward . 192.0.2.53\ncache {\nserve_stale 1h\n}\n}");
    s.upstream
        .borrow_mut()
        .extend([reply(NAME, rtype::A, 0, vec![a(60, 8)])]);
    ask(&s, "www.example.net", A);
    s.upstream.borrow_mut().clear();
    *s.now.borrow_mut() += Duration::from_secs(100);
    for _ in 0..3 {
        assert_eq!(
            answer_texts(&ask(&s, "www.example.net", A)),
            ["www.example.net. 0 A 8.8.8.8"]
        );
    }
    assert_eq!(
        s.asked.borrow().len(),
        4,
        "each failed refresh allows the next"
    );
    s.upstream
        .borrow_mut()
        .extend([reply(NAME, rtype::A, 0, vec![a(60, 9)])]);
    ask(&s, "www.example.net", A);
    assert_eq!(
        answer_texts(&ask(&s, "www.example.net", A)),
        ["www.example.net. 60 A 8.8.8.9"],
        "refreshed behind the client's back"
    );
}

#[test]
fn verify_asks_first() {
    let s = Server::plain(". {\nforward . 192.0.2.53\ncache {\nserve_stale 1h verify\n}\n}");
    s.upstream
        .borrow_mut()
        .extend([reply(NAME, rtype::A, 0, vec![a(60, 8)])]);
    ask(&s, "www.example.net", A);
    *s.now.borrow_mut() += Duration::from_secs(100);
    s.upstream
        .borrow_mut()
        .extend([reply(NAME, rtype::A, 0, vec![a(60, 9)])]);
    assert_eq!(
        answer_texts(&ask(&s, "www.example.net", A)),
        ["www.example.net. 60 A 8.8.8.9"]
    );
    *s.now.borrow_mut() += Duration::from_secs(100);
    s.upstream.borrow_mut().clear();
    assert_eq!(
        answer_texts(&ask(&s, "www.example.net", A)),
        ["www.example.net. 0 A 8.8.8.9"]
    );
}

#[test]
fn longest_zone_wins_and_ds_goes_to_the_parent() {
    let s = Server::plain("example.org {\nwhoami\n}\nsub.example.org {\nforward . 192.0.2.53\n}");
    let code = |name: &str, t| ask(&s, name, t).metadata.response_code;
    assert_eq!(code("x.example.org", A), ResponseCode::NoError);
    assert_eq!(
        code("a.sub.example.org", A),
        ResponseCode::ServFail,
        "asked upstream, which is silent"
    );
    assert_eq!(
        code("sub.example.org", hickory_proto::rr::RecordType::DS),
        ResponseCode::NoError,
        "whoami of the parent"
    );
    assert_eq!(code("example.com", A), ResponseCode::Refused);
}

#[test]
fn hosts() {
    let s = Server::plain(
        ". {\nhosts {\nttl 60\nfallthrough\n}\ndns64 {\nprefix 2001:db8:64::/96\nallow_ipv4\n}\nforward . 192.0.2.53\n}",
    );
    assert_eq!(
        answer_texts(&ask(&s, "h.example.org", A)),
        ["h.example.org. 60 A 192.0.2.1"]
    );
    assert_eq!(
        answer_texts(&ask(&s, "dual.example.org", AAAA)),
        ["dual.example.org. 60 AAAA 2001:db8::1"]
    );
    assert_eq!(
        answer_texts(&ask(&s, "v4.example.org", AAAA)),
        ["v4.example.org. 60 AAAA 2001:db8:64::808:404"],
        "made from the hosts file"
    );
    assert_eq!(
        answer_texts(&ask(&s, "1.2.0.192.in-addr.arpa", PTR)),
        ["1.2.0.192.in-addr.arpa. 60 PTR h.example.org."]
    );
    assert_eq!(
        ask(&s, "none.example.org", A).metadata.response_code,
        ResponseCode::ServFail,
        "it fell through to silence"
    );
    assert_eq!(s.asked.borrow().len(), 1);
}

#[test]
fn whoami_and_loop() {
    let s = Server::plain("example.org {\nwhoami\nloop\n}");
    let m = ask(&s, "example.org", A);
    let extra: Vec<String> = m
        .additionals
        .iter()
        .map(|r| format!("{} {}", r.name, r.data))
        .collect();
    assert_eq!(
        extra,
        ["example.org. 2001:db8:c::1", "_tcp.example.org. 0 0 5000 ."]
    );
    let probe = s.world.chains()[0].probe().unwrap();
    let mut q = vec![0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    q.extend_from_slice(&probe.name);
    q.extend_from_slice(&[0, 13, 0, 1]);
    assert!(s.exchange(&q, Transport::Udp, V6).is_some());
    assert!(s.exchange(&q, Transport::Udp, V6).is_some());
    assert!(
        s.exchange(&q, Transport::Udp, V6).is_none(),
        "the third time it is a loop"
    );
}

#[test]
fn what_does_not_fit_is_truncated() {
    let s = Server::plain(". {\nforward . 192.0.2.53\ncache\nbufsize 700\n}");
    s.upstream.borrow_mut().extend([reply(
        NAME,
        rtype::A,
        0,
        (0..60).map(|i| a(60, i)).collect(),
    )]);
    let with = |size: Option<u16>, transport| {
        let mut q = question("www.example.net", A);
        if let Some(size) = size {
            q[11] = 1;
            q.extend_from_slice(&[&[0, 0, 41][..], &size.to_be_bytes(), &[0; 6]].concat());
        }
        s.exchange(&q, transport, V6).unwrap()
    };
    for (size, transport, whole, max) in [
        (None, Transport::Udp, false, 512),
        (Some(4096), Transport::Udp, false, 700),
        (Some(0), Transport::Udp, false, 512),
        (None, Transport::Tcp, true, 65535),
    ] {
        let wire = with(size, transport);
        let m = Hickory::from_vec(&wire).unwrap();
        assert!(wire.len() <= max);
        assert_eq!(
            (m.metadata.truncation, m.answers.len()),
            (!whole, if whole { 60 } else { 0 }),
            "{size:?}"
        );
        assert_eq!(
            m.edns.is_some(),
            size.is_some(),
            "OPT answers OPT (RFC 6891 §7)"
        );
    }
}

#[test]
fn loadbalance_varies_the_order_and_loses_nothing() {
    let s = Server::plain(". {\nforward . 192.0.2.53\ncache\nloadbalance\n}");
    let alias = Record::new(NAME, rtype::CNAME, 60, b"\x01t\x03net\0".to_vec());
    let mut records: Vec<Record> = (0..8).map(|i| a(60, i)).collect();
    records
        .iter_mut()
        .for_each(|r| r.owner = b"\x01t\x03net\0".to_vec());
    records.insert(0, alias);
    s.upstream
        .borrow_mut()
        .extend([reply(NAME, rtype::A, 0, records)]);
    ask(&s, "www.example.net", A);
    let q = question("www.example.net", A);
    let mut orders = std::collections::BTreeSet::new();
    let mut out = Vec::new();
    for seed in 1..50u64 {
        s.world.handle(
            0,
            &q,
            Transport::Udp,
            V6.parse().unwrap(),
            *s.now.borrow(),
            seed.wrapping_mul(0x9e37_79b9_7f4a_7c15),
            &mut out,
        );
        let texts = answer_texts(&Hickory::from_vec(&out).unwrap());
        assert_eq!(texts[0], "www.example.net. 60 CNAME t.net.");
        let mut sorted = texts[1..].to_vec();
        orders.insert(sorted.clone());
        sorted.sort();
        assert_eq!(
            sorted,
            (0..8)
                .map(|i| format!("t.net. 60 A 8.8.8.{i}"))
                .collect::<Vec<_>>()
        );
    }
    assert!(orders.len() > 20, "{}", orders.len());
}

#[test]
fn cname_questions_are_not_chased() {
    let s = dns64();
    let alias = Record::new(NAME, rtype::CNAME, 60, b"\x01t\x03net\0".to_vec());
    s.upstream
        .borrow_mut()
        .extend([reply(NAME, rtype::CNAME, 0, vec![alias])]);
    assert_eq!(
        answer_texts(&ask(&s, "www.example.net", CNAME)),
        ["www.example.net. 60 CNAME t.net."]
    );
}

proptest! {
    /// Whatever comes in: no panic, and what goes out is a response with the same id, within the limit, that hickory reads.
    #[test]
    fn no_octets_upset_it(wire in proptest::collection::vec(any::<u8>(), 0..300)) {
        let s = dns64();
        if let Some(answer) = s.exchange(&wire, Transport::Udp, V6) {
            prop_assert!(answer.len() >= 12 && answer.len() <= 1232);
            prop_assert_eq!(&answer[..2], &wire[..2]);
            prop_assert!(answer[2] & 0x80 != 0);
        }
    }

    /// Good questions with one octet changed or cut: as above, and the answer is well formed.
    #[test]
    fn bent_questions(at in 0usize..60, to in any::<u8>(), cut in 0usize..60, t in prop_oneof![Just(A), Just(AAAA), Just(PTR)]) {
        let s = dns64();
        let mut wire = question("www.example.net", t);
        wire[11] = 1;
        wire.extend_from_slice(&[0, 0, 41, 16, 0, 0, 0, 0x80, 0, 0, 0]);
        if let Some(b) = wire.get_mut(at) {
            *b = to;
        }
        wire.truncate(wire.len().saturating_sub(cut));
        if let Some(answer) = s.exchange(&wire, Transport::Udp, V6) {
            prop_assert_eq!(&answer[..2], &wire[..2]);
            if Query::parse(&wire, Transport::Udp).is_ok() {
                prop_assert!(Hickory::from_vec(&answer).is_ok(), "{:?}", answer);
            }
        }
    }

    /// Upstream octets of any kind: parsed or refused, never a panic; what is parsed can be sent on.
    #[test]
    fn no_reply_upsets_it(mut wire in proptest::collection::vec(any::<u8>(), 0..200), good in any::<bool>()) {
        if good {
            let head = [&[0, 1, 0x81, 0x80, 0, 1, 0, 3, 0, 1, 0, 1][..], NAME, &[0, 28, 0, 1, 0xc0, 12, 0, 5]].concat();
            wire.splice(0..0, head);
        }
        if let Ok(m) = Message::parse(&wire) {
            let s = dns64();
            let (name, t) = (NAME.to_vec(), m.qtype);
            s.upstream.borrow_mut().insert((name, rtype::AAAA), Message { qtype: rtype::AAAA, ..m.clone() });
            s.upstream.borrow_mut().insert((NAME.to_vec(), rtype::A), Message { qtype: rtype::A, ..m });
            let answer = s.exchange(&question("www.example.net", AAAA), Transport::Tcp, V6);
            prop_assert!(answer.is_some(), "type {}", t);
        }
    }

    /// Names of every shape survive: parsed, encoded with compression, and read by hickory.
    #[test]
    fn messages_round_trip(labels in proptest::collection::vec("[a-zA-Z0-9]{1,20}", 1..8), ttl in 0u32..0x7fff_ffff) {
        let mut owner = Vec::new();
        for l in &labels {
            owner.push(l.len() as u8);
            owner.extend_from_slice(l.as_bytes());
        }
        owner.push(0);
        let mut m = Message::empty(&owner, rtype::A, rcode::NOERROR);
        m.answers = vec![
            Record::new(&owner, rtype::CNAME, ttl, [b"\x03foo", &owner[..]].concat()),
            Record::new(&[b"\x03foo", &owner[..]].concat(), rtype::A, ttl, vec![192, 0, 2, 1]),
        ];
        let s = Server::plain(". {\nforward . 192.0.2.53\n}");
        s.upstream.borrow_mut().insert((owner.to_ascii_lowercase(), rtype::A), m.clone());
        let name = labels.join(".");
        let got = ask(&s, &name, A);
        prop_assert_eq!(got.answers.len(), 2);
        prop_assert_eq!(got.answers[0].ttl, ttl);
        let wire = s.exchange(&question(&name, A), Transport::Tcp, V6).unwrap();
        let again = Message::parse(&wire).unwrap();
        prop_assert_eq!(&again.answers[1].data, &m.answers[1].data);
        prop_assert!(again.answers[0].data.eq_ignore_ascii_case(&m.answers[0].data));
    }
}
