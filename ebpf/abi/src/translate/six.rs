//! IPv6 to IPv4 (RFC 7915 §5): everything but ICMP errors.

use super::state::{self, Inner};
use super::{
    ErrorPacket, FOUR, Next, Packet, SIX, Tables, Verdict, clamp_mss, header4, may_cross, need,
    number, ports, pseudo_icmp6, sum,
};
use crate::nat64::bib::{FRAGMENT_TIMEOUT, Fragment, FragmentKey};
use crate::nat64::{Counter, External, Settings};
use crate::reason::Reason;

/// Extension headers that are skipped. Limit: the verifier walks each.
const MAX_EXTENSIONS: u32 = 4;
/// Up to this size an IPv4 packet is sent without DF (RFC 7915 §5.1): with 20 more octets it crosses any IPv6 link.
const DF_ABOVE: u32 = 1260;

const ECHO_REQUEST: u32 = 128;
const ECHO_REPLY: u32 = 129;

/// What the extension headers say.
struct Extensions {
    /// The protocol after them.
    next: u32,
    /// Where it begins.
    at: u32,
    /// 1: there is a fragment header.
    fragmented: u32,
    /// Offset, reserved bits and M, as the header has them.
    offset: u32,
    id: u32,
}

#[inline(always)]
fn extensions<P: Packet>(p: &mut P, first: u32) -> Result<Extensions, Reason> {
    let mut x = Extensions {
        next: first,
        at: SIX,
        fragmented: 0,
        offset: 0,
        id: 0,
    };
    for _ in 0..MAX_EXTENSIONS {
        match x.next {
            number::TCP | number::UDP | number::ICMP6 => break,
            number::HOP_BY_HOP | number::DESTINATION | number::ROUTING => {
                let mut w = [0u32; 1];
                need(p.load(x.at, &mut w))?;
                let w = u32::from_be(w[0]);
                if x.next == number::ROUTING && w & 0xff != 0 {
                    return Err(Reason::Nat64Untranslatable);
                }
                x.at += (((w >> 16) & 0xff) + 1) << 3;
                x.next = w >> 24;
            }
            number::FRAGMENT => {
                let mut w = [0u32; 2];
                need(p.load(x.at, &mut w))?;
                let first = u32::from_be(w[0]);
                x.at += 8;
                x.next = first >> 24;
                x.fragmented = 1;
                x.offset = first & 0xffff;
                x.id = w[1];
                if x.offset >> 3 != 0 {
                    break;
                }
            }
            _ => return Err(Reason::Nat64Untranslatable),
        }
    }
    let mut all = [x.next, x.at, x.fragmented, x.offset, x.id];
    p.forget(&mut all);
    [x.next, x.at, x.fragmented, x.offset, x.id] = all;
    Ok(x)
}

