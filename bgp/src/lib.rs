//! The embedded BGP speaker: sockets, sessions, Adj-RIB-Out.
