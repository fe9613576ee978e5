//! kun's configuration: `kun.yaml` and the Corefile, parsed once into types that cannot be wrong.
//!
//! Pure: text comes in, validated types or a list of [`Fault`]s go out; this crate opens no file. Every fault names the file,
//! the line, the path in it, what was wrong and what would be right.

#![forbid(unsafe_code)]

pub mod corefile;
pub mod types;

pub mod yaml;

mod fault;
mod parse;
mod scalar;
mod sections;

pub use fault::{Fault, Faults};
pub use parse::{known_fields, parse, parse_on};
pub use sections::*;
