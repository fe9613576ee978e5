//! The check of a watch: names and versions alone, listed by pages now and then, against what was told.
//!
//! A watch that resumes after a loss may have come to a server whose data is older: that one waits, without a word, for a version that
//! it may never reach. Or the storage was restored from a backup, and its versions have come back up to ours: then it goes on as if
//! nothing had been, and what is known is of another history. So it is asked, with a list of one object, whether it has come as far
//! and still has that object as it was when the stream ended (a *probe*). The object is the one that had changed last, its *witness*: a
//! history that has its last change has all changes before. What no probe can see: a backup that is younger than the last
//! change, with bookmarks alone between it and the end of the stream.
//!
//! A list and a watch are never at the same point, so a difference means nothing by itself. One that is the very same, on both
//! sides, longer than an event can be on its way, was lost or invented.

use std::collections::HashMap;
use std::time::Duration;

use super::answer::{Envelope, Purpose, said};
use super::known::{Item, Print, Witness};
use super::split::{Items, Piece};
use super::{Action, Context, Exchange, Input, Lane, PAGE, Watch, refusal};
use crate::ObjectName;
use crate::resource::selectors;

/// Differences that are remembered. More at once is either a burst of changes or a watch that has lost everything.
const MAX_SUSPECTS: usize = 1_000;

/// Pages of one check: an endless list is no list. Ten thousand pages are five million objects.
const MAX_PAGES: u32 = 10_000;

/// How the API server calls a resourceVersion that its data has not reached within three seconds.
const TOO_LARGE: &str = "Too large resource version";

const NAMES_AND_VERSIONS: &str =
    "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1,application/json";

/// Witnesses that are asked for, one after the other, when each has changed meanwhile.
const MAX_WITNESSES: u32 = 4;

/// What has to be proven of a stream that resumed another: that it is of the same history.
#[derive(Debug, Clone)]
pub(super) struct Proof {
    /// `None`: there is nothing to tell histories apart by.
    witness: Option<Witness>,
    /// The version that was resumed from: what changes later is told.
    from: u64,
    asked: u32,
    /// Probes without an answer.
    failed: u32,
}

impl Proof {
    pub(super) fn new(witness: Option<Witness>, from: u64) -> Self {
        Self {
            witness,
            from,
            asked: 0,
            failed: 0,
        }
    }

    /// Nothing was said between the two.
    pub(super) fn is_as(&self, other: &Self) -> bool {
        self.witness == other.witness && self.from == other.from
    }

    fn of_deletion(&self) -> bool {
        self.witness.as_ref().is_some_and(Witness::is_deletion)
    }

    fn verdict(&self, found: Option<Print>) -> Verdict {
        // Nothing is known: what is there has to be later.
        let held = self.witness.as_ref().map(|witness| witness.print);
        match found {
            found if found.unwrap_or_default() == held.unwrap_or_default() => Verdict::Same,
            Some(print) if !print.later_than(self.from) => Verdict::Another,
            Some(_) if held.is_none() => Verdict::Same,
            // Changed since, or deleted, of which the stream tells; or never there.
            Some(_) | None => Verdict::Unknown,
        }
    }
}

/// Of whose history an answer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Same,
    Another,
    Unknown,
}

/// What the list says, and what is held.
type Pair = (Print, Print);

#[derive(Debug)]
struct Asked {
    exchange: Exchange,
    probe: bool,
    /// What the probe has found of its witness.
    found: Option<Print>,
    heard: Duration,
    items: Items,
    refused: Option<(u16, Vec<u8>)>,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Check {
    /// When to begin; `None`: there is no list yet to check.
    next: Option<Duration>,
    /// When to probe.
    probe: Option<Duration>,
    asked: Option<Asked>,
    pages: u32,
    next_page: Option<String>,
    /// Of the look that is under way.
    differs: HashMap<ObjectName, Pair>,
    /// Of the look before; `None`: this is the first.
    suspects: Option<HashMap<ObjectName, Pair>>,
    confirmed: usize,
    trouble: Option<String>,
}

impl Check {
    pub(super) fn new() -> Self {
        Self {
            next: None,
            probe: None,
            asked: None,
            pages: 0,
            next_page: None,
            differs: HashMap::new(),
            suspects: None,
            confirmed: 0,
            trouble: None,
        }
    }

