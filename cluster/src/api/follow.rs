//! The thread that carries requests and answers between the API server and the watches' state machines. Decides nothing.
//!
//! One thread and one runtime for all watches of a program. While `on_event` runs nothing is read: a consumer that is slow slows
//! the server's streams down, and memory holds what a few buffers hold.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::BodyExt;
use kube::Client;
use kube::client::Body;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

use super::access::{Access, runtime};
use super::{ApiError, Following, Stop, body};
use crate::watch::{Action, Counts, Exchange, Hub, Input, Pace, Request};
use crate::{Event, Kind, Troubles, Wanted};

/// Pieces of bodies that wait to be looked at, for all watches together. A piece is some ten kilobytes: the rest waits in sockets.
const MAX_PIECES: usize = 32;

/// A client this young has read all there is on disk: making another would find nothing new, and run a plugin again.
const CLIENT_FRESH: Duration = Duration::from_secs(3);

/// A piece of an answer on its way.
#[derive(Debug)]
enum Piece {
    Head {
        status: u16,
        retry_after: Option<Duration>,
    },
    Body(Bytes),
    End,
    Lost(String),
}

type Pieces = mpsc::Sender<(Exchange, Piece)>;

pub(super) fn spawn(
    access: Access,
    pace: Pace,
    wanted: Wanted,
    mut on_event: impl FnMut(Event) -> bool + Send + 'static,
) -> Result<Following, ApiError> {
    let runtime = runtime()?;
    let stop = Arc::new(Stop::default());
    let troubles = Troubles::default();
    let counts = Arc::new(Mutex::new(Vec::new()));
    let (pieces, arrived) = mpsc::channel(MAX_PIECES);
    let begin = Instant::now();
    let mut follower = Follower {
        access,
        begin,
        hub: Hub::new(&wanted, pace, seed(), Duration::ZERO),
        client: None,
        running: HashMap::new(),
        pieces,
        arrived,
        stop: Arc::clone(&stop),
        troubles: troubles.clone(),
        counts: Arc::clone(&counts),
    };
    let thread = std::thread::Builder::new()
        .name("kun-api".to_owned())
        .spawn(move || {
            // The event is handed over outside of the runtime, so that whoever takes it may block.
            while let Some(event) = runtime.block_on(follower.next_event()) {
                if !on_event(event) {
                    break;
                }
            }
            // A credential plugin that hangs must not hold the end up.
            runtime.shutdown_background();
        })
        .map_err(ApiError::Thread)?;
    Ok(Following {
        stop,
        troubles,
        counts,
        _thread: thread,
    })
}

/// From the keys that the system seeds each hasher with: enough for ten thousand nodes not to wait alike.
fn seed() -> u64 {
    let mut hasher = std::hash::RandomState::new().build_hasher();
    hasher.write_u32(std::process::id());
    hasher.finish()
}

struct Follower {
    access: Access,
    begin: Instant,
    hub: Hub,
    client: Option<(Client, Instant)>,
    running: HashMap<Exchange, AbortHandle>,
    pieces: Pieces,
    arrived: mpsc::Receiver<(Exchange, Piece)>,
    stop: Arc<Stop>,
    troubles: Troubles,
    counts: Arc<Mutex<Vec<(Kind, Counts)>>>,
}

impl Follower {
    fn now(&self) -> Duration {
        self.begin.elapsed()
    }

    /// `None`: told to stop.
    async fn next_event(&mut self) -> Option<Event> {
        // Also between two events that are ready at once.
        while !self.stop.set.load(Ordering::Acquire) {
            self.hub.tick(self.now());
            // What has arrived together is one event.
            while let Ok((exchange, piece)) = self.arrived.try_recv() {
                self.take(exchange, piece);
            }
            while let Some(action) = self.hub.poll_action() {
                self.act(action).await;
            }
            let event = self.hub.poll_event();
            self.troubles.set(self.hub.troubles());
            *self.counts.lock().unwrap_or_else(PoisonError::into_inner) =
                self.hub.counts().collect();
            if event.is_some() {
                return event;
            }
            let due = self.begin.checked_add(self.hub.timeout());
            let due = due.unwrap_or_else(|| Instant::now() + Duration::from_secs(3600));
            tokio::select! {
                () = self.stop.woken.notified() => return None,
                Some((exchange, piece)) = self.arrived.recv() => self.take(exchange, piece),
                () = tokio::time::sleep_until(due.into()) => {}
            }
        }
        None
    }

    fn take(&mut self, exchange: Exchange, piece: Piece) {
        let input = match &piece {
            Piece::Head {
                status,
                retry_after,
            } => Input::Head {
                status: *status,
                retry_after: *retry_after,
            },
            Piece::Body(bytes) => Input::Body(bytes),
            Piece::End => Input::End,
            Piece::Lost(why) => Input::Lost(why),
        };
        if matches!(piece, Piece::End | Piece::Lost(_)) {
            self.running.remove(&exchange);
        }
        self.hub.input(exchange, input, self.now());
    }

    async fn act(&mut self, action: Action) {
        match action {
            Action::Send(request) => {
                let exchange = request.exchange;
                match self.client().await {
                    Ok(client) => {
                        let pieces = self.pieces.clone();
                        let task = tokio::spawn(carry(client, request, pieces));
                        self.running.insert(exchange, task.abort_handle());
                    }
                    Err(error) => {
                        let why = error.to_string();
                        self.hub.set_trouble(Some(why.clone()));
                        self.hub.input(exchange, Input::Lost(&why), self.now());
                    }
                }
            }
            Action::Abort(exchange) => {
                if let Some(task) = self.running.remove(&exchange) {
                    task.abort();
                }
            }
            Action::Renew => {
                // Watches are refused together; one renewal serves all.
                self.client
                    .take_if(|(_, made)| made.elapsed() >= CLIENT_FRESH);
            }
        }
    }

    async fn client(&mut self) -> Result<Client, ApiError> {
        if let Some((client, _)) = &self.client {
            return Ok(client.clone());
        }
        let client = self.access.client().await?;
        self.hub.set_trouble(None);
        self.client = Some((client.clone(), Instant::now()));
        Ok(client)
    }
}

/// Sends a request and gives its answer on, piece by piece. Ends with it, or when nobody wants it any more.
async fn carry(client: Client, request: Request, pieces: Pieces) {
    let exchange = request.exchange;
    let last = match exchange_of(client, &request, &pieces).await {
        Ok(()) => Piece::End,
        Err(why) => Piece::Lost(why),
    };
    // Nobody listens: the program stops.
    let _ = pieces.send((exchange, last)).await;
}

async fn exchange_of(client: Client, request: &Request, pieces: &Pieces) -> Result<(), String> {
    let give = async |piece| {
        let given = pieces.send((request.exchange, piece)).await;
        given.map_err(|_| "stopped".to_owned())
    };
    let get = http::Request::get(&request.path)
        .header(http::header::ACCEPT, request.accept)
        .body(Body::empty())
        .map_err(|error| error.to_string())?;
    let answer = client
        .send(get)
        .await
        .map_err(|error| body::chain(&error))?;
    give(Piece::Head {
        status: answer.status().as_u16(),
        retry_after: body::retry_after(answer.headers()),
    })
    .await?;
    let mut stream = answer.into_body();
    while let Some(frame) = stream.frame().await {
        let frame = frame.map_err(|error| body::chain(&error))?;
        if let Ok(data) = frame.into_data() {
            give(Piece::Body(data)).await?;
        }
    }
    Ok(())
}
