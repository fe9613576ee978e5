//! Strings that many objects share. Bounded; decides nothing.

use std::collections::HashSet;
use std::sync::Arc;

/// Strings kept for sharing; namespaces, label keys, node names and zones of 10,000 nodes are below this.
const MAX_INTERNED: usize = 65_536;

/// Makes equal strings one allocation: ten thousand slices name the same namespace, zones and nodes.
#[derive(Debug, Default)]
pub struct Interner(HashSet<Arc<str>>);

impl Interner {
    pub(crate) fn get(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.0.get(text) {
            return Arc::clone(known);
        }
        if self.0.len() >= MAX_INTERNED {
            self.0.clear();
        }
        let new: Arc<str> = text.into();
        self.0.insert(Arc::clone(&new));
        new
    }
}