#[inline(always)]
pub(super) fn translate<P: Packet, T: Tables>(
    p: &mut P,
    t: &mut T,
    s: &Settings,
    error: &mut ErrorPacket,
) -> Result<Next, Reason> {
    let h = &mut error.header;
    if !p.load(0, h)
        || h[6] != s.pref64[0]
        || h[7] != s.pref64[1]
        || h[8] != s.pref64[2]
        || u32::from_be(h[0]) >> 28 != 6
    {
        return Ok(Next::Done(Verdict::Pass));
    }
    let src = [h[2], h[3], h[4], h[5]];
    let dst = h[9];
    let from_pref64 = src[0] == s.pref64[0] && src[1] == s.pref64[1] && src[2] == s.pref64[2];
    let from_group = u32::from_be(src[0]) >> 24 == 0xff;
    if from_pref64 || from_group || !may_cross(u32::from_be(dst), s) {
        return Err(Reason::Nat64Untranslatable);
    }
    let class = (u32::from_be(h[0]) >> 20) & 0xff;
    let w1 = u32::from_be(h[1]);
    let total = (w1 >> 16) + SIX;
    let hop = w1 & 0xff;
    need(p.len() >= total)?;
    if hop <= 1 {
        t.count(Counter::ToStack);
        return Ok(Next::Done(Verdict::ToStack));
    }
    let addresses = sum::of(&[src[0], src[1], src[2], src[3], h[6], h[7], h[8], dst]);

    let x = extensions(p, (w1 >> 8) & 0xff)?;
    need(x.at <= total)?;
    let len = total - x.at;
    let proto = if x.next == number::ICMP6 {
        number::ICMP4
    } else {
        x.next
    };
    if proto == number::ICMP4 && x.fragmented != 0 && x.offset & 0xfff9 != 0 {
        return Err(Reason::Nat64Fragment);
    }
    if proto != number::ICMP4 && proto != number::TCP && proto != number::UDP {
        return Err(Reason::Nat64Untranslatable);
    }
    let fragment = FragmentKey {
        src,
        dst: [s.pref64[0], s.pref64[1], s.pref64[2], dst],
        id: x.id,
        proto,
    };
    let id_and_flags = (u32::from_be(x.id) & 0xffff) << 16 | (x.offset & 1) << 13 | x.offset >> 3;

    if x.offset >> 3 != 0 {
        let now = t.now();
        let from = match t.fragment(&fragment) {
            Some(f) if now.wrapping_sub(f.seen) < FRAGMENT_TIMEOUT => f.addr[3],
            // The address of a block does not depend on the port: right for every flow that is no exception.
            _ => state::slot(s, &src)
                .and_then(|slot| s.mapping.block(slot))
                .map(|(addr, _)| addr.to_be())
                .ok_or(Reason::Nat64Fragment)?,
        };
        let new = header4(class, len + FOUR, id_and_flags, hop - 1, proto, from, dst);
        replace(p, x.at, &new)?;
        t.count(Counter::Fragment);
        t.count(Counter::SixToFour);
        return Ok(Next::Done(Verdict::Send));
    }

    // The transport header. Two words are enough but for TCP, whose flags stand in the fourth.
    let mut l4 = [0u32; 4];
    if proto == number::TCP {
        need(len >= 20 && p.load(x.at, &mut l4))?;
    } else {
        let mut two = [0u32; 2];
        need(len >= 8 && p.load(x.at, &mut two))?;
        l4[0] = two[0];
        l4[1] = two[1];
    }
    let first = u32::from_be(l4[0]);
    let (icmp_type, port, remote_port) = if proto == number::ICMP4 {
        (first >> 24, (u32::from_be(l4[1]) >> 16) as u16, 0)
    } else {
        (0, (first >> 16) as u16, first as u16)
    };
    if proto == number::ICMP4 && icmp_type != ECHO_REQUEST && icmp_type != ECHO_REPLY {
        if (1..=4).contains(&icmp_type) {
            error.at = x.at;
            error.len = len;
            return Ok(Next::Error);
        }
        return Err(Reason::Nat64Untranslatable);
    }

    let flags = (u32::from_be(l4[3]) >> 16) as u8;
    let inner = Inner { addr: src, port };
    let external = match state::computed(s, proto, &inner) {
        Some(e) => e,
        None => {
            let may_open = icmp_type != ECHO_REPLY;
            state::exception_out(t, s, proto, &inner, dst, remote_port, flags, may_open)?
        }
    };
    if proto == number::TCP {
        clamp_mss(p, x.at, l4[3], s.mtu)?;
    }
    if s.mapping.pool.index(u32::from_be(dst)).is_some() {
        if x.at != SIX || proto == number::ICMP4 {
            return Err(Reason::Nat64NoReverse);
        }
        super::hairpin::turn(p, t, s, h, proto, l4[0], flags, external)?;
        return Ok(Next::Done(Verdict::Send));
    }
    if x.fragmented != 0 && x.offset & 1 != 0 {
        let seen = t.now();
        let addr = [0, 0, 0, external.addr.to_be()];
        t.fragment_put(&fragment, &Fragment { addr, seen });
        t.count(Counter::Fragment);
    }

    let total4 = len + FOUR;
    let id_and_flags = if x.fragmented != 0 {
        id_and_flags
    } else if total4 > DF_ABOVE {
        0x4000
    } else {
        t.random() << 16
    };
    let from = external.addr.to_be();
    let new = header4(class, total4, id_and_flags, hop - 1, proto, from, dst);
    replace(p, x.at, &new)?;
    if proto == number::ICMP4 {
        echo(p, &l4, icmp_type, external, addresses, len)?;
    } else {
        let word = ports(external.port, remote_port);
        need(p.store(FOUR, &[word]))?;
        let (at, udp) = if proto == number::UDP {
            (FOUR + 6, true)
        } else {
            (FOUR + 16, false)
        };
        let pseudo = sum::delta(sum::add(from, dst), addresses);
        need(p.fix_checksum(at, pseudo, true, udp))?;
        need(p.fix_checksum(at, sum::delta(word, l4[0]), false, udp))?;
    }
    t.count(Counter::SixToFour);
    Ok(Next::Done(Verdict::Send))
}

/// Puts an IPv4 header in the place of the IPv6 header and its extensions, which end at `at`.
#[inline(always)]
pub(super) fn replace<P: Packet>(p: &mut P, at: u32, new: &[u32; 5]) -> Result<(), Reason> {
    need(p.change_family(false))?;
    if at > SIX {
        need(p.make_room(-((at - SIX) as i32)))?;
    }
    need(p.store(0, new))
}

#[inline(always)]
fn echo<P: Packet>(
    p: &mut P,
    l4: &[u32; 4],
    icmp_type: u32,
    external: External,
    addresses: u32,
    len: u32,
) -> Result<(), Reason> {
    let new_type: u32 = if icmp_type == ECHO_REQUEST { 8 } else { 0 };
    let w0 = (new_type << 24).to_be() | l4[0] & 0x0000_ffffu32.to_be();
    let w1 = (u32::from(external.port) << 16).to_be() | l4[1] & 0x0000_ffffu32.to_be();
    need(p.store(FOUR, &[w0, w1]))?;
    // ICMPv4's checksum has no pseudo-header: the whole of ICMPv6's goes.
    let gone = sum::add(addresses, pseudo_icmp6(len));
    need(p.fix_checksum(FOUR + 2, sum::delta(0, gone), true, false))?;
    let changed = sum::delta(sum::add(w0, w1), sum::add(l4[0], l4[1]));
    need(p.fix_checksum(FOUR + 2, changed, false, false))
}
