//! Gives nodes their IPAM blocks and services their virtual addresses.

#![forbid(unsafe_code)]
