//! The API source against a real control plane that is killed, frozen, made to forget, lied about and replaced. In each case nothing
//! is lost and nothing invented (the store equals a fresh list), nobody panics, and the thread that follows does not spin.
//!
//! What no real server can be made to do in a test's time is tried in virtual time: `cluster/core/tests/watch_sim.rs`.

mod case;

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use case::{Case, KINDS, TOLD_WITHIN, alone, pace, service};
use kun_cluster::api::ApiSource;
use kun_cluster::api::write::{Expected, Writer};
use kun_cluster::watch::Pace;
use kun_cluster::{Delta, Kind, ObjectName, Resource, Source, Wanted};
use kun_harness::control_plane::{ControlPlane, Part};
use kun_harness::wait_for;
use kun_tests::faulty_proxy::FaultyProxy;
use kun_tests::rig;
use kun_tests::watcher::Watcher;

#[test]
fn a_server_that_is_killed_comes_back() {
    let _alone = alone();
    let Some(builder) = ControlPlane::builder() else {
        return;
    };
    let mut plane = builder.start().unwrap();
    let admin = plane.kubeconfig().to_owned();
    let mut case = Case::new(&admin, &admin, pace()).unwrap().synced().unwrap();
    case.create(&service("before")).unwrap();
    case.has_service("before").unwrap();
    let lists = case.lists();
    plane.kill(Part::ApiServer).unwrap();
    case.while_it("no server", |case| {
        case.sees("that it is gone", |w| {
            w.told.iter().any(|t| t.contains("cannot be reached"))
        })?;
        // What was read stays in force.
        ensure!(
            case.watcher
                .store
                .service(&ObjectName::new("default", "before"))
                .is_some()
        );
        ensure!(
            case.watcher
                .deltas
                .iter()
                .all(|d| !matches!(d, Delta::Remove(..))),
            "{:?}",
            case.watcher.deltas
        );
        Ok(())
    })
    .unwrap();
    plane.start(Part::ApiServer, &[]).unwrap();
    case.create(&service("after")).unwrap();
    case.has_service("after").unwrap();
    case.sees("no trouble", |w| w.troubles().now().is_empty())
        .unwrap();
    case.equals_a_fresh_list(&admin).unwrap();
    // What its watch cache has forgotten with the restart is listed once, and no more.
    assert!(
        case.lists() <= lists + KINDS.len() as u64,
        "{:?}",
        case.counts()
    );
}

#[test]
fn a_server_that_forgot_is_listed_and_compared() {
    let _alone = alone();
    let Some(builder) = ControlPlane::builder() else {
        return;
    };
    let mut plane = builder
        .controller_flags(&["--controllers=*,-node-lifecycle-controller"])
        .start()
        .unwrap();
    let admin = plane.kubeconfig().to_owned();
    let second = plane.add_api_server(&[]).unwrap();
    let mut case = Case::new(&admin, &second.kubeconfig, pace())
        .unwrap()
        .synced()
        .unwrap();
    for name in ["a", "b"] {
        case.create(&rig::node(name)).unwrap();
        case.create(&service(name)).unwrap();
    }
    case.has_service("b").unwrap();
    case.sees("node b", |w| w.store.node("b").is_some())
        .unwrap();
    let uid = case.watcher.store.node("a").map(|n| n.meta.uid.clone());
    // While it is dead: a service goes, and a node is replaced under its name.
    plane.kill(Part::ApiServer).unwrap();
    case.delete(Kind::Service, "default", "a").unwrap();
    case.delete(Kind::Node, "", "a").unwrap();
    case.create(&rig::node("a")).unwrap();
    plane.compact().unwrap();
    plane.start(Part::ApiServer, &[]).unwrap();
    case.sees("another node a", |w| {
        w.store
            .node("a")
            .is_some_and(|n| Some(&n.meta.uid) != uid.as_ref())
    })
    .unwrap();
    case.sees("no service a", |w| {
        w.store.service(&ObjectName::new("default", "a")).is_none()
    })
    .unwrap();
    let gone: u64 = case.counts().iter().map(|(_, c)| c.gone).sum();
    assert!(gone > 0, "nothing was forgotten: {:?}", case.counts());
    let removed = case
        .watcher
        .deltas
        .iter()
        .any(|d| matches!(d, Delta::Remove(Kind::Node, n) if *n.name == *"a"));
    assert!(removed, "the old node was not removed first");
    case.equals_a_fresh_list(&admin).unwrap();
}

