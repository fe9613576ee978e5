//! One peer's task: dials or accepts, runs the FSM over one connection at a time, and keeps the peer's table equal to the route set.
//!
//! Adj-RIB-Out is the last route set that was written, so a change is encoded only when the socket has taken the one before: however fast
//! route sets follow each other, at most one table's worth of bytes waits. What the peer announces is parsed for its errors (RFC 7606),
//! counted and dropped.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use kun_bgp_core::{Delta, Route, RouteSet};
use kun_config::BgpPeer;
use rustbgpd_fsm::{Action, Event, NegotiatedSession, Session, SessionState, TimerType};
use rustbgpd_wire::notification::cease_subcode;
use rustbgpd_wire::{
    Afi, ErrorDisposition, Message, NotificationCode, NotificationMessage, OpenMessage,
    PathAttribute, RouteRefreshSubtype, Safi, UpdateMessage, encode_message,
};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout, timeout_at};

use crate::encode::Context;
use crate::frames::{Frames, ReadError};
use crate::open::{Local, context, fsm_config, in_words, missing_family, truthful};
use crate::retry::Jitter;
use crate::speaker::StopMode;
use crate::status::Board;
use crate::sys;
use crate::transport::{Key, dial};

/// How long a peer may take over its OPEN on a second connection (RFC 4271 §6.8) before that connection is dropped.
const OPEN_WITHIN: Duration = Duration::from_secs(5);
/// How long the last words may take to leave: a peer that does not read them has the hold timer.
const LAST_WORDS_WITHIN: Duration = Duration::from_secs(2);
/// RFC 9687 §6: a peer that takes nothing for this long is gone, whatever it sends.
const SEND_HOLD: Duration = Duration::from_secs(480);

/// Whether the task goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    Run,
    Stop(StopMode),
}

/// A connection, and what was read from it before it became the session's.
struct Link {
    stream: TcpStream,
    frames: Frames,
    /// The peer opened it.
    passive: bool,
    /// Its OPEN, where it was read to settle a collision.
    open: Option<OpenMessage>,
}

impl Link {
    fn new(stream: TcpStream, passive: bool) -> Self {
        Self {
            stream,
            frames: Frames::default(),
            passive,
            open: None,
        }
    }
}

/// How a connection ended.
enum End {
    /// The peer's other connection takes its place.
    Replaced(Link),
    /// Closed or lost; whether the session had been up.
    Down { established: bool },
}

/// The FSM wants the connection closed.
struct Closing {
    /// What is queued goes out first.
    flush: bool,
}

/// Everything that outlives a connection.
pub(crate) struct Peer {
    pub(crate) local: Local,
    pub(crate) peer: BgpPeer,
    pub(crate) key: Option<Key>,
    pub(crate) desired: watch::Receiver<Option<Arc<RouteSet>>>,
    pub(crate) order: watch::Receiver<Order>,
    pub(crate) inbound: mpsc::Receiver<TcpStream>,
    pub(crate) board: Arc<Board>,
    pub(crate) jitter: Jitter,
    /// Peers are to be told once that this speaker restarted (RFC 4724 §3, R).
    pub(crate) restarted: bool,
    /// Forwarding outlived the last session (RFC 4724 §3, F).
    pub(crate) preserved: bool,
}

impl Peer {
    /// Runs until ordered to stop or until the speaker is gone.
    pub(crate) async fn run(mut self) {
        // A session that opened before the routes are known would tell the peer that they are gone.
        while self.desired.borrow_and_update().is_none() {
            tokio::select! {
                changed = self.desired.changed() => if changed.is_err() { return },
                _ = stopped(&mut self.order) => return,
                Some(early) = self.inbound.recv() => drop(early),
            }
        }
        let mut failures = 0;
        let mut next = None;
        loop {
            let link = match next.take() {
                Some(link) => link,
                None => match self.connect(&mut failures).await {
                    Some(link) => link,
                    None => return,
                },
            };
            match self.converse(link).await {
                End::Replaced(link) => next = Some(link),
                End::Down { established } => failures = if established { 1 } else { failures + 1 },
            }
        }
    }

