//! What this node tells the API server about itself: one thread and one client for all of it, so that no server that is slow or away
//! holds up anything else. Whoever has something to tell is a [`Teller`]; what it tells and when is its own, how often it tries is
//! decided here.
//!
//! Failures wait: from a second up to a minute, each at random within half of it, and as long as `Retry-After` asks. A teller that
//! fails holds up no other, beyond the one call that it waits for.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kun_cluster::api::ApiError;
use kun_cluster::api::write::{WriteError, Writer};
use kun_cni::clock;
use kun_cni::ipam::BootTime;

/// How often tellers are asked: what they do without news is to look at a few numbers.
const TICK: Duration = Duration::from_millis(250);

/// The first wait after a failure, doubled up to the last.
const RETRY_FIRST: Duration = Duration::from_secs(1);
const RETRY_LAST: Duration = Duration::from_secs(60);

/// A server may ask for more patience than ours; it may not silence a node.
const RETRY_AFTER_AT_MOST: Duration = Duration::from_secs(120);

/// Somebody who keeps something at the API server.
pub(crate) trait Teller: Send {
    /// What it keeps, for people.
    fn what(&self) -> &'static str;

    /// Writes what is due; nothing, as a rule. After an error it is asked again, later.
    fn turn(&mut self, writer: &Writer, now: BootTime) -> Result<(), WriteError>;
}

/// What could not be told, for status. By teller: what, and how many times in a row.
#[derive(Debug, Clone, Default)]
pub(crate) struct Failures(Arc<Mutex<BTreeMap<&'static str, String>>>);

impl Failures {
    /// Of a teller.
    pub(crate) fn of(&self, what: &str) -> Option<String> {
        let failures = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        failures.get(what).cloned()
    }

    fn set(&self, what: &'static str, error: Option<String>) {
        let mut failures = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match error {
            Some(error) => failures.insert(what, error),
            None => failures.remove(what),
        };
    }
}

/// Why nobody can tell anything.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TellError {
    /// No client.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// No thread.
    #[error("the system refuses a thread: {0}")]
    Thread(#[from] io::Error),
}

struct Seat {
    teller: Box<dyn Teller>,
    failures: u32,
    not_before: BootTime,
}

/// Asks all of them in turn, for as long as the process lives.
pub(crate) fn start(
    kubeconfig: Option<&Path>,
    tellers: Vec<Box<dyn Teller>>,
    failures: Failures,
) -> Result<(), TellError> {
    let writer = Writer::open(kubeconfig)?;
    let mut seats: Vec<Seat> = (tellers.into_iter())
        .map(|teller| Seat {
            teller,
            failures: 0,
            not_before: BootTime::default(),
        })
        .collect();
    std::thread::Builder::new()
        .name("kun-writes".to_owned())
        .spawn(move || {
            loop {
                for seat in &mut seats {
                    seat.turn(&writer, &failures);
                }
                std::thread::sleep(TICK);
            }
        })?;
    Ok(())
}

impl Seat {
    fn turn(&mut self, writer: &Writer, failures: &Failures) {
        let now = clock::now();
        if now < self.not_before {
            return;
        }
        let what = self.teller.what();
        match self.teller.turn(writer, now) {
            Ok(()) if self.failures > 0 => {
                tracing::info!("{what}: told again");
                self.failures = 0;
                failures.set(what, None);
            }
            Ok(()) => {}
            Err(error) => {
                let asked = match &error {
                    WriteError::Busy { retry_after, .. } => *retry_after,
                    _ => None,
                };
                let wait = wait(self.failures, random(), asked);
                // After the call: it may have taken its time.
                self.not_before = BootTime(clock::now().0 + wait);
                self.failures = self.failures.saturating_add(1);
                let text = error.to_string();
                if failures.of(what).as_ref() != Some(&text) {
                    tracing::warn!(again_in = ?wait, "{what}: {text}");
                }
                failures.set(what, Some(text));
            }
        }
    }
}

fn wait(failures: u32, random: f64, asked: Option<Duration>) -> Duration {
    let longest = RETRY_FIRST
        .saturating_mul(1 << failures.min(16))
        .min(RETRY_LAST);
    let own = longest.mul_f64(0.5 + random / 2.0);
    // Ten thousand nodes are asked to come back after the same time, and must not come back at the same time.
    own + asked.unwrap_or_default().min(RETRY_AFTER_AT_MOST)
}

/// From 0 to 1, from the keys that the system seeds each hasher with: enough for nodes not to act alike.
pub(crate) fn random() -> f64 {
    let bits = RandomState::new().build_hasher().finish();
    (bits >> 11) as f64 / (1_u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_wait_longer_and_never_alike() {
        let seconds = |failures, random, asked: Option<u64>| {
            wait(failures, random, asked.map(Duration::from_secs)).as_secs_f64()
        };
        assert_eq!((seconds(0, 0.0, None), seconds(0, 1.0, None)), (0.5, 1.0));
        assert_eq!((seconds(3, 0.0, None), seconds(3, 1.0, None)), (4.0, 8.0));
        assert_eq!(seconds(u32::MAX, 1.0, None), 60.0);
        assert_eq!(seconds(0, 1.0, Some(10)), 11.0);
        assert_eq!(seconds(0, 1.0, Some(100_000)), 121.0);
        let drawn: Vec<f64> = (0..100).map(|_| random()).collect();
        assert!(drawn.iter().all(|r| (0.0..=1.0).contains(r)));
        assert!(drawn.iter().any(|r| *r != drawn[0]));
    }
}
