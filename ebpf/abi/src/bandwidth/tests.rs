//! Never more than rate and burst, never less than what conforms, and lengths as they are on a wire.

extern crate std;

use core::cell::Cell;
use std::vec::Vec;

use proptest::prelude::*;

use super::*;

/// A clock that fails its first exchanges, as if another CPU came in between with nothing to add.
struct Word {
    value: Cell<u64>,
    fail: Cell<u32>,
}

impl Word {
    fn new() -> Self {
        Word {
            value: Cell::new(0),
            fail: Cell::new(0),
        }
    }
}

impl Clock for Word {
    fn load(&self) -> u64 {
        self.value.get()
    }

    fn exchange(&self, old: u64, new: u64) -> Result<(), u64> {
        if self.fail.get() > 0 {
            self.fail.set(self.fail.get() - 1);
            return Err(self.value.get());
        }
        if self.value.get() != old {
            return Err(self.value.get());
        }
        self.value.set(new);
        Ok(())
    }
}

/// A packet: how long after the one before, and its bytes.
fn packets() -> impl Strategy<Value = Vec<(u64, u64)>> {
    let gap = prop_oneof![4 => 0_u64..200_000, 1 => 0_u64..400_000_000];
    let bytes = prop_oneof![3 => 60_u64..1515, 1 => 1515_u64..70_000];
    prop::collection::vec((gap, bytes), 1..200)
}

/// Rates of pods, from a modem's to more than any pod's interface carries.
fn rates() -> impl Strategy<Value = u64> {
    (3_u32..11, 1_u64..10).prop_map(|(zeros, digit)| digit * 10_u64.pow(zeros))
}

/// What is asked for besides: nothing, or anything up to what runtimes say without being asked.
fn bursts() -> impl Strategy<Value = Option<u64>> {
    let asked = (0_u32..10, 1_u64..10).prop_map(|(zeros, digit)| Some(digit * 10_u64.pow(zeros)));
    prop_oneof![1 => Just(None), 1 => asked]
}

/// Most bits that may leave within `nanoseconds`, a larger packet than the bucket included.
fn most(rate: u64, terms: &Terms, largest: u64, nanoseconds: u64) -> u128 {
    let held = u128::from(terms.burst.max(duration(terms.per_byte, largest)));
    // One byte for what the clock's nanoseconds round.
    u128::from(rate) * (u128::from(nanoseconds) + held) / 1_000_000_000 + 8
}

proptest! {
    /// In no window more than the rate and the burst, whether packets are dropped or wait.
    #[test]
    fn never_more_than_rate_and_burst(
        rate in rates(),
        burst in bursts(),
        paced in any::<bool>(),
        packets in packets(),
        start in 1_u64..1 << 50,
    ) {
        let terms = Terms::new(rate, burst, paced);
        let clock = Word::new();
        let mut now = start;
        let mut left: Vec<(u64, u64)> = Vec::new();
        for (gap, bytes) in packets {
            now += gap;
            match admit(&clock, &terms, bytes, now) {
                Verdict::Pass => left.push((now, bytes)),
                Verdict::At(then) => {
                    prop_assert!(paced && then > now && then - now <= HORIZON_NS);
                    left.push((then, bytes));
                }
                Verdict::Drop => {}
            }
        }
        prop_assert!(left.is_sorted_by_key(|(at, _)| *at), "the order is kept");
        let largest = left.iter().map(|(_, bytes)| *bytes).max().unwrap_or(0);
        for first in 0..left.len() {
            let mut bits = 0_u128;
            for (at, bytes) in &left[first..] {
                bits += u128::from(*bytes) * 8;
                let within = at - left[first].0;
                prop_assert!(bits <= most(rate, &terms, largest, within), "{bits} bits in {within} ns");
            }
        }
    }

    /// What an exact token bucket of the same terms lets through passes at once.
    #[test]
    fn what_conforms_is_never_dropped(
        rate in rates(),
        burst in bursts(),
        paced in any::<bool>(),
        packets in packets(),
    ) {
        let terms = Terms::new(rate, burst, paced);
        let clock = Word::new();
        let mut now = 1 << 40;
        // Of the bucket's content the oracle counts bits times 10^9, exactly, and gives away less than the program rounds up.
        let scale = 1_000_000_000_u128;
        let full = u128::from(terms.burst) * u128::from(rate);
        let mut tokens = full;
        let mut slack = 0_u128;
        for (gap, bytes) in packets {
            now += gap;
            tokens = (tokens + u128::from(gap) * u128::from(rate)).min(full);
            let cost = u128::from(bytes) * 8 * scale;
            // A nanosecond a packet, and the fraction of `per_byte`.
            slack += u128::from(rate) * 2 + (cost >> 10);
            if tokens < cost + slack {
                continue;
            }
            tokens -= cost;
            prop_assert_eq!(admit(&clock, &terms, bytes, now), Verdict::Pass);
        }
    }

    /// Whoever offers more than the rate gets the rate: nothing is lost to rounding or to refusals.
    #[test]
    fn the_rate_is_reached(rate in rates(), paced in any::<bool>(), bytes in 60_u64..1515) {
        let terms = Terms::new(rate, None, paced);
        let clock = Word::new();
        let step = (duration(terms.per_byte, bytes) / 3).max(1);
        let (start, mut now) = (1_u64 << 40, 1_u64 << 40);
        let mut passed = 0_u128;
        for _ in 0..20_000 {
            now += step;
            if admit(&clock, &terms, bytes, now) != Verdict::Drop {
                passed += u128::from(bytes) * 8;
            }
        }
        let due = u128::from(rate) * u128::from(now - start) / 1_000_000_000;
        prop_assert!(passed * 1000 >= due * 995, "{passed} of {due} bits");
    }

    #[test]
    fn another_cpu_in_between_changes_nothing(fails in 0_u32..ATTEMPTS, bytes in 60_u64..70_000) {
        let terms = Terms::new(10_000_000, None, false);
        let clock = Word::new();
        clock.fail.set(fails);
        prop_assert_eq!(admit(&clock, &terms, bytes, 1 << 40), Verdict::Pass);
        prop_assert_eq!(clock.load(), (1 << 40) + duration(terms.per_byte, bytes));
    }
}

