//! The Corefile: Caddy's lexer and parser semantics, CoreDNS's zones and plugin order, typed plugin specifications.
//!
//! What is not understood is refused with file, line and reason: no directive and no option is ever skipped in silence. Pure:
//! imported files and environment variables come in through [`Surroundings`].

use std::fmt;
use std::net::IpAddr;

use crate::Faults;
use crate::types::DnsName;

mod address;
mod blocks;
mod describe;
mod directive;
mod lexer;
mod order;
mod serving;
mod setup;
mod spec;

pub use order::PLUGIN_ORDER;
pub use spec::*;

/// What a Corefile may refer to outside itself.
pub trait Surroundings {
    /// The value of an environment variable; `None` counts as empty, as in Caddy.
    fn env(&self, name: &str) -> Option<String>;
    /// The files that `pattern` names: absolute, or relative to the folder of `importing_file`; at most one `*`. Each as file name and
    /// text, sorted by name. An empty list: nothing matches.
    fn import(&self, importing_file: &str, pattern: &str) -> Result<Vec<(String, String)>, String>;
}

/// No environment and no files: for tests and for Corefiles that stand alone.
#[derive(Debug, Clone, Copy, Default)]
pub struct Alone;

impl Surroundings for Alone {
    fn env(&self, _: &str) -> Option<String> {
        None
    }
    fn import(&self, _: &str, _: &str) -> Result<Vec<(String, String)>, String> {
        Ok(Vec::new())
    }
}

/// A whole Corefile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Corefile {
    /// Server blocks in the order of the file.
    pub servers: Vec<ServerBlock>,
    /// What is legal but probably not meant: `file:line: what`.
    pub warnings: Vec<String>,
}

/// One server block: keys that share one chain of plugins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerBlock {
    /// What it answers for.
    pub zones: Vec<ZoneAddress>,
    /// `bind`; empty: all addresses.
    pub bind: Vec<IpAddr>,
    /// The chain, in the order in which CoreDNS would run it.
    pub plugins: Vec<Plugin>,
    /// Where the block begins: file and 1-based line.
    pub at: (String, u32),
}

/// One key of a server block.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ZoneAddress {
    /// The zone.
    pub zone: DnsName,
    /// The port, 53 where the key names none.
    pub port: u16,
}

impl fmt::Display for ZoneAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "dns://{}:{}", self.zone, self.port)
    }
}

/// Parses a Corefile.
///
/// `file_name` appears in faults and is what relative imports start from.
pub fn parse(
    file_name: &str,
    text: &str,
    surroundings: &dyn Surroundings,
) -> Result<Corefile, Faults> {
    let (raw, warnings) =
        blocks::parse(file_name, text, surroundings).map_err(|f| Faults(vec![f]))?;
    setup::corefile(raw, warnings)
}

#[cfg(test)]
mod tests;
