//! Advertisements and readiness to route sets per peer. Pure.

#![forbid(unsafe_code)]
