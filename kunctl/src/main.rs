//! `kunctl`: status, why, ipam.

fn main() {}