    pub(super) fn trouble(&self) -> Option<&String> {
        self.trouble.as_ref()
    }
}

impl Watch {
    pub(super) fn check_timeout(&self) -> Duration {
        match &self.check.asked {
            Some(asked) => asked.heard + self.pace.answer_within,
            None => {
                let due = self.check.probe.into_iter().chain(self.check.next);
                due.min().unwrap_or(Duration::MAX)
            }
        }
    }

    /// A watch has resumed after a loss. Not at once: its whole cluster may have.
    pub(super) fn probe_soon(&mut self, now: Duration) {
        let wait = self
            .jitter
            .between(Duration::ZERO, self.pace.wait_first * 4);
        self.check.probe = Some(now + wait);
    }

    pub(super) fn abort_probe(&mut self, cx: &mut Context<'_>) {
        if let Some(asked) = self.check.asked.take_if(|asked| asked.probe) {
            cx.actions.push(Action::Abort(asked.exchange));
        }
    }

    /// From now, a period later.
    pub(super) fn check_later(&mut self, now: Duration) {
        self.check.asked = None;
        if self.proofs.is_empty() {
            self.check.probe = None;
        }
        self.check.suspects = None;
        let objects = u32::try_from(self.known.len()).unwrap_or(u32::MAX);
        let period = self.pace.check_per_object.saturating_mul(objects);
        let period = period
            .max(self.pace.check_every)
            .min(self.pace.check_at_most);
        let period = self.jitter.between(period / 2, period * 3 / 2);
        self.check.next = Some(now + period);
    }

    pub(super) fn check_tick(&mut self, cx: &mut Context<'_>) {
        if let Some(asked) = &self.check.asked {
            if asked.heard + self.pace.answer_within <= cx.now {
                cx.actions.push(Action::Abort(asked.exchange));
                self.probe_again(cx.now);
                self.check_later(cx.now);
            }
            return;
        }
        if self.check.probe.take_if(|due| *due <= cx.now).is_some() {
            // Else there is nothing to probe: whoever asks next resumes anew.
            if let Some(version) = self.watching().map(str::to_owned) {
                self.ask_witness(version, cx);
            }
            return;
        }
        if self.check.next.is_none_or(|next| next > cx.now) {
            return;
        }
        if self.watching().is_none() {
            // A list is under way or the server is gone: there is nothing to check against.
            return self.check_later(cx.now);
        }
        self.known.begin_check();
        self.check.differs.clear();
        self.check.pages = 0;
        self.check.next_page = None;
        self.ask_page(cx);
    }

    fn ask_page(&mut self, cx: &mut Context<'_>) {
        let Some(version) = self.watching().map(str::to_owned) else {
            return self.check_later(cx.now);
        };
        let token = self.check.next_page.take();
        // From the server's cache, and not from one that is behind what we know. A server without streaming lists would go to etcd
        // for that.
        let at_least = self.streams(cx.now).then_some(version);
        self.check.pages += 1;
        let mut query = selectors(self.kind, &self.scope);
        query.push(("limit", PAGE.to_string()));
        match (token, at_least) {
            (Some(token), _) => query.push(("continue", token)),
            (None, Some(version)) => {
                query.push(("resourceVersion", version));
                query.push(("resourceVersionMatch", "NotOlderThan".to_owned()));
            }
            (None, None) => query.push(("resourceVersion", "0".to_owned())),
        }
        let exchange = self.send(Lane::Check, &query, NAMES_AND_VERSIONS, cx);
        self.check_asked(exchange, false, cx);
    }

