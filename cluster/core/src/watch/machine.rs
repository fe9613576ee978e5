//! One kind in one scope: list, watch, resume, relist.

mod asking;

use std::time::Duration;

use super::answer::{Counts, Envelope, Purpose, said};
use super::backoff::{Backoff, Jitter};
use super::check::{Check, Proof};
use super::json;
use super::known::{Known, number};
use super::refusal::{self, Meaning};
use super::split::{Items, Lines, MAX_OBJECT, Piece};
use super::{Action, Context, Exchange, Input, Lane, Pace};
use crate::{Delta, Kind, Reached, Resource, Scope};

/// The text of a refusal that is read; the API server's are some hundred bytes.
const MAX_REFUSAL: usize = 16 << 10;

/// Failures in a row after which one that passes by itself is told.
const TOLD_AFTER: u32 = 2;

/// Streams in a row that were silent until the end of patience: after this the version that they resumed from is in doubt.
const SILENT_STREAMS: u32 = 2;

/// Continue tokens in a row that expired (they live five minutes): after this the list is asked for in one piece.
const EXPIRED_LISTS: u32 = 2;

/// Why everything is listed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Why {
    /// For the first time.
    First,
    /// The version was forgotten.
    Gone,
    /// The server's data is older than what is known.
    WentBack,
    /// Nothing proves that what is known is of the server's history.
    Unproven,
    /// Streams stayed silent, or said what nobody understands.
    Doubt,
    /// A check found a difference that stays.
    Check,
}

#[derive(Debug)]
enum Main {
    /// Until then.
    Waiting {
        until: Duration,
    },
    Asked(Asked),
}

#[derive(Debug)]
struct Asked {
    exchange: Exchange,
    purpose: Purpose,
    since: Duration,
    /// When the last byte came; `None`: no head yet.
    heard: Option<Duration>,
    /// It has said something.
    spoke: bool,
    body: BodyOf,
}

#[derive(Debug)]
enum BodyOf {
    Lines(Lines),
    Items(Box<Items>),
    Refusal {
        status: u16,
        retry_after: Option<Duration>,
        text: Vec<u8>,
    },
}

/// What an event asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Turn {
    Relist(Why),
    /// The stream ends with a refusal in it.
    Refused(u16, String),
    NoStreams,
}

/// See the module.
#[derive(Debug)]
pub struct Watch {
    pub(super) index: usize,
    pub(super) kind: Kind,
    pub(super) scope: Scope,
    pub(super) resource: Resource,
    pub(super) pace: Pace,
    pub(super) jitter: Jitter,
    pub(super) known: Known,
    pub(super) counts: Counts,
    serial: u64,
    /// Everything up to here is known; `None`: list.
    version: Option<Box<str>>,
    why: Why,
    next_page: Option<String>,
    /// Streaming lists are not asked for before this.
    no_streams_until: Option<Duration>,
    expired_lists: u32,
    silent_streams: u32,
    backoff: Backoff,
    main: Main,
    pub(super) check: Check,
    /// The stream before the one that is next, or runs, is over: another server may answer now, or another storage.
    lost: bool,
    /// Whether what resumed streams say goes on from what was known is still to be seen: one for each stream that is over.
    pub(super) proofs: Vec<Proof>,
    /// Somebody goes by revisions: see [`Watch::go_by_revisions`].
    pub(super) revisions: bool,
    /// What the view has been through; `None`: it is in doubt.
    reached: Option<Reached>,
    /// Of a list that is not complete.
    held: Vec<Delta>,
    synced: bool,
    /// An object of the last list, or of the watch since, was too large.
    missing: bool,
    trouble: Option<String>,
    /// The server's data went back, or a check repaired something: told until the next good check.
    pub(super) note: Option<String>,
}

impl Watch {
    /// Not begun: the first request goes out at the first tick.
    pub fn new(
        index: usize,
        kind: Kind,
        scope: Scope,
        pace: Pace,
        seed: u64,
        now: Duration,
    ) -> Self {
        Self {
            index,
            kind,
            resource: Resource::of(kind),
            pace,
            jitter: Jitter::new(seed),
            known: Known::new(kind, scope.clone(), seed),
            scope,
            counts: Counts::default(),
            serial: 0,
            version: None,
            why: Why::First,
            next_page: None,
            no_streams_until: None,
            expired_lists: 0,
            silent_streams: 0,
            backoff: Backoff::default(),
            main: Main::Waiting { until: now },
            check: Check::new(),
            lost: false,
            proofs: Vec::new(),
            revisions: false,
            reached: None,
            held: Vec::new(),
            synced: false,
            missing: false,
            trouble: None,
            note: None,
        }
    }