#[test]
fn a_frozen_server_is_noticed_and_thaws() {
    let _alone = alone();
    let Some(builder) = ControlPlane::builder() else {
        return;
    };
    let mut plane = builder.start().unwrap();
    let admin = plane.kubeconfig().to_owned();
    let pace = Pace {
        silent_at_most: Duration::from_secs(5),
        answer_within: Duration::from_secs(3),
        ..pace()
    };
    let mut case = Case::new(&admin, &admin, pace).unwrap().synced().unwrap();
    case.create(&service("before")).unwrap();
    case.has_service("before").unwrap();
    plane.freeze(Part::ApiServer).unwrap();
    case.while_it("a frozen server", |case| {
        case.sees("that it is frozen", |w| {
            w.told.iter().any(|t| t.contains("cannot be reached"))
        })
    })
    .unwrap();
    assert!(
        case.watcher
            .deltas
            .iter()
            .all(|d| !matches!(d, Delta::Remove(..)))
    );
    plane.thaw(Part::ApiServer).unwrap();
    case.create(&service("after")).unwrap();
    case.has_service("after").unwrap();
    case.equals_a_fresh_list(&admin).unwrap();
}

#[test]
fn refusals_are_borne_and_retry_after_is_honoured() {
    let _alone = alone();
    let Some(plane) = ControlPlane::shared() else {
        return;
    };
    let admin = plane.kubeconfig().to_owned();
    let proxy = FaultyProxy::start(&admin).unwrap();
    // Refused from the first request on.
    for status in [500, 503, 429, 410, 504] {
        proxy.faults().refuse.extend([(status, None); 4]);
    }
    let case = Case::new(&proxy.kubeconfig(), &admin, pace()).unwrap();
    let mut case = case.synced().unwrap();
    assert!(
        case.watcher
            .told
            .iter()
            .any(|t| t.contains("the proxy says")),
        "{:?}",
        case.watcher.told
    );
    case.sees("no trouble", |w| w.troubles().now().is_empty())
        .unwrap();
    for status in [429, 500, 503] {
        proxy
            .faults()
            .refuse
            .extend([(status, Some(3)); KINDS.len()]);
        let before = proxy.requests();
        let begin = Instant::now();
        proxy.cut();
        let refused = KINDS.len() as u64;
        wait_for("the refusals", TOLD_WITHIN, || {
            (proxy.requests() >= before + refused).then_some(())
        })
        .unwrap();
        let name = format!("s{status}");
        case.create(&service(&name)).unwrap();
        case.while_it("refused", |case| case.has_service(&name))
            .unwrap();
        assert!(
            begin.elapsed() >= Duration::from_secs(3),
            "{status}: asked again after {:?}",
            begin.elapsed()
        );
        case.sees("no trouble", |w| w.troubles().now().is_empty())
            .unwrap();
    }
    case.equals_a_fresh_list(&admin).unwrap();
    case.clear().unwrap();
}

#[test]
fn streams_that_are_cut_in_the_middle_lose_nothing() {
    let _alone = alone();
    let Some(plane) = ControlPlane::shared() else {
        return;
    };
    let admin = plane.kubeconfig().to_owned();
    let proxy = FaultyProxy::start(&admin).unwrap();
    let pace = Pace {
        wait_first: Duration::from_millis(20),
        wait_at_most: Duration::from_millis(200),
        ..pace()
    };
    let mut case = Case::new(&proxy.kubeconfig(), &admin, pace)
        .unwrap()
        .synced()
        .unwrap();
    let lists = case.lists();
    for i in 0..60 {
        case.create(&service(&format!("s{i}"))).unwrap();
        if i % 4 == 0 {
            proxy.cut();
        }
        if i % 3 == 0 && i > 0 {
            case.delete(Kind::Service, "default", &format!("s{}", i - 1))
                .unwrap();
        }
    }
    case.has_service("s59").unwrap();
    case.equals_a_fresh_list(&admin).unwrap();
    assert_eq!(
        case.lists(),
        lists,
        "a cut cost a list: {:?}",
        case.counts()
    );
    case.clear().unwrap();
}

