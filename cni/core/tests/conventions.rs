//! What runtimes and pods ask for: every place, in its order, and the words for what is wrong.

#![allow(missing_docs)]

use std::collections::BTreeMap;

use kun_cni_core::spec::{NetworkConfig, Transport, Wishes};
use serde_json::{Value, json};

const ANNOTATIONS: &str = "io.kubernetes.cri.pod-annotations";

fn wishes(more: Value, args: &[(&str, &str)]) -> Result<Wishes, String> {
    let mut config = json!({"cniVersion": "1.1.0", "name": "kun", "type": "kun-cni"});
    for (key, value) in more.as_object().unwrap() {
        config[key] = value.clone();
    }
    let args: BTreeMap<String, String> = args
        .iter()
        .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
        .collect();
    NetworkConfig::parse(config.to_string().as_bytes())
        .unwrap()
        .wishes(&args)
        .map_err(|e| e.to_string())
}

fn runtime(value: Value) -> Result<Wishes, String> {
    wishes(json!({"runtimeConfig": value}), &[])
}

#[test]
fn the_annotation_beats_args_and_args_beat_the_environment() {
    let env = [
        ("KUN_NETWORK_IPV4", "true"),
        ("IP", "10.0.0.3/24"),
        ("MAC", "02:00:00:00:00:03"),
    ];
    let mut more = json!({});
    let of = |more: &Value| wishes(more.clone(), &env).unwrap();
    let ips = |w: &Wishes| w.ips.iter().map(ToString::to_string).collect::<Vec<_>>();
    let found = of(&more);
    assert_eq!(found.ipv4, Some(true));
    assert_eq!(ips(&found), ["10.0.0.3"]);
    assert_eq!(found.mac.unwrap().to_string(), "02:00:00:00:00:03");
    more["args"] = json!({"cni": {
        "kun.network/ipv4": false,
        "ips": ["10.0.0.2"],
        "mac": "02-00-00-00-00-02",
        "labels": [{"key": "app", "value": "a"}],
    }});
    let found = of(&more);
    assert_eq!(found.ipv4, Some(false));
    assert_eq!(ips(&found), ["10.0.0.2"]);
    assert_eq!(found.mac.unwrap().to_string(), "02:00:00:00:00:02");
    more["runtimeConfig"] = json!({ANNOTATIONS: {
        "kun.network/ipv4": "true", "kun.network/ips": "10.0.0.9, fd00::9", "other": "x",
    }});
    let found = of(&more);
    assert_eq!(found.ipv4, Some(true));
    assert_eq!(ips(&found), ["10.0.0.9", "fd00::9"]);
    more["runtimeConfig"]["ips"] = json!(["fd00::1/64"]);
    more["runtimeConfig"]["mac"] = json!("02:00:00:00:00:01");
    let found = of(&more);
    assert_eq!(ips(&found), ["fd00::1"]);
    assert_eq!(found.mac.unwrap().to_string(), "02:00:00:00:00:01");
}

#[test]
fn limits_and_host_ports_become_types() {
    let found = runtime(json!({
        "bandwidth": {"ingressRate": 2000, "ingressBurst": 2_147_483_647_u32, "egressRate": 0},
        "portMappings": [
            {"hostPort": 8080, "containerPort": 80, "protocol": "TCP", "hostIP": ""},
            {"hostPort": 8080, "containerPort": 53, "protocol": "udp", "hostIP": "::"},
            {"hostPort": 8081, "containerPort": 81},
        ],
        ANNOTATIONS: {
            // The capability beats the annotation of its direction.
            "kubernetes.io/ingress-bandwidth": "1G",
            "kubernetes.io/egress-bandwidth": "1.5M",
        },
        "aliases": ["a"],
        "cgroupPath": "/x",
    }))
    .unwrap();
    let ingress = found.ingress.unwrap();
    assert_eq!(
        (ingress.rate.get(), ingress.burst.map(u64::from)),
        (2000, Some(2_147_483_647))
    );
    let egress = found.egress.unwrap();
    assert_eq!((egress.rate.get(), egress.burst), (1_500_000, None));
    let ports: Vec<_> = found
        .ports
        .iter()
        .map(|p| {
            let ip = p.host_ip.map(|ip| ip.to_string());
            (p.host_port.get(), p.container_port.get(), p.protocol, ip)
        })
        .collect();
    assert_eq!(
        ports,
        [
            (8080, 80, Transport::Tcp, None),
            (8080, 53, Transport::Udp, Some("::".to_owned())),
            (8081, 81, Transport::Tcp, None),
        ]
    );
    assert!(found.needs_agent());
    assert!(!runtime(json!({"portMappings": []})).unwrap().needs_agent());
}

