//! `kunctl ipam release` and `kunctl ipam rebuild` by hand, as an operator does it: against a real agent, with living pods, with and
//! without a terminal; and what agent and plugin say of a store that they cannot read.

mod rig;

use std::fs;
use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use kun_control::{Request, Response, SlotRow};
use kun_harness::{Netns, require_tool, wait_for};
use rig::{Node, Pod};
use serde_json::{Value, json};

/// A look is made every five seconds; a busy machine takes its time.
const SOON: Duration = Duration::from_secs(60);

/// The shortest that can be configured, and a few looks.
const QUARANTINED_WITHIN: Duration = Duration::from_secs(150);

fn slots(node: &Node) -> Vec<SlotRow> {
    match node.ask(&Request::Ipam) {
        Response::Ipam { slots, .. } => slots,
        other => panic!("{other:?}"),
    }
}

fn row(node: &Node, address: IpAddr) -> Option<SlotRow> {
    let of =
        |row: &SlotRow| IpAddr::V6(row.v6) == address || row.v4.map(IpAddr::V4) == Some(address);
    slots(node).into_iter().find(of)
}

/// Exit code, standard output, standard error.
fn told(output: &Output) -> (i32, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let code = output.status.code().unwrap();
    (code, text(&output.stdout), text(&output.stderr))
}

fn kunctl(node: &Node, words: &[&str]) -> (i32, String, String) {
    let mut command = node.kunctl();
    command.args(words).stdin(Stdio::null());
    told(&node.netns.output(command).unwrap())
}