    /// The next connection, whoever opens it; `None` when ordered to stop.
    async fn connect(&mut self, failures: &mut u32) -> Option<Link> {
        loop {
            if *failures > 0 {
                self.board.state(SessionState::Active);
                let again = Instant::now() + self.jitter.retry(*failures);
                tokio::select! {
                    _ = stopped(&mut self.order) => return None,
                    Some(stream) = self.inbound.recv() => return Some(Link::new(stream, true)),
                    () = sleep_until(again) => {}
                }
            }
            self.board.state(SessionState::Connect);
            tokio::select! {
                _ = stopped(&mut self.order) => return None,
                Some(stream) = self.inbound.recv() => return Some(Link::new(stream, true)),
                dialled = dial(&self.peer, self.key.as_ref()) => match dialled {
                    Ok(stream) => return Some(Link::new(stream, false)),
                    Err(error) => {
                        self.board.error(error.to_string());
                        *failures = failures.saturating_add(1);
                    }
                }
            }
        }
    }

    /// One connection from OPEN to its end.
    async fn converse(&mut self, link: Link) -> End {
        let Link {
            mut stream,
            mut frames,
            passive,
            open,
        } = link;
        let ours = stream.local_addr().map(|a| a.ip()).ok();
        let (mut reader, mut writer) = stream.split();
        let mut talk = Talk::new(self, passive, ours);
        talk.begin(open);
        let mut rival: Option<Rival> = None;
        let ending = loop {
            if let Some(Closing { flush }) = talk.closing {
                break Ending::Close { flush };
            }
            if talk.stop == Some(StopMode::Withdraw) && talk.out.is_empty() && talk.is_withdrawn() {
                talk.event(Event::ManualStop { reason: None });
                continue;
            }
            talk.refill();
            let (hold, keepalive, send_hold) = talk.deadlines();
            tokio::select! {
                stop = stopped(&mut talk.me.order), if talk.stop.is_none() => match stop {
                    StopMode::Graceful => break Ending::Silence,
                    StopMode::Withdraw => talk.withdraw(),
                },
                changed = talk.me.desired.changed() => match changed {
                    Ok(()) => talk.dirty = true,
                    Err(_) => break Ending::Silence,
                },
                () = sleep_until(keepalive) => talk.event(Event::KeepaliveTimerExpires),
                () = sleep_until(hold) => {
                    // A busy node may have slept through it: what waits in the socket counts as heard in time.
                    let late = timeout(Duration::ZERO, frames.fill(&mut reader)).await;
                    if matches!(late, Ok(Ok(()))) {
                        talk.handle(&mut frames);
                    }
                    if talk.hold.is_some_and(|at| at <= Instant::now()) {
                        talk.event(Event::HoldTimerExpires);
                    }
                }
                () = sleep_until(send_hold) => {
                    talk.fail("Send Hold Timer Expired (8/0): the peer takes nothing from its socket".to_owned());
                    break Ending::Silence;
                }
                filled = frames.fill(&mut reader) => match filled {
                    Ok(()) => talk.handle(&mut frames),
                    Err(error) => talk.lost(&error),
                },
                written = writer.write_buf(&mut talk.out), if !talk.out.is_empty() => match written {
                    Ok(_) => talk.progress(),
                    Err(error) => talk.lost(&ReadError::Io(error)),
                },
                Some(stream) = talk.me.inbound.recv(), if rival.is_none() => rival = Some(Rival::new(stream)),
                said = open_of(&mut rival), if rival.is_some() => {
                    let Some(Rival { stream, frames, .. }) = rival.take() else { continue };
                    let Some(open) = said else { continue };
                    match talk.collide(&open) {
                        Winner::Current => refuse(stream),
                        Winner::Rival { notify } => {
                            if notify {
                                talk.notify(cease(cease_subcode::CONNECTION_COLLISION_RESOLUTION));
                            }
                            break Ending::Replaced(Link { stream, frames, passive: true, open: Some(open) });
                        }
                    }
                }
            }
        };
        let established = talk.was_established;
        let stopping = talk.stop.is_some();
        let mut out = std::mem::take(&mut talk.out);
        let replaced = match ending {
            Ending::Silence => None,
            Ending::Close { flush } => {
                if flush {
                    last_words(&mut stream, &mut out).await;
                }
                None
            }
            Ending::Replaced(link) => {
                last_words(&mut stream, &mut out).await;
                Some(link)
            }
        };
        self.board.state(SessionState::Idle);
        let waiting = rival.filter(|_| !stopping);
        match replaced.or_else(|| waiting.map(Rival::into_link)) {
            Some(link) => End::Replaced(link),
            None => End::Down { established },
        }
    }
}

