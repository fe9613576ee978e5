//! When to ask again: exponential, with full jitter, capped; and whatever the server asked for. Randomness comes in as a seed.

use std::time::Duration;

/// A source of jitter: SplitMix64. Ten thousand nodes with ten thousand seeds do not come back together.
#[derive(Debug, Clone)]
pub(super) struct Jitter(u64);

impl Jitter {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Evenly from `[from, to)`.
    pub(super) fn between(&mut self, from: Duration, to: Duration) -> Duration {
        let part = (self.next() >> 11) as f64 / (1_u64 << 53) as f64;
        from + to.saturating_sub(from).mul_f64(part)
    }
}

/// How often it has failed in a row.
#[derive(Debug, Clone, Default)]
pub(super) struct Backoff {
    failures: u32,
}

impl Backoff {
    /// All is well again.
    pub(super) fn reset(&mut self) {
        self.failures = 0;
    }

    /// Failures in a row.
    pub(super) fn failures(&self) -> u32 {
        self.failures
    }

    /// One failure more; how long to wait. `asked` is a Retry-After, which jitter is added to: whoever was refused together must not
    /// come back together.
    pub(super) fn fail(
        &mut self,
        jitter: &mut Jitter,
        (first, cap): (Duration, Duration),
        asked: Option<Duration>,
    ) -> Duration {
        let ceiling = first.saturating_mul(1 << self.failures.min(16)).min(cap);
        self.failures = self.failures.saturating_add(1);
        let wait = jitter.between(Duration::ZERO, ceiling);
        asked.map_or(wait, |asked| asked + wait)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: Duration = Duration::from_secs(1);
    const CAP: Duration = Duration::from_secs(30);

    #[test]
    fn waits_grow_to_the_cap_and_fill_it() {
        let (mut sum, mut most) = ([Duration::ZERO; 12], [Duration::ZERO; 12]);
        for seed in 0..2_000 {
            let (mut jitter, mut backoff) = (Jitter::new(seed), Backoff::default());
            for i in 0..12 {
                let wait = backoff.fail(&mut jitter, (FIRST, CAP), None);
                sum[i] += wait;
                most[i] = most[i].max(wait);
            }
        }
        for i in 0..12 {
            let ceiling = FIRST.saturating_mul(1 << i).min(CAP);
            assert!(most[i] <= ceiling, "{i}: {:?}", most[i]);
            assert!(most[i] > ceiling.mul_f64(0.98), "{i}: {:?}", most[i]);
            let mean = (sum[i] / 2_000).as_secs_f64() / ceiling.as_secs_f64();
            assert!((0.45..0.55).contains(&mean), "{i}: {mean}");
        }
    }

    #[test]
    fn what_the_server_asks_for_is_given_and_a_success_forgets() {
        let (mut jitter, mut backoff) = (Jitter::new(7), Backoff::default());
        let asked = Duration::from_secs(20);
        let wait = backoff.fail(&mut jitter, (FIRST, CAP), Some(asked));
        assert!((asked..=asked + FIRST).contains(&wait), "{wait:?}");
        for _ in 0..9 {
            backoff.fail(&mut jitter, (FIRST, CAP), None);
        }
        backoff.reset();
        assert!(backoff.fail(&mut jitter, (FIRST, CAP), None) <= FIRST);
    }
}
