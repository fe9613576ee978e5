//! The speaker against BIRD, over real TCP between network namespaces: what BIRD holds, what its kernel routes, and what our
//! status says when they disagree.

mod lab;

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use kun_bgp::{Community, StopMode};
use kun_harness::{wait_for, wait_until};

use lab::{BirdConfig, Handle, Lab, NODE_ASN, SOON, blocks, config, routes, set};

const PAIR: [&str; 3] = ["10.1.0.64/26", "fd00::a01:40/122", "64:ff9b::/96"];

fn holds(lab: &Lab, n: usize) {
    wait_for(&format!("BIRD holding {n} routes"), SOON, || {
        (lab.bird_holds() == n).then_some(())
    })
    .unwrap_or_else(|e| panic!("{e}; it holds {}", lab.bird_holds()));
}

#[test]
fn both_families_over_one_session_and_gone_when_withdrawn() {
    for over_v6 in [false, true] {
        let Some(lab) = Lab::new(&BirdConfig {
            over_v6,
            ..BirdConfig::default()
        }) else {
            return;
        };
        lab.with_speaker(config(over_v6), false, |node| {
            node.announce(routes(PAIR));
            node.wait_established();
            holds(&lab, 3);
            // BIRD tells its kernel a moment after its own table.
            let want = [
                "10.1.0.64/26 via 192.0.2.2 dev down0",
                "64:ff9b::/96 via 2001:db8::2 dev down0",
                "fd00::a01:40/122 via 2001:db8::2 dev down0",
            ];
            wait_for("the router's kernel", SOON, || {
                let have = lab.kernel_routes();
                want.iter()
                    .all(|w| have.iter().any(|h| h.starts_with(w)))
                    .then_some(())
            })
            .unwrap_or_else(|e| panic!("{e}: {:#?}", lab.kernel_routes()));
            let status = node.status();
            assert_eq!((status.announced, status.condition), (3, None));

            node.announce(routes(["10.1.0.64/26"]));
            holds(&lab, 1);
            wait_for("the router's kernel", SOON, || {
                (lab.kernel_routes().len() == 1).then_some(())
            })
            .unwrap();
            assert_eq!(node.status().announced, 1);
        });
    }
}

#[test]
fn nothing_opens_before_the_first_route_set() {
    let Some(lab) = Lab::new(&BirdConfig {
        passive: false,
        ..BirdConfig::default()
    }) else {
        return;
    };
    let listening = kun_config::Bgp {
        listen: Some("192.0.2.2:179".parse().unwrap()),
        ..config(false)
    };
    lab.with_speaker(listening, false, |node| {
        // BIRD dials and is turned away; the session may stand only after the announcement.
        let up = wait_until(Duration::from_secs(3), || {
            lab.birdc("show protocols node").contains("Established")
        });
        assert!(!up, "{}", lab.birdc("show protocols node"));
        assert_eq!(node.status().state, "Idle");
        node.announce(routes(PAIR));
        holds(&lab, 3);
    });
}

#[test]
fn the_router_dials_and_collisions_leave_one_session() {
    for over_v6 in [false, true] {
        let Some(lab) = Lab::new(&BirdConfig {
            passive: false,
            over_v6,
            ..BirdConfig::default()
        }) else {
            return;
        };
        let listening = kun_config::Bgp {
            listen: Some("[::]:179".parse().unwrap()),
            ..config(over_v6)
        };
        lab.with_speaker(listening.clone(), false, |node| {
            node.announce(routes(PAIR));
            holds(&lab, 3);
        });
        // The node cannot dial: every session is the router's.
        let mut deaf = listening;
        deaf.peers[0].port = 1;
        lab.with_speaker(deaf, false, |node| {
            node.announce(routes(PAIR));
            node.wait_established();
            holds(&lab, 3);
        });
    }
}

