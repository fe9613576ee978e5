//! The socket hooks: a TCP connect() to a service goes to a backend, and getpeername() still shows the service.
//!
//! UDP sockets of pods pass: their packets are translated one by one at the pod's interface, so that a datagram of a long-lived
//! socket never goes to a backend that is gone. Sockets of the node's own network namespace have no such interface before them.
//! Theirs are served here: an unconnected one at each sendmsg(), where a backend that is gone is another generation and the
//! datagram goes to the next; a connected one at connect(), after which the kernel asks no more. What that one sends to a backend
//! that is gone is answered by the network, as it is to a client of any server that is gone.

use aya_ebpf::EbpfContext;
use aya_ebpf::Global;
use aya_ebpf::bindings::{BPF_ANY, bpf_sock_addr};
use aya_ebpf::helpers::{
    bpf_get_current_ancestor_cgroup_id, bpf_get_netns_cookie, bpf_get_prandom_u32,
    bpf_get_socket_cookie, bpf_set_retval,
};
use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use kun_ebpf_abi::service::packet::{TCP, UDP};
use kun_ebpf_abi::service::select::{netns_client, socket_client};
use kun_ebpf_abi::service::steer::{self, Connect, Maps, connect};
use kun_ebpf_abi::service::{PeerValue, Scope, ServiceKey, ServiceValue};
use kun_ebpf_abi::{Addr, Port};

use crate::maps::{Kernel, OPTED_OUT, PEERS};

/// 1: the kernel has bpf_set_retval (≥ 5.18). Without it a refused connect() is sent to port 0 of the loopback address, whose
/// stack answers with a reset: ECONNREFUSED as well, a moment later.
#[unsafe(no_mangle)]
static HAS_SET_RETVAL: Global<u32> = Global::new(1);

/// Cookie of the node's network namespace: there, and nowhere else, its loopback address is the node's.
#[unsafe(no_mangle)]
static NODE_NETNS: Global<u64> = Global::new(0);

/// How deep below the root of the cgroup tree an opted-out cgroup can be: kubelet's are at 3 to 5.
const OPT_OUT_DEPTH: i32 = 8;

const ALLOW: i32 = 1;
const REFUSE: i32 = 0;
const ECONNREFUSED: i32 = 111;

#[cgroup_sock_addr(connect4)]
fn connect4(ctx: SockAddrContext) -> i32 {
    serve::<V4>(&ctx)
}

#[cgroup_sock_addr(connect6)]
fn connect6(ctx: SockAddrContext) -> i32 {
    serve::<V6>(&ctx)
}

#[cgroup_sock_addr(sendmsg4)]
fn sendmsg4(ctx: SockAddrContext) -> i32 {
    send::<V4>(&ctx)
}

#[cgroup_sock_addr(sendmsg6)]
fn sendmsg6(ctx: SockAddrContext) -> i32 {
    send::<V6>(&ctx)
}

#[cgroup_sock_addr(recvmsg4)]
fn recvmsg4(ctx: SockAddrContext) -> i32 {
    receive::<V4>(&ctx)
}

#[cgroup_sock_addr(recvmsg6)]
fn recvmsg6(ctx: SockAddrContext) -> i32 {
    receive::<V6>(&ctx)
}

#[cgroup_sock_addr(getpeername4)]
fn getpeername4(ctx: SockAddrContext) -> i32 {
    show::<V4>(&ctx)
}

#[cgroup_sock_addr(getpeername6)]
fn getpeername6(ctx: SockAddrContext) -> i32 {
    show::<V6>(&ctx)
}

/// How a family's address is held in the context.
trait Family {
    fn load(sock: *mut bpf_sock_addr) -> Addr;
    /// False: the address is of the other family.
    fn store(sock: *mut bpf_sock_addr, addr: &Addr) -> bool;
    fn loopback() -> Addr;
}

enum V4 {}
enum V6 {}

impl Family for V4 {
    #[inline(always)]
    fn load(sock: *mut bpf_sock_addr) -> Addr {
        // SAFETY: the context is valid for the program's run; the verifier wants a load of the whole field.
        Addr::v4_word(unsafe { (&raw const (*sock).user_ip4).read_volatile() })
    }