#[test]
fn a_packet_larger_than_the_bucket_passes_a_full_one_and_is_paid_off() {
    let terms = Terms::new(1_000, None, false);
    let clock = Word::new();
    let now = 1 << 40;
    assert_eq!(admit(&clock, &terms, 60_000, now), Verdict::Pass);
    let paid = duration(terms.per_byte, 60_000);
    assert_eq!(
        admit(&clock, &terms, 60, now + paid - terms.burst),
        Verdict::Drop
    );
    assert_eq!(admit(&clock, &terms, 60_000, now + paid), Verdict::Pass);
}

#[test]
fn a_burst_that_was_asked_for_is_kept_and_a_runtimes_default_is_none() {
    let rate = 10_000_000;
    for (paced, usual) in [(false, BURST_NS), (true, PACED_BURST_NS)] {
        let terms = |burst| Terms::new(rate, burst, paced);
        let least = terms(Some(8));
        assert_eq!(least.burst, duration(least.per_byte, BURST_BYTES));
        assert_eq!(terms(None).burst, usual.max(least.burst));
        for unsaid in [(1 << 31) - 1, u64::from(u32::MAX)] {
            assert_eq!(terms(Some(unsaid)), terms(None));
        }
        assert_eq!(terms(Some(2_000_000)).burst, 200_000_000);
        assert_eq!(terms(Some(40_000_000)).burst, 4_000_000_000);
    }
    let longest = Terms::new(SLOWEST, Some(UNSAID_BURST - 1), false);
    assert_eq!(longest.burst, (UNSAID_BURST - 1) * 1_000_000);
    assert!(!Terms::new(FASTEST + 1, None, false).limits());
    assert!(Terms::new(FASTEST, None, false).limits());
    assert_eq!(
        admit(&Word::new(), &Terms::default(), 1 << 30, 5),
        Verdict::Pass
    );
}

/// After a rest as much passes at once as was asked for, to the packet, and from then on the rate.
#[test]
fn as_much_goes_at_once_as_was_asked_for() {
    // Five seconds of the rate.
    let (rate, bits, bytes) = (1_000_000, 5_000_000, 1250);
    let terms = Terms::new(rate, Some(bits), false);
    let clock = Word::new();
    let now = 1 << 40;
    let passes = |at| {
        let passed = (0..2_000).filter(|_| admit(&clock, &terms, bytes, at) == Verdict::Pass);
        passed.count()
    };
    assert_eq!(passes(now), 500);
    assert_eq!(passes(now + 1_000_000_000), 100);
    assert_eq!(passes(now + 60_000_000_000), 500);
}

struct Bytes<'a>(&'a [u8]);

impl Octets for Bytes<'_> {
    fn octet(&self, at: usize) -> Option<u8> {
        self.0.get(at).copied()
    }
}

#[test]
fn a_super_packet_counts_the_headers_of_its_segments() {
    let mut packet = [0_u8; 100];
    // TCP with twelve bytes of options over IPv4: 14 + 20 + 32.
    packet[14] = 0x45;
    packet[23] = 6;
    packet[14 + 20 + 12] = 0x80;
    let length = |packet: &[u8], payload: u32, segment: u32, headers: u32| {
        wire_length(&Bytes(packet), payload + headers, segment)
    };
    assert_eq!(length(&packet, 1448, 0, 66), 1514);
    assert_eq!(length(&packet, 1448 * 45, 1448, 66), 45 * 1514);
    assert_eq!(length(&packet, 1448 * 44 + 1, 1448, 66), 44 * 1514 + 67);
    // UDP over IPv4, then TCP and UDP over IPv6.
    packet[23] = 17;
    assert_eq!(length(&packet, 12_000, 1200, 42), 10 * 1242);
    packet = [0; 100];
    packet[14] = 0x60;
    packet[20] = 6;
    packet[14 + 40 + 12] = 0x50;
    assert_eq!(length(&packet, 1428 * 3, 1428, 74), 3 * 1502);
    packet[20] = 17;
    assert_eq!(length(&packet, 4000, 1000, 62), 4 * 1062);
    // Cut short: no less than what is there.
    assert_eq!(length(&packet[..10], 4000, 1000, 62), 4062 + 4 * 14);
    assert_eq!(length(&packet[..14], 0, 1000, 10), 10);
}
