//! Stands between a client and a real API server and spoils answers: refuses, cuts in the middle of an event, swallows an event,
//! changes over to another server. It speaks plain HTTP/1.1 to the client (one request a connection), and to the server whatever a
//! kubeconfig says; everything that it does not spoil is the server's own.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result};
use http_body_util::BodyExt;
use kube::client::Body;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// What is to go wrong.
#[derive(Debug, Default)]
pub struct Faults {
    /// Answers to the next requests: status, `Retry-After` in seconds.
    pub refuse: VecDeque<(u16, Option<u32>)>,
    /// Lines of streams that contain this are left out.
    pub swallow: Option<String>,
    /// Increased: every answer that is under way ends in the middle of what it was about to say.
    pub cuts: u64,
}

/// The proxy; dropped, it is gone.
#[derive(Debug)]
pub struct FaultyProxy {
    shared: Arc<Shared>,
    // Ends its tasks when dropped.
    _runtime: tokio::runtime::Runtime,
    address: std::net::SocketAddr,
    dir: tempfile::TempDir,
}

#[derive(Debug)]
struct Shared {
    faults: Mutex<Faults>,
    upstream: Mutex<PathBuf>,
    requests: std::sync::atomic::AtomicU64,
}

impl FaultyProxy {
    /// In front of the server of a kubeconfig.
    pub fn start(kubeconfig: &Path) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("faulty-proxy")
            .enable_all()
            .build()?;
        let shared = Arc::new(Shared {
            faults: Mutex::default(),
            upstream: Mutex::new(kubeconfig.to_owned()),
            requests: std::sync::atomic::AtomicU64::new(0),
        });
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0"))?;
        let address = listener.local_addr()?;
        let accepting = Arc::clone(&shared);
        runtime.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let shared = Arc::clone(&accepting);
                // A connection that fails is what a faulty proxy is for.
                tokio::spawn(async move { drop(serve(stream, &shared).await) });
            }
        });
        let dir = tempfile::tempdir()?;
        let text = format!(
            "apiVersion: v1\nkind: Config\nclusters: [{{name: p, cluster: {{server: 'http://{address}'}}}}]\nusers: [{{name: p, user: {{}}}}]\n\
             contexts: [{{name: p, context: {{cluster: p, user: p}}}}]\ncurrent-context: p\n"
        );
        std::fs::write(dir.path().join("kubeconfig"), text)?;
        Ok(Self {
            shared,
            _runtime: runtime,
            address,
            dir,
        })
    }

    /// A kubeconfig that leads through the proxy.
    pub fn kubeconfig(&self) -> PathBuf {
        self.dir.path().join("kubeconfig")
    }

    /// Its address.
    pub fn address(&self) -> std::net::SocketAddr {
        self.address
    }

    /// What is to go wrong.
    pub fn faults(&self) -> MutexGuard<'_, Faults> {
        self.shared.faults()
    }

    /// Ends every answer that is under way in the middle of an event.
    pub fn cut(&self) {
        self.faults().cuts += 1;
    }

    /// New requests go to another server.
    pub fn change_over(&self, kubeconfig: &Path) {
        *lock(&self.shared.upstream) = kubeconfig.to_owned();
        self.cut();
    }

    /// Requests so far.
    pub fn requests(&self) -> u64 {
        self.shared
            .requests
            .load(std::sync::atomic::Ordering::Relaxed)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn faults(&self) -> MutexGuard<'_, Faults> {
        lock(&self.faults)
    }
}

