//! The packet programs, run by the kernel on one packet at a time (BPF_PROG_TEST_RUN), over both families.

mod rig;

use std::collections::HashSet;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use kun_ebpf_abi::reason::Reason;
use kun_ebpf_abi::service::{Pace, Scope, ViewKind, state};
use kun_ebpf_loader::{Hook, ServiceConfig, ServiceDataplane};
use rig::*;

#[test]
fn udp_goes_to_a_backend_and_its_answer_comes_from_the_service() {
    if !kun_harness::require_root() {
        return;
    }
    for f in families() {
        let mut rig = Rig::new();
        rig.service(3, f.vip, 53, UDP, Scope::Cluster);
        let ids = rig.backends(0, &[(f.backends[0], 5353)]);
        rig.publish(3, ViewKind::Cluster, &ids);

        let out = rig
            .plane
            .test_run(Hook::PodIngress, &udp((f.client, 40000), (f.vip, 53)), 1)
            .unwrap();
        assert_eq!(out.verdict, PASS);
        let sent = read(&out.packet);
        assert_eq!(
            (sent.src, sent.dst),
            ((f.client, 40000), (f.backends[0], 5353))
        );
        assert_eq!(sent.payload, b"hello, world");

        let back = rig
            .plane
            .test_run(Hook::PodEgress, &udp(sent.dst, sent.src), 1)
            .unwrap();
        assert_eq!(back.verdict, PASS);
        let back = read(&back.packet);
        assert_eq!((back.src, back.dst), ((f.vip, 53), (f.client, 40000)));
        assert_eq!(rig.counted(Reason::NoEndpoint), 0);
    }
}

/// One service with one backend, published in both views.
fn simple(f: &Family, proto: u8, scope: Scope) -> Rig {
    let mut rig = Rig::new();
    rig.service(1, f.vip, 80, proto, scope);
    let ids = rig.backends(0, &[(f.backends[0], 8080)]);
    rig.publish(1, ViewKind::Cluster, &ids);
    rig.publish(1, ViewKind::Local, &ids);
    rig
}

#[test]
fn tcp_for_a_service_is_translated_packet_by_packet() {
    if !kun_harness::require_root() {
        return;
    }
    for f in families() {
        let rig = simple(&f, TCP, Scope::External);
        let (client, vip, backend) = ((f.client, 41000), (f.vip, 80), (f.backends[0], 8080));
        for (there, back) in [
            (Hook::PodIngress, Hook::PodEgress),
            (Hook::UplinkIngress, Hook::UplinkEgress),
        ] {
            for (flags, payload) in [(SYN, &b""[..]), (ACK, b"request"), (FIN | ACK, b"")] {
                let out = rig
                    .plane
                    .test_run(there, &packet(TCP, client, vip, flags, payload), 1)
                    .unwrap();
                assert_eq!(out.verdict, PASS);
                let sent = read(&out.packet);
                assert_eq!(
                    (sent.src, sent.dst, &sent.payload[..]),
                    (client, backend, payload)
                );
                let out = rig
                    .plane
                    .test_run(back, &packet(TCP, backend, client, ACK, b"answer"), 1)
                    .unwrap();
                let got = read(&out.packet);
                assert_eq!(
                    (got.src, got.dst, &got.payload[..]),
                    (vip, client, &b"answer"[..])
                );
            }
        }
    }
}

#[test]
fn what_is_for_no_service_is_left_alone() {
    if !kun_harness::require_root() {
        return;
    }
    for f in families() {
        let rig = simple(&f, UDP, Scope::Cluster);
        let others = [
            udp((f.client, 40000), (f.stranger, 80)),
            udp((f.client, 40000), (f.vip, 81)),
            packet(TCP, (f.client, 40000), (f.vip, 80), SYN, b""),
            udp((f.client, 40000), (f.hairpin, 40001)),
        ];
        for sent in others {
            for hook in Hook::ALL {
                let out = rig.plane.test_run(hook, &sent, 1).unwrap();
                assert_eq!((out.verdict, &out.packet), (PASS, &sent), "{hook:?}");
            }
        }
        // A ClusterIP is not for those outside.
        let sent = udp((f.stranger, 40000), (f.vip, 80));
        let out = rig.plane.test_run(Hook::UplinkIngress, &sent, 1).unwrap();
        assert_eq!((out.verdict, out.packet), (PASS, sent));
        assert!(rig.plane.reasons().unwrap().iter().all(|(_, n)| *n == 0));
    }
}

