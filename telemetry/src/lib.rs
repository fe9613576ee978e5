//! Structured logs and the Prometheus text endpoint, the same in every program.

#![forbid(unsafe_code)]