    /// Asks a server that is at a version at least for the witness.
    fn ask_witness(&mut self, version: String, cx: &mut Context<'_>) {
        let mut query = selectors(self.kind, &self.scope);
        let proof = self.proofs.last();
        let witness = proof.and_then(|proof| proof.witness.as_ref());
        let mut namespace = self.scope.namespace().map(str::to_owned);
        if let Some(Witness { name, .. }) = witness {
            let field = format!("metadata.name={}", name.name);
            match query.iter_mut().find(|(key, _)| *key == "fieldSelector") {
                Some((_, fields)) if fields.contains(&field) => {}
                Some((_, fields)) => *fields = format!("{fields},{field}"),
                None => query.push(("fieldSelector", field)),
            }
            // In its own namespace a server looks one name up and goes through no list.
            namespace = Some(name.namespace.to_string());
        }
        // Nothing is known that could have a name: then nothing that is there may be older.
        let limit = if witness.is_some() { 1 } else { PAGE };
        query.push(("limit", limit.to_string()));
        query.push(("resourceVersion", version));
        query.push(("resourceVersionMatch", "NotOlderThan".to_owned()));
        let collection = self.resource.collection(namespace.as_deref());
        let exchange = self.send_to(Lane::Check, collection, &query, NAMES_AND_VERSIONS, cx);
        self.check_asked(exchange, true, cx);
    }

    fn check_asked(&mut self, exchange: Exchange, probe: bool, cx: &mut Context<'_>) {
        self.check.asked = Some(Asked {
            exchange,
            probe,
            found: None,
            heard: cx.now,
            items: Items::default(),
            refused: None,
        });
    }

    /// As long as something is to be proven there is a probe.
    fn probe_again(&mut self, now: Duration) {
        if let Some(proof) = self.proofs.last_mut()
            && self.check.probe.is_none()
        {
            proof.failed = proof.failed.saturating_add(1);
            let longer = self
                .pace
                .wait_first
                .saturating_mul(1 << proof.failed.min(16));
            let most = longer.min(self.pace.wait_at_most);
            let wait = self.jitter.between(most / 2, most);
            self.check.probe = Some(now + wait);
        }
    }

    /// The probe has an answer.
    fn probed(&mut self, found: Option<Print>, cx: &mut Context<'_>) {
        let Some(proof) = self.proofs.last_mut() else {
            return;
        };
        match proof.verdict(found) {
            // Where somebody goes by revisions nothing less will do than the last change itself.
            Verdict::Unknown if self.revisions => self.relist_unproven(cx),
            // Gone in both: what is not there proves less than what is.
            Verdict::Same if proof.of_deletion() => {
                proof.witness = self.known.newest_until(proof.from);
                self.probe_soon(cx.now);
            }
            Verdict::Same => self.proven(cx.now),
            Verdict::Another => {
                self.relist_for_older_data(cx);
            }
            Verdict::Unknown if proof.asked < MAX_WITNESSES => {
                proof.asked += 1;
                proof.witness = self.known.newest_until(proof.from);
                self.probe_soon(cx.now);
            }
            // It is not there, and no stream says that it went; or all is small enough that a list costs no more than asking on.
            Verdict::Unknown if found.is_none() || self.known.len() <= PAGE => {
                self.relist_unproven(cx);
            }
            // Whatever is asked for changes meanwhile: a busy kind, whose changes the stream tells.
            Verdict::Unknown => self.proven(cx.now),
        }
    }

    /// The last loss is proven, the ones before it are next.
    fn proven(&mut self, now: Duration) {
        self.proofs.pop();
        if !self.proofs.is_empty() {
            self.probe_soon(now);
        }
    }

