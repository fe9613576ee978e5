//! What an ADD makes while an agent makes its slot durable: it leads nowhere, and whatever the agent answers, or if it never does,
//! nothing of it stays that should not.

#![allow(missing_docs)]

mod node;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Stdio;
use std::time::Duration;

use kun_cni::clock;
use kun_cni::ipam::IpamService;
use kun_config::types::SlotClass;
use kun_control::{Request, Response};
use kun_harness::{require_root, wait_for};
use node::{Node, Pod};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(20);

/// An agent's end of a connection.
struct Connection(BufReader<UnixStream>);

impl Connection {
    fn accept(listener: &UnixListener) -> Self {
        Self(BufReader::new(listener.accept().unwrap().0))
    }

    fn next(&mut self) -> Option<Request> {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        (!line.is_empty()).then(|| serde_json::from_str(&line).unwrap())
    }

    fn tell(&mut self, response: &Response) {
        let line = serde_json::to_string(response).unwrap();
        writeln!(self.0.get_mut(), "{line}").unwrap();
    }

    /// Answers out of the service until the other end hangs up.
    fn serve(&mut self, service: &IpamService) {
        while let Some(request) = self.next() {
            self.tell(&service.handle(&request, clock::now()));
        }
    }
}

/// Waits until the node has so many ends of pairs, all tagged as of no slot, and no route to any.
fn await_unfinished(node: &Node, count: usize) {
    wait_for("the pairs", SOON, || {
        let links = node.netns.exec("link show type veth").unwrap();
        (links.matches("alias kun:0:kun/").count() == count).then_some(())
    })
    .unwrap();
    for family in ["-4", "-6"] {
        let routes = node.netns.exec(&format!("{family} route show proto 0x6b"));
        assert_eq!(routes.unwrap(), "");
    }
}

fn links_of(pod: &Pod) -> String {
    pod.netns.exec("-br link show type veth").unwrap()
}

fn allocated(service: &IpamService) -> u32 {
    [SlotClass::Dual, SlotClass::V6Only]
        .into_iter()
        .map(|class| service.counts(class, clock::now()).unwrap().0)
        .sum()
}

#[test]
fn a_refused_slot_leaves_no_interface() {
    if !require_root() {
        return;
    }
    let node = Node::new("split");
    let pod = Pod::new("c1", true);
    let listener = UnixListener::bind(node.parsed().agent.socket).unwrap();
    let error = std::thread::scope(|scope| {
        let adding = scope.spawn(|| node.add(&pod).unwrap_err());
        let mut asking = Connection::accept(&listener);
        assert!(matches!(asking.next(), Some(Request::Allocate { .. })));
        await_unfinished(&node, 2);
        let message = "no slot today".to_owned();
        asking.tell(&Response::Failed { message });
        adding.join().unwrap()
    });
    assert_eq!(error["details"], "no slot today");
    assert_eq!(node.leavings(), "");
    assert_eq!(links_of(&pod), "");
}

/// An agent that has no room for a connection says so and hangs up, before it has read what it is asked.
#[test]
fn the_one_word_of_an_agent_that_turns_it_away_is_told() {
    if !require_root() {
        return;
    }
    let node = Node::new("split");
    let pod = Pod::new("c1", true);
    let listener = UnixListener::bind(node.parsed().agent.socket).unwrap();
    let error = std::thread::scope(|scope| {
        // The pod does not say its class: there are two questions, and one answer.
        let adding = scope.spawn(|| node.verb("ADD", &pod, &node.network()).unwrap_err());
        let mut asking = Connection::accept(&listener);
        assert!(matches!(asking.next(), Some(Request::Class { .. })));
        assert!(matches!(asking.next(), Some(Request::Allocate { .. })));
        let message = "512 connections are open already; try again".to_owned();
        asking.tell(&Response::Failed { message });
        drop(asking);
        adding.join().unwrap()
    });
    assert_eq!(
        error["details"],
        "512 connections are open already; try again"
    );
    assert_eq!(node.leavings(), "");
}

#[test]
fn killed_while_it_waits_del_removes_the_pairs_and_releases_the_slot() {
    if !require_root() {
        return;
    }
    let node = Node::new("split");
    let pod = Pod::new("c1", true);
    let listener = UnixListener::bind(node.parsed().agent.socket).unwrap();
    let service = node.service();
    let path = pod.netns.path();
    let vars = pod.variables("ADD", &path);
    let vars: Vec<(&str, &str)> = vars.iter().map(|(n, v)| (*n, v.as_str())).collect();
    let mut command = node.command(&vars, pod.network(&node).to_string().as_bytes());
    command.stdout(Stdio::null());
    let mut adding = node.netns.run(|| command.spawn().unwrap());
    let mut asking = Connection::accept(&listener);
    let request = asking.next().expect("it asks for a slot");
    await_unfinished(&node, 2);
    adding.kill().unwrap();
    adding.wait().unwrap();
    // It was made durable; nobody hears of it any more.
    assert!(matches!(
        service.handle(&request, clock::now()),
        Response::Allocation { .. }
    ));
    drop(asking);
    std::thread::scope(|scope| {
        let deleting = scope.spawn(|| node.del(&pod).unwrap());
        Connection::accept(&listener).serve(&service);
        deleting.join().unwrap();
    });
    assert_eq!(node.leavings(), "");
    assert_eq!(links_of(&pod), "");
    assert_eq!(allocated(&service), 0);
}

