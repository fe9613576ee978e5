//! Text to documents. Refuses what a configuration never needs and what attackers do: merge keys, foreign tags, keys that are not
//! scalars, deep nesting, and aliases that multiply.

use std::borrow::Cow;
use std::collections::HashMap;

use granit_parser::{Event, Marker, Parser, ScalarStyle, Tag};

use crate::Fault;

/// Nesting that no Kubernetes object reaches (CRD schemas are the deepest at about 30).
const MAX_DEPTH: usize = 64;

/// Nodes that aliases may add to a stream: a generous real use is thousands, a "billion laughs" is not.
const MAX_ALIASED: usize = 100_000;

/// A place in a file, both 1-based.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark {
    /// Line.
    pub line: u32,
    /// Column, in characters.
    pub column: u32,
}

impl From<&Marker> for Mark {
    fn from(m: &Marker) -> Self {
        Self {
            line: m.line() as u32,
            column: m.col() as u32 + 1,
        }
    }
}

/// A value and its place.
#[derive(Debug, Clone)]
pub struct Node<'a> {
    /// Where it begins.
    pub at: Mark,
    /// What it is.
    pub value: Value<'a>,
}

/// A value.
#[derive(Debug, Clone)]
pub enum Value<'a> {
    /// Nothing, `~` or `null`.
    Null,
    /// Text, a number, a boolean: the field that reads it decides.
    Scalar {
        /// Without quotes and escapes.
        text: Cow<'a, str>,
        /// Written without quotes.
        plain: bool,
    },
    /// A list.
    Sequence(Vec<Node<'a>>),
    /// A mapping, in the order of the file; keys are unique.
    Mapping(Vec<Entry<'a>>),
}

/// One key of a mapping.
#[derive(Debug, Clone)]
pub struct Entry<'a> {
    /// The key.
    pub key: Cow<'a, str>,
    /// Where the key begins.
    pub at: Mark,
    /// Its value.
    pub node: Node<'a>,
}

impl Node<'_> {
    fn size(&self) -> usize {
        1 + match &self.value {
            Value::Null | Value::Scalar { .. } => 0,
            Value::Sequence(items) => items.iter().map(Node::size).sum(),
            Value::Mapping(entries) => entries.iter().map(|e| e.node.size()).sum(),
        }
    }

    /// What it is, for a person.
    pub fn noun(&self) -> &'static str {
        match self.value {
            Value::Null => "nothing",
            Value::Scalar { .. } => "a single value",
            Value::Sequence(_) => "a list",
            Value::Mapping(_) => "a mapping",
        }
    }
}

/// A collection that is still open.
enum Open<'a> {
    Sequence {
        at: Mark,
        anchor: usize,
        items: Vec<Node<'a>>,
    },
    Mapping {
        at: Mark,
        anchor: usize,
        entries: Vec<Entry<'a>>,
        key: Option<(Cow<'a, str>, Mark)>,
    },
}

struct Builder<'a, 'f> {
    file: &'f str,
    open: Vec<Open<'a>>,
    anchors: HashMap<usize, Node<'a>>,
    aliased: usize,
    documents: Vec<Node<'a>>,
}

/// All documents of a stream, empty ones left out. Fails as a whole: half a file is no file.
pub fn documents<'a>(file: &str, text: &'a str) -> Result<Vec<Node<'a>>, Fault> {
    let mut builder = Builder {
        file,
        open: Vec::new(),
        anchors: HashMap::new(),
        aliased: 0,
        documents: Vec::new(),
    };
    for event in Parser::new_from_str(text) {
        let (event, span) = event.map_err(|e| {
            let (line, column) = (e.marker().line() as u32, e.marker().col() as u32 + 1);
            builder.fault(
                Mark { line, column },
                format!("not YAML: {}", e.info()),
                String::new(),
            )
        })?;
        builder.event(event, Mark::from(&span.start))?;
    }
    Ok(builder.documents)
}

