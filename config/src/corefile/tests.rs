//! Corefiles whole: what parses, into what, and what is refused where.

use std::collections::BTreeMap;

use super::*;

#[derive(Default)]
struct Fake {
    env: BTreeMap<&'static str, &'static str>,
    files: BTreeMap<&'static str, &'static str>,
}

impl Surroundings for Fake {
    fn env(&self, name: &str) -> Option<String> {
        self.env.get(name).map(ToString::to_string)
    }
    fn import(&self, _: &str, pattern: &str) -> Result<Vec<(String, String)>, String> {
        let (head, tail) = pattern.split_once('*').unwrap_or((pattern, ""));
        let matches = |f: &str| {
            if pattern.contains('*') {
                f.starts_with(head) && f.ends_with(tail)
            } else {
                f == pattern
            }
        };
        Ok(self
            .files
            .iter()
            .filter(|(f, _)| matches(f))
            .map(|(f, t)| (f.to_string(), t.to_string()))
            .collect())
    }
}

fn parsed(text: &str) -> Corefile {
    parse("Corefile", text, &Alone).unwrap_or_else(|e| panic!("{e}\n{text}"))
}

fn refused(text: &str) -> String {
    match parse("Corefile", text, &Alone) {
        Ok(_) => panic!("accepted:\n{text}"),
        Err(e) => e.to_string(),
    }
}

fn chain(block: &ServerBlock) -> Vec<&'static str> {
    block.plugins.iter().map(Plugin::name).collect()
}

/// The Corefile that kubeadm installs.
const STOCK: &str = "
.:53 {
    errors
    health {
       lameduck 5s
    }
    ready
    kubernetes cluster.local in-addr.arpa ip6.arpa {
       pods insecure
       fallthrough in-addr.arpa ip6.arpa
       ttl 30
    }
    prometheus :9153
    forward . /etc/resolv.conf {
       max_concurrent 1000
    }
    cache 30 {
       disable success cluster.local
       disable denial cluster.local
    }
    loop
    reload
    loadbalance
}
";

#[test]
fn the_stock_corefile() {
    let c = parsed(STOCK);
    assert_eq!(
        chain(&c.servers[0]),
        [
            "reload",
            "ready",
            "health",
            "prometheus",
            "errors",
            "loadbalance",
            "cache",
            "kubernetes",
            "loop",
            "forward"
        ]
    );
    let Plugin::Kubernetes(k) = &c.servers[0].plugins[7] else {
        panic!()
    };
    assert_eq!(k.zones.len(), 3);
    assert_eq!((k.ttl, k.pods), (30, PodMode::Insecure));
    assert!(k.fallthrough.covers(b"\x011\x07in-addr\x04arpa\0"));
    assert!(!k.fallthrough.covers(b"\x07cluster\x05local\0"));
    let Plugin::Cache(cache) = &c.servers[0].plugins[6] else {
        panic!()
    };
    assert_eq!(cache.success.max_ttl.as_secs(), 30);
    assert_eq!(
        cache.disable_denial,
        [DnsName::parse("cluster.local").unwrap()]
    );
    let Plugin::Forward(f) = &c.servers[0].plugins[9] else {
        panic!()
    };
    assert_eq!(f.max_concurrent, Some(1000));
    assert_eq!(f.to, [ForwardTo::File("/etc/resolv.conf".into())]);
}

#[test]
fn keys_braces_and_commas() {
    assert_eq!(
        parsed("example.org\nwhoami").servers[0].plugins,
        [Plugin::Whoami],
        "one block may go without braces"
    );
    assert_eq!(
        parsed("a.org, \n b.org {\nwhoami\n}").servers[0]
            .zones
            .len(),
        2,
        "a trailing comma continues"
    );
    assert_eq!(parsed("a.org b.org {\nwhoami\n}").servers[0].zones.len(), 2);
    assert_eq!(parsed("a.org {\n}\nb.org {\n}").servers.len(), 2);
    assert_eq!(parsed("10.0.0.0/15 {\n}").servers[0].zones.len(), 2);
    assert!(
        refused("a.org, {\nwhoami\n}").contains("Corefile:1:1: { where another zone was expected")
    );
    assert!(refused("a.org {\nwhoami\n").contains("Corefile:2:1: unexpected end of file"));
    assert!(refused("a.org {\nwhoami\n}\n}").contains("Corefile:4:1: a brace in the zone \"}\""));
    assert!(refused("a.org{\nwhoami\n}").contains("Corefile:3:1: } without a matching {"));
    assert!(refused("a.org\nwhoami\n}").contains("Corefile:3:1: } without a matching {"));
    assert!(parse("Corefile", "", &Alone).unwrap().servers.is_empty());
}

