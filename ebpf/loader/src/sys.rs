//! The bpf(2) calls that aya lacks or hides, over plain old data: map batches, memory-mapped arrays, links, test runs.
//!
//! Every layout here is that of `union bpf_attr` in the kernel's `linux/bpf.h`; the kernel reads as many bytes as the call
//! says and takes the rest as zero.

#![allow(unsafe_code)]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicU64};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

use kun_ebpf_abi::bandwidth::Limits;
use kun_ebpf_abi::service::{
    AffinityKey, AffinityValue, Backend, FlowKey, FlowValue, PeerValue, ServiceKey, ServiceValue,
};

/// asm-generic/socket.h.
const SO_NETNS_COOKIE: libc::c_int = 71;

const MAP_CREATE: u32 = 0;
const MAP_LOOKUP_ELEM: u32 = 1;
const MAP_UPDATE_ELEM: u32 = 2;
const MAP_DELETE_ELEM: u32 = 3;
const OBJ_PIN: u32 = 6;
const OBJ_GET: u32 = 7;
const PROG_TEST_RUN: u32 = 10;
const OBJ_GET_INFO_BY_FD: u32 = 15;
const MAP_LOOKUP_BATCH: u32 = 24;
const MAP_UPDATE_BATCH: u32 = 26;
const MAP_DELETE_BATCH: u32 = 27;
const LINK_CREATE: u32 = 28;
const LINK_UPDATE: u32 = 29;

/// `enum bpf_map_type`.
pub(crate) mod map_type {
    /// Hash.
    pub(crate) const HASH: u32 = 1;
    /// Array.
    pub(crate) const ARRAY: u32 = 2;
    /// One array for each CPU.
    pub(crate) const PERCPU_ARRAY: u32 = 6;
    /// Hash that forgets the least recently used.
    pub(crate) const LRU_HASH: u32 = 9;
    /// Array of maps.
    pub(crate) const ARRAY_OF_MAPS: u32 = 12;
}

/// Flag of `BPF_LINK_CREATE` on a tcx hook: before the program that is named, and none is named, so before all.
pub(crate) const BPF_F_BEFORE: u32 = 1 << 3;

/// Flags of `BPF_MAP_CREATE`.
pub(crate) mod map_flag {
    /// Elements are allocated when they are put.
    pub(crate) const NO_PREALLOC: u32 = 1;
    /// User space may map the values.
    pub(crate) const MMAPABLE: u32 = 1 << 10;
}

/// `enum bpf_attach_type`.
pub(crate) mod attach_type {
    /// cgroup/connect4.
    pub(crate) const CONNECT4: u32 = 10;
    /// cgroup/connect6.
    pub(crate) const CONNECT6: u32 = 11;
    /// cgroup/sendmsg4.
    pub(crate) const SENDMSG4: u32 = 14;
    /// cgroup/sendmsg6.
    pub(crate) const SENDMSG6: u32 = 15;
    /// cgroup/recvmsg4.
    pub(crate) const RECVMSG4: u32 = 19;
    /// cgroup/recvmsg6.
    pub(crate) const RECVMSG6: u32 = 20;
    /// cgroup/getpeername4.
    pub(crate) const GETPEERNAME4: u32 = 29;
    /// cgroup/getpeername6.
    pub(crate) const GETPEERNAME6: u32 = 30;
    /// tcx ingress (kernel ≥ 6.6).
    pub(crate) const TCX_INGRESS: u32 = 46;
    /// tcx egress.
    pub(crate) const TCX_EGRESS: u32 = 47;
}

/// Types that are their bytes: `repr(C)`, no padding, every bit pattern valid.
///
/// # Safety
///
/// The kernel writes any bytes into a value of the type, and reads all of it.
pub(crate) unsafe trait Data: Copy {
    /// All bits zero.
    fn zeroed() -> Self {
        // SAFETY: every bit pattern is valid.
        unsafe { std::mem::zeroed() }
    }
}

