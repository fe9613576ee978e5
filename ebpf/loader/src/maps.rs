//! The service dataplane's maps, typed.
//!
//! `views`, `slots` and `backends` are written through memory: a publication is one 64-bit store. The order that keeps readers
//! right is the caller's (write slots and backends, then publish; recycle after [`ServiceMaps::grace`]); the stores themselves
//! are release stores in program order.

use std::collections::HashSet;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::fence;
use std::time::Duration;

use kun_ebpf_abi::service::{
    AffinityKey, AffinityValue, Backend, FlowKey, FlowValue, Pace, PeerValue, ServiceKey,
    ServiceValue, VIEWS, View, ViewKind, packet::TCP, state,
};
use kun_ebpf_abi::{Addr, Port};

use crate::object::Object;
use crate::pins::MapSpec;
use crate::service::ServiceConfig;
use crate::sys::{self, Grace, Mapped, map_flag, map_type};
use crate::{Error, REASONS_MAP};

/// How long an established TCP flow that the node translates packet by packet may be silent: RFC 5382 REQ-5 (2 h 4 min).
const TCP_IDLE: Duration = Duration::from_secs(7440);

/// Opted-out cgroups at most: one for each of the pods that a node can run, several times over.
const MAX_OPTED_OUT: u32 = 4096;

pub(crate) fn specs(config: &ServiceConfig) -> Vec<MapSpec> {
    let spec = |name, map_type, key, value, flags, max_entries| MapSpec {
        name,
        map_type,
        key,
        value,
        flags,
        max_entries,
    };
    let array =
        |name, value, entries| spec(name, map_type::ARRAY, 4, value, map_flag::MMAPABLE, entries);
    vec![
        spec(
            "services",
            map_type::HASH,
            size_of::<ServiceKey>(),
            size_of::<ServiceValue>(),
            map_flag::NO_PREALLOC,
            config.max_services,
        ),
        array("views", 8, config.max_services.saturating_mul(VIEWS)),
        array("slots", 8, config.max_slots.div_ceil(2)),
        array("backends", size_of::<Backend>(), config.max_backends),
        spec(
            "flows",
            map_type::LRU_HASH,
            size_of::<FlowKey>(),
            size_of::<FlowValue>(),
            0,
            config.max_flows,
        ),
        spec(
            "affinity",
            map_type::LRU_HASH,
            size_of::<AffinityKey>(),
            size_of::<AffinityValue>(),
            0,
            config.max_flows,
        ),
        spec(
            "peers",
            map_type::LRU_HASH,
            size_of::<u64>(),
            size_of::<PeerValue>(),
            0,
            config.max_flows,
        ),
        spec(
            "opted_out",
            map_type::HASH,
            8,
            1,
            map_flag::NO_PREALLOC,
            MAX_OPTED_OUT,
        ),
        spec(
            REASONS_MAP,
            map_type::PERCPU_ARRAY,
            4,
            8,
            0,
            kun_ebpf_abi::reason::REASONS,
        ),
        spec(
            "answers",
            map_type::PERCPU_ARRAY,
            4,
            size_of::<Pace>(),
            0,
            1,
        ),
    ]
}

/// How many of each there can be, as the maps in the kernel say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacities {
    /// Frontends, and service ids below this number.
    pub services: u32,
    /// Slots.
    pub slots: u32,
    /// Backends.
    pub backends: u32,
    /// Flow records: two for each flow.
    pub flows: u32,
}

/// What [`ServiceMaps::expire_flows`] found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Expired {
    /// Records that stay.
    pub live: u64,
    /// Records removed.
    pub removed: u64,
}

/// Typed handles.
#[derive(Debug)]
pub struct ServiceMaps {
    services: OwnedFd,
    flows: OwnedFd,
    opted_out: OwnedFd,
    affinity: OwnedFd,
    views: Mapped,
    slots: Mapped,
    backends: Mapped,
    capacities: Capacities,
    grace: Grace,
}

fn failed(map: &'static str, operation: &'static str) -> impl Fn(std::io::Error) -> Error {
    move |source| Error::Map {
        map,
        operation,
        source,
    }
}

