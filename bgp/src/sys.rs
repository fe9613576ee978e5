//! What no safe crate offers: TCP MD5 keys (RFC 2385), TTL security (RFC 5082), and the addresses of an interface.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString};
use std::io;
use std::mem;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, BorrowedFd};

/// `struct tcp_md5sig` of linux/tcp.h: the address is a `sockaddr_storage`, the key is inline.
#[repr(C)]
struct TcpMd5Sig {
    address: libc::sockaddr_storage,
    flags: u8,
    prefix_len: u8,
    key_len: u16,
    if_index: u32,
    key: [u8; MD5_KEY_MAX],
}

/// TCP_MD5SIG_MAXKEYLEN.
pub(crate) const MD5_KEY_MAX: usize = 80;

/// Makes the kernel sign and demand TCP MD5 with `key` towards `peer` on this socket; a listener takes one key a peer.
pub(crate) fn set_md5(socket: BorrowedFd<'_>, peer: IpAddr, key: &[u8]) -> io::Result<()> {
    if key.is_empty() || key.len() > MD5_KEY_MAX {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: all-zero bytes are a valid `TcpMd5Sig`: integers and byte arrays only.
    let mut sig: TcpMd5Sig = unsafe { mem::zeroed() };
    match peer {
        IpAddr::V4(a) => {
            // SAFETY: `sockaddr_storage` is defined to be large and aligned enough for any socket address.
            let sin = unsafe { &mut *(&raw mut sig.address).cast::<libc::sockaddr_in>() };
            sin.sin_family = libc::AF_INET as libc::sa_family_t;
            sin.sin_addr.s_addr = u32::from(a).to_be();
        }
        IpAddr::V6(a) => {
            // SAFETY: as above.
            let sin6 = unsafe { &mut *(&raw mut sig.address).cast::<libc::sockaddr_in6>() };
            sin6.sin6_family = libc::AF_INET6 as libc::sa_family_t;
            sin6.sin6_addr.s6_addr = a.octets();
        }
    }
    sig.key_len = key.len() as u16;
    sig.key[..key.len()].copy_from_slice(key);
    set(socket, libc::IPPROTO_TCP, libc::TCP_MD5SIG, &sig)
}

/// Sends with TTL 255 and drops what arrives with less (RFC 5082 §3): only a neighbour can have sent it.
pub(crate) fn set_gtsm(socket: BorrowedFd<'_>, peer: IpAddr) -> io::Result<()> {
    let most: libc::c_int = 255;
    match peer {
        IpAddr::V4(_) => {
            set(socket, libc::IPPROTO_IP, libc::IP_TTL, &most)?;
            set(socket, libc::IPPROTO_IP, libc::IP_MINTTL, &most)
        }
        IpAddr::V6(_) => {
            set(socket, libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS, &most)?;
            set(socket, libc::IPPROTO_IPV6, libc::IPV6_MINHOPCOUNT, &most)
        }
    }
}

fn set<T>(
    socket: BorrowedFd<'_>,
    level: libc::c_int,
    name: libc::c_int,
    value: &T,
) -> io::Result<()> {
    // SAFETY: the descriptor is borrowed and open; the pointer and length describe `value`, which outlives the call.
    let done = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            std::ptr::from_ref(value).cast(),
            mem::size_of::<T>() as libc::socklen_t,
        )
    };
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// The index of an interface of this network namespace.
pub(crate) fn interface_index(name: &str) -> io::Result<u32> {
    let name = CString::new(name).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: `name` is a valid C string for the length of the call.
    match unsafe { libc::if_nametoindex(name.as_ptr()) } {
        0 => Err(io::Error::last_os_error()),
        index => Ok(index),
    }
}

/// Every address of this network namespace, with its interface's name, as the kernel lists them.
pub(crate) fn addresses() -> io::Result<Vec<(String, IpAddr)>> {
    let mut list = std::ptr::null_mut();
    // SAFETY: `list` is a valid place for the list's head.
    if unsafe { libc::getifaddrs(&raw mut list) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let mut found = Vec::new();
    let mut next = list;
    // SAFETY: a non-null pointer from getifaddrs points to an `ifaddrs` that lives until freeifaddrs.
    while let Some(entry) = unsafe { next.as_ref() } {
        next = entry.ifa_next;
        // SAFETY: `ifa_addr` is null or points to a socket address of the family it names.
        let Some(address) = (unsafe { entry.ifa_addr.as_ref() }) else {
            continue;
        };
        let ip = match i32::from(address.sa_family) {
            libc::AF_INET => {
                // SAFETY: the family says that this is a `sockaddr_in`.
                let sin = unsafe { &*entry.ifa_addr.cast::<libc::sockaddr_in>() };
                IpAddr::V4(Ipv4Addr::from(u32::from_be(sin.sin_addr.s_addr)))
            }
            libc::AF_INET6 => {
                // SAFETY: the family says that this is a `sockaddr_in6`.
                let sin6 = unsafe { &*entry.ifa_addr.cast::<libc::sockaddr_in6>() };
                IpAddr::V6(Ipv6Addr::from(sin6.sin6_addr.s6_addr))
            }
            _ => continue,
        };
        // SAFETY: `ifa_name` is a C string that lives as long as the list.
        let name = unsafe { CStr::from_ptr(entry.ifa_name) };
        found.push((name.to_string_lossy().into_owned(), ip));
    }
    // SAFETY: `list` came from getifaddrs, and nothing borrows from it any more.
    unsafe { libc::freeifaddrs(list) };
    Ok(found)
}
