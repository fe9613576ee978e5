//! What the probes found, as a table for people and as JSON.

use comfy_table::{CellAlignment, Table, presets::UTF8_BORDERS_ONLY};
use serde::Serialize;

/// One line of the table: a number of probes of one kind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Line {
    /// What must hold.
    pub what: String,
    /// IPv4, IPv6, or neither.
    pub family: String,
    /// Probes that held.
    pub held: u32,
    /// Probes made.
    pub made: u32,
    /// The first that failed, or what was seen.
    pub detail: String,
}

impl Line {
    /// A line that holds no probe yet.
    pub fn new(what: impl Into<String>, family: &str) -> Self {
        Self {
            what: what.into(),
            family: family.to_owned(),
            held: 0,
            made: 0,
            detail: String::new(),
        }
    }

    /// Counts a probe: what was seen, or why it failed.
    pub fn count(&mut self, probe: Result<String, String>) {
        self.made += 1;
        match probe {
            Ok(seen) => {
                if self.held + 1 == self.made && self.detail.is_empty() {
                    self.detail = seen;
                }
                self.held += 1;
            }
            Err(why) => {
                if self.held + 1 == self.made {
                    self.detail = why;
                }
            }
        }
    }

    /// Whether every probe of it held, and there was one.
    pub fn holds(&self) -> bool {
        self.made > 0 && self.held == self.made
    }
}

/// All lines.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// In the order in which they were probed.
    pub lines: Vec<Line>,
}

impl Report {
    /// Whether all hold.
    pub fn holds(&self) -> bool {
        !self.lines.is_empty() && self.lines.iter().all(Line::holds)
    }

    /// For people.
    pub fn table(&self) -> String {
        let mut table = Table::new();
        table.load_style(UTF8_BORDERS_ONLY);
        table.set_header(["", "what", "family", "probes", "seen"]);
        for line in &self.lines {
            let mark = if line.holds() { "✔" } else { "✘" };
            table.add_row([
                mark,
                &line.what,
                &line.family,
                &format!("{}/{}", line.held, line.made),
                &line.detail,
            ]);
        }
        if let Some(column) = table.column_mut(3) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        table.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_holds_only_when_all_of_it_does() {
        let mut line = Line::new("x", "IPv6");
        assert!(!line.holds(), "nothing probed is nothing shown");
        line.count(Ok("one".into()));
        assert!(line.holds());
        line.count(Err("two failed".into()));
        line.count(Ok("three".into()));
        assert!(!line.holds());
        assert_eq!(
            (line.held, line.made, line.detail.as_str()),
            (2, 3, "two failed")
        );
        assert!(!Report::default().holds());
    }
}