#[test]
fn outside_clients_see_the_external_view() {
    if !kun_harness::require_root() {
        return;
    }
    for f in families() {
        let mut rig = Rig::new();
        rig.service(1, f.vip, 80, UDP, Scope::External);
        rig.backends(0, &f.backends.map(|b| (b, 8080)));
        rig.publish(1, ViewKind::Cluster, &[0]);
        rig.publish(1, ViewKind::Local, &[1]);
        let sent = udp((f.stranger, 40000), (f.vip, 80));
        let out = rig.plane.test_run(Hook::UplinkIngress, &sent, 1).unwrap();
        assert_eq!(read(&out.packet).dst, (f.backends[1], 8080));
        let sent = udp((f.client, 40000), (f.vip, 80));
        let out = rig.plane.test_run(Hook::PodIngress, &sent, 1).unwrap();
        assert_eq!(read(&out.packet).dst, (f.backends[0], 8080));
    }
}

#[test]
fn without_an_endpoint_the_sender_is_told_that_the_port_is_unreachable() {
    if !kun_harness::require_root() {
        return;
    }
    for f in families() {
        for proto in [UDP, TCP] {
            let mut rig = simple(&f, proto, Scope::External);
            rig.publish(1, ViewKind::Cluster, &[]);
            rig.publish(1, ViewKind::Local, &[]);
            for (nth, hook) in [Hook::PodIngress, Hook::UplinkIngress]
                .into_iter()
                .enumerate()
            {
                let sent = packet(proto, (f.client, 40000), (f.vip, 80), SYN, &[7; 900]);
                let out = rig.plane.test_run(hook, &sent, 1).unwrap();
                assert_eq!(out.verdict, REDIRECT);
                assert_eq!(rig.counted(Reason::NoEndpoint), nth as u64 + 1);
                unreachable_about(&f, &sent, &out.packet);
            }
        }
    }
}

/// Takes an ICMP answer apart with etherparse.
fn unreachable_about(f: &Family, sent: &[u8], answer: &[u8]) {
    use etherparse::{
        Icmpv4Type, Icmpv6Type, NetSlice, SlicedPacket, TransportSlice, icmpv4, icmpv6,
    };
    assert_eq!(
        (&answer[..6], &answer[6..12]),
        (&sent[6..12], &sent[..6]),
        "MAC addresses exchanged"
    );
    let sliced = SlicedPacket::from_ethernet(answer).unwrap();
    let (from, to, about) = match (
        sliced.net.as_ref().unwrap(),
        sliced.transport.as_ref().unwrap(),
    ) {
        (NetSlice::Ipv4(ip), TransportSlice::Icmpv4(icmp)) => {
            let header = ip.header().to_header();
            assert_eq!(header.header_checksum, header.calc_header_checksum());
            assert_eq!(
                icmp.icmp_type(),
                Icmpv4Type::DestinationUnreachable(icmpv4::DestUnreachableHeader::Port)
            );
            let typed = icmp.icmp_type();
            assert_eq!(typed.calc_checksum(icmp.payload()), icmp.checksum());
            (
                IpAddr::from(header.source),
                IpAddr::from(header.destination),
                icmp.payload(),
            )
        }
        (NetSlice::Ipv6(ip), TransportSlice::Icmpv6(icmp)) => {
            let header = ip.header().to_header();
            assert_eq!(
                icmp.icmp_type(),
                Icmpv6Type::DestinationUnreachable(icmpv6::DestUnreachableCode::Port)
            );
            assert!(icmp.is_checksum_valid(header.source, header.destination));
            (
                IpAddr::from(header.source),
                IpAddr::from(header.destination),
                icmp.payload(),
            )
        }
        other => panic!("{other:?}"),
    };
    assert_eq!((from, to), (f.vip, f.client));
    assert_eq!(
        about,
        &sent[14..14 + about.len()],
        "the packet that it is about"
    );
    assert!(about.len() >= if f.vip.is_ipv4() { 28 } else { 48 });
}