    /// Somebody goes by what [`Watch::reached`] says. Streams are then resumed from the last change and not from the last bookmark: where
    /// no change was, a server of the same history sends nothing more, and one of another history sends what it has there. If there
    /// was none since the list, or what changed last was deleted, nothing could prove anything, and all is listed.
    pub(super) fn go_by_revisions(&mut self) {
        self.revisions = true;
    }

    /// The first list is complete.
    pub fn synced(&self) -> bool {
        self.synced
    }

    /// Objects are missing from the view that nobody removed: they were never read right.
    pub fn partial(&self) -> bool {
        self.missing || self.known.blank() > 0
    }

    /// Which revision everything is told up to. Not known before the first list, after what was told turned out to be wrong or of
    /// other data, where versions are no numbers, as long as objects are missing, and from the end of a stream until the one
    /// that resumed it has proven to go on from there.
    pub fn reached(&self) -> Option<Reached> {
        let proven = !self.lost && self.proofs.is_empty();
        self.reached.filter(|_| proven && !self.partial())
    }

    /// What has happened.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// What is wrong now, a line each.
    pub fn troubles(&self) -> impl Iterator<Item = String> {
        let plural = self.resource.plural;
        let missing = self.missing.then(|| {
            format!(
                "{plural}: an object of more than {MAX_OBJECT} bytes is not read; make it smaller"
            )
        });
        let own = [
            self.trouble.clone(),
            self.note.clone(),
            self.check.trouble().cloned(),
            missing,
        ];
        own.into_iter().flatten().chain(self.known.faults())
    }

    /// When [`Watch::tick`] has something to do.
    pub fn timeout(&self) -> Duration {
        let main = match &self.main {
            Main::Waiting { until } => *until,
            Main::Asked(asked) => self.patience(asked),
        };
        main.min(self.check_timeout())
    }

    fn patience(&self, asked: &Asked) -> Duration {
        match asked.heard {
            None => asked.since + self.pace.answer_within,
            Some(heard) => heard + self.pace.silent_at_most,
        }
    }

    /// Does what is due.
    pub fn tick(&mut self, cx: &mut Context<'_>) {
        match &self.main {
            Main::Waiting { until } if *until <= cx.now => self.ask(cx),
            Main::Asked(asked) if self.patience(asked) <= cx.now => self.impatient(cx),
            Main::Waiting { .. } | Main::Asked(_) => {}
        }
        self.check_tick(cx);
    }

    /// Takes what has arrived for a request of this watch.
    pub fn input(&mut self, exchange: Exchange, input: Input<'_>, cx: &mut Context<'_>) {
        if exchange.lane == Lane::Check {
            return self.check_input(exchange, input, cx);
        }
        let Main::Asked(asked) = &mut self.main else {
            return;
        };
        if asked.exchange != exchange {
            return;
        }
        match input {
            Input::Head { status: 200, .. } => {
                asked.heard = Some(cx.now);
                self.trouble = None;
                if asked.purpose == Purpose::Watch && std::mem::take(&mut self.lost) {
                    self.probe_soon(cx.now);
                }
            }
            Input::Head {
                status,
                retry_after,
            } => {
                asked.heard = Some(cx.now);
                asked.body = BodyOf::Refusal {
                    status,
                    retry_after,
                    text: Vec::new(),
                };
            }
            Input::Body(bytes) => {
                asked.heard = Some(cx.now);
                self.body(bytes, cx);
            }
            Input::End => self.ended(None, cx),
            Input::Lost(why) => self.ended(Some(why), cx),
        }
    }

    /// Whether streaming lists are to be asked for.
    pub(super) fn streams(&self, now: Duration) -> bool {
        self.no_streams_until.is_none_or(|until| until <= now)
    }

    /// The version up to which everything is known, while a watch runs that has answered.
    pub(super) fn watching(&self) -> Option<&str> {
        match &self.main {
            Main::Asked(asked) if asked.purpose == Purpose::Watch && asked.heard.is_some() => {
                self.version.as_deref()
            }
            Main::Asked(_) | Main::Waiting { .. } => None,
        }
    }

    /// Lists anew because a check says that the watch lied.
    pub(super) fn relist_for_check(&mut self, cx: &mut Context<'_>) {
        self.turn(Turn::Relist(Why::Check), cx);
    }

