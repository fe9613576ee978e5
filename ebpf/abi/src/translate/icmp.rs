//! ICMP errors in both directions (RFC 7915 §4.2, §4.3, §5.2, §5.3) and the one error that the gateway makes itself.
//!
//! An error carries the head of the packet it complains about, which is a packet that the gateway sent: its source on the way
//! in is the flow's external address, and its destination the far end. Path MTU discovery of both sides hangs on this.
//! The checksum of what came is verified and that of what goes is computed whole, so cut packets cost nothing extra.
//! Extensions (RFC 4884) are cut off, with the length attribute cleared.

use super::state::{self, Inner};
use super::{
    FOUR, MIN_MTU, Packet, SIX, Step, Tables, Verdict, Work, header4, header6, may_cross, need,
    number, ports, pseudo_icmp6, sum, under_pref64,
};
use crate::nat64::{Counter, External, Settings};
use crate::reason::Reason;

/// ICMP header.
const ICMP: u32 = 8;
/// Octets of the inner packet after its header that fit a 576-octet ICMPv4 error (RFC 1812 §4.3.2.3).
const MAX_INNER_4: u32 = 576 - FOUR - ICMP - FOUR;
/// The same for a 1280-octet ICMPv6 error (RFC 4443 §2.4).
const MAX_INNER_6: u32 = MIN_MTU - SIX - ICMP - SIX;
/// Octets of a too big packet that are sent back: headers and some payload.
const QUOTED: u32 = 128;

const ECHO_REQUEST_6: u32 = 128;
const ECHO_REPLY_6: u32 = 129;
const ECHO_REQUEST_4: u32 = 8;
const ECHO_REPLY_4: u32 = 0;

/// Type, code and the second word (pointer or MTU) of an ICMP error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Kind {
    pub(super) ty: u32,
    pub(super) code: u32,
    pub(super) word: u32,
}

/// Maps an ICMPv6 error (RFC 7915 §5.2). `None`: it has no counterpart.
#[inline(always)]
pub(super) fn kind_to_four(ty: u32, code: u32, word: u32, mtu: u32) -> Option<Kind> {
    let kind = |ty, code, word| Some(Kind { ty, code, word });
    match (ty, code) {
        (1, 0 | 2 | 3) => kind(3, 1, 0),
        (1, 1) => kind(3, 10, 0),
        (1, 4) => kind(3, 3, 0),
        // The MTU of a packet to us is that of IPv6; the same packet is 20 octets shorter in IPv4.
        (2, _) => {
            let told = if word < MIN_MTU { MIN_MTU } else { word };
            let fits = if told < mtu { told } else { mtu };
            kind(3, 4, fits - 20)
        }
        (3, 0 | 1) => kind(11, code, 0),
        (4, 0) => {
            let pointer = match word {
                0 => 0,
                1 => 1,
                4 | 5 => 2,
                6 => 9,
                7 => 8,
                8..=23 => 12,
                24..=39 => 16,
                _ => return None,
            };
            kind(12, 0, pointer << 24)
        }
        (4, 1) => kind(3, 2, 0),
        _ => None,
    }
}

/// Maps an ICMPv4 error (RFC 7915 §4.2). `inner_total`: total length of the packet complained about, for routers that tell no
/// MTU. `None`: it has no counterpart.
#[inline(always)]
pub(super) fn kind_to_six(
    ty: u32,
    code: u32,
    word: u32,
    mtu: u32,
    inner_total: u32,
) -> Option<Kind> {
    let kind = |ty, code, word| Some(Kind { ty, code, word });
    match (ty, code) {
        (3, 0 | 1 | 5 | 6 | 7 | 8 | 11 | 12) => kind(1, 0, 0),
        (3, 2) => kind(4, 1, 6),
        (3, 3) => kind(1, 4, 0),
        (3, 4) => {
            let told = match word & 0xffff {
                0 => plateau(inner_total),
                told => told,
            };
            let grown = told + 20;
            let fits = if grown < mtu { grown } else { mtu };
            kind(2, 0, if fits < MIN_MTU { MIN_MTU } else { fits })
        }
        (3, 9 | 10 | 13 | 15) => kind(1, 1, 0),
        (11, 0 | 1) => kind(3, code, 0),
        (12, 0 | 2) => {
            let pointer = match word >> 24 {
                0 => 0,
                1 => 1,
                2 | 3 => 4,
                8 => 7,
                9 => 6,
                12..=15 => 8,
                16..=19 => 24,
                _ => return None,
            };
            kind(4, 0, pointer)
        }
        _ => None,
    }
}

