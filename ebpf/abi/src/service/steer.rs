//! What each hook decides about a packet, and about a connect().
//!
//! | hook | sees | does |
//! |---|---|---|
//! | [`from_pod`] | what a pod sends | service address → backend; a pod that is its own backend gets the packet back |
//! | [`to_client`] | what reaches a pod, or leaves the uplink | backend's reply → from the service address |
//! | [`from_uplink`] | what comes from outside | external service address → backend, by the external view |
//! | [`connect`] | a socket's destination | service address → backend |
//! | [`send`] | a datagram's destination, of a socket of the node itself | service address → backend |
//! | [`receive`] | a datagram's source, at such a socket | backend → service address |
//!
//! A flow has one record per direction, each naming the other end's rewriting. Either may be lost (the table is an LRU: a full
//! one must not stop new flows, and a flow that it forgets is found again, because the choice depends on the tuple alone):
//! a lost forward record is chosen anew, a lost reverse record is put back by the client's next packet that comes
//! [`REFRESH_NS`] or later after the last refresh.
//!
//! Of the backend's answers, tuple and record are one: a client that reaches one backend by two frontends from one port (VIPs 80
//! and 443 with one target port, say) would have two flows with one reverse record. The later flow gets another client port
//! on its way to the backend, which both records name; [`PORTS`] are tried.
//!
//! A socket has records like a flow, in directions of their own, with the socket in the place of the client: its datagrams keep a
//! backend for as long as that lives. Its port cannot be changed, so that of two frontends with one backend the answers are taken
//! for those of the frontend that the socket has sent to last.
//!
//! Hairpin: to a pod that is chosen as its own backend the packet comes from [`HAIRPIN_V4`] or [`HAIRPIN_V6`], since neither
//! family's stack takes a packet from its own address off a wire. Its replies leave by its default route and so come back to
//! this hook, where they get the service's address again. Such packets never enter the node's stack.

use super::packet::{Headers, Packet, Parsed, TCP, parse, rewrite, tcp};
use super::select::{Chosen, NoBackend, hash, select_for};
use super::{
    AffinityKey, AffinityValue, Backend, FlowKey, FlowValue, Scope, ServiceKey, ServiceValue, flow,
};
use crate::reason::Reason;
use crate::{Addr, Port};

/// Whom a pod sees that talks to itself: its IPv4 next hop, which it has no other business with.
pub const HAIRPIN_V4: Addr = Addr::v4([169, 254, 1, 1]);
/// The same in IPv6: 100::1, of the discard-only prefix (RFC 6666). Not the next hop, which is link-local: a socket that is
/// bound to no address would answer it from the pod's own link-local address (RFC 6724 §5, rule 2), which is in no record.
pub const HAIRPIN_V6: Addr = Addr::v6([1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);

/// A flow's time is written at most this often: a store to a shared cache line for each packet would be dearer than the look-up.
pub const REFRESH_NS: u64 = 1_000_000_000;

/// Client ports that are tried for a flow whose own one is taken at the backend; then its packet is dropped as if the table were
/// full.
pub const PORTS: u32 = 4;
/// They are from here to 65535.
const FIRST_PORT: u32 = 1 << 15;

/// Access to the maps.
pub trait Maps {
    /// From `services`.
    fn service(&self, key: &ServiceKey) -> Option<&ServiceValue>;
    /// From `views`; 0 when there is none.
    fn view(&self, index: u32) -> u64;
    /// From `slots`.
    fn slot(&self, index: u32) -> Option<u32>;
    /// From `backends`.
    fn backend(&self, id: u32) -> Option<&Backend>;
    /// From `flows`.
    fn flow(&self, key: &FlowKey) -> Option<&FlowValue>;
    /// Sets time and, when `closing`, the end mark of a flow's record; nothing if there is none.
    fn touch_flow(&mut self, key: &FlowKey, now: u64, closing: bool);
    /// Puts a flow's record; false: no room.
    fn put_flow(&mut self, key: &FlowKey, value: &FlowValue) -> bool;
    /// From `affinity`.
    fn affinity(&self, key: &AffinityKey) -> Option<&AffinityValue>;
    /// Puts an affinity; not to find room is no fault.
    fn put_affinity(&mut self, key: &AffinityKey, value: &AffinityValue);
    /// Counts a drop.
    fn count(&mut self, reason: Reason);
    /// CLOCK_BOOTTIME in nanoseconds.
    fn now(&self) -> u64;
}

/// What becomes of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Goes its way, rewritten or not.
    Pass,
    /// Ends here; counted.
    Drop,
    /// Goes back out of the interface that it came in by.
    Bounce,
    /// Ends here; the sender is told that the port is unreachable, as far as [`Pace`](super::Pace) lets it. Counted.
    Unreachable,
}

