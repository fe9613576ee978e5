//! The only crate that knows aya: typed map handles; load, attach, pin, adopt.