/// The largest plateau of RFC 1191 §7.1 below the size that did not fit.
#[inline(always)]
fn plateau(total: u32) -> u32 {
    match total {
        65536.. => 65535,
        32001.. => 32000,
        17915.. => 17914,
        8167.. => 8166,
        4353.. => 4352,
        2003.. => 2002,
        1493.. => 1492,
        1007.. => 1006,
        509.. => 508,
        297.. => 296,
        _ => 68,
    }
}

/// The inner packet's transport words and what they become.
struct Quoted {
    new: [u32; 2],
    old: [u32; 2],
}

/// Rewrites the checksum inside a quoted transport header, where it was quoted. `at`: where the header lies now.
#[inline(always)]
fn inner_checksum<P: Packet>(
    p: &mut P,
    at: u32,
    len: u32,
    proto: u32,
    mut words: Quoted,
    pseudo: u32,
) -> Result<(), Reason> {
    let delta = sum::add(pseudo, sum::delta(sum::of(&words.new), sum::of(&words.old)));
    if proto == number::UDP {
        let field = u32::from_be(words.new[1]) & 0xffff;
        if field != 0 {
            let new = match sum::adjust((field as u16).to_be(), delta) {
                0 => 0xffff,
                v => v,
            };
            words.new[1] =
                words.new[1] & 0xffff_0000u32.to_be() | u32::from(u16::from_be(new)).to_be();
        }
        return need(p.store(at, &words.new));
    }
    if proto == number::ICMP4 {
        let field = (u32::from_be(words.new[0]) & 0xffff) as u16;
        let new = sum::adjust(field.to_be(), delta);
        words.new[0] = words.new[0] & 0xffff_0000u32.to_be() | u32::from(u16::from_be(new)).to_be();
        return need(p.store(at, &words.new));
    }
    need(p.store(at, &words.new))?;
    if len >= 20 {
        let mut w = [0u32; 1];
        need(p.load(at + 16, &mut w))?;
        let field = (u32::from_be(w[0]) >> 16) as u16;
        let new = sum::adjust(field.to_be(), delta);
        need(p.store_half(at + 16, new))?;
    }
    Ok(())
}

/// First step of an error: its checksum.
#[inline(always)]
pub fn verify<P: Packet>(p: &P, w: &Work) -> Result<Step, Reason> {
    let whole = p.sum(w.at, w.len).ok_or(Reason::Malformed)?;
    need(sum::fold(sum::add(whole, w.pseudo)) == 0xffff)?;
    Ok(Step::Next)
}

/// Last step of an error: the new checksum, over a field that is zero.
#[inline(always)]
pub fn seal<P: Packet>(p: &mut P, w: &Work) -> Result<Step, Reason> {
    let whole = p.sum(w.at, w.len).ok_or(Reason::Malformed)?;
    need(p.store_half(w.at + 2, !sum::fold(sum::add(whole, w.pseudo))))?;
    Ok(Step::Done(Verdict::Send))
}

