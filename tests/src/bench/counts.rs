//! Instruction counts: what one run of a packet program costs, measured in a guest whose clock advances one nanosecond an
//! instruction (`cargo xtask vm --count-instructions`). The same in every boot, however busy the machine; so they gate.
//!
//! A count holds the kernel's test run around the program too, and what the program calls: maps, checksums, the clock.

use anyhow::Result;

use super::{Row, ebpf, nat64};

/// Measures a part.
pub type Part = fn() -> Result<Vec<Row>>;

/// The parts that can be counted.
pub const PARTS: &[(&str, Part)] = &[("ebpf", ebpf::instructions), ("nat64", nat64::instructions)];

/// What was counted when the programs were last changed on purpose, under Debian's 6.1. A change that costs more changes this table.
const COUNTED: &[(&str, f64)] = &[
    ("ebpf/pod_ingress_v4_known_flow_instructions", 1719.0),
    ("ebpf/uplink_ingress_v4_known_flow_instructions", 1642.0),
    ("ebpf/pod_egress_v4_known_flow_instructions", 1244.0),
    ("ebpf/uplink_egress_v4_known_flow_instructions", 1244.0),
    ("ebpf/pod_ingress_v4_not_a_service_instructions", 359.0),
    ("ebpf/pod_egress_v4_not_a_service_instructions", 389.0),
    ("ebpf/uplink_ingress_v4_not_a_service_instructions", 331.0),
    ("ebpf/uplink_egress_v4_not_a_service_instructions", 389.0),
    ("ebpf/pod_ingress_v6_known_flow_instructions", 1717.0),
    ("ebpf/uplink_ingress_v6_known_flow_instructions", 1640.0),
    ("ebpf/pod_egress_v6_known_flow_instructions", 1247.0),
    ("ebpf/uplink_egress_v6_known_flow_instructions", 1247.0),
    ("ebpf/pod_ingress_v6_not_a_service_instructions", 356.0),
    ("ebpf/pod_egress_v6_not_a_service_instructions", 391.0),
    ("ebpf/uplink_ingress_v6_not_a_service_instructions", 327.0),
    ("ebpf/uplink_egress_v6_not_a_service_instructions", 391.0),
    ("ebpf/limit_ingress_passes_instructions", 349.0),
    ("ebpf/limit_ingress_dropped_instructions", 342.0),
    ("nat64/run, not for the translator, instructions", 250.0),
    (
        "nat64/run, IPv6 to IPv4, TCP in a block, instructions",
        1577.0,
    ),
    (
        "nat64/run, IPv4 to IPv6, TCP in a block, instructions",
        1692.0,
    ),
    (
        "nat64/run, IPv6 to IPv4, TCP exception, instructions",
        2155.0,
    ),
];

/// Room for the kernel's own changes between its releases.
const ROOM: f64 = 1.03;

/// The counts of the parts that are wanted, each against its budget.
pub fn run(wanted: impl Fn(&str) -> bool) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (_, part) in PARTS.iter().filter(|(name, _)| wanted(name)) {
        for row in part()? {
            let counted = COUNTED.iter().find(|(name, _)| *name == row.name);
            rows.push(match counted {
                Some((_, counted)) => row.at_most((counted * ROOM).round()),
                None => row,
            });
        }
    }
    Ok(rows)
}
