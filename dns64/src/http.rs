//! `health`, `ready` and `prometheus` of the Corefile, and `dns.metrics` of kun.yaml: GET of one path each, HTTP/1.1, one request a connection.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use crate::slow::Shared;

/// A request line and some headers.
const MAX_REQUEST: usize = 8192;

/// For the request, and for the answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Serves until dropped.
pub(crate) async fn serve(shared: Arc<Shared>, listener: TcpListener, address: SocketAddr) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let shared = shared.clone();
                tokio::spawn(timeout(PATIENCE, async move {
                    answer(&shared, stream, address).await
                }));
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

async fn answer(
    shared: &Shared,
    mut stream: TcpStream,
    address: SocketAddr,
) -> std::io::Result<()> {
    let mut request = Vec::new();
    while !request.windows(4).any(|w| w == b"\r\n\r\n") {
        if request.len() > MAX_REQUEST || stream.read_buf(&mut request).await? == 0 {
            return Ok(());
        }
    }
    let line = String::from_utf8_lossy(&request);
    let mut words = line.split_whitespace();
    let (method, target) = (
        words.next().unwrap_or_default(),
        words.next().unwrap_or_default(),
    );
    let path = target.split('?').next().unwrap_or_default();
    let loaded = shared.loaded.load_full();
    // What is served where may change with a reload; the listener stays.
    let served = loaded.endpoints().contains(&(address, path));
    let (status, kind, body) = match (method, path) {
        ("GET" | "HEAD", _) if !served => ("404 Not Found", "text/plain", "not found\n".to_owned()),
        ("GET" | "HEAD", "/health" | "/healthz") => ("200 OK", "text/plain", "OK".to_owned()),
        ("GET" | "HEAD", "/ready" | "/readyz") => match loaded.world.synced() {
            true => ("200 OK", "text/plain", "OK".to_owned()),
            // CoreDNS names the plugins that are not ready.
            false => (
                "503 Service Unavailable",
                "text/plain",
                "kubernetes".to_owned(),
            ),
        },
        ("GET" | "HEAD", _) => (
            "200 OK",
            "text/plain; version=0.0.4; charset=utf-8",
            shared.metrics.text(&loaded),
        ),
        _ => (
            "405 Method Not Allowed",
            "text/plain",
            "GET only\n".to_owned(),
        ),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await?;
    if method != "HEAD" {
        stream.write_all(body.as_bytes()).await?;
    }
    stream.shutdown().await
}
