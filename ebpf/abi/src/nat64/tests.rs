//! The bijection, exhaustively and by property; the vectors of RFC 6052 §2.4; the session states.

extern crate std;

use std::collections::HashSet;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::vec::Vec;

use proptest::prelude::*;

use super::bib::{Side, State, tcp};
use super::*;

fn v6(text: &str) -> [u8; 16] {
    text.parse::<Ipv6Addr>().expect("an address").octets()
}

fn v4(text: &str) -> [u8; 4] {
    text.parse::<Ipv4Addr>().expect("an address").octets()
}

fn number(text: &str) -> u32 {
    u32::from_be_bytes(v4(text))
}

fn params(clients: &[(u32, u32)], pool: &[(u32, u32)], block_bits: u8, base: u16) -> MappingParams {
    MappingParams {
        clients: Ranges::new(clients.iter().copied()).expect("ranges"),
        pool: Ranges::new(pool.iter().copied()).expect("ranges"),
        block_bits,
        local_port_base: base,
        slice: 0,
    }
}

#[test]
fn rfc6052_vectors() {
    let table = [
        ("2001:db8::", 32, "2001:db8:c000:221::"),
        ("2001:db8:100::", 40, "2001:db8:1c0:2:21::"),
        ("2001:db8:122::", 48, "2001:db8:122:c000:2:2100::"),
        ("2001:db8:122:300::", 56, "2001:db8:122:3c0:0:221::"),
        ("2001:db8:122:344::", 64, "2001:db8:122:344:c0:2:2100::"),
        ("2001:db8:122:344::", 96, "2001:db8:122:344::192.0.2.33"),
        ("64:ff9b::", 96, "64:ff9b::192.0.2.33"),
    ];
    for (prefix, len, want) in table {
        let got = embed(v6(prefix), len, v4("192.0.2.33")).expect("a length of RFC 6052");
        assert_eq!(Ipv6Addr::from(got), Ipv6Addr::from(v6(want)), "/{len}");
        assert_eq!(
            extract(v6(prefix), len, v6(want)),
            Some(v4("192.0.2.33")),
            "/{len}"
        );
    }
}

#[test]
fn other_prefix_lengths_are_refused() {
    for len in 0..=128u8 {
        let known = PREFIX_LENGTHS.contains(&len);
        assert_eq!(
            embed(v6("2001:db8::"), len, [1, 2, 3, 4]).is_some(),
            known,
            "/{len}"
        );
        assert!(known || extract(v6("2001:db8::"), len, v6("2001:db8::")).is_none());
    }
}

#[test]
fn bits_64_to_71_must_be_zero() {
    for len in PREFIX_LENGTHS {
        let mut a = embed(v6("2001:db8::"), len, [192, 0, 2, 33]).expect("embeds");
        a[8] = 1;
        assert_eq!(extract(v6("2001:db8::"), len, a), None, "/{len}");
    }
    assert_eq!(embed(v6("2001:db8:0:0:100::"), 96, [1, 2, 3, 4]), None);
}

#[test]
fn the_suffix_is_ignored() {
    let mut a = embed(v6("2001:db8::"), 32, [192, 0, 2, 33]).expect("embeds");
    a[15] = 0xff;
    assert_eq!(extract(v6("2001:db8::"), 32, a), Some([192, 0, 2, 33]));
}

#[test]
fn special_purpose_addresses_are_not_global() {
    for a in [
        "0.0.0.0",
        "10.1.2.3",
        "100.64.0.1",
        "100.127.255.255",
        "127.0.0.1",
        "169.254.1.1",
        "172.16.0.1",
        "172.31.255.255",
        "192.0.0.170",
        "192.0.2.33",
        "192.168.0.1",
        "198.18.0.1",
        "198.19.255.255",
        "198.51.100.7",
        "203.0.113.9",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
    ] {
        assert!(!is_global(number(a)), "{a}");
    }
    for a in [
        "1.1.1.1",
        "8.8.8.8",
        "100.63.255.255",
        "100.128.0.0",
        "172.15.0.1",
        "172.32.0.1",
        "192.0.1.1",
        "198.20.0.1",
        "223.255.255.255",
    ] {
        assert!(is_global(number(a)), "{a}");
    }
}

