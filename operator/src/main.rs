//! The program: flags, configuration, and the shells joined.

fn main() {}
