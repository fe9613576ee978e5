//! The DNS server shell: sockets, upstreams, reload.