impl<'a> Builder<'a, '_> {
    fn fault(&self, at: Mark, wrong: String, right: String) -> Fault {
        Fault {
            file: self.file.to_owned(),
            at: Some((at.line, at.column)),
            path: self.path(),
            wrong,
            right,
        }
    }

    fn path(&self) -> String {
        let mut path = String::new();
        for open in &self.open {
            match open {
                Open::Sequence { items, .. } => path.push_str(&format!("[{}]", items.len())),
                Open::Mapping {
                    key: Some((key, _)),
                    ..
                } => {
                    if !path.is_empty() {
                        path.push('.');
                    }
                    path.push_str(key);
                }
                Open::Mapping { key: None, .. } => {}
            }
        }
        path
    }

    fn event(&mut self, event: Event<'a>, at: Mark) -> Result<(), Fault> {
        match event {
            Event::Scalar(text, style, anchor, tag) => {
                let plain =
                    style == ScalarStyle::Plain && !self.is_string_tag(tag.as_deref(), at)?;
                let null = plain && matches!(&*text, "" | "~" | "null" | "Null" | "NULL");
                let value = if null {
                    Value::Null
                } else {
                    Value::Scalar { text, plain }
                };
                self.close(Node { at, value }, anchor)
            }
            Event::SequenceStart(_, anchor, tag) => {
                self.is_string_tag(tag.as_deref(), at)?;
                self.deeper(at)?;
                let items = Vec::new();
                self.open.push(Open::Sequence { at, anchor, items });
                Ok(())
            }
            Event::MappingStart(_, anchor, tag) => {
                self.is_string_tag(tag.as_deref(), at)?;
                self.deeper(at)?;
                self.open.push(Open::Mapping {
                    at,
                    anchor,
                    entries: Vec::new(),
                    key: None,
                });
                Ok(())
            }
            Event::SequenceEnd | Event::MappingEnd => match self.open.pop() {
                Some(Open::Sequence { at, anchor, items }) => {
                    let value = Value::Sequence(items);
                    self.close(Node { at, value }, anchor)
                }
                Some(Open::Mapping {
                    at,
                    anchor,
                    entries,
                    ..
                }) => {
                    let value = Value::Mapping(entries);
                    self.close(Node { at, value }, anchor)
                }
                None => Ok(()),
            },
            Event::Alias(id) => {
                let Some(node) = self.anchors.get(&id).cloned() else {
                    let right = "an alias stands after the whole of its anchor".to_owned();
                    return Err(self.fault(at, "an alias inside its own anchor".to_owned(), right));
                };
                self.aliased += node.size();
                if self.aliased > MAX_ALIASED {
                    let wrong = format!("aliases add more than {MAX_ALIASED} values");
                    return Err(self.fault(at, wrong, "write the values out".to_owned()));
                }
                self.close(Node { at, ..node }, 0)
            }
            Event::DocumentEnd => {
                self.anchors.clear();
                Ok(())
            }
            // Stream and document starts; comments, which carry no data.
            _ => Ok(()),
        }
    }

    /// `!!str` makes `5` a string; the other core tags say what the field knows anyway.
    fn is_string_tag(&self, tag: Option<&Tag>, at: Mark) -> Result<bool, Fault> {
        let Some(tag) = tag else { return Ok(false) };
        if tag.is_custom() {
            let wrong = format!("the tag {} means nothing here", tag.original());
            return Err(self.fault(at, wrong, "remove it".to_owned()));
        }
        Ok(tag.is_yaml_core_schema_tag("str"))
    }

    fn deeper(&self, at: Mark) -> Result<(), Fault> {
        if self.open.len() >= MAX_DEPTH {
            let wrong = format!("nested deeper than {MAX_DEPTH} levels");
            return Err(self.fault(at, wrong, String::new()));
        }
        Ok(())
    }

    /// A complete node goes where it belongs.
    fn close(&mut self, node: Node<'a>, anchor: usize) -> Result<(), Fault> {
        if anchor != 0 {
            self.anchors.insert(anchor, node.clone());
        }
        match self.open.last_mut() {
            None => {
                if !matches!(node.value, Value::Null) {
                    self.documents.push(node);
                }
                return Ok(());
            }
            Some(Open::Sequence { items, .. }) => {
                items.push(node);
                return Ok(());
            }
            Some(Open::Mapping { entries, key, .. }) => {
                if let Some((key, at)) = key.take() {
                    entries.push(Entry { key, at, node });
                    return Ok(());
                }
                let name = match node.value {
                    Value::Scalar { text, .. } => text,
                    Value::Null => Cow::Borrowed("null"),
                    Value::Sequence(_) | Value::Mapping(_) => {
                        let noun = node.noun();
                        let wrong = format!("a key that is {noun}");
                        return Err(self.fault(node.at, wrong, "keys are names".to_owned()));
                    }
                };
                let earlier = entries.iter().find(|e| e.key == name).map(|e| e.at.line);
                *key = Some((name.clone(), node.at));
                if let Some(line) = earlier {
                    let wrong = format!("given twice, first on line {line}");
                    return Err(self.fault(node.at, wrong, "keep one of them".to_owned()));
                }
                if name == "<<" {
                    let wrong = "merge keys are not read".to_owned();
                    return Err(self.fault(node.at, wrong, "write the fields out".to_owned()));
                }
            }
        }
        Ok(())
    }
}