/// How the loop of a connection ends.
enum Ending {
    /// Without a word: the peer keeps our routes for the restart time.
    Silence,
    /// What is queued goes out first.
    Close { flush: bool },
    /// A rival connection is the session now.
    Replaced(Link),
}

/// A second connection from the same peer, before its OPEN says who wins (RFC 4271 §6.8).
struct Rival {
    stream: TcpStream,
    frames: Frames,
    deadline: Instant,
}

impl Rival {
    fn new(stream: TcpStream) -> Self {
        Self {
            stream,
            frames: Frames::default(),
            deadline: Instant::now() + OPEN_WITHIN,
        }
    }

    fn into_link(self) -> Link {
        Link {
            stream: self.stream,
            frames: self.frames,
            passive: true,
            open: None,
        }
    }
}

enum Winner {
    Current,
    Rival { notify: bool },
}

/// Waits for the rival's OPEN; `None` when something else comes, or nothing. Cancel-safe: bytes stay in its frames.
async fn open_of(rival: &mut Option<Rival>) -> Option<OpenMessage> {
    let Rival {
        stream,
        frames,
        deadline,
    } = rival.as_mut()?;
    loop {
        match frames.next() {
            Ok(Some(Message::Open(open))) => return Some(open),
            Ok(None) => {}
            Ok(Some(_)) | Err(_) => return None,
        }
        timeout_at(*deadline, frames.fill(stream))
            .await
            .ok()?
            .ok()?;
    }
}

/// Tells a connection that lost its collision, without waiting for it.
fn refuse(stream: TcpStream) {
    if let Ok(bytes) = encode_message(&Message::Notification(cease(
        cease_subcode::CONNECTION_COLLISION_RESOLUTION,
    ))) {
        // A fresh socket takes 21 bytes at once, or the peer finds out by the close.
        let _ = stream.try_write(&bytes);
    }
}

fn cease(subcode: u8) -> NotificationMessage {
    NotificationMessage::new(NotificationCode::Cease, subcode, bytes::Bytes::new())
}

/// Writes what is left and closes in order: a reset would take unread bytes from the peer.
async fn last_words(stream: &mut TcpStream, out: &mut BytesMut) {
    let said = async {
        stream.write_all_buf(out).await?;
        stream.shutdown().await?;
        let mut frames = Frames::default();
        while frames.fill(stream).await.is_ok() {
            frames = Frames::default();
        }
        Ok::<(), std::io::Error>(())
    };
    let _ = timeout(LAST_WORDS_WITHIN, said).await;
}

async fn stopped(order: &mut watch::Receiver<Order>) -> StopMode {
    match order.wait_for(|o| *o != Order::Run).await.map(|o| *o) {
        Ok(Order::Stop(mode)) => mode,
        Ok(Order::Run) | Err(_) => StopMode::Graceful,
    }
}

/// The state of one connection; everything here is synchronous.
struct Talk<'a> {
    me: &'a mut Peer,
    fsm: Session,
    passive: bool,
    ours: Option<IpAddr>,
    /// The AS in the peer's OPEN, for a better word than "bad peer AS".
    seen_asn: Option<u32>,
    out: BytesMut,
    hold: Option<Instant>,
    keepalive: Option<Instant>,
    /// When the socket last took bytes, or `out` began to hold some.
    moved: Instant,
    context: Option<Context>,
    peer_restarts_gracefully: bool,
    sent: Arc<RouteSet>,
    dirty: bool,
    /// Families whose routes the peer wants again: each once, however often it asks before it takes them.
    again: Vec<Afi>,
    end_of_rib_due: bool,
    was_established: bool,
    stop: Option<StopMode>,
    closing: Option<Closing>,
}