#[test]
fn a_flood_is_not_answered_by_one() {
    if !kun_harness::require_root() {
        return;
    }
    for f in families() {
        let mut rig = Rig::new();
        rig.service(1, f.vip, 80, UDP, Scope::External);
        let sent = udp((f.stranger, 40000), (f.vip, 80));
        let began = Instant::now();
        let mut answered = 0;
        for _ in 0..1000 {
            let out = rig.plane.test_run(Hook::UplinkIngress, &sent, 1).unwrap();
            assert!([REDIRECT, SHOT].contains(&out.verdict));
            answered += u64::from(out.verdict == REDIRECT);
        }
        let cpus = std::thread::available_parallelism().unwrap().get() as u64;
        let even = began.elapsed().as_nanos() as u64 / Pace::EVERY_NS;
        assert!(answered >= Pace::BURST, "{answered} answers");
        assert!(
            answered <= cpus * (Pace::BURST + even + 1),
            "{answered} answers on {cpus} CPUs"
        );
        assert!(answered < 1000, "the pace was never met");
        assert_eq!(rig.counted(Reason::NoEndpoint), 1000);
    }
}

/// One client port, two services, one backend: neither flow may get the other's answers.
#[test]
fn two_services_before_one_backend_keep_their_flows_apart() {
    if !kun_harness::require_root() {
        return;
    }
    for f in families() {
        for proto in [UDP, TCP] {
            // The client itself as its only backend: likewise.
            for (backend, there, back) in [
                (f.backends[0], Hook::UplinkIngress, Hook::UplinkEgress),
                (f.backends[0], Hook::PodIngress, Hook::PodEgress),
                (f.client, Hook::PodIngress, Hook::PodIngress),
            ] {
                let mut rig = Rig::new();
                let ids = rig.backends(0, &[(backend, 8080)]);
                for service in 0..3 {
                    rig.service(service, f.vip, 80 + service as u16, proto, Scope::External);
                    rig.publish(service, ViewKind::Cluster, &ids);
                    rig.publish(service, ViewKind::Local, &ids);
                }
                let client = (f.client, 40000);
                let mut seen = Vec::new();
                // Twice: the second time each flow is known.
                for flags in [SYN, ACK] {
                    for service in 0..3 {
                        let vip = (f.vip, 80 + service);
                        let sent = packet(proto, client, vip, flags, b"request");
                        let sent = rig.plane.test_run(there, &sent, 1).unwrap();
                        let sent = read(&sent.packet);
                        assert_eq!(sent.dst, (backend, 8080));
                        seen.push(sent.src);
                    }
                }
                assert_eq!(seen[..3], seen[3..], "a flow keeps its port");
                assert_eq!(seen[0].1, client.1, "nothing is changed without need");
                assert!(seen[0] != seen[1] && seen[1] != seen[2] && seen[0] != seen[2]);
                for (service, at_backend) in (0..3).zip(&seen) {
                    let answer = packet(proto, (backend, 8080), *at_backend, ACK, b"answer");
                    let got = rig.plane.test_run(back, &answer, 1).unwrap();
                    let got = read(&got.packet);
                    assert_eq!((got.src, got.dst), ((f.vip, 80 + service), client));
                }
                assert_eq!(rig.counted(Reason::FlowTableFull), 0);
            }
        }
    }
}

