//! What runs in a pod of the lab: HTTP on every TCP port of its containers, echo on every UDP port. Every answer tells which pod
//! answered and whom it saw as its peer. Also the client side of both, which [`super::client`] drives.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// An answer of a pod is far below this.
const LARGEST_ANSWER: u64 = 64 << 10;

/// What a pod says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The pod's name, or `internet`.
    pub pod: String,
    /// The peer's address and port as the server saw them.
    pub peer: String,
}

/// Serves until killed.
pub fn serve(name: &str, tcp: &[u16], udp: &[u16]) -> Result<()> {
    end_on_signal()?;
    let mut threads = Vec::new();
    for &port in tcp {
        let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))
            .with_context(|| format!("TCP port {port}"))?;
        let name = name.to_owned();
        threads.push(std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let name = name.clone();
                std::thread::spawn(move || answer(stream, &name));
            }
        }));
    }
    for &port in udp {
        let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port))
            .with_context(|| format!("UDP port {port}"))?;
        let name = name.to_owned();
        threads.push(std::thread::spawn(move || echo(&socket, &name)));
    }
    if threads.is_empty() {
        // A pod without ports runs all the same.
        loop {
            std::thread::park();
        }
    }
    for thread in threads {
        let _ = thread.join();
    }
    Ok(())
}

/// The path by which a kubelet learns whether the pod is ready.
pub const READY_PATH: &str = "/ready";
const READY: &str = "GET /ready ";

/// The pod was told to end.
static ENDING: AtomicBool = AtomicBool::new(false);

/// After a pod is told to end, it says that it is not ready, and serves on for so long: by then the kubelet has asked, every node
/// has heard, and nobody sends it anything. Whoever stops at once refuses what comes from nodes that have not heard yet.
const SERVES_ON: Duration = Duration::from_secs(5);

/// Ends the process some time after SIGTERM. The first process of a container gets no signal that it does not ask for.
fn end_on_signal() -> Result<()> {
    on_signal(|| {
        ENDING.store(true, Ordering::Relaxed);
        std::thread::sleep(SERVES_ON);
    })
}

/// Holds a pod's namespaces until SIGTERM.
pub fn pause() -> Result<()> {
    on_signal(|| {})?;
    loop {
        std::thread::park();
    }
}

fn on_signal(then: impl FnOnce() + Send + 'static) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let mut terminate = {
        let _guard = runtime.enter();
        tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?
    };
    std::thread::spawn(move || {
        runtime.block_on(terminate.recv());
        then();
        std::process::exit(0);
    });
    Ok(())
}

/// One connection: requests until the peer closes.
fn answer(stream: TcpStream, name: &str) -> io::Result<()> {
    let peer = canonical(stream.peer_addr()?);
    let mut writer = stream.try_clone()?;
    let mut reader = BufReader::new(stream);
    while let Some(request) = read_head(&mut reader)? {
        if request.starts_with(READY) && ENDING.load(Ordering::Relaxed) {
            write!(
                writer,
                "HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"
            )?;
            continue;
        }
        let body = serde_json::to_string(&Hello {
            pod: name.to_owned(),
            peer: peer.to_string(),
        })?;
        write!(
            writer,
            "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )?;
    }
    Ok(())
}

/// The request line; `None` at the end of the stream.
fn read_head(reader: &mut impl BufRead) -> io::Result<Option<String>> {
    let mut request = String::new();
    loop {
        let mut line = String::new();
        if reader.take(LARGEST_ANSWER).read_line(&mut line)? == 0 {
            return Ok(None);
        }
        if line.trim_end().is_empty() {
            if !request.is_empty() {
                return Ok(Some(request));
            }
        } else if request.is_empty() {
            request = line;
        }
    }
}

fn echo(socket: &UdpSocket, name: &str) {
    let mut buffer = [0; 2048];
    while let Ok((_, peer)) = socket.recv_from(&mut buffer) {
        let hello = Hello {
            pod: name.to_owned(),
            peer: canonical(peer).to_string(),
        };
        if let Ok(text) = serde_json::to_vec(&hello) {
            let _ = socket.send_to(&text, peer);
        }
    }
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// One request over a connection that stands.
pub fn exchange(stream: &mut TcpStream, host: &str) -> Result<Hello> {
    write!(stream, "GET / HTTP/1.1\r\nHost: {host}\r\n\r\n")?;
    let mut reader = BufReader::new(stream);
    let mut length = 0_u64;
    let mut status = String::new();
    loop {
        let mut line = String::new();
        anyhow::ensure!(
            (&mut reader).take(LARGEST_ANSWER).read_line(&mut line)? > 0,
            "the server closed the connection"
        );
        if status.is_empty() {
            status = line.trim_end().to_owned();
        }
        if let Some((name, value)) = line.split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            length = value.trim().parse().context("Content-Length")?;
        }
        if line.trim_end().is_empty() {
            break;
        }
    }
    anyhow::ensure!(status.contains(" 200 "), "{status}");
    let mut body = vec![0; length.min(LARGEST_ANSWER) as usize];
    reader.read_exact(&mut body)?;
    serde_json::from_slice(&body).context("the body is not one of the lab's")
}

/// One fetch over a new connection.
pub fn fetch(address: SocketAddr, host: &str, within: Duration) -> Result<Hello> {
    let mut stream = connect(address, within)?;
    exchange(&mut stream, host)
}

/// A connection with deadlines.
pub fn connect(address: SocketAddr, within: Duration) -> Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&address, within)?;
    stream.set_read_timeout(Some(within))?;
    stream.set_write_timeout(Some(within))?;
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_carries_several_requests() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            answer(stream, "p").unwrap();
        });
        let mut stream = connect(address, Duration::from_secs(5)).unwrap();
        let seen = stream.local_addr().unwrap().to_string();
        for _ in 0..2 {
            let hello = exchange(&mut stream, "p").unwrap();
            assert_eq!(
                hello,
                Hello {
                    pod: "p".into(),
                    peer: seen.clone()
                }
            );
        }
    }
}