async fn serve(mut stream: TcpStream, shared: &Shared) -> Result<()> {
    let asked = read_request(&mut stream).await?;
    shared
        .requests
        .fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let refused = shared.faults().refuse.pop_front();
    if let Some((status, after)) = refused {
        let body = format!(
            "{{\"kind\":\"Status\",\"code\":{status},\"message\":\"the proxy says {status}\"}}"
        );
        let after = after
            .map(|s| format!("Retry-After: {s}\r\n"))
            .unwrap_or_default();
        let head = format!(
            "HTTP/1.1 {status} No\r\nConnection: close\r\n{after}Content-Length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all((head + &body).as_bytes()).await?;
        return Ok(());
    }
    let cuts = shared.faults().cuts;
    let upstream = lock(&shared.upstream).clone();
    let mut config = Config::from_custom_kubeconfig(
        Kubeconfig::read_from(upstream)?,
        &KubeConfigOptions::default(),
    )
    .await?;
    // An answer that is an error is the client's to see.
    config.default_retry = false;
    let mut request = http::Request::builder()
        .method(asked.method.as_str())
        .uri(asked.path)
        .header("accept", asked.accept);
    if let Some(kind) = asked.content_type {
        request = request.header("content-type", kind);
    }
    let request = request.body(Body::from(asked.body))?;
    let answer = Client::try_from(config)?.send(request).await?;
    let after = answer
        .headers()
        .get("retry-after")
        .and_then(|v| v.to_str().ok());
    let after = after
        .map(|s| format!("Retry-After: {s}\r\n"))
        .unwrap_or_default();
    let status = answer.status().as_u16();
    let head = format!(
        "HTTP/1.1 {status} Yes\r\nConnection: close\r\n{after}Transfer-Encoding: chunked\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await?;
    let mut body = answer.into_body();
    let mut begun: Vec<u8> = Vec::new();
    // Looked at this often, so that a cut does not wait for the server to speak.
    let mut tick = tokio::time::interval(std::time::Duration::from_millis(50));
    loop {
        tokio::select! {
            _ = tick.tick() => {
                if shared.faults().cuts != cuts {
                    // Half an event, and no end of the chunks.
                    write_chunk(&mut stream, b"{\"type\":\"ADDED\",\"object\":{\"metadata\":{\"name\":\"half").await?;
                    return Ok(());
                }
            }
            frame = body.frame() => {
                let Some(frame) = frame else { break };
                let Ok(data) = frame?.into_data() else { continue };
                let swallow = shared.faults().swallow.clone();
                match swallow {
                    None => {
                        begun.extend_from_slice(&data);
                        write_chunk(&mut stream, &std::mem::take(&mut begun)).await?;
                    }
                    Some(text) => {
                        begun.extend_from_slice(&data);
                        while let Some(end) = begun.iter().position(|b| *b == b'\n') {
                            let line: Vec<u8> = begun.drain(..=end).collect();
                            if !String::from_utf8_lossy(&line).contains(&text) {
                                write_chunk(&mut stream, &line).await?;
                            }
                        }
                    }
                }
            }
        }
    }
    write_chunk(&mut stream, &begun).await?;
    stream.write_all(b"0\r\n\r\n").await?;
    Ok(())
}

async fn write_chunk(stream: &mut TcpStream, data: &[u8]) -> Result<()> {
    if !data.is_empty() {
        stream
            .write_all(format!("{:x}\r\n", data.len()).as_bytes())
            .await?;
        stream.write_all(data).await?;
        stream.write_all(b"\r\n").await?;
    }
    Ok(())
}

/// Of a request what is passed on.
struct Asked {
    method: String,
    path: String,
    accept: String,
    content_type: Option<String>,
    body: Vec<u8>,
}

async fn read_request(stream: &mut TcpStream) -> Result<Asked> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        anyhow::ensure!(head.len() < 64 << 10, "a request of more than 64 KiB");
        head.push(stream.read_u8().await?);
    }
    let head = String::from_utf8(head)?;
    let mut words = head.split(' ');
    let method = words.next().context("a request line")?.to_owned();
    let path = words.next().context("a request line")?.to_owned();
    let header = |name: &str| {
        let mut lines = head.lines().filter_map(|l| l.split_once(':'));
        let found = lines.find(|(k, _)| k.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.trim().to_owned())
    };
    let length: usize = match header("content-length") {
        Some(length) => length.parse()?,
        None => 0,
    };
    anyhow::ensure!(length <= 1 << 20, "a request with more than a MiB");
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await?;
    Ok(Asked {
        method,
        path,
        accept: header("accept").unwrap_or_else(|| "*/*".to_owned()),
        content_type: header("content-type"),
        body,
    })
}
