//! The speaker against GoBGP, over real TCP between network namespaces: what its table holds, and what it keeps while the speaker is away.
//!
//! Less than against BIRD (`bird.rs`): what a second implementation can read differently, not every path again.

#![allow(missing_docs)]

#[allow(dead_code, reason = "bird.rs uses the rest")]
mod lab;

use std::collections::BTreeMap;
use std::process::{Command, Stdio};

use kun_bgp::{Community, StopMode};
use kun_harness::{Netns, Process, peers, require_root, veth, wait_for};
use serde_json::Value;
use tempfile::TempDir;

use lab::{Handle, NODE_ASN, SOON, blocks, config, routes, set};

const PAIR: [&str; 3] = ["10.1.0.64/26", "fd00::a01:40/122", "64:ff9b::/96"];

/// A router running gobgpd and a node, joined by a veth pair.
struct Router {
    netns: Netns,
    node: Netns,
    dir: TempDir,
    daemon: Option<Process>,
}

impl Router {
    /// `None`, recorded as a skip, where it cannot be had.
    fn new(over_v6: bool) -> Option<Self> {
        if !require_root() {
            return None;
        }
        peers::require("gobgpd")?;
        let (netns, node) = (Netns::new("tor").unwrap(), Netns::new("node").unwrap());
        veth(&netns, "down0", &node, "up0").unwrap();
        for (netns, interface, n) in [(&netns, "down0", 1), (&node, "up0", 2)] {
            for address in [format!("192.0.2.{n}/24"), format!("2001:db8::{n}/64")] {
                netns
                    .exec(&format!("addr add {address} dev {interface}"))
                    .unwrap();
            }
        }
        let dir = tempfile::tempdir().unwrap();
        let neighbor = if over_v6 { "2001:db8::2" } else { "192.0.2.2" };
        let family = |name: &str| {
            format!(
                "[[neighbors.afi-safis]]\n[neighbors.afi-safis.config]\nafi-safi-name = \"{name}\"\n\
                 [neighbors.afi-safis.mp-graceful-restart.config]\nenabled = true\n"
            )
        };
        let text = format!(
            "[global.config]\nas = 64512\nrouter-id = \"192.0.2.1\"\n[[neighbors]]\n[neighbors.config]\n\
             neighbor-address = \"{neighbor}\"\npeer-as = {NODE_ASN}\n[neighbors.timers.config]\nhold-time = 9\n\
             [neighbors.transport.config]\npassive-mode = true\n[neighbors.graceful-restart.config]\nenabled = true\nrestart-time = 60\n{}{}",
            family("ipv4-unicast"),
            family("ipv6-unicast")
        );
        std::fs::write(dir.path().join("gobgpd.toml"), text).unwrap();
        let mut router = Self {
            netns,
            node,
            dir,
            daemon: None,
        };
        router.start(false);
        Some(router)
    }

    /// Starts gobgpd and waits until it answers.
    fn start(&mut self, restarted: bool) {
        let log = std::fs::File::create(self.dir.path().join("gobgpd.log")).unwrap();
        let mut command = Command::new(peers::path("gobgpd"));
        command
            .arg("--pprof-disable")
            .arg("--config-file")
            .arg(self.dir.path().join("gobgpd.toml"))
            .arg("--api-hosts")
            .arg(self.socket())
            .args(restarted.then_some("--graceful-restart"))
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        let _ = std::fs::remove_file(self.dir.path().join("api"));
        self.daemon = Some(self.netns.spawn(command).unwrap());
        wait_for("gobgpd answering", SOON, || {
            self.gobgp(&["neighbor"]).filter(|n| n != &Value::Null)
        })
        .unwrap_or_else(|e| {
            let log = std::fs::read_to_string(self.dir.path().join("gobgpd.log"));
            panic!("{e}: {}", log.unwrap_or_default())
        });
    }

    fn socket(&self) -> String {
        format!("unix://{}/api", self.dir.path().display())
    }

    /// What `gobgp` says, as JSON; `None` when it fails.
    fn gobgp(&self, words: &[&str]) -> Option<Value> {
        let output = Command::new(peers::path("gobgp"))
            .args(["--json", "--target", &self.socket()])
            .args(words)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        if !output.status.success() {
            return None;
        }
        match output.stdout.is_empty() {
            true => Some(Value::Null),
            false => serde_json::from_slice(&output.stdout).ok(),
        }
    }

    /// Its table: the one path of each prefix.
    fn table(&self) -> BTreeMap<String, Value> {
        let mut table = BTreeMap::new();
        for family in ["ipv4", "ipv6"] {
            let rib = self
                .gobgp(&["global", "rib", "-a", family])
                .unwrap_or_default();
            for (prefix, paths) in rib.as_object().into_iter().flatten() {
                let paths = paths.as_array().unwrap();
                assert_eq!(paths.len(), 1, "{prefix}: {paths:?}");
                table.insert(prefix.clone(), paths[0].clone());
            }
        }
        table
    }

    fn holds(&self, n: usize) -> BTreeMap<String, Value> {
        wait_for(&format!("gobgpd holding {n} routes"), SOON, || {
            Some(self.table()).filter(|table| table.len() == n)
        })
        .unwrap_or_else(|e| panic!("{e}; it holds {:#?}", self.table()))
    }

