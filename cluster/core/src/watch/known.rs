//! What has been told of one kind: by name, which object (uid) in which version. Not the objects themselves: they belong to whoever
//! was told. Turns what the server says into deltas, and keeps the last good version of an object that is wrong.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::hash::{BuildHasher, Hasher};

use foldhash::SharedSeed;
use foldhash::fast::{FixedState, SeedableRandomState};
use kun_config::yaml::Node;

use super::json;
use crate::{Delta, Interner, Kind, Object, ObjectName, Resource, Scope, read_api};

/// Objects of one kind whose faults are told one by one; past this only their number is.
const MAX_WRONG_TOLD: usize = 50;

/// Faults told of one object.
const MAX_FAULTS_TOLD: usize = 5;

/// uid and resourceVersion, only ever compared for equality.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Print {
    uid: u128,
    version: u64,
}

impl Print {
    pub(super) fn version(self) -> u64 {
        self.version
    }

    /// Whether it is of a later version than this.
    pub(super) fn later_than(self, version: u64) -> bool {
        self.version > version
    }

    pub(super) fn new(uid: &str, version: &str) -> Self {
        Self {
            uid: uid_print(uid),
            version: number(version).unwrap_or_else(|| hash(version.as_bytes())),
        }
    }
}

/// A UUID as the number it is; anything else hashed.
fn uid_print(text: &str) -> u128 {
    let plain = text.bytes().filter(|b| *b != b'-');
    let digits = plain.clone().count() == 32 && plain.clone().all(|b| b.is_ascii_hexdigit());
    if digits {
        return plain.fold(0, |n, b| {
            n << 4 | u128::from(char::from(b).to_digit(16).unwrap_or(0))
        });
    }
    u128::from(hash(text.as_bytes())) << 64 | u128::from(hash(&[text.as_bytes(), b"."].concat()))
}

/// A resourceVersion that is a number may be compared with another (KEP-5504); any other only for equality.
pub(super) fn number(version: &str) -> Option<u64> {
    let canonical = version == "0" || !version.starts_with('0');
    let digits = !version.is_empty() && version.bytes().all(|b| b.is_ascii_digit());
    (canonical && digits)
        .then(|| version.parse().ok())
        .flatten()
}

fn hash(bytes: &[u8]) -> u64 {
    FixedState::default().hash_one(bytes)
}

/// The object that a watch changed last, as it then was: what tells one history of a storage from another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Witness {
    pub(super) name: ObjectName,
    /// [`Print::default`]: it was deleted.
    pub(super) print: Print,
    /// When.
    pub(super) at: u64,
    /// A list named it: what was deleted before the list it does not know.
    pub(super) listed: bool,
}

impl Witness {
    pub(super) fn is_deletion(&self) -> bool {
        self.print == Print::default()
    }
}

#[derive(Debug)]
struct Held {
    print: Print,
    /// Of a kind that is written far more often than it changes: what it says, hashed.
    content: u64,
    /// The list in which it was last seen.
    round: u32,
    /// The check in which it was last seen.
    checked: u32,
    /// Whoever listens has it.
    told: bool,
    /// The version here is wrong, so that what was told is an older one, or nothing.
    wrong: bool,
}

/// Everything known of one kind. Bounded by the cluster itself.
#[derive(Debug)]
pub(super) struct Known {
    kind: Kind,
    scope: Scope,
    /// Hashed with the seed that the shell gave: names are chosen by users.
    held: HashMap<ObjectName, Held, SeedableRandomState>,
    round: u32,
    check: u32,
    faults: BTreeMap<ObjectName, Vec<String>>,
    /// Objects that are wrong and of which nothing was ever told.
    blank: usize,
    /// Of the last list and what came after it.
    newest: Option<Witness>,
    /// A list is under way.
    listing: bool,
}

