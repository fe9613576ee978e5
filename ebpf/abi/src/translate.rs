//! IP/ICMP translation (RFC 7915), the one core for tcx, XDP and userspace.