impl ServiceMaps {
    pub(crate) fn open(object: &Object) -> Result<Self, Error> {
        let entries = |map: &'static str, fd: BorrowedFd<'_>| {
            sys::map_info(fd)
                .map(|i| i.max_entries)
                .map_err(failed(map, "info"))
        };
        let mapped = |map: &'static str, each: usize| -> Result<(Mapped, u32), Error> {
            let fd = object.map(map)?;
            let count = entries(map, fd.as_fd())?;
            let memory =
                Mapped::new(fd.as_fd(), count as usize * each).map_err(failed(map, "mmap"))?;
            Ok((memory, count))
        };
        let services = object.map("services")?;
        let flows = object.map("flows")?;
        let (views, view_count) = mapped("views", 8)?;
        let (slots, slot_pairs) = mapped("slots", 8)?;
        let (backends, backend_count) = mapped("backends", size_of::<Backend>())?;
        let capacities = Capacities {
            services: entries("services", services.as_fd())?.min(view_count / VIEWS),
            slots: slot_pairs.saturating_mul(2),
            backends: backend_count,
            flows: entries("flows", flows.as_fd())?,
        };
        Ok(ServiceMaps {
            services,
            flows,
            opted_out: object.map("opted_out")?,
            affinity: object.map("affinity")?,
            views,
            slots,
            backends,
            capacities,
            grace: Grace::new().map_err(failed("grace", "create"))?,
        })
    }

    /// How much fits.
    pub fn capacities(&self) -> Capacities {
        self.capacities
    }

    /// Makes an address, port and protocol lead to a service.
    pub fn upsert_service(&mut self, key: &ServiceKey, value: &ServiceValue) -> Result<(), Error> {
        sys::update(self.services.as_fd(), key, value).map_err(failed("services", "update"))
    }

    /// [`Self::upsert_service`] of many in one call.
    pub fn upsert_services(
        &mut self,
        keys: &[ServiceKey],
        values: &[ServiceValue],
    ) -> Result<(), Error> {
        sys::update_batch(self.services.as_fd(), keys, values).map_err(failed("services", "update"))
    }

    /// Removes a frontend; false: it was not there.
    pub fn remove_service(&mut self, key: &ServiceKey) -> Result<bool, Error> {
        sys::delete(self.services.as_fd(), key).map_err(failed("services", "delete"))
    }

    /// One frontend.
    pub fn service(&self, key: &ServiceKey) -> Result<Option<ServiceValue>, Error> {
        sys::lookup(self.services.as_fd(), key).map_err(failed("services", "look up"))
    }

    /// All frontends, in no order.
    pub fn services(&self) -> Result<Vec<(ServiceKey, ServiceValue)>, Error> {
        let mut all = Vec::new();
        sys::for_each_batch(
            self.services.as_fd(),
            |keys: &[ServiceKey], values: &[ServiceValue]| {
                all.extend(keys.iter().copied().zip(values.iter().copied()));
            },
        )
        .map_err(failed("services", "walk"))?;
        Ok(all)
    }

    fn view_at(&self, service: u32, kind: ViewKind) -> Result<usize, Error> {
        if service >= self.capacities.services {
            return Err(Error::Capacity {
                map: "views",
                index: service.into(),
                capacity: self.capacities.services.into(),
            });
        }
        Ok((service * VIEWS + kind as u32) as usize)
    }

    /// Publishes a backend set: one store. What it names must have been written before.
    pub fn publish(&mut self, service: u32, kind: ViewKind, view: View) -> Result<(), Error> {
        let at = self.view_at(service, kind)?;
        self.views.words64()[at].store(view.pack(), Release);
        Ok(())
    }

    /// What is published.
    pub fn view(&self, service: u32, kind: ViewKind) -> Result<View, Error> {
        let at = self.view_at(service, kind)?;
        Ok(View::unpack(self.views.words64()[at].load(Acquire)))
    }

    fn slot_range(&self, base: u32, count: usize) -> Result<std::ops::Range<usize>, Error> {
        let end = base as usize + count;
        if end > self.capacities.slots as usize {
            return Err(Error::Capacity {
                map: "slots",
                index: end as u64 - 1,
                capacity: self.capacities.slots.into(),
            });
        }
        Ok(base as usize..end)
    }

    /// Writes an extent. Readers of a published one see each slot's old or new content.
    pub fn write_slots(&mut self, base: u32, ids: &[u32]) -> Result<(), Error> {
        let range = self.slot_range(base, ids.len())?;
        for (word, id) in self.slots.words32()[range].iter().zip(ids) {
            word.store(*id, Release);
        }
        Ok(())
    }

    /// Reads an extent.
    pub fn slots(&self, base: u32, count: u16) -> Result<Vec<u32>, Error> {
        let range = self.slot_range(base, count.into())?;
        Ok(self.slots.words32()[range]
            .iter()
            .map(|w| w.load(Acquire))
            .collect())
    }

    fn backend_words(&self, id: u32) -> Result<&[std::sync::atomic::AtomicU32], Error> {
        const WORDS: usize = size_of::<Backend>() / 4;
        if id >= self.capacities.backends {
            return Err(Error::Capacity {
                map: "backends",
                index: id.into(),
                capacity: self.capacities.backends.into(),
            });
        }
        let at = id as usize * WORDS;
        Ok(&self.backends.words32()[at..at + WORDS])
    }

    /// Writes a backend's record. A reader meanwhile sees the old record, the new one, or one that takes no new flow.
    pub fn write_backend(&mut self, id: u32, backend: &Backend) -> Result<(), Error> {
        let words = self.backend_words(id)?;
        let new = to_words(backend);
        let old = from_words(&std::array::from_fn(|i| words[i].load(Acquire)));
        if (old.addr, old.port) != (backend.addr, backend.port) {
            // Nobody may choose the record while address and port are of two minds.
            let mut gone = old;
            gone.state = state::DEAD;
            words[STATE_WORD].store(to_words(&gone)[STATE_WORD], Release);
            fence(Release);
        }
        for (i, word) in words.iter().enumerate() {
            if i != STATE_WORD {
                word.store(new[i], Release);
            }
        }
        words[STATE_WORD].store(new[STATE_WORD], Release);
        Ok(())
    }

    /// A backend's record.
    pub fn backend(&self, id: u32) -> Result<Backend, Error> {
        let words = self.backend_words(id)?;
        Ok(from_words(&std::array::from_fn(|i| words[i].load(Acquire))))
    }

    /// Returns when no program can still hold what it read from a map before the call: extents and ids may be used again.
    pub fn grace(&self) -> Result<(), Error> {
        self.grace.wait().map_err(failed("grace", "update"))
    }

    /// Sockets of this cgroup (by its id, the inode of its directory) and below keep service addresses at connect(); their
    /// packets are translated at the pod's interface.
    pub fn opt_out(&mut self, cgroup: u64) -> Result<(), Error> {
        sys::update(self.opted_out.as_fd(), &cgroup, &1u8).map_err(failed("opted_out", "update"))
    }

    /// Undoes [`Self::opt_out`].
    pub fn opt_in(&mut self, cgroup: u64) -> Result<bool, Error> {
        sys::delete(self.opted_out.as_fd(), &cgroup).map_err(failed("opted_out", "delete"))
    }

    /// Removes flow records that were idle for too long (`udp_idle`; 2 h 4 min for open TCP connections, `udp_idle` for ended
    /// ones) or whose backend is gone. `now_ns`: CLOCK_BOOTTIME.
    ///
    /// A record that is used between the look and the removal is lost; its flow's next packet makes it again, with the same
    /// backend.
    pub fn expire_flows(&mut self, now_ns: u64, udp_idle: Duration) -> Result<Expired, Error> {
        let mut expired = Expired::default();
        let mut dead = Vec::new();
        let backends = &self.backends;
        let alive = |value: &FlowValue| {
            let at = value.backend as usize * (size_of::<Backend>() / 4) + GENERATION_WORD;
            backends
                .words32()
                .get(at)
                .is_some_and(|g| g.load(Relaxed) == value.generation)
        };
        sys::for_each_batch(
            self.flows.as_fd(),
            |keys: &[FlowKey], values: &[FlowValue]| {
                for (key, value) in keys.iter().zip(values) {
                    let limit = if key.proto == TCP && value.closing == 0 {
                        TCP_IDLE
                    } else {
                        udp_idle
                    };
                    let idle = Duration::from_nanos(now_ns.saturating_sub(value.seen));
                    if idle >= limit || !alive(value) {
                        dead.push(*key);
                    } else {
                        expired.live += 1;
                    }
                }
            },
        )
        .map_err(failed("flows", "walk"))?;
        sys::delete_batch(self.flows.as_fd(), &dead).map_err(failed("flows", "delete"))?;
        expired.removed = dead.len() as u64;
        Ok(expired)
    }

    /// The flow records, for a thread of its own.
    pub fn flow_records(&self) -> Result<FlowRecords, Error> {
        let flows = self.flows.try_clone().map_err(failed("flows", "clone"))?;
        Ok(FlowRecords { flows })
    }

    /// One flow record, for explanations.
    pub fn flow(&self, key: &FlowKey) -> Result<Option<FlowValue>, Error> {
        sys::lookup(self.flows.as_fd(), key).map_err(failed("flows", "look up"))
    }

    /// One affinity record, for explanations.
    pub fn affinity(&self, key: &AffinityKey) -> Result<Option<AffinityValue>, Error> {
        sys::lookup(self.affinity.as_fd(), key).map_err(failed("affinity", "look up"))
    }
}

