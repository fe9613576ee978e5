//! Words about requests and answers that lists, watches and checks share.

/// What a request of the main conversation is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// A streaming list that goes on as a watch.
    Stream,
    /// A page of a list.
    Page,
    /// A watch from a known version.
    Watch,
    /// A page of a check.
    Check,
}

impl Purpose {
    pub(super) fn verb(self) -> &'static str {
        match self {
            Self::Stream | Self::Watch => "watch",
            Self::Page | Self::Check => "list",
        }
    }
}

/// How often what has happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Requests sent.
    pub requests: u64,
    /// Lists completed.
    pub lists: u64,
    /// Versions that the server had forgotten.
    pub gone: u64,
    /// Times the server's data was older than before.
    pub went_back: u64,
    /// Streams given up for silence.
    pub silent: u64,
    /// Checks completed.
    pub checks: u64,
    /// Objects that a watch had lost or invented, put right after a check.
    pub repaired: u64,
    /// Objects too large to be read.
    pub too_large: u64,
}

/// A list without its items.
#[derive(Debug, Default)]
pub(super) struct Envelope {
    pub(super) version: String,
    pub(super) next: String,
}

impl Envelope {
    pub(super) fn read(json: &[u8]) -> Option<Self> {
        let list: serde_json::Value = serde_json::from_slice(json).ok()?;
        let meta = &list["metadata"];
        Some(Self {
            version: meta["resourceVersion"].as_str()?.to_owned(),
            next: meta["continue"].as_str().unwrap_or_default().to_owned(),
        })
    }
}

/// The message of a Status, or what stood there instead.
pub(super) fn said(text: &[u8]) -> String {
    const SHOWN: usize = 300;
    let status: serde_json::Value = serde_json::from_slice(text).unwrap_or_default();
    match status["message"].as_str() {
        Some(message) => message.chars().take(SHOWN).collect(),
        None => String::from_utf8_lossy(text)
            .trim()
            .chars()
            .take(SHOWN)
            .collect(),
    }
}