#[test]
fn a_pod_reaches_itself_through_its_service() {
    if !kun_harness::require_root() {
        return;
    }
    for f in families() {
        let mut rig = simple(&f, UDP, Scope::Cluster);
        rig.backend(0, f.client, 8080, 1, 1);
        let sent = udp((f.client, 40000), (f.vip, 80));
        let out = rig.plane.test_run(Hook::PodIngress, &sent, 1).unwrap();
        assert_eq!(out.verdict, REDIRECT);
        let there = read(&out.packet);
        assert_eq!(
            (there.src, there.dst),
            ((f.hairpin, 40000), (f.client, 8080))
        );
        let macs = read(&sent).macs;
        assert_eq!(there.macs, (macs.1, macs.0), "back to where it came from");
        let out = rig
            .plane
            .test_run(Hook::PodIngress, &udp(there.dst, there.src), 1)
            .unwrap();
        assert_eq!(out.verdict, REDIRECT);
        let back = read(&out.packet);
        assert_eq!((back.src, back.dst), ((f.vip, 80), (f.client, 40000)));
    }
}

#[test]
fn a_flow_follows_its_backends_generation() {
    if !kun_harness::require_root() {
        return;
    }
    for f in families() {
        let mut rig = simple(&f, UDP, Scope::Cluster);
        rig.backends(1, &[(f.backends[1], 8080)]);
        let sent = udp((f.client, 40000), (f.vip, 80));
        let to = |rig: &Rig| {
            read(
                &rig.plane
                    .test_run(Hook::PodIngress, &sent, 1)
                    .unwrap()
                    .packet,
            )
            .dst
            .0
        };
        assert_eq!(to(&rig), f.backends[0]);
        // Another set, the old backend alive: the flow stays.
        rig.publish(1, ViewKind::Cluster, &[1]);
        assert_eq!(to(&rig), f.backends[0]);
        rig.backend(0, f.backends[0], 8080, state::DRAINING, 1);
        assert_eq!(to(&rig), f.backends[0]);
        // One store ends it: this flow's next packet goes elsewhere.
        rig.backend(0, f.backends[0], 8080, state::DEAD, 2);
        assert_eq!(to(&rig), f.backends[1]);
        // What the dead one still says is not given the service's address any more.
        let late = udp((f.backends[0], 8080), (f.client, 40000));
        assert_eq!(
            rig.plane
                .test_run(Hook::PodEgress, &late, 1)
                .unwrap()
                .packet,
            late
        );
        let answer = udp((f.backends[1], 8080), (f.client, 40000));
        let out = rig.plane.test_run(Hook::PodEgress, &answer, 1).unwrap();
        assert_eq!(read(&out.packet).src, (f.vip, 80));
    }
}

#[test]
fn affinity_holds_across_a_clients_flows() {
    if !kun_harness::require_root() {
        return;
    }
    for f in families() {
        let mut rig = Rig::new();
        let mut value = rig.service(1, f.vip, 80, UDP, Scope::Cluster);
        let ids = rig.backends(0, &f.backends.map(|b| (b, 8080)));
        rig.publish(1, ViewKind::Cluster, &ids);
        let to = |rig: &Rig, port| {
            let sent = udp((f.client, port), (f.vip, 80));
            read(
                &rig.plane
                    .test_run(Hook::PodIngress, &sent, 1)
                    .unwrap()
                    .packet,
            )
            .dst
            .0
        };
        let free: Vec<IpAddr> = (40000..40032).map(|port| to(&rig, port)).collect();
        assert!(
            f.backends.iter().all(|b| free.contains(b)),
            "without affinity both are used: {free:?}"
        );
        value.affinity_secs = 600;
        rig.plane
            .maps()
            .upsert_service(&key(f.vip, 80, UDP), &value)
            .unwrap();
        let held: Vec<IpAddr> = (41000..41032).map(|port| to(&rig, port)).collect();
        assert!(held.iter().all(|b| *b == held[0]), "{held:?}");
    }
}

#[test]
fn every_truncation_is_dropped_and_counted_or_passed_and_never_rewritten() {
    if !kun_harness::require_root() {
        return;
    }
    for f in families() {
        for proto in [UDP, TCP] {
            let rig = simple(&f, proto, Scope::External);
            let whole = packet(proto, (f.client, 40000), (f.vip, 80), SYN, b"");
            // The kernel's test run wants an Ethernet header at least.
            for length in 14..whole.len() {
                let cut = &whole[..length];
                for hook in Hook::ALL {
                    let before = rig.counted(Reason::Malformed);
                    // The kernel itself refuses to run what is shorter than its IP header.
                    let Ok(out) = rig.plane.test_run(hook, cut, 1) else {
                        continue;
                    };
                    let judged = matches!(hook, Hook::PodIngress | Hook::UplinkIngress);
                    assert_eq!(
                        out.verdict,
                        if judged { SHOT } else { PASS },
                        "{hook:?} {length}"
                    );
                    assert_eq!(out.packet, cut);
                    assert_eq!(rig.counted(Reason::Malformed), before + u64::from(judged));
                }
            }
        }
    }
}

