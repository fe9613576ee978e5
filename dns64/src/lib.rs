//! The DNS server shell: sockets, upstreams, reload. What is answered is decided in `kun-dns-core`.
//!
//! Fast lane: one thread and one SO_REUSEPORT socket a core and listener; what memory holds is answered there, in batches. Slow
//! lane: one tokio thread for upstreams, TCP and HTTP; equal questions in flight are asked once.

pub mod echo;
pub mod listen;
pub mod load;
pub mod server;

mod fast;
mod http;
mod metrics;
mod slow;
mod sys;
mod tcp;
mod upstream;
