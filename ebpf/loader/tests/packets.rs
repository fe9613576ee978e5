//! The packet programs, run by the kernel on one packet at a time (BPF_PROG_TEST_RUN), over both families.

mod rig;

use kun_ebpf_abi::reason::Reason;
use kun_ebpf_abi::service::{Scope, ViewKind};
use kun_ebpf_loader::Hook;
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
