//! The check of a watch: names and versions alone, listed by pages now and then, against what was told.
//!
//! A list and a watch are never at the same point, so a difference means nothing by itself. One that is the very same, on both
//! sides, longer than an event can be on its way, was lost or invented.

use std::collections::HashMap;
use std::time::Duration;

use super::known::{Item, Print};
use super::machine::{Envelope, Purpose, said};
use super::split::{Items, Piece};
use super::{Action, Context, Exchange, Input, Lane, PAGE, Watch, refusal};
use crate::ObjectName;
use crate::resource::selectors;

/// Differences that are remembered. More at once is either a burst of changes or a watch that has lost everything.
const MAX_SUSPECTS: usize = 1_000;

/// Pages of one check: an endless list is no list. Ten thousand pages are five million objects.
const MAX_PAGES: u32 = 10_000;

/// What the list says, and what is held.
type Pair = (Print, Print);

#[derive(Debug)]
struct Asked {
    exchange: Exchange,
    heard: Duration,
    items: Items,
    refused: Option<(u16, Vec<u8>)>,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Check {
    /// When to begin; `None`: there is no list yet to check.
    next: Option<Duration>,
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
        match (&self.check.asked, self.check.next) {
            (Some(asked), _) => asked.heard + self.pace.answer_within,
            (None, next) => next.unwrap_or(Duration::MAX),
        }
    }

    /// From now, a period later.
    pub(super) fn check_later(&mut self, now: Duration) {
        self.check.asked = None;
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
                self.check_later(cx.now);
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
        let mut query = selectors(self.kind, &self.scope);
        query.push(("limit", PAGE.to_string()));
        match self.check.next_page.take() {
            Some(token) => query.push(("continue", token)),
            // From the server's cache, and not from one that is behind what we know. A server without streaming lists would go to
            // etcd for that.
            None if self.streams(cx.now) => {
                query.push(("resourceVersion", version));
                query.push(("resourceVersionMatch", "NotOlderThan".to_owned()));
            }
            None => query.push(("resourceVersion", "0".to_owned())),
        }
        let accept =
            "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1,application/json";
        let exchange = self.send(Lane::Check, &query, accept, cx);
        self.check.pages += 1;
        self.check.asked = Some(Asked {
            exchange,
            heard: cx.now,
            items: Items::default(),
            refused: None,
        });
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
                None => asked.items.push(bytes, |piece| self.check_item(piece, cx)),
            },
            Input::End => return self.check_page_ended(asked, cx),
            Input::Lost(_) => return self.check_later(cx.now),
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
