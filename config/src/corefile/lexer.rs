//! Tokens, exactly as Caddy's lexer cuts them (github.com/coredns/caddy, `caddyfile/lexer.go`), its quirks included.

use std::sync::Arc;

/// A token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Token {
    /// The file it came from.
    pub(super) file: Arc<str>,
    /// 1-based line of its first character.
    pub(super) line: u32,
    /// Its text without quotes.
    pub(super) text: String,
}

impl Token {
    /// The line of its last character: a quoted token may span lines.
    pub(super) fn last_line(&self) -> u32 {
        self.line + self.text.matches('\n').count() as u32
    }
}

/// Cuts `text`.
///
/// - White space separates; `\r` is ignored wherever it stands.
/// - `"` opens a quoted token at a token's start only; inside, `\"` is a quote and every other backslash stays.
/// - `#` starts a comment, even inside a token. The comment ends with the line, or, when it began inside a token, at the next
///   white space: `foo#bar baz` is `foo`, `baz`.
pub(super) fn lex(file: &str, text: &str) -> Vec<Token> {
    let file: Arc<str> = file.into();
    let mut tokens = Vec::new();
    let mut line = 1;
    let mut chars = text.strip_prefix('\u{feff}').unwrap_or(text).chars();
    loop {
        let mut value = String::new();
        let (mut comment, mut quoted, mut escaped) = (false, false, false);
        let mut start = line;
        let complete = loop {
            let Some(c) = chars.next() else {
                break !value.is_empty();
            };
            if quoted {
                if !escaped {
                    if c == '\\' {
                        escaped = true;
                        continue;
                    }
                    if c == '"' {
                        break true;
                    }
                }
                if c == '\n' {
                    line += 1;
                }
                if escaped && c != '"' {
                    value.push('\\');
                }
                value.push(c);
                escaped = false;
                continue;
            }
            if c.is_whitespace() {
                if c == '\r' {
                    continue;
                }
                if c == '\n' {
                    line += 1;
                    comment = false;
                }
                if !value.is_empty() {
                    break true;
                }
                continue;
            }
            if c == '#' {
                comment = true;
            }
            if comment {
                continue;
            }
            if value.is_empty() {
                start = line;
                if c == '"' {
                    quoted = true;
                    continue;
                }
            }
            value.push(c);
        };
        if !complete {
            return tokens;
        }
        tokens.push(Token {
            file: file.clone(),
            line: start,
            text: value,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(input: &str) -> Vec<String> {
        lex("t", input).into_iter().map(|t| t.text).collect()
    }

    #[test]
    fn tokens() {
        for (input, want) in [
            ("a b\tc", vec!["a", "b", "c"]),
            ("\u{feff}a", vec!["a"]),
            ("a\r\nb", vec!["a", "b"]),
            ("foo#bar baz", vec!["foo", "baz"]),
            ("# all of it\nb", vec!["b"]),
            ("a # rest { }\nb", vec!["a", "b"]),
            (r#""a b" c"#, vec!["a b", "c"]),
            (r#""a \" b""#, vec![r#"a " b"#]),
            (r#""a \n b""#, vec![r"a \n b"]),
            (r#"a"b c"#, vec![r#"a"b"#, "c"]),
            (r#""" x"#, vec!["", "x"]),
            ("{a}", vec!["{a}"]),
            ("a{ b", vec!["a{", "b"]),
            ("\"open", vec!["open"]),
        ] {
            assert_eq!(texts(input), want, "{input:?}");
        }
    }

    #[test]
    fn lines_are_of_the_first_character() {
        let t = lex("t", "a\n\n\"b\nc\" d\ne");
        let lines: Vec<_> = t
            .iter()
            .map(|t| (t.text.as_str(), t.line, t.last_line()))
            .collect();
        assert_eq!(
            lines,
            [("a", 1, 1), ("b\nc", 3, 4), ("d", 4, 4), ("e", 5, 5)]
        );
    }
}