#[test]
fn a_restarted_router_gets_everything_again() {
    let bird = BirdConfig::default();
    let Some(mut lab) = Lab::new(&bird) else {
        return;
    };
    let node = lab.node.run(|| {
        let node = Handle::start(&config(false), false);
        node.announce(routes(PAIR));
        node
    });
    holds(&lab, 3);
    lab.kill_bird();
    wait_for("the session down", SOON, || {
        (node.status().state != "Established").then_some(())
    })
    .unwrap();
    assert_eq!(node.status().announced, 0);
    assert!(node.status().last_error.is_some(), "{:?}", node.status());
    lab.start_bird(&bird);
    holds(&lab, 3);
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

fn child_process(lab: &Lab, count: u32, restarted: bool) -> kun_harness::Process {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "child", "--nocapture"])
        .env("KUN_BGP_TEST_CHILD", format!("{count} {restarted}"));
    command.stdout(Stdio::null());
    lab.node.spawn(command).unwrap()
}

/// Everything that the router's kernel says about its routes, from the moment this is made.
struct Monitor {
    file: PathBuf,
    _process: kun_harness::Process,
}

impl Monitor {
    /// A route that BIRD has nothing to do with: seen in the events, it proves that all before it were seen.
    const MARK: &str = "203.0.113.";

    fn start(lab: &Lab) -> Self {
        let file = lab.dir.path().join("events");
        let mut ip = Command::new("ip");
        // Room for every event of every route, twice: a lost event would be a lost proof.
        ip.args(["-rcvbuf", "67108864", "monitor", "route"]);
        ip.stdout(std::fs::File::create(&file).unwrap());
        let process = lab.tor.spawn(ip).unwrap();
        let monitor = Self {
            file,
            _process: process,
        };
        monitor.mark(lab, 1);
        monitor
    }

    /// Waits until all events up to now are in, and gives them.
    fn mark(&self, lab: &Lab, n: u8) -> String {
        let mark = format!("{}{n}", Self::MARK);
        wait_for("a route event", SOON, || {
            // Until the monitor listens, its first marks go unheard.
            lab.tor
                .exec(&format!("route replace blackhole {mark}/32"))
                .unwrap();
            lab.tor
                .exec(&format!("route del blackhole {mark}/32"))
                .unwrap();
            let seen = std::fs::read_to_string(&self.file).unwrap();
            seen.contains(&mark).then_some(seen)
        })
        .unwrap()
    }
}

#[test]
fn a_killed_and_restarted_speaker_moves_no_route_at_the_router() {
    const ROUTES: u32 = 20_000;
    let Some(lab) = Lab::new(&BirdConfig::default()) else {
        return;
    };
    let mut speaker = child_process(&lab, ROUTES, false);
    holds(&lab, ROUTES as usize);
    wait_for("the router's kernel", SOON, || {
        (lab.kernel_routes().len() == ROUTES as usize).then_some(())
    })
    .unwrap();
    let monitor = Monitor::start(&lab);
    for _ in 0..2 {
        drop(speaker);
        wait_for("BIRD waiting for the restart", SOON, || {
            (!lab.birdc("show protocols node").contains("Established")).then_some(())
        })
        .unwrap();
        assert_eq!(
            lab.bird_holds(),
            ROUTES as usize,
            "kept while the speaker is away"
        );
        speaker = child_process(&lab, ROUTES, true);
        // A second restart before End-of-RIB flushes everything (RFC 4724 §4.2): wait until BIRD has it.
        wait_for("the end of the restart", SOON, || {
            let node = lab.birdc("show protocols all node");
            (node.contains("Established") && !node.contains("graceful restart active"))
                .then_some(())
        })
        .unwrap();
    }
    drop(speaker);
    // What BIRD would flush, it flushes at End-of-RIB. This run lacks one pair: once that is gone, all before it has happened.
    let last = child_process(&lab, ROUTES - 2, true);
    holds(&lab, ROUTES as usize - 2);
    wait_for("the router's kernel", SOON, || {
        (lab.kernel_routes().len() == ROUTES as usize - 2).then_some(())
    })
    .unwrap();
    let seen = monitor.mark(&lab, 2);
    drop(last);
    let moved: Vec<&str> = seen.lines().filter(|l| l.contains("proto bird")).collect();
    assert_eq!(
        moved.len(),
        2,
        "in three kills: {} events, from {:?}",
        moved.len(),
        moved.first()
    );
    assert!(moved.iter().all(|l| l.starts_with("Deleted")), "{moved:#?}");
}