/// go-cni 1.1.14 marshals structures without tags, and every Go plugin reads them: names differ in case, what is not given is empty.
#[test]
fn what_containerd_writes_is_read_as_what_the_conventions_say() {
    let found = runtime(json!({
        "bandwidth": {"IngressRate": 2000, "IngressBurst": u32::MAX, "EgressRate": 0, "EgressBurst": 0},
        "portMappings": [{"HostPort": 8080, "ContainerPort": 80, "Protocol": "udp", "HostIP": ""}],
        "dns": {"Servers": ["fd00::a", "fe80::1%eth0"], "Searches": ["a.b"], "Options": null},
        "ipRanges": [[{"Subnet": "10.0.0.0/8", "RangeStart": "", "RangeEnd": "10.0.0.9", "Gateway": ""}]],
    }))
    .unwrap();
    let told = runtime(json!({
        "bandwidth": {"ingressRate": 2000, "ingressBurst": u32::MAX},
        "portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "udp"}],
        "dns": {"servers": ["fd00::a", "fe80::1%eth0"], "searches": ["a.b"]},
        "ipRanges": [[{"subnet": "10.0.0.0/8", "rangeEnd": "10.0.0.9"}]],
    }))
    .unwrap();
    assert_eq!(found, told);
    assert_eq!(found.ports[0].host_port.get(), 8080);
    assert_eq!(found.ingress.unwrap().rate.get(), 2000);
    assert_eq!(found.dns.unwrap()["nameservers"][0], "fd00::a");
    // Of two spellings the conventions' is the one that counts.
    let found = runtime(json!({
        "portMappings": [{"HostPort": 1, "hostPort": 2, "containerPort": 80}],
    }));
    assert_eq!(found.unwrap().ports[0].host_port.get(), 2);
    let error = runtime(json!({"portMappings": [{"HostPort": 99999, "ContainerPort": 80}]}));
    assert!(
        error
            .unwrap_err()
            .contains("portMappings[0].hostPort: 99999")
    );
}

#[test]
fn quantities_are_kubernetes_own() {
    for (text, bits) in [
        ("1500", 1500_u64),
        ("10k", 10_000),
        ("10M", 10_000_000),
        ("2Ki", 2048),
        ("1e6", 1_000_000),
        ("1.5G", 1_500_000_000),
        ("0.5M", 500_000),
    ] {
        let found = runtime(json!({ANNOTATIONS: {"kubernetes.io/ingress-bandwidth": text}}));
        assert_eq!(found.unwrap().ingress.unwrap().rate.get(), bits, "{text}");
    }
    for text in ["", "M", "-1", "1m", "10 M", "1e40", "0", "10Mi5", "1.2.3"] {
        let found = runtime(json!({ANNOTATIONS: {"kubernetes.io/ingress-bandwidth": text}}));
        assert!(found.is_err(), "{text}");
    }
}

#[test]
fn dns_is_the_runtimes_else_the_configurations() {
    let conf = json!({"dns": {"nameservers": ["192.0.2.53"], "search": ["a"], "domain": "d"}});
    let found = wishes(conf.clone(), &[]).unwrap().dns.unwrap();
    assert_eq!(
        Value::Object(found),
        json!({"nameservers": ["192.0.2.53"], "search": ["a"], "domain": "d"})
    );
    let mut both = conf;
    both["runtimeConfig"] = json!({"dns": {"servers": ["2001:db8::53"], "searches": ["b"]}});
    let found = wishes(both, &[]).unwrap().dns.unwrap();
    assert_eq!(
        Value::Object(found),
        json!({"nameservers": ["2001:db8::53"], "search": ["b"]})
    );
    // An empty one is one: it takes the configuration's away.
    assert_eq!(
        wishes(json!({"dns": {}}), &[]).unwrap().dns.unwrap().len(),
        0
    );
    assert_eq!(wishes(json!({}), &[]).unwrap().dns, None);
}

