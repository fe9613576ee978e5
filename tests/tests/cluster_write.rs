//! The operator's door for writes against a real API server: what it does is done once, and what it must not do it refuses by name.

use std::time::Duration;

use kun_cluster::api::write::{Expected, WriteError, Writer};
use kun_cluster::{Kind, ObjectName, Resource};
use kun_harness::control_plane::ControlPlane;
use serde_json::json;

/// A kind that no controller of the test's control plane writes to.
const SERVICES: Resource = Resource::of(Kind::Service);

fn text(value: &serde_json::Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

#[test]
fn nothing_is_written_over_unseen() {
    let Some(plane) = ControlPlane::shared() else {
        return;
    };
    let namespace = plane.namespace("write").unwrap();
    let writer = Writer::open(Some(plane.kubeconfig())).unwrap();
    let name = ObjectName::new(namespace.name(), "front");
    let front = json!({
        "metadata": {"namespace": namespace.name(), "name": "front", "labels": {}},
        "spec": {"type": "LoadBalancer", "ports": [{"port": 80}]},
    });
    let made = writer.create(SERVICES, &front).unwrap();
    assert!(matches!(
        writer.create(SERVICES, &front),
        Err(WriteError::Exists { .. })
    ));

    // Two read the same; the second to write is told.
    let (mut mine, mut theirs) = (made.clone(), made.clone());
    mine["metadata"]["labels"]["who"] = json!("me");
    theirs["metadata"]["labels"]["who"] = json!("they");
    let now = writer.replace(SERVICES, &mine).unwrap();
    let conflict = writer.replace(SERVICES, &theirs).unwrap_err();
    assert!(
        matches!(conflict, WriteError::Conflict { .. }),
        "{conflict}"
    );
    assert!(
        conflict.to_string().starts_with(&format!(
            "update services {name}: changed since it was read"
        )),
        "{conflict}"
    );
    let mut blind = now.clone();
    blind["metadata"]
        .as_object_mut()
        .unwrap()
        .remove("resourceVersion");
    assert!(matches!(
        writer.replace(SERVICES, &blind),
        Err(WriteError::Malformed { .. })
    ));
    assert_eq!(
        text(&writer.get(SERVICES, &name).unwrap()["metadata"]["labels"]["who"]),
        "me"
    );

    // A status is a resource of its own.
    let status = json!({"status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.1"}]}}});
    let now = writer.patch_status(SERVICES, &name, &status).unwrap();
    assert_eq!(
        text(&now["status"]["loadBalancer"]["ingress"][0]["ip"]),
        "192.0.2.1"
    );
    let stale =
        json!({"metadata": {"resourceVersion": made["metadata"]["resourceVersion"]}, "status": {}});
    assert!(matches!(
        writer.patch_status(SERVICES, &name, &stale),
        Err(WriteError::Conflict { .. })
    ));

    // A delete means one object, and not the next of its name.
    let expected = |object: &serde_json::Value| Expected {
        uid: Some(text(&object["metadata"]["uid"])),
        resource_version: Some(text(&object["metadata"]["resourceVersion"])),
    };
    assert!(matches!(
        writer.delete(SERVICES, &name, &expected(&made)),
        Err(WriteError::Conflict { .. })
    ));
    writer.delete(SERVICES, &name, &expected(&now)).unwrap();
    writer.create(SERVICES, &front).unwrap();
    let of_the_old = Expected {
        resource_version: None,
        ..expected(&now)
    };
    assert!(matches!(
        writer.delete(SERVICES, &name, &of_the_old),
        Err(WriteError::Conflict { .. })
    ));
    writer
        .delete(SERVICES, &name, &Expected::default())
        .unwrap();
    assert!(matches!(
        writer.delete(SERVICES, &name, &Expected::default()),
        Err(WriteError::NotFound { .. })
    ));
}

#[test]
fn a_lease_has_one_holder() {
    let Some(plane) = ControlPlane::shared() else {
        return;
    };
    let namespace = plane.namespace("lease").unwrap();
    let writer = Writer::open(Some(plane.kubeconfig())).unwrap();
    let name = ObjectName::new(namespace.name(), "leader");
    assert!(writer.lease(&name).unwrap().is_none());
    let lease = |holder: &str| {
        serde_json::from_value(json!({"metadata": {"namespace": &*name.namespace, "name": "leader"},
            "spec": {"holderIdentity": holder, "leaseDurationSeconds": 15, "renewTime": "2026-01-01T00:00:00.000000Z"}}))
        .unwrap()
    };
    let first = writer.create_lease(&lease("a")).unwrap();
    assert!(matches!(
        writer.create_lease(&lease("b")),
        Err(WriteError::Exists { .. })
    ));
    let read = writer.lease(&name).unwrap().unwrap();
    assert_eq!(read, first);
    let with = |holder: &str| {
        let mut lease = read.clone();
        if let Some(spec) = &mut lease.spec {
            spec.holder_identity = Some(holder.to_owned());
        }
        lease
    };
    let held = writer.update_lease(&with("b")).unwrap();
    assert_eq!(held.spec.unwrap().holder_identity.as_deref(), Some("b"));
    assert!(matches!(
        writer.update_lease(&with("c")),
        Err(WriteError::Conflict { .. })
    ));
}

