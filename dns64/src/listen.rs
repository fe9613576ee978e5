//! Listening: sockets for one listener, and who holds an address that is taken.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use kun_dns_core::Listen;
use socket2::{Domain, Protocol, Socket, Type};

use crate::sys;

/// A thread that hears nothing looks this often whether it is to stop.
const LOOK_UP: Duration = Duration::from_millis(200);

/// Datagrams waiting in a socket: 4 MiB is some 10,000 questions, a tenth of a second of work.
const RECEIVE_BUFFER: usize = 4 << 20;

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Someone else has it.
    #[error(
        "{address}/{protocol}: taken by {holder}; stop it, or change port or bind in the Corefile (for metrics: dns.metrics in kun.yaml)"
    )]
    Occupied {
        /// The address.
        address: SocketAddr,
        /// `udp`, `tcp`.
        protocol: &'static str,
        /// `systemd-resolve (pid 612)`, as far as can be seen.
        holder: String,
    },
    /// Not possible for another reason.
    #[error("{address}/{protocol}: cannot listen ({source}); {}", remedy(source))]
    Failed {
        /// The address.
        address: SocketAddr,
        /// `udp`, `tcp`.
        protocol: &'static str,
        /// Why.
        source: io::Error,
    },
}

fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => {
            "run it as root or with CAP_NET_BIND_SERVICE, or give a port above 1023 in the Corefile"
        }
        io::ErrorKind::AddrNotAvailable => "bind must name an address of this host",
        _ => "change port or bind in the Corefile",
    }
}

/// The sockets of one listener.
#[derive(Debug)]
pub struct Sockets {
    /// One for each thread.
    pub udp: Vec<UdpSocket>,
    /// Not blocking.
    pub tcp: std::net::TcpListener,
}

/// Binds the sockets of `listen`.
pub fn bind(listen: Listen, threads: usize) -> Result<Sockets, ListenError> {
    let any6 = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), listen.port);
    let address = listen
        .address
        .map_or(any6, |ip| SocketAddr::new(ip, listen.port));
    match sockets(address, listen.address.is_none(), threads) {
        // A kernel without IPv6: every IPv4 address is then every address.
        Err(ListenError::Failed { source, .. })
            if listen.address.is_none() && source.raw_os_error() == Some(libc::EAFNOSUPPORT) =>
        {
            sockets(
                SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), listen.port),
                true,
                threads,
            )
        }
        other => other,
    }
}

fn sockets(address: SocketAddr, every: bool, threads: usize) -> Result<Sockets, ListenError> {
    let fault = |protocol, source: io::Error| match source.kind() {
        io::ErrorKind::AddrInUse => ListenError::Occupied {
            address,
            protocol,
            holder: holder(protocol, address),
        },
        _ => ListenError::Failed {
            address,
            protocol,
            source,
        },
    };
    // Alone first: SO_REUSEPORT would share the address with another instance of ours without a word.
    drop(udp(address, every, false).map_err(|e| fault("udp", e))?);
    let udp = (0..threads)
        .map(|_| udp(address, every, true))
        .collect::<Result<_, _>>();
    Ok(Sockets {
        udp: udp.map_err(|e| fault("udp", e))?,
        tcp: tcp(address).map_err(|e| fault("tcp", e))?,
    })
}

fn udp(address: SocketAddr, every: bool, share: bool) -> io::Result<UdpSocket> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::DGRAM,
        Some(Protocol::UDP),
    )?;
    if address.is_ipv6() {
        socket.set_only_v6(!every)?;
    }
    if share {
        socket.set_reuse_port(true)?;
        // Less is granted where net.core.rmem_max says so.
        socket.set_recv_buffer_size(RECEIVE_BUFFER)?;
        socket.set_read_timeout(Some(LOOK_UP))?;
        if every {
            sys::want_destination(&socket, address.is_ipv6())?;
        }
    }
    socket.bind(&address.into())?;
    Ok(socket.into())
}

/// A listening TCP socket.
pub(crate) fn tcp(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    if address.is_ipv6() {
        socket.set_only_v6(!address.ip().is_unspecified())?;
    }
    // Connections of a former instance in TIME_WAIT hold up nobody; a listening one still does.
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(1024)?;
    Ok(socket.into())
}

/// Binds an HTTP endpoint.
pub(crate) fn http(address: SocketAddr) -> Result<std::net::TcpListener, ListenError> {
    tcp(address).map_err(|source| match source.kind() {
        io::ErrorKind::AddrInUse => ListenError::Occupied {
            address,
            protocol: "tcp",
            holder: holder("tcp", address),
        },
        _ => ListenError::Failed {
            address,
            protocol: "tcp",
            source,
        },
    })
}

/// Who holds a port, from /proc: the kernel's tables name an inode, a process's descriptors name it too.
fn holder(protocol: &str, address: SocketAddr) -> String {
    let inodes: Vec<String> = [protocol.to_owned(), format!("{protocol}6")]
        .iter()
        .filter_map(|table| fs::read_to_string(format!("/proc/net/{table}")).ok())
        .flat_map(|text| {
            text.lines()
                .skip(1)
                .filter_map(|line| {
                    let words: Vec<&str> = line.split_whitespace().collect();
                    let (host, port) = words.get(1)?.rsplit_once(':')?;
                    let every = host.bytes().all(|b| b == b'0')
                        || address.ip().is_unspecified()
                        || is(host, address.ip());
                    let listens = protocol == "udp" || words.get(3) == Some(&"0A");
                    (u16::from_str_radix(port, 16).ok()? == address.port() && every && listens)
                        .then(|| words.get(9).map(ToString::to_string))?
                })
                .collect::<Vec<_>>()
        })
        .collect();
    let wanted: Vec<String> = inodes.iter().map(|i| format!("socket:[{i}]")).collect();
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = process
            .file_name()
            .to_str()
            .and_then(|n| n.parse::<u32>().ok())
        else {
            continue;
        };
        for descriptor in fs::read_dir(process.path().join("fd"))
            .into_iter()
            .flatten()
            .flatten()
        {
            let link = fs::read_link(descriptor.path()).unwrap_or_default();
            if wanted.iter().any(|w| link.as_os_str() == w.as_str()) {
                let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
                return format!("{} (pid {pid})", name.trim());
            }
        }
    }
    "a process that cannot be seen from here".to_owned()
}

/// Whether /proc/net's hexadecimal `host` is `ip`: 32-bit words in the machine's order.
fn is(host: &str, ip: IpAddr) -> bool {
    let octets: Vec<u8> = match ip {
        IpAddr::V4(a) => a.octets().to_vec(),
        IpAddr::V6(a) => a.octets().to_vec(),
    };
    let text: String = octets
        .chunks_exact(4)
        .map(|w| format!("{:08X}", u32::from_ne_bytes([w[0], w[1], w[2], w[3]])))
        .collect();
    host.eq_ignore_ascii_case(&text)
}