    fn is_established(&self) -> bool {
        let neighbors = self.gobgp(&["neighbor"]).unwrap_or_default();
        // SESSION_STATE_ESTABLISHED of its API.
        neighbors[0]["state"]["session_state"] == 6
    }
}

/// The value of a path attribute of this type.
fn attribute(path: &Value, kind: u64) -> &Value {
    let attributes = path["attrs"].as_array().unwrap();
    attributes
        .iter()
        .find(|a| a["type"] == kind)
        .unwrap_or(&Value::Null)
}

#[test]
fn both_families_over_either_transport_and_gone_when_withdrawn() {
    for over_v6 in [false, true] {
        let Some(router) = Router::new(over_v6) else {
            return;
        };
        router.node.run(|| {
            let node = Handle::start(&config(over_v6), false);
            node.announce(routes(PAIR));
            node.wait_established();
            let table = router.holds(3);
            for prefix in PAIR {
                let path = &table[prefix];
                // AS_PATH, then NEXT_HOP or the one in MP_REACH_NLRI (RFC 4271 §5.1.2, RFC 4760 §3).
                let segments = attribute(path, 2);
                assert_eq!(segments["as_paths"][0]["asns"][0], NODE_ASN, "{path:#}");
                let next_hop = match prefix.contains(':') {
                    true => attribute(path, 14),
                    false => attribute(path, 3),
                };
                let want = if prefix.contains(':') {
                    "2001:db8::2"
                } else {
                    "192.0.2.2"
                };
                assert_eq!(next_hop["nexthop"], want, "{path:#}");
            }
            assert_eq!(node.status().announced, 3);
            node.announce(routes(["10.1.0.64/26"]));
            let left = router.holds(1);
            assert!(left.contains_key("10.1.0.64/26"), "{left:#?}");
            // Draining marks, and does not withdraw (RFC 8326 §4.1).
            let draining = [Community::GRACEFUL_SHUTDOWN];
            node.announce(set(PAIR.map(|p| p.parse().unwrap()), draining));
            router.holds(3);
            wait_for("GRACEFUL_SHUTDOWN on every route", SOON, || {
                let table = router.table();
                let marked = |path: &Value| attribute(path, 8)["communities"][0] == 0xffff_0000_u32;
                table.values().all(marked).then_some(())
            })
            .unwrap_or_else(|e| panic!("{e}: {:#?}", router.table()));
            node.shutdown(StopMode::Withdraw);
            router.holds(0);
        });
    }
}

/// The process that the next test kills: a speaker with as many blocks as it is told.
#[test]
fn child() {
    let Ok(told) = std::env::var("KUN_BGP_TEST_CHILD") else {
        return;
    };
    let (count, restarted) = told.split_once(' ').unwrap();
    let node = Handle::start(&config(false), restarted == "true");
    node.announce(blocks(count.parse().unwrap()));
    loop {
        std::thread::park();
    }
}

fn child_process(router: &Router, count: u32, restarted: bool) -> Process {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "child", "--nocapture"])
        .env("KUN_BGP_TEST_CHILD", format!("{count} {restarted}"))
        .stdout(Stdio::null());
    router.node.spawn(command).unwrap()
}

#[test]
fn a_killed_speakers_routes_stay_until_it_is_back_and_no_longer() {
    const ROUTES: usize = 200;
    let Some(router) = Router::new(false) else {
        return;
    };
    let speaker = child_process(&router, ROUTES as u32, false);
    let before = router.holds(ROUTES);
    assert!(before.values().all(|path| path["stale"] != true));
    drop(speaker); // SIGKILL
    wait_for("gobgpd waiting for the restart", SOON, || {
        (!router.is_established()).then_some(())
    })
    .unwrap();
    let kept = router.holds(ROUTES);
    assert!(
        kept.values().all(|path| path["stale"] == true),
        "{:#?}",
        kept.first_key_value()
    );
    // Two fewer than before: at End-of-RIB those go, and the rest are fresh (RFC 4724 §4.2).
    let _speaker = child_process(&router, ROUTES as u32 - 2, true);
    let after = router.holds(ROUTES - 2);
    wait_for("no stale route", SOON, || {
        router
            .table()
            .values()
            .all(|path| path["stale"] != true)
            .then_some(())
    })
    .unwrap();
    assert!(after.keys().all(|prefix| before.contains_key(prefix)));
    assert!(router.is_established());
}

#[test]
fn a_restarted_router_gets_everything_again_and_gives_us_nothing() {
    let Some(mut router) = Router::new(false) else {
        return;
    };
    let node = router.node.run(|| {
        let node = Handle::start(&config(false), false);
        node.announce(routes(PAIR));
        node
    });
    router.holds(3);
    router.daemon = None; // SIGKILL
    wait_for("the session down", SOON, || {
        (node.status().state != "Established").then_some(())
    })
    .unwrap();
    router.start(true);
    router.holds(3);
    let before = router.node.exec("-4 route show table all").unwrap();
    router
        .gobgp(&["global", "rib", "-a", "ipv4", "add", "0.0.0.0/0"])
        .unwrap();
    wait_for("the offer counted", SOON, || {
        (node.status().ignored == 1).then_some(())
    })
    .unwrap_or_else(|e| panic!("{e}: {:?}", node.status()));
    assert_eq!(router.node.exec("-4 route show table all").unwrap(), before);
}