#[test]
fn same_key_twice() {
    assert!(
        refused("a.org {\n}\na.org:53 {\n}")
            .contains("Corefile:3:1: dns://a.org.:53 is already served by the block on line 1")
    );
    assert_eq!(parsed("a.org {\n}\na.org:54 {\n}").servers.len(), 2);
    assert_eq!(
        parsed("a.org {\nbind 127.0.0.1\n}\na.org {\nbind ::1\n}")
            .servers
            .len(),
        2
    );
    assert!(refused("a.org {\nbind 127.0.0.1\n}\na.org {\n}").contains("already served"));
}

#[test]
fn snippets_and_imports() {
    let c = parsed("(s) {\nwhoami\nerrors\n}\n. {\nimport s\n}");
    assert_eq!(chain(&c.servers[0]), ["errors", "whoami"]);
    assert!(refused("(s) {\n}\n(s) {\n}").contains("Corefile:3:1: snippet (s) is declared twice"));
    assert!(refused("(s) {\nimport s\n}\n. {\nimport s\n}").contains("imports itself"));
    assert!(
        refused(". {\nimport s\n}\n(s) {\nwhoami\n}")
            .contains("neither a snippet declared above nor a file")
    );
    assert!(
        refused("(a) {\nimport b\n}\n(b) {\nimport a\n}\n. {\nimport a\n}")
            .contains("more than 10000 imports")
    );
    let f = Fake {
        files: BTreeMap::from([
            ("d/a.conf", "whoami"),
            ("d/b.conf", "errors"),
            ("zones", "a.org {\nwhoami\n}"),
            ("self", "import self"),
        ]),
        ..Fake::default()
    };
    let of = |text: &str| parse("Corefile", text, &f);
    assert_eq!(
        chain(&of(". {\nimport d/*.conf\n}").unwrap().servers[0]),
        ["errors", "whoami"]
    );
    assert_eq!(of("import zones\nb.org {\n}").unwrap().servers.len(), 2);
    let none = of(". {\nimport none/*\n}").unwrap();
    assert_eq!(none.warnings, ["Corefile:2: no file matches \"none/*\""]);
    assert!(
        of(". {\nimport gone\n}")
            .unwrap_err()
            .to_string()
            .contains("Corefile:2:1")
    );
    assert!(
        of(". {\nimport d/*/*\n}")
            .unwrap_err()
            .to_string()
            .contains("several wildcards")
    );
    assert!(
        of(". {\nimport self\n}")
            .unwrap_err()
            .to_string()
            .contains("10000")
    );
    assert!(
        of(". {\nimport\n}")
            .unwrap_err()
            .to_string()
            .contains("without an argument")
    );
    assert!(
        of(". {\nimport a b\n}")
            .unwrap_err()
            .to_string()
            .contains("one argument")
    );
}

#[test]
fn environment() {
    let f = Fake {
        env: BTreeMap::from([("PORT", "9253"), ("A", "a"), ("LOOP", "{$LOOP}")]),
        ..Fake::default()
    };
    let of = |text: &str| parse("Corefile", text, &f);
    assert_eq!(
        of(". {\nprometheus localhost:{$PORT}\n}").unwrap().servers[0].plugins,
        [Plugin::Prometheus("127.0.0.1:9253".parse().unwrap())]
    );
    assert_eq!(
        of("{$A}{%A%}.org:{%PORT%} {\n}").unwrap().servers[0].zones[0].to_string(),
        "dns://aa.org.:9253"
    );
    assert_eq!(
        of("x{$UNSET}y {\n}").unwrap().servers[0].zones[0].to_string(),
        "dns://xy.:53"
    );
    assert!(
        of("{$LOOP} {\n}")
            .unwrap_err()
            .to_string()
            .contains("more than 100 variables")
    );
    assert_eq!(
        of("a{$ {\n}").unwrap().servers[0].zones[0].to_string(),
        "dns://a{\\$.:53",
        "malformed ones stay"
    );
}

