//! The CNI shell: netlink, namespaces, the durable store, and the IPAM service that the agent embeds.
