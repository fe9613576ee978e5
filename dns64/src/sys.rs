//! The system calls without a safe wrapper: batches of datagrams, replies from the address that was asked, random octets.
#![allow(unsafe_code)]

use std::io;
use std::mem::{size_of, zeroed};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6, UdpSocket};
use std::os::fd::AsRawFd;

/// Datagrams a system call: at 64 the call costs little beside the work, and the newest waits for no more than that.
pub(crate) const BATCH: usize = 64;

/// Longest request: far above any question with options; what is longer is cut and found malformed.
const MAX_REQUEST: usize = 2048;

/// Room for one IP_PKTINFO or IPV6_PKTINFO message, aligned as the kernel wants it.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
struct Control([u8; 64]);

/// Where a datagram came from, and to which of our addresses: a reply takes the way back.
#[derive(Clone, Copy)]
pub(crate) struct Path {
    name: libc::sockaddr_storage,
    name_len: libc::socklen_t,
    control: Control,
    control_len: usize,
}

impl Path {
    /// The client.
    pub(crate) fn client(&self) -> SocketAddr {
        // SAFETY: the storage is larger than and aligned for either shape, and the kernel filled it as its family says.
        unsafe {
            if i32::from(self.name.ss_family) == libc::AF_INET {
                let a = &*std::ptr::from_ref(&self.name).cast::<libc::sockaddr_in>();
                SocketAddrV4::new(
                    Ipv4Addr::from(u32::from_be(a.sin_addr.s_addr)),
                    u16::from_be(a.sin_port),
                )
                .into()
            } else {
                let a = &*std::ptr::from_ref(&self.name).cast::<libc::sockaddr_in6>();
                SocketAddrV6::new(
                    Ipv6Addr::from(a.sin6_addr.s6_addr),
                    u16::from_be(a.sin6_port),
                    0,
                    a.sin6_scope_id,
                )
                .into()
            }
        }
    }

    /// Forgets the interface unless the client is link-local: the routing table knows the way back, which may be another one.
    fn settle(&mut self) {
        let link_local =
            matches!(self.client(), SocketAddr::V6(a) if a.ip().is_unicast_link_local());
        let header = size_of::<libc::cmsghdr>();
        if self.control_len < header || link_local {
            return;
        }
        // SAFETY: at least a header is there, aligned by `Control`.
        let (level, kind) = unsafe {
            let c = &*self.control.0.as_ptr().cast::<libc::cmsghdr>();
            (c.cmsg_level, c.cmsg_type)
        };
        let at = match (level, kind) {
            (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => header + 16,
            (libc::IPPROTO_IP, libc::IP_PKTINFO) => header,
            _ => return,
        };
        self.control.0[at..at + 4].fill(0);
    }
}

/// Buffers for one batch.
pub(crate) struct Batch {
    requests: Box<[[u8; MAX_REQUEST]]>,
    paths: Box<[Path]>,
    vectors: Box<[libc::iovec]>,
    headers: Box<[libc::mmsghdr]>,
    answers: Box<[Vec<u8>]>,
}

// SAFETY: the raw pointers inside are set anew, into buffers the batch owns, before each system call.
unsafe impl Send for Batch {}

impl Default for Batch {
    fn default() -> Self {
        // SAFETY: all-zero is a valid value of these C structures.
        let (path, vector, header) = unsafe {
            let path = Path {
                name: zeroed(),
                name_len: 0,
                control: Control([0; 64]),
                control_len: 0,
            };
            (path, zeroed(), zeroed::<libc::mmsghdr>())
        };
        Self {
            requests: vec![[0; MAX_REQUEST]; BATCH].into(),
            paths: vec![path; BATCH].into(),
            vectors: vec![vector; BATCH].into(),
            headers: vec![header; BATCH].into(),
            answers: std::iter::repeat_with(|| {
                Vec::with_capacity(usize::from(kun_dns_core::wire::UDP_PAYLOAD))
            })
            .take(BATCH)
            .collect(),
        }
    }
}

impl Batch {
    /// Receives what is there (waits for the first, up to the socket's timeout), has each answered, sends the answers. The number
    /// received.
    pub(crate) fn serve(
        &mut self,
        socket: &UdpSocket,
        mut answer: impl FnMut(&[u8], &Path, &mut Vec<u8>) -> bool,
    ) -> io::Result<usize> {
        for i in 0..BATCH {
            self.vectors[i] = libc::iovec {
                iov_base: self.requests[i].as_mut_ptr().cast(),
                iov_len: MAX_REQUEST,
            };
            let path = &mut self.paths[i];
            let h = &mut self.headers[i].msg_hdr;
            h.msg_name = std::ptr::from_mut(&mut path.name).cast();
            h.msg_namelen = size_of::<libc::sockaddr_storage>() as u32;
            h.msg_iov = &mut self.vectors[i];
            h.msg_iovlen = 1;
            h.msg_control = path.control.0.as_mut_ptr().cast();
            h.msg_controllen = path.control.0.len();
            h.msg_flags = 0;
        }
        // SAFETY: each header points at buffers of the lengths it states, which outlive the call.
        let n = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                self.headers.as_mut_ptr(),
                BATCH as u32,
                libc::MSG_WAITFORONE,
                std::ptr::null_mut(),
            )
        };
        let received = usize::try_from(n).map_err(|_| io::Error::last_os_error())?;
        let mut out = 0;
        for i in 0..received {
            let header = &self.headers[i];
            let (len, truncated) = (
                header.msg_len as usize,
                header.msg_hdr.msg_flags & libc::MSG_TRUNC != 0,
            );
            self.paths[i].name_len = header.msg_hdr.msg_namelen;
            self.paths[i].control_len = header.msg_hdr.msg_controllen;
            self.paths[i].settle();
            if truncated
                || !answer(
                    &self.requests[i][..len],
                    &self.paths[i],
                    &mut self.answers[i],
                )
            {
                continue;
            }
            self.vectors[out] = libc::iovec {
                iov_base: self.answers[i].as_mut_ptr().cast(),
                iov_len: self.answers[i].len(),
            };
            // Answers move up over requests that need none; a header already read is free to be overwritten.
            let path = &mut self.paths[i];
            let h = &mut self.headers[out].msg_hdr;
            h.msg_name = std::ptr::from_mut(&mut path.name).cast();
            h.msg_namelen = path.name_len;
            h.msg_iov = &mut self.vectors[out];
            h.msg_iovlen = 1;
            h.msg_control = if path.control_len == 0 {
                std::ptr::null_mut()
            } else {
                path.control.0.as_mut_ptr().cast()
            };
            h.msg_controllen = path.control_len;
            h.msg_flags = 0;
            out += 1;
        }
        let mut sent = 0;
        while sent < out {
            // SAFETY: as above; `sent..out` are headers filled in this call.
            let n = unsafe {
                libc::sendmmsg(
                    socket.as_raw_fd(),
                    self.headers.as_mut_ptr().add(sent),
                    (out - sent) as u32,
                    0,
                )
            };
            // One that cannot be sent (a client without a route) holds up nobody: it is passed over, as the network might.
            sent += usize::try_from(n).unwrap_or(0).max(1);
        }
        Ok(received)
    }
}

