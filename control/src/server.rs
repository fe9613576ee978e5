//! The agent's end: one thread a connection, one JSON line a request, answered in order.
//!
//! A socket file that nobody answers on is left over from a killed agent and replaced; a live one is refused. Only root may
//! connect. Lines are at most [`MAX_LINE`] bytes and connections at most [`MAX_CONNECTIONS`].
//!
//! The threads wait for connections themselves: an ADD would otherwise wait for one to be made, on a busy node for as long as
//! the kernel takes to come to it.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::{MAX_LINE, Request, Response};

/// A kubelet adds pods ten at a time by default and 250 at most; each ADD is one connection.
const MAX_CONNECTIONS: usize = 512;

/// Threads that wait for connections once a burst is over: as many pods as a kubelet adds at once by default, and a few more.
const MAX_IDLE: usize = 16;

/// A client that is silent for so long has died without closing.
const IDLE: Duration = Duration::from_secs(60);

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Another agent lives.
    #[error("{}: another agent answers there; one node has one kun-proxy: stop it, or give this one another agent.socket", path.display())]
    Occupied {
        /// The socket.
        path: PathBuf,
    },
    /// The path is something else.
    #[error("{}: is there and is no socket; remove it, or give another agent.socket", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The system's word.
    #[error("{}: {source}; agent.socket must lie in a directory that can be written", path.display())]
    Io {
        /// The socket.
        path: PathBuf,
        /// What happened.
        source: io::Error,
    },
}

/// A bound socket; the file goes when this is dropped.
#[derive(Debug)]
pub struct Server {
    path: PathBuf,
    listener: UnixListener,
}

impl Server {
    /// Binds `path`. Connections wait in its backlog until [`Server::serve`].
    pub fn bind(path: &Path) -> Result<Self, SocketError> {
        let io = |source| SocketError::Io {
            path: path.to_owned(),
            source,
        };
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory).map_err(io)?;
        }
        match fs::symlink_metadata(path) {
            Ok(meta) if !std::os::unix::fs::FileTypeExt::is_socket(&meta.file_type()) => {
                return Err(SocketError::NotASocket {
                    path: path.to_owned(),
                });
            }
            Ok(_) if UnixStream::connect(path).is_ok() => {
                return Err(SocketError::Occupied {
                    path: path.to_owned(),
                });
            }
            Ok(_) => {
                tracing::info!(socket = %path.display(), "replacing the socket of an agent that is gone");
                fs::remove_file(path).map_err(io)?;
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(io(e)),
        }
        let listener = UnixListener::bind(path).map_err(io)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(io)?;
        Ok(Self {
            path: path.to_owned(),
            listener,
        })
    }

    /// Answers with `handle` from threads of its own, in the caller's network namespace, for as long as the process lives.
    pub fn serve(
        &self,
        handle: impl Fn(&Request) -> Response + Send + Sync + 'static,
    ) -> Result<(), SocketError> {
        let io = |source| SocketError::Io {
            path: self.path.clone(),
            source,
        };
        let listener = self.listener.try_clone().map_err(io)?;
        let crew = Arc::new(Crew {
            listener,
            handle,
            idle: AtomicUsize::new(0),
            busy: AtomicUsize::new(0),
        });
        crew.hire().map_err(io)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may be gone already, with its directory; nothing is left to do then.
        let _ = fs::remove_file(&self.path);
    }
}

/// The threads: one at least waits for the next connection, unless the system has no more.
struct Crew<H> {
    listener: UnixListener,
    handle: H,
    /// Those that wait for a connection, or are about to.
    idle: AtomicUsize,
    /// Those that have one.
    busy: AtomicUsize,
}

impl<H> Crew<H>
where
    H: Fn(&Request) -> Response + Send + Sync + 'static,
{
    fn hire(self: &Arc<Self>) -> io::Result<()> {
        let crew = Arc::clone(self);
        self.idle.fetch_add(1, Ordering::Relaxed);
        let spawned = std::thread::Builder::new()
            .name("kun-client".to_owned())
            .spawn(move || crew.work());
        if spawned.is_err() {
            self.idle.fetch_sub(1, Ordering::Relaxed);
        }
        spawned.map(|_| ())
    }

    /// Takes connection after connection; ends when enough others wait.
    fn work(self: &Arc<Self>) {
        loop {
            let mut stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Out of descriptors: pause, or this loop would take the CPU as well.
                    tracing::warn!(%error, "socket: accept failed");
                    std::thread::sleep(Duration::from_millis(100));
                    continue;
                }
            };
            if self.busy.fetch_add(1, Ordering::Relaxed) >= MAX_CONNECTIONS {
                self.busy.fetch_sub(1, Ordering::Relaxed);
                let message = format!("{MAX_CONNECTIONS} connections are open already; try again");
                // Whoever is turned away may not wait for the reason.
                let _ = write(&mut stream, &Response::Failed { message });
                continue;
            }
            if self.idle.fetch_sub(1, Ordering::Relaxed) == 1
                && let Err(error) = self.hire()
            {
                tracing::warn!(%error, "socket: no thread for more connections; they wait for this one");
            }
            let conversed = std::panic::AssertUnwindSafe(|| converse(stream, &self.handle));
            // A panic has told itself; its connection is closed, and this thread is of use still.
            if let Ok(Err(error)) = std::panic::catch_unwind(conversed) {
                tracing::debug!(%error, "socket: a conversation ended early");
            }
            self.busy.fetch_sub(1, Ordering::Relaxed);
            if self.idle.fetch_add(1, Ordering::Relaxed) >= MAX_IDLE {
                self.idle.fetch_sub(1, Ordering::Relaxed);
                return;
            }
        }
    }
}

