//! The service proxy shell: applies plans to the eBPF maps.