#[test]
fn graceful_stop_leaves_routes_and_withdraw_takes_them() {
    let Some(lab) = Lab::new(&BirdConfig::default()) else {
        return;
    };
    for (mode, left) in [(StopMode::Graceful, 3), (StopMode::Withdraw, 0)] {
        let node = lab.node.run(|| Handle::start(&config(false), true));
        node.announce(routes(PAIR));
        node.wait_established();
        holds(&lab, 3);
        node.shutdown(mode);
        wait_for("BIRD seeing the end", SOON, || {
            (!lab.birdc("show protocols node").contains("Established")).then_some(())
        })
        .unwrap();
        assert_eq!(lab.bird_holds(), left, "{mode:?}");
    }
    let end = lab.birdc("show protocols all node");
    assert!(end.contains("Administrative shutdown"), "{end}");
}

#[test]
fn draining_marks_routes_for_graceful_shutdown() {
    let Some(lab) = Lab::new(&BirdConfig::default()) else {
        return;
    };
    lab.with_speaker(config(false), false, |node| {
        node.announce(routes(PAIR));
        holds(&lab, 3);
        assert!(!lab.birdc("show route all").contains("(65535,0)"));
        node.announce(set(
            PAIR.map(|p| p.parse().unwrap()),
            [Community::GRACEFUL_SHUTDOWN],
        ));
        wait_for("GRACEFUL_SHUTDOWN on every route", SOON, || {
            (lab.birdc("show route all").matches("(65535,0)").count() == 3).then_some(())
        })
        .unwrap();
        assert_eq!(lab.bird_holds(), 3, "marked, not withdrawn");
    });
}

#[test]
fn a_default_route_that_the_router_offers_never_enters() {
    let bird = BirdConfig {
        offers: vec!["0.0.0.0/0", "198.51.100.0/24", "::/0"],
        ..BirdConfig::default()
    };
    let Some(lab) = Lab::new(&bird) else { return };
    let before = lab.node_routes();
    lab.with_speaker(config(false), false, |node| {
        node.announce(routes(PAIR));
        holds(&lab, 3);
        wait_for("the offer counted", SOON, || {
            (node.status().ignored == 3).then_some(())
        })
        .unwrap();
        assert_eq!(node.status().state, "Established");
        assert_eq!(lab.node_routes(), before);
    });
}

#[test]
fn a_wrong_as_is_named_on_both_sides() {
    // BIRD is another than we expect: we refuse.
    let Some(lab) = Lab::new(&BirdConfig {
        asn: 64999,
        ..BirdConfig::default()
    }) else {
        return;
    };
    lab.with_speaker(config(false), false, |node| {
        node.announce(routes(PAIR));
        wait_for("our refusal", SOON, || {
            let error = node.status().last_error?;
            error.contains("Bad Peer AS").then_some(error)
        })
        .map(|error| {
            assert_eq!(
                error,
                "sent OPEN Message Error / Bad Peer AS (2/2); the peer says AS 64999, configured is AS 64512"
            );
        })
        .unwrap_or_else(|e| panic!("{e}: {:?}", node.status()));
    });
    // BIRD expects another than we are: it refuses.
    let Some(lab) = Lab::new(&BirdConfig {
        expects: 64999,
        ..BirdConfig::default()
    }) else {
        return;
    };
    lab.with_speaker(config(false), false, |node| {
        node.announce(routes(PAIR));
        wait_for("its refusal", SOON, || {
            let error = node.status().last_error?;
            (error == format!("received OPEN Message Error / Bad Peer AS (2/2); the peer does not expect AS {NODE_ASN}"))
                .then_some(())
        })
        .unwrap_or_else(|e| panic!("{e}: {:?}", node.status()));
    });
}

