//! NAT64 mapping: deterministic port blocks, computed and not remembered.