#[test]
fn ipv4_options_are_stepped_over_and_fragments_are_not_translated() {
    if !kun_harness::require_root() {
        return;
    }
    let [f, _] = families();
    let rig = simple(&f, UDP, Scope::Cluster);
    let plain = udp((f.client, 40000), (f.vip, 80));
    // Two words of "no operation" (RFC 791): IHL 7, length + 8.
    let mut long = plain[..34].to_vec();
    long[14] = 0x47;
    let total = u16::from_be_bytes([long[16], long[17]]) + 8;
    long[16..18].copy_from_slice(&total.to_be_bytes());
    long.extend([1; 8]);
    long.extend(&plain[34..]);
    let sum = etherparse::Ipv4Header::from_slice(&long[14..])
        .unwrap()
        .0
        .calc_header_checksum();
    long[24..26].copy_from_slice(&sum.to_be_bytes());
    let out = rig.plane.test_run(Hook::PodIngress, &long, 1).unwrap();
    let got = read(&out.packet);
    assert_eq!((out.verdict, got.dst), (PASS, (f.backends[0], 8080)));

    let mut first = plain.clone();
    first[20] = 0x20;
    let out = rig.plane.test_run(Hook::PodIngress, &first, 1).unwrap();
    assert_eq!((out.verdict, rig.counted(Reason::Fragment)), (SHOT, 1));
    let mut later = plain;
    later[21] = 0x10;
    let out = rig.plane.test_run(Hook::PodIngress, &later, 1).unwrap();
    assert_eq!((out.verdict, out.packet), (PASS, later));
}

#[test]
fn udp_without_a_checksum_stays_without() {
    if !kun_harness::require_root() {
        return;
    }
    let [f, _] = families();
    let rig = simple(&f, UDP, Scope::Cluster);
    let mut sent = udp((f.client, 40000), (f.vip, 80));
    sent[40..42].fill(0);
    let out = rig.plane.test_run(Hook::PodIngress, &sent, 1).unwrap();
    assert_eq!(out.packet[40..42], [0, 0]);
    assert_eq!(out.packet[30..34], [10, 0, 1, 1]);
}

#[test]
fn a_full_flow_table_stops_nobody() {
    if !kun_harness::require_root() {
        return;
    }
    for f in families() {
        let mut rig = Rig::with(256, "/nonexistent".into());
        rig.service(1, f.vip, 80, UDP, Scope::Cluster);
        let ids = rig.backends(0, &f.backends.map(|b| (b, 8080)));
        rig.publish(1, ViewKind::Cluster, &ids);
        let there = |rig: &Rig, port: u16| {
            let out = rig
                .plane
                .test_run(Hook::PodIngress, &udp((f.client, port), (f.vip, 80)), 1)
                .unwrap();
            assert_eq!(out.verdict, PASS);
            read(&out.packet)
        };
        let first = there(&rig, 1000).dst;
        // Eight times as many flows as there is room for: each works at once, both ways.
        for port in 1001..2024 {
            let sent = there(&rig, port);
            let out = rig
                .plane
                .test_run(Hook::PodEgress, &udp(sent.dst, sent.src), 1)
                .unwrap();
            assert_eq!(read(&out.packet).src, (f.vip, 80), "flow {port}");
        }
        // The forgotten first one finds its backend again, and its answers are translated.
        assert_eq!(there(&rig, 1000).dst, first);
        let out = rig
            .plane
            .test_run(Hook::PodEgress, &udp(first, (f.client, 1000)), 1)
            .unwrap();
        assert_eq!(read(&out.packet).src, (f.vip, 80));
        assert_eq!(rig.counted(Reason::FlowTableFull), 0);
    }
}

