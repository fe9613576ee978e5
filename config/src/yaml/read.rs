//! Walking a tree: each read either gives a value or notes a fault with its place and path, and the walk goes on.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fmt::Display;

use super::tree::{Entry, Mark, Node, Value};
use crate::{Fault, Faults};

/// Past this many faults a file is of the wrong kind altogether, and more lines help nobody.
const MAX_FAULTS: usize = 100;

/// Gathers what a walk finds in one file.
#[derive(Debug)]
pub struct Sink<'f> {
    file: &'f str,
    faults: RefCell<Vec<Fault>>,
    warnings: RefCell<Vec<Fault>>,
    known: RefCell<BTreeSet<String>>,
    track: bool,
}

impl<'f> Sink<'f> {
    /// For `file`, named as the person gave it.
    pub fn new(file: &'f str) -> Self {
        Self {
            file,
            faults: RefCell::default(),
            warnings: RefCell::default(),
            known: RefCell::default(),
            track: false,
        }
    }

    /// Also remembers the path of every field that was asked for: what the reference must document.
    pub fn tracking(file: &'f str) -> Self {
        Self {
            track: true,
            ..Self::new(file)
        }
    }

    /// Notes a fault.
    pub fn fault(&self, at: Option<Mark>, path: String, wrong: impl Display, right: impl Display) {
        push(&self.faults, self.make(at, path, wrong, right));
    }

    /// Notes something legal that is surely not meant.
    pub fn warn(&self, at: Option<Mark>, path: String, wrong: impl Display, right: impl Display) {
        push(&self.warnings, self.make(at, path, wrong, right));
    }

    fn make(
        &self,
        at: Option<Mark>,
        path: String,
        wrong: impl Display,
        right: impl Display,
    ) -> Fault {
        Fault {
            file: self.file.to_owned(),
            at: at.map(|m| (m.line, m.column)),
            path,
            wrong: wrong.to_string(),
            right: right.to_string(),
        }
    }

    /// Paths of the fields that were asked for, list indices written `[]`.
    pub fn known(&self) -> BTreeSet<String> {
        self.known.borrow().clone()
    }

    /// Faults and warnings, each in the order of the file.
    pub fn into_parts(self) -> (Faults, Faults) {
        let (mut faults, mut warnings) = (self.faults.into_inner(), self.warnings.into_inner());
        faults.sort_by_key(|f| f.at);
        warnings.sort_by_key(|f| f.at);
        (Faults(faults), Faults(warnings))
    }
}

fn push(list: &RefCell<Vec<Fault>>, fault: Fault) {
    let mut list = list.borrow_mut();
    if list.len() < MAX_FAULTS {
        list.push(fault);
    }
}

#[derive(Debug, Clone, Copy)]
enum Step<'p> {
    Root,
    Key(&'p str),
    Index(usize),
}

/// A node and the way to it.
#[derive(Debug, Clone, Copy)]
pub struct Cursor<'p, 'a> {
    node: &'p Node<'a>,
    step: Step<'p>,
    parent: Option<&'p Cursor<'p, 'a>>,
    sink: &'p Sink<'p>,
}

impl<'p, 'a> Cursor<'p, 'a> {
    /// At a document's root.
    pub fn root(node: &'p Node<'a>, sink: &'p Sink<'p>) -> Self {
        Self {
            node,
            step: Step::Root,
            parent: None,
            sink,
        }
    }

    /// Where findings go.
    pub fn sink(&self) -> &'p Sink<'p> {
        self.sink
    }

    /// The same place, with findings going elsewhere.
    pub fn with_sink<'q>(self, sink: &'q Sink<'q>) -> Cursor<'q, 'a>
    where
        'p: 'q,
    {
        Cursor { sink, ..self }
    }

    /// What stands here.
    pub fn value(&self) -> &'p Value<'a> {
        &self.node.value
    }

