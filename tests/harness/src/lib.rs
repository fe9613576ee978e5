//! Network namespaces, processes and skips for tests: everything a test makes is gone when it drops, panics included.
