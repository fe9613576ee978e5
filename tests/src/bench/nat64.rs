//! Figures of the part `nat64`: one run of the gateway's program for a packet of each kind, by test run, minimum of many. The
//! packet is rewritten by each run, so each run is a call of its own; what the call itself costs is measured beside it and shown,
//! not subtracted.

use std::net::{Ipv4Addr, Ipv6Addr};

use kun_ebpf_loader::{Nat64Config, Nat64Dataplane};
use kun_harness::BpfFs;

use super::{Context, Row};

/// Runs of which the fastest counts.
const RUNS: usize = 3000;

/// Measures the part.
pub fn run(_context: &Context) -> anyhow::Result<Vec<Row>> {
    let (bpffs, mut plane) = gateway()?;
    let mut rows = runs(&mut plane, RUNS, "ns", "")?;
    if let Some(n) = plane.verified_instructions() {
        // The kernel's limit is a million: beyond half of it the next change is a gamble.
        rows.push(
            Row::new("nat64/verified instructions", f64::from(n), "instructions")
                .at_most(500_000.0),
        );
    }
    drop(bpffs);
    Ok(rows)
}

/// The same where the clock counts instructions.
pub fn instructions() -> anyhow::Result<Vec<Row>> {
    let (_bpffs, mut plane) = gateway()?;
    runs(&mut plane, 200, "instructions", ", instructions")
}

fn gateway() -> anyhow::Result<(BpfFs, Nat64Dataplane)> {
    let bpffs = BpfFs::new()?;
    let mut plane = Nat64Dataplane::open(&Nat64Config {
        bpffs_root: bpffs.path().to_owned(),
        pod_prefix: Ipv6Addr::new(0x2001, 0xdb8, 0x10, 0, 0, 0, 0, 0),
        pref64: (Ipv6Addr::new(0x2001, 0xdb8, 0x64, 0, 0, 0, 0, 0), 96),
        pool: vec![(Ipv4Addr::new(198, 51, 100, 0), 30)],
        clients: vec![(Ipv4Addr::new(10, 8, 0, 0), 25)],
        port_block_bits: 10,
        local_port_base: 64512,
        slice: 0,
    })?;
    plane.configure(1, 1500)?;
    Ok((bpffs, plane))
}

/// The fastest of so many runs of each kind of packet.
fn runs(
    plane: &mut Nat64Dataplane,
    times: usize,
    unit: &str,
    suffix: &str,
) -> anyhow::Result<Vec<Row>> {
    // DESIGN §10 allows 200 ns for a known mapping in XDP; in tcx the skb's own work comes on top.
    [
        ("nat64/run, not for the translator", passing(), -1),
        ("nat64/run, IPv6 to IPv4, TCP in a block", six(64512), 7),
        ("nat64/run, IPv4 to IPv6, TCP in a block", four(), 7),
        ("nat64/run, IPv6 to IPv4, TCP exception", six(1000), 7),
    ]
    .into_iter()
    .map(|(name, frame, answer)| {
        let mut best = u128::MAX;
        for _ in 0..times {
            let (_, got, took) = plane.test_run(&frame)?;
            anyhow::ensure!(got == answer, "{name}: the program answered {got}");
            best = best.min(took.as_nanos());
        }
        Ok(Row::new(format!("{name}{suffix}"), best as f64, unit))
    })
    .collect()
}

fn frame(kind: u16, parts: &[&[u8]]) -> Vec<u8> {
    let mut f = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    f.extend(kind.to_be_bytes());
    for part in parts {
        f.extend(*part);
    }
    f
}

/// A TCP segment of 100 octets; the program adjusts its checksum and does not look whether it was right.
fn tcp(from: u16, to: u16) -> Vec<u8> {
    let mut s = vec![0; 120];
    s[..2].copy_from_slice(&from.to_be_bytes());
    s[2..4].copy_from_slice(&to.to_be_bytes());
    s[12] = 0x50;
    s[13] = 0x18;
    s
}

fn six(port: u16) -> Vec<u8> {
    let header = [0x60, 0, 0, 0, 0, 120, 6, 64];
    let pod: [u8; 16] = Ipv6Addr::new(0x2001, 0xdb8, 0x10, 0, 0, 0, 0xa08, 1).octets();
    let to = Ipv6Addr::new(0x2001, 0xdb8, 0x64, 0, 0, 0, 0xc000, 0x250).octets();
    frame(0x86dd, &[&header, &pod, &to, &tcp(port, 80)])
}

fn four() -> Vec<u8> {
    let mut header = vec![0x45, 0, 0, 140, 0, 0, 0x40, 0, 64, 6, 0, 0];
    header.extend([192, 0, 2, 80, 198, 51, 100, 0]);
    let sum: u32 = header
        .chunks(2)
        .map(|p| u32::from(p[0]) << 8 | u32::from(p[1]))
        .sum();
    let check = !((sum & 0xffff) + (sum >> 16)) as u16;
    header[10..12].copy_from_slice(&check.to_be_bytes());
    frame(0x0800, &[&header, &tcp(80, 2048)])
}

fn passing() -> Vec<u8> {
    let mut f = six(64512);
    f[14 + 24] = 0xfd;
    f
}
