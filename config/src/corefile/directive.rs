//! One occurrence of a directive: its arguments and the lines of its block, read with faults that name the line.

use std::time::Duration;

use super::address;
use super::blocks::fault;
use super::lexer::Token;
use crate::Fault;
use crate::types::DnsName;

/// A directive.
#[derive(Debug, Clone)]
pub(super) struct Directive {
    /// Its name.
    pub(super) name: Token,
    /// What stands behind it on its line.
    pub(super) args: Vec<Token>,
    /// The lines of its block.
    pub(super) options: Vec<OptionLine>,
}

/// A line inside a directive's block.
#[derive(Debug, Clone)]
pub(super) struct OptionLine {
    /// First word.
    pub(super) name: Token,
    /// The others.
    pub(super) args: Vec<Token>,
}

/// Takes the merged tokens of one directive name apart. Nested blocks, which no plugin served here has, are refused.
pub(super) fn split(tokens: &[Token]) -> Result<Vec<Directive>, Fault> {
    let mut out: Vec<Directive> = Vec::new();
    let mut depth = 0;
    for (i, token) in tokens.iter().enumerate() {
        let new_line =
            i == 0 || tokens[i - 1].file != token.file || tokens[i - 1].last_line() < token.line;
        match token.text.as_str() {
            "{" if depth == 0 && !out.is_empty() => depth = 1,
            "{" => return Err(fault(token, "a block inside a block", "one level of { }")),
            "}" if depth == 1 => depth = 0,
            _ if depth == 0 && new_line => out.push(Directive {
                name: token.clone(),
                args: Vec::new(),
                options: Vec::new(),
            }),
            _ => {
                let directive = out.last_mut().expect("the first token is on a new line");
                if depth == 0 {
                    directive.args.push(token.clone());
                } else if new_line || directive.options.is_empty() || tokens[i - 1].text == "{" {
                    directive.options.push(OptionLine {
                        name: token.clone(),
                        args: Vec::new(),
                    });
                } else {
                    let option = directive.options.last_mut().expect("not empty");
                    option.args.push(token.clone());
                }
            }
        }
    }
    Ok(out)
}

impl Directive {
    /// A fault at this directive.
    pub(super) fn fault(&self, wrong: impl Into<String>, right: impl Into<String>) -> Fault {
        let mut f = fault(&self.name, wrong, right);
        f.path.clone_from(&self.name.text);
        f
    }

    /// Refuses arguments beyond `max`.
    pub(super) fn at_most(&self, max: usize) -> Result<(), Fault> {
        match self.args.get(max) {
            Some(extra) => Err(self.fault(
                format!("unexpected argument \"{}\"", extra.text),
                format!("at most {max} arguments"),
            )),
            None => Ok(()),
        }
    }

    /// Refuses a block.
    pub(super) fn no_options(&self) -> Result<(), Fault> {
        match self.options.first() {
            Some(option) => Err(self.unknown(option)),
            None => Ok(()),
        }
    }

    /// The fault of an option that nobody knows.
    pub(super) fn unknown(&self, option: &OptionLine) -> Fault {
        self.at(
            option,
            "unknown option",
            "an option that CoreDNS documents for this plugin",
        )
    }

    /// The fault of an option that CoreDNS knows and kun does not serve.
    pub(super) fn unsupported(&self, option: &OptionLine, why: &str) -> Fault {
        self.at(option, "known CoreDNS option, not supported yet", why)
    }

    /// A fault at an option.
    pub(super) fn at(
        &self,
        option: &OptionLine,
        wrong: impl Into<String>,
        right: impl Into<String>,
    ) -> Fault {
        let mut f = fault(&option.name, wrong, right);
        f.path = format!("{}.{}", self.name.text, option.name.text);
        f
    }

    /// Zone arguments from `args[from..]`, or `default` where there are none.
    pub(super) fn zones(&self, from: usize, default: &[DnsName]) -> Result<Vec<DnsName>, Fault> {
        zones(&self.args[from.min(self.args.len())..], default)
            .map_err(|wrong| self.fault(wrong, "a zone or a network"))
    }

    /// Zone arguments of an option, or `default`.
    pub(super) fn option_zones(
        &self,
        option: &OptionLine,
        default: &[DnsName],
    ) -> Result<Vec<DnsName>, Fault> {
        zones(&option.args, default).map_err(|wrong| self.at(option, wrong, "a zone or a network"))
    }

    /// An option without arguments.
    pub(super) fn flag(&self, option: &OptionLine) -> Result<bool, Fault> {
        match option.args.first() {
            Some(extra) => Err(self.at(
                option,
                format!("unexpected argument \"{}\"", extra.text),
                "no argument",
            )),
            None => Ok(true),
        }
    }

    /// An option's only argument.
    pub(super) fn one<'a>(&self, option: &'a OptionLine, right: &str) -> Result<&'a str, Fault> {
        match &option.args[..] {
            [one] => Ok(&one.text),
            _ => Err(self.at(option, format!("{} arguments", option.args.len()), right)),
        }
    }

    /// An option's only argument as a number within bounds.
    pub(super) fn number(&self, option: &OptionLine, min: u64, max: u64) -> Result<u64, Fault> {
        let right = format!("a number from {min} to {max}");
        let text = self.one(option, &right)?;
        text.parse()
            .ok()
            .filter(|n| (min..=max).contains(n))
            .ok_or_else(|| self.at(option, format!("\"{text}\""), right))
    }

    /// An option's only argument as a duration.
    pub(super) fn duration(&self, option: &OptionLine) -> Result<Duration, Fault> {
        let text = self.one(option, "a duration like 5s")?;
        duration(text).ok_or_else(|| {
            self.at(
                option,
                format!("\"{text}\" is not a duration"),
                "a duration like 5s",
            )
        })
    }
}

fn zones(args: &[Token], default: &[DnsName]) -> Result<Vec<DnsName>, String> {
    if args.is_empty() {
        return Ok(default.to_vec());
    }
    let mut out = Vec::new();
    for arg in args {
        out.extend(address::zones(&arg.text)?);
    }
    Ok(out)
}

/// Go's `time.ParseDuration` for what is not negative: `1h30m`, `1.5s`, `300ms`, `0`.
pub(super) fn duration(text: &str) -> Option<Duration> {
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let mut rest = text;
    let mut total = 0f64;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let value: f64 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let unit_end = rest
            .find(|c: char| c.is_ascii_digit() || c == '.')
            .unwrap_or(rest.len());
        let unit = match &rest[..unit_end] {
            "ns" => 1e-9,
            "us" | "µs" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return None,
        };
        total += value * unit;
        rest = &rest[unit_end..];
    }
    // Ten years: far past any use, and well inside what Instant arithmetic bears.
    (!text.is_empty() && total <= 315_360_000.0).then(|| Duration::from_secs_f64(total))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        for (text, want) in [
            ("0", Some(0)),
            ("5s", Some(5_000)),
            ("1h30m", Some(5_400_000)),
            ("1.5s", Some(1_500)),
            ("300ms", Some(300)),
            ("5", None),
            ("", None),
            ("s", None),
            ("-1s", None),
            ("1d", None),
            ("9999999999h", None),
        ] {
            assert_eq!(duration(text), want.map(Duration::from_millis), "{text:?}");
        }
    }
}
