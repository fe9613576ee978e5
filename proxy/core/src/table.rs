//! Slot tables: how a backend set is laid out in `slots`.
//!
//! East-west: the compact table, one slot a backend (a weight of w gets w slots, spread out), because the client keeps what it
//! chose. North-south: Maglev (Eisenbud et al., NSDI 2016 §3.4), because another node may see the next packet of the flow and has
//! to choose alike. Both depend on the backends' addresses alone, never on ids: every node builds the same table.

/// Maglev sizes: the largest prime below each power of two, so that a table fills its buddy extent.
const PRIMES: [u32; 11] = [
    61, 127, 251, 509, 1021, 2039, 4093, 8191, 16381, 32749, 65521,
];

/// Slots a backend gets at least, while the table can grow: an imbalance of about 1 %.
const SLOTS_PER_BACKEND: usize = 64;

/// How a view's table is built.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Method {
    /// One slot a backend.
    Compact,
    /// Maglev.
    Maglev,
}

/// A backend on its way into a table: its id, and a hash of its address and port that is the same on every node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// What the slot will hold.
    pub id: u32,
    /// Of address and port.
    pub hash: u64,
}

/// A hash of bytes that is the same on every node and in every version: FNV-1a, then a finisher (SplitMix64) for its weak high bits.
pub fn stable_hash(bytes: &[u8]) -> u64 {
    let mut h = 0xcbf2_9ce4_8422_2325_u64;
    for b in bytes {
        h = (h ^ u64::from(*b)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    h = (h ^ (h >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    h = (h ^ (h >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    h ^ (h >> 31)
}

/// Slots that `backends` backends take, without building the table.
pub fn size(method: Method, backends: usize) -> usize {
    match (method, backends) {
        (_, 0) => 0,
        (Method::Compact, n) => n,
        (Method::Maglev, n) => maglev_size(n) as usize,
    }
}

fn maglev_size(backends: usize) -> u32 {
    let wanted = backends * SLOTS_PER_BACKEND;
    PRIMES
        .into_iter()
        .find(|p| *p as usize >= wanted)
        .unwrap_or(PRIMES[PRIMES.len() - 1])
}

/// The table of `entries`, which are in the same order on every node. At most 65,521 entries for Maglev, 65,535 for compact.
pub fn build(method: Method, entries: &[Entry]) -> Vec<u32> {
    match method {
        Method::Compact => entries.iter().map(|e| e.id).collect(),
        Method::Maglev => maglev(entries),
    }
}

/// Spreads weights over a compact table: backend i stands `weights[i] / gcd` times, as far apart as the table allows.
/// Positions into `weights`, in slot order; a weight of 0 gets none.
pub fn weighted(weights: &[u16]) -> Vec<usize> {
    let gcd = weights.iter().copied().filter(|w| *w > 0).fold(0, gcd);
    if gcd == 0 {
        return Vec::new();
    }
    // Smooth weighted round robin: each turn everyone earns its weight, the richest pays the sum.
    let weights: Vec<i64> = weights.iter().map(|w| i64::from(w / gcd)).collect();
    let sum: i64 = weights.iter().sum();
    let mut credit = vec![0_i64; weights.len()];
    let mut order = Vec::with_capacity(sum as usize);
    for _ in 0..sum {
        for (c, w) in credit.iter_mut().zip(&weights) {
            *c += w;
        }
        let (richest, _) = credit
            .iter()
            .enumerate()
            .filter(|(i, _)| weights[*i] > 0)
            .max_by_key(|(i, c)| (**c, usize::MAX - i))
            .expect("a positive weight exists");
        credit[richest] -= sum;
        order.push(richest);
    }
    order
}

fn gcd(a: u16, b: u16) -> u16 {
    if b == 0 { a } else { gcd(b, a % b) }
}

fn maglev(entries: &[Entry]) -> Vec<u32> {
    if entries.is_empty() {
        return Vec::new();
    }
    let size = maglev_size(entries.len());
    let entries = &entries[..entries.len().min(size as usize)];
    let mut next: Vec<(u32, u32)> = entries
        .iter()
        .map(|e| {
            let offset = (e.hash >> 32) as u32 % size;
            let skip = e.hash as u32 % (size - 1) + 1;
            (offset, skip)
        })
        .collect();
    let mut table = vec![None; size as usize];
    let mut filled = 0;
    loop {
        for (entry, (position, skip)) in entries.iter().zip(&mut next) {
            // The size is prime, so the walk visits every slot and a free one comes while one is left.
            while table[*position as usize].is_some() {
                *position = (*position + *skip) % size;
            }
            table[*position as usize] = Some(entry.id);
            filled += 1;
            if filled == size {
                return table.into_iter().flatten().collect();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(n: u32) -> Vec<Entry> {
        (0..n)
            .map(|i| Entry {
                id: i,
                hash: stable_hash(&i.to_be_bytes()),
            })
            .collect()
    }

    #[test]
    fn three_endpoints_fit_in_a_kibibyte() {
        assert_eq!(size(Method::Maglev, 3) * 4, 1004);
        assert_eq!(build(Method::Maglev, &entries(3)).len(), 251);
    }

    #[test]
    fn maglev_is_even_to_a_few_percent() {
        for n in [1_u32, 2, 3, 10, 100, 1000] {
            let table = build(Method::Maglev, &entries(n));
            let mut counts = vec![0_usize; n as usize];
            for id in &table {
                counts[*id as usize] += 1;
            }
            let fair = table.len() as f64 / f64::from(n);
            for c in counts {
                assert!(
                    (c as f64) >= fair - 1.5 && (c as f64) <= fair + 1.5,
                    "{n}: {c} of {fair}"
                );
            }
        }
    }

    #[test]
    fn losing_one_backend_moves_few_others() {
        let before = build(Method::Maglev, &entries(50));
        let mut fewer = entries(50);
        fewer.remove(17);
        let after = build(Method::Maglev, &fewer);
        assert_eq!(before.len(), after.len());
        let moved = before
            .iter()
            .zip(&after)
            .filter(|(b, a)| **b != 17 && b != a)
            .count();
        assert!(
            moved * 100 < before.len() * 8,
            "{moved} of {} slots moved that need not",
            before.len()
        );
    }

    #[test]
    fn the_largest_table_still_holds_everyone() {
        let table = build(Method::Maglev, &entries(32_000));
        let distinct: std::collections::BTreeSet<_> = table.iter().collect();
        assert_eq!((table.len(), distinct.len()), (65_521, 32_000));
    }

    #[test]
    fn weights_are_exact_and_spread() {
        assert_eq!(weighted(&[2, 2]), [0, 1]);
        assert_eq!(weighted(&[4, 2, 0]), [0, 1, 0]);
        assert_eq!(weighted(&[0, 0]), Vec::<usize>::new());
        let order = weighted(&[5, 1, 1]);
        assert_eq!(order, [0, 0, 1, 0, 2, 0, 0]);
    }

    #[test]
    fn the_hash_never_changes() {
        assert_eq!(stable_hash(b""), 0xf52a_15e9_a9b5_e89b);
    }
}