// SAFETY: numbers.
unsafe impl Data for u8 {}
// SAFETY: numbers.
unsafe impl Data for u32 {}
// SAFETY: numbers.
unsafe impl Data for u64 {}
// SAFETY: repr(C) of byte arrays and numbers; sizes asserted in the abi crate leave no padding.
unsafe impl Data for ServiceKey {}
// SAFETY: as above.
unsafe impl Data for ServiceValue {}
// SAFETY: as above.
unsafe impl Data for Backend {}
// SAFETY: as above.
unsafe impl Data for FlowKey {}
// SAFETY: as above.
unsafe impl Data for FlowValue {}
// SAFETY: as above.
unsafe impl Data for AffinityKey {}
// SAFETY: as above.
unsafe impl Data for AffinityValue {}
// SAFETY: as above.
unsafe impl Data for PeerValue {}
// SAFETY: as above.
unsafe impl Data for Limits {}

fn bpf<T>(command: u32, attr: &mut T) -> io::Result<i64> {
    // SAFETY: `attr` is a live structure of the size given; what its pointers refer to outlives the call (callers' duty).
    let r = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_mut(attr),
            size_of::<T>(),
        )
    };
    if r < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(r)
    }
}

fn owned(fd: i64) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor for us.
    unsafe { OwnedFd::from_raw_fd(fd as i32) }
}

fn address<T>(of: &T) -> u64 {
    std::ptr::from_ref(of) as u64
}

