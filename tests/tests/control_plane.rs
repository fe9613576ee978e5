//! The control plane that tests use is a real one: its controllers make EndpointSlices, and nothing of it stays.

use std::time::Duration;

use kun_harness::{skip, wait_for};
use kun_tests::control_plane::{ControlPlane, binary};

/// Controllers act within a second; a busy machine takes a few.
const ACTS_WITHIN: Duration = Duration::from_secs(60);

/// The controllers leave out pods of nodes that do not exist.
const SHOP: &str = r#"
apiVersion: v1
kind: Node
metadata: {name: node-a}
---
apiVersion: v1
kind: Service
metadata: {name: front}
spec:
  ipFamilyPolicy: RequireDualStack
  selector: {app: front}
  ports: [{name: http, port: 80, targetPort: 8080}]
---
apiVersion: v1
kind: Pod
metadata: {name: front-0, labels: {app: front}}
spec:
  nodeName: node-a
  automountServiceAccountToken: false
  containers: [{name: c, image: nothing}]
"#;

#[test]
fn controllers_make_endpointslices() {
    if !binary().is_file() {
        skip("the control plane is not built: cargo xtask peers");
        return;
    }
    let plane = ControlPlane::start(&["node-a"]).unwrap();
    plane.kubectl(&["apply", "-f", "-"], SHOP).unwrap();
    // What a kubelet would say of the pod.
    let status = r#"{"status":{"phase":"Running","podIP":"10.64.0.1","podIPs":[{"ip":"10.64.0.1"},{"ip":"2001:db8::1"}],"conditions":[{"type":"Ready","status":"True"}]}}"#;
    plane
        .kubectl(
            &[
                "patch",
                "pod",
                "front-0",
                "--subresource=status",
                "-p",
                status,
            ],
            "",
        )
        .unwrap();
    let addresses = ["-o", "jsonpath={.items[*].endpoints[*].addresses[0]}"];
    let query = [
        "get",
        "endpointslices",
        "-l",
        "kubernetes.io/service-name=front",
        addresses[0],
        addresses[1],
    ];
    let mut seen = wait_for("both EndpointSlices", ACTS_WITHIN, || {
        let text = plane.kubectl(&query, "").ok()?;
        let found: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
        (found.len() == 2).then_some(found)
    })
    .unwrap();
    seen.sort();
    assert_eq!(seen, ["10.64.0.1", "2001:db8::1"]);

    let dir = plane.dir().to_owned();
    let server = plane.server().trim_start_matches("https://").to_owned();
    drop(plane);
    assert!(!dir.exists(), "{} is left", dir.display());
    assert!(
        std::net::TcpStream::connect(server).is_err(),
        "the API server still answers"
    );
}
