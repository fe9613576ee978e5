//! An API server that injects faults: lists, streaming lists, watches with bookmarks, compaction, in memory. Its honest half is what
//! the Kubernetes API concepts say; whether a real server does the same is tried elsewhere, on one.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use kun_cluster_core::{Kind, Object, ObjectName, Resource};
use serde_json::{Value, json};

/// Between bookmarks of a stream.
const BOOKMARK: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lie {
    Lose,
    Invent,
    Twice,
    Swap,
    Garbage,
}

/// What the server makes of `sendInitialEvents`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Streams {
    Yes,
    /// 422.
    Refused,
    /// It knows no such parameter, and sends what it would without.
    Ignored,
}

#[derive(Debug, Clone)]
struct Stored {
    uid: String,
    rev: u64,
    good: bool,
    json: Value,
}

#[derive(Debug, Clone)]
struct Happened {
    rev: u64,
    kind: Kind,
    what: &'static str,
    json: Value,
}

#[derive(Debug, Clone, Default)]
struct Data {
    rev: u64,
    objects: BTreeMap<(Kind, String), Stored>,
    history: Vec<Happened>,
    compacted: u64,
    /// What there was of Namespaces (name, uid) at each revision that changed it.
    states: BTreeMap<u64, BTreeMap<String, String>>,
}

/// One request's answer.
pub(crate) struct Connection {
    pub(crate) head: Option<(u16, Option<Duration>)>,
    pub(crate) out: Vec<u8>,
    /// Nothing more will come.
    pub(crate) over: bool,
    pub(crate) next_bookmark: Duration,
    watch: Option<(Kind, u64)>,
    held: Option<Vec<u8>>,
}

pub(crate) struct Server {
    data: Data,
    saved: Option<Data>,
    /// A stream said what was not so.
    pub(crate) lied: bool,
    /// Every good version that an object ever had, by uid.
    good: BTreeMap<String, Vec<u64>>,
    uids: u64,
    pub(crate) frozen: bool,
    pub(crate) refuse: VecDeque<(u16, Option<Duration>)>,
    pub(crate) lie: Option<Lie>,
    pub(crate) streams: Streams,
    pub(crate) streams_asked: u64,
    /// 410 comes as an event and not as a status.
    pub(crate) gone_in_stream: bool,
    pub(crate) page: usize,
    pub(crate) bookmarks: bool,
    /// So many continue tokens are refused.
    pub(crate) expire_tokens: u32,
}

impl Server {
    pub(crate) fn new() -> Self {
        Self {
            data: Data {
                rev: 100,
                ..Data::default()
            },
            saved: None,
            lied: false,
            good: BTreeMap::new(),
            uids: 0,
            frozen: false,
            refuse: VecDeque::new(),
            lie: None,
            streams: Streams::Yes,
            streams_asked: 0,
            gone_in_stream: false,
            page: 3,
            bookmarks: true,
            expire_tokens: 0,
        }
    }

    pub(crate) fn create(&mut self, kind: Kind, name: u8) {
        if !self.data.objects.contains_key(&(kind, name_of(kind, name))) {
            self.uids += 1;
            let uid = format!("00000000-0000-4000-8000-{:012}", self.uids);
            self.write(kind, name, uid, "ADDED", true);
        }
    }

    pub(crate) fn update(&mut self, kind: Kind, name: u8, spoil: bool) {
        if let Some(stored) = self.data.objects.get(&(kind, name_of(kind, name))) {
            let uid = stored.uid.clone();
            self.write(kind, name, uid, "MODIFIED", !spoil);
        }
    }

    fn write(&mut self, kind: Kind, name: u8, uid: String, what: &'static str, good: bool) {
        self.data.rev += 1;
        let rev = self.data.rev;
        let json = object(kind, name, &uid, rev, good);
        if good {
            self.good.entry(uid.clone()).or_default().push(rev);
        }
        let stored = Stored {
            uid,
            rev,
            good,
            json: json.clone(),
        };
        self.data
            .objects
            .insert((kind, name_of(kind, name)), stored);
        self.data.history.push(Happened {
            rev,
            kind,
            what,
            json,
        });
        self.remember();
    }