    /// Lists anew because the server has not come as far as what is known.
    pub(super) fn relist_for_older_data(&mut self, cx: &mut Context<'_>) {
        self.turn(Turn::Relist(Why::WentBack), cx);
    }

    /// Lists anew because nothing proves that what is known is of the server's history.
    pub(super) fn relist_unproven(&mut self, cx: &mut Context<'_>) {
        self.turn(Turn::Relist(Why::Unproven), cx);
    }

    fn body(&mut self, bytes: &[u8], cx: &mut Context<'_>) {
        let Main::Asked(asked) = &mut self.main else {
            return;
        };
        // The body is put back unless what it said ends the exchange.
        let mut body = std::mem::replace(&mut asked.body, BodyOf::Lines(Lines::default()));
        let mut turn = None;
        match &mut body {
            BodyOf::Lines(lines) => lines.push(bytes, |piece| {
                if turn.is_none() {
                    turn = self.line(piece, cx);
                }
            }),
            BodyOf::Items(items) => items.push(bytes, |piece| {
                if turn.is_none() {
                    turn = self.item(piece, cx);
                }
            }),
            BodyOf::Refusal { text, .. } => {
                let room = MAX_REFUSAL - text.len();
                text.extend_from_slice(&bytes[..bytes.len().min(room)]);
            }
        }
        if let Main::Asked(asked) = &mut self.main {
            asked.body = body;
        }
        if let Some(turn) = turn {
            self.turn(turn, cx);
        }
    }

    /// An item of a page.
    fn item(&mut self, piece: Piece<'_>, cx: &mut Context<'_>) -> Option<Turn> {
        let Piece::Whole(text) = piece else {
            self.too_large();
            return None;
        };
        let mut tree = match json::object(self.kind, text) {
            Ok(tree) => tree,
            Err(_) => return Some(Turn::Relist(Why::Doubt)),
        };
        let known = self.known.upsert(cx.names, &mut tree, &mut self.held);
        (!known).then_some(Turn::Relist(Why::Doubt))
    }

    fn too_large(&mut self) {
        self.missing = true;
        self.counts.too_large += 1;
    }

    /// A line of a stream.
    fn line(&mut self, piece: Piece<'_>, cx: &mut Context<'_>) -> Option<Turn> {
        let Main::Asked(asked) = &mut self.main else {
            return None;
        };
        asked.spoke = true;
        let listing = asked.purpose == Purpose::Stream;
        let Piece::Whole(text) = piece else {
            self.too_large();
            return None;
        };
        let Ok(mut event) = json::event(self.kind, text) else {
            return Some(Turn::Relist(Why::Doubt));
        };
        if event.kind == "ERROR" {
            let code = json::text(&event.object, &["code"]).and_then(|c| c.parse().ok());
            let said = json::text(&event.object, &["message"]).unwrap_or_default();
            return Some(Turn::Refused(code.unwrap_or(500), said.to_owned()));
        }
        let Some(version) = json::text(&event.object, &["metadata", "resourceVersion"]) else {
            return Some(Turn::Relist(Why::Doubt));
        };
        let version: Box<str> = version.into();
        // The events of a list come in any order; those of a watch never go back.
        if !listing && self.went_back(&version) {
            return Some(Turn::Relist(Why::WentBack));
        }
        let deltas = if listing {
            &mut self.held
        } else {
            &mut *cx.deltas
        };
        let known = match &*event.kind {
            "ADDED" | "MODIFIED" => self.known.upsert(cx.names, &mut event.object, deltas),
            "DELETED" => self.known.delete(cx.names, &event.object, deltas),
            "BOOKMARK" if listing => {
                let end = ["metadata", "annotations", "k8s.io/initial-events-end"];
                // A bookmark that does not end the list: this server does not know what it was asked for.
                if json::text(&event.object, &end) != Some("true") {
                    return Some(Turn::NoStreams);
                }
                self.complete(version, cx);
                return None;
            }
            "BOOKMARK" => true,
            _ => false,
        };
        if !known {
            return Some(Turn::Relist(Why::Doubt));
        }
        if !listing {
            self.silent_streams = 0;
            self.reached = self.reached.and_then(|before| {
                let at = number(&version)?;
                let changed = if event.kind == "BOOKMARK" {
                    before.changed
                } else {
                    at
                };
                Some(Reached {
                    changed,
                    at,
                    ..before
                })
            });
            self.version = Some(version);
        }
        None
    }

