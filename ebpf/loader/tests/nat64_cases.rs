//! A table of packets with what must become of each, run through the translator in userspace and, as root, through the program
//! in the kernel; then generated and damaged packets, on which the two must agree to the octet.

mod nat64_packet;

use std::net::Ipv4Addr;

use kun_ebpf_abi::nat64::Settings;
use kun_ebpf_abi::nat64::bib::{Bib4, Bib6};
use kun_ebpf_abi::reason::Reason;
use kun_ebpf_abi::translate::Verdict;
use kun_ebpf_loader::{Nat64Config, Nat64Dataplane};
use kun_harness::{BpfFs, require_root};
use nat64_packet::*;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

const POD: &str = "2001:db8:10::a08:1";
const FOREIGN: &str = "2001:db8:20::1";
const ROUTER6: &str = "2001:db8:99::1";
const SERVER6: &str = "2001:db8:64::c000:250";
const SERVER: &str = "192.0.2.80";
const ROUTER: &str = "203.0.113.1";
const BLOCK: &str = "198.51.100.0";
const LAST: &str = "198.51.100.3";
const MTU: u32 = 1500;

fn config(root: &std::path::Path, pref64: &str) -> Nat64Config {
    Nat64Config {
        bpffs_root: root.to_owned(),
        pod_prefix: a6("2001:db8:10::"),
        pref64: (a6(pref64), 96),
        pool: vec![(Ipv4Addr::new(198, 51, 100, 0), 30)],
        clients: vec![(Ipv4Addr::new(10, 8, 0, 0), 25)],
        port_block_bits: 10,
        local_port_base: 64512,
        slice: 0,
    }
}

fn settings(pref64: &str) -> Settings {
    let (mut s, _) = config("/".as_ref(), pref64).settings().unwrap();
    s.uplink = 1;
    s.mtu = MTU;
    s
}

fn words(a: &str) -> [u32; 4] {
    let o = a6(a).octets();
    [0, 4, 8, 12].map(|i| u32::from_ne_bytes([o[i], o[i + 1], o[i + 2], o[i + 3]]))
}

/// BIB entries that stand before each case: (IPv6 end, external port, protocol).
fn standing() -> Vec<(Bib6, Bib4)> {
    [
        (FOREIGN, 5000, 2000, UDP),
        (FOREIGN, 5000, 2000, TCP),
        (FOREIGN, 5002, 2002, TCP),
        (POD, 77, 3000, ICMP4),
    ]
    .map(|(addr, port, external, proto)| {
        let inner = Bib6 {
            addr: words(addr),
            port,
            proto,
            pad: 0,
        };
        let outer = Bib4 {
            port: external,
            proto,
            pad: 0,
        };
        (inner, outer)
    })
    .to_vec()
}

fn memory() -> Memory {
    let mut t = Memory {
        now: 1 << 40,
        ..Memory::default()
    };
    for (inner, outer) in standing() {
        t.bib6.insert(inner, outer);
        t.bib4.insert(outer, inner);
    }
    t
}

struct Case {
    name: &'static str,
    packet: Vec<u8>,
    verdict: Verdict,
    /// Of [`Verdict::Send`].
    becomes: Vec<u8>,
}

fn sent(name: &'static str, packet: Vec<u8>, becomes: Vec<u8>) -> Case {
    Case {
        name,
        packet,
        verdict: Verdict::Send,
        becomes,
    }
}

fn dropped(name: &'static str, packet: Vec<u8>, reason: Reason) -> Case {
    Case {
        name,
        packet,
        verdict: Verdict::Drop(reason),
        becomes: Vec::new(),
    }
}

fn left(name: &'static str, packet: Vec<u8>, verdict: Verdict) -> Case {
    Case {
        name,
        packet,
        verdict,
        becomes: Vec::new(),
    }
}

/// IPv6 from the pod to the server, and what leaves for the server.
fn out6() -> Six {
    Six::new(POD, SERVER6)
}

fn out4() -> Four {
    Four::new(BLOCK, SERVER).ttl(63)
}

/// IPv4 from the server to the pod, and what the pod gets.
fn in4() -> Four {
    Four::new(SERVER, BLOCK)
}

fn in6() -> Six {
    Six::new(SERVER6, POD).hop(63)
}

/// Small packets go without DF.
fn small(f: Four) -> Four {
    f.fragment(0, 0)
}