#[repr(C)]
struct Elem {
    map_fd: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// One value; `None`: no such key.
pub(crate) fn lookup<K: Data, V: Data>(map: BorrowedFd<'_>, key: &K) -> io::Result<Option<V>> {
    let mut value = V::zeroed();
    let mut attr = Elem {
        map_fd: map.as_raw_fd() as u32,
        pad: 0,
        key: address(key),
        value: std::ptr::from_mut(&mut value) as u64,
        flags: 0,
    };
    match bpf(MAP_LOOKUP_ELEM, &mut attr) {
        Ok(_) => Ok(Some(value)),
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(e) => Err(e),
    }
}

/// All CPUs' values of an element of a per-CPU map.
pub(crate) fn lookup_per_cpu(map: BorrowedFd<'_>, key: u32, cpus: usize) -> io::Result<Vec<u64>> {
    let mut values = vec![0u64; cpus];
    let mut attr = Elem {
        map_fd: map.as_raw_fd() as u32,
        pad: 0,
        key: address(&key),
        value: values.as_mut_ptr() as u64,
        flags: 0,
    };
    bpf(MAP_LOOKUP_ELEM, &mut attr)?;
    Ok(values)
}

/// Puts a value.
pub(crate) fn update<K: Data, V: Data>(map: BorrowedFd<'_>, key: &K, value: &V) -> io::Result<()> {
    let mut attr = Elem {
        map_fd: map.as_raw_fd() as u32,
        pad: 0,
        key: address(key),
        value: address(value),
        flags: 0,
    };
    bpf(MAP_UPDATE_ELEM, &mut attr).map(drop)
}

/// Removes a key; false: it was not there.
pub(crate) fn delete<K: Data>(map: BorrowedFd<'_>, key: &K) -> io::Result<bool> {
    let mut attr = Elem {
        map_fd: map.as_raw_fd() as u32,
        pad: 0,
        key: address(key),
        value: 0,
        flags: 0,
    };
    match bpf(MAP_DELETE_ELEM, &mut attr) {
        Ok(_) => Ok(true),
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(e) => Err(e),
    }
}

#[repr(C)]
struct Batch {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// Puts many values in one call.
pub(crate) fn update_batch<K: Data, V: Data>(
    map: BorrowedFd<'_>,
    keys: &[K],
    values: &[V],
) -> io::Result<()> {
    assert_eq!(keys.len(), values.len(), "a value for each key");
    if keys.is_empty() {
        return Ok(());
    }
    let mut attr = Batch {
        in_batch: 0,
        out_batch: 0,
        keys: keys.as_ptr() as u64,
        values: values.as_ptr() as u64,
        count: keys.len() as u32,
        map_fd: map.as_raw_fd() as u32,
        elem_flags: 0,
        flags: 0,
    };
    bpf(MAP_UPDATE_BATCH, &mut attr).map(drop)
}

/// Removes many keys; those that are gone already are no fault.
pub(crate) fn delete_batch<K: Data>(map: BorrowedFd<'_>, mut keys: &[K]) -> io::Result<()> {
    while !keys.is_empty() {
        let mut attr = Batch {
            in_batch: 0,
            out_batch: 0,
            keys: keys.as_ptr() as u64,
            values: 0,
            count: keys.len() as u32,
            map_fd: map.as_raw_fd() as u32,
            elem_flags: 0,
            flags: 0,
        };
        match bpf(MAP_DELETE_BATCH, &mut attr) {
            Ok(_) => return Ok(()),
            // The batch stops at a missing key, and `count` says how many went before it.
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => {
                keys = keys.get(attr.count as usize + 1..).unwrap_or_default();
            }
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Walks a hash, a batch at a time.
pub(crate) fn for_each_batch<K: Data, V: Data>(
    map: BorrowedFd<'_>,
    mut each: impl FnMut(&[K], &[V]),
) -> io::Result<()> {
    // A batch must hold a whole bucket; the kernel says ENOSPC when it does not.
    let mut room = 4096usize;
    let mut position = [0u64; 8];
    let mut first = true;
    loop {
        let mut keys = vec![K::zeroed(); room];
        let mut values = vec![V::zeroed(); room];
        let mut next = [0u64; 8];
        let mut attr = Batch {
            in_batch: if first { 0 } else { position.as_ptr() as u64 },
            out_batch: next.as_mut_ptr() as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: room as u32,
            map_fd: map.as_raw_fd() as u32,
            elem_flags: 0,
            flags: 0,
        };
        let result = bpf(MAP_LOOKUP_BATCH, &mut attr);
        let count = attr.count as usize;
        match result {
            Ok(_) => {
                each(&keys[..count], &values[..count]);
                position = next;
                first = false;
            }
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => {
                each(&keys[..count], &values[..count]);
                return Ok(());
            }
            Err(e) if e.raw_os_error() == Some(libc::ENOSPC) && room < 1 << 20 => room *= 4,
            Err(e) => return Err(e),
        }
    }
}

#[repr(C)]
struct Create {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
    inner_map_fd: u32,
}

fn create(attr: &mut Create) -> io::Result<OwnedFd> {
    bpf(MAP_CREATE, attr).map(owned)
}

/// A barrier: an update of a map of maps returns only when no program can still see what the map held before, which is one
/// RCU grace period (the kernel's `maybe_wait_bpf_programs`). membarrier(2) would not do: on one CPU it waits for nothing.
#[derive(Debug)]
pub(crate) struct Grace {
    outer: OwnedFd,
    inner: OwnedFd,
}

impl Grace {
    pub(crate) fn new() -> io::Result<Self> {
        let inner = create(&mut Create {
            map_type: map_type::ARRAY,
            key_size: 4,
            value_size: 4,
            max_entries: 1,
            map_flags: 0,
            inner_map_fd: 0,
        })?;
        let outer = create(&mut Create {
            map_type: map_type::ARRAY_OF_MAPS,
            key_size: 4,
            value_size: 4,
            max_entries: 1,
            map_flags: 0,
            inner_map_fd: inner.as_raw_fd() as u32,
        })?;
        Ok(Grace { outer, inner })
    }

    pub(crate) fn wait(&self) -> io::Result<()> {
        update(self.outer.as_fd(), &0u32, &(self.inner.as_raw_fd() as u32))
    }
}

/// The values of a mappable array.
#[derive(Debug)]
pub(crate) struct Mapped {
    start: *mut libc::c_void,
    bytes: usize,
}

// SAFETY: the memory is reached through atomics only, and unmapped once, on drop.
unsafe impl Send for Mapped {}
// SAFETY: as above.
unsafe impl Sync for Mapped {}

impl Mapped {
    /// Maps `bytes` bytes of values.
    pub(crate) fn new(map: BorrowedFd<'_>, bytes: usize) -> io::Result<Self> {
        let bytes = bytes.next_multiple_of(rustix::param::page_size());
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                map.as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Mapped { start, bytes })
    }

    /// As 64-bit words.
    pub(crate) fn words64(&self) -> &[AtomicU64] {
        // SAFETY: page-aligned, `bytes` long, lives as long as `self`; the kernel's accesses are whole words as well.
        unsafe { std::slice::from_raw_parts(self.start.cast(), self.bytes / 8) }
    }

    /// As 32-bit words.
    pub(crate) fn words32(&self) -> &[AtomicU32] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts(self.start.cast(), self.bytes / 4) }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: our own mapping, and no reference outlives `self`.
        unsafe { libc::munmap(self.start, self.bytes) };
    }
}

#[repr(C)]
struct Obj {
    path: u64,
    fd: u32,
    flags: u32,
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)
}

/// Opens what is pinned at `path`; `None`: nothing is.
pub(crate) fn obj_get(path: &Path) -> io::Result<Option<OwnedFd>> {
    let name = c_path(path)?;
    let mut attr = Obj {
        path: name.as_ptr() as u64,
        fd: 0,
        flags: 0,
    };
    match bpf(OBJ_GET, &mut attr) {
        Ok(fd) => Ok(Some(owned(fd))),
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Pins an object at `path`.
pub(crate) fn obj_pin(fd: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let name = c_path(path)?;
    let mut attr = Obj {
        path: name.as_ptr() as u64,
        fd: fd.as_raw_fd() as u32,
        flags: 0,
    };
    bpf(OBJ_PIN, &mut attr).map(drop)
}

#[repr(C)]
struct InfoAttr {
    fd: u32,
    len: u32,
    info: u64,
}

fn info<T>(fd: BorrowedFd<'_>, into: &mut T) -> io::Result<()> {
    let mut attr = InfoAttr {
        fd: fd.as_raw_fd() as u32,
        len: size_of::<T>() as u32,
        info: std::ptr::from_mut(into) as u64,
    };
    bpf(OBJ_GET_INFO_BY_FD, &mut attr).map(drop)
}

/// The head of `struct bpf_map_info`.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct MapInfo {
    pub(crate) map_type: u32,
    id: u32,
    pub(crate) key_size: u32,
    pub(crate) value_size: u32,
    pub(crate) max_entries: u32,
    pub(crate) map_flags: u32,
}

pub(crate) fn map_info(fd: BorrowedFd<'_>) -> io::Result<MapInfo> {
    let mut out = MapInfo::default();
    info(fd, &mut out)?;
    Ok(out)
}

/// The head of `struct bpf_link_info`; `target` is the interface's index for tcx, the cgroup's id (low half) for a cgroup.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct LinkInfo {
    link_type: u32,
    id: u32,
    pub(crate) prog_id: u32,
    pad: u32,
    pub(crate) target: u64,
    rest: u64,
}

impl LinkInfo {
    /// The interface of a tcx link; 0: it is gone.
    pub(crate) fn ifindex(&self) -> u32 {
        self.target as u32
    }
}

pub(crate) fn link_info(fd: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    let mut out = LinkInfo::default();
    info(fd, &mut out)?;
    Ok(out)
}

#[repr(C)]
struct LinkCreate {
    prog_fd: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
    // The kernel refuses a tcx link whose ordering fields are not given as zero.
    order: [u64; 4],
}

/// Attaches a program to a cgroup's descriptor or an interface's index.
pub(crate) fn link_create(
    program: BorrowedFd<'_>,
    target: u32,
    attach: u32,
    flags: u32,
) -> io::Result<OwnedFd> {
    let mut attr = LinkCreate {
        prog_fd: program.as_raw_fd() as u32,
        target,
        attach_type: attach,
        flags,
        order: [0; 4],
    };
    bpf(LINK_CREATE, &mut attr).map(owned)
}

#[repr(C)]
struct LinkUpdate {
    link_fd: u32,
    new_prog_fd: u32,
    flags: u32,
    old_prog_fd: u32,
}

/// Replaces a link's program; every packet meets either the old or the new one.
pub(crate) fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = LinkUpdate {
        link_fd: link.as_raw_fd() as u32,
        new_prog_fd: program.as_raw_fd() as u32,
        flags: 0,
        old_prog_fd: 0,
    };
    bpf(LINK_UPDATE, &mut attr).map(drop)
}

