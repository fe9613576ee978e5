//! UDP sockets of the node's own processes that are connected to a backend that their service has no more: found and aborted
//! (sock_diag(7)).
//!
//! The kernel asks no program about what a connected socket sends. Such a socket would go on sending to the address of a pod that
//! is gone, and to the next pod there. Aborted, it says ECONNABORTED to its process, which then asks the service anew. Only
//! sockets that our connect program led there are touched, by their cookies; pods' sockets are never connected to a backend.

use std::io;
use std::time::Duration;

use kun_ebpf_abi::{Addr, Port};
use kun_ebpf_loader::Error;
use kun_proxy::EbpfBackend;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_SOCK_DIAG};
use rustix::net::sockopt::{Timeout, set_socket_timeout};

/// linux/netlink.h
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;
const HEADER: usize = 16;

/// linux/sock_diag.h
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;

/// sys/socket.h, netinet/in.h
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const IPPROTO_UDP: u8 = 17;

/// `struct inet_diag_sockid` (linux/inet_diag.h): ports, addresses of 16 octets, interface, cookie.
const ID: usize = 48;

/// The state of a connected UDP socket is TCP's ESTABLISHED.
const CONNECTED: u32 = 1 << 1;

/// Sockets that are looked at in one family: a node's own processes have tens. Those beyond wait for the next look.
const MAX_SOCKETS: usize = 65_536;

/// The kernel answers at once.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// Aborts the sockets that were led to a backend that is gone; how many.
pub(super) fn abort_stale(backend: &mut EbpfBackend) -> Result<usize, SocketError> {
    let sockets = Sockets::open().map_err(SocketError::Diag)?;
    let mut led = Vec::new();
    for socket in sockets.connected().map_err(SocketError::Diag)? {
        // Led there, and not since connected to another address by its process.
        if let Some(way) = backend.peer(socket.cookie())?
            && way.backend == socket.peer()
        {
            led.push((socket, way));
        }
    }
    let gone = backend.gone(led.iter().map(|(_, way)| *way).collect())?;
    led.retain(|(_, way)| gone.contains(way));
    for (socket, _) in &led {
        sockets.abort(socket).map_err(SocketError::Diag)?;
    }
    Ok(led.len())
}

/// Why stale sockets were not looked for.
#[derive(Debug, thiserror::Error)]
pub(super) enum SocketError {
    /// The maps.
    #[error(transparent)]
    Maps(#[from] Error),
    /// The kernel has no UDP sockets' diagnosis, or no abortion.
    #[error("sock_diag: {0}; it needs CONFIG_INET_UDP_DIAG and CONFIG_INET_DIAG_DESTROY")]
    Diag(#[source] io::Error),
}

/// A connected UDP socket of this namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Connected {
    family: u8,
    id: [u8; ID],
}

impl Connected {
    /// As `bpf_get_socket_cookie` counts.
    pub(super) fn cookie(&self) -> u64 {
        let [.., a, b, c, d, e, f, g, h] = self.id;
        // Two words, the lower one first.
        let low = u32::from_ne_bytes([a, b, c, d]);
        let high = u32::from_ne_bytes([e, f, g, h]);
        u64::from(high) << 32 | u64::from(low)
    }

