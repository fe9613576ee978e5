//! The only crate that knows aya: typed map handles; load, attach, pin, adopt.

mod hook;
pub mod nat64;
mod sys;

pub use hook::{HookError, Mechanism};
pub use nat64::{Nat64Config, Nat64Dataplane, Nat64Error, Nat64Stats, Nat64Warning};