#[repr(C)]
struct TestRun {
    prog_fd: u32,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    ctx: [u64; 5],
}

/// What a program did with a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ran {
    /// What the program returned.
    pub verdict: i32,
    /// The packet afterwards.
    pub packet: Vec<u8>,
    /// Mean nanoseconds of a run, as the kernel measured them.
    pub nanoseconds: u32,
}

/// Runs a program `repeat` times on one packet that starts with an Ethernet header; changes add up over the repetitions.
pub(crate) fn test_run(program: BorrowedFd<'_>, packet: &[u8], repeat: u32) -> io::Result<Ran> {
    let mut out = vec![0u8; packet.len() + 256];
    let mut attr = TestRun {
        prog_fd: program.as_raw_fd() as u32,
        retval: 0,
        data_size_in: packet.len() as u32,
        data_size_out: out.len() as u32,
        data_in: packet.as_ptr() as u64,
        data_out: out.as_mut_ptr() as u64,
        repeat,
        duration: 0,
        ctx: [0; 5],
    };
    bpf(PROG_TEST_RUN, &mut attr)?;
    out.truncate(attr.data_size_out as usize);
    Ok(Ran {
        verdict: attr.retval as i32,
        packet: out,
        nanoseconds: attr.duration,
    })
}

/// Makes the kernel account programs' run times until the descriptor is closed; each run then costs some 25 ns more.
pub fn account_run_time() -> io::Result<OwnedFd> {
    const ENABLE_STATS: u32 = 32;
    // BPF_STATS_RUN_TIME.
    let mut kind = 0u32;
    bpf(ENABLE_STATS, &mut kind).map(owned)
}