    fn remember(&mut self) {
        let namespaces =
            (self.data.objects.iter()).filter(|((kind, _), _)| *kind == Kind::Namespace);
        let state = namespaces.map(|((_, name), stored)| (name.clone(), stored.uid.clone()));
        self.data.states.insert(self.data.rev, state.collect());
    }

    /// The Namespaces at a revision.
    pub(crate) fn had(&self, revision: u64) -> BTreeMap<String, String> {
        assert!(revision <= self.data.rev, "{revision} is still to come");
        let until = self.data.states.range(..=revision).next_back();
        until.map(|(_, state)| state.clone()).unwrap_or_default()
    }

    pub(crate) fn delete(&mut self, kind: Kind, name: u8) {
        if let Some(stored) = self.data.objects.remove(&(kind, name_of(kind, name))) {
            self.data.rev += 1;
            let rev = self.data.rev;
            let json = object(kind, name, &stored.uid, rev, stored.good);
            self.data.history.push(Happened {
                rev,
                kind,
                what: "DELETED",
                json,
            });
            self.remember();
        }
    }

    pub(crate) fn compact(&mut self) {
        self.data.compacted = self.data.rev;
        self.data.history.clear();
    }

    pub(crate) fn backup(&mut self) {
        self.saved = Some(self.data.clone());
    }

    pub(crate) fn go_back(&mut self) {
        if let Some(saved) = self.saved.take() {
            self.data = saved;
        }
    }

    /// Others write until the numbers are where they were.
    pub(crate) fn count_on(&mut self, revision: u64) {
        self.data.rev = self.data.rev.max(revision);
    }

    pub(crate) fn revision(&self) -> u64 {
        self.data.rev
    }

    pub(crate) fn open(&mut self, path: &str, accept: &str, now: Duration) -> Connection {
        let (path, query) = path.split_once('?').unwrap_or((path, ""));
        let query: BTreeMap<&str, &str> = query
            .split('&')
            .filter_map(|pair| pair.split_once('='))
            .collect();
        let kind = [Kind::Namespace, Kind::IpamBlock]
            .into_iter()
            .find(|k| Resource::of(*k).collection(None) == path);
        let kind = kind.unwrap_or_else(|| panic!("nobody serves {path}"));
        let mut connection = Connection {
            head: Some((200, None)),
            out: Vec::new(),
            over: false,
            next_bookmark: Duration::MAX,
            watch: None,
            held: None,
        };
        if let Some((status, retry_after)) = self.refuse.pop_front() {
            refuse(&mut connection, status, retry_after);
            return connection;
        }
        if query.contains_key("watch") {
            assert_eq!(query.get("allowWatchBookmarks"), Some(&"true"));
            connection.next_bookmark = now + BOOKMARK;
            self.open_watch(kind, &query, &mut connection);
        } else {
            self.open_list(
                kind,
                &query,
                accept.contains("PartialObjectMetadataList"),
                &mut connection,
            );
        }
        connection
    }