#[test]
fn idle_flows_expire_and_live_ones_stay() {
    if !kun_harness::require_root() {
        return;
    }
    let idle = Duration::from_secs(30);
    for f in families() {
        let mut rig = simple(&f, UDP, Scope::External);
        rig.service(2, f.vip, 443, TCP, Scope::External);
        rig.publish(2, ViewKind::Cluster, &[0]);
        let start = boot_time();
        for (proto, port, flags) in [(UDP, 80, 0), (TCP, 443, SYN)] {
            rig.plane
                .test_run(
                    Hook::PodIngress,
                    &packet(proto, (f.client, 40000), (f.vip, port), flags, b""),
                    1,
                )
                .unwrap();
        }
        let maps = rig.plane.maps();
        let expired = maps.expire_flows(start, idle).unwrap();
        assert_eq!((expired.live, expired.removed), (4, 0));
        // The UDP flow's two records go, the open TCP connection's stay.
        let later = boot_time() + idle.as_nanos() as u64;
        let expired = maps.expire_flows(later, idle).unwrap();
        assert_eq!((expired.live, expired.removed), (2, 2));
        // An ended connection is kept no longer than that.
        rig.plane
            .test_run(
                Hook::PodIngress,
                &packet(TCP, (f.client, 40000), (f.vip, 443), FIN | ACK, b""),
                1,
            )
            .unwrap();
        let later = boot_time() + idle.as_nanos() as u64;
        let expired = rig.plane.maps().expire_flows(later, idle).unwrap();
        assert_eq!((expired.live, expired.removed), (0, 2));
        // A dead backend's flows go at once.
        rig.plane
            .test_run(Hook::PodIngress, &udp((f.client, 40000), (f.vip, 80)), 1)
            .unwrap();
        rig.backend(0, f.backends[0], 8080, state::DEAD, 2);
        let expired = rig.plane.maps().expire_flows(boot_time(), idle).unwrap();
        assert_eq!((expired.live, expired.removed), (0, 2));
    }
}

fn boot_time() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

#[test]
fn the_next_agent_finds_flows_services_and_backends() {
    if !kun_harness::require_root() {
        return;
    }
    for f in families() {
        let mut rig = simple(&f, UDP, Scope::Cluster);
        rig.backends(1, &[(f.backends[1], 8080)]);
        let sent = udp((f.client, 40000), (f.vip, 80));
        rig.plane.test_run(Hook::PodIngress, &sent, 1).unwrap();
        rig.publish(1, ViewKind::Cluster, &[1]);
        let (mut rig, adopted) = rig.restart();
        assert_eq!(adopted.maps, 10);
        let out = rig.plane.test_run(Hook::PodIngress, &sent, 1).unwrap();
        assert_eq!(read(&out.packet).dst.0, f.backends[0], "the flow goes on");
        let maps = rig.plane.maps();
        assert_eq!(maps.services().unwrap().len(), 1);
        let view = maps.view(1, ViewKind::Cluster).unwrap();
        assert_eq!((view.count, view.epoch), (1, 2));
        assert_eq!(maps.slots(view.base, view.count).unwrap(), [1]);
        assert_eq!(maps.backend(1).unwrap().addr, addr(f.backends[1]));
    }
}