    #[inline(always)]
    fn store(sock: *mut bpf_sock_addr, addr: &Addr) -> bool {
        if !addr.is_v4() {
            return false;
        }
        // SAFETY: as in `load`.
        unsafe { (&raw mut (*sock).user_ip4).write_volatile(addr.0[3]) };
        true
    }

    #[inline(always)]
    fn loopback() -> Addr {
        Addr::v4([127, 0, 0, 1])
    }
}

impl Family for V6 {
    #[inline(always)]
    fn load(sock: *mut bpf_sock_addr) -> Addr {
        let mut addr = [0u32; 4];
        let mut i = 0;
        while i < 4 {
            // SAFETY: as above; four words, since older verifiers refuse wider loads of this field.
            addr[i] = unsafe { (&raw const (*sock).user_ip6[i]).read_volatile() };
            i += 1;
        }
        Addr(addr)
    }

    #[inline(always)]
    fn store(sock: *mut bpf_sock_addr, addr: &Addr) -> bool {
        let mut i = 0;
        while i < 4 {
            // SAFETY: as above.
            unsafe { (&raw mut (*sock).user_ip6[i]).write_volatile(addr.0[i]) };
            i += 1;
        }
        true
    }

    #[inline(always)]
    fn loopback() -> Addr {
        Addr([0, 0, 0, u32::from_ne_bytes([0, 0, 0, 1])])
    }
}

#[inline(always)]
fn port(sock: *mut bpf_sock_addr) -> Port {
    // SAFETY: the context is valid for the program's run. The port is the word's low half, in network order.
    Port(unsafe { (&raw const (*sock).user_port).read_volatile() } as u16)
}

#[inline(always)]
fn set_port(sock: *mut bpf_sock_addr, port: Port) {
    // SAFETY: as in `port`.
    unsafe { (&raw mut (*sock).user_port).write_volatile(u32::from(port.0)) };
}

#[inline(always)]
fn protocol(sock: *mut bpf_sock_addr) -> u32 {
    // SAFETY: the context is valid for the program's run.
    unsafe { (&raw const (*sock).protocol).read_volatile() }
}

/// Is the socket in the node's own network namespace?
#[inline(always)]
fn of_node(ctx: &SockAddrContext) -> bool {
    // SAFETY: the context is the program's own.
    unsafe { bpf_get_netns_cookie(ctx.as_ptr()) == NODE_NETNS.load() }
}

#[inline(always)]
fn socket(ctx: &SockAddrContext) -> u64 {
    // SAFETY: the context is the program's own.
    unsafe { bpf_get_socket_cookie(ctx.as_ptr()) }
}

/// The frontend that the context's address is, for a process that is served.
#[inline(always)]
fn frontend<F: Family>(ctx: &SockAddrContext, proto: u8) -> Option<(ServiceKey, ServiceValue)> {
    let sock = ctx.sock_addr;
    let key = ServiceKey {
        addr: F::load(sock),
        port: port(sock),
        proto,
        pad: 0,
    };
    let service = Kernel.service(&key).copied()?;
    if opted_out() {
        return None;
    }
    let node_only = proto == UDP || service.scope == Scope::HostLoopback as u8;
    if node_only && !of_node(ctx) {
        return None;
    }
    Some((key, service))
}

/// Who is held to a backend by ClientIP affinity.
#[inline(always)]
fn client(ctx: &SockAddrContext, service: &ServiceValue) -> Addr {
    if service.affinity_secs == 0 {
        return Addr([0; 4]);
    }
    // SAFETY: the context is the program's own.
    netns_client(unsafe { bpf_get_netns_cookie(ctx.as_ptr()) })
}

