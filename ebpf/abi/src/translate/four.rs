//! IPv4 to IPv6 (RFC 7915 §4): everything but ICMP errors.

use super::state;
use super::{
    FOUR, Packet, SIX, Step, Tables, Verdict, Work, clamp_mss, header6, may_cross, need, number,
    ports, pseudo_icmp6, sum, under_pref64,
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

/// First step: whether the packet is ours, and what it is. Later fragments are done here.
#[inline(always)]
pub fn parse<P: Packet, T: Tables>(
    p: &mut P,
    t: &mut T,
    s: &Settings,
    w: &mut Work,
) -> Result<Step, Reason> {
    let mut h = [0u32; 5];
    if !p.load(0, &mut h) {
        return Ok(Step::Done(Verdict::Pass));
    }
    let w0 = u32::from_be(h[0]);
    let dst = u32::from_be(h[4]);
    if w0 >> 28 != 4 || s.mapping.pool.index(dst).is_none() {
        return Ok(Step::Done(Verdict::Pass));
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
    if !may_cross(u32::from_be(h[3]), s) {
        return Err(Reason::Nat64Untranslatable);
    }
    let w1 = u32::from_be(h[1]);
    let w2 = u32::from_be(h[2]);
    if w2 >> 24 <= 1 {
        t.count(Counter::ToStack);
        return Ok(Step::Done(Verdict::ToStack));
    }
    let mut known = [header, total, (w2 >> 16) & 0xff];
    p.forget(&mut known);
    let [header, total, proto] = known;
    let len = total.wrapping_sub(header);
    w.header[..5].copy_from_slice(&h);
    w.at = header;
    w.len = len;
    w.proto = proto;
    w.fragmented = u32::from(w1 & (MF | OFFSET) != 0);
    w.fragment = w1 & 0xffff;
    w.id = w1 >> 16;
    w.external = dst;
    if proto != number::ICMP4 && proto != number::TCP && proto != number::UDP {
        return Err(Reason::Nat64Untranslatable);
    }
    if w.fragmented != 0 && proto == number::ICMP4 {
        return Err(Reason::Nat64Fragment);
    }
    if w1 & OFFSET != 0 {
        return later_fragment(p, t, s, w);
    }

    if proto == number::TCP {
        need(len >= 20 && p.load(header, &mut w.l4))?;
    } else {
        let mut two = [0u32; 2];
        need(len >= 8 && p.load(header, &mut two))?;
        w.l4 = [two[0], two[1], 0, 0];
    }
    let first = u32::from_be(w.l4[0]);
    if proto != number::ICMP4 {
        w.kind = 0;
        w.external_port = first & 0xffff;
        w.remote_port = first >> 16;
        return Ok(Step::Next);
    }
    w.kind = first >> 24;
    w.external_port = u32::from_be(w.l4[1]) >> 16;
    w.remote_port = 0;
    match w.kind {
        ECHO_REQUEST | ECHO_REPLY => Ok(Step::Next),
        3 | 11 | 12 => {
            w.pseudo = 0;
            Ok(Step::Error)
        }
        _ => Err(Reason::Nat64Untranslatable),
    }
}

#[inline(always)]
fn fragment_key(w: &Work) -> FragmentKey {
    FragmentKey {
        src: [0, 0, 0, w.header[3]],
        dst: [0, 0, 0, w.header[4]],
        id: w.id,
        proto: w.proto,
    }
}

/// The fragment header.
#[inline(always)]
fn fragment_words(w: &Work, next: u32) -> [u32; 2] {
    let more = u32::from(w.fragment & MF != 0);
    [
        (next << 24 | (w.fragment & OFFSET) << 3 | more).to_be(),
        w.id.to_be(),
    ]
}

#[inline(always)]
fn later_fragment<P: Packet, T: Tables>(
    p: &mut P,
    t: &mut T,
    s: &Settings,
    w: &Work,
) -> Result<Step, Reason> {
    let now = t.now();
    let known = match t.fragment(&fragment_key(w)) {
        Some(f) if now.wrapping_sub(f.seen) < FRAGMENT_TIMEOUT => f,
        _ => return Err(Reason::Nat64Fragment),
    };
    if !fits(p, s, w.len + SIX + FRAGMENT_HEADER, 0) {
        return Err(Reason::Nat64TooBig);
    }
    let new = header6(
        (u32::from_be(w.header[0]) >> 16) & 0xff,
        w.len + FRAGMENT_HEADER,
        number::FRAGMENT,
        (u32::from_be(w.header[2]) >> 24) - 1,
        under_pref64(s, w.header[3]),
        known.addr,
    );
    replace(p, w.at, &new, Some(&fragment_words(w, w.proto)))?;
    t.count(Counter::Fragment);
    t.count(Counter::FourToSix);
    Ok(Step::Done(Verdict::Send))
}

/// Second step: the IPv6 end of a flow in a port block.
#[inline(always)]
pub fn map(s: &Settings, w: &mut Work) -> Result<Step, Reason> {
    if w.external == s.mapping.exception_addr {
        return Ok(Step::Exception);
    }
    let external = External {
        addr: w.external,
        port: w.external_port as u16,
    };
    let inner = state::computed_back(s, w.proto, external).ok_or(Reason::Nat64NoReverse)?;
    w.inner = inner.addr;
    w.inner_port = u32::from(inner.port);
    Ok(Step::Next)
}

/// Second step of a flow in none.
#[inline(always)]
pub fn map_exception<T: Tables>(t: &mut T, w: &mut Work) -> Result<Step, Reason> {
    let flow = state::Flow {
        proto: w.proto,
        remote: w.header[3],
        remote_port: w.remote_port as u16,
        tcp_flags: (u32::from_be(w.l4[3]) >> 16) as u8,
    };
    let inner = state::exception_in(t, &flow, w.external_port as u16)?;
    w.inner = inner.addr;
    w.inner_port = u32::from(inner.port);
    Ok(Step::Next)
}

/// Third step: the packet becomes IPv6, or is found too big ([`Step::TooBig`]).
#[inline(always)]
pub fn write<P: Packet, T: Tables>(
    p: &mut P,
    t: &mut T,
    s: &Settings,
    w: &Work,
) -> Result<Step, Reason> {
    let proto = w.proto;
    let (header, len) = (w.at, w.len);
    let src = w.header[3];
    let from = under_pref64(s, src);
    let l4_header = if proto == number::TCP {
        (u32::from_be(w.l4[3]) >> 28) << 2
    } else {
        8
    };
    let extra = if w.fragmented != 0 {
        FRAGMENT_HEADER
    } else {
        0
    };
    if !fits(p, s, len + SIX + extra, l4_header) {
        if w.fragment & DF == 0 || header != FOUR {
            return Err(Reason::Nat64TooBig);
        }
        return Ok(Step::TooBig);
    }
    if w.fragmented != 0 {
        let seen = t.now();
        let value = Fragment {
            addr: w.inner,
            seen,
        };
        t.fragment_put(&fragment_key(w), &value);
        t.count(Counter::Fragment);
    }

    let new_addresses = sum::add(sum::of(&from), sum::of(&w.inner));
    let word = ports(w.remote_port as u16, w.inner_port as u16);
    // A datagram without a checksum gets one: IPv6 wants it (RFC 7915 §4.5).
    let bare = proto == number::UDP && w.l4[1] & 0x0000_ffffu32.to_be() == 0;
    if bare {
        let udp_len = u32::from_be(w.l4[1]) >> 16;
        if w.fragmented != 0 {
            return Err(Reason::Nat64Untranslatable);
        }
        need(udp_len >= 8 && udp_len <= len)?;
        let data = p.sum(header, udp_len).ok_or(Reason::Nat64Untranslatable)?;
        let pseudo = sum::add(
            new_addresses,
            sum::add(udp_len.to_be(), number::UDP.to_be()),
        );
        let whole = sum::add(sum::add(data, pseudo), sum::delta(word, w.l4[0]));
        let value = match !sum::fold(whole) {
            0 => 0xffff,
            v => v,
        };
        need(p.store_half(header + 6, value))?;
    }
    if proto == number::TCP {
        clamp_mss(p, header, w.l4[3], s.mtu)?;
    }

    let next = if proto == number::ICMP4 {
        number::ICMP6
    } else {
        proto
    };
    let class = (u32::from_be(w.header[0]) >> 16) & 0xff;
    let hop = (u32::from_be(w.header[2]) >> 24) - 1;
    if w.fragmented != 0 {
        let new = header6(class, len + extra, number::FRAGMENT, hop, from, w.inner);
        replace(p, header, &new, Some(&fragment_words(w, next)))?;
    } else {
        let new = header6(class, len, next, hop, from, w.inner);
        replace(p, header, &new, None)?;
    }
    let at = SIX + extra;
    if proto == number::ICMP4 {
        let new_type: u32 = if w.kind == ECHO_REQUEST { 128 } else { 129 };
        let w0 = (new_type << 24).to_be() | w.l4[0] & 0x0000_ffffu32.to_be();
        let w1 = (w.inner_port << 16).to_be() | w.l4[1] & 0x0000_ffffu32.to_be();
        need(p.store(at, &[w0, w1]))?;
        let come = sum::add(new_addresses, pseudo_icmp6(len));
        need(p.fix_checksum(at + 2, come, true, false))?;
        let changed = sum::delta(sum::add(w0, w1), sum::add(w.l4[0], w.l4[1]));
        need(p.fix_checksum(at + 2, changed, false, false))?;
    } else {
        need(p.store(at, &[word]))?;
        let (field, udp) = if proto == number::UDP {
            (at + 6, true)
        } else {
            (at + 16, false)
        };
        if !bare {
            let pseudo = sum::delta(new_addresses, sum::add(src, w.header[4]));
            need(p.fix_checksum(field, pseudo, true, udp))?;
            need(p.fix_checksum(field, sum::delta(word, w.l4[0]), false, udp))?;
        }
    }
    t.count(Counter::FourToSix);
    Ok(Step::Done(Verdict::Send))
}

/// Whether the packet, or each segment of a super-packet, fits the uplink as IPv6.
#[inline(always)]
fn fits<P: Packet>(p: &P, s: &Settings, total: u32, l4_header: u32) -> bool {
    let segment = p.segment();
    let biggest = if segment == 0 {
        total
    } else {
        SIX + l4_header + segment
    };
    biggest <= s.mtu
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
