//! What an answer other than 200 means for a watch: every status has one meaning, in one table.

use super::machine::Purpose;
use crate::Resource;

/// What to do about a refused request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Meaning {
    /// The resourceVersion or the continue token is of no use any more: list anew.
    Relist,
    /// No streaming lists here: list by pages.
    NoStreams,
    /// Read the credentials anew, then ask again.
    Renew,
    /// A person has to do something; ask again meanwhile.
    Wrong,
    /// It passes by itself; worth telling when it does not.
    Later,
}

/// The meaning of a status.
pub(super) fn meaning(status: u16, purpose: Purpose) -> Meaning {
    match (status, purpose) {
        (410, _) => Meaning::Relist,
        // A server that does not know the parameters says so: 400 and 422 by validation, the others by what stands before it.
        (400 | 405 | 406 | 415 | 422 | 501, Purpose::Stream) => Meaning::NoStreams,
        // A resourceVersion that this server cannot read: another kind of server stands there now.
        (400 | 422, Purpose::Watch) => Meaning::Relist,
        (401, _) => Meaning::Renew,
        (408 | 425 | 429, _) => Meaning::Later,
        (502..=504, _) => Meaning::Later,
        _ => Meaning::Wrong,
    }
}

/// The trouble, with what would be right.
pub(super) fn trouble(
    resource: &Resource,
    purpose: Purpose,
    status: u16,
    said: &str,
    what: &str,
) -> String {
    let plural = resource.plural;
    let of_group = if resource.group.is_empty() {
        String::new()
    } else {
        format!(" of {}", resource.group)
    };
    let said = if said.is_empty() {
        "no reason given"
    } else {
        said
    };
    match status {
        401 => format!(
            "{plural}: the API server does not know us (401: {said}); the credentials are read anew each time"
        ),
        403 => format!(
            "no right to `{}` `{plural}`{of_group} {what}: {said}; grant it in the ClusterRole",
            purpose.verb()
        ),
        404 if resource.is_ours() => format!(
            "the API server has no {plural}{of_group} ({}): apply deploy/crds",
            resource.version
        ),
        404 => format!(
            "the API server has no {plural}{of_group} {}: {said}",
            resource.version
        ),
        400 if resource.is_ours() => {
            format!("{plural}: refused (400: {said}); apply deploy/crds of this version")
        }
        _ => format!(
            "{plural}: the API server answers {status} to {}: {said}",
            purpose.verb()
        ),
    }
}
