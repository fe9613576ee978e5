//! Which external transport address a flow has: computed for port blocks, looked up or made for exceptions.

use super::{Tables, number};
use crate::nat64::bib::{self, Bib4, Bib6, Session, SessionKey, Side, State};
use crate::nat64::{Counter, External, Settings};
use crate::reason::Reason;

/// How often an unchanged session's time is written: each packet would cost a map update.
const REFRESH: u64 = 1_000_000_000;

/// The IPv6 end of a flow.
pub(crate) struct Inner {
    /// Address, as it lies in memory.
    pub(crate) addr: [u32; 4],
    /// Port or identifier.
    pub(crate) port: u16,
}

/// What a session is about, besides the IPv6 end.
pub(crate) struct Flow {
    pub(crate) proto: u32,
    /// The IPv4 end, as it lies in memory.
    pub(crate) remote: u32,
    /// Its port, as a number; 0 for ICMP.
    pub(crate) remote_port: u16,
    /// The flags octet; 0 unless TCP.
    pub(crate) tcp_flags: u8,
}

/// The slot of an address under the pod prefix.
#[inline(always)]
pub(crate) fn slot(s: &Settings, addr: &[u32; 4]) -> Option<u32> {
    let under =
        addr[0] == s.pod_prefix[0] && addr[1] == s.pod_prefix[1] && addr[2] == s.pod_prefix[2];
    if under {
        Some(u32::from_be(addr[3]))
    } else {
        None
    }
}

/// The computed external address of an IPv6 end, if a block covers it.
#[inline(always)]
pub(crate) fn computed(s: &Settings, proto: u32, addr: &[u32; 4], port: u32) -> Option<External> {
    if proto == number::ICMP4 {
        return None;
    }
    s.mapping.forward(slot(s, addr)?, port as u16)
}

/// The computed IPv6 end of an external address.
#[inline(always)]
pub(crate) fn computed_back(s: &Settings, proto: u32, external: External) -> Option<Inner> {
    if proto == number::ICMP4 {
        return None;
    }
    let (slot, port) = s.mapping.reverse(external.addr, external.port)?;
    Some(Inner {
        addr: [
            s.pod_prefix[0],
            s.pod_prefix[1],
            s.pod_prefix[2],
            slot.to_be(),
        ],
        port,
    })
}

/// The external address of an IPv6 end, without making or refreshing anything: for ICMP errors.
#[inline(always)]
pub(crate) fn peek_out<T: Tables>(
    t: &T,
    s: &Settings,
    proto: u32,
    inner: &Inner,
) -> Option<External> {
    if let Some(e) = computed(s, proto, &inner.addr, u32::from(inner.port)) {
        return Some(e);
    }
    let found = t.bib6(&key6(proto, &inner.addr, inner.port))?;
    Some(External {
        addr: s.mapping.exception_addr,
        port: found.port,
    })
}

/// The IPv6 end of an external address, likewise.
#[inline(always)]
pub(crate) fn peek_in<T: Tables>(
    t: &T,
    s: &Settings,
    proto: u32,
    external: External,
) -> Option<Inner> {
    if external.addr != s.mapping.exception_addr {
        return computed_back(s, proto, external);
    }
    let found = t.bib4(&key4(proto, external.port))?;
    Some(Inner {
        addr: found.addr,
        port: found.port,
    })
}

/// The external port of a packet from IPv6 that no block covers: its BIB entry, made if `may_open`, and its session kept.
#[inline(always)]
pub(crate) fn exception_out<T: Tables>(
    t: &mut T,
    s: &Settings,
    flow: &Flow,
    addr: &[u32; 4],
    inner_port: u32,
    may_open: bool,
) -> Result<u16, Reason> {
    let key = key6(flow.proto, addr, inner_port as u16);
    let port = match t.bib6(&key) {
        Some(found) => found.port,
        None if may_open => open(t, s, flow, &key)?,
        None => return Err(Reason::Nat64NoMapping),
    };
    keep(t, flow, port, Side::Six)?;
    t.count(Counter::Exception);
    Ok(port)
}