/// The same at a terminal, where a person types these lines: exit code, and all that the terminal shows.
fn at_a_terminal(node: &Node, words: &[&str], typed: &str) -> (i32, String) {
    let mut kunctl = node.kunctl();
    kunctl.args(words);
    let all = [kunctl.get_program()].into_iter().chain(kunctl.get_args());
    let line: Vec<String> = all
        .map(|word| word.to_string_lossy().into_owned())
        .collect();
    let mut script = Command::new("script");
    script
        .args([
            "--quiet",
            "--return",
            "--command",
            &line.join(" "),
            "/dev/null",
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    let output = node.netns.run(|| {
        let mut child = script.spawn().unwrap();
        let mut input = child.stdin.take().unwrap();
        input.write_all(typed.as_bytes()).unwrap();
        drop(input);
        child.wait_with_output().unwrap()
    });
    let (code, shown, _) = told(&output);
    (code, shown)
}

#[test]
fn release_asks_twice_and_spares_the_living() {
    if !require_tool("script") {
        return;
    }
    let Some(mut node) = Node::prepare_beside("release") else {
        return;
    };
    node.configure(|config| {
        config["ipam"]["cooldown"] = "1s".into();
        config["ipam"]["quarantineAfter"] = "1m".into();
    });
    node.spawn();
    let (living, gone) = (node.server("living"), node.pod("gone"));
    // One whose network never forgets: it will be quarantined.
    let address = gone.v6;
    node.manifest(
        "stale.yaml",
        &[json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {"name": "stale", "namespace": "default", "labels": {"kubernetes.io/service-name": "old"}},
            "addressType": "IPv6", "ports": [], "endpoints": [{"addresses": [address.to_string()]}]})],
    );
    node.remove(gone);
    let v6 = living.v6.to_string();
    let held = row(&node, living.v6.into()).unwrap();
    let generation = held.generation.to_string();

    // Without a terminal nothing is guessed, and the line to write is told.
    let (code, out, error) = kunctl(&node, &["ipam", "release", &v6]);
    assert_eq!((code, out.as_str()), (1, ""), "{error}");
    assert!(
        error.contains(&format!("--yes and --generation {generation}")),
        "{error}"
    );
    let wrong = (held.generation + 1).to_string();
    let yes = |generation: &str| {
        kunctl(
            &node,
            &["ipam", "release", &v6, "--yes", "--generation", generation],
        )
    };
    let (code, _, error) = yes(&wrong);
    assert_eq!(code, 1);
    assert!(
        error.contains(&format!("has generation {generation}, not {wrong}")),
        "{error}"
    );
    // With it, the agent looks: the pod lives.
    let (code, _, error) = yes(&generation);
    assert_eq!(code, 1);
    assert!(error.contains("--force"), "{error}");
    // At a terminal it asks whether, and then for the address; the answer of the agent is the same.
    for (typed, asked) in [
        ("n\n", 1),
        ("y\n10.64.0.63\n", 2),
        ("y\nyes\n", 2),
        ("\n", 1),
    ] {
        let (code, shown) = at_a_terminal(&node, &["ipam", "release", &v6], typed);
        assert_eq!(code, 1, "{typed:?}: {shown}");
        assert!(shown.contains("pod default/living"), "{shown}");
        assert_eq!(
            shown.contains("once more"),
            asked == 2,
            "{typed:?}: {shown}"
        );
        assert!(shown.contains("nothing was changed"), "{typed:?}: {shown}");
    }
    let (code, shown) = at_a_terminal(&node, &["ipam", "release", &v6], &format!("y\n{v6}\n"));
    assert_eq!(code, 1, "{shown}");
    assert!(shown.contains("--force"), "{shown}");
    let after = row(&node, living.v6.into()).unwrap();
    assert_eq!(
        (after.state, after.generation),
        ("allocated".to_owned(), held.generation)
    );

    // One that nobody has, and what is no address.
    let (code, _, error) = kunctl(&node, &["ipam", "release", "10.64.0.63"]);
    assert_eq!(code, 1);
    assert!(
        error.contains("10.64.0.63 is free, or no slot of this node"),
        "{error}"
    );
    assert_eq!(kunctl(&node, &["ipam", "release", "front"]).0, 2);

    // By force, what lives goes too; its interfaces follow, since the store knows their time is over.
    let (code, out, error) = kunctl(
        &node,
        &[
            "ipam",
            "release",
            &v6,
            "--yes",
            "--force",
            "--generation",
            &generation,
        ],
    );
    assert_eq!(code, 0, "{error}");
    assert!(out.contains("let go"), "{out}");
    assert!(row(&node, living.v6.into()).is_none_or(|row| row.state != "allocated"));
    wait_for("its interfaces going", SOON, || {
        let links = living.netns.exec("-br link show type veth").unwrap();
        links.is_empty().then_some(())
    })
    .unwrap();

    // That one is let go by hand, after it was told why.
    let quarantined = wait_for("quarantine", QUARANTINED_WITHIN, || {
        row(&node, address.into()).filter(|row| row.state == "quarantined")
    })
    .unwrap();
    assert!(
        quarantined
            .why
            .iter()
            .any(|line| line.contains("default/stale")),
        "{quarantined:?}"
    );
    let (code, shown) = at_a_terminal(
        &node,
        &["ipam", "release", &address.to_string(), "--output", "json"],
        &format!("y\n{address}\n"),
    );
    assert_eq!(code, 0, "{shown}");
    assert!(shown.contains("default/stale"), "{shown}");
    // What was typed is shown before it is asked for.
    let answer = &shown[shown.find("{\"is\"").unwrap_or_else(|| panic!("{shown}"))..];
    let answer: Value = serde_json::from_str(answer.trim()).unwrap();
    assert_eq!(
        serde_json::from_value::<Response>(answer).unwrap(),
        Response::Done
    );
    wait_for("the address being free", SOON, || {
        row(&node, address.into()).is_none().then_some(())
    })
    .unwrap();

    // Without an agent there is nobody to ask.
    node.kill();
    assert_eq!(kunctl(&node, &["ipam", "release", &v6]).0, 3);
}