fn cases() -> Vec<Case> {
    let data = |n: usize| (0..n).map(|i| (i * 5 + 1) as u8).collect::<Vec<u8>>();
    let mut c = Vec::new();

    // --- Plain, both ways, odd and even lengths.
    for (name, n) in [("0", 0), ("1", 1), ("2", 2), ("1200", 1200)] {
        let name: &'static str = format!("udp64/{name}").leak();
        c.push(sent(
            name,
            out6().packet(UDP, &udp(64512, 53, &data(n))),
            small(out4()).packet(UDP, &udp(2048, 53, &data(n))),
        ));
        let name: &'static str = format!("udp46/{n}").leak();
        c.push(sent(
            name,
            in4().packet(UDP, &udp(53, 3071, &data(n))),
            in6().packet(UDP, &udp(53, 65535, &data(n))),
        ));
        let name: &'static str = format!("tcp64/{n}").leak();
        c.push(sent(
            name,
            out6().packet(TCP, &tcp(64600, 80, 0x18, &[], &data(n))),
            small(out4()).packet(TCP, &tcp(2136, 80, 0x18, &[], &data(n))),
        ));
        let name: &'static str = format!("tcp46/{n}").leak();
        c.push(sent(
            name,
            in4().packet(TCP, &tcp(80, 2136, 0x18, &[1, 1, 1, 0], &data(n))),
            in6().packet(TCP, &tcp(80, 64600, 0x18, &[1, 1, 1, 0], &data(n))),
        ));
        let name: &'static str = format!("icmpi64/{n}").leak();
        c.push(sent(
            name,
            out6().packet(ICMP6, &echo(128, 77, 9, &data(n))),
            small(Four::new(LAST, SERVER).ttl(63)).packet(ICMP4, &echo(8, 3000, 9, &data(n))),
        ));
        let name: &'static str = format!("icmpi46/{n}").leak();
        c.push(sent(
            name,
            Four::new(SERVER, LAST).packet(ICMP4, &echo(0, 3000, 9, &data(n))),
            in6().packet(ICMP6, &echo(129, 77, 9, &data(n))),
        ));
    }
    c.push(sent(
        "big packets go with DF",
        out6().packet(UDP, &udp(64512, 53, &data(1300))),
        out4().packet(UDP, &udp(2048, 53, &data(1300))),
    ));
    c.push(sent(
        "exception, out",
        Six::new(FOREIGN, SERVER6).packet(UDP, &udp(5000, 53, b"x")),
        small(Four::new(LAST, SERVER).ttl(63)).packet(UDP, &udp(2000, 53, b"x")),
    ));
    c.push(sent(
        "exception, in",
        Four::new(SERVER, LAST).packet(UDP, &udp(53, 2000, b"x")),
        Six::new(SERVER6, FOREIGN)
            .hop(63)
            .packet(UDP, &udp(53, 5000, b"x")),
    ));
    c.push(sent(
        "exception, TCP SYN in",
        Four::new(SERVER, LAST).packet(TCP, &tcp(80, 2000, 2, &[], b"")),
        Six::new(SERVER6, FOREIGN)
            .hop(63)
            .packet(TCP, &tcp(80, 5000, 2, &[], b"")),
    ));

    // --- Header fields.
    let mut class = out6();
    class.class = 0xb9;
    let mut tos = small(out4());
    tos.tos = 0xb9;
    c.push(sent(
        "traffic class becomes TOS",
        class.packet(UDP, &udp(64512, 53, b"")),
        tos.packet(UDP, &udp(2048, 53, b"")),
    ));
    let mut tos = in4();
    tos.tos = 0x2e;
    let mut class = in6();
    class.class = 0x2e;
    c.push(sent(
        "TOS becomes traffic class",
        tos.packet(UDP, &udp(53, 2048, b"")),
        class.packet(UDP, &udp(53, 64512, b"")),
    ));
    c.push(sent(
        "DF clear is translated the same",
        small(in4()).packet(UDP, &udp(53, 2048, b"q")),
        in6().packet(UDP, &udp(53, 64512, b"q")),
    ));
    let mut options = in4();
    options.options = vec![7, 7, 4, 0, 0, 0, 0, 1];
    c.push(sent(
        "IPv4 options are left out",
        options.packet(UDP, &udp(53, 2048, b"q")),
        in6().packet(UDP, &udp(53, 64512, b"q")),
    ));
    options.options = vec![131, 7, 4, 1, 2, 3, 4, 0];
    c.push(dropped(
        "a source route is refused",
        options.packet(UDP, &udp(53, 2048, b"q")),
        Reason::Nat64Untranslatable,
    ));
    for (name, next, first) in [
        ("hop-by-hop options are skipped", 0u8, 0u8),
        ("destination options are skipped", 60, 0),
        ("a finished routing header is skipped", 43, 0),
    ] {
        let mut x = vec![UDP, 0, first, 0, 0, 0, 0, 0];
        x.extend(out6().sealed(UDP, &udp(64512, 53, b"ext")));
        c.push(sent(
            name,
            out6().raw(next, &x),
            small(out4()).packet(UDP, &udp(2048, 53, b"ext")),
        ));
    }
    let mut x = vec![UDP, 0, 0, 1, 0, 0, 0, 0];
    x.extend(out6().sealed(UDP, &udp(64512, 53, b"ext")));
    c.push(dropped(
        "a routing header with segments left is refused",
        out6().raw(43, &x),
        Reason::Nat64Untranslatable,
    ));
    c.push(left(
        "hop limit 1 is left to the stack",
        out6().hop(1).packet(UDP, &udp(64512, 53, b"")),
        Verdict::ToStack,
    ));
    c.push(left(
        "TTL 1 is left to the stack",
        in4().ttl(1).packet(UDP, &udp(53, 2048, b"")),
        Verdict::ToStack,
    ));
    c.push(sent(
        "hop limit 2 crosses",
        out6().hop(2).packet(UDP, &udp(64512, 53, b"")),
        small(out4()).ttl(1).packet(UDP, &udp(2048, 53, b"")),
    ));

    // --- Not ours.
    c.push(left(
        "another IPv6 destination passes",
        Six::new(POD, "2001:db8:65::1").packet(UDP, &udp(1, 2, b"")),
        Verdict::Pass,
    ));
    c.push(left(
        "another IPv4 destination passes",
        Four::new(SERVER, "198.51.100.4").packet(UDP, &udp(1, 2, b"")),
        Verdict::Pass,
    ));

    // --- Refused.
    c.push(dropped(
        "SCTP",
        out6().raw(132, &[0; 32]),
        Reason::Nat64Untranslatable,
    ));
    c.push(dropped(
        "GRE from IPv4",
        in4().raw(47, &[0; 32]),
        Reason::Nat64Untranslatable,
    ));
    c.push(dropped(
        "a source under Pref64 (a loop)",
        Six::new("2001:db8:64::1", SERVER6).packet(UDP, &udp(64512, 53, b"")),
        Reason::Nat64Untranslatable,
    ));
    for (name, to) in [
        ("to loopback", "2001:db8:64::7f00:1"),
        ("to a group", "2001:db8:64::e000:1"),
        ("to 0.0.0.0", "2001:db8:64::"),
        ("to broadcast", "2001:db8:64::ffff:ffff"),
    ] {
        c.push(dropped(
            name,
            Six::new(POD, to).packet(UDP, &udp(64512, 53, b"")),
            Reason::Nat64Untranslatable,
        ));
    }
    c.push(dropped(
        "a bad IPv4 header checksum",
        {
            let mut p = in4().packet(UDP, &udp(53, 2048, b""));
            p[10] ^= 0x55;
            p
        },
        Reason::Malformed,
    ));
    c.push(dropped(
        "a port of no block",
        in4().packet(UDP, &udp(53, 1023, b"")),
        Reason::Nat64NoReverse,
    ));
    c.push(dropped(
        "an exception that does not stand",
        Four::new(SERVER, LAST).packet(UDP, &udp(53, 2001, b"")),
        Reason::Nat64NoReverse,
    ));
    c.push(dropped(
        "a TCP segment without a session from IPv4",
        Four::new(SERVER, LAST).packet(TCP, &tcp(80, 2002, 0x10, &[], b"")),
        Reason::Nat64NoMapping,
    ));
    c.push(dropped(
        "an echo reply of nobody",
        out6().packet(ICMP6, &echo(129, 78, 1, b"")),
        Reason::Nat64NoMapping,
    ));
    c.push(dropped(
        "neighbour discovery",
        out6().packet(ICMP6, &icmp(135, 0, 0, &[0; 16])),
        Reason::Nat64Untranslatable,
    ));
    c.push(dropped(
        "an ICMPv4 timestamp",
        Four::new(SERVER, LAST).packet(ICMP4, &icmp(13, 0, 0, &[0; 12])),
        Reason::Nat64Untranslatable,
    ));
    c.push(dropped(
        "a header that claims more than there is",
        {
            let mut p = out6().packet(UDP, &udp(64512, 53, b"1234"));
            p.truncate(p.len() - 1);
            p
        },
        Reason::Malformed,
    ));
    c.push(sent(
        "padding of the link goes along",
        {
            let mut p = in4().packet(UDP, &udp(53, 2048, b"q"));
            p.extend([0xee; 9]);
            p
        },
        {
            let mut p = in6().packet(UDP, &udp(53, 64512, b"q"));
            p.extend([0xee; 9]);
            p
        },
    ));

    // --- UDP without checksum.
    for n in [0usize, 1, 2, 3, 700, 1001] {
        let mut bare = udp(53, 2048, &data(n));
        bare[6..8].fill(0);
        let name: &'static str = format!("udp46 without checksum/{n}").leak();
        c.push(sent(
            name,
            in4().raw(UDP, &bare),
            in6().packet(UDP, &udp(53, 64512, &data(n))),
        ));
    }
    c.push(dropped(
        "a first fragment without checksum",
        {
            let mut bare = udp(53, 2048, &data(24));
            bare[6..8].fill(0);
            in4().fragment(7, 0x2000).raw(UDP, &bare)
        },
        Reason::Nat64Untranslatable,
    ));

    // --- MSS.
    for (name, told, becomes) in [("clamped", 1460u16, 1440u16), ("left", 1400, 1400)] {
        let option = |mss: u16| [2, 4, (mss >> 8) as u8, mss as u8];
        let name6: &'static str = format!("mss64 {name}").leak();
        c.push(sent(
            name6,
            out6().packet(TCP, &tcp(64512, 80, 2, &option(told), b"")),
            small(out4()).packet(TCP, &tcp(2048, 80, 2, &option(becomes), b"")),
        ));
        let name4: &'static str = format!("mss46 {name}").leak();
        c.push(sent(
            name4,
            in4().packet(TCP, &tcp(80, 2048, 0x12, &option(told), b"")),
            in6().packet(TCP, &tcp(80, 64512, 0x12, &option(becomes), b"")),
        ));
    }
    c.push(sent(
        "no clamp without SYN",
        out6().packet(TCP, &tcp(64512, 80, 0x10, &[2, 4, 5, 0xb4], b"")),
        small(out4()).packet(TCP, &tcp(2048, 80, 0x10, &[2, 4, 5, 0xb4], b"")),
    ));

    // --- Fragments (the later ones are a test of their own).
    let whole6 = out6().sealed(UDP, &udp(64512, 53, &data(64)));
    let whole4 = out4().sealed(UDP, &udp(2048, 53, &data(64)));
    c.push(sent(
        "first fragment 64",
        out6().raw(44, &fragment6(UDP, 0, true, 0xabcd_1234, &whole6[..40])),
        out4().fragment(0x1234, 0x2000).raw(UDP, &whole4[..40]),
    ));
    c.push(sent(
        "a later fragment of a pod in a block 64",
        out6().raw(44, &fragment6(UDP, 40, false, 0xabcd_9999, &whole6[40..])),
        out4().fragment(0x9999, 5).raw(UDP, &whole4[40..]),
    ));
    c.push(sent(
        "an atomic fragment 64",
        out6().raw(44, &fragment6(UDP, 0, false, 0x0000_4321, &whole6)),
        out4().fragment(0x4321, 0).raw(UDP, &whole4),
    ));
    let whole4 = in4().sealed(UDP, &udp(53, 2048, &data(64)));
    let whole6 = in6().sealed(UDP, &udp(53, 64512, &data(64)));
    c.push(sent(
        "first fragment 46",
        in4().fragment(0x1234, 0x2000).raw(UDP, &whole4[..40]),
        in6().raw(44, &fragment6(UDP, 0, true, 0x1234, &whole6[..40])),
    ));
    c.push(dropped(
        "a later fragment of nobody 46",
        in4().fragment(0x5678, 5).raw(UDP, &whole4[40..]),
        Reason::Nat64Fragment,
    ));
    c.push(dropped(
        "a later fragment of a foreign host 64",
        Six::new(FOREIGN, SERVER6).raw(44, &fragment6(UDP, 40, false, 1, &whole6[40..])),
        Reason::Nat64Fragment,
    ));
    c.push(dropped(
        "ICMP in fragments 64",
        out6().raw(
            44,
            &fragment6(ICMP6, 0, true, 1, &echo(128, 77, 1, &data(8))),
        ),
        Reason::Nat64Fragment,
    ));
    c.push(dropped(
        "ICMP in fragments 46",
        Four::new(SERVER, LAST)
            .fragment(1, 0x2000)
            .raw(ICMP4, &echo(0, 3000, 1, &data(8))),
        Reason::Nat64Fragment,
    ));

    // --- Hairpin: to the second pod (10.8.0.2: 3072..4096).
    let pool6 = "2001:db8:64::c633:6400";
    c.push(sent(
        "hairpin",
        Six::new(POD, pool6).packet(UDP, &udp(64512, 3080, b"hi")),
        Six::new(pool6, "2001:db8:10::a08:2")
            .hop(63)
            .packet(UDP, &udp(2048, 64520, b"hi")),
    ));
    c.push(sent(
        "hairpin to an exception",
        Six::new(POD, "2001:db8:64::c633:6403").packet(TCP, &tcp(64512, 2000, 2, &[], b"")),
        Six::new(pool6, FOREIGN)
            .hop(63)
            .packet(TCP, &tcp(2048, 5000, 2, &[], b"")),
    ));
    c.push(dropped(
        "hairpin to nobody",
        Six::new(POD, pool6).packet(UDP, &udp(64512, 80, b"hi")),
        Reason::Nat64NoReverse,
    ));

    // --- Too big for the uplink as IPv6.
    let big = in4().packet(UDP, &udp(53, 2048, &data(1472)));
    c.push(sent(
        "too big with DF is answered",
        big.clone(),
        Four::new(LAST, SERVER)
            .fragment(0, 0)
            .packet(ICMP4, &icmp(3, 4, 1480, &big[..128])),
    ));
    c.push(sent(
        "just fits",
        in4().packet(UDP, &udp(53, 2048, &data(1452))),
        in6().packet(UDP, &udp(53, 64512, &data(1452))),
    ));

    errors(&mut c);
    c
}

