//! Server blocks, snippets, imports and environment variables, as Caddy's parser does them (`caddyfile/parse.go`).

use std::collections::{BTreeMap, BTreeSet};

use super::Surroundings;
use super::lexer::{Token, lex};
use super::order::PLUGIN_ORDER;
use crate::Fault;

/// Imports and snippet uses in one Corefile: a cycle through files would never end. Caddy's own limit.
const MAX_EXPANSIONS: u32 = 10_000;

/// Tokens after all expansions: a bomb of nested snippets stays below 64 MiB.
const MAX_TOKENS: usize = 1_000_000;

/// Replacements in one token: a variable whose value names itself would never end.
const MAX_REPLACEMENTS: u32 = 100;

/// A server block before its directives are understood.
#[derive(Debug)]
pub(super) struct RawBlock {
    /// The keys, variables replaced.
    pub(super) keys: Vec<Token>,
    /// Directives by name; all occurrences of one name in one list, as Caddy merges them.
    pub(super) directives: BTreeMap<&'static str, Vec<Token>>,
}

struct Parser<'a> {
    surroundings: &'a dyn Surroundings,
    tokens: Vec<Token>,
    /// Index of the current token; `None` before the first.
    cursor: Option<usize>,
    snippets: BTreeMap<String, Vec<Token>>,
    expansions: u32,
    warnings: Vec<String>,
}

/// The blocks of a Corefile and warnings.
pub(super) fn parse(
    file: &str,
    text: &str,
    surroundings: &dyn Surroundings,
) -> Result<(Vec<RawBlock>, Vec<String>), Fault> {
    let mut parser = Parser {
        surroundings,
        tokens: lex(file, text),
        cursor: None,
        snippets: BTreeMap::new(),
        expansions: 0,
        warnings: Vec::new(),
    };
    let mut blocks = Vec::new();
    while parser.next() {
        blocks.extend(parser.block()?);
    }
    Ok((blocks, parser.warnings))
}

pub(super) fn fault(token: &Token, wrong: impl Into<String>, right: impl Into<String>) -> Fault {
    Fault {
        file: token.file.to_string(),
        at: Some((token.line, 1)),
        path: String::new(),
        wrong: wrong.into(),
        right: right.into(),
    }
}