impl<'a> Talk<'a> {
    fn new(me: &'a mut Peer, passive: bool, ours: Option<IpAddr>) -> Self {
        let mut fsm = Session::new(fsm_config(&me.local, &me.peer));
        // The connection stands already; the FSM's own wish to dial comes too late.
        let _ = fsm.handle_event(Event::ManualStart);
        Self {
            fsm,
            passive,
            ours,
            seen_asn: None,
            out: BytesMut::new(),
            hold: None,
            keepalive: None,
            moved: Instant::now(),
            context: None,
            peer_restarts_gracefully: false,
            sent: Arc::new(RouteSet::default()),
            dirty: false,
            again: Vec::new(),
            end_of_rib_due: false,
            was_established: false,
            stop: None,
            closing: None,
            me,
        }
    }

    fn begin(&mut self, open: Option<OpenMessage>) {
        self.event(if self.passive {
            Event::TcpConnectionAcknowledged
        } else {
            Event::TcpConnectionConfirmed
        });
        if let Some(open) = open {
            self.opened(open);
        }
    }

    fn opened(&mut self, open: OpenMessage) {
        self.seen_asn = Some(open.four_byte_as());
        self.event(Event::OpenReceived(open));
    }

    fn event(&mut self, event: Event) {
        for action in self.fsm.handle_event(event) {
            self.act(action);
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::SendOpen(open) => {
                let open = truthful(open, self.me.restarted, self.me.preserved);
                self.send(&Message::Open(open));
            }
            Action::SendKeepalive => self.send(&Message::Keepalive),
            Action::SendNotification(n) => self.notify(n),
            Action::StartTimer(TimerType::Hold, secs) => {
                self.hold = Some(after(Duration::from_secs(secs.into())))
            }
            Action::StartTimer(TimerType::Keepalive, secs) => {
                let wait = self.me.jitter.shorten(Duration::from_secs(secs.into()));
                self.keepalive = Some(after(wait));
            }
            Action::StopTimer(TimerType::Hold) => self.hold = None,
            Action::StopTimer(TimerType::Keepalive) => self.keepalive = None,
            Action::CloseTcpConnection => {
                self.closing.get_or_insert(Closing { flush: true });
            }
            Action::StateChanged { new, .. } => self.me.board.state(new),
            Action::SessionEstablished(negotiated) => self.established(&negotiated),
            // Retries are this shell's; routes of the peer there are none.
            _ => {}
        }
    }

    fn established(&mut self, negotiated: &NegotiatedSession) {
        let addresses = sys::addresses().unwrap_or_default();
        let ours = self.ours.unwrap_or(Ipv4Addr::UNSPECIFIED.into());
        let (context, withheld) = context(&self.me.local, negotiated, ours, &addresses);
        self.me
            .board
            .condition(withheld.or_else(|| missing_family(&self.me.peer, negotiated)));
        self.context = Some(context);
        self.peer_restarts_gracefully = negotiated.peer_gr_capable;
        self.was_established = true;
        self.dirty = true;
        self.end_of_rib_due = true;
        // From here on the kernel forwards whatever becomes of this session, and a later one is no restart.
        self.me.preserved = true;
    }

    /// Everything that was read.
    fn handle(&mut self, frames: &mut Frames) {
        while self.closing.is_none() {
            let message = match frames.next() {
                Ok(Some(message)) => message,
                Ok(None) => return,
                Err(error) => {
                    self.event(Event::DecodeError(error));
                    return;
                }
            };
            self.me.board.metrics().received.inc();
            match message {
                Message::Open(open) => self.opened(open),
                Message::Keepalive => self.event(Event::KeepaliveReceived),
                Message::Notification(n) => {
                    self.fail(format!("received {}{}", in_words(&n), self.hint(&n, true)));
                    self.event(Event::NotificationReceived(n));
                }
                Message::Update(update) => self.update(&update),
                Message::RouteRefresh(refresh) => {
                    if refresh.subtype() == RouteRefreshSubtype::Normal
                        && let (Some(afi), Some(Safi::Unicast)) = (refresh.afi(), refresh.safi())
                        && matches!(afi, Afi::Ipv4 | Afi::Ipv6)
                        && !self.again.contains(&afi)
                    {
                        self.again.push(afi);
                    }
                    // RFC 4271 §8.2.2 knows no ROUTE-REFRESH; for the hold timer it is as good as a KEEPALIVE.
                    self.event(Event::KeepaliveReceived);
                }
                _ => {}
            }
        }
    }