/// The IPv6 end for a packet from IPv4 to the exceptions' address, its session kept.
#[inline(always)]
pub(crate) fn exception_in<T: Tables>(t: &mut T, flow: &Flow, port: u16) -> Result<Inner, Reason> {
    let found = t
        .bib4(&key4(flow.proto, port))
        .ok_or(Reason::Nat64NoReverse)?;
    keep(t, flow, port, Side::Four)?;
    t.count(Counter::Exception);
    Ok(Inner {
        addr: found.addr,
        port: found.port,
    })
}

/// Takes a free port of the slice.
#[inline(always)]
fn open<T: Tables>(t: &mut T, s: &Settings, flow: &Flow, key: &Bib6) -> Result<u16, Reason> {
    if flow.proto == number::TCP && State::tcp_open(Side::Six, flow.tcp_flags).is_none() {
        return Err(Reason::Nat64NoMapping);
    }
    let start = t.random();
    for i in 0..bib::PORT_TRIES {
        let port =
            (s.mapping.slice_first + start.wrapping_add(i) % s.mapping.slice_count.max(1)) as u16;
        let candidate = key4(flow.proto, port);
        if !t.bib4_add(&candidate, key) {
            continue;
        }
        if t.bib6_add(key, &candidate) {
            t.count(Counter::BibCreated);
            return Ok(port);
        }
        // Another processor was first with the same flow, or the table is full.
        t.bib4_remove(&candidate);
        return t
            .bib6(key)
            .map(|other| other.port)
            .ok_or(Reason::Nat64NoMapping);
    }
    Err(Reason::Nat64NoMapping)
}

/// Opens, advances or refreshes a session (RFC 6146 §3.5).
#[inline(always)]
fn keep<T: Tables>(t: &mut T, flow: &Flow, port: u16, side: Side) -> Result<(), Reason> {
    let tcp_flags = flow.tcp_flags;
    let key = SessionKey {
        remote: flow.remote,
        remote_port: flow.remote_port,
        port,
        proto: flow.proto,
    };
    let now = t.now();
    let tcp = key.proto == number::TCP;
    // Nobody outside can fill the table (RFC 6146 §5.3): what comes unasked to a port that is open gets in, but only what goes out
    // makes a session. Of TCP a SYN does, for six seconds.
    // Plain values instead of an Option: the verifier refuses registers that only one arm has set.
    let (known, was, until) = match t.session(&key) {
        Some(o) if !o.expired(now) => (true, o.state, o.until),
        _ => (false, 0, 0),
    };
    if !known && !tcp && matches!(side, Side::Four) {
        return Ok(());
    }
    let (state, refresh) = if !tcp {
        let only = if key.proto == number::UDP {
            State::Udp
        } else {
            State::Icmp
        };
        (only, true)
    } else if known {
        State::from_stored(was).tcp_next(side, tcp_flags)
    } else {
        let first = State::tcp_open(side, tcp_flags).ok_or(Reason::Nat64NoMapping)?;
        (first, true)
    };
    let new = Session {
        until: if refresh {
            now + state.timeout()
        } else {
            until
        },
        state: state as u32,
        pad: 0,
    };
    if known && new.state == was && new.until.wrapping_sub(until) < REFRESH {
        return Ok(());
    }
    if t.session_put(&key, &new) {
        Ok(())
    } else {
        Err(Reason::FlowTableFull)
    }
}

#[inline(always)]
fn key6(proto: u32, addr: &[u32; 4], port: u16) -> Bib6 {
    Bib6 {
        addr: *addr,
        port,
        proto: proto as u8,
        pad: 0,
    }
}

#[inline(always)]
fn key4(proto: u32, port: u16) -> Bib4 {
    Bib4 {
        port,
        proto: proto as u8,
        pad: 0,
    }
}
