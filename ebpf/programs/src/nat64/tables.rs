//! The gateway's maps as the translator's tables. All are pinned by name below the ABI's directory and adopted at start.

use aya_ebpf::bindings::{BPF_F_NO_PREALLOC, BPF_NOEXIST};
use aya_ebpf::helpers::generated::{bpf_get_prandom_u32, bpf_ktime_get_boot_ns};
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, LruHashMap, PerCpuArray, ProgramArray};
use kun_ebpf_abi::nat64::bib::{
    Bib4, Bib6, Fragment, FragmentKey, MAX_BIB, MAX_FRAGMENTS, MAX_SESSIONS, Session, SessionKey,
};
use kun_ebpf_abi::nat64::{COUNTERS, Counter, Settings, step};
use kun_ebpf_abi::reason::REASONS;
use kun_ebpf_abi::translate::{Tables, Work};

use crate::skb::STEP;

/// Two settings, of which `nat64_active` names the one in force: a change is one store.
#[map(name = "nat64_settings")]
static SETTINGS: Array<Settings> = Array::pinned(2, 0);
/// 0 or 1; 2 = nothing configured yet.
#[map(name = "nat64_active")]
static ACTIVE: Array<u32> = Array::pinned(1, 0);
#[map(name = "nat64_counters")]
static COUNTS: PerCpuArray<u64> = PerCpuArray::pinned(COUNTERS, 0);
#[map(name = "nat64_reasons")]
static DROPS: PerCpuArray<u64> = PerCpuArray::pinned(REASONS, 0);
#[map(name = "nat64_bib6")]
static BIB6: HashMap<Bib6, Bib4> = HashMap::pinned(MAX_BIB, BPF_F_NO_PREALLOC);
#[map(name = "nat64_bib4")]
static BIB4: HashMap<Bib4, Bib6> = HashMap::pinned(MAX_BIB, BPF_F_NO_PREALLOC);
#[map(name = "nat64_sessions")]
static SESSIONS: HashMap<SessionKey, Session> = HashMap::pinned(MAX_SESSIONS, BPF_F_NO_PREALLOC);
#[map(name = "nat64_fragments")]
static FRAGMENTS: LruHashMap<FragmentKey, Fragment> = LruHashMap::pinned(MAX_FRAGMENTS, 0);

/// Room for the octets that are being summed, and the rest of their last word.
#[map(name = "nat64_scratch")]
static SCRATCH: PerCpuArray<[u32; STEP as usize / 4 + 1]> = PerCpuArray::with_max_entries(1, 0);

/// The scratch buffer.
#[inline(always)]
pub(crate) fn scratch() -> Option<*mut [u32; STEP as usize / 4 + 1]> {
    SCRATCH.get_ptr_mut(0)
}

/// The steps' programs, by their numbers. Not pinned by name: each process has its own, so that a new process's steps are never
/// mixed with an old one's.
#[map(name = "nat64_steps")]
pub(crate) static STEPS: ProgramArray = ProgramArray::with_max_entries(step::COUNT, 0);

/// What the steps tell each other about a packet.
#[map(name = "nat64_work")]
static WORK: PerCpuArray<Work> = PerCpuArray::with_max_entries(1, 0);

/// This processor's.
#[inline(always)]
pub(crate) fn work() -> Option<&'static mut Work> {
    // SAFETY: a program runs to its end on one processor before another of its kind starts there.
    WORK.get_ptr_mut(0).map(|p| unsafe { &mut *p })
}

/// The settings in force.
#[inline(always)]
pub(crate) fn settings() -> Option<&'static Settings> {
    SETTINGS.get(*ACTIVE.get(0)?)
}

#[inline(always)]
fn bump(counters: &PerCpuArray<u64>, index: u32) {
    if let Some(n) = counters.get_ptr_mut(index) {
        // SAFETY: the slot is this processor's, and the program is not preempted by another of its kind on it.
        unsafe { *n += 1 };
    }
}

/// Counts a drop.
#[inline(always)]
pub(crate) fn count_reason(reason: u32) {
    bump(&DROPS, reason);
}

/// The maps.
pub(crate) struct Maps;

impl Tables for Maps {
    #[inline(always)]
    fn now(&self) -> u64 {
        // SAFETY: reads a clock.
        unsafe { bpf_ktime_get_boot_ns() }
    }

    #[inline(always)]
    fn random(&mut self) -> u32 {
        // SAFETY: draws a number.
        unsafe { bpf_get_prandom_u32() }
    }

    #[inline(always)]
    fn count(&mut self, counter: Counter) {
        bump(&COUNTS, counter as u32);
    }

    #[inline(always)]
    fn bib6(&self, key: &Bib6) -> Option<Bib4> {
        // SAFETY: values are plain data and never change while they stand.
        unsafe { BIB6.get(key) }.copied()
    }

    #[inline(always)]
    fn bib4(&self, key: &Bib4) -> Option<Bib6> {
        // SAFETY: as above.
        unsafe { BIB4.get(key) }.copied()
    }

    #[inline(always)]
    fn bib6_add(&mut self, key: &Bib6, value: &Bib4) -> bool {
        BIB6.insert(key, value, u64::from(BPF_NOEXIST)).is_ok()
    }

    #[inline(always)]
    fn bib4_add(&mut self, key: &Bib4, value: &Bib6) -> bool {
        BIB4.insert(key, value, u64::from(BPF_NOEXIST)).is_ok()
    }

    #[inline(always)]
    fn bib4_remove(&mut self, key: &Bib4) {
        let _ = BIB4.remove(key);
    }

    #[inline(always)]
    fn session(&self, key: &SessionKey) -> Option<Session> {
        // SAFETY: plain data; a torn read moves a timer by a packet's distance.
        unsafe { SESSIONS.get(key) }.copied()
    }

    #[inline(always)]
    fn session_put(&mut self, key: &SessionKey, value: &Session) -> bool {
        SESSIONS.insert(key, value, 0).is_ok()
    }

    #[inline(always)]
    fn fragment(&self, key: &FragmentKey) -> Option<Fragment> {
        // SAFETY: plain data, written once.
        unsafe { FRAGMENTS.get(key) }.copied()
    }

    #[inline(always)]
    fn fragment_put(&mut self, key: &FragmentKey, value: &Fragment) {
        let _ = FRAGMENTS.insert(key, value, 0);
    }
}