/// A packet that a pod sends.
#[inline(always)]
pub fn from_pod<P: Packet, M: Maps>(packet: &mut P, maps: &mut M) -> Verdict {
    let mut headers = match parse(packet) {
        Parsed::Ours(headers) => headers,
        Parsed::Other => return Verdict::Pass,
        Parsed::Malformed => return drop(maps, Reason::Malformed),
    };
    if headers.tuple.dst.same(&HAIRPIN_V6) || headers.tuple.dst.same(&HAIRPIN_V4) {
        headers.tuple.dir = flow::HAIRPIN;
        return answer(packet, maps, &headers);
    }
    match maps.service(&service_key(&headers.tuple)).copied() {
        // A pod's loopback address is its own, and on a wire it is nobody's.
        Some(service) if service.scope != Scope::HostLoopback as u8 => forward(
            packet,
            maps,
            &headers,
            &service,
            service.internal_view,
            true,
        ),
        _ => Verdict::Pass,
    }
}

/// A packet that comes from outside the node.
#[inline(always)]
pub fn from_uplink<P: Packet, M: Maps>(packet: &mut P, maps: &mut M) -> Verdict {
    let headers = match parse(packet) {
        Parsed::Ours(headers) => headers,
        Parsed::Other => return Verdict::Pass,
        Parsed::Malformed => return drop(maps, Reason::Malformed),
    };
    match maps.service(&service_key(&headers.tuple)).copied() {
        // A ClusterIP is for the cluster's own: nobody outside has a route that leads it here rightfully.
        Some(service)
            if service.scope != Scope::Cluster as u8
                && service.scope != Scope::HostLoopback as u8 =>
        {
            forward(
                packet,
                maps,
                &headers,
                &service,
                service.external_view,
                false,
            )
        }
        _ => Verdict::Pass,
    }
}

/// A packet on its way to a client: into a pod, or out of the uplink.
#[inline(always)]
pub fn to_client<P: Packet, M: Maps>(packet: &mut P, maps: &mut M) -> Verdict {
    // What is malformed here came through the node's own stack; it is none of ours to judge.
    let Parsed::Ours(mut headers) = parse(packet) else {
        return Verdict::Pass;
    };
    headers.tuple.dir = flow::REVERSE;
    answer(packet, maps, &headers)
}

/// What connect() is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Connect {
    /// As the program asked: no service.
    Untouched,
    /// Go to this backend.
    To(Chosen),
    /// Fail with ECONNREFUSED. Counted.
    Refuse,
}

/// A TCP socket's destination. `client` names who connects (for affinity); `seed` is random.
#[inline(always)]
pub fn connect<M: Maps>(maps: &mut M, service: &ServiceValue, client: Addr, seed: u32) -> Connect {
    // The time is needed for affinity alone; the branch spares the others a helper call.
    let now = if service.affinity_secs == 0 {
        0
    } else {
        maps.now()
    };
    match select_for(maps, service, service.internal_view, client, seed, now) {
        Ok(chosen) => Connect::To(chosen),
        Err(none) => {
            maps.count(reason(none));
            Connect::Refuse
        }
    }
}

