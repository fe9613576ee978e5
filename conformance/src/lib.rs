//! Black-box suites that drive any subject from outside, and the ledgers of requirements.

#![forbid(unsafe_code)]

pub mod cni;
pub mod dns;
