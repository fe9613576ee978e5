//! IPv6 to IPv4 (RFC 7915 §5): everything but ICMP errors.

use super::state;
use super::{
    FOUR, Packet, SIX, Step, Tables, Verdict, Work, clamp_mss, header4, may_cross, need, number,
    ports, pseudo_icmp6, sum,
};
use crate::nat64::bib::{FRAGMENT_TIMEOUT, Fragment, FragmentKey};
use crate::nat64::{Counter, Settings};
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

/// The words that are the packet's addresses, summed.
#[inline(always)]
fn addresses(h: &[u32; 10]) -> u32 {
    sum::of(&[h[2], h[3], h[4], h[5], h[6], h[7], h[8], h[9]])
}

/// First step: whether the packet is ours, and what it is. Later fragments are done here.
#[inline(always)]
pub fn parse<P: Packet, T: Tables>(
    p: &mut P,
    t: &mut T,
    s: &Settings,
    w: &mut Work,
) -> Result<Step, Reason> {
    let h = &mut w.header;
    if !p.load(0, h)
        || h[6] != s.pref64[0]
        || h[7] != s.pref64[1]
        || h[8] != s.pref64[2]
        || u32::from_be(h[0]) >> 28 != 6
    {
        return Ok(Step::Done(Verdict::Pass));
    }
    let from_pref64 = h[2] == s.pref64[0] && h[3] == s.pref64[1] && h[4] == s.pref64[2];
    let from_group = u32::from_be(h[2]) >> 24 == 0xff;
    if from_pref64 || from_group || !may_cross(u32::from_be(h[9]), s) {
        return Err(Reason::Nat64Untranslatable);
    }
    let w1 = u32::from_be(h[1]);
    let total = (w1 >> 16) + SIX;
    need(p.len() >= total)?;
    if w1 & 0xff <= 1 {
        t.count(Counter::ToStack);
        return Ok(Step::Done(Verdict::ToStack));
    }

    let x = extensions(p, (w1 >> 8) & 0xff)?;
    need(x.at <= total)?;
    let len = total - x.at;
    let proto = if x.next == number::ICMP6 {
        number::ICMP4
    } else {
        x.next
    };
    if proto != number::ICMP4 && proto != number::TCP && proto != number::UDP {
        return Err(Reason::Nat64Untranslatable);
    }
    w.at = x.at;
    w.len = len;
    w.proto = proto;
    w.fragmented = x.fragmented;
    w.fragment = x.offset;
    w.id = x.id;
    w.inner = [w.header[2], w.header[3], w.header[4], w.header[5]];
    if x.offset & 0xfff9 != 0 && proto == number::ICMP4 {
        return Err(Reason::Nat64Fragment);
    }
    if x.offset >> 3 != 0 {
        return later_fragment(p, t, s, w);
    }

    // The transport header. Two words are enough but for TCP, whose flags stand in the fourth.
    if proto == number::TCP {
        need(len >= 20 && p.load(x.at, &mut w.l4))?;
    } else {
        let mut two = [0u32; 2];
        need(len >= 8 && p.load(x.at, &mut two))?;
        w.l4 = [two[0], two[1], 0, 0];
    }
    let first = u32::from_be(w.l4[0]);
    if proto != number::ICMP4 {
        w.kind = 0;
        w.inner_port = first >> 16;
        w.remote_port = first & 0xffff;
        return Ok(Step::Next);
    }
    w.kind = first >> 24;
    w.inner_port = u32::from_be(w.l4[1]) >> 16;
    w.remote_port = 0;
    match w.kind {
        ECHO_REQUEST | ECHO_REPLY => Ok(Step::Next),
        1..=4 => {
            w.pseudo = sum::add(addresses(&w.header), pseudo_icmp6(len));
            Ok(Step::Error)
        }
        _ => Err(Reason::Nat64Untranslatable),
    }
}

#[inline(always)]
fn fragment_key(s: &Settings, w: &Work) -> FragmentKey {
    FragmentKey {
        src: w.inner,
        dst: [s.pref64[0], s.pref64[1], s.pref64[2], w.header[9]],
        id: w.id,
        proto: w.proto,
    }
}

/// Identification and fragment field of the IPv4 header.
#[inline(always)]
fn id_and_fragment(w: &Work) -> u32 {
    (u32::from_be(w.id) & 0xffff) << 16 | (w.fragment & 1) << 13 | w.fragment >> 3
}