#[test]
fn md5_opens_with_the_key_and_names_a_wrong_one() {
    let bird = BirdConfig {
        key: Some("s3cret"),
        ..BirdConfig::default()
    };
    let Some(lab) = Lab::new(&bird) else { return };
    let key = lab.dir.path().join("key");
    let mut with_key = config(false);
    with_key.peers[0].md5_file = Some(key.clone());
    std::fs::write(&key, "s3cret\n").unwrap();
    lab.with_speaker(with_key.clone(), false, |node| {
        node.announce(routes(PAIR));
        holds(&lab, 3);
    });
    std::fs::write(&key, "wrong\n").unwrap();
    for (config, says) in [
        (with_key, "a wrong key looks exactly like this"),
        (config(false), "demands a TCP MD5 key"),
    ] {
        let started = Instant::now();
        lab.with_speaker(config, false, |node| {
            node.announce(routes(PAIR));
            wait_for(says, SOON, || {
                node.status().last_error?.contains(says).then_some(())
            })
            .unwrap_or_else(|e| panic!("{e}: {:?}", node.status()));
            assert_ne!(node.status().state, "Established");
        });
        assert!(
            started.elapsed() < Duration::from_secs(10),
            "named within 10 s"
        );
    }
}

#[test]
fn md5_holds_for_the_listener_as_well() {
    let bird = BirdConfig {
        key: Some("s3cret"),
        passive: false,
        ..BirdConfig::default()
    };
    let Some(lab) = Lab::new(&bird) else { return };
    let key = lab.dir.path().join("key");
    std::fs::write(&key, "s3cret").unwrap();
    for listen in ["[::]:179", "192.0.2.2:179"] {
        let mut listening = config(false);
        listening.listen = Some(listen.parse().unwrap());
        listening.peers[0].md5_file = Some(key.clone());
        listening.peers[0].port = 1;
        lab.with_speaker(listening, false, |node| {
            node.announce(routes(PAIR));
            node.wait_established();
            holds(&lab, 3);
        });
    }
}

#[test]
fn ttl_security_works_in_both_families() {
    for over_v6 in [false, true] {
        let Some(lab) = Lab::new(&BirdConfig {
            over_v6,
            gtsm: true,
            ..BirdConfig::default()
        }) else {
            return;
        };
        let mut near = config(over_v6);
        near.peers[0].gtsm = true;
        lab.with_speaker(near, false, |node| {
            node.announce(routes(PAIR));
            holds(&lab, 3);
        });
        // Without it our packets arrive with a TTL that BIRD takes for a stranger's.
        lab.with_speaker(config(over_v6), false, |node| {
            node.announce(routes(PAIR));
            wait_for("a reason", SOON, || node.status().last_error).unwrap();
            assert_ne!(node.status().state, "Established");
        });
    }
}

#[test]
fn a_family_that_cannot_be_sent_is_a_condition() {
    let Some(lab) = Lab::new(&BirdConfig {
        v6: false,
        ..BirdConfig::default()
    }) else {
        return;
    };
    lab.with_speaker(config(false), false, |node| {
        node.announce(routes(PAIR));
        holds(&lab, 1);
        let status = node.status();
        assert_eq!(
            status.condition.as_deref(),
            Some("the peer does not speak IPv6 unicast on this session")
        );
        assert_eq!(status.announced, 1);
    });
}

#[test]
fn twenty_thousand_routes_arrive() {
    let Some(lab) = Lab::new(&BirdConfig::default()) else {
        return;
    };
    lab.with_speaker(config(false), false, |node| {
        node.announce(routes(PAIR));
        holds(&lab, 3);
        let started = Instant::now();
        node.announce(blocks(20_000));
        holds(&lab, 20_000);
        println!("20,000 routes in {:?}", started.elapsed());
        // A refresh sends them all again and changes nothing.
        lab.birdc("reload in node");
        node.announce(set(PAIR.map(|p| p.parse().unwrap()), []));
        holds(&lab, 3);
    });
}

#[test]
fn a_silent_router_is_noticed_by_the_hold_timer() {
    let Some(lab) = Lab::new(&BirdConfig::default()) else {
        return;
    };
    let mut short = config(false);
    short.peers[0].hold = Duration::from_secs(3);
    lab.with_speaker(short, false, |node| {
        node.announce(routes(PAIR));
        node.wait_established();
        lab.tor.exec("link set down0 down").unwrap();
        wait_for("the hold timer", SOON, || {
            node.status()
                .last_error?
                .contains("Hold Timer Expired (4/0)")
                .then_some(())
        })
        .unwrap_or_else(|e| panic!("{e}: {:?}", node.status()));
        assert_ne!(node.status().state, "Established");
        lab.tor.exec("link set down0 up").unwrap();
        // The kernel takes IPv6 addresses off an interface that goes down.
        node.wait_established();
    });
}
