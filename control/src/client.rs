//! The blocking client: connect, one line out, one line in.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::{MAX_LINE, Request, Response};

/// An ADD waits for one group commit and a handful of netlink messages; far past that the agent is stuck.
const ANSWER_WITHIN: Duration = Duration::from_secs(20);

fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => "run this as root",
        _ => "is kun-proxy running?",
    }
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error("{}: no agent answers there ({source}); {}", socket.display(), remedy(source))]
    NoAgent {
        /// The socket.
        socket: PathBuf,
        /// The system's word.
        source: io::Error,
    },
    /// It listens and does not answer.
    #[error("{}: the agent has not answered for {ANSWER_WITHIN:?}; what it does instead stands in its log", socket.display())]
    Silent {
        /// The socket.
        socket: PathBuf,
    },
    /// The conversation broke off.
    #[error("the agent broke off: {0}")]
    Broken(#[from] io::Error),
    /// The answer is not one of ours.
    #[error("the agent's answer cannot be read ({0}); are both programs of one version?")]
    Answer(#[from] serde_json::Error),
    /// The answer is longer than [`MAX_LINE`].
    #[error("the agent's answer is longer than {MAX_LINE} bytes")]
    TooLong,
}

/// A connection to the agent.
#[derive(Debug)]
pub struct Client {
    socket: PathBuf,
    stream: BufReader<UnixStream>,
}

impl Client {
    /// Connects; fails at once when nobody listens.
    pub fn connect(socket: &Path) -> Result<Self, ClientError> {
        let stream = UnixStream::connect(socket).map_err(|source| ClientError::NoAgent {
            socket: socket.to_owned(),
            source,
        })?;
        stream.set_read_timeout(Some(ANSWER_WITHIN))?;
        stream.set_write_timeout(Some(ANSWER_WITHIN))?;
        Ok(Self {
            socket: socket.to_owned(),
            stream: BufReader::new(stream),
        })
    }

    /// One request, one answer.
    pub fn ask(&mut self, request: &Request) -> Result<Response, ClientError> {
        self.send(&[request])?;
        self.receive()
    }

    /// Requests whose answers are [received](Client::receive) later, in this order.
    pub fn send(&mut self, requests: &[&Request]) -> Result<(), ClientError> {
        let mut lines = Vec::new();
        for request in requests {
            serde_json::to_writer(&mut lines, request)?;
            lines.push(b'\n');
        }
        Ok(self.stream.get_mut().write_all(&lines)?)
    }

    /// The answer to the first request that has none yet.
    pub fn receive(&mut self) -> Result<Response, ClientError> {
        let mut answer = Vec::new();
        let read = (&mut self.stream)
            .take(MAX_LINE as u64 + 1)
            .read_until(b'\n', &mut answer);
        match read {
            // SO_RCVTIMEO.
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                let socket = self.socket.clone();
                return Err(ClientError::Silent { socket });
            }
            read => read?,
        };
        if answer.len() > MAX_LINE {
            return Err(ClientError::TooLong);
        }
        if answer.last() != Some(&b'\n') {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        Ok(serde_json::from_slice(&answer)?)
    }
}
