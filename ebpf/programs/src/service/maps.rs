//! The maps, and the core's way to them.

use aya_ebpf::bindings::{BPF_ANY, BPF_F_MMAPABLE, BPF_F_NO_PREALLOC};
use aya_ebpf::helpers::bpf_ktime_get_boot_ns;
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, LruHashMap, PerCpuArray};
use kun_ebpf_abi::reason::{REASONS, Reason};
use kun_ebpf_abi::service::steer::Maps;
use kun_ebpf_abi::service::{
    AffinityKey, AffinityValue, Backend, FlowKey, FlowValue, Pace, PeerValue, ServiceKey,
    ServiceValue,
};

// Not preallocated: a preallocated element is reused at once when it is deleted, and a program that has just looked it up
// would read another service's value.
#[map(name = "services")]
static SERVICES: HashMap<ServiceKey, ServiceValue> =
    HashMap::with_max_entries(1, BPF_F_NO_PREALLOC);

#[map(name = "views")]
static VIEWS: Array<u64> = Array::with_max_entries(1, BPF_F_MMAPABLE);

// Two slots an element: the kernel rounds the elements of a mappable array up to eight bytes.
#[map(name = "slots")]
static SLOTS: Array<[u32; 2]> = Array::with_max_entries(1, BPF_F_MMAPABLE);

#[map(name = "backends")]
static BACKENDS: Array<Backend> = Array::with_max_entries(1, BPF_F_MMAPABLE);

#[map(name = "flows")]
static FLOWS: LruHashMap<FlowKey, FlowValue> = LruHashMap::with_max_entries(1, 0);

#[map(name = "affinity")]
static AFFINITY: LruHashMap<AffinityKey, AffinityValue> = LruHashMap::with_max_entries(1, 0);

#[map(name = "peers")]
pub(crate) static PEERS: LruHashMap<u64, PeerValue> = LruHashMap::with_max_entries(1, 0);

#[map(name = "opted_out")]
pub(crate) static OPTED_OUT: HashMap<u64, u8> = HashMap::with_max_entries(1, BPF_F_NO_PREALLOC);

#[map(name = "reasons")]
static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(REASONS, 0);

#[map(name = "answers")]
static ANSWERS: PerCpuArray<Pace> = PerCpuArray::with_max_entries(1, 0);

/// Whether this CPU may answer one more packet with an ICMP error.
#[inline(always)]
pub(crate) fn may_answer() -> bool {
    match ANSWERS.get_ptr_mut(0) {
        // SAFETY: this CPU's element; the hooks that answer do not interrupt each other on one CPU.
        Some(pace) => unsafe { (*pace).take(bpf_ktime_get_boot_ns()) },
        None => false,
    }
}

/// The kernel's maps.
pub(crate) struct Kernel;

impl Maps for Kernel {
    #[inline(always)]
    fn service(&self, key: &ServiceKey) -> Option<&ServiceValue> {
        // SAFETY: the element lives until the program ends (RCU, no preallocation).
        unsafe { SERVICES.get(key) }
    }

    #[inline(always)]
    fn view(&self, index: u32) -> u64 {
        match VIEWS.get_ptr(index) {
            // SAFETY: an aligned element of the array; volatile, because user space stores to it meanwhile.
            Some(view) => unsafe { view.read_volatile() },
            None => 0,
        }
    }

    #[inline(always)]
    fn slot(&self, index: u32) -> Option<u32> {
        SLOTS
            .get(index >> 1)
            .map(|pair| if index & 1 == 0 { pair[0] } else { pair[1] })
    }

    #[inline(always)]
    fn backend(&self, id: u32) -> Option<&Backend> {
        BACKENDS.get(id)
    }

    #[inline(always)]
    fn flow(&self, key: &FlowKey) -> Option<&FlowValue> {
        // SAFETY: the memory stays the map's; an element that is recycled meanwhile yields another flow's record for this one
        // packet, which the LRU makes improbable by recycling the least used.
        unsafe { FLOWS.get(key) }
    }

    #[inline(always)]
    fn touch_flow(&mut self, key: &FlowKey, now: u64, closing: bool) {
        if let Some(held) = FLOWS.get_ptr_mut(key) {
            // SAFETY: an element of the map; each field is one store, and a race leaves either time.
            unsafe {
                (*held).seen = now;
                if closing {
                    (*held).closing = 1;
                }
            }
        }
    }

    #[inline(always)]
    fn put_flow(&mut self, key: &FlowKey, value: &FlowValue) -> bool {
        FLOWS.insert(key, value, BPF_ANY as u64).is_ok()
    }

    #[inline(always)]
    fn affinity(&self, key: &AffinityKey) -> Option<&AffinityValue> {
        // SAFETY: as for flows; the backend's generation is checked by the caller.
        unsafe { AFFINITY.get(key) }
    }

    #[inline(always)]
    fn put_affinity(&mut self, key: &AffinityKey, value: &AffinityValue) {
        let _ = AFFINITY.insert(key, value, BPF_ANY as u64);
    }

    #[inline(always)]
    fn count(&mut self, reason: Reason) {
        if let Some(counter) = COUNTERS.get_ptr_mut(reason as u32) {
            // SAFETY: this CPU's element; a connect() that is interrupted by a packet on its CPU may lose one count.
            unsafe { *counter += 1 };
        }
    }

    #[inline(always)]
    fn now(&self) -> u64 {
        // SAFETY: takes nothing, returns a number.
        unsafe { bpf_ktime_get_boot_ns() }
    }
}