    pub(super) fn check_input(
        &mut self,
        exchange: Exchange,
        input: Input<'_>,
        cx: &mut Context<'_>,
    ) {
        let Some(mut asked) = self.check.asked.take_if(|asked| asked.exchange == exchange) else {
            return;
        };
        asked.heard = cx.now;
        match input {
            Input::Head { status: 200, .. } => {}
            Input::Head { status, .. } => asked.refused = Some((status, Vec::new())),
            Input::Body(bytes) => match &mut asked.refused {
                Some((_, text)) => text.extend_from_slice(&bytes[..bytes.len().min(1 << 10)]),
                None if asked.probe => asked.items.push(bytes, |piece| {
                    if let Piece::Whole(json) = piece
                        && let Ok(Item { metadata }) = serde_json::from_slice(json)
                    {
                        let print = metadata.print();
                        let oldest = asked
                            .found
                            .filter(|found| !found.later_than(print.version()));
                        asked.found = oldest.or(Some(print));
                    }
                }),
                None => asked.items.push(bytes, |piece| self.check_item(piece, cx)),
            },
            Input::End => return self.check_page_ended(asked, cx),
            Input::Lost(_) => {
                self.probe_again(cx.now);
                return self.check_later(cx.now);
            }
        }
        self.check.asked = Some(asked);
    }

    fn check_item(&mut self, piece: Piece<'_>, cx: &mut Context<'_>) {
        let Piece::Whole(json) = piece else { return };
        let Ok(Item { metadata }) = serde_json::from_slice(json) else {
            return;
        };
        let print = metadata.print();
        let named = (&*metadata.namespace, &*metadata.name);
        if let Some((name, held)) = self.known.differs(cx.names, named, print)
            && self.check.differs.len() < MAX_SUSPECTS
        {
            self.check.differs.insert(name, (print, held));
        }
    }

    fn check_page_ended(&mut self, asked: Asked, cx: &mut Context<'_>) {
        if let Some((status, text)) = asked.refused {
            if status == 504 && said(&text).contains(TOO_LARGE) {
                self.check_later(cx.now);
                return self.relist_for_older_data(cx);
            }
            if asked.probe {
                return self.probe_again(cx.now);
            }
            self.check.trouble = (status == 403).then(|| {
                refusal::trouble(
                    &self.resource,
                    Purpose::Check,
                    status,
                    &said(&text),
                    &self.whose(),
                )
            });
            return self.check_later(cx.now);
        }
        if asked.probe {
            // An answer that is cut off says nothing.
            return match asked.items.envelope_of().and_then(Envelope::read) {
                Some(_) => self.probed(asked.found, cx),
                None => self.probe_again(cx.now),
            };
        }
        let Some(envelope) = asked.items.envelope_of().and_then(Envelope::read) else {
            return self.check_later(cx.now);
        };
        self.check.trouble = None;
        if !envelope.next.is_empty() && self.check.pages < MAX_PAGES {
            self.check.next_page = Some(envelope.next);
            return self.ask_page(cx);
        }
        self.check_complete(cx);
    }

    fn check_complete(&mut self, cx: &mut Context<'_>) {
        self.counts.checks += 1;
        let room = MAX_SUSPECTS - self.check.differs.len();
        let extra = self.known.unchecked().take(room);
        let extra: Vec<_> = extra
            .map(|(name, held)| (name.clone(), (Print::default(), held)))
            .collect();
        self.check.differs.extend(extra);
        let differs = std::mem::take(&mut self.check.differs);
        match self.check.suspects.take() {
            None if differs.is_empty() => {
                self.note = None;
                self.check_later(cx.now);
            }
            None => {
                self.check_later(cx.now);
                self.check.suspects = Some(differs);
                self.check.next = Some(cx.now + self.pace.confirm_after);
            }
            Some(suspects) => {
                let same = suspects
                    .iter()
                    .filter(|(name, pair)| differs.get(*name) == Some(*pair));
                self.check.confirmed = same.count();
                self.check_later(cx.now);
                if self.check.confirmed > 0 {
                    self.relist_for_check(cx);
                }
            }
        }
    }

    /// A list that a check asked for is complete and made this many deltas.
    pub(super) fn repaired(&mut self, deltas: usize) {
        if deltas > 0 {
            self.note = Some(format!(
                "{}: a check found {} objects that the watch had lost or invented; all were listed anew and {deltas} changes made good",
                self.resource.plural, self.check.confirmed
            ));
        }
    }
}