    /// Whom it is connected to.
    pub(super) fn peer(&self) -> (Addr, Port) {
        let port = Port(u16::from_ne_bytes([self.id[2], self.id[3]]));
        let octets: [u8; 16] = std::array::from_fn(|i| self.id[20 + i]);
        let addr = if self.family == AF_INET {
            let [a, b, c, d, ..] = octets;
            Addr::v4([a, b, c, d])
        } else {
            Addr::v6(octets)
        };
        (addr, port)
    }
}

/// The conversation.
pub(super) struct Sockets(Socket);

impl Sockets {
    /// In the calling thread's network namespace.
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_SOCK_DIAG)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        set_socket_timeout(&socket, Timeout::Recv, Some(ANSWER_WITHIN))?;
        Ok(Self(socket))
    }

    /// Every UDP socket that is connected.
    pub(super) fn connected(&self) -> io::Result<Vec<Connected>> {
        let mut found = Vec::new();
        for family in [AF_INET, AF_INET6] {
            let all = request(SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, family, &[0; ID]);
            self.0.send(&all, 0)?;
            let mut theirs = 0;
            self.answers(|body| {
                // `struct inet_diag_msg`: family, state, two octets, the id.
                if let Some(id) = body.get(4..4 + ID).and_then(|id| id.try_into().ok())
                    && theirs < MAX_SOCKETS
                {
                    theirs += 1;
                    found.push(Connected { family, id });
                }
            })?;
        }
        Ok(found)
    }

    /// The process gets ECONNABORTED. One that is closed already is no fault.
    pub(super) fn abort(&self, socket: &Connected) -> io::Result<()> {
        let one = request(SOCK_DESTROY, NLM_F_ACK, socket.family, &socket.id);
        self.0.send(&one, 0)?;
        match self.answers(|_| ()) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }

    /// Hands over the body of each answer until the last.
    fn answers(&self, mut each: impl FnMut(&[u8])) -> io::Result<()> {
        let mut datagram = Vec::with_capacity(32 << 10);
        loop {
            datagram.clear();
            self.0.recv(&mut datagram, 0)?;
            let mut rest = datagram.as_slice();
            while let Some((length, kind)) = head(rest) {
                let body = rest.get(HEADER..length).unwrap_or_default();
                match kind {
                    NLMSG_DONE => return Ok(()),
                    NLMSG_ERROR => {
                        let code = body.first_chunk().copied().unwrap_or_default();
                        return match i32::from_ne_bytes(code) {
                            0 => Ok(()),
                            code => Err(io::Error::from_raw_os_error(-code)),
                        };
                    }
                    _ => each(body),
                }
                rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
            }
        }
    }
}

/// Length and kind of a message.
fn head(bytes: &[u8]) -> Option<(usize, u16)> {
    let [a, b, c, d, e, f, ..] = *bytes else {
        return None;
    };
    let length = usize::try_from(u32::from_ne_bytes([a, b, c, d])).ok()?;
    (length >= HEADER).then_some((length, u16::from_ne_bytes([e, f])))
}

/// `struct inet_diag_req_v2` with its header.
fn request(kind: u16, flags: u16, family: u8, id: &[u8; ID]) -> Vec<u8> {
    let length = u32::try_from(HEADER + 8 + ID).unwrap_or_default();
    let mut bytes = Vec::new();
    bytes.extend(length.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend((NLM_F_REQUEST | flags).to_ne_bytes());
    bytes.extend([0; 8]);
    bytes.extend([family, IPPROTO_UDP, 0, 0]);
    bytes.extend(CONNECTED.to_ne_bytes());
    bytes.extend(id);
    bytes
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use kun_harness::{Netns, require_root};

    use super::*;

    #[test]
    fn a_connected_socket_is_found_by_its_peer_and_aborted() {
        if !require_root() {
            return;
        }
        let netns = Netns::new("sockets").unwrap();
        for (own, peer, addr) in [
            ("127.0.0.1:0", "127.0.0.1:5353", Addr::v4([127, 0, 0, 1])),
            (
                "[::1]:0",
                "[::1]:5354",
                Addr::v6(std::net::Ipv6Addr::LOCALHOST.octets()),
            ),
        ] {
            let (socket, stays) = netns.run(|| {
                let socket = UdpSocket::bind(own).unwrap();
                socket.connect(peer).unwrap();
                (socket, UdpSocket::bind(own).unwrap())
            });
            let port = Port::new(peer.rsplit(':').next().unwrap().parse().unwrap());
            netns.run(|| {
                let sockets = Sockets::open().unwrap();
                let found = sockets.connected().unwrap();
                let [one] = found.as_slice() else {
                    panic!("{found:?}")
                };
                assert_eq!(one.peer(), (addr, port));
                assert_ne!(one.cookie(), 0);
                sockets.abort(one).unwrap();
                assert_eq!(sockets.connected().unwrap(), []);
            });
            let error = socket.take_error().unwrap().unwrap();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted);
            assert!(stays.take_error().unwrap().is_none());
        }
    }
}
