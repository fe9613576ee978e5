//! IPv4 to IPv6 (RFC 7915 §4): everything but ICMP errors.

use super::state;
use super::{
    ErrorPacket, FOUR, Next, Packet, SIX, Tables, Verdict, clamp_mss, header6, may_cross, need,
    number, ports, pseudo_icmp6, sum, under_pref64,
};
use crate::nat64::bib::{FRAGMENT_TIMEOUT, Fragment, FragmentKey};
use crate::nat64::{Counter, External, Settings};
use crate::reason::Reason;

const ECHO_REPLY: u32 = 0;
const ECHO_REQUEST: u32 = 8;
const DF: u32 = 0x4000;
const MF: u32 = 0x2000;
const OFFSET: u32 = 0x1fff;
const FRAGMENT_HEADER: u32 = 8;
/// Options that fit an IPv4 header.
const MAX_OPTIONS: u32 = 40;
const LOOSE_ROUTE: u8 = 131;
const STRICT_ROUTE: u8 = 137;

#[inline(always)]
pub(super) fn translate<P: Packet, T: Tables>(
    p: &mut P,
    t: &mut T,
    s: &Settings,
    error: &mut ErrorPacket,
) -> Result<Next, Reason> {
    let mut h = [0u32; 5];
    if !p.load(0, &mut h) {
        return Ok(Next::Done(Verdict::Pass));
    }
    let w0 = u32::from_be(h[0]);
    let dst = u32::from_be(h[4]);
    if w0 >> 28 != 4 || s.mapping.pool.index(dst).is_none() {
        return Ok(Next::Done(Verdict::Pass));
    }
    let header = ((w0 >> 24) & 0xf) << 2;
    let total = w0 & 0xffff;
    need(header >= FOUR && total >= header && p.len() >= total)?;
    let mut check = sum::of(&h);
    if header > FOUR {
        check = sum::add(check, p.sum(FOUR, header - FOUR).ok_or(Reason::Malformed)?);
        source_route(p, header)?;
    }
    need(sum::fold(check) == 0xffff)?;
    let src = h[3];
    if !may_cross(u32::from_be(src), s) {
        return Err(Reason::Nat64Untranslatable);
    }
    let w1 = u32::from_be(h[1]);
    let w2 = u32::from_be(h[2]);
    let (ttl, proto) = (w2 >> 24, (w2 >> 16) & 0xff);
    if ttl <= 1 {
        t.count(Counter::ToStack);
        return Ok(Next::Done(Verdict::ToStack));
    }
    let mut known = [header, total, ttl, proto];
    p.forget(&mut known);
    let [header, total, ttl, proto] = known;
    let len = total.wrapping_sub(header);
    let (offset, more) = (w1 & OFFSET, w1 & MF != 0);
    let fragmented = offset != 0 || more;
    if proto != number::ICMP4 && proto != number::TCP && proto != number::UDP {
        return Err(Reason::Nat64Untranslatable);
    }
    if proto == number::ICMP4 && fragmented {
        return Err(Reason::Nat64Fragment);
    }
    let next = if proto == number::ICMP4 {
        number::ICMP6
    } else {
        proto
    };
    let class = (w0 >> 16) & 0xff;
    let fragment_key = FragmentKey {
        src: [0, 0, 0, src],
        dst: [0, 0, 0, h[4]],
        id: w1 >> 16,
        proto,
    };
    let fragment_words = [
        (next << 24 | offset << 3 | u32::from(more)).to_be(),
        (w1 >> 16).to_be(),
    ];
    let from = under_pref64(s, src);

    if offset != 0 {
        let now = t.now();
        let known = t
            .fragment(&fragment_key)
            .filter(|f| now.wrapping_sub(f.seen) < FRAGMENT_TIMEOUT)
            .ok_or(Reason::Nat64Fragment)?;
        fits(p, s, len + SIX + FRAGMENT_HEADER, 0)?;
        let new = header6(
            class,
            len + FRAGMENT_HEADER,
            number::FRAGMENT,
            ttl - 1,
            from,
            known.addr,
        );
        replace(p, header, &new, Some(&fragment_words))?;
        t.count(Counter::Fragment);
        t.count(Counter::FourToSix);
        return Ok(Next::Done(Verdict::Send));
    }

    let mut l4 = [0u32; 4];
    if proto == number::TCP {
        need(len >= 20 && p.load(header, &mut l4))?;
    } else {
        let mut two = [0u32; 2];
        need(len >= 8 && p.load(header, &mut two))?;
        l4[0] = two[0];
        l4[1] = two[1];
    }
    let first = u32::from_be(l4[0]);
    let (icmp_type, port, remote_port) = if proto == number::ICMP4 {
        (first >> 24, (u32::from_be(l4[1]) >> 16) as u16, 0)
    } else {
        (0, first as u16, (first >> 16) as u16)
    };
    if proto == number::ICMP4 && icmp_type != ECHO_REQUEST && icmp_type != ECHO_REPLY {
        if matches!(icmp_type, 3 | 11 | 12) {
            keep(error, &h, header, len);
            return Ok(Next::Error);
        }
        return Err(Reason::Nat64Untranslatable);
    }

    let flags = (u32::from_be(l4[3]) >> 16) as u8;
    let inner = if dst == s.mapping.exception_addr {
        state::exception_in(t, proto, port, src, remote_port, flags)?
    } else {
        state::computed_back(s, proto, External { addr: dst, port })
            .ok_or(Reason::Nat64NoReverse)?
    };

    let l4_header = if proto == number::TCP {
        (u32::from_be(l4[3]) >> 28) << 2
    } else {
        8
    };
    let extra = if fragmented { FRAGMENT_HEADER } else { 0 };
    if fits(p, s, len + SIX + extra, l4_header).is_err() {
        if w1 & DF == 0 || header != FOUR {
            return Err(Reason::Nat64TooBig);
        }
        keep(error, &h, 0, total);
        return Ok(Next::Error);
    }
    if more {
        let seen = t.now();
        t.fragment_put(
            &fragment_key,
            &Fragment {
                addr: inner.addr,
                seen,
            },
        );
        t.count(Counter::Fragment);
    }

    let new_addresses = sum::add(sum::of(&from), sum::of(&inner.addr));
    let word = ports(remote_port, inner.port);
    // A datagram without a checksum gets one: IPv6 wants it (RFC 7915 §4.5).
    let bare = proto == number::UDP && l4[1] & 0x0000_ffffu32.to_be() == 0;
    if bare {
        let udp_len = u32::from_be(l4[1]) >> 16;
        if fragmented {
            return Err(Reason::Nat64Untranslatable);
        }
        need(udp_len >= 8 && udp_len <= len)?;
        let data = p.sum(header, udp_len).ok_or(Reason::Nat64Untranslatable)?;
        let pseudo = sum::add(
            new_addresses,
            sum::add(udp_len.to_be(), number::UDP.to_be()),
        );
        let whole = sum::add(sum::add(data, pseudo), sum::delta(word, l4[0]));
        let value = match !sum::fold(whole) {
            0 => 0xffff,
            v => v,
        };
        need(p.store_half(header + 6, value))?;
    }
    if proto == number::TCP {
        clamp_mss(p, header, l4[3], s.mtu)?;
    }

    let (payload, next_header) = if fragmented {
        (len + FRAGMENT_HEADER, number::FRAGMENT)
    } else {
        (len, next)
    };
    let new = header6(class, payload, next_header, ttl - 1, from, inner.addr);
    let between = if fragmented {
        Some(&fragment_words)
    } else {
        None
    };
    replace(p, header, &new, between)?;
    let at = SIX + extra;
    if proto == number::ICMP4 {
        let new_type: u32 = if icmp_type == ECHO_REQUEST { 128 } else { 129 };
        let w0 = (new_type << 24).to_be() | l4[0] & 0x0000_ffffu32.to_be();
        let w1 = (u32::from(inner.port) << 16).to_be() | l4[1] & 0x0000_ffffu32.to_be();
        need(p.store(at, &[w0, w1]))?;
        let come = sum::add(new_addresses, pseudo_icmp6(len));
        need(p.fix_checksum(at + 2, come, true, false))?;
        let changed = sum::delta(sum::add(w0, w1), sum::add(l4[0], l4[1]));
        need(p.fix_checksum(at + 2, changed, false, false))?;
    } else {
        need(p.store(at, &[word]))?;
        let (field, udp) = if proto == number::UDP {
            (at + 6, true)
        } else {
            (at + 16, false)
        };
        if !bare {
            let pseudo = sum::delta(new_addresses, sum::add(src, h[4]));
            need(p.fix_checksum(field, pseudo, true, udp))?;
            need(p.fix_checksum(field, sum::delta(word, l4[0]), false, udp))?;
        }
    }
    t.count(Counter::FourToSix);
    Ok(Next::Done(Verdict::Send))
}