#[test]
fn ranges_are_whole_subnets_or_parts_of_them() {
    let found = runtime(json!({"ipRanges": [
        [{"subnet": "10.64.0.0/26"}, {"subnet": "10.64.1.0/24", "rangeStart": "10.64.1.7", "rangeEnd": "10.64.1.9"}],
        [{"subnet": "fd00:64::a40:0/122"}],
        [],
    ]}))
    .unwrap();
    let shown: Vec<Vec<String>> = found
        .ranges
        .iter()
        .map(|set| {
            set.iter()
                .map(|r| format!("{}-{}", r.first, r.last))
                .collect()
        })
        .collect();
    assert_eq!(
        shown,
        [
            vec![
                "10.64.0.0-10.64.0.63".to_owned(),
                "10.64.1.7-10.64.1.9".to_owned()
            ],
            vec!["fd00:64::a40:0-fd00:64::a40:3f".to_owned()],
        ]
    );
}

/// Golden: an error says where, what it is, and what would be right.
#[test]
fn what_is_wrong_is_told_with_its_path() {
    let table = [
        (json!([]), "runtimeConfig: [] is wrong; it is an object"),
        (
            json!({ANNOTATIONS: {"kun.network/ipv4": "yes"}}),
            "runtimeConfig.\"io.kubernetes.cri.pod-annotations\".\"kun.network/ipv4\": \"yes\" is wrong; it is \"true\" or \"false\"",
        ),
        (
            json!({ANNOTATIONS: {"x": 1}}),
            "runtimeConfig.\"io.kubernetes.cri.pod-annotations\".\"x\": 1 is wrong; an annotation is text",
        ),
        (
            json!({ANNOTATIONS: {"kun.network/ips": "10.0.0.1,10.0.0.2"}}),
            "runtimeConfig.\"io.kubernetes.cri.pod-annotations\".\"kun.network/ips\": \"10.0.0.1, 10.0.0.2\" is wrong; a pod has one address of each family",
        ),
        (
            json!({ANNOTATIONS: {"kubernetes.io/egress-bandwidth": "fast"}}),
            "runtimeConfig.\"io.kubernetes.cri.pod-annotations\".\"kubernetes.io/egress-bandwidth\": \"fast\" is wrong; it is bits a second as a quantity, as \"10M\"",
        ),
        (
            json!({"ips": "10.0.0.1"}),
            "runtimeConfig.ips: \"10.0.0.1\" is wrong; it is a list",
        ),
        (
            json!({"ips": ["10.0.0"]}),
            "runtimeConfig.ips[0]: \"10.0.0\" is wrong; it is an address, as \"fd00::a40:9\"",
        ),
        (
            json!({"mac": "01:00:5e:00:00:01"}),
            "runtimeConfig.mac: \"01:00:5e:00:00:01\" is wrong; it is a unicast hardware address, as \"02:00:00:00:00:01\"",
        ),
        (
            json!({"bandwidth": {"ingressRate": "fast"}}),
            "runtimeConfig.bandwidth.ingressRate: \"fast\" is wrong; it is a number of bits",
        ),
        (
            json!({"bandwidth": {"ingressRate": 10}}),
            "runtimeConfig.bandwidth.ingressRate: 10 is wrong; it is between 1 kbit/s and 1 Pbit/s",
        ),
        (
            json!({"bandwidth": {"egressBurst": 5}}),
            "runtimeConfig.bandwidth.egressBurst: 5 is wrong; a burst needs a rate",
        ),
        (
            json!({"portMappings": [{"hostPort": 0, "containerPort": 80}]}),
            "runtimeConfig.portMappings[0].hostPort: 0 is wrong; it is a port, 1 to 65535",
        ),
        (
            json!({"portMappings": [{"hostPort": 80}]}),
            "runtimeConfig.portMappings[0].containerPort: missing; it is a port, 1 to 65535",
        ),
        (
            json!({"portMappings": [{"hostPort": 80, "containerPort": 80, "protocol": "icmp"}]}),
            "runtimeConfig.portMappings[0].protocol: \"icmp\" is wrong; it is tcp, udp or sctp",
        ),
        (
            json!({"portMappings": [{"hostPort": 80, "containerPort": 80, "hostIP": "node"}]}),
            "runtimeConfig.portMappings[0].hostIP: \"node\" is wrong; it is an address, as \"fd00::a40:9\"",
        ),
        (
            json!({"portMappings": [{"hostPort": 80, "containerPort": 80}, {"hostPort": 80, "containerPort": 81}]}),
            "runtimeConfig.portMappings[1]: {\"containerPort\":81,\"hostPort\":80} is wrong; each host port is mapped once",
        ),
        (
            json!({"ipRanges": [{}]}),
            "runtimeConfig.ipRanges[0]: {} is wrong; it is a list of lists of {\"subnet\", \"rangeStart\", \"rangeEnd\"}",
        ),
        (
            json!({"ipRanges": [[{"subnet": "10.0.0.1/24"}]]}),
            "runtimeConfig.ipRanges[0][0].subnet: \"10.0.0.1/24\" is wrong; its host bits are zero",
        ),
        (
            json!({"ipRanges": [[{"subnet": "10.0.0.0/24", "rangeEnd": "10.0.1.1"}]]}),
            "runtimeConfig.ipRanges[0][0].rangeEnd: \"10.0.1.1\" is wrong; it lies in the subnet",
        ),
        (
            json!({"ipRanges": [[{"subnet": "10.0.0.0/24", "gateway": "10.0.0.1"}]]}),
            "runtimeConfig.ipRanges[0][0].gateway: not supported; a pod's next hop is link-local: leave it out",
        ),
        (
            json!({"ipRanges": [[{"subnet": "10.0.0.0/24"}], [{"subnet": "10.1.0.0/24"}]]}),
            "runtimeConfig.ipRanges: [[{\"subnet\":\"10.0.0.0/24\"}],[{\"subnet\":\"10.1.0.0/24\"}]] is wrong; a pod has one address of each family: one set for IPv4, one for IPv6",
        ),
        (
            json!({"deviceID": "0000:00:1f.6"}),
            "runtimeConfig.deviceID: not supported; kun makes veth pairs: leave the capability out of its configuration",
        ),
        (
            json!({"dns": {"servers": ["ns"]}}),
            "runtimeConfig.dns.servers[0]: \"ns\" is wrong; it is an address",
        ),
    ];
    for (config, message) in table {
        assert_eq!(runtime(config).unwrap_err(), message);
    }
    type Arguments = &'static [(&'static str, &'static str)];
    let table: [(Value, Arguments, &str); 5] = [
        (
            json!({}),
            &[("FOO", "1"), ("BAR", "2")],
            "CNI_ARGS: \"BAR, FOO\" is wrong; kun does not know these keys; IgnoreUnknown=1 lets them pass",
        ),
        (
            json!({}),
            &[("IgnoreUnknown", "maybe")],
            "CNI_ARGS IgnoreUnknown: \"maybe\" is wrong; it is 1 or 0",
        ),
        (
            json!({}),
            &[("IP", "10.0.0.256")],
            "CNI_ARGS IP: \"10.0.0.256\" is wrong; it is an address, as \"fd00::a40:9\"",
        ),
        (
            json!({"args": {"cni": {"labels": [{"key": "a"}]}}}),
            &[],
            "args.cni.labels[0]: {\"key\":\"a\"} is wrong; it is {\"key\", \"value\"}",
        ),
        (
            json!({"args": {"cni": []}}),
            &[],
            "args.cni: [] is wrong; it is an object",
        ),
    ];
    for (config, args, message) in table {
        assert_eq!(wishes(config, args).unwrap_err(), message);
    }
    assert!(wishes(json!({}), &[("FOO", "1"), ("IgnoreUnknown", "true")]).is_ok());
}
