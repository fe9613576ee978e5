//! Zones, the plugin chain, cache, DNS64 synthesis, NAT64 mapping. Pure: no sockets, no clock.

#![forbid(unsafe_code)]
