//! The IPAM core and the CNI verbs as plans: `step(state, command, now) → (state, reply, effects)`. Pure.

#![forbid(unsafe_code)]
