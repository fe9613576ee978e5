//! Services, views, slot tables, diff: desired and observed state to ordered ops. Pure.

#![forbid(unsafe_code)]
