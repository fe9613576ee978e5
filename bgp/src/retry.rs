//! When to try again, and by how much to spread what many nodes do at once. Pure.

use std::time::Duration;

/// First wait after a failure.
const FIRST: Duration = Duration::from_millis(250);
/// Longest wait: a ToR with 100 nodes then sees about 12 attempts a second while it refuses them all.
const LONGEST: Duration = Duration::from_secs(8);

/// Waits double from [`FIRST`] to [`LONGEST`], each shortened by up to a quarter (RFC 4271 §10 asks for 0.75 to 1).
#[derive(Debug)]
pub(crate) struct Jitter(u64);

impl Jitter {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// `whole`, shortened by up to a quarter.
    pub(crate) fn shorten(&mut self, whole: Duration) -> Duration {
        // SplitMix64: enough to keep nodes apart; nothing secret hangs on it.
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        whole - whole.mul_f64((z >> 11) as f64 / (1u64 << 53) as f64 / 4.0)
    }

    /// The wait after this many failures in a row.
    pub(crate) fn retry(&mut self, failures: u32) -> Duration {
        let whole = FIRST
            .saturating_mul(1 << failures.saturating_sub(1).min(10))
            .min(LONGEST);
        self.shorten(whole)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_to_the_longest_and_stay_within_a_quarter() {
        for seed in 0..200 {
            let mut jitter = Jitter::new(seed);
            for (failures, whole) in [
                (1, 250),
                (2, 500),
                (3, 1000),
                (5, 4000),
                (6, 8000),
                (7, 8000),
                (u32::MAX, 8000),
            ] {
                let whole = Duration::from_millis(whole);
                let wait = jitter.retry(failures);
                assert!(
                    wait <= whole && wait >= whole.mul_f64(0.75),
                    "{failures}: {wait:?}"
                );
            }
        }
    }

    #[test]
    fn two_nodes_do_not_march_in_step() {
        let (mut a, mut b) = (Jitter::new(1), Jitter::new(2));
        assert_ne!(a.retry(6), b.retry(6));
    }
}
