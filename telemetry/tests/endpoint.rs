//! The endpoint over real sockets: what it answers, what it refuses, and that nobody can hold it.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use kun_harness::wait_until;
use kun_telemetry::{Endpoint, Health, Metrics, ServeError, serve};
use prometheus_client::metrics::counter::Counter;

const ANY: SocketAddr = SocketAddr::new(std::net::IpAddr::V6(std::net::Ipv6Addr::LOCALHOST), 0);

/// Far beyond any answer.
const WITHIN: Duration = Duration::from_secs(20);

fn endpoint() -> (Endpoint, Metrics, Health) {
    let (metrics, health) = (Metrics::new("kun-test", "1.2.3"), Health::new());
    let endpoint = serve(ANY, metrics.clone(), health.clone()).expect("a free port");
    (endpoint, metrics, health)
}

fn connect(endpoint: &Endpoint) -> TcpStream {
    let stream = TcpStream::connect(endpoint.address()).expect("connected");
    stream.set_read_timeout(Some(WITHIN)).expect("a timeout");
    stream
}

fn ask(endpoint: &Endpoint, request: &str) -> String {
    let mut stream = connect(endpoint);
    stream.write_all(request.as_bytes()).expect("sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("answered");
    answer
}

fn get(endpoint: &Endpoint, path: &str) -> String {
    ask(endpoint, &format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n"))
}

#[test]
fn metrics_are_open_metrics_text() {
    let (endpoint, metrics, _) = endpoint();
    let counted = Counter::<u64>::default();
    metrics.register(|r| r.register("kun_test_events", "Events", counted.clone()));
    counted.inc_by(3);
    let answer = get(&endpoint, "/metrics");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    assert!(
        head.contains("Content-Type: application/openmetrics-text; version=1.0.0"),
        "{head}"
    );
    assert!(
        head.contains(&format!("Content-Length: {}\r\n", body.len())),
        "{head}"
    );
    assert!(
        body.contains("kun_build_info{program=\"kun-test\",version=\"1.2.3\"} 1\n"),
        "{body}"
    );
    assert!(body.contains("kun_test_events_total 3\n"), "{body}");
    assert!(body.ends_with("# EOF\n"), "{body}");
}

#[test]
fn ready_follows_the_program_and_healthy_does_not() {
    let (endpoint, _, health) = endpoint();
    assert!(get(&endpoint, "/readyz").starts_with("HTTP/1.1 503 "));
    assert!(get(&endpoint, "/healthz").starts_with("HTTP/1.1 200 "));
    health.set_ready(true);
    assert!(get(&endpoint, "/readyz?verbose").starts_with("HTTP/1.1 200 "));
}

#[test]
fn other_requests_are_refused() {
    let (endpoint, _, _) = endpoint();
    assert!(get(&endpoint, "/").starts_with("HTTP/1.1 404 "));
    assert!(ask(&endpoint, "POST /metrics HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 405 "));
    assert!(ask(&endpoint, "\u{1}\u{2}\r\n\r\n").starts_with("HTTP/1.1 405 "));
    let head = ask(&endpoint, "HEAD /metrics HTTP/1.1\r\n\r\n");
    assert!(
        head.starts_with("HTTP/1.1 200 ") && head.ends_with("\r\n\r\n"),
        "{head}"
    );
}

#[test]
fn an_endless_request_is_cut_off() {
    let (endpoint, _, _) = endpoint();
    let mut stream = connect(&endpoint);
    // Writing fails once the other side has answered and closed: that is the point.
    let _ = stream.write_all(&vec![b'x'; 64 << 10]);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    assert!(
        answer.is_empty() || answer.starts_with(b"HTTP/1.1 431 "),
        "{}",
        String::from_utf8_lossy(&answer)
    );
}

#[test]
fn silent_connections_do_not_keep_others_out_for_long() {
    let (endpoint, _, _) = endpoint();
    let silent: Vec<TcpStream> = (0..64).map(|_| connect(&endpoint)).collect();
    let answered = wait_until(WITHIN, || {
        let mut stream = connect(&endpoint);
        let mut answer = String::new();
        if stream.write_all(b"GET /healthz HTTP/1.1\r\n\r\n").is_ok() {
            // A refused connection is closed or reset without an answer.
            let _ = stream.read_to_string(&mut answer);
        }
        answer.starts_with("HTTP/1.1 200 ")
    });
    assert!(
        answered,
        "still shut out by {} silent connections",
        silent.len()
    );
}

#[test]
fn an_occupied_address_is_named_with_the_way_to_find_the_holder() {
    let holder = TcpListener::bind(ANY).expect("a free port");
    let address = holder.local_addr().expect("bound");
    let error = serve(address, Metrics::default(), Health::new()).expect_err("taken");
    assert!(matches!(error, ServeError::Occupied { .. }));
    let told = error.to_string();
    assert!(
        told.starts_with(&format!("{address}: the metrics address is taken")),
        "{told}"
    );
    assert!(
        told.contains(&format!("ss -ltnp 'sport = :{}'", address.port())),
        "{told}"
    );
}

#[test]
fn dropped_it_frees_its_address() {
    let (endpoint, metrics, health) = endpoint();
    let address = endpoint.address();
    drop(endpoint);
    let again = serve(address, metrics, health).expect("free again");
    assert!(get(&again, "/healthz").starts_with("HTTP/1.1 200 "));
}