/// Translates an ICMPv6 error. `e` as the first step filled it.
#[inline(always)]
pub fn to_four<P: Packet, T: Tables>(
    p: &mut P,
    t: &mut T,
    s: &Settings,
    e: &mut Work,
) -> Result<Step, Reason> {
    let h = &e.header;
    need(e.len >= ICMP + SIX + 8)?;
    let mut icmp = [0u32; 2];
    let mut i = [0u32; 10];
    let mut words = [0u32; 2];
    let ok = p.load(e.at, &mut icmp)
        && p.load(e.at + ICMP, &mut i)
        && p.load(e.at + ICMP + SIX, &mut words);
    need(ok)?;
    let first = u32::from_be(icmp[0]);
    let (ty, code) = (first >> 24, (first >> 16) & 0xff);
    let word = u32::from_be(icmp[1]);
    let attribute = if ty == 1 || ty == 3 { word >> 24 } else { 0 };
    let kind = kind_to_four(ty, code, word, s.mtu).ok_or(Reason::Nat64Untranslatable)?;

    let inner_w1 = u32::from_be(i[1]);
    let inner_next = (inner_w1 >> 8) & 0xff;
    let from_us = u32::from_be(i[0]) >> 28 == 6
        && i[2] == s.pref64[0]
        && i[3] == s.pref64[1]
        && i[4] == s.pref64[2];
    if !from_us {
        return Err(Reason::Nat64Untranslatable);
    }
    let payload = quoted(
        e.len - ICMP - SIX,
        (attribute << 3).wrapping_sub(SIX),
        attribute != 0,
        inner_w1 >> 16,
        MAX_INNER_4,
    );
    need(payload >= 8)?;
    let proto = if inner_next == number::ICMP6 {
        number::ICMP4
    } else {
        inner_next
    };
    let end = [i[6], i[7], i[8], i[9]];
    let l4 = u32::from_be(words[0]);
    let mut new = words;
    let external = match proto {
        number::TCP | number::UDP => {
            let inner = Inner {
                addr: end,
                port: l4 as u16,
            };
            let x = state::peek_out(t, s, proto, &inner).ok_or(Reason::Nat64NoMapping)?;
            new[0] = ports((l4 >> 16) as u16, x.port);
            x
        }
        number::ICMP4 => {
            let new_type = match l4 >> 24 {
                ECHO_REPLY_6 => ECHO_REPLY_4,
                ECHO_REQUEST_6 => ECHO_REQUEST_4,
                _ => return Err(Reason::Nat64Untranslatable),
            };
            let id = u32::from_be(words[1]);
            let inner = Inner {
                addr: end,
                port: (id >> 16) as u16,
            };
            let x = state::peek_out(t, s, proto, &inner).ok_or(Reason::Nat64NoMapping)?;
            new[0] = (new_type << 24 | l4 & 0x00ff_ffff).to_be();
            new[1] = (u32::from(x.port) << 16 | id & 0xffff).to_be();
            x
        }
        _ => return Err(Reason::Nat64Untranslatable),
    };
    let own = external.addr.to_be();
    let hop = u32::from_be(h[1]) & 0xff;
    let class = (u32::from_be(h[0]) >> 20) & 0xff;
    let outer = header4(
        class,
        FOUR + ICMP + FOUR + payload,
        0,
        hop - 1,
        number::ICMP4,
        own,
        h[9],
    );
    let inner_len = (inner_w1 >> 16) + FOUR;
    let inner_header = header4(
        (u32::from_be(i[0]) >> 20) & 0xff,
        inner_len & 0xffff,
        if inner_len > 1260 { 0x4000 } else { 0 },
        inner_w1 & 0xff,
        proto,
        i[5],
        own,
    );
    let inner_old = sum::of(&[i[2], i[3], i[4], i[5], i[6], i[7], i[8], i[9]]);
    let pseudo = if proto == number::ICMP4 {
        sum::delta(0, sum::add(inner_old, pseudo_icmp6(inner_w1 >> 16)))
    } else {
        sum::delta(sum::add(i[5], own), inner_old)
    };

    need(p.trim(e.at + ICMP + SIX + payload))?;
    super::six::replace(p, e.at + FOUR, &outer)?;
    let at = FOUR + ICMP + FOUR;
    let head = [(kind.ty << 24 | kind.code << 16).to_be(), kind.word.to_be()];
    need(p.store(FOUR, &head) && p.store(FOUR + ICMP, &inner_header))?;
    inner_checksum(p, at, payload, proto, Quoted { new, old: words }, pseudo)?;
    e.at = FOUR;
    e.len = ICMP + FOUR + payload;
    e.pseudo = 0;
    t.count(Counter::IcmpError);
    t.count(Counter::SixToFour);
    Ok(Step::Seal)
}