/// Every (slot, port) of a small world: distinct external pairs, none below 1024, none on the last address, and back again.
#[test]
fn the_mapping_is_a_bijection_exhaustively() {
    for bits in BLOCK_BITS {
        let base = (65536u32 - (1 << bits)) as u16;
        let clients = [(number("10.8.0.0"), 40), (number("240.0.1.0"), 25)];
        let pool = [(number("198.51.100.4"), 2), (number("203.0.113.0"), 4)];
        let m = Mapping::new(&params(&clients, &pool, bits, base)).expect("valid");
        let mut seen = HashSet::new();
        for (first, count) in clients {
            for slot in first..first + count {
                let has_block = u64::from(m.clients.index(slot).expect("a client")) < m.capacity();
                for port in 0..=u16::MAX {
                    let inside = u32::from(port) >= u32::from(base);
                    let Some(x) = m.forward(slot, port) else {
                        assert!(!has_block || !inside, "k={bits} slot={slot} port={port}");
                        continue;
                    };
                    assert!(has_block && inside);
                    assert!(x.port >= FIRST_PORT);
                    assert_ne!(x.addr, m.exception_addr);
                    assert!(seen.insert((x.addr, x.port)), "shared {x:?}");
                    assert_eq!(m.reverse(x.addr, x.port), Some((slot, port)));
                }
            }
        }
        assert!(!seen.is_empty());
        // The other way: whatever reverses, comes from exactly there.
        for (first, count) in pool {
            for addr in first..first + count {
                for port in 0..=u16::MAX {
                    let back = m.reverse(addr, port);
                    assert_eq!(back.is_some(), seen.contains(&(addr, port)));
                }
            }
        }
    }
}

fn disjoint(max: usize) -> impl Strategy<Value = Vec<(u32, u32)>> {
    proptest::collection::vec((0u32..1 << 16, 1u32..2000), 1..=max).prop_map(|gaps| {
        let mut at = 0x0a00_0000u32;
        gaps.into_iter()
            .map(|(gap, count)| {
                at += gap;
                let r = (at, count);
                at += count;
                r
            })
            .collect()
    })
}

proptest! {
    #[test]
    fn forward_then_reverse_is_the_identity(
        clients in disjoint(MAX_RANGES),
        pool in disjoint(MAX_RANGES),
        bits in BLOCK_BITS,
        at in any::<u32>(), other in any::<u32>(), port in any::<u16>(), other_port in any::<u16>(),
    ) {
        let base = (65536u32 - (1 << bits)) as u16;
        let m = Mapping::new(&params(&clients, &pool, bits, base)).expect("valid");
        let (a, b) = (m.clients.nth(at % m.clients.total).expect("inside"), m.clients.nth(other % m.clients.total).expect("inside"));
        let (pa, pb) = (base | port & ((1 << bits) - 1), base | other_port & ((1 << bits) - 1));
        if let Some(x) = m.forward(a, pa) {
            prop_assert!(x.port >= FIRST_PORT);
            prop_assert_eq!(m.reverse(x.addr, x.port), Some((a, pa)));
            if let Some(y) = m.forward(b, pb) {
                prop_assert_eq!(x == y, (a, pa) == (b, pb));
            }
        }
    }

    #[test]
    fn reverse_then_forward_is_the_identity(
        clients in disjoint(MAX_RANGES), pool in disjoint(MAX_RANGES), bits in BLOCK_BITS, at in any::<u32>(), port in any::<u16>(),
    ) {
        let base = (65536u32 - (1 << bits)) as u16;
        let m = Mapping::new(&params(&clients, &pool, bits, base)).expect("valid");
        let addr = m.pool.nth(at % m.pool.total).expect("inside");
        if let Some((slot, local)) = m.reverse(addr, port) {
            prop_assert!(local >= base);
            prop_assert_eq!(m.forward(slot, local), Some(External { addr, port }));
        }
    }

    #[test]
    fn embedding_is_reversible(prefix in any::<[u8; 16]>(), a in any::<[u8; 4]>(), which in 0usize..6) {
        let mut prefix = prefix;
        prefix[8] = 0;
        let len = PREFIX_LENGTHS[which];
        let whole = embed(prefix, len, a).expect("embeds");
        prop_assert_eq!(extract(prefix, len, whole), Some(a));
    }
}