/// A datagram that an unconnected socket of the node itself sends to the frontend `to`. `client` is as for [`connect`].
#[inline(always)]
pub fn send<M: Maps>(
    maps: &mut M,
    to: &ServiceKey,
    service: &ServiceValue,
    socket: Addr,
    client: Addr,
) -> Connect {
    let key = FlowKey {
        src: socket,
        dst: to.addr,
        sport: Port(0),
        dport: to.port,
        proto: to.proto,
        dir: flow::SOCKET,
        pad: 0,
    };
    let now = maps.now();
    let mut held = None;
    let mut refresh = true;
    if let Some(record) = maps.flow(&key)
        && let Some(backend) = maps.backend(record.backend)
        && backend.generation == record.generation
    {
        refresh = due(record, now);
        held = Some(Chosen::new(record.backend, backend));
    }
    let chosen = match held {
        Some(chosen) => chosen,
        None => match select_for(
            maps,
            service,
            service.internal_view,
            client,
            hash(&key),
            now,
        ) {
            Ok(chosen) => chosen,
            Err(none) => {
                maps.count(reason(none));
                return Connect::Refuse;
            }
        },
    };
    let back = answers_to(socket, chosen.addr, chosen.port, to.proto);
    let named = match maps.flow(&back) {
        Some(record) => {
            record.addr.same(&to.addr)
                && record.port.0 == to.port.0
                && record.generation == chosen.generation
                && record.backend == chosen.id
        }
        None => false,
    };
    if refresh || !named {
        let mut value = FlowValue {
            addr: chosen.addr,
            port: chosen.port,
            closing: 0,
            pad: 0,
            backend: chosen.id,
            generation: chosen.generation,
            client: Port(0),
            pad2: 0,
            seen: now,
        };
        let mut room = maps.put_flow(&key, &value);
        value.addr = to.addr;
        value.port = to.port;
        room &= maps.put_flow(&back, &value);
        if !room {
            maps.count(Reason::FlowTableFull);
            return Connect::Refuse;
        }
    }
    Connect::To(chosen)
}

/// Whose answer a datagram is that a socket of the node itself gets from `from`: the frontend; `None`: as it says.
#[inline(always)]
pub fn receive<M: Maps>(
    maps: &M,
    socket: Addr,
    from: Addr,
    port: Port,
    proto: u8,
) -> Option<(Addr, Port)> {
    let held = maps.flow(&answers_to(socket, from, port, proto))?;
    alive(maps, held).then_some((held.addr, held.port))
}

/// The record of a backend's answers to a socket.
#[inline(always)]
fn answers_to(socket: Addr, backend: Addr, port: Port, proto: u8) -> FlowKey {
    FlowKey {
        src: backend,
        dst: socket,
        sport: port,
        dport: Port(0),
        proto,
        dir: flow::SOCKET_REVERSE,
        pad: 0,
    }
}

#[inline(always)]
fn forward<P: Packet, M: Maps>(
    packet: &mut P,
    maps: &mut M,
    headers: &Headers,
    service: &ServiceValue,
    view: u8,
    from_pod: bool,
) -> Verdict {
    if headers.fragment {
        return drop(maps, Reason::Fragment);
    }
    let key = &headers.tuple;
    let now = maps.now();
    // A SYN that reuses the tuple of an ended connection is a new one.
    let fresh = key.proto == TCP && headers.flags & (tcp::SYN | tcp::ACK) == tcp::SYN;
    // The tuple of the backend's answers; it also says what this packet becomes.
    let mut pair = FlowKey {
        dst: key.src,
        dport: key.sport,
        dir: flow::REVERSE,
        ..*key
    };
    let mut known = false;
    let mut closing = ends(headers);
    let mut refresh = closing;
    let mut id = 0;
    let mut generation = 0;
    if let Some(held) = maps.flow(key)
        && !(fresh && held.closing != 0)
        && alive(maps, held)
    {
        known = true;
        refresh |= due(held, now);
        closing |= held.closing != 0;
        (id, generation) = (held.backend, held.generation);
        (pair.src, pair.sport) = (held.addr, held.port);
        if held.client.0 != 0 {
            pair.dport = held.client;
        }
    }
    if !known {
        match select_for(maps, service, view, key.src, hash(key), now) {
            Ok(chosen) => {
                (id, generation) = (chosen.id, chosen.generation);
                (pair.src, pair.sport) = (chosen.addr, chosen.port);
            }
            Err(none) => {
                maps.count(reason(none));
                return Verdict::Unreachable;
            }
        }
    }
    let hairpin = from_pod && pair.src.same(&key.src);
    if hairpin {
        pair.dir = flow::HAIRPIN;
        pair.dst = if headers.v6 { HAIRPIN_V6 } else { HAIRPIN_V4 };
    }
    if !known && !free_port(maps, key, &mut pair) {
        return drop(maps, Reason::FlowTableFull);
    }
    if !known || refresh {
        let moved = pair.dport.0 != key.sport.0;
        let mut value = FlowValue {
            addr: pair.src,
            port: pair.sport,
            closing: closing as u8,
            pad: 0,
            backend: id,
            generation,
            client: if moved { pair.dport } else { Port(0) },
            pad2: 0,
            seen: now,
        };
        let mut room = true;
        if known {
            maps.touch_flow(key, now, closing);
        } else {
            room = maps.put_flow(key, &value);
        }
        value.addr = key.dst;
        value.port = key.dport;
        if moved {
            value.client = key.sport;
        }
        // Also of a known flow: here a reverse record that the table has forgotten comes back.
        room &= maps.put_flow(&pair, &value);
        if !room {
            return drop(maps, Reason::FlowTableFull);
        }
    }
    finish(
        packet,
        maps,
        headers,
        &pair,
        if hairpin {
            Verdict::Bounce
        } else {
            Verdict::Pass
        },
    )
}