/// The flow records alone, which every thread may look through: each change is the kernel's own, and atomic.
#[derive(Debug)]
pub struct FlowRecords {
    flows: OwnedFd,
}

impl FlowRecords {
    /// Removes every record that names one of these addresses, whichever end it is; how many went.
    ///
    /// A record lets a backend's answers through to the client's address and port, whoever has them by now: the backend's
    /// generation says nothing of the client. One walk over the table for any number of addresses.
    pub fn forget(&self, addresses: &HashSet<Addr>) -> Result<u64, Error> {
        if addresses.is_empty() {
            return Ok(0);
        }
        let mut named = Vec::new();
        sys::for_each_batch(
            self.flows.as_fd(),
            |keys: &[FlowKey], values: &[FlowValue]| {
                for (key, value) in keys.iter().zip(values) {
                    let ends = [&key.src, &key.dst, &value.addr];
                    if ends.into_iter().any(|end| addresses.contains(end)) {
                        named.push(*key);
                    }
                }
            },
        )
        .map_err(failed("flows", "walk"))?;
        sys::delete_batch(self.flows.as_fd(), &named).map_err(failed("flows", "delete"))?;
        Ok(named.len() as u64)
    }
}

const STATE_WORD: usize = 4;
const GENERATION_WORD: usize = 5;
const _: () = {
    assert!(std::mem::offset_of!(Backend, state) / 4 == STATE_WORD);
    assert!(std::mem::offset_of!(Backend, generation) == GENERATION_WORD * 4);
};

