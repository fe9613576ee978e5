//! What of an ADD needs no slot, made while an agent makes the slot durable: pairs, and the pod's ends of them. No address, no route.
//!
//! What is certain is made at once, the rest when the class is known. With the slot all of it is made what the slot needs.

use kun_cni_core::plan::{self, Draft, Facts, Pair, Undo};
use kun_config::types::SlotClass;

use crate::kernel::{self, Kernel, KernelError};

/// The kernel's part of one ADD.
pub(crate) struct Early<'a> {
    kernel: Kernel<'a>,
    draft: Draft,
    local_ports: (u16, u16),
    /// Pairs that stand.
    made: Vec<Pair>,
    /// Those whose ends in the pod are set up.
    linked: Vec<Pair>,
    undo: Vec<Undo>,
    done: Result<(), KernelError>,
}

impl<'a> Early<'a> {
    /// Nothing is made yet.
    pub(crate) fn new(kernel: Kernel<'a>, draft: Draft, local_ports: (u16, u16)) -> Self {
        Self {
            kernel,
            draft,
            local_ports,
            made: Vec::new(),
            linked: Vec::new(),
            undo: Vec::new(),
            done: Ok(()),
        }
    }

    /// Makes what a slot of this class needs; `None`: what one of any class does. A failure is told by [`Early::finish`].
    pub(crate) fn make(&mut self, class: Option<SlotClass>) {
        if self.done.is_err() {
            return;
        }
        self.draft.class = class.unwrap_or(SlotClass::V6Only);
        self.done = self.advance(class.is_some());
    }

    /// `known`: the pairs are what they will be, and their ends in the pod may be set up.
    fn advance(&mut self, known: bool) -> Result<(), KernelError> {
        let wanted = self.draft.pairs();
        let missing = without(&wanted, |pair| {
            self.made.iter().any(|m| m.host == pair.host)
        });
        self.kernel
            .apply(&plan::begin(&missing, self.draft.mtu), &mut self.undo)?;
        self.made.extend(missing);
        if known {
            let same = |a: &Pair, b: &Pair| (&a.host, a.carries) == (&b.host, b.carries);
            let bare = without(&wanted, |pair| self.linked.iter().any(|l| same(l, pair)));
            self.kernel
                .apply(&plan::link(&bare, self.local_ports), &mut self.undo)?;
            self.linked.extend(bare);
        }
        Ok(())
    }

    /// The rest, now that the slot is known.
    pub(crate) fn finish(&mut self, facts: &Facts) -> Result<(), KernelError> {
        std::mem::replace(&mut self.done, Ok(()))?;
        self.draft = facts.draft();
        self.advance(true)?;
        // An attachment that has a slot already keeps it, and that may be without IPv4.
        let wanted = self.draft.pairs();
        let surplus: Vec<Undo> = without(&self.made, |pair| {
            wanted.iter().any(|w| w.host == pair.host)
        })
        .into_iter()
        .map(|pair| Undo::RemoveLink { host: pair.host })
        .collect();
        if let Some(error) = self.revert(&surplus).pop() {
            return Err(error);
        }
        self.kernel.apply(&plan::finish(facts), &mut self.undo)
    }

    /// Removes whatever was made; gives what could not be.
    pub(crate) fn undo(&self) -> Vec<String> {
        let failed = self.revert(&self.undo);
        failed.iter().map(ToString::to_string).collect()
    }

    fn revert(&self, undo: &[Undo]) -> Vec<KernelError> {
        match undo {
            [] => Vec::new(),
            undo => kernel::revert(undo, &self.draft.key).failed,
        }
    }
}

fn without(pairs: &[Pair], is_there: impl Fn(&Pair) -> bool) -> Vec<Pair> {
    let mut left = pairs.to_vec();
    left.retain(|pair| !is_there(pair));
    left
}