/// Makes `pair`, the tuple of the answers to `key`, one that no other flow has, by the client's port; false: none was found.
#[inline(always)]
fn free_port<M: Maps>(maps: &M, key: &FlowKey, pair: &mut FlowKey) -> bool {
    let seed = hash(key);
    let mut tried = 0;
    while tried <= PORTS {
        let Some(held) = maps.flow(pair) else {
            return true;
        };
        let client = if held.client.0 == 0 {
            pair.dport
        } else {
            held.client
        };
        let own = client.0 == key.sport.0 && held.addr.same(&key.dst) && held.port.0 == key.dport.0;
        if own || !alive(maps, held) {
            return true;
        }
        let port = FIRST_PORT | (seed >> (tried * 4)) & (FIRST_PORT - 1);
        pair.dport = Port::new(port as u16);
        tried += 1;
    }
    false
}

/// A backend's packet to its client, whose reverse or hairpin record `headers.tuple` may be.
#[inline(always)]
fn answer<P: Packet, M: Maps>(packet: &mut P, maps: &mut M, headers: &Headers) -> Verdict {
    let key = &headers.tuple;
    let hairpin = key.dir == flow::HAIRPIN;
    let Some(held) = maps.flow(key) else {
        return Verdict::Pass;
    };
    if !alive(maps, held) {
        return Verdict::Pass;
    }
    // The client's own tuple: the record of the forward direction.
    let pair = FlowKey {
        src: if hairpin { key.src } else { key.dst },
        dst: held.addr,
        sport: if held.client.0 == 0 {
            key.dport
        } else {
            held.client
        },
        dport: held.port,
        dir: flow::FORWARD,
        ..*key
    };
    let now = maps.now();
    if due(held, now) || ends(headers) {
        maps.touch_flow(key, now, ends(headers));
        maps.touch_flow(&pair, now, ends(headers));
    }
    finish(
        packet,
        maps,
        headers,
        &pair,
        if hairpin {
            Verdict::Bounce
        } else {
            Verdict::Pass
        },
    )
}

#[inline(always)]
fn finish<P: Packet, M: Maps>(
    packet: &mut P,
    maps: &mut M,
    headers: &Headers,
    answer: &FlowKey,
    verdict: Verdict,
) -> Verdict {
    match rewrite(packet, headers, answer) {
        Some(()) => verdict,
        None => drop(maps, Reason::Rewrite),
    }
}

#[inline(always)]
fn drop<M: Maps>(maps: &mut M, reason: Reason) -> Verdict {
    maps.count(reason);
    Verdict::Drop
}

/// The generation that the flow was made with is still the backend's.
#[inline(always)]
fn alive<M: Maps>(maps: &M, held: &FlowValue) -> bool {
    match maps.backend(held.backend) {
        Some(backend) => backend.generation == held.generation,
        None => false,
    }
}

#[inline(always)]
fn due(held: &FlowValue, now: u64) -> bool {
    now.wrapping_sub(held.seen) >= REFRESH_NS
}

#[inline(always)]
fn ends(headers: &Headers) -> bool {
    headers.flags & (tcp::FIN | tcp::RST) != 0
}

#[inline(always)]
fn reason(none: NoBackend) -> Reason {
    match none {
        NoBackend::Empty => Reason::NoEndpoint,
        NoBackend::Stale => Reason::StaleBackend,
    }
}

/// The frontend that a packet is for.
#[inline(always)]
pub fn service_key(tuple: &FlowKey) -> ServiceKey {
    ServiceKey {
        addr: tuple.dst,
        port: tuple.dport,
        proto: tuple.proto,
        pad: 0,
    }
}