/// Made while the slot is not known are the pairs that are certain; when it is known they are those that it needs.
#[test]
fn the_pairs_are_those_of_the_slot_whatever_was_made_before() {
    if !require_root() {
        return;
    }
    use SlotClass::{Dual, V6Only};
    for (asked, said, told, before) in [
        (None, Some(Dual), Dual, 2),
        (None, Some(V6Only), V6Only, 1),
        // An agent that does not know the question.
        (None, None, Dual, 1),
        (None, None, V6Only, 1),
        // What it says changes before the slot is taken.
        (None, Some(Dual), V6Only, 2),
        (None, Some(V6Only), Dual, 1),
        (Some(false), None, V6Only, 1),
        (Some(true), None, Dual, 2),
        // The slot is one that it has since an ADD of which nobody heard the end.
        (Some(true), None, V6Only, 2),
    ] {
        let node = Node::new("split");
        let pod = Pod::new("c1", asked == Some(true));
        let network = match asked {
            Some(_) => pod.network(&node),
            None => node.network(),
        };
        let listener = UnixListener::bind(node.parsed().agent.socket).unwrap();
        let service = node.service();
        // Each verb on so many connections.
        let verb = |verb: &str, network: &Value, connections: usize| -> Option<Value> {
            std::thread::scope(|scope| {
                let asking = scope.spawn(|| node.verb(verb, &pod, network).unwrap());
                for _ in 0..connections {
                    let mut connection = Connection::accept(&listener);
                    while let Some(mut request) = connection.next() {
                        if let Request::Class { .. } = request {
                            let message = "what?".to_owned();
                            connection.tell(&said.map_or(Response::Failed { message }, |class| {
                                Response::Class { class }
                            }));
                            continue;
                        }
                        if let Request::Allocate { class, .. } = &mut request {
                            *class = Some(told);
                            await_unfinished(&node, before);
                        }
                        connection.tell(&service.handle(&request, clock::now()));
                    }
                }
                asking.join().unwrap()
            })
        };
        let result = verb("ADD", &network, 1).expect("ADD has a result");
        let pairs = match told {
            SlotClass::Dual => 2,
            SlotClass::V6Only => 1,
        };
        assert_eq!(
            links_of(&pod).lines().count(),
            pairs,
            "{asked:?} {said:?} {told:?}"
        );
        let links = node.netns.exec("link show type veth").unwrap();
        assert_eq!(links.matches("alias kun:1:kun/c1/eth0").count(), pairs);
        assert_eq!(links.matches("alias kun:").count(), pairs);
        assert_eq!(result["interfaces"].as_array().unwrap().len(), 2 * pairs);
        let mut checked = network.clone();
        checked["prevResult"] = result;
        assert_eq!(verb("CHECK", &checked, 2), None);
        verb("DEL", &network, 1);
        assert_eq!(node.leavings(), "");
        assert_eq!(links_of(&pod), "");
    }
}

/// Two ADDs of one attachment into two namespaces, as a runtime that was restarted may have them: the one that comes second to the
/// node's names fails, and takes neither the first one's interfaces nor its slot.
#[test]
fn of_two_adds_at_once_the_second_leaves_the_first_alone() {
    if !require_root() {
        return;
    }
    let node = Node::new("split");
    let (pod, other) = (Pod::new("c1", true), Pod::new("c1", true));
    let listener = UnixListener::bind(node.parsed().agent.socket).unwrap();
    let service = node.service();
    std::thread::scope(|scope| {
        let first = scope.spawn(|| node.add(&pod).unwrap());
        let mut waiting = Connection::accept(&listener);
        let allocate = waiting.next().expect("it asks for a slot");
        await_unfinished(&node, 2);

        let second = scope.spawn(|| node.add(&other).unwrap_err());
        Connection::accept(&listener).serve(&service);
        let error = second.join().unwrap();
        let details = error["details"].as_str().unwrap();
        assert!(
            details.contains("the attachment stands already"),
            "{details}"
        );
        await_unfinished(&node, 2);

        waiting.tell(&service.handle(&allocate, clock::now()));
        waiting.serve(&service);
        let result = first.join().unwrap();
        assert_eq!(result["interfaces"].as_array().unwrap().len(), 4);
    });
    assert_eq!(links_of(&pod).lines().count(), 2);
    assert_eq!(links_of(&other), "");
    assert_eq!(allocated(&service), 1);
}