/// Sends one answer back along `path`.
pub(crate) fn send(socket: &UdpSocket, path: &Path, answer: &[u8]) -> io::Result<()> {
    let mut path = *path;
    let mut vector = libc::iovec {
        iov_base: answer.as_ptr().cast_mut().cast(),
        iov_len: answer.len(),
    };
    // SAFETY: all-zero is a valid msghdr.
    let mut h: libc::msghdr = unsafe { zeroed() };
    h.msg_name = std::ptr::from_mut(&mut path.name).cast();
    h.msg_namelen = path.name_len;
    h.msg_iov = &mut vector;
    h.msg_iovlen = 1;
    if path.control_len > 0 {
        h.msg_control = path.control.0.as_mut_ptr().cast();
        h.msg_controllen = path.control_len;
    }
    // SAFETY: the header points at buffers that outlive the call; sendmsg reads them only.
    let n = unsafe { libc::sendmsg(socket.as_raw_fd(), &h, libc::MSG_DONTWAIT) };
    if n < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Asks for the address a datagram was sent to, on a socket bound to every address.
pub(crate) fn want_destination(socket: &socket2::Socket, v6: bool) -> io::Result<()> {
    let (level, option) = if v6 {
        (libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO)
    } else {
        (libc::IPPROTO_IP, libc::IP_PKTINFO)
    };
    let on: libc::c_int = 1;
    // SAFETY: the option takes an int, and gets one with its size.
    let n = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            std::ptr::from_ref(&on).cast(),
            size_of::<libc::c_int>() as u32,
        )
    };
    if n < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Random octets from the kernel, for message ids, seeds and choices.
pub(crate) fn random<const N: usize>() -> [u8; N] {
    let mut out = [0u8; N];
    // SAFETY: the buffer is N octets. Up to 256 octets the call neither blocks, once the system is up, nor returns short.
    let n = unsafe { libc::getrandom(out.as_mut_ptr().cast(), N, 0) };
    assert!(
        N <= 256 && n == N as isize,
        "getrandom: {}",
        io::Error::last_os_error()
    );
    out
}