    /// RFC 8212: nothing is accepted. The message is parsed all the same, because RFC 7606 tells the errors that a session survives (and
    /// that change nothing for one who keeps no routes) from those that end it.
    fn update(&mut self, update: &UpdateMessage) {
        let Some(context) = &self.context else {
            // RFC 4271 §8.2.2: an UPDATE before Established is the FSM's error to name.
            self.event(Event::UpdateReceived);
            return;
        };
        match update.parse_revised(context.four_octet_as, context.internal, false, &[]) {
            Ok(parsed) => {
                let reset = parsed
                    .malformed
                    .iter()
                    .find(|m| m.disposition == ErrorDisposition::SessionReset);
                if let Some(fatal) = reset {
                    let (code, subcode, data) = fatal.error.to_notification();
                    self.event(Event::UpdateValidationError(NotificationMessage::new(
                        code, subcode, data,
                    )));
                    return;
                }
                let mp = parsed.update.attributes.iter().map(|a| match a {
                    PathAttribute::MpReachNlri(reach) => reach.announced.len(),
                    _ => 0,
                });
                let prefixes = parsed.update.announced.len() + mp.sum::<usize>();
                self.me
                    .board
                    .received(prefixes as u64, !parsed.malformed.is_empty());
                self.event(Event::UpdateReceived);
            }
            Err(error) => {
                let (code, subcode, data) = error.to_notification();
                self.event(Event::UpdateValidationError(NotificationMessage::new(
                    code, subcode, data,
                )));
            }
        }
    }

    /// RFC 2918 §3: the whole Adj-RIB-Out of a family again.
    fn resend(&mut self, afi: Afi) {
        let Some(context) = &self.context else { return };
        let of_family = |r: &&Route| r.prefix.addr().is_ipv4() == (afi == Afi::Ipv4);
        let delta = Delta {
            announce: self.sent.routes().filter(of_family).cloned().collect(),
            withdraw: Vec::new(),
        };
        let done = context.updates(&delta, &mut self.out);
        self.queued(true, done);
    }

    /// Encodes, when all that was before has left, what the peer asked for again, or the difference to the route set that is wanted
    /// now.
    fn refill(&mut self) {
        while self.out.is_empty()
            && let Some(afi) = self.again.pop()
        {
            self.resend(afi);
        }
        if !self.dirty || !self.out.is_empty() {
            return;
        }
        let Some(context) = &self.context else { return };
        self.dirty = false;
        let wanted = match self.stop {
            Some(StopMode::Withdraw) => Arc::new(RouteSet::default()),
            _ => self
                .me
                .desired
                .borrow_and_update()
                .clone()
                .unwrap_or_default(),
        };
        let delta = wanted.delta_from(&self.sent);
        let mut done = context.updates(&delta, &mut self.out);
        if std::mem::take(&mut self.end_of_rib_due) {
            // RFC 4724 §4.1: the whole table was sent; stale routes may go.
            done = done.and_then(|n| Ok(n + context.end_of_rib(&mut self.out)?));
            self.me.restarted = false;
        }
        let carried = wanted
            .routes()
            .filter(|r| context.carries(&r.prefix))
            .count();
        self.me.board.sent(carried, wanted.refused().len());
        self.sent = wanted;
        self.queued(true, done);
    }