impl Known {
    pub(super) fn new(kind: Kind, scope: Scope, seed: u64) -> Self {
        let hashed = SeedableRandomState::with_seed(seed, SharedSeed::global_fixed());
        Self {
            kind,
            scope,
            held: HashMap::with_hasher(hashed),
            round: 0,
            check: 0,
            faults: BTreeMap::new(),
            blank: 0,
            newest: None,
            listing: false,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.held.len()
    }

    /// Objects that are wrong and were never right: the view lacks them.
    pub(super) fn blank(&self) -> usize {
        self.blank
    }

    /// What is wrong with objects.
    pub(super) fn faults(&self) -> impl Iterator<Item = String> {
        let told = self.faults.values().take(MAX_WRONG_TOLD).flatten().cloned();
        let more = self.faults.len().saturating_sub(MAX_WRONG_TOLD);
        let more = (more > 0).then(|| format!("{:?}: {more} objects more are wrong", self.kind));
        told.chain(more)
    }

    /// The server's name of an object.
    fn name(&self, names: &mut Interner, tree: &Node<'_>) -> Option<ObjectName> {
        let name = json::text(tree, &["metadata", "name"])?;
        let namespace = json::text(tree, &["metadata", "namespace"]).unwrap_or_default();
        Some(self.named(names, namespace, name))
    }

    fn named(&self, names: &mut Interner, namespace: &str, name: &str) -> ObjectName {
        ObjectName {
            namespace: names.get(namespace),
            name: name.into(),
        }
    }

    /// A list begins: what it does not name is gone at its end.
    pub(super) fn begin_list(&mut self) {
        self.round = self.round.wrapping_add(1);
        self.newest = None;
        self.listing = true;
    }

    /// It is complete.
    pub(super) fn end_list(&mut self, deltas: &mut Vec<Delta>) {
        self.listing = false;
        let round = self.round;
        let mut gone: Vec<ObjectName> = (self.held.iter())
            .filter(|(_, held)| held.round != round)
            .map(|(name, _)| name.clone())
            .collect();
        gone.sort();
        gone.iter().for_each(|name| self.remove(name, deltas));
    }

    /// An object as the server has it now; `false`: it has no name, so it is no object.
    pub(super) fn upsert(
        &mut self,
        names: &mut Interner,
        tree: &mut Node<'_>,
        deltas: &mut Vec<Delta>,
    ) -> bool {
        let Some(name) = self.name(names, tree) else {
            return false;
        };
        let print = Print::new(
            json::text(tree, &["metadata", "uid"]).unwrap_or_default(),
            json::text(tree, &["metadata", "resourceVersion"]).unwrap_or_default(),
        );
        self.changed(&name, print, tree);
        let round = self.round;
        if let Some(held) = self.held.get_mut(&name) {
            held.round = round;
            if held.print == print {
                return true;
            }
            if held.print.uid != print.uid {
                // Another object under this name: whatever was known of the old one went with it.
                self.remove(&name, deltas);
            }
        }
        let resource = Resource::of(self.kind);
        json::set(tree, "apiVersion", resource.api_version());
        json::set(tree, "kind", resource.kind.to_owned());
        let title = format!("{} {name}", resource.kind);
        let reading = read_api(names, self.kind, &title, tree);
        let lost = reading.object.is_none() && !reading.faults.0.is_empty();
        let object = reading.object.filter(|object| self.scope.admits(object));
        let before = self.held.remove(&name);
        self.count_blank(before.as_ref(), -1);
        let (was_told, was) = before.map_or((false, 0), |held| (held.told, held.content));
        let told_now = if lost { was_told } else { object.is_some() };
        let content = object.as_ref().map_or(was, content);
        self.note(&name, &reading.faults.0, lost && was_told, lost);
        match object {
            // A heartbeat: nothing that anybody reads has changed.
            Some(_) if was_told && content != 0 && content == was => {}
            Some(object) => deltas.push(Delta::Upsert(object)),
            None if was_told && !lost => deltas.push(Delta::Remove(self.kind, name.clone())),
            None => {}
        }
        let held = Held {
            print,
            content,
            round,
            checked: self.check,
            told: told_now,
            wrong: lost,
        };
        self.count_blank(Some(&held), 1);
        self.held.insert(name, held);
        true
    }

    fn count_blank(&mut self, held: Option<&Held>, by: isize) {
        if held.is_some_and(|held| held.wrong && !held.told) {
            self.blank = self.blank.saturating_add_signed(by);
        }
    }

    fn note(&mut self, name: &ObjectName, faults: &[kun_config::Fault], kept: bool, lost: bool) {
        if faults.is_empty() {
            self.faults.remove(name);
            return;
        }
        let end = match (lost, kept) {
            (true, true) => " (its last good version stays in force)",
            (true, false) => " (it is left out)",
            (false, _) => " (the rest of it is used)",
        };
        let lines = faults.iter().take(MAX_FAULTS_TOLD);
        self.faults
            .insert(name.clone(), lines.map(|f| format!("{f}{end}")).collect());
    }

    /// An object that the server has no more.
    pub(super) fn delete(
        &mut self,
        names: &mut Interner,
        tree: &Node<'_>,
        deltas: &mut Vec<Delta>,
    ) -> bool {
        let Some(name) = self.name(names, tree) else {
            return false;
        };
        self.changed(&name, Print::default(), tree);
        self.remove(&name, deltas);
        true
    }

    fn changed(&mut self, name: &ObjectName, print: Print, tree: &Node<'_>) {
        let version = json::text(tree, &["metadata", "resourceVersion"]).and_then(number);
        let Some(at) = version else { return };
        if self.newest.as_ref().is_none_or(|newest| newest.at <= at) {
            let name = name.clone();
            let listed = self.listing;
            self.newest = Some(Witness {
                name,
                print,
                at,
                listed,
            });
        }
    }

    /// What changed last.
    pub(super) fn newest(&self) -> Option<&Witness> {
        self.newest.as_ref()
    }

    /// Of what has not changed since a version, what changed last.
    pub(super) fn newest_until(&self, version: u64) -> Option<Witness> {
        let until = self
            .held
            .iter()
            .filter(|(_, held)| held.print.version <= version);
        let (name, held) = until.max_by_key(|(_, held)| held.print.version)?;
        Some(Witness {
            name: name.clone(),
            print: held.print,
            at: held.print.version,
            listed: false,
        })
    }

    fn remove(&mut self, name: &ObjectName, deltas: &mut Vec<Delta>) {
        self.faults.remove(name);
        let Some(held) = self.held.remove(name) else {
            return;
        };
        self.count_blank(Some(&held), -1);
        if held.told {
            deltas.push(Delta::Remove(self.kind, name.clone()));
        }
    }

    /// A check begins.
    pub(super) fn begin_check(&mut self) {
        self.check = self.check.wrapping_add(1);
    }

    /// What is held of an object that the check names, if it is not what the check says.
    pub(super) fn differs(
        &mut self,
        names: &mut Interner,
        (namespace, name): (&str, &str),
        print: Print,
    ) -> Option<(ObjectName, Print)> {
        let name = self.named(names, namespace, name);
        match self.held.get_mut(&name) {
            Some(held) => {
                held.checked = self.check;
                (held.print != print).then_some((name, held.print))
            }
            None => Some((name, Print::default())),
        }
    }

    /// What is held and the check has not named.
    pub(super) fn unchecked(&self) -> impl Iterator<Item = (&ObjectName, Print)> {
        let check = self.check;
        (self.held.iter())
            .filter(move |(_, held)| held.checked != check)
            .map(|(name, held)| (name, held.print))
    }
}

/// A Node is written every few minutes by its kubelet's heartbeat and changes every few weeks. Everything but where it was read,
/// hashed; 0 for other kinds, whose every version is told (whoever replaces one needs its resourceVersion).
fn content(object: &Object) -> u64 {
    let Object::Node(node) = object else { return 0 };
    let mut node = crate::Node::clone(node);
    node.meta.origin = crate::Origin::Api {
        resource_version: "".into(),
    };
    let mut hash = HashText(FixedState::default().build_hasher());
    // Hashing cannot fail.
    let _ = write!(hash, "{node:?}");
    hash.0.finish() | 1
}

struct HashText<H>(H);

impl<H: Hasher> std::fmt::Write for HashText<H> {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        self.0.write(text.as_bytes());
        Ok(())
    }
}