#[test]
fn events_are_recorded_and_missing_rights_are_named() {
    let Some(plane) = ControlPlane::shared() else {
        return;
    };
    let namespace = plane.namespace("events").unwrap();
    let writer = Writer::open(Some(plane.kubeconfig())).unwrap();
    let event = json!({
        "metadata": {"generateName": "kun-", "namespace": namespace.name()}, "eventTime": "2026-01-01T00:00:00.000000Z",
        "type": "Warning", "reason": "Braked", "action": "Hold", "note": "held back", "reportingController": "kun.network/operator",
        "reportingInstance": "a", "regarding": {"apiVersion": "v1", "kind": "Service", "namespace": namespace.name(), "name": "front"},
    });
    writer
        .record(&serde_json::from_value(event).unwrap())
        .unwrap();
    let recorded = writer
        .list(Resource::EVENTS, Some(namespace.name()))
        .unwrap();
    assert_eq!(text(&recorded["items"][0]["reason"]), "Braked");

    let dir = tempfile::tempdir().unwrap();
    let (token, kubeconfig) = (dir.path().join("token"), dir.path().join("kubeconfig"));
    plane
        .write_token(
            namespace.name(),
            "default",
            Duration::from_secs(600),
            &token,
        )
        .unwrap();
    plane.token_kubeconfig(&token, &kubeconfig).unwrap();
    let nobody = Writer::open(Some(&kubeconfig)).unwrap();
    let front = ObjectName::new(namespace.name(), "front");
    let error = nobody
        .patch_status(SERVICES, &front, &json!({"status": {}}))
        .unwrap_err();
    assert!(
        matches!(&error, WriteError::Forbidden { verb: "patch", resource, group: "", .. } if resource == "services/status"),
        "{error}"
    );
    let error = nobody
        .create(
            Resource::LEASES,
            &json!({"metadata": {"namespace": namespace.name(), "name": "x"}}),
        )
        .unwrap_err();
    let told = error.to_string();
    assert!(
        told.starts_with("no right to `create` `leases` of coordination.k8s.io: "),
        "{told}"
    );
}

#[test]
fn a_token_that_has_expired_is_read_anew_before_anybody_is_told() {
    let Some(plane) = ControlPlane::shared() else {
        return;
    };
    let namespace = plane.namespace("token").unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (token, kubeconfig) = (dir.path().join("token"), dir.path().join("kubeconfig"));
    std::fs::write(&token, "no token at all").unwrap();
    plane.token_kubeconfig(&token, &kubeconfig).unwrap();
    let writer = Writer::open(Some(&kubeconfig)).unwrap();
    let name = ObjectName::new(namespace.name(), "leader");
    assert!(matches!(
        writer.lease(&name),
        Err(WriteError::Unauthorized { .. })
    ));
    plane
        .write_token(
            namespace.name(),
            "default",
            Duration::from_secs(600),
            &token,
        )
        .unwrap();
    // Known now, and without rights.
    assert!(matches!(
        writer.lease(&name),
        Err(WriteError::Forbidden { .. })
    ));
}

#[test]
fn a_server_that_is_gone_is_no_answer() {
    let dir = tempfile::tempdir().unwrap();
    let kubeconfig = dir.path().join("kubeconfig");
    let text = "apiVersion: v1\nkind: Config\nclusters: [{name: c, cluster: {server: 'http://127.0.0.1:1'}}]\nusers: [{name: u, user: {}}]\n\
        contexts: [{name: x, context: {cluster: c, user: u}}]\ncurrent-context: x\n";
    std::fs::write(&kubeconfig, text).unwrap();
    let writer = Writer::open(Some(&kubeconfig)).unwrap();
    let error = writer.get(SERVICES, &ObjectName::new("", "a")).unwrap_err();
    assert!(matches!(error, WriteError::Unreachable { .. }), "{error}");
    assert!(error.to_string().contains("refused"), "{error}");
}
