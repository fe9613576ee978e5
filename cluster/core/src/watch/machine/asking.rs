//! What is asked of the API server, and how.

use super::{Asked, BodyOf, EXPIRED_LISTS, Main, Watch, Why};
use crate::resource::{encode, selectors};
use crate::watch::answer::Purpose;
use crate::watch::check::Proof;
use crate::watch::known::number;
use crate::watch::split::Lines;
use crate::watch::{Action, Context, Exchange, Lane, PAGE, Request};

/// Streams in a row that were over before they were proven; each costs a probe later. A proxy that cuts every stream as soon as it stands
/// does so within seconds, and then everything is listed.
const MAX_UNPROVEN: usize = 16;

impl Watch {
    /// A stream that is over goes on in another one: what was known when it ended has to be proven to be of the same history.
    fn resumes(&mut self, cx: &mut Context<'_>) {
        if !self.lost {
            return;
        }
        // What was asked before this loss is about the stream before it.
        self.abort_probe(cx);
        let Some(from) = self.version.as_deref().and_then(number) else {
            return;
        };
        let newest = self.known.newest();
        if self.revisions && newest.is_none_or(|newest| newest.listed || newest.is_deletion()) {
            // Nothing has the last change that could be asked for.
            return self.list_instead();
        }
        // Lost again before it was proven: what was said in between may be of yet another history.
        let proof = Proof::new(self.known.newest().cloned(), from);
        if self.proofs.last().is_some_and(|last| last.is_as(&proof)) {
            return;
        }
        if self.proofs.len() < MAX_UNPROVEN {
            self.proofs.push(proof);
            return;
        }
        self.list_instead();
    }

    fn list_instead(&mut self) {
        self.version = None;
        self.reached = None;
        self.why = Why::Unproven;
    }

    fn resume_from(&self) -> String {
        let changed = self.known.newest().map(|newest| newest.at);
        match changed {
            Some(changed) if self.revisions && !self.proofs.is_empty() => changed.to_string(),
            _ => self.version.as_deref().unwrap_or_default().to_owned(),
        }
    }

    /// Sends the request that is next.
    pub(super) fn ask(&mut self, cx: &mut Context<'_>) {
        self.resumes(cx);
        let purpose = match &self.version {
            Some(_) => Purpose::Watch,
            None if self.streams(cx.now) && self.next_page.is_none() => Purpose::Stream,
            None => Purpose::Page,
        };
        if purpose == Purpose::Stream || (purpose == Purpose::Page && self.next_page.is_none()) {
            self.known.begin_list();
            self.missing = false;
        }
        let mut query: Vec<(&str, String)> = selectors(self.kind, &self.scope);
        let body = match purpose {
            Purpose::Stream | Purpose::Watch => {
                let longest = self.pace.watch_for * 2;
                let seconds = self
                    .jitter
                    .between(self.pace.watch_for, longest)
                    .as_secs()
                    .max(1);
                query.push(("watch", "1".to_owned()));
                query.push(("allowWatchBookmarks", "true".to_owned()));
                query.push(("timeoutSeconds", seconds.to_string()));
                BodyOf::Lines(Lines::default())
            }
            Purpose::Page | Purpose::Check => BodyOf::Items(Box::default()),
        };
        match purpose {
            Purpose::Watch => {
                query.push(("resourceVersion", self.resume_from()));
            }
            // No resourceVersion: the newest data, not what some cache has.
            Purpose::Stream => {
                query.push(("sendInitialEvents", "true".to_owned()));
                query.push(("resourceVersionMatch", "NotOlderThan".to_owned()));
            }
            Purpose::Page | Purpose::Check => {
                if self.expired_lists < EXPIRED_LISTS {
                    query.push(("limit", PAGE.to_string()));
                }
                let token = self.next_page.clone();
                query.extend(token.map(|token| ("continue", token)));
            }
        }
        let exchange = self.send(Lane::Main, &query, "application/json", cx);
        self.main = Main::Asked(Asked {
            exchange,
            purpose,
            since: cx.now,
            heard: None,
            spoke: false,
            body,
        });
    }

    pub(in crate::watch) fn send(
        &mut self,
        lane: Lane,
        query: &[(&str, String)],
        accept: &'static str,
        cx: &mut Context<'_>,
    ) -> Exchange {
        let collection = self.resource.collection(self.scope.namespace());
        self.send_to(lane, collection, query, accept, cx)
    }

    pub(in crate::watch) fn send_to(
        &mut self,
        lane: Lane,
        collection: String,
        query: &[(&str, String)],
        accept: &'static str,
        cx: &mut Context<'_>,
    ) -> Exchange {
        self.serial += 1;
        self.counts.requests += 1;
        let exchange = Exchange {
            watch: self.index,
            lane,
            serial: self.serial,
        };
        let mut path = collection;
        for (i, (key, value)) in query.iter().enumerate() {
            path.push(if i == 0 { '?' } else { '&' });
            path.push_str(key);
            path.push('=');
            encode(&mut path, value);
        }
        cx.actions.push(Action::Send(Request {
            exchange,
            path,
            accept,
        }));
        exchange
    }
}