/// Translates an ICMPv4 error. `e` as the first step filled it.
#[inline(always)]
pub fn to_six<P: Packet, T: Tables>(
    p: &mut P,
    t: &mut T,
    s: &Settings,
    e: &mut Work,
) -> Result<Step, Reason> {
    let h = &e.header;
    need(e.len >= ICMP + FOUR + 8)?;
    let mut icmp = [0u32; 2];
    let mut i = [0u32; 5];
    let mut words = [0u32; 2];
    let ok = p.load(e.at, &mut icmp)
        && p.load(e.at + ICMP, &mut i)
        && p.load(e.at + ICMP + FOUR, &mut words);
    need(ok)?;
    let first = u32::from_be(icmp[0]);
    let (ty, code) = (first >> 24, (first >> 16) & 0xff);
    let word = u32::from_be(icmp[1]);
    let attribute = (word >> 16) & 0xff;
    let inner_w0 = u32::from_be(i[0]);
    let inner_total = inner_w0 & 0xffff;
    // Inner options and inner fragments are not translated.
    if inner_w0 >> 24 != 0x45 || u32::from_be(i[1]) & 0x3fff != 0 {
        return Err(Reason::Nat64Untranslatable);
    }
    need(inner_total >= FOUR + 8)?;
    let kind =
        kind_to_six(ty, code, word, s.mtu, inner_total).ok_or(Reason::Nat64Untranslatable)?;
    let payload = quoted(
        e.len - ICMP - FOUR,
        (attribute << 2).wrapping_sub(FOUR),
        attribute != 0,
        inner_total - FOUR,
        MAX_INNER_6,
    );
    need(payload >= 8)?;
    let proto = (u32::from_be(i[2]) >> 16) & 0xff;
    let own = u32::from_be(i[3]);
    if !may_cross(u32::from_be(i[4]), s) {
        return Err(Reason::Nat64Untranslatable);
    }
    let l4 = u32::from_be(words[0]);
    let id = u32::from_be(words[1]);
    let port = match proto {
        number::TCP | number::UDP => (l4 >> 16) as u16,
        number::ICMP4 => (id >> 16) as u16,
        _ => return Err(Reason::Nat64Untranslatable),
    };
    let external = External { addr: own, port };
    let end = state::peek_in(t, s, proto, external).ok_or(Reason::Nat64NoReverse)?;
    let mut new = words;
    if proto == number::ICMP4 {
        let new_type = match l4 >> 24 {
            ECHO_REPLY_4 => ECHO_REPLY_6,
            ECHO_REQUEST_4 => ECHO_REQUEST_6,
            _ => return Err(Reason::Nat64Untranslatable),
        };
        new[0] = (new_type << 24 | l4 & 0x00ff_ffff).to_be();
        new[1] = (u32::from(end.port) << 16 | id & 0xffff).to_be();
    } else {
        new[0] = ports(end.port, l4 as u16);
    }

    let outer_w2 = u32::from_be(h[2]);
    let class = (u32::from_be(h[0]) >> 16) & 0xff;
    let far = under_pref64(s, i[4]);
    let icmp_len = ICMP + SIX + payload;
    let outer = header6(
        class,
        icmp_len,
        number::ICMP6,
        (outer_w2 >> 24) - 1,
        under_pref64(s, h[3]),
        end.addr,
    );
    let inner_next = if proto == number::ICMP4 {
        number::ICMP6
    } else {
        proto
    };
    let inner_header = header6(
        (inner_w0 >> 16) & 0xff,
        inner_total - FOUR,
        inner_next,
        u32::from_be(i[2]) >> 24,
        end.addr,
        far,
    );
    let inner_addresses = sum::add(sum::of(&end.addr), sum::of(&far));
    let pseudo = if proto == number::ICMP4 {
        sum::add(inner_addresses, pseudo_icmp6(inner_total - FOUR))
    } else {
        sum::delta(inner_addresses, sum::add(i[3], i[4]))
    };

    need(p.trim(e.at + ICMP + FOUR + payload))?;
    if e.at > FOUR {
        need(p.make_room(-((e.at - FOUR) as i32)))?;
    }
    need(p.change_family(true) && p.make_room((SIX - FOUR) as i32) && p.store(0, &outer))?;
    let head = [(kind.ty << 24 | kind.code << 16).to_be(), kind.word.to_be()];
    need(p.store(SIX, &head) && p.store(SIX + ICMP, &inner_header))?;
    let at = SIX + ICMP + SIX;
    inner_checksum(p, at, payload, proto, Quoted { new, old: words }, pseudo)?;
    let outer_addresses = sum::of(&[
        outer[2], outer[3], outer[4], outer[5], outer[6], outer[7], outer[8], outer[9],
    ]);
    e.at = SIX;
    e.len = icmp_len;
    e.pseudo = sum::add(outer_addresses, pseudo_icmp6(icmp_len));
    t.count(Counter::IcmpError);
    t.count(Counter::FourToSix);
    Ok(Step::Seal)
}

/// Octets of the inner packet's payload that go into the translation: what came, without an extension or padding, and no
/// more than the other family's errors carry.
#[inline(always)]
fn quoted(came: u32, attribute: u32, has_attribute: bool, inner_payload: u32, most: u32) -> u32 {
    let mut n = came;
    if has_attribute && attribute < n {
        n = attribute;
    }
    if inner_payload < n {
        n = inner_payload;
    }
    if most < n {
        n = most;
    }
    n
}

/// Turns an IPv4 packet that does not fit into the "fragmentation needed" that its sender gets (RFC 7915 §4.1). Its source is
/// the exceptions' address: it is routed to the gateways from everywhere, which a link address need not be.
#[inline(always)]
pub fn too_big<P: Packet, T: Tables>(
    p: &mut P,
    t: &mut T,
    s: &Settings,
    e: &mut Work,
) -> Result<Step, Reason> {
    let h = &e.header;
    // It is longer than an MTU.
    let quote = QUOTED;
    let outer = header4(
        0,
        FOUR + ICMP + quote,
        0,
        64,
        number::ICMP4,
        s.mapping.exception_addr.to_be(),
        h[3],
    );
    let grown = FOUR + ICMP;
    need(p.trim(quote) && p.make_room(grown as i32))?;
    let mut front = [0u32; 12];
    front[..5].copy_from_slice(&outer);
    front[5] = (3u32 << 24 | 4 << 16).to_be();
    front[6] = (s.mtu - 20).to_be();
    front[7..].copy_from_slice(&h[..5]);
    need(p.store(0, &front))?;
    e.at = FOUR;
    e.len = ICMP + quote;
    e.pseudo = 0;
    t.count(Counter::TooBig);
    Ok(Step::Seal)
}