fn to_words(b: &Backend) -> [u32; 8] {
    let [a0, a1, a2, a3] = b.addr.0;
    let [p0, p1] = b.port.0.to_ne_bytes();
    let state = u32::from_ne_bytes([p0, p1, b.state, b.local]);
    [a0, a1, a2, a3, state, b.generation, b.service, b.pad]
}

fn from_words(words: &[u32; 8]) -> Backend {
    let [a0, a1, a2, a3, state, generation, service, pad] = *words;
    let [p0, p1, state, local] = state.to_ne_bytes();
    Backend {
        addr: Addr([a0, a1, a2, a3]),
        port: Port(u16::from_ne_bytes([p0, p1])),
        state,
        local,
        generation,
        service,
        pad,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backend_survives_its_words() {
        let backend = Backend {
            addr: Addr::v6(std::array::from_fn(|i| i as u8)),
            port: Port::new(8080),
            state: state::DRAINING,
            local: 1,
            generation: 7,
            service: 9,
            pad: 0,
        };
        let words = to_words(&backend);
        assert_eq!(from_words(&words), backend);
        // And the words are the record's memory, which is what the kernel reads.
        assert_eq!(words[GENERATION_WORD], 7);
        assert_eq!(words[STATE_WORD].to_ne_bytes()[2], state::DRAINING);
    }
}
