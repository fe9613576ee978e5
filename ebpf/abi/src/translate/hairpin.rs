//! From pod to pod through the pool (RFC 6146 §3.8): both translations at once, the packet stays IPv6.

use super::state;
use super::{
    Packet, SIX, Step, Tables, Verdict, Work, header6, need, number, ports, sum, under_pref64,
};
use crate::nat64::{Counter, External, Settings};
use crate::reason::Reason;

/// Rewrites a TCP or UDP packet without extension headers.
#[inline(always)]
pub(super) fn turn<P: Packet, T: Tables>(
    p: &mut P,
    t: &mut T,
    s: &Settings,
    w: &Work,
) -> Result<Step, Reason> {
    let h = &w.header;
    let proto = w.proto;
    if w.at != SIX || proto == number::ICMP4 {
        return Err(Reason::Nat64NoReverse);
    }
    let target = External {
        addr: u32::from_be(h[9]),
        port: w.remote_port as u16,
    };
    let from = w.external.to_be();
    let inner = if target.addr == s.mapping.exception_addr {
        let flow = state::Flow {
            proto,
            remote: from,
            remote_port: w.external_port as u16,
            tcp_flags: (u32::from_be(w.l4[3]) >> 16) as u8,
        };
        state::exception_in(t, &flow, target.port)?
    } else {
        state::computed_back(s, proto, target).ok_or(Reason::Nat64NoReverse)?
    };
    let (class, w1) = ((u32::from_be(h[0]) >> 20) & 0xff, u32::from_be(h[1]));
    let new = header6(
        class,
        w1 >> 16,
        proto,
        (w1 & 0xff) - 1,
        under_pref64(s, from),
        inner.addr,
    );
    let word = w.l4[0];
    let new_word = ports(w.external_port as u16, inner.port);
    need(p.store(0, &new) && p.store(SIX, &[new_word]))?;
    let old_sum = sum::of(&[h[2], h[3], h[4], h[5], h[6], h[7], h[8], h[9]]);
    let new_sum = sum::of(&[
        new[2], new[3], new[4], new[5], new[6], new[7], new[8], new[9],
    ]);
    let (at, udp) = if proto == number::UDP {
        (SIX + 6, true)
    } else {
        (SIX + 16, false)
    };
    need(p.fix_checksum(at, sum::delta(new_sum, old_sum), true, udp))?;
    need(p.fix_checksum(at, sum::delta(new_word, word), false, udp))?;
    t.count(Counter::Hairpin);
    Ok(Step::Done(Verdict::Send))
}
