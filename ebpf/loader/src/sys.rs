//! The loader's only unsafe code: values that travel through maps, and an interface's MTU.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::AsRawFd;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

/// A map's key or value: aya's marker cannot be put on the types of another crate.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Plain<T>(pub(crate) T);

// SAFETY: used for the types of `kun_ebpf_abi` alone, which are `repr(C)`, hold integers and say their padding.
unsafe impl<T: Copy + 'static> aya::Pod for Plain<T> {}

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