#[test]
fn refusals_name_file_line_and_reason() {
    for (text, want) in [
        (
            ". {\n  template ANY ANY\n}",
            "Corefile:2:1: template: known CoreDNS plugin, not supported yet; remove it",
        ),
        (
            ". {\n  forwrad . 8.8.8.8\n}",
            "Corefile:2:1: unknown plugin \"forwrad\"; did you mean \"forward\"?",
        ),
        (
            "tls://. {\n}",
            "Corefile:1:1: tls:// is a known CoreDNS transport, not supported yet; dns:// over UDP and TCP",
        ),
        (
            ". {\n\n  cache {\n    sucess 10\n  }\n}",
            "Corefile:4:1: cache.sucess: unknown option; an option that CoreDNS documents for this plugin",
        ),
        (
            ". {\n dns64 2001:db8::/72\n}",
            "Corefile:2:1: dns64: 2001:db8::/72: /72 is not a translation prefix length (32, 40, 48, 56, 64, 96); an IPv6 prefix like 64:ff9b::/96 (RFC 6052 §2.2)",
        ),
        (
            ". {\n bufsize 100\n}",
            "Corefile:2:1: bufsize: size \"100\"; 512 to 4096",
        ),
        (
            ". {\n kubernetes {\n  ttl 4000\n }\n}",
            "Corefile:3:1: kubernetes.ttl: \"4000\"; a number from 0 to 3600",
        ),
        (
            ". {\n kubernetes {\n  endpoint https://x\n }\n}",
            "Corefile:3:1: kubernetes.endpoint: known CoreDNS option, not supported yet; where cluster objects come from is said in kun.yaml, section cluster",
        ),
        (
            ". {\n whoami\n whoami\n}",
            "Corefile:3:1: whoami: stands twice in one block; once a block",
        ),
        (
            ". {\n forward .\n}",
            "Corefile:2:1: forward: no upstream; forward FROM TO…",
        ),
        (
            ". {\n log . \"{nope}\"\n}",
            "Corefile:2:1: log: unknown placeholder {nope} in the format; one that CoreDNS documents for log",
        ),
        (
            ". {\n bind lo\n}",
            "Corefile:2:1: bind: \"lo\" is not an address; names of interfaces are not supported yet; bind ADDRESS…",
        ),
    ] {
        assert_eq!(refused(text), want);
    }
}

#[test]
fn all_faults_at_once_in_order() {
    let faults = refused(". {\n bufsize 1\n any\n}\nexample.org {\n chaos x\n}");
    let lines: Vec<_> = faults
        .lines()
        .map(|l| l.split(": ").next().unwrap().to_owned())
        .collect();
    assert_eq!(lines, ["Corefile:2:1", "Corefile:3:1", "Corefile:6:1"]);
}

#[test]
fn options_of_the_serving_plugins() {
    let c = parsed(
        "example.org {
            cache 100 example.org {
                success 5000 200 7
                denial 0
                prefetch 3 2m 20%
                serve_stale 2h verify
                servfail 0
                keepttl
            }
            dns64 {
                prefix 64:ff9b::/96
                prefix 2001:db8:64::/48
                translate_all
                allow_ipv4
                exclude 2001:db8:1::/48
            }
            forward . 192.0.2.1 [2001:db8::1]:5353 dns://192.0.2.2:54 {
                except internal
                policy sequential
                health_check 2s no_rec domain example.net
                failover SERVFAIL REFUSED
                max_fails 0
                expire 20s
            }
            forward other.org 192.0.2.9
            hosts {
                192.0.2.7 a.example.org b.example.org
                ttl 60
                fallthrough
            }
            log example.net {
                class denial error
            }
            log
        }",
    );
    let mut seen = 0;
    for p in &c.servers[0].plugins {
        seen += 1;
        match p {
            Plugin::Cache(c) => {
                assert_eq!(
                    (
                        c.success.capacity,
                        c.success.max_ttl.as_secs(),
                        c.success.min_ttl.as_secs()
                    ),
                    (5000, 200, 7)
                );
                assert_eq!((c.denial.capacity, c.denial.max_ttl.as_secs()), (0, 100));
                assert_eq!(c.prefetch.unwrap().percentage, 20);
                assert!(c.serve_stale.unwrap().verify && c.keep_ttl && c.servfail.is_zero());
            }
            Plugin::Dns64(d) => {
                assert_eq!(d.prefixes.len(), 2);
                assert!(d.translate_all && d.allow_ipv4);
                assert_eq!(d.exclude, ["2001:db8:1::/48".parse().unwrap()]);
            }
            Plugin::Forward(f) if f.from[0] == DnsName::root() => {
                assert_eq!(f.to.len(), 3);
                assert_eq!(
                    (f.policy, f.max_fails, f.health_no_rec),
                    (Policy::Sequential, 0, true)
                );
                assert_eq!(f.failover, [2, 5]);
            }
            Plugin::Forward(f) => assert_eq!(f.from[0].to_string(), "other.org."),
            Plugin::Hosts(h) => assert_eq!(
                (h.inline[0].1.len(), h.ttl, h.fallthrough.0.len()),
                (2, 60, 1)
            ),
            Plugin::Log(rules) => {
                assert!(
                    !rules[0].classes.success
                        && rules[0].classes.denial
                        && rules[1].classes.success
                );
                assert_eq!(rules[1].names[0].to_string(), "example.org.");
            }
            other => panic!("{other}"),
        }
    }
    assert_eq!(seen, 6);
}