/// An item of a metadata-only list.
#[derive(Debug, serde::Deserialize)]
pub(super) struct Item<'a> {
    #[serde(borrow)]
    pub(super) metadata: ItemMeta<'a>,
}

/// What a check compares.
#[derive(Debug, serde::Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ItemMeta<'a> {
    #[serde(borrow)]
    pub(super) name: Cow<'a, str>,
    #[serde(borrow, default)]
    pub(super) namespace: Cow<'a, str>,
    #[serde(borrow, default)]
    uid: Cow<'a, str>,
    #[serde(borrow, default)]
    resource_version: Cow<'a, str>,
}

impl ItemMeta<'_> {
    pub(super) fn print(&self) -> Print {
        Print::new(&self.uid, &self.resource_version)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_numbers_only_where_they_are_written_as_such() {
        for (text, expected) in [
            ("0", Some(0)),
            ("18446744073709551615", Some(u64::MAX)),
            ("18446744073709551616", None),
            ("007", None),
            ("", None),
            ("-1", None),
            ("12a", None),
            ("1e3", None),
        ] {
            assert_eq!(number(text), expected, "{text}");
        }
        // Others are told apart all the same.
        let prints = ["7", "007", "7a", "a7", ""].map(|version| Print::new("u", version));
        for (i, a) in prints.iter().enumerate() {
            assert!(prints[..i].iter().all(|b| a != b), "{i}");
        }
        let uids = [
            "00000000-0000-4000-8000-000000000001",
            "00000000-0000-4000-8000-000000000002",
            "u1",
            "u2",
            "",
        ];
        for (i, a) in uids.iter().enumerate() {
            assert!(
                uids[..i].iter().all(|b| uid_print(a) != uid_print(b)),
                "{i}"
            );
        }
    }

    fn node(version: &str, label: &str, heartbeat: &str) -> String {
        format!(
            r#"{{"metadata": {{"name": "a", "uid": "u", "resourceVersion": "{version}", "labels": {{"l": "{label}"}}}},
                "status": {{"conditions": [{{"type": "Ready", "status": "True", "lastHeartbeatTime": "{heartbeat}"}}]}}}}"#
        )
    }

    #[test]
    fn a_heartbeat_is_no_change_and_a_label_is() {
        let (mut known, mut names) = (Known::new(Kind::Node, Scope::All, 1), Interner::default());
        let mut told = |text: &str| {
            let mut deltas = Vec::new();
            let mut tree = json::object(Kind::Node, text.as_bytes()).expect("JSON");
            assert!(known.upsert(&mut names, &mut tree, &mut deltas));
            deltas.len()
        };
        assert_eq!(told(&node("1", "x", "10:00")), 1);
        assert_eq!(told(&node("2", "x", "10:05")), 0);
        assert_eq!(told(&node("3", "y", "10:05")), 1);
        assert_eq!(told(&node("4", "y", "10:10")), 0);
        assert_eq!(told(&node("5", "x", "10:10")), 1);
    }
}
