//! Small things about HTTP answers.

use std::error::Error;
use std::time::Duration;

use http::HeaderMap;
use http_body_util::BodyExt;
use kube::client::Body;

/// `Retry-After` in seconds, as the API server writes it (RFC 9110, 10.2.3).
pub(super) fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(http::header::RETRY_AFTER)?.to_str().ok()?;
    text.trim().parse().ok().map(Duration::from_secs)
}

/// A whole body of at most `limit` bytes.
pub(super) async fn collect(mut body: Body, limit: usize) -> Result<Vec<u8>, String> {
    let mut whole = Vec::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| chain(&error))?;
        if let Some(data) = frame.data_ref() {
            if whole.len() + data.len() > limit {
                return Err(format!("an answer of more than {limit} bytes"));
            }
            whole.extend_from_slice(data);
        }
    }
    Ok(whole)
}

/// An error and what caused it, in one line: the outermost alone says "client error".
pub(super) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        // Many errors print their cause themselves.
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = error.source();
    }
    text
}
