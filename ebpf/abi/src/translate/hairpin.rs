//! From pod to pod through the pool (RFC 6146 §3.8): both translations at once, the packet stays IPv6.

use super::state;
use super::{Packet, SIX, Tables, header6, need, number, ports, sum, under_pref64};
use crate::nat64::{Counter, External, Settings};
use crate::reason::Reason;

/// Rewrites a TCP or UDP packet without extension headers. `word`: its ports.
#[inline(always)]
pub(super) fn turn<P: Packet, T: Tables>(
    p: &mut P,
    t: &mut T,
    s: &Settings,
    h: &[u32; 10],
    proto: u32,
    word: u32,
    tcp_flags: u8,
    external: External,
) -> Result<(), Reason> {
    let target = External {
        addr: u32::from_be(h[9]),
        port: u32::from_be(word) as u16,
    };
    let from = external.addr.to_be();
    let inner = if target.addr == s.mapping.exception_addr {
        state::exception_in(t, proto, target.port, from, external.port, tcp_flags)?
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
    let new_word = ports(external.port, inner.port);
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
    Ok(())
}