    fn went_back(&self, version: &str) -> bool {
        let known = self.version.as_deref().and_then(number);
        matches!((known, number(version)), (Some(known), Some(now)) if now < known)
    }

    /// A list is complete: what it did not name is gone, and all of it is told at once.
    fn complete(&mut self, version: Box<str>, cx: &mut Context<'_>) {
        self.lost = false;
        self.proofs.clear();
        self.known.end_list(&mut self.held);
        self.counts.lists += 1;
        if self.why == Why::Check {
            let repaired = self.held.len();
            self.counts.repaired += repaired as u64;
            self.repaired(repaired);
        }
        cx.deltas.append(&mut self.held);
        self.held = Vec::new();
        self.reached = number(&version).map(|at| Reached {
            since: at,
            changed: at,
            at,
        });
        self.version = Some(version);
        self.why = Why::Gone;
        self.synced = true;
        self.next_page = None;
        self.expired_lists = 0;
        self.silent_streams = 0;
        if let Main::Asked(asked) = &mut self.main {
            asked.purpose = Purpose::Watch;
        }
        self.check_later(cx.now);
    }

    /// The body is over, whole or not.
    fn ended(&mut self, lost: Option<&str>, cx: &mut Context<'_>) {
        let Main::Asked(asked) = std::mem::replace(&mut self.main, Main::Waiting { until: cx.now })
        else {
            return;
        };
        let healthy =
            asked.heard.is_some() && cx.now.saturating_sub(asked.since) >= self.pace.healthy_after;
        match (asked.body, asked.purpose) {
            (
                BodyOf::Refusal {
                    status,
                    retry_after,
                    text,
                },
                purpose,
            ) => {
                let said = said(&text);
                self.refused(purpose, status, &said, retry_after, cx);
            }
            (BodyOf::Items(items), _) => {
                let envelope = lost
                    .is_none()
                    .then(|| items.envelope_of().and_then(Envelope::read));
                match envelope.flatten() {
                    Some(envelope) => self.page_ended(envelope, cx),
                    None => {
                        let why = lost.unwrap_or("a list that is cut off");
                        self.failed(Purpose::Page, false, why, cx);
                    }
                }
            }
            (BodyOf::Lines(_), purpose) => {
                if lost.is_none() && healthy && purpose == Purpose::Watch {
                    // Its time was over. A whole cluster's streams may end with one server: they come back one by one.
                    self.lost = true;
                    self.backoff.reset();
                    let wait = self.jitter.between(Duration::ZERO, self.pace.wait_first);
                    self.main = Main::Waiting {
                        until: cx.now + wait,
                    };
                    return;
                }
                let why = lost.unwrap_or("the stream ended at once");
                self.failed(purpose, healthy, why, cx);
            }
        }
    }

    fn page_ended(&mut self, envelope: Envelope, cx: &mut Context<'_>) {
        self.main = Main::Waiting { until: cx.now };
        self.next_page = Some(envelope.next).filter(|next| !next.is_empty());
        if self.next_page.is_none() {
            self.complete(envelope.version.into(), cx);
        }
        self.ask(cx);
    }

    fn refused(
        &mut self,
        purpose: Purpose,
        status: u16,
        said: &str,
        retry_after: Option<Duration>,
        cx: &mut Context<'_>,
    ) {
        let asked = retry_after.map(|asked| asked.min(self.pace.retry_after_at_most));
        self.lost = true;
        let limits = (self.pace.wait_first, self.pace.wait_at_most);
        let wait = self.backoff.fail(&mut self.jitter, limits, asked);
        self.main = Main::Waiting {
            until: cx.now + wait,
        };
        let meaning = refusal::meaning(status, purpose);
        match meaning {
            Meaning::Relist => {
                self.counts.gone += 1;
                if self.next_page.take().is_some() {
                    self.expired_lists += 1;
                }
                self.version = None;
                self.why = if self.synced { Why::Gone } else { Why::First };
            }
            Meaning::NoStreams => {
                self.no_streams_until = Some(cx.now + self.pace.streams_again);
                self.main = Main::Waiting { until: cx.now };
            }
            Meaning::Renew => cx.actions.push(Action::Renew),
            Meaning::Wrong | Meaning::Later => {}
        }
        let told = match meaning {
            Meaning::Wrong => true,
            // Once more with what is on disk now, before anybody is called.
            Meaning::Renew | Meaning::Later => self.backoff.failures() >= TOLD_AFTER,
            Meaning::Relist | Meaning::NoStreams => false,
        };
        if told {
            let what = self.whose();
            self.trouble = Some(refusal::trouble(
                &self.resource,
                purpose,
                status,
                said,
                &what,
            ));
        }
    }

