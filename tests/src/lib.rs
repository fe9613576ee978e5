//! The lab, the scenarios and the bench: the whole of kun on one machine, driven from outside.

#![forbid(unsafe_code)]

pub mod bench;
pub mod control_plane;
pub mod lab;
pub mod watcher;