    /// Whether it is a scalar without quotes.
    pub fn is_plain(&self) -> bool {
        matches!(self.node.value, Value::Scalar { plain: true, .. })
    }

    /// Where this is.
    pub fn at(&self) -> Mark {
        self.node.at
    }

    /// `nat64.gateway.pool[0]`.
    pub fn path(&self) -> String {
        let mut path = self.parent.map(Cursor::path).unwrap_or_default();
        match self.step {
            Step::Root => {}
            Step::Key(key) => {
                if !path.is_empty() {
                    path.push('.');
                }
                path.push_str(key);
            }
            Step::Index(i) => path.push_str(&format!("[{i}]")),
        }
        path
    }

    /// Notes a fault here.
    pub fn fault(&self, wrong: impl Display, right: impl Display) {
        self.sink.fault(Some(self.at()), self.path(), wrong, right);
    }

    /// Notes a warning here.
    pub fn warn(&self, wrong: impl Display, right: impl Display) {
        self.sink.warn(Some(self.at()), self.path(), wrong, right);
    }

    /// The text of a scalar.
    pub fn text(&self) -> Option<&'p str> {
        match &self.node.value {
            Value::Scalar { text, .. } => Some(text),
            Value::Null | Value::Sequence(_) | Value::Mapping(_) => {
                self.fault(
                    format_args!("{} where a single value belongs", self.node.noun()),
                    "",
                );
                None
            }
        }
    }

    /// A scalar that `parse` understands; else "`text` is not `noun`; `right`".
    pub fn scalar<T>(
        &self,
        noun: &str,
        right: impl Display,
        parse: impl FnOnce(&str) -> Option<T>,
    ) -> Option<T> {
        let text = self.text()?;
        let value = parse(text);
        if value.is_none() {
            self.fault(format_args!("`{}` is not {noun}", shortened(text)), right);
        }
        value
    }

    /// `true` or `false`.
    pub fn boolean(&self) -> Option<bool> {
        self.scalar("true or false", "write true or false", |text| match text {
            "true" | "True" | "TRUE" => Some(true),
            "false" | "False" | "FALSE" => Some(false),
            _ => None,
        })
    }

    /// The elements of a list.
    pub fn elements(&self) -> impl Iterator<Item = Cursor<'_, 'a>> {
        let items: &[Node<'a>] = match &self.node.value {
            Value::Sequence(items) => items,
            Value::Null | Value::Scalar { .. } | Value::Mapping(_) => {
                self.fault(
                    format_args!("{} where a list belongs", self.node.noun()),
                    "write `- …` lines or [a, b]",
                );
                &[]
            }
        };
        items.iter().enumerate().map(move |(i, node)| Cursor {
            node,
            step: Step::Index(i),
            parent: Some(self),
            sink: self.sink,
        })
    }

    /// The entries of a mapping whose keys are data, such as labels.
    pub fn pairs(&self) -> impl Iterator<Item = (&'p str, Cursor<'_, 'a>)> {
        let entries = self.mapping();
        entries.iter().map(move |e| (&*e.key, self.child(e)))
    }

    /// The fields of a mapping.
    pub fn fields(self) -> Fields<'p, 'a> {
        Fields {
            entries: self.mapping(),
            cursor: self,
            asked: RefCell::default(),
        }
    }

    fn mapping(&self) -> &'p [Entry<'a>] {
        match &self.node.value {
            Value::Mapping(entries) => entries,
            Value::Null | Value::Scalar { .. } | Value::Sequence(_) => {
                self.fault(
                    format_args!("{} where a mapping belongs", self.node.noun()),
                    "write `name: value` lines",
                );
                &[]
            }
        }
    }

    fn child<'q>(&'q self, entry: &'q Entry<'a>) -> Cursor<'q, 'a> {
        Cursor {
            node: &entry.node,
            step: Step::Key(&entry.key),
            parent: Some(self),
            sink: self.sink,
        }
    }
}

