//! The error result (CNI §5 Error): every code in one place.

use serde_json::{Value, json};

use super::config::ConfigError;
use super::env::EnvError;
use super::result::ResultError;
use super::version::{UnsupportedVersion, Version};

/// Codes up to 99 are the specification's; from 100 on they are ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u32)]
pub enum Code {
    /// 1
    IncompatibleVersion = 1,
    /// 2
    UnsupportedField = 2,
    /// 3: nothing is known of this container.
    UnknownContainer = 3,
    /// 4
    InvalidEnvironment = 4,
    /// 5
    Io = 5,
    /// 6
    Decode = 6,
    /// 7
    InvalidConfig = 7,
    /// 8: as libcni uses it.
    InvalidNamespace = 8,
    /// 11: the same call may succeed later.
    TryAgainLater = 11,
    /// 50: STATUS: ADD cannot be served.
    NotAvailable = 50,
    /// 51: STATUS: ADD cannot be served, and pods may have limited connectivity.
    LimitedConnectivity = 51,
    /// 100: the kernel refused.
    Kernel = 100,
    /// 101: CHECK found the attachment changed.
    NotAsExpected = 101,
    /// 102: the store is damaged: a person must look.
    StoreDamaged = 102,
}

impl Code {
    /// The short message.
    fn message(self) -> &'static str {
        match self {
            Code::IncompatibleVersion => "incompatible CNI version",
            Code::UnsupportedField => "unsupported field in network configuration",
            Code::UnknownContainer => "unknown container",
            Code::InvalidEnvironment => "invalid environment",
            Code::Io => "I/O failure",
            Code::Decode => "cannot decode",
            Code::InvalidConfig => "invalid network configuration",
            Code::InvalidNamespace => "invalid network namespace",
            Code::TryAgainLater => "try again later",
            Code::NotAvailable => "not available",
            Code::LimitedConnectivity => "not available, limited connectivity",
            Code::Kernel => "the kernel refused",
            Code::NotAsExpected => "the attachment is not as expected",
            Code::StoreDamaged => "the address store is damaged",
        }
    }
}

/// An error result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// The code.
    pub code: Code,
    /// What was wrong and what would be right.
    pub details: String,
}

impl Failure {
    /// Of a code and what there is to say.
    pub fn new(code: Code, details: impl ToString) -> Self {
        Self {
            code,
            details: details.to_string(),
        }
    }

    /// Adds what went wrong while cleaning up after it.
    pub fn also(mut self, more: &[String]) -> Self {
        for more in more {
            self.details.push_str("; then ");
            self.details.push_str(more);
        }
        self
    }

    /// As it goes to stdout.
    pub fn to_json(&self, version: Version) -> Value {
        json!({
            "cniVersion": version.as_str(),
            "code": self.code as u32,
            "msg": self.code.message(),
            "details": self.details,
        })
    }
}

impl From<EnvError> for Failure {
    fn from(e: EnvError) -> Self {
        Failure::new(Code::InvalidEnvironment, e)
    }
}

impl From<UnsupportedVersion> for Failure {
    fn from(e: UnsupportedVersion) -> Self {
        Failure::new(Code::IncompatibleVersion, e)
    }
}

impl From<ConfigError> for Failure {
    fn from(e: ConfigError) -> Self {
        let code = match &e {
            ConfigError::Version(_) => Code::IncompatibleVersion,
            ConfigError::NotJson(_) | ConfigError::TooLong => Code::Decode,
            ConfigError::Unsupported { .. } => Code::UnsupportedField,
            ConfigError::VerbNeeds { .. } => Code::IncompatibleVersion,
            ConfigError::Field { .. } => Code::InvalidConfig,
        };
        Failure::new(code, e)
    }
}

impl From<ResultError> for Failure {
    fn from(e: ResultError) -> Self {
        Failure::new(Code::Decode, e)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shape_of_section_5() {
        let failure = Failure::from(EnvError::NoCommand).also(&["x".into()]);
        let json = failure.to_json(Version::V1_0_0);
        assert_eq!(json["cniVersion"], "1.0.0");
        assert_eq!(json["code"], 4);
        assert!(json["msg"].as_str().is_some_and(|m| !m.is_empty()));
        assert!(
            json["details"]
                .as_str()
                .is_some_and(|d| d.ends_with("; then x"))
        );
    }
}
