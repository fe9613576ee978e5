//! Specification versions: which are spoken, and what each knows.

use std::fmt;

/// A version of the specification that kun speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Version {
    /// 0.3.0
    V0_3_0,
    /// 0.3.1
    V0_3_1,
    /// 0.4.0: CHECK.
    V0_4_0,
    /// 1.0.0: no `version` in addresses, no single-plugin files.
    V1_0_0,
    /// 1.1.0: GC, STATUS, interface `mtu`, route `mtu`, `advmss`, `priority`, `table`, `scope`.
    V1_1_0,
}

/// A version that is not spoken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{} is not supported; supported: {}", self.told(), Version::ALL.map(Version::as_str).join(", "))]
pub struct UnsupportedVersion {
    /// What was asked for; empty: nothing.
    pub asked: String,
}

impl UnsupportedVersion {
    /// Whoever wrote no version looks for the word 0.1.0 in vain.
    fn told(&self) -> String {
        match self.asked.as_str() {
            "" => "cniVersion: missing, which stands for 0.1.0, and that".to_owned(),
            asked => format!("cniVersion `{asked}`"),
        }
    }
}

impl Version {
    /// All of them, oldest first.
    pub const ALL: [Version; 5] = [
        Version::V0_3_0,
        Version::V0_3_1,
        Version::V0_4_0,
        Version::V1_0_0,
        Version::V1_1_0,
    ];

    /// The newest.
    pub const CURRENT: Version = Version::V1_1_0;

    /// As it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Version::V0_3_0 => "0.3.0",
            Version::V0_3_1 => "0.3.1",
            Version::V0_4_0 => "0.4.0",
            Version::V1_0_0 => "1.0.0",
            Version::V1_1_0 => "1.1.0",
        }
    }

    /// Of its text.
    pub fn parse(text: &str) -> Result<Self, UnsupportedVersion> {
        Self::ALL
            .into_iter()
            .find(|v| v.as_str() == text)
            .ok_or_else(|| UnsupportedVersion {
                asked: text.to_owned(),
            })
    }

    /// CHECK came with 0.4.0.
    pub fn has_check(self) -> bool {
        self >= Version::V0_4_0
    }

    /// GC and STATUS came with 1.1.0.
    pub fn has_gc_and_status(self) -> bool {
        self >= Version::V1_1_0
    }

    /// Addresses say their family (`"version": "4"`) before 1.0.0.
    pub(super) fn tells_family(self) -> bool {
        self < Version::V1_0_0
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_back() {
        for v in Version::ALL {
            assert_eq!(Version::parse(v.as_str()), Ok(v));
        }
        for asked in ["", "0.1.0", "0.2.0", "1.2.0", "1.1", " 1.1.0"] {
            assert!(Version::parse(asked).is_err(), "{asked}");
        }
    }

    #[test]
    fn verbs_by_version() {
        let table = Version::ALL.map(|v| (v.has_check(), v.has_gc_and_status()));
        assert_eq!(
            table,
            [
                (false, false),
                (false, false),
                (true, false),
                (true, false),
                (true, true)
            ]
        );
    }
}