    fn queued(&mut self, was_empty: bool, done: Result<u64, rustbgpd_wire::EncodeError>) {
        if was_empty {
            self.moved = Instant::now();
        }
        match done {
            Ok(messages) => {
                self.me.board.metrics().sent.inc_by(messages);
            }
            Err(error) => {
                self.fail(format!("a route cannot be encoded: {error}"));
                self.closing.get_or_insert(Closing { flush: false });
            }
        }
    }

    fn withdraw(&mut self) {
        self.stop = Some(StopMode::Withdraw);
        self.dirty = true;
    }

    /// The peer holds nothing of ours any more, or never did.
    fn is_withdrawn(&self) -> bool {
        self.context.is_none() || self.sent.is_empty() && !self.dirty
    }

    /// RFC 4271 §6.8: of two connections the one that the side with the higher identifier opened stays (RFC 6286: then the higher AS).
    fn collide(&self, open: &OpenMessage) -> Winner {
        if open.four_byte_as() != self.me.peer.asn {
            return Winner::Current;
        }
        match self.fsm.state() {
            // RFC 4724 §5: a peer that restarts gracefully and opens anew has lost the old connection.
            SessionState::Established if self.peer_restarts_gracefully => {
                Winner::Rival { notify: false }
            }
            SessionState::Established => Winner::Current,
            // Two connections of one origin: the later one is what the peer means now.
            _ if self.passive => Winner::Rival { notify: true },
            _ => {
                let theirs = (open.bgp_identifier, open.four_byte_as());
                let ours = (self.me.local.router_id, self.me.local.asn);
                if theirs > ours {
                    Winner::Rival { notify: true }
                } else {
                    Winner::Current
                }
            }
        }
    }

    fn send(&mut self, message: &Message) {
        let was_empty = self.out.is_empty();
        let done = encode_message(message).map(|bytes| {
            self.out.extend_from_slice(&bytes);
            1
        });
        self.queued(was_empty, done);
    }

    fn notify(&mut self, n: NotificationMessage) {
        if !(self.stop == Some(StopMode::Withdraw) && n.code == NotificationCode::Cease) {
            self.fail(format!("sent {}{}", in_words(&n), self.hint(&n, false)));
        }
        self.send(&Message::Notification(n));
    }

    /// What a person would ask next.
    fn hint(&self, n: &NotificationMessage, received: bool) -> String {
        match (n.code, n.subcode) {
            (NotificationCode::OpenMessage, 2) if received => {
                format!("; the peer does not expect AS {}", self.me.local.asn)
            }
            (NotificationCode::OpenMessage, 2) => match self.seen_asn {
                Some(seen) => format!(
                    "; the peer says AS {seen}, configured is AS {}",
                    self.me.peer.asn
                ),
                None => String::new(),
            },
            (NotificationCode::HoldTimerExpired, _) if !received => {
                "; nothing was heard from the peer for the hold time".to_owned()
            }
            _ => String::new(),
        }
    }

    fn fail(&self, error: String) {
        self.me.board.error(error);
    }

    fn lost(&mut self, error: &ReadError) {
        // A NOTIFICATION was the reason; the close that follows it is not.
        if self.closing.is_none() {
            let state = self.fsm.state();
            let hint = match (state, error) {
                (SessionState::OpenSent, ReadError::Closed) => {
                    " before its OPEN: it may not know this node's address, or waits out an earlier error"
                }
                _ => "",
            };
            self.fail(format!("{error}{hint}"));
            self.event(Event::TcpConnectionFails);
        }
        self.closing = Some(Closing { flush: false });
    }

    fn progress(&mut self) {
        self.moved = Instant::now();
    }

    /// Hold, keepalive and send-hold; a timer that is off lies beyond any session.
    fn deadlines(&self) -> (Instant, Instant, Instant) {
        let never = Instant::now() + Duration::from_secs(86_400);
        let send_hold = if self.out.is_empty() {
            never
        } else {
            self.moved + SEND_HOLD
        };
        (
            self.hold.unwrap_or(never),
            self.keepalive.unwrap_or(never),
            send_hold,
        )
    }
}

fn after(wait: Duration) -> Instant {
    Instant::now() + wait
}

#[cfg(test)]
mod tests;