/// A mapping whose keys are names that the reader knows.
#[derive(Debug)]
pub struct Fields<'p, 'a> {
    cursor: Cursor<'p, 'a>,
    entries: &'p [Entry<'a>],
    asked: RefCell<Vec<&'static str>>,
}

impl<'p, 'a> Fields<'p, 'a> {
    /// The mapping itself.
    pub fn cursor(&self) -> &Cursor<'p, 'a> {
        &self.cursor
    }

    /// A field; one without a value is absent.
    pub fn get(&self, name: &'static str) -> Option<Cursor<'_, 'a>> {
        let mut asked = self.asked.borrow_mut();
        if !asked.contains(&name) {
            asked.push(name);
        }
        drop(asked);
        let entry = self.entries.iter().find(|e| e.key == name)?;
        match entry.node.value {
            Value::Null => None,
            Value::Scalar { .. } | Value::Sequence(_) | Value::Mapping(_) => {
                Some(self.cursor.child(entry))
            }
        }
    }

    /// A mapping in a field; absent, it is read as `empty`.
    pub fn section<'q>(&'q self, name: &'static str, empty: &'q Node<'a>) -> Fields<'q, 'a> {
        let cursor = self.get(name).unwrap_or(Cursor {
            node: empty,
            step: Step::Key(name),
            parent: Some(&self.cursor),
            sink: self.cursor.sink,
        });
        cursor.fields()
    }

    /// A field that must be there.
    pub fn require(&self, name: &'static str, right: impl Display) -> Option<Cursor<'_, 'a>> {
        let field = self.get(name);
        if field.is_none() {
            self.cursor
                .fault(format_args!("the field `{name}` is missing"), right);
        }
        field
    }

    /// Refuses the fields that nobody asked for; whether there are none.
    pub fn finish(self) -> bool {
        let asked = self.asked.into_inner();
        let sink = self.cursor.sink;
        let mut none = true;
        for entry in self.entries.iter().filter(|e| !asked.contains(&&*e.key)) {
            none = false;
            let path = self.cursor.child(entry).path();
            let right = match nearest(&entry.key, &asked) {
                Some(name) => format!("did you mean `{name}`?"),
                None => format!("known here: {}", asked.join(", ")),
            };
            sink.fault(Some(entry.at), path, "unknown field", right);
        }
        if sink.track {
            let path = without_indices(&self.cursor.path());
            let dot = if path.is_empty() { "" } else { "." };
            let known = asked.iter().map(|name| format!("{path}{dot}{name}"));
            sink.known.borrow_mut().extend(known);
        }
        none
    }
}

fn without_indices(path: &str) -> String {
    let mut plain = String::new();
    let mut inside = false;
    for c in path.chars() {
        match c {
            '[' => {
                inside = true;
                plain.push_str("[]");
            }
            ']' => inside = false,
            _ if !inside => plain.push(c),
            _ => {}
        }
    }
    plain
}

/// A value as it is quoted in a fault: whole when short.
fn shortened(text: &str) -> String {
    const SHOWN: usize = 60;
    if text.chars().count() <= SHOWN {
        return text.to_owned();
    }
    let start: String = text.chars().take(SHOWN).collect();
    format!("{start}…")
}

/// The known name that `given` was probably meant to be.
pub fn nearest(given: &str, known: &[&'static str]) -> Option<&'static str> {
    let given = given.to_lowercase();
    let plain = |s: &str| s.to_lowercase().replace(['-', '_'], "");
    known
        .iter()
        .map(|name| (distance(&plain(&given), &plain(name)), *name))
        .filter(|(d, name)| *d <= 2 && *d < name.len() / 2 + 1)
        .min()
        .map(|(_, name)| name)
}

/// Edit distance (insert, delete, replace), names only: both sides are short.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().take(64).collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().take(64).enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let replace = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = replace.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}
