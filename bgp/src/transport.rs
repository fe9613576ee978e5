//! TCP towards a peer: dialling, listening, and the options that protect both.

use std::io;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::os::fd::AsFd;
use std::time::Duration;

use kun_config::BgpPeer;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

use crate::sys;

/// A neighbour answers in milliseconds; a SYN that got no answer for this long was dropped on purpose.
pub(crate) const DIAL_WITHIN: Duration = Duration::from_secs(4);

/// Connections that wait to be accepted: two for each of the peers of a node, with room.
const BACKLOG: i32 = 64;

/// A TCP MD5 key; never shown.
#[derive(Clone)]
pub(crate) struct Key(pub(crate) Vec<u8>);

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key(…)")
    }
}

/// Why a peer cannot be reached.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DialError {
    #[error("no interface {interface} in this network namespace ({source})")]
    Interface {
        interface: String,
        source: io::Error,
    },
    #[error("{option} cannot be set on the socket: {source}")]
    Option {
        option: &'static str,
        source: io::Error,
    },
    #[error("source {address} cannot be used: {source}")]
    Source { address: IpAddr, source: io::Error },
    #[error(
        "{address} refuses connections: no BGP speaker listens there, or it does not know this node"
    )]
    Refused { address: SocketAddr },
    #[error("no answer from {address} in {} s; TCP MD5 is on, and a wrong key looks exactly like this", DIAL_WITHIN.as_secs())]
    SilentWithKey { address: SocketAddr },
    #[error("no answer from {address} in {} s: it is down, filtered, or demands a TCP MD5 key that is not configured here", DIAL_WITHIN.as_secs())]
    Silent { address: SocketAddr },
    #[error("{address}: {source}")]
    Connect {
        address: SocketAddr,
        source: io::Error,
    },
}

/// Where a peer is, with the scope of a link-local address.
pub(crate) fn peer_address(peer: &BgpPeer) -> Result<SocketAddr, DialError> {
    let IpAddr::V6(address) = peer.address else {
        return Ok(SocketAddr::new(peer.address, peer.port));
    };
    let scope = match &peer.interface {
        None => 0,
        Some(interface) => {
            sys::interface_index(interface).map_err(|source| DialError::Interface {
                interface: interface.clone(),
                source,
            })?
        }
    };
    Ok(SocketAddrV6::new(address, peer.port, 0, scope).into())
}

/// An outgoing connection to a peer.
pub(crate) async fn dial(peer: &BgpPeer, key: Option<&Key>) -> Result<TcpStream, DialError> {
    let address = peer_address(peer)?;
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4(),
        SocketAddr::V6(_) => TcpSocket::new_v6(),
    }
    .map_err(|source| DialError::Connect { address, source })?;
    protect(socket.as_fd(), peer, key)?;
    if let Some(source_address) = peer.source {
        let scope = match address {
            SocketAddr::V6(a) if source_address.is_ipv6() => a.scope_id(),
            _ => 0,
        };
        let local = match source_address {
            IpAddr::V4(_) => SocketAddr::new(source_address, 0),
            IpAddr::V6(a) => SocketAddrV6::new(a, 0, 0, scope).into(),
        };
        socket.bind(local).map_err(|source| DialError::Source {
            address: source_address,
            source,
        })?;
    }
    match tokio::time::timeout(DIAL_WITHIN, socket.connect(address)).await {
        Err(_) if key.is_some() => Err(DialError::SilentWithKey { address }),
        Err(_) => Err(DialError::Silent { address }),
        Ok(Err(source)) if source.kind() == io::ErrorKind::ConnectionRefused => {
            Err(DialError::Refused { address })
        }
        Ok(Err(source)) => Err(DialError::Connect { address, source }),
        Ok(Ok(stream)) => {
            // Keepalives are small and urgent.
            let _ = stream.set_nodelay(true);
            Ok(stream)
        }
    }
}

/// The options of an accepted connection. MD5 came with the listener.
pub(crate) fn accepted(stream: &TcpStream, peer: &BgpPeer) -> io::Result<()> {
    stream.set_nodelay(true)?;
    if peer.gtsm {
        sys::set_gtsm(stream.as_fd(), peer.address)?;
    }
    Ok(())
}

fn protect(
    socket: std::os::fd::BorrowedFd<'_>,
    peer: &BgpPeer,
    key: Option<&Key>,
) -> Result<(), DialError> {
    if let Some(Key(key)) = key {
        sys::set_md5(socket, peer.address, key).map_err(|source| DialError::Option {
            option: "TCP MD5 (RFC 2385)",
            source,
        })?;
    }
    if peer.gtsm {
        sys::set_gtsm(socket, peer.address).map_err(|source| DialError::Option {
            option: "TTL security (RFC 5082)",
            source,
        })?;
    }
    Ok(())
}

/// A listener that demands each peer's key. `[::]` takes IPv4 peers as well.
pub(crate) fn listen<'a>(
    address: SocketAddr,
    keys: impl Iterator<Item = (&'a BgpPeer, &'a Key)>,
) -> io::Result<TcpListener> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM.nonblocking().cloexec(),
        Some(Protocol::TCP),
    )?;
    socket.set_reuse_address(true)?;
    let any_v6 = matches!(address, SocketAddr::V6(a) if a.ip().is_unspecified());
    if any_v6 {
        socket.set_only_v6(false)?;
    }
    for (peer, Key(key)) in keys {
        match peer.address {
            IpAddr::V4(a) if any_v6 => {
                sys::set_md5(socket.as_fd(), a.to_ipv6_mapped().into(), key)?
            }
            IpAddr::V4(_) if address.is_ipv4() => sys::set_md5(socket.as_fd(), peer.address, key)?,
            IpAddr::V6(_) if address.is_ipv6() => sys::set_md5(socket.as_fd(), peer.address, key)?,
            _ => {}
        }
    }
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// Whether an accepted connection comes from `peer`.
pub(crate) fn is_from(remote: SocketAddr, peer: &BgpPeer) -> bool {
    if remote.ip().to_canonical() != peer.address {
        return false;
    }
    match (remote, &peer.interface) {
        (SocketAddr::V6(remote), Some(interface)) => {
            sys::interface_index(interface).is_ok_and(|i| i == remote.scope_id())
        }
        _ => true,
    }
}
