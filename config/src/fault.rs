//! What is wrong with an input, said so that a person can mend it.

use std::fmt;

/// One fault in one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// The file's name as the person gave it.
    pub file: String,
    /// 1-based line and column, where known.
    pub at: Option<(u32, u32)>,
    /// Path inside the document (`nat64.pool[0]`), empty for the document as a whole.
    pub path: String,
    /// What was wrong.
    pub wrong: String,
    /// What would be right.
    pub right: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file)?;
        if let Some((line, column)) = self.at {
            write!(f, ":{line}:{column}")?;
        }
        if !self.path.is_empty() {
            write!(f, ": {}", self.path)?;
        }
        write!(f, ": {}", self.wrong)?;
        if !self.right.is_empty() {
            write!(f, "; {}", self.right)?;
        }
        Ok(())
    }
}

/// All faults of one input, in the order of the file.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Faults(pub Vec<Fault>);

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, fault) in self.0.iter().enumerate() {
            if i > 0 {
                writeln!(f)?;
            }
            write!(f, "{fault}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Faults {}