#[test]
fn bad_mappings_are_refused() {
    let good = params(&[(1 << 24, 64)], &[(2 << 24, 2)], 10, 64512);
    assert!(Mapping::new(&good).is_ok());
    let of = |change: fn(&mut MappingParams)| {
        let mut p = good;
        change(&mut p);
        Mapping::new(&p).expect_err("refused")
    };
    assert_eq!(of(|p| p.block_bits = 5), MappingError::BlockBits(5));
    assert_eq!(of(|p| p.block_bits = 13), MappingError::BlockBits(13));
    assert_eq!(
        of(|p| p.local_port_base = 64513),
        MappingError::LocalPortBase(64513)
    );
    assert_eq!(
        of(|p| p.local_port_base = 0),
        MappingError::LocalPortBase(0)
    );
    assert_eq!(of(|p| p.slice = 16), MappingError::Slice(16));
    assert_eq!(of(|p| p.pool = Ranges::default()), MappingError::NoPool);
    assert!(matches!(
        Ranges::new([(10, 5), (14, 1)]),
        Err(MappingError::Overlap { .. })
    ));
    assert!(matches!(
        Ranges::new([(u32::MAX, 2)]),
        Err(MappingError::BadRange { .. })
    ));
    assert!(matches!(
        Ranges::new((0..9).map(|i| (i * 2, 1))),
        Err(MappingError::TooManyRanges)
    ));
}

#[test]
fn slices_partition_the_exception_ports() {
    let mut owner = [None; 65536];
    for slice in 0..16 {
        let mut p = params(&[(1 << 24, 64)], &[(2 << 24, 2)], 10, 64512);
        p.slice = slice;
        let m = Mapping::new(&p).expect("valid");
        for port in m.slice_first..m.slice_first + m.slice_count {
            assert!(owner[port as usize].replace(slice).is_none());
        }
    }
    for (port, o) in owner.iter().enumerate() {
        assert_eq!(o.map(usize::from), (port >= 1024).then_some(port >> 12));
    }
}

#[test]
fn a_tcp_session_lives_and_dies_as_rfc6146_says() {
    use Side::{Four, Six};
    use State::*;
    let opened = State::tcp_open(Six, tcp::SYN).expect("opens");
    assert_eq!(
        (opened, opened.timeout()),
        (V6Init, bib::TCP_TRANSITORY_TIMEOUT)
    );
    let (s, _) = opened.tcp_next(Four, tcp::SYN);
    assert_eq!(
        (s, s.timeout()),
        (Established, bib::TCP_ESTABLISHED_TIMEOUT)
    );
    let (s, _) = s.tcp_next(Six, tcp::FIN);
    assert_eq!(s, V6Fin);
    let (s, _) = s.tcp_next(Four, tcp::FIN);
    assert_eq!((s, s.timeout()), (BothFin, bib::TCP_TRANSITORY_TIMEOUT));
    assert_eq!(s.tcp_next(Six, 0), (BothFin, false));
    // A reset makes it transitory; a later packet that is no reset shows it alive (§3.5.2.2).
    let (s, _) = Established.tcp_next(Four, tcp::RST);
    assert_eq!((s, s.timeout()), (Trans, bib::TCP_TRANSITORY_TIMEOUT));
    assert_eq!(s.tcp_next(Four, tcp::RST), (Trans, false));
    assert_eq!(s.tcp_next(Six, 0), (Established, true));
    // From IPv4 only a SYN opens anything, for six seconds.
    assert_eq!(State::tcp_open(Four, 0), None);
    assert_eq!(State::tcp_open(Four, tcp::SYN | tcp::RST), None);
    let s = State::tcp_open(Four, tcp::SYN).expect("opens");
    assert_eq!((s, s.timeout()), (V4Init, bib::TCP_INCOMING_SYN_TIMEOUT));
    assert_eq!(s.tcp_next(Six, tcp::SYN), (Established, true));
    assert_eq!(V6Fin.tcp_next(Six, tcp::FIN), (V6Fin, true));
}

#[test]
fn the_timers_are_those_of_rfc6146() {
    for (state, seconds) in [
        (State::Udp, 300),
        (State::Icmp, 60),
        (State::Established, 7440),
        (State::V4Fin, 7440),
        (State::Trans, 240),
        (State::V6Init, 240),
        (State::V4Init, 6),
    ] {
        assert_eq!(state.timeout(), seconds * 1_000_000_000, "{state:?}");
    }
    let s = bib::Session {
        until: 7,
        ..Default::default()
    };
    assert!(!s.expired(7) && s.expired(8));
}

#[test]
fn states_survive_being_stored() {
    for n in 0..=8 {
        assert_eq!(State::from_stored(n) as u32, n);
    }
}
