//! YAML (and with it JSON) as a tree in which every node knows its line and column, and a reader that walks it and gathers
//! every fault instead of stopping at the first.
//!
//! Why not serde: a derived `Deserialize` stops at the first fault, and says neither the path of an unknown field nor where a
//! value stood once a later check refuses it. The tree costs one pass and keeps the place of everything.
//! Scalars stay text until a field says what they are, so `1.10` is never a number by accident.

mod read;
mod tree;

pub use read::{Cursor, Fields, Sink, nearest};
pub use tree::{Entry, Mark, Node, Value, documents};
