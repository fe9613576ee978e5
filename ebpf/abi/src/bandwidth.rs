//! Bandwidth limits of pods: one bucket a pod and direction, whatever its interfaces and families.
//!
//! | map | key → value | how it changes |
//! |---|---|---|
//! | `limited` | interface index → [`Limits`] | hash; a pod's interfaces have the same value |
//! | `buckets` | number → [`Bucket`] | mmap array; user space sets the terms, programs move the time |
//!
//! A bucket is a virtual clock: `next` is the time at which it is full again, and a packet moves it on by the time that the packet
//! takes at the rate. That is the generic cell rate algorithm of ITU-T I.371 in one word, so packets of several CPUs share the
//! bucket by compare-and-exchange and need no lock. What does not conform is dropped, or waits for its departure time where
//! the interface has a queue that keeps it (`fq`, "earliest departure time").
//!
//! Lengths are those of Ethernet frames as they would be on a wire: a super-packet counts each segment's headers.

/// Fraction bits of [`Terms::per_byte`]: 1 kbit/s to 1 Tbit/s are within 0.01 % of what was asked.
pub const FRACTION: u32 = 20;

/// Attempts to move the clock. Each one that fails is another CPU's success; a packet that loses so often is dropped.
pub const ATTEMPTS: u32 = 64;

/// Nanoseconds that a bucket holds. TCP without a queue in its way loses a whole window when it meets the limit, waits for its
/// retransmission timer (200 ms at least in Linux, RFC 6298) and begins anew: what it may then send must be what the wait has saved.
pub const BURST_NS: u64 = 300_000_000;

/// The least that a bucket holds, whatever is asked for: TCP's initial window (RFC 6928) is to pass at any rate.
pub const BURST_BYTES: u64 = 16 * 1024;

/// From here on a burst in bits means that nobody asked for one: Kubernetes' annotations know none, and runtimes fill in the largest
/// number of 31 or of 32 bits. As a burst it would be no limit until two gigabits have gone by.
pub const UNSAID_BURST: u64 = (1 << 31) - 1;

/// What a bucket holds where packets wait instead of being dropped: as good as nothing, since they leave evenly.
pub const PACED_BURST_NS: u64 = 2_000_000;

/// The longest wait; then a packet is dropped, for a queue of more is no help to anybody.
pub const HORIZON_NS: u64 = 250_000_000;

/// The least rate: one packet in several seconds is slower than any protocol's patience. Kubernetes takes no less either.
pub const SLOWEST: u64 = 1_000;

/// Rates beyond this are none: a nanosecond would hold more than 125 bytes, and no pod's interface carries that.
pub const FASTEST: u64 = 1_000_000_000_000;

/// What a bucket is held to.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Terms {
    /// Nanoseconds that a byte takes, times 2^[`FRACTION`]; 0: no limit.
    pub per_byte: u64,
    /// Nanoseconds that the bucket holds.
    pub burst: u64,
    /// Nanoseconds that a packet may wait; 0: it is dropped.
    pub horizon: u64,
}

impl Terms {
    /// Of a rate in bits a second. `paced`: packets can wait.
    ///
    /// A burst in bits that somebody asked for is kept, also one that is larger than what TCP needs: after a rest so much goes at once.
    pub const fn new(rate: u64, burst: Option<u64>, paced: bool) -> Self {
        if rate == 0 || rate > FASTEST {
            return Terms {
                per_byte: 0,
                burst: 0,
                horizon: 0,
            };
        }
        let rate = if rate < SLOWEST { SLOWEST } else { rate };
        // Rounded up: never more than the rate.
        let per_byte = (8_000_000_000u64 << FRACTION).div_ceil(rate);
        let mut hold = if paced { PACED_BURST_NS } else { BURST_NS };
        if let Some(bits) = burst
            && bits < UNSAID_BURST
        {
            hold = (bits as u128 * 1_000_000_000 / rate as u128) as u64;
        }
        let least = duration(per_byte, BURST_BYTES);
        Terms {
            per_byte,
            burst: if hold < least { least } else { hold },
            horizon: if paced { HORIZON_NS } else { 0 },
        }
    }

    /// Whether there is a limit.
    pub const fn limits(&self) -> bool {
        self.per_byte != 0
    }
}

/// Value of `limited`: which bucket a direction has, plus one; 0: none.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Limits {
    /// Of what the pod sends.
    pub sends: u32,
    /// Of what reaches the pod.
    pub receives: u32,
}

