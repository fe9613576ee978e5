//! The IPAM core and the CNI protocol: slots with their cooldown as one state machine, the verbs as plans, and the shapes of
//! the CNI specification (0.3.0 to 1.1.0). Pure: time, boot identity and everything durable come in and go out as values.

#![forbid(unsafe_code)]

pub mod choice;
pub mod claims;
pub mod ipam;
pub mod leaks;
pub mod names;
pub mod older;
pub mod plan;
pub mod rebuild;
pub mod spec;
pub mod tag;
pub mod watermark;