    /// The scope, as a missing right would have to name it.
    pub(super) fn whose(&self) -> String {
        match &self.scope {
            Scope::Node(node) => format!("of node {node}"),
            Scope::Namespace(namespace) => format!("in namespace {namespace}"),
            Scope::Named(name) => format!("of the name {name}"),
            Scope::All if self.resource.namespaced => "in all namespaces".to_owned(),
            Scope::All => "of the cluster".to_owned(),
        }
    }

    /// No answer, or half of one.
    fn failed(&mut self, purpose: Purpose, healthy: bool, why: &str, cx: &mut Context<'_>) {
        self.lost = true;
        if healthy {
            self.backoff.reset();
        }
        let limits = (self.pace.wait_first, self.pace.wait_at_most);
        let wait = self.backoff.fail(&mut self.jitter, limits, None);
        self.main = Main::Waiting {
            until: cx.now + wait,
        };
        if self.backoff.failures() >= TOLD_AFTER {
            let (plural, verb) = (self.resource.plural, purpose.verb());
            self.trouble = Some(format!(
                "{plural}: the API server cannot be reached to {verb} them ({why}); what was read before stays in force"
            ));
        }
    }

    /// Nothing has come for too long: the server is frozen, or the way to it is gone without a word.
    fn impatient(&mut self, cx: &mut Context<'_>) {
        let Main::Asked(asked) = &self.main else {
            return;
        };
        let (exchange, purpose) = (asked.exchange, asked.purpose);
        let (spoke, answered) = (asked.spoke, asked.heard.is_some());
        let healthy =
            answered && spoke && cx.now.saturating_sub(asked.since) >= self.pace.healthy_after;
        cx.actions.push(Action::Abort(exchange));
        self.counts.silent += 1;
        if answered && !spoke {
            match purpose {
                // Perhaps it does not know what it was asked for, and waits for changes.
                Purpose::Stream => self.no_streams_until = Some(cx.now + self.pace.streams_again),
                // Perhaps it waits for a version that its data will never reach.
                Purpose::Watch => {
                    self.silent_streams += 1;
                    if self.silent_streams >= SILENT_STREAMS {
                        self.silent_streams = 0;
                        self.version = None;
                        self.why = Why::Doubt;
                    }
                }
                Purpose::Page | Purpose::Check => {}
            }
        }
        let waited = if answered {
            self.pace.silent_at_most
        } else {
            self.pace.answer_within
        };
        let why = format!("silent for {} s", waited.as_secs());
        self.failed(purpose, healthy, &why, cx);
    }

    /// An exchange ends because of what it said.
    fn turn(&mut self, turn: Turn, cx: &mut Context<'_>) {
        let Main::Asked(asked) = std::mem::replace(&mut self.main, Main::Waiting { until: cx.now })
        else {
            return;
        };
        let healthy = cx.now.saturating_sub(asked.since) >= self.pace.healthy_after;
        cx.actions.push(Action::Abort(asked.exchange));
        if healthy {
            self.backoff.reset();
        }
        match turn {
            Turn::Refused(status, said) => self.refused(asked.purpose, status, &said, None, cx),
            Turn::NoStreams => self.no_streams_until = Some(cx.now + self.pace.streams_again),
            Turn::Relist(why) => {
                let known = self.version.take();
                // It lied, or spoke of other data.
                self.reached = None;
                self.next_page = None;
                self.why = why;
                let limits = (self.pace.wait_first, self.pace.wait_at_most);
                let wait = self.backoff.fail(&mut self.jitter, limits, None);
                self.main = Main::Waiting {
                    until: cx.now + wait,
                };
                let plural = self.resource.plural;
                match why {
                    Why::WentBack => {
                        self.counts.went_back += 1;
                        self.note = Some(format!(
                            "{plural}: the API server's data is older than resourceVersion {}, which it gave before: a restored \
                             etcd, or another server; everything is listed anew",
                            known.as_deref().unwrap_or_default()
                        ));
                    }
                    Why::Doubt => {
                        self.trouble = Some(format!(
                            "{plural}: the API server sent what is no object and no event; everything is listed anew"
                        ));
                    }
                    Why::First | Why::Gone | Why::Unproven | Why::Check => {}
                }
            }
        }
    }
}
