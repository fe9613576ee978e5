//! The watch protocol of the Kubernetes API as a state machine: lists, watches and checks go out as requests, answers come in as
//! they arrive, deltas come out. No socket, no clock, no randomness: `now` and a seed are given.
//!
//! One [`Watch`] a (kind, scope); a [`Hub`] joins those of a program: one first snapshot, then deltas.
//!
//! * *List*: a streaming list (`sendInitialEvents`) where the server has it, else pages. Always of the newest data: a list never goes
//!   back to an older one from a cache.
//! * *Watch*: from the last resourceVersion, with bookmarks, so that a cut costs no list.
//! * *Relist* when the server has forgotten that version (410), when its data went back (a restored etcd, another server), or
//!   when a check says so. What is known is compared with the list: missed deletions become removals, a changed uid is a removal and
//!   a new object.
//! * *Check*: now and then the names and versions alone are listed and compared with what was told. What is different in the same
//!   way twice, a good while apart, was lost or invented by a watch: it is listed anew, and said.
//!
//! Governing: the Kubernetes API concepts ("Efficient detection of changes", "Resource versions", "Streaming lists"), KEP-3157,
//! KEP-5504.

mod backoff;
mod check;
mod hub;
mod json;
mod known;
mod machine;
mod refusal;
mod split;

use std::time::Duration;

pub use hub::Hub;
pub use machine::{Counts, Watch};

use crate::{Delta, Interner};

/// How long things may take. The defaults are meant for clusters of up to ten thousand nodes; tests are in more of a hurry.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// Until the head of an answer. The API server gives up on a request after 60 s.
    pub answer_within: Duration,
    /// Without a byte in a body. Bookmarks come once a minute; two may be lost to a busy server.
    pub silent_at_most: Duration,
    /// The first wait after a failure is below this, the next below twice as much, …
    pub wait_first: Duration,
    /// … and at most this.
    pub wait_at_most: Duration,
    /// A server may ask for this much more; it may not send us away for ever.
    pub retry_after_at_most: Duration,
    /// A stream that lived this long was no failure, however it ended.
    pub healthy_after: Duration,
    /// A watch is asked for this long, at least; twice as long at most. The longer, the fewer requests from ten thousand nodes; a
    /// server closes it when it likes to.
    pub watch_for: Duration,
    /// A server without streaming lists is asked for one again after this: it may have been updated.
    pub streams_again: Duration,
    /// Between checks, at least, …
    pub check_every: Duration,
    /// … and this much for each object, so that a check costs the server about one object's metadata a second, …
    pub check_per_object: Duration,
    /// … and this at most.
    pub check_at_most: Duration,
    /// What a check finds must still be so after this: longer than a bookmark may take.
    pub confirm_after: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            answer_within: Duration::from_secs(70),
            silent_at_most: Duration::from_secs(150),
            wait_first: Duration::from_secs(1),
            wait_at_most: Duration::from_secs(30),
            retry_after_at_most: Duration::from_secs(120),
            healthy_after: Duration::from_secs(10),
            watch_for: Duration::from_secs(30 * 60),
            streams_again: Duration::from_secs(60 * 60),
            check_every: Duration::from_secs(5 * 60),
            check_per_object: Duration::from_secs(1),
            check_at_most: Duration::from_secs(6 * 60 * 60),
            confirm_after: Duration::from_secs(130),
        }
    }
}

/// Objects of a page. What kubectl and client-go ask for.
pub const PAGE: usize = 500;

/// Which of a watch's two conversations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Lane {
    /// Lists and watches.
    Main,
    /// Checks.
    Check,
}

/// One request and its answer. What arrives for one that is over is not looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Exchange {
    /// Index of the watch in its hub.
    pub watch: usize,
    /// Which conversation.
    pub lane: Lane,
    /// Counts requests.
    pub serial: u64,
}

/// A GET request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// What its answer is given back with.
    pub exchange: Exchange,
    /// Path and query.
    pub path: String,
    /// `Accept`.
    pub accept: &'static str,
}

/// What the shell is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Send it, and give back its answer as [`Input`]s.
    Send(Request),
    /// Close its connection; nothing more of its answer is of use.
    Abort(Exchange),
    /// The server does not know us: read the credentials anew before the next request.
    Renew,
}

/// What happens to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Input<'b> {
    /// The answer's head.
    Head {
        /// HTTP status.
        status: u16,
        /// `Retry-After`.
        retry_after: Option<Duration>,
    },
    /// The next bytes of its body.
    Body(&'b [u8]),
    /// The body has ended.
    End,
    /// There is no answer, or no more of it.
    Lost(&'b str),
}

/// What a watch works with and on.
#[derive(Debug)]
pub struct Context<'c> {
    /// Since any fixed moment, never back.
    pub now: Duration,
    /// Shared strings.
    pub names: &'c mut Interner,
    /// For the shell.
    pub actions: &'c mut Vec<Action>,
    /// For whoever listens.
    pub deltas: &'c mut Vec<Delta>,
}