/// Value of `buckets`: one cache line.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Bucket {
    /// CLOCK_MONOTONIC nanoseconds: when the bucket is full again.
    pub next: u64,
    /// What it is held to.
    pub terms: Terms,
    /// Packets dropped; a super-packet is one.
    pub dropped_packets: u64,
    /// Their bytes on the wire.
    pub dropped_bytes: u64,
    /// Zero.
    pub pad: [u64; 2],
}

const _: () = {
    assert!(size_of::<Limits>() == 8);
    assert!(size_of::<Bucket>() == 64);
};

/// The word that CPUs share.
pub trait Clock {
    /// Its value.
    fn load(&self) -> u64;
    /// Puts `new` if it is still `old`; else tells what it is.
    fn exchange(&self, old: u64, new: u64) -> Result<(), u64>;
}

/// What becomes of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Goes now.
    Pass,
    /// Leaves at this time and not before.
    At(u64),
    /// Is too much.
    Drop,
}

/// Longer than any packet: Linux's largest super-packets have half of it.
const LONGEST: u64 = 1 << 20;

// The product of `duration` fits a word: the kernel's programs have no wider one.
const _: () = assert!((8_000_000_000u64 << FRACTION).div_ceil(SLOWEST) < u64::MAX / LONGEST);

/// Nanoseconds that `bytes` take.
#[inline(always)]
pub const fn duration(per_byte: u64, bytes: u64) -> u64 {
    let bytes = if bytes < LONGEST { bytes } else { LONGEST };
    (per_byte * bytes).div_ceil(1 << FRACTION)
}

/// Takes a packet of `bytes` on the wire into account.
///
/// A packet that is larger than the bucket passes a full one, and is paid off afterwards.
#[inline(always)]
pub fn admit<C: Clock>(clock: &C, terms: &Terms, bytes: u64, now: u64) -> Verdict {
    if !terms.limits() {
        return Verdict::Pass;
    }
    let cost = duration(terms.per_byte, bytes);
    let need = if cost < terms.burst {
        cost
    } else {
        terms.burst
    };
    // The time at which a bucket that is full then has room for the packet now.
    let latest = now + terms.burst - need;
    let mut held = clock.load();
    let mut attempt = 0;
    while attempt < ATTEMPTS {
        let wait = held.saturating_sub(latest);
        if wait > terms.horizon {
            return Verdict::Drop;
        }
        let from = if held > now { held } else { now };
        match clock.exchange(held, from + cost) {
            Ok(()) if wait == 0 => return Verdict::Pass,
            Ok(()) => return Verdict::At(now + wait),
            Err(other) => held = other,
        }
        attempt += 1;
    }
    Verdict::Drop
}

/// Access to a packet that starts at its Ethernet header.
pub trait Octets {
    /// The octet at `at`, or nothing if the packet ends before.
    fn octet(&self, at: usize) -> Option<u8>;
}

const ETHERNET: usize = 14;
const TCP: u8 = 6;

/// Bytes on the wire of a packet of `length` bytes, which is cut into segments of `segment` bytes of payload (0: it is not).
///
/// Headers are read where they are; behind IPv6 extension headers and in tunnels a TCP header without options is assumed.
#[inline(always)]
pub fn wire_length<P: Octets>(packet: &P, length: u32, segment: u32) -> u64 {
    let length = u64::from(length);
    if segment == 0 {
        return length;
    }
    let headers = header_length(packet);
    if length <= headers {
        return length;
    }
    let segments = (length - headers).div_ceil(u64::from(segment));
    length + (segments - 1) * headers
}

#[inline(always)]
fn header_length<P: Octets>(packet: &P) -> u64 {
    let Some(version) = packet.octet(ETHERNET) else {
        return ETHERNET as u64;
    };
    let (ip, protocol) = if version >> 4 == 6 {
        (40, packet.octet(ETHERNET + 6))
    } else {
        (usize::from(version & 0x0f) * 4, packet.octet(ETHERNET + 9))
    };
    let transport = if protocol == Some(17) {
        8
    } else if protocol == Some(TCP) {
        match packet.octet(ETHERNET + ip + 12) {
            Some(offset) => usize::from(offset >> 4) * 4,
            None => 20,
        }
    } else {
        20
    };
    (ETHERNET + ip + transport) as u64
}

#[cfg(test)]
mod tests;