fn converse(stream: UnixStream, handle: &impl Fn(&Request) -> Response) -> io::Result<()> {
    stream.set_read_timeout(Some(IDLE))?;
    stream.set_write_timeout(Some(IDLE))?;
    let mut stream = BufReader::new(stream);
    loop {
        let mut line = Vec::new();
        (&mut stream)
            .take(MAX_LINE as u64 + 1)
            .read_until(b'\n', &mut line)?;
        if line.is_empty() {
            return Ok(());
        }
        if line.len() > MAX_LINE {
            let message = format!("the request is longer than {MAX_LINE} bytes");
            return write(stream.get_mut(), &Response::Failed { message });
        }
        let response = match serde_json::from_slice::<Request>(&line) {
            Ok(request) => handle(&request),
            Err(e) => Response::Failed {
                message: format!(
                    "the request cannot be read ({e}); are both programs of one version?"
                ),
            },
        };
        write(stream.get_mut(), &response)?;
    }
}

fn write(stream: &mut UnixStream, response: &Response) -> io::Result<()> {
    let mut line = serde_json::to_vec(response)?;
    line.push(b'\n');
    stream.write_all(&line)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn socket() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/agent.sock");
        (dir, path)
    }

    #[test]
    fn a_dead_socket_is_replaced_and_a_live_one_refused() {
        let (_dir, path) = socket();
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        drop(UnixListener::bind(&path).unwrap());
        let server = Server::bind(&path).unwrap();
        let error = Server::bind(&path).unwrap_err();
        assert!(matches!(error, SocketError::Occupied { .. }), "{error}");
        assert!(error.to_string().contains("agent.sock"), "{error}");
        drop(server);
        assert!(!path.exists());
        fs::write(&path, b"").unwrap();
        assert!(matches!(
            Server::bind(&path),
            Err(SocketError::NotASocket { .. })
        ));
    }

    #[test]
    fn requests_are_answered_in_order_and_nonsense_is_named() {
        let (_dir, path) = socket();
        let server = Server::bind(&path).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        server
            .serve(|request| match request {
                Request::Status => Response::Done,
                _ => Response::Unknown,
            })
            .unwrap();
        let mut client = crate::Client::connect(&path).unwrap();
        assert_eq!(client.ask(&Request::Status).unwrap(), Response::Done);
        assert_eq!(client.ask(&Request::Ipam).unwrap(), Response::Unknown);
        let mut raw = UnixStream::connect(&path).unwrap();
        raw.write_all(b"{\"op\":\"fly\"}\n{\"op\":\"status\"}\n")
            .unwrap();
        let mut lines = BufReader::new(raw).lines();
        let first = lines.next().unwrap().unwrap();
        assert!(first.contains("fly") && first.contains("failed"), "{first}");
        assert!(lines.next().unwrap().unwrap().contains("done"));
    }

    #[test]
    fn more_than_wait_are_served_at_once_and_again() {
        let (_dir, path) = socket();
        let server = Server::bind(&path).unwrap();
        server.serve(|_| Response::Done).unwrap();
        for _ in 0..2 {
            let mut clients: Vec<crate::Client> = (0..3 * MAX_IDLE)
                .map(|_| crate::Client::connect(&path).unwrap())
                .collect();
            // Each has a thread of its own: none waits for another to hang up.
            for client in clients.iter_mut().rev() {
                assert_eq!(client.ask(&Request::Status).unwrap(), Response::Done);
            }
        }
    }

    #[test]
    fn a_panic_ends_one_conversation_and_nothing_else() {
        let (_dir, path) = socket();
        let server = Server::bind(&path).unwrap();
        server
            .serve(|request| match request {
                Request::Status => Response::Done,
                other => panic!("{other:?}"),
            })
            .unwrap();
        for _ in 0..2 * MAX_IDLE {
            let mut client = crate::Client::connect(&path).unwrap();
            assert!(client.ask(&Request::Ipam).is_err());
        }
        let mut client = crate::Client::connect(&path).unwrap();
        assert_eq!(client.ask(&Request::Status).unwrap(), Response::Done);
    }

    #[test]
    fn who_comes_when_all_are_busy_is_told_so() {
        let (dir, path) = socket();
        fs::create_dir_all(dir.path().join("run")).unwrap();
        let crew = Arc::new(Crew {
            listener: UnixListener::bind(&path).unwrap(),
            handle: |_: &Request| Response::Done,
            idle: AtomicUsize::new(0),
            busy: AtomicUsize::new(MAX_CONNECTIONS),
        });
        crew.hire().unwrap();
        // Nothing is asked: the answer may be there before the question.
        let mut told = String::new();
        let stream = UnixStream::connect(&path).unwrap();
        BufReader::new(stream).read_line(&mut told).unwrap();
        assert!(told.contains("512 connections are open already"), "{told}");
        crew.busy.store(0, Ordering::Relaxed);
        let mut client = crate::Client::connect(&path).unwrap();
        assert_eq!(client.ask(&Request::Status).unwrap(), Response::Done);
    }
}