/// ICMP errors: every row of RFC 7915 §4.2 and §5.2 with a counterpart, and some without.
fn errors(c: &mut Vec<Case>) {
    let body = vec![0x5a; 40];
    // The packet complained about: from the server to the pod as IPv6, from the server to the block as IPv4.
    let inner6 = in6().packet(UDP, &udp(53, 64512, &body));
    let inner4 = small(in4().ttl(63)).packet(UDP, &udp(53, 2048, &body));
    let from_router = |p: &[u8]| Six::new(ROUTER6, SERVER6).packet(ICMP6, p);
    let as4 = |p: &[u8]| small(out4()).packet(ICMP4, p);
    let rows64: [(u8, u8, u32, u8, u8, u32); 17] = [
        (1, 0, 0, 3, 1, 0),
        (1, 1, 0, 3, 10, 0),
        (1, 2, 0, 3, 1, 0),
        (1, 3, 0, 3, 1, 0),
        (1, 4, 0, 3, 3, 0),
        (2, 0, 1400, 3, 4, 1380),
        (2, 0, 9000, 3, 4, 1480),
        (2, 0, 1280, 3, 4, 1260),
        (2, 0, 0, 3, 4, 1260),
        (3, 0, 0, 11, 0, 0),
        (3, 1, 0, 11, 1, 0),
        (4, 0, 0, 12, 0, 0),
        (4, 0, 4, 12, 0, 2 << 24),
        (4, 0, 6, 12, 0, 9 << 24),
        (4, 0, 7, 12, 0, 8 << 24),
        (4, 0, 24, 12, 0, 16 << 24),
        (4, 1, 6, 3, 2, 0),
    ];
    for (ty, code, word, ty4, code4, word4) in rows64 {
        let name: &'static str = format!("icmpe64 {ty}/{code}/{word}").leak();
        c.push(sent(
            name,
            from_router(&icmp(ty, code, word, &inner6)),
            as4(&icmp(ty4, code4, word4, &inner4)),
        ));
    }
    for (ty, code, word) in [(1, 5, 0), (4, 0, 2), (4, 0, 40), (4, 2, 0)] {
        let name: &'static str = format!("icmpe64 {ty}/{code}/{word} has no counterpart").leak();
        c.push(dropped(
            name,
            from_router(&icmp(ty, code, word, &inner6)),
            Reason::Nat64Untranslatable,
        ));
    }

    // The packet complained about: from the block to the server.
    let inner4 = out4().packet(UDP, &udp(2048, 53, &body));
    let inner6 = out6().hop(63).packet(UDP, &udp(64512, 53, &body));
    let from_router = |p: &[u8]| Four::new(ROUTER, BLOCK).packet(ICMP4, p);
    let router_at6 = "2001:db8:64::cb00:7101";
    let as6 = |p: &[u8]| Six::new(router_at6, POD).hop(63).packet(ICMP6, p);
    let mut rows46 = vec![
        (3u8, 2u8, 0u32, 4u8, 1u8, 6u32),
        (3, 3, 0, 1, 4, 0),
        (3, 4, 1400, 2, 0, 1420),
        (3, 4, 9000, 2, 0, 1500),
        (3, 4, 600, 2, 0, 1280),
        (3, 4, 0, 2, 0, 1280),
        (11, 0, 0, 3, 0, 0),
        (11, 1, 0, 3, 1, 0),
        (12, 0, 0, 4, 0, 0),
        (12, 0, 2 << 24, 4, 0, 4),
        (12, 2, 8 << 24, 4, 0, 7),
        (12, 0, 9 << 24, 4, 0, 6),
        (12, 0, 12 << 24, 4, 0, 8),
        (12, 0, 16 << 24, 4, 0, 24),
    ];
    rows46.extend([0, 1, 5, 6, 7, 8, 11, 12].map(|code| (3, code, 0, 1, 0, 0)));
    rows46.extend([9, 10, 13, 15].map(|code| (3, code, 0, 1, 1, 0)));
    for (ty, code, word, ty6, code6, word6) in rows46 {
        let name: &'static str = format!("icmpe46 {ty}/{code}/{word}").leak();
        c.push(sent(
            name,
            from_router(&icmp(ty, code, word, &inner4)),
            as6(&icmp(ty6, code6, word6, &inner6)),
        ));
    }
    for (ty, code, word) in [
        (3, 14, 0),
        (4, 0, 0),
        (5, 0, 0),
        (12, 1, 0),
        (12, 0, 4 << 24),
    ] {
        let name: &'static str = format!("icmpe46 {ty}/{code}/{word} has no counterpart").leak();
        c.push(dropped(
            name,
            from_router(&icmp(ty, code, word, &inner4)),
            Reason::Nat64Untranslatable,
        ));
    }
    // A router that tells no MTU: the plateau below the size that did not fit (RFC 1191 §7.1).
    let size = |n: usize| vec![1u8; n - 28];
    for (total, told) in [(1500usize, 1500u32), (1492, 1280), (2002, 1500)] {
        let inner4 = out4().packet(UDP, &udp(2048, 53, &size(total)));
        let inner6 = out6().hop(63).packet(UDP, &udp(64512, 53, &size(total)));
        let name: &'static str = format!("icmpe46 plateau below {total}").leak();
        c.push(sent(
            name,
            from_router(&icmp(3, 4, 0, &inner4[..200])),
            as6(&icmp(2, 0, told, &inner6[..220])),
        ));
    }

    // Other inner packets.
    let inner4 = out4().packet(TCP, &tcp(2100, 80, 0x10, &[], &body));
    let inner6 = out6()
        .hop(63)
        .packet(TCP, &tcp(64564, 80, 0x10, &[], &body));
    for (name, quoted) in [("eight octets", 8), ("its header", 20), ("all", 60)] {
        let name: &'static str = format!("icmpe46 about TCP, {name} quoted").leak();
        c.push(sent(
            name,
            from_router(&icmp(3, 1, 0, &inner4[..20 + quoted])),
            as6(&icmp(1, 0, 0, &inner6[..40 + quoted])),
        ));
    }
    let inner4 = Four::new(LAST, SERVER).packet(ICMP4, &echo(8, 3000, 5, &body));
    let inner6 = Six::new(POD, SERVER6).packet(ICMP6, &echo(128, 77, 5, &body));
    c.push(sent(
        "icmpe46 about an echo",
        Four::new(ROUTER, LAST).packet(ICMP4, &icmp(11, 0, 0, &inner4)),
        as6(&icmp(3, 0, 0, &inner6)),
    ));
    let inner6 = in6().packet(ICMP6, &echo(129, 77, 5, &body));
    let inner4 = small(Four::new(SERVER, LAST).ttl(63)).packet(ICMP4, &echo(0, 3000, 5, &body));
    c.push(sent(
        "icmpe64 about an echo reply",
        Six::new(POD, SERVER6).packet(ICMP6, &icmp(1, 4, 0, &inner6)),
        small(Four::new(LAST, SERVER).ttl(63)).packet(ICMP4, &icmp(3, 3, 0, &inner4)),
    ));

    // Sizes: 576 for ICMPv4, 1280 for ICMPv6.
    let long = vec![7u8; 1160];
    let inner6 = in6().packet(UDP, &udp(53, 64512, &long));
    let inner4 = small(in4().ttl(63)).packet(UDP, &udp(53, 2048, &long));
    c.push(sent(
        "icmpe64 is cut to 576",
        Six::new(ROUTER6, SERVER6).packet(ICMP6, &icmp(1, 0, 0, &inner6)),
        small(out4()).packet(ICMP4, &icmp(3, 1, 0, &inner4[..548])),
    ));
    let long = vec![7u8; 1400];
    let inner4 = out4().packet(UDP, &udp(2048, 53, &long));
    let inner6 = out6().hop(63).packet(UDP, &udp(64512, 53, &long));
    c.push(sent(
        "icmpe46 is cut to 1280",
        from_router(&icmp(3, 1, 0, &inner4)),
        as6(&icmp(1, 0, 0, &inner6[..1232])),
    ));

    // Extensions (RFC 4884) are cut off.
    let long = vec![9u8; 300];
    let inner4 = out4().packet(UDP, &udp(2048, 53, &long));
    let inner6 = out6().hop(63).packet(UDP, &udp(64512, 53, &long));
    let mut with_extension = inner4[..128].to_vec();
    with_extension.extend([0x20, 0, 0, 0, 0, 8, 1, 1, 1, 2, 3, 4]);
    c.push(sent(
        "icmpe46 with an extension",
        from_router(&icmp(11, 0, 32 << 16, &with_extension)),
        as6(&icmp(3, 0, 0, &inner6[..148])),
    ));

    // Refused.
    let stranger = Four::new("198.51.100.9", SERVER).packet(UDP, &udp(2048, 53, &body));
    c.push(dropped(
        "icmpe46 about a packet that is not ours",
        from_router(&icmp(3, 1, 0, &stranger)),
        Reason::Nat64NoReverse,
    ));
    let stranger = Six::new(ROUTER6, POD).packet(UDP, &udp(53, 64512, &body));
    c.push(dropped(
        "icmpe64 about a packet that is not ours",
        Six::new(ROUTER6, SERVER6).packet(ICMP6, &icmp(1, 0, 0, &stranger)),
        Reason::Nat64Untranslatable,
    ));
    let inner4 = out4().packet(UDP, &udp(2048, 53, &body));
    c.push(dropped(
        "icmpe46 with a wrong checksum",
        {
            let mut p = from_router(&icmp(3, 1, 0, &inner4));
            p[22] ^= 1;
            p
        },
        Reason::Malformed,
    ));
    let error = out4().packet(ICMP4, &icmp(3, 1, 0, &inner4));
    c.push(dropped(
        "icmpe46 about an error",
        from_router(&icmp(3, 1, 0, &error)),
        Reason::Nat64NoReverse,
    ));
}