impl Parser<'_> {
    fn next(&mut self) -> bool {
        let next = self.cursor.map_or(0, |c| c + 1);
        if next < self.tokens.len() {
            self.cursor = Some(next);
            true
        } else {
            false
        }
    }

    fn back(&mut self) {
        self.cursor = self.cursor.and_then(|c| c.checked_sub(1));
    }

    fn at(&self) -> usize {
        self.cursor.expect("next() returned true before")
    }

    fn token(&self) -> &Token {
        &self.tokens[self.at()]
    }

    fn is_new_line(&self) -> bool {
        let at = self.at();
        at == 0 || {
            let (a, b) = (&self.tokens[at - 1], &self.tokens[at]);
            a.file != b.file || a.last_line() < b.line
        }
    }

    fn end_of_file(&self) -> Fault {
        let last = self.tokens.last().expect("a block has begun");
        fault(last, "unexpected end of file", "close every { with a }")
    }

    fn block(&mut self) -> Result<Option<RawBlock>, Fault> {
        let (keys, ended) = self.keys()?;
        if let [key] = &keys[..]
            && !ended
            && key.text.starts_with('(')
            && key.text.ends_with(')')
        {
            self.snippet(key)?;
            return Ok(None);
        }
        if ended {
            return Ok((!keys.is_empty()).then_some(RawBlock {
                keys,
                directives: BTreeMap::new(),
            }));
        }
        let braced = self.token().text == "{";
        if !braced {
            self.back();
        }
        let mut directives = BTreeMap::new();
        let mut closed = false;
        while self.next() {
            match self.token().text.as_str() {
                "}" => {
                    closed = true;
                    break;
                }
                "import" => self.import()?,
                _ => self.directive(&mut directives)?,
            }
        }
        if braced && !closed {
            return Err(self.end_of_file());
        }
        if !braced && closed {
            return Err(fault(self.token(), "} without a matching {", "remove it"));
        }
        Ok((!keys.is_empty()).then_some(RawBlock { keys, directives }))
    }

    /// The keys of a block; true: the file ends behind them.
    fn keys(&mut self) -> Result<(Vec<Token>, bool), Fault> {
        let mut keys = Vec::new();
        let mut expecting = false;
        loop {
            let mut token = self.token().clone();
            token.text = self.replace_env(&token)?;
            if token.text == "import" && self.is_new_line() {
                self.import()?;
                if !self.next() {
                    return Ok((keys, true));
                }
                continue;
            }
            if token.text == "{" {
                if expecting {
                    return Err(fault(
                        &token,
                        "{ where another zone was expected",
                        "remove the trailing comma",
                    ));
                }
                return Ok((keys, false));
            }
            if let Some(stripped) = token.text.strip_suffix(',') {
                expecting = true;
                token.text = stripped.to_owned();
                keys.push(token);
            } else if !token.text.is_empty() {
                expecting = false;
                keys.push(token);
            }
            if !self.next() {
                return if expecting {
                    Err(self.end_of_file())
                } else {
                    Ok((keys, true))
                };
            }
            if !expecting && self.is_new_line() {
                return Ok((keys, false));
            }
        }
    }

    fn snippet(&mut self, key: &Token) -> Result<(), Fault> {
        let name = key.text[1..key.text.len() - 1].to_owned();
        if self.snippets.contains_key(&name) {
            return Err(fault(
                key,
                format!("snippet ({name}) is declared twice"),
                "give it another name",
            ));
        }
        if self.token().text != "{" {
            return Err(fault(
                self.token(),
                format!("\"{}\" behind snippet ({name})", self.token().text),
                "a snippet's body stands in { }",
            ));
        }
        let mut depth = 1;
        let mut body = Vec::new();
        while self.next() {
            match self.token().text.as_str() {
                "}" => depth -= 1,
                "{" => depth += 1,
                _ => {}
            }
            if depth == 0 {
                self.snippets.insert(name, body);
                return Ok(());
            }
            body.push(self.token().clone());
        }
        Err(self.end_of_file())
    }

    /// Puts what `import` names in its place; the cursor then stands before it.
    fn import(&mut self) -> Result<(), Fault> {
        let at = self.at();
        let directive = self.tokens[at].clone();
        let same_line = |p: &Self, i: usize| {
            p.tokens
                .get(i)
                .is_some_and(|t| t.file == directive.file && t.line == p.tokens[i - 1].last_line())
        };
        if !same_line(self, at + 1) {
            return Err(fault(
                &directive,
                "import without an argument",
                "import SNIPPET, or import FILE",
            ));
        }
        let argument = self.tokens[at + 1].clone();
        let pattern = self.replace_env(&argument)?;
        if pattern.is_empty() {
            return Err(fault(
                &directive,
                "import of an empty name",
                "import SNIPPET, or import FILE",
            ));
        }
        if same_line(self, at + 2) {
            return Err(fault(
                &self.tokens[at + 2],
                "import takes one argument",
                "one import a line",
            ));
        }
        self.expansions += 1;
        if self.expansions > MAX_EXPANSIONS {
            return Err(fault(
                &directive,
                format!("more than {MAX_EXPANSIONS} imports: they import each other"),
                "break the circle",
            ));
        }
        let imported = match self.snippets.get(&pattern) {
            Some(body) => {
                let uses: BTreeSet<&str> = body
                    .windows(2)
                    .filter(|w| w[0].text == "import")
                    .map(|w| w[1].text.as_str())
                    .collect();
                if uses.contains(pattern.as_str()) {
                    return Err(fault(
                        &directive,
                        format!("snippet ({pattern}) imports itself"),
                        "break the circle",
                    ));
                }
                body.clone()
            }
            None => self.import_files(&argument, &pattern)?,
        };
        if self.tokens.len() + imported.len() > MAX_TOKENS {
            return Err(fault(
                &directive,
                format!("more than {MAX_TOKENS} tokens after imports"),
                "import less",
            ));
        }
        self.tokens.splice(at..at + 2, imported);
        self.cursor = at.checked_sub(1);
        Ok(())
    }

    fn import_files(&mut self, at: &Token, pattern: &str) -> Result<Vec<Token>, Fault> {
        if pattern.matches('*').count() > 1
            || pattern.matches('?').count() > 1
            || (pattern.contains('[') && pattern.contains(']'))
        {
            return Err(fault(
                at,
                format!("\"{pattern}\" has several wildcards"),
                "at most one *",
            ));
        }
        let files = self.surroundings.import(&at.file, pattern).map_err(|why| {
            fault(
                at,
                format!("cannot import \"{pattern}\": {why}"),
                "a readable file",
            )
        })?;
        if files.is_empty() {
            if !pattern.contains('*') {
                return Err(fault(
                    at,
                    format!("\"{pattern}\" is neither a snippet declared above nor a file"),
                    "declare the snippet before its use, or name a file",
                ));
            }
            self.warnings.push(format!(
                "{}:{}: no file matches \"{pattern}\"",
                at.file, at.line
            ));
        }
        Ok(files
            .iter()
            .flat_map(|(name, text)| lex(name, text))
            .collect())
    }

    fn directive(
        &mut self,
        directives: &mut BTreeMap<&'static str, Vec<Token>>,
    ) -> Result<(), Fault> {
        let first = self.token().clone();
        let name = self.replace_env(&first)?;
        let Some(name) = PLUGIN_ORDER.iter().find(|p| **p == name).copied() else {
            return Err(fault(
                &first,
                format!("unknown plugin \"{name}\""),
                nearest(&name),
            ));
        };
        let mut out = vec![Token {
            text: name.to_owned(),
            ..first
        }];
        let mut depth = 0;
        while self.next() {
            let text = self.token().text.as_str();
            if text == "{" {
                depth += 1;
            } else if self.is_new_line() && depth == 0 {
                self.back();
                break;
            } else if text == "}" && depth > 0 {
                depth -= 1;
            } else if text == "}" {
                return Err(fault(
                    self.token(),
                    "} without a matching {",
                    "put it on a line of its own",
                ));
            } else if text == "import" && self.is_new_line() {
                self.import()?;
                continue;
            }
            let mut token = self.token().clone();
            token.text = self.replace_env(&token)?;
            out.push(token);
        }
        if depth > 0 {
            return Err(self.end_of_file());
        }
        directives.entry(name).or_default().extend(out);
        Ok(())
    }

    /// `{%VAR%}`, then `{$VAR}`, anywhere in the token, any number of times; malformed ones stay as they are.
    fn replace_env(&self, token: &Token) -> Result<String, Fault> {
        let mut text = token.text.clone();
        let mut left = MAX_REPLACEMENTS;
        for (open, close) in [("{%", "%}"), ("{$", "}")] {
            while let Some(start) = text.find(open) {
                let Some(end) = text[start..].find(close).map(|e| e + start) else {
                    break;
                };
                if end <= start + open.len() {
                    break;
                }
                if left == 0 {
                    return Err(fault(
                        token,
                        format!("more than {MAX_REPLACEMENTS} variables in one word"),
                        "a variable's value must not name itself",
                    ));
                }
                left -= 1;
                let reference = text[start..end + close.len()].to_owned();
                let value = self
                    .surroundings
                    .env(&reference[open.len()..reference.len() - close.len()])
                    .unwrap_or_default();
                text = text.replace(&reference, &value);
                if text.len() > 1 << 16 {
                    return Err(fault(
                        token,
                        "a word longer than 64 KiB after its variables",
                        "shorter values",
                    ));
                }
            }
        }
        Ok(text)
    }
}

fn nearest(name: &str) -> String {
    let close = PLUGIN_ORDER
        .iter()
        .filter(|p| p.len().abs_diff(name.len()) <= 2)
        .min_by_key(|p| p.bytes().zip(name.bytes()).filter(|(a, b)| a != b).count());
    match close {
        Some(p) if p.bytes().zip(name.bytes()).filter(|(a, b)| a != b).count() <= 2 => {
            format!("did you mean \"{p}\"?")
        }
        _ => "a plugin of CoreDNS's plugin.cfg".to_owned(),
    }
}
