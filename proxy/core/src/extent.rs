//! The buddy allocator over `slots`: extents of 2^n entries, split and merged.
//!
//! Pure bookkeeping: the caller returns an extent only after a grace period, when no program can still read it.

use std::collections::BTreeSet;

/// Largest extent: 2^16 slots, what a view can count.
const ORDERS: usize = 17;

/// A run of slots: `1 << order` of them from `base`, which is a multiple of that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Extent {
    /// First slot.
    pub base: u32,
    /// Binary logarithm of the length.
    pub order: u8,
}

impl Extent {
    /// The extent that a published view with `count` > 0 slots at `base` uses; `None` when no allocator of ours made that.
    pub fn of_view(base: u32, count: u16) -> Option<Self> {
        let order = order_for(usize::from(count))?;
        base.is_multiple_of(1 << order)
            .then_some(Extent { base, order })
    }
}

fn order_for(count: usize) -> Option<u8> {
    if count == 0 {
        return None;
    }
    let order = count.next_power_of_two().trailing_zeros() as usize;
    (order < ORDERS).then_some(order as u8)
}

/// Free extents of `0..capacity`.
#[derive(Debug, Clone)]
pub struct Extents {
    free: [BTreeSet<u32>; ORDERS],
    capacity: u32,
    used: u32,
}

impl Extents {
    /// Everything free. Any capacity: what is no power of two is cut into the largest aligned pieces.
    pub fn new(capacity: u32) -> Self {
        let mut free = std::array::from_fn(|_| BTreeSet::new());
        let mut base = 0_u32;
        while base < capacity {
            let aligned = if base == 0 { 31 } else { base.trailing_zeros() };
            let fits = (capacity - base).ilog2();
            let order = aligned.min(fits).min(ORDERS as u32 - 1);
            let pieces: &mut BTreeSet<u32> = &mut free[order as usize];
            pieces.insert(base);
            base += 1 << order;
        }
        Self {
            free,
            capacity,
            used: 0,
        }
    }

    /// Slots handed out, extents' rounding included.
    pub fn used(&self) -> u32 {
        self.used
    }

    /// All slots.
    pub fn capacity(&self) -> u32 {
        self.capacity
    }

    /// An extent of at least `count` > 0 slots; `None`: no room.
    pub fn take(&mut self, count: usize) -> Option<Extent> {
        let order = order_for(count)?;
        let from = (usize::from(order)..ORDERS).find(|o| !self.free[*o].is_empty())?;
        let base = self.free[from].pop_first()?;
        for o in (usize::from(order)..from).rev() {
            self.free[o].insert(base + (1 << o));
        }
        self.used += 1 << order;
        Some(Extent { base, order })
    }

    /// Takes exactly `extent`, as an adopted view holds it; `false`: part of it is not free.
    pub fn reserve(&mut self, extent: Extent) -> bool {
        let order = usize::from(extent.order);
        let Some(from) = (order..ORDERS).find(|o| {
            let base = extent.base & !((1_u64 << o) - 1) as u32;
            self.free[*o].contains(&base)
        }) else {
            return false;
        };
        let mut base = extent.base & !((1_u64 << from) - 1) as u32;
        self.free[from].remove(&base);
        for o in (order..from).rev() {
            let upper = base + (1 << o);
            if extent.base >= upper {
                self.free[o].insert(base);
                base = upper;
            } else {
                self.free[o].insert(upper);
            }
        }
        self.used += 1 << order;
        true
    }

    /// Gives an extent back, merged with its buddies.
    pub fn give(&mut self, extent: Extent) {
        self.used -= 1 << extent.order;
        let (mut base, mut order) = (extent.base, usize::from(extent.order));
        while order + 1 < ORDERS {
            let buddy = base ^ (1 << order);
            if !self.free[order].remove(&buddy) {
                break;
            }
            base = base.min(buddy);
            order += 1;
        }
        self.free[order].insert(base);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn overlap(a: Extent, b: Extent) -> bool {
        let end = |e: Extent| u64::from(e.base) + (1 << e.order);
        u64::from(a.base) < end(b) && u64::from(b.base) < end(a)
    }

    proptest! {
        #[test]
        fn extents_never_overlap_and_all_come_back(
            capacity in 1_u32..5000,
            steps in prop::collection::vec((any::<bool>(), 1_usize..300, any::<prop::sample::Index>()), 1..200),
        ) {
            let mut extents = Extents::new(capacity);
            let whole = extents.clone();
            let mut live: Vec<Extent> = Vec::new();
            for (take, count, index) in steps {
                if take || live.is_empty() {
                    if let Some(e) = extents.take(count) {
                        prop_assert!(1_usize << e.order >= count);
                        prop_assert!(e.base + (1 << e.order) <= capacity);
                        prop_assert!(live.iter().all(|l| !overlap(*l, e)));
                        live.push(e);
                    }
                } else {
                    extents.give(live.swap_remove(index.index(live.len())));
                }
                prop_assert_eq!(extents.used(), live.iter().map(|e| 1_u32 << e.order).sum::<u32>());
            }
            // An adopting allocator that reserves the live extents is the same allocator.
            let mut adopted = Extents::new(capacity);
            for e in &live {
                prop_assert!(adopted.reserve(*e));
                prop_assert!(!adopted.reserve(*e));
            }
            for e in live {
                extents.give(e);
                adopted.give(e);
            }
            prop_assert_eq!(&extents.free, &whole.free);
            prop_assert_eq!(&adopted.free, &whole.free);
        }
    }
}
