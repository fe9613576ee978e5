//! Waiting for a condition, with a deadline and a name.

use std::time::{Duration, Instant};

/// How long a poll rests. The only sleep in the tests.
const REST: Duration = Duration::from_millis(5);

/// Polls until `poll` gives a value; past the deadline, an error that names what was awaited.
pub fn wait_for<T>(
    what: &str,
    deadline: Duration,
    mut poll: impl FnMut() -> Option<T>,
) -> anyhow::Result<T> {
    let end = Instant::now() + deadline;
    loop {
        if let Some(value) = poll() {
            return Ok(value);
        }
        if Instant::now() >= end {
            anyhow::bail!("{what}: not within {deadline:?}");
        }
        std::thread::sleep(REST);
    }
}

/// Polls until the condition holds; whether it did before the deadline.
pub fn wait_until(deadline: Duration, mut condition: impl FnMut() -> bool) -> bool {
    wait_for("", deadline, || condition().then_some(())).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_deadline_names_what_was_awaited() {
        let error = wait_for("the moon", Duration::from_millis(20), || None::<()>).unwrap_err();
        assert!(error.to_string().starts_with("the moon"));
        let mut left = 3;
        assert!(wait_until(Duration::from_secs(5), || {
            left -= 1;
            left == 0
        }));
    }
}