#[test]
fn a_watch_that_lies_is_found_out() {
    let _alone = alone();
    let Some(plane) = ControlPlane::shared() else {
        return;
    };
    let admin = plane.kubeconfig().to_owned();
    let proxy = FaultyProxy::start(&admin).unwrap();
    let pace = Pace {
        check_every: Duration::from_secs(4),
        check_per_object: Duration::ZERO,
        confirm_after: Duration::from_secs(2),
        ..pace()
    };
    let mut case = Case::new(&proxy.kubeconfig(), &admin, pace)
        .unwrap()
        .synced()
        .unwrap();
    case.create(&service("doomed")).unwrap();
    case.has_service("doomed").unwrap();
    proxy.faults().swallow = Some("\"namespace\":\"default\"".to_owned());
    case.create(&service("unheard")).unwrap();
    case.delete(Kind::Service, "default", "doomed").unwrap();
    // Something else is heard, so both must have been swallowed.
    case.create(&rig::namespace("heard")).unwrap();
    case.sees("the namespace", |w| w.store.namespace("heard").is_some())
        .unwrap();
    assert!(
        case.watcher
            .store
            .service(&ObjectName::new("default", "unheard"))
            .is_none()
    );
    proxy.faults().swallow = None;
    case.has_service("unheard").unwrap();
    case.sees("the deletion", |w| {
        w.store
            .service(&ObjectName::new("default", "doomed"))
            .is_none()
    })
    .unwrap();
    case.sees("that it was found out", |w| {
        w.told.iter().any(|t| t.contains("lost or invented"))
    })
    .unwrap();
    let repaired: u64 = case.counts().iter().map(|(_, c)| c.repaired).sum();
    assert!(repaired >= 2, "{:?}", case.counts());
    case.equals_a_fresh_list(&admin).unwrap();
    case.sees("no trouble", |w| w.troubles().now().is_empty())
        .unwrap();
    case.clear().unwrap();
}

#[test]
fn a_token_that_expires_is_read_anew() {
    let _alone = alone();
    let Some(plane) = ControlPlane::shared() else {
        return;
    };
    let admin = plane.kubeconfig().to_owned();
    let dir = tempfile::tempdir().unwrap();
    let (token, kubeconfig) = (dir.path().join("token"), dir.path().join("kubeconfig"));
    plane
        .kubectl(&["create", "serviceaccount", "reader", "-n", "default"], "")
        .unwrap();
    let all = "--verb=list,watch";
    let resources = "--resource=services,nodes,namespaces,endpointslices.discovery.k8s.io,leases.coordination.k8s.io";
    plane
        .kubectl(&["create", "clusterrole", "reader", all, resources], "")
        .unwrap();
    plane
        .kubectl(
            &[
                "create",
                "clusterrolebinding",
                "reader",
                "--clusterrole=reader",
                "--serviceaccount=default:reader",
            ],
            "",
        )
        .unwrap();
    plane
        .write_token("default", "reader", Duration::from_secs(5), &token)
        .unwrap();
    plane.token_kubeconfig(&token, &kubeconfig).unwrap();
    // Asks anew every two to four seconds: a stream that stands outlives its token.
    let pace = Pace {
        watch_for: Duration::from_secs(2),
        healthy_after: Duration::from_secs(1),
        ..pace()
    };
    let mut case = Case::new(&kubeconfig, &admin, pace)
        .unwrap()
        .synced()
        .unwrap();
    case.while_it("an expired token", |case| {
        case.sees("that it is refused", |w| {
            w.told.iter().any(|t| t.contains("does not know us"))
        })
    })
    .unwrap();
    case.create(&service("meanwhile")).unwrap();
    plane
        .write_token("default", "reader", Duration::from_secs(600), &token)
        .unwrap();
    case.has_service("meanwhile").unwrap();
    case.sees("no trouble", |w| w.troubles().now().is_empty())
        .unwrap();
    // Rotated in time, nobody notices.
    plane
        .write_token("default", "reader", Duration::from_secs(600), &token)
        .unwrap();
    case.create(&service("after")).unwrap();
    case.has_service("after").unwrap();
    case.equals_a_fresh_list(&admin).unwrap();
    case.clear().unwrap();
}

#[test]
fn a_missing_right_is_named() {
    let _alone = alone();
    let Some(plane) = ControlPlane::shared() else {
        return;
    };
    let admin = plane.kubeconfig().to_owned();
    let dir = tempfile::tempdir().unwrap();
    let (token, kubeconfig) = (dir.path().join("token"), dir.path().join("kubeconfig"));
    plane
        .kubectl(&["create", "serviceaccount", "nobody", "-n", "default"], "")
        .unwrap();
    plane
        .write_token("default", "nobody", Duration::from_secs(600), &token)
        .unwrap();
    plane.token_kubeconfig(&token, &kubeconfig).unwrap();
    let mut case = Case::new(&kubeconfig, &admin, pace()).unwrap();
    case.sees("the right", |w| {
        w.told.iter().any(|t| {
            t.starts_with(
                "no right to `watch` `endpointslices` of discovery.k8s.io in all namespaces",
            )
        })
    })
    .unwrap();
    assert!(!case.watcher.synced, "half a view was called whole");
    // The source of our own kinds says what to do.
    let own = Watcher::new(
        Source::Api(Box::new(ApiSource::open(Some(&admin)).unwrap())),
        Wanted::new().all([Kind::IpPool]),
    );
    let mut own = own.unwrap();
    own.until("the missing kind", TOLD_WITHIN, |w| {
        w.told.iter().any(|t| t.contains("apply deploy/crds"))
    })
    .unwrap();
    assert!(!own.synced);
    // Granted, it goes on by itself.
    plane
        .kubectl(
            &[
                "create",
                "clusterrolebinding",
                "nobody",
                "--clusterrole=cluster-admin",
                "--serviceaccount=default:nobody",
            ],
            "",
        )
        .unwrap();
    case.watcher.until_synced(TOLD_WITHIN).unwrap();
    case.sees("no trouble", |w| w.troubles().now().is_empty())
        .unwrap();
    case.clear().unwrap();
}