/// Nanoseconds that a program has run, and how often, while accounted.
pub(crate) fn run_time(program: BorrowedFd<'_>) -> io::Result<(u64, u64)> {
    let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", program.as_raw_fd()))?;
    let field = |name: &str| {
        let line = text.lines().find_map(|l| l.strip_prefix(name));
        line.and_then(|v| v.trim().parse().ok())
            .ok_or_else(|| io::Error::other(name.to_owned()))
    };
    Ok((field("run_time_ns:")?, field("run_cnt:")?))
}

/// How many values an element of a per-CPU map has: the CPUs that the kernel could ever have.
pub(crate) fn possible_cpus() -> io::Result<usize> {
    let text = std::fs::read_to_string("/sys/devices/system/cpu/possible")?;
    let last = text.trim().rsplit([',', '-']).next().unwrap_or_default();
    last.parse::<usize>()
        .map(|n| n + 1)
        .map_err(io::Error::other)
}

/// A map's key or value: aya's marker cannot be put on the types of another crate.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Plain<T>(pub(crate) T);

// SAFETY: used for the types of `kun_ebpf_abi` alone, which are `repr(C)`, hold integers and say their padding.
unsafe impl<T: Copy + 'static> aya::Pod for Plain<T> {}

/// The index of an interface of the calling thread's network namespace.
pub(crate) fn interface_index(name: &str) -> io::Result<u32> {
    let socket = socket_with(
        AddressFamily::INET,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    Ok(rustix::net::netdevice::name_to_index(&socket, name)?)
}

/// The cookie of the calling thread's network namespace, which programs see (Linux 5.14).
pub(crate) fn netns_cookie() -> io::Result<u64> {
    let socket = socket_with(
        AddressFamily::INET,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    let mut cookie = 0u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes to the number.
    let r = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if r < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(cookie)
}

/// The MTU of an interface of the calling thread's network namespace. (Not from /sys, which shows the namespace that mounted it.)
pub(crate) fn mtu(interface: &str) -> io::Result<u32> {
    let socket = socket_with(
        AddressFamily::INET,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    // SAFETY: all zeroes is a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if interface.len() >= request.ifr_name.len() {
        return Err(io::Error::from_raw_os_error(libc::ENODEV));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(interface.bytes()) {
        *to = from as libc::c_char;
    }
    // SAFETY: the name ends with a zero; SIOCGIFMTU writes `ifru_mtu` of the same struct.
    let mtu = unsafe {
        if libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFMTU, &raw mut request) != 0 {
            return Err(io::Error::last_os_error());
        }
        request.ifr_ifru.ifru_mtu
    };
    u32::try_from(mtu).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}