/// Ways in which a file goes bad, and what they leave of these bytes.
fn damages(good: &[u8]) -> Vec<(&'static str, Vec<u8>)> {
    let changed = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = good.to_vec();
        change(&mut bytes);
        bytes
    };
    vec![
        (
            "its head flipped",
            changed(&|b| b[..9].iter_mut().for_each(|b| *b ^= 0x5a)),
        ),
        (
            "every page's bytes flipped",
            changed(&|b| b.iter_mut().skip(4096).step_by(7).for_each(|b| *b ^= 1)),
        ),
        ("cut in the middle", changed(&|b| b.truncate(b.len() / 2))),
        ("cut within its head", changed(&|b| b.truncate(100))),
        ("cut to nothing", Vec::new()),
        ("zeroes", vec![0; good.len()]),
        (
            "another format's version",
            changed(&|b| {
                b[64] = 99;
                b[192] = 99;
            }),
        ),
        ("another program's file", b"SQLite format 3\0".repeat(300)),
    ]
}

/// Counts connections that failed, until it is stopped: a client of the pods.
fn traffic(from: &Netns, to: &[SocketAddr], stop: &AtomicBool, made: &AtomicU32) -> Vec<String> {
    let mut failed = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        for to in to {
            match rig::name_over_tcp(from, *to) {
                Ok(_) => drop(made.fetch_add(1, Ordering::Relaxed)),
                Err(e) => failed.push(format!("{to}: {e}")),
            }
        }
    }
    failed
}

#[test]
fn a_damaged_store_is_refused_by_all_and_rebuilt_under_living_pods() {
    let Some(mut node) = Node::prepare_beside("rebuild") else {
        return;
    };
    node.spawn();
    // What a speaker would have told.
    for route in [
        "10.64.0.0/26 via 192.0.2.2",
        "fd00:64::a40:0/122 via 2001:db8::2",
    ] {
        node.fabric.exec(&format!("route add {route}")).unwrap();
    }
    let store = node.path("state").join("ipam.redb");
    let one = node.server("one");
    node.terminate();
    let older = fs::read(&store).unwrap();
    node.spawn();
    let (two, gone) = (node.server("two"), node.pod("gone"));
    let went = gone.v6;
    node.remove(gone);
    node.terminate();
    let good = fs::read(&store).unwrap();
    let to: Vec<SocketAddr> = [&one, &two]
        .iter()
        .flat_map(|pod| [IpAddr::V6(pod.v6), IpAddr::V4(pod.v4)])
        .map(|address| SocketAddr::new(address, 8080))
        .collect();
    let (stop, made) = (AtomicBool::new(false), AtomicU32::new(0));
    let failed = std::thread::scope(|scope| {
        let client = scope.spawn(|| traffic(&node.fabric, &to, &stop, &made));
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            fs::remove_file(&store).unwrap();
            refused(&node, "removed");
            assert!(!store.exists(), "none is made by the way");
            rebuilt(&node, "removed");
            for (what, bad) in damages(&good) {
                fs::write(&store, &bad).unwrap();
                refused(&node, what);
                assert_eq!(
                    fs::read(&store).unwrap(),
                    bad,
                    "{what}: it is left as it was"
                );
                rebuilt(&node, what);
            }
            // Whole, and of an earlier time: of one pod it knows nothing, and would give its address to the next.
            fs::write(&store, &older).unwrap();
            refused(&node, "an older copy");
            rebuilt(&node, "an older copy");
        }));
        stop.store(true, Ordering::Relaxed);
        let failed = client.join().unwrap();
        done.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        failed
    });
    assert_eq!(failed, Vec::<String>::new(), "traffic went on");
    assert!(made.load(Ordering::Relaxed) > 100, "{made:?}");

    // A sound one is nobody's to replace.
    let (code, _, error) = kunctl(&node, &["ipam", "rebuild"]);
    assert_eq!(code, 1);
    assert!(error.contains("sound"), "{error}");

    // An agent takes it over: the living have what they had, all else cools, and nobody gets any of it meanwhile.
    node.spawn();
    keeps(&node, [&one, &two]);
    assert_eq!(row(&node, went.into()).unwrap().state, "cooling");
    let full = node.try_pod("early", &json!({})).unwrap_err();
    assert!(
        full.contains("\"code\":11") && full.contains("cooling"),
        "{full}"
    );
    // While it runs, nobody takes the store from under it.
    let (code, _, error) = kunctl(&node, &["ipam", "rebuild"]);
    assert_eq!(code, 1);
    assert!(error.contains("another process"), "{error}");
    // The old pods go as any.
    let addresses = [one.v6, two.v6];
    node.remove(one);
    node.remove(two);
    for address in addresses {
        assert_eq!(row(&node, address.into()).unwrap().state, "cooling");
    }
}