/// Hands the packet to the slow half.
#[inline(always)]
fn keep(error: &mut ErrorPacket, h: &[u32; 5], at: u32, len: u32) {
    error.header[0] = h[0];
    error.header[1] = h[1];
    error.header[2] = h[2];
    error.header[3] = h[3];
    error.header[4] = h[4];
    error.at = at;
    error.len = len;
}

/// Whether the packet, or each segment of a super-packet, fits the uplink as IPv6.
#[inline(always)]
fn fits<P: Packet>(p: &P, s: &Settings, total: u32, l4_header: u32) -> Result<(), Reason> {
    let segment = p.segment();
    let biggest = if segment == 0 {
        total
    } else {
        SIX + l4_header + segment
    };
    if biggest > s.mtu {
        Err(Reason::Nat64TooBig)
    } else {
        Ok(())
    }
}

/// A source route is not translated (RFC 7915 §4.1); all other options are dropped silently. Any octet that could be one's
/// kind counts: a real walk multiplies the verifier's paths, and options that look so do not occur outside source routes.
#[inline(always)]
fn source_route<P: Packet>(p: &P, header: u32) -> Result<(), Reason> {
    for i in 0..MAX_OPTIONS / 4 {
        let at = FOUR + 4 * i;
        if at >= header {
            break;
        }
        let mut w = [0u32; 1];
        need(p.load(at, &mut w))?;
        for octet in w[0].to_ne_bytes() {
            if octet == LOOSE_ROUTE || octet == STRICT_ROUTE {
                return Err(Reason::Nat64Untranslatable);
            }
        }
    }
    Ok(())
}

/// Puts an IPv6 header (and a fragment header) in the place of the IPv4 header, which ends at `header`.
#[inline(always)]
pub(super) fn replace<P: Packet>(
    p: &mut P,
    header: u32,
    new: &[u32; 10],
    fragment: Option<&[u32; 2]>,
) -> Result<(), Reason> {
    if header > FOUR {
        need(p.make_room(-((header - FOUR) as i32)))?;
    }
    need(p.change_family(true))?;
    if let Some(words) = fragment {
        need(p.make_room(FRAGMENT_HEADER as i32))?;
        need(p.store(0, new))?;
        return need(p.store(SIX, words));
    }
    need(p.store(0, new))
}