#[test]
fn foreign_pins_and_missing_bpffs_are_named() {
    if !kun_harness::require_root() {
        return;
    }
    let rig = Rig::new();
    let config = rig.config().clone();
    // Another capacity is told, and kept.
    let larger = ServiceConfig {
        max_flows: 2048,
        ..config.clone()
    };
    drop(rig.plane);
    let (plane, adopted) = ServiceDataplane::open(&larger).unwrap();
    let told: Vec<_> = adopted
        .capacities
        .iter()
        .map(|k| (k.map.as_str(), k.has, k.wanted))
        .collect();
    assert_eq!(
        told,
        [
            ("flows", 1024, 2048),
            ("affinity", 1024, 2048),
            ("peers", 1024, 2048)
        ]
    );
    drop(plane);
    // Another layout is refused, with the file's name.
    let maps = config.bpffs_root.join("v1/service/maps");
    std::fs::remove_file(maps.join("services")).unwrap();
    std::fs::rename(maps.join("backends"), maps.join("services")).unwrap();
    let fault = ServiceDataplane::open(&config).unwrap_err().to_string();
    assert!(
        fault.contains("v1/service/maps/services: pinned map has type 2, key 4 and value 32"),
        "{fault}"
    );
    // No bpffs.
    let plain = tempfile::tempdir().unwrap();
    let nowhere = ServiceConfig {
        bpffs_root: plain.path().join("bpf"),
        ..config
    };
    let fault = ServiceDataplane::open(&nowhere).unwrap_err().to_string();
    assert!(fault.contains("mount -t bpf bpf"), "{fault}");
    // Unless it may make one.
    let made = ServiceConfig {
        mount_bpffs: true,
        ..nowhere
    };
    drop(ServiceDataplane::open(&made).unwrap());
    ServiceDataplane::remove(&made.bpffs_root, &[]).unwrap();
    let left = made.bpffs_root.join("v1").exists();
    rustix::mount::unmount(&made.bpffs_root, rustix::mount::UnmountFlags::DETACH).unwrap();
    assert!(!left, "nothing of ours is left");
}

#[test]
fn what_does_not_fit_is_refused_with_the_limit() {
    if !kun_harness::require_root() {
        return;
    }
    let mut rig = Rig::new();
    let maps = rig.plane.maps();
    let view = kun_ebpf_abi::service::View::default();
    let capacities = maps.capacities();
    for fault in [
        maps.publish(capacities.services, ViewKind::Cluster, view)
            .unwrap_err(),
        maps.write_slots(capacities.slots - 1, &[0, 0]).unwrap_err(),
        maps.write_backend(capacities.backends, &Default::default())
            .unwrap_err(),
    ] {
        assert!(
            matches!(fault, kun_ebpf_loader::Error::Capacity { .. }),
            "{fault}"
        );
    }
    maps.grace().unwrap();
}

/// A backend goes on answering a client that is gone: to whoever has its address next these are no answers of the service.
#[test]
fn flows_of_an_address_are_forgotten_and_no_others() {
    if !kun_harness::require_root() {
        return;
    }
    for f in families() {
        let mut rig = Rig::new();
        rig.service(3, f.vip, 53, UDP, Scope::Cluster);
        let ids = rig.backends(0, &[(f.backends[0], 5353)]);
        rig.publish(3, ViewKind::Cluster, &ids);
        let (backend, vip) = ((f.backends[0], 5353), (f.vip, 53));
        let clients = [(f.client, 40000), (f.stranger, 40000)];
        for client in clients {
            let out = rig.plane.test_run(Hook::PodIngress, &udp(client, vip), 1);
            assert_eq!(read(&out.unwrap().packet).dst, backend);
        }
        let answered = |rig: &Rig, client: End| {
            let out = rig
                .plane
                .test_run(Hook::PodEgress, &udp(backend, client), 1);
            read(&out.unwrap().packet).src
        };
        for client in clients {
            assert_eq!(answered(&rig, client), vip);
        }
        let records = rig.plane.maps().flow_records().unwrap();
        assert_eq!(records.forget(&HashSet::new()).unwrap(), 0);
        // Both directions.
        assert_eq!(records.forget(&HashSet::from([addr(f.client)])).unwrap(), 2);
        assert_eq!(answered(&rig, clients[0]), backend, "as it was sent");
        assert_eq!(answered(&rig, clients[1]), vip);
        // As a backend, and as its own client.
        assert_eq!(
            records
                .forget(&HashSet::from([addr(f.backends[0])]))
                .unwrap(),
            2
        );
        let itself = udp((f.backends[0], 40000), vip);
        let out = rig.plane.test_run(Hook::PodIngress, &itself, 1).unwrap();
        assert_eq!(out.verdict, REDIRECT);
        assert_eq!(
            records
                .forget(&HashSet::from([addr(f.backends[0])]))
                .unwrap(),
            2
        );
    }
}