#[test]
fn every_case_in_userspace() {
    let s = settings("2001:db8:64::");
    let mut wrong = Vec::new();
    let cases = cases();
    assert!(cases.len() > 120, "{}", cases.len());
    for case in cases {
        let mut t = memory();
        let (verdict, packet) = translate(&s, &mut t, &case.packet);
        let same = verdict != Verdict::Send
            || without_id(packet.clone()) == without_id(case.becomes.clone());
        if verdict != case.verdict || !same {
            wrong.push(format!(
                "{}: {verdict:?}, wanted {:?}\n got {packet:02x?}\nwant {:02x?}",
                case.name, case.verdict, case.becomes
            ));
        }
    }
    assert!(
        wrong.is_empty(),
        "{} wrong:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
}

/// The program in the kernel, with the same entries standing.
fn kernel(bpffs: &BpfFs, pref64: &str) -> Nat64Dataplane {
    let mut plane = Nat64Dataplane::open(&config(bpffs.path(), pref64)).unwrap();
    plane.configure(1, MTU).unwrap();
    for (inner, outer) in standing() {
        plane.seed(inner, outer).unwrap();
    }
    plane
}

/// What the kernel's program does with an IP packet, in the terms of the core.
fn in_kernel(plane: &mut Nat64Dataplane, packet: &[u8]) -> (Option<Verdict>, Vec<u8>) {
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    let six = packet.first().is_some_and(|o| o >> 4 == 6);
    frame.extend(if six { [0x86, 0xdd] } else { [8, 0] });
    frame.extend(packet);
    let before = plane.stats().unwrap();
    let (out, answer, _) = plane.test_run(&frame).unwrap();
    let after = plane.stats().unwrap();
    let reason = (0..after.reasons.len()).find(|&i| after.reasons[i] != before.reasons[i]);
    let to_stack = after.counter(kun_ebpf_abi::nat64::Counter::ToStack)
        != before.counter(kun_ebpf_abi::nat64::Counter::ToStack);
    let verdict = match (answer, reason) {
        (7, None) => Some(Verdict::Send),
        (-1, None) if to_stack => Some(Verdict::ToStack),
        (-1, None) => Some(Verdict::Pass),
        (2, Some(i)) => REASONS
            .into_iter()
            .find(|r| *r as usize == i)
            .map(Verdict::Drop),
        _ => None,
    };
    (verdict, out[14..].to_vec())
}

const REASONS: [Reason; 8] = [
    Reason::FlowTableFull,
    Reason::Malformed,
    Reason::Nat64NoMapping,
    Reason::Nat64HopLimit,
    Reason::Nat64Untranslatable,
    Reason::Nat64NoReverse,
    Reason::Nat64Fragment,
    Reason::Nat64TooBig,
];

#[test]
fn every_case_in_the_kernel() {
    if !require_root() {
        return;
    }
    let bpffs = BpfFs::new().unwrap();
    let mut plane = kernel(&bpffs, "2001:db8:64::");
    println!("verified instructions: {:?}", plane.verified_instructions());
    let mut wrong = Vec::new();
    for case in cases() {
        let (verdict, packet) = in_kernel(&mut plane, &case.packet);
        let same = verdict != Some(Verdict::Send)
            || without_id(packet.clone()) == without_id(case.becomes.clone());
        if verdict != Some(case.verdict) || !same {
            wrong.push(format!(
                "{}: {verdict:?}, wanted {:?}\n got {packet:02x?}\nwant {:02x?}",
                case.name, case.verdict, case.becomes
            ));
        }
    }
    assert!(
        wrong.is_empty(),
        "{} wrong:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
}

/// How many generated packets: as many as `KUN_CASES` says, which guests under emulation set low.
fn generated(usual: u32) -> u32 {
    let asked = std::env::var("KUN_CASES").ok();
    asked.and_then(|n| n.parse().ok()).unwrap_or(usual)
}

/// Damage: octets overwritten, then cut.
fn damaged() -> impl Strategy<Value = (usize, Vec<(u16, u8)>, Option<u16>)> {
    (
        any::<usize>(),
        proptest::collection::vec((0u16..96, any::<u8>()), 0..4),
        proptest::option::weighted(0.3, 40u16..1600),
    )
}

fn damage(cases: &[Case], (which, octets, cut): &(usize, Vec<(u16, u8)>, Option<u16>)) -> Vec<u8> {
    let mut p = cases[which % cases.len()].packet.clone();
    for (at, value) in octets {
        let at = usize::from(*at);
        // The version stays: it chooses the link header's type.
        if at < p.len() && at != 0 {
            p[at] = *value;
        }
    }
    if let Some(cut) = cut {
        p.truncate(usize::from(*cut));
    }
    p
}

/// Kernel and userspace agree on what a damaged packet becomes.
#[test]
fn the_kernel_and_userspace_agree() {
    if !require_root() {
        return;
    }
    let bpffs = BpfFs::new().unwrap();
    let mut plane = kernel(&bpffs, "2001:db8:64::");
    let s = settings("2001:db8:64::");
    let cases = cases();
    // State goes on over all packets, in both alike; only what the kernel's clock and dice decide is left out below.
    let mut t = memory();
    let mut runner = TestRunner::new(Config {
        cases: generated(4000),
        failure_persistence: None,
        ..Config::default()
    });
    let plane = std::cell::RefCell::new(&mut plane);
    let t = std::cell::RefCell::new(&mut t);
    let sends = std::cell::Cell::new(0u32);
    runner
        .run(&damaged(), |d| {
            let packet = damage(&cases, &d);
            let made = t.borrow().bib4.len();
            let (here, mine) = translate(&s, &mut t.borrow_mut(), &packet);
            let (there, theirs) = in_kernel(&mut plane.borrow_mut(), &packet);
            prop_assert_eq!(Some(here), there, "{:02x?}", packet);
            // A new exception's port is drawn by lot: forget it on both sides.
            if t.borrow().bib4.len() != made {
                let mut t = t.borrow_mut();
                let keep = standing();
                t.bib4.retain(|k, _| keep.iter().any(|(_, o)| o == k));
                t.bib6.retain(|k, _| keep.iter().any(|(i, _)| i == k));
                plane.borrow_mut().retain_bib(&keep).unwrap();
                return Ok(());
            }
            if here == Verdict::Send {
                sends.set(sends.get() + 1);
                prop_assert_eq!(without_id(mine), without_id(theirs), "{:02x?}", packet);
            }
            Ok(())
        })
        .unwrap();
    assert!(
        sends.get() > generated(4000) / 8,
        "too few packets crossed: {}",
        sends.get()
    );
}

/// Nothing that is sent has a wrong checksum or length when what came had right ones, whatever the damage.
#[test]
fn no_damage_makes_the_translator_panic() {
    let s = settings("2001:db8:64::");
    let cases = cases();
    let mut t = memory();
    let t = std::cell::RefCell::new(&mut t);
    let mut runner = TestRunner::new(Config {
        cases: generated(30_000),
        failure_persistence: None,
        ..Config::default()
    });
    runner
        .run(&damaged(), |d| {
            let packet = damage(&cases, &d);
            let (verdict, out) = translate(&s, &mut t.borrow_mut(), &packet);
            if verdict == Verdict::Send && out[0] == 0x45 {
                prop_assert_eq!(checksum(&out[..20]), 0);
                let total = usize::from(u16::from_be_bytes([out[2], out[3]]));
                prop_assert!(total <= out.len());
            }
            Ok(())
        })
        .unwrap();
}

/// 64:ff9b::/96 carries global addresses only (RFC 6052 §3.1), in both directions.
#[test]
fn the_well_known_prefix_refuses_what_is_not_global() {
    let s = settings("64:ff9b::");
    assert_eq!(s.well_known, 1);
    let mut t = memory();
    for (to, verdict) in [
        ("64:ff9b::101:101", Verdict::Send),
        ("64:ff9b::a00:1", Verdict::Drop(Reason::Nat64Untranslatable)),
        (
            "64:ff9b::c0a8:1",
            Verdict::Drop(Reason::Nat64Untranslatable),
        ),
        (
            "64:ff9b::c000:250",
            Verdict::Drop(Reason::Nat64Untranslatable),
        ),
    ] {
        let p = Six::new(POD, to).packet(UDP, &udp(64512, 53, b""));
        assert_eq!(translate(&s, &mut t, &p).0, verdict, "{to}");
    }
    for (from, verdict) in [
        ("1.1.1.1", Verdict::Send),
        ("10.0.0.1", Verdict::Drop(Reason::Nat64Untranslatable)),
    ] {
        let p = Four::new(from, BLOCK).packet(UDP, &udp(53, 2048, b""));
        assert_eq!(translate(&s, &mut t, &p).0, verdict, "{from}");
    }
}

/// Later fragments follow the first one's ports, for two seconds.
#[test]
fn later_fragments_follow_the_first() {
    let s = settings("2001:db8:64::");
    let mut t = memory();
    let body = vec![3u8; 64];
    let whole4 = in4().sealed(UDP, &udp(53, 2048, &body));
    let whole6 = in6().sealed(UDP, &udp(53, 64512, &body));
    let first = in4().fragment(9, 0x2000).raw(UDP, &whole4[..40]);
    let last = in4().fragment(9, 5).raw(UDP, &whole4[40..]);
    assert_eq!(
        translate(&s, &mut t, &last).0,
        Verdict::Drop(Reason::Nat64Fragment)
    );
    assert_eq!(translate(&s, &mut t, &first).0, Verdict::Send);
    let (verdict, got) = translate(&s, &mut t, &last);
    assert_eq!(verdict, Verdict::Send);
    let want = in6().raw(44, &fragment6(UDP, 40, false, 9, &whole6[40..]));
    assert_eq!(got, want);
    t.now += 2_000_000_001;
    assert_eq!(
        translate(&s, &mut t, &last).0,
        Verdict::Drop(Reason::Nat64Fragment)
    );

    // From IPv6, a foreign host's: its exception's address.
    let from = Six::new(FOREIGN, SERVER6);
    let whole6 = from.sealed(UDP, &udp(5000, 53, &body));
    let first = from.raw(44, &fragment6(UDP, 0, true, 7, &whole6[..40]));
    let last = from.raw(44, &fragment6(UDP, 40, false, 7, &whole6[40..]));
    assert_eq!(translate(&s, &mut t, &first).0, Verdict::Send);
    let (verdict, got) = translate(&s, &mut t, &last);
    assert_eq!(verdict, Verdict::Send);
    let to4 = Four::new(LAST, SERVER).ttl(63).fragment(7, 5);
    let whole4 = to4.sealed(UDP, &udp(2000, 53, &body));
    assert_eq!(got, to4.raw(UDP, &whole4[40..]));
}

/// A new exception gets a port of the slice, keeps it, and shares it with nobody; a full slice refuses.
#[test]
fn exceptions_take_the_ports_of_the_slice() {
    let s = settings("2001:db8:64::");
    let mut t = Memory::default();
    let mut seen = std::collections::HashMap::new();
    let mut refused = 0;
    for round in 0..2 {
        for port in 1..3500u16 {
            let p = Six::new(FOREIGN, SERVER6).packet(UDP, &udp(port, 53, b""));
            match translate(&s, &mut t, &p) {
                (Verdict::Send, out) => {
                    let external = u16::from_be_bytes([out[20], out[21]]);
                    assert!((1024..4096).contains(&external));
                    let before = seen.insert(port, external);
                    assert!(round == 0 || before.is_none_or(|b| b == external));
                }
                (verdict, _) => {
                    assert_eq!(verdict, Verdict::Drop(Reason::Nat64NoMapping));
                    refused += 1;
                }
            }
        }
    }
    let distinct: std::collections::HashSet<_> = seen.values().collect();
    assert_eq!(distinct.len(), seen.len());
    assert!(seen.len() <= 3072 && seen.len() > 2900, "{}", seen.len());
    assert!(refused > 0);
    // A full session table refuses rather than forget a session.
    t.max_sessions = t.sessions.len();
    let p = Six::new(FOREIGN, "2001:db8:64::c000:251").packet(UDP, &udp(1, 53, b""));
    assert_eq!(
        translate(&s, &mut t, &p).0,
        Verdict::Drop(Reason::FlowTableFull)
    );
}

/// Bad configurations are refused, doubtful ones are told.
#[test]
fn configurations_are_judged() {
    let good = config("/".as_ref(), "2001:db8:64::");
    assert_eq!(good.settings().unwrap().1, Vec::new());
    let mut c = good.clone();
    c.pref64.1 = 64;
    assert!(c.settings().unwrap_err().to_string().contains("/96"));
    let mut c = good.clone();
    c.pref64.0 = a6("2001:db8:64::1");
    assert!(c.settings().is_err());
    let mut c = good.clone();
    c.pool[0] = (Ipv4Addr::new(198, 51, 100, 1), 30);
    assert!(c.settings().unwrap_err().to_string().contains("host bits"));
    let mut c = good.clone();
    c.clients[0].1 = 16;
    let (_, warnings) = c.settings().unwrap();
    assert!(
        warnings[0]
            .to_string()
            .contains("65536 client slots but 189 port blocks")
    );
    let mut c = good.clone();
    c.pref64.0 = a6("64:ff9b::");
    let (_, warnings) = c.settings().unwrap();
    assert!(warnings[0].to_string().contains("RFC 6052 §3.1"));
}