/// A disk that is rolled back under an agent, or an agent that could see no interfaces when it began.
#[test]
fn an_agent_that_sees_what_its_store_cannot_have_made_gives_no_more_addresses() {
    let Some(mut node) = Node::prepare_beside("older") else {
        return;
    };
    node.spawn();
    let one = node.pod("one");
    let generation = row(&node, one.v6.into()).unwrap().generation;
    node.netns
        .exec("link add kun-later type veth peer name later")
        .unwrap();
    let alias = format!("kun:{}:kun/container-later/eth0", generation + 1);
    node.netns
        .exec(&format!("link set kun-later alias {alias}"))
        .unwrap();
    wait_for("the next look", SOON, || {
        let log = node.log();
        log.contains("no address is given any more").then_some(())
    })
    .unwrap();
    let refusal = node.try_pod("two", &json!({})).unwrap_err();
    for part in [
        "older copy",
        "kun-later of container container-later",
        "`kunctl ipam rebuild`",
    ] {
        assert!(refusal.contains(part), "{refusal}");
    }
    // DEL works, and what it gives back waits for a store that can be believed.
    node.remove(one);
    assert_eq!(fs::read_dir(node.path("state/spool")).unwrap().count(), 1);
    // Without the evidence the next one begins as ever.
    node.netns.exec("link del kun-later").unwrap();
    node.terminate();
    node.spawn();
    node.pod("three");
}

/// The two have what they had.
fn keeps(node: &Node, pods: [&Pod; 2]) {
    for pod in pods {
        let row = row(node, pod.v6.into()).unwrap();
        assert_eq!(row.state, "allocated", "{row:?}");
        assert_eq!(row.v4, Some(pod.v4));
        assert_eq!(row.key.container_id, format!("container-{}", pod.name));
    }
}

/// Neither the agent nor the plugin alone begins with it, and both say what to do.
fn refused(node: &Node, what: &str) {
    let remedy = "`kunctl ipam rebuild`";
    let said = node.run_agent(&[]);
    let line = said.lines().find(|line| line.starts_with("kun-proxy: "));
    let line = line.unwrap_or_else(|| panic!("{what}: {said}"));
    assert!(
        line.contains("ipam.redb") && line.contains(remedy),
        "{what}: {line}"
    );
    let early = Netns::new("p-early").unwrap();
    for verb in ["ADD", "STATUS"] {
        let (done, said) = node.cni(verb, "early", &early, &json!({}));
        assert!(!done, "{what}: {verb}");
        assert!(
            said.contains("ipam.redb") && said.contains(remedy),
            "{what}: {verb}: {said}"
        );
    }
}

/// The operator does what was said.
fn rebuilt(node: &Node, what: &str) {
    let directory = node.path("results").display().to_string();
    let words = [
        "ipam",
        "rebuild",
        "--results",
        &directory,
        "--output",
        "json",
    ];
    let (code, out, error) = kunctl(node, &words);
    assert_eq!(code, 0, "{what}: {error}");
    let answer: Response =
        serde_json::from_str(&out).unwrap_or_else(|e| panic!("{what}: {e}: {out}"));
    assert_eq!(answer, Response::Done, "{what}");
}
