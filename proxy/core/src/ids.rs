//! Dense numbers handed out lowest first, so that what is in use stays together in the arrays.

use std::collections::BTreeSet;

/// Numbers `0..capacity`.
#[derive(Debug, Clone)]
pub(crate) struct Ids {
    /// Free below `next`.
    free: BTreeSet<u32>,
    next: u32,
    capacity: u32,
}

impl Ids {
    pub(crate) fn new(capacity: u32) -> Self {
        Self {
            free: BTreeSet::new(),
            next: 0,
            capacity,
        }
    }

    pub(crate) fn take(&mut self) -> Option<u32> {
        if let Some(id) = self.free.pop_first() {
            return Some(id);
        }
        (self.next < self.capacity).then(|| {
            self.next += 1;
            self.next - 1
        })
    }

    /// Takes exactly `id`; `false` when it is taken or too big.
    pub(crate) fn reserve(&mut self, id: u32) -> bool {
        if id >= self.capacity {
            return false;
        }
        if id < self.next {
            return self.free.remove(&id);
        }
        self.free.extend(self.next..id);
        self.next = id + 1;
        true
    }

    pub(crate) fn give(&mut self, id: u32) {
        self.free.insert(id);
    }

    pub(crate) fn used(&self) -> u32 {
        self.next - self.free.len() as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lowest_first_and_reserved_ones_skipped() {
        let mut ids = Ids::new(4);
        assert!(ids.reserve(2) && !ids.reserve(2) && !ids.reserve(4));
        assert_eq!(
            [ids.take(), ids.take(), ids.take(), ids.take()],
            [Some(0), Some(1), Some(3), None]
        );
        ids.give(1);
        assert_eq!((ids.used(), ids.take()), (3, Some(1)));
    }
}