#[inline(always)]
fn later_fragment<P: Packet, T: Tables>(
    p: &mut P,
    t: &mut T,
    s: &Settings,
    w: &Work,
) -> Result<Step, Reason> {
    let now = t.now();
    let from = match t.fragment(&fragment_key(s, w)) {
        Some(f) if now.wrapping_sub(f.seen) < FRAGMENT_TIMEOUT => f.addr[3],
        // The address of a block does not depend on the port: right for every flow that is no exception.
        _ => state::slot(s, &w.inner)
            .and_then(|slot| s.mapping.block(slot))
            .map(|(addr, _)| addr.to_be())
            .ok_or(Reason::Nat64Fragment)?,
    };
    let class = (u32::from_be(w.header[0]) >> 20) & 0xff;
    let hop = u32::from_be(w.header[1]) & 0xff;
    let new = header4(
        class,
        w.len + FOUR,
        id_and_fragment(w),
        hop - 1,
        w.proto,
        from,
        w.header[9],
    );
    replace(p, w.at, &new)?;
    t.count(Counter::Fragment);
    t.count(Counter::SixToFour);
    Ok(Step::Done(Verdict::Send))
}

/// Second step: the external address of a flow in a port block.
#[inline(always)]
pub fn map(s: &Settings, w: &mut Work) -> Result<Step, Reason> {
    match state::computed(s, w.proto, &w.inner, w.inner_port) {
        Some(e) => {
            w.external = e.addr;
            w.external_port = u32::from(e.port);
            Ok(Step::Next)
        }
        None => Ok(Step::Exception),
    }
}

/// Second step of a flow in none.
#[inline(always)]
pub fn map_exception<T: Tables>(t: &mut T, s: &Settings, w: &mut Work) -> Result<Step, Reason> {
    let may_open = w.kind != ECHO_REPLY;
    let flow = state::Flow {
        proto: w.proto,
        remote: w.header[9],
        remote_port: w.remote_port as u16,
        tcp_flags: (u32::from_be(w.l4[3]) >> 16) as u8,
    };
    let port = state::exception_out(t, s, &flow, &w.inner, w.inner_port, may_open)?;
    w.external = s.mapping.exception_addr;
    w.external_port = u32::from(port);
    Ok(Step::Next)
}

/// Third step: the packet becomes IPv4, or turns back to a pod.
#[inline(always)]
pub fn write<P: Packet, T: Tables>(
    p: &mut P,
    t: &mut T,
    s: &Settings,
    w: &Work,
) -> Result<Step, Reason> {
    let h = &w.header;
    let proto = w.proto;
    if proto == number::TCP {
        clamp_mss(p, w.at, w.l4[3], s.mtu)?;
    }
    if s.mapping.pool.index(u32::from_be(h[9])).is_some() {
        return super::hairpin::turn(p, t, s, w);
    }
    if w.fragment & 1 != 0 {
        let seen = t.now();
        let addr = [0, 0, 0, w.external.to_be()];
        t.fragment_put(&fragment_key(s, w), &Fragment { addr, seen });
        t.count(Counter::Fragment);
    }
    let total4 = w.len + FOUR;
    let id = if w.fragmented != 0 {
        id_and_fragment(w)
    } else if total4 > DF_ABOVE {
        0x4000
    } else {
        t.random() << 16
    };
    let (from, dst) = (w.external.to_be(), h[9]);
    let class = (u32::from_be(h[0]) >> 20) & 0xff;
    let hop = u32::from_be(h[1]) & 0xff;
    let new = header4(class, total4, id, hop - 1, proto, from, dst);
    let gone = addresses(h);
    replace(p, w.at, &new)?;
    if proto == number::ICMP4 {
        echo(p, w, gone)?;
    } else {
        let word = ports(w.external_port as u16, w.remote_port as u16);
        need(p.store(FOUR, &[word]))?;
        let (at, udp) = if proto == number::UDP {
            (FOUR + 6, true)
        } else {
            (FOUR + 16, false)
        };
        let pseudo = sum::delta(sum::add(from, dst), gone);
        need(p.fix_checksum(at, pseudo, true, udp))?;
        need(p.fix_checksum(at, sum::delta(word, w.l4[0]), false, udp))?;
    }
    t.count(Counter::SixToFour);
    Ok(Step::Done(Verdict::Send))
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
fn echo<P: Packet>(p: &mut P, w: &Work, addresses: u32) -> Result<(), Reason> {
    let new_type: u32 = if w.kind == ECHO_REQUEST { 8 } else { 0 };
    let w0 = (new_type << 24).to_be() | w.l4[0] & 0x0000_ffffu32.to_be();
    let w1 = (w.external_port << 16).to_be() | w.l4[1] & 0x0000_ffffu32.to_be();
    need(p.store(FOUR, &[w0, w1]))?;
    // ICMPv4's checksum has no pseudo-header: the whole of ICMPv6's goes.
    let gone = sum::add(addresses, pseudo_icmp6(w.len));
    need(p.fix_checksum(FOUR + 2, sum::delta(0, gone), true, false))?;
    let changed = sum::delta(sum::add(w0, w1), sum::add(w.l4[0], w.l4[1]));
    need(p.fix_checksum(FOUR + 2, changed, false, false))
}