#[inline(always)]
fn serve<F: Family>(ctx: &SockAddrContext) -> i32 {
    let sock = ctx.sock_addr;
    let proto = protocol(sock);
    if proto != u32::from(TCP) && proto != u32::from(UDP) {
        return ALLOW;
    }
    let Some((key, service)) = frontend::<F>(ctx, proto as u8) else {
        return ALLOW;
    };
    let client = client(ctx, &service);
    // SAFETY: takes nothing, returns a number.
    let seed = unsafe { bpf_get_prandom_u32() };
    match connect(&mut Kernel, &service, client, seed) {
        Connect::Untouched => ALLOW,
        Connect::To(chosen) => {
            let to = chosen;
            if !F::store(sock, &to.addr) {
                return refuse::<F>(sock);
            }
            set_port(sock, to.port);
            let value = PeerValue {
                frontend: key.addr,
                backend: to.addr,
                frontend_port: key.port,
                backend_port: to.port,
            };
            let _ = PEERS.insert(socket(ctx), value, BPF_ANY as u64);
            ALLOW
        }
        Connect::Refuse => refuse::<F>(sock),
    }
}

#[inline(always)]
fn refuse<F: Family>(sock: *mut bpf_sock_addr) -> i32 {
    if HAS_SET_RETVAL.load() == 1 {
        // SAFETY: takes a number; the verifier removes this branch where the kernel lacks the helper.
        unsafe { bpf_set_retval(-ECONNREFUSED) };
        return REFUSE;
    }
    F::store(sock, &F::loopback());
    set_port(sock, Port(0));
    ALLOW
}

/// Is the process in an opted-out cgroup or below one? Asked only for connects that meet a service.
#[inline(always)]
fn opted_out() -> bool {
    let mut level = 1;
    while level <= OPT_OUT_DEPTH {
        // SAFETY: takes a number, returns one: 0 below the process's own level.
        let id = unsafe { bpf_get_current_ancestor_cgroup_id(level) };
        if id == 0 {
            return false;
        }
        if OPTED_OUT.get_ptr(id).is_some() {
            return true;
        }
        level += 1;
    }
    false
}

#[inline(always)]
fn send<F: Family>(ctx: &SockAddrContext) -> i32 {
    let sock = ctx.sock_addr;
    if protocol(sock) != u32::from(UDP) {
        return ALLOW;
    }
    let Some((key, service)) = frontend::<F>(ctx, UDP) else {
        return ALLOW;
    };
    let from = socket_client(socket(ctx));
    let client = client(ctx, &service);
    match steer::send(&mut Kernel, &key, &service, from, client) {
        Connect::Untouched => ALLOW,
        Connect::To(to) if F::store(sock, &to.addr) => {
            set_port(sock, to.port);
            ALLOW
        }
        Connect::To(_) | Connect::Refuse => {
            if HAS_SET_RETVAL.load() == 1 {
                // SAFETY: as in `refuse`. Without the helper it is EPERM: a datagram has no handshake to be reset.
                unsafe { bpf_set_retval(-ECONNREFUSED) };
            }
            REFUSE
        }
    }
}

#[inline(always)]
fn receive<F: Family>(ctx: &SockAddrContext) -> i32 {
    let sock = ctx.sock_addr;
    if protocol(sock) != u32::from(UDP) || !of_node(ctx) {
        return ALLOW;
    }
    let to = socket_client(socket(ctx));
    match steer::receive(&Kernel, to, F::load(sock), port(sock), UDP) {
        Some((addr, port)) => {
            if F::store(sock, &addr) {
                set_port(sock, port);
            }
            ALLOW
        }
        None => show::<F>(ctx),
    }
}

#[inline(always)]
fn show<F: Family>(ctx: &SockAddrContext) -> i32 {
    let sock = ctx.sock_addr;
    let proto = protocol(sock);
    if proto != u32::from(TCP) && proto != u32::from(UDP) {
        return ALLOW;
    }
    // SAFETY: an element of the map; one that is recycled meanwhile fails the comparison below.
    if let Some(peer) = unsafe { PEERS.get(socket(ctx)) } {
        let peer = *peer;
        if peer.backend.same(&F::load(sock))
            && peer.backend_port.0 == port(sock).0
            && F::store(sock, &peer.frontend)
        {
            set_port(sock, peer.frontend_port);
        }
    }
    ALLOW
}