    fn open_watch(
        &mut self,
        kind: Kind,
        query: &BTreeMap<&str, &str>,
        connection: &mut Connection,
    ) {
        let version = query
            .get("resourceVersion")
            .map(|v| v.parse().expect("a version of ours"));
        if query.contains_key("sendInitialEvents") {
            self.streams_asked += 1;
            assert_eq!(query.get("resourceVersionMatch"), Some(&"NotOlderThan"));
            if self.streams == Streams::Refused {
                return refuse(connection, 422, None);
            }
            for (_, stored) in self.data.objects.iter().filter(|((k, _), _)| *k == kind) {
                line(connection, "ADDED", &stored.json);
            }
            if self.streams == Streams::Yes {
                let end = json!({"metadata": {"resourceVersion": self.data.rev.to_string(), "annotations": {"k8s.io/initial-events-end": "true"}}});
                line(connection, "BOOKMARK", &end);
            }
            connection.watch = Some((kind, self.data.rev));
        } else if version.is_some_and(|v: u64| v < self.data.compacted) {
            if self.gone_in_stream {
                line(
                    connection,
                    "ERROR",
                    &json!({"kind": "Status", "code": 410, "reason": "Expired", "message": "too old"}),
                );
                connection.over = true;
            } else {
                refuse(connection, 410, None);
            }
        } else {
            connection.watch = version.map(|v| (kind, v));
            assert!(version.is_some(), "a watch from anywhere");
        }
    }

    fn open_list(
        &mut self,
        kind: Kind,
        query: &BTreeMap<&str, &str>,
        meta_only: bool,
        connection: &mut Connection,
    ) {
        let at_least = query
            .get("resourceVersion")
            .and_then(|v| v.parse::<u64>().ok());
        if at_least.is_some_and(|v| v > self.data.rev) {
            refuse(connection, 504, None);
            connection.out =
                br#"{"code":504,"message":"Timeout: Too large resource version: 9, current: 8"}"#
                    .to_vec();
            return;
        }
        let from = match query
            .get("continue")
            .and_then(|token| token.split_once('.'))
        {
            None => 0,
            Some((rev, from)) => {
                let rev: u64 = rev.parse().expect("our token");
                if self.expire_tokens > 0 || rev < self.data.compacted {
                    self.expire_tokens = self.expire_tokens.saturating_sub(1);
                    return refuse(connection, 410, None);
                }
                from.parse().expect("our token")
            }
        };
        let named = query
            .get("fieldSelector")
            .map(|field| field.strip_prefix("metadata.name%3D").expect("a name"));
        let of_kind: Vec<&Stored> = (self.data.objects.iter())
            .filter(|((k, name), _)| *k == kind && named.is_none_or(|named| named == name))
            .map(|(_, s)| s)
            .collect();
        let page = if query.contains_key("limit") {
            self.page
        } else {
            usize::MAX
        };
        let item = |stored: &&Stored| {
            if meta_only {
                json!({"metadata": stored.json["metadata"]})
            } else {
                stored.json.clone()
            }
        };
        let items: Vec<Value> = of_kind.iter().skip(from).take(page).map(item).collect();
        let next = from.saturating_add(page);
        let token = if next < of_kind.len() {
            format!("{}.{next}", self.data.rev)
        } else {
            String::new()
        };
        let list = json!({"kind": "List", "items": items, "metadata": {"resourceVersion": self.data.rev.to_string(), "continue": token}});
        connection.out = list.to_string().into_bytes();
        connection.over = true;
    }

    /// What has happened since goes into the stream, as honestly as the server is.
    pub(crate) fn feed(&mut self, connection: &mut Connection, now: Duration) {
        let Some((kind, at)) = connection.watch else {
            return;
        };
        let new: Vec<Happened> = (self.data.history.iter())
            .filter(|h| h.rev > at && h.kind == kind)
            .cloned()
            .collect();
        for happened in new {
            self.say(connection, &happened);
        }
        if now >= connection.next_bookmark {
            connection.next_bookmark = now + BOOKMARK;
            if !self.bookmarks {
                return;
            }
            line(
                connection,
                "BOOKMARK",
                &json!({"metadata": {"resourceVersion": self.data.rev.to_string()}}),
            );
        }
        connection.watch = Some((kind, at.max(self.data.rev)));
    }

