//! Which backend: one choice from a published view, and the clients that must be given the same one again.

use super::steer::Maps;
use super::{AffinityKey, AffinityValue, Backend, FlowKey, ServiceValue, VIEWS, View, state};
use crate::{Addr, Port};

/// How many slots are looked at before a service counts as having no endpoint. Slots hold dead backends only between a death
/// and the next publication.
pub const PROBES: u32 = 4;

/// A chosen backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chosen {
    /// Its id.
    pub id: u32,
    /// Its generation.
    pub generation: u32,
    /// Its address.
    pub addr: Addr,
    /// Its port.
    pub port: Port,
}

impl Chosen {
    #[inline(always)]
    pub(super) fn new(id: u32, backend: &Backend) -> Self {
        Chosen {
            id,
            generation: backend.generation,
            addr: backend.addr,
            port: backend.port,
        }
    }
}

/// Why there is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoBackend {
    /// The view is empty.
    Empty,
    /// The view is not, but no slot that was looked at has a live backend.
    Stale,
}

/// A number that depends on nothing but the tuple: while a view stays as it is, a flow whose record is lost finds its
/// backend again.
#[inline(always)]
pub fn hash(tuple: &FlowKey) -> u32 {
    let (s, d) = (&tuple.src.0, &tuple.dst.0);
    let mut h = 0x9e37_79b9u32;
    let mut i = 0;
    while i < 4 {
        h = mix(h, s[i].to_le());
        h = mix(h, d[i].to_le());
        i += 1;
    }
    h = mix(
        h,
        u32::from(tuple.sport.get()) << 16 | u32::from(tuple.dport.get()),
    );
    // Finalizer of MurmurHash3: every input bit reaches the high bits, which choose the slot.
    h ^= h >> 16;
    h = h.wrapping_mul(0x85eb_ca6b);
    h ^= h >> 13;
    h = h.wrapping_mul(0xc2b2_ae35);
    h ^ h >> 16
}

#[inline(always)]
fn mix(h: u32, word: u32) -> u32 {
    (h ^ word).wrapping_mul(0xcc9e_2d51).rotate_left(15)
}

/// The identity of a client at connect(): its network namespace, in the discard-only prefix 100::/64 (RFC 6666).
#[inline(always)]
pub const fn netns_client(cookie: u64) -> Addr {
    discarded(cookie)
}

/// A socket as the source of a flow, in the same prefix: the direction of its records says that it is no namespace.
#[inline(always)]
pub const fn socket_client(cookie: u64) -> Addr {
    discarded(cookie)
}

#[inline(always)]
const fn discarded(cookie: u64) -> Addr {
    let c = cookie.to_be_bytes();
    Addr([
        u32::from_ne_bytes([1, 0, 0, 0]),
        0,
        u32::from_ne_bytes([c[0], c[1], c[2], c[3]]),
        u32::from_ne_bytes([c[4], c[5], c[6], c[7]]),
    ])
}

/// Chooses from the view `kind` of `service`; `seed` decides which.
///
/// A draining backend is taken when no active one is found: a terminating endpoint that still serves is better than a refusal.
#[inline(always)]
pub fn select<M: Maps>(
    maps: &M,
    service: &ServiceValue,
    kind: u8,
    seed: u32,
) -> Result<Chosen, NoBackend> {
    let view = View::unpack(maps.view(view_index(service, kind)));
    let count = u32::from(view.count);
    if count == 0 {
        return Err(NoBackend::Empty);
    }
    let first = ((u64::from(seed) * u64::from(count)) >> 32) as u32;
    let mut draining = None;
    let mut probe = 0;
    while probe < PROBES && probe < count {
        let mut slot = first + probe;
        if slot >= count {
            slot -= count;
        }
        probe += 1;
        let Some(id) = maps.slot(view.base.wrapping_add(slot)) else {
            continue;
        };
        let Some(backend) = maps.backend(id) else {
            continue;
        };
        if backend.state == state::ACTIVE {
            return Ok(Chosen::new(id, backend));
        }
        if backend.state == state::DRAINING && draining.is_none() {
            draining = Some((id, backend));
        }
    }
    match draining {
        Some((id, backend)) => Ok(Chosen::new(id, backend)),
        None => Err(NoBackend::Stale),
    }
}

/// [`select`], with ClientIP affinity where the service has it.
#[inline(always)]
pub fn select_for<M: Maps>(
    maps: &mut M,
    service: &ServiceValue,
    kind: u8,
    client: Addr,
    seed: u32,
    now: u64,
) -> Result<Chosen, NoBackend> {
    if service.affinity_secs == 0 {
        return select(maps, service, kind, seed);
    }
    let key = AffinityKey {
        client,
        view: view_index(service, kind),
    };
    let mut chosen = None;
    if let Some(held) = maps.affinity(&key)
        && now.wrapping_sub(held.seen) < u64::from(service.affinity_secs) * 1_000_000_000
        && let Some(backend) = maps.backend(held.backend)
        && backend.generation == held.generation
        && backend.state == state::ACTIVE
    {
        chosen = Some(Chosen::new(held.backend, backend));
    }
    let chosen = match chosen {
        Some(chosen) => chosen,
        None => select(maps, service, kind, seed)?,
    };
    maps.put_affinity(
        &key,
        &AffinityValue {
            backend: chosen.id,
            generation: chosen.generation,
            seen: now,
        },
    );
    Ok(chosen)
}

/// Where a view of a service is in `views`.
#[inline(always)]
pub fn view_index(service: &ServiceValue, kind: u8) -> u32 {
    service
        .service
        .wrapping_mul(VIEWS)
        .wrapping_add(u32::from(kind) & (VIEWS - 1))
}