#[test]
fn a_change_over_to_another_server_is_no_event_and_to_other_data_is_one() {
    let _alone = alone();
    let Some(builder) = ControlPlane::builder() else {
        return;
    };
    let mut plane = builder.start().unwrap();
    let admin = plane.kubeconfig().to_owned();
    let second = plane.add_api_server(&[]).unwrap();
    let proxy = FaultyProxy::start(&admin).unwrap();
    let mut case = Case::new(&proxy.kubeconfig(), &admin, pace())
        .unwrap()
        .synced()
        .unwrap();
    case.create(&service("before")).unwrap();
    case.has_service("before").unwrap();
    let lists = case.lists();
    proxy.change_over(&second.kubeconfig);
    case.create(&service("after")).unwrap();
    case.has_service("after").unwrap();
    assert_eq!(
        case.lists(),
        lists,
        "the same data was listed again: {:?}",
        case.counts()
    );
    case.equals_a_fresh_list(&second.kubeconfig).unwrap();
    // Another etcd, restored from an older day: everything is different, and its versions are lower.
    (0..200).for_each(|i| drop(case.create(&service(&format!("s{i}"))).unwrap()));
    case.has_service("s199").unwrap();
    let Some(other) = ControlPlane::builder() else {
        return;
    };
    let other = other.start().unwrap();
    proxy.change_over(other.kubeconfig());
    case.sees("what is not there is gone", |w| {
        w.store
            .service(&ObjectName::new("default", "s199"))
            .is_none()
    })
    .unwrap();
    case.sees("that it was older", |w| {
        w.told
            .iter()
            .any(|t| t.contains("older than resourceVersion"))
    })
    .unwrap();
    case.equals_a_fresh_list(other.kubeconfig()).unwrap();
}

#[test]
fn ten_thousand_services_come_and_go() {
    const SERVICES: usize = 10_000;
    const WRITERS: usize = 8;
    let _alone = alone();
    let Some(builder) = ControlPlane::builder() else {
        return;
    };
    let flags = [
        "--max-requests-inflight=10000",
        "--max-mutating-requests-inflight=10000",
    ];
    let plane = builder.apiserver_flags(&flags).start().unwrap();
    let admin = plane.kubeconfig().to_owned();
    let mut case = Case::new(&admin, &admin, pace()).unwrap().synced().unwrap();
    let write = |all: &(dyn Fn(&Writer, usize) -> Result<()> + Sync)| {
        std::thread::scope(|scope| {
            for first in 0..WRITERS {
                let admin = &admin;
                scope.spawn(move || {
                    let writer = Writer::open(Some(admin)).unwrap();
                    (first..SERVICES)
                        .step_by(WRITERS)
                        .for_each(|i| all(&writer, i).unwrap());
                });
            }
        });
    };
    let resource = Resource::of(Kind::Service);
    write(&|writer, i| {
        Ok(writer
            .create(resource, &service(&format!("s{i}")))
            .map(drop)?)
    });
    case.sees("all of them", |w| {
        w.store
            .services()
            .filter(|s| s.meta.name.name.starts_with('s'))
            .count()
            == SERVICES
    })
    .unwrap();
    case.equals_a_fresh_list(&admin).unwrap();
    write(&|writer, i| {
        let name = ObjectName::new("default", &format!("s{i}"));
        Ok(writer.delete(resource, &name, &Expected::default())?)
    });
    case.sees("none of them", |w| {
        w.store
            .services()
            .all(|s| !s.meta.name.name.starts_with('s'))
    })
    .unwrap();
    case.equals_a_fresh_list(&admin).unwrap();
    assert!(case.watcher.told.is_empty(), "{:?}", case.watcher.told);
}