    fn say(&mut self, connection: &mut Connection, happened: &Happened) {
        let text = line_of(happened.what, &happened.json);
        self.lied |= self.lie.is_some();
        match self.lie.take() {
            Some(Lie::Lose) => {}
            Some(Lie::Twice) => {
                connection.out.extend_from_slice(&text);
                connection.out.extend_from_slice(&text);
            }
            Some(Lie::Swap) => connection.held = Some(text),
            Some(Lie::Garbage) => {
                connection
                    .out
                    .extend_from_slice(b"{\"type\":\"ADDED\",\"object\":{\"metadata\":{}}}\n");
                connection.out.extend_from_slice(&text);
            }
            Some(Lie::Invent) => {
                connection.out.extend_from_slice(&text);
                let ghost = object(
                    happened.kind,
                    9,
                    "00000000-0000-4000-8000-ffffffffffff",
                    happened.rev,
                    true,
                );
                connection.out.extend_from_slice(&line_of("ADDED", &ghost));
            }
            None => {
                connection.out.extend_from_slice(&text);
                if let Some(held) = connection.held.take() {
                    connection.out.extend_from_slice(&held);
                }
            }
        }
    }

    /// What was told is what there is; of an object that is wrong, any good version that it once had, or nothing.
    pub(crate) fn agrees(&self, told: &BTreeMap<(Kind, ObjectName), Object>) {
        let told: BTreeMap<(Kind, String), (String, u64)> = told
            .values()
            .map(|object| {
                let meta = object.meta();
                let version = meta
                    .labels
                    .get("version")
                    .expect("each has one")
                    .parse()
                    .expect("a number");
                (
                    (object.kind(), meta.name.name.to_string()),
                    (meta.uid.to_string(), version),
                )
            })
            .collect();
        for (key, stored) in &self.data.objects {
            match told.get(key) {
                Some((uid, version)) if stored.good => {
                    assert_eq!((uid, *version), (&stored.uid, stored.rev), "{key:?}")
                }
                Some((uid, version)) => {
                    assert_eq!(*uid, stored.uid, "{key:?}");
                    assert!(
                        self.good[uid].contains(version),
                        "{key:?} was never {version}"
                    );
                }
                None => assert!(!stored.good, "{key:?} is lost"),
            }
        }
        for key in told.keys() {
            assert!(self.data.objects.contains_key(key), "{key:?} is invented");
        }
    }
}

/// The name of a block's object follows from the block.
pub(crate) fn names_and_uids<'o>(
    objects: impl Iterator<Item = &'o Object>,
) -> BTreeMap<String, String> {
    objects
        .map(|o| (o.meta().name.name.to_string(), o.meta().uid.to_string()))
        .collect()
}

fn name_of(kind: Kind, name: u8) -> String {
    match kind {
        Kind::IpamBlock => format!("block-10-64-{name}-0"),
        _ => format!("o{name}"),
    }
}

fn object(kind: Kind, name: u8, uid: &str, rev: u64, good: bool) -> Value {
    let resource = Resource::of(kind);
    let slot = if good { 0 } else { 1 };
    let mut object = json!({
        "apiVersion": resource.api_version(), "kind": resource.kind,
        "metadata": {"name": name_of(kind, name), "uid": uid, "resourceVersion": rev.to_string(), "labels": {"version": rev.to_string()}},
    });
    if kind == Kind::IpamBlock {
        object["spec"] = json!({"first": format!("10.64.{name}.{slot}"), "node": "a"});
    }
    object
}

fn line_of(what: &str, object: &Value) -> Vec<u8> {
    format!("{}\n", json!({"type": what, "object": object})).into_bytes()
}

fn line(connection: &mut Connection, what: &str, object: &Value) {
    connection.out.extend_from_slice(&line_of(what, object));
}

fn refuse(connection: &mut Connection, status: u16, retry_after: Option<Duration>) {
    connection.head = Some((status, retry_after));
    connection.out = json!({"kind": "Status", "code": status, "message": format!("fake {status}")})
        .to_string()
        .into_bytes();
    connection.over = true;
    connection.watch = None;
}
